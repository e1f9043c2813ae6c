"""Make examples in two passes: by user and by listing.

The user pass makes sessions, labels, user and pair features, and histories. The listing pass makes
the listing's counts. The module also joins their results.

The user pass makes complete rows except for the listing's counts, and these rows go straight to
their day. Only `_QUERIES`, a few bytes of each, are shuffled by listing, and the counts are joined
to the rows by row number. Until then listings are codes, not ids. All functions are pure, from
table to table.
"""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pyarrow as pa

from pipelines.features.as_of import (
    Events,
    ItemAttributes,
    Queries,
    item_features,
    local_hour_weekday,
    pair_features,
    user_features,
)
from pipelines.features.attribution import attribute_orders
from pipelines.features.history import user_history
from pipelines.features.time_index import DAY_US, NEVER
from pipelines.inputs.logs import clean_log, encode_texts, first_of_each, share_codes, usable_clicks, usable_orders
from pipelines.runs.accounting import Count, Outcomes
from schemas.events import CLICKS, ORDERS
from schemas.training import EXAMPLES

CLICK_EVENT, ORDER_EVENT, CONVERSION_EVENT = 0, 1, 2
ROW = "row"
"""int64: number of an example, unique within the run: bucket of its user times 2^32, plus its place."""
_QUERIES = pa.schema(
    [
        (ROW, pa.int64()),
        ("item", pa.int32()),
        ("store_id", pa.string()),
        ("session_start", pa.int64()),
        ("listed_at", pa.int64()),
    ]
)
_ITEM_EVENTS = pa.schema(
    [
        ("item", pa.int32()),
        ("store_id", pa.string()),
        ("kind", pa.int8()),
        ("time", pa.int64()),
        # number of events of that listing, store and kind that the row represents
        ("weight", pa.int64()),
    ]
)


@dataclass
class UserResult:
    """The results of one bucket of users."""

    examples: pa.Table
    """`EXAMPLES` without the listing's counts, with ROW. item_id and history_item are codes, int32."""
    queries: pa.Table
    """The queries to the listing pass: `_QUERIES`."""
    item_events: pa.Table
    rejects: list[pa.Table] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)


def build_user_examples(
    clicks_table: pa.Table,
    orders_table: pa.Table,
    item_ids: pa.Array,
    attributes: ItemAttributes,
    *,
    stage: str,
    as_of: int,
    window: int,
    history: int,
    timezones: dict[str, str],
    timezone: str,
    bucket: int = 0,
    frozen_before: int = 0,
) -> UserResult:
    """Build the examples of a bucket of users.

    They have labels, user and pair features and histories.

    Args:
        clicks_table: all clicks of these users.
        orders_table: all orders of these users.
        item_ids: ids of the catalog in code order.
        attributes: attributes of each item code.
        stage: name of the stage, for rejects.
        as_of: nothing after it is read, int64 microseconds. Clicks whose window ends after it are
            `open_window`.
        window: attribution window, microseconds.
        history: entries of a history.
        timezones: IANA zone of each store.
        timezone: zone of stores that are not in `timezones`.
        bucket: number of this bucket of users, from which rows are numbered.
        frozen_before: sessions that started before, int64 microseconds, are `final_day`: an earlier
            run built their day for good.
    """
    click_log, order_log = clean_log(stage, CLICKS, clicks_table), clean_log(stage, ORDERS, orders_table)
    click_outcomes, order_outcomes = Outcomes("clicks", []), Outcomes("orders", [])
    click_outcomes.counts += [
        Count("clicks", "duplicates", click_log.copies),
        Count("clicks", "rejected", click_log.rejects.num_rows),
    ]
    order_outcomes.counts += [
        Count("orders", "duplicates", order_log.copies),
        Count("orders", "rejected", order_log.rejects.num_rows),
    ]
    orders = usable_orders(order_log, item_ids, as_of, order_outcomes)
    clicks = usable_clicks(click_log, item_ids, as_of, click_outcomes)
    order_outcomes.counts.append(Count("orders", "out", len(orders)))

    of_clicks, of_orders, _ = share_codes(click_log, order_log, "user_id")
    click_user, order_user = of_clicks[clicks["user_id"]], of_orders[orders["user_id"]]
    of_clicks, of_orders, store_ids = share_codes(click_log, order_log, "store_id")
    click_store, order_store = of_clicks[clicks["store_id"]], of_orders[orders["store_id"]]
    click_item, order_item = clicks["item"].to_numpy(np.int64), orders["item"].to_numpy(np.int64)
    clicked_at, ordered_at = clicks["clicked_at"].to_numpy(np.int64), orders["ordered_at"].to_numpy(np.int64)
    size = np.int64(len(item_ids))
    _, converted_at = attribute_orders(
        click_user * size + click_item, clicked_at, order_user * size + order_item, ordered_at, window
    )
    events = Events(
        click_user=click_user,
        click_item=click_item,
        click_store=click_store,
        clicked_at=clicked_at,
        converted_at=converted_at,
        order_user=order_user,
        order_item=order_item,
        order_store=order_store,
        ordered_at=ordered_at,
    )
    happened = converted_at != NEVER
    item_events = pa.concat_tables(
        [
            _item_events(item, store, store_ids, kind, time, frozen_before)
            for kind, item, store, time in (
                (CLICK_EVENT, click_item, click_store, clicked_at),
                (ORDER_EVENT, order_item, order_store, ordered_at),
                (CONVERSION_EVENT, click_item[happened], click_store[happened], converted_at[happened]),
            )
        ]
    )
    clicks = clicks.assign(user=click_user, label=happened.astype(np.int8))
    # They count in the features of later sessions like all others.
    clicks = click_outcomes.keep(clicks, (clicks["session_start"] >= frozen_before).to_numpy(dtype=bool), "final_day")
    clicked_at = clicks["clicked_at"].to_numpy(np.int64)
    closed = click_outcomes.keep(clicks, (clicked_at + window <= as_of), "open_window")
    # Repeated clicks on one listing in a session are one example: placed where the first was,
    # positive if any led to an order.
    same = pd.factorize(closed["session"].to_numpy() * size + closed["item"].to_numpy())[0]
    bought = np.bincount(same, weights=closed["label"]) > 0
    closed = closed.assign(label=bought[same].astype(np.int8))
    first = click_outcomes.keep(closed, first_of_each(same), "repeated_clicks")
    click_outcomes.counts.append(Count("clicks", "out", len(first)))
    examples = _describe(first, click_log.texts, events, attributes, history, timezones, timezone)
    rows = pa.array(np.arange(len(first), dtype=np.int64) + (bucket << 32))
    examples = examples.append_column(ROW, rows)
    queries = pa.table(
        {
            ROW: rows,
            "item": examples["item_id"],
            "store_id": examples["store_id"],
            "session_start": examples["session_start"].cast(pa.int64()),
            "listed_at": attributes.listed_at[examples["item_id"].to_numpy()],
        },
        schema=_QUERIES,
    )
    return UserResult(
        examples,
        queries,
        item_events,
        [click_log.rejects, order_log.rejects],
        [*click_outcomes.counts, *order_outcomes.counts],
    )


