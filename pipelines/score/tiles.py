"""Score tiles on the workers.

One tile of listings is scored against a chunk of audience rows. Then each row's best listings are
ranked.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.utils.shared import Shared
from numpy.typing import NDArray

from camenn_model.data.feature_space import NUMERIC_GROUPS, CatalogFeatures
from pipelines.features.as_of import ItemAttributes, item_attributes
from pipelines.features.time_index import Ints
from pipelines.io import cache, files, objects
from pipelines.io.tables import FileRecord
from pipelines.runner.console import ProgressFile
from pipelines.runner.memory import release_memory
from pipelines.runs.copies import package_directory
from pipelines.runs.manifest import check_records
from pipelines.score.audience_rows import AudienceRows
from pipelines.score.snapshot import Snapshot
from schemas.scores import LISTING_QUALITY, SCORES
from schemas.training import ITEMS

if TYPE_CHECKING:
    from camenn_model.config import ModelConfig
    from camenn_model.data.item_table import ItemTable
    from camenn_model.model.camenn import CameNN
    from camenn_model.package import Package
    from camenn_model.scoring.scorer import Scorer
    from camenn_model.scoring.shortlist import Shortlist


TIMED = 256
"""Listings and audience rows of the tile that `--plan` times."""
AGAIN = "Run `camenn score` again: its embeddings are copied again from the store."
ITEMS_READ = [name for name in ITEMS.names if name not in ("title", "image_uri")]
"""Columns of the items that workers read"""


@dataclass(frozen=True)
class Tile:
    """Listings to score against one chunk of audience rows.

    They are [first, last) of a store's list (places in `rows`).
    """

    chunk: int
    audience: tuple[int, int]
    rows: bytes
    """item rows, int32 little-endian"""

    def item_rows(self) -> Ints:
        """Return the item rows, int64 [I]."""
        return np.frombuffer(self.rows, dtype=np.int32).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class WorkerInput:
    """The locations of a worker's inputs.

    The submitter writes them all under the run's directory.
    """

    out: str
    """Output whose `contents/` are read"""
    directory: str
    """Of the run"""
    model: str
    """Directory of the package's run"""
    images: tuple[FileRecord, ...]
    titles: tuple[FileRecord, ...]
    by_ranges: bool
    """Whether single rows of them are read from the object store, and no file is copied"""
    top_k: int
    precision: str
    progress: str | None
    shared: Shared = field(default_factory=Shared)
    """Caches a process's inputs for all DoFns that share it"""


def make_scorer(model: "CameNN", precision: str, top_k: int) -> "Scorer | Shortlist":
    """Make the scorer for `--precision`."""
    from camenn_model.scoring.scorer import Scorer
    from camenn_model.scoring.shortlist import Shortlist

    return Shortlist(model, top_k) if precision == "bf16" else Scorer(model)


def _read_part(directory: str, name: str, columns: list[str] | None = None) -> pa.Table:
    """Read a table that the submitter wrote with `write_table`.

    With `columns`, only these are read.
    """
    with files.open_read(files.join(directory, name, "part-0.parquet")) as handle:
        return pq.read_table(handle, columns=columns)


@dataclass(frozen=True)
class _Loaded:
    """The data that all DoFns of a process read.

    They are its threads', and none of them writes to it.
    """

    package: "Package"
    model: "CameNN"
    table: "ItemTable"
    attributes: ItemAttributes
    snapshot: Snapshot
    audience: AudienceRows
    candidates: Ints | None
    """Places of the pairs that were asked for, audience row × listings + item row, in order"""


def _load(given: WorkerInput) -> _Loaded:
    from camenn_model.package import read_package

    package = read_package(package_directory(given.model))
    items = _read_part(given.directory, "items", ITEMS_READ)
    catalog_features = _read_part(given.directory, "catalog_features", list(CatalogFeatures._fields))
    found = CatalogFeatures(*(catalog_features[name].to_numpy() for name in CatalogFeatures._fields))
    table = open_items(given, items, package.config).encode(package.space, found)
    asked = _read_part(given.directory, "candidate_rows")
    return _Loaded(
        package=package,
        model=package.model(),
        table=table,
        attributes=item_attributes(items),
        snapshot=Snapshot.read(files.join(given.directory, "snapshot")),
        audience=AudienceRows.read(_read_part(given.directory, "audience_features")),
        candidates=(
            asked["audience"].to_numpy() * np.int64(len(table)) + asked["item"].to_numpy() if asked.num_rows else None
        ),
    )


