"""Metrics of predictions, with numpy only.

They are computed without loops over groups.

Shapes: n examples; ``labels`` are 0 or 1, ``scores`` any real numbers that rank (raw logits),
``probabilities`` in [0, 1], ``groups`` any array of n keys (users, sessions). Ties count a half, or
are averaged over their orders, throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
SMALLEST = 1e-12
"""Probabilities are clipped to [SMALLEST, 1 - SMALLEST] before a logarithm."""


class UndefinedMetricError(ValueError):
    """A metric that does not exist on these labels.

    There are no examples, or all are of one class.
    """


@dataclass(frozen=True, kw_only=True)
class GroupedAuc:
    """AUC within groups, weighted by each group's examples (impressions)."""

    value: float  # NaN where no group has both classes
    groups: int  # groups with both classes, from which the value is computed
    left_out: int  # groups with one class


def auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Compute the area under the ROC curve.

    It is the chance that a positive ranks above a negative.

    Raises:
        UndefinedMetricError: it does not exist on these labels.
    """
    y, s = _pair(labels, scores)
    positives = y.sum()
    negatives = len(y) - positives
    if positives == 0 or negatives == 0:
        raise UndefinedMetricError(f"auc: {int(positives)} positives, {int(negatives)} negatives: both are needed")
    ranks = _group_ranks(np.zeros(len(y), dtype=np.int64), s)
    return float((ranks[y == 1].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def gauc(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike) -> GroupedAuc:
    """Compute the AUC averaged over groups.

    It is taken within each group (user or session), and the groups' numbers of examples are the
    weights.
    """
    within, size = auc_of_groups(labels, scores, groups)
    both = np.isfinite(within)
    if not both.any():
        return GroupedAuc(value=float("nan"), groups=0, left_out=len(within))
    value = float(np.average(within[both], weights=size[both]))
    return GroupedAuc(value=value, groups=int(both.sum()), left_out=int((~both).sum()))


def auc_of_groups(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike) -> tuple[Floats, Floats]:
    """Compute the AUC and the examples of each group.

    Both are [g], in order of the groups' keys. The AUC of a group of one class is NaN.
    """
    y, s = _pair(labels, scores)
    keys = _keys(groups, len(y))
    count = int(keys.max()) + 1 if len(keys) else 0
    ranks = _group_ranks(keys, s)
    size = np.bincount(keys, minlength=count).astype(np.float64)
    positives = np.bincount(keys, weights=y, minlength=count)
    rank_sum = np.bincount(keys, weights=ranks * y, minlength=count)
    pairs = positives * (size - positives)
    with np.errstate(invalid="ignore"):
        within = np.where(pairs > 0, (rank_sum - positives * (positives + 1) / 2) / pairs, np.nan)
    return within, size


def log_loss(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Compute the mean negative log likelihood, natural logarithm.

    Raises:
        UndefinedMetricError: there are no examples.
    """
    y, p = _pair(labels, probabilities)
    if len(y) == 0:
        raise UndefinedMetricError("log_loss: no examples")
    p = np.clip(p, SMALLEST, 1 - SMALLEST)
    return float(-(y * np.log(p) + (1 - y) * np.log1p(-p)).mean())


