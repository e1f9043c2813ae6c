"""The catalog joined with its embeddings' keys and quality figures: the `items` table that shards and score share."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import apache_beam as beam
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from camenn_model.encoder_spec import normalise_title
from camenn_model.integrity import DamagedError
from pipelines import files
from pipelines.catalog import read_catalog
from pipelines.inference import content_key
from pipelines.manifest import Manifest, check_records
from pipelines.store import CONTENTS, ROW_GROUP, chunk_name
from pipelines.tables import FileRecord, Source
from schemas.contract import InputError
from schemas.embeddings import embedding_shape
from schemas.training import ITEMS

CONTENT_FILE_BYTES = 128 * 2**20
"""Embeddings of a contents file, at most: they are in memory while it is written"""


def read_stored(manifest: Manifest, table: str, columns: list[str]) -> pa.Table:
    """Read columns, not the embeddings, of a store table.

    One row per content key: the first by path wins where a retry wrote a key twice. Beside the columns `part` and
    `group`: the number of the part among the sorted paths, and of the row group in it.
    """
    paths = sorted(manifest.paths(table))
    pieces = []
    for number, path in enumerate(paths):
        with files.open_read(path) as handle:
            parquet = pq.ParquetFile(handle)
            piece = parquet.read(columns=columns)
            rows = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
        groups = np.repeat(np.arange(len(rows), dtype=np.int32), rows)
        piece = piece.append_column("part", pa.array(np.full(piece.num_rows, number, dtype=np.int32)))
        pieces.append(piece.append_column("group", pa.array(groups)))
    if not pieces:
        return pa.table(
            {name: pa.array([], pa.string() if name.endswith("_key") else pa.float32()) for name in columns}
            | {name: pa.array([], pa.int32()) for name in ("part", "group")}
        )
    stored = pa.concat_tables(pieces).replace_schema_metadata(None)
    frame = stored.select([columns[0]]).to_pandas()
    first = ~frame[columns[0]].duplicated().to_numpy()
    return stored.filter(pa.array(first))


def _gather(stored: pa.Table, key: str, wanted: pa.ChunkedArray, columns: list[str]) -> dict[str, pa.Array]:
    row = pc.index_in(wanted, stored[key])
    return {name: stored[name].take(row.combine_chunks()) for name in columns}


AS_THEY_ARE = (
    "item_id",
    "category",
    "subcategory",
    "brand",
    "product_key",
    "store_id",
    "image_uri",
    "listed_at",
    "price",
)
"""Columns of the catalog that the items have too."""


def load_items(stage: str, source: Source, store: Manifest) -> tuple[pa.Table, pa.Table, dict[str, int]]:
    """The `items` table of a catalog under a pinned store run: (items ordered by item_id, rejects, counts).

    Raises:
        InputError: listings of the catalog were never embedded, or have another title or photo address since.
    """
    catalog, rejects, counts = read_catalog(stage, source)
    names = ["item_id", "title_key", "image_key", "image_uri"]
    embedded = [pq.read_table(files.open_read(path), columns=names) for path in store.paths("items")]
    keys = pa.concat_tables(embedded) if embedded else pa.table({name: pa.array([], pa.string()) for name in names})
    row = pc.index_in(catalog["item_id"], keys["item_id"])
    if row.null_count:
        missing = catalog["item_id"].filter(pc.is_null(row))
        raise InputError(
            f"{source.files[0]}: {len(missing):,} of {catalog.num_rows:,} listings are not in the embedding store (item_id '{missing[0]}' is the first). "
            "Run `camenn embed` on this catalog first."
        )
    keys = keys.take(row.combine_chunks())
    titles = [normalise_title(text) for text in catalog["title"].to_pylist()]
    title_keys = pa.array([content_key(title.encode()) if title else None for title in titles], pa.string())
    for name, now, then in (
        ("title", title_keys, keys["title_key"]),
        ("image_uri", catalog["image_uri"], keys["image_uri"]),
    ):
        other = pc.not_equal(pc.fill_null(now, ""), pc.fill_null(then, "")).to_numpy(zero_copy_only=False)
        if other.any():
            # What is published would stand beside another photo or title than it was computed from.
            raise InputError(
                f"{source.files[0]}: column '{name}' of {other.sum():,} of {catalog.num_rows:,} listings is not what was embedded (item_id '{catalog['item_id'][int(np.argmax(other))]}' is the first). "
                "Run `camenn embed` on this catalog first."
            )
    images = read_stored(store, "image_embeddings", ["image_key", "blur", "luminance", "width", "height"])
    title_rows = read_stored(store, "title_embeddings", ["title_key", "tokens", "unknown_share"])
    image = _gather(images, "image_key", keys["image_key"], ["image_key", "blur", "luminance", "width", "height"])
    title = _gather(title_rows, "title_key", keys["title_key"], ["title_key", "tokens", "unknown_share"])
    megapixels = pc.divide(
        pc.multiply(pc.cast(image["width"], pa.float32()), pc.cast(image["height"], pa.float32())), 1e6
    )
    columns = {
        **{name: catalog[name] for name in AS_THEY_ARE},
        "title": pa.array([title or None for title in titles], pa.string()),
        # A photo that could not be decoded has a key in the store's items but no embedding: the listing has no photo.
        "image_key": image["image_key"],
        "title_key": title["title_key"],
        "price_relative": relative_price(catalog["price"], catalog["subcategory"]),
        "blur": image["blur"],
        "luminance": image["luminance"],
        "megapixels": pc.cast(megapixels, pa.float32()),
        "title_tokens": pc.cast(title["tokens"], pa.float32()),
        "unknown_share": title["unknown_share"],
    }
    return pa.table({name: columns[name] for name in ITEMS.names}).cast(ITEMS.schema), rejects, counts


def relative_price(price: pa.ChunkedArray, subcategory: pa.ChunkedArray) -> pa.Array:
    """log(price / median price of the subcategory), float32 [n]; null where the price is unknown or not positive."""
    frame = pd.DataFrame(
        {"price": price.to_pandas().to_numpy(dtype=np.float64), "group": subcategory.to_pandas().fillna("")}
    )
    frame.loc[~(frame["price"] > 0), "price"] = np.nan
    median = frame.groupby("group")["price"].transform("median")
    values = np.log((frame["price"] / median).to_numpy(dtype=np.float64)).astype(np.float32)
    return pa.array(values, mask=~np.isfinite(values))


@dataclass(frozen=True)
class ContentJob:
    """Rows of some store parts that become one contents file."""

    kind: str
    groups: tuple[tuple[str, tuple[int, ...]], ...]
    """Store parts, by path, and the row groups of each that have the rows"""
    wanted: str
    """Path of an Arrow IPC stream: the content keys to copy from there, ordered.

    A job is part of the pipeline that is submitted: a name, not the keys.
    """


def plan_contents(
    kind: str, store: Manifest, wanted: pa.ChunkedArray, present: list[str], directory: str
) -> list[ContentJob]:
    """Plan how the embeddings of `wanted` keys are copied.

    Keys that a file of `present` holds already are left out. All jobs together are one pass over the store's parts: in
    order of keys, which are hashes and lie in all parts, they would be as many passes as there are files. Each job's
    keys are written under `directory`.
    """
    key, table = f"{kind[:-1]}_key", f"{kind[:-1]}_embeddings"
    stored = read_stored(store, table, [key])
    keep = pc.is_in(stored[key], pc.drop_null(wanted).unique())
    for path in present:
        with pa.memory_map(path) as mapped:
            keep = pc.and_not(keep, pc.is_in(stored[key], pa.ipc.open_file(mapped).read_all()[key]))
    chosen = stored.filter(keep)
    if not chosen.num_rows:
        return []
    paths = sorted(store.paths(table))
    with files.open_read(paths[0]) as handle:
        shape = embedding_shape(pq.ParquetFile(handle).schema_arrow)
    limit = max(1, CONTENT_FILE_BYTES // (2 * shape[0] * shape[1]))
    numbers, groups = chosen["part"].to_numpy(), chosen["group"].to_numpy()
    edges = np.append(np.flatnonzero((np.diff(numbers) != 0) | (np.diff(groups) != 0)) + 1, len(numbers))
    jobs: list[ContentJob] = []
    start = 0
    while start < len(numbers):
        # Whole row groups, at least one: none is read by two jobs.
        place = int(np.searchsorted(edges, start + limit, side="right")) - 1
        end = int(edges[place]) if place >= 0 and edges[place] > start else int(edges[place + 1])
        path = files.join(directory, f"{kind}-{len(jobs)}.arrows")
        with files.atomic_write(path) as handle:
            handle.write(files.ipc_bytes(chosen.slice(start, end - start).select([key]).sort_by(key)))
        read = {
            paths[number]: tuple(np.unique(groups[start:end][numbers[start:end] == number]).tolist())
            for number in np.unique(numbers[start:end])
        }
        jobs.append(ContentJob(kind, tuple(read.items()), path))
        start = end
    return jobs


def copy_contents(job: ContentJob, directory: str) -> FileRecord:
    """Copy a job's rows into one Arrow IPC file.

    It is not compressed, so that a reader can map it and gather rows without decoding. Columns: the content key, in
    order, and `embedding` as fixed_size_binary (float16, shape in the field's metadata). The file is named by its keys:
    a job that is done again, by a retried bundle or after a crash, writes the same file again.

    Raises:
        RuntimeError: the store's parts no longer have all that was planned.
    """
    key = f"{job.kind[:-1]}_key"
    with files.open_read(job.wanted) as source:
        wanted = files.ipc_table(source.read())[key].combine_chunks()
    rows: NDArray[np.void] | None = None
    missing = np.ones(len(wanted), dtype=bool)
    field = None
    for batch in _read_batches(job, [key, "embedding"]):
        keys, column = batch[key], batch["embedding"]
        if rows is None:
            field = batch.schema.field("embedding")
            rows = np.empty(len(wanted), dtype=np.dtype((np.void, field.type.byte_width)))
        place = pc.fill_null(pc.index_in(keys, value_set=wanted), -1).to_numpy()
        fresh = np.flatnonzero(place >= 0)
        fresh = fresh[missing[place[fresh]]]
        # Where a retry wrote a key twice the first row stays.
        found, first = np.unique(place[fresh], return_index=True)
        values = np.frombuffer(column.buffers()[1], dtype=rows.dtype)[column.offset : column.offset + len(column)]
        rows[found] = values[fresh[first]]
        missing[found] = False
    if rows is None or field is None or missing.any():
        raise RuntimeError(
            f"{', '.join(path for path, _ in job.groups)}: {missing.sum():,} of {len(wanted):,} contents that were there a moment ago are not ({wanted[int(np.argmax(missing))]} is the first)."
        )
    path = files.join(directory, f"part-{chunk_name(CONTENTS, wanted.to_pylist())}.arrow")
    schema = pa.schema([pa.field(key, pa.string()), pa.field("embedding", field.type, metadata=field.metadata)])
    embeddings = pa.FixedSizeBinaryArray.from_buffers(field.type, len(rows), [None, pa.py_buffer(rows)])
    with files.atomic_write(path) as handle, pa.ipc.new_file(handle, schema) as writer:
        writer.write_batch(pa.record_batch([wanted, embeddings], schema=schema))
    return FileRecord.of(f"contents_{job.kind}", path, len(wanted), handle.written)


def _read_batches(job: ContentJob, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of a job's row groups, `ROW_GROUP` rows at a time."""
    for path, groups in job.groups:
        with files.open_read(path) as source:
            # Read ahead, each of the reading threads would keep 33 MB for good.
            yield from pq.ParquetFile(source, pre_buffer=False).iter_batches(
                ROW_GROUP, row_groups=list(groups), columns=columns, use_threads=False
            )


@dataclass(frozen=True)
class PlacedJob:
    """A job and the directory that its file goes to."""

    directory: str
    job: ContentJob


class CopyContents(beam.DoFn):
    """PlacedJob → FileRecord of the contents file it wrote."""

    @staticmethod
    def copy(placed: PlacedJob) -> FileRecord:
        """Do one job, here and now."""
        return copy_contents(placed.job, placed.directory)

    def process(self, placed: PlacedJob) -> Iterator[FileRecord]:
        yield self.copy(placed)


def contents_jobs(
    store: Manifest, items: pa.Table, latest: Manifest | None, root: str, run_directory: str
) -> tuple[list[PlacedJob], list[FileRecord]]:
    """What is still to be copied into `root`/contents/KIND/FINGERPRINT/, and the files of the last run that stay in use.

    Contents are only ever added; those of another encoder lie in another directory and are not used.
    """
    jobs: list[PlacedJob] = []
    kept: list[FileRecord] = []
    for kind in ("images", "titles"):
        generation = str(store.options["image" if kind == "images" else "text"]["fingerprint"])
        directory = files.join(root, CONTENTS, kind, generation)
        files.make_directory(directory)
        files.mark_own(directory)
        present = [
            record
            for record in (latest.records(f"contents_{kind}") if latest else [])
            if record.path.startswith(directory) and _is_whole(record)
        ]
        kept += present
        jobs += [
            PlacedJob(directory, job)
            for job in plan_contents(
                kind,
                store,
                items[f"{kind[:-1]}_key"],
                [record.path for record in present],
                files.join(run_directory, "wanted"),
            )
        ]
    return jobs, kept


def _is_whole(record: FileRecord) -> bool:
    """Tell whether a contents file can stay in use; what was in one that cannot is copied from the store again."""
    try:
        check_records([record], "Its embeddings are copied again from the store.")
    except DamagedError as error:
        print(f"{error}", file=sys.stderr)
        return False
    return True


def local_only(path: str, flag: str) -> str:
    """`path`, if it is on this machine.

    Raises:
        InputError: it is on an object store, whose files cannot be mapped into memory.
    """
    if not files.is_local(path):
        raise InputError(
            f"{flag} {path}: embeddings are mapped into memory, which needs a local directory. Copy it, or mount the bucket."
        )
    return os.path.abspath(path)