def open_items(given: WorkerInput, items: pa.Table, config: "ModelConfig") -> "ItemTable":
    """Open the items, with contents mapped or read by ranges."""
    from camenn_model.data.item_table import ItemTable

    if given.by_ranges:
        check_records([*given.images, *given.titles], AGAIN)
        sizes = ([(record.path, record.bytes) for record in kind] for kind in (given.images, given.titles))
        return ItemTable.of_ranges(items, *sizes, read=objects.read_ranges, config=config)
    images, titles = (cache.local_copies(given.out, kind, AGAIN) for kind in (given.images, given.titles))
    return ItemTable.of_files(items, images, titles, config)


class ScoreTile(beam.DoFn):
    """A step from a tile to its rows' best.

    It yields (chunk, Arrow IPC of its rows' best: audience row, item row, cvr). A process loads its
    inputs once, whatever the number of its threads.
    """

    def __init__(self, given: WorkerInput) -> None:
        self.given = given

    def setup(self) -> None:
        import torch

        # With more, sums are added in another order, and where two experts' gate logits are all but
        # equal another one is chosen: measured on an undertrained model, 5 of 720 pairs moved by up
        # to 4e-6. Processes use the cores as well as threads do.
        torch.set_num_threads(1)
        self.loaded = self.given.shared.acquire(lambda: _load(self.given), self.given.directory)
        self.package, self.table = self.loaded.package, self.loaded.table
        self.attributes, self.snapshot = self.loaded.attributes, self.loaded.snapshot
        self.audience, self.candidates = self.loaded.audience, self.loaded.candidates
        # A thread's own: a shortlist learns as it goes.
        self.scorer: Any = make_scorer(self.loaded.model, self.given.precision, self.given.top_k)
        self.latest: tuple[int, Any] | None = None
        self.progress = ProgressFile(self.given.progress)
        release_memory()

    def process(self, tile: Tile) -> Iterator[tuple[int, bytes]]:
        import torch

        first, last = tile.audience
        rows = tile.item_rows()
        audience = self._audience(tile)
        columns = self.snapshot.tile(
            self.audience.user[first:last],
            self.audience.store[first:last],
            rows,
            self.attributes.subcategory[rows],
            self.attributes.brand[rows],
        )
        values, buckets = encode_tile(self.package.space.numbers, columns, (last - first, len(rows)))
        allowed = None
        if self.candidates is not None:
            wanted = np.arange(first, last)[:, None] * np.int64(len(self.table)) + rows[None, :]
            place = np.minimum(np.searchsorted(self.candidates, wanted), len(self.candidates) - 1)
            allowed = self.candidates[place] == wanted
        logits = self.scorer.score_tile(
            self.scorer.item_states(self.table.batch(rows)),
            audience,
            torch.from_numpy(values),
            torch.from_numpy(buckets),
            None if allowed is None else torch.from_numpy(allowed),
        ).numpy()
        cvr = self.package.calibration(logits).astype(np.float32)
        self.progress.add(cvr.size if allowed is None else int(allowed.sum()))
        yield tile.chunk, files.ipc_bytes(best_of(cvr, np.arange(first, last), rows, self.given.top_k, allowed))

    def _audience(self, tile: Tile) -> Any:
        # Only the previous tile's chunk is cached: a chunk's states are large (0.15 MB a row in
        # `small`), and recomputing them costs a hundredth of a whole tile's time.
        if self.latest is None or self.latest[0] != tile.chunk:
            batch, history = self.audience.batch(slice(*tile.audience))
            self.latest = tile.chunk, self.scorer.audience_states(batch, self.table.history(history))
        return self.latest[1]


