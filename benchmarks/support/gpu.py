"""The ceiling and the utilisation of one GPU."""

import shutil
import statistics
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

MATRIX = 8_192


def matrix_ceiling(repeats: int = 5) -> float:
    """Return the FLOP/s of a square bf16 matrix product.

    It is measured on this GPU, and the median of some is taken.
    """
    a, b = (torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found = []
    for turn in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(10):
            a @ b
        end.record()
        end.synchronize()
        if turn >= 2:
            found.append(10 * 2 * MATRIX**3 / (begin.elapsed_time(end) / 1000))
    return statistics.median(found)


@contextmanager
def watch_utilisation(samples: list[float]) -> Iterator[None]:
    """Collect the GPU's utilisation from nvidia-smi.

    It is the % of the time in which a kernel ran, five times a second. Nothing is collected where
    nvidia-smi is not installed.
    """
    if shutil.which("nvidia-smi") is None:
        yield
        return
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=200", "--id=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip().isdigit():
                samples.append(float(line))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield
    finally:
        process.terminate()
        process.wait()
        thread.join()
