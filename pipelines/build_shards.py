"""`camenn shards`: catalog, logs and embeddings → a self-contained training shard set.

clicks, orders ──► Clean ──► ByUser: sessions, labels, user and pair features, history
                               │
                               ▼
                            ByItem: listing features ──► ByDay ──► examples/date=.../
published run ──► final days: their files; open days: their features ──┘
store ──► Copy the embeddings in use, once ──► contents/
"""

import argparse
import datetime
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.transforms.window import GlobalWindows

from camenn_model.shards import BLOCK_ROWS
from pipelines import files
from pipelines.attribution import DAY_US, HOUR_US, day_of
from pipelines.clock import latest_time
from pipelines.console import ProgressFile, closing_table, watch
from pipelines.days import (
    ROW_SETTINGS,
    Kept,
    check_same_log,
    cut_splits,
    date_of,
    delisted_items,
    keep_days,
    keep_features,
    read_starts,
    sketch_days,
    split_records,
    write_part,
)
from pipelines.dimensions import read_timezones, read_users
from pipelines.event_log import KeptRows, LogPlan, kept_table, plan_logs, remember
from pipelines.events import CleanEvents, read_times
from pipelines.examples import Day, ItemPass, SplitTimes, UserPass, cut_long_days, finish_examples, split_times
from pipelines.features import FEATURES_VERSION
from pipelines.items import CopyContents, contents_jobs, load_items, local_only
from pipelines.manifest import (
    Count,
    FinishRun,
    Manifest,
    add_files,
    check_accounting,
    check_reject_rate,
    new_run,
    publish,
    read_finished,
    read_latest,
    read_rejects,
    request_fingerprint,
    require_latest,
)
from pipelines.options import add_common_flags, is_local_run, new_parser, open_pipeline, parse_with_beam, run_main
from pipelines.outputs import hold_output
from pipelines.parcels import Packer, Parcel, unpack
from pipelines.tables import FileRecord, ReadTable, ShuffleByBucket, Source, WriteTable, write_table
from schemas.catalog import CATALOG
from schemas.contract import InputError
from schemas.events import CLICKS, ORDERS
from schemas.rejects import REJECTS
from schemas.training import EXAMPLE_ORDER, EXAMPLES, ITEMS

STAGE = "shards"
ROWS_PER_BUCKET = 262_144
ROWS_PER_FILE = BLOCK_ROWS
WRITERS = 2
FEW_CLICKS = 100
"""Of fewer clicks since the final days all may be of listings that left the catalog."""


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
    """Where shuffles lie, on the local runner (pipelines/parcels.py)"""


