"""Plan a run of `camenn shards`.

The submitter reads both logs' times, and finds until when the log is known, which days are final,
what must be read again, and where the test part begins.
"""

import datetime
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from camenn_model.data.shard_set import date_of
from pipelines.features.time_index import DAY_US, HOUR_US, day_of
from pipelines.inputs.contents import contents_jobs
from pipelines.inputs.items import load_items
from pipelines.inputs.logs import read_times
from pipelines.io import cache
from pipelines.io.clock import latest_time
from pipelines.io.tables import write_table
from pipelines.runner.log import stage_logger
from pipelines.runs.accounting import Count
from pipelines.runs.context import RunContext
from pipelines.runs.manifest import Manifest
from pipelines.shards import sizes
from pipelines.shards.examples import cut_long_days
from pipelines.shards.final_days import (
    ROW_SETTINGS,
    Kept,
    check_same_log,
    delisted_items,
    keep_days,
    read_starts,
    sample_days,
)
from pipelines.shards.inputs import ShardInputs
from pipelines.shards.log_cache import LogPlan, plan_logs
from pipelines.shards.options import STAGE, Plan, ShardOptions, Tables
from pipelines.shards.splits import split_times
from schemas.errors import InputError
from schemas.events import CLICKS

_LOG = stage_logger(STAGE)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A plan, and what it was made from.

    `due`: clicks whose window is closed, of the days that are not final. `samples`: of the days
    that
    were read, see `sample_days`.
    """

    plan: Plan
    tables: Tables
    due: int
    samples: dict[str, list[int]]


def resolve_as_of(as_of: str | None, clicked_at: np.ndarray, ordered_at: np.ndarray) -> int:
    """Return the last moment that is read, int64 microseconds.

    It is the flag's, but no later than the smaller of both logs' ends.

    Beyond a log's end nothing is known: a click whose window were closed there would pass for one
    without an order.
    """
    end = int(min(clicked_at.max(), ordered_at.max())) if len(ordered_at) else int(clicked_at.max())
    if as_of is None:
        return end
    try:
        moment = datetime.datetime.fromisoformat(as_of)
    except ValueError as error:
        raise InputError(
            f"--as_of {as_of}: not a time. Write it as 2026-01-31 or 2026-01-31T06:00:00 (UTC)."
        ) from error
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    asked = int(moment.timestamp() * 1_000_000)
    if asked > end:
        _LOG.warning("--as_of %s is later than the logs' end; %s is used", as_of, np.datetime64(end, "us"))
    return min(asked, end)


@dataclass(frozen=True, kw_only=True)
class Found:
    """The facts of the logs and the published run.

    Nothing is written yet.
    """

    clicked_at: np.ndarray
    """Times of all clicks, int64 microseconds"""
    closed: np.ndarray
    """Of those whose attribution window is closed"""
    as_of: int
    latest_event: int
    """Events after it are impossible"""
    kept: Kept
    logs: dict[str, LogPlan]
    user_buckets: int

    @property
    def built(self) -> np.ndarray:
        """Return the times of the clicks that become examples."""
        return self.closed[self.closed >= self.kept.frozen_before]


def look(options: ShardOptions, inputs: ShardInputs, latest: Manifest | None, out: str) -> Found:
    """Find what is to be read and built.

    `latest`: published run to go on from, None = build all days.

    Raises:
        InputError: there is no click to learn from, or no attribution window is closed.
    """
    clicks, orders = inputs.tables.clicks, inputs.tables.orders
    window = int(options.attribution_hours * HOUR_US)
    latest_event = latest_time()
    clicked_at, ordered_at = read_times(clicks, latest_event), read_times(orders, latest_event)
    if not len(clicked_at):
        raise InputError(
            f"{clicks.files[0]}: table 'clicks' is empty, or none of its times can be: there is nothing to "
            "learn from. Export a log with clicks in it."
        )
    as_of = resolve_as_of(options.as_of, clicked_at, ordered_at)
    closed = clicked_at[clicked_at + window <= as_of]
    if not len(closed):
        raise InputError(
            f"{clicks.files[0]}: no click's attribution window of {options.attribution_hours:g} h is closed "
            f"at --as_of {np.datetime64(as_of, 'us')}. "
            "Give a later --as_of, a longer log, or a shorter --attribution_hours."
        )
    settings = {name: getattr(options, name) for name in ROW_SETTINGS}
    late = window + int(options.late_days * DAY_US)
    kept = keep_days(latest, settings, as_of, late, out)
    logs, user_buckets = plan_logs([clicks, orders], latest, sizes.ROWS_PER_BUCKET)
    return Found(
        clicked_at=clicked_at,
        closed=closed,
        as_of=as_of,
        latest_event=latest_event,
        kept=kept,
        logs=logs,
        user_buckets=user_buckets,
    )


def prepare(context: RunContext, options: ShardOptions, inputs: ShardInputs, *, rebuild: bool, local: bool) -> Prepared:
    """Plan what to read and build.

    Args:
        context: the run.
        options: its options.
        inputs: its inputs.
        rebuild: build days again that were final.
        local: workers are on this machine, and shuffles lie on its disk.

    Raises:
        InputError: see `look`, or the log is another one than the published run's.
    """
    clicks, orders, out = inputs.tables.clicks, inputs.tables.orders, context.request.out
    window = int(options.attribution_hours * HOUR_US)
    found = look(options, inputs, None if rebuild else context.latest, out)
    clicked_at, closed, kept, logs = found.clicked_at, found.closed, found.kept, found.logs
    latest_event, user_buckets = found.latest_event, found.user_buckets
    begins = day_of(int(clicked_at.min()))
    unsampled, changed = logs["clicks"].unsampled()
    sampled = {
        date: sample
        for date, sample in kept.samples.items()
        if changed is not None and date >= begins and date not in changed
    }
    samples = sample_days(CLICKS, unsampled, latest_event, sampled)
    check_same_log(kept, samples, out)
    # Days that have left the log count in the split too.
    gone = [record for record in kept.records if date_of(record.path) < begins]
    splits = split_times(np.concatenate([closed, *map(read_starts, gone)]), window, options.test_share)
    items, tables = write_tables(context, inputs, kept, local=local)
    built = found.built
    # Each click that is built asks for counts. Of what lies before, a bucket of users has sums of
    # each listing's clicks, orders and conversions.
    item_rows = clicks.rows + orders.rows
    if kept.frozen_before:
        item_rows = min(item_rows, 2 * len(built) + 3 * user_buckets * items.num_rows)
    plan = Plan(
        clicks=clicks,
        orders=orders,
        logs=logs,
        user_buckets=user_buckets,
        item_rows=item_rows,
        items_path=tables.records[0].path,
        as_of=found.as_of,
        latest=latest_event,
        window=window,
        splits=splits,
        timezones=inputs.tables.timezones,
        timezone=options.timezone,
        history=options.history,
        directory=context.directory,
        kept=kept,
        day_cuts=cut_long_days(built, sizes.ROWS_PER_FILE),
        scratch=cache.scratch_directory(context.directory) if local else None,
    )
    return Prepared(plan=plan, tables=tables, due=len(built), samples=samples)


def write_tables(context: RunContext, inputs: ShardInputs, kept: Kept, *, local: bool) -> tuple[pa.Table, Tables]:
    """Write the tables that need no worker.

    They are items, users and rejects of the catalog. Returns the items beside. Listings of final
    days that left the catalog are among them.
    """
    latest, directory = context.latest, context.directory
    items, rejects, counts = load_items(STAGE, inputs.tables.catalog, inputs.store)
    if kept.records and latest is not None:
        delisted = delisted_items(items, latest.paths("items"), kept.records)
        items = pa.concat_tables([items, delisted]).sort_by("item_id")
    records = [write_table(directory, "items", items), write_table(directory, "users", inputs.tables.users)]
    if rejects.num_rows:
        records.append(write_table(directory, "rejects", rejects))
    copies, contents = contents_jobs(inputs.store, items, latest, context.request.out, directory, keep=local)
    counted = [Count("catalog", where, rows) for where, rows in counts.items()]
    return items, Tables(records=records, counts=counted, copies=copies, kept=contents)
