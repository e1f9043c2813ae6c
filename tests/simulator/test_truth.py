"""The expected AUC and its ladder."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.truth import LADDER_RUNGS, ClickTerms, best_linear_score, expected_auc, expected_ladder


def brute_force_auc(p: np.ndarray, s: np.ndarray) -> float:
    """The double sum as it is written in docs/city.md."""
    beats = (s[:, None] > s[None, :]) + 0.5 * (s[:, None] == s[None, :])
    return float((p[:, None] * (1 - p)[None, :] * beats).sum() / (p.sum() * (1 - p).sum()))


@given(st.lists(st.tuples(st.floats(0.01, 0.99), st.integers(-3, 3)), min_size=1, max_size=40))
def test_expected_auc_equals_double_sum_with_ties(pairs: list[tuple[float, int]]) -> None:
    p = np.array([pair[0] for pair in pairs])
    s = np.array([pair[1] for pair in pairs], dtype=float)
    assert expected_auc(p, s) == pytest.approx(brute_force_auc(p, s), abs=1e-12)


def test_expected_auc_of_a_constant_score_is_a_half() -> None:
    assert expected_auc(np.array([0.1, 0.5, 0.9]), np.zeros(3)) == pytest.approx(0.5)


def test_expected_auc_of_certain_labels_is_the_auc() -> None:
    labels = np.array([0.0, 1.0, 0.0, 1.0])
    assert expected_auc(labels, np.array([0.1, 0.4, 0.2, 0.3])) == 1.0
    assert expected_auc(labels, np.array([0.4, 0.4, 0.2, 0.1])) == pytest.approx(0.375)


@pytest.mark.parametrize(
    ("p", "s", "message"),
    [
        ([0.5, 0.5], [1.0], "one length"),
        ([0.5, 1.5], [1.0, 2.0], "probabilities"),
        ([0.5, 0.5], [1.0, np.nan], "not numbers"),
        ([1.0, 1.0], [1.0, 2.0], "both outcomes"),
        ([], [], "both outcomes"),
    ],
)
def test_expected_auc_rejects_what_has_no_auc(p: list[float], s: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expected_auc(np.array(p), np.array(s))


def test_best_linear_score_recovers_the_logit() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 5_000))
    logit = -1.5 + 0.7 * x - 0.4 * y
    score = best_linear_score(1 / (1 + np.exp(-logit)), [x, y, np.ones(5_000)])
    assert np.abs(score - logit).max() < 1e-3


def test_expected_ladder_rises_with_what_is_known() -> None:
    rng = np.random.default_rng(1)
    n = 20_000
    a, o, v, t = rng.standard_normal((4, n)) * 0.8
    image_ok, text_ok = rng.random((2, n)) < 0.8
    mismatched = ~image_ok & (rng.random(n) < 0.3)
    logit = -2.5 + 0.7 * a + 0.9 * o + 0.9 * v + 0.8 * t - mismatched
    ladder = expected_ladder(ClickTerms(a, o, v, t, image_ok, text_ok, mismatched, 1 / (1 + np.exp(-logit))))
    assert tuple(ladder) == LADDER_RUNGS
    assert ladder["class_context"] < ladder["clean_text"] < ladder["true_probability"]
    assert ladder["class_context"] < ladder["clean_image"] < ladder["true_probability"]
    assert ladder["as_displayed"] < ladder["mismatch_known"] < ladder["true_probability"]
