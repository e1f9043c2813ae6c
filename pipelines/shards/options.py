"""Options of the shards stage."""

from dataclasses import dataclass

import numpy as np

from pipelines.inputs.contents import PlacedJob
from pipelines.io.tables import FileRecord, Source
from pipelines.runs.accounting import Count
from pipelines.shards.final_days import Kept
from pipelines.shards.log_cache import LogPlan
from pipelines.shards.splits import SplitTimes
from schemas.errors import InputError

STAGE = "shards"


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """One shards run, resolved."""

    data: str
    store: str
    out: str
    attribution_hours: float
    history: int
    as_of: str | None
    timezone: str
    test_share: float
    max_reject_rate: float
    late_days: float = 2.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The facts the submitter found before the job starts."""

    clicks: Source
    orders: Source
    logs: dict[str, LogPlan]
    """The plans of both logs"""
    user_buckets: int
    item_rows: int
    """Approximate number of rows that go from users to listings"""
    items_path: str
    as_of: int
    latest: int
    """Events after it are impossible"""
    window: int
    splits: SplitTimes
    timezones: dict[str, str]
    timezone: str
    """Of stores without one"""
    history: int
    """Entries of a user's history"""
    directory: str
    kept: Kept
    day_cuts: np.ndarray
    """See `cut_long_days`"""
    scratch: str | None = None
    """Directory of spilled partitions, on the local runner (pipelines/io/shuffle.py)"""


@dataclass(frozen=True, kw_only=True)
class Tables:
    """The tables that need no worker.

    The submitter wrote and counted them. `copies`: contents to copy from the store. `kept`: those
    that the published run has already.
    """

    records: list[FileRecord]
    counts: list[Count]
    copies: list[PlacedJob]
    kept: list[FileRecord]


def check_flags(options: ShardOptions) -> None:
    """Check that the numbers of the flags make sense.

    Raises:
        InputError: a number that makes no sense. The error names the flag.
    """
    hours, history, share, late = options.attribution_hours, options.history, options.test_share, options.late_days
    if not 0 <= late <= 365:
        raise InputError(f"--late_days {late}: must be between 0 and 365.")
    if not 0 < hours <= 24 * 365:
        raise InputError(f"--attribution_hours {hours}: must be more than 0 and at most a year.")
    if not 1 <= history <= 1_000:
        raise InputError(f"--history {history}: must be between 1 and 1000 entries.")
    if not 0 < share < 0.9:
        raise InputError(f"--test_share {share}: must be more than 0 and less than 0.9.")
