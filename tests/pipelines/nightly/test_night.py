"""A night's stages succeed, fail, or are gated.

The stages are fakes here, and real in test_nights.py.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.nightly import command as nightly_command
from pipelines.nightly import night
from pipelines.nightly.retraining import Decision
from pipelines.runner.exit_codes import GatesFailed, run_main
from pipelines.runs.manifest import Manifest
from pipelines.runs.night_record import DONE, FAILED, GATED, NOT_DUE, StageRecord, read_nights
from pipelines.runs.publication import publish
from pipelines.stages import OUTPUT_FOLDERS
from schemas.errors import InputError

Outcomes = dict[str, BaseException]


class Stages:
    """Fakes of the stages' commands: each ends as configured, and publishes where it succeeds."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.outcomes, self.called, self.due = root, {}, [], True
        self.config = root / "city.toml"
        reported = (
            "import os, pathlib, json; "
            "pathlib.Path('told.json').write_text(json.dumps("
            "{name: os.environ['CAMENN_' + name] for name in ('EXIT_CODE', 'MESSAGE', 'RECORD')}))"
        )
        on_failure = json.dumps([sys.executable, "-c", f"import os; os.chdir({str(root)!r}); {reported}"])
        self.config.write_text(f'data = "data"\nwork = "work"\non_failure = {on_failure}\n')
        monkeypatch.setattr(night._Nightly, "run_stage", self.run_stage)
        monkeypatch.setattr(night._Nightly, "tidy", lambda night, record: setattr(record, "status", DONE))
        monkeypatch.setattr(night, "decide", lambda config: Decision(self.due, "so it is"))

    outcomes: Outcomes
    called: list[str]

    def run_stage(self, record: StageRecord) -> None:
        self.called.append(record.stage)
        if record.stage in self.outcomes:
            raise self.outcomes[record.stage]
        record.status = DONE
        if record.stage in OUTPUT_FOLDERS:
            out = self.root / "work" / OUTPUT_FOLDERS[record.stage]
            record.run = f"r{len(self.called)}"
            publish(str(out), Manifest(stage=record.stage, run=record.run))

    def night(self, **outcomes: BaseException) -> tuple[int, dict[str, Any]]:
        """(exit code, record) of a night whose stages end so."""
        self.outcomes, self.called = outcomes, []
        code = run_main(nightly_command.main, ["--config", str(self.config)])
        return code, read_nights(str(self.root / "work"))[-1]

    def reported(self) -> dict[str, str]:
        found: dict[str, str] = json.loads((self.root / "told.json").read_text())
        return found


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stages:
    return Stages(tmp_path, monkeypatch)


def status(record: dict[str, Any]) -> dict[str, str]:
    return {stage["stage"]: stage["status"] for stage in record["stages"]}


def test_a_good_night(stages: Stages) -> None:
    code, record = stages.night()
    assert (code, record["exit_code"], record["message"]) == (0, 0, "")
    assert status(record) == dict.fromkeys(("embed", "shards", "train", "score", "report", "gc"), DONE)
    assert record["published"]["run"] == "r4" and record["published"]["hours"] == 0
    assert not (stages.root / "told.json").exists()
    stages.due = False
    assert status(stages.night()[1])["train"] == NOT_DUE and stages.called == ["embed", "shards", "score", "report"]


