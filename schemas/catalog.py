"""The catalog, one row per listing.

A listing is one store's offer of a product.
"""

import pyarrow as pa

from schemas.contract import TIMESTAMP, Column, Contract, text_column

CATALOG = Contract(
    name="catalog",
    doc="One row per listing: an item is one store's listing of a product.",
    key=("item_id",),
    extra_columns=True,
    columns=(
        text_column("item_id", "unique id of the listing"),
        text_column("title", "title as the store wrote it; null or empty = none", nullable=True),
        text_column("category", "coarse group", nullable=True),
        text_column("subcategory", "finer group within the category", nullable=True),
        text_column("brand", "brand, or the store's own code of it", nullable=True),
        Column(name="price", type=pa.float32(), doc="price in currency units; null = unknown", nullable=True),
        text_column(
            "image_uri",
            "photo: a path relative to --image_root, or gs:// or s3:// below it; null = none",
            nullable=True,
        ),
        Column(
            name="image_bytes", type=pa.binary(), doc="the encoded photo itself, instead of image_uri", optional=True
        ),
        text_column("product_key", "the same product in several stores shares this key", optional=True),
        text_column("store_id", "the store that lists the item; null = all stores", optional=True),
        Column(
            name="listed_at",
            type=TIMESTAMP,
            doc="since when the listing is offered, timestamp[us], UTC; null = unknown",
            optional=True,
        ),
    ),
)
