"""The shard set.

It has examples, and the items and users they refer to. Embeddings are stored in `contents/` (Arrow
IPC, mapped).
"""

import pyarrow as pa

from schemas.contract import TIMESTAMP, Column, Contract, text_column

SPLITS = ("train", "gap", "early_stop", "calibration", "test")
"""Parts of the examples by session start. `gap` rows lie within the attribution window before the
next part: they are not used.
"""

NO_HISTORY, CLICKED, PURCHASED = 0, 1, 2
"""Kinds of a history entry: padding, a click without a known purchase, a purchase."""

_COUNT = pa.float32()


def _number(name: str, doc: str) -> Column:
    return Column(name=name, type=_COUNT, doc=doc, nullable=True)


AUDIENCE_COUNTS = (
    _number(
        "user_clicks_per_day",
        "clicks of the user before the session, over days since the user's first click or order and one more",
    ),
    _number("user_orders_per_day", "order lines of the user before the session, over the same days"),
    _number("user_cvr", "smoothed share of the user's earlier clicks that are known to have been ordered"),
    _number("user_days_since_order", "days since the user's last order; null = never"),
)
ITEM_COUNTS = (
    _number("item_clicks", "clicks on the listing before the session"),
    _number("item_orders", "order lines of the listing before the session"),
    _number("item_cvr", "smoothed share of earlier clicks on the listing that are known to have been ordered"),
    _number(
        "item_days_since_listed",
        "days since the listing is offered; null = unknown to the catalog, or at or after the session's start",
    ),
    _number("item_days_since_first_click", "days since the first click on the listing; null = none yet"),
    _number("item_days_since_order", "days since the listing was last ordered; null = never"),
    _number("store_item_clicks", "clicks on the listing in this store before the session"),
    _number("store_item_orders", "order lines of the listing in this store before the session"),
)
PAIR_COUNTS = (
    _number("pair_clicks", "clicks of the user on the listing before the session"),
    _number("pair_orders", "order lines of the user for the listing before the session"),
    _number("pair_days_since_click", "days since the user's last click on the listing; null = never"),
    _number("pair_days_since_order", "days since the user last ordered the listing; null = never"),
    _number("user_subcategory_clicks", "clicks of the user in the listing's subcategory before the session"),
    _number("user_subcategory_orders", "order lines of the user in the listing's subcategory before the session"),
    _number("user_brand_orders", "order lines of the user in the listing's brand before the session"),
)
ITEM_NUMBERS = (
    _number("price", "price in currency units"),
    _number("price_relative", "log of price over the median price of the subcategory"),
)
ITEM_QUALITY = (
    _number("blur", "variance of the Laplacian of the photo"),
    _number("luminance", "mean luminance of the photo, 0 to 1"),
    _number("megapixels", "size of the photo, 1e6 px"),
    _number("title_tokens", "tokens of the title"),
    _number("unknown_share", "share of the title's words that the vocabulary does not know"),
)

EXAMPLES = Contract(
    name="examples",
    doc=(
        "One row per listing clicked in a session; in examples/date=.../; the manifest has "
        "each file's split. Counts are as of the session's first click."
    ),
    key=("user_id", "session_id", "item_id"),
    columns=(
        text_column("user_id", "who clicked"),
        text_column("session_id", "the session"),
        text_column("store_id", "store of the click"),
        text_column("item_id", "listing that was clicked"),
        Column(name="session_start", type=TIMESTAMP, doc="first click of the session, timestamp[us], UTC"),
        Column(name="clicked_at", type=TIMESTAMP, doc="first click of the session on this listing, timestamp[us], UTC"),
        Column(
            name="position",
            type=pa.int64(),
            doc="rank at which the listing was shown, from 0; null = unknown",
            nullable=True,
        ),
        Column(
            name="label", type=pa.int8(), doc="1 = an order was credited to a click of this session on this listing"
        ),
        Column(name="hour", type=pa.int8(), doc="local hour of the session's start, 0 to 23"),
        Column(name="weekday", type=pa.int8(), doc="local weekday of the session's start, 0 = Monday"),
        *AUDIENCE_COUNTS,
        *ITEM_COUNTS,
        *PAIR_COUNTS,
        Column(
            name="history_item",
            type=pa.list_(pa.string()),
            doc="the user's last listings before the session, latest first",
        ),
        Column(
            name="history_kind", type=pa.list_(pa.int8()), doc="1 = clicked without a known purchase, 2 = purchased"
        ),
        Column(name="history_hours", type=pa.list_(pa.float32()), doc="hours before the session"),
    ),
)

EXAMPLE_ORDER = ("session_start", "user_id", "session_id", "item_id")
"""Sort order of a day's examples, in each file and across files"""

ITEMS = Contract(
    name="items",
    doc="One row per listing of the catalog, ordered by item_id.",
    key=("item_id",),
    columns=(
        text_column("item_id", "listing of the catalog"),
        text_column("title", "normalised title", nullable=True),
        text_column("category", "coarse group", nullable=True),
        text_column("subcategory", "finer group", nullable=True),
        text_column("brand", "brand", nullable=True),
        text_column("product_key", "the same product in several stores", nullable=True),
        text_column("store_id", "the store that lists the item; null = all stores", nullable=True),
        text_column("image_uri", "address of the photo", nullable=True),
        Column(
            name="listed_at",
            type=TIMESTAMP,
            doc="since when the listing is offered, timestamp[us], UTC; null = unknown",
            nullable=True,
        ),
        text_column("title_key", "row of contents/titles; null = no title", nullable=True),
        text_column("image_key", "row of contents/images; null = no photo", nullable=True),
        *ITEM_NUMBERS,
        *ITEM_QUALITY,
    ),
)
