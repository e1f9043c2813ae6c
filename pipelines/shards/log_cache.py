"""The rows of the logs that a shard set keeps.

They are kept so that the next run reads only new parts of the logs.

A row group of a log file is identified by a hash of its bytes, wherever it lies by then. Its
cleaned rows are kept in files of one bucket of users each, and go to the user pass from there. A
new row group is read. The rows of one that is gone are dropped. So a run sees exactly the rows of
tonight's logs, whatever was kept. A row group with a row that was rejected is read again each time,
so that the reject names the file of tonight.

Files are Arrow IPC streams, texts dictionary-encoded, in order of time. Their schema's metadata has
the bucket and the number of rows of each row group.
"""

import hashlib
import json
import uuid
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from camenn_model.integrity import DamagedError
from pipelines.features.time_index import DAY_US, Ints, day_of
from pipelines.inputs.logs import SLICE, UNCODED, time_column
from pipelines.io import files
from pipelines.io.clock import EARLIEST, latest_time
from pipelines.io.shuffle import SpilledPartition
from pipelines.io.tables import FileRecord, Slice, Source, open_table
from pipelines.runner.log import stage_logger
from pipelines.runs.manifest import Manifest, check_records
from schemas.contract import TIMESTAMP, Contract, without_dictionary

MERGE = 8
"""Number of a bucket's files from which on they are merged"""


def kept_table(contract: Contract) -> str:
    """Name the table of a log's kept rows.

    The table is one of a run's tables.
    """
    return f"kept_{contract.name}"


@dataclass(frozen=True)
class Part:
    """One file of kept rows."""

    record: FileRecord
    bucket: int
    slices: dict[int, int]
    """Number of a row group → its rows"""

    @classmethod
    def read(cls, record: FileRecord) -> "Part":
        """Read the file's record from its metadata."""
        with files.open_read(record.path) as handle:
            metadata = pa.ipc.open_stream(handle).schema.metadata
        slices = json.loads(metadata[b"slices"])
        return cls(record, int(metadata[b"bucket"]), {int(number): rows for number, rows in slices.items()})

    @property
    def partition(self) -> SpilledPartition:
        """Return the file as a partition of a shuffle."""
        return (self.record.path, 0, self.record.bytes)


@dataclass(frozen=True)
class RowGroup:
    """A row group of a log."""

    number: int
    """Within the shard set"""
    rows: int
    first: int | None = None
    last: int | None = None
    """Its earliest and latest time, int64 microseconds, None where its file does not record them"""


