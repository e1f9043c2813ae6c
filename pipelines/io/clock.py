"""The one clock of the pipelines.

It supplies the timestamps of runs and publications, the time that their age is measured against,
and the range of times that an event can have.
"""

import datetime

import numpy as np

EARLIEST = 946_684_800_000_000
"""2000-01-01, int64 microseconds: an earlier time is in other units, or the 0 of a missing value."""


def utc_now() -> datetime.datetime:
    """Return the time, UTC."""
    return datetime.datetime.now(datetime.UTC)


def utc_stamp() -> str:
    """Return the time as ISO text to the second, UTC."""
    return utc_now().isoformat(timespec="seconds")


def latest_time() -> int:
    """Return the latest time an event can have, int64 microseconds.

    It is a day from now, for exporters that write local times.
    """
    return int((utc_now() + datetime.timedelta(days=1)).timestamp()) * 1_000_000


def can_be(times: np.ndarray, latest: int) -> np.ndarray:
    """Mark the times that events can have, bool [n].

    Times are int64 microseconds.
    """
    return (times >= EARLIEST) & (times <= latest)
