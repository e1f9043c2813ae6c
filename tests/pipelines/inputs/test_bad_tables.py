"""Tables that are wrong, empty or odd: their messages, dropped rows, and accepted rows."""

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from camenn_model.data.shard_set import ShardSet
from pipelines.inputs.catalog import read_catalog
from pipelines.inputs.logs import read_times
from pipelines.inputs.users_and_stores import read_timezones, read_users
from pipelines.io.clock import latest_time
from pipelines.io.rejects import drop_unusable
from pipelines.io.tables import Slice, Source
from pipelines.runner.exit_codes import run_main
from pipelines.score.audience import read_audience, score_time
from pipelines.shards import command as shards_command
from pipelines.shards import planning, sizes
from schemas.audience import AUDIENCE
from schemas.catalog import CATALOG
from schemas.contract import Contract, conform
from schemas.errors import InputError
from schemas.events import CLICKS, ORDERS
from tests.pipelines.shards.test_examples import LATER, a_click, an_order
from tests.support.shard_reference import DAY, HOUR, Row, Settings
from tests.support.small_city import (
    CATALOG_ROWS,
    START,
    build_examples,
    catalog_table,
    event_table,
    write_data,
    write_files,
    write_store,
)

DAYS = 12


def plain_events() -> tuple[list[Row], list[Row]]:
    """Forty clicks of two users over twelve days, every third one ordered."""
    items = ("i0", "i1", "i2", "i9")
    clicks = [
        a_click(n, START + n * DAYS * DAY // 40, user_id=f"u{n % 2}", session_id=f"v{n}", item_id=items[n % 4])
        for n in range(40)
    ]
    orders = [
        an_order(n, clicks[n]["clicked_at"] + HOUR, user_id=clicks[n]["user_id"], item_id=clicks[n]["item_id"])
        for n in range(0, 40, 3)
    ]
    return clicks, orders


def plain_tables() -> dict[str, pa.Table]:
    clicks, orders = plain_events()
    return {"catalog": catalog_table(), "clicks": event_table(clicks, CLICKS), "orders": event_table(orders, ORDERS)}


def put(table: pa.Table, name: str, values: Any) -> pa.Table:
    """`table` with another column `name`."""
    return (
        table.set_column(table.column_names.index(name), name, values)
        if name in table.column_names
        else table.append_column(name, values)
    )


class Data:
    """A data directory and its store; `shards` runs the command as a user does."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tables = plain_tables()
        write_store(root / "store", self.tables["catalog"])

    def shards(self, *flags: str) -> int:
        for name, table in self.tables.items():
            write_files(self.root / "data", name, table)
        flags = (
            "--data",
            str(self.root / "data"),
            "--store",
            str(self.root / "store"),
            "--out",
            str(self.root / "shards"),
            *flags,
        )
        return run_main(shards_command.main, list(flags))

    def file(self, name: str) -> str:
        return str(self.root / "data" / f"{name}.parquet")

    def counts(self, table: str) -> dict[str, int]:
        return {
            where: rows for where, rows in ShardSet(str(self.root / "shards")).manifest["counts"][table].items() if rows
        }

    def rejects(self) -> list[Row]:
        paths = ShardSet(str(self.root / "shards")).files("rejects")
        return [row for path, _ in paths for row in pq.read_table(path).to_pylist()]


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(tmp_path)


def drop(name: str, column: str) -> Callable[[Data], None]:
    return lambda data: data.tables.update({name: data.tables[name].drop_columns([column])})


def swap(name: str, column: str, values: Callable[[pa.Table], Any]) -> Callable[[Data], None]:
    return lambda data: data.tables.update({name: put(data.tables[name], column, values(data.tables[name]))})


def floats(table: pa.Table) -> pa.Array:
    return pa.array(np.arange(table.num_rows, dtype=np.float64))


def strings(table: pa.Table) -> pa.Array:
    return pa.array(["2024-01-01"] * table.num_rows)


def nanoseconds(table: pa.Table) -> pa.Array:
    return pa.array(np.full(table.num_rows, START * 1000 + 1), pa.timestamp("ns"))


BAD: dict[str, tuple[Callable[[Data], Any], list[str], list[str]]] = {
    "missing table": (
        lambda data: data.tables.pop("orders"),
        [],
        ["table 'orders' is missing", "orders.parquet", "Put it there"],
    ),
    "missing column": (
        drop("clicks", "session_id"),
        [],
        ["clicks.parquet: column 'session_id' of table 'clicks' is missing", "found: exposure_id", "Add it as string"],
    ),
    "missing price": (
        drop("catalog", "price"),
        [],
        ["catalog.parquet: column 'price' of table 'catalog' is missing", "Add it as float: price in currency units"],
    ),
    "times as strings": (
        swap("orders", "ordered_at", strings),
        [],
        ["orders.parquet: column 'ordered_at'", "has type string", "Write it as timestamp[us]"],
    ),
    "float ids": (
        swap("clicks", "user_id", floats),
        [],
        ["clicks.parquet: column 'user_id'", "has type double", "cannot become string", "Write it as string"],
    ),
    "too fine times": (
        swap("clicks", "clicked_at", nanoseconds),
        [],
        ["clicks.parquet: column 'clicked_at'", "timestamp[ns]", "Write it as timestamp[us]"],
    ),
    "half a position": (
        swap("clicks", "position", lambda t: pa.array(np.full(t.num_rows, 0.5))),
        [],
        ["clicks.parquet: column 'position'", "cannot become int64", "Write it as int64"],
    ),
    "no clicks": (
        lambda data: data.tables.update(clicks=CLICKS.schema.empty_table()),
        [],
        ["clicks.parquet: table 'clicks' is empty", "Export a log"],
    ),
    "nonsense as_of": (lambda data: None, ["--as_of", "yesterday"], ["--as_of yesterday: not a time", "2026-01-31"]),
    "early as_of": (
        lambda data: None,
        ["--as_of", "2001-01-01"],
        [
            "clicks.parquet: no click's attribution window of 24 h is closed at --as_of 2001-01-01T00:00:00",
            "Give a later --as_of",
        ],
    ),
    "unknown default zone": (
        lambda data: None,
        ["--timezone", "Mars/Olympus"],
        ["--timezone Mars/Olympus: no such zone", "Europe/Amsterdam"],
    ),
    "unknown zone": (
        lambda data: data.tables.update(
            stores=pa.table({"store_id": ["s0", "s1"], "timezone": ["UTC", "Asia/Nowhere"]})
        ),
        [],
        ["stores.parquet: store_id 's1': column 'timezone': 'Asia/Nowhere' is not an IANA zone", "Asia/Shanghai"],
    ),
    "null zone": (
        lambda data: data.tables.update(stores=pa.table({"store_id": ["s0"], "timezone": pa.nulls(1, pa.string())})),
        [],
        ["stores.parquet: store_id 's0': column 'timezone': is null or blank. Use an IANA name"],
    ),
    "a user twice": (
        lambda data: data.tables.update(users=pa.table({"user_id": ["a", "b", "a"]})),
        [],
        [
            "users.parquet: row 0 and ",
            "users.parquet: row 2: column 'user_id'",
            "'a' stands there more than once",
            "Keep one row",
        ],
    ),
    "a user's list": (
        lambda data: data.tables.update(users=pa.table({"user_id": ["a"], "tags": [["x"]]})),
        [],
        ["users.parquet: column 'tags' of table 'users'", "not a category", "Write it as strings"],
    ),
    "never embedded": (
        lambda data: data.tables.update(
            catalog=catalog_table(
                [*CATALOG_ROWS, {"item_id": "new", "subcategory": None, "brand": None, "listed_at": None}]
            )
        ),
        [],
        ["catalog.parquet: 1 of 6 listings are not in the embedding store (item_id 'new'", "Run `camenn embed`"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_shards_names_what_is_wrong_and_what_to_do(data: Data, capsys: pytest.CaptureFixture[str], case: str) -> None:
    spoil, flags, words = BAD[case]
    spoil(data)
    assert data.shards(*flags) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("camenn: error: ")
    for word in words:
        assert word in said
    assert "Traceback" not in said
    assert not (data.root / "shards" / "latest.json").exists()


def test_shards_takes_odd_but_lossless_types(data: Data) -> None:
    """The examples are the same with odd but lossless types.

    The types: integer ids, dictionary-encoded strings, an int64 price, extra columns, zoned times,
    milliseconds, large strings.
    """
    assert data.shards() == 0
    plain = ShardSet(str(data.root / "shards"))
    expected = [pq.ParquetFile(path).read() for path, _ in plain.files("examples")]
    odd = data.tables
    odd["catalog"] = (
        put(odd["catalog"], "price", pa.array([0, 1, 2, 3, 5]))
        .append_column("colour", pa.array([["red"]] * 5))
        .append_column("rank", pa.array(range(5)))
    )
    for name, column in (("catalog", "subcategory"), ("clicks", "item_id"), ("orders", "user_id")):
        odd[name] = put(odd[name], column, odd[name][column].dictionary_encode())
    odd["clicks"] = put(odd["clicks"], "store_id", odd["clicks"]["store_id"].cast(pa.large_string()))
    zoned = odd["clicks"]["clicked_at"].cast(pa.timestamp("us", tz="UTC")).cast(pa.timestamp("ns", tz="Asia/Shanghai"))
    odd["clicks"] = put(odd["clicks"], "clicked_at", zoned)
    odd["clicks"] = put(odd["clicks"], "position", odd["clicks"]["position"].cast(pa.float64()))
    odd["orders"] = put(
        odd["orders"], "ordered_at", odd["orders"]["ordered_at"].cast(pa.timestamp("ms", tz="America/New_York"))
    )
    odd["orders"] = put(odd["orders"], "quantity", odd["orders"]["quantity"].cast(pa.int32()))
    assert data.shards() == 0
    shards = ShardSet(str(data.root / "shards"))
    assert len(expected) > 3
    assert shards.manifest["run"] != plain.manifest["run"]
    assert [pq.ParquetFile(path).read() for path, _ in shards.files("examples")] == expected
    assert shards.items["price"].to_pylist() == [0.0, 1.0, 2.0, 3.0, 5.0]
    assert "colour" not in shards.items.column_names


def test_conform_keeps_the_instant_of_a_zoned_time() -> None:
    noon = datetime.datetime(2024, 7, 1, 12, tzinfo=datetime.timezone(datetime.timedelta(hours=8)))
    table = pa.table(
        {name: ["x"] for name in CLICKS.names if name != "clicked_at"}
        | {"clicked_at": pa.array([noon], pa.timestamp("ms", tz="Asia/Shanghai")), "position": [1]}
    )
    assert conform(table, CLICKS, "clicks.parquet")["clicked_at"].to_pylist() == [datetime.datetime(2024, 7, 1, 4)]


def test_read_times_agrees_with_the_table(tmp_path: Path) -> None:
    times = (
        pa.array([START, None, START + 5]).cast(pa.timestamp("us", tz="UTC")).cast(pa.timestamp("us", tz="Asia/Tokyo"))
    )
    clicks = put(event_table([a_click(n, START) for n in range(3)], CLICKS), "clicked_at", times)
    write_files(tmp_path, "clicks", clicks)
    assert read_times(Source.find(str(tmp_path), CLICKS), latest_time()).tolist() == [START, START + 5]


def test_conform_widens_integer_ids() -> None:
    table = conform(put(catalog_table(), "item_id", pa.array([1, 20, 3, -4, 2**62])), CATALOG, "catalog.parquet")
    assert table["item_id"].to_pylist() == ["1", "20", "3", "-4", str(2**62)]


@pytest.mark.parametrize(
    ("contract", "column", "values"),
    [
        (CLICKS, "user_id", pa.array([1.0])),
        (CLICKS, "user_id", pa.array([True])),
        (CLICKS, "user_id", pa.array([b"u"])),
        (CLICKS, "position", pa.array(["1"])),
        (CLICKS, "clicked_at", pa.array([START])),
        (CLICKS, "clicked_at", pa.array([datetime.date(2024, 1, 1)])),
        (ORDERS, "quantity", pa.array(["1"])),
        (CATALOG, "price", pa.array(["1.00"])),
        (CATALOG, "title", pa.array([["a", "b"]])),
    ],
)
def test_conform_refuses_what_is_no_widening(contract: Contract, column: str, values: pa.Array) -> None:
    rows = {
        CLICKS: event_table([a_click(0, START)], CLICKS),
        ORDERS: event_table([an_order(0, START)], ORDERS),
        CATALOG: catalog_table().slice(0, 1),
    }
    with pytest.raises(
        InputError, match=f"a.parquet: column '{column}' of table '{contract.name}' has type .* Write it as "
    ):
        conform(put(rows[contract], column, values), contract, "a.parquet")


def test_a_missing_table_names_both_places(tmp_path: Path) -> None:
    (tmp_path / "clicks").mkdir()
    with pytest.raises(
        InputError,
        match="table 'clicks' is missing: neither .*clicks.parquet nor a directory .*clicks/ with .parquet files",
    ):
        Source.find(str(tmp_path), CLICKS)


def test_every_file_of_a_table_is_checked(tmp_path: Path) -> None:
    (tmp_path / "clicks").mkdir()
    good = event_table([a_click(0, START)], CLICKS)
    pq.write_table(good, tmp_path / "clicks" / "a.parquet")
    pq.write_table(good.drop_columns(["item_id"]), tmp_path / "clicks" / "b.parquet")
    with pytest.raises(InputError, match=r"clicks/b.parquet: column 'item_id' of table 'clicks' is missing"):
        Source.find(str(tmp_path), CLICKS)


def test_same_listing_twice_collapses(data: Data) -> None:
    rows = data.tables["catalog"]
    data.tables["catalog"] = pa.concat_tables([rows, rows.slice(1, 2), rows.slice(1, 1)])
    assert data.shards() == 0
    assert data.counts("catalog") == {"in": 8, "out": 5, "duplicates": 3}


def test_copies_with_nan_prices_collapse(tmp_path: Path) -> None:
    rows = put(catalog_table(), "price", pa.array([float("nan")] * 5, pa.float32()))
    write_files(tmp_path, "catalog", pa.concat_tables([rows, rows]))
    _, rejects, counts = read_catalog("shards", Source.find(str(tmp_path), CATALOG))
    assert counts == {"in": 10, "out": 5, "rejected": 0, "duplicates": 5}
    assert rejects.num_rows == 0


def test_different_listings_of_one_id_are_rejected_with_both_places(tmp_path: Path) -> None:
    rows = catalog_table()
    other = put(put(rows.slice(2, 1), "title", pa.array(["other"])), "price", pa.array([9.0], pa.float32()))
    (tmp_path / "catalog").mkdir()
    first, second = (str(tmp_path / "catalog" / f"part-{n}.parquet") for n in (0, 1))
    pq.write_table(rows, first, row_group_size=2)
    pq.write_table(pa.concat_tables([rows.slice(4, 1), other]), second)
    kept, rejects, counts = read_catalog("shards", Source.find(str(tmp_path), CATALOG))
    assert counts == {"in": 7, "out": 5, "rejected": 1, "duplicates": 1}
    assert kept.filter(pa.compute.equal(kept["item_id"], "i10"))["title"].to_pylist() == ["fresh  i10"]
    (reject,) = rejects.to_pylist()
    assert (reject["stage"], reject["key"], reject["reason"]) == ("shards", "catalog:i10", "duplicate_item_id")
    assert reject["detail"] == (
        f"{second}: row 1: column 'item_id': 'i10' stands already in {first}: row 2, with another title, price. "
        "Give each listing its own item_id, or leave one row out."
    )


def test_too_many_rejects_stop_the_run_with_examples(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    rows = data.tables["catalog"]
    data.tables["catalog"] = pa.concat_tables([rows, put(rows.slice(1, 1), "brand", pa.array(["z"]))])
    assert data.shards() == 2
    said = capsys.readouterr().err
    assert (
        "table 'catalog': 1 of 6 rows were rejected (16.7%), more than --max_reject_rate 0.01. Nothing was published."
        in said
    )
    assert "catalog:i1: duplicate_item_id: " in said
    assert "raise --max_reject_rate" in said
    assert not (data.root / "shards" / "latest.json").exists()
    assert data.shards("--max_reject_rate", "0.2") == 0
    assert data.counts("catalog") == {"in": 6, "out": 5, "rejected": 1}


def test_examples_of_rejects_are_those_of_the_table_that_stopped_the_run(
    data: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six rejects of the catalog, within the limit, must not hide those of the clicks."""
    rows = data.tables["catalog"]
    nameless = put(rows.slice(0, 1), "item_id", pa.nulls(1, pa.string()))
    data.tables["catalog"] = pa.concat_tables([rows, *[rows] * 20, *[nameless] * 6])
    clicks = data.tables["clicks"]
    data.tables["clicks"] = put(clicks, "user_id", pa.array([None] * 5 + clicks["user_id"].to_pylist()[5:]))
    assert data.shards("--max_reject_rate", "0.1") == 2
    said = capsys.readouterr().err
    assert "table 'clicks': 5 of 40 rows were rejected (12.5%)" in said
    assert "clicks:e0: null_user_id: " in said


def test_null_values_are_rejected_with_file_and_row(data: Data) -> None:
    catalog, clicks = data.tables["catalog"], data.tables["clicks"]
    data.tables["catalog"] = pa.concat_tables([catalog, put(catalog.slice(0, 1), "item_id", pa.nulls(1, pa.string()))])
    data.tables["clicks"] = put(
        clicks, "clicked_at", pa.array([*clicks["clicked_at"].to_pylist()[:-1], None], clicks["clicked_at"].type)
    )
    assert data.shards("--max_reject_rate", "0.2") == 0
    rejects = {row["reason"]: row for row in data.rejects()}
    assert set(rejects) == {"null_item_id", "null_clicked_at"}
    assert rejects["null_item_id"]["key"] == f"catalog:row 5 of {data.file('catalog')}"
    assert rejects["null_item_id"]["detail"].startswith(
        f"{data.file('catalog')}: row 5: column 'item_id' is null or blank. Give it a value"
    )
    assert rejects["null_clicked_at"]["key"] == "clicks:e39"
    assert rejects["null_clicked_at"]["detail"].startswith(
        f"{data.file('clicks')}: row 39: column 'clicked_at' is null or blank."
    )
    assert data.counts("clicks")["rejected"] == 1


def test_a_row_without_several_values_is_one_reject() -> None:
    table = event_table([a_click(0, START), a_click(1, START, user_id=None, item_id=None, exposure_id=None)], CLICKS)
    kept, rejects = drop_unusable("shards", Slice("f.parquet", 0, 100), table, CLICKS)
    assert (kept.num_rows, rejects.num_rows) == (1, 1)
    assert rejects["key"].to_pylist() == ["clicks:row 101 of f.parquet"]
    assert rejects["reason"].to_pylist() == ["null_exposure_id"]


def test_odd_events_are_counted_where_they_belong() -> None:
    """Odd events are counted, each by its kind.

    They are a negative quantity, a click on an unknown listing, an order without a click, copies,
    and an exposure that stands on two clicks.
    """
    now = START + 5 * DAY
    clicks = [
        a_click(0, now),
        a_click(0, now),
        a_click(1, now, item_id="gone"),
        a_click(2, now + 1, item_id="i1"),
        a_click(2, now + 2, item_id="i2"),
    ]
    orders = [
        an_order(0, now - DAY),
        an_order(1, now + 1, quantity=-1.0),
        an_order(2, now + 1, quantity=0.0),
        an_order(3, now, item_id="gone"),
        an_order(0, now - DAY),
    ]
    examples, counts = build_examples(clicks, orders, CATALOG_ROWS, LATER)
    assert +counts["clicks"] == {"duplicates": 1, "unknown_item": 1, "rejected": 1, "out": 2}
    assert +counts["orders"] == {"duplicates": 1, "returns": 2, "unknown_item": 1, "out": 1}
    row = examples["u0", "a", "i0"]
    assert (row["label"], row["user_orders_per_day"], row["item_orders"], row["history_kind"]) == (0, 0.5, 1.0, [2])
    assert set(examples) == {("u0", "a", "i0"), ("u0", "a", "i1")}


def test_exposures_of_two_users_are_not_compared() -> None:
    """Users are read in buckets: a comparison between users would depend on which share one."""
    clicks = [a_click(0, START, user_id="u0"), a_click(0, START, user_id="u1")]
    together = build_examples(clicks, [], CATALOG_ROWS, LATER)[0]
    apart = [build_examples([click], [], CATALOG_ROWS, LATER)[0] for click in clicks]
    assert set(together) == set(apart[0]) | set(apart[1])


def test_a_conflicting_exposure_is_rejected_by_name(data: Data) -> None:
    clicks, _ = plain_events()
    again = clicks[7] | {"clicked_at": clicks[7]["clicked_at"] + 1}
    data.tables["clicks"] = event_table([*clicks, again], CLICKS)
    assert data.shards("--max_reject_rate", "0.1") == 0
    (reject,) = data.rejects()
    assert (reject["key"], reject["reason"]) == ("clicks:e7", "duplicate_exposure_id")
    at = (datetime.datetime(1970, 1, 1) + datetime.timedelta(microseconds=again["clicked_at"])).isoformat()
    assert reject["detail"] == (
        f"table 'clicks': column 'exposure_id': 'e7' stands on different clicks of user_id '{again['user_id']}'. "
        f"Left out is the one on item_id 'i9' at {at}. Give each exposure its own id."
    )


def test_no_orders_at_all_give_examples_without_positives(data: Data) -> None:
    data.tables["orders"] = ORDERS.schema.empty_table()
    assert data.shards() == 0
    labels = [
        label
        for path, _ in ShardSet(str(data.root / "shards")).files("examples")
        for label in pq.read_table(path)["label"].to_pylist()
    ]
    assert labels == [0] * data.counts("clicks")["out"]
    assert labels
    assert data.counts("orders") == {}


def test_a_row_group_of_rejects_only_and_buckets_without_examples(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty pieces travel through the job.

    They are a part of a log that is all rejects, and users whose only click is still open.
    """
    clicks, orders = plain_events()
    late = [a_click(100 + n, START + DAYS * DAY, user_id=f"late{n}") for n in range(6)]
    # Both logs reach the requested time.
    orders = [*orders, an_order(100, START + DAYS * DAY, user_id="u0", item_id="i0")]
    for name, rows, contract in (("clicks", [*clicks, *late], CLICKS), ("orders", orders, ORDERS)):
        nothing = put(event_table(rows[:3], contract), "user_id", pa.nulls(3, pa.string()))
        (data.root / "data" / name).mkdir(parents=True)
        pq.write_table(event_table(rows, contract), data.root / "data" / name / "a.parquet")
        pq.write_table(nothing, data.root / "data" / name / "b.parquet")
        pq.write_table(nothing.slice(0, 0), data.root / "data" / name / "c.parquet")
        del data.tables[name]
    monkeypatch.setattr(sizes, "ROWS_PER_BUCKET", 4)
    as_of = (datetime.datetime(1970, 1, 1) + datetime.timedelta(microseconds=START + DAYS * DAY)).isoformat()
    assert data.shards("--max_reject_rate", "0.5", "--as_of", as_of) == 0
    counts = data.counts("clicks")
    assert (counts["in"], counts["rejected"], counts["open_window"] >= 6) == (49, 3, True)
    assert data.counts("orders")["rejected"] == 3


def test_build_examples_of_nothing() -> None:
    examples, counts = build_examples([], [], CATALOG_ROWS, Settings(as_of=START, window=24 * HOUR, history=3))
    assert not examples
    assert not +counts["clicks"] + +counts["orders"]


def test_training_refuses_labels_of_one_class(data: Data) -> None:
    corpus = pytest.importorskip("camenn_model.training.corpus")
    data.tables["orders"] = ORDERS.schema.empty_table()
    assert data.shards("--attribution_hours", "3", "--test_share", "0.3") == 0
    with pytest.raises(
        InputError, match=r"part '\w+' has one class only \(no click was followed by an order\).*--attribution_hours"
    ):
        corpus.open_corpus(corpus.TrainOptions(shards=str(data.root / "shards"), out="unused"))
    with pytest.raises(InputError, match="every click was followed by an order"):
        corpus._check_classes("shards", "train", 1.0)


def test_training_refuses_a_log_that_is_too_short(data: Data) -> None:
    corpus = pytest.importorskip("camenn_model.training.corpus")
    data.tables["clicks"] = data.tables["clicks"].slice(0, 6)
    assert data.shards() == 0
    with pytest.raises(InputError, match=r"part '\w+' is empty: the log is too short .*Give a longer log"):
        corpus.open_corpus(corpus.TrainOptions(shards=str(data.root / "shards"), out="unused"))


@pytest.mark.parametrize(
    ("flag", "near"),
    [
        ("--attribution_hour", "--attribution_hours"),
        ("--runer", "--runner"),
        ("--max-reject-rate", "--max_reject_rate"),
    ],
)
def test_a_misspelt_flag_is_named_with_its_neighbour(capsys: pytest.CaptureFixture[str], flag: str, near: str) -> None:
    with pytest.raises(SystemExit) as stop:
        run_main(shards_command.main, ["--data", "d", "--store", "s", "--out", "o", f"{flag}=3"])
    assert stop.value.code == 2
    assert f"unknown argument {flag}=3; did you mean {near}?" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["tomorrow", "2024-13-01", "2024-01-01T00:00", "20240101", "2024-W01-1", ""])
def test_score_time_refuses_what_is_no_date(text: str) -> None:
    with pytest.raises(InputError, match=f"--score_date {text}: not a date. Write it as 2026-01-31."):
        score_time(text)


def test_score_time_is_midnight_utc() -> None:
    assert score_time("2023-11-15") == (1_700_006_400_000_000, 2)


@pytest.mark.parametrize(
    "text", ["2023-11-14T22:13:20.000001", "2023-11-14T22:13:20.000001+00:00", "2023-11-15T06:13:20.000001+08:00"]
)
def test_resolve_as_of_is_exact(text: str) -> None:
    later = np.array([START + DAY])
    assert planning.resolve_as_of(text, later, later) == START + 1
    for micros in range(0, 1_000_000, 9973):
        assert planning.resolve_as_of(f"2023-11-14T22:13:20.{micros:06d}", later, later) == START + micros


def test_resolve_as_of_goes_no_further_than_the_logs(capsys: pytest.CaptureFixture[str]) -> None:
    clicked, ordered = np.array([START, START + 9 * DAY]), np.array([START + 7 * DAY])
    assert planning.resolve_as_of(None, clicked, ordered) == START + 7 * DAY
    assert planning.resolve_as_of("2033-01-01", clicked, ordered) == START + 7 * DAY
    assert "later than the logs' end" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--attribution_hours", "0"), ("--attribution_hours", "nan"), ("--history", "-1"), ("--test_share", "2")],
)
def test_shards_refuses_numbers_that_make_no_sense(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--data", "d", "--store", "s", "--out", "o", flag, value]
    assert run_main(shards_command.main, argv) == 2
    assert flag in capsys.readouterr().err


def write_parts(directory: Path, tables: list[pa.Table]) -> Path:
    directory.mkdir(parents=True)
    for number, table in enumerate(tables):
        pq.write_table(table, directory / f"part-{number}.parquet")
    return directory.parent


def test_dimensions_name_the_very_file_and_row(tmp_path: Path) -> None:
    root = write_parts(tmp_path / "users", [pa.table({"user_id": ["a", "b"]}), pa.table({"user_id": ["c", None]})])
    with pytest.raises(InputError, match=r"users/part-1.parquet: row 1: column 'user_id' of table 'users' is null"):
        read_users(str(root))
    root = write_parts(tmp_path / "other" / "stores", [pa.table({"store_id": ["a"], "timezone": ["UTC"]})] * 2)
    with pytest.raises(
        InputError,
        match=r"part-0.parquet: row 0 and .*part-1.parquet: row 0: column 'store_id' "
        r"of table 'stores': 'a' stands there more than once",
    ):
        read_timezones(str(root), "UTC")


def test_users_of_any_plain_type_become_strings(tmp_path: Path) -> None:
    table = pa.table(
        {
            "user_id": [3, 12, 1],
            "age": [30.5, None, 7.0],
            "member": [True, False, None],
            "town": pa.array(["x", "y", "x"]).dictionary_encode(),
        }
    )
    write_files(tmp_path, "users", table)
    users, _ = read_users(str(tmp_path))
    assert users["user_id"].to_pylist() == ["1", "12", "3"]
    assert {str(field.type) for field in users.schema} == {"string"}
    assert (users["town"].to_pylist(), users["age"].null_count) == (["x", "y", "x"], 1)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        (
            "audience_id",
            ["a", "b", "b"],
            r"audience/part-1.parquet: row 0: column 'audience_id': 'b' stands there more than once. "
            r"Give each row its own id",
        ),
        ("audience_id", ["a", "b", None], r"part-2.parquet: row 0: column 'audience_id' of table 'audience' is null"),
        ("store_id", ["s", None, "s"], r"part-1.parquet: row 0: column 'store_id' of table 'audience' is null"),
        (
            "hour",
            [3, 0, 24],
            r"part-2.parquet: row 0: audience_id 'c': column 'hour' is 24. Use the local hour, 0 to 23",
        ),
        ("hour", [-1, 0, 2], r"part-0.parquet: row 0: audience_id 'a': column 'hour' is -1"),
    ],
)
def test_read_audience_names_the_row(tmp_path: Path, column: str, values: list[Any], message: str) -> None:
    table = pa.table(
        {"audience_id": ["a", "b", "c"], "user_id": pa.nulls(3, pa.string()), "store_id": ["s"] * 3, "hour": [1, 2, 3]}
    )
    table = put(table, column, pa.array(values, AUDIENCE.schema.field(column).type))
    root = write_parts(tmp_path / "audience", [table.slice(n, 1) for n in range(3)])
    with pytest.raises(InputError, match=message):
        read_audience(str(root))


def test_write_data_is_readable(tmp_path: Path) -> None:
    """The helper writes what the contracts require."""
    clicks, orders = plain_events()
    write_data(tmp_path, clicks, orders)
    for contract in (CATALOG, CLICKS, ORDERS):
        assert Source.find(str(tmp_path), contract).rows


@pytest.mark.parametrize("statistics", [True, False])
def test_events_at_times_that_cannot_be_are_rejects_and_move_nothing(
    data: Data, statistics: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row of the year 2099, of nanoseconds taken for microseconds, or of a 0 that stands for nothing."""
    assert data.shards() == 0
    before = ShardSet(str(data.root / "shards"))
    clicks, orders = plain_events()
    far = int(datetime.datetime(2099, 1, 1, tzinfo=datetime.UTC).timestamp()) * 1_000_000
    clicks += [a_click(100 + n, time) for n, time in enumerate((far, START * 1000, 0, -80_000_000_000_000_000))]
    orders.append(an_order(100, far))
    data.tables |= {"clicks": event_table(clicks, CLICKS), "orders": event_table(orders, ORDERS)}
    if not statistics:
        written = pq.write_table
        monkeypatch.setattr(pq, "write_table", lambda *args, **more: written(*args, **more, write_statistics=False))
    for flags in ((), ("--rebuild",)):
        assert data.shards("--max_reject_rate", "0.2", *flags) == 0
        after = ShardSet(str(data.root / "shards"))
        assert after.manifest["summary"]["as_of"] == before.manifest["summary"]["as_of"]
        assert after.manifest["options"]["days"]["as_of"] == before.manifest["options"]["days"]["as_of"]
        assert data.counts("clicks")["rejected"] == 4 and data.counts("orders")["rejected"] == 1
        rejects = [row for row in data.rejects() if row["reason"] == "impossible_time"]
        assert {row["key"] for row in rejects} == {
            "clicks:e100",
            "clicks:e101",
            "clicks:e102",
            "clicks:e103",
            "orders:o100/i0",
        }
        detail = next(row["detail"] for row in rejects if row["key"] == "clicks:e100")
        assert detail.startswith(f"{data.file('clicks')}: row 40: column 'clicked_at' is 2099-01-01T00:00:00")


def test_a_log_whose_clicks_become_no_example_is_not_published(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty catalog must not make days final that were never used in training."""
    whole = data.tables["catalog"]
    data.tables["catalog"] = whole.slice(0, 0)
    assert data.shards() == 2
    said = capsys.readouterr().err
    assert "none of " in said and "unknown_item 40" in said and "same item_id" in said
    assert not (data.root / "shards" / "latest.json").exists()
    data.tables["catalog"] = whole
    assert data.shards() == 0


@pytest.mark.parametrize("name", ["days_since_order", "hash", "brand_orders"])
def test_users_columns_named_like_features_are_refused(tmp_path: Path, name: str) -> None:
    write_files(tmp_path, "users", pa.table({"user_id": ["u0"], name: ["a"]}))
    with pytest.raises(
        InputError, match=f"column '{name}' of table 'users' would be the feature 'user_{name}'.*Rename"
    ):
        read_users(str(tmp_path))


def test_files_of_a_table_that_do_not_fit_together_are_named(tmp_path: Path) -> None:
    write_files(tmp_path / "users", "a", pa.table({"user_id": ["u0"], "age": ["old"]}))
    write_files(tmp_path / "users", "b", pa.table({"user_id": ["u1"], "age": pa.array([[1]])}))
    with pytest.raises(InputError, match="the files of table 'users' do not fit together"):
        read_users(str(tmp_path))


def test_an_audience_column_that_is_no_category_is_refused(tmp_path: Path) -> None:
    row = {"audience_id": ["a"], "user_id": ["u0"], "store_id": ["s0"], "hour": [1]}
    write_files(tmp_path, "audience", pa.table(row | {"tags": [["x"]]}))
    with pytest.raises(InputError, match="column 'tags' of table 'audience' has type list.*not a category"):
        read_audience(str(tmp_path))


def test_a_price_is_read_alike_however_it_is_written() -> None:
    """The model reads float32: rupiah as integers are no error, and give the same numbers as doubles."""
    prices = [20_000_001, 5]
    read = [
        conform(
            put(catalog_table(), "price", pa.array([*prices, *range(catalog_table().num_rows - 2)], kind)), CATALOG, "f"
        )
        for kind in (pa.int64(), pa.float64())
    ]
    assert read[0]["price"].equals(read[1]["price"])


@pytest.mark.parametrize("column", ["title", "image_uri"])
def test_a_catalog_that_changed_since_it_was_embedded_is_refused(
    data: Data, column: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Published scores must not stand beside another title or photo than they were computed from."""
    values = data.tables["catalog"][column].to_pylist()
    data.tables["catalog"] = put(data.tables["catalog"], column, pa.array(["another", *values[1:]]))
    assert data.shards() == 2
    assert f"column '{column}' of 1 of " in (said := capsys.readouterr().err) and "Run `camenn embed`" in said