def _item_events(
    item: np.ndarray, store: np.ndarray, store_ids: pa.Array, kind: int, time: np.ndarray, frozen_before: int
) -> pa.Table:
    """Make the events of one kind for `_ITEM_EVENTS`.

    Every query is of a session that starts at `frozen_before` or later, so all earlier events
    precede it. Such events of a listing in a store are reduced to one row, at the first click, or
    at the last order.
    """
    early = time < frozen_before
    pair = item[early] * np.int64(max(1, len(store_ids))) + store[early]
    code, pairs = pd.factorize(pair)
    moment = np.full(len(pairs), NEVER if kind == CLICK_EVENT else -NEVER)
    (np.minimum if kind == CLICK_EVENT else np.maximum).at(moment, code, time[early])
    sums = np.divmod(pairs, max(1, len(store_ids)))
    late = ~early
    columns = {
        "item": np.concatenate([sums[0], item[late]]).astype(np.int32),
        "store_id": store_ids.take(pa.array(np.concatenate([sums[1], store[late]]))),
        "kind": np.full(len(pairs) + int(late.sum()), kind, dtype=np.int8),
        "time": np.concatenate([moment, time[late]]),
        "weight": np.concatenate([np.bincount(code, minlength=len(pairs)), np.ones(int(late.sum()), dtype=np.int64)]),
    }
    return pa.table(columns, schema=_ITEM_EVENTS)


def _describe(
    first: pd.DataFrame,
    texts: dict[str, pa.Array],
    events: Events,
    attributes: ItemAttributes,
    length: int,
    timezones: dict[str, str],
    timezone: str,
) -> pa.Table:
    user, item, start = (
        first["user"].to_numpy(np.int64),
        first["item"].to_numpy(np.int64),
        first["session_start"].to_numpy(np.int64),
    )
    # User features and histories once per session, then spread over its examples.
    session_user, session_start, session_row = _distinct_sessions(user, start)
    per_session = user_features(events, session_user, session_start)
    history = user_history(events, session_user, session_start, length)
    pairs = pair_features(events, Queries(user=user, item=item, store=np.zeros_like(user), time=start), attributes)
    zones = [timezones.get(name, timezone) for name in texts["store_id"].to_pylist()]
    hour, weekday = local_hour_weekday(start, first["store_id"].to_numpy(), zones)
    valid = history.kind != 0
    lengths = valid.sum(axis=1)
    rows, offsets = _spread(lengths, session_row)
    flat_item, flat_kind, flat_hours = history.item[valid], history.kind[valid], history.hours[valid]

    def nested(values: pa.Array) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)

    strings = {name: texts[name].take(pa.array(first[name])) for name in ("user_id", "session_id", "store_id")}
    return pa.table(
        {
            **strings,
            "item_id": item.astype(np.int32),
            "session_start": pa.array(start).cast(pa.timestamp("us")),
            "clicked_at": pa.array(first["clicked_at"].to_numpy(np.int64)).cast(pa.timestamp("us")),
            "position": pa.Array.from_pandas(first["position"], type=pa.int64())
            if first["position"].notna().any()
            else pa.nulls(len(first), pa.int64()),
            "label": first["label"].to_numpy(np.int8),
            "hour": hour,
            "weekday": weekday,
            **{name: _nullable(values[session_row]) for name, values in per_session.items()},
            **{name: _nullable(values) for name, values in pairs.items()},
            "history_item": nested(pa.array(flat_item.astype(np.int32)[rows])),
            "history_kind": nested(pa.array(flat_kind[rows])),
            "history_hours": nested(pa.array(flat_hours[rows])),
        }
    )


