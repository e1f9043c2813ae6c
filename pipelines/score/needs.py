"""Compute the needs of a worker of `camenn score`.

They are what it downloads, keeps on disk and holds in memory.

Sizes come from the store's manifest, the package and the tables that were read. Rows of one width
are counted, and one row, or some, are encoded to see their width.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from camenn_model.data.feature_space import CatalogFeatures
from pipelines.features.as_of import item_attributes
from pipelines.inputs.contents import KEY_BYTES, look_at_contents
from pipelines.runner.machine_needs import MachineNeeds
from pipelines.runs.manifest import Manifest
from pipelines.score.find_pairs import encode_audience
from pipelines.score.inputs import STAGE, ScoreInputs
from pipelines.score.pairs import CHUNK_ROWS, TILE_ITEMS, Pairs
from pipelines.score.snapshot import Snapshot
from pipelines.score.tiles import ITEMS_READ, make_scorer, tile_numbers

if TYPE_CHECKING:
    from camenn_model.data.item_table import ItemTable
    from camenn_model.package import Package

SAMPLE = 16
"""Listings and audience rows that are encoded to see how wide a row is"""
FRAME_BYTES = 16_384
"""Of a Parquet file beside its values, at most: footer, page headers, dictionaries of few values"""
TABLES = 10
"""Files that the submitter writes for workers"""
CONTENT_ROW_BYTES = KEY_BYTES + 2 * 8
"""Of a content in memory: its key, its file and its place there"""


def worker_needs(
    inputs: ScoreInputs, pairs: Pairs, latest: Manifest | None, out: str, precision: str, top_k: int, threads: int
) -> MachineNeeds:
    """Compute the needs of a process with so many threads."""
    from camenn_model.data.contents import Contents
    from camenn_model.data.item_table import ItemTable

    package, config = inputs.package, inputs.package.config
    rows = pairs.items.num_rows
    contents = look_at_contents(inputs.store, pairs.items, latest, out)
    some = pairs.items.slice(0, SAMPLE)
    images = Contents([], "image_key", (config.patch_grid**2, config.image_width))
    titles = Contents([], "title_key", (config.text_tokens, config.text_width))
    table = ItemTable(some, images, titles, keep=False).encode(package.space)
    few = replace(pairs, audience=pairs.audience.slice(0, SAMPLE), fields=pairs.fields.slice(0, SAMPLE))
    audience = encode_audience(package, few)
    listings = rows * (size_of(vars(table).values()) + size_of(vars(item_attributes(some)).values())) / len(table)
    people = pairs.audience.num_rows * size_of(vars(audience).values()) / few.audience.num_rows
    snapshot = Snapshot.size(pairs.log)
    asked = 0 if pairs.candidates is None else 8 * len(pairs.candidates)
    found = 4 * len(CatalogFeatures._fields) * rows
    # Another step reads the ids of listings and audience again.
    ids = pairs.items["item_id"].nbytes + pairs.audience["audience_id"].nbytes
    tables = pairs.items.select(ITEMS_READ).nbytes + found + people + snapshot + 2 * asked + ids
    directory = package.directory
    size = sum(path.stat().st_size for path in directory.iterdir() if path.is_file())
    return MachineNeeds(
        stage=STAGE,
        threads=threads,
        kept={"contents": contents.bytes, "package": size},
        # Parquet packs values: they are this large in memory, and no larger on the way.
        streamed={"tables_at_most": tables + TABLES * FRAME_BYTES},
        held={
            "package": size,
            "listings": listings + contents.rows * CONTENT_ROW_BYTES,
            "audience": people + asked,
            "snapshot": snapshot,
        },
        each_thread={"tile": tile_size(package, table, audience, precision, top_k)},
    )


def size_of(values: Iterable[Any]) -> int:
    """Add up the bytes of arrays and tensors.

    Those inside of other things count too.
    """
    total = 0
    for value in values:
        if isinstance(value, np.ndarray | pa.Array | pa.ChunkedArray) or hasattr(value, "untyped_storage"):
            total += value.nbytes
        elif isinstance(value, dict):
            total += size_of(value.values())
        elif isinstance(value, list | tuple):
            total += size_of(value)
        elif hasattr(value, "__dataclass_fields__"):
            total += size_of(vars(value).values())
    return total


def tile_size(package: "Package", table: "ItemTable", audience: Any, precision: str, top_k: int) -> float:
    """Compute the bytes of a tile in work.

    They are of its rows, their states and its numbers. A small tile is scored, and its states are
    counted after all experts that its pairs choose are among them.
    """
    import torch

    scorer: Any = make_scorer(package.model(), precision, top_k)
    batch, history = audience.batch(slice(0, SAMPLE))
    items = table.batch(np.arange(len(table)))
    # Their histories have listings of the whole catalog.
    history = np.where(history >= 0, history % len(table), history)
    rows = len(batch.cats)
    shape = (rows, len(table), len(tile_numbers()))
    states = scorer.audience_states(batch, table.history(history)), scorer.item_states(items)
    scorer.score_tile(states[1], states[0], torch.zeros(shape), torch.zeros(shape, dtype=torch.int64))
    per_row, per_item = size_of([states[0]]) / rows, size_of([states[1], items]) / len(table)
    numbers = TILE_ITEMS * CHUNK_ROWS * shape[2] * (4 + 8)
    return CHUNK_ROWS * per_row + TILE_ITEMS * per_item + numbers
