"""Stage `train`: a thin run around `camenn_model.training`.

That knows nothing of Beam or of publication.
"""

import os
import sys
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from camenn_model.config import LossConfig
from camenn_model.encoders.machine import resolve_device_precision
from camenn_model.integrity import file_sha256
from pipelines.io import files
from pipelines.io.files import local_only
from pipelines.io.tables import FileRecord
from pipelines.runner.console import Bar
from pipelines.runner.exit_codes import HeldBack
from pipelines.runs.gate import Gate
from pipelines.runs.manifest import (
    Manifest,
    add_files,
    new_run,
    read_latest,
    request_fingerprint,
    require_latest,
    write_manifest,
)
from pipelines.runs.outputs import hold_output
from pipelines.runs.publication import publish
from pipelines.train.options import STAGE, TrainFlags
from schemas.errors import InputError


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
                    {"align": "steps", "counts": "passes", "wide": "penalties"}.get(phase, "examples"),
                )
            )
            self.phase = phase
        self.bar.update(done, note)


def run(options: TrainFlags) -> dict[str, Any] | None:
    """Train, calibrate, measure and publish.

    Returns the summary, or None in all processes of a training but the first.

    Raises:
        InputError: the shard set or a flag cannot be used.
        HeldBack: the challenge is lost.
    """
    started = time.monotonic()
    out = local_only(options.out, "--out")
    shards_root = local_only(options.shards, "--shards")
    shards = require_latest(shards_root, "shards", "--shards")
    import torch

    from camenn_model.training.corpus import TrainOptions
    from camenn_model.training.distributed import join_processes, processes_here, started_processes
    from camenn_model.training.optimizer import OptimizerConfig
    from camenn_model.training.train import train

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
    training = TrainOptions(
        shards=shards_root,
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
    inputs = {"shards": shards.request}
    request = request_fingerprint(inputs, training.request())
    with (
        join_processes(device) as processes,
        files.shared_reader(shards_root),
        hold_output(out, "--out", STAGE, {"--shards": shards_root}) if processes.first else nullcontext(),
    ):
        latest = read_latest(out)
        unchanged = (
            latest is not None
            and latest.request == request
            and not options.rerun
            and is_readable(Path(out) / "runs" / latest.run)
        )
        # The first process decides: the others may see what it publishes.
        if processes.sums([float(unchanged and processes.first)])[0]:
            return _unchanged(latest, time.monotonic() - started) if latest is not None and processes.first else None
        if not processes.first:
            train(training, Path(out), _nothing, processes)
            return None
        run, directory = new_run(out)
        with ExitStack() as stack:
            metrics = train(training, Path(directory), _Bars(stack), processes)
        manifest = Manifest(
            stage=STAGE,
            run=run,
            request=request,
            inputs=inputs,
            options=training.request(),
            seconds=time.monotonic() - started,
        )
        names = [name for name in sorted(os.listdir(directory)) if not name.startswith(".")]
        paths = {name: os.path.join(directory, name) for name in names}
        records = [
            FileRecord(name, path, 0, os.path.getsize(path), sha256=file_sha256(path)) for name, path in paths.items()
        ]
        add_files(manifest, dict.fromkeys(names, ""), records)
        manifest.summary = _summary(metrics, shards, manifest, out)
        if options.challenge and latest is not None:
            challenge(manifest, latest.run, out, shards_root)
        publish(out, manifest)
    return manifest.summary


def is_readable(package: Path) -> bool:
    """Tell whether this version of camenn reads a package."""
    from camenn_model.package import read_package

    try:
        read_package(package)
    except InputError:
        return False
    return True


def challenge(manifest: Manifest, champion: str, out: str, shards_root: str) -> None:
    """Compare the new model with the published one.

    How it did against the published run `champion` on the latest closed days is entered into the
    manifest.

    Raises:
        HeldBack: it is worse. Its package and its manifest are kept.
    """
    from camenn_model.data.shard_set import ShardSet
    from camenn_model.evaluation.challenge import hold_duel
    from camenn_model.package import read_package

    runs = Path(out) / "runs"
    try:
        old = read_package(runs / champion)
    except InputError as error:
        print(f"train: the published model cannot be compared, and the new one takes over: {error}", file=sys.stderr)
        return
    duel = hold_duel(old, read_package(runs / manifest.run), ShardSet(shards_root))
    if duel is None:
        print(
            "train: the published model cannot be compared (other encoders, or no closed day "
            "in the test part): the new one takes over",
            file=sys.stderr,
        )
        return
    gate = Gate("challenge", duel.passed, duel.words())
    manifest.gates, manifest.summary["challenge"] = [gate.to_json()], duel.to_json()
    if not duel.passed:
        write_manifest(out, manifest)
        directory = files.join(out, "runs", manifest.run)
        raise HeldBack(
            f"{duel.words()}. The published model stays. If the new one is to be had all the "
            f"same: camenn publish {directory} --force --reason TEXT"
        )


def _nothing(*_: object) -> None:
    """Ignore the progress of processes that tell nothing."""


def _unchanged(latest: Manifest, seconds: float) -> dict[str, Any]:
    print(
        f"train: shards and flags are those of run {latest.run}: nothing to do (--rerun trains again)", file=sys.stderr
    )
    return {**latest.summary, "unchanged": True, "seconds": round(seconds, 1)}


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
