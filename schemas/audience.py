"""Audience rows to be scored.

The tables name the users and contexts to score, and optionally the pairs of audience row and item.
"""

import pyarrow as pa

from schemas.contract import Column, Contract, text_column

AUDIENCE = Contract(
    name="audience",
    doc=(
        "One row per audience: a user, or anybody (user_id null), in a store at an hour. May "
        "carry any of the users' columns."
    ),
    key=("audience_id",),
    extra_columns=True,
    columns=(
        text_column("audience_id", "unique id of the audience row"),
        text_column("user_id", "the user, or null for anybody", nullable=True),
        text_column("store_id", "store in which the audience shops"),
        Column(name="hour", type=pa.int64(), doc="local hour of the visit, 0 to 23"),
    ),
)

CANDIDATES = Contract(
    name="candidates",
    doc="The pairs to score, where not all.",
    key=("audience_id", "item_id"),
    columns=(
        text_column("audience_id", "row of the audience table"),
        text_column("item_id", "listing of the catalog"),
    ),
)
