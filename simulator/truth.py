"""Known truth: expected AUC under true probabilities, and the ladder of what can be known of an order after a click."""

from typing import NamedTuple

import numpy as np

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
    """What the true order probability is made of, arrays of length n: terms of docs/city.md and the listing's state."""

    class_term: np.ndarray
    context_term: np.ndarray
    visual_term: np.ndarray
    text_term: np.ndarray
    image_ok: np.ndarray
    text_ok: np.ndarray
    mismatched: np.ndarray
    p_order: np.ndarray


def expected_auc(p: np.ndarray, s: np.ndarray) -> float:
    """AUC that score `s` [n] is expected to have on labels drawn with probability `p` [n].

    Σ_ij p_i (1 − p_j) ([s_i > s_j] + ½ [s_i = s_j]) / (Σp · Σ(1 − p)), in O(n log n) by sorting (docs/city.md).

    Raises:
        ValueError: different lengths, a p outside 0 to 1, a score that is not a number, or Σp · Σ(1 − p) = 0.
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


def best_linear_score(p: np.ndarray, known: list[np.ndarray]) -> np.ndarray:
    """The logistic regression on `known` (each [n]) that fits the true `p` [n] best, as a score (logit) [n].

    Refitting, instead of leaving terms out of the true formula, accounts for what a click itself tells of the terms
    that are not known: who clicked in spite of a high price had another reason. Newton's method on the expected log
    loss; a tiny ridge keeps constant columns harmless.
    """
    x = np.column_stack([np.ones(len(p)), *known]).astype(np.float64)
    weights = np.zeros(x.shape[1])
    ridge = 1e-6 * len(p) * np.eye(x.shape[1])
    for _ in range(25):
        q = 1.0 / (1.0 + np.exp(-(x @ weights)))
        hessian = (x * (q * (1 - q))[:, None]).T @ x + ridge
        step = np.linalg.solve(hessian, x.T @ (p - q) - ridge @ weights)
        weights += step
        if np.abs(step).max() < 1e-8:
            break
    return x @ weights


def expected_ladder(terms: ClickTerms) -> dict[str, float]:
    """Expected AUC in clicked space of ever better informed scores, with users' tastes known; keys LADDER_RUNGS.

    class_context     a and o.
    clean_text        a and o, and t̂ of every listing, as if no title were spoilt.
    clean_image       a and o, and v̂ of every listing, as if no photo were spoilt.
    as_displayed      a and o; t̂ and v̂ where title and photo are unspoilt, and for each whether it is.
    mismatch_known    as_displayed, and whether photo or title is another class's.
    true_probability  the probability that the order was drawn with.

    Each but the last is `best_linear_score` of what it knows.
    """
    base = [terms.class_term, terms.context_term]
    displayed = [
        *base,
        terms.text_term * terms.text_ok,
        terms.visual_term * terms.image_ok,
        terms.text_ok,
        terms.image_ok,
    ]
    known = {
        "class_context": base,
        "clean_text": [*base, terms.text_term],
        "clean_image": [*base, terms.visual_term],
        "as_displayed": displayed,
        "mismatch_known": [*displayed, terms.mismatched],
    }
    ladder = {name: expected_auc(terms.p_order, best_linear_score(terms.p_order, x)) for name, x in known.items()}
    ladder["true_probability"] = expected_auc(terms.p_order, terms.p_order)
    return ladder
