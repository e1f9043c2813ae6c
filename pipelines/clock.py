"""The one clock of the plant: what is stamped on runs and publications, and what their age is measured by."""

import datetime


def utc_now() -> datetime.datetime:
    """The time, UTC."""
    return datetime.datetime.now(datetime.UTC)


def utc_stamp() -> str:
    """The time as ISO text to the second, UTC."""
    return utc_now().isoformat(timespec="seconds")
