"""Agreement of a listing's photo and title.

It estimates whether the two belong together, from the listings of other products. [ours;
docs/decisions/0020-agreement-by-csls.md has the figures]

Shapes: n listings that have both, p and q widths of the frozen encoders' mean features, k shared
directions, B listings of a bank.

The cosine of photo and title in their shared directions (`canonical_directions.py`) mistakes a
vague photo for a wrong one: a dark photo is similar to no title, and a title such as "special
offer" to no photo. So it is compared with the photo's mean cosine to its ten nearest titles of
other listings, and with the title's mean cosine to its ten nearest photos, as in cross-domain
similarity local scaling (CSLS, Conneau et al. 2018). A photo that is close to many titles but far
from its own is another product's. A logistic regression combines the three figures, their squares
and products. Its classes are listings' own pairs and pairs of two listings.

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
"""Its file in a package"""
FOLDS = 5
"""Number of folds of the products"""
DIRECTIONS = 64
NEIGHBOURS = 10
LEAST_FITTED = 40
"""With fewer listings no shared direction is found, and nothing is judged."""
MOST_BANK = 4_096
"""Listings of a bank, which a photo and a title are compared with"""
BLOCK = 1_024
"""Listings that are judged in one block"""
PENALTY = 1.0
"""L2 penalty λ of a regression: λ/2·‖w‖² is added to its summed log loss."""
TINY = 1e-12
COSINE, IMAGE_NEIGHBOURS, TEXT_NEIGHBOURS = range(3)
"""Columns of the figures: cosine of own photo and title; mean top-k cosine of the photo with titles
(CSLS); mean top-k cosine of the title with photos
"""
HEADS = {
    "ita": (COSINE, IMAGE_NEIGHBOURS),
    "tia": (COSINE, TEXT_NEIGHBOURS),
    "both": (COSINE, IMAGE_NEIGHBOURS, TEXT_NEIGHBOURS),
}
"""The figures of each probability: for whether another title would suit the photo better, whether
another photo would suit the title better, and both
"""


@dataclass(frozen=True)
class Judgement:
    """The judgement of each listing, arrays [n].

    NaN where photo or title is missing, or nothing can be judged.
    """

    cosine: NDArray[np.float32]
    ita: NDArray[np.float32]
    """Probability that the title belongs to the photo, at a prior of one half"""
    tia: NDArray[np.float32]
    """Probability that the photo belongs to the title"""
    agreement: NDArray[np.float32]
    """Log-odds that they belong together, from all figures"""

    @property
    def mismatch(self) -> NDArray[np.float32]:
        """Return the probability that they do not belong together."""
        return sigmoid(-self.agreement).astype(np.float32)


@dataclass(frozen=True)
class FoldJudge:
    """The judge of one fold's listings.

    It is fitted on the listings of the other folds.
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

        Mean features [n, p] and [n, q] give the cosine and two mean top-k cosines (CSLS), float64
        [n, 3].
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
    """Weights of each head: of its figures, of their pairwise products, of their squares; and the intercept"""
    penalty: float
    """Penalty on the directions, see `choose_penalty`"""

    @classmethod
    def none(cls) -> "Agreement":
        """Return an agreement that judges nothing."""
        return cls((), np.zeros(3), np.ones(3), {}, PENALTIES[-1])

    @classmethod
    def fit(cls, images: Floats, titles: Floats, product: NDArray[np.uint64], fold: Ints) -> "Agreement":
        """Fit the judges of all folds.

        It takes listings' mean features [n, p] and [n, q], their products, and the folds that these
        are in. A fold's bank holds the first of the other folds' listings.
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

        They are [n], at a prior of one half.
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

    Returns its weights [m] on x [n, m], the last column of which is 1. All weights but the last
    take the L2 penalty `PENALTY`.
    """
    held = np.full(x.shape[1], PENALTY)
    held[-1] = TINY
    weights = np.zeros(x.shape[1])
    for _ in range(rounds):
        p = sigmoid(x @ weights)
        slope = x.T @ (p - y) + held * weights
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + np.diag(held), slope)
        # Full steps overshoot where classes are nearly separable.
        weights = weights - step * min(1.0, 4.0 / (np.abs(step).max() + TINY))
        if np.abs(step).max() < 1e-10:
            break
    return weights


def _expand(x: Floats) -> Floats:
    """Expand figures [n, f] to the regression's columns.

    They are the figures, their pairwise products, their squares, and 1.
    """
    pairs = [x[:, a] * x[:, b] for a, b in combinations(range(x.shape[1]), 2)]
    return np.stack([*x.T, *pairs, *np.square(x.T), np.ones(len(x))], axis=1)


def _mean_top_k_cosine(vectors: Floats, bank: Floats) -> Floats:
    similar = vectors @ bank.T.astype(np.float64)
    count = min(NEIGHBOURS, similar.shape[1])
    mean: Floats = np.partition(similar, similar.shape[1] - count, axis=1)[:, -count:].mean(axis=1)
    return mean
