"""Prices against those of the most similar listings.

Similar are those that look and read most like a listing. [ours;
docs/decisions/0012-price-against-similar.md has the figures]

Shapes: N listings, of which n have photo and title; p and q widths of the frozen encoders' mean
features, k shared directions.

What people find dear is dear for what it is, and a subcategory is coarser than that: among hot
drinks all coffee is dear. Photo and title together tell what something is. So a price is compared
with the prices of those listings of the subcategory that are most alike in the directions which
photos and titles share (`canonical_directions.py`).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from camenn_model.content.arrays import read_arrays, write_arrays
from camenn_model.content.canonical_directions import find_shared, units_along

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]

FILE = "likeness.safetensors"
"""In a package"""
DIRECTIONS = 64
POWER = 2
"""Of a direction's correlation: how much it counts in what is alike. Those that photos and titles
hardly share are noise.
"""
NEIGHBOURS = 10
MOST_REFERENCES = 2_048
"""Listings of a subcategory that its listings are compared with: those of the smallest hashes, so
that a new listing changes few prices' neighbours.
"""
BLOCK = 256
"""Listings that are looked at at a time: what a block needs is beside what a catalog needs anyway"""
DIGITS = 9
"""Similarities are float64, rounded so far: how many threads added them up must not tell who is near."""


@dataclass(frozen=True)
class Likeness:
    """Maps of mean features onto the shared directions.

    Photos and titles share these. There are none where too few listings have both.
    """

    image: Floats  # [p, k] float32
    text: Floats  # [q, k]
    image_mean: Floats  # [p]
    text_mean: Floats  # [q]

    @classmethod
    def fit(cls, images: Floats, titles: Floats) -> "Likeness":
        """Fit on mean features of the same listings.

        They are [n, p] and [n, q].
        """
        images, titles = images.astype(np.float32), titles.astype(np.float32)
        means = [features.mean(axis=0) if len(features) else features.sum(axis=0) for features in (images, titles)]
        if len(images):
            *directions, correlations = find_shared(images, titles, DIRECTIONS)
            maps = [(columns * correlations**POWER).astype(np.float32) for columns in directions]
        else:
            maps = [np.zeros((features.shape[1], 0), np.float32) for features in (images, titles)]
        return cls(*maps, *means)

    def vectors(self, images: Floats, titles: Floats, image_row: Ints, title_row: Ints) -> NDArray[np.float32]:
        """Return vectors whose dot products tell likeness, [N, 2k].

        The dot product of two listings' is the cosine of their photos plus that of their titles,
        where both have one.

        Args:
            images: mean features of the distinct photos, of any number.
            titles: mean features of the distinct titles, of any number.
            image_row: each listing's row of `images`, [N]; -1 = none.
            title_row: each listing's row of `titles`, [N]; -1 = none.
        """
        size = self.image.shape[1]
        found = np.zeros((len(image_row), 2 * size), dtype=np.float32)
        for side, (features, row, mean, directions) in enumerate(
            ((images, image_row, self.image_mean, self.image), (titles, title_row, self.text_mean, self.text))
        ):
            # A block at a time: a catalog's features are large.
            units = np.zeros((len(features) + 1, size), dtype=np.float32)
            for start in range(0, len(features), BLOCK):
                block = features[start : start + BLOCK]
                units[start : start + len(block)] = units_along(block, mean, directions)
            found[:, side * size : (side + 1) * size] = units[row]
        return found

    def write(self, directory: Path) -> None:
        """Write one safetensors file into a package."""
        write_arrays(directory / FILE, vars(self))

    @classmethod
    def read(cls, directory: Path) -> "Likeness":
        """Read what `write` wrote.

        Raises:
            InputError: the file is missing or damaged.
        """
        return cls(**read_arrays(directory / FILE))


def alike_prices(vectors: Floats, price: Floats, group: Ints, rank: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Compare each price with those of the most alike listings.

    Returns log(price / median price of the 10 listings of the same group that are most alike),
    float32 [N].

    NaN where the price is unknown or not positive, where a listing has neither photo nor title, and
    where no other of the group has both a price and one of them.

    Args:
        vectors: `Likeness.vectors`.
        price: currency units, NaN = unknown.
        group: subcategory.
        rank: tells the listings that a large group is compared with, and which of two that are
            equally alike comes first. The smallest do.
    """
    found = np.full(len(price), np.nan, dtype=np.float32)
    usable = np.flatnonzero((price > 0) & vectors.any(axis=1))
    order = usable[np.lexsort((rank[usable], group[usable]))]
    logs = np.zeros(len(price))
    logs[usable] = np.log(price[usable].astype(np.float64))
    edges = np.flatnonzero(np.diff(group[order], prepend=-1, append=-1))
    for first, last in zip(edges[:-1], edges[1:], strict=True):
        members = order[first:last]
        references = members[:MOST_REFERENCES]
        for start in range(0, len(members), BLOCK):
            block = members[start : start + BLOCK]
            alike = np.round(vectors[block].astype(np.float64) @ vectors[references].T.astype(np.float64), DIGITS)
            alike -= np.arange(len(references)) * (0.1**DIGITS / (2 * MOST_REFERENCES))
            own = np.arange(start, min(start + len(block), len(references)))
            alike[own - start, own] = -np.inf
            # A block is of references, or of none: MOST_REFERENCES is a multiple of BLOCK.
            count = min(NEIGHBOURS, len(references) - (len(own) > 0))
            if count:
                nearest = np.argpartition(-alike, count - 1, axis=1)[:, :count]
                found[block] = logs[block] - np.median(logs[references[nearest]], axis=1)
    return found