def measure_pace(
    package: "Package", items: pa.Table, audience: AudienceRows, met: Ints, precision: str, top_k: int
) -> float:
    """Measure the seconds for one pair on one thread.

    The thread is of this machine.

    The scored tile has real audience rows and real listings (`met`: their rows) without embeddings
    and counts, which do not affect its time.
    """
    import torch

    from camenn_model.data.contents import Contents
    from camenn_model.data.item_table import ItemTable

    config = package.config
    images = Contents([], "image_key", (config.patch_grid**2, config.image_width))
    titles = Contents([], "title_key", (config.text_tokens, config.text_width))
    table = ItemTable(items, images, titles).encode(package.space)
    scorer: Any = make_scorer(package.model(), precision, top_k)
    rows = met[:TIMED]
    batch, history = audience.batch(slice(0, TIMED))
    shape = (len(batch.cats), len(rows), len(tile_numbers()))
    values, buckets = torch.zeros(shape), torch.zeros(shape, dtype=torch.int64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = []
    try:
        for _ in range(2):
            started = time.monotonic()
            states = scorer.audience_states(batch, table.history(history))
            scorer.score_tile(scorer.item_states(table.batch(rows)), states, values, buckets)
            seconds.append(time.monotonic() - started)
    finally:
        torch.set_num_threads(threads)
    return min(seconds) / (shape[0] * shape[1])


def tile_numbers() -> list[str]:
    """List the numbers that each pair of a tile has."""
    return [*NUMERIC_GROUPS["item_counts"], *NUMERIC_GROUPS["pair_counts"]]


def encode_tile(
    numbers: dict[str, Any], columns: dict[str, NDArray[np.float32]], shape: tuple[int, int]
) -> tuple[NDArray[np.float32], Ints]:
    """Encode each column, then broadcast it to [S, I, n].

    Returns (values float32, buckets int64), [S, I, n]. Each column is encoded at its own, smaller
    shape and then broadcast.
    """
    names = tile_numbers()
    values = np.empty((*shape, len(names)), dtype=np.float32)
    buckets = np.empty((*shape, len(names)), dtype=np.int64)
    for place, name in enumerate(names):
        values[..., place], buckets[..., place] = numbers[name].encode(columns[name])
    return values, buckets


def best_of(
    cvr: NDArray[np.float32], audience: Ints, items: Ints, top_k: int, allowed: NDArray[np.bool_] | None
) -> pa.Table:
    """Return the `top_k` best of each row of cvr.

    cvr is [S, I], `top_k` 0 = all. Ties go by item row. The result is a table (audience, item,
    cvr).
    """
    order = np.lexsort((np.broadcast_to(items, cvr.shape), -cvr), axis=1)
    if allowed is not None:
        # Candidates first, still by falling cvr: a stable sort keeps the order within.
        order = np.take_along_axis(
            order, np.argsort(~np.take_along_axis(allowed, order, axis=1), axis=1, kind="stable"), axis=1
        )
    if top_k:
        order = order[:, :top_k]
    keep = np.ones(order.shape, dtype=bool) if allowed is None else np.take_along_axis(allowed, order, axis=1)
    rows = np.broadcast_to(audience[:, None], order.shape)[keep]
    return pa.table(
        {
            "audience": rows.astype(np.int32),
            "item": items[order][keep].astype(np.int32),
            "cvr": np.take_along_axis(cvr, order, axis=1)[keep],
        }
    )


class RankChunk(beam.DoFn):
    """A step from a chunk's tiles to its published rows.

    It takes all tiles of an audience chunk and yields the published rows of its audience.
    """

    def __init__(self, directory: str, top_k: int, model_version: str) -> None:
        self.directory = directory
        self.top_k = top_k
        self.model_version = model_version

    def setup(self) -> None:
        self.audience_ids, self.item_ids = (
            _read_part(self.directory, name, [column])[column].combine_chunks()
            for name, column in (("audience", "audience_id"), ("items", "item_id"))
        )

    def process(self, element: tuple[int, Iterable[bytes]]) -> Iterator[pa.Table]:
        _, pieces = element
        table = pa.concat_tables([files.ipc_table(piece) for piece in pieces])
        audience, item, cvr = (table[name].to_numpy() for name in ("audience", "item", "cvr"))
        order = np.lexsort((item, -cvr, audience))
        audience, item, cvr = audience[order], item[order], cvr[order]
        first = np.searchsorted(audience, audience)
        rank = np.arange(len(audience)) - first + 1
        keep = rank <= self.top_k if self.top_k else np.ones(len(rank), dtype=bool)
        yield pa.table(
            {
                "audience_id": self.audience_ids.take(pa.array(audience[keep])),
                "item_id": self.item_ids.take(pa.array(item[keep])),
                "cvr": cvr[keep],
                "rank": rank[keep].astype(np.int32),
                "model_version": pa.repeat(self.model_version, int(keep.sum())),
            },
            schema=SCORES.schema,
        )


class JudgeListings(beam.DoFn):
    """A step that makes the whole catalog's listing_quality table.

    The input element is ignored. One step makes the whole table, as percentiles need all of the
    catalog.
    """

    def __init__(self, directory: str, model_version: str) -> None:
        self.directory = directory
        self.model_version = model_version

    def process(self, element: None) -> Iterator[pa.Table]:
        from camenn_model.content.agreement import Judgement
        from camenn_model.content.listing_quality import Activity, judge

        items, activity = _read_part(self.directory, "items", ITEMS_READ), _read_part(self.directory, "activity")
        found = _read_part(self.directory, "catalog_features", list(Judgement.__dataclass_fields__))
        judged = judge(
            items,
            Judgement(**{name: found[name].to_numpy() for name in found.column_names}),
            Activity(*(activity[name].to_numpy() for name in ("clicks", "orders"))),
        )
        yield judged.append_column("model_version", pa.repeat(self.model_version, judged.num_rows)).cast(
            LISTING_QUALITY.schema
        )
