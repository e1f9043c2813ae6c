"""A run from its lock to its publication, without any stage's own work."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest

from pipelines.io.files import InUseError
from pipelines.io.tables import FileRecord
from pipelines.runner.exit_codes import GatesFailed
from pipelines.runs.accounting import Count
from pipelines.runs.context import Outcome, Request, RunContext, open_run
from pipelines.runs.gate import Gate
from pipelines.runs.listing import list_runs
from pipelines.runs.manifest import read_latest, read_run
from schemas.errors import InputError


class Steps(beam.PTransform[Any, Any]):
    """Emits given files and counts."""

    def __init__(self, records: list[FileRecord], counts: list[Count]) -> None:
        super().__init__()
        self.records, self.counts = records, counts

    def expand(self, pipeline: beam.Pipeline) -> dict[str, beam.PCollection[Any]]:
        return {
            "files": pipeline | "F" >> beam.Create(self.records),
            "counts": pipeline | "C" >> beam.Create(self.counts),
        }


@contextmanager
def opened(out: Path, rerun: bool = False, **changes: Any) -> Iterator[RunContext]:
    request = Request(
        stage="score",
        out=str(out),
        inputs={"catalog": "c1"},
        fingerprint="f1",
        options={"top_k": 5},
        repeats="scores again",
    )
    with open_run(replace(request, **changes), started=0.0, rerun=rerun) as context:
        yield context


def outcome(context: RunContext, *gates: Gate, **changes: Any) -> Outcome:
    path = Path(context.directory, "scores.parquet")
    path.write_bytes(b"rows")
    made = Outcome(
        records=[FileRecord("scores", str(path), 3, 4)],
        contracts={"scores": "s1"},
        options={"score_date": "2026-01-31"},
        gates=gates,
        summarise=lambda manifest: {"rows_out": manifest.rows("scores"), "run": manifest.run},
    )
    return replace(made, **changes)


def test_a_request_is_done_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "camenn")
    with opened(tmp_path) as context:
        assert not context.unchanged and context.latest is None
        first = context.publish(outcome(context))
    assert first == {"rows_out": 3, "run": context.name}
    latest = read_latest(str(tmp_path))
    assert latest is not None
    assert (latest.run, latest.request, latest.inputs) == (context.name, "f1", {"catalog": "c1"})
    assert latest.options == {"top_k": 5, "score_date": "2026-01-31"} and latest.seconds > 0
    with opened(tmp_path) as again:
        assert again.unchanged
        summary = again.repeat_summary()
    assert summary["unchanged"] and summary["run"] == first["run"] == list_runs(str(tmp_path))["run"]
    assert f"those of run {context.name}: nothing to do (--rerun scores again)" in caplog.text
    # An unchanged run leaves no directory behind.
    assert os.listdir(tmp_path / "runs") == [context.name]


@pytest.mark.parametrize(
    "changes",
    [{"fingerprint": "f2"}, {"fingerprint": ""}, {"rerun": True}, {"reads_published": lambda _: False}],
)
def test_what_changed_is_done_again(tmp_path: Path, changes: dict[str, Any]) -> None:
    with opened(tmp_path) as context:
        context.publish(outcome(context))
    with opened(tmp_path, **changes) as again:
        assert not again.unchanged and again.latest is not None and again.latest.run == context.name
        again.publish(outcome(again, fingerprint="late"))
    latest = read_latest(str(tmp_path))
    assert latest is not None and latest.run == again.name != context.name
    assert latest.request == (changes.get("fingerprint", "f1") or "late")


def test_a_failed_gate_keeps_a_whole_run_from_readers(tmp_path: Path) -> None:
    passed, failed = Gate("psi", True, "fine"), Gate("rows", False, "3 rows, 5 are due")
    with opened(tmp_path) as context, pytest.raises(GatesFailed) as caught:
        context.publish(outcome(context, passed, failed))
    assert str(caught.value) == (
        f"run {context.name} is finished, but 3 rows, 5 are due. Nothing is published yet. "
        f"Look at {context.directory}; "
        f"if it is right: camenn publish {context.directory} --force --reason TEXT"
    )
    assert read_latest(str(tmp_path)) is None
    kept = read_run(str(tmp_path), context.name)
    assert kept.gates == [passed.to_json(), failed.to_json()] and kept.summary["rows_out"] == 3
    with opened(tmp_path) as later:
        later.publish(outcome(later))
    with (
        opened(tmp_path, rerun=True) as third,
        pytest.raises(GatesFailed, match="published before stays. Count again;"),
    ):
        third.publish(outcome(third, failed, advice="Count again"))
    latest = read_latest(str(tmp_path))
    assert latest is not None and latest.run == later.name


def test_a_job_gives_files_and_counts_and_loses_its_scratch(tmp_path: Path) -> None:
    counts = [Count("clicks", "in", 5), Count("clicks", "out", 3), Count("clicks", "duplicates", 1)]
    with opened(tmp_path / "out") as context:
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        record = FileRecord("scores", f"{context.directory}/scores/a.parquet", 2, 10)
        with pytest.raises(RuntimeError, match="table 'clicks': 5 rows came in"):
            context.run_job([], Steps([record], counts), scratch=str(scratch))
        assert not scratch.exists(), "of a job that failed, too"
        context.run_job([], Steps([record, replace(record, rows=4)], [*counts, Count("clicks", "out", 1)]))
    assert context.counts == {"clicks": {"in": 5, "out": 4, "duplicates": 1}}
    assert context.rows("scores") == 6 and context.paths("scores") == [record.path] * 2 and not context.paths("items")


def test_a_job_may_lose_so_many_rows_and_no_more(tmp_path: Path) -> None:
    counts = [Count("catalog", "in", 4), Count("catalog", "out", 3), Count("catalog", "rejected", 1)]
    with opened(tmp_path, max_reject_rate=0.25) as context:
        context.run_job([], Steps([], counts))
    with (
        opened(tmp_path, max_reject_rate=0.2) as context,
        pytest.raises(InputError, match="1 of 4 rows were rejected \\(25.0%\\)"),
    ):
        context.run_job([], Steps([], counts))


def test_an_output_is_held_and_is_no_input(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(InUseError), opened(tmp_path):
        raise AssertionError("two hold it")
    for name in ("tables", "outputs"):
        changes: dict[str, Any] = {name: {"--data": str(tmp_path)}}
        with pytest.raises(InputError, match="is also --data"), opened(tmp_path, **changes):
            raise AssertionError("it reads what it writes")


def test_runs_are_listed_as_they_were_published(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing is published there"):
        list_runs(str(tmp_path))
    names = []
    for number in range(3):
        with opened(tmp_path, fingerprint=f"f{number}") as context:
            context.publish(outcome(context))
            names.append(context.name)
    listed = list_runs(str(tmp_path), last=2)
    assert [entry["run"] for entry in listed["publications"]] == names[1:]
    assert listed["run"] == names[2] and listed["directory"] == str(tmp_path / "runs" / names[2])
    assert listed["tables"] == {"scores": {"rows": 3, "files": [f"{listed['directory']}/scores.parquet"]}}
    assert json.loads(Path(listed["manifest"]).read_text())["run"] == names[2]
