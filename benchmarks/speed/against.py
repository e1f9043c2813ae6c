"""The cost of a change: this tree against another checkout.

    git worktree add /tmp/before COMMIT
    python -m benchmarks.speed.against --before /tmp/before --work WORK

Stages of both trees run alternately on one machine. Both trees read the same city, and each builds
its own store, shard set and model. A run is a process of its own, with one worker.

`cpu_ratio` and `wall_ratio` are medians over the turns of this tree's seconds over the other's.
`same_rows` is true where the rows of both are bitwise equal. The last line of stdout is one JSON
object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks.support.city import make_city, multiply_city
from benchmarks.support.command import machine, names_of, progress_log, work_directory
from benchmarks.support.stage_process import Job

log = progress_log("against")

IMAGE_SHAPE, TEXT_SHAPE = (16, 1536), (32, 384)
CLICKS_PER_USER = 50
STAGES = ("shards", "score")
HERE = Path(__file__).resolve().parents[2]
PROCESSES = ("benchmarks.support.stage_process", "benchmarks.plant_stage")
"""Module that runs one stage, and its name in checkouts older than the move into rooms"""


def run_in(tree: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    """Run Python on a checkout and return its last line's JSON."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)} | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run_stage(tree: Path, place: Path, stage: str, out: str, *, rebuild: bool = False) -> dict[str, Any]:
    """Run one stage of a checkout and return its result.

    It runs in a process of its own.
    """
    job = Job(
        stage=stage,
        work=str(place),
        out=str(place / out),
        beam_flags=("--direct_num_workers=1",),
        image_shape=IMAGE_SHAPE,
        text_shape=TEXT_SHAPE,
        rebuild=rebuild,
    )
    # Defaults are left out: an earlier tree may not know the field.
    defaults = {field.name: field.default for field in fields(job)}
    given = {name: value for name, value in asdict(job).items() if value != defaults[name]}
    module = next(name for name in PROCESSES if (tree / name.replace(".", "/")).with_suffix(".py").exists())
    return run_in(tree, "-m", module, json.dumps(given))


def measure(work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all ratios."""
    trees = {"before": arguments.before.resolve(), "now": HERE}
    make_city(work / "city", arguments.items, arguments.clicks // arguments.copies, 1, CLICKS_PER_USER)
    rows = multiply_city(work / "city", work / "data", arguments.copies)
    log(f"{rows}")
    for name, tree in trees.items():
        place = work / name
        place.mkdir(exist_ok=True)
        if not (place / "data").is_symlink():
            (place / "data").symlink_to(work / "data")
        for stage, out in (("embed", "store"), ("shards", "shards"), ("model", "model")):
            if not (place / out / "latest.json").exists():
                log(f"{name}: {stage}")
                run_stage(tree, place, stage, out)
    found: dict[str, Any] = {}
    for stage in arguments.stages:
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
        for turn in range(arguments.repeats):
            # The order alternates, as the second of two runs finds the files in memory.
            for name in sorted(trees, reverse=turn % 2 == 1):
                out = "shards" if stage == "shards" else f"scores-{turn}"
                result = run_stage(trees[name], work / name, stage, out, rebuild=stage == "shards")
                runs[name].append(result)
                log(f"{stage} {turn + 1}/{arguments.repeats}: {name} {result['cpu_seconds']:.1f} CPU s")
        pairs = list(zip(runs["now"], runs["before"], strict=True))
        found[stage] = {
            "cpu_ratio": round(statistics.median(a["cpu_seconds"] / b["cpu_seconds"] for a, b in pairs), 4),
            "wall_ratio": round(statistics.median(a["seconds"] / b["seconds"] for a, b in pairs), 4),
            "cpu_seconds": {name: [round(run["cpu_seconds"], 2) for run in results] for name, results in runs.items()},
            "wall_seconds": {name: [round(run["seconds"], 2) for run in results] for name, results in runs.items()},
            "same_rows": len({run["digest"] for results in runs.values() for run in results}) == 1,
        }
    return found | {"rows": rows}


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.against", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--before", type=Path, required=True, help="another checkout of this project")
    parser.add_argument("--stages", type=names_of(STAGES), default=list(STAGES), help="of shards,score (default: all)")
    parser.add_argument("--items", type=int, default=20_000, help="listings (default %(default)s)")
    parser.add_argument("--clicks", type=int, default=2_000_000, help="clicks, about (default %(default)s)")
    parser.add_argument("--copies", type=int, default=10, help="copies of the users (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each (default %(default)s)")
    parser.add_argument("--work", type=Path, help="directory kept for the next time (default: a temporary one)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure, and print one JSON line."""
    arguments = build_parser().parse_args(argv)
    with work_directory(arguments.work, "against") as work:
        found = measure(work, arguments)
    print(json.dumps(found | {"stub_encoders": "meaningless embeddings of real sizes", **machine()}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
