"""Data-parallel training by several processes.

`camenn train --processes` or torchrun start them. Each computes its share of every step, and sums
are taken over all.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

WAIT = timedelta(hours=2)
"""Time that a process waits for another: the first one alone writes checkpoints and evaluates the split parts."""

MEETING = "CAMENN_MEETING"
"""Environment variable: file over which the processes of one machine find each other.

Without it they use torchrun's rendezvous.
"""


@dataclass(frozen=True)
class Processes:
    """This process's place among those that train one model."""

    rank: int = 0
    count: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Return whether this process writes the outputs."""
        return self.rank == 0

    def sums(self, values: Sequence[float]) -> list[float]:
        """Sum element by element over all processes, in float64.

        The result is the same on each.
        """
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def copy_from_first(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite tensors with those of the first process."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)


def started_processes() -> tuple[int, int]:
    """Read (rank, number of processes) from the environment.

    The variables have torchrun's names. Without them it is (0, 1).
    """
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def processes_here() -> int:
    """Return the number of processes started on this machine.

    It is 1 where the environment does not set it.
    """
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def join_processes(device: str) -> Iterator[Processes]:
    """Meet the other processes, if any were started.

    They meet over nccl on GPUs (one for each process), over gloo on CPUs.
    """
    rank, count = started_processes()
    if device == "cuda" and count > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if count == 1:
        yield Processes(device=device)
        return
    if device != "cpu":
        torch.cuda.set_device(device)
    meeting = os.environ.get(MEETING)
    place = f"file://{meeting}" if meeting else "env://"
    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, init_method=place, timeout=WAIT, rank=rank, world_size=count)
    try:
        yield Processes(rank, count, device)
    finally:
        dist.destroy_process_group()
