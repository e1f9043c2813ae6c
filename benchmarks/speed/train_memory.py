"""The memory of `camenn train` on a large log, killed and resumed.

    python -m benchmarks.speed.train_memory --clicks 20000000

The benchmarks' own city is simulated, with stub embeddings of real sizes. `camenn train` runs on it
in a process of its own. It is killed once a share of the examples is learned, started again, and
goes on.

    peak_mb: most memory that is the process's own (Linux's RssAnon), of both runs.
        The embeddings are mapped files, which the system drops where it needs the memory.
    peak_mapped_mb: most of the mapped files in memory at once (RssFile)
    examples_per_second: of the steps that learn orders, wall time
    killed_at, resumed_at: examples learned when it was killed, and where it went on

With --until the second run is ended early, and the rest is not measured. The last line of stdout is
one JSON object.
"""

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.speed.train import prepare
from benchmarks.support.command import machine, progress_log, work_directory

log = progress_log("train_memory")

SAMPLE_S = 0.2
LEARNED = re.compile(r"^train: ([\d,]+) of ([\d,]+) examples")
MEASURES = {"RssAnon": "peak_mb", "RssFile": "peak_mapped_mb"}


@dataclass
class Training:
    """One process of `camenn train`, watched."""

    command: list[str]
    peaks: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MEASURES.values(), 0))
    learned: list[tuple[float, int]] = field(default_factory=list)
    """(moment, examples learned) of each line of progress"""
    total: int = 0

    def run(self, until: float) -> int:
        """Run until a share of the examples is learned.

        Returns the exit status, negative where the process was killed then.
        """
        child = subprocess.Popen(self.command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        done = threading.Event()
        watch = threading.Thread(target=self._watch, args=(child.pid, done), daemon=True)
        watch.start()
        said = []
        assert child.stderr is not None
        for line in child.stderr:
            said.append(line)
            if found := LEARNED.match(line):
                examples, self.total = (int(text.replace(",", "")) for text in found.groups())
                self.learned.append((time.monotonic(), examples))
                if examples >= until * self.total and until < 1:
                    child.kill()
        status = child.wait()
        done.set()
        watch.join()
        if status > 0:
            raise RuntimeError(f"camenn train ended with {status}:\n{''.join(said[-20:])}")
        return status

    def _watch(self, pid: int, done: threading.Event) -> None:
        while not done.wait(SAMPLE_S):
            try:
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            except OSError:
                return
            for line in lines:
                if name := MEASURES.get(line.partition(":")[0]):
                    self.peaks[name] = max(self.peaks[name], int(line.split()[1]) // 1024)


def pace(learned: list[tuple[float, int]]) -> float:
    """Return examples a second between the first and the last line of progress."""
    (begin, first), (end, last) = learned[0], learned[-1]
    return (last - first) / (end - begin) if end > begin else 0.0


def measure(shards: str, out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, kill, and go on."""
    command = [sys.executable, "-m", "pipelines.cli", "train", "--shards", shards, "--out", str(out)]
    command += ["--threads", str(arguments.threads)] if arguments.threads else []
    trainings = [Training(command), Training(command)]
    started = time.monotonic()
    if trainings[0].run(arguments.kill_at) == 0:
        raise RuntimeError("camenn train ended before it was killed: give more clicks")
    log(f"killed after {trainings[0].learned[-1][1]:,} examples, {time.monotonic() - started:.0f} s")
    trainings[1].run(arguments.until)
    learned = [training.learned for training in trainings]
    return {
        **{name: max(training.peaks[name] for training in trainings) for name in MEASURES.values()},
        "examples_per_second": round(pace(max(learned, key=len))),
        "killed_at": learned[0][-1][1],
        "resumed_at": learned[1][0][1],
        "examples": learned[1][-1][1],
        "training_examples": trainings[1].total,
        "seconds": round(time.monotonic() - started),
    }


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.train_memory", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--items", type=int, default=20_000, help="listings of the city (default %(default)s)")
    parser.add_argument("--clicks", type=int, default=20_000_000, help="clicks of the city (default %(default)s)")
    parser.add_argument("--kill_at", type=float, default=0.1, help="share learned before it is killed (default 0.1)")
    parser.add_argument("--until", type=float, default=1.0, help="share learned at which the second run is ended")
    parser.add_argument("--threads", type=int, default=0, help="as for camenn train; 0 = half of the cores")
    parser.add_argument("--work", type=Path, help="directory kept for the next time (default: a temporary one)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure, and print one JSON line."""
    arguments = build_parser().parse_args(argv)
    with work_directory(arguments.work, "train-memory") as work:
        shards = prepare(work, arguments.items, arguments.clicks)
        found = measure(shards, work / "model", arguments)
    print(json.dumps({"clicks": arguments.clicks, **found, **machine()}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
