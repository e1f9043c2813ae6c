"""Directions of photos and titles in which people differ.

They come from linear discriminant analysis with people as classes. [ours;
docs/decisions/0014-preference-vectors-by-modality.md has the figures]

Shapes: N listings, n clicks, p width of a frozen encoder's mean features, k directions.

Most differences between photos do not depend on who clicks them. Fisher's discriminant (1936) finds
the directions along which the clicks of one person are similar and those of different people are
not: the variance of persons' means over the total variance, the largest first. The store's mean is
subtracted from features, as a store's assortment is no personal preference. Two clicks of a person
on one listing carry no information about its photo or title. Directions with little information are
short: for Gaussian preferences the best estimate from m clicks weights a direction of variance
share r by m r / (m r + 1).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]

PENALTY = 0.3
"""Added to the diagonal of the total covariance, times its mean eigenvalue: there are many features and few clicks."""
CLICKS = 100.0
"""Clicks of a person that the directions' weights assume"""
SPREAD = 0.5
"""Standard deviation over clicks along a direction of variance share 1"""
BLOCK = 16_384
"""Rows of features that are in memory at once"""
TINY = 1e-12


@dataclass(frozen=True)
class PreferenceSpace:
    """A map of mean features: (x - center) @ directions."""

    center: Floats  # [p]
    directions: Floats  # [p, k]
    shares: Floats  # [k]: variance between people over all variance, the largest first


def find_preferences(features: Floats, item: Ints, person: Ints, store: Ints, count: int) -> PreferenceSpace:
    """Find the directions in which people's clicks differ.

    Returns directions [p, k], k ≤ `count`, and the share of the variance along each that is between
    people.

    Args:
        features: mean features [N, p] of listings.
        item: row of `features` of each click, [n].
        person: of each click, codes from 0, [n].
        store: of each click, codes from 0, [n].
        count: most directions.
    """
    offers, place = np.unique(np.stack([store, item], axis=1), axis=0, return_inverse=True)
    clicks = np.bincount(place, minlength=len(offers)).astype(np.float64)
    of_store = _of_stores(features, offers, clicks)
    center = np.bincount(store) @ of_store / len(store)

    def values(rows: Ints) -> Floats:
        return (features[offers[rows, 1]] - of_store[offers[rows, 0]]).astype(np.float32)

    # Clicks by person and offer. Pairs of clicks of one person on different listings are all pairs
    # less those on the same one.
    key, times = np.unique(person * len(offers) + place, return_counts=True)
    who, what = key // len(offers), key % len(offers)
    same = np.bincount(what, weights=times.astype(np.float64) ** 2, minlength=len(offers))
    pairs = float((np.bincount(person).astype(np.float64) ** 2).sum() - same.sum())
    width = features.shape[1]
    covariance, between = np.zeros((width, width)), np.zeros((width, width))
    for start in range(0, len(offers), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(offers)))
        some = values(rows)
        covariance += (some * clicks[rows, None]).T @ some
        between -= (some * same[rows, None]).T @ some
    for run in _whole_groups(who):
        sums = np.add.reduceat(values(what[run]) * times[run, None], _starts(who[run]))
        between += sums.T @ sums
    covariance, between = covariance / clicks.sum(), between / max(pairs, 1.0)

    penalised = covariance + PENALTY * np.trace(covariance) / width * np.eye(width)
    scale, axes = np.linalg.eigh(penalised)
    white = axes / np.sqrt(np.maximum(scale, TINY))
    shares, axes = np.linalg.eigh(white.T @ between @ white)
    first = np.argsort(-shares)[:count]
    first = first[shares[first] > 0]
    directions = white @ axes[:, first]
    spread = np.sqrt(np.maximum(np.einsum("pk,pq,qk->k", directions, covariance, directions, optimize=True), TINY))
    weight = np.sqrt(shares[first] / (shares[first] + 1 / CLICKS))
    return PreferenceSpace(center, directions * (SPREAD * weight / spread), shares[first])


def _of_stores(features: Floats, offers: Ints, clicks: Floats) -> Floats:
    """Average the features of the clicks in each store.

    Returns [stores, p]. offers [·, 2] (store, item) are in order of stores.
    """
    total = np.zeros((int(offers[-1, 0]) + 1, features.shape[1]))
    for rows in _whole_groups(offers[:, 0]):
        weighted = features[offers[rows, 1]] * clicks[rows, None]
        total[np.unique(offers[rows, 0])] = np.add.reduceat(weighted, _starts(offers[rows, 0]))
    counts = np.bincount(offers[:, 0], weights=clicks)
    return total / counts.clip(min=1)[:, None]


def _starts(groups: Ints) -> Ints:
    """Find where each run of equal codes begins."""
    return np.flatnonzero(np.diff(groups, prepend=-1))


def _whole_groups(groups: Ints) -> Iterator[slice]:
    """Yield slices that cut no run of equal codes.

    They have about `BLOCK` rows. Codes are in order.
    """
    starts = _starts(groups)
    start = 0
    while start < len(groups):
        place = int(np.searchsorted(starts, start + BLOCK))
        end = int(starts[place]) if place < len(starts) else len(groups)
        yield slice(start, end)
        start = end
