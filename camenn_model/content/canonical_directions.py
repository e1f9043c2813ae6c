"""Directions that initialize the projections of photos and titles.

They are the directions that the two share, and each one's own. [ours;
docs/decisions/0019-canonical-directions.md has the figures]

Shapes: n listings that have both, p and q widths of the frozen encoders' mean features, d width of
the model.

A random projection to a small width loses most of a photo's information, and contrastive learning
on some thousands of listings takes hours for what a matrix decomposition finds in a second. So the
first half of the dimensions starts with the canonical directions (Hotelling 1936): those in which
photos and titles of the same listings correlate most. Information in only one of them (how fresh
something looks, whether it is organic) is excluded from these by construction. It is in the
directions in which a modality varies most once the shared ones are removed, and those fill the
other half. Both are only initial values: training changes them.

A penalty keeps the canonical directions from overfitting single listings. Some hundred listings
need a thousand times the penalty of some thousand, so it is cross-validated.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]

PENALTY = 0.001
"""Default penalty on the canonical directions, in units of the mean eigenvalue of the features'
covariance, where it is not cross-validated.
"""
PENALTIES = (0.001, 0.01, 0.1, 1.0, 10.0)
"""Candidates of the cross-validation."""
PENALTY_FOLDS = 5
LISTINGS_PER_DIRECTION = 8
"""Fewer listings give fewer directions, as more would overfit single listings."""
SPREAD = 0.5
"""Standard deviation over listings of a projection's output in each dimension."""
TINY = 1e-12
NEGLIGIBLE = 1e-3
"""Shared directions with a smaller correlation are left out, and own ones along which less than
this share of a feature's usual spread remains.
"""


@dataclass(frozen=True)
class _Decomposed:
    """Centred features of n listings along their principal axes.

    The axes are those of their photos, [r], and of their titles, [r']. Directions of any penalty
    are computed from them alone.
    """

    image_axes: Floats  # [p, r]
    image_values: Floats  # [r]: eigenvalues
    image_mean: float
    """of all p eigenvalues"""
    text_axes: Floats  # [q, r']
    text_values: Floats
    text_mean: float
    cross: Floats  # [r, r']: covariance
    listings: int

    @classmethod
    def of(cls, images: Floats, titles: Floats) -> "_Decomposed":
        """Decompose centred features [n, p] and [n, q]."""
        sides = [(*_principal_axes(features), float(np.square(features).mean())) for features in (images, titles)]
        along = [features @ axes for features, (axes, *_) in zip((images, titles), sides, strict=True)]
        return cls(*sides[0], *sides[1], along[0].T @ along[1] / len(images), len(images))

    def directions(self, penalty: float, count: int) -> tuple[Floats, Floats, Floats]:
        """Compute the directions, see `canonical_directions`."""
        scales = [
            1 / np.sqrt(np.maximum(values + penalty * mean, TINY))
            for values, mean in ((self.image_values, self.image_mean), (self.text_values, self.text_mean))
        ]
        left, correlations, right = np.linalg.svd(scales[0][:, None] * self.cross * scales[1], full_matrices=False)
        return (
            self.image_axes @ (scales[0][:, None] * left[:, :count]),
            self.text_axes @ (scales[1][:, None] * right[:count].T),
            correlations[:count],
        )

    def shared(self, penalty: float, count: int) -> tuple[Floats, Floats, Floats]:
        """Return `directions` of standardised features.

        Their number is limited by the listings, and negligible ones are left out.
        """
        limit = self.listings // LISTINGS_PER_DIRECTION
        of_images, of_titles, correlations = self.directions(penalty, min(count, limit))
        kept = int((correlations > NEGLIGIBLE).sum())
        return of_images[:, :kept], of_titles[:, :kept], correlations[:kept]


def _principal_axes(features: Floats) -> tuple[Floats, Floats]:
    """Find the principal axes of centred features [n, p].

    Returns axes [p, r] and eigenvalues [r] of their covariance, r = min(n, p).
    """
    n, width = features.shape
    if n >= width:
        values, axes = np.linalg.eigh(features.T @ features / n)
        return axes, values
    _, roots, axes = np.linalg.svd(features, full_matrices=False)
    return axes.T, np.square(roots) / n


def canonical_directions(images: Floats, titles: Floats, penalty: float, count: int) -> tuple[Floats, Floats, Floats]:
    """Compute the regularised canonical correlation analysis of photos and titles.

    Returns directions [p, k], [q, k] and correlations [k], k ≤ `count`.

    Args:
        images: centred features [n, p].
        titles: centred features [n, q].
        penalty: added to each eigenvalue of the features' covariance, in units of their mean.
        count: most directions.
    """
    return _Decomposed.of(images, titles).directions(penalty, count)


