"""Labels and features against the row-by-row reference, and against the arrow of time."""

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from camenn_model.data.shard_set import ShardSet
from pipelines.features import history
from pipelines.features.as_of import Events
from pipelines.features.history import user_history
from pipelines.features.time_index import HOUR_US, NEVER, TimeIndex, day_of
from pipelines.shards import sizes
from pipelines.shards import stage as shards_stage
from pipelines.shards.examples import ROW, cut_long_days
from pipelines.shards.options import ShardOptions
from pipelines.shards.pipeline import cut_days
from pipelines.shards.splits import split_times
from schemas.training import AUDIENCE_COUNTS, EXAMPLE_ORDER, EXAMPLES, ITEM_COUNTS, PAIR_COUNTS, SPLITS
from tests.support import shard_reference
from tests.support.shard_reference import DAY, HOUR, Row, Settings
from tests.support.small_city import (
    CATALOG_ROWS,
    ITEMS,
    START,
    STEP,
    STORES,
    ZONES,
    build_examples,
    by_key,
    cities,
    random_city,
    write_data,
    write_store,
)

FEATURES = [column.name for column in (*AUDIENCE_COUNTS, *ITEM_COUNTS, *PAIR_COUNTS)] + [
    "history_item",
    "history_kind",
    "history_hours",
    "session_start",
    "hour",
    "weekday",
]
QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def a_click(number: int, time: int, **values: Any) -> Row:
    base = {
        "exposure_id": f"e{number}",
        "session_id": "a",
        "user_id": "u0",
        "store_id": "s0",
        "item_id": "i0",
        "clicked_at": time,
        "position": 0,
    }
    return base | values


def an_order(number: int, time: int, **values: Any) -> Row:
    return {
        "order_id": f"o{number}",
        "user_id": "u0",
        "store_id": "s0",
        "item_id": "i0",
        "ordered_at": time,
        "quantity": 1.0,
    } | values


LATER = Settings(as_of=START + 30 * DAY, window=24 * HOUR, history=4)


def test_reference_knows_every_column() -> None:
    answer = shard_reference.build([a_click(0, START)], [], CATALOG_ROWS, LATER)
    assert set(answer.examples["u0", "a", "i0"]) == set(EXAMPLES.names)


@QUICK
@given(cities())
@example(([a_click(0, START)], [], LATER))
@example(([a_click(0, START)], [an_order(0, START)], LATER))
@example(([a_click(0, START)], [an_order(0, START + 24 * HOUR)], LATER))
@example(([a_click(0, START)], [an_order(0, START + 24 * HOUR + 1)], LATER))
@example(([a_click(1, START, position=5), a_click(0, START, position=1)], [], LATER))
@example(([a_click(0, START, item_id="gone"), a_click(1, START + 5)], [an_order(0, START + 5, quantity=-1.0)], LATER))
@example(([a_click(1, START), a_click(0, START, session_id="b")], [an_order(0, START), an_order(1, START + 1)], LATER))
@example(
    (
        [a_click(0, START), a_click(1, START + STEP, session_id="b", item_id="i1")],
        [an_order(0, START + 2 * STEP)],
        LATER,
    )
)
@example(([a_click(0, START), a_click(1, START + STEP, user_id="u1")], [an_order(0, START + 2 * STEP)], LATER))
def test_build_examples_equals_the_reference(city: tuple[list[Row], list[Row], Settings]) -> None:
    clicks, orders, flags = city
    expected = shard_reference.build(clicks, orders, CATALOG_ROWS, flags)
    examples, counts = build_examples(clicks, orders, CATALOG_ROWS, flags)
    assert examples == expected.examples
    assert +counts["clicks"] == +expected.clicks
    assert +counts["orders"] == +expected.orders


@QUICK
@given(cities(), st.randoms(use_true_random=False))
def test_build_examples_ignores_the_order_of_rows(city: tuple[list[Row], list[Row], Settings], rng: Any) -> None:
    clicks, orders, flags = city
    before = build_examples(clicks, orders, CATALOG_ROWS, flags)
    rng.shuffle(clicks)
    rng.shuffle(orders)
    assert build_examples(clicks, orders, CATALOG_ROWS, flags) == before


