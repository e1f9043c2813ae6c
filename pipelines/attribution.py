"""Which order is credited to which click. Pure functions on arrays; times are int64 microseconds since 1970, UTC."""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

NEVER = np.iinfo(np.int64).max
"""Time of something that did not happen."""

HOUR_US = 3_600_000_000
DAY_US = 24 * HOUR_US


class TimeIndex:
    """Events sorted by (key, time), for asking what lay before a time under a key.

    Keys are int64. Keys and times are ranked, so that (key, time) fits one int64 whatever the keys' size (codes of pairs grow as users × listings),
    and one `searchsorted` answers all queries at once.
    """

    def __init__(self, key: Ints, time: Ints) -> None:
        self.order = np.lexsort((time, key))
        self.keys, key_ranks = np.unique(key, return_inverse=True)
        self.times, ranks = np.unique(time, return_inverse=True)
        self.stride = np.int64(len(self.times) + 1)
        self.combined = (key_ranks * self.stride + ranks)[self.order]
        self.time = time[self.order]

    def bounds(self, key: Ints, time: Ints, *, inclusive: bool = False) -> tuple[Ints, Ints]:
        """First and one-past-last position (into `order`) of the events of `key` before `time`, or up to and including it."""
        ranks = np.searchsorted(self.times, time, side="right" if inclusive else "left")
        place = np.searchsorted(self.keys, key)
        there = place < len(self.keys)
        there[there] = self.keys[place[there]] == key[there]
        base = place * self.stride
        return np.searchsorted(self.combined, base), np.searchsorted(self.combined, np.where(there, base + ranks, base))

    def count(self, key: Ints, time: Ints) -> Ints:
        """Events of `key` strictly before `time`."""
        start, end = self.bounds(key, time)
        return end - start

    def last(self, key: Ints, time: Ints) -> Ints:
        """Time of the last event of `key` strictly before `time`; NEVER where there is none."""
        start, end = self.bounds(key, time)
        found = np.full(len(key), NEVER)
        some = end > start
        found[some] = self.time[end[some] - 1]
        return found


def attribute_orders(
    click_pair: Ints, click_time: Ints, order_pair: Ints, order_time: Ints, window: int
) -> tuple[Ints, Ints]:
    """Credit each order to the latest click of the same (user, item) at or before it, no more than `window` microseconds back.

    Args:
        click_pair, order_pair: code of (user, item), int64 [clicks], [orders].
        click_time, order_time: int64 microseconds. Of clicks at the same time the last in input order takes the order.
        window: attribution window, microseconds.

    Returns:
        (credited click of each order, int64 [orders], -1 = none; time of the first order credited to each click, int64 [clicks], NEVER = none).
    """
    index = TimeIndex(click_pair, click_time)
    start, end = index.bounds(order_pair, order_time, inclusive=True)
    credited = np.full(len(order_pair), -1, dtype=np.int64)
    some = end > start
    credited[some] = index.order[end[some] - 1]
    some[some] = order_time[some] - click_time[credited[some]] <= window
    credited[~some] = -1
    first = np.full(len(click_pair), NEVER)
    np.minimum.at(first, credited[some], order_time[some])
    return credited, first
