"""Thirty nights in a row, with a month's usual faults.

After each night, readers see that night's scores, which are right, or those of the previous night.
"""

import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from safetensors.torch import save_file

from camenn_model.encoders.inception_v4 import load_inception
from camenn_model.encoders.spec import ImageSpec
from pipelines.embed import command as embed_command
from pipelines.io import clock
from pipelines.nightly import command as nightly_command
from pipelines.runner.exit_codes import run_main
from pipelines.runs.manifest import read_latest
from pipelines.runs.night_record import DONE, FAILED, GATED, NOT_DUE, UNCHANGED, read_nights
from pipelines.runs.publication import check_whole, publications
from pipelines.score import command as score_command
from pipelines.score import gates
from simulator.config import preset_config
from simulator.generate import generate_city
from tests.support.encoder_sources import minilm

NIGHTS, FIRST_DAYS = 30, 16
DAY = datetime.timedelta(days=1)
ENCODERS = {"grid": 2, "max_tokens": 16}
COMMAND = [sys.executable, "-c", "import sys; from pipelines import cli; sys.exit(cli.console())"]


@dataclass
class Month:
    """A city whose logs grow by a day a night, and its nightly."""

    root: Path
    whole: Path
    config: Path
    night: int = 0
    faults: dict[int, int] = field(default_factory=dict)
    """Exit codes of the nights that were to fail, by the number of the night's record"""

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def work(self) -> Path:
        return self.root / "work"

    def dawn(self) -> None:
        """Write the next day's tables.

        They hold all events until its end, a new title, another photo, and occasionally a new
        listing.
        """
        self.night += 1
        rng = np.random.default_rng(self.night)
        start = datetime.datetime(2024, 3, 4)
        end = pa.scalar(start + (FIRST_DAYS + self.night - 1) * DAY, pa.timestamp("us"))
        catalog = pq.read_table(self.whole / "catalog.parquet").to_pandas()
        catalog = catalog[: len(catalog) - 10 + self.night // 3]
        titles = json.loads((self.root / "titles.json").read_text()) if self.night > 1 else {}
        if self.night > 1:
            # The first night is that of the catalog as it is.
            titles[str(int(rng.integers(100)))] = f"fresh title of night {self.night}"
            photo = self.data / str(catalog["image_uri"].dropna().iloc[int(rng.integers(50))])
            photo.write_bytes(photo.read_bytes() + bytes([self.night]))
        (self.root / "titles.json").write_text(json.dumps(titles))
        for row, title in titles.items():
            catalog.loc[catalog.index[int(row)], "title"] = title
        self.write("catalog", pa.Table.from_pandas(catalog, preserve_index=False))
        for name, column in (("clicks", "clicked_at"), ("orders", "ordered_at")):
            table = pq.read_table(self.whole / f"{name}.parquet")
            self.write(name, table.filter(pc.less(table[column].cast(pa.timestamp("us")), end)))

    def write(self, name: str, table: pa.Table) -> None:
        pq.write_table(table, self.data / f"{name}.parquet")

    def read(self, name: str) -> pa.Table:
        return pq.read_table(self.data / f"{name}.parquet")

    def run(self) -> tuple[int, dict[str, Any]]:
        """A night, in this process: (exit code, its record)."""
        code = run_main(nightly_command.main, ["--config", str(self.config)])
        return code, read_nights(str(self.work))[-1]

    def start(self) -> subprocess.Popen[bytes]:
        """A night in a process of its own."""
        return subprocess.Popen(
            [*COMMAND, "nightly", "--config", str(self.config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def wait_for(self, number: int, stage: str) -> None:
        """Until night `number` is in a stage."""
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            nights = read_nights(str(self.work))
            if nights and nights[-1]["number"] == number and any(s["stage"] == stage for s in nights[-1]["stages"]):
                return
            time.sleep(0.02)
        raise AssertionError(f"night {number} never came to {stage}")

    def published(self) -> tuple[str, pd.DataFrame]:
        """(run, scores) that readers see, which must be whole."""
        latest = read_latest(str(self.work / "scores"))
        assert latest is not None
        check_whole(str(self.work / "scores"), latest)
        scores = pa.concat_tables([pq.ParquetFile(path).read() for path in latest.paths("scores")]).to_pandas()
        return latest.run, scores.sort_values(["audience_id", "rank"], ignore_index=True)

    def expect(self, code: int, status: Mapping[str, str | None]) -> dict[str, Any]:
        """Run a night that must end so; where it must fail, readers see what they saw before. Returns its record."""
        before = self.published() if self.night > 1 else None
        nights = len(read_nights(str(self.work)))
        found, record = self.run()
        assert found == code, record["message"]
        assert len(read_nights(str(self.work))) == nights + 1
        assert (record["exit_code"], record["finished_at"] is not None) == (code, True)
        statuses = {stage["stage"]: stage["status"] for stage in record["stages"]}
        assert {stage: statuses.get(stage) for stage in status} == status, record
        now = self.published()
        assert record["published"]["run"] == now[0]
        if code:
            self.faults[record["number"]] = code
            assert before is not None and before[0] == now[0]
            pd.testing.assert_frame_equal(before[1], now[1])
            assert (
                record["message"]
                and record["message"]
                in (Path(self.work) / "nights" / f"{record['number']:08d}" / "log.txt").read_text()
            )
        else:
            assert not record["message"]
        return record

    def check_scores(self) -> None:
        """Compare the published scores with those of a first run.

        That run is over tonight's data, with the same model and nothing from the nights before.
        """
        fresh = self.root / "fresh"
        shutil.rmtree(fresh, ignore_errors=True)
        encoders = [f"--{name}={value}" for name, value in ENCODERS.items()]
        encoders += ["--text_encoder", minilm(), "--image_weights", str(self.root / "weights.safetensors")]
        places = ["--data", str(self.data), "--store", str(fresh / "store")]
        assert run_main(embed_command.main, [*places, *encoders]) == 0
        model = ["--model", str(self.work / "model"), "--out", str(fresh / "scores"), "--top_k", "0"]
        assert run_main(score_command.main, [*places, *model]) == 0
        latest = read_latest(str(fresh / "scores"))
        assert latest is not None
        scores = pa.concat_tables([pq.ParquetFile(path).read() for path in latest.paths("scores")]).to_pandas()
        _, published = self.published()
        pd.testing.assert_frame_equal(
            published, scores.sort_values(["audience_id", "rank"], ignore_index=True), rtol=0, atol=1e-6
        )


@pytest.fixture(scope="module")
def month(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Month]:
    root = tmp_path_factory.mktemp("month")
    whole = root / "whole"
    generate_city(whole, preset_config("tiny", {"days": FIRST_DAYS + NIGHTS, "clicks": 16_000}))
    shutil.copytree(whole, root / "data", ignore=shutil.ignore_patterns("truth"))
    (root / "failures").mkdir()
    config = root / "city.toml"
    notice = (
        "import os, pathlib; "
        "pathlib.Path(os.environ['CAMENN_NOTICES'], "
        "os.environ['CAMENN_RECORD'].split('/')[-2] if os.environ['CAMENN_RECORD'] else 'busy').write_text("
        "os.environ['CAMENN_EXIT_CODE'] + ' ' + os.environ['CAMENN_MESSAGE'])"
    )
    # Random weights that are drawn once, not every night.
    save_file(
        load_inception(
            ImageSpec.resolve("random:0", grid=2, patch_size=75, device="cpu", precision="auto")
        ).state_dict(),
        root / "weights.safetensors",
    )
    encoders = "\n".join(f"{name} = {json.dumps(value)}" for name, value in ENCODERS.items())
    config.write_text(
        f"""
        data = "data"
        work = "work"
        on_failure = {json.dumps([sys.executable, "-c", notice])}
        [retrain]
        every_days = 12
        on_drift = false
        [keep]
        runs = 3
        [embed]
        text_encoder = "{minilm()}"
        image_weights = "{root}/weights.safetensors"
        {encoders}
        [shards]
        attribution_hours = 12
        late_days = 1
        [train]
        batch_size = 128
        [score]
        top_k = 0
        """
    )
    os.environ["CAMENN_NOTICES"] = str(root / "failures")
    (root / "work").mkdir()
    mounted = (
        os.geteuid() == 0
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2g", "none", str(root / "work")], capture_output=True, check=False
        ).returncode
        == 0
    )
    found = Month(root, whole, config)
    try:
        yield found
    finally:
        os.environ.pop("CAMENN_NOTICES")
        if mounted:
            subprocess.run(["umount", "-l", str(root / "work")], check=True)


ALL_DONE = {"embed": DONE, "shards": DONE, "train": NOT_DUE, "score": DONE, "report": DONE, "gc": DONE}


def truncated_photos(month: Month) -> None:
    """Three uploads that broke off: each costs its listing the photo."""
    before = month.published()[0]
    uris = month.read("catalog")["image_uri"].drop_null().unique().to_pylist()[:3]
    for uri in uris:
        path = month.data / uri
        path.write_bytes(path.read_bytes()[:200])
    record = month.expect(0, ALL_DONE)
    defects = next(stage for stage in record["stages"] if stage["stage"] == "embed")["summary"]["defects"]
    listings = [row for row in month.read("catalog")["image_uri"].to_pylist() if row in uris]
    assert defects == len(listings) >= 3
    assert month.published()[0] != before
    for uri in uris:
        shutil.copy(month.whole / uri, month.data / uri)


def truncated_table(month: Month) -> None:
    path = month.data / "catalog.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    record = month.expect(2, {"embed": FAILED, "score": None})
    assert str(path) in record["message"]
    path.write_bytes(whole)
    month.expect(0, ALL_DONE)


def changed_schema(month: Month) -> None:
    clicks = month.read("clicks")
    month.write(
        "clicks",
        clicks.set_column(
            clicks.schema.get_field_index("clicked_at"), "clicked_at", clicks["clicked_at"].cast(pa.string())
        ),
    )
    record = month.expect(2, {"embed": DONE, "shards": FAILED, "train": None})
    assert "clicked_at" in record["message"] and "clicks.parquet" in record["message"]
    month.write("clicks", clicks)
    # The listings' new contents were encoded in the night that failed.
    again = month.expect(0, ALL_DONE)
    assert again["stages"][0]["summary"]["encoded_titles"] == 0


def missing_table(month: Month) -> None:
    orders = month.read("orders")
    (month.data / "orders.parquet").unlink()
    record = month.expect(2, {"shards": FAILED})
    assert "table 'orders' is missing" in record["message"]
    month.write("orders", orders)
    month.expect(0, ALL_DONE)


def full_disk(month: Month) -> None:
    """The disk has room for part of the night."""
    if not os.path.ismount(month.work):
        pytest.fail(
            "a full disk needs a file system of its own, which root alone can mount: "
            "run the tests as root, or leave this one out with -k"
        )
    used = shutil.disk_usage(month.work).used
    resize = ["mount", "-o", f"remount,size={used + 96 * 1024}", str(month.work)]
    subprocess.run(resize, check=True)
    record = month.expect(2, {})
    assert "disk is full" in record["message"]
    subprocess.run(["mount", "-o", "remount,size=2g", str(month.work)], check=True)
    month.expect(0, ALL_DONE)


def killed(month: Month) -> None:
    before = month.published()
    number = read_nights(str(month.work))[-1]["number"] + 1
    process = month.start()
    month.wait_for(number, "score")
    process.kill()
    process.wait()
    record = read_nights(str(month.work))[-1]
    assert (record["number"], record["exit_code"], record["stages"][-1]["stage"]) == (number, None, "score")
    assert month.published()[0] == before[0]
    pd.testing.assert_frame_equal(month.published()[1], before[1])
    record = month.expect(0, ALL_DONE | {"shards": UNCHANGED})
    log = (month.work / "nights" / f"{record['number']:08d}" / "log.txt").read_text()
    assert f"night {number} was cut off in score" in log


def two_at_once(month: Month) -> None:
    number = read_nights(str(month.work))[-1]["number"] + 1
    process = month.start()
    month.wait_for(number, "embed")
    before = month.published()[0]
    assert run_main(nightly_command.main, ["--config", str(month.config)]) == 4
    # The refused one left no record, and did not disturb the other.
    assert read_nights(str(month.work))[-1]["number"] == number
    assert process.wait(timeout=300) == 0
    record = read_nights(str(month.work))[-1]
    assert record["exit_code"] == 0 and month.published()[0] == record["published"]["run"] != before
    assert (month.root / "failures" / "busy").read_text().startswith("4 ")


def clock_set_back(month: Month) -> None:
    real = clock.utc_now
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "utc_now", lambda: real() - 3 * DAY)
        record = month.expect(0, ALL_DONE)
    # A later publication with an earlier time, and readers see it.
    entries = publications(str(month.work / "scores"))
    assert entries[-1]["run"] == record["published"]["run"] and entries[-1]["at"] < entries[-2]["at"]


def nothing_new(month: Month) -> None:
    """Input that stopped arriving: nothing is done again, and after two days the exit code is 5."""
    month.expect(0, ALL_DONE)
    still = ALL_DONE | {"shards": UNCHANGED, "score": UNCHANGED}
    record = month.expect(0, still)
    assert record["stages"][0]["summary"]["encoded_images"] == 0
    real = clock.utc_now
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "utc_now", lambda: real() + 3 * DAY)
        record = month.expect(5, still)
    assert "72 h old" in record["message"]


def lost_listings(month: Month) -> None:
    """Half of the catalog is missing: such scores are gated."""
    catalog = month.read("catalog")
    month.write("catalog", catalog.slice(0, catalog.num_rows // 2))
    record = month.expect(3, {"embed": DONE, "score": GATED, "report": None})
    assert "listings are" in record["message"] and "camenn publish" in record["message"]
    month.write("catalog", catalog)
    month.expect(0, ALL_DONE)


def unmounted_photos(month: Month) -> None:
    """The share with the photos is not there: its directory is, and is empty."""
    aside = (month.data / "images").rename(month.root / "images")
    (month.data / "images").mkdir()
    record = month.expect(3, {"embed": GATED, "shards": None})
    assert "listings that had a photo" in record["message"] and str(month.data) in record["message"]
    (month.data / "images").rmdir()
    aside.rename(month.data / "images")
    month.expect(0, ALL_DONE)


FAULTS: dict[int, Callable[[Month], None]] = {
    3: truncated_photos,
    5: truncated_table,
    7: changed_schema,
    9: missing_table,
    11: full_disk,
    16: killed,
    18: two_at_once,
    20: clock_set_back,
    22: nothing_new,
    24: lost_listings,
    27: unmounted_photos,
}


@pytest.mark.slow
def test_thirty_nights(month: Month, monkeypatch: pytest.MonkeyPatch) -> None:
    # A hundred listings, and models of some steps: scores vary more between nights than in any real
    # city. The gates' own thresholds: test_gates.py.
    monkeypatch.setattr(gates, "MOST_PSI", 1.0)
    monkeypatch.setattr(gates, "MOST_MEAN_CHANGE", 0.5)
    trained = []
    for night in range(1, NIGHTS + 1):
        month.dawn()
        if night in FAULTS:
            FAULTS[night](month)
        else:
            due = night in (1, 13, 25)
            record = month.expect(
                0, {stage: status for stage, status in ALL_DONE.items() if stage != "train" or not due}
            )
            if due:
                # A later model may lose against the previous one, which then stays.
                training = {stage["stage"]: stage["status"] for stage in record["stages"]}["train"]
                assert training == DONE or (night > 1 and training == GATED), record
                trained.append(record["number"])
        if night in (2, 12, 17, 30):
            month.check_scores()
    assert {
        int(path.name): int(path.read_text().split()[0])
        for path in (month.root / "failures").iterdir()
        if path.name != "busy"
    } == month.faults
    # Files are bounded: four outputs keep three runs each, and what is young.
    nights = read_nights(str(month.work))
    assert [record["number"] for record in nights] == list(range(1, len(nights) + 1))
    report = (month.work / "report" / "index.html").read_text()
    assert "data:image/" in report
