"""The scaling of the pipelines over workers, and Beam's overhead.

    python -m benchmarks.speed.scaling
    python -m benchmarks.speed.scaling --runners fnapi,flink --flink "$(scripts/flink_local.sh flags)"

It gives seconds of embed, shards and score at a parallelism of 1, 2 and more on FnApiRunner and
Flink, the peak memory of each process, and Beam's overhead over the plain functions called in a
loop.

The pipelines are measured without the networks of the encoders. There is a simulated city whose
photos are a few unique bytes. StubImageHandler and StubTitleHandler replace InceptionV4 and BERT,
with small embeddings. `score` runs a CameNN of the default profile with untrained weights, on one
thread to a worker.

Every run is a process of its own. Variants alternate, so that a busy machine slows all of them.
Medians are compared, and all outputs must be equal row by row.

The overhead is seconds on FnApiRunner with one worker over seconds of the plain loop
(benchmarks/support/loop_runner.py), minus 1. The overhead in processor seconds is given as well,
which is less affected by a machine that lends its cores elsewhere.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.support.city import make_city
from benchmarks.support.command import progress_log
from benchmarks.support.processes import run_watched
from benchmarks.support.stage_process import PLAIN, STAGES, Job

log = progress_log("scaling")

LIMIT = 0.25
"""Largest overhead of Beam for `shards` on FnApiRunner, as a share of the plain loop's seconds."""
RUNNERS = ("fnapi", "flink")
READS = {"embed": (), "shards": ("store",), "score": ("store", "shards", "model")}
"""Stages to prepare for each stage, besides the tables. `score` itself reads no shards, but its model needs them."""
LOOP = ("--runner=benchmarks.support.loop_runner.LoopRunner",)


@dataclass(frozen=True)
class Variant:
    """One way to run a stage."""

    runner: str
    parallelism: int
    beam_flags: tuple[str, ...]

    @property
    def name(self) -> str:
        """Return `plain`, `fnapi-1`, `flink-2`, ..."""
        return self.runner if self.runner == PLAIN else f"{self.runner}-{self.parallelism}"


