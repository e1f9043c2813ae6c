"""Reading and writing tables in Beam: one pair of transforms, bound to a contract. Elements are Arrow tables, not rows."""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from camenn_model.hashing import stable_hash
from pipelines.files import Written, fingerprint, join, list_parquet, open_read, write_parquet
from pipelines.parcels import Packer, Parcel, unpack
from schemas.contract import Contract, InputError, check_output, conform
from schemas.rejects import REJECTS

ROWS_PER_FILE = 262_144


@dataclass(frozen=True, kw_only=True)
class Source:
    """One table's files, with the row count of their footers and a fingerprint of what they hold."""

    contract: Contract
    files: tuple[str, ...]
    rows: int
    fingerprint: str

    @classmethod
    def find(cls, directory: str, contract: Contract, *, name: str | None = None) -> "Source":
        """Find `DIR/name.parquet` or `DIR/name/`, and hold every file's columns and types to the contract before any work starts.

        Raises:
            InputError: the table is missing, or a file's columns cannot be read under the contract.
        """
        files = list_parquet(join(directory, name or contract.name), contract.name)
        rows = 0
        for path in files:
            with open_read(path) as handle:
                try:
                    parquet = pq.ParquetFile(handle)
                except pa.ArrowInvalid as error:
                    raise InputError(
                        f"{path}: table '{contract.name}': not a whole Parquet file ({error}). Write it again."
                    ) from error
                conform(parquet.schema_arrow.empty_table(), contract, path)
                rows += parquet.metadata.num_rows
        return cls(contract=contract, files=tuple(files), rows=rows, fingerprint=fingerprint(files))

    def read_all(self, columns: list[str] | None = None) -> pa.Table:
        """The whole table in memory: for small dimensions (users, stores, audience)."""
        tables = []
        for path in self.files:
            with open_read(path) as handle:
                tables.append(conform(pq.read_table(handle), self.contract, path))
        try:
            table = pa.concat_tables(tables, promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise InputError(
                f"{self.files[0]}: the files of table '{self.contract.name}' do not fit together ({error}). Write each column with the same type in all of them."
            ) from error
        return table.select(columns) if columns else table


@dataclass(frozen=True)
class Slice:
    """One row group of a file, with the number of its first row (from 0): where a reject says that it was found."""

    file: str
    row_group: int
    first_row: int
    number: int = 0
    """Within the shard set, of a log's: see pipelines/event_log.py"""


def list_slices(source: Source) -> list[Slice]:
    """Row groups of a table's files, in order."""
    slices = []
    for path in source.files:
        with open_read(path) as handle:
            metadata = pq.ParquetFile(handle).metadata
        first = 0
        for group in range(metadata.num_row_groups):
            slices.append(Slice(path, group, first))
            first += metadata.row_group(group).num_rows
    return slices


def read_slice(where: Slice, contract: Contract, columns: list[str] | None = None) -> pa.Table:
    """One row group, or some of its columns, conformed to its contract."""
    with open_read(where.file) as handle:
        table = pq.ParquetFile(handle).read_row_group(where.row_group, columns=columns)
    return conform(table, contract, where.file)


class _ReadSlice(beam.DoFn):
    def __init__(self, contract: Contract) -> None:
        self.contract = contract
        self.read_msec = beam.metrics.Metrics.counter("read", f"{contract.name}-msec")
        self.rows = beam.metrics.Metrics.counter("read", f"{contract.name}-rows")

    def process(self, element: Slice) -> Iterator[tuple[Slice, pa.Table]]:
        started = time.monotonic()
        table = read_slice(element, self.contract)
        self.read_msec.inc(int(1000 * (time.monotonic() - started)))
        self.rows.inc(table.num_rows)
        yield element, table


@dataclass
class ReadTable(beam.PTransform):
    """Read a table as (Slice, Arrow table) per row group, conformed to its contract; row groups are spread over the workers.

    `slices`: those of its row groups that are wanted; None = all.
    """

    source: Source
    slices: tuple[Slice, ...] | None = None

    def expand(self, pipeline: beam.Pipeline) -> beam.PCollection:
        return (
            pipeline
            | "ListRowGroups" >> beam.Create(list_slices(self.source) if self.slices is None else self.slices)
            | "Spread" >> beam.Reshuffle()
            | "ReadRowGroup" >> beam.ParDo(_ReadSlice(self.source.contract))
        )


@dataclass(frozen=True)
class FileRecord:
    """A finished file: what the manifest lists."""

    table: str
    path: str
    rows: int
    bytes: int
    split: str = ""
    """Part of the log, of example files"""
    sha256: str = ""
    """64 hex digits over its bytes; '' where an earlier version of camenn wrote it"""

    @classmethod
    def of(cls, table: str, path: str, rows: int, written: Written, split: str = "") -> "FileRecord":
        """Return the record of a file that was just written."""
        return cls(table, path, rows, written.bytes, split, written.sha256)


class _WriteTables(beam.DoFn):
    """Buffers Arrow tables up to a file's worth of rows, then writes one file with a unique name."""

    def __init__(self, contract: Contract, directory: str, rows_per_file: int) -> None:
        self.contract = contract
        self.directory = directory
        self.rows_per_file = rows_per_file
        self.write_msec = beam.metrics.Metrics.counter("write", f"{contract.name}-msec")

    def start_bundle(self) -> None:
        self.buffer: list[pa.Table] = []
        self.buffered = 0

    def _flush(self) -> FileRecord:
        started = time.monotonic()
        table = check_output(pa.concat_tables(self.buffer), self.contract)
        path = join(self.directory, f"part-{uuid.uuid4().hex}.parquet")
        written = write_parquet(path, table)
        self.write_msec.inc(int(1000 * (time.monotonic() - started)))
        self.buffer, self.buffered = [], 0
        return FileRecord.of(self.contract.name, path, table.num_rows, written)

    def process(self, table: pa.Table) -> Iterator[FileRecord]:
        if table.num_rows == 0:
            return
        self.buffer.append(table)
        self.buffered += table.num_rows
        if self.buffered >= self.rows_per_file:
            yield self._flush()

    def finish_bundle(self) -> Iterator[beam.utils.windowed_value.WindowedValue]:
        if self.buffered:
            yield beam.transforms.window.GlobalWindows.windowed_value(self._flush())


@dataclass
class WriteTable(beam.PTransform):
    """Write Arrow tables under `directory` as uniquely named Parquet files that meet the contract; yields a FileRecord per file."""

    contract: Contract
    directory: str
    rows_per_file: int = ROWS_PER_FILE

    def expand(self, tables: beam.PCollection) -> beam.PCollection:
        return tables | "WriteParquet" >> beam.ParDo(_WriteTables(self.contract, self.directory, self.rows_per_file))


def write_table(directory: str, name: str, table: pa.Table) -> FileRecord:
    """Write a small table from the submitting process, as DIRECTORY/NAME/part-0.parquet."""
    path = join(directory, name, "part-0.parquet")
    return FileRecord.of(name, path, table.num_rows, write_parquet(path, table))


def hash_buckets(column: pa.ChunkedArray, buckets: int) -> np.ndarray:
    """Bucket number of each string (or integer code), int64 [n], 0 <= b < buckets: the same on every machine and in every process (`stable_hash`)."""
    if buckets == 1:
        return np.zeros(len(column), dtype=np.int64)
    if pa.types.is_integer(column.type):
        return column.to_numpy() % buckets
    return (stable_hash(column) % np.uint64(buckets)).astype(np.int64)


def split_by_bucket(table: pa.Table, column: str, buckets: int) -> Iterator[tuple[int, pa.Table]]:
    """Cut a table into one piece per bucket of `column`; row order within a piece is kept."""
    if table.num_rows == 0:
        return
    bucket = hash_buckets(table[column], buckets)
    order = np.argsort(bucket, kind="stable")
    numbers, starts = np.unique(bucket[order], return_index=True)
    ends = np.append(starts[1:], len(order))
    for number, start, end in zip(numbers, starts, ends, strict=True):
        yield int(number), table.take(pa.array(order[start:end]))


class _ToBuckets(beam.DoFn):
    def __init__(self, column: str, buckets: int, tag: str, packer: Packer) -> None:
        self.column = column
        self.buckets = buckets
        self.tag = tag
        self.packer = packer

    def process(self, table: pa.Table) -> Iterator[tuple[int, tuple[str, Parcel]]]:
        for number, piece in split_by_bucket(table, self.column, self.buckets):
            yield number, (self.tag, self.packer.pack(piece))

    def finish_bundle(self) -> None:
        self.packer.close()


@dataclass
class ShuffleByBucket(beam.PTransform):
    """Bring tables of several kinds together by the hash of one column.

    Takes a dict kind -> (PCollection of Arrow tables, column); yields (bucket, {kind: Arrow table or None}). Batches travel as Arrow IPC bytes: a
    shuffle costs by element, so rows never travel alone. Row order within a bucket is not defined: sort before you depend on it. `compression`: lz4
    is the faster one; zstd takes half of the memory where FnApiRunner holds the shuffle, above all of content keys. `scratch`: directory in which the batches
    stay, so that only their places travel (see pipelines/parcels.py). `placed`: (bucket, (kind, parcel)) of what lies in files by its bucket already.
    """

    kinds: dict[str, str]
    buckets: int
    compression: str = "lz4"
    scratch: str | None = None
    placed: tuple[tuple[int, tuple[str, Parcel]], ...] = ()

    def expand(self, tables: Any) -> beam.PCollection:
        tagged = [
            tables[kind]
            | f"Bucket{kind.title().replace('_', '')}"
            >> beam.ParDo(_ToBuckets(column, self.buckets, kind, Packer(self.scratch, self.compression)))
            for kind, column in self.kinds.items()
        ]
        if self.placed:
            tagged.append(tagged[0].pipeline | "Placed" >> beam.Create(self.placed))
        return (
            tagged | "Merge" >> beam.Flatten() | "ByBucket" >> beam.GroupByKey() | "Decode" >> beam.Map(_decode_group)
        )


def _decode_group(group: tuple[int, Iterable[tuple[str, Parcel]]]) -> tuple[int, dict[str, pa.Table]]:
    bucket, pieces = group
    found: dict[str, list[pa.Table]] = {}
    for tag, parcel in pieces:
        found.setdefault(tag, []).append(unpack(parcel))
    return bucket, {tag: pa.concat_tables(tables) for tag, tables in found.items()}


def make_rejects(stage: str, keys: list[str], reason: str, details: list[str]) -> pa.Table:
    """A rejects (or defects) table of one reason."""
    return pa.table(
        {"stage": [stage] * len(keys), "key": keys, "reason": [reason] * len(keys), "detail": details},
        schema=REJECTS.schema,
    )


@dataclass(frozen=True)
class Fault:
    """What makes rows of a table unusable. `rows`: bool [n]; `told`: of one of them, column, value and remedy."""

    reason: str
    rows: np.ndarray
    told: Callable[[int], str]


def find_nulls(table: pa.Table, contract: Contract) -> list[Fault]:
    """A fault for each column that lacks a required value somewhere."""
    return [
        Fault(
            f"null_{column.name}",
            pc.is_null(table[column.name]).to_numpy(),
            lambda _, column=column: (
                f"column '{column.name}' is null. Give it a value ({column.doc}) or leave the row out."
            ),
        )
        for column in contract.columns
        if not (column.nullable or column.optional) and table[column.name].null_count
    ]


def drop_faults(
    stage: str, where: Slice, table: pa.Table, contract: Contract, faults: Iterable[Fault]
) -> tuple[pa.Table, pa.Table]:
    """Split off unusable rows, each under its first fault: (rows to keep, rejects). A reject names file, row, column and remedy."""
    bad = np.zeros(table.num_rows, dtype=bool)
    rejects = [REJECTS.schema.empty_table()]
    for fault in faults:
        rows = np.flatnonzero(fault.rows & ~bad)
        bad |= fault.rows
        keys, details = [], []
        for row in map(int, rows):
            values = [table[name][row].as_py() for name in contract.key]
            known = "/".join(str(v) for v in values if v is not None)
            keys.append(f"{contract.name}:{known or f'row {where.first_row + row} of {where.file}'}")
            details.append(f"{where.file}: row {where.first_row + row}: {fault.told(row)}")
        rejects.append(make_rejects(stage, keys, fault.reason, details))
    return (table.filter(pa.array(~bad)) if bad.any() else table), pa.concat_tables(rejects)


def drop_nulls(stage: str, where: Slice, table: pa.Table, contract: Contract) -> tuple[pa.Table, pa.Table]:
    """Split off rows that lack a required value, see `drop_faults`."""
    return drop_faults(stage, where, table, contract, find_nulls(table, contract))
