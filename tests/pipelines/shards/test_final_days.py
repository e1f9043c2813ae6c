"""Night after night is built into one shard set.

Final days stay, open days keep their features, and the result equals one build of the whole log.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from camenn_model.data.shard_set import ShardSet, date_of
from camenn_model.hashing import stable_hash
from camenn_model.training.corpus import TrainOptions, open_corpus
from pipelines.features.as_of import FEATURES_VERSION
from pipelines.features.time_index import DAY_US, HOUR_US, day_of
from pipelines.io.clock import EARLIEST, latest_time
from pipelines.io.tables import FileRecord, Source, list_slices
from pipelines.runs.manifest import Manifest, add_files, read_latest
from pipelines.shards import final_days
from pipelines.shards import stage as shards_stage
from pipelines.shards.final_days import (
    SAMPLE_SIZE,
    Kept,
    _least,
    check_same_log,
    delisted_items,
    keep_days,
    mix,
    sample_days,
    start_of,
)
from schemas.contract import TIMESTAMP
from schemas.errors import InputError
from schemas.events import CLICKS
from schemas.training import AUDIENCE_COUNTS, EXAMPLES, ITEM_COUNTS, PAIR_COUNTS, SPLITS
from tests.pipelines.shards.test_examples import shard_options
from tests.support.documents import edit_document
from tests.support.shard_reference import Row
from tests.support.small_city import CATALOG_ROWS, START, by_key, catalog_table, random_city, write_data, write_store

FEATURES = [column.name for column in (*AUDIENCE_COUNTS, *ITEM_COUNTS, *PAIR_COUNTS)] + ["history_item", "history_kind"]


class Nights:
    """A log that grows, and the shards built from it.

    They are built again and again. Labels are final a day after the attribution window of six
    hours.
    """

    def __init__(self, root: Path, seed: int = 5) -> None:
        self.root = root
        self.clicks, self.orders = random_city(seed, 500, 400)
        self.catalog = catalog_table()
        write_store(root / "store", self.catalog)
        self.night = 0

    def build(self, until: float, *, out: str = "shards", since: float = 0.0, **flags: Any) -> dict[str, Any]:
        """Write the events that had arrived `until` days after the start, and build; returns the closing table."""
        self.night += 1

        def came(rows: list[Row], column: str) -> list[Row]:
            ends = (START + since * DAY_US, START + until * DAY_US)
            return [row for row in rows if ends[0] <= row[column] < ends[1]]

        data = self.root / f"data-{self.night}"
        write_data(data, came(self.clicks, "clicked_at"), came(self.orders, "ordered_at"), catalog=self.catalog)
        rebuild = flags.pop("rebuild", False)
        settings = {"attribution_hours": 6.0, "late_days": 1.0, "max_reject_rate": 0.3, "test_share": 0.3} | flags
        return shards_stage.run(
            shard_options(data, self.root / "store", self.root / out, **settings), [], rebuild=rebuild
        )

    def rows(self, out: str = "shards") -> dict[Any, Row]:
        """All examples by key, each with its split."""
        shards = ShardSet(str(self.root / out))
        found: dict[Any, Row] = {}
        for split in SPLITS:
            for path, rows in shards.examples(split):
                table = pq.ParquetFile(path).read()
                assert table.num_rows == rows
                assert {str(day) for day in table["session_start"].cast(pa.date32()).to_pylist()} == {date_of(path)}
                for key, row in by_key(table).items():
                    assert key not in found
                    found[key] = row | {"split": split}
        assert len(found) == sum(rows for _, rows in shards.files("examples"))
        return found

    def paths(self, before: int = 2**62) -> dict[str, bytes]:
        """Example files of the days before a time, and what is in them."""
        shards = ShardSet(str(self.root / "shards"))
        return {
            path: Path(path).read_bytes() for path, _ in shards.files("examples") if start_of(date_of(path)) < before
        }


@pytest.mark.parametrize("seed", [5, 6])
def test_nights_add_up_to_one_build_of_the_whole_log(tmp_path: Path, seed: int) -> None:
    nights = Nights(tmp_path, seed)
    first = nights.build(6)
    assert (first["days_kept"], first["days_built"]) == (0, len({date_of(path) for path in nights.paths()}))
    for until in (8, 9.5, 12):
        built = nights.build(until)
        assert built["days_kept"] > 0
        # Each click of a final day, and none else, is left alone.
        assert built["clicks_final_day"] > 0
    nights.build(12, out="whole")
    assert nights.rows() == nights.rows("whole")
    assert built["examples"] == sum_by_split(nights.rows("whole"))
    assert built["days_built"] < nights.build(12, rebuild=True)["days_built"]
    assert nights.rows() == nights.rows("whole")


def sum_by_split(rows: dict[Any, Row]) -> dict[str, int]:
    return {split: sum(row["split"] == split for row in rows.values()) for split in SPLITS}


def test_final_days_stay_and_open_days_keep_their_features(tmp_path: Path) -> None:
    nights = Nights(tmp_path)
    nights.build(8)
    before = nights.rows()
    latest = read_latest(str(tmp_path / "shards"))
    assert latest is not None
    final = int(latest.options["days"]["as_of"]) - 6 * HOUR_US - DAY_US
    final = final // DAY_US * DAY_US
    kept = nights.paths(final)
    assert kept
    # A click and an order of every day, which come a night late; the order is for an example of that day that had none.
    late_clicks, late_orders, bought = [], [], {}
    for number, (key, row) in enumerate(sorted(before.items(), key=lambda entry: str(entry))):
        click = {
            "exposure_id": f"late {number}",
            "session_id": f"late {number}",
            "user_id": key[0],
            "store_id": row["store_id"],
            "item_id": key[2],
            "clicked_at": row["session_start"] - 60_000_000,
            "position": 0,
        }
        late_clicks.append(click)
        day = row["session_start"] // DAY_US
        if row["label"] == 0 and day not in bought:
            bought[day] = key
            order = {name: click[name] for name in ("user_id", "store_id", "item_id")}
            late_orders.append(
                {"order_id": f"late {number}", **order, "ordered_at": row["clicked_at"] + 1, "quantity": 1.0}
            )
    nights.clicks += late_clicks
    nights.orders += late_orders
    nights.build(9)
    after = nights.rows()
    now = nights.paths(final)
    stayed = kept.keys() & now.keys()
    assert stayed and all(now[path] == kept[path] for path in stayed)
    assert len(kept) - len(stayed) <= len(SPLITS), "only where a split begins is a final day cut anew"
    changed = 0
    for key, row in before.items():
        names = set(row) - {"split", "label"}
        assert {name: after[key][name] for name in names} == {name: row[name] for name in names}
        if row["session_start"] < final:
            assert after[key]["label"] == row["label"]
        elif key in bought.values():
            assert (row["label"], after[key]["label"]) == (0, 1)
            changed += 1
    assert changed > 0
    late = {key for key in after if str(key[1]).startswith("late")}
    assert late and min(after[key]["session_start"] for key in late) >= final
    # New rows have the features as known now, including the late clicks.
    nights.build(9, out="whole")
    whole = nights.rows("whole")
    fresh = [key for key in after if key not in before]
    assert all({n: after[key][n] for n in FEATURES} == {n: whole[key][n] for n in FEATURES} for key in fresh)
    assert any(whole[key][name] != before[key][name] for key in before for name in FEATURES)


def test_days_that_left_the_log_and_listings_that_left_the_catalog_stay(tmp_path: Path) -> None:
    nights = Nights(tmp_path)
    nights.build(9)
    before = nights.rows()
    nights.catalog = catalog_table(row for row in CATALOG_ROWS if row["item_id"] != "i0")
    write_store(tmp_path / "store", nights.catalog, run="20240102T000000-bbbbbb")
    nights.build(12, since=5)
    after = nights.rows()
    gone = {key for key, row in before.items() if row["session_start"] < START + 4 * DAY_US}
    assert gone <= after.keys()
    assert any(key[2] == "i0" for key in gone)
    shards = ShardSet(str(tmp_path / "shards"))
    assert set(shards.items["item_id"].to_pylist()) == {row["item_id"] for row in CATALOG_ROWS}
    corpus = open_corpus(TrainOptions(shards=str(tmp_path / "shards"), out=str(tmp_path / "model")))
    for path, _ in corpus.files("train"):
        assert corpus.reader.read(path).item.min() >= 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"attribution_hours": 12.0}, "--attribution_hours 12.0: the days in .* were built with 6.0.*--rebuild"),
        ({"history": 7}, "--history 7: the days in .* were built with 5.*--rebuild"),
        ({"timezone": "Asia/Shanghai"}, "--timezone Asia/Shanghai: .*--rebuild"),
        ({"as_of": "2023-11-19"}, "--as_of 2023-11-19.*which is later.*--rebuild"),
    ],
)
def test_rows_that_would_not_fit_are_refused(tmp_path: Path, flags: dict[str, Any], message: str) -> None:
    nights = Nights(tmp_path)
    nights.build(8)
    pointer = (tmp_path / "shards" / "latest.json").read_bytes()
    with pytest.raises(InputError, match=message):
        nights.build(9, **flags)
    assert (tmp_path / "shards" / "latest.json").read_bytes() == pointer
    summary = nights.build(9, rebuild=True, **flags)
    assert summary["days_kept"] == 0
    assert json.loads(manifest_of(tmp_path / "shards").read_text())["options"]["days"]["rebuilt"] is True


def test_shard_sets_of_before_are_refused(tmp_path: Path) -> None:
    nights = Nights(tmp_path)
    nights.build(8)
    path = manifest_of(tmp_path / "shards")

    def as_before(manifest: dict[str, Any]) -> None:
        del manifest["options"]["days"]
        for entry in manifest["tables"]["examples"]["files"]:
            del entry["split"]

    edit_document(path, as_before)
    with pytest.raises(InputError, match="an earlier version of camenn.*--rebuild"):
        ShardSet(str(tmp_path / "shards")).examples("train")
    with pytest.raises(InputError, match="another version of camenn.*--rebuild"):
        nights.build(9)
    nights.build(9, rebuild=True)
    assert nights.rows()


def test_days_with_features_of_another_version_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nights = Nights(tmp_path)
    nights.build(8)
    for module in (final_days, shards_stage):
        monkeypatch.setattr(module, "FEATURES_VERSION", FEATURES_VERSION + 1)
    for night in (8, 9):
        with pytest.raises(InputError, match="computed its features in another way.*--rebuild"):
            nights.build(night)
    nights.build(8, rebuild=True)
    assert nights.rows()


def manifest_of(out: Path) -> Path:
    return Path(out / json.loads((out / "latest.json").read_text())["manifest"])


def test_another_log_is_refused(tmp_path: Path) -> None:
    nights = Nights(tmp_path)
    nights.build(8)
    for row in nights.clicks:
        row["exposure_id"] = f"other {row['exposure_id']}"
    with pytest.raises(InputError, match="the clicks of 2023-11-1.* are not those .*--rebuild"):
        nights.build(9)


@given(st.data())
def test_samples_are_the_least_numbers_of_each_day(data: st.DataObject) -> None:
    """Whatever the row groups, the order of rows and how many clicks share a moment."""
    moments = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=8), label="moments")
    rows = data.draw(st.lists(st.tuples(st.sampled_from(moments), st.integers(0, 40)), min_size=1, max_size=200))
    rows = [(EARLIEST + number // 3 * DAY_US + number % 3, exposure) for number, exposure in rows]
    table = pa.table(
        {"exposure_id": [f"e{number}" for _, number in rows], "clicked_at": pa.array([t for t, _ in rows], TIMESTAMP)}
    )
    every: dict[str, set[int]] = {}
    for (time, _), hashed in zip(rows, stable_hash(table["exposure_id"]).tolist(), strict=True):
        number = int(mix(np.array([time]))[0]) << 32 | hashed & (2**32 - 1)
        every.setdefault(day_of(time), set()).add(number)
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/clicks.parquet"
        pq.write_table(table, path, row_group_size=data.draw(st.integers(1, 100), label="rows of a row group"))
        source = Source(contract=CLICKS, files=(path,), rows=len(rows), fingerprint="")
        expected = {date: sorted(numbers)[:SAMPLE_SIZE] for date, numbers in sorted(every.items())}
        slices = list_slices(source)
        assert sample_days(CLICKS, slices, latest_time()) == expected
        cut = data.draw(st.integers(0, len(slices)), label="row groups that are known")
        assert (
            sample_days(CLICKS, slices[cut:], latest_time(), sample_days(CLICKS, slices[:cut], latest_time()))
            == expected
        )


@pytest.mark.parametrize("late", [0, 6 * HOUR_US, DAY_US + 6 * HOUR_US])
@pytest.mark.parametrize("after", [0, 1, 6 * HOUR_US, DAY_US - 1])
def test_days_are_kept_up_to_the_first_that_may_change(late: int, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A day stays where it ended at least `late` before the `as_of` of the run that built it, and
    then as a whole; tonight's `as_of` makes no difference.
    """
    # These files are names only.
    monkeypatch.setattr(Manifest, "check", lambda *_: None)
    before = start_of("2024-01-05") + after
    dates = [f"2024-01-{day:02d}" for day in range(1, 8)]
    settings: dict[str, object] = {"history": 5}
    manifest = Manifest(
        stage="shards", run="r", options=settings | {"days": {"as_of": before, "features": FEATURES_VERSION}}
    )
    records = [FileRecord("examples", f"/x/date={date}/part-0.parquet", 1, 1, "train") for date in dates]
    add_files(manifest, {"examples": EXAMPLES.fingerprint()}, records)
    for as_of in (before, before + 3 * DAY_US):
        kept = keep_days(manifest, settings, as_of, late, "out")
        final = [date for date in dates if start_of(date) + DAY_US + late <= before]
        assert sorted(kept.dates) == final and sorted(kept.open_paths) == dates[len(final) :]
        # There is no gap between the last day that stays and the first that is built.
        assert kept.frozen_before % DAY_US == 0
        assert day_of(kept.frozen_before) == dates[len(final)]
    with pytest.raises(InputError, match="which is later"):
        keep_days(manifest, settings, before - 1, late, "out")


