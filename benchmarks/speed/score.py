"""The cost of scoring: cached states, matrix product, memory.

    python -m benchmarks.speed.score
    python -m benchmarks.speed.score --shards WORK/shards --parts speed

Cached states are measured against the plain forward pass and against the machine's own matrix
product. Memory is measured by catalog.

`speed` is measured for each profile, on one thread, alternately, with medians of the ratios.

`vs_plain_forward` is the pairs/s of tiles of listings × audience rows (states of both sides and
all) over those of the same model scored pair by pair in large batches, on a sample of the pairs.

`vs_floor` is a share of the time taken: the floating-point operations of the cached algorithm, over
the operations per second of a large matrix product of the same precision and threads.

`max_abs_diff` is the largest difference of the two paths' logits. Pairs whose K-th and next gate
logits differ by less than 1e-5 are left out and counted.

`bf16` is about `--precision bf16` over the same tiles: pairs/s over float32's, share of rows whose
ten best are the same in the same order, share of pairs computed in both precisions.

Weights are initial ones. Gates are drawn at random so that all experts are chosen. Listings'
embeddings are random numbers of the profile's own shape.

`memory` is the peak resident memory of `camenn score` over two catalogs, one ten times the other,
with as many pairs. The last line of stdout is one JSON object.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.train import prepare
from benchmarks.support.city import make_city
from benchmarks.support.command import machine, names_of, progress_log, work_directory
from benchmarks.support.processes import run_watched
from benchmarks.support.stage_process import Job, run_stage
from camenn_model.batch import AudienceBatch, Batch, HistoryItems, ItemBatch, PairBatch
from camenn_model.config import PROFILES, ModelConfig
from camenn_model.data.batching import collate
from camenn_model.model.camenn import CameNN
from camenn_model.scoring.scorer import Scorer
from camenn_model.scoring.shortlist import Shortlist
from camenn_model.training.corpus import Corpus, TrainOptions, open_corpus
from pipelines.runs.manifest import read_latest

log = progress_log("score")

PARTS = ("speed", "memory")
TILE_ITEMS = 512
PLAIN_BATCH = 512
MEMORY_PAIRS = 2_000_000
TOP_K = 10
STUB_SHAPES = (1, 1536), (1, 384)


def matmul_flops(dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Return floating-point operations a second of a matrix product.

    The product is of 2048 × 2048 on this process's threads. The best of the measurements within
    some seconds is taken.
    """
    a, b = (torch.randn(2048, 2048, dtype=dtype) for _ in range(2))
    times: list[float] = []
    while sum(times) < seconds:
        started = time.monotonic()
        _ = a @ b
        times.append(time.monotonic() - started)
    return 2 * 2048**3 / min(times)


