"""Carry a run from its lock to its publication.

Every stage that publishes does the same twelve steps around its own work. They are here, once:

lock ──► unchanged? ──► new run ──► job ──► row counts, rejects ──► manifest ──► gates ──► publish
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import apache_beam as beam

from pipelines.io import files
from pipelines.io.lease import Writer
from pipelines.io.tables import FileRecord
from pipelines.runner.beam import open_pipeline
from pipelines.runner.exit_codes import GatesFailed
from pipelines.runner.log import stage_logger
from pipelines.runs import readers_path
from pipelines.runs.accounting import FinishRun, check_accounting, check_reject_rate, read_finished, read_rejects
from pipelines.runs.gate import Gate
from pipelines.runs.manifest import Manifest, add_files, new_run, read_latest, write_manifest
from pipelines.runs.outputs import hold_output
from pipelines.runs.publication import Position, publish


@dataclass(frozen=True, kw_only=True)
class Request:
    """The work of a run, known before it begins."""

    stage: str
    out: str
    flag: str = "--out"
    """Names `out` in messages"""
    tables: Mapping[str, str | None] = field(default_factory=dict)
    """Flag -> directory of the user's that is read"""
    outputs: Mapping[str, str | None] = field(default_factory=dict)
    """Flag -> another stage's output that is read: `camenn gc` leaves it alone meanwhile"""
    inputs: dict[str, str]
    """Name -> fingerprint of what is read"""
    fingerprint: str = ""
    """Of inputs and options: a run of the same one is not repeated. Empty = known at the end only"""
    options: dict[str, Any]
    max_reject_rate: float = 1.0
    repeats: str = ""
    """What `--rerun` does, for the message that nothing is to be done"""
    reads_published: Callable[[Manifest], bool] = lambda _: True
    """Whether this version of camenn can use the published run"""


