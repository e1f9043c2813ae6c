"""A Flink cluster for the tests: `scripts/flink_local.sh` with ports and a directory of its own."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).parents[2]
SCRIPT = PROJECT / "scripts" / "flink_local.sh"
LACKING = 3
"""The script's exit code where the machine lacks Java or Maven, or the artifacts cannot be fetched."""


def free_port() -> int:
    """Find a port of loopback that nobody listens on now.

    It is low enough that the JobManager's, a thousand higher, is a port too.
    """
    for _ in range(100):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if port + 1001 < 65_536:
            return port
    raise RuntimeError("no free port")


class FlinkCluster:
    """One JobManager, two TaskManagers of two slots, and a worker pool."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.rest, self.pool = free_port(), free_port()
        self.environment = {
            **os.environ,
            "PYTHON": sys.executable,
            "FLINK_STATE": str(state),
            "FLINK_REST_PORT": str(self.rest),
            "FLINK_WORKER_PORT": str(self.pool),
        }

    def script(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(command), env=self.environment, capture_output=True, text=True, timeout=900, check=False
        )

    def command(self, command: str) -> list[str]:
        """The command line of the script."""
        return [str(SCRIPT), command]

    def up(self) -> None:
        """Start the missing processes; skips where the machine lacks the requirements."""
        answer = self.script("up")
        if answer.returncode == LACKING:
            pytest.skip(f"no Flink here: {answer.stderr.strip().splitlines()[-1]}")
        assert answer.returncode == 0, answer.stderr

    def flags(self, parallelism: int) -> list[str]:
        answer = self.script("flags")
        assert answer.returncode == 0, answer.stderr
        return [*answer.stdout.split(), f"--parallelism={parallelism}"]

    def process(self, name: str) -> int:
        return int((self.state / "pids" / name).read_text())

    def processes(self) -> list[int]:
        """All that `up` started: the JobManager, the TaskManagers and the pool."""
        return [int(path.read_text()) for path in (self.state / "pids").iterdir()]

    def workers(self) -> list[int]:
        """Process ids of the SDK workers that run now."""
        found = subprocess.run(
            ["pgrep", "-P", str(self.process("workers"))], capture_output=True, text=True, check=False
        )
        return [int(line) for line in found.stdout.split()]

    def ask(self, path: str) -> Any:
        """The JobManager's answer to GET /path."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://localhost:{self.rest}/{path}", timeout=20) as answer:
            return json.load(answer)

    def newest_job(self) -> dict[str, Any]:
        jobs = self.ask("jobs/overview")["jobs"]
        return max(jobs, key=lambda job: job["start-time"], default={})


class ElsewhereCluster(FlinkCluster):
    """The same in a mount namespace of its own, where some directories are empty and private.

    What it starts sees none of the submitter's files there, as if it ran on other machines.
    """

    def __init__(self, state: Path, hidden: list[Path]) -> None:
        super().__init__(state)
        self.hidden = hidden

    def command(self, command: str) -> list[str]:
        if command != "up":
            return super().command(command)
        mounts = [f"mount -t tmpfs -o size=2g none {shlex.quote(str(path))}" for path in self.hidden]
        script = " && ".join([*mounts, shlex.join(["exec", *super().command(command)])])
        return ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"]), "sh", "-ec", script]

    def up(self) -> None:
        """Start it; skips where this user may make no namespace."""
        tried = subprocess.run(
            ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"]), "true"],
            capture_output=True,
            text=True,
            check=False,
        )
        if tried.returncode:
            pytest.skip(f"no mount namespaces here: {tried.stderr.strip()}")
        super().up()


def wait_until(condition: Any, seconds: float, what: str) -> Any:
    """The first true answer of `condition()`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answer = condition()
        if answer:
            return answer
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds:g} s in vain for {what}")


def start_camenn(*argv: str) -> subprocess.Popen[str]:
    """A command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=PROJECT,
    )


def kill(process: int) -> None:
    """As the out-of-memory killer would."""
    os.kill(process, signal.SIGKILL)
