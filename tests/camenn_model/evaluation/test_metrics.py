from __future__ import annotations

import itertools
import math
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from camenn_model.evaluation import metrics

Columns = tuple[np.ndarray, ...]
"""Label, score and group of each row"""
examples = st.lists(st.tuples(st.integers(0, 1), st.integers(-3, 3), st.integers(0, 3)), min_size=1, max_size=40).map(
    lambda rows: tuple(np.array(column) for column in zip(*rows, strict=True))
)


def plain_auc(y: np.ndarray, s: np.ndarray) -> float:
    wins = [(a > b) + 0.5 * (a == b) for a in s[y == 1] for b in s[y == 0]]
    return float(np.mean(wins))


def orders_of_ties(s: np.ndarray) -> list[list[int]]:
    """All ways to sort by falling score."""
    groups = [np.flatnonzero(s == value).tolist() for value in sorted(set(s.tolist()), reverse=True)]
    return [sum(map(list, parts), []) for parts in itertools.product(*(itertools.permutations(g) for g in groups))]


@given(examples)
def test_auc_equals_counting_pairs(rows: Columns) -> None:
    y, s, _ = rows
    if y.min() == y.max():
        with pytest.raises(metrics.UndefinedMetricError):
            metrics.auc(y, s)
    else:
        assert metrics.auc(y, s) == pytest.approx(plain_auc(y, s))


@given(examples)
def test_gauc_equals_a_loop_over_groups(rows: Columns) -> None:
    y, s, g = rows
    values, weights, left_out = [], [], 0
    for key in set(g.tolist()):
        inside = g == key
        if y[inside].min() == y[inside].max():
            left_out += 1
        else:
            values.append(plain_auc(y[inside], s[inside]))
            weights.append(inside.sum())
    found = metrics.gauc(y, s, g)
    assert (found.groups, found.left_out) == (len(values), left_out)
    if values:
        assert found.value == pytest.approx(np.average(values, weights=weights))
    else:
        assert math.isnan(found.value)


def test_metrics_equal_sklearn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    y, s = rng.integers(0, 2, 500), np.round(rng.normal(size=500), 1)
    p = 1 / (1 + np.exp(-s))
    assert metrics.auc(y, s) == pytest.approx(sklearn.roc_auc_score(y, s))
    assert metrics.log_loss(y, p) == pytest.approx(sklearn.log_loss(y, p))
    groups = np.zeros(500, dtype=int)
    assert metrics.ndcg_at_k(y, s, groups) == pytest.approx(sklearn.ndcg_score([y], [s], k=10))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=6),
    st.integers(1, 4),
)
def test_ndcg_and_hit_rate_average_over_the_orders_of_ties(rows: list[tuple[int, int, int]], k: int) -> None:
    y, s, g = (np.array(column) for column in zip(*rows, strict=True))
    gains, hits = [], []
    for key in set(g.tolist()):
        labels, scores = y[g == key], s[g == key]
        if labels.sum() == 0:
            continue
        ideal = sum(1 / math.log2(place + 2) for place in range(min(k, labels.sum())))
        orders = orders_of_ties(scores)
        gains.append(
            np.mean([sum(labels[j] / math.log2(n + 2) for n, j in enumerate(order[:k])) for order in orders]) / ideal
        )
        hits.append(np.mean([labels[order[:k]].any() for order in orders]))
    found = metrics.ndcg_at_k(y, s, g, k), metrics.hit_rate_at_k(y, s, g, k)
    if gains:
        assert found == pytest.approx((np.mean(gains), np.mean(hits)))
    else:
        assert all(math.isnan(value) for value in found)


def test_log_loss_family_on_known_numbers() -> None:
    y, p = [1, 0, 0, 0], [0.5, 0.25, 0.25, 0.5]
    expected = -(math.log(0.5) + 2 * math.log(0.75) + math.log(0.5)) / 4
    assert metrics.log_loss(y, p) == pytest.approx(expected)
    assert metrics.normalised_entropy(y, p) == pytest.approx(
        expected / -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    )
    assert metrics.pcoc(y, p) == pytest.approx(1.5)
    assert math.isfinite(metrics.log_loss([1, 0], [0.0, 1.0]))
    assert metrics.normalised_entropy(y, [0.25] * 4) == pytest.approx(1.0)


