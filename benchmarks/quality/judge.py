"""Figures of predictions.

They are the usual ones, those under known truth, and their standard errors.

Shapes: n examples of the test part.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.worlds import Truth
from camenn_model.calibration import PlattScaling
from camenn_model.evaluation import metrics
from camenn_model.evaluation.predictions import Predictions, cvr_metrics
from simulator.truth import expected_auc

LEAST_GAP = 1e-6
"""Least difference of two expected AUCs. Less is rounding."""

Floats = NDArray[np.float64]
BINS = 15
FEW_CLICKS = 10
"""Most clicks before the session at which a listing counts as hardly known."""
FEWEST = 100
"""Least examples of a stratum with an AUC"""


class Prior(NamedTuple):
    """The knowledge of each example before its session.

    It is counts, float64 [n], and whether there is a photo, bool [n].
    """

    of_listing: Floats
    """Clicks by all users"""
    of_pair: Floats
    """Clicks by this user on this listing"""
    orders_of_pair: Floats
    """Orders of this listing by this user"""
    has_photo: NDArray[np.bool_]


def expected_ece(p: Floats, probability: Floats, bins: int = BINS) -> float:
    """Return expected calibration error against true probabilities.

    With p [n], it is the mean over equal-mass bins of |mean probability − mean p|.
    """
    order = np.argsort(probability, kind="stable")
    pieces = np.array_split(order, bins)
    return float(
        sum(len(rows) * abs(probability[rows].mean() - p[rows].mean()) for rows in pieces if len(rows)) / len(p)
    )


def strata(truth: Truth, prior: Prior) -> dict[str, NDArray[np.bool_]]:
    """Return the parts of the test examples reported apart.

    They are bool [n] each. Every click is from a listing that was shown. `uniform` ones were shown
    at random.
    """
    uncorrupted = truth.image_ok & truth.text_ok
    return {
        "uniform_sessions": truth.uniform,
        "cold_start": truth.cold,
        "warm": ~truth.cold,
        "no_prior_click": prior.of_listing == 0,
        "few_prior_clicks": (prior.of_listing > 0) & (prior.of_listing <= FEW_CLICKS),
        "more_prior_clicks": prior.of_listing > FEW_CLICKS,
        "uncorrupted": uncorrupted,
        "corrupted": ~uncorrupted,
        "mismatched": truth.mismatched,
        # Facts that a new listing does not display are still unknown. An old one has clicks and orders as evidence.
        "cold_start_uncorrupted": truth.cold & uncorrupted,
        "cold_start_corrupted": truth.cold & ~uncorrupted,
        "warm_uncorrupted": ~truth.cold & uncorrupted,
        "warm_corrupted": ~truth.cold & ~uncorrupted,
        # An earlier click on a listing is evidence of the preference for it, which a new listing rarely has.
        "cold_start_first_click": truth.cold & (prior.of_pair == 0),
        "warm_first_click": ~truth.cold & (prior.of_pair == 0),
    }


def known_strata(prior: Prior) -> dict[str, NDArray[np.bool_]]:
    """Split the test examples by prior knowledge of them.

    The parts are bool [n] each. The first three are of the pair, and disjoint.
    """
    ordered = prior.orders_of_pair > 0
    clicked = ~ordered & (prior.of_pair > 0)
    return {
        "pair_ordered_before": ordered,
        "pair_clicked_before": clicked,
        "pair_first_click": ~ordered & ~clicked,
        "with_photo": prior.has_photo,
        "without_photo": ~prior.has_photo,
    }


def as_observed(found: Predictions, prior: Prior) -> dict[str, dict[str, Any]]:
    """Return rows, orders and AUC by stratum.

    It is meant for a log without known truth. AUC is None where a stratum has fewer than `FEWEST`
    examples or one class.
    """
    by_stratum = {}
    for name, rows in known_strata(prior).items():
        labels = found.labels[rows]
        enough = len(labels) >= FEWEST and 0 < labels.sum() < len(labels)
        by_stratum[name] = {
            "rows": len(labels),
            "orders": int(labels.sum()),
            "auc": metrics.auc(labels, found.logits[rows]) if enough else None,
        }
    return by_stratum


def under_truth(found: Predictions, calibration: PlattScaling, truth: Truth, prior: Prior) -> dict[str, Any]:
    """Return expected AUC, PCOC and ECE.

    They are of all examples and by stratum, and None where a stratum has fewer than `FEWEST`
    examples.
    """
    p, probability = truth.p_order, calibration(found.logits)
    ladder = truth.ladder["test"]
    auc = expected_auc(p, found.logits)
    by_stratum = {
        name: {
            "rows": int(rows.sum()),
            "auc": expected_auc(p[rows], found.logits[rows]) if rows.sum() >= FEWEST else None,
            "auc_of_truth": expected_auc(p[rows], p[rows]) if rows.sum() >= FEWEST else None,
        }
        for name, rows in strata(truth, prior).items()
    }
    return {
        "auc": auc,
        "auc_of_truth": expected_auc(p, p),
        "attainable_share": attainable_share(auc, ladder["class_context"], ladder["as_displayed"]),
        "pcoc": float(probability.sum() / p.sum()),
        "ece": expected_ece(p, probability),
        "strata": by_stratum,
        "ladder": ladder,
    }


def attainable_share(auc: float, context: float, displayed: float) -> float | None:
    """Return the share of displayed content that a model uses.

    It is the share of the gain of displayed content over class and context. It is None where there
    is no gain, as in the control without effect of content.
    """
    gap = displayed - context
    return (auc - context) / gap if gap > LEAST_GAP else None


def content_efficiency(model: float, without_content: float, displayed: float) -> float:
    """Return the model's share of the attainable gain from content.

    The attainable gain is that of the same model when it is given the displayed content. The
    model's own gain comes from photos and titles. All gains are in expected AUC.
    """
    return (model - without_content) / (displayed - without_content)


def judge(
    found: Predictions,
    calibration: PlattScaling,
    base_rate: float,
    truth: Truth | None,
    prior: Prior,
) -> dict[str, Any]:
    """Return all figures of one model on one test part."""
    figures = {"test": cvr_metrics(found, calibration, base_rate)}
    if truth is None:
        figures["test"] |= of_draws(found) | {"strata": as_observed(found, prior)}
    else:
        figures["expected"] = under_truth(found, calibration, truth, prior)
    return figures


def of_draws(found: Predictions, draws: int = 200, seed: int = 0) -> dict[str, list[float]]:
    """Return AUC and AUC within sessions on drawn users.

    Users are drawn with replacement, with all of their examples (cluster bootstrap, Field and Welsh
    2007).

    The draws are the same for all models: the standard deviation of two models' differences is the
    standard error of their difference. A user drawn twice is two users, with sessions of their own.
    Scores are sorted once, and a draw only weighs them.
    """
    rng = np.random.default_rng(seed)
    _, user = np.unique(found.users, return_inverse=True)
    users = int(user.max()) + 1
    order = np.argsort(found.logits, kind="stable")
    positive, of_user, score = found.labels[order] == 1, user[order], found.logits[order]
    # Ties begin at these places: a positive is above all before its own tie, and halfway in it.
    tie = np.flatnonzero(np.append(True, score[1:] != score[:-1]))
    # Twice its examples do not change a session's AUC, only its weight.
    sessions, first = np.unique(found.sessions, return_index=True)
    if (user[first][np.searchsorted(sessions, found.sessions)] != user).any():
        raise ValueError("a session has two users: it cannot be drawn with one of them")
    within, size = metrics.auc_of_groups(found.labels, found.logits, found.sessions)
    both = np.isfinite(within)
    drawn: dict[str, list[float]] = {"auc_of_draws": [], "session_auc_of_draws": []}
    for _ in range(draws):
        times = np.bincount(rng.integers(0, users, users), minlength=users).astype(np.float64)
        counts = times[of_user]
        negatives, positives = (np.add.reduceat(counts * side, tie) for side in (~positive, positive))
        below = np.cumsum(negatives) - negatives / 2
        drawn["auc_of_draws"].append(float((positives * below).sum() / (positives.sum() * negatives.sum())))
        weights = (times[user[first]] * size)[both]
        drawn["session_auc_of_draws"].append(float(np.average(within[both], weights=weights)))
    return drawn


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Adjust p values for their number (Holm 1979)."""
    adjusted: dict[str, float] = {}
    highest = 0.0
    for place, name in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = highest
    return adjusted
