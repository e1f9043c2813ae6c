"""Insert plausible bugs, and report which go unnoticed.

`make mutate` runs it on the list in scripts/mutations.py. A mutation is applied to a copy of the
tree, one at a time, and only the tests that should notice it are run. Generic operators (mutmut,
cosmic-ray) make thousands of mutants, most of them of no interest, and start Python again for each.
Here torch, Beam and the other libraries are imported once, and each mutation gets a fork of that
process. The last line of stdout is one JSON object with the counts.
"""

import argparse
import compileall
import dataclasses
import fnmatch
import importlib
import json
import os
import py_compile
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scripts.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[1]
OURS = ("schemas", "camenn_model", "pipelines", "simulator", "benchmarks", "examples", "docs", "tests")
LIBRARIES = (
    "numpy",
    "pandas",
    "pyarrow.compute",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "torch.distributed",
    "torch.nn.parallel",
    "safetensors.torch",
    "apache_beam.ml.inference.base",
    "apache_beam.runners.direct",
    "apache_beam.runners.portability.fn_api_runner",
    "PIL.Image",
    "sklearn.metrics",
    "hypothesis",
    "pytest",
)
"""Imported before the first fork. None of them imports this project."""

QUIET = {"CI": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
"""CI: hypothesis repeats the same cases, so that a mutation that is caught once is caught always."""


class StaleError(Exception):
    """The list does not fit the tree.

    Or the tests of a mutation could not be run.
    """


def find_stale(mutations: Sequence[Mutation], root: Path = ROOT) -> list[str]:
    """Return the faults of a list of mutations.

    There is one line for each fault, and none where the list fits the tree. A snippet must occur
    exactly once in its file, its replacement must differ, ids must be unique, and tests must occur
    in their file's text.
    """
    faults = []
    texts: dict[str, str] = {}

    def text(name: str) -> str:
        if name not in texts:
            texts[name] = (root / name).read_text() if (root / name).is_file() else ""
        return texts[name]

    ids = [mutation.id for mutation in mutations]
    faults += [f"{name}: the id stands twice" for name in sorted({name for name in ids if ids.count(name) > 1})]
    for mutation in mutations:
        found = text(mutation.file).count(mutation.old)
        if found != 1:
            faults.append(f"{mutation.id}: {mutation.file} has its snippet {found} times, not once: {mutation.old!r}")
        if mutation.old == mutation.new:
            faults.append(f"{mutation.id}: what takes the snippet's place is the same")
        if not mutation.tests:
            faults.append(f"{mutation.id}: no test should notice it")
        for test in mutation.tests:
            file, _, name = test.partition("::")
            if (f"def {name.partition('[')[0]}(" if name else "def test_") not in text(file):
                faults.append(f"{mutation.id}: there is no test {test}")
    return faults


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of some tests.

    `kind` is `passed`, `failed`, `timed out`, or `no result` where they could not even be
    collected.
    """

    kind: str
    seconds: float
    first_failed: str
    output: str


class Slot:
    """A copy of the tree in which mutations are tested.

    One mutation at a time is applied and tested in it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root / "tree"
        self.answer, self.output = root / "answer.json", root / "output.txt"
        named = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        for name in filter(None, named.stdout.decode().split("\0")):
            if (ROOT / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, self.root / name)
        # A hash detects that a module, mutated within one second at the same length, differs from the compiled one.
        for package in OURS:
            compileall.compile_dir(
                self.root / package, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH
            )
        self.mutation: Mutation | None = None
        self.plain = ""
        self.pid = 0
        self.started = 0.0

    def start(self, mutation: Mutation | None, tests: Sequence[str]) -> None:
        """Apply a mutation, if any, and fork the tests.

        The fork is a process that runs some tests.
        """
        self.mutation = mutation
        if mutation is not None:
            path = self.root / mutation.file
            self.plain = path.read_text()
            path.write_text(self.plain.replace(mutation.old, mutation.new))
        self.answer.unlink(missing_ok=True)
        self.started = time.monotonic()
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            self._run_tests(tests)

    def _run_tests(self, tests: Sequence[str]) -> None:
        """Run tests on the copy, in the fork.

        Then write the result, and end.
        """
        try:
            os.setsid()
            target = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(target, 1)
            os.dup2(target, 2)
            os.chdir(self.root)
            os.environ["PYTHONPATH"] = str(self.root)
            sys.path[:] = [str(self.root), *(path for path in sys.path if path not in ("", str(ROOT)))]
            sys.dont_write_bytecode = True
            import hypothesis
            import pytest

            # The first failure is enough: hypothesis neither shrinks nor explains it.
            hypothesis.settings.register_profile(
                "mutate",
                derandomize=True,
                database=None,
                phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
            )
            first: list[str] = []

            class Watch:
                def pytest_runtest_logreport(self, report: Any) -> None:
                    if report.failed and not first:
                        first.append(report.nodeid)

            code = pytest.main(
                [
                    *("-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-profile=mutate"),
                    *("-m", "not slow"),
                    *tests,
                ],
                plugins=[Watch()],
            )
            # Otherwise the tests would have run on another tree.
            strangers = [
                name
                for name, module in list(sys.modules.items())
                if name.partition(".")[0] in OURS
                and not str(getattr(module, "__file__", None) or self.root).startswith(str(self.root))
            ]
            self.answer.write_text(json.dumps({"code": int(code), "first": first[:1], "strangers": strangers}))
        except BaseException as error:
            self.answer.write_text(json.dumps({"code": -1, "first": [], "strangers": [repr(error)]}))
        finally:
            sys.stdout.flush()
            os._exit(0)

    def poll(self, limit: float) -> Outcome | None:
        """Return the outcome of the tests, None while they run.

        The copy is the tree again afterwards.
        """
        done, _ = os.waitpid(self.pid, os.WNOHANG)
        seconds = time.monotonic() - self.started
        if not done and seconds <= limit:
            return None
        if not done:
            # The process leads its own group, with the processes that its tests started.
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        if self.mutation is not None:
            (self.root / self.mutation.file).write_text(self.plain)
        output = self.output.read_text(errors="replace") if self.output.exists() else ""
        if not done:
            return Outcome("timed out", seconds, "", output)
        answer: dict[str, Any] = {"code": -1, "strangers": ["died"]}
        if self.answer.exists():
            answer = json.loads(self.answer.read_text())
        if answer["strangers"]:
            return Outcome("no result", seconds, "", f"{answer['strangers']}\n{output}")
        kind = {0: "passed", 1: "failed"}.get(answer["code"], "no result")
        return Outcome(kind, seconds, "".join(answer["first"]), output)


def judge_all(slots: Sequence[Slot], mutations: Sequence[Mutation], limit: float) -> Iterator[tuple[Mutation, Outcome]]:
    """Yield mutations with their outcomes, as they end."""
    waiting, free = list(reversed(mutations)), list(slots)
    running: list[Slot] = []
    while waiting or running:
        while waiting and free:
            slot = free.pop()
            mutation = waiting.pop()
            slot.start(mutation, mutation.tests)
            running.append(slot)
        time.sleep(0.02)
        for slot in list(running):
            outcome = slot.poll(limit)
            if outcome is not None:
                running.remove(slot)
                free.append(slot)
                assert slot.mutation is not None
                yield slot.mutation, outcome


def run(mutations: Sequence[Mutation], jobs: int, limit: float) -> dict[str, Any]:
    """Test mutations and print a line for each.

    Returns the counts.

    Raises:
        StaleError: a test fails without any mutation, or the tests of a mutation could not be run.
    """
    for name in LIBRARIES:
        importlib.import_module(name)
    if any(name.partition(".")[0] in OURS for name in sys.modules):
        raise StaleError("a module of the project was imported before the fork: its mutations would not be seen")
    started = time.monotonic()
    tests = list(dict.fromkeys(test for mutation in mutations for test in mutation.tests))
    counts: dict[str, Any] = dict.fromkeys(("mutations", "killed", "survived", "equivalent", "timed_out"), 0)
    survivors = []
    with tempfile.TemporaryDirectory(prefix="camenn-mutate-") as directory:
        slots = [Slot(Path(directory) / f"slot-{number}") for number in range(jobs)]
        slots[0].start(None, tests)
        while (plain := slots[0].poll(1_800)) is None:
            time.sleep(0.02)
        if plain.kind != "passed":
            raise StaleError(
                f"without any mutation the tests {plain.kind} ({plain.first_failed}):\n{plain.output[-4000:]}"
            )
        print(f"{'':10} {plain.seconds:6.1f} s  all tests that are used, without a mutation", flush=True)
        for mutation, outcome in judge_all(slots, mutations, limit):
            if outcome.kind == "no result":
                raise StaleError(f"{mutation.id}: its tests could not be run:\n{outcome.output[-4000:]}")
            result = {"passed": "survived", "failed": "killed", "timed out": "timed_out"}[outcome.kind]
            if mutation.equivalent and result == "survived":
                result = "equivalent"
            counts["mutations"] += 1
            counts[result] += 1
            if result == "survived":
                survivors.append(mutation.id)
            note = {
                "killed": outcome.first_failed,
                "survived": f"{mutation.file}: {mutation.new!r}",
                "equivalent": mutation.equivalent,
                "timed_out": f"longer than {limit:.0f} s",
            }[result]
            if mutation.equivalent and result == "killed":
                note += f" (but it is marked as equivalent: {mutation.equivalent})"
            print(f"{result:10} {outcome.seconds:6.1f} s  {mutation.id}  {note}", flush=True)
    judged = counts["mutations"] - counts["equivalent"]
    caught = counts["killed"] + counts["timed_out"]
    return counts | {
        "caught_share": round(caught / judged, 4) if judged else 1.0,
        "survivors": survivors,
        "test_seconds": round(plain.seconds, 1),
        "seconds": round(time.monotonic() - started, 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code.

    The code is 1 where a mutation survived, 2 where the list does not fit the tree.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the mutations and run nothing")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="ids to run, as in 'metrics-*'")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutations at a time (default: cores)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for the tests of one mutation")
    given = parser.parse_args(argv)
    chosen = [mutation for mutation in MUTATIONS if fnmatch.fnmatch(mutation.id, given.only)]
    if given.list:
        for mutation in chosen:
            note = "  equivalent" if mutation.equivalent else ""
            print(f"{mutation.id}  {mutation.file}  {len(mutation.tests)} tests{note}")
        print(json.dumps({"mutations": len(chosen)}))
        return 0
    faults = find_stale(MUTATIONS) or ([] if chosen else [f"--only {given.only}: no mutation has such an id"])
    if faults:
        print("\n".join(faults), file=sys.stderr)
        print(json.dumps({"stale": len(faults)}))
        return 2
    os.environ |= QUIET
    try:
        counts = run(chosen, max(1, given.jobs), given.timeout)
    except StaleError as error:
        print(error, file=sys.stderr)
        print(json.dumps({"stale": 1}))
        return 2
    print(json.dumps(counts))
    return int(counts["survived"] > 0)


if __name__ == "__main__":
    sys.exit(main())
