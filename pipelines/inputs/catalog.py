"""The cleaned catalog.

One rule holds for every stage that reads it, whether a bucket at a time or whole.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.io.rejects import drop_unusable, make_rejects
from pipelines.io.tables import Slice, Source, list_slices, read_slice
from schemas.catalog import CATALOG
from schemas.contract import conform
from schemas.reasons import Reason
from schemas.rejects import REJECTS

FILE, ROW = "__file", "__row"
"""A row's origin: kept beside the rows until duplicates are resolved, so that the choice does not
depend on reading order."""


def add_origin(where: Slice, table: pa.Table) -> pa.Table:
    """Add each row's file and row number to its columns.

    Returns the catalog's own columns, with the file and the row number (from 0) beside them.
    """
    rows = pa.array(np.arange(where.first_row, where.first_row + table.num_rows))
    files = pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(table.num_rows, dtype=np.int32)), pa.array([where.file])
    ).cast(pa.string())
    return table.select(CATALOG.names).append_column(FILE, files).append_column(ROW, rows)


def drop_duplicates(stage: str, table: pa.Table) -> tuple[pa.Table, pa.Table, int]:
    """Reduce a table to one row per item_id.

    Returns (rows ordered by item_id, rejects, number of exact copies).

    Exact copies collapse (a NaN is a copy of a NaN). Of rows that share an item_id and differ, the
    first by file and row number stays and the others are rejects.
    """
    table = table.sort_by([("item_id", "ascending"), (FILE, "ascending"), (ROW, "ascending")])
    ids = table["item_id"]
    repeats = np.zeros(table.num_rows, dtype=bool)
    if table.num_rows > 1:
        repeats[1:] = pc.equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)
    if not repeats.any():
        return table.drop_columns([FILE, ROW]), REJECTS.schema.empty_table(), 0
    first = np.maximum.accumulate(np.where(repeats, 0, np.arange(len(repeats))))
    later = np.flatnonzero(repeats)
    here, there = table.take(pa.array(later)), table.take(pa.array(first[later]))
    copy = np.ones(len(later), dtype=bool)
    differs: list[list[str]] = [[] for _ in later]
    for name in CATALOG.names:
        same = np.array(
            [
                a == b or (a != a and b != b)
                for a, b in zip(here[name].to_pylist(), there[name].to_pylist(), strict=True)
            ],
            dtype=bool,
        )
        copy &= same
        for index in np.flatnonzero(~same):
            differs[index].append(name)
    conflicts = np.flatnonzero(~copy)
    rows_here, rows_there = here.take(pa.array(conflicts)), there.take(pa.array(conflicts))
    keys = [f"catalog:{item}" for item in rows_here["item_id"].to_pylist()]
    details = [
        f"{file}: row {row}: column 'item_id': '{item}' stands already in {other_file}: row "
        f"{other_row}, with another {', '.join(differs[index])}. "
        "Give each listing its own item_id, or leave one row out."
        for index, file, row, item, other_file, other_row in zip(
            conflicts,
            rows_here[FILE].to_pylist(),
            rows_here[ROW].to_pylist(),
            rows_here["item_id"].to_pylist(),
            rows_there[FILE].to_pylist(),
            rows_there[ROW].to_pylist(),
            strict=True,
        )
    ]
    rejects = make_rejects(stage, keys, Reason.DUPLICATE_ITEM_ID, details)
    return table.filter(pa.array(~repeats)).drop_columns([FILE, ROW]), rejects, int(copy.sum())


def read_catalog(stage: str, source: Source) -> tuple[pa.Table, pa.Table, dict[str, int]]:
    """Read the whole cleaned catalog into memory.

    Returns (rows ordered by item_id, rejects, counts). It takes about 300 bytes a listing, photos'
    bytes left out.
    """
    kept, rejects = [], []
    for where in list_slices(source):
        good, bad = drop_unusable(stage, where, add_origin(where, read_slice(where, CATALOG)), CATALOG)
        kept.append(good)
        rejects.append(bad)
    if not kept:
        kept = [
            add_origin(
                Slice("", 0, 0), conform(pa.table({c.name: pa.array([], c.type) for c in CATALOG.columns}), CATALOG, "")
            )
        ]
    rows, conflicts, copies = drop_duplicates(stage, pa.concat_tables(kept))
    all_rejects = pa.concat_tables([*rejects, conflicts])
    counts = {"in": source.rows, "out": rows.num_rows, "rejected": all_rejects.num_rows, "duplicates": copies}
    return rows.drop_columns(["image_bytes"]), all_rejects, counts
