"""Users and stores: both tables are optional."""

from schemas.contract import Contract, text_column

USERS = Contract(
    name="users",
    doc="One row per user; every column beyond user_id is a categorical field.",
    key=("user_id",),
    extra_columns=True,
    columns=(text_column("user_id", "unique id of the user"),),
)

STORES = Contract(
    name="stores",
    doc="One row per store: hour and weekday are local to it.",
    key=("store_id",),
    columns=(
        text_column("store_id", "unique id of the store"),
        text_column("timezone", "IANA name, for example Asia/Shanghai"),
    ),
)
