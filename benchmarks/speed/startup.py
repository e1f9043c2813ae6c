"""The cost of starting a command: CPU seconds and memory.

    python -m benchmarks.speed.startup [--before CHECKOUT]

`camenn COMMAND --help` is run in processes of their own.

With `--before`, another checkout's commands are run in turns with this one's, and `cpu_ratio` is
the median of this tree's CPU seconds over the other's `shards --help`. Imports of the stages' own
modules are measured as well. The last line of stdout is one JSON object.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.support.command import machine

HERE = Path(__file__).resolve().parents[2]
HELP = ("shards", "score", "train", "gc")
"""Commands that both trees have, and that are compared"""


def run_once(tree: Path, arguments: Sequence[str]) -> tuple[float, float]:
    """Run Python in a checkout, as in `python ARGUMENTS`.

    Returns CPU seconds and peak memory in MB.
    """
    pid = os.fork()
    if pid == 0:
        os.chdir(tree)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.execve(sys.executable, [sys.executable, *arguments], os.environ | {"PYTHONPATH": str(tree)})
    _, status, usage = os.wait4(pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError(f"{tree}: python {' '.join(arguments)} ended with {os.waitstatus_to_exitcode(status)}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the flags."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.startup", description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="another checkout of this project")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each (default %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure, and print one JSON line."""
    arguments = build_parser().parse_args(argv)
    trees = {"now": HERE} | ({"before": arguments.before.resolve()} if arguments.before else {})
    found: dict[str, dict[str, dict[str, float]]] = {}
    for command in HELP:
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in trees}
        for turn in range(arguments.repeats):
            for name in sorted(trees, reverse=turn % 2 == 1):
                runs[name].append(run_once(trees[name], ["-m", "pipelines.cli", command, "--help"]))
        found[command] = {
            name: {
                "cpu_seconds": round(statistics.median(cpu for cpu, _ in results), 3),
                "megabytes": round(statistics.median(memory for _, memory in results), 1),
            }
            for name, results in runs.items()
        }
        print(f"{command} --help: {found[command]}", file=sys.stderr, flush=True)
    before = found["shards"].get("before")
    ratios = (
        {name: round(row["now"]["cpu_seconds"] / before["cpu_seconds"], 4) for name, row in found.items()}
        if before
        else {}
    )
    print(json.dumps({"help": found, "cpu_ratio_to_shards_before": ratios, **machine()}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
