from __future__ import annotations

import math

import numpy as np
import pytest

from camenn_model.calibration import PlattScaling, fit_platt
from camenn_model.evaluation.metrics import log_loss, pcoc


def sample(slope: float, intercept: float, count: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    logits = rng.normal(-1.0, 1.5, count)
    return (rng.random(count) < 1 / (1 + np.exp(-(slope * logits + intercept)))).astype(float), logits


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, 0.0), (0.3, -2.0), (4.0, 1.0)])
def test_fit_platt_finds_the_line(slope: float, intercept: float) -> None:
    labels, logits = sample(slope, intercept)
    found = fit_platt(labels, logits)
    assert found.slope == pytest.approx(slope, rel=0.08)
    assert found.intercept == pytest.approx(intercept, abs=0.15)
    assert found.reason == ""
    assert pcoc(labels, found(logits)) == pytest.approx(1.0, abs=1e-3)


def test_fit_platt_is_a_minimum() -> None:
    labels, logits = sample(0.5, -1.0, 2000)
    best = fit_platt(labels, logits)
    least = log_loss(labels, best(logits))
    for slope, intercept in ((0.02, 0.0), (-0.02, 0.0), (0.0, 0.02), (0.0, -0.02)):
        other = PlattScaling(slope=best.slope + slope, intercept=best.intercept + intercept)
        assert log_loss(labels, other(logits)) > least


def test_fit_platt_survives_wild_logits() -> None:
    labels, logits = sample(1.0, 0.0)
    assert fit_platt(labels, logits * 1e3).slope == pytest.approx(1e-3, rel=0.08)
    assert fit_platt(labels, logits + 1e4).intercept == pytest.approx(-1e4, rel=0.08)


def platt_targets(labels: list[int]) -> list[float]:
    """Smoothed targets of Platt (1999): one positive and one negative are added to the counts."""
    positives = sum(labels)
    negatives = len(labels) - positives
    return [(positives + 1) / (positives + 2) if label else 1 / (negatives + 2) for label in labels]


@pytest.mark.parametrize(
    ("labels", "logits"),
    [
        ([0, 0, 1, 1], [-2.0, -1.0, 1.0, 2.0]),
        ([0, 0, 0, 0, 0, 1, 1], [-3.0, -2.5, -1.0, 0.4, 1.0, 0.3, 2.0]),
        ([1, 1, 1, 1, 0, 0], [90.0, 95.0, 104.0, 130.0, 80.0, 101.0]),
    ],
)
def test_fit_platt_meets_the_smoothed_targets(labels: list[int], logits: list[float]) -> None:
    """Where the derivatives by slope and intercept are 0, the sums of p and of p · logit are those of the targets:
    with loops, without Newton.
    """
    found = fit_platt(labels, logits)
    probabilities = [1 / (1 + math.exp(-(found.slope * logit + found.intercept))) for logit in logits]
    targets = platt_targets(labels)
    assert sum(probabilities) == pytest.approx(sum(targets), abs=1e-7)
    weighted = [sum(p * logit for p, logit in zip(row, logits, strict=True)) for row in (probabilities, targets)]
    assert weighted[0] == pytest.approx(weighted[1], abs=1e-5)
    assert found.reason == "" and found.slope > 0


def test_fit_platt_of_a_separable_sample_is_a_known_line() -> None:
    """By symmetry the intercept is 0, and the slope s solves σ(s) + 2 σ(2 s) = 3 · 3/4. Raw labels
    have no finite solution.
    """
    low, high = 0.0, 10.0
    for _ in range(100):
        slope = (low + high) / 2
        reached = 1 / (1 + math.exp(-slope)) + 2 / (1 + math.exp(-2 * slope)) >= 2.25
        low, high = (low, slope) if reached else (slope, high)
    found = fit_platt([0, 0, 1, 1], [-2.0, -1.0, 1.0, 2.0])
    assert found.slope == pytest.approx(low, abs=1e-6) == pytest.approx(0.67, abs=0.01)
    assert found.intercept == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("labels", "logits", "reason"),
    [([0, 0], [0.1, 0.2], "one class"), ([], [], "one class"), ([1, 1], [0.0, 1.0], "one class")],
)
def test_fit_platt_of_one_class_is_the_identity_with_a_reason(
    labels: list[int], logits: list[float], reason: str
) -> None:
    found = fit_platt(labels, logits)
    assert (found.slope, found.intercept) == (1.0, 0.0)
    assert reason in found.reason


def test_fit_platt_never_turns_the_ranks() -> None:
    labels, logits = sample(-1.0, 0.0)
    found = fit_platt(labels, logits)
    assert (found.slope, found.intercept) == (1.0, 0.0)
    assert "reverse the ranks" in found.reason


def test_fit_platt_of_equal_logits_meets_the_base_rate() -> None:
    found = fit_platt([1, 0, 0, 0], [0.7] * 4)
    assert found([0.7]) == pytest.approx([0.25])


def test_fit_platt_refuses_infinite_logits() -> None:
    with pytest.raises(ValueError, match="not finite"):
        fit_platt([0, 1], [0.0, np.inf])


def test_platt_scaling_survives_json() -> None:
    scaling = PlattScaling(slope=0.1 + 0.2, intercept=-1 / 3, examples=7, positives=3)
    assert PlattScaling.from_json(scaling.to_json()) == scaling
