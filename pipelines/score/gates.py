"""Gates that a night passes before readers see it.

A night is compared with nights published before, and with limits that hold on any night.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from camenn_model.evaluation.distribution import EDGES, decile_shares, histogram, population_stability_index
from pipelines.io import files
from pipelines.runs.gate import LEAST_ROWS, MOST_PSI, NEARLY_NONE, Gate
from pipelines.runs.manifest import Manifest
from schemas.errors import InputError

if TYPE_CHECKING:
    from camenn_model.evaluation.challenge import Calibration


NIGHTS = 7
LEAST_COVERAGE = 0.98
"""Least share of the median that a night must reach in listings, audience rows and the pairs of both that meet."""
MOST_RECODED = 0.02
"""Ids that join after a change of form are the same ids: a share of them above the share of
listings that may be missing is not chance."""
OPTIONAL_TABLES = ("audience", "candidates", "users", "stores")
MOST_MEAN_CHANGE = 0.20
MOST_OFF = 0.20
"""How far predicted over observed orders may be from 1 on the latest closed days, beyond two standard errors: as much
as the mean CVR may move."""


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """The share of tonight's input found where it belongs.

    The share is `found` of `asked`.
    """

    name: str
    """The gate's name, under which later nights look it up"""
    found: int
    asked: int
    counted: str
    """The finding in words, as in '12 of 12 audience rows meet a listing'"""
    least: float
    """Least share of the usual number"""
    recoded: int = 0
    """Further rows that would be found if both sides wrote their ids the same way"""
    most_recoded: float = 1.0
    """Share of `asked` that may be recoded, beyond what is usual"""
    lacking: str = ""
    """The rows not found, an example of both sides, and a remedy"""
    by_share: bool = False
    """Compare the ratio of found to asked, as the number asked varies from night to night"""
    chance: bool = False
    """The rows are a sample that differs each night: a tolerance of two standard errors is allowed"""
    plausible: bool = False
    """True where nearly none found is a fault on a first night, too"""

    @property
    def nearly_none(self) -> bool:
        """Return whether nearly none of the requested rows was found."""
        return self.found < NEARLY_NONE * self.asked

    def counts(self) -> tuple[int, int, int]:
        """Return the counts in the form that a night stores."""
        return self.found, self.asked, self.recoded


@dataclass(frozen=True, kw_only=True)
class Night:
    """The figures of a night that later nights compare with."""

    listings: int
    audience_rows: int
    rows: int
    mean_cvr: float
    histogram: tuple[tuple[int, int], ...]
    """(bin, count) of `camenn_model.evaluation.distribution.histogram`, where there are any"""
    model: str = ""
    """Version of the model that scored it"""
    coverage: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """(found, asked, recoded) of each `Coverage` by name. Nights written by an earlier camenn have none"""
    tables: tuple[str, ...] = ()
    """Optional tables that were read"""
    overridden: tuple[str, ...] = ()
    """Gates that had failed when the night was published by force"""

    def shares(self) -> np.ndarray:
        """Return the histogram as shares, float64 [bins]."""
        found = np.zeros(len(EDGES) + 1)
        for place, count in self.histogram:
            found[place] = count
        return found / max(found.sum(), 1)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Night":
        """Return the night from its `asdict`.

        This camenn or an earlier one may have written it.
        """
        read = {
            "histogram": tuple((int(place), int(count)) for place, count in value["histogram"]),
            "coverage": {name: tuple(counts) for name, counts in value.get("coverage", {}).items()},
            "tables": tuple(value.get("tables", ())),
            "overridden": tuple(value.get("overridden", ())),
        }
        return cls(**(value | read))

    @classmethod
    def of_manifest(cls, manifest: "Manifest") -> "Night | None":
        """Return the night of a published run.

        The result is None where its camenn recorded none.
        """
        if "night" not in manifest.options:
            return None
        # A run that is published although a gate had failed was forced.
        overridden = [gate["name"] for gate in manifest.gates if not gate["passed"]]
        tables = [name for name in OPTIONAL_TABLES if name in manifest.inputs]
        return cls.from_json(manifest.options["night"] | {"tables": tables, "overridden": overridden})