def normalised_entropy(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Compute the normalised entropy (NE).

    It is the log loss over that of always predicting the labels' mean (He et al. 2014).

    Raises:
        UndefinedMetricError: it does not exist on these labels.
    """
    y, _ = _pair(labels, probabilities)
    rate = y.mean() if len(y) else 0.0
    if rate in (0.0, 1.0):
        raise UndefinedMetricError(f"normalised_entropy: the labels' mean is {rate}: both classes are needed")
    return log_loss(y, probabilities) / log_loss(y, np.full(len(y), rate))


def pcoc(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Compute predicted over observed conversions, Σp / Σy.

    1 is calibrated.

    Raises:
        UndefinedMetricError: there are no positives.
    """
    y, p = _pair(labels, probabilities)
    if y.sum() == 0:
        raise UndefinedMetricError("pcoc: no positives")
    return float(p.sum() / y.sum())


def ece(labels: ArrayLike, probabilities: ArrayLike, bins: int = 15) -> float:
    """Compute the expected calibration error.

    It is over ``bins`` bins of equal mass, sorted by probability.

    Each row takes the mean label of all rows with an equal probability, so the order of rows does
    not matter.
    """
    y, p = _pair(labels, probabilities)
    if len(y) == 0:
        raise UndefinedMetricError("ece: no examples")
    order = np.argsort(p, kind="stable")
    y, p = y[order], p[order]
    _, tie = np.unique(p, return_inverse=True)
    y = (np.bincount(tie, weights=y) / np.bincount(tie))[tie]
    bin_of = np.arange(len(y)) * bins // len(y)
    gap = np.bincount(bin_of, weights=y, minlength=bins) - np.bincount(bin_of, weights=p, minlength=bins)
    return float(np.abs(gap).sum() / len(y))


def ndcg_at_k(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, k: int = 10) -> float:
    """Compute the mean NDCG@k over groups with a positive.

    Tied scores share the mean gain of their places (McSherry, Najork 2008). NaN where no group has
    a positive.
    """
    y, s = _pair(labels, scores)
    keys = _keys(groups, len(y))
    discount = np.zeros(int(np.bincount(keys).max()) + 1 if len(keys) else 1)
    top = min(k, len(discount) - 1)
    discount[1 : top + 1] = 1.0 / np.log2(np.arange(top) + 2)
    gained = np.cumsum(discount)  # gained[j]: discounts of places 1 .. j
    first, last = _places(keys, s)
    share = (gained[last] - gained[first - 1]) / (last - first + 1)
    gain = np.bincount(keys, weights=y * share)
    positives = np.bincount(keys, weights=y).astype(np.int64)
    some = positives > 0
    return float((gain[some] / gained[positives[some]]).mean()) if some.any() else float("nan")


def hit_rate_at_k(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, k: int = 10) -> float:
    """Compute the share of groups with a hit.

    It is the share of the groups with a positive that have one among their k best scores.

    Where ties straddle place k, the chance of a hit over all orders of the tied: hypergeometric.
    NaN without positives.
    """
    y, s = _pair(labels, scores)
    keys = _keys(groups, len(y))
    positives = np.bincount(keys, weights=y)
    first, last = _places(keys, s)
    sure = np.bincount(keys, weights=y * (last <= k)) > 0
    straddles = (first <= k) & (last > k)
    tied = np.bincount(keys, weights=straddles)
    tied_positives = np.bincount(keys, weights=straddles * y)
    drawn = np.zeros(len(positives))
    drawn[keys[straddles]] = k - first[straddles] + 1  # equal for all tied of a group
    # Chance that no positive of the tied is drawn: product over draws of (negatives - j) / (tied - j).
    miss = np.ones(len(positives))
    for j in range(min(k, int(drawn.max(initial=0)))):
        still = j < drawn
        left = np.maximum(tied - tied_positives - j, 0.0)
        miss = np.where(still, miss * left / np.maximum(tied - j, 1.0), miss)
    hit = np.where(sure, 1.0, 1.0 - miss)
    some = positives > 0
    return float(hit[some].mean()) if some.any() else float("nan")


def recall_at_k(
    similarities: ArrayLike, query_groups: ArrayLike, target_groups: ArrayLike, ks: tuple[int, ...] = (1, 5, 10)
) -> dict[int, float]:
    """Compute R@k of retrieval.

    Similarities are [q, t]. A hit is a target of the query's group (product class) among the k
    best.

    A query without any target of its group is left out. A foreign target that ties with the best
    own one counts as ranked before it, so that constant vectors do not score well.
    """
    sim = np.asarray(similarities, dtype=np.float64)
    own = np.asarray(query_groups)[:, None] == np.asarray(target_groups)[None, :]
    if sim.shape != own.shape:
        raise ValueError(f"recall_at_k: similarities {sim.shape}, groups {own.shape}")
    possible = own.any(1)
    if not possible.any():
        raise UndefinedMetricError("recall_at_k: no query has a target of its group")
    sim, own = sim[possible], own[possible]
    best = np.where(own, sim, -np.inf).max(1, keepdims=True)
    before = ((sim >= best) & ~own).sum(1)
    return {k: float((before < k).mean()) for k in ks}


def mismatch_auc(mismatched: ArrayLike, alignment: ArrayLike) -> float:
    """Compute the AUC of finding mismatched listings.

    They are those whose photo and title do not belong together: low alignment should mean
    mismatched.
    """
    return auc(mismatched, -np.asarray(alignment, dtype=np.float64))


def _pair(labels: ArrayLike, values: ArrayLike) -> tuple[Floats, Floats]:
    """Convert both to float64 vectors of one length.

    Raises:
        ValueError: other labels than 0 and 1, or values not finite.
    """
    y, v = np.asarray(labels, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if y.shape != v.shape or y.ndim != 1:
        raise ValueError(f"labels {y.shape} and values {v.shape} must be vectors of one length")
    if not np.isin(y, (0.0, 1.0)).all():
        raise ValueError("labels must be 0 or 1")
    if not np.isfinite(v).all():
        raise ValueError(f"{int((~np.isfinite(v)).sum())} of {len(v)} values are not finite")
    return y, v


def _keys(groups: ArrayLike, count: int) -> NDArray[np.int64]:
    """Number the groups from 0."""
    keys = np.asarray(groups)
    if keys.shape != (count,):
        raise ValueError(f"groups {keys.shape}: one for each of {count} examples")
    return np.unique(keys, return_inverse=True)[1].astype(np.int64)


def _runs(starts: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return first and last row number of each row's run.

    Rows are sorted, and ``starts`` marks the first of each run.
    """
    number = np.cumsum(starts) - 1
    first = np.flatnonzero(starts)
    last = np.append(first[1:], len(starts)) - 1
    return first[number], last[number]


def _spans(keys: NDArray[np.int64], scores: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return places of the first and last tied example.

    They are tied with each example, within its group, by rising score, from 1.
    """
    first, last = np.empty(len(keys), dtype=np.int64), np.empty(len(keys), dtype=np.int64)
    if len(keys) == 0:
        return first, last
    order = np.lexsort((scores, keys))
    k, s = keys[order], scores[order]
    new_group = np.append(True, k[1:] != k[:-1])
    tie_first, tie_last = _runs(new_group | np.append(True, s[1:] != s[:-1]))
    group_first, _ = _runs(new_group)
    first[order], last[order] = tie_first - group_first + 1, tie_last - group_first + 1
    return first, last


def _group_ranks(keys: NDArray[np.int64], scores: Floats) -> Floats:
    """Rank each score within its group.

    Ranks are from 1 for the smallest, ties averaged.
    """
    first, last = _spans(keys, scores)
    return (first + last) / 2.0


def _places(keys: NDArray[np.int64], scores: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return ``_spans`` with 1 for the largest score."""
    return _spans(keys, -scores)
