"""Choose the audience that is scored.

It is the audience table, or one made from stores and hours, or from active users.
"""

import datetime
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.features.as_of import local_hour_weekday
from pipelines.inputs.users_and_stores import as_category, locate_row
from pipelines.io import files
from pipelines.io.tables import Source
from pipelines.score.joins import Side, column_of
from pipelines.score.snapshot import Log, active_users
from schemas.audience import AUDIENCE, CANDIDATES
from schemas.errors import InputError

BUCKET_HOURS = 4


def by_store(stores: list[str]) -> pa.Table:
    """Make one row per store and 4-hour bucket.

    The row has the bucket's middle hour, and no user.
    """
    rows = [
        (f"{store}@{start:02d}h", store, start + BUCKET_HOURS // 2)
        for store in sorted(stores)
        for start in range(0, 24, BUCKET_HOURS)
    ]
    return pa.table(
        {
            "audience_id": [r[0] for r in rows],
            "user_id": pa.nulls(len(rows), pa.string()),
            "store_id": [r[1] for r in rows],
            "hour": [r[2] for r in rows],
        },
        schema=AUDIENCE.schema,
    )


def by_user(log: Log, timezones: dict[str, str], timezone: str) -> pa.Table:
    """Make one row per user who was active recently.

    These are the users active in the last 28 days. The row is in the store and at the hour of their
    last event.
    """
    active = active_users(log)
    codes, names = np.unique(active["store_id"].to_numpy(dtype=object).astype(str), return_inverse=True)[::-1]
    zones = [timezones.get(str(name), timezone) for name in names]
    hour, _ = local_hour_weekday(active["at"].to_numpy(np.int64), codes.astype(np.int64), zones)
    ids = pa.array(active["user_id"].tolist(), pa.string())
    return pa.table(
        {
            "audience_id": ids,
            "user_id": ids,
            "store_id": pa.array(active["store_id"].tolist(), pa.string()),
            "hour": pa.array(hour, pa.int64()),
        },
        schema=AUDIENCE.schema,
    )


def read_audience(data: str) -> tuple[pa.Table, Source] | None:
    """Read the audience table, checked and ordered by audience_id.

    The result is None where there is none.

    Raises:
        InputError: a null, blank or repeated audience_id, a null or blank store, an hour outside 0
            to 23, or a further column that is no category.
    """
    if not files.has_table(files.join(data, "audience")):
        return None
    source = Source.find(data, AUDIENCE)
    table = source.read_all()
    for name in ("audience_id", "store_id", "hour"):
        if table[name].null_count:
            where = locate_row(source, pc.index(pc.is_null(table[name]), value=True).as_py())
            raise InputError(
                f"{where}: column '{name}' of table 'audience' is null or blank. Give it a value or leave the row out."
            )
    counts = pc.value_counts(table["audience_id"].combine_chunks())
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        where = locate_row(source, pc.index(table["audience_id"], value=repeated[0]).as_py())
        raise InputError(
            f"{where}: column 'audience_id': '{repeated[0]}' stands there more than once. Give each row its own id."
        )
    wrong = np.flatnonzero(pc.or_(pc.less(table["hour"], 0), pc.greater(table["hour"], 23)).to_numpy())
    if len(wrong):
        row = table.slice(int(wrong[0]), 1).to_pylist()[0]
        raise InputError(
            f"{locate_row(source, int(wrong[0]))}: audience_id '{row['audience_id']}': column 'hour' is "
            f"{row['hour']}. Use the local hour, 0 to 23."
        )
    for place, name in enumerate(table.column_names):
        if name not in AUDIENCE.names:
            table = table.set_column(place, name, as_category(source, name, table[name]))
    return table.sort_by("audience_id"), source


def find_candidates(data: str) -> Source | None:
    """Find the table `candidates`, which names the pairs to score.

    The result is None where there is none.
    """
    return Source.find(data, CANDIDATES) if files.has_table(files.join(data, "candidates")) else None


@dataclass(frozen=True)
class Candidates:
    """The pairs that are to be scored.

    `pairs` are rows of (audience, item), int64 [n, 2], distinct and ordered. `rows`, `unknown` and
    `copies` count rows of the table: all, those that name an unknown id, and copies.

    `audience_ids` and `item_ids` are the table's columns as they are, [rows].
    """

    pairs: np.ndarray
    file: str
    rows: int
    unknown: int
    copies: int
    audience_ids: Side
    item_ids: Side


def read_candidates(source: Source, audience_ids: pa.ChunkedArray, item_ids: pa.ChunkedArray) -> Candidates:
    """Read the table `candidates`."""
    table = source.read_all()
    codes = [
        pc.fill_null(pc.index_in(table[name], value_set=known.combine_chunks()), -1).to_numpy()
        for name, known in (("audience_id", audience_ids), ("item_id", item_ids))
    ]
    pairs = np.stack(codes, axis=1).astype(np.int64)
    known = (pairs >= 0).all(axis=1)
    distinct = np.unique(pairs[known], axis=0)
    unknown = int((~known).sum())
    sides = (column_of(source, name, table[name]) for name in ("audience_id", "item_id"))
    return Candidates(distinct, source.files[0], len(pairs), unknown, len(pairs) - unknown - len(distinct), *sides)


def score_time(score_date: str) -> tuple[int, int]:
    """Return the time and weekday of the score's date.

    The result is (midnight UTC of the date, int64 microseconds, and weekday, 0 = Monday).

    Raises:
        InputError: not a date.
    """
    try:
        date: datetime.date | None = datetime.date.fromisoformat(score_date)
    except ValueError:
        date = None
    # The flag becomes a directory's name, score_date=YYYY-MM-DD: other spellings of a date would
    # become other directories.
    if date is None or date.isoformat() != score_date:
        raise InputError(f"--score_date {score_date}: not a date. Write it as 2026-01-31.")
    midnight = datetime.datetime(date.year, date.month, date.day, tzinfo=datetime.UTC)
    return int(midnight.timestamp()) * 1_000_000, date.weekday()
