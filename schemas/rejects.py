"""Rejected and degraded rows.

Rejects are rows that were dropped, defects are rows that were kept but degraded.
"""

from schemas.contract import Contract, text_column

_COLUMNS = (
    text_column("stage", "stage that found it: embed, shards or score"),
    text_column("key", "key of the row, as table:key"),
    text_column("reason", "short name of the reason, stable between versions (reasons.md)"),
    text_column("detail", "file, column, value and remedy, for a person"),
)

REJECTS = Contract(name="rejects", doc="Rows that were dropped.", key=("stage", "key", "reason"), columns=_COLUMNS)
DEFECTS = Contract(
    name="defects", doc="Rows that were kept, but degraded.", key=("stage", "key", "reason"), columns=_COLUMNS
)
