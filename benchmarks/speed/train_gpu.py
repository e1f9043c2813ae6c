"""The load that `camenn train` puts on one GPU.

    python -m benchmarks.speed.train_gpu --shards WORK/shards

For each profile, precision and size of a step it measures, after some steps to warm up:

    loader_busy: examples/s with the loader over those on batches that lie on the device
    share_of_products: operations/s of the former over those of large bf16 matrix products
    utilisation: share of the time in which a kernel ran, while the loader feeds

Where there is no CUDA device, it reports so and measures nothing. Without --shards the benchmarks'
own city is simulated, with stub embeddings of real sizes.
"""

import argparse
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.train import add_shards_flags, prepare
from benchmarks.support.command import names_of, progress_log, work_directory
from benchmarks.support.gpu import matrix_ceiling, watch_utilisation
from benchmarks.support.train_steps import endless
from camenn_model.config import PROFILES
from camenn_model.training.corpus import TrainOptions, open_corpus
from camenn_model.training.trainer import Share, Trainer

log = progress_log("train_gpu")

PRECISIONS = ("fp32", "bf16")
SIZES = ("1024", "4096", "16384")
WARM_STEPS = 8


def synchronize(trainer: Trainer) -> None:
    """Wait for the device."""
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()


def pace(trainer: Trainer, shares: Iterable[Share]) -> float:
    """Return the examples a second of some steps."""
    synchronize(trainer)
    examples, started = 0, time.monotonic()
    for share in shares:
        trainer.step(share)
        examples += share.examples
    synchronize(trainer)
    return examples / (time.monotonic() - started)


def on_device(trainer: Trainer, share: Share) -> Share:
    """Return a share whose batches lie on the device."""
    pieces = [
        replace(
            piece,
            batch=piece.batch.to(trainer.device),
            alignment=piece.alignment.to(trainer.device) if piece.alignment is not None else None,
        )
        for piece in share.pieces
    ]
    return replace(share, pieces=pieces)


def measure(options: TrainOptions, steps: int) -> dict[str, Any]:
    """Measure one profile, precision and size of a step."""
    trainer = Trainer(open_corpus(options), options, lambda *_: None)
    stream = endless(trainer)
    kept = [on_device(trainer, share) for share in itertools.islice(stream, WARM_STEPS)]
    pace(trainer, kept)
    with FlopCounterMode(display=False) as counter:
        pace(trainer, kept)
    operations = counter.get_total_flops() / sum(share.examples for share in kept)
    bare = pace(trainer, itertools.islice(itertools.cycle(kept), steps))
    samples: list[float] = []
    with watch_utilisation(samples):
        fed = pace(trainer, itertools.islice(stream, steps))
    return {
        "loader_busy": round(fed / bare, 4),
        "examples_per_second": round(fed),
        "bare_examples_per_second": round(bare),
        "megaflops": round(operations / 1e6, 2),
        "operations_per_second": fed * operations,
        "utilisation": round(statistics.mean(samples) / 100, 3) if samples else None,
    }


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.train_gpu", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    add_shards_flags(parser)
    profiles = tuple(sorted(PROFILES, reverse=True))
    parser.add_argument("--profiles", type=names_of(profiles), default=list(profiles), help="(default: all)")
    parser.add_argument("--precisions", type=names_of(PRECISIONS), default=list(PRECISIONS), help="(default: both)")
    parser.add_argument("--sizes", type=names_of(SIZES), default=list(SIZES), help="examples of a step (default: all)")
    parser.add_argument("--steps", type=int, default=64, help="steps of each measurement (default %(default)s)")
    parser.add_argument("--workers", type=int, default=8, help="as for camenn train (default %(default)s)")
    parser.add_argument("--work", type=Path, help="directory kept for the next time (default: a temporary one)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure, and print one JSON line."""
    arguments = build_parser().parse_args(argv)
    if not torch.cuda.is_available():
        print("train_gpu: no CUDA device here: nothing was measured. Run it on a machine with one.", file=sys.stderr)
        print(json.dumps({"device": None, "platform": platform.platform()}), flush=True)
        return 0
    ceiling = matrix_ceiling()
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "matrix_tflops": round(ceiling / 1e12, 1)}
    with work_directory(arguments.work, "train-gpu") as work:
        shards = arguments.shards or prepare(work, arguments.items, arguments.clicks)
        for profile, precision, size in itertools.product(arguments.profiles, arguments.precisions, arguments.sizes):
            options = TrainOptions(
                shards=shards,
                out=str(work / "model"),
                profile=profile,
                precision=precision,
                batch_size=int(size),
                device="cuda",
                workers=arguments.workers,
            )
            result = measure(options, arguments.steps)
            result["share_of_products"] = round(result.pop("operations_per_second") / ceiling, 4)
            found[f"{profile}.{precision}.{size}"] = result
            log(f"{profile}, {precision}, steps of {size}: {result}")
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