@dataclass(kw_only=True)
class Outcome:
    """The result of a stage's own work, for its manifest.

    `contracts`: table -> fingerprint of its contract. `summarise` returns the closing table.
    """

    records: Sequence[FileRecord]
    contracts: dict[str, str]
    summarise: Callable[[Manifest], dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    """To remember beside the request's"""
    gates: Sequence[Gate] = ()
    advice: str = ""
    """What to look at where a gate failed"""
    fingerprint: str = ""
    """Where the request had none"""


@dataclass(kw_only=True)
class RunContext:
    """One run: what was published before, its directory, its counts.

    `unchanged`: the published run did just this already, and there is nothing to do.
    """

    request: Request
    latest: Manifest | None
    unchanged: bool
    started: float
    position: Position
    """Of the output's publications when the run began"""
    writer: Writer
    """To be checked before anything is removed from the output, or published"""
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Table -> outcome -> rows, as the job counted them"""
    records: list[FileRecord] = field(default_factory=list)
    """Files that the job wrote"""

    @functools.cached_property
    def place(self) -> tuple[str, str]:
        """Make the run's directory when first used.

        Returns (name, directory).
        """
        return new_run(self.request.out)

    @property
    def name(self) -> str:
        """Return the run's name."""
        return self.place[0]

    @property
    def directory(self) -> str:
        """Return the run's directory."""
        return self.place[1]

    @property
    def seconds(self) -> float:
        """Return the seconds since the command began."""
        return time.monotonic() - self.started

    def paths(self, table: str) -> list[str]:
        """Return a table's files, as the job wrote them."""
        return [record.path for record in self.records if record.table == table]

    def rows(self, table: str) -> int:
        """Count the rows of a table that the job wrote."""
        return sum(record.rows for record in self.records if record.table == table)

    def run_job(self, beam_flags: list[str], steps: beam.PTransform[Any, Any], scratch: str | None = None) -> None:
        """Run a Beam job and check its counts.

        Args:
            beam_flags: Beam's own flags.
            steps: what it does. It yields `files` (FileRecord) and `counts` (Count).
            scratch: directory that only the job needs. It is removed after it.

        Raises:
            RuntimeError: rows of a table have no outcome, or more than one.
            InputError: a table lost more rows than `max_reject_rate` allows.
            LostLeaseError: another process took the output over.
        """
        try:
            self.records, self.counts = execute(beam_flags, steps, self.directory)
            # A run that cannot be published does nothing more.
            self.writer.check()
        finally:
            if scratch is not None and files.exists(scratch):
                files.delete_directory(scratch)
        check_reject_rate(self.counts, self.request.max_reject_rate, read_rejects(self.records))

    def repeat_summary(self) -> dict[str, Any]:
        """Return the published run's closing table.

        It is logged that there is nothing to do.
        """
        if self.latest is None:
            raise RuntimeError("nothing is published")
        stage_logger(self.request.stage).info(
            "inputs and flags are those of run %s: nothing to do (--rerun %s)", self.latest.run, self.request.repeats
        )
        return {**self.latest.summary, "unchanged": True, "seconds": round(self.seconds, 1)}

    def publish(self, outcome: Outcome) -> dict[str, Any]:
        """Write the manifest, and let readers see the run.

        Returns the closing table.

        Raises:
            GatesFailed: a gate failed. The run is whole, and what was published before stays.
            AnotherPublishedError: another run was published meanwhile. This one is whole.
            LostLeaseError: another process took the output over.
        """
        manifest = self.describe(outcome)
        failed = [gate.words for gate in outcome.gates if not gate.passed]
        if failed:
            write_manifest(self.request.out, manifest)
            before = "What was published before stays" if self.latest else "Nothing is published yet"
            raise GatesFailed(
                f"run {self.name} is finished, but {'; '.join(failed)}. {before}. "
                f"{outcome.advice or f'Look at {self.directory}'}; if it is right: "
                f"camenn publish {self.directory} --force --reason TEXT"
            )
        publish(self.request.out, manifest, self.position, self.writer)
        return manifest.summary

    def describe(self, outcome: Outcome) -> Manifest:
        """Return the run's manifest."""
        manifest = Manifest(
            stage=self.request.stage,
            run=self.name,
            request=self.request.fingerprint or outcome.fingerprint,
            inputs=self.request.inputs,
            options=self.request.options | outcome.options,
            counts=self.counts,
            gates=[gate.to_json() for gate in outcome.gates],
        )
        add_files(manifest, outcome.contracts, outcome.records)
        manifest.seconds = self.seconds
        manifest.summary = outcome.summarise(manifest)
        return manifest


@contextlib.contextmanager
def open_run(request: Request, *, started: float, rerun: bool = False) -> Iterator[RunContext]:
    """Hold an output for one run of a stage.

    Args:
        request: what is to be done.
        started: of the command, from `time.monotonic`.
        rerun: do it although the published run is of the same request.

    Raises:
        InputError: the directory cannot be the stage's output, see `hold_output`.
        InUseError: another process writes there.
    """
    read = [path for path in request.outputs.values() if path is not None]
    with (
        files.shared_reader(*read),
        hold_output(request.out, request.flag, request.stage, {**request.tables, **request.outputs}) as writer,
    ):
        position = Position.of(request.out)
        latest = read_latest(request.out)
        if latest is not None:
            readers_path.update_or_warn(request.out, latest)
        same = latest is not None and bool(request.fingerprint) and latest.request == request.fingerprint
        unchanged = same and not rerun and latest is not None and request.reads_published(latest)
        yield RunContext(
            request=request, latest=latest, unchanged=unchanged, started=started, position=position, writer=writer
        )


def execute(
    beam_flags: list[str], steps: beam.PTransform[Any, Any], directory: str
) -> tuple[list[FileRecord], dict[str, dict[str, int]]]:
    """Run a Beam job to its end.

    Returns the files and counts that it emitted.

    Raises:
        RuntimeError: rows of a table have no outcome, or more than one.
    """
    with open_pipeline(beam_flags) as pipeline:
        pipeline | steps | "Finish" >> FinishRun(directory)
    records, counts = read_finished(directory)
    check_accounting(counts)
    return records, counts