def check_night(
    now: Night,
    before: Sequence[Night],
    calibration: "Calibration | None" = None,
    coverage: Sequence[Coverage] = (),
) -> list[Gate]:
    """Compare tonight with up to seven published nights.

    Tonight is compared with their median.

    - Listings and audience rows: each at least 0.98 of the median.
    - Optional tables: those that most nights had.
    - `coverage`: each at least its `least` of the median of the nights that have it, and ids that
      differ in form only not above the usual share. Where no night has it, nearly none found is a
      fault where `plausible` is set.
    - Against the nights that the same model scored: mean CVR, within 20 % of the median, and PSI
      over the deciles of the bin-wise median of their distributions, at most 0.2.
    - `calibration`: predicted over observed orders on the latest closed days, within 20 % of 1
      beyond what chance explains.

    On a new model's first night only `calibration` checks its scores: another model's distribution
    differs without any fault. The first night is checked by `coverage` alone.

    Where a night was published by force although a gate had failed, that gate ignores all earlier
    nights: the forced night defines what is usual from then on.
    """
    before = before[-NIGHTS:]
    gates = [gate for one in coverage for gate in _check_coverage(one, _since_forced(before, one.name))]
    if not before:
        return gates
    counts = []
    for name, counted in (("listings", "listings"), ("audience_rows", "audience rows")):
        nights = _since_forced(before, f"coverage_{name}")
        usual, of = _usual([getattr(night, name) for night in nights])
        share = getattr(now, name) / usual if usual else 1.0
        words = f"{getattr(now, name):,} {counted} are {share:.3f} of {of}; at least {LEAST_COVERAGE} are due"
        counts.append(Gate(f"coverage_{name}", share >= LEAST_COVERAGE, words))
    gates = [*counts, *_check_tables(now, _since_forced(before, "tables")), *gates]
    if calibration is not None:
        words = f"{calibration.words()}; {MOST_OFF:.0%} from 1 beyond two standard errors are allowed"
        gates.append(Gate("calibration", calibration.off_by() <= MOST_OFF, words))
    alike = [night for night in before if night.model == now.model]
    if not alike:
        return gates

    def by_model(nights: Sequence[Night]) -> str:
        return f"{_median_of(len(nights))}{' by this model' if len(alike) < len(before) else ''}"

    nights = _since_forced(alike, "mean_cvr")
    usual = statistics.median(night.mean_cvr for night in nights)
    change = now.mean_cvr / usual - 1 if usual else 0.0
    words = (
        f"mean CVR {now.mean_cvr:.4f} is {change:+.1%} against {by_model(nights)}; {MOST_MEAN_CHANGE:.0%} are allowed"
    )
    gates.append(Gate("mean_cvr", abs(change) <= MOST_MEAN_CHANGE, words))
    nights = _since_forced(alike, "psi")
    shares = np.stack([night.shares() for night in nights])
    expected = np.median(shares, axis=0)
    if not expected.any():
        # Nights that share no bin have no median.
        expected = shares.mean(axis=0)
    psi = population_stability_index(decile_shares(now.shares(), expected), decile_shares(expected, expected))
    words = f"the distribution of CVR has a PSI of {psi:.3f} against {by_model(nights)}; {MOST_PSI} is allowed"
    gates.append(Gate("psi", psi <= MOST_PSI, words))
    return gates


def _check_coverage(now: Coverage, before: Sequence[Night]) -> list[Gate]:
    nights = [night.coverage[now.name] for night in before if now.name in night.coverage]
    if not now.asked and not any(found for found, _, _ in nights):
        return []
    words = f"{now.found:,} of {now.asked:,} {now.counted}"
    passed = True
    recoded = 0.0
    if nights:
        recoded = statistics.median(found[2] / max(found[1], 1) for found in nights)
        shares = [found / max(asked, 1) for found, asked, _ in nights]
        usual, of = _usual(shares if now.by_share else [found for found, _, _ in nights])
        here = now.found / max(now.asked, 1) if now.by_share else now.found
        spread = 2 * math.sqrt(usual * (1 - statistics.median(shares))) if now.chance else 0.0
        share = here / usual if usual else 1.0
        passed = here >= now.least * usual - spread
        words += f", {share:.3f} of {of}; at least {now.least} are due{' beyond two standard errors' if spread else ''}"
    elif now.plausible and now.asked >= LEAST_ROWS and now.nearly_none:
        passed = False
        words += f"; nothing was published before, and less than {NEARLY_NONE:.0%} are no ordinary night"
    if now.recoded > (now.most_recoded + recoded) * now.asked:
        passed = False
    if not passed and now.lacking:
        words += f"; {now.lacking}"
    return [Gate(now.name, passed, words)]


