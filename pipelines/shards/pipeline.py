"""Wire the Beam steps that build days of examples.

The steps turn clean logs into days of examples.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.transforms.window import GlobalWindows

from pipelines.features.as_of import ATTRIBUTES, item_attributes
from pipelines.features.time_index import DAY_US, day_of
from pipelines.inputs.contents import CopyContents
from pipelines.inputs.logs import CleanEvents
from pipelines.io import files
from pipelines.io.files import open_read
from pipelines.io.shuffle import Packer, ShuffleByBucket, SpilledPartition, unpack
from pipelines.io.tables import FileRecord, ReadTable, WriteTable
from pipelines.runner.console import ProgressFile
from pipelines.runs.accounting import Count
from pipelines.shards import sizes
from pipelines.shards.examples import build_item_features, build_user_examples, finish_examples
from pipelines.shards.final_days import keep_features, write_part
from pipelines.shards.log_cache import KeptRows, kept_table
from pipelines.shards.options import STAGE, Plan, Tables
from pipelines.shards.splits import cut_splits
from schemas.events import CLICKS, ORDERS
from schemas.rejects import REJECTS
from schemas.training import EXAMPLE_ORDER


class _ItemsDoFn(beam.DoFn):
    """A DoFn that knows the items.

    They are read once per worker from the run's own items file.
    """

    def __init__(self, items_path: str) -> None:
        self.items_path = items_path

    def setup(self) -> None:
        with open_read(self.items_path) as handle:
            items = pq.read_table(handle, columns=["item_id", *ATTRIBUTES])
        self.item_ids = items["item_id"].combine_chunks()
        self.attributes = item_attributes(items)


Day = tuple[str, int]
"""(date of the session's start, piece of the day in order of time): the unit that is written together."""


def cut_days(table: pa.Table, day_cuts: np.ndarray) -> Iterator[tuple[Day, pa.Table]]:
    """Cut rows by day, or piece of a day.

    The rows have `session_start`.
    """
    if not table.num_rows:
        return
    start = table["session_start"].cast(pa.int64()).to_numpy()
    day = start // DAY_US
    before = np.searchsorted(day_cuts, day * DAY_US, side="right")
    frame = pd.DataFrame({"day": day, "piece": np.searchsorted(day_cuts, start, side="right") - before})
    groups: Any = frame.groupby(["day", "piece"]).indices
    for (day, piece), rows in groups.items():
        yield (day_of(int(day) * DAY_US), int(piece)), table.take(pa.array(rows))


class UserPass(_ItemsDoFn):
    """A step from a bucket of users to examples.

    It yields (Day, examples without listing counts). Side outputs are the queries to the listing
    pass, its events, and the files that keep the newly read rows of the logs.
    """

    def __init__(
        self,
        items_path: str,
        *,
        stage: str,
        as_of: int,
        window: int,
        history: int,
        timezones: dict[str, str],
        timezone: str,
        frozen_before: int,
        day_cuts: np.ndarray,
        clicks: KeptRows,
        orders: KeptRows,
    ) -> None:
        super().__init__(items_path)
        self.clicks, self.orders = clicks, orders
        self.stage, self.as_of, self.window, self.history = stage, as_of, window, history
        self.timezones, self.timezone = timezones, timezone
        self.frozen_before, self.day_cuts = frozen_before, day_cuts

    def process(self, element: tuple[int, dict[str, pa.Table]]) -> Iterator[Any]:
        bucket, kinds = element
        clicks, kept_clicks = self.clicks.join(bucket, kinds)
        orders, kept_orders = self.orders.join(bucket, kinds)
        for record in (*kept_clicks, *kept_orders):
            yield beam.pvalue.TaggedOutput("files", record)
        result = build_user_examples(
            clicks,
            orders,
            self.item_ids,
            self.attributes,
            stage=self.stage,
            as_of=self.as_of,
            window=self.window,
            history=self.history,
            timezones=self.timezones,
            timezone=self.timezone,
            bucket=bucket,
            frozen_before=self.frozen_before,
        )
        yield from cut_days(result.examples, self.day_cuts)
        yield beam.pvalue.TaggedOutput("queries", result.queries)
        yield beam.pvalue.TaggedOutput("item_events", result.item_events)
        for rejects in result.rejects:
            yield beam.pvalue.TaggedOutput("rejects", rejects)
        for count in result.counts:
            yield beam.pvalue.TaggedOutput("counts", count)


class ItemPass(beam.DoFn):
    """A step from a bucket of listings to their counts.

    The counts are cut like the examples that they belong to: (Day, ROW and `ITEM_COUNTS`).
    """

    def __init__(self, day_cuts: np.ndarray) -> None:
        self.day_cuts = day_cuts

    def process(self, element: tuple[int, dict[str, pa.Table]]) -> Iterator[tuple[Day, pa.Table]]:
        _, kinds = element
        if "queries" not in kinds:
            return
        queries = kinds["queries"]
        counts = build_item_features(queries, kinds["item_events"])
        for day, table in cut_days(counts.append_column("session_start", queries["session_start"]), self.day_cuts):
            yield day, table.drop_columns(["session_start"])


WRITERS = 2


class PackDays(beam.DoFn):
    """A step that packs a day's table for the shuffle.

    (Day, table) → (Day, (kind, partition of the table)).
    """

    def __init__(self, kind: str, packer: Packer) -> None:
        self.kind, self.packer = kind, packer

    def process(self, element: tuple[Day, pa.Table]) -> Iterator[tuple[Day, tuple[str, SpilledPartition]]]:
        day, table = element
        yield day, (self.kind, self.packer.pack(table))

    def finish_bundle(self) -> None:
        self.packer.close()


class WriteDays(beam.DoFn):
    """A step that writes a day's examples to files.

    It takes a day's examples, or those of a piece of it, and their listings' counts. It writes
    files of at most 262,144 rows.
    """

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
        # Parquet is encoded beside the next day. No more days than writers are in memory.
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
            (split, rows.slice(start, sizes.ROWS_PER_FILE))
            for split, rows in cut_splits(table, self.splits)
            for start in range(0, rows.num_rows, sizes.ROWS_PER_FILE)
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
class BuildExamples(beam.PTransform[beam.Pipeline, Any]):
    """The composite from logs to examples.

    It yields the inputs of `FinishRun`.
    """

    plan: Plan
    progress: str | None

    def expand(self, pipeline: beam.Pipeline) -> Any:
        plan = self.plan
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
            history=plan.history,
            timezones=plan.timezones,
            timezone=plan.timezone,
            frozen_before=plan.kept.frozen_before,
            day_cuts=plan.day_cuts,
            clicks=KeptRows.of(plan.logs["clicks"], plan.directory),
            orders=KeptRows.of(plan.logs["orders"], plan.directory),
        )
        placed = [
            (part.bucket, (kept_table(log.contract), part.partition))
            for log in plan.logs.values()
            for part in log.parts
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
        item_buckets = max(1, -(-plan.item_rows // sizes.ROWS_PER_BUCKET))
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


@dataclass
class BuildShards(beam.PTransform[Any, Any]):
    """The whole stage as one composite.

    Logs and copies to make go in. Examples, contents and the submitter's own files come out. It
    yields what `FinishRun` wants.
    """

    plan: Plan
    tables: Tables
    progress: str | None

    def expand(self, pipeline: beam.Pipeline) -> Any:
        emitted = pipeline | "Examples" >> BuildExamples(self.plan, self.progress)
        contents = (
            pipeline
            | "ContentJobs" >> beam.Create(self.tables.copies)
            | "SpreadJobs" >> beam.Reshuffle()
            | "CopyContents" >> beam.ParDo(CopyContents())
        )
        submitted = pipeline | "SubmittersFiles" >> beam.Create(self.tables.records)
        # Rows that an earlier run had read are not read again, and came in all the same.
        known = [Count(name, "in", log.known_rows) for name, log in self.plan.logs.items()]
        counts = pipeline | "SubmittersCounts" >> beam.Create([*self.tables.counts, *known])
        return {
            "files": [emitted["files"], contents, submitted] | "AllFiles" >> beam.Flatten(),
            "counts": [emitted["counts"], counts] | "AllCounts" >> beam.Flatten(),
        }
