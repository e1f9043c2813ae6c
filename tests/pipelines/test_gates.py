"""The gates before publication: by hand, and over whole nights with the real stage (tests/test_end_to_end.py)."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from camenn_model.challenge import Calibration
from pipelines.distribution import decile_shares, histogram, population_stability_index
from pipelines.gates import Night, check_night


def make_night(seed: int = 0, shift: float = 0.0, **values: Any) -> Night:
    logits = np.random.default_rng(seed).normal(-2 + shift, 1, 20_000)
    cvr = 1 / (1 + np.exp(-logits))
    counts = histogram(cvr)
    night = Night(
        listings=1_000,
        audience_rows=60,
        rows=len(cvr),
        mean_cvr=float(cvr.mean()),
        histogram=tuple((int(place), int(counts[place])) for place in np.flatnonzero(counts)),
    )
    return dataclasses.replace(night, **values)


def failed(now: Night, before: list[Night]) -> set[str]:
    return {gate.name for gate in check_night(now, before) if not gate.passed}


def test_the_first_night_has_nothing_to_be_held_against() -> None:
    assert check_night(make_night(), []) == []


def test_nights_alike_pass() -> None:
    before = [make_night(seed) for seed in range(7)]
    gates = check_night(make_night(9), before)
    assert [gate.name for gate in gates] == ["coverage_listings", "coverage_audience_rows", "mean_cvr", "psi"]
    assert all(gate.passed for gate in gates)
    assert "the median of 7 published nights" in gates[0].words
    assert "the night published last" in check_night(make_night(9), before[:1])[0].words


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"listings": 980}, set()),
        ({"listings": 979}, {"coverage_listings"}),
        ({"audience_rows": 58}, {"coverage_audience_rows"}),
        ({"listings": 5_000}, set()),
    ],
)
def test_coverage(values: dict[str, Any], names: set[str]) -> None:
    assert failed(make_night(9, **values), [make_night(seed) for seed in range(7)]) == names


def test_one_odd_night_among_seven_moves_no_bar() -> None:
    before = [make_night(seed) for seed in range(6)] + [make_night(6, shift=3, listings=1)]
    assert failed(make_night(9), before) == set()


def test_only_the_last_seven_nights_count() -> None:
    before = [make_night(seed, shift=2) for seed in range(20)] + [make_night(seed) for seed in range(7)]
    assert failed(make_night(9), before) == set()


def test_mean_and_distribution() -> None:
    before = [make_night(seed) for seed in range(3)]
    assert failed(make_night(9, shift=0.1), before) == set()
    assert failed(make_night(9, shift=1.0), before) == {"mean_cvr", "psi"}
    # The same mean, but no longer spread: every listing gets the same score.
    flat = make_night(9)
    everything = histogram(np.full(flat.rows, flat.mean_cvr))
    flat = dataclasses.replace(flat, histogram=tuple((int(p), int(everything[p])) for p in np.flatnonzero(everything)))
    assert failed(flat, before) == {"psi"}


def test_psi_is_that_of_the_values_deciles() -> None:
    """Against PSI from the values themselves."""
    rng = np.random.default_rng(0)
    before, now = (1 / (1 + np.exp(-rng.normal(-2 + shift, 1, 50_000))) for shift in (0, 0.3))
    edges = np.quantile(before, np.linspace(0, 1, 11)[1:-1])
    p, q = (np.bincount(np.searchsorted(edges, v), minlength=10) / len(v) for v in (before, now))
    expected = float(np.sum((q - p) * np.log(q / p)))
    a, b = histogram(before), histogram(now)
    assert population_stability_index(decile_shares(b, a), decile_shares(a, a)) == pytest.approx(expected, rel=0.05)


def test_nights_survive_a_manifest() -> None:
    night = make_night()
    assert Night.from_json(json.loads(json.dumps(dataclasses.asdict(night)))) == night


def test_nights_without_a_common_bin_have_a_distribution_too() -> None:
    nights = [dataclasses.replace(make_night(), histogram=((place, 100),)) for place in (900, 1_000, 1_100)]
    assert {gate.name for gate in check_night(nights[1], nights)} >= {"psi"}


def test_another_models_distribution_says_nothing_of_faults() -> None:
    before = [make_night(seed, model="old") for seed in range(6)]
    new = make_night(9, shift=1.0, model="new")
    assert {gate.name for gate in check_night(new, before)} == {"coverage_listings", "coverage_audience_rows"}
    assert failed(make_night(9, shift=1.0, model="new", listings=900), before) == {"coverage_listings"}
    # From its second night on it is held against itself, not against the one before.
    later = check_night(make_night(10, shift=1.0, model="new"), [*before, new])
    assert len(later) == 4 and all(gate.passed for gate in later)
    assert failed(make_night(10, model="new"), [*before, new]) == {"mean_cvr", "psi"}
    assert "the night published last by this model" in later[2].words


@pytest.mark.parametrize(
    ("pcoc", "error", "passed"), [(1.19, 0.0, True), (1.35, 0.1, True), (1.35, 0.05, False), (0.7, 0.01, False)]
)
def test_calibration_is_held_to_a_fifth_beyond_chance(pcoc: float, error: float, passed: bool) -> None:
    calibration = Calibration("2026-01-01", "2026-01-02", 3_000, 500, pcoc, error, 0.4)
    for before in ([make_night(1)], [make_night(1, model="old")]):
        gates = {gate.name: gate for gate in check_night(make_night(9), before, calibration)}
        assert gates["calibration"].passed is passed
        assert f"{pcoc:.3f}" in gates["calibration"].words
    assert check_night(make_night(9), [], calibration) == []


@pytest.mark.parametrize(("expected", "error", "passed"), [(500.0, 25.0, False), (1.5, 1.2, True)])
def test_a_night_without_any_order_is_held_back_where_some_were_due(
    expected: float, error: float, passed: bool
) -> None:
    calibration = Calibration("2026-01-01", "2026-01-02", 3_000, 0, None, None, 0.4, expected, error)
    gate = next(gate for gate in check_night(make_night(2), [make_night(1)], calibration) if gate.name == "calibration")
    assert gate.passed is passed and f"{expected:,.1f}" in gate.words
