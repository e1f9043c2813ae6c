"""Clicks made around purchases.

They are each basket's own lines, and products that it did not buy.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from examples.complete_journey.source import HALVES, Ints, Journey

MEAN_NEGATIVES = 30.0
"""Mean of the geometric distribution; one more is drawn per basket."""
SMOOTHING = 0.5
"""Added to a product's sales to the other half, so that none is out of reach."""
FIRST_SECOND, LAST_SECOND = 5 * 60, 120 * 60
"""Bounds, both inclusive, on how long before its basket a click is."""
DAY = 24 * 60 * 60


@dataclass(frozen=True, kw_only=True)
class HalfLog:
    """The clicks and purchases of one half of the households.

    Both are ordered by the basket's time. `line` are rows of the journey's lines. Click arrays have
    one value per click: `click_line` is a line of the same basket, `product` a row of the products,
    `second` the time in seconds since 1970, `position` the rank within the session.
    """

    line: Ints
    click_line: Ints
    product: Ints
    second: Ints
    position: Ints
    bought: NDArray[np.bool_]


def draw_weights(journey: Journey, half: str) -> NDArray[np.float64]:
    """Compute how often each product is drawn for this half.

    It is proportional to its purchases by the other half, so that a negative says nothing about
    this half's future. The result is float64 [products] and sums to one.
    """
    lines = journey.paid & ~journey.in_half(half)
    weights = np.bincount(journey.product[lines], minlength=len(journey.products)) + SMOOTHING
    return weights / weights.sum()


def _distinct(keys: Ints) -> Ints:
    """Return the distinct keys, in order.

    `np.unique` takes longer for so many.
    """
    keys = np.sort(keys)
    return keys[np.diff(keys, prepend=-1) > 0]


def make_log(journey: Journey, half: str, seed: int) -> HalfLog:
    """Make the log of one half of the households.

    A basket is a session: a click on each product it bought, and on up to 1 + Geometric(mean
    `MEAN_NEGATIVES`) others. Products drawn twice, or bought, count once: that is why there are
    a few less. Equal seeds give equal logs.
    """
    rng = np.random.default_rng([seed, HALVES[half]])
    products = len(journey.products)
    inside = np.flatnonzero(journey.in_half(half))
    # Baskets are numbered by time, for an order of the rows that a log would have.
    inside = inside[np.lexsort((journey.product[inside], journey.basket[inside], journey.second[inside]))]
    line = inside[journey.paid[inside]]
    first = np.flatnonzero(np.diff(journey.basket[line], prepend=-1))
    baskets = journey.basket[line][first]
    by_id = np.argsort(baskets)

    def basket_number(rows: Ints) -> Ints:
        return by_id[np.searchsorted(baskets, journey.basket[rows], sorter=by_id)]

    # A basket of which nothing was paid has no session.
    touched = inside[np.isin(journey.basket[inside], baskets)]
    bought = _distinct(basket_number(line) * products + journey.product[line])
    not_drawn = basket_number(touched) * products + journey.product[touched]

    count = 1 + rng.geometric(1 / MEAN_NEGATIVES, size=len(baskets))
    bounds = np.cumsum(draw_weights(journey, half))
    drawn = np.searchsorted(bounds, rng.random(count.sum()) * bounds[-1], side="right")
    drawn = _distinct(np.repeat(np.arange(len(baskets)), count) * products + drawn)
    drawn = drawn[~np.isin(drawn, not_drawn)]

    key = np.concatenate([bought, drawn])
    is_bought = np.arange(len(key)) < len(bought)
    # A random order within each session, and the sessions in their own order.
    order = np.lexsort((rng.random(len(key)), key // products))
    key, is_bought = key[order], is_bought[order]
    basket = key // products
    starts = np.flatnonzero(np.diff(basket, prepend=-1))
    click_line = line[first][basket]
    before = rng.integers(FIRST_SECOND, LAST_SECOND, size=len(key), endpoint=True)
    return HalfLog(
        line=line,
        click_line=click_line,
        product=key % products,
        second=journey.second[click_line] - before,
        position=np.arange(len(key)) - starts[basket],
        bought=is_bought,
    )


def conversion_rate(journey: Journey, log: HalfLog) -> float:
    """Compute the share of clicks with a purchase.

    It is one of the same product by the same household within a day, in whatever basket.
    """
    products = len(journey.products)
    # Seconds of the year fit into 25 bits, pairs of household and product into 27.
    start = min(journey.second.min(), log.second.min())
    bought_at = ((journey.household[log.line] * products + journey.product[log.line]) << 25) + (
        journey.second[log.line] - start
    )
    bought_at.sort()
    clicked_at = ((journey.household[log.click_line] * products + log.product) << 25) + (log.second - start)
    following = np.searchsorted(bought_at, clicked_at)
    until = np.append(bought_at, np.iinfo(np.int64).max)[following] - clicked_at
    return (until <= DAY).mean().item()