def resolve_as_of(as_of: str | None, clicked_at: np.ndarray, ordered_at: np.ndarray) -> int:
    """The last moment that is read, int64 microseconds: the flag's, but no later than the smaller of both logs' ends.

    Beyond a log's end nothing is known: a click whose window were closed there would pass for one without an order.
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


def check_flags(options: ShardOptions) -> None:
    """Raises InputError, naming the flag, for a number that makes no sense."""
    hours, history, share, late = options.attribution_hours, options.history, options.test_share, options.late_days
    if not 0 <= late <= 365:
        raise InputError(f"--late_days {late}: must be between 0 and 365.")
    if not 0 < hours <= 24 * 365:
        raise InputError(f"--attribution_hours {hours}: must be more than 0 and at most a year.")
    if not 1 <= history <= 1_000:
        raise InputError(f"--history {history}: must be between 1 and 1000 entries.")
    if not 0 < share < 0.9:
        raise InputError(f"--test_share {share}: must be more than 0 and less than 0.9.")


def check_examples(built: int, due: int, kept: Kept, counts: dict[str, dict[str, int]], catalog: Source) -> None:
    """Days without examples would be final some nights later, and what was clicked on them would never be learned.

    Args:
        built: examples of this run.
        due: clicks whose window is closed, of the days that are not final.

    Raises:
        InputError: of so many clicks some should have become examples.
    """
    if built or (kept.records and due < FEW_CLICKS):
        return
    clicks = {name: rows for name, rows in counts["clicks"].items() if name not in ("in", "out")}
    raise InputError(
        f"{catalog.files[0]}: none of {due:,} clicks whose attribution window is closed became an example ({', '.join(f'{name} {rows:,}' for name, rows in clicks.items())}). "
        "Nothing was published. Give a table 'catalog' that has the listings that were clicked, under the same item_id."
    )


class PackDays(beam.DoFn):
    """(Day, table) → (Day, (kind, parcel of the table))."""

    def __init__(self, kind: str, packer: Packer) -> None:
        self.kind, self.packer = kind, packer

    def process(self, element: tuple[Day, pa.Table]) -> Iterator[tuple[Day, tuple[str, Parcel]]]:
        day, table = element
        yield day, (self.kind, self.packer.pack(table))

    def finish_bundle(self) -> None:
        self.packer.close()


class WriteDays(beam.DoFn):
    """A day's examples, or those of a piece of it, and their listings' counts → files of at most 262,144 rows."""

    def __init__(self, plan: Plan, progress: str | None) -> None:
        self.directory = files.join(plan.directory, "examples")
        self.items_path = plan.items_path
        self.splits = plan.splits
        self.open_paths = plan.kept.open_paths
        self.progress_directory = progress

    def setup(self) -> None:
        self.progress = ProgressFile(self.progress_directory)
        with files.open_read(self.items_path) as handle:
            self.item_ids = pq.read_table(handle, columns=["item_id"])["item_id"].combine_chunks()
        self.writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="days")

    def start_bundle(self) -> None:
        self.writing: deque[Future[list[FileRecord]]] = deque()

    def process(self, element: tuple[Day, Any]) -> Iterator[FileRecord]:
        (date, number), pieces = element
        kinds: dict[str, list[pa.Table]] = {"examples": [], "counts": []}
        for kind, piece in pieces:
            kinds[kind].append(unpack(piece))
        table = finish_examples(pa.concat_tables(kinds["examples"]), pa.concat_tables(kinds["counts"]), self.item_ids)
        self.writing.append(self.writers.submit(self._write, date, number, table))
        # Parquet is encoded beside the next day; no more days than writers are in memory.
        while len(self.writing) > WRITERS:
            yield from self._written()

    def finish_bundle(self) -> Iterator[Any]:
        while self.writing:
            for record in self._written():
                yield GlobalWindows.windowed_value(record)

    def teardown(self) -> None:
        self.writers.shutdown()

    def _write(self, date: str, piece: int, table: pa.Table) -> list[FileRecord]:
        table = keep_features(table, self.open_paths.get(date, []))
        table = table.sort_by([(name, "ascending") for name in EXAMPLE_ORDER])
        pieces = [
            (split, rows.slice(start, ROWS_PER_FILE))
            for split, rows in cut_splits(table, self.splits)
            for start in range(0, rows.num_rows, ROWS_PER_FILE)
        ]
        return [
            write_part(self.directory, date, f"{piece}-{number}", split, rows)
            for number, (split, rows) in enumerate(pieces)
        ]

    def _written(self) -> list[FileRecord]:
        records = self.writing.popleft().result()
        self.progress.add(sum(record.rows for record in records))
        self.progress.flush()
        return records


@dataclass
class BuildExamples(beam.PTransform):
    """Logs in, examples out; yields what `FinishRun` wants."""

    options: ShardOptions
    plan: Plan
    progress: str | None

    def expand(self, pipeline: beam.Pipeline) -> Any:
        o, plan = self.options, self.plan
        clicks = (
            pipeline
            | "ReadClicks" >> ReadTable(plan.clicks, plan.logs["clicks"].fresh)
            | "CleanClicks"
            >> beam.ParDo(CleanEvents(STAGE, CLICKS, plan.latest)).with_outputs("rejects", "counts", main="rows")
        )
        orders = (
            pipeline
            | "ReadOrders" >> ReadTable(plan.orders, plan.logs["orders"].fresh)
            | "CleanOrders"
            >> beam.ParDo(CleanEvents(STAGE, ORDERS, plan.latest)).with_outputs("rejects", "counts", main="rows")
        )
        user_pass = UserPass(
            plan.items_path,
            stage=STAGE,
            as_of=plan.as_of,
            window=plan.window,
            history=o.history,
            timezones=plan.timezones,
            timezone=o.timezone,
            frozen_before=plan.kept.frozen_before,
            day_cuts=plan.day_cuts,
            clicks=KeptRows.of(plan.logs["clicks"], plan.directory),
            orders=KeptRows.of(plan.logs["orders"], plan.directory),
        )
        placed = [
            (part.bucket, (kept_table(log.contract), part.parcel)) for log in plan.logs.values() for part in log.parts
        ]
        by_user = (
            {"clicks": clicks.rows, "orders": orders.rows}
            | "ByUser"
            >> ShuffleByBucket(
                {"clicks": "user_id", "orders": "user_id"},
                plan.user_buckets,
                scratch=plan.scratch,
                placed=tuple(placed),
            )
            | "DescribeUsers"
            >> beam.ParDo(user_pass).with_outputs(
                "queries", "item_events", "files", "rejects", "counts", main="examples"
            )
        )
        item_buckets = max(1, -(-plan.item_rows // ROWS_PER_BUCKET))
        counts = (
            {"queries": by_user.queries, "item_events": by_user.item_events}
            | "ByItem"
            >> ShuffleByBucket({"queries": "item", "item_events": "item"}, item_buckets, scratch=plan.scratch)
            | "DescribeItems" >> beam.ParDo(ItemPass(plan.day_cuts))
        )
        examples = (
            [
                by_user.examples | "Pack" >> beam.ParDo(PackDays("examples", Packer(plan.scratch))),
                counts | "PackCounts" >> beam.ParDo(PackDays("counts", Packer(plan.scratch))),
            ]
            | "Join" >> beam.Flatten()
            | "ByDay" >> beam.GroupByKey()
            | "WriteDays" >> beam.ParDo(WriteDays(plan, self.progress))
        )
        rejects = [clicks.rejects, orders.rejects, by_user.rejects] | "MergeRejects" >> beam.Flatten()
        written = rejects | "WriteRejects" >> WriteTable(REJECTS, files.join(plan.directory, "rejects"))
        return {
            "files": [examples, by_user.files, written] | "MergeFiles" >> beam.Flatten(),
            "counts": [clicks.counts, orders.counts, by_user.counts] | "MergeCounts" >> beam.Flatten(),
        }


def run(options: ShardOptions, beam_flags: list[str], rerun: bool = False, rebuild: bool = False) -> dict[str, Any]:
    """Run the stage and publish; returns the closing table. With `rebuild`, days that were final are built again too."""
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
                f"{clicks.files[0]}: table 'clicks' is empty, or none of its times can be: there is nothing to learn from. Export a log with clicks in it."
            )
        as_of = resolve_as_of(options.as_of, clicked_at, ordered_at)
        closed = clicked_at[clicked_at + window <= as_of]
        if not len(closed):
            raise InputError(
                f"{clicks.files[0]}: no click's attribution window of {options.attribution_hours:g} h is closed at --as_of {np.datetime64(as_of, 'us')}. "
                "Give a later --as_of, a longer log, or a shorter --attribution_hours."
            )
        settings = {name: getattr(options, name) for name in ROW_SETTINGS}
        late = window + int(options.late_days * DAY_US)
        kept = Kept() if rebuild else keep_days(latest, settings, as_of, late, out)
        logs, user_buckets = plan_logs([clicks, orders], None if rebuild else latest, ROWS_PER_BUCKET)
        unsampled, changed = logs["clicks"].unsampled()
        begins = day_of(int(clicked_at.min()))
        sampled = {
            date: sample
            for date, sample in kept.sketches.items()
            if changed is not None and date >= begins and date not in changed
        }
        sketches = sketch_days(CLICKS, unsampled, latest_event, sampled)
        check_same_log(kept, sketches, out)
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
        # Each click that is built asks for counts; of what lies before, a bucket of users tells sums of each listing's clicks, orders and conversions.
        item_rows = clicks.rows + orders.rows
        if kept.frozen_before:
            item_rows = min(item_rows, 2 * len(built) + 3 * user_buckets * items.num_rows)
        plan = Plan(
            clicks=clicks, orders=orders, logs=logs, user_buckets=user_buckets, item_rows=item_rows, items_path=written[0].path, as_of=as_of, latest=latest_event, window=window,
            splits=splits, timezones=timezones, directory=directory, kept=kept,
            day_cuts=cut_long_days(built, ROWS_PER_FILE),
            scratch=files.join(directory, "shuffle") if local else None,
        )  # fmt: skip
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
            "samples": {date: kept.sketches[date] for date in kept.sketches if date in kept.dates} | sketches,
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


def build_parser() -> argparse.ArgumentParser:
    """The flags of `camenn shards`."""
    parser = new_parser(STAGE, "Label clicks, add as-of features, and write a self-contained training shard set.")
    parser.add_argument(
        "--data", required=True, help="data directory with catalog, clicks, orders and, optionally, users and stores"
    )
    parser.add_argument("--store", required=True, help="embedding store that `camenn embed` wrote")
    parser.add_argument("--out", required=True, help="shard set; made if it is not there")
    parser.add_argument(
        "--attribution_hours",
        type=float,
        default=24.0,
        help="an order within so many hours after a click is credited to it (default %(default)s)",
    )
    parser.add_argument("--history", type=int, default=20, help="entries of a user's history (default %(default)s)")
    parser.add_argument("--as_of", help="read nothing after this time, UTC (default: the smaller of both logs' ends)")
    parser.add_argument(
        "--timezone",
        default="UTC",
        help="IANA zone of stores that the table `stores` does not name (default %(default)s)",
    )
    parser.add_argument(
        "--test_share",
        type=float,
        default=0.2,
        help="share of clicks, the last by time, in the test part (default %(default)s)",
    )
    parser.add_argument(
        "--late_days",
        type=float,
        default=2.0,
        help="days after a day's last attribution window until its labels are final and later runs keep it as it is (default %(default)s)",
    )
    parser.add_argument("--rerun", action="store_true", help="run again although neither inputs nor flags changed")
    parser.add_argument(
        "--rebuild", action="store_true", help="build all days again, also final ones; the manifest records it"
    )
    add_common_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, run, print."""
    a, beam_flags = parse_with_beam(build_parser(), argv)
    options = ShardOptions(
        data=files.absolute(a.data), store=files.absolute(a.store), out=files.absolute(a.out), attribution_hours=a.attribution_hours, history=a.history, as_of=a.as_of,
        timezone=a.timezone, test_share=a.test_share, max_reject_rate=a.max_reject_rate, late_days=a.late_days,
    )  # fmt: skip
    check_flags(options)
    closing_table(STAGE, run(options, beam_flags, rerun=a.rerun, rebuild=a.rebuild), as_json=a.json)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
