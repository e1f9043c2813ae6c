"""Stage `train`: a thin run around `camenn_model.training`.

That knows nothing of Beam or of publication.
"""

import hashlib
import os
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camenn_model.config import LossConfig
from camenn_model.encoders.machine import resolve_device_precision
from camenn_model.integrity import DamagedError
from pipelines.io import files
from pipelines.io.files import output_place
from pipelines.runner.console import Bar
from pipelines.runner.exit_codes import GatesFailed
from pipelines.runner.log import stage_logger
from pipelines.runs.context import Outcome, Request, RunContext, open_run
from pipelines.runs.copies import open_shards, package_directory
from pipelines.runs.gate import Gate
from pipelines.runs.manifest import Manifest, request_fingerprint, require_latest
from pipelines.train.options import STAGE, TrainFlags
from schemas.errors import InputError
from schemas.manifest import RUNS

if TYPE_CHECKING:
    from camenn_model.data.shard_set import ShardSet
    from camenn_model.evaluation.challenge import ModelComparison
    from camenn_model.training.corpus import TrainOptions
    from camenn_model.training.distributed import Processes

_LOG = stage_logger(STAGE)


class _Bars:
    """One bar after another, as phases follow each other."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        self.phase = ""
        self.bar: Bar | None = None

    def __call__(self, phase: str, done: int, total: int, note: str) -> None:
        if phase != self.phase or self.bar is None:
            self.stack.close()
            self.bar = self.stack.enter_context(
                Bar(
                    phase,
                    total,
                    {"align": "steps", "counts": "epochs", "wide": "penalties"}.get(phase, "examples"),
                )
            )
            self.phase = phase
        self.bar.update(done, note)


def run(options: TrainFlags) -> dict[str, Any] | None:
    """Train, calibrate, measure and publish.

    Returns the summary, or None in all processes of a training but the first.

    Raises:
        InputError: the shard set or a flag cannot be used.
        GatesFailed: the published model predicts the latest closed days better.
    """
    started = time.monotonic()
    out, shards_root = output_place(options.out, "--out"), output_place(options.shards, "--shards")
    shards = require_latest(shards_root, "shards", "--shards")

    from camenn_model.training.distributed import join_processes
    from camenn_model.training.train import train
    from pipelines.train.workplace import checkpoints_of, clear_workplace, workplace

    training = resolve_training(options, out, shards_root)
    inputs = {"shards": shards.request}
    request = Request(
        stage=STAGE,
        out=out,
        outputs={"--shards": shards_root},
        inputs=inputs,
        fingerprint=request_fingerprint(inputs, training.request()),
        options=training.request(),
        repeats="trains again",
        reads_published=lambda latest: is_readable(files.join(out, RUNS, latest.run)),
    )
    with (
        join_processes(training.device) as processes,
        # The others hold no output: the first one publishes for all.
        open_run(request, started=started, rerun=options.rerun) if processes.first else nullcontext() as context,
    ):
        # The first process decides: the others may see what it publishes.
        unchanged = processes.sums([float(context is not None and context.unchanged)])[0]
        if unchanged:
            return None if context is None else context.repeat_summary()
        check_same_shards(processes, shards.run)
        shard_set = open_shards(shards_root, shards.run)
        checkpoints = checkpoints_of(out, None if context is None else context.writer)
        if context is None:
            train(training, workplace(out), _nothing, processes, shards=shard_set, checkpoints=checkpoints)
            return None
        warn_of_missing_contents(shard_set)
        clear_workplace(out)
        package = workplace(out) / RUNS / context.name
        package.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            metrics = train(training, package, _Bars(stack), processes, shards=shard_set, checkpoints=checkpoints)
        comparison = compare_with_published(context, package, shard_set) if options.challenge else None
        try:
            summary = context.publish(describe_model(context, package, metrics, shards, comparison))
        except GatesFailed:
            checkpoints.discard()
            raise
        checkpoints.discard()
        return summary


def check_same_shards(processes: "Processes", run: str) -> None:
    """Check that all processes train on one shard run.

    Raises:
        InputError: another one was published while they started.
    """
    number = float(int(hashlib.sha256(run.encode()).hexdigest()[:8], 16))
    if processes.sums([number])[0] != number * processes.count:
        raise InputError("--shards: another run was published while the training's processes started. Run again.")


def warn_of_missing_contents(shards: "ShardSet") -> None:
    """Warn where no listing has a photo, or a title."""
    for kind, contents in (("photo", shards.images), ("title", shards.titles)):
        if not len(contents):
            _LOG.warning(
                "no listing has a %s that could be encoded: orders are learned without them, nothing is aligned, and "
                "no mismatch is known. See the store's `defects`.",
                kind,
            )


def resolve_training(options: TrainFlags, out: str, shards: str) -> "TrainOptions":
    """Resolve device, threads and micro-batches on this machine.

    Raises:
        InputError: there is no such device.
    """
    import torch

    from camenn_model.training.corpus import TrainOptions
    from camenn_model.training.distributed import processes_here, started_processes
    from camenn_model.training.optimizer import OptimizerConfig

    _, count = started_processes()
    cores = max(1, (os.cpu_count() or 1) // processes_here())
    threads = options.threads or max(1, cores // 2)
    torch.set_num_threads(threads)
    device, _ = resolve_device_precision(options.device, "auto")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(
            f"--device {options.device}: this machine has no CUDA device that torch can use. "
            "Give --device cpu, or auto."
        )
    return TrainOptions(
        shards=shards,
        out=out,
        profile=options.profile,
        attention=options.attention,
        epochs=options.epochs,
        batch_size=options.batch_size,
        micro_batches=options.micro_batches or count,
        by_store=options.by_store,
        optimizer=OptimizerConfig(learning_rate=options.learning_rate, ema_decay=0.99),
        loss=LossConfig(weighting=options.weighting),
        alignment=not options.no_alignment,
        seed=options.seed,
        device=device,
        precision=options.precision,
        workers=options.workers or max(1, cores - threads),
    )


def describe_model(
    context: RunContext,
    package: Path,
    metrics: dict[str, Any],
    shards: Manifest,
    comparison: "ModelComparison | None",
) -> Outcome:
    """Describe the package for its manifest.

    On an object store it is uploaded.
    """
    from pipelines.train.workplace import upload_package

    names = [name for name in sorted(os.listdir(package)) if not name.startswith(".")]
    records = upload_package(package, context.request.out, context.directory, names)

    def summarise(manifest: Manifest) -> dict[str, Any]:
        summary = _summary(metrics, shards, manifest, context.request.out)
        return summary if comparison is None else summary | {"challenge": comparison.to_json()}

    return Outcome(
        records=records,
        contracts=dict.fromkeys(names, ""),
        gates=[] if comparison is None else [Gate("challenge", comparison.passed, comparison.words())],
        summarise=summarise,
    )


def is_readable(directory: str) -> bool:
    """Return whether this version of camenn reads a package."""
    from camenn_model.package import read_package

    try:
        package = package_directory(directory)
    except DamagedError:
        return False
    # A store that does not answer, or a full disk, says nothing of the package.
    try:
        read_package(package)
    except InputError:
        return False
    return True


def compare_with_published(context: RunContext, package: Path, shards: "ShardSet") -> "ModelComparison | None":
    """Compare a new package with the published model.

    The latest closed days are predicted. None means that they cannot be compared, or that nothing
    is published.
    """
    if context.latest is None:
        return None
    from camenn_model.evaluation.challenge import compare_with_champion
    from camenn_model.package import read_package

    try:
        directory = package_directory(files.join(context.request.out, RUNS, context.latest.run))
    except DamagedError as error:
        _LOG.warning("the published model cannot be compared, and the new one takes over: %s", error)
        return None
    # Only what it is tells that it cannot be compared: not a store that does not answer, or a full disk.
    try:
        champion = read_package(directory)
    except InputError as error:
        _LOG.warning("the published model cannot be compared, and the new one takes over: %s", error)
        return None
    comparison = compare_with_champion(champion, read_package(package), shards)
    if comparison is None:
        _LOG.warning(
            "the published model cannot be compared (other encoders, or no closed day "
            "in the test part): the new one takes over"
        )
    return comparison


def _nothing(*_: object) -> None:
    """Ignore the progress of processes that print nothing."""


def _summary(metrics: dict[str, Any], shards: Manifest, manifest: Manifest, out: str) -> dict[str, Any]:
    test, popularity = metrics["test"], metrics["baselines"]["popularity"]
    representation = metrics["representation"] or {}
    return {
        "rows_in": shards.rows("examples"),
        "rows_out": shards.rows("examples"),
        "rejected": 0,
        "encoded_images": 0,
        "encoded_titles": 0,
        "examples_per_second": metrics["train"]["examples_per_second"],
        "steps": metrics["train"]["steps"],
        "best_step": metrics["train"]["best_step"],
        "test_auc": test["auc"],
        "test_gauc": test["gauc"],
        "test_log_loss": test["log_loss"],
        "test_ne": test["ne"],
        "test_pcoc": test["pcoc"],
        "popularity_auc": popularity["auc"],
        "mismatch_auc": representation.get("mismatch_auc"),
        "shards_as_of": shards.summary["as_of"],
        "seconds": round(manifest.seconds, 1),
        "run": manifest.run,
        "out": out,
    }
