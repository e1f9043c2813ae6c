"""Say what a machine of workers needs: downloads, disk, memory.

Each figure is a sum of named parts. Parts are computed from sizes that are known, apart from the
constants below.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.runner.beam import pipeline_options

IMAGE_GB = 7.0
"""Of the worker image, unpacked: CUDA's libraries are most of it (docs/guides/dataflow.md)"""
SYSTEM_GB = 18.0
"""For the system, packed layers of the image, and logs: with the image 25 GB, which Dataflow gives by default. Not
measured
"""
LIBRARIES_MB = {"embed": 950.0, "shards": 216.0, "score": 706.0}
"""Resident memory of a worker process after its imports, 10^6 bytes: measured on Linux, 2026-11-30"""


def threads_of(beam_flags: list[str]) -> int:
    """Return the threads of a worker process.

    It is 1 where the flags name none.
    """
    return int(pipeline_options(beam_flags).get_all_options()["number_of_worker_harness_threads"] or 1)


@dataclass(frozen=True, kw_only=True)
class MachineNeeds:
    """The downloads, disk and memory of a worker process.

    All are bytes.
    """

    stage: str
    threads: int
    kept: Mapping[str, float] = field(default_factory=dict)
    """Downloaded once and kept on disk"""
    streamed: Mapping[str, float] = field(default_factory=dict)
    """Downloaded, and not kept"""
    together: Mapping[str, float] = field(default_factory=dict)
    """Downloaded by one of all workers, and not kept"""
    in_image: float = 0
    """Part of the image beside the libraries"""
    held: Mapping[str, float] = field(default_factory=dict)
    """In memory once"""
    each_thread: Mapping[str, float] = field(default_factory=dict)
    """In memory for each thread"""
    lacks: str = ""
    """What of the memory is not known"""

    @property
    def disk_gb(self) -> int:
        """Return a size for `--disk_size_gb`."""
        return math.ceil(IMAGE_GB + SYSTEM_GB + (self.in_image + sum(self.kept.values())) / 1e9)

    def lines(self) -> dict[str, Any]:
        """Return the lines of a closing table, in 10^6 bytes."""
        downloads = {**self.kept, **self.streamed}
        disk = {"libraries": IMAGE_GB, "system": SYSTEM_GB}
        if self.in_image:
            disk["weights"] = _round(self.in_image / 1e9)
        if self.kept:
            disk["copies"] = _round(sum(self.kept.values()) / 1e9)
        memory = {"libraries": LIBRARIES_MB[self.stage]}
        memory |= {name: _round(size / 1e6) for name, size in self.held.items()}
        # Of each thread, times the threads.
        memory |= {name: _round(self.threads * size / 1e6) for name, size in self.each_thread.items()}
        total = f"sum_without_{self.lacks}" if self.lacks else "sum"
        return {
            "worker_downloads_megabytes": {name: _round(size / 1e6) for name, size in downloads.items()},
            "workers_together_download_megabytes": {name: _round(size / 1e6) for name, size in self.together.items()},
            "worker_disk_gigabytes": disk,
            "disk_size_gb": self.disk_gb,
            "worker_threads": self.threads,
            "worker_memory_megabytes": {**memory, total: _round(sum(memory.values()))},
        }


def _round(value: float) -> float:
    return round(value, 6)