def _distinct_sessions(user: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the distinct (user, start), in that order.

    Also returns each row's index among them.
    """
    order = np.lexsort((start, user))
    new = np.ones(len(order), dtype=bool)
    new[1:] = (np.diff(user[order]) != 0) | (np.diff(start[order]) != 0)
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.cumsum(new) - 1
    return user[order[new]], start[order[new]], place


def _spread(lengths: np.ndarray, session_row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each example's rows of the flat history.

    The rows are in order. The list offsets come with them.
    """
    starts = np.concatenate([[0], np.cumsum(lengths)])
    own = lengths[session_row]
    offsets = np.concatenate([[0], np.cumsum(own)])
    rows = np.repeat(starts[session_row] - offsets[:-1], own) + np.arange(offsets[-1])
    return rows.astype(np.int64), offsets.astype(np.int32)


def _nullable(values: np.ndarray) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))


def build_item_features(queries: pa.Table, item_events: pa.Table) -> pa.Table:
    """Compute the listing counts of a bucket's queries.

    Returns ROW and `ITEM_COUNTS` of a bucket of listings' queries. `item_events` are all their
    clicks, orders and conversions.
    """
    item, kind, time, weight = (item_events[name].to_numpy() for name in ("item", "kind", "time", "weight"))
    item = item.astype(np.int64)
    n = len(item)
    stores, names = encode_texts(item_events["store_id"], queries["store_id"])
    clicks, orders, conversions = (
        np.flatnonzero(kind == value) for value in (CLICK_EVENT, ORDER_EVENT, CONVERSION_EVENT)
    )
    # A listing's counts depend on when a click converted, not on which one: conversions have an index of their own.
    start = queries["session_start"].to_numpy()
    asked = Queries(
        user=np.zeros(len(start), dtype=np.int64),
        item=queries["item"].to_numpy().astype(np.int64),
        store=stores[n:],
        time=start,
    )
    features = item_features(
        click_item=item[clicks],
        click_store=stores[:n][clicks],
        clicked_at=time[clicks],
        conversion_item=item[conversions],
        converted_at=time[conversions],
        order_item=item[orders],
        order_store=stores[:n][orders],
        ordered_at=time[orders],
        queries=asked,
        click_weight=weight[clicks],
        conversion_weight=weight[conversions],
        order_weight=weight[orders],
        listed_at=queries["listed_at"].to_numpy(),
        n_stores=len(names),
    )
    return pa.table({ROW: queries[ROW], **{name: _nullable(values) for name, values in features.items()}})


def finish_examples(examples: pa.Table, counts: pa.Table, item_ids: pa.Array) -> pa.Table:
    """Assemble complete rows under `EXAMPLES`.

    A row has the user pass's columns, the counts of the same row, and ids instead of codes.

    Args:
        examples: rows of the user pass, in any order.
        counts: listing counts of the same rows, in any order.
        item_ids: ids of the catalog in code order.
    """
    rows, asked = counts[ROW].to_numpy(), examples[ROW].to_numpy()
    order = np.argsort(rows)
    place = pa.array(order[np.searchsorted(rows, asked, sorter=order)])
    history = examples["history_item"].combine_chunks()
    columns = {name: examples[name] for name in examples.column_names}
    columns |= {name: counts[name].take(place) for name in counts.column_names}
    columns["item_id"] = item_ids.take(examples["item_id"].combine_chunks())
    columns["history_item"] = pa.ListArray.from_arrays(history.offsets, item_ids.take(history.values))
    return pa.table({name: columns[name] for name in EXAMPLES.names})


def cut_long_days(clicked_at: np.ndarray, rows: int) -> np.ndarray:
    """Find the times at which large days are cut.

    Pieces are cut by time, not by users. One after another they are the day in order, however many
    there are.

    Args:
        clicked_at: int64 microseconds [n], of approximately the clicks that become examples.
        rows: approximate number of clicks of a piece.

    Returns:
        The first time of each piece but a day's first, int64 microseconds, in order.
    """
    day = clicked_at // DAY_US
    first = int(day.min(initial=NEVER))
    counts = np.bincount(day - first)
    cuts: list[int] = []
    for number in np.flatnonzero(counts >= 1.5 * rows):
        times = np.sort(clicked_at[day == first + number])
        pieces = round(len(times) / rows)
        cuts += [int(times[len(times) * piece // pieces]) for piece in range(1, pieces)]
    return np.unique(np.array(cuts, dtype=np.int64))
