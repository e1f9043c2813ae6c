"""Prices against those of the most similar listings.

Similarity is that of photos and titles. [ours; docs/decisions/0012-price-against-similar.md has the
figures]

Shapes: N listings, of which n have photo and title; p and q widths of the frozen encoders' mean
features, k shared directions.

People judge a price against those of comparable products, and a subcategory is too coarse for that:
among hot drinks all coffee is expensive. Photo and title together identify the product. So a price
is compared with those of the most similar listings of the subcategory, in the directions that
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
"""Its file in a package"""
DIRECTIONS = 64
POWER = 2
"""Exponent of a direction's correlation in its weight in the similarity. Directions that photos and
titles hardly share are noise.
"""
NEIGHBOURS = 10
MOST_REFERENCES = 2_048
"""Listings of a subcategory that its listings are compared with: those of the smallest hashes, so
that a new listing changes few prices' neighbours.
"""
BLOCK = 256
"""Listings in a block: its memory comes on top of the catalog's"""
DIGITS = 9
"""Decimals that float64 similarities are rounded to, so that the number of threads does not affect the neighbours."""


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
        """Return vectors whose dot products are similarities, [N, 2k].

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
    """Compare each price with those of the most similar listings.

    Returns log(price / median price of the 10 most similar listings of the same group), float32
    [N].

    NaN where the price is unknown or not positive, where a listing has neither photo nor title, and
    where no other of the group has both a price and one of them.

    Args:
        vectors: `Likeness.vectors`.
        price: currency units, NaN = unknown.
        group: subcategory.
        rank: selects the listings that a large group is compared with, and breaks ties of
            similarity. The smallest come first.
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
            # A block holds only references or none: MOST_REFERENCES is a multiple of BLOCK.
            count = min(NEIGHBOURS, len(references) - (len(own) > 0))
            if count:
                nearest = np.argpartition(-alike, count - 1, axis=1)[:, :count]
                found[block] = logs[block] - np.median(logs[references[nearest]], axis=1)
    return found