def test_a_final_day_is_known_by_half_of_its_sample() -> None:
    kept = Kept(
        records=[FileRecord("examples", f"/x/date=2024-01-0{day}/part-0.parquet", 1, 1) for day in (1, 2)],
        samples={"2024-01-01": [1, 2, 3, 4], "2024-01-02": [10, 20, 30, 40]},
    )
    first = {"2024-01-01": [4, 5, 6, 7]}
    check_same_log(kept, first | {"2024-01-02": [10, 20, 35, 45]}, "out")
    # Of the day at which the log begins now, any part may have left it.
    check_same_log(kept, {"2024-01-01": [7], "2024-01-02": [10, 20, 30, 40]}, "out")
    with pytest.raises(InputError, match="of 2024-01-02 .*: 3 of 4 sampled exposures"):
        check_same_log(kept, first | {"2024-01-02": [10, 25, 35, 45]}, "out")


def test_only_listings_that_final_days_refer_to_are_kept(tmp_path: Path) -> None:
    columns = {"item_id": ["a", "b", "c", "d"], "price": [1.0, 2.0, 3.0, 4.0]}
    earlier, kept = str(tmp_path / "items.parquet"), []
    pq.write_table(pa.table(columns), earlier)
    for number, ids in enumerate((["a", "b"], ["b", "d"])):
        path = str(tmp_path / f"part-{number}.parquet")
        pq.write_table(pa.table({"item_id": ids}), path)
        kept.append(FileRecord("examples", path, 2, 1))
    items = pa.table({"price": [9.0, 8.0], "item_id": ["a", "e"]})
    found = delisted_items(items, [earlier], kept)
    # `a` is there still, and no day refers to `c`.
    assert found.to_pylist() == [{"price": 2.0, "item_id": "b"}, {"price": 4.0, "item_id": "d"}]
    assert delisted_items(items, [earlier], []).num_rows == delisted_items(items, [], kept).num_rows == 0


