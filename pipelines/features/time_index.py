"""Look up events by key and time.

Pure functions on arrays. Times are int64 microseconds since 1970, UTC.
"""

import datetime

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Ints = NDArray[np.int64]
NEVER = np.iinfo(np.int64).max
"""Time of something that did not happen."""
HOUR_US = 3_600_000_000
DAY_US = 24 * HOUR_US


def day_of(time: int) -> str:
    """Return the date of a time in int64 microseconds, UTC."""
    return (datetime.date(1970, 1, 1) + datetime.timedelta(days=time // DAY_US)).isoformat()


class TimeIndex:
    """Events sorted by (key, time).

    The index answers which events of a key precede a time.

    Key and time are packed into one int64, so that one `searchsorted` answers all queries at once.
    The key is packed as its distance from the least one, or as its rank where keys are sparse
    (codes of pairs grow as users × listings). The time is packed as its distance from the first
    one, or as its rank where that would not fit.

    Args:
        key, time: of each event, int64 [n].
        weight: number of events that each row represents, int64 [n]. None = one each. Only `count`
            and `count_first_last` use it.
    """

    def __init__(self, key: Ints, time: Ints, weight: Ints | None = None) -> None:
        n = len(key)
        self.keys: Ints | None = None
        self.first = int(key.min()) if n else 0
        width = int(key.max()) - self.first + 1 if n else 0
        if width <= 4 * n + 1024:
            code = key - self.first
        else:
            self.keys, code = np.unique(key, return_inverse=True)
            width = len(self.keys)
        self.times: Ints | None = None
        self.low = int(time.min()) if n else 0
        span = int(time.max()) - self.low + 2 if n else 1
        if width * span < NEVER:
            at = time - self.low
        else:
            self.times, at = np.unique(time, return_inverse=True)
            span = len(self.times) + 1
        self.span = np.int64(span)
        combined = code * self.span + at
        self.order = _order(code, width, time)
        self.combined = combined[self.order]
        self.time = time[self.order]
        self.starts = np.zeros(width + 1, dtype=np.int64)
        np.cumsum(np.bincount(code, minlength=width), out=self.starts[1:])
        self.before: Ints | None = None
        """Cumulative weight before each place of `order`, with the total last [n + 1]. None where
        each event counts as one"""
        if weight is not None:
            self.before = np.concatenate([[0], np.cumsum(weight[self.order])])

    @classmethod
    def of_asked(cls, asked: Ints, key: Ints, time: Ints) -> "TimeIndex":
        """Index only the events of the requested keys.

        Looking up a key costs less than sorting its events. Positions in `order` refer to all
        events.
        """
        wanted = np.flatnonzero(pd.Series(key).isin(asked).to_numpy())
        index = cls(key[wanted], time[wanted])
        index.order = wanted[index.order]
        return index

    def _codes(self, key: Ints) -> tuple[Ints, NDArray[np.bool_]]:
        """Return each key's code, and whether it may have events.

        The code is 0 where the key has no events.
        """
        width = len(self.starts) - 1
        if self.keys is None:
            code = key - self.first
            there = (code >= 0) & (code < width)
        else:
            code = np.searchsorted(self.keys, key)
            there = code < width
            there[there] = self.keys[code[there]] == key[there]
        return np.where(there, code, 0), there

    def bounds(self, key: Ints, time: Ints, *, inclusive: bool = False) -> tuple[Ints, Ints]:
        """Find the events of `key` before `time`.

        Returns the first and one-past-last position (into `order`) of the events of `key` before
        `time`, or up to and including it.
        """
        code, there = self._codes(key)
        if self.times is None:
            at = np.clip(time - self.low + inclusive, 0, self.span - 1)
        else:
            at = np.searchsorted(self.times, time, side="right" if inclusive else "left")
        start = self.starts[code]
        end = np.searchsorted(self.combined, code * self.span + at)
        return start, np.where(there, end, start)

    def count(self, key: Ints, time: Ints) -> Ints:
        """Count the events of `key` strictly before `time`."""
        return self._between(*self.bounds(key, time))

    def _between(self, start: Ints, end: Ints) -> Ints:
        return end - start if self.before is None else self.before[end] - self.before[start]

    def count_first_last(self, key: Ints, time: Ints) -> tuple[Ints, Ints, Ints]:
        """Return `count`, and the first and last event times.

        The times are those of the first and the last counted event, NEVER where there is none.
        """
        start, end = self.bounds(key, time)
        some = end > start
        first, last = np.full(len(start), NEVER), np.full(len(start), NEVER)
        first[some], last[some] = self.time[start[some]], self.time[end[some] - 1]
        return self._between(start, end), first, last


def _order(code: Ints, width: int, time: Ints) -> Ints:
    """Return the order of events by (code, time).

    Events with equal code and time keep their input order. Codes lie below `width`. Logs come in
    order of time or nearly so, and numpy sorts 16 bits without comparing. On 300,000 events this
    takes a quarter to half of the time of sorting (code, time) packed into one number.
    """
    by_time = None if (time[1:] >= time[:-1]).all() else np.argsort(time, kind="stable")
    rest = code if by_time is None else code[by_time]
    order = np.argsort((rest & 0xFFFF).astype(np.uint16), kind="stable")
    for shift in range(16, max(width - 1, 1).bit_length(), 16):
        order = order[np.argsort((rest[order] >> shift & 0xFFFF).astype(np.uint16), kind="stable")]
    return order if by_time is None else by_time[order]