@st.composite
def perturbed_cities(draw: st.DrawFn) -> tuple[list[Row], list[Row], Settings, list[Row], list[Row], Any]:
    """Draw a city, its other future, and a key.

    The second is the same city with another future. The key is that of an example whose session
    starts where the future does.
    """
    clicks, orders, flags = draw(cities(conflicts=False))
    flags.as_of = START + 60 * STEP
    examples = shard_reference.build(clicks, orders, CATALOG_ROWS, flags).examples
    if not examples:
        return clicks, orders, flags, clicks, orders, None
    key = draw(st.sampled_from(sorted(examples)))
    now = examples[key]["session_start"]
    user, session, item = key
    own = [
        c
        for c in clicks
        if (c["user_id"], c["session_id"]) == (user, session) and (c["clicked_at"] == now or c["item_id"] == item)
    ]
    other_clicks, other_orders, _ = draw(cities(conflicts=False))
    new_clicks = [c for c in clicks if c["clicked_at"] < now] + own
    # The example itself stays: an earlier click of its own, in another store, would be another
    # exposure, at that store's local hour.
    new_clicks += [
        c | {"exposure_id": f"x{c['exposure_id']}"}
        for c in other_clicks
        if c["clicked_at"] >= now and (c["user_id"], c["session_id"], c["item_id"]) != key
    ]
    new_orders = [o for o in orders if o["ordered_at"] < now] + [o for o in other_orders if o["ordered_at"] >= now]
    return clicks, orders, flags, new_clicks, new_orders, key


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(perturbed_cities())
def test_features_do_not_read_anything_at_or_after_the_session_start(
    case: tuple[list[Row], list[Row], Settings, list[Row], list[Row], Any],
) -> None:
    clicks, orders, flags, new_clicks, new_orders, key = case
    if key is None:
        return
    before, _ = build_examples(clicks, orders, CATALOG_ROWS, flags)
    after, _ = build_examples(new_clicks, new_orders, CATALOG_ROWS, flags)
    assert {name: after[key][name] for name in FEATURES} == {name: before[key][name] for name in FEATURES}


def test_features_read_what_lies_just_before_the_session_start() -> None:
    """The test above would pass if nothing were read at all."""
    now = START + 10 * DAY
    clicks = [a_click(0, now)]
    before, _ = build_examples(clicks, [], CATALOG_ROWS, LATER)
    catalog = [{**row, "listed_at": now - 1} for row in CATALOG_ROWS]
    after, _ = build_examples([*clicks, a_click(1, now - 1, session_id="b")], [an_order(0, now - 1)], catalog, LATER)
    key = ("u0", "a", "i0")
    changed = {name for name in FEATURES if before[key][name] != after[key][name]}
    assert changed == set(FEATURES) - {"session_start", "hour", "weekday"}


@pytest.mark.parametrize(("listed", "days"), [(-DAY, 1.0), (-1, 1 / DAY), (0, None), (1, None)])
def test_a_listing_offered_at_the_session_start_is_not_known_to_be(listed: int, days: float | None) -> None:
    """As of the session's start means strictly before it, for the catalog's times and for the logs'."""
    now = START + 10 * DAY
    catalog = [{**row, "listed_at": now + listed} for row in CATALOG_ROWS]
    row = build_examples([a_click(0, now)], [], catalog, LATER)[0]["u0", "a", "i0"]
    assert row["item_days_since_listed"] == (None if days is None else np.float32(days))


def test_events_of_one_moment_stand_in_a_history_by_kind_and_listing() -> None:
    """Purchases first, then by listing, whatever the order of rows and of ids."""
    now = START + 10 * DAY
    clicks = [a_click(n, now - HOUR, session_id="b", item_id=item) for n, item in enumerate(("i2", "i0", "i9"))]
    orders = [an_order(n, now - HOUR, item_id=item) for n, item in enumerate(("i10", "i1"))]
    flags = Settings(as_of=START + 30 * DAY, window=24 * HOUR, history=20)
    row = build_examples([*clicks, a_click(9, now)], orders, CATALOG_ROWS, flags)[0]["u0", "a", "i0"]
    assert row["history_item"] == ["i1", "i10", "i0", "i2", "i9"]
    assert row["history_kind"] == [2, 2, 1, 1, 1]