@dataclass
class Runs:
    """The results of all runs of one variant.

    A variant is of one stage.
    """

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    """Processor seconds of the submitting process, which are all where the worker is inside it"""
    peaks: list[dict[str, float] | None] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Return the median seconds."""
        return statistics.median(self.seconds)

    @property
    def peak(self) -> dict[str, float] | None:
        """Return MB of each process, the most of all runs."""
        known = [peaks for peaks in self.peaks if peaks is not None]
        if not known:
            return None
        return {name: max(p.get(name, 0.0) for p in known) for name in sorted({name for p in known for name in p})}


def fnapi_flags(parallelism: int) -> tuple[str, ...]:
    """Return the flags of FnApiRunner at a parallelism.

    It has one worker inside the submitting process, or so many worker processes.
    """
    if parallelism == 1:
        return ("--direct_num_workers=1",)
    return (f"--direct_num_workers={parallelism}", "--direct_running_mode=multi_processing")


def flink_answers(flags: list[str]) -> bool:
    """Return whether the JobManager of the flags answers."""
    master = next((flag.split("=", 1)[1] for flag in flags if flag.startswith("--flink_master=")), "")
    if not master:
        return False
    # A proxy of the environment must not be used between this machine and its own cluster.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{master}/overview", timeout=5) as answer:
            return bool(json.load(answer)["taskmanagers"])
    except (OSError, ValueError, KeyError):
        return False


def list_variants(runners: list[str], parallelism: list[int], flink: list[str]) -> list[Variant]:
    """List the plain loop and every runner at every parallelism.

    Only available runners are listed.
    """
    variants = [Variant(PLAIN, 1, LOOP)]
    if "fnapi" in runners:
        variants += [Variant("fnapi", n, fnapi_flags(n)) for n in parallelism]
    if "flink" in runners:
        if not flink_answers(flink):
            log(
                "flink is left out: no cluster answers. "
                'Start one with scripts/flink_local.sh up, and give --flink "$(scripts/flink_local.sh flags)".'
            )
        else:
            variants += [
                Variant("flink", n, (*flink, f"--parallelism={n}", f"--sdk_worker_parallelism={n}"))
                for n in parallelism
            ]
    return variants


def run_job(job: Job, variant: Variant, timeout: float) -> tuple[dict[str, Any], dict[str, float] | None]:
    """Run one job in a process of its own.

    Returns (its result, peak MB of each process).
    """
    shutil.rmtree(job.out, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.support.stage_process", json.dumps(asdict(job))]
    out, peaks = run_watched(command, standing=variant.runner == "flink", timeout=timeout)
    return json.loads(out.strip().splitlines()[-1]), peaks


def prepare(work: Path, arguments: argparse.Namespace, jobs: dict[str, Any]) -> dict[str, int]:
    """Make all inputs of the stages.

    Existing ones are reused. Returns the city's row counts.
    """
    started = time.monotonic()
    rows = make_city(work / "data", arguments.items, arguments.clicks, arguments.pairs)
    log(
        f"city of {rows['items']:,} items and {rows['clicks']:,} clicks "
        f"after {time.monotonic() - started:.0f} s: {work}"
    )
    for stage, name in (("embed", "store"), ("shards", "shards"), ("model", "model")):
        needed = any(name in READS[asked] for asked in arguments.stages)
        if not needed or (work / name / "latest.json").exists():
            continue
        log(f"preparing {name}")
        run_job(
            Job(stage=stage, out=str(work / name), beam_flags=LOOP, **jobs), Variant(PLAIN, 1, LOOP), arguments.timeout
        )
    return rows


def measure(
    work: Path, arguments: argparse.Namespace, variants: list[Variant], jobs: dict[str, Any]
) -> dict[str, dict[str, Runs]]:
    """Run every variant of every stage `repeats` times.

    Variants alternate.

    Raises:
        RuntimeError: two variants of a stage gave different rows.
    """
    found: dict[str, dict[str, Runs]] = {}
    for stage in arguments.stages:
        found[stage] = {variant.name: Runs() for variant in variants}
        for number in range(arguments.repeats):
            for variant in variants:
                out = work / "measured" / f"{stage}-{variant.name}"
                job = Job(stage=stage, out=str(out), beam_flags=variant.beam_flags, **jobs)
                result, peaks = run_job(job, variant, arguments.timeout)
                shutil.rmtree(out, ignore_errors=True)
                runs = found[stage][variant.name]
                runs.seconds.append(result["seconds"])
                runs.cpu_seconds.append(result["cpu_seconds"])
                runs.peaks.append(peaks)
                runs.result = result
                first = found[stage][variants[0].name].result
                if (result["rows"], result["digest"]) != (first["rows"], first["digest"]):
                    raise RuntimeError(
                        f"{stage} on {variant.name} gave {result['rows']}, digest {result['digest']}; "
                        f"{variants[0].name} gave {first['rows']}, "
                        f"digest {first['digest']}: a comparison of their seconds would mean nothing."
                    )
                shown = "" if peaks is None else f", {sum(peaks.values()):,.0f} MB in {len(peaks)} processes"
                log(f"{stage} {variant.name} {number + 1}/{arguments.repeats}: {result['seconds']:.1f} s{shown}")
    return found


def summarise(found: dict[str, dict[str, Runs]]) -> dict[str, Any]:
    """Return ratios first, then their components."""
    overhead = {
        stage: round(runs["fnapi-1"].median / runs[PLAIN].median - 1, 4)
        for stage, runs in found.items()
        if "fnapi-1" in runs
    }
    speedup: dict[str, dict[str, dict[str, float]]] = {}
    for stage, runs in found.items():
        for name, run in runs.items():
            runner, _, parallelism = name.partition("-")
            if parallelism and parallelism != "1" and f"{runner}-1" in runs:
                by_runner = speedup.setdefault(f"speedup_{parallelism}_workers", {}).setdefault(runner, {})
                by_runner[stage] = round(runs[f"{runner}-1"].median / run.median, 3)
    return {
        "shards_beam_overhead": overhead.get("shards"),
        "shards_beam_overhead_limit": LIMIT,
        "beam_overhead": overhead,
        "beam_overhead_cpu": {
            stage: round(
                statistics.median(runs["fnapi-1"].cpu_seconds) / statistics.median(runs[PLAIN].cpu_seconds) - 1, 4
            )
            for stage, runs in found.items()
            if "fnapi-1" in runs
        },
        **speedup,
        "seconds": {stage: {name: round(run.median, 2) for name, run in runs.items()} for stage, runs in found.items()},
        "all_seconds": {
            stage: {name: [round(s, 2) for s in run.seconds] for name, run in runs.items()}
            for stage, runs in found.items()
        },
        "peak_rss_mb": {stage: {name: run.peak for name, run in runs.items()} for stage, runs in found.items()},
        "rows_out": {stage: runs[PLAIN].result["rows"] for stage, runs in found.items()},
        "pairs": next(
            (runs[PLAIN].result["pairs"] for runs in found.values() if runs[PLAIN].result.get("pairs")), None
        ),
    }


def print_table(found: dict[str, dict[str, Runs]], summary: dict[str, Any]) -> None:
    """Print a table for a person, to stderr."""
    print(
        f"\n{'stage':<8}{'variant':<10}{'seconds':>9}{'plain':>8}{'MB':>9}  peak of each process, MB", file=sys.stderr
    )
    for stage, runs in found.items():
        for name, run in runs.items():
            peak = run.peak
            total = f"{sum(peak.values()):>9,.0f}" if peak is not None else f"{'-':>9}"
            each = ", ".join(f"{process} {mb:,.0f}" for process, mb in (peak or {}).items())
            ratio = f"{run.median / runs[PLAIN].median:>8.2f}"
            print(f"{stage:<8}{name:<10}{run.median:>9.2f}{ratio}{total}  {each}", file=sys.stderr)
    overhead = summary["shards_beam_overhead"]
    if overhead is not None:
        words = "within" if overhead <= LIMIT else "MORE THAN"
        print(f"\nBeam costs shards {overhead:.1%} on FnApiRunner: {words} the limit of {LIMIT:.0%}", file=sys.stderr)
    print(file=sys.stderr)


def _names(text: str, known: tuple[str, ...]) -> list[str]:
    names = [name for name in text.split(",") if name]
    unknown = set(names) - set(known)
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"choose from {','.join(known)}")
    return [name for name in known if name in names]


def _shape(text: str) -> tuple[int, int]:
    rows, _, width = text.partition("x")
    return int(rows), int(width)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.scaling", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    cores = os.cpu_count() or 1
    usual = ",".join(str(n) for n in sorted({1, 2, *(2**k for k in range(2, 7) if 2**k <= cores)}))
    parser.add_argument("--items", type=int, default=100_000, help="listings of the city (default %(default)s)")
    parser.add_argument("--clicks", type=int, default=2_000_000, help="clicks aimed at (default %(default)s)")
    parser.add_argument(
        "--pairs",
        type=int,
        default=600_000,
        help="pairs to score, at most: whole stores at six hours of the day (default %(default)s)",
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each variant (default %(default)s)")
    parser.add_argument(
        "--stages",
        type=lambda text: _names(text, STAGES),
        default=list(STAGES),
        help="of embed,shards,score (default: all)",
    )
    parser.add_argument(
        "--runners", type=lambda text: _names(text, RUNNERS), default=["fnapi"], help="of fnapi,flink (default: fnapi)"
    )
    parser.add_argument(
        "--parallelism",
        type=lambda text: sorted({int(n) for n in text.split(",")}),
        default=usual,
        help="numbers of workers, with commas (default: powers of two up to the cores, %(default)s)",
    )
    parser.add_argument(
        "--flink",
        default="",
        help="flags that send a job to a running cluster, as scripts/flink_local.sh flags prints them",
    )
    parser.add_argument(
        "--image_shape",
        type=_shape,
        default="4x64",
        help="patches x features of a stub photo embedding, patches being a square "
        "(default %(default)s; InceptionV4's are 64x1536)",
    )
    parser.add_argument(
        "--text_shape",
        type=_shape,
        default="8x64",
        help="tokens x features of a stub title embedding (default %(default)s; BERT's are 32x768)",
    )
    parser.add_argument(
        "--work",
        help="directory for the city and its outputs, kept for the next time (default: a temporary one)",
    )
    parser.add_argument(
        "--timeout", type=float, default=7_200, help="seconds after which a run is ended (default %(default)s)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Prepare, measure, and print the table and one JSON line."""
    arguments = build_parser().parse_args(argv)
    with ExitStack() as stack:
        root = Path(
            arguments.work or stack.enter_context(tempfile.TemporaryDirectory(prefix="camenn-scaling-"))
        ).absolute()
        shapes = {"image": arguments.image_shape, "text": arguments.text_shape}
        label = "-".join(f"{a}x{b}" for a, b in shapes.values())
        work = root / f"city-{arguments.items}-{arguments.clicks}-{arguments.pairs}-{label}"
        jobs = {"work": str(work), "image_shape": shapes["image"], "text_shape": shapes["text"]}
        variants = list_variants(arguments.runners, arguments.parallelism, arguments.flink.split())
        city = prepare(work, arguments, jobs)
        found = measure(work, arguments, variants, jobs)
    summary = summarise(found) | {
        "city": city,
        "stub_encoders": {f"{kind}_shape": list(shape) for kind, shape in shapes.items()},
        "repeats": arguments.repeats,
        "cores": os.cpu_count(),
        "platform": platform.platform(),
    }
    print_table(found, summary)
    print(json.dumps(summary), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