@pytest.mark.parametrize(
    ("stage", "error", "code", "after"),
    [
        ("embed", InputError("catalog is missing"), 2, {"embed": FAILED}),
        ("shards", RuntimeError("a bug"), 1, {"embed": DONE, "shards": FAILED}),
        ("shards", OSError(28, "No space left on device"), 2, {"embed": DONE, "shards": FAILED}),
        ("embed", SystemExit(2), 2, {"embed": FAILED}),
        ("embed", GatesFailed("photos are gone"), 3, {"embed": GATED}),
        ("score", GatesFailed("listings are few"), 3, {"embed": DONE, "shards": DONE, "train": DONE, "score": GATED}),
        ("score", InputError("no pair"), 2, {"embed": DONE, "shards": DONE, "train": DONE, "score": FAILED}),
    ],
)
def test_a_stage_that_fails_ends_the_night(
    stages: Stages, stage: str, error: BaseException, code: int, after: dict[str, str]
) -> None:
    stages.night()
    found, record = stages.night(**{stage: error})
    assert found == record["exit_code"] == code
    assert status(record) == after
    assert record["published"]["run"] == "r4"
    assert record["message"].startswith(f"{stage}: ")
    assert stages.reported() == {
        "EXIT_CODE": str(code),
        "MESSAGE": record["message"],
        "RECORD": str(stages.root / "work" / "nights" / "00000002" / "record.json"),
    }
    log = (stages.root / "work" / "nights" / "00000002" / "log.txt").read_text()
    assert record["message"] in log
    # A bug is reported with its traceback, an error that the user can fix is not.
    assert ("Traceback" in log) is (code == 1)


def test_a_training_that_fails_leaves_the_model_of_before(stages: Stages) -> None:
    code, record = stages.night(train=RuntimeError("not finite"))
    # There is none yet: nothing can be scored.
    assert code == 1 and status(record) == {"embed": DONE, "shards": DONE, "train": FAILED}
    stages.night()
    code, record = stages.night(train=RuntimeError("not finite"))
    assert code == 1 and record["message"] == "train: RuntimeError: not finite"
    assert status(record) == dict.fromkeys(("embed", "shards", "score", "report", "gc"), DONE) | {"train": FAILED}
    assert record["published"]["run"] == "r4"


def test_a_challenger_that_lost_is_no_failure(stages: Stages) -> None:
    stages.night()
    code, record = stages.night(train=GatesFailed("the new model is worse"))
    assert code == 0 and status(record)["train"] == GATED and status(record)["score"] == DONE
    assert "the new model is worse" in next(s["words"] for s in record["stages"] if s["stage"] == "train")


def test_a_night_that_is_ended_by_hand_says_so(stages: Stages) -> None:
    with pytest.raises(KeyboardInterrupt):
        stages.night(shards=KeyboardInterrupt())
    record = read_nights(str(stages.root / "work"))[-1]
    assert (record["exit_code"], record["message"]) == (1, "nightly: ended by KeyboardInterrupt")
    # The lock is free again.
    assert stages.night()[0] == 0


def test_a_night_that_is_terminated_says_so_and_calls_the_command(
    stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM, as from a service manager or a machine that shuts down."""
    before = signal.getsignal(signal.SIGTERM)

    def terminate(night: Any, record: StageRecord) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(night._Nightly, "run_stage", terminate)
    with pytest.raises(night.Terminated):
        nightly_command.main(["--config", str(stages.config)])
    record = read_nights(str(stages.root / "work"))[-1]
    assert record["exit_code"] == 1 and record["finished_at"] and "Terminated" in record["message"]
    assert stages.reported()["EXIT_CODE"] == "1" and "Terminated" in stages.reported()["MESSAGE"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_command_for_failures_that_fails_changes_nothing(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    stages.config.write_text('data = "data"\nwork = "work"\non_failure = ["/no/such/command"]\n')
    assert stages.night(embed=InputError("no catalog"))[0] == 2
    assert "on_failure: /no/such/command failed" in capsys.readouterr().err


def test_flags_that_beam_does_not_know_are_something_to_mend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "city.toml"
    config.write_text('data = "data"\nwork = "work"\nbeam = ["--rnuner=FlinkRunner"]\n')
    assert run_main(nightly_command.main, ["--config", str(config)]) == 2
    assert "did you mean --runner?" in capsys.readouterr().err
    record = read_nights(str(tmp_path / "work"))[-1]
    assert record["exit_code"] == 2 and "refused its flags" in record["message"]
