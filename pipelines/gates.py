"""What a night's scores are held against before readers see them: the nights that were published before."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.distribution import EDGES, decile_shares, population_stability_index

if TYPE_CHECKING:
    from camenn_model.challenge import Calibration

NIGHTS = 7
LEAST_COVERAGE = 0.98
MOST_MEAN_CHANGE = 0.20
MOST_PSI = 0.2
MOST_OFF = 0.20
"""How far predicted over observed orders may be from 1 on the latest closed days, beyond two standard errors: as much as the mean CVR may move."""


class HeldBack(Exception):
    """A run is finished and whole, and its gates failed: readers keep what was published before."""


@dataclass(frozen=True, kw_only=True)
class Night:
    """What is kept of a night's scores, to hold later ones against."""

    listings: int
    audience_rows: int
    rows: int
    mean_cvr: float
    histogram: tuple[tuple[int, int], ...]
    """(bin, count) of `pipelines.distribution.histogram`, where there are any"""
    model: str = ""
    """Version of the model that scored it"""

    def shares(self) -> np.ndarray:
        """The histogram as shares, float64 [bins]."""
        found = np.zeros(len(EDGES) + 1)
        for place, count in self.histogram:
            found[place] = count
        return found / max(found.sum(), 1)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Night":
        """The night that `asdict` gave."""
        return cls(**(value | {"histogram": tuple((int(place), int(count)) for place, count in value["histogram"])}))


@dataclass(frozen=True)
class Gate:
    """One comparison. `words`: what was found, and what was allowed."""

    name: str
    passed: bool
    words: str

    def to_json(self) -> dict[str, Any]:
        """As a manifest keeps it."""
        return asdict(self)


def check_night(now: Night, before: Sequence[Night], calibration: "Calibration | None" = None) -> list[Gate]:
    """Tonight against the median of up to seven published nights; none on the first night.

    Coverage: listings and audience rows, each at least 0.98 of the median. Of the nights that the same model scored: mean CVR, within 20 % of the median; PSI over the
    deciles of the bin-wise median of their distributions, at most 0.2. `calibration`: predicted over observed orders on the latest closed days, within 20 % of 1 beyond what chance
    explains. On a new model's first night it is the only figure of its scores: another model's distribution is another one, and says nothing of faults.
    """
    before = before[-NIGHTS:]
    if not before:
        return []
    of = _median_of(before)
    gates = []
    for name, counted in (("listings", "listings"), ("audience_rows", "audience rows")):
        usual = statistics.median(getattr(night, name) for night in before)
        share = getattr(now, name) / usual if usual else 1.0
        words = f"{getattr(now, name):,} {counted} are {share:.3f} of {of}; at least {LEAST_COVERAGE} are due"
        gates.append(Gate(f"coverage_{name}", share >= LEAST_COVERAGE, words))
    if calibration is not None:
        words = f"{calibration.words()}; {MOST_OFF:.0%} from 1 beyond two standard errors are allowed"
        gates.append(Gate("calibration", calibration.off_by() <= MOST_OFF, words))
    alike = [night for night in before if night.model == now.model]
    if not alike:
        return gates
    of = f"{_median_of(alike)}{' by this model' if len(alike) < len(before) else ''}"
    usual = statistics.median(night.mean_cvr for night in alike)
    change = now.mean_cvr / usual - 1 if usual else 0.0
    words = f"mean CVR {now.mean_cvr:.4f} is {change:+.1%} against {of}; {MOST_MEAN_CHANGE:.0%} are allowed"
    gates.append(Gate("mean_cvr", abs(change) <= MOST_MEAN_CHANGE, words))
    shares = np.stack([night.shares() for night in alike])
    expected = np.median(shares, axis=0)
    if not expected.any():
        # Nights that share no bin have no median.
        expected = shares.mean(axis=0)
    psi = population_stability_index(decile_shares(now.shares(), expected), decile_shares(expected, expected))
    words = f"the distribution of CVR has a PSI of {psi:.3f} against {of}; {MOST_PSI} is allowed"
    gates.append(Gate("psi", psi <= MOST_PSI, words))
    return gates


def _median_of(nights: Sequence[Night]) -> str:
    return f"the median of {len(nights)} published nights" if len(nights) > 1 else "the night published last"
