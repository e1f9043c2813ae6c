"""Where the projections of photos and titles start: on the directions that the two share, and on each one's own. [ours; docs/decisions.md has the figures]

Shapes: n listings that have both, p and q widths of the frozen encoders' mean features, d width of the model.

A random projection to a small width keeps little of what a photo tells, and contrastive learning on some thousands of listings finds in hours what a matrix
decomposition finds in a second. So the first half of the dimensions starts with the canonical directions (Hotelling 1936): those in which photos and titles of the
same listings correlate most. What only one of them tells (how fresh something looks, whether it is organic) is not in these by construction; it is in the directions in
which a modality varies most once the shared ones are taken out, and those fill the other half. Both are where training starts, not where it ends.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]

PENALTY = 0.001
"""On the canonical directions, times the mean eigenvalue of the features' covariance."""
LISTINGS_PER_DIRECTION = 8
"""Fewer listings give fewer directions: they would be those of single listings."""
SPREAD = 0.5
"""Standard deviation over listings of what a projection gives in each dimension."""
TINY = 1e-12
NEGLIGIBLE = 1e-3
"""Shared directions of less correlation, and own ones along which less than this share of a feature's usual spread is left, are left out."""


def _inverse_root(covariance: Floats, penalty: float) -> Floats:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors / np.sqrt(np.maximum(values + penalty * values.mean(), TINY))) @ vectors.T


def canonical_directions(images: Floats, titles: Floats, penalty: float, count: int) -> tuple[Floats, Floats, Floats]:
    """Regularised canonical correlation analysis of centred features [n, p] and [n, q]: directions [p, k], [q, k] and correlations [k], k ≤ `count`."""
    n = len(images)
    white_images = _inverse_root(images.T @ images / n, penalty)
    white_titles = _inverse_root(titles.T @ titles / n, penalty)
    left, correlations, right = np.linalg.svd(
        white_images @ (images.T @ titles / n) @ white_titles, full_matrices=False
    )
    return white_images @ left[:, :count], white_titles @ right[:count].T, correlations[:count]


def own_directions(features: Floats, shared: Floats, count: int) -> Floats:
    """Principal directions [p, k], k ≤ `count`, of centred features [n, p] once what follows from their values along `shared` [p, s] is taken out of them.

    Values along them are not correlated with those along `shared`.
    """
    residual, follows = features, np.zeros((0, features.shape[1]), features.dtype)
    if shared.shape[1]:
        along = features @ shared
        follows = np.linalg.lstsq(along, features, rcond=None)[0]
        residual = features - along @ follows
    values, vectors = np.linalg.eigh(residual.T @ residual / len(residual))
    widest = np.argsort(-values)[:count]
    spread = np.sqrt(np.maximum(values[widest], 0))
    usual = np.sqrt(np.square(features).mean())
    principal = vectors[:, widest[spread > NEGLIGIBLE * usual + TINY]]
    return principal - shared @ (follows @ principal)


def principal_directions(features: Floats, count: int) -> Floats:
    """Directions [p, k], k ≤ `count`, in which features [n, p] vary most; along each they have standard deviation 1."""
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    found = own_directions(
        centred, np.zeros((features.shape[1], 0)), min(count, len(features) // LISTINGS_PER_DIRECTION)
    )
    return (found / (centred @ found).std(axis=0)).astype(np.float32)


@dataclass(frozen=True)
class Start:
    """Maps of raw features less their means. Along each of their columns the listings that they were found on have mean 0 and standard deviation `SPREAD`."""

    image: Floats  # [p, m], m ≤ d: shared directions first
    text: Floats  # [q, m']
    shared_image: Floats  # [p, s]: shared directions, the most correlated first
    shared_text: Floats  # [q, s]
    correlations: Floats  # [s]


def find_start(images: Floats, titles: Floats, width: int, size: int, *, aligned: bool) -> Start:
    """Where the projections to `width` start, and those to `size` that photos and titles are compared by.

    Without `aligned` nothing is taken from what photos tell of titles: all directions are own ones.

    Args:
        images, titles: mean features [n, p] and [n, q] of the same listings.
    """
    sides = [_standardise(features) for features in (images, titles)]
    *shared, correlations = _shared_directions(sides[0][0], sides[1][0], size if aligned else 0)
    maps = []
    for side, directions in zip(sides, shared, strict=True):
        first = directions[:, : width // 2]
        own = own_directions(side[0], first, min(width - first.shape[1], len(images) // LISTINGS_PER_DIRECTION))
        maps.append(_raw_map(*side, np.concatenate([first, own], axis=1)))
    both = [_raw_map(*side, directions) for side, directions in zip(sides, shared, strict=True)]
    return Start(maps[0], maps[1], both[0], both[1], correlations)


def find_shared(images: Floats, titles: Floats, count: int) -> tuple[Floats, Floats, Floats]:
    """`Start.shared_image` [p, k], `Start.shared_text` [q, k] and their correlations [k], k ≤ `count`, without the rest."""
    sides = [_standardise(features) for features in (images, titles)]
    of_images, of_titles, correlations = _shared_directions(sides[0][0], sides[1][0], count)
    return _raw_map(*sides[0], of_images), _raw_map(*sides[1], of_titles), correlations


def _standardise(features: Floats) -> tuple[Floats, Floats]:
    """(standardised [n, p], scale [p])."""
    spread = features.std(axis=0)
    scale = 1.0 / (spread + 0.1 * spread.mean() + 1e-6)
    return (features - features.mean(axis=0)) * scale, scale


def _shared_directions(images: Floats, titles: Floats, count: int) -> tuple[Floats, Floats, Floats]:
    """`canonical_directions` of standardised features: as many as the listings allow, less negligible ones."""
    limit = len(images) // LISTINGS_PER_DIRECTION
    of_images, of_titles, correlations = canonical_directions(images, titles, PENALTY, min(count, limit))
    kept = int((correlations > NEGLIGIBLE).sum())
    return of_images[:, :kept], of_titles[:, :kept], correlations[:kept]


def _raw_map(features: Floats, scale: Floats, columns: Floats) -> Floats:
    """From directions of standardised features to those of raw ones, with a spread of `SPREAD` along each."""
    spread = (features @ columns).std(axis=0)
    return (scale[:, None] * columns * (SPREAD / spread)).astype(np.float32)