@settings(QUICK, max_examples=40)
@given(cities(), st.integers(0, 30))
@example(([a_click(0, START), a_click(1, START + STEP, session_id="b")], [], LATER), 1)
@example(([a_click(0, START), a_click(1, START + STEP, item_id="i1")], [an_order(0, START)], LATER), 1)
@example(
    (
        [a_click(n, START + n * STEP, session_id=f"v{n}") for n in range(3)],
        [an_order(n, START + n * HOUR) for n in range(3)],
        LATER,
    ),
    1,
)
def test_events_of_final_days_are_summed_up_to_the_first_day_that_is_built(
    city: tuple[list[Row], list[Row], Settings], step: int
) -> None:
    """Rows equal those of a full build, however much of the earlier log enters as sums."""
    clicks, orders, flags = city
    first = START + step * STEP
    whole, all_counts = build_examples(clicks, orders, CATALOG_ROWS, flags)
    part, counts = build_examples(clicks, orders, CATALOG_ROWS, flags, frozen_before=first)
    assert part == {key: row for key, row in whole.items() if row["session_start"] >= first}
    assert sum(counts["clicks"].values()) == sum(all_counts["clicks"].values())
    assert counts["clicks"]["out"] == len(part)


def test_rows_of_a_session_lie_in_one_file_of_a_day() -> None:
    """A session in two files would count as two. Pieces of a day are numbered from 0, in order of time."""
    midnight = START // DAY * DAY
    starts = [midnight + day * DAY + hour * HOUR for day in range(3) for hour in range(6)]
    rows = [(place, start) for start in starts for place in range(4)]
    random.Random(0).shuffle(rows)
    columns = {ROW: [place for place, _ in rows], "session_start": pa.array([at for _, at in rows], pa.timestamp("us"))}
    # The first two days are cut at the start of a session, the third is not cut.
    cuts = np.array([midnight + 2 * HOUR, midnight + 4 * HOUR, midnight + DAY + 3 * HOUR])
    found = {
        day: sorted(piece["session_start"].cast(pa.int64()).to_pylist())
        for day, piece in cut_days(pa.table(columns), cuts)
    }
    expected = {}
    for day, pieces in enumerate(([2, 2, 2], [3, 3], [6])):
        first = 6 * day
        for piece, sessions in enumerate(pieces):
            expected[day_of(midnight + day * DAY), piece] = [
                at for at in starts[first : first + sessions] for _ in range(4)
            ]
            first += sessions
    assert found == expected


def test_an_order_after_the_session_start_is_not_yet_a_conversion() -> None:
    now = START + 10 * DAY
    clicks = [a_click(0, now - HOUR, session_id="b"), a_click(1, now, item_id="i1")]
    key = ("u0", "a", "i1")
    for ordered_at, kinds, known in ((now - 1, [2], 1), (now, [1], 0), (now + 1, [1], 0)):
        row = build_examples(clicks, [an_order(0, ordered_at)], CATALOG_ROWS, LATER)[0][key]
        assert row["history_kind"] == kinds
        assert row["user_cvr"] == np.float32((3 + known) / 21)


def test_history_is_full_although_the_last_events_are_known_conversions() -> None:
    now = START + 10 * DAY
    clicks = [a_click(n, now - (2 * n + 2) * HOUR, session_id=f"v{n}", item_id=ITEMS[n % 5]) for n in range(30)]
    orders = [an_order(n, now - (2 * n + 2) * HOUR + 1, item_id=ITEMS[n % 5]) for n in range(12)]
    row = build_examples(
        [*clicks, a_click(99, now)], orders, CATALOG_ROWS, Settings(as_of=now + 2 * DAY, window=24 * HOUR, history=20)
    )[0]["u0", "a", "i0"]
    assert row["history_kind"] == [2] * 12 + [1] * 8


