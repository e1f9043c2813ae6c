"""Distributions of probabilities.

They are histograms by log-odds, compared by the population stability index.
"""

import numpy as np
from numpy.typing import NDArray

EDGES = np.linspace(-14.0, 14.0, 2801)
"""Edges of the bins in log-odds: a step is 1 % of the odds, fine enough for deciles."""

Counts = NDArray[np.int64]


def histogram(cvr: NDArray[np.float64]) -> Counts:
    """Count probabilities by log-odds, int64 [2802]."""
    clipped = np.clip(cvr, 1e-7, 1 - 1e-7)
    bins = np.searchsorted(EDGES, np.log(clipped / (1 - clipped)), side="right")
    return np.bincount(bins, minlength=len(EDGES) + 1)


def decile_shares(now: NDArray[np.float64] | Counts, before: NDArray[np.float64] | Counts) -> NDArray[np.float64]:
    """Return shares within the deciles of another histogram.

    They are the shares float64 [10] of the histogram `now` within the deciles of the histogram
    `before`. Both are [bins], counts or shares.
    """
    reached = np.cumsum(before) / max(before.sum(), 1e-300)
    # A bin belongs to the decile in which its middle lies.
    middle = reached - before / max(before.sum(), 1e-300) / 2
    decile = np.minimum((middle * 10).astype(int), 9)
    return np.asarray(np.bincount(decile, weights=now, minlength=10) / max(now.sum(), 1e-300))


def population_stability_index(found: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    """Compute the population stability index.

    It is Σ (q - p) ln(q / p) over shares p, q: below 0.1 is interpreted as stable, above 0.2 as
    shifted. Empty cells count as 1e-4.
    """
    q, p = np.maximum(found, 1e-4), np.maximum(expected, 1e-4)
    return float(np.sum((q - p) * np.log(q / p)))
