"""The click and order logs."""

import pyarrow as pa

from schemas.contract import TIMESTAMP, Column, Contract, text_column

CLICKS = Contract(
    name="clicks",
    doc="One row per click on an exposed listing.",
    key=("exposure_id",),
    columns=(
        text_column("exposure_id", "id of the exposure that was clicked, unique among the clicks of its user_id"),
        text_column("session_id", "visit that the click belongs to; features are as of its first click"),
        text_column("user_id", "who clicked"),
        text_column("store_id", "store the user was in"),
        text_column("item_id", "listing that was clicked"),
        Column(name="clicked_at", type=TIMESTAMP, doc="time of the click, timestamp[us], UTC"),
        Column(
            name="position",
            type=pa.int64(),
            doc="rank at which the listing was shown, from 0; null = unknown",
            nullable=True,
        ),
    ),
)

ORDERS = Contract(
    name="orders",
    doc=(
        "One row per order line. Exact copies count once; lines of one order on the same "
        "listing that differ count each."
    ),
    key=("order_id", "item_id"),
    columns=(
        text_column("order_id", "id of the order; its lines share it"),
        text_column("user_id", "who ordered"),
        text_column("store_id", "store that sold"),
        text_column("item_id", "listing that was ordered"),
        Column(name="ordered_at", type=TIMESTAMP, doc="time of the order, timestamp[us], UTC"),
        Column(name="quantity", type=pa.float64(), doc="pieces; zero or less is a return and is left out"),
    ),
)
