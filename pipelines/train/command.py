"""`camenn train`: flags, checks, closing table."""

import argparse
import math
import os
import sys
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from camenn_model.config import PROFILES, LossConfig
from camenn_model.encoders.spec import resolve_device_precision
from camenn_model.integrity import file_sha256
from pipelines.io import files
from pipelines.io.files import local_only
from pipelines.io.tables import FileRecord
from pipelines.runner.console import Bar, closing_table
from pipelines.runner.exit_codes import run_main
from pipelines.runner.flags import add_json_flag
from pipelines.runs.manifest import (
    Manifest,
    add_files,
    new_run,
    read_latest,
    request_fingerprint,
    require_latest,
)
from pipelines.runs.outputs import hold_output
from pipelines.runs.publication import publish
from pipelines.train.stage import STAGE, challenge, is_readable
from schemas.contract import InputError


def build_parser() -> argparse.ArgumentParser:
    """The flags of `camenn train`."""
    parser = argparse.ArgumentParser(
        prog="camenn train",
        description="Train CameNN on a shard set, calibrate it, measure it, and write a model package.",
        allow_abbrev=False,
    )
    parser.add_argument("--shards", required=True, help="shard set that `camenn shards` wrote")
    parser.add_argument("--out", required=True, help="model directory; made if it is not there")
    parser.add_argument(
        "--profile", default="small", choices=sorted(PROFILES), help="size of the model (default %(default)s)"
    )
    parser.add_argument(
        "--attention",
        default="prefix",
        choices=("prefix", "full"),
        help="prefix: item and audience states can be cached (default %(default)s)",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=1,
        help="passes over the training part (default %(default)s: ids overfit after about one)",
    )
    parser.add_argument("--batch_size", type=int, default=128, help="examples a step (default %(default)s)")
    parser.add_argument(
        "--micro_batches",
        type=int,
        default=0,
        help="pieces of a step's batch whose gradients are summed: less memory, and one or more for each process; 0 = one for each process (default %(default)s)",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="processes of this machine that train together, on a GPU each where there are GPUs (default %(default)s)",
    )
    parser.add_argument(
        "--by_store",
        action="store_true",
        help="fill a batch from few stores: it holds fewer distinct listings, and mixes less",
    )
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="largest learning rate (default %(default)s)")
    parser.add_argument(
        "--weighting",
        default="fixed",
        choices=("fixed", "uncertainty"),
        help="how the tasks' losses are weighed (default %(default)s)",
    )
    parser.add_argument("--no_alignment", action="store_true", help="train the CVR task alone")
    parser.add_argument("--seed", type=int, default=0, help="seed of every draw (default %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto (default %(default)s)")
    parser.add_argument(
        "--precision", default="fp32", choices=("fp32", "bf16"), help="of the forward pass (default %(default)s)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        help="threads for computing; 0 = half of the cores, the others gather batches (default %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        help="threads that gather batches; 0 = the cores that do not compute (default %(default)s)",
    )
    parser.add_argument(
        "--challenge",
        action="store_true",
        help="publish the new model only where it predicts the latest closed days as well as the published one (exit code 3 otherwise)",
    )
    parser.add_argument("--rerun", action="store_true", help="train again although neither shards nor flags changed")
    add_json_flag(parser)
    return parser


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


def main(argv: list[str] | None = None) -> int:
    """Parse, train, publish, print; as one of several processes where they were started."""
    arguments = build_parser().parse_args(argv)
    check_flags(arguments)
    if arguments.processes > 1 and "RANK" not in os.environ:
        from pipelines.train.processes import train_in_processes

        train_in_processes(arguments.processes, sys.argv[1:] if argv is None else argv)
        return 0
    started = time.monotonic()
    out = local_only(arguments.out, "--out")
    shards_root = local_only(arguments.shards, "--shards")
    shards = require_latest(shards_root, "shards", "--shards")
    import torch

    from camenn_model.training.corpus import TrainOptions
    from camenn_model.training.distributed import join_processes, processes_here, started_processes
    from camenn_model.training.optimizer import OptimizerConfig
    from camenn_model.training.train import train

    _, count = started_processes()
    cores = max(1, (os.cpu_count() or 1) // processes_here())
    threads = arguments.threads or max(1, cores // 2)
    torch.set_num_threads(threads)
    device, _ = resolve_device_precision(arguments.device, "auto")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(
            f"--device {arguments.device}: this machine has no CUDA device that torch can use. Give --device cpu, or auto."
        )
    options = TrainOptions(
        shards=shards_root,
        out=out,
        profile=arguments.profile,
        attention=arguments.attention,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        micro_batches=arguments.micro_batches or count,
        by_store=arguments.by_store,
        optimizer=OptimizerConfig(learning_rate=arguments.learning_rate, ema_decay=0.99),
        loss=LossConfig(weighting=arguments.weighting),
        alignment=not arguments.no_alignment,
        seed=arguments.seed,
        device=device,
        precision=arguments.precision,
        workers=arguments.workers or max(1, cores - threads),
    )
    inputs = {"shards": shards.request}
    request = request_fingerprint(inputs, options.request())
    with (
        join_processes(device) as processes,
        files.shared_reader(shards_root),
        hold_output(out, "--out", STAGE, {"--shards": shards_root}) if processes.first else nullcontext(),
    ):
        latest = read_latest(out)
        unchanged = (
            latest is not None
            and latest.request == request
            and not arguments.rerun
            and is_readable(Path(out) / "runs" / latest.run)
        )
        # The first process decides: the others may see what it publishes.
        if processes.sums([float(unchanged and processes.first)])[0]:
            if latest is not None and processes.first:
                _tell_unchanged(latest, time.monotonic() - started, arguments.json)
            return 0
        if not processes.first:
            train(options, Path(out), _nothing, processes)
            return 0
        run, directory = new_run(out)
        with ExitStack() as stack:
            metrics = train(options, Path(directory), _Bars(stack), processes)
        manifest = Manifest(
            stage=STAGE,
            run=run,
            request=request,
            inputs=inputs,
            options=options.request(),
            seconds=time.monotonic() - started,
        )
        names = [name for name in sorted(os.listdir(directory)) if not name.startswith(".")]
        paths = {name: os.path.join(directory, name) for name in names}
        records = [
            FileRecord(name, path, 0, os.path.getsize(path), sha256=file_sha256(path)) for name, path in paths.items()
        ]
        add_files(manifest, dict.fromkeys(names, ""), records)
        manifest.summary = _summary(metrics, shards, manifest, out)
        if arguments.challenge and latest is not None:
            challenge(manifest, latest.run, out, shards_root)
        publish(out, manifest)
    closing_table(STAGE, manifest.summary, as_json=arguments.json)
    return 0


def check_flags(arguments: argparse.Namespace) -> None:
    """Raises InputError, naming the flag, for a number that makes no sense."""
    for name, least in (
        ("epochs", 1),
        ("batch_size", 2),
        ("processes", 1),
        ("micro_batches", 0),
        ("threads", 0),
        ("workers", 0),
    ):
        if getattr(arguments, name) < least:
            raise InputError(f"--{name} {getattr(arguments, name)}: must be at least {least}.")
    if not arguments.learning_rate > 0 or math.isinf(arguments.learning_rate):
        raise InputError(f"--learning_rate {arguments.learning_rate}: must be a number above 0, such as 0.001.")
    if arguments.micro_batches > arguments.batch_size:
        raise InputError(
            f"--micro_batches {arguments.micro_batches}: a batch of {arguments.batch_size} examples cannot be cut into so many. Give fewer, or a larger --batch_size."
        )


def _nothing(*_: object) -> None:
    """Progress of the processes that tell nothing."""


def _tell_unchanged(latest: Manifest, seconds: float, as_json: bool) -> None:
    print(
        f"train: shards and flags are those of run {latest.run}: nothing to do (--rerun trains again)", file=sys.stderr
    )
    closing_table(STAGE, {**latest.summary, "unchanged": True, "seconds": round(seconds, 1)}, as_json=as_json)


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


if __name__ == "__main__":
    sys.exit(run_main(main))
