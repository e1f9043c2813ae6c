"""Run `camenn shards`: build a self-contained training shard set.

It is built from catalog, logs and embeddings.

clicks, orders ──► Clean ──► ByUser: sessions, labels, user and pair features, history
                               │
                               ▼
                            ByItem: listing features ──► ByDay ──► examples/date=.../
published run ──► final days: their files; open days: their features ──┘
store ──► Copy the embeddings in use, once ──► contents/
"""

import datetime
import sys
import time
from dataclasses import asdict
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa

from camenn_model.data.shard_set import date_of
from pipelines.features.as_of import FEATURES_VERSION
from pipelines.features.time_index import DAY_US, HOUR_US, day_of
from pipelines.inputs.contents import CopyContents, contents_jobs
from pipelines.inputs.items import load_items
from pipelines.inputs.logs import read_times
from pipelines.inputs.users_and_stores import read_timezones, read_users
from pipelines.io import files
from pipelines.io.clock import latest_time
from pipelines.io.files import local_only
from pipelines.io.tables import FileRecord, Source, write_table
from pipelines.runner.beam import is_local_run, open_pipeline
from pipelines.runner.console import watch
from pipelines.runs.accounting import Count, FinishRun, check_accounting, check_reject_rate, read_finished, read_rejects
from pipelines.runs.manifest import Manifest, add_files, new_run, read_latest, request_fingerprint, require_latest
from pipelines.runs.outputs import hold_output
from pipelines.runs.publication import publish
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
from pipelines.shards.log_cache import kept_table, plan_logs, remember
from pipelines.shards.options import STAGE, Plan, ShardOptions
from pipelines.shards.pipeline import BuildExamples
from pipelines.shards.splits import split_records, split_times
from schemas.catalog import CATALOG
from schemas.errors import InputError
from schemas.events import CLICKS, ORDERS
from schemas.rejects import REJECTS
from schemas.training import EXAMPLES, ITEMS

FEW_CLICKS = 100
"""Of fewer clicks since the final days all may be of listings that left the catalog."""


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
        print(
            f"shards: --as_of {as_of} is later than the logs' end; {np.datetime64(end, 'us')} is used", file=sys.stderr
        )
    return min(asked, end)


def check_examples(built: int, due: int, kept: Kept, counts: dict[str, dict[str, int]], catalog: Source) -> None:
    """Check that closed clicks became examples.

    Days without examples would be final some nights later, and what was clicked on them would never
    be learned.

    Args:
        built: examples of this run.
        due: clicks whose window is closed, of the days that are not final.
        kept: what stays of the published run.
        counts: this run's counts, of which a message names those of clicks.
        catalog: the catalog, which a message names.

    Raises:
        InputError: of so many clicks some should have become examples.
    """
    if built or (kept.records and due < FEW_CLICKS):
        return
    clicks = {name: rows for name, rows in counts["clicks"].items() if name not in ("in", "out")}
    raise InputError(
        f"{catalog.files[0]}: none of {due:,} clicks whose attribution window is closed became an example "
        f"({', '.join(f'{name} {rows:,}' for name, rows in clicks.items())}). "
        "Nothing was published. Give a table 'catalog' that has the listings that were clicked, under the same item_id."
    )


