"""Published tables: scores and listing quality.

Each is an ordinary hive-partitioned dataset by score_date.
"""

import pyarrow as pa

from schemas.contract import Column, Contract, text_column

SCORES = Contract(
    name="scores",
    doc="One row per audience row and item, in scores/score_date=YYYY-MM-DD/.",
    key=("audience_id", "item_id"),
    columns=(
        text_column("audience_id", "row of the audience table"),
        text_column("item_id", "listing of the catalog"),
        Column(name="cvr", type=pa.float32(), doc="calibrated probability of an order after a click, 0 to 1"),
        Column(name="rank", type=pa.int32(), doc="rank within the audience row, 1 = highest cvr; ties by item_id"),
        text_column("model_version", "fingerprint of the model package"),
    ),
)

LISTING_QUALITY = Contract(
    name="listing_quality",
    doc="One row per listing, in listing_quality/score_date=YYYY-MM-DD/.",
    key=("item_id",),
    columns=(
        text_column("item_id", "listing of the catalog"),
        Column(
            name="ita",
            type=pa.float32(),
            doc=(
                "probability that the title belongs to the photo, of pairs half of which do: "
                "compared with other titles close to the photo; null without both"
            ),
            nullable=True,
        ),
        Column(
            name="tia",
            type=pa.float32(),
            doc=(
                "probability that the photo belongs to the title: compared with other photos "
                "close to the title; null without both"
            ),
            nullable=True,
        ),
        Column(
            name="cosine",
            type=pa.float32(),
            doc=(
                "cosine of photo and title along the directions that photos and titles share, "
                "-1 to 1; null without both"
            ),
            nullable=True,
        ),
        Column(
            name="mismatch",
            type=pa.float32(),
            doc="probability that they do not belong together, by both ways at once; null without both",
            nullable=True,
        ),
        Column(
            name="mismatch_percentile",
            type=pa.float32(),
            doc="share of listings with a lower mismatch; null without both",
            nullable=True,
        ),
        Column(name="flags", type=pa.list_(pa.string()), doc="mismatch, no_image, no_text, vague_image, poor_title"),
        Column(name="clicks", type=pa.int64(), doc="clicks in the 28 days before the score date"),
        Column(name="orders", type=pa.int64(), doc="of these clicks, those an order has been credited to by then"),
        Column(
            name="lost_orders",
            type=pa.float32(),
            doc=(
                "orders that photo and title may have cost in these days: what the clicks bring "
                "to unflagged listings of the subcategory, less its own orders, shrunk where "
                "clicks are few; 0 without a flag"
            ),
        ),
        text_column("model_version", "fingerprint of the model package"),
    ),
)
