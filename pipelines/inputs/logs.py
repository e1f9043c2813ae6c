"""Read click and order logs.

The result is clean events, with times in UTC and codes instead of texts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import apache_beam as beam
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.io.clock import EARLIEST, can_be
from pipelines.io.rejects import Fault, drop_faults, find_unusable, make_rejects
from pipelines.io.tables import Slice, Source, read_groups
from pipelines.runs.accounting import Count, Outcomes
from schemas.contract import Contract, without_dictionary
from schemas.events import CLICKS
from schemas.reasons import Reason
from schemas.rejects import REJECTS

SLICE = "slice"
"""int32: number of the row group that a row was read from"""
UNCODED = ("exposure_id", "order_id")
"""Ids that hardly ever repeat"""


def time_column(contract: Contract) -> str:
    """Name of a log's time."""
    return next(column.name for column in contract.columns if pa.types.is_timestamp(column.type))


def drop_impossible(
    stage: str, where: Slice, table: pa.Table, contract: Contract, latest: int
) -> tuple[pa.Table, pa.Table]:
    """Split off unusable events and those with an impossible time.

    Returns (events to keep, rejects). Rejected are the events that `find_unusable` finds and those
    with an impossible time.

    A single time in the future would move the end of the log there: open windows would count as
    closed, and days to come as final.
    """
    name = time_column(contract)
    times = table[name].cast(pa.int64()).fill_null(EARLIEST).to_numpy()
    wrong = Fault(
        Reason.IMPOSSIBLE_TIME,
        ~can_be(times, latest),
        lambda row: (
            f"column '{name}' is {np.datetime64(int(times[row]), 'us')}: before "
            f"{np.datetime64(EARLIEST, 'us')} or after {np.datetime64(latest, 'us')}, a day "
            "from now. "
            "Write times in microseconds, UTC, or leave the row out."
        ),
    )
    return drop_faults(stage, where, table, contract, [*find_unusable(table, contract), wrong])


class CleanEvents(beam.DoFn):
    """A step that drops unusable events from each slice.

    (Slice, rows) → rows with all required values and a possible time (up to `latest`), with SLICE.
    Rejects and counts go to side outputs.
    """

    def __init__(self, stage: str, contract: Contract, latest: int) -> None:
        self.stage = stage
        self.contract = contract
        self.latest = latest

    def process(self, element: tuple[Slice, pa.Table]) -> Iterator[Any]:
        where, table = element
        kept, rejects = drop_impossible(
            self.stage, where, table.select(self.contract.names), self.contract, self.latest
        )
        yield kept.append_column(SLICE, pa.array(np.full(kept.num_rows, where.number, dtype=np.int32)))
        yield beam.pvalue.TaggedOutput("counts", Count(self.contract.name, "in", table.num_rows))
        yield beam.pvalue.TaggedOutput("counts", Count(self.contract.name, "rejected", rejects.num_rows))
        if rejects.num_rows:
            yield beam.pvalue.TaggedOutput("rejects", rejects)


@dataclass(frozen=True)
class CleanLog:
    """The usable events of a log.

    Each user's are in order of time and key, and all are in order of time.
    """

    events: pd.DataFrame
    """The contract's columns, except those that serve its key alone. Times are int64 microseconds.
    Texts are int64 codes of the values in `texts`"""
    texts: dict[str, pa.Array]
    """Column → its values, string"""
    rejects: pa.Table
    copies: int
    """Exact copies that were left out"""


def clean_log(stage: str, contract: Contract, table: pa.Table) -> CleanLog:
    """Collapse exact copies of events.

    Of a user's clicks that share an exposure_id and differ, the first by time and values stays and
    the others are rejects. Those of two users are not compared, as users are read in buckets and
    the result must not depend on which users share a bucket.
    """
    time = time_column(contract)
    times = table[time].cast(pa.int64()).to_numpy()
    order = np.argsort(times, kind="stable")
    moments = times[order]
    # Only events of one moment and user can be copies, and only they need the rest of the order.
    same = moments[1:] == moments[:-1]
    tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
    users = encode_texts(table["user_id"].take(pa.array(order[tied])))[0]
    tied = tied[pd.DataFrame({"moment": moments[tied], "user": users}).duplicated(keep=False).to_numpy()]
    copies = np.zeros(len(order), dtype=bool)
    if len(tied):
        names = [time, *contract.key, *(name for name in contract.names if name not in (time, *contract.key))]
        rows = to_frame(table.take(pa.array(order[tied])), contract.names)
        rows[time] = moments[tied]
        ordered = rows.sort_values(names, kind="stable")
        copies[tied] = ordered.duplicated().to_numpy()
        order[tied] = order[tied[ordered.index.to_numpy()]]
    order = order[~copies]
    rejects = REJECTS.schema.empty_table()
    if contract is CLICKS and len(pc.unique(table["exposure_id"])) < len(order):
        rows = to_frame(table.take(pa.array(order)), ["user_id", "exposure_id", "item_id"])
        again = rows.duplicated(["user_id", "exposure_id"]).to_numpy()
        if again.any():
            # The file is not known here: kept logs are by row group, whichever file it lies in.
            # User, item and time locate the row.
            left_out = rows[again].assign(at=times[order[again]].view("datetime64[us]"))
            details = [
                f"table 'clicks': column 'exposure_id': '{row.exposure_id}' stands on "
                f"different clicks of user_id '{row.user_id}'. "
                f"Left out is the one on item_id '{row.item_id}' at {row.at.isoformat()}. "
                "Give each exposure its own id."
                for row in left_out.itertuples()
            ]
            keys = [f"clicks:{exposure}" for exposure in left_out["exposure_id"]]
            rejects = make_rejects(stage, keys, Reason.DUPLICATE_EXPOSURE_ID, details)
            order = order[~again]
    columns: dict[str, Any] = {}
    texts: dict[str, pa.Array] = {}
    for column in contract.columns:
        if column.name == time:
            columns[time] = times[order]
        elif not pa.types.is_string(column.type):
            columns[column.name] = table[column.name].to_pandas().to_numpy()[order]
        elif column.name not in UNCODED:
            codes, texts[column.name] = encode_texts(table[column.name])
            columns[column.name] = codes[order]
    return CleanLog(pd.DataFrame(columns), texts, rejects, int(copies.sum()))


