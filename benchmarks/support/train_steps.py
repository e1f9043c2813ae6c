"""Training of any checkout, in a process.

    python benchmarks/support/train_steps.py JOB

JOB is a JSON job. The tree on PYTHONPATH is measured, so nothing else of the benchmarks is imported
here. The last line of stdout is the result. Seconds are CPU seconds of all threads and wall
seconds.
"""

import importlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

WARM_STEPS = 3
PROFILED_STEPS = 4
PRODUCT = 1_024
"""Rows and columns of the matrices by which the machine's own pace is measured"""
PRODUCTS = 24


def part(*names: str) -> Any:
    """Import the first module that the measured tree has.

    It is looked for in the working directory: an installed tree would answer for another's modules.
    """
    return importlib.import_module(next(name for name in names if Path(f"{name.replace('.', '/')}.py").exists()))


@contextmanager
def measured(found: dict[str, Any], examples: int = 0) -> Iterator[None]:
    """Write the seconds of a block to `found`."""
    cpu, wall = time.process_time(), time.monotonic()
    yield
    found["cpu"], found["wall"] = time.process_time() - cpu, time.monotonic() - wall
    if examples:
        found["examples"] = examples


def endless(trainer: Any) -> Iterator[Any]:
    """Yield shares of pass after pass."""
    while True:
        # A stream goes on where the trainer's pass is.
        trainer.state.batch = 0
        yield from trainer.stream()


def product_rate(dtype: torch.dtype) -> float:
    """Measure the operations a second of large products."""
    left, right = (torch.rand(PRODUCT, PRODUCT).to(dtype) for _ in range(2))
    left @ right
    started = time.process_time()
    for _ in range(PRODUCTS):
        left @ right
    return PRODUCTS * 2 * PRODUCT**3 / (time.process_time() - started)


def run_steps(job: dict[str, Any], out: str) -> dict[str, Any]:
    """Measure training steps with their loader.

    The operations of one example come with them.
    """
    corpora, trainers = (
        part("camenn_model.training.corpus", "camenn_model.corpus"),
        part("camenn_model.training.trainer", "camenn_model.train"),
    )
    given = {"batch_size": job["batch_size"]} if job.get("batch_size") else {}
    options = corpora.TrainOptions(shards=job["shards"], out=out, profile=job["profile"], **given)
    corpus = corpora.open_corpus(options)
    trainer = trainers.Trainer(corpus, options, lambda *_: None)
    stream = endless(trainer)
    for share in itertools.islice(stream, WARM_STEPS):
        trainer.step(share)
    found: dict[str, Any] = {"batch_size": getattr(trainer, "batch_size", options.batch_size)}
    examples = 0
    with measured(found):
        for share in stream:
            trainer.step(share)
            examples += share.examples
            if examples >= job["examples"]:
                break
    found["examples"] = examples
    # Not every step includes alignment.
    shares = list(itertools.islice(stream, PROFILED_STEPS))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True) as profile:
        for share in shares:
            trainer.step(share)
    operations = sum(event.flops for event in profile.key_averages())
    found["operations"] = operations / sum(share.examples for share in shares)
    found["products"] = {name: product_rate(getattr(torch, name)) for name in ("float32", "bfloat16")}
    return found


def run_whole(job: dict[str, Any], out: str) -> dict[str, Any]:
    """Measure the whole of a training."""
    corpora = part("camenn_model.training.corpus", "camenn_model.corpus")
    training = part("camenn_model.training.train", "camenn_model.train")
    options = corpora.TrainOptions(shards=job["shards"], out=out, profile=job["profile"])
    found: dict[str, Any] = {}
    phases: dict[str, float] = {}
    latest, since = "open", time.process_time()

    def progress(phase: str, *_: object) -> None:
        nonlocal latest, since
        if phase != latest:
            now = time.process_time()
            phases[latest] = phases.get(latest, 0.0) + now - since
            latest, since = phase, now

    with measured(found):
        metrics = training.train(options, Path(out), progress)
    progress("")
    return found | {"phases": phases, "auc": metrics["test"]["auc"], "log_loss": metrics["test"]["log_loss"]}


WAYS = {"steps": run_steps, "whole": run_whole}


def main() -> None:
    """Run the job of the first argument."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as out:
        print(json.dumps(WAYS[job["way"]](job, out)), flush=True)


if __name__ == "__main__":
    main()
