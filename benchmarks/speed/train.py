"""The cost of training, part by part.

It is measured against an earlier tree, and so are loader, deduplication, attention and mixing.

    python -m benchmarks.speed.train --before f7f002f
    python -m benchmarks.speed.train --shards WORK/shards --parts mixing

`against` measures this tree and a revision of it, in a git worktree, each with its own defaults, on
the same shards. Every measurement is a process of one thread, in turns, and seconds are CPU
seconds of all of its threads:

    fast.vs_before, small.vs_before, base.vs_before: examples/s of steps with their loader, over the
        revision's. Where it has no `fast`, its `small` is measured.
    small.share_of_products: operations/s of these steps (matrix products alone) over those of
        large float32 products. `small.operations` is a share of the revision's operations.
    whole.vs_before: CPU seconds of the revision's whole training over this tree's.
    vs_mmoe, vs_lightgbm: examples/s of `small` over those of deepctr-torch's MMoE (one epoch, its
        defaults) and of LightGBM (a whole fit with early stop). `fast.vs_mmoe` and so on likewise.

The revision cannot read what a newer `camenn shards` publishes, so it makes the shards.

The loader is measured against the same model fed from memory. Further ratios are of encoding each
listing once, of `prefix` against `full` attention, and of mixing.

`speed` is measured for each profile, all ways alternately within one process, with medians of their
ratios:

    loader_busy: examples/s of training (loader, steps, log)
        over the same steps on batches that lie in memory.
    vs_bare: the same over forward, backward and optimiser alone
        on those batches: no loader, no log.
    dedup_speedup: a step that encodes each listing and session of the batch once,
        over one that encodes them for every example.
    prefix_speedup: a step with `prefix` attention over one with `full` attention.
    loader_alone: examples/s that the loader gives where nothing is computed,
        over those of training.

`mixing` gives distinct listings and sessions of a batch where sessions are mixed freely and where a
batch draws from few stores, and what that costs in AUC.

Without --shards the benchmarks' own city is simulated, with stub embeddings of real sizes. Their
values carry no information, so AUC comes from the other features. The last line of stdout is one
JSON object.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.speed.against import run_in
from benchmarks.speed.against import run_stage as run_in_tree
from benchmarks.support.city import make_city
from benchmarks.support.command import machine, names_of, progress_log, work_directory
from benchmarks.support.stage_process import Job, run_stage
from benchmarks.support.train_steps import endless
from camenn_model.batch import Batch
from camenn_model.config import DEFAULT_PROFILE, PROFILES
from camenn_model.data.batching import collate, list_units, stream_batches
from camenn_model.data.examples import Rows
from camenn_model.data.item_table import ItemTable
from camenn_model.evaluation import metrics
from camenn_model.evaluation.predictions import predict
from camenn_model.training.corpus import Corpus, TrainOptions, open_corpus
from camenn_model.training.trainer import MicroBatch, Share, Trainer
from pipelines.runs.manifest import read_latest

log = progress_log("train")

PARTS = ("against", "speed", "mixing")
HERE = Path(__file__).resolve().parents[2]
IMAGE_SHAPE, TEXT_SHAPE = (16, 1536), (32, 384)


def prepare(work: Path, items: int, clicks: int) -> str:
    """Make a shard set of the benchmarks' own city.

    An existing one is reused.
    """
    make_city(work / "data", items, clicks, 1)
    for stage, name in (("embed", "store"), ("shards", "shards")):
        if read_latest(str(work / name)) is None:
            log(f"{stage} of {items:,} listings and {clicks:,} clicks")
            run_stage(
                Job(
                    stage=stage,
                    work=str(work),
                    out=str(work / name),
                    beam_flags=("--direct_num_workers=1",),
                    image_shape=IMAGE_SHAPE,
                    text_shape=TEXT_SHAPE,
                )
            )
    return str(work / "shards")


def prepare_shards(work: Path, arguments: argparse.Namespace) -> str:
    """Make the benchmarks' own shard set.

    The revision makes it where one is measured.
    """
    if "against" not in arguments.parts:
        return prepare(work, arguments.items, arguments.clicks)
    before = _worktree(arguments.before, work / "before")
    make_city(work / "data", arguments.items, arguments.clicks, 1)
    for stage, name in (("embed", "store"), ("shards", "shards")):
        if not (work / name / "latest.json").exists():
            run_in_tree(before, work, stage, name)
    return str(work / "shards")


def repeat_sides(rows: Rows, table: ItemTable) -> Batch:
    """Return the same examples without deduplication.

    Each has a listing and an audience row of its own, as a loader without deduplication gives them.
    """
    once = collate(rows, table)
    every = torch.arange(len(rows))
    session = once.pairs.audience
    audience = replace(once.audience, **{name: value[session] for name, value in vars(once.audience).items()})
    return replace(
        once,
        items=table.batch(rows.item),
        audience=audience,
        pairs=replace(once.pairs, item=every, audience=every),
    )


def step_bare(trainer: Trainer, piece: MicroBatch) -> None:
    """Run forward, backward and optimiser.

    It is the least work of a step, without loader and log.
    """
    trainer.model.train()
    trainer.optimizer.zero_grad(set_to_none=True)
    losses, _ = trainer.objective(piece.batch, piece.alignment)
    losses.total.backward()
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.options.optimizer.clip)
    trainer.optimizer.step()
    trainer.ema.update(trainer.model)


def seconds_of(work: Callable[[], None]) -> float:
    """Measure the wall seconds of some work."""
    started = time.monotonic()
    work()
    return time.monotonic() - started


def measure_profile(corpus: Corpus, options: TrainOptions, steps: int, repeats: int) -> dict[str, Any]:
    """Measure the ratios of one profile."""

    def nothing(*_: object) -> None:
        pass

    trainer = Trainer(corpus, options, nothing)
    full_options = replace(options, attention="full")
    full_corpus = replace(corpus, config=replace(corpus.config, attention="full"))
    full = Trainer(full_corpus, full_options, nothing)
    stream: Iterator[Share] = endless(trainer)
    kept = list(itertools.islice(stream, steps))
    doubled = [
        Share(share.examples, [replace(piece, batch=repeat_sides(piece.rows, corpus.table)) for piece in share.pieces])
        for share in kept
    ]
    examples = sum(share.examples for share in kept)

    def train_on(shares: list[Share], with_model: Trainer) -> None:
        for share in shares:
            with_model.step(share)

    def from_loader() -> float:
        # Batches that the loader prepared while other ways were measured do not count.
        for share in itertools.islice(stream, 2 * options.workers + 2):
            trainer.step(share)
        chosen = 0
        started = time.monotonic()
        for share in itertools.islice(stream, steps):
            trainer.step(share)
            chosen += share.examples
        return (time.monotonic() - started) / chosen

    def run_bare() -> None:
        for share in kept:
            for piece in share.pieces:
                step_bare(trainer, piece)

    ways: dict[str, Callable[[], float]] = {
        "loader": from_loader,
        "memory": lambda: seconds_of(lambda: train_on(kept, trainer)) / examples,
        "bare": lambda: seconds_of(run_bare) / examples,
        "repeated": lambda: seconds_of(lambda: train_on(doubled, trainer)) / examples,
        "full": lambda: seconds_of(lambda: train_on(kept, full)) / examples,
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for warm in (True, *[False] * repeats):
        for name, way in ways.items():
            taken = way()
            if not warm:
                found[name].append(taken)
        if not warm:
            log(", ".join(f"{name} {1 / values[-1]:,.0f}/s" for name, values in found.items()))

    def ratio(above: str, below: str) -> float:
        return round(statistics.median(a / b for a, b in zip(found[above], found[below], strict=True)), 3)

    drained = 0
    started = time.monotonic()
    for share in itertools.islice(trainer.stream(), max(1, 100_000 // trainer.batch_size)):
        drained += share.examples
    loader_pace = drained / (time.monotonic() - started)
    return {
        "loader_busy": ratio("memory", "loader"),
        "vs_bare": ratio("bare", "loader"),
        "dedup_speedup": ratio("repeated", "memory"),
        "prefix_speedup": ratio("full", "memory"),
        "loader_alone": round(loader_pace * statistics.median(found["loader"]), 1),
        "examples_per_second": {name: round(1 / statistics.median(values), 1) for name, values in found.items()},
        "batch_size": trainer.batch_size,
    }


def _worktree(revision: str, place: Path) -> Path:
    """Check out a revision into `place`, unless it is there."""
    if not (place / "setup.py").exists():
        subprocess.run(["git", "worktree", "add", "--detach", str(place), revision], cwd=HERE, check=True)
    return place


def _in_tree(tree: Path, script: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Run a script on a tree.

    It is a process of one thread. Returns its result.
    """
    return run_in(tree, str(script), json.dumps(job), OMP_NUM_THREADS="1")


