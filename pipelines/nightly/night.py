"""Run one night unattended: `camenn nightly`.

It runs embed, shards, train where it is due, score and report, from one config file.

Each stage skips what did not change and goes on where a killed run ended, so a night that failed is
simply run again. Exit codes:

* 0 all is well
* 1 something unforeseen
* 2 something to fix (input, config, a full disk)
* 3 a gate kept tonight's embeddings or scores from readers
* 4 another night is running
* 5 the published scores are older than they may be

After each of them readers see tonight's scores whole, or those of before.
"""

import contextlib
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from pipelines.io import clock, files
from pipelines.io.errors import input_error_behind
from pipelines.nightly.config import NightlyConfig, describe
from pipelines.nightly.retraining import decide
from pipelines.runner.console import closing_table
from pipelines.runner.exit_codes import ExitCode, GatesFailed
from pipelines.runner.log import stage_logger
from pipelines.runs.garbage import collect
from pipelines.runs.manifest import read_latest
from pipelines.runs.night_record import DONE, FAILED, GATED, NOT_DUE, UNCHANGED, Night, StageRecord, new_night
from pipelines.runs.publication import publications
from pipelines.stages import OUTPUT_FOLDERS, STAGES

FAILURE_COMMAND_S = 300.0


def stage_command(config: NightlyConfig, stage: str) -> list[str]:
    """Return the flags that a stage gets tonight."""
    store, shards, model, scores = (config.output(name) for name in OUTPUT_FOLDERS.values())
    own = {
        "embed": ["--data", config.data, "--store", store],
        "shards": ["--data", config.data, "--store", store, "--out", shards],
        "train": ["--shards", shards, "--out", model, *(["--challenge"] if config.retrain.challenge else [])],
        "score": ["--data", config.data, "--store", store, "--model", model, "--out", scores, "--shards", shards],
        "report": ["--run", config.work],
    }[stage]
    beam = list(config.beam) if STAGES[stage].on_beam else []
    return [*own, *config.stage_flags(stage), *beam]


def summarise(stage: str, summary: dict[str, Any]) -> str:
    """Summarize what a stage changed and what it left out.

    The summary is one sentence.
    """
    s = summary
    if stage == "embed":
        return (
            f"{s['encoded_images']:,} photos and {s['encoded_titles']:,} titles encoded, "
            f"{s['images_in_store']:,} and {s['titles_in_store']:,} in the store; "
            f"{s['rows_out']:,} listings, {s['rejected']:,} rejected, {s['defects']:,} without a usable photo"
        )
    if stage == "shards":
        return (
            f"{s.get('log_rows_read', 0):,} rows of the logs read, "
            f"{s.get('log_rows_kept', 0):,} known already; {s['examples_built']:,} examples "
            f"of {s['days_built']:,} days built, {s['days_kept']:,} final days left as they "
            "are; "
            f"{s.get('clicks_open_window', 0):,} clicks left out until their window is over, "
            f"{s['rejected']:,} rows rejected"
        )
    if stage == "train":
        comparison = s.get("challenge")
        took_over = (
            f"; log loss {comparison['challenger_log_loss']:.4f} against {comparison['champion_log_loss']:.4f} of "
            "the model before"
            if comparison
            else ""
        )
        return f"{s['steps']:,} steps, AUC {s['test_auc']:.4f} on unseen clicks{took_over}"
    return (
        f"{s['pairs']:,} pairs as of {s['score_date']}, {s['rows_out']:,} rows published, mean "
        f"CVR {s['mean_cvr']:.4f}, {s['flagged_mismatch']:,} listings flagged as mismatched"
    )