def choose_penalty(images: Floats, titles: Floats, product: Ints, count: int) -> float:
    """Choose a penalty of `PENALTIES` by cross-validation.

    Directions fitted on four fifths of the products are evaluated by retrieval on the other fifth,
    from photos to titles and from titles to photos.

    The measure is the mean reciprocal rank of a listing's own title or photo among those of other
    products. Of the penalties within one standard error of the difference from the best, the
    largest is returned (the one-standard-error rule of Breiman et al. 1984).

    Args:
        images: mean features [n, p] of the listings.
        titles: mean features [n, q] of the same listings.
        product: of each listing, [n]. A product's listings stay in one fold, as directions must
            generalize to new products.
        count: most directions.
    """
    _, number = np.unique(product, return_inverse=True)
    fold = (np.random.default_rng(0).permutation(number.max(initial=-1) + 1) % PENALTY_FOLDS)[number]
    found = [np.zeros((len(PENALTIES), 0))]
    for asked in (fold == place for place in range(PENALTY_FOLDS)):
        known = ~asked
        if known.sum() < LISTINGS_PER_DIRECTION or not asked.any():
            continue
        sides = [_standardise(features[known]) for features in (images, titles)]
        queries = [features[asked] - features[known].mean(axis=0) for features in (images, titles)]
        rivals = product[asked, None] != product[asked]
        decomposed = _Decomposed.of(sides[0][0], sides[1][0])
        of_fold = []
        for penalty in PENALTIES:
            *directions, correlations = decomposed.shared(penalty, count)
            units = []
            for side, columns, query in zip(sides, directions, queries, strict=True):
                along = query @ (_raw_map(*side, columns) * np.sqrt(correlations))
                units.append(along / np.maximum(np.linalg.norm(along, axis=1, keepdims=True), TINY))
            similar = units[0] @ units[1].T
            of_fold.append((_reciprocal_ranks(similar, rivals) + _reciprocal_ranks(similar.T, rivals)) / 2)
        found.append(np.stack(of_fold))
    ranks = np.concatenate(found, axis=1)
    if not ranks.size:
        return PENALTIES[-1]
    worse = ranks[ranks.mean(axis=1).argmax()] - ranks
    alike = worse.mean(axis=1) <= worse.std(axis=1) / np.sqrt(ranks.shape[1])
    return max(penalty for penalty, so in zip(PENALTIES, alike, strict=True) if so)


def _reciprocal_ranks(similar: Floats, rivals: NDArray[np.bool_]) -> Floats:
    """Return the reciprocal rank of each row's own column.

    It is ranked among the row's rivals, [n]. A tie counts half.
    """
    own = np.diag(similar)[:, None]
    ahead = ((similar > own) & rivals).sum(axis=1) + ((similar == own) & rivals).sum(axis=1) / 2
    found: Floats = 1 / (1 + ahead)
    return found


def own_directions(features: Floats, shared: Floats, count: int) -> Floats:
    """Find the principal directions that a modality does not share.

    Returns [p, k], k ≤ `count`, of centred features [n, p] after regressing out their values along
    `shared` [p, s]. Values along them are not correlated with those along `shared`.
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
    """Find the directions in which features vary most.

    Returns [p, k], k ≤ `count`, of features [n, p]. Along each they have standard deviation 1.
    """
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    found = own_directions(
        centred, np.zeros((features.shape[1], 0)), min(count, len(features) // LISTINGS_PER_DIRECTION)
    )
    return (found / (centred @ found).std(axis=0)).astype(np.float32)


@dataclass(frozen=True)
class Start:
    """Maps of raw features less their means.

    Along each of their columns the listings that they were fitted on have mean 0 and standard
    deviation `SPREAD`.
    """

    image: Floats  # [p, m], m ≤ d: shared directions first
    text: Floats  # [q, m']
    shared_image: Floats  # [p, s]: shared directions, the most correlated first
    shared_text: Floats  # [q, s]
    correlations: Floats  # [s]


def find_start(
    images: Floats, titles: Floats, width: int, size: int, *, aligned: bool, penalty: float = PENALTY
) -> Start:
    """Compute the initial projections.

    Args:
        images: mean features [n, p] of the listings.
        titles: mean features [n, q] of the same listings.
        width: of the projections.
        size: of the projections that photos and titles are compared by.
        aligned: whether to use shared directions. Without it all directions are each modality's
            own.
        penalty: on the shared directions, see `choose_penalty`.
    """
    sides = [_standardise(features) for features in (images, titles)]
    *shared, correlations = _Decomposed.of(sides[0][0], sides[1][0]).shared(penalty, size if aligned else 0)
    maps = []
    for side, directions in zip(sides, shared, strict=True):
        first = directions[:, : width // 2]
        own = own_directions(side[0], first, min(width - first.shape[1], len(images) // LISTINGS_PER_DIRECTION))
        maps.append(_raw_map(*side, np.concatenate([first, own], axis=1)))
    both = [_raw_map(*side, directions) for side, directions in zip(sides, shared, strict=True)]
    return Start(maps[0], maps[1], both[0], both[1], correlations)


def find_shared(images: Floats, titles: Floats, count: int, penalty: float = PENALTY) -> tuple[Floats, Floats, Floats]:
    """Find only the shared directions of a start.

    Returns `Start.shared_image` [p, k], `Start.shared_text` [q, k] and their correlations [k], k ≤
    `count`, without the rest.
    """
    sides = [_standardise(features) for features in (images, titles)]
    of_images, of_titles, correlations = _Decomposed.of(sides[0][0], sides[1][0]).shared(penalty, count)
    return _raw_map(*sides[0], of_images), _raw_map(*sides[1], of_titles), correlations


def units_along(features: Floats, mean: Floats, directions: Floats) -> Floats:
    """Return unit vectors of features along directions.

    Features [n, p] along directions [p, k] give [n, k] float64, so that the number of threads does
    not affect the result.
    """
    along: Floats = (features.astype(np.float64) - mean) @ directions.astype(np.float64)
    return along / np.maximum(np.linalg.norm(along, axis=1, keepdims=True), TINY)


def _standardise(features: Floats) -> tuple[Floats, Floats]:
    """Return (standardised [n, p], scale [p])."""
    spread = features.std(axis=0)
    scale = 1.0 / (spread + 0.1 * spread.mean() + 1e-6)
    return (features - features.mean(axis=0)) * scale, scale


def _raw_map(features: Floats, scale: Floats, columns: Floats) -> Floats:
    """Convert directions of standardised features to raw ones.

    Raw features have a spread of `SPREAD` along each.
    """
    spread = (features @ columns).std(axis=0)
    return (scale[:, None] * columns * (SPREAD / spread)).astype(np.float32)