def plain_history(events: Events, user: int, time: int, length: int) -> list[tuple[int, int, float]]:
    """(item, kind, hours) of the reference's history of one user at one time."""
    past = [
        (-at, 0, f"{item:03d}")
        for who, item, at in zip(events.order_user, events.order_item, events.ordered_at, strict=True)
        if who == user and at < time
    ]
    past += [
        (-at, 1, f"{item:03d}")
        for who, item, at, bought in zip(
            events.click_user, events.click_item, events.clicked_at, events.converted_at, strict=True
        )
        if who == user and at < time <= bought
    ]
    chosen = shard_reference.latest_history(sorted(past), length)
    return [(int(item), 1 if clicked else 2, (time + minus) / HOUR) for minus, clicked, item in chosen]


@pytest.mark.parametrize("length", [1, 2, 5, 7, 12])
def test_histories_of_busy_users_equal_the_reference(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some forty events a user, many at one moment: clicks yield to older purchases, and clicks
    known to be bought are left out. A dozen places are found at once.
    """
    monkeypatch.setattr(history, "CELLS", 12)
    rng = np.random.default_rng(length)
    for _ in range(8):
        n_clicks, n_orders = 110, int(rng.integers(0, 40))
        clicked_at = rng.integers(0, 60, n_clicks) * HOUR_US
        # Each click left out has its own credited order.
        bought = rng.permutation(n_clicks)[: n_orders // 2]
        converted_at = np.full(n_clicks, NEVER)
        converted_at[bought] = clicked_at[bought] + rng.integers(0, 9, len(bought)) * HOUR_US
        click_user, click_item = rng.integers(0, 3, n_clicks), rng.integers(0, 9, n_clicks)
        rest = n_orders - len(bought)
        events = Events(
            click_user=click_user,
            click_item=click_item,
            click_store=np.zeros(n_clicks, dtype=np.int64),
            clicked_at=clicked_at,
            converted_at=converted_at,
            order_user=np.concatenate([click_user[bought], rng.integers(0, 3, rest)]),
            order_item=np.concatenate([click_item[bought], rng.integers(0, 9, rest)]),
            order_store=np.zeros(n_orders, dtype=np.int64),
            ordered_at=np.concatenate([converted_at[bought], rng.integers(0, 60, rest) * HOUR_US]),
        )
        user, time = (grid.ravel() for grid in np.meshgrid(np.arange(4), np.arange(0, 70, 7) * HOUR_US))
        found = user_history(events, user, time, length)
        for row in range(len(user)):
            size = int((found.kind[row] > 0).sum())
            entries = list(zip(found.item[row], found.kind[row], found.hours[row], strict=True))
            assert entries[:size] == plain_history(events, user[row], time[row], length)
            assert set(found.item[row, size:]) <= {-1}


def check_shards(tmp_path: Path, clicks: list[Row], orders: list[Row], *, files: int) -> None:
    """`camenn shards` gives the reference's rows and row counts."""
    data = write_data(tmp_path / "data", clicks, orders, files=files, row_group_size=50)
    store = write_store(tmp_path / "store", pq.read_table(data / ("catalog" if files > 1 else "catalog.parquet")))
    shards_stage.run(shard_options(data, store, tmp_path / "shards"), [])
    shards = ShardSet(str(tmp_path / "shards"))
    as_of = min(max(c["clicked_at"] for c in clicks), max(o["ordered_at"] for o in orders))
    flags = Settings(as_of=as_of, window=24 * HOUR, history=5, timezones=ZONES, timezone="Asia/Kathmandu")
    expected = shard_reference.build(clicks, orders, CATALOG_ROWS, flags)
    written = [(path, pq.ParquetFile(path).read()) for path, _ in shards.files("examples")]
    assert by_key(pa.concat_tables([table for _, table in written])) == expected.examples
    for path, table in written:
        date = path.split("date=")[1].split("/")[0]
        assert {str(day) for day in table["session_start"].cast(pa.date32()).to_pylist()} == {date}
        assert table.schema.equals(EXAMPLES.schema)
    assert +shards_counts(shards, "clicks") == {"in": len(clicks), **+expected.clicks}
    assert +shards_counts(shards, "orders") == {"in": len(orders), **+expected.orders}


@pytest.mark.parametrize("seed", [1, 2])
def test_shards_pipeline_equals_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Two seeds: one bucket, and several buckets with several files per table."""
    if seed > 1:
        monkeypatch.setattr(sizes, "ROWS_PER_BUCKET", 90)
    check_shards(tmp_path, *random_city(seed, 300, 200), files=seed)


def test_shards_are_right_where_one_listing_and_one_user_have_most_clicks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One listing and one user have very many clicks.

    The listing has 30 % of all clicks and the user 5 %. Each is far larger than the intended size
    of a bucket and a file.
    """
    clicks, orders = random_city(3, 500, 200, users=40)
    rng = random.Random(3)
    for row in clicks:
        if rng.random() < 0.30:
            row |= {"item_id": ITEMS[0], "store_id": STORES[0]}
        if rng.random() < 0.05 and row["user_id"] is not None:
            row["user_id"] = "u0"
    monkeypatch.setattr(sizes, "ROWS_PER_BUCKET", 20)
    monkeypatch.setattr(sizes, "ROWS_PER_FILE", 8)
    check_shards(tmp_path, clicks, orders, files=2)
    # Long days are cut by time: their files, one after another, are the day in order.
    shards = ShardSet(str(tmp_path / "shards"))
    for split in SPLITS:
        tables = [pq.ParquetFile(path).read(columns=list(EXAMPLE_ORDER)) for path, _ in shards.examples(split)]
        rows = [tuple(row[name] for name in EXAMPLE_ORDER) for table in tables for row in table.to_pylist()]
        assert rows == sorted(rows) and len(tables) > 3


@QUICK
@given(st.lists(st.integers(0, 4 * 24), max_size=200), st.integers(1, 50))
def test_long_days_are_cut_into_even_pieces(hours: list[int], size: int) -> None:
    """Days of less than half a piece more than one stay whole; no piece of distinct times is much too large."""
    times = np.array(hours, dtype=np.int64) * HOUR_US + np.arange(len(hours))
    table = pa.table({"session_start": times})
    pieces = dict(cut_days(table, cut_long_days(times, size)))
    assert sum(piece.num_rows for piece in pieces.values()) == len(times)
    assert all(piece.num_rows < 1.5 * size + 1 for piece in pieces.values())
    ends: dict[str, int] = {}
    for (date, number), piece in sorted(pieces.items()):
        start = piece["session_start"].to_numpy()
        assert {day_of(int(time)) for time in start} == {date}
        assert start.min() > ends.get(date, -1)
        ends[date] = start.max()
        days = sum(day_of(int(time)) == date for time in times)
        assert number == 0 or days >= 1.5 * size


def shards_counts(shards: ShardSet, table: str) -> Any:
    from collections import Counter

    return Counter(shards.manifest["counts"][table])


def shard_options(data: Path, store: Path, out: Path, **flags: Any) -> ShardOptions:
    values: dict[str, Any] = {
        "data": str(data),
        "store": str(store),
        "out": str(out),
        "attribution_hours": 24.0,
        "history": 5,
        "as_of": None,
        "timezone": "Asia/Kathmandu",
        "test_share": 0.2,
        "max_reject_rate": 0.1,
    }
    return ShardOptions(**(values | flags))


@QUICK
@given(
    st.lists(st.integers(0, 40 * 24), min_size=1, max_size=60),
    st.sampled_from((1, 6, 24)),
    st.sampled_from((0.05, 0.2, 0.5)),
)
def test_split_times_keep_the_parts_in_order_and_a_window_apart(hours: list[int], window: int, share: float) -> None:
    times = np.array(sorted(hours), dtype=np.int64) * HOUR_US
    parts = split_times(times, window * HOUR_US, share).of(times)
    rank = {"train": 0, "early_stop": 1, "calibration": 2, "test": 3}
    kept = [(int(time), rank[part]) for time, part in zip(times, parts, strict=True) if part != "gap"]
    assert [part for _, part in kept] == sorted(part for _, part in kept)
    for (time, part), (later, later_part) in itertools.combinations(kept, 2):
        if part == 0 < later_part or part < 3 == later_part:
            assert later - time >= window * HOUR_US


def test_parts_of_a_log_begin_where_they_should() -> None:
    """A thousand clicks, one an hour: by hand, in hours, to the hour that a share of a thousand may be rounded by."""
    splits = split_times(np.arange(1_000, dtype=np.int64) * HOUR_US, 24 * HOUR_US, 0.2)
    begins = [
        edge / HOUR_US for edge in (splits.gap, splits.early_stop, splits.calibration, splits.second_gap, splits.test)
    ]
    # The last fifth; a window before it; 6 % each before that; and another window.
    assert begins == pytest.approx([656 - 24, 656, 716, 776, 800], abs=1.01)
    for part, edge in (("early_stop", splits.early_stop), ("calibration", splits.calibration), ("test", splits.test)):
        assert splits.of(np.array([edge, edge + 1])).tolist() == [part, part], "it begins with its first moment"
        assert splits.of(np.array([edge - 1])).tolist() != [part]
    assert splits.of(np.array([splits.gap - 1, splits.gap, splits.second_gap])).tolist() == ["train", "gap", "gap"]


@QUICK
@given(
    st.lists(st.tuples(st.sampled_from((0, 1, 2, 2**40, 2**55)), st.integers(0, 6)), max_size=20),
    st.lists(
        st.tuples(st.sampled_from((-1, 0, 1, 2, 3, 2**40, 2**55, 2**55 + 1)), st.integers(-1, 8)),
        min_size=1,
        max_size=10,
    ),
    st.sampled_from((1, 2**59)),
)
def test_time_index_counts_and_finds_the_first_and_the_last(
    events: list[tuple[int, int]], queries: list[tuple[int, int]], unit: int
) -> None:
    """Keys of pairs grow as users × listings.

    2**55 stands for a large city. Times that are far apart do not fit beside a key.
    """
    events, queries = ([(key, moment * unit) for key, moment in rows] for rows in (events, queries))
    key, time = (np.array([event[place] for event in events], dtype=np.int64) for place in (0, 1))
    asked, at = (np.array([query[place] for query in queries], dtype=np.int64) for place in (0, 1))
    index = TimeIndex(key, time)
    before = [[t for k, t in events if k == q and t < moment] for q, moment in queries]
    assert index.count(asked, at).tolist() == [len(times) for times in before]
    never = np.iinfo(np.int64).max
    count, first, last = index.count_first_last(asked, at)
    assert count.tolist() == [len(times) for times in before]
    assert first.tolist() == [min(times, default=never) for times in before]
    assert last.tolist() == [max(times, default=never) for times in before]
    start, end = index.bounds(asked, at, inclusive=True)
    assert (end - start).tolist() == [sum(k == q and t <= moment for k, t in events) for q, moment in queries]
    weighted = TimeIndex(key, time, np.arange(1, len(key) + 1))
    assert weighted.count(asked, at).tolist() == [
        sum(place + 1 for place, (k, t) in enumerate(events) if k == q and t < moment) for q, moment in queries
    ]


@pytest.mark.parametrize("keys", [1, 2, 1 << 16, (1 << 16) + 1, 1 << 33])
@pytest.mark.parametrize("sorted_already", [True, False])
def test_time_index_orders_by_key_and_time_and_then_as_they_came(keys: int, sorted_already: bool) -> None:
    random = np.random.default_rng(keys)
    # Up to 1 << 20 keys are codes as they are, of more their ranks.
    n = 300_000 if keys < 1 << 20 else 1_000
    key, time = random.integers(0, keys, n), random.integers(0, n // 2, n)
    if sorted_already:
        time.sort()
    assert (TimeIndex(key, time).order == np.lexsort((time, key))).all()


def test_stores_are_told_apart() -> None:
    """A store's counts are its own, whichever stores its neighbours in code order are."""
    now = START + 10 * DAY
    clicks = [
        a_click(n, now - n - 1, session_id="b", store_id=store, item_id=item)
        for n, (store, item) in enumerate(itertools.product(STORES, ITEMS))
    ]
    row = build_examples([*clicks, a_click(99, now, store_id="new")], [], CATALOG_ROWS, LATER)[0]["u0", "a", "i0"]
    assert (row["item_clicks"], row["store_item_clicks"]) == (3.0, 0.0)
