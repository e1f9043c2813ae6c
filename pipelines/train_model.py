"""`camenn train`: a thin main around `camenn_model.train`, which knows nothing of Beam or of publication."""

import argparse
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from camenn_model.config import PROFILES, LossConfig
from camenn_model.encoder_spec import resolve_device_precision
from pipelines import files
from pipelines.console import Bar, closing_table
from pipelines.items import local_only
from pipelines.manifest import Manifest, new_run, publish, read_latest, request_fingerprint, require_latest
from pipelines.options import add_json_flag, run_main

STAGE = "train"


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
                Bar(phase, total, "models" if phase == "alignment models" else "examples")
            )
            self.phase = phase
        self.bar.update(done, note)


def main(argv: list[str] | None = None) -> int:
    """Parse, train, publish, print."""
    arguments = build_parser().parse_args(argv)
    started = time.monotonic()
    out = local_only(arguments.out, "--out")
    shards_root = local_only(arguments.shards, "--shards")
    shards = require_latest(shards_root, "shards", "--shards")
    import torch

    from camenn_model.optimizer import OptimizerConfig
    from camenn_model.train import TrainOptions, train

    torch.set_num_threads(arguments.threads or max(1, (os.cpu_count() or 1) // 2))
    device, _ = resolve_device_precision(arguments.device, "auto")
    options = TrainOptions(
        shards=shards_root,
        out=out,
        profile=arguments.profile,
        attention=arguments.attention,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        optimizer=OptimizerConfig(learning_rate=arguments.learning_rate, ema_decay=0.99),
        loss=LossConfig(weighting=arguments.weighting),
        alignment=not arguments.no_alignment,
        seed=arguments.seed,
        device=device,
        precision=arguments.precision,
    )
    inputs = {"shards": shards.request}
    request = request_fingerprint(inputs, asdict(options))
    with files.single_writer(out):
        latest = read_latest(out)
        if latest is not None and latest.request == request and not arguments.rerun:
            print(
                f"train: shards and flags are those of run {latest.run}: nothing to do (--rerun trains again)",
                file=sys.stderr,
            )
            closing_table(
                STAGE,
                {**latest.summary, "unchanged": True, "seconds": round(time.monotonic() - started, 1)},
                as_json=arguments.json,
            )
            return 0
        run, directory = new_run(out)
        with ExitStack() as stack:
            metrics = train(options, Path(directory), _Bars(stack))
        manifest = Manifest(
            stage=STAGE,
            run=run,
            request=request,
            inputs=inputs,
            options=asdict(options),
            seconds=time.monotonic() - started,
        )
        for name in sorted(os.listdir(directory)):
            path = os.path.join(directory, name)
            manifest.tables[name] = {
                "fingerprint": "",
                "files": [{"path": path, "rows": 0, "bytes": os.path.getsize(path)}],
            }
        manifest.summary = _summary(metrics, shards, manifest, out)
        publish(out, manifest)
    closing_table(STAGE, manifest.summary, as_json=arguments.json)
    return 0


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
        "seconds": round(manifest.seconds, 1),
        "run": manifest.run,
        "out": out,
    }


if __name__ == "__main__":
    sys.exit(run_main(main))
