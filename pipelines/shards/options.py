"""Options of the shards stage."""

from dataclasses import dataclass

import numpy as np

from camenn_model.data.shard_set import BLOCK_ROWS
from pipelines.io.tables import Source
from pipelines.shards.final_days import Kept
from pipelines.shards.log_cache import LogPlan
from pipelines.shards.splits import SplitTimes

STAGE = "shards"
ROWS_PER_FILE = BLOCK_ROWS


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
    """What the submitter found out before the job starts."""

    clicks: Source
    orders: Source
    logs: dict[str, LogPlan]
    """What is read of both"""
    user_buckets: int
    item_rows: int
    """About so many rows go from users to listings"""
    items_path: str
    as_of: int
    latest: int
    """Events after it cannot be"""
    window: int
    splits: SplitTimes
    timezones: dict[str, str]
    directory: str
    kept: Kept
    day_cuts: np.ndarray
    """See `cut_long_days`"""
    scratch: str | None = None
    """Where shuffles lie, on the local runner (pipelines/io/shuffle.py)"""