class _Nightly:
    """One night that has the lock."""

    def __init__(self, config: NightlyConfig, night: Night) -> None:
        self.config, self.night = config, night
        self.code = 0

    def stage(self, stage: str, work: Callable[[StageRecord], None]) -> bool:
        """Run one stage and record how it went.

        Returns whether it succeeded.
        """
        record = StageRecord(stage)
        self.night.stages.append(record)
        self.night.write()
        self.night.log(f"{stage}: begins")
        began = time.monotonic()
        try:
            work(record)
        except GatesFailed as held:
            record.status, record.words = GATED, str(held)
            if stage != "train":
                # A challenger that lost is a result, not a failure.
                self.fail(ExitCode.GATED, stage, record.words)
        except Exception as error:
            user_error = input_error_behind(error, self.config.words)
            record.status = FAILED
            record.words = str(user_error) if user_error else f"{type(error).__name__}: {error}"
            if user_error is None:
                self.night.log(f"{stage}: {traceback.format_exc()}")
            self.fail(ExitCode.INPUT_ERROR if user_error else ExitCode.UNEXPECTED_ERROR, stage, record.words)
        except SystemExit as refused:
            # argparse exits so on wrong flags, and has printed which.
            record.status, record.words = (
                FAILED,
                f"camenn {stage} refused its flags, see above (exit code {refused.code})",
            )
            self.fail(ExitCode.INPUT_ERROR, stage, record.words)
        record.seconds = round(time.monotonic() - began, 1)
        self.night.log(f"{stage}: {record.status}, {record.seconds} s: {record.words}")
        self.night.write()
        return record.status in (DONE, UNCHANGED, NOT_DUE)

    def fail(self, code: int, stage: str, words: str) -> None:
        """Record the first failure."""
        if not self.code:
            self.code, self.night.message = code, f"{stage}: {words}"

    def run_stage(self, record: StageRecord) -> None:
        """Call a stage's command.

        The run that it published goes into the record.
        """
        stage = record.stage
        root = self.config.output(OUTPUT_FOLDERS[stage]) if stage in OUTPUT_FOLDERS else None
        before = read_latest(root) if root else None
        code = int(STAGES[stage].module().main(stage_command(self.config, stage)))
        if code:
            raise RuntimeError(f"camenn {stage} ended with exit code {code}")
        after = read_latest(root) if root else None
        if after is None:
            record.status, record.words = DONE, files.join(self.config.work, "report", "index.html")
            return
        record.run, record.summary = after.run, after.summary
        same = before is not None and before.run == after.run
        record.status = UNCHANGED if same else DONE
        record.words = f"nothing changed since run {after.run}" if same else summarise(stage, after.summary)

    def train(self, record: StageRecord) -> None:
        """Train where it is due."""
        decision = decide(self.config)
        if not decision.due:
            record.status, record.words = NOT_DUE, decision.words
            return
        self.night.log(f"train: due: {decision.words}")
        self.run_stage(record)
        record.words = f"due: {decision.words}; {record.words}"

    def tidy(self, record: StageRecord) -> None:
        """Remove what no kept run refers to."""
        keep = self.config.keep
        if not keep.runs:
            record.status, record.words = NOT_DUE, "[keep] runs = 0"
            return
        found = [
            collect(self.config.output(name), keep.runs, keep.retention_days or None, dry_run=False)
            for name in OUTPUT_FOLDERS.values()
            if read_latest(self.config.output(name)) is not None
        ]
        removed, megabytes = sum(part["files_removed"] for part in found), sum(part["megabytes"] for part in found)
        record.status, record.words = DONE, f"{removed:,} files removed, {megabytes:,.1f} MB"

    def run(self) -> None:
        """Run the stages in order.

        A failed training leaves the previous model, and the night goes on with it.
        """
        for stage in ("embed", "shards"):
            if not self.stage(stage, self.run_stage):
                return
        if not self.stage("train", self.train) and read_latest(self.config.output("model")) is None:
            return
        if self.stage("score", self.run_stage):
            self.stage("report", self.run_stage)
            self.stage("gc", self.tidy)

    def finish(self) -> int:
        """Write the record and return the exit code.

        Before that it reads which scores are published now.
        """
        night = self.night
        night.published = published_scores(self.config)
        if night.published is not None:
            hours = night.published["hours"]
            if hours > self.config.keep.stale_hours and not self.code:
                self.code = ExitCode.STALE
                night.message = (
                    f"the published scores are {hours:.0f} h old, more than "
                    f"{self.config.keep.stale_hours:g}: nothing new came in. "
                    "See whether catalog and logs still arrive."
                )
        night.exit_code, night.finished_at = self.code, clock.utc_stamp()
        night.finish()
        seen = f"readers see run {night.published['run']}" if night.published else "nothing is published yet"
        night.log(f"ends with exit code {self.code}; {seen}" + (f"; {night.message}" if night.message else ""))
        return self.code


