"""The cache of the logs.

Whatever was added, removed or rewritten, a run with the previous night's cache equals one that
reads everything.
"""

import logging
import os
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipelines.features.time_index import DAY_US
from pipelines.inputs.logs import CleanEvents
from pipelines.io.clock import latest_time
from pipelines.io.shuffle import split_by_bucket, unpack
from pipelines.io.tables import Source, list_slices, read_slice
from pipelines.runs.accounting import read_rejects
from pipelines.runs.manifest import Manifest, add_files, read_latest
from pipelines.shards import log_cache, sizes
from pipelines.shards import stage as shards_stage
from pipelines.shards.final_days import sample_days
from pipelines.shards.log_cache import KeptRows, LogPlan, hash_row_groups, plan_logs, remember
from schemas.contract import Contract
from schemas.events import CLICKS, ORDERS
from tests.pipelines.shards.test_examples import shard_options
from tests.pipelines.shards.test_final_days import Nights
from tests.support.documents import edit_document
from tests.support.shard_reference import Row
from tests.support.small_city import START, catalog_table, event_table, random_city, write_data, write_store


class Logs:
    """Logs of one file a day, in their state at each night."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.data = root / "data"
        write_data(self.data, [], [], catalog=catalog_table())
        write_store(root / "store", catalog_table())
        self.rows: dict[str, list[Row]] = {}
        for contract, rows in zip((CLICKS, ORDERS), random_city(seed, 600, 500), strict=True):
            self.rows[contract.name] = rows
            (self.data / f"{contract.name}.parquet").unlink()
            (self.data / contract.name).mkdir()

    def file(self, contract: Contract, name: str) -> Path:
        """Where a file of a log lies."""
        return self.data / contract.name / f"{name}.parquet"

    def add(self, contract: Contract, name: str, rows: list[Row], row_group_size: int = 40) -> None:
        """Write a file of a log."""
        pq.write_table(event_table(rows, contract), self.file(contract, name), row_group_size=row_group_size)

    def day(self, contract: Contract, day: int) -> list[Row]:
        """The events of one day of the city."""
        time = "clicked_at" if contract is CLICKS else "ordered_at"
        return [row for row in self.rows[contract.name] if (row[time] - START) // DAY_US == day]

    def add_days(self, *days: int) -> None:
        """Write some days' files."""
        for contract in (CLICKS, ORDERS):
            for day in days:
                self.add(contract, f"day-{day:02d}", self.day(contract, day))

    def build(self, out: str = "shards", **flags: Any) -> dict[str, Any]:
        """A night; returns the closing table."""
        settings = {"attribution_hours": 6.0, "late_days": 1.0, "max_reject_rate": 0.5, "test_share": 0.3}
        return shards_stage.run(shard_options(self.data, self.root / "store", self.root / out, **settings), [], **flags)

    def build_both(self) -> dict[str, Any]:
        """A night, which must equal one without cached logs; returns the closing table."""
        shutil.rmtree(self.root / "plain", ignore_errors=True)
        shutil.copytree(self.root / "shards", self.root / "plain")
        before = read_latest(str(self.root / "plain"))
        assert before is not None
        path = self.root / "plain" / "runs" / before.run / "manifest.json"
        edit_document(path, lambda manifest: manifest["options"].pop("log"))
        summary, plain = self.build(), self.build("plain")
        assert plain["log_rows_kept"] == 0
        assert outcome(self.root / "shards") == outcome(self.root / "plain")
        return summary


def outcome(out: Path) -> dict[str, Any]:
    """Everything that a shard set records of the logs."""
    manifest = read_latest(str(out))
    assert manifest is not None
    examples = Nights.rows(type("Shards", (), {"root": out.parent})(), out.name)
    rejects = sorted(tuple(row.values()) for row in read_rejects(manifest.records("rejects"), 10_000))
    return {
        "examples": examples,
        "counts": manifest.counts,
        "rejects": rejects,
        "samples": manifest.options["days"]["samples"],
    }


def kept_rows(manifest: Manifest) -> int:
    return sum(manifest.rows(log_cache.kept_table(contract)) for contract in (CLICKS, ORDERS))


