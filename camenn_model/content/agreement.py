"""Agreement of a listing's photo and title.

It tells whether the two belong together, judged by the listings of other products. [ours;
docs/decisions/0020-agreement-by-csls.md has the figures]

Shapes: n listings that have both, p and q widths of the frozen encoders' mean features, k shared
directions, B listings of a bank.

The cosine of photo and title in the directions that the two share (`canonical_directions.py`) takes
a vague photo for a wrong one: a dark photo is not like any title, a title that says "special offer"
is not like any photo. So it is held against what the photo has with the ten titles of other
listings that suit it best, and the title with the ten photos, as in cross-domain similarity local
scaling (Conneau et al. 2018). A photo that suits many titles well and its own badly is another
product's. What these three figures tell together is a logistic regression on them, their squares
and products, of listings' own pairs against pairs of two listings.

Everything is cross-fitted: products are in folds, and a listing's photo and title are judged by
directions and a bank of the other folds' listings.
"""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from camenn_model.calibration import sigmoid
from camenn_model.content.arrays import read_arrays, write_arrays
from camenn_model.content.canonical_directions import PENALTIES, choose_penalty, find_shared, units_along

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]

FILE = "agreement.safetensors"
"""In a package"""
FOLDS = 5
"""Parts of the products"""
DIRECTIONS = 64
NEIGHBOURS = 10
LEAST_FITTED = 40
"""With fewer there is no direction that they share, and nothing is judged."""
MOST_BANK = 4_096
"""Listings that a photo and a title are held against"""
BLOCK = 1_024
"""Listings that are judged at a time"""
PENALTY = 1.0
"""Half of it times the sum of squares of a regression's weights is added to its summed log loss."""
TINY = 1e-12
COSINE, IMAGE_NEIGHBOURS, TEXT_NEIGHBOURS = range(3)
"""Columns of the figures: of own photo and title; mean of the photo with the titles that suit it
best; mean of the title with the photos
"""
HEADS = {
    "ita": (COSINE, IMAGE_NEIGHBOURS),
    "tia": (COSINE, TEXT_NEIGHBOURS),
    "both": (COSINE, IMAGE_NEIGHBOURS, TEXT_NEIGHBOURS),
}
"""Which figures a probability is read from: whether another title would suit the photo better,
whether another photo the title, and both
"""


@dataclass(frozen=True)
class Judgement:
    """The judgement of each listing, arrays [n].

    NaN where photo or title is missing, or nothing can be judged.
    """

    cosine: NDArray[np.float32]
    ita: NDArray[np.float32]
    """Probability that the title belongs to the photo, of pairs half of which do"""
    tia: NDArray[np.float32]
    """That the photo belongs to the title"""
    agreement: NDArray[np.float32]
    """Log-odds that they belong together, by all figures"""

    @property
    def mismatch(self) -> NDArray[np.float32]:
        """Return the probability that they do not belong together."""
        return sigmoid(-self.agreement).astype(np.float32)


@dataclass(frozen=True)
class FoldJudge:
    """The judge of one fold's listings.

    It is found on the listings of the other folds.
    """

    image_mean: Floats  # [p]
    text_mean: Floats  # [q]
    image_map: Floats  # [p, k]
    text_map: Floats  # [q, k]
    image_bank: Floats  # [B, k], unit vectors
    text_bank: Floats  # [B, k]

    @classmethod
    def fit(cls, images: Floats, titles: Floats, penalty: float) -> "FoldJudge":
        """Fit on mean features of the same listings.

        They are [n, p] and [n, q].
        """
        *directions, correlations = find_shared(images, titles, DIRECTIONS, penalty)
        maps = [(columns * np.sqrt(correlations)).astype(np.float32) for columns in directions]
        means = [features.mean(axis=0, dtype=np.float64).astype(np.float32) for features in (images, titles)]
        banks = [
            units_along(features[:MOST_BANK], *side).astype(np.float32)
            for features, *side in zip((images, titles), means, maps, strict=True)
        ]
        return cls(*means, *maps, *banks)

    def figures(self, images: Floats, titles: Floats) -> Floats:
        """Compute the figures of pairs of photo and title.

        From mean features [n, p] and [n, q] come cosine and reaches, float64 [n, 3].
        """
        photos = units_along(images, self.image_mean, self.image_map)
        said = units_along(titles, self.text_mean, self.text_map)
        cosine = (photos * said).sum(axis=1)
        return np.stack(
            [cosine, _mean_top_k_cosine(photos, self.text_bank), _mean_top_k_cosine(said, self.image_bank)], axis=1
        )


