"""The scaling benchmark end to end on a very small city: it measures, and the compared outputs are equal."""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.speed import scaling
from benchmarks.support import stage_process
from benchmarks.support.processes import run_watched
from benchmarks.support.stub_encoders import stub_embeddings


def run_here(command: list[str], *, standing: bool, timeout: float) -> tuple[str, dict[str, float] | None]:
    """In the place of `run_watched`: nine processes would spend a minute on their imports."""
    assert command[1:3] == ["-m", "benchmarks.support.stage_process"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert stage_process.main(command[3:]) == 0
    return out.getvalue(), {"submitter": 100.0}


def test_scaling_measures_all_stages_on_fnapi(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "run_watched", run_here)
    small = ["--items", "300", "--clicks", "3000", "--repeats", "1", "--parallelism", "1", "--work", str(tmp_path)]
    assert scaling.main(small) == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 1, "one JSON line, nothing else, on stdout"
    found: dict[str, Any] = json.loads(printed.out)
    assert found["shards_beam_overhead"] == found["beam_overhead"]["shards"]
    assert set(found["seconds"]) == {"embed", "shards", "score"}
    for stage, seconds in found["seconds"].items():
        assert set(seconds) == {"plain", "fnapi-1"} and min(seconds.values()) > 0
        assert found["peak_rss_mb"][stage]["fnapi-1"] == {"submitter": 100.0}
    assert found["rows_out"]["embed"]["image_embeddings"] == found["city"]["items"] == 300
    assert found["rows_out"]["shards"]["examples"] > 0
    # Every store at six hours of the day, and its best hundred listings.
    assert found["rows_out"]["score"]["scores"] == found["pairs"] == 6 * 300
    assert "stub_encoders" in found


def test_scaling_leaves_flink_out_where_none_answers(caplog: pytest.LogCaptureFixture) -> None:
    variants = scaling.list_variants(["fnapi", "flink"], [1, 2], ["--flink_master=localhost:9"])
    assert [variant.name for variant in variants] == ["plain", "fnapi-1", "fnapi-2"]
    assert "flink is left out" in caplog.text


def test_summarise_compares_medians() -> None:
    def runs(*seconds: float) -> scaling.Runs:
        return scaling.Runs(
            seconds=list(seconds), cpu_seconds=list(seconds), peaks=[None], result={"rows": {}, "pairs": None}
        )

    found = {"shards": {"plain": runs(10, 30, 8), "fnapi-1": runs(12, 11, 50), "fnapi-2": runs(6)}}
    summary = scaling.summarise(found)
    assert summary["shards_beam_overhead"] == summary["beam_overhead_cpu"]["shards"] == pytest.approx(0.2)
    assert summary["speedup_2_workers"] == {"fnapi": {"shards": 2.0}}
    assert summary["peak_rss_mb"]["shards"]["plain"] is None


def test_stub_embeddings_are_the_keys_own_and_do_not_compress() -> None:
    keys = [f"{number:032x}" for number in range(2**64, 2**64 + 50)]
    whole, one = stub_embeddings(keys, (3, 5)), stub_embeddings(keys[7:8], (3, 5))
    assert whole.dtype == np.float16 and whole.shape == (50, 3, 5)
    assert (whole[7] == one[0]).all()
    assert len(np.unique(whole.reshape(50, -1), axis=0)) == 50
    assert np.isfinite(whole).all() and np.abs(whole).max() <= 1


def test_run_watched_names_the_child_and_tells_why_it_failed() -> None:
    out, peaks = run_watched(
        [sys.executable, "-c", "import time; x = bytearray(64 << 20); time.sleep(0.5); print('done')"],
        standing=False,
        timeout=60,
    )
    assert out == "done\n"
    assert peaks is None or (list(peaks) == ["submitter"] and 64 < peaks["submitter"] < 200)
    with pytest.raises(RuntimeError, match="no such luck"):
        run_watched([sys.executable, "-c", "raise SystemExit('no such luck')"], standing=False, timeout=60)