@pytest.mark.parametrize("seed", [5, 6])
def test_a_night_that_knows_the_log_gives_what_one_gives_that_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(sizes, "ROWS_PER_BUCKET", 150)
    monkeypatch.setattr(log_cache, "MERGE", 3)
    logs = Logs(tmp_path, seed)
    logs.add_days(*range(6))
    first = logs.build()
    assert first["log_rows_kept"] == 0 and first["log_rows_read"] == first["rows_in"] + len(
        [row for day in range(6) for row in logs.day(ORDERS, day)]
    )
    # Only the row groups of a row without user or quantity are read again.
    dirty = 2 * 40
    logs.add_days(6)
    summary = logs.build_both()
    new = sum(len(logs.day(contract, 6)) for contract in (CLICKS, ORDERS))
    assert new <= summary["log_rows_read"] <= new + dirty

    late = [{**row, "exposure_id": f"late {row['exposure_id']}"} for row in logs.day(CLICKS, 2)[:20]]
    logs.add(CLICKS, "late", late)
    logs.add_days(7)
    summary = logs.build_both()
    assert summary["log_rows_read"] < summary["log_rows_kept"]

    # Files that leave the log, and one that comes under another name.
    for contract in (CLICKS, ORDERS):
        logs.file(contract, "day-00").unlink()
        logs.file(contract, "day-05").rename(logs.file(contract, "moved"))
    logs.add_days(8)
    assert logs.build_both()["log_rows_read"] < 400

    # A duplicated file, and one that is rewritten in another order.
    shutil.copy(logs.file(CLICKS, "day-04"), logs.file(CLICKS, "day-04-again"))
    rows = logs.day(CLICKS, 3)
    random.Random(seed).shuffle(rows)
    logs.add(CLICKS, "day-03", rows, 17)
    # Part of the day at which the log begins now leaves it.
    rows = logs.day(CLICKS, 1)
    begins = min(row["clicked_at"] // DAY_US for row in rows)
    stay = [row for n, row in enumerate(rows) if row["clicked_at"] // DAY_US > begins or n % 3 == 0]
    assert len(stay) < len(rows)
    logs.add(CLICKS, "day-01", stay)
    logs.add_days(9)
    summary = logs.build_both()
    assert summary["clicks_duplicates"] >= len(logs.day(CLICKS, 4))

    logs.file(CLICKS, "day-04-again").unlink()
    # Without times in the footer, whole days are sampled again.
    pq.write_table(pq.read_table(logs.file(CLICKS, "day-02")), logs.file(CLICKS, "day-02"), write_statistics=False)
    for day in range(10, 14):
        logs.add_days(day)
        summary = logs.build_both()
        assert summary["log_rows_read"] < 400
    manifest = read_latest(str(tmp_path / "shards"))
    assert manifest is not None
    files: dict[tuple[str, str], int] = {}
    for contract in (CLICKS, ORDERS):
        for path in manifest.paths(log_cache.kept_table(contract)):
            key = (contract.name, Path(path).name.rpartition("-")[0])
            files[key] = files.get(key, 0) + 1
    assert len(files) > 4 and max(files.values()) <= 3, "files of a bucket are merged"
    assert kept_rows(manifest) < 1.5 * summary["log_rows_kept"], (
        "rows that are gone are forgotten when files are merged"
    )

    # Nothing new, and everything read again on request.
    logs.file(CLICKS, "day-01").unlink()
    logs.build_both()
    logs.add(CLICKS, "day-02", logs.day(CLICKS, 2))
    logs.build_both()
    again = logs.build(rerun=True)
    assert again["log_rows_read"] <= dirty and outcome(tmp_path / "shards") == outcome(tmp_path / "plain")
    assert logs.build(rebuild=True)["log_rows_kept"] == 0


@pytest.mark.parametrize("harm", ["cut", "gone", "flipped"])
def test_kept_rows_that_are_not_whole_are_read_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    logs = Logs(tmp_path, 5)
    logs.add_days(*range(7))
    logs.build()
    manifest = read_latest(str(tmp_path / "shards"))
    assert manifest is not None
    path = manifest.paths("kept_clicks")[0]
    logs.add_days(7)
    caplog.clear()
    if harm == "cut":
        os.truncate(path, os.path.getsize(path) - 1)
    elif harm == "gone":
        os.remove(path)
    else:
        with open(path, "r+b") as handle:
            handle.seek(os.path.getsize(path) // 2)
            byte = handle.read(1)[0]
            handle.seek(-1, os.SEEK_CUR)
            handle.write(bytes([byte ^ 0x10]))
    summary = logs.build_both()
    assert summary["log_rows_kept"] == 0
    told_of = next(line for line in map(logging.LogRecord.getMessage, caplog.records) if line.startswith(f"{path}: "))
    assert told_of.endswith("The whole log is read again.")
    logs.add_days(8)
    assert logs.build_both()["log_rows_kept"] > 0


def test_a_log_that_outgrew_its_buckets_is_cut_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "ROWS_PER_BUCKET", 400)
    logs = Logs(tmp_path, 5)
    logs.add_days(*range(6))
    logs.build()
    logs.add_days(*range(6, 8))
    assert logs.build_both()["log_rows_kept"] > 0
    monkeypatch.setattr(sizes, "ROWS_PER_BUCKET", 50)
    logs.add_days(8)
    assert logs.build_both()["log_rows_kept"] == 0
    logs.add_days(9)
    assert logs.build_both()["log_rows_kept"] > 0


def test_row_groups_are_known_by_what_they_hold(tmp_path: Path) -> None:
    table = event_table(random_city(5, 60, 50)[0], CLICKS)

    def hashes(name: str, table: pa.Table, **settings: Any) -> list[str]:
        path = tmp_path / f"{name}.parquet"
        pq.write_table(table, path, **settings)
        source = Source(contract=CLICKS, files=(str(path),), rows=table.num_rows, fingerprint="")
        found = hash_row_groups(source)
        assert [(place.row_group, place.first_row) for _, place, _ in found] == [
            (number, 20 * number) for number in range(len(found))
        ]
        assert sum(group.rows for _, _, group in found) == table.num_rows
        return [name for name, _, _ in found]

    first = hashes("a", table, row_group_size=20)
    assert len(set(first)) == len(first) > 2
    assert hashes("b", pa.concat_tables([table, table.slice(0, 7)]), row_group_size=20)[: len(first) - 1] == first[:-1]
    beside = table.append_column("note", pa.array(["x"] * table.num_rows))
    assert hashes("c", beside, row_group_size=20) == first, "columns that nobody reads do not matter"
    turned = table.set_column(1, "session_id", pc.utf8_reverse(table["session_id"]))
    assert not set(hashes("d", turned, row_group_size=20)) & set(first)
    zoned = table.set_column(5, "clicked_at", table["clicked_at"].cast(pa.timestamp("us", "UTC")))
    assert not set(hashes("e", zoned, row_group_size=20)) & set(first), "the same bytes under another type"
    twice = hashes("f", pa.concat_tables([table.slice(0, 20)] * 3), row_group_size=20)
    assert twice == [first[0], f"{first[0]}-2", f"{first[0]}-3"]


class Plans:
    """Night after night of one log, without Beam: what is planned, read and kept, against reading everything."""

    def __init__(self, root: Path, rows_per_bucket: int) -> None:
        self.root, self.rows_per_bucket = root, rows_per_bucket
        self.latest: Manifest | None = None
        self.samples: dict[str, list[int]] = {}
        self.nights = 0

    def read(self, places: Any) -> tuple[list[pa.Table], int]:
        """Row groups' rows, cleaned, and how many were rejected."""
        step = CleanEvents("shards", CLICKS, latest_time())
        kept, rejected = [], 0
        for place in places:
            for output in step.process((place, read_slice(place, CLICKS))):
                if not isinstance(output, beam.pvalue.TaggedOutput):
                    kept.append(output)
                elif output.tag == "rejects":
                    rejected += output.value.num_rows
        return kept, rejected

    def night(self, paths: list[Path]) -> LogPlan:
        """A night over some files; its rows, rejects and samples are those of the whole log."""
        rows = sum(pq.read_metadata(path).num_rows for path in paths)
        source = Source(contract=CLICKS, files=tuple(map(str, paths)), rows=rows, fingerprint="")
        plans, buckets = plan_logs([source], self.latest, self.rows_per_bucket)
        plan = plans["clicks"]
        kinds: dict[int, dict[str, list[pa.Table]]] = {bucket: {} for bucket in range(buckets)}
        fresh, rejected = self.read(plan.fresh)
        for table in fresh:
            for bucket, piece in split_by_bucket(table, "user_id", buckets):
                kinds[bucket].setdefault("clicks", []).append(piece)
        for part in plan.parts:
            kinds[part.bucket].setdefault("kept_clicks", []).append(unpack(part.partition))
        self.nights += 1
        step = KeptRows.of(plan, str(self.root / f"run-{self.nights}"))
        found, records = [], []
        for bucket, tables in kinds.items():
            joined = step.join(bucket, {name: pa.concat_tables(pieces) for name, pieces in tables.items()})
            found.append(joined[0].select(CLICKS.names))
            records += joined[1]
        everything, all_rejected = self.read(list_slices(source))
        assert lines(found) == lines(everything)
        assert rejected == all_rejected
        assert plan.known_rows + plan.fresh_rows == rows

        log, kept = remember(plans, buckets)
        self.latest = Manifest(stage="shards", run=f"run-{self.nights}", options={"log": log})
        add_files(self.latest, {"kept_clicks": ""}, [*kept, *records])
        of_bucket = Counter(Path(record.path).name.rpartition("-")[0] for record in self.latest.records("kept_clicks"))
        assert max(of_bucket.values(), default=0) <= log_cache.MERGE

        unsampled, changed = plan.unsampled()
        stay = {date: sample for date, sample in self.samples.items() if changed is not None and date not in changed}
        self.samples = sample_days(CLICKS, unsampled, latest_time(), stay)
        assert self.samples == sample_days(CLICKS, list_slices(source), latest_time())
        return plan


def lines(tables: list[pa.Table]) -> list[tuple[Any, ...]]:
    """All rows of some tables, in an order of their own."""
    return sorted((tuple(row.values()) for table in tables for row in table.select(CLICKS.names).to_pylist()), key=str)


@pytest.mark.parametrize("seed", range(6))
def test_plans_of_many_nights_give_the_rows_of_tonights_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Files are added, removed, rewritten, duplicated, moved, or have rows without a user; row
    groups span midnight or do not.
    """
    monkeypatch.setattr(log_cache, "MERGE", 3)
    rng = random.Random(seed)
    plans = Plans(tmp_path, rows_per_bucket=90)
    paths: list[Path] = []
    number = 0

    def write(rows: list[Row]) -> Path:
        nonlocal number
        number += 1
        path = tmp_path / f"file-{number}.parquet"
        statistics = rng.random() < 0.9
        pq.write_table(
            event_table(rows, CLICKS), path, row_group_size=rng.choice([7, 12, 100]), write_statistics=statistics
        )
        return path

    def some_rows(day: int) -> list[Row]:
        start = (START // DAY_US + day) * DAY_US
        return sorted(
            (
                {
                    "exposure_id": f"e{number}-{place}",
                    "session_id": f"v{rng.randrange(4)}",
                    "user_id": None if place == 0 and number % 5 == 0 else f"u{rng.randrange(9)}",
                    "store_id": rng.choice(("s0", "s1")),
                    "item_id": f"i{rng.randrange(5)}",
                    "clicked_at": start + rng.randrange(rng.choice([1, 2])) * DAY_US + rng.randrange(DAY_US),
                    "position": place,
                }
                for place in range(24)
            ),
            key=lambda row: row["clicked_at"],
        )

    for night in range(12):
        for _ in range(rng.choice([0, 1, 2])):
            paths.append(write(some_rows(rng.randrange(max(0, night // 2 - 2), night // 2 + 1))))
        what = rng.choice(["none", "gone", "twice", "moved", "anew"])
        if paths and what != "none":
            place = rng.randrange(len(paths))
            if what == "gone":
                paths.pop(place)
            elif what == "twice":
                paths.append(paths[place])
            elif what == "moved":
                paths[place] = Path(shutil.copy(paths[place], tmp_path / f"moved-{night}.parquet"))
            else:
                rows = pq.read_table(paths[place])
                again = tmp_path / f"anew-{night}.parquet"
                pq.write_table(
                    rows.take(pa.array(rng.sample(range(rows.num_rows), rows.num_rows))), again, row_group_size=9
                )
                paths[place] = again
        if not paths:
            paths.append(write(some_rows(night // 2)))
        plans.night(paths)
        # Of the same files, only row groups with rejects are read again.
        if night % 4 == 3:
            plan = plans.night(paths)
            dirty = [place for place in plan.places if read_slice(place, CLICKS)["user_id"].null_count]
            assert list(plan.fresh) == dirty


@pytest.mark.parametrize("harm", [-1, 1])
def test_kept_rows_of_another_size_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: int) -> None:
    rows = [row for row in random_city(5, 60, 50)[0] if row["user_id"] is not None]
    path = tmp_path / "clicks.parquet"
    pq.write_table(event_table(rows, CLICKS), path, row_group_size=20)
    plans = Plans(tmp_path, rows_per_bucket=1_000)
    plans.night([path])
    assert plans.night([path]).fresh == ()
    assert plans.latest is not None
    (kept,) = plans.latest.paths("kept_clicks")
    os.truncate(kept, os.path.getsize(kept) + harm)
    assert plans.night([path]).known == frozenset()
    assert f"{kept}: has " in caplog.text and "The whole log is read again." in caplog.text