@dataclass(frozen=True, kw_only=True)
class LogPlan:
    """The row groups of a log, read or kept."""

    contract: Contract
    groups: dict[str, RowGroup] = field(default_factory=dict)
    """By hash: the row groups of tonight's log"""
    places: tuple[Slice, ...] = ()
    """Where each of them lies, with its number, in the same order"""
    known: frozenset[int] = frozenset()
    """Numbers of those whose rows are kept"""
    parts: tuple[Part, ...] = ()
    merged: frozenset[int] = frozenset()
    """Buckets whose files are merged tonight"""
    next_number: int = 0
    forgotten: tuple[RowGroup, ...] = ()
    """Known row groups that are gone"""

    @property
    def fresh(self) -> tuple[Slice, ...]:
        """Return the row groups to read."""
        return tuple(place for place in self.places if place.number not in self.known)

    @property
    def fresh_rows(self) -> int:
        """Count the rows to read."""
        return sum(group.rows for group in self.groups.values()) - self.known_rows

    @property
    def known_rows(self) -> int:
        """Count the kept rows that are used tonight."""
        return sum(group.rows for group in self.groups.values() if group.number in self.known)

    @property
    def dropped(self) -> bool:
        """Return whether some kept rows are no longer used.

        Such rows are of row groups that are gone, or that are read again.
        """
        return any(not part.slices.keys() <= self.known for part in self.parts)

    def unsampled(self) -> tuple[list[Slice], set[str] | None]:
        """Return the row groups and days to sample again.

        The result is (row groups to read for a sample of each day, the days whose previous sample
        is invalid). None for the days means all.

        A day from which rows have gone is sampled again, of all row groups that may have some of
        it.
        """
        spans = [(group.first, group.last) for group in self.forgotten]
        if not self.known or any(first is None or last is None for first, last in spans):
            return list(self.places), None
        days = [(first // DAY_US, last // DAY_US) for first, last in spans if first is not None and last is not None]
        wanted = []
        for group, place in zip(self.groups.values(), self.places, strict=True):
            if group.number not in self.known or group.first is None or group.last is None:
                wanted.append(place)
                continue
            first, last = group.first // DAY_US, group.last // DAY_US
            if any(first <= end and last >= start for start, end in days):
                wanted.append(place)
        return wanted, {day_of(day * DAY_US) for start, end in days for day in range(start, end + 1)}


def hash_row_groups(source: Source) -> list[tuple[str, Slice, RowGroup]]:
    """Hash every row group of a log.

    Returns (hash, place, the row group without its number) of every row group, in order. The hash
    is SHA-256 of the bytes of the contract's columns and of their types. Identical row groups are
    distinguished by their number of predecessors.
    """
    found: list[tuple[str, Slice, RowGroup]] = []
    time = time_column(source.contract)
    seen: dict[str, int] = {}
    for path in source.files:
        with open_table(path, source.contract) as (handle, parquet):
            metadata, schema = parquet.metadata, parquet.schema_arrow
            places = [place for place in range(metadata.num_columns) if _name(metadata, place) in source.contract.names]
            types = ",".join(
                f"{_name(metadata, place)} {schema.field(_name(metadata, place)).type}" for place in places
            )
            first = 0
            for number in range(metadata.num_row_groups):
                group = metadata.row_group(number)
                digest = hashlib.sha256(f"{types};{group.num_rows}".encode())
                span: tuple[int | None, int | None] = (None, None)
                for place in places:
                    chunk = group.column(place)
                    if _name(metadata, place) == time:
                        span = _span(chunk.statistics, schema.field(time).type)
                    start = chunk.data_page_offset
                    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
                        start = min(start, chunk.dictionary_page_offset)
                    handle.seek(start)
                    digest.update(
                        f";{_name(metadata, place)} {chunk.compression} {chunk.total_compressed_size};".encode()
                    )
                    digest.update(handle.read(chunk.total_compressed_size))
                name = digest.hexdigest()[:32]
                seen[name] = seen.get(name, 0) + 1
                again = f"{name}-{seen[name]}" if seen[name] > 1 else name
                found.append((again, Slice(path, number, first), RowGroup(-1, group.num_rows, *span)))
                first += group.num_rows
    return found


def _span(statistics: pq.Statistics | None, kind: pa.DataType) -> tuple[int | None, int | None]:
    """Return the earliest and latest time of a column's statistics.

    They are int64 microseconds. The result is (None, None) where the statistics are missing or have
    impossible times.
    """
    if statistics is None or not statistics.has_min_max or not pa.types.is_timestamp(kind):
        return None, None
    # Converting times beyond Python's years to its datetime would end the run.
    raw = pa.array([statistics.min_raw, statistics.max_raw], pa.int64())
    try:
        first, last = (
            raw.cast(pa.timestamp(kind.unit)).cast(TIMESTAMP, safe=kind.unit != "ns").cast(pa.int64()).to_pylist()
        )
    except pa.ArrowInvalid:
        return None, None
    return (first, last) if first >= EARLIEST and last <= latest_time() else (None, None)


def _name(metadata: pq.FileMetaData, place: int) -> str:
    return str(metadata.schema.column(place).path)


def plan_logs(
    sources: Iterable[Source], latest: Manifest | None, rows_per_bucket: int
) -> tuple[dict[str, LogPlan], int]:
    """Plan the reading of each log.

    Returns ({table: its plan}, buckets of users). With `latest` None everything is new.
    """
    found = {source.contract.name: hash_row_groups(source) for source in sources}
    contracts = {source.contract.name: source.contract for source in sources}
    needed = max(1, -(-sum(group.rows for groups in found.values() for _, _, group in groups) // rows_per_bucket))
    earlier = _earlier(latest, contracts, needed)
    buckets = earlier["buckets"] if earlier else needed
    plans = {}
    for name, groups in found.items():
        before: dict[str, RowGroup] = earlier["tables"][name]["groups"] if earlier else {}
        parts: list[Part] = earlier["tables"][name]["parts"] if earlier else []
        following: int = earlier["tables"][name]["next"] if earlier else 0
        there = _count_rows(parts)
        now: dict[str, RowGroup] = {}
        for key, _, group in groups:
            # Where rows were rejected, fewer are kept than were read.
            if key in before and there.get(before[key].number, 0) == group.rows:
                now[key] = before[key]
            else:
                now[key] = replace(group, number=following)
                following += 1
        known = frozenset(group.number for key, group in now.items() if group == before.get(key))
        parts = [part for part in parts if part.slices.keys() & known]
        counted: dict[int, int] = {}
        for part in parts:
            counted[part.bucket] = counted.get(part.bucket, 0) + 1
        plans[name] = LogPlan(
            contract=contracts[name],
            groups=now,
            places=tuple(replace(place, number=now[key].number) for key, place, _ in groups),
            known=known,
            parts=tuple(parts),
            merged=frozenset(bucket for bucket, number in counted.items() if number >= MERGE),
            next_number=following,
            forgotten=tuple(before[key] for key in before.keys() - now.keys()),
        )
    return plans, buckets


def _count_rows(parts: Iterable[Part]) -> dict[int, int]:
    """Count the kept rows of each row group."""
    there: dict[int, int] = {}
    for part in parts:
        for number, rows in part.slices.items():
            there[number] = there.get(number, 0) + rows
    return there


def _earlier(latest: Manifest | None, contracts: dict[str, Contract], needed: int) -> dict[str, Any] | None:
    """Return the published run's kept rows, where usable.

    The result is {buckets, tables: {name: {groups, next, parts}}}.
    """
    log = latest.options.get("log") if latest is not None else None
    if latest is None or log is None or not log["buckets"] / 4 <= needed <= 2 * log["buckets"]:
        return None
    tables = {}
    for name, contract in contracts.items():
        table = log["tables"].get(name)
        if table is None or table["contract"] != contract.fingerprint():
            return None
        try:
            check_records(latest.records(kept_table(contract)), "The whole log is read again.")
        except DamagedError as error:
            stage_logger("shards").warning("%s", error)
            return None
        parts = [Part.read(record) for record in latest.records(kept_table(contract))]
        groups = {key: RowGroup(*values) for key, values in table["groups"].items()}
        tables[name] = {"groups": groups, "next": table["next"], "parts": parts}
    return {"buckets": int(log["buckets"]), "tables": tables}


def remember(plans: dict[str, LogPlan], buckets: int) -> tuple[dict[str, Any], list[FileRecord]]:
    """Return the manifest's entry for the logs.

    The result is (the manifest's entry, files of earlier runs that stay in use).
    """
    tables, kept = {}, []
    for name, plan in plans.items():
        kept += [part.record for part in plan.parts if part.bucket not in plan.merged]
        tables[name] = {
            "contract": plan.contract.fingerprint(),
            "next": plan.next_number,
            "groups": {key: astuple(group) for key, group in plan.groups.items()},
        }
    return {"buckets": buckets, "tables": tables}, kept


def encode_rows(table: pa.Table) -> pa.Table:
    """Dictionary-encode the texts of a log's rows.

    The rows, newly read or kept, come in one piece. Ids that hardly ever repeat stay plain strings.
    """
    # Combine the pieces first: the dictionaries of thousands of pieces would be merged one by one,
    # each time with all values.
    table = table.combine_chunks()
    for place, column in enumerate(table.schema):
        if pa.types.is_string(column.type) and column.name not in UNCODED:
            table = table.set_column(place, column.name, table[column.name].dictionary_encode())
    return _whole(table)


def _whole(table: pa.Table) -> pa.Table:
    """Return the table in one piece.

    It has one dictionary a column.
    """
    return table.unify_dictionaries().combine_chunks()


def drop_stale_rows(table: pa.Table, known: Ints) -> pa.Table:
    """Drop kept rows of row groups no longer known."""
    return table.filter(pa.array(np.isin(table[SLICE].to_numpy(), known)))


def write_rows(directory: str, contract: Contract, bucket: int, table: pa.Table) -> FileRecord:
    """Keep the rows of a bucket in a new file.

    It is a bucket of users. The rows are encoded, in one piece and with SLICE.
    """
    table = table.take(pa.array(np.argsort(table[time_column(contract)].cast(pa.int64()).to_numpy(), kind="stable")))
    numbers, rows = np.unique(table[SLICE].to_numpy(), return_counts=True)
    slices = {str(number): int(count) for number, count in zip(numbers, rows, strict=True)}
    table = table.replace_schema_metadata({"bucket": str(bucket), "slices": json.dumps(slices)})
    path = files.join(directory, kept_table(contract), f"bucket-{bucket}-{uuid.uuid4().hex}.arrows")
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with files.atomic_write(path) as handle, pa.ipc.new_stream(handle, table.schema, options=options) as writer:
        writer.write_table(table)
    return FileRecord.of(kept_table(contract), path, table.num_rows, handle.written)


@dataclass(frozen=True, kw_only=True)
class KeptRows:
    """The user pass's facts about a log's kept rows.

    The object is serialized to workers.
    """

    contract: Contract
    directory: str
    """Of the run"""
    known: Ints
    """Numbers of the row groups whose rows are used, int64, in order"""
    dropped: bool
    merged: frozenset[int]

    @classmethod
    def of(cls, plan: LogPlan, directory: str) -> "KeptRows":
        """Build from the log's plan."""
        known = np.array(sorted(plan.known), dtype=np.int64)
        return cls(contract=plan.contract, directory=directory, known=known, dropped=plan.dropped, merged=plan.merged)

    def join(self, bucket: int, kinds: dict[str, pa.Table]) -> tuple[pa.Table, list[FileRecord]]:
        """Join a bucket's kept rows with the newly read ones.

        Returns (the log of a bucket of users, the files that keep the newly read rows). The log has
        both, texts dictionary-encoded.
        """
        pieces = []
        kept, fresh = kinds.get(kept_table(self.contract)), kinds.get(self.contract.name)
        if kept is not None:
            pieces.append(drop_stale_rows(kept, self.known) if self.dropped else kept)
        if fresh is not None:
            pieces.append(encode_rows(fresh))
        if not pieces:
            return self.contract.schema.empty_table(), []
        table = _whole(pa.concat_tables(pieces))
        if bucket in self.merged:
            # Dictionaries may hold values that no row has any more.
            plain = pa.table({name: without_dictionary(table[name]) for name in table.column_names})
            new = encode_rows(plain)
        else:
            new = pieces[-1] if fresh is not None else table.slice(0, 0)
        written = [write_rows(self.directory, self.contract, bucket, new)] if new.num_rows else []
        return table, written
