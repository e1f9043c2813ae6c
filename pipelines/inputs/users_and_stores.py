"""Users and stores, two optional tables.

They are small enough to be held whole.
"""

import zoneinfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from camenn_model.config import USER_HASH
from pipelines.io import files
from pipelines.io.tables import Source, open_table
from schemas.contract import Contract
from schemas.errors import InputError
from schemas.training import AUDIENCE_COUNTS, PAIR_COUNTS
from schemas.users import STORES, USERS


def _find_optional(data: str, contract: Contract) -> Source | None:
    return Source.find(data, contract) if files.has_table(files.join(data, contract.name)) else None


def _check_key(source: Source, table: pa.Table, key: str) -> None:
    """Stop on a null, blank or repeated key.

    These tables are configuration, not logs: guessing which row is meant would be wrong.
    """
    if table[key].null_count:
        where = locate_row(source, pc.index(pc.is_null(table[key]), value=True).as_py())
        raise InputError(
            f"{where}: column '{key}' of table '{source.contract.name}' is null or blank. "
            "Give it a value or leave the row out."
        )
    counts = pc.value_counts(table[key].combine_chunks())
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        rows = np.flatnonzero(pc.equal(table[key], repeated[0]).to_numpy())
        places = " and ".join(locate_row(source, int(row)) for row in rows[:2])
        raise InputError(
            f"{places}: column '{key}' of table '{source.contract.name}': '{repeated[0]}' "
            f"stands there more than once. Keep one row for each {key}."
        )


def locate_row(source: Source, row: int) -> str:
    """Return file and row number of a row.

    A message names a row of `source.read_all()` by them. The number is from 0, in that file.
    """
    for path in source.files:
        with open_table(path, source.contract) as (_, parquet):
            rows = parquet.metadata.num_rows
        if row < rows:
            break
        row -= rows
    return f"{path}: row {row}"


RESERVED = frozenset(
    name.removeprefix("user_")
    for name in (USER_HASH, *(column.name for column in (*AUDIENCE_COUNTS, *PAIR_COUNTS)))
    if name.startswith("user_")
)
"""Columns that a users table cannot have: prefixed with `user_` they are features already."""


def as_category(source: Source, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Cast a column to strings.

    Raises:
        InputError: it is no category (a list, for example).
    """
    try:
        return column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(
            f"{source.files[0]}: column '{name}' of table '{source.contract.name}' has type "
            f"{column.type}, which is not a category. Write it as strings, or leave the "
            "column out."
        ) from error


def read_users(data: str) -> tuple[pa.Table, Source | None]:
    """Read the users, ordered by user_id.

    Every column is a string, as fields are categorical. Where there is no such table, an empty one
    is returned.

    Raises:
        InputError: a null, blank or repeated user_id, or a column that is no category (a list, for
            example) or has the name of a feature.
    """
    source = _find_optional(data, USERS)
    if source is None:
        return USERS.schema.empty_table(), None
    table = source.read_all()
    _check_key(source, table, "user_id")
    taken = sorted(RESERVED.intersection(table.column_names))
    if taken:
        raise InputError(
            f"{source.files[0]}: column '{taken[0]}' of table 'users' would be the feature "
            f"'user_{taken[0]}', which camenn computes itself. Rename the column, or leave it "
            "out."
        )
    strings = {name: as_category(source, name, table[name]) for name in table.column_names}
    return pa.table(strings).sort_by("user_id"), source


def read_timezones(data: str, default: str) -> tuple[dict[str, str], Source | None]:
    """Read the IANA zone of each store.

    The stores are those of the table `stores`.

    Raises:
        InputError: a zone, or the default, is not in the time zone database, or a store_id is null,
            blank or repeated.
    """
    known = zoneinfo.available_timezones()
    if default not in known:
        raise InputError(f"--timezone {default}: no such zone. Use an IANA name, for example Europe/Amsterdam.")
    source = _find_optional(data, STORES)
    if source is None:
        return {}, None
    table = source.read_all()
    _check_key(source, table, "store_id")
    zones = dict(zip(table["store_id"].to_pylist(), table["timezone"].to_pylist(), strict=True))
    for store, zone in zones.items():
        if zone not in known:
            wrong = "is null or blank" if zone is None else f"'{zone}' is not an IANA zone"
            raise InputError(
                f"{source.files[0]}: store_id '{store}': column 'timezone': {wrong}. Use an "
                "IANA name such as Asia/Shanghai."
            )
    return zones, source
