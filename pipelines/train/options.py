"""Options of the train stage."""

import math
from dataclasses import dataclass
from typing import Literal

from camenn_model.config import BATCH_SIZES, DEFAULT_PROFILE
from schemas.errors import InputError

STAGE = "train"


@dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """One training run, as its flags describe it.

    `camenn_model.training.corpus.TrainOptions` is its resolved form on a machine.
    """

    shards: str
    out: str
    profile: str = DEFAULT_PROFILE
    attention: Literal["prefix", "full"] = "prefix"
    epochs: int = 1
    batch_size: int = 0
    micro_batches: int = 0
    processes: int = 1
    by_store: bool = False
    learning_rate: float = 1e-3
    weighting: Literal["fixed", "uncertainty"] = "fixed"
    no_alignment: bool = False
    seed: int = 0
    device: str = "auto"
    precision: str = "fp32"
    threads: int = 0
    workers: int = 0
    challenge: bool = False
    rerun: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("epochs", 1),
            ("processes", 1),
            ("micro_batches", 0),
            ("threads", 0),
            ("workers", 0),
        ):
            if getattr(self, name) < least:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least {least}.")
        if self.batch_size < 0 or self.batch_size == 1:
            raise InputError(
                f"--batch_size {self.batch_size}: must be at least 2, or 0 for the size that fits the log."
            )
        if not self.learning_rate > 0 or math.isinf(self.learning_rate):
            raise InputError(f"--learning_rate {self.learning_rate}: must be a number above 0, such as 0.001.")
        least = self.batch_size or BATCH_SIZES[0]
        if self.micro_batches > least:
            raise InputError(
                f"--micro_batches {self.micro_batches}: a batch of {least} examples "
                "cannot be cut into so many. Give fewer, or a larger --batch_size."
            )