class Sides:
    """Listings and audience rows of a shard set.

    Their embeddings are random, of a profile's own shape.
    """

    def __init__(self, corpus: Corpus, profile: str, items: int, rows: int) -> None:
        given = corpus.config
        self.config = ModelConfig.profile(
            profile,
            fields=given.fields,
            text_width=given.text_width,
            image_width=given.image_width,
            base_rate=given.base_rate,
            history_length=given.history_length,
        )
        self.corpus, self.rng = corpus, np.random.default_rng(0)
        self.item_rows = self.rng.choice(len(corpus.table), items, replace=False)
        test = collate(corpus.reader.read(corpus.files("test")[0][0]), corpus.table)
        every = np.arange(len(test.audience.cats))
        chosen = torch.from_numpy(self.rng.choice(every, rows, replace=len(every) < rows))
        self.audience = AudienceBatch(**{name: value[chosen] for name, value in vars(test.audience).items()})
        self.history: HistoryItems = test.history
        self.pair_values, self.pair_buckets = test.pairs.values, test.pairs.buckets
        self.model = self._model()

    def _model(self) -> CameNN:
        torch.manual_seed(0)
        model = CameNN(self.config)
        with torch.no_grad():
            for part in model.cvr_gate.weights:
                assert isinstance(part, torch.nn.Linear)
                torch.nn.init.normal_(part.weight, std=0.3)
        return model.eval()

    def items(self, first: int, count: int) -> ItemBatch:
        """Return some listings, in a tile's form."""
        rows = self.item_rows[first : first + count]
        batch = self.corpus.table.batch(rows)
        c = self.config
        text = torch.from_numpy(self.rng.standard_normal((len(rows), c.text_tokens, c.text_width), dtype=np.float32))
        patches = torch.from_numpy(self.rng.standard_normal((len(rows), c.patch_grid**2, c.image_width), np.float32))
        present = torch.ones(len(rows), dtype=torch.bool)
        return replace(
            batch,
            text=text.half(),
            text_mask=torch.ones(text.shape[:2], dtype=torch.bool),
            patches=patches.half(),
            has_text=present,
            has_image=present,
        )

    def pairs(self, rows: int, items: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw (values, buckets) [rows, items, n] of real examples.

        They are drawn at random.
        """
        place = torch.from_numpy(self.rng.integers(0, len(self.pair_values), rows * items))
        values, buckets = (column[place].view(rows, items, -1) for column in (self.pair_values, self.pair_buckets))
        return values, buckets


def take(batch: Any, rows: torch.Tensor) -> Any:
    """Return named rows of a batch.

    The batch is of items or of audience rows. A row occurs as often as it is named.
    """
    return replace(batch, **{name: value[rows] for name, value in vars(batch).items()})


def listed_pairs(
    sides: Sides, items: ItemBatch, places: torch.Tensor, rows: torch.Tensor, values: Any, buckets: Any
) -> Batch:
    """Return a batch without shared listings or audience rows.

    Pair n has a listing and an audience row of its own, as a scorer without states reads them.
    """
    every = torch.arange(len(places))
    pairs = PairBatch(
        item=every,
        audience=every,
        values=values,
        buckets=buckets,
        position=torch.zeros(len(places), dtype=torch.int64),
        label=torch.zeros(len(places)),
    )
    return Batch(items=take(items, places), audience=take(sides.audience, rows), history=sides.history, pairs=pairs)


def measure_profile(corpus: Corpus, profile: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the ratios of one profile."""
    tiles = arguments.tiles if profile == "small" else max(1, arguments.tiles // 4)
    count = tiles * TILE_ITEMS
    sides = Sides(corpus, profile, min(count, len(corpus.table)), arguments.rows)
    scorer = Scorer(sides.model)
    batches = [sides.items(first, TILE_ITEMS) for first in range(0, count, TILE_ITEMS)]
    numbers = [sides.pairs(arguments.rows, TILE_ITEMS) for _ in batches]
    sample = arguments.plain_pairs if profile == "small" else max(64, arguments.plain_pairs // 8)
    size = min(PLAIN_BATCH, sample)
    plain_batches = []
    for _ in range(max(1, sample // size)):
        places, rows = (torch.from_numpy(sides.rng.integers(0, n, size)) for n in (TILE_ITEMS, arguments.rows))
        values, buckets = numbers[0][0][rows, places], numbers[0][1][rows, places]
        plain_batches.append(listed_pairs(sides, batches[0], places, rows, values, buckets))

    shortlists: list[Shortlist] = []
    logits: dict[str, torch.Tensor] = {}

    def score_tiles(name: str, way: Any) -> None:
        audience = way.audience_states(sides.audience, sides.history)
        pieces = [
            way.score_tile(way.item_states(batch), audience, values, buckets)
            for batch, (values, buckets) in zip(batches, numbers, strict=True)
        ]
        logits[name] = torch.cat(pieces, dim=1)

    def cached() -> None:
        score_tiles("cached", scorer)

    def bf16() -> None:
        shortlists.append(Shortlist(sides.model, TOP_K))
        score_tiles("bf16", shortlists[-1])

    def plain() -> None:
        for batch in plain_batches:
            scorer.score_pairs(batch)

    pairs = {"cached": count * arguments.rows, "bf16": count * arguments.rows, "plain": len(plain_batches) * size}
    with FlopCounterMode(display=False) as counter:
        cached()
    flops = counter.get_total_flops()
    bf16()
    plain()
    ways: dict[str, Callable[[], None]] = {"cached": cached, "bf16": bf16, "plain": plain}
    pace: dict[str, list[float]] = {name: [] for name in ways}
    ceilings: list[float] = []
    for number in range(arguments.repeats):
        ceilings.append(matmul_flops(torch.float32))
        for name, way in ways.items():
            started = time.monotonic()
            way()
            pace[name].append(pairs[name] / (time.monotonic() - started))
        shown = ", ".join(f"{name} {values[-1]:,.0f} pairs/s" for name, values in pace.items())
        log(f"{profile} {number + 1}/{arguments.repeats}: {shown}, matrix product {ceilings[-1] / 1e9:,.0f} GFLOP/s")
    floor = [flops / ceiling * value / pairs["cached"] for ceiling, value in zip(ceilings, pace["cached"], strict=True)]
    best = {name: found.topk(TOP_K, dim=1).indices for name, found in logits.items()}

    def ratio(over: str, under: str) -> float:
        return round(statistics.median(a / b for a, b in zip(pace[over], pace[under], strict=True)), 2)

    found = {
        "vs_plain_forward": ratio("cached", "plain"),
        "bf16": {
            "vs_float32": ratio("bf16", "cached"),
            "same_top_10": float((best["cached"] == best["bf16"]).all(1).float().mean()),
            "computed_twice": round(shortlists[-1].twice / shortlists[-1].pairs, 4),
        },
        "vs_floor": round(statistics.median(floor), 3),
        "pairs_per_second": {name: round(statistics.median(values)) for name, values in pace.items()},
        "mflop_per_pair": round(flops / pairs["cached"] / 1e6, 3),
        "matmul_gflops": round(statistics.median(ceilings) / 1e9, 1),
        "pairs": pairs,
    }
    return found | compare(sides, scorer, batches[0])


def compare(sides: Sides, scorer: Scorer, items: ItemBatch, side: int = 48) -> dict[str, Any]:
    """Return the largest difference of both paths.

    They are compared over a tile of all pairs.
    """
    some = torch.arange(side)
    few = take(items, some)
    values, buckets = sides.pairs(side, side)
    states = scorer.item_states(few)
    audience = scorer.audience_states(take(sides.audience, some), sides.history)
    tile = scorer.score_tile(states, audience, values, buckets)
    settled = scorer.margin(states, audience) > 1e-5
    rows, places = (grid.flatten() for grid in torch.meshgrid(some, some, indexing="ij"))
    plain = []
    for start in range(0, len(rows), PLAIN_BATCH):
        chosen = slice(start, start + PLAIN_BATCH)
        flat = [column.flatten(0, 1)[chosen] for column in (values, buckets)]
        plain.append(scorer.score_pairs(listed_pairs(sides, few, places[chosen], rows[chosen], *flat)))
    difference = (tile - torch.cat(plain).view(side, side)).abs()
    return {
        "max_abs_diff": float(difference[settled].max()),
        "gate_ties": int((~settled).sum()),
        "compared_pairs": side * side,
    }


def measure_speed(work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the ratios of each profile."""
    shards = arguments.shards or prepare(work, arguments.items, arguments.clicks)
    found = {}
    for profile in arguments.profiles:
        log(f"profile {profile}")
        corpus = open_corpus(TrainOptions(shards=shards, out=str(work / "models"), profile=profile))
        found[profile] = measure_profile(corpus, profile, arguments)
    return {"speed": found}


def measure_memory(work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the peak resident memory of the whole stage.

    It runs over two catalogs, with as many pairs of each.
    """
    peaks: dict[int, list[float]] = {}
    for size in arguments.memory_items:
        place = work / f"memory-{size}"
        make_city(place / "data", size, arguments.memory_clicks, MEMORY_PAIRS)
        for stage, name in (("embed", "store"), ("shards", "shards"), ("model", "model")):
            if read_latest(str(place / name)) is None:
                log(f"{stage} of {size:,} listings")
                run_stage(_job(place, stage, name))
        peaks[size] = []
    for number in range(arguments.repeats):
        for size, found in peaks.items():
            job = _job(work / f"memory-{size}", "score", f"scores-{number}-{time.time_ns()}")
            command = [sys.executable, "-m", "benchmarks.support.stage_process", json.dumps(asdict(job))]
            _, shown = run_watched(command, standing=False, timeout=arguments.timeout)
            found.append(sum((shown or {}).values()))
            log(f"memory {number + 1}/{arguments.repeats}: {size:,} listings, {found[-1]:,.0f} MB")
    few, many = (statistics.median(peaks[size]) for size in sorted(peaks))
    return {
        "memory": {
            "rss_ratio": round(many / few, 3),
            "peak_rss_mb": {size: round(statistics.median(v)) for size, v in peaks.items()},
        }
    }


def _job(place: Path, stage: str, name: str) -> Job:
    return Job(
        stage=stage,
        work=str(place),
        out=str(place / name),
        beam_flags=("--direct_num_workers=1",),
        image_shape=STUB_SHAPES[0],
        text_shape=STUB_SHAPES[1],
    )


MEASURES = {"speed": measure_speed, "memory": measure_memory}


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.score", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--parts", type=names_of(PARTS), default=list(PARTS), help="of speed,memory (default: all)")
    profiles = tuple(sorted(PROFILES, reverse=True))
    parser.add_argument("--profiles", type=names_of(profiles), default=list(profiles), help="(default: all)")
    parser.add_argument("--shards", help="shard set that `camenn shards` wrote, for its fields (default: one is made)")
    parser.add_argument("--items", type=int, default=20_000, help="listings of the city (default %(default)s)")
    parser.add_argument("--clicks", type=int, default=300_000, help="clicks of the city (default %(default)s)")
    parser.add_argument("--rows", type=int, default=500, help="audience rows (default %(default)s)")
    parser.add_argument(
        "--tiles",
        type=int,
        default=8,
        help="tiles of 512 listings that are timed, a quarter in `base` (default %(default)s)",
    )
    parser.add_argument(
        "--plain_pairs",
        type=int,
        default=4_096,
        help="pairs of the plain way, an eighth in `base` (default %(default)s)",
    )
    parser.add_argument(
        "--memory_items",
        type=lambda text: [int(size) for size in text.split(",")],
        default=[20_000, 200_000],
        help="listings of the two catalogs of the memory part (default 20000,200000)",
    )
    parser.add_argument("--memory_clicks", type=int, default=200_000, help="clicks of each (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each (default %(default)s)")
    parser.add_argument("--work", type=Path, help="directory kept for the next time (default: a temporary one)")
    parser.add_argument("--timeout", type=float, default=7_200, help="seconds after which a run is ended")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure, and print one JSON line."""
    arguments = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with work_directory(arguments.work, "score") as work:
        for part in arguments.parts:
            found |= MEASURES[part](work, arguments)
    print(json.dumps(found | {"repeats": arguments.repeats, "threads": 1, **machine()}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