def to_frame(table: pa.Table, names: list[str]) -> pd.DataFrame:
    """Convert some columns to pandas.

    Texts are held as Arrow's strings, since pandas' own would cost a Python object each.
    """
    table = pa.table({name: without_dictionary(table[name]) for name in names})
    return table.to_pandas(types_mapper={pa.string(): pd.StringDtype("pyarrow")}.get)


def encode_texts(*columns: pa.ChunkedArray | pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Encode the texts of some columns as integer codes.

    Returns the code of each value, int64, the columns concatenated, and the values of the codes.
    Codes are equal for equal strings. Texts may be dictionary-encoded.
    """
    chunks: list[pa.Array] = []
    for column in columns:
        coded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        chunks += coded.chunks if isinstance(coded, pa.ChunkedArray) else [coded]
    encoded = pa.chunked_array(chunks, pa.dictionary(pa.int32(), pa.string())).unify_dictionaries().combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        return np.zeros(0, dtype=np.int64), pa.array([], pa.string())
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary


def share_codes(clicks: CleanLog, orders: CleanLog, name: str) -> tuple[np.ndarray, np.ndarray, pa.Array]:
    """Encode one column of both logs under the same codes.

    Returns the shared code of each of a log's own codes, int64, and the values of the shared codes.
    """
    both, values = encode_texts(clicks.texts[name], orders.texts[name])
    edge = len(clicks.texts[name])
    return both[:edge], both[edge:], values


def first_of_each(codes: np.ndarray) -> np.ndarray:
    """Mark each code's first appearance, bool [n].

    Codes are numbered from 0, in order of appearance.
    """
    return np.diff(np.maximum.accumulate(codes), prepend=-1) > 0


def item_codes(log: CleanLog, known: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Find each event's listing in `known`.

    Returns its row, int64 [n], -1 = absent.
    """
    value_set = known.combine_chunks() if isinstance(known, pa.ChunkedArray) else known
    found = pc.fill_null(pc.index_in(log.texts["item_id"], value_set=value_set), -1)
    return found.to_numpy(zero_copy_only=False).astype(np.int64)[log.events["item_id"].to_numpy()]


def usable_orders(log: CleanLog, known: pa.ChunkedArray | pa.Array, as_of: int, outcomes: Outcomes) -> pd.DataFrame:
    """Select the orders that feed labels and counts.

    These are orders known by `as_of`, of a listing of the catalog, and not returned. Their `item`
    code is added.
    """
    orders = log.events.assign(item=item_codes(log, known))
    orders = outcomes.keep(orders, (orders["ordered_at"] <= as_of).to_numpy(dtype=bool), "after_as_of")
    orders = outcomes.keep(orders, (orders["quantity"] > 0).to_numpy(dtype=bool), "returns")
    return outcomes.keep(orders, (orders["item"] >= 0).to_numpy(dtype=bool), "unknown_item")


def usable_clicks(log: CleanLog, known: pa.ChunkedArray | pa.Array, as_of: int, outcomes: Outcomes) -> pd.DataFrame:
    """Select the clicks that feed counts and examples.

    Added are their `item` code, their `session` and its start (its first click, `session_start`).
    """
    clicks = log.events.assign(item=item_codes(log, known))
    clicks = outcomes.keep(clicks, (clicks["clicked_at"] <= as_of).to_numpy(dtype=bool), "after_as_of")
    sessions = max(1, len(log.texts["session_id"]))
    session = pd.factorize(clicks["user_id"].to_numpy() * np.int64(sessions) + clicks["session_id"].to_numpy())[0]
    # The session starts at its first click, whether or not the catalog knows that click's listing;
    # clicks are in order of time.
    start = clicks["clicked_at"].to_numpy()[first_of_each(session)][session]
    clicks = clicks.assign(session=session, session_start=start)
    return outcomes.keep(clicks, (clicks["item"] >= 0).to_numpy(dtype=bool), "unknown_item")


def read_times(source: Source, latest: int) -> np.ndarray:
    """Read the times of a log, int64 microseconds.

    Nulls and impossible times are left out. It takes eight bytes a row in the submitting process.

    Raises:
        InputError: times finer than microseconds.
    """
    column = time_column(source.contract)
    contract = replace(source.contract, columns=tuple(c for c in source.contract.columns if c.name == column))
    pieces = []
    for path in source.files:
        times = read_groups(path, contract, columns=[column])[column]
        found = pc.drop_null(times).cast(pa.int64()).to_numpy()
        pieces.append(found[can_be(found, latest)])
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