def published_scores(config: NightlyConfig) -> dict[str, Any] | None:
    """Describe the scores that readers see.

    They are run, when they were published, and hours since (0 where the clock was set back).
    """
    root = config.output("scores")
    latest = read_latest(root)
    if latest is None:
        return None
    # Scores of an earlier camenn have no record of their publication.
    at = next((entry["at"] for entry in reversed(publications(root)) if entry["run"] == latest.run), latest.created_at)
    hours = (clock.utc_now() - datetime.fromisoformat(at)).total_seconds() / 3_600
    return {"run": latest.run, "at": at, "hours": round(max(0.0, hours), 2)}


def call_on_failure(config: NightlyConfig, code: int, message: str, record: str, log: Callable[[str], None]) -> None:
    """Run the config's `on_failure` command.

    Its outcome does not change the night's own exit code.
    """
    if not config.on_failure or not code:
        return
    variables = {"CAMENN_EXIT_CODE": str(code), "CAMENN_MESSAGE": message, "CAMENN_RECORD": record}
    try:
        ended = subprocess.run(config.on_failure, env=os.environ | variables, timeout=FAILURE_COMMAND_S, check=False)
        log(f"on_failure: {' '.join(config.on_failure)} ended with exit code {ended.returncode}")
    except (OSError, subprocess.TimeoutExpired) as error:
        log(f"on_failure: {' '.join(config.on_failure)} failed: {error}")


class Terminated(BaseException):
    """A request to end the process (SIGTERM).

    A service manager sends it, for example. The night's record is written, and `on_failure` is
    called.
    """


@contextlib.contextmanager
def sigterm_handler() -> Iterator[None]:
    """Install a SIGTERM handler that raises `Terminated`.

    Without it SIGTERM would end this process at once. Forked children keep the default.
    """
    own = os.getpid()

    def end(number: int, _: object) -> None:
        if os.getpid() != own:
            os._exit(128 + number)
        raise Terminated(signal.Signals(number).name)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_night(config: NightlyConfig, as_json: bool) -> int:
    """Run one night, from the lock to the exit code."""
    started = time.monotonic()
    try:
        with sigterm_handler(), files.single_writer(config.work):
            night, before = new_night(config.work, dict(describe(config)))
            night.log(f"night {night.number} begins; config {config.path}")
            if before is not None and before["exit_code"] is None:
                where = before["stages"][-1]["stage"] if before["stages"] else "its beginning"
                night.log(f"night {before['number']} was cut off in {where}; what it had committed is used")
            work = _Nightly(config, night)
            try:
                work.run()
            except BaseException as ended:
                work.fail(ExitCode.UNEXPECTED_ERROR, "nightly", f"ended by {type(ended).__name__}")
                call_on_failure(config, work.finish(), night.message, night.path, night.log)
                raise
            code = work.finish()
    except files.InUseError as busy:
        stage_logger("nightly").error("%s", busy)
        call_on_failure(config, ExitCode.BUSY, str(busy), "", stage_logger("nightly").error)
        return ExitCode.BUSY
    call_on_failure(config, code, night.message, night.path, night.log)
    closing_table("nightly", _summary(night, time.monotonic() - started), as_json=as_json)
    return code


def _summary(night: Night, seconds: float) -> dict[str, Any]:
    """Build the closing table.

    It has the row counts and figures of the stages that ran.
    """
    found = {record.stage: record.summary for record in night.stages}
    rows = {name: found.get("score", {}).get(name, 0) for name in ("rows_in", "rows_out", "rejected")}
    encoded = {name: found.get("embed", {}).get(name, 0) for name in ("encoded_images", "encoded_titles")}
    if any(record.stage == "embed" and record.status != DONE for record in night.stages):
        encoded = dict.fromkeys(encoded, 0)
    return {
        **rows,
        **encoded,
        "score_date": found.get("score", {}).get("score_date"),
        "night": night.number,
        "exit_code": night.exit_code,
        "message": night.message or None,
        "stages": {record.stage: record.status for record in night.stages},
        "stage_seconds": {record.stage: record.seconds for record in night.stages},
        "published": night.published["run"] if night.published else None,
        "record": night.path,
        "seconds": round(seconds, 1),
        "out": night.config["work"],
    }