def run(options: ShardOptions, beam_flags: list[str], rerun: bool = False, rebuild: bool = False) -> dict[str, Any]:
    """Run the stage and publish.

    Returns the closing table. With `rebuild`, days that were final are built again too.
    """
    started = time.monotonic()
    out = local_only(options.out, "--out")
    catalog, clicks, orders = (Source.find(options.data, contract) for contract in (CATALOG, CLICKS, ORDERS))
    users, users_source = read_users(options.data)
    timezones, stores_source = read_timezones(options.data, options.timezone)
    store = require_latest(options.store, "embed", "--store")
    sources = {"catalog": catalog, "clicks": clicks, "orders": orders, "users": users_source, "stores": stores_source}
    inputs = {name: source.fingerprint for name, source in sources.items() if source is not None}
    inputs["store"] = store.request
    request = request_fingerprint(inputs, {**asdict(options), "features": FEATURES_VERSION})
    given = {"--data": options.data, "--store": options.store}
    with files.shared_reader(options.store), hold_output(out, "--out", STAGE, given):
        latest = read_latest(out)
        if latest is not None and latest.request == request and not (rerun or rebuild):
            print(
                f"shards: inputs and flags are those of run {latest.run}: nothing to do (--rerun builds it again)",
                file=sys.stderr,
            )
            return {**latest.summary, "unchanged": True, "seconds": round(time.monotonic() - started, 1)}
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
        kept = Kept() if rebuild else keep_days(latest, settings, as_of, late, out)
        logs, user_buckets = plan_logs([clicks, orders], None if rebuild else latest, sizes.ROWS_PER_BUCKET)
        unsampled, changed = logs["clicks"].unsampled()
        begins = day_of(int(clicked_at.min()))
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
        run_name, directory = new_run(out)
        items, catalog_rejects, catalog_counts = load_items(STAGE, catalog, store)
        if kept.records and latest is not None:
            delisted = delisted_items(items, latest.paths("items"), kept.records)
            items = pa.concat_tables([items, delisted]).sort_by("item_id")
        written = [write_table(directory, "items", items), write_table(directory, "users", users)]
        if catalog_rejects.num_rows:
            written.append(write_table(directory, "rejects", catalog_rejects))
        jobs, contents_kept = contents_jobs(store, items, latest, out, directory)
        built = closed[closed >= kept.frozen_before]
        local = is_local_run(beam_flags)
        # Each click that is built asks for counts. Of what lies before, a bucket of users tells
        # sums of each listing's clicks, orders and conversions.
        item_rows = clicks.rows + orders.rows
        if kept.frozen_before:
            item_rows = min(item_rows, 2 * len(built) + 3 * user_buckets * items.num_rows)
        plan = Plan(
            clicks=clicks,
            orders=orders,
            logs=logs,
            user_buckets=user_buckets,
            item_rows=item_rows,
            items_path=written[0].path,
            as_of=as_of,
            latest=latest_event,
            window=window,
            splits=splits,
            timezones=timezones,
            directory=directory,
            kept=kept,
            day_cuts=cut_long_days(built, sizes.ROWS_PER_FILE),
            scratch=files.join(directory, "shuffle") if local else None,
        )
        days_kept = split_records(kept.records, splits, files.join(directory, "examples"))
        due = len(built)
        # 8 bytes a click each, for as long as the job runs.
        del clicked_at, ordered_at, closed, built
        with (
            watch("shards", due, "examples", local) as progress,
            open_pipeline(beam_flags) as pipeline,
        ):
            emitted = pipeline | "Examples" >> BuildExamples(options, plan, progress)
            contents = (
                pipeline
                | "ContentJobs" >> beam.Create(jobs)
                | "SpreadJobs" >> beam.Reshuffle()
                | "CopyContents" >> beam.ParDo(CopyContents())
            )
            extra = pipeline | "SubmittersFiles" >> beam.Create(written)
            counts = pipeline | "SubmittersCounts" >> beam.Create(
                [Count("catalog", where, rows) for where, rows in catalog_counts.items()]
                + [Count(name, "in", log.known_rows) for name, log in logs.items()]
            )
            {
                "files": [emitted["files"], contents, extra] | "AllFiles" >> beam.Flatten(),
                "counts": [emitted["counts"], counts] | "AllCounts" >> beam.Flatten(),
            } | "Finish" >> FinishRun(directory)
        records, found = read_finished(directory)
        if plan.scratch is not None and files.exists(plan.scratch):
            files.delete_directory(plan.scratch)
        check_accounting(found)
        check_reject_rate(found, options.max_reject_rate, read_rejects(records))
        check_examples(sum(record.rows for record in records if record.table == "examples"), due, kept, found, catalog)
        manifest = Manifest(
            stage=STAGE, run=run_name, request=request, inputs=inputs, options=asdict(options), counts=found
        )
        encoders = {
            kind: {name: store.options[kind][name] for name in ("fingerprint", "description")}
            for kind in ("image", "text")
        }
        manifest.options["encoders"] = encoders
        contracts = {c.name: c.fingerprint() for c in (EXAMPLES, ITEMS, REJECTS)} | dict.fromkeys(
            ("users", "contents_images", "contents_titles", *(kept_table(log.contract) for log in logs.values())), ""
        )
        manifest.options["log"], rows_kept = remember(logs, user_buckets)
        manifest.options["days"] = {
            "as_of": as_of,
            "features": FEATURES_VERSION,
            "final_before": day_of(kept.frozen_before) if kept.records else None,
            "rebuilt": rebuild,
            "samples": {date: kept.samples[date] for date in kept.samples if date in kept.dates} | samples,
        }
        add_files(manifest, contracts, [*records, *days_kept, *contents_kept, *rows_kept])
        manifest.seconds = time.monotonic() - started
        manifest.summary = _summary(options, manifest, plan, records, contents_kept)
        publish(out, manifest)
    return manifest.summary


def _summary(
    options: ShardOptions, manifest: Manifest, plan: Plan, records: list[FileRecord], kept: list[FileRecord]
) -> dict[str, Any]:
    clicks = manifest.counts["clicks"]
    splits: dict[str, int] = {}
    for record in sorted(manifest.records("examples"), key=lambda record: date_of(record.path)):
        splits[record.split] = splits.get(record.split, 0) + record.rows
    size = sum(entry["bytes"] for table in manifest.tables.values() for entry in table["files"])
    return {
        "rows_in": clicks["in"],
        "rows_out": clicks.get("out", 0),
        "rejected": sum(row.get("rejected", 0) for row in manifest.counts.values()),
        **{f"clicks_{name}": rows for name, rows in clicks.items() if name not in ("in", "out", "rejected") and rows},
        **{
            f"orders_{name}": rows
            for name, rows in manifest.counts["orders"].items()
            if name not in ("in", "rejected") and rows
        },
        "examples": splits,
        "examples_built": sum(record.rows for record in records if record.table == "examples"),
        "days_built": len({date_of(record.path) for record in records if record.table == "examples"}),
        "days_kept": len(plan.kept.dates),
        "log_rows_read": sum(log.fresh_rows for log in plan.logs.values()),
        "log_rows_kept": sum(log.known_rows for log in plan.logs.values()),
        "encoded_images": 0,
        "encoded_titles": 0,
        "contents_copied": sum(record.rows for record in records if record.table.startswith("contents_")),
        "contents_kept": sum(record.rows for record in kept),
        "as_of": str(np.datetime64(plan.as_of, "us")),
        "megabytes": round(size / 1e6, 1),
        "seconds": round(manifest.seconds, 1),
        "clicks_per_second": round(clicks["in"] / manifest.seconds),
        "run": manifest.run,
        "out": options.out,
    }