@given(st.lists(st.sampled_from([0, 0, 0, 0, 1, 1, 1, 2, 3, 5, 8]), max_size=120), st.integers(1, 4))
@example([0] * 20 + [1, 2, 3, 5], 4)
@example([2] * 70 + [0, 1, 3, 5], 4)
def test_the_least_values_are_found_among_many_that_are_alike(values: list[int], count: int) -> None:
    assert _least(np.array(values, dtype=np.uint64), count).tolist() == sorted(set(values))[:count]


def test_a_log_that_grows_is_known_again() -> None:
    """However many clicks arrive late, the old sample of a day is found in the day."""
    rng = np.random.default_rng(0)
    kept = Kept(records=[FileRecord("examples", f"/x/date=2024-01-0{day}/part-0.parquet", 1, 1) for day in (2, 3)])
    for _ in range(200):
        old = {f"2024-01-0{day}": np.unique(rng.integers(0, 2**63, int(rng.integers(1, 60)))) for day in (1, 2, 3)}
        grown = {
            date: np.union1d(values, rng.integers(0, 2**63, int(rng.integers(0, 300))))[:SAMPLE_SIZE].tolist()
            for date, values in old.items()
        }
        samples = {date: values[:SAMPLE_SIZE].tolist() for date, values in old.items()}
        check_same_log(Kept(records=kept.records, samples=samples), grown, "out")
        # A day of few clicks may match another log unnoticed, one of some dozens does not.
        known, other = (
            {date: np.unique(rng.integers(0, 2**63, 60))[:SAMPLE_SIZE].tolist() for date in old} for _ in range(2)
        )
        with pytest.raises(InputError, match="2024-01-02"):
            check_same_log(Kept(records=kept.records, samples=known), other, "out")
