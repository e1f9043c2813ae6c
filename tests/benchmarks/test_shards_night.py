"""A small city's second night reads the new day alone, and gives the rows of one build."""

import json
from pathlib import Path

import pytest

from benchmarks.speed import shards, shards_night
from tests.benchmarks.test_shards import run_here


def test_a_second_night_reads_the_new_day(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "run_watched", run_here)
    flags = ["--items", "300", "--clicks", "6000", "--copies", "2", "--days", "12", "--repeats", "2", "--check"]
    assert shards_night.main([*flags, "--work", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["checked"] and found["ratio"] > 0
    assert found["days"] == {"kept": 8, "built": 4}, "the attribution window and two late days"
    whole = found["rows"]["clicks"] + found["rows"]["orders"]
    assert found["log_rows"]["read"] + found["log_rows"]["kept"] == whole
    assert 0 < found["log_rows"]["read"] < whole / 6
