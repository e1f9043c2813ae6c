"""The expected output of the shards stage, row by row: loops over dicts, nothing shared with the
code under test.

Events are dicts with the columns of `clicks` and `orders`. Times are int microseconds, UTC. Slow on
purpose, so that each rule can be read.
"""

import datetime
import math
import struct
import zoneinfo
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]

HOUR = 3_600_000_000
DAY = 24 * HOUR
PRIOR_CONVERSIONS = 3.0
PRIOR_CLICKS = 20.0
CLICK_COLUMNS = ("exposure_id", "session_id", "user_id", "store_id", "item_id", "clicked_at", "position")
ORDER_COLUMNS = ("order_id", "user_id", "store_id", "item_id", "ordered_at", "quantity")


def single(value: float | None) -> float | None:
    """The nearest single-precision number; None stays."""
    return None if value is None else struct.unpack("<f", struct.pack("<f", value))[0]


@dataclass
class Settings:
    """The flags of the stage that matter here."""

    as_of: int
    window: int
    history: int
    timezones: dict[str, str] = field(default_factory=dict)
    timezone: str = "UTC"


@dataclass
class Answer:
    """Examples by (user, session, item), and the outcome of every row of a log: {outcome: rows}."""

    examples: dict[tuple[str, str, str], Row]
    clicks: Counter[str]
    orders: Counter[str]
    duplicate_exposures: list[Row]


def complete(rows: list[Row], columns: tuple[str, ...], counts: Counter[str]) -> list[Row]:
    """Rows with a value in every required column."""
    kept = []
    for row in rows:
        if any(row[name] is None for name in columns if name != "position"):
            counts["rejected"] += 1
        else:
            kept.append(row)
    return kept


def without_copies(rows: list[Row], columns: tuple[str, ...], counts: Counter[str]) -> list[Row]:
    """Every distinct row once."""
    kept: list[Row] = []
    seen = set()
    for row in rows:
        values = tuple(row[name] for name in columns)
        if values in seen:
            counts["duplicates"] += 1
        else:
            seen.add(values)
            kept.append(row)
    return kept


def click_order(click: Row) -> tuple[Any, ...]:
    """By time; at the same time by exposure, then by the other values, an unknown position last."""
    ids = tuple(click[name] for name in ("exposure_id", "session_id", "user_id", "store_id", "item_id"))
    return (click["clicked_at"], *ids, math.inf if click["position"] is None else click["position"])


def clean_clicks(rows: list[Row], items: set[str], as_of: int, counts: Counter[str]) -> tuple[list[Row], list[Row]]:
    """Return the usable clicks, and those of a repeated exposure.

    (usable clicks, earliest first, each with its session's start; clicks whose exposure_id the user
    already has on another click)
    """
    rows = sorted(without_copies(complete(rows, CLICK_COLUMNS, counts), CLICK_COLUMNS, counts), key=click_order)
    seen: set[tuple[str, str]] = set()
    once, again = [], []
    for click in rows:
        if (click["user_id"], click["exposure_id"]) in seen:
            counts["rejected"] += 1
            again.append(click)
        else:
            seen.add((click["user_id"], click["exposure_id"]))
            once.append(click)
    usable = []
    for click in once:
        if click["clicked_at"] > as_of:
            counts["after_as_of"] += 1
        elif click["item_id"] not in items:
            counts["unknown_item"] += 1
        else:
            of_session = [
                c["clicked_at"]
                for c in once
                if c["user_id"] == click["user_id"] and c["session_id"] == click["session_id"]
            ]
            usable.append({**click, "session_start": min(of_session), "ordered_at": None})
    return usable, again


def clean_orders(rows: list[Row], items: set[str], as_of: int, counts: Counter[str]) -> list[Row]:
    """Usable order lines."""
    usable = []
    for order in without_copies(complete(rows, ORDER_COLUMNS, counts), ORDER_COLUMNS, counts):
        if order["ordered_at"] > as_of:
            counts["after_as_of"] += 1
        elif order["quantity"] <= 0:
            counts["returns"] += 1
        elif order["item_id"] not in items:
            counts["unknown_item"] += 1
        else:
            counts["out"] += 1
            usable.append(order)
    return usable


def credit(clicks: list[Row], orders: list[Row], window: int) -> None:
    """Set `ordered_at` of each click to the time of its first order, if any."""
    for order in orders:
        latest = None
        for click in clicks:
            same = click["user_id"] == order["user_id"] and click["item_id"] == order["item_id"]
            if same and click["clicked_at"] <= order["ordered_at"]:
                latest = click
        if latest is not None and order["ordered_at"] - latest["clicked_at"] <= window:
            known = latest["ordered_at"]
            latest["ordered_at"] = order["ordered_at"] if known is None else min(known, order["ordered_at"])


def smoothed(conversions: int, clicks: int) -> float:
    """A rate that starts at 3 of 20."""
    return (conversions + PRIOR_CONVERSIONS) / (clicks + PRIOR_CLICKS)


def days_since(times: list[int], start: int) -> float | None:
    """Days since the last of `times`."""
    return (start - max(times)) / DAY if times else None


