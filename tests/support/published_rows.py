"""What outputs hold, wherever they lie: their published rows, compared."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.io import files
from pipelines.runs.manifest import Manifest, read_latest
from schemas.contract import without_dictionary

ALIGNMENT = ["ita", "tia", "cosine", "mismatch", "mismatch_percentile"]
KEYS = {
    "items": ["item_id"],
    "image_embeddings": ["image_key"],
    "title_embeddings": ["title_key"],
    "examples": ["user_id", "session_id", "item_id"],
    "users": ["user_id"],
    "kept_clicks": ["exposure_id", "user_id"],
    "kept_orders": ["order_id", "item_id"],
    "contents_images": ["image_key"],
    "contents_titles": ["title_key"],
    "scores": ["audience_id", "item_id"],
    "listing_quality": ["item_id"],
    "audience": ["audience_id"],
    "rejects": ["key", "reason"],
    "defects": ["key", "reason"],
}


def read(path: str) -> pa.Table:
    with files.open_read(path) as handle:
        if path.endswith(".arrow"):
            return pa.ipc.open_file(handle).read_all()
        if path.endswith(".arrows"):
            table = pa.ipc.open_stream(handle).read_all()
            return pa.table({name: without_dictionary(table[name]) for name in table.column_names})
        return pq.ParquetFile(handle).read()


OF_THE_PLACE = ("image_mtime", "image_version")
"""Columns of a store's items that say where and when photos were found"""


def published(root: Path | str) -> dict[str, pa.Table]:
    """Every published table with a key, sorted by it, without file boundaries."""
    manifest = latest(root)
    tables = {}
    for name in manifest.tables.keys() & KEYS.keys():
        pieces = [read(path).replace_schema_metadata(None) for path in manifest.paths(name)]
        if pieces:
            order = [(key, "ascending") for key in KEYS[name]]
            rows = pa.concat_tables(pieces)
            rows = rows.drop_columns([column for column in OF_THE_PLACE if column in rows.column_names])
            tables[name] = rows.sort_by(order).combine_chunks()
    assert tables
    return tables


def latest(root: Path | str) -> Manifest:
    manifest = read_latest(str(root))
    assert manifest is not None
    return manifest


def assert_same(found: Path | str, expected: Path | str) -> None:
    """Bit-identical tables and equal row counts."""
    a, b = published(found), published(expected)
    assert set(a) == set(b)
    for name in b:
        assert a[name].equals(b[name]), name
    assert latest(found).counts == latest(expected).counts


def assert_scores_close(found: Path | str, expected: Path | str) -> None:
    a, b = published(found), published(expected)
    for name, columns in (("scores", ["cvr"]), ("listing_quality", ALIGNMENT)):
        left, right = a[name].to_pandas(), b[name].to_pandas()
        assert left[KEYS[name]].equals(right[KEYS[name]])
        for column in columns:
            assert np.allclose(left[column], right[column], rtol=0, atol=1e-6, equal_nan=True), (name, column)
    assert_ranks(a["scores"].to_pandas())


def assert_ranks(scores: pd.DataFrame) -> None:
    """1, 2, ... by falling cvr within each audience row."""
    ordered = scores.sort_values(["audience_id", "rank"])
    assert (ordered.groupby("audience_id").cumcount() + 1 == ordered["rank"]).all()
    assert (ordered.groupby("audience_id")["cvr"].diff().fillna(0) <= 0).all()