def _check_tables(now: Night, before: Sequence[Night]) -> list[Gate]:
    usual = [name for name in OPTIONAL_TABLES if 2 * sum(name in night.tables for night in before) > len(before)]
    lost = [name for name in usual if name not in now.tables]
    if not usual:
        return []
    named = ", ".join(f"'{name}'" for name in lost or usual)
    if not lost:
        return [Gate("tables", True, f"optional tables are read as before: {named}")]
    often = f"most of {_nights(len(before))}" if len(before) > 1 else _nights(1)
    words = (
        f"table {named} is not read tonight, but was in {often}: put it back into --data, or leave out the flag "
        "that passes it over"
    )
    return [Gate("tables", False, words)]


def _usual(values: Sequence[float]) -> tuple[float, str]:
    """Return the median of some nights' values, and its name.

    The latest value stands last.

    Where most nights had none, the latest night alone is the reference.
    """
    median = statistics.median(values)
    return (median, _median_of(len(values))) if median else (values[-1], _median_of(1))


def _since_forced(before: Sequence[Night], gate: str) -> Sequence[Night]:
    """Return the nights since one was forced through `gate`.

    They begin with the latest night that was published although `gate` had failed. Where there is
    none, all nights are returned.
    """
    forced = [place for place, night in enumerate(before) if gate in night.overridden]
    return before[forced[-1] :] if forced else before


def _median_of(nights: int) -> str:
    return f"the median of {_nights(nights)}" if nights > 1 else _nights(nights)


def _nights(count: int) -> str:
    return f"{count} published nights" if count > 1 else "the night published last"


def check_scores(cvr_range: tuple[float, float] | None, rows: int, expected_rows: int) -> None:
    """Check the first night's gates.

    Something was scored, every audience row has an answer, and all values are probabilities.

    Raises:
        InputError: a gate failed. Nothing is published.
    """
    if rows == 0 or cvr_range is None:
        raise InputError(
            "score: no pair was scored: no audience row meets any listing. Check store_id in catalog and "
            "audience. Nothing was published."
        )
    low, high = cvr_range
    if not (0.0 <= low <= high <= 1.0):
        raise InputError(
            f"score: cvr ranges from {low} to {high}: not probabilities. Nothing was published; train again."
        )
    if rows != expected_rows:
        raise RuntimeError(f"score: {rows} rows were written, {expected_rows} were due. Nothing was published.")


def score_statistics(paths: list[str]) -> dict[str, Any]:
    """Compute statistics of the written cvr column.

    They are mean, range and histogram, computed file by file. A null or NaN raises.
    """
    total, rows, low, high = 0.0, 0, np.inf, -np.inf
    counts = np.zeros(len(EDGES) + 1, dtype=np.int64)
    for path in paths:
        with files.open_read(path) as handle:
            cvr = pq.read_table(handle, columns=["cvr"])["cvr"].to_numpy()
        if not np.isfinite(cvr).all():
            raise InputError(f"{path}: cvr holds values that are not finite. Nothing was published; train again.")
        total, rows = total + float(cvr.sum(dtype=np.float64)), rows + len(cvr)
        low, high = min(low, float(cvr.min(initial=np.inf))), max(high, float(cvr.max(initial=-np.inf)))
        counts += histogram(cvr.astype(np.float64))
    return {"mean": total / rows if rows else 0.0, "range": (low, high) if rows else None, "histogram": counts}


def count_flag(paths: list[str], flag: str) -> int:
    """Count the listings that carry a flag."""
    count = 0
    for path in paths:
        with files.open_read(path) as handle:
            count += sum(flag in flags for flags in pq.read_table(handle, columns=["flags"])["flags"].to_pylist())
    return count