def test_ece_is_zero_when_calibrated_and_the_gap_when_not() -> None:
    y = np.array([1, 0, 0, 0] * 30)
    assert metrics.ece(y, np.full(120, 0.25)) == pytest.approx(0.0, abs=1e-12)
    assert metrics.ece(y, np.full(120, 0.65)) == pytest.approx(0.4)
    assert metrics.ece([1, 0], [0.9, 0.2]) == pytest.approx(0.15)


def plain_ece(y: np.ndarray, p: np.ndarray, bins: int) -> float:
    """Row by row: each bin has as many of the sorted rows as any other one, or one more or less; a row counts the mean
    label of its ties.
    """
    rows = sorted(zip(p.tolist(), y.tolist(), strict=True))
    labels = [np.mean([label for other, label in rows if other == probability]) for probability, _ in rows]
    gaps = [0.0] * bins
    for place, (probability, _) in enumerate(rows):
        gaps[math.floor(place * bins / len(rows))] += labels[place] - probability
    return sum(abs(gap) for gap in gaps) / len(rows)


@given(examples, st.sampled_from([2, 3, 15]))
def test_ece_equals_a_loop_over_bins_of_equal_mass(rows: Columns, bins: int) -> None:
    y, s, g = rows
    # Squeezed, so that a single bin of equal width would hold most of them.
    p = 1 / (1 + np.exp(-(s / 3 + g - 4)))
    assert metrics.ece(y, p, bins) == pytest.approx(plain_ece(y, p, bins))


def test_ece_has_bins_of_equal_mass() -> None:
    """Rare probabilities near 0.1, as conversions have: bins of equal width would cancel what is too low against what
    is too high.
    """
    p = np.repeat([0.10, 0.11, 0.12], 100)
    y = np.concatenate([np.arange(100) < hits for hits in (4, 11, 18)]).astype(int)
    assert metrics.ece(y, p, 3) == pytest.approx((0.06 + 0.0 + 0.06) / 3)


@given(examples, st.randoms(use_true_random=False))
def test_ece_does_not_depend_on_the_order_of_rows(rows: Columns, random: Random) -> None:
    y, s, _ = rows
    p = 1 / (1 + np.exp(-s))
    order = list(range(len(y)))
    random.shuffle(order)
    assert metrics.ece(y[order], p[order]) == pytest.approx(metrics.ece(y, p))


def test_recall_at_k_counts_ties_against() -> None:
    similarities = np.array([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.2, 0.2, 0.2]])
    found = metrics.recall_at_k(similarities, ["a", "b", "c"], ["a", "b", "c"], ks=(1, 2, 3))
    assert found == {1: pytest.approx(1 / 3), 2: pytest.approx(2 / 3), 3: pytest.approx(1.0)}


def test_recall_at_k_leaves_out_queries_without_target() -> None:
    assert metrics.recall_at_k([[1.0, 0.0], [0.0, 0.5]], [0, 9], [0, 1], ks=(1,)) == {1: 1.0}
    with pytest.raises(metrics.UndefinedMetricError):
        metrics.recall_at_k([[1.0]], [0], [1])


def test_mismatch_auc_wants_low_alignment() -> None:
    assert metrics.mismatch_auc([1, 0, 0], [0.1, 0.8, 0.9]) == 1.0


@pytest.mark.parametrize(
    ("labels", "values", "message"),
    [([0, 2], [0.1, 0.2], "0 or 1"), ([0, 1], [0.1, math.nan], "not finite"), ([0, 1], [0.1], "one length")],
)
def test_metrics_refuse_bad_input(labels: list[int], values: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.auc(labels, values)


def test_grouped_metrics_are_quick_on_many_groups() -> None:
    rng = np.random.default_rng(0)
    y, s, g = rng.integers(0, 2, 300_000), rng.normal(size=300_000), rng.integers(0, 100_000, 300_000)
    assert 0.45 < metrics.gauc(y, s, g).value < 0.55
    assert 0.0 < metrics.ndcg_at_k(y, s, g) <= 1.0
    assert 0.0 < metrics.hit_rate_at_k(y, s, g, 1) <= 1.0
