"""Kill commands between two system calls, and cut the power.

Readers must see the old run or the new one, whole.

    python -m tests.support.kill_lab --work WORK --data DATA --points 20 [--only publish,score] [--json]

A command runs in a forked child, in which every call that changes a file is counted: open for
writing, write, close, fsync, rename, link, remove, mkdir, rmdir. First it runs to its end to count them,
then once for each chosen point, at which the child is killed by SIGKILL before that call. The disk
is examined in four states: as it is, without the names that no fsync of their directory has made
durable, with those names but without the bytes that no fsync of the file has made durable, and with
a half of those names, drawn at random, and without the bytes. WORK is copied for each point, never
changed. `--within publish` counts only calls inside of the publication.
"""

import argparse
import builtins
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from camenn_model.integrity import DamagedError
from pipelines import cli
from pipelines.runs import manifest, publication
from pipelines.runs.manifest import read_latest
from pipelines.runs.publication import check_whole


class Shim:
    """Counts, records and at one of them stops all calls of this process that change files below a directory.

    Args:
        root: of the files that count.
        log: receives one JSON line a call.
        stop: number of the call before which the process is killed; 0 = never.
        within: whether only calls inside of a publication count.
    """

    def __init__(self, root: Path, log: Path, stop: int, within: bool) -> None:
        self.root, self.stop, self.within = str(root), stop, within
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.count = 0
        self.inside = not within

    def step(self, call: str, *paths: str) -> None:
        """Count one call that is about to be made, and record it."""
        if not any(path.startswith(self.root) for path in paths):
            return
        if self.inside:
            self.count += 1
            if self.count == self.stop:
                os.kill(os.getpid(), signal.SIGKILL)
        os.write(self.log, json.dumps([call, *paths, self.inside]).encode() + b"\n")

    def install(self) -> None:
        """Put this in the place of the calls."""
        for name in ("replace", "rename"):
            self._wrap(os, name, lambda a, b: self.step("rename", _text(a), _text(b)))
        self._wrap(os, "link", lambda a, b: self.step("link", _text(a), _text(b)))
        for name in ("remove", "unlink"):
            self._wrap(os, name, lambda a, **_: self.step("remove", _text(a)))
        self._wrap(os, "rmdir", lambda a, **_: self.step("rmdir", _text(a)))
        self._wrap(os, "mkdir", self._mkdir)
        self._wrap(os, "fsync", lambda fd: self.step("fsync", os.readlink(f"/proc/self/fd/{fd}")))
        opened = builtins.open

        def open_counted(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            counts = isinstance(file, str | os.PathLike) and set(mode) & set("wax+")
            if counts:
                self.step("open", _text(file), mode)
            handle = opened(file, mode, *args, **kwargs)
            return _Counted(handle, self, _text(file)) if counts and "b" in mode else handle

        builtins.open = open_counted
        if self.within:
            for module, name in ((manifest, "write_manifest"), (publication, "point_to")):
                self._around(module, name)

    def _mkdir(self, path: Any, *_: Any, **__: Any) -> None:
        if not os.path.isdir(path):
            self.step("mkdir", _text(path))

    def _wrap(self, module: Any, name: str, before: Callable[..., None]) -> None:
        real = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            before(*args, **kwargs)
            return real(*args, **kwargs)

        setattr(module, name, call)

    def _around(self, module: Any, name: str) -> None:
        real = getattr(module, name)

        def inside(*args: Any, **kwargs: Any) -> Any:
            self.inside = True
            try:
                return real(*args, **kwargs)
            finally:
                self.inside = False

        ours = [found for module_name, found in sys.modules.items() if module_name.startswith("pipelines.")]
        for user in ours:
            if getattr(user, name, None) is real:
                setattr(user, name, inside)


class _Counted:
    """A binary file whose writes are counted."""

    def __init__(self, handle: IO[bytes], shim: Shim, path: str) -> None:
        self._handle, self._shim, self._path = handle, shim, path

    def write(self, data: Any) -> int:
        self._shim.step("write", self._path)
        count = self._handle.write(data)
        # So that what was written before a kill is in the file.
        self._handle.flush()
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def __enter__(self) -> "_Counted":
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.close()


def _text(path: Any) -> str:
    return os.path.abspath(os.fspath(path)) if isinstance(path, str | os.PathLike) else ""


@dataclass
class Loss:
    """The possible losses in a power cut, after the calls of a killed process."""

    unsynced: set[str] = field(default_factory=set)
    """Files whose bytes may be gone"""
    names: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Path → (what was done to its name, its directory), where the directory was not synced since"""

    @classmethod
    def of(cls, log: Path) -> "Loss":
        """Build from the recorded calls."""
        loss = cls()
        for line in log.read_text().splitlines():
            call, *paths, _ = json.loads(line)
            path = paths[0]
            if call in ("open", "write"):
                loss.unsynced.add(path)
                loss.names.setdefault(path, ("new", os.path.dirname(path)))
            elif call == "fsync":
                loss.unsynced.discard(path)
                loss.names = {name: done for name, done in loss.names.items() if done[1] != path}
            elif call == "rename":
                if path in loss.unsynced:
                    loss.unsynced.discard(path)
                    loss.unsynced.add(paths[1])
                loss.names.pop(path, None)
                loss.names[paths[1]] = ("new", os.path.dirname(paths[1]))
            elif call == "link":
                if path in loss.unsynced:
                    loss.unsynced.add(paths[1])
                loss.names[paths[1]] = ("new", os.path.dirname(paths[1]))
            elif call in ("remove", "rmdir"):
                loss.unsynced.discard(path)
                loss.names[path] = ("removed", os.path.dirname(path))
            elif call == "mkdir":
                loss.names[path] = ("new", os.path.dirname(path))
        return loss

    def lose_names(self, now: Path, before: Path, share: float, seed: int) -> None:
        """Undo in `now` the changes of names, or of a share of them; the files that they named are in `before`."""
        draw = random.Random(seed)
        for path, (done, _) in sorted(self.names.items(), reverse=True):
            if draw.random() >= share:
                continue
            there, old = Path(path), before / Path(path).relative_to(now)
            if done == "new" and there.is_dir():
                shutil.rmtree(there, ignore_errors=True)
            elif done == "new":
                there.unlink(missing_ok=True)
            if old.is_file():
                there.parent.mkdir(parents=True, exist_ok=True)
                there.unlink(missing_ok=True)
                os.link(old, there)

    def lose_bytes(self) -> None:
        """Empty the files whose bytes were not made durable."""
        for path in self.unsynced:
            if os.path.exists(path):
                # Not in place: other copies of the directory share the file.
                os.remove(path)
                Path(path).touch()


def seen(out: Path) -> str:
    """The readers' view of an output: the published run, whole; for a report its length."""
    if (out / "index.html").exists():
        page = (out / "index.html").read_bytes()
        assert page.rstrip().endswith(b"</html>"), f"{len(page)} bytes of a page"
        return f"page of {len(page)}"
    latest = read_latest(str(out))
    if latest is None:
        return "nothing"
    check_whole(str(out), latest)
    return latest.run


@dataclass(frozen=True)
class Command:
    """A command to be killed: its arguments in a copy of WORK at `root`, and where readers look."""

    argv: Callable[[Path, Path], list[str]]
    out: str


def commands() -> dict[str, Command]:
    """The commands that publish, or change the published run."""

    def stage(name: str, out: str, *inputs: str) -> Command:
        def argv(data: Path, work: Path) -> list[str]:
            given = [] if name == "train" else ["--data", str(data)]
            places = [word for folder in inputs for word in (f"--{folder}", str(work / folder))]
            return [name, *given, *places, "--out", str(work / out), "--rerun", "--json"]

        return Command(argv, out)

    def first_run(work: Path) -> str:
        return str(min((work / "scores" / "runs").glob("*/manifest.json")).parent)

    return {
        "shards": stage("shards", "shards", "store"),
        "score": stage("score", "scores", "store", "model"),
        "publish": Command(lambda _, work: ["publish", first_run(work)], "scores"),
        "rollback": Command(lambda _, work: ["rollback", "--out", str(work / "scores")], "scores"),
        "gc": Command(lambda _, work: ["gc", "--out", str(work / "scores"), "--keep", "1"], "scores"),
        "report": Command(lambda _, work: ["report", "--run", str(work)], "report"),
    }


def run_child(argv: list[str], shim: Callable[[], Shim]) -> int:
    """Run a command in a forked child; returns its exit code, or minus the signal."""
    pid = os.fork()
    if pid == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        code = 99
        try:
            shim().install()
            code = cli.main(argv)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def copy_tree(source: Path, target: Path) -> None:
    """Copy a directory's names: files are never changed in place, but replaced."""
    shutil.copytree(source, target, symlinks=True, copy_function=os.link)


def try_points(
    name: str, command: Command, data: Path, work: Path, points: int, within: bool, scratch: Path
) -> Iterator[dict[str, Any]]:
    """Kill a command at some points, spread evenly over all that it has; yields the readers' view after each."""

    def prepare(log: str) -> tuple[Path, Path]:
        root = scratch / "work"
        shutil.rmtree(root, ignore_errors=True)
        copy_tree(work, root)
        (scratch / log).unlink(missing_ok=True)
        return root, scratch / log

    root, log = prepare("whole")
    old = seen(root / command.out)
    code = run_child(command.argv(data, root), lambda: Shim(root, log, 0, within))
    assert code == 0, f"{name} ended with exit code {code}"
    total = sum(json.loads(line)[-1] for line in log.read_text().splitlines())
    new = seen(root / command.out)

    def tell(found: str) -> str:
        """Name the readers' view. A stage's run, or a page, differs each time that the command runs."""
        if found in (old, new):
            return "old" if found == old else "new"
        fresh = found != "nothing" and not (work / command.out / "runs" / found).exists()
        return "new" if fresh and name in ("shards", "score", "report") else f"BROKEN: {found} is published"

    step = max(1.0, total / points)
    chosen = sorted({1 + int(number * step) for number in range(min(points, total))})
    for point in chosen:
        root, log = prepare("killed")
        code = run_child(command.argv(data, root), partial(Shim, root, log, point, within))
        assert code == -signal.SIGKILL, f"{name} at {point}: exit code {code}"
        killed = scratch / "kept"
        shutil.rmtree(killed, ignore_errors=True)
        copy_tree(root, killed)
        for cut in ("kill", "names lost", "bytes lost", "half lost"):
            if cut != "kill":
                shutil.rmtree(root)
                copy_tree(killed, root)
                loss = Loss.of(log) if log.exists() else Loss()
                if cut != "bytes lost":
                    loss.lose_names(root, work, 1.0 if cut == "names lost" else 0.5, point)
                if cut != "names lost":
                    loss.lose_bytes()
            try:
                found = seen(root / command.out)
                state = tell(found)
            except (DamagedError, AssertionError, OSError, ValueError, TypeError, KeyError) as error:
                state = f"BROKEN: {type(error).__name__}: {error}"
            yield {"command": name, "point": point, "of": total, "cut": cut, "state": state}


def main(argv: list[str] | None = None) -> int:
    """Parse, kill, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="with store, shards, model, scores (two runs), report")
    parser.add_argument("--points", type=int, default=20, help="for each command")
    parser.add_argument("--only", default="", help="commands, comma separated")
    parser.add_argument("--within", choices=("all", "publish"), default="all")
    arguments = parser.parse_args(argv)
    chosen = [name for name in arguments.only.split(",") if name] or list(commands())
    for module in ("torch", "matplotlib.pyplot", "camenn_model.package", "camenn_model.scoring.scorer", *MODULES):
        importlib.import_module(module)
    tallies: dict[str, dict[str, int]] = {}
    broken = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in chosen:
            tally = tallies.setdefault(name, {"points": 0, "old": 0, "new": 0, "broken": 0})
            places = (arguments.data, arguments.work, arguments.points, arguments.within == "publish", Path(scratch))
            for found in try_points(name, commands()[name], *places):
                tally["points"] += found["cut"] == "kill"
                key = found["state"] if found["state"] in ("old", "new") else "broken"
                tally[key] += 1
                if key == "broken":
                    broken.append(found)
            print(f"{name}: {tally}", file=sys.stderr, flush=True)
    print(json.dumps({"tallies": tallies, "broken": broken}))
    return 1 if broken else 0


MODULES = tuple(module for module, _ in cli.COMMANDS.values() if module.startswith("pipelines."))


if __name__ == "__main__":
    sys.exit(main())
