"""The features of user, listing and pair before a time.

These as-of features hold what was known strictly before that time.

One set of functions serves training (the time is the session's first click) and scoring (the time
is the score's own). They take events as arrays and queries as arrays, and never read an event at or
after a query's time. Times are int64 microseconds, UTC. Ids are int64 codes.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.features.time_index import DAY_US, NEVER, Ints, TimeIndex

Floats = NDArray[np.float32]
FEATURES_VERSION = 5
"""Raised by one whenever the same events yield other features or histories: all days of a shard set
share one version."""
PRIOR_CVR = 0.15
PRIOR_CLICKS = 20.0
"""A new listing or user starts at a CVR of 0.15 with the weight of 20 clicks. Constants, not
today's rates, so that yesterday's features stay what they were."""


@dataclass(frozen=True, kw_only=True)
class Events:
    """Clicks and orders as codes.

    `converted_at` is when a click's first credited order came, NEVER = none (yet).
    """

    click_user: Ints
    click_item: Ints
    click_store: Ints
    clicked_at: Ints
    converted_at: Ints
    order_user: Ints
    order_item: Ints
    order_store: Ints
    ordered_at: Ints


@dataclass(frozen=True, kw_only=True)
class Queries:
    """The point-in-time query keys: users, listings, stores and times.

    Each is int64 [n]. A user or store of -1 has no events.
    """

    user: Ints
    item: Ints
    store: Ints
    time: Ints


def _pair(left: Ints, right: Ints, size: int) -> Ints:
    return left * np.int64(size) + right


def _counts(index: TimeIndex, key: Ints, time: Ints) -> Floats:
    return index.count(key, time).astype(np.float32)


def _counts_and_days(index: TimeIndex, key: Ints, time: Ints) -> tuple[Floats, Floats]:
    """Count events before each time, and days since the last.

    The days are NaN where there is no event.
    """
    count, _, last = index.count_first_last(key, time)
    return count.astype(np.float32), _days(last, time)


def _days(since: Ints, time: Ints) -> Floats:
    """Return the days from `since` to `time`.

    They are NaN where `since` is NEVER.
    """
    return np.where(since == NEVER, np.nan, (time - since) / DAY_US).astype(np.float32)


def smoothed_cvr(conversions: Floats, clicks: Floats) -> Floats:
    """Return the smoothed CVR, float32 [n].

    It is (conversions + prior) / (clicks + prior weight).
    """
    return ((conversions + np.float32(PRIOR_CVR * PRIOR_CLICKS)) / (clicks + np.float32(PRIOR_CLICKS))).astype(
        np.float32
    )


def user_features(events: Events, user: Ints, time: Ints) -> dict[str, Floats]:
    """Compute columns of `AUDIENCE_COUNTS` for each (user, time).

    They are float32 [n].

    Clicks and orders are expressed as rates. Counts grow with the log for every user, so a model
    would read the log's age from them, and mistake a new listing among long-standing users for an
    old one without demand.
    """
    clicks = TimeIndex(events.click_user, events.clicked_at)
    orders = TimeIndex(events.order_user, events.ordered_at)
    happened = events.converted_at != NEVER
    conversions = TimeIndex(events.click_user[happened], events.converted_at[happened])
    n_clicks, first_click, _ = clicks.count_first_last(user, time)
    n_orders, first_order, last_order = orders.count_first_last(user, time)
    days = 1 + (time - np.minimum(np.minimum(first_click, first_order), time)) / DAY_US
    return {
        "user_clicks_per_day": (n_clicks / days).astype(np.float32),
        "user_orders_per_day": (n_orders / days).astype(np.float32),
        "user_cvr": smoothed_cvr(_counts(conversions, user, time), n_clicks.astype(np.float32)),
        "user_days_since_order": _days(last_order, time),
    }


def item_features(
    *,
    click_item: Ints,
    click_store: Ints,
    clicked_at: Ints,
    conversion_item: Ints,
    converted_at: Ints,
    order_item: Ints,
    order_store: Ints,
    ordered_at: Ints,
    queries: Queries,
    listed_at: Ints,
    n_stores: int,
    click_weight: Ints | None = None,
    conversion_weight: Ints | None = None,
    order_weight: Ints | None = None,
) -> dict[str, Floats]:
    """Compute columns of `ITEM_COUNTS` for each query.

    A query is (item, store, time). Each column is float32 [n].

    Args:
        click_item: item of each click.
        click_store: store of each click.
        clicked_at: time of each click.
        conversion_item: item of each first order credited to a click.
        converted_at: time of each first order credited to a click.
        order_item: item of each order.
        order_store: store of each order.
        ordered_at: time of each order.
        queries: point-in-time query keys.
        listed_at: when each query's listing was first offered, int64 [n] microseconds, NEVER =
            unknown. A time at or after the query's time counts as unknown.
        n_stores: number of stores.
        click_weight: number of clicks that each row represents. None = one.
        conversion_weight: number of conversions that each row represents. None = one.
        order_weight: number of orders that each row represents. None = one.
    """
    clicks, first, _ = TimeIndex(click_item, clicked_at, click_weight).count_first_last(queries.item, queries.time)
    n_clicks = clicks.astype(np.float32)
    n_conversions = _counts(TimeIndex(conversion_item, converted_at, conversion_weight), queries.item, queries.time)
    n_orders, days = _counts_and_days(TimeIndex(order_item, ordered_at, order_weight), queries.item, queries.time)
    listed = np.where(listed_at < queries.time, listed_at, NEVER)
    here = np.where(queries.store >= 0, _pair(queries.item, queries.store, n_stores), -1)
    return {
        "item_clicks": n_clicks,
        "item_orders": n_orders,
        "item_cvr": smoothed_cvr(n_conversions, n_clicks),
        "item_days_since_listed": _days(listed, queries.time),
        "item_days_since_first_click": _days(first, queries.time),
        "item_days_since_order": days,
        "store_item_clicks": _counts(
            TimeIndex(_pair(click_item, click_store, n_stores), clicked_at, click_weight), here, queries.time
        ),
        "store_item_orders": _counts(
            TimeIndex(_pair(order_item, order_store, n_stores), ordered_at, order_weight), here, queries.time
        ),
    }


@dataclass(frozen=True, kw_only=True)
class ItemAttributes:
    """The catalog's attributes of each item code.

    All are int64 [items]: codes of subcategory and brand, -1 = unknown, which matches nothing, and
    `listed_at`, microseconds, NEVER = unknown.
    """

    subcategory: Ints
    brand: Ints
    listed_at: Ints

    @property
    def size(self) -> int:
        """Return the number of items."""
        return len(self.subcategory)


def pair_features(events: Events, queries: Queries, items: ItemAttributes) -> dict[str, Floats]:
    """Compute columns of `PAIR_COUNTS` for each query.

    A query is (user, item, time). Each column is float32 [n].
    """
    n_groups = 1 + int(max(items.subcategory.max(initial=-1), items.brand.max(initial=-1), 0))
    pair = _pair(queries.user, queries.item, items.size)
    n_clicks, click_days = _counts_and_days(
        TimeIndex.of_asked(pair, _pair(events.click_user, events.click_item, items.size), events.clicked_at),
        pair,
        queries.time,
    )
    n_orders, order_days = _counts_and_days(
        TimeIndex.of_asked(pair, _pair(events.order_user, events.order_item, items.size), events.ordered_at),
        pair,
        queries.time,
    )

    def in_group(user: Ints, item: Ints, time: Ints, codes: Ints) -> Floats:
        group, asked = codes[item], codes[queries.item]
        # Events of no group are stored under a key that no query has.
        key = np.where(group >= 0, _pair(user, group, n_groups), -1)
        wanted = np.where(asked >= 0, _pair(queries.user, asked, n_groups), -2)
        return _counts(TimeIndex.of_asked(wanted, key, time), wanted, queries.time)

    known_user = queries.user >= 0
    features = {
        "pair_clicks": n_clicks,
        "pair_orders": n_orders,
        "pair_days_since_click": click_days,
        "pair_days_since_order": order_days,
        "user_subcategory_clicks": in_group(events.click_user, events.click_item, events.clicked_at, items.subcategory),
        "user_subcategory_orders": in_group(events.order_user, events.order_item, events.ordered_at, items.subcategory),
        "user_brand_orders": in_group(events.order_user, events.order_item, events.ordered_at, items.brand),
    }
    for name, values in features.items():
        values[~known_user] = np.nan if "days" in name else 0
    return features


def local_hour_weekday(
    time: Ints, store: Ints, store_timezones: list[str]
) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Return each time's hour and weekday in its store.

    The hour (0 to 23) and weekday (0 = Monday) are on the clock of the time's store, int8 [n].

    Args:
        time: int64 microseconds, UTC.
        store: code of the store, an index into `store_timezones`.
        store_timezones: IANA name of each store's zone.
    """
    hour, weekday = np.zeros(len(time), dtype=np.int8), np.zeros(len(time), dtype=np.int8)
    zones = np.asarray(store_timezones, dtype=object)[store] if len(time) else np.zeros(0, dtype=object)
    for zone in sorted(set(zones)):
        rows = np.flatnonzero(zones == zone)
        local = pd.DatetimeIndex(time[rows].view("datetime64[us]")).tz_localize("UTC").tz_convert(zone)
        hour[rows], weekday[rows] = local.hour, local.weekday
    return hour, weekday


ATTRIBUTES = ("subcategory", "brand", "listed_at")
"""Columns of the items from which features are computed."""


def item_attributes(items: pa.Table) -> ItemAttributes:
    """Return the attributes of items with the columns `ATTRIBUTES`.

    They are in the items' order.
    """
    codes = [pd.factorize(items[name].to_pandas())[0].astype(np.int64) for name in ("subcategory", "brand")]
    listed_at = pc.fill_null(items["listed_at"].cast(pa.int64()), NEVER).to_numpy()
    return ItemAttributes(subcategory=codes[0], brand=codes[1], listed_at=listed_at)