def describe(
    user: str,
    item: str,
    store: str,
    start: int,
    clicks: list[Row],
    orders: list[Row],
    catalog: dict[str, Row],
    history: int,
) -> Row:
    """Every feature of (user, item, store) at `start`, from earlier events alone."""
    clicks = [
        {**c, "known": c["ordered_at"] is not None and c["ordered_at"] < start}
        for c in clicks
        if c["clicked_at"] < start
    ]
    orders = [o for o in orders if o["ordered_at"] < start]
    my_clicks, my_orders = ([e for e in events if e["user_id"] == user] for events in (clicks, orders))
    its_clicks, its_orders = ([e for e in events if e["item_id"] == item] for events in (clicks, orders))
    pair_clicks, pair_orders = ([e for e in events if e["item_id"] == item] for events in (my_clicks, my_orders))

    def group(events: list[Row], column: str) -> int:
        wanted = catalog[item][column]
        return 0 if wanted is None else sum(catalog[e["item_id"]][column] == wanted for e in events)

    listed = catalog[item]["listed_at"]
    first_seen = min([c["clicked_at"] for c in my_clicks] + [o["ordered_at"] for o in my_orders], default=start)
    days_known = 1 + (start - first_seen) / DAY
    # A conversion counts when it becomes known, whenever its click was.
    features = {
        "user_clicks_per_day": len(my_clicks) / days_known,
        "user_orders_per_day": len(my_orders) / days_known,
        "user_cvr": smoothed(sum(c["known"] for c in my_clicks), len(my_clicks)),
        "user_days_since_order": days_since([o["ordered_at"] for o in my_orders], start),
        "item_clicks": len(its_clicks),
        "item_orders": len(its_orders),
        "item_cvr": smoothed(sum(c["known"] for c in its_clicks), len(its_clicks)),
        "item_days_since_listed": days_since([listed] if listed is not None and listed < start else [], start),
        "item_days_since_first_click": days_since(
            [min(c["clicked_at"] for c in its_clicks)] if its_clicks else [], start
        ),
        "item_days_since_order": days_since([o["ordered_at"] for o in its_orders], start),
        "store_item_clicks": sum(c["store_id"] == store for c in its_clicks),
        "store_item_orders": sum(o["store_id"] == store for o in its_orders),
        "pair_clicks": len(pair_clicks),
        "pair_orders": len(pair_orders),
        "pair_days_since_click": days_since([c["clicked_at"] for c in pair_clicks], start),
        "pair_days_since_order": days_since([o["ordered_at"] for o in pair_orders], start),
        "user_subcategory_clicks": group(my_clicks, "subcategory"),
        "user_subcategory_orders": group(my_orders, "subcategory"),
        "user_brand_orders": group(my_orders, "brand"),
    }
    past = [(-o["ordered_at"], 0, o["item_id"]) for o in my_orders]
    past += [(-c["clicked_at"], 1, c["item_id"]) for c in my_clicks if not c["known"]]
    past = latest_history(sorted(past), history)
    return {name: single(value) for name, value in features.items()} | {
        "history_item": [name for _, _, name in past],
        "history_kind": [1 if clicked else 2 for _, clicked, _ in past],
        "history_hours": [single((start + minus) / HOUR) for minus, _, _ in past],
    }


def latest_history(past: list[tuple[int, int, str]], length: int) -> list[tuple[int, int, str]]:
    """Return the last `length` events, latest first.

    Events are (−time, 1 if clicked, item). Old clicks among them make room, one by one, for older
    purchases.
    """
    shown, rest = past[:length], past[length:]
    for purchase in [event for event in rest if event[1] == 0]:
        clicks = [event for event in shown if event[1] == 1]
        if len(clicks) <= length // 4:
            break
        shown.reverse()
        shown.remove(clicks[-1])
        shown.reverse()
        shown.append(purchase)
    return shown


def local_time(time: int, zone: str) -> datetime.datetime:
    """The instant on the clock of a zone."""
    instant = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(microseconds=time)
    return instant.astimezone(zoneinfo.ZoneInfo(zone))


def build(clicks: list[Row], orders: list[Row], catalog: list[Row], settings: Settings) -> Answer:
    """Examples and row counts of two logs."""
    listings = {row["item_id"]: row for row in catalog}
    counts: tuple[Counter[str], Counter[str]] = Counter(), Counter()
    usable, again = clean_clicks(clicks, set(listings), settings.as_of, counts[0])
    bought = clean_orders(orders, set(listings), settings.as_of, counts[1])
    credit(usable, bought, settings.window)
    closed: dict[tuple[str, str, str], list[Row]] = {}
    for click in usable:
        if click["clicked_at"] + settings.window > settings.as_of:
            counts[0]["open_window"] += 1
        else:
            closed.setdefault((click["user_id"], click["session_id"], click["item_id"]), []).append(click)
    examples = {}
    for (user, session, item), same in closed.items():
        first = same[0]
        counts[0]["out"] += 1
        counts[0]["repeated_clicks"] += len(same) - 1
        clock = local_time(first["session_start"], settings.timezones.get(first["store_id"], settings.timezone))
        examples[user, session, item] = {
            "user_id": user,
            "session_id": session,
            "store_id": first["store_id"],
            "item_id": item,
            "session_start": first["session_start"],
            "clicked_at": first["clicked_at"],
            "position": first["position"],
            "label": int(any(click["ordered_at"] is not None for click in same)),
            "hour": clock.hour,
            "weekday": clock.weekday(),
            **describe(
                user, item, first["store_id"], first["session_start"], usable, bought, listings, settings.history
            ),
        }
    return Answer(examples, counts[0], counts[1], again)
