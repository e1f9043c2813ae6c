"""Scoring a past click at its own time gives training's features, bitwise equal."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.features.as_of import Events, ItemAttributes, Queries, item_attributes, item_features, pair_features
from pipelines.features.time_index import NEVER
from pipelines.io.tables import Source
from pipelines.score.snapshot import Snapshot, active_users, audience_features, build_log, recent_activity
from schemas.events import CLICKS, ORDERS
from schemas.training import AUDIENCE_COUNTS, ITEM_COUNTS, PAIR_COUNTS
from tests.support import shard_reference
from tests.support.shard_reference import DAY, HOUR, Row, Settings
from tests.support.small_city import CATALOG_ROWS, ITEMS, START, build_examples, items_table, random_city, write_data

CITY_ITEMS = items_table(CATALOG_ROWS)
HISTORY = 5


def sources(data: Path) -> tuple[Source, Source]:
    return Source.find(str(data), CLICKS), Source.find(str(data), ORDERS)


def as_scored(data: Path, folder: Path, time: int, keys: list[tuple[str, str, str]]) -> list[Row]:
    """Features of (user, item, store) at `time`, as the workers of `camenn score` get them."""
    attributes = item_attributes(CITY_ITEMS)
    log, _, _ = build_log("score", *sources(data), CITY_ITEMS["item_id"], attributes, time, 24 * HOUR)
    Snapshot.build(log).write(str(folder))
    snapshot = Snapshot.read(str(folder))
    users, stores = log.user_codes([user for user, _, _ in keys]), log.store_codes([store for _, _, store in keys])
    everything = np.arange(len(ITEMS))
    tile = snapshot.tile(users, stores, everything, attributes.subcategory, attributes.brand)
    tile = {name: np.broadcast_to(values, (len(keys), len(ITEMS))) for name, values in tile.items()}
    counts, history, kind, hours = audience_features(log, users, HISTORY)
    found = []
    for number, (_, item, _) in enumerate(keys):
        values = {name: column[number, ITEMS.index(item)] for name, column in tile.items()}
        values |= {name: column[number] for name, column in counts.items()}
        assert all(value.dtype == np.float32 for value in values.values())
        row: Row = {name: None if np.isnan(value) else value.item() for name, value in values.items()}
        past = kind[number] > 0
        row["history_item"] = [ITEMS[code] for code in history[number, past]]
        row["history_kind"] = kind[number, past].tolist()
        row["history_hours"] = hours[number, past].tolist()
        found.append(row)
    return found


@pytest.mark.parametrize("seed", [5, 6])
def test_snapshot_gives_a_past_click_its_training_features(tmp_path: Path, seed: int) -> None:
    clicks, orders = random_city(seed, 250, 200, users=6)
    data = write_data(tmp_path / "data", clicks, orders, files=2, row_group_size=60)
    flags = Settings(as_of=START + 40 * DAY, window=24 * HOUR, history=HISTORY)
    examples, _ = build_examples(
        [c for c in clicks if c["user_id"]], [o for o in orders if o["quantity"] is not None], CATALOG_ROWS, flags
    )
    by_start: dict[int, list[Row]] = {}
    for row in examples.values():
        by_start.setdefault(row["session_start"], []).append(row)
    starts = sorted(by_start)
    names = [column.name for column in (*AUDIENCE_COUNTS, *ITEM_COUNTS, *PAIR_COUNTS)] + [
        "history_item",
        "history_kind",
        "history_hours",
    ]
    compared = 0
    for number, time in enumerate([*starts[:2], *starts[2::4]]):
        rows = by_start[time]
        scored = as_scored(
            data,
            tmp_path / f"snapshot-{number}",
            time,
            [(row["user_id"], row["item_id"], row["store_id"]) for row in rows],
        )
        assert scored == [{name: row[name] for name in scored[0]} for row in rows]
        assert set(scored[0]) == set(names)
        compared += len(rows)
    assert compared > 20


def test_snapshot_of_empty_logs_and_of_strangers(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", [], [])
    row = as_scored(data, tmp_path / "snapshot", START, [("nobody", "i1", "nowhere")])[0]
    assert row["user_cvr"] == row["item_cvr"] == np.float32(0.15).item()
    assert {value for name, value in row.items() if "days_since" in name} == {None}
    assert {value for name, value in row.items() if name.endswith(("clicks", "orders"))} == {0.0}
    assert row["history_item"] == []


def test_item_features_know_nothing_of_an_unknown_store() -> None:
    """A store of -1 must not be read as the last store of the previous listing."""
    one, none = np.array([1]), np.zeros(0, dtype=np.int64)
    queries = Queries(user=one, item=np.array([1]), store=np.array([-1]), time=np.array([100]))
    for clicked in (True, False):
        events: dict[str, Any] = {f"{kind}_item": none for kind in ("click", "conversion", "order")}
        events |= {
            "click_store": none,
            "order_store": none,
            "clicked_at": none,
            "converted_at": none,
            "ordered_at": none,
        }
        kind, time = ("click", "clicked_at") if clicked else ("order", "ordered_at")
        events |= {f"{kind}_item": np.array([0]), f"{kind}_store": np.array([2]), time: np.array([5])}
        features = item_features(**events, queries=queries, listed_at=np.array([50]), n_stores=3)
        assert features["store_item_clicks"].tolist() == features["store_item_orders"].tolist() == [0.0]


def test_build_log_accounts_for_every_row(tmp_path: Path) -> None:
    clicks, orders = random_city(8, 300, 200)
    data = write_data(tmp_path / "data", clicks, orders, files=3, row_group_size=40)
    # An order at that very time is not known yet.
    time = sorted(
        order["ordered_at"] for order in orders if (order["quantity"] or 0) > 0 and order["item_id"] != "gone"
    )[120]
    log, rejects, counted = build_log(
        "score", *sources(data), CITY_ITEMS["item_id"], item_attributes(CITY_ITEMS), time, 24 * HOUR
    )
    counts: dict[str, Counter[str]] = {"clicks": Counter(), "orders": Counter()}
    for count in counted:
        counts[count.table][count.where] += count.rows
    expected = shard_reference.build(
        clicks, orders, CATALOG_ROWS, Settings(as_of=time - 1, window=24 * HOUR, history=1)
    )
    usable = sum(expected.clicks[name] for name in ("out", "repeated_clicks", "open_window"))
    dropped = {name: expected.clicks[name] for name in ("duplicates", "rejected", "after_as_of", "unknown_item")}
    assert counts["clicks"] == {"in": len(clicks), "out": usable, **dropped}
    assert counts["orders"] == {"in": len(orders), **expected.orders}
    assert min(counts["clicks"].values()) > 0 < min(counts["orders"].values())
    for table in counts.values():
        assert table["in"] == sum(rows for where, rows in table.items() if where != "in")
    assert sum(table.num_rows for table in rejects) == counts["clicks"]["rejected"] + counts["orders"]["rejected"]
    assert (len(log.events.clicked_at), len(log.events.ordered_at)) == (usable, expected.orders["out"])
    assert max(log.events.clicked_at.max(), log.events.ordered_at.max()) < time


def test_a_tile_holds_the_listings_that_it_is_asked_for(tmp_path: Path) -> None:
    """Some listings, in any order, have the same columns as among all listings."""
    data = write_data(tmp_path / "data", *random_city(4, 200, 150, users=6))
    attributes = item_attributes(CITY_ITEMS)
    log, _, _ = build_log("score", *sources(data), CITY_ITEMS["item_id"], attributes, START + 9 * DAY, 24 * HOUR)
    snapshot = Snapshot.build(log)
    users, stores = log.user_codes(["u1", None, "u0", "u1"]), log.store_codes(["s2", "s0", "s0", "s1"])

    def tile(rows: np.ndarray) -> dict[str, np.ndarray]:
        found = snapshot.tile(users, stores, rows, attributes.subcategory[rows], attributes.brand[rows])
        return {name: np.broadcast_to(values, (len(users), len(rows))) for name, values in found.items()}

    every, some = tile(np.arange(len(ITEMS))), np.array([3, 0, 2])
    for name, values in tile(some).items():
        assert np.array_equal(values, every[name][:, some], equal_nan=True), name
    assert len(np.unique(every["item_clicks"])) > 3


def test_activity_is_that_of_the_last_28_days(tmp_path: Path) -> None:
    """Against loops; events lie on both edges, and of one moment in two stores."""
    now = START + 60 * DAY
    edge = now - 28 * DAY
    times = [edge - 1, edge, edge + 1, now - DAY, now - 1, now]
    clicks: list[Row] = []
    orders: list[Row] = []
    for number, (time, user) in enumerate((time, user) for user in ("u0", "u1", "u2") for time in times):
        if user == "u2" and time >= edge:
            continue
        where = {"user_id": user, "store_id": f"s{number % 3}", "item_id": ITEMS[number % 4]}
        click = {"exposure_id": f"e{number}", "session_id": f"v{number}", **where, "clicked_at": time, "position": 0}
        clicks.append(click)
        if user == "u0" and time != edge:
            orders.append({"order_id": f"o{number}", **where, "ordered_at": time + HOUR, "quantity": 1.0})
    # Seen last by an order, in another store than clicked last.
    orders.append(
        {"order_id": "last", "user_id": "u1", "store_id": "s0", "item_id": "i2", "ordered_at": edge, "quantity": 1.0}
    )
    clicks = [click for click in clicks if click["user_id"] != "u1" or click["clicked_at"] < edge]
    data = write_data(tmp_path / "data", clicks, orders)
    log, _, _ = build_log("score", *sources(data), CITY_ITEMS["item_id"], item_attributes(CITY_ITEMS), now, 24 * HOUR)
    recent = [click for click in clicks if edge <= click["clicked_at"] < now]
    bought = [
        click
        for click in recent
        if any(
            order["user_id"] == click["user_id"]
            and order["item_id"] == click["item_id"]
            and click["clicked_at"] == order["ordered_at"] - HOUR
            and order["ordered_at"] < now
            for order in orders
        )
    ]
    found = recent_activity(log)
    for name, events in (("clicks", recent), ("orders", bought)):
        assert found[name].tolist() == [sum(event["item_id"] == item for event in events) for item in ITEMS], name
    assert bought and len(bought) < len(recent)
    seen: dict[str, tuple[int, str]] = {}
    for events, column in ((clicks, "clicked_at"), (orders, "ordered_at")):
        for event in events:
            if event[column] < now:
                last = (event[column], event["store_id"])
                seen[event["user_id"]] = max(seen.get(event["user_id"], last), last)
    expected = [(user, store, at) for user, (at, store) in sorted(seen.items()) if at >= edge]
    assert list(active_users(log).itertuples(index=False, name=None)) == expected
    assert [user for user, _, _ in expected] == ["u0", "u1"]


def test_a_pair_of_nobody_knows_nothing() -> None:
    """A user of -1 must not be read as one whose events are of no group, nor as a distance of 0 days."""
    one, zero = np.array([1]), np.array([0])
    events = Events(
        click_user=zero,
        click_item=zero,
        click_store=zero,
        clicked_at=one,
        converted_at=np.array([5]),
        order_user=zero,
        order_item=zero,
        order_store=zero,
        ordered_at=np.array([5]),
    )
    # The listing of the events is of no group, the requested one of the last group.
    items = ItemAttributes(subcategory=np.array([-1, 2]), brand=np.array([-1, 2]), listed_at=np.array([NEVER, NEVER]))
    queries = Queries(user=np.array([-1]), item=one, store=zero, time=np.array([100]))
    found = {name: values.tolist() for name, values in pair_features(events, queries, items).items()}
    assert {name for name, values in found.items() if np.isnan(values).all()} == {
        "pair_days_since_click",
        "pair_days_since_order",
    }
    assert {values[0] for name, values in found.items() if "days" not in name} == {0.0}
