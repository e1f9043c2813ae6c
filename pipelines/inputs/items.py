"""The catalog joined with its embeddings' keys and quality figures.

This is the `items` table that shards and score share.
"""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from camenn_model.hashing import content_key, normalise_title
from pipelines.inputs.catalog import read_catalog
from pipelines.io import files
from pipelines.io.tables import Source
from pipelines.runs.manifest import Manifest
from pipelines.runs.part_keys import keys_path, read_keys, read_part
from schemas.embeddings import ROW_GROUP_COLUMN, keys_table
from schemas.errors import InputError
from schemas.training import ITEMS


def read_stored(manifest: Manifest, table: str, columns: list[str]) -> pa.Table:
    """Read columns, not the embeddings, of a store table.

    One row per content key: the first by path wins where a retry wrote a key twice. Beside the
    columns `part` and `group`: the number of the part among the sorted paths, and of the row group
    in it. Keys files are read where there are any.
    """
    wanted = [*columns, ROW_GROUP_COLUMN]
    keys = {record.path: record for record in manifest.records(keys_table(table))}
    pieces = []
    for number, path in enumerate(sorted(manifest.paths(table))):
        record = keys.get(keys_path(path))
        if record is None:
            # An earlier version of camenn wrote it.
            piece = read_part(path, wanted)
        else:
            piece = read_keys(record.path, record.bytes, record.sha256, wanted)
        piece = piece.rename_columns([*columns, "group"])
        pieces.append(piece.append_column("part", pa.array(np.full(piece.num_rows, number, dtype=np.int32))))
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
    """Load the `items` table of a catalog.

    The embedding store's run is pinned. Returns (items ordered by item_id, rejects, counts).

    Raises:
        InputError: listings of the catalog were never embedded, or have another title or photo
            address since.
    """
    catalog, rejects, counts = read_catalog(stage, source)
    names = ["item_id", "title_key", "image_key", "image_uri"]
    embedded = [pq.read_table(files.open_read(path), columns=names) for path in store.paths("items")]
    keys = pa.concat_tables(embedded) if embedded else pa.table({name: pa.array([], pa.string()) for name in names})
    row = pc.index_in(catalog["item_id"], keys["item_id"])
    if row.null_count:
        missing = catalog["item_id"].filter(pc.is_null(row))
        raise InputError(
            f"{source.files[0]}: {len(missing):,} of {catalog.num_rows:,} listings are not in "
            f"the embedding store (item_id '{missing[0]}' is the first). "
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
            # Otherwise scores would be published beside another photo or title than they were computed from.
            raise InputError(
                f"{source.files[0]}: column '{name}' of {other.sum():,} of "
                f"{catalog.num_rows:,} listings is not what was embedded (item_id "
                f"'{catalog['item_id'][int(np.argmax(other))]}' is the first). "
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
    """Compute log(price / median price of the subcategory), float32 [n].

    It is null where the price is unknown or not positive.
    """
    frame = pd.DataFrame(
        {"price": price.to_pandas().to_numpy(dtype=np.float64), "group": subcategory.to_pandas().fillna("")}
    )
    frame.loc[~(frame["price"] > 0), "price"] = np.nan
    median = frame.groupby("group")["price"].transform("median")
    values = np.log((frame["price"] / median).to_numpy(dtype=np.float64)).astype(np.float32)
    return pa.array(values, mask=~np.isfinite(values))
