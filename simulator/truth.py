"""Known truth of orders after a click.

It has the expected AUC under true probabilities, and a ladder of scores with increasing knowledge
of an order after a click.
"""

from typing import NamedTuple

import numpy as np

from simulator.config import CityConfig

LADDER_RUNGS = (
    "class_context",
    "clean_text",
    "clean_image",
    "as_displayed",
    "mismatch_known",
    "true_probability",
)
"""Rungs in order; see `expected_ladder`."""


class ClickTerms(NamedTuple):
    """Terms of the true order probability.

    They are arrays of length n: terms of docs/explanation/city.md and the listing's state.
    """

    class_term: np.ndarray
    context_term: np.ndarray
    visual_term: np.ndarray
    text_term: np.ndarray
    image_ok: np.ndarray
    text_ok: np.ndarray
    mismatched: np.ndarray
    p_order: np.ndarray


def expected_auc(p: np.ndarray, s: np.ndarray) -> float:
    """Compute the expected AUC of score `s` [n].

    It is expected on labels drawn with probability `p` [n].

    Σ_ij p_i (1 − p_j) ([s_i > s_j] + ½ [s_i = s_j]) / (Σp · Σ(1 − p)), in O(n log n) by sorting
    (docs/explanation/city.md).

    Raises:
        ValueError: different lengths, a p outside 0 to 1, a score that is not a number, or
            Σp · Σ(1 − p) = 0.
    """
    p = np.asarray(p, dtype=np.float64)
    s = np.asarray(s)
    if p.shape != s.shape or p.ndim != 1:
        raise ValueError(f"p and s must be vectors of one length, not {p.shape} and {s.shape}")
    if p.size and (p.min() < 0 or p.max() > 1 or np.isnan(p).any()):
        raise ValueError("p must be probabilities, 0 to 1")
    if np.isnan(s).any():
        raise ValueError("s holds values that are not numbers")
    positives, negatives = p.sum(), (1 - p).sum()
    if positives * negatives == 0:
        raise ValueError("expected AUC needs both outcomes to be possible")
    _, tie = np.unique(s, return_inverse=True)
    p_tie = np.bincount(tie, weights=p)
    q_tie = np.bincount(tie, weights=1 - p)
    below = np.cumsum(q_tie) - q_tie
    return float(np.sum(p_tie * (below + 0.5 * q_tie)) / (positives * negatives))


class Draws(NamedTuple):
    """Draws of a click's unknown listing.

    They are conditional on the click's user and store: arrays [n, D] of D draws for each click.
    """

    visual_term: np.ndarray
    text_term: np.ndarray
    image_ok: np.ndarray
    text_ok: np.ndarray
    mismatched: np.ndarray


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def conditional_p_order(terms: ClickTerms, draws: Draws, config: CityConfig, known: tuple[str, ...]) -> np.ndarray:
    """Compute the probability of an order given what is known.

    It is conditional on the click, class, context and the terms in `known`, float64 [n]: the best
    possible score with that knowledge.

    Σ_d P(click | d) P(order | d) / Σ_d P(click | d) over draws d of the unknown terms: the click
    itself is evidence about them, as a user who clicked in spite of a high price had another
    reason. Exposure is no evidence, as it does not depend on content.

    `known`, names of `Draws`: visual_term, text_term (of the true product); image_ok, text_ok (then
    the term is known where it is ok); mismatched. Where image_ok and text_ok are known, draws are
    weighted by the rate of mismatched listings like them.
    """

    def value(name: str) -> np.ndarray:
        own: np.ndarray = getattr(terms, name)[:, None]
        drawn: np.ndarray = getattr(draws, name)
        if name in known:
            return np.broadcast_to(own, drawn.shape)
        flag = {"visual_term": "image_ok", "text_term": "text_ok"}.get(name)
        # A term that is displayed correctly is known.
        return np.where(getattr(terms, flag)[:, None], own, drawn) if flag in known else drawn

    visual, text, image_ok, text_ok, mismatched = (value(name) for name in Draws._fields)
    a, o = terms.class_term[:, None], terms.context_term[:, None]
    weight = _sigmoid(
        config.click_bias
        + config.click_class * a
        + config.click_context * o
        + (config.click_visual * visual) * image_ok
        + (config.click_text * text) * text_ok
        + config.click_bad_image * ~image_ok
        + config.click_bad_text * ~text_ok
    )
    logit = (
        config.order_bias
        + config.order_class * a
        + config.order_context * o
        + config.order_visual * visual
        + config.order_text * text
    )
    p: np.ndarray
    if "image_ok" in known and "mismatched" not in known:
        rate = _mismatch_rate(terms, draws)[:, None]
        p = (1 - rate) * _sigmoid(logit) + rate * _sigmoid(logit + config.order_mismatch)
    else:
        p = _sigmoid(logit + config.order_mismatch * mismatched)
    return np.asarray((weight * p).sum(axis=1) / weight.sum(axis=1), dtype=np.float64)


def _mismatch_rate(terms: ClickTerms, draws: Draws) -> np.ndarray:
    """Return the rate of mismatched listings for each click, [n].

    It is taken among all draws whose photo and title are as correct as the click's.
    """
    kind = 2 * draws.image_ok.ravel() + draws.text_ok.ravel()
    count = np.maximum(np.bincount(kind, minlength=4), 1)
    rate = np.bincount(kind, weights=draws.mismatched.ravel(), minlength=4) / count
    return np.asarray(rate[2 * terms.image_ok + terms.text_ok])


def expected_ladder(terms: ClickTerms, draws: Draws, config: CityConfig) -> dict[str, float]:
    """Compute expected AUC of scores with increasing knowledge.

    It is in clicked space, with users' preferences known. Keys are LADDER_RUNGS.

    - class_context: a and o.
    - clean_text: a and o, and t̂ of every listing, as if no title were spoilt.
    - clean_image: a and o, and v̂ of every listing, as if no photo were spoilt.
    - as_displayed: a and o; t̂ and v̂ where title and photo are unspoilt, and for each whether it is.
    - mismatch_known: as_displayed, and whether photo or title is another class's.
    - true_probability: the probability that the order was drawn with.

    Each but the last is `conditional_p_order` of its known terms.
    """
    known = {
        "class_context": (),
        "clean_text": ("text_term",),
        "clean_image": ("visual_term",),
        "as_displayed": ("image_ok", "text_ok"),
        "mismatch_known": ("image_ok", "text_ok", "mismatched"),
    }
    ladder = {
        name: expected_auc(terms.p_order, conditional_p_order(terms, draws, config, what))
        for name, what in known.items()
    }
    ladder["true_probability"] = expected_auc(terms.p_order, terms.p_order)
    return ladder
