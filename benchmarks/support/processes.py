"""Commands in child processes, and their peak memory.

The memory is the peak of one command and of every process that worked for it (Linux, null
elsewhere). Many commands can be run that end with their parent.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

PROC = Path("/proc")
SAMPLE_S = 0.1
STANDING = {
    "StandaloneSessionClusterEntrypoint": "Flink JobManager",
    "TaskManagerRunner": "Flink TaskManager",
    "pipelines.runner.worker_pool": "worker pool",
}
"""Processes of a running cluster: a part of the command line, and the name under which they are reported."""


@dataclass(frozen=True)
class _Process:
    pid: int
    parent: int
    started: int
    """Clock ticks since the machine's start, which identify a reused id."""
    command: str


def _read(pid: int) -> _Process | None:
    try:
        # The name may hold spaces and brackets: what follows the last one is regular.
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        command = (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (OSError, IndexError):
        return None
    return _Process(pid, int(fields[1]), int(fields[19]), command)


def _processes() -> dict[int, _Process]:
    found = (_read(int(entry.name)) for entry in os.scandir(PROC) if entry.name.isdigit())
    return {process.pid: process for process in found if process is not None}


def _descendants(roots: set[int], processes: dict[int, _Process]) -> set[int]:
    found = set(roots)
    grown = True
    while grown:
        more = {process.pid for process in processes.values() if process.parent in found} - found
        grown = bool(more)
        found |= more
    return found


def _peak_mb(pid: int) -> float:
    """Return the most resident memory of a process so far.

    This is VmHWM in MB, 0 where the process has ended.
    """
    try:
        lines = (PROC / str(pid) / "status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), 0.0)


def _name(process: _Process, root: int) -> str:
    if process.pid == root:
        return "submitter"
    for part, name in STANDING.items():
        if part in process.command:
            return name
    if "sdk_worker" in process.command:
        return "worker"
    if "java" in process.command:
        return "job server"
    return "other"


@dataclass
class Watch:
    """Samples peaks until it is stopped."""

    root: int
    standing: bool
    """True where the processes of a running cluster count as well."""
    peaks: dict[tuple[int, int], tuple[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._before: set[tuple[int, int]] = set()
        if self.standing:
            processes = _processes()
            pools = {p.pid for p in processes.values() if any(part in p.command for part in STANDING)}
            for pid in pools:
                # A standing process starts with its present memory, not with its past peak.
                try:
                    (PROC / str(pid) / "clear_refs").write_text("5")
                except OSError:
                    continue
            # Workers of the cluster's earlier jobs are not this command's.
            self._before = {(pid, processes[pid].started) for pid in _descendants(pools, processes) - pools}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            processes = _processes()
            roots = {self.root}
            if self.standing:
                roots |= {p.pid for p in processes.values() if any(part in p.command for part in STANDING)}
            for pid in _descendants(roots, processes):
                process = processes.get(pid)
                # A shell that only waits for its command holds a megabyte or two: it is not reported.
                if process is None or (pid, process.started) in self._before or process.command.startswith("/bin/sh "):
                    continue
                key = (pid, process.started)
                peak = max(_peak_mb(pid), self.peaks.get(key, ("", 0.0))[1])
                if peak:
                    self.peaks[key] = (_name(process, self.root), peak)

    def stop(self) -> dict[str, float]:
        """Stop, and return the MB by process.

        Several of a kind are numbered, the largest first.
        """
        self._stop.set()
        self._thread.join()
        kinds: dict[str, list[float]] = {}
        for name, peak in self.peaks.values():
            kinds.setdefault(name, []).append(peak)
        found: dict[str, float] = {}
        for name, peaks in sorted(kinds.items()):
            for number, peak in enumerate(sorted(peaks, reverse=True), start=1):
                found[name if len(peaks) == 1 else f"{name} {number}"] = round(peak, 1)
        return found


def run_watched(command: list[str], *, standing: bool, timeout: float) -> tuple[str, dict[str, float] | None]:
    """Run a command to its end and watch its memory.

    Returns (its stdout, peak resident memory in MB of each process, or None without /proc).

    With `standing`, the processes of a running Flink cluster and its workers are counted too. The
    command is ended after `timeout` seconds.

    Raises:
        RuntimeError: it failed. The message has the end of what it printed.
    """
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
    )
    watch = Watch(child.pid, standing) if PROC.is_dir() and sys.platform.startswith("linux") else None
    began = time.monotonic()
    try:
        out, errors = child.communicate(timeout=timeout)
    except BaseException:
        child.kill()
        child.communicate()
        raise
    finally:
        peaks = watch.stop() if watch else None
    if child.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with {child.returncode} "
            f"after {time.monotonic() - began:.0f} s:\n{errors[-3000:]}"
        )
    return out, peaks


class Children:
    """Commands that do not outlive this process.

    SIGTERM ends it as Ctrl-C does, and leaving the context ends what still runs.

    Enter the context in the main thread. Any thread may run commands.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._ended = False

    def __enter__(self) -> Self:
        self._handler = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._handler)
        with self._lock:
            self._ended = True
            for child in self._running:
                child.terminate()

    def run(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
        """Run a command to its end and return its status.

        The exit status is -SIGTERM where the context was left before the command began.
        """
        with self._lock:
            if self._ended:
                return -signal.SIGTERM
            child = subprocess.Popen(command, env=environment)
            self._running.add(child)
        try:
            return child.wait()
        except BaseException:
            child.terminate()
            raise
        finally:
            with self._lock:
                self._running.remove(child)