def _job(tree: Path, way: str, shards: str, profile: str, **more: Any) -> dict[str, Any]:
    """Describe a job on a tree, with a profile that it has."""
    has_fast = (tree / "camenn_model" / "model" / "target_attention.py").exists()
    return {"way": way, "shards": shards, "profile": profile if has_fast or profile != "fast" else "small", **more}


def _rate(found: dict[str, Any]) -> float:
    return float(found["examples"] / found["cpu"])


def measure_against(shards: str, out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure this tree against a revision and peers."""
    before = _worktree(arguments.before, out.parent / "before")
    trees = {"before": before, "now": HERE}
    steps = HERE / "benchmarks" / "support" / "train_steps.py"
    found: dict[str, Any] = {"before": arguments.before}
    rates: dict[str, list[float]] = {}
    for profile in arguments.profiles:
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
        examples = arguments.examples if profile != "base" else max(1, arguments.examples // 16)
        for turn in range(arguments.turns):
            for name in list(trees)[:: 1 if turn % 2 == 0 else -1]:
                job = _job(trees[name], "steps", shards, profile, examples=examples)
                turns[name].append(_in_tree(trees[name], steps, job))
            log(f"{profile}: " + ", ".join(f"{name} {_rate(each[-1]):,.0f}/s" for name, each in turns.items()))
        rates[profile] = [_rate(each) for each in turns["now"]]
        shares = [each["operations"] * _rate(each) / each["products"]["float32"] for each in turns["now"]]
        ratios = [_rate(now) / _rate(old) for old, now in zip(*turns.values(), strict=True)]
        walls = [
            now["examples"] / now["wall"] / (old["examples"] / old["wall"])
            for old, now in zip(*turns.values(), strict=True)
        ]
        operations = [each[0]["operations"] for each in turns.values()]
        found[profile] = {
            "vs_before": round(statistics.median(ratios), 3),
            "vs_before_wall": round(statistics.median(walls), 3),
            "share_of_products": round(statistics.median(shares), 3),
            "operations": round(operations[1] / operations[0], 3),
            "megaflops": [round(each / 1e6, 1) for each in operations],
            "examples_per_cpu_second": round(statistics.median(rates[profile])),
        }
    jobs = {name: _job(tree, "whole", shards, DEFAULT_PROFILE) for name, tree in trees.items()}
    whole = {name: _in_tree(tree, steps, jobs[name]) for name, tree in trees.items()} if arguments.whole else {}
    if whole:
        found["whole"] = {
            "vs_before": round(whole["before"]["cpu"] / whole["now"]["cpu"], 3),
            **{name: {key: each[key] for key in ("cpu", "wall", "phases", "auc")} for name, each in whole.items()},
        }
    found["peers"] = _in_tree(HERE, HERE / "benchmarks" / "support" / "peer_rates.py", {"shards": shards})
    for profile, of_turns in rates.items():
        own = {f"vs_{name}": round(statistics.median(of_turns) / rate, 3) for name, rate in found["peers"].items()}
        found[profile] |= own
        if profile == "small":
            found |= own
    return found


def measure_speed(shards: str, out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the ratios of each profile."""
    found = {}
    for profile in arguments.profiles:
        options = TrainOptions(
            shards=shards, out=str(out), profile=profile, batch_size=arguments.batch_size, workers=arguments.workers
        )
        log(f"profile {profile}")
        found[profile] = measure_profile(open_corpus(options), options, arguments.steps, arguments.repeats)
    return {"speed": found}


def measure_mixing(shards: str, out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure both ways of filling a batch.

    These are distinct listings and sessions a batch, and AUC of trained models.
    """
    found: dict[str, Any] = {}
    aucs: dict[bool, list[float]] = {False: [], True: []}
    for seed in range(arguments.seeds):
        for by_store, values in aucs.items():
            options = TrainOptions(
                shards=shards,
                out=str(out / f"{seed}-{by_store}"),
                batch_size=arguments.batch_size,
                workers=arguments.workers,
                by_store=by_store,
                seed=seed,
            )
            Path(options.out).mkdir(parents=True, exist_ok=True)
            corpus = open_corpus(options)
            trainer = Trainer(corpus, options, lambda *_: None)
            trainer.run()
            test = predict(trainer.model, corpus.reader, corpus.table, corpus.blocks("test"))
            values.append(metrics.auc(test.labels, test.logits))
            log(f"seed {seed}, by_store {by_store}: AUC {values[-1]:.4f}, {trainer.state.examples:,} examples")
    for by_store, values in aucs.items():
        units = list_units(corpus.files("train"))
        batches = stream_batches(
            corpus.reader, units, arguments.batch_size, np.random.default_rng(0), by_store=by_store
        )
        sizes = [
            (len(rows), len(np.unique(rows.item)), len(np.unique(rows.session)))
            for rows in itertools.islice(batches, 200)
        ]
        rows, items, sessions = (sum(column) for column in zip(*sizes, strict=True))
        found["by_store" if by_store else "mixed"] = {
            "test_auc": [round(value, 4) for value in values],
            "examples_per_listing": round(rows / items, 3),
            "examples_per_session": round(rows / sessions, 3),
        }
    difference = [few - free for few, free in zip(aucs[True], aucs[False], strict=True)]
    return {"mixing": found | {"auc_cost": round(-statistics.mean(difference), 5)}}


MEASURES = {"against": measure_against, "speed": measure_speed, "mixing": measure_mixing}


def add_shards_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the shard set, or of the city that one is made of."""
    parser.add_argument("--shards", help="shard set that `camenn shards` wrote (default: one is made)")
    parser.add_argument("--items", type=int, default=20_000, help="listings of the city (default %(default)s)")
    parser.add_argument("--clicks", type=int, default=300_000, help="clicks of the city (default %(default)s)")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.train", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    add_shards_flags(parser)
    parser.add_argument(
        "--parts", type=names_of(PARTS), default=["against"], help=f"of {','.join(PARTS)} (default: against)"
    )
    parser.add_argument("--before", default="f7f002f", help="revision to measure against (default %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="measurements of each tree (default %(default)s)")
    parser.add_argument(
        "--examples", type=int, default=16_384, help="examples of a measurement of small (default %(default)s)"
    )
    parser.add_argument("--no_whole", dest="whole", action="store_false", help="leave out the whole training")
    profiles = tuple(sorted(PROFILES, reverse=True))
    parser.add_argument("--profiles", type=names_of(profiles), default=list(profiles), help="(default: all)")
    parser.add_argument("--batch_size", type=int, default=512, help="examples a step (default %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="steps of each measurement (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each way (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each way of mixing (default %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="as for camenn train; 0 = half of the cores")
    parser.add_argument("--workers", type=int, default=1, help="as for camenn train (default %(default)s)")
    parser.add_argument("--work", type=Path, help="directory kept for the next time (default: a temporary one)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure, and print one JSON line."""
    arguments = build_parser().parse_args(argv)
    torch.set_num_threads(arguments.threads or max(1, (os.cpu_count() or 1) // 2))
    found: dict[str, Any] = {}
    with work_directory(arguments.work, "train") as work:
        shards = arguments.shards or prepare_shards(work, arguments)
        for part in arguments.parts:
            found |= MEASURES[part](shards, work / "models", arguments)
    # Where the work directory was a temporary one, so was the revision's tree.
    subprocess.run(["git", "worktree", "prune"], cwd=HERE, check=False)
    found |= {
        "embeddings": "real" if arguments.shards else "stub, of real sizes",
        "repeats": arguments.repeats,
        "threads": torch.get_num_threads(),
        **machine(),
    }
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