@dataclass(frozen=True)
class Agreement:
    """The judges of all folds and the regressions' weights.

    There are no judges where too few listings have both photo and title.
    """

    folds: tuple[FoldJudge, ...]
    center: Floats  # [3], of the figures
    scale: Floats  # [3]
    weights: dict[str, Floats]
    """Of each head: of its figures, of their products in pairs, of their squares; and the intercept"""
    penalty: float
    """On the directions, see `choose_penalty`"""

    @classmethod
    def none(cls) -> "Agreement":
        """Return an agreement that judges nothing."""
        return cls((), np.zeros(3), np.ones(3), {}, PENALTIES[-1])

    @classmethod
    def fit(cls, images: Floats, titles: Floats, product: NDArray[np.uint64], fold: Ints) -> "Agreement":
        """Fit the judges of all folds.

        It takes listings' mean features [n, p] and [n, q], their products, and the folds that these
        are in. A fold's bank is of the first of the others' listings.
        """
        images, titles = (side.astype(np.float32) for side in (images, titles))
        enough = all((fold != place).sum() >= LEAST_FITTED for place in range(FOLDS))
        distinct, number = np.unique(product, return_inverse=True)
        if not enough or len(distinct) < 2 * FOLDS:
            return cls.none()
        penalty = choose_penalty(images, titles, number.astype(np.int64), DIRECTIONS)
        judges: list[FoldJudge] = []
        figures: list[Floats] = []
        belongs: list[Floats] = []
        rng = np.random.default_rng(0)
        for place in range(FOLDS):
            known, asked = fold != place, np.flatnonzero(fold == place)
            judge = FoldJudge.fit(images[known], titles[known], penalty)
            judges.append(judge)
            other = asked[rng.permutation(len(asked))]
            foreign = number[asked] != number[other]
            for own, photo, title in ((1.0, asked, asked), (0.0, asked[foreign], other[foreign])):
                figures.append(judge.figures(images[photo], titles[title]))
                belongs.append(np.full(len(photo), own))
        found, label = np.concatenate(figures), np.concatenate(belongs)
        center, scale = found.mean(axis=0), found.std(axis=0) + TINY
        standard = (found - center) / scale
        weights = {name: fit_logistic(_expand(standard[:, columns]), label) for name, columns in HEADS.items()}
        return cls(tuple(judges), center, scale, weights, penalty)

    def log_odds(self, figures: Floats, head: str) -> Floats:
        """Return log odds that photo and title belong together.

        They are [n], for pairs half of which do.
        """
        standard = (figures - self.center) / self.scale
        return _expand(standard[:, HEADS[head]]) @ self.weights[head]

    def judge(self, images: Floats, titles: Floats, image_row: Ints, title_row: Ints, fold: Ints) -> Judgement:
        """Judge N listings, each by the judge of its fold.

        Args:
            images: mean features of the distinct photos.
            titles: mean features of the distinct titles.
            image_row: each listing's row of `images`, [N]; -1 = none.
            title_row: each listing's row of `titles`, [N]; -1 = none.
            fold: each listing's, [N].
        """
        found = np.full((4, len(fold)), np.nan, dtype=np.float32)
        both = (image_row >= 0) & (title_row >= 0)
        for place in range(len(self.folds)):
            mine = np.flatnonzero(both & (fold == place))
            for start in range(0, len(mine), BLOCK):
                rows = mine[start : start + BLOCK]
                figures = self.folds[place].figures(images[image_row[rows]], titles[title_row[rows]])
                ita, tia, odds = (self.log_odds(figures, head) for head in HEADS)
                found[:, rows] = figures[:, COSINE], sigmoid(ita), sigmoid(tia), odds
        return Judgement(*found)

    def write(self, directory: Path) -> None:
        """Write one safetensors file into a package."""
        arrays = {"center": self.center, "scale": self.scale, "penalty": np.array([self.penalty])}
        arrays |= {f"head.{name}": weights for name, weights in self.weights.items()}
        for place, judge in enumerate(self.folds):
            arrays |= {f"fold{place}.{name}": value for name, value in vars(judge).items()}
        write_arrays(directory / FILE, arrays)

    @classmethod
    def read(cls, directory: Path) -> "Agreement":
        """Read what `write` wrote.

        Raises:
            InputError: the file is missing or damaged.
        """
        arrays = read_arrays(directory / FILE)

        def part(prefix: str) -> dict[str, Floats]:
            return {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}

        folds = [part(f"fold{place}.") for place in range(FOLDS)]
        judges = tuple(FoldJudge(**fold) for fold in folds if fold)
        return cls(judges, arrays["center"], arrays["scale"], part("head."), float(arrays["penalty"][0]))


def fit_logistic(x: Floats, y: Floats, rounds: int = 50) -> Floats:
    """Fit a logistic regression by Newton's method.

    Returns its weights [m] on x [n, m], the last column of which is 1. All weights but the last are
    held back by `PENALTY`.
    """
    held = np.full(x.shape[1], PENALTY)
    held[-1] = TINY
    weights = np.zeros(x.shape[1])
    for _ in range(rounds):
        p = sigmoid(x @ weights)
        slope = x.T @ (p - y) + held * weights
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + np.diag(held), slope)
        # Far steps overshoot where classes are all but separable.
        weights = weights - step * min(1.0, 4.0 / (np.abs(step).max() + TINY))
        if np.abs(step).max() < 1e-10:
            break
    return weights


def _expand(x: Floats) -> Floats:
    """Expand figures [n, f] to the regression's columns.

    They are the figures, their products in pairs, their squares, and 1.
    """
    pairs = [x[:, a] * x[:, b] for a, b in combinations(range(x.shape[1]), 2)]
    return np.stack([*x.T, *pairs, *np.square(x.T), np.ones(len(x))], axis=1)


def _mean_top_k_cosine(vectors: Floats, bank: Floats) -> Floats:
    similar = vectors @ bank.T.astype(np.float64)
    count = min(NEIGHBOURS, similar.shape[1])
    mean: Floats = np.partition(similar, similar.shape[1] - count, axis=1)[:, -count:].mean(axis=1)
    return mean
