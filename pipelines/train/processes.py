"""Train with several processes of one machine.

They meet over a file and loopback: torchrun's own ports listen on every interface.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from types import FrameType

from pipelines.runner.exit_codes import ExitCode, GatesFailed
from schemas.errors import InputError

COMMAND = (sys.executable, "-m", "pipelines.train.command")

_LOOK_EVERY_S = 0.1


def train_in_processes(count: int, argv: list[str]) -> None:
    """Run `camenn train` in several processes.

    `count` processes run with `argv` to their end. The first one prints the output of a single
    process.

    Raises:
        InputError, GatesFailed, RuntimeError: one of them ended so. It has printed why, and the
            others are ended.
    """
    # The processes import torch, not this one.
    from camenn_model.training.distributed import MEETING

    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    with tempfile.TemporaryDirectory(prefix="camenn-train-") as directory:
        shared = {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "GLOO_SOCKET_IFNAME": loopback,
            "NCCL_SOCKET_IFNAME": loopback,
            MEETING: os.path.join(directory, "meeting"),
        }
        started: list[subprocess.Popen[bytes]] = []
        before = signal.getsignal(signal.SIGTERM)
        if before is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _end)
        try:
            for rank in map(str, range(count)):
                own = {"RANK": rank, "LOCAL_RANK": rank}
                started.append(subprocess.Popen([*COMMAND, *argv], env={**os.environ, **shared, **own}))
            code = _wait(started)
        finally:
            if before is signal.SIG_DFL:
                signal.signal(signal.SIGTERM, before)
            for process in started:
                process.terminate()
            for process in started:
                process.wait()
    if code == ExitCode.INPUT_ERROR:
        raise InputError("a training process ended with the error above.")
    if code == ExitCode.GATED:
        raise GatesFailed("the trained model, for the reason that stands above")
    if code:
        raise RuntimeError(f"a training process ended with exit code {code}; see its message above")


def _wait(started: list[subprocess.Popen[bytes]]) -> int:
    """Wait for the processes to end.

    Returns the first exit code that is not 0, as soon as a process ends with one. It is 0 when all
    ended well.
    """
    while True:
        codes = [process.poll() for process in started]
        bad = [code for code in codes if code]
        if bad:
            return bad[0]
        if None not in codes:
            return 0
        time.sleep(_LOOK_EVERY_S)


def _end(number: int, frame: FrameType | None) -> None:
    # As after an unhandled signal: the other processes ended first.
    raise SystemExit(128 + number)
