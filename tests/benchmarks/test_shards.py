"""The benchmark of `camenn shards` against an expert's Polars.

The examples are bitwise equal to those of Polars, and the benchmark's figures are present.
"""

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from benchmarks.peers import polars_shards
from benchmarks.speed import shards
from benchmarks.support import city, stage_process
from pipelines.features.as_of import PRIOR_CLICKS


def run_here(command: list[str], *, standing: bool, timeout: float) -> tuple[str, dict[str, float] | None]:
    """In the place of `run_watched`: processes would spend their time on imports."""
    module = {"benchmarks.support.stage_process": stage_process, "benchmarks.peers.polars_shards": polars_shards}[
        command[2]
    ]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert module.main(command[3:]) == 0
    return out.getvalue(), {"submitter": 100.0}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    work = tmp_path_factory.mktemp("shards")
    return ["--items", "300", "--clicks", "4000", "--copies", "2", "--repeats", "1", "--work", str(work)]


def test_shards_equal_those_of_polars(
    small: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "run_watched", run_here)
    monkeypatch.setattr(polars_shards, "SESSIONS_AT_ONCE", 100)
    # Rows that differ are an error.
    assert shards.main(small) == 0
    printed = capsys.readouterr()
    found: dict[str, Any] = json.loads(printed.out.splitlines()[-1])
    assert found["rows"]["examples"] > 1_000
    assert math.isfinite(found["vs_polars"]) and found["vs_polars"] > 0
    assert 1.0 <= found["bytes_ratio"] < 1.15
    assert found["rss_bytes_per_click"] == 0, "memory stands still in this test"
    assert found["skew"]["rss_ratio"] == 1 and found["skew"]["seconds_ratio"] > 0


def test_the_skewed_log_is_skewed(tmp_path: Path) -> None:
    rows = city.make_city(tmp_path / "even", 100, 4_000, 1)
    assert city.skew_city(tmp_path / "even", tmp_path / "skew") == rows
    clicks = pq.read_table(tmp_path / "skew" / "clicks")
    assert clicks.num_rows == rows["clicks"]
    for column, share in (("item_id", city.SKEW_ITEM), ("user_id", city.SKEW_USER)):
        most = pc.max(pc.value_counts(clicks[column]).field("counts")).as_py()
        assert most / rows["clicks"] == pytest.approx(share, abs=0.03)
    even = pq.read_table(tmp_path / "even" / "clicks")
    assert pc.max(pc.value_counts(even["item_id"]).field("counts")).as_py() < 0.2 * rows["clicks"], "not its source"


def test_rows_that_differ_are_an_error(small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "run_watched", run_here)
    monkeypatch.setattr(polars_shards, "PRIOR_CLICKS", PRIOR_CLICKS + 1)
    with pytest.raises(RuntimeError, match="the rows differ"):
        shards.main(small)
