"""The one clock of the plant: what is stamped on runs and publications, what their age is measured by, and which times an event can have."""

import datetime

import numpy as np

EARLIEST = 946_684_800_000_000
"""2000-01-01, int64 microseconds: an earlier time is one in other units, or the 0 of a missing value."""


def utc_now() -> datetime.datetime:
    """The time, UTC."""
    return datetime.datetime.now(datetime.UTC)


def utc_stamp() -> str:
    """The time as ISO text to the second, UTC."""
    return utc_now().isoformat(timespec="seconds")


def latest_time() -> int:
    """The end of what can have happened, int64 microseconds: a day from now, for exporters that write local times."""
    return int((utc_now() + datetime.timedelta(days=1)).timestamp()) * 1_000_000


def can_be(times: np.ndarray, latest: int) -> np.ndarray:
    """Which times, int64 microseconds, events can have, bool [n]."""
    return (times >= EARLIEST) & (times <= latest)
