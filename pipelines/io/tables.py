"""Read and write tables in Beam.

One pair of transforms is bound to a contract. Elements are Arrow tables, not rows.
"""

import contextlib
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import apache_beam as beam
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.io.cache import keep_inputs, open_input
from pipelines.io.errors import reading
from pipelines.io.files import Written, find_parquet, fingerprint, join, write_parquet
from pipelines.io.object_file import ObjectFile
from schemas.contract import Contract, check_output, conform, find_not_utf8, is_text, without_dictionary
from schemas.errors import InputError

ROWS_PER_FILE = 262_144


@dataclass(frozen=True, kw_only=True)
class Source:
    """One table's files and their row count.

    The row count is that of their footers. A fingerprint of their contents is kept with them.
    """

    contract: Contract
    files: tuple[str, ...]
    rows: int
    fingerprint: str

    @classmethod
    def find(cls, directory: str, contract: Contract, *, name: str | None = None) -> "Source":
        """Find a table's files and check their columns.

        The files are `DIR/name.parquet` or `DIR/name/`. Every file's columns and types are checked
        against the contract before any work starts.

        Raises:
            InputError: the table is missing, or a file's columns cannot be read under the contract.
        """
        found = find_parquet(join(directory, name or contract.name), contract.name)
        files = [file.path for file in found]
        keep_inputs(found)
        rows = 0
        for path in files:
            with open_table(path, contract) as (_, parquet):
                conform(parquet.schema_arrow.empty_table(), contract, path)
                rows += parquet.metadata.num_rows
        return cls(contract=contract, files=tuple(files), rows=rows, fingerprint=fingerprint(found))

    def read_all(self, columns: list[str] | None = None) -> pa.Table:
        """Read the whole table into memory.

        It is for small dimensions (users, stores, audience).

        Raises:
            InputError: a file cannot be read, has a text that is not UTF-8, or does not fit the
                others.
        """
        tables = []
        for path in self.files:
            table = read_groups(path, self.contract)
            for name in table.column_names:
                column = without_dictionary(table[name])
                wrong = find_not_utf8(column)
                if wrong is not None:
                    row = pc.index(wrong, value=True).as_py()
                    raise InputError(f"{path}: row {row}: {describe_not_utf8(name, column[row])}")
            tables.append(table)
        try:
            table = pa.concat_tables(tables, promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise InputError(
                f"{self.files[0]}: the files of table '{self.contract.name}' do not fit "
                f"together ({error}). Write each column with the same type in all of them."
            ) from error
        return table.select(columns) if columns else table


@dataclass(frozen=True)
class Slice:
    """One row group of a file.

    It has the number of its first row (from 0), from which a reject's row number is computed.
    """

    file: str
    row_group: int
    first_row: int
    number: int = 0
    """Within the shard set, for a log: see pipelines/shards/log_cache.py"""


@contextlib.contextmanager
def open_table(path: str, contract: Contract) -> Iterator[tuple[BinaryIO, pq.ParquetFile]]:
    """Open one of a table's files.

    Yields (its byte stream, Arrow's Parquet reader on it).

    Raises:
        InputError: naming the file, for any error in the block.
    """
    with reading(path, f"table '{contract.name}' cannot be read"), open_input(path) as handle:
        yield handle, open_parquet(handle)


def open_parquet(handle: BinaryIO, texts: Sequence[str] = ()) -> pq.ParquetFile:
    """Open a Parquet file and check its pages.

    Pages are verified against their checksums where they have any.

    `texts`: columns to read as dictionaries of strings.
    """
    # Of an object, neighbouring columns are one request.
    return pq.ParquetFile(
        handle,
        page_checksum_verification=True,
        read_dictionary=list(texts),
        pre_buffer=isinstance(handle, ObjectFile),
    )


def read_groups(
    path: str, contract: Contract, groups: Sequence[int] | None = None, columns: list[str] | None = None
) -> pa.Table:
    """Read row groups and columns of a file.

    The chosen row groups and columns, or all, are read and conformed to the contract.

    Raises:
        InputError: naming file, row group and column that cannot be read.
    """
    with open_table(path, contract) as (handle, parquet):
        wanted = list(range(parquet.num_row_groups) if groups is None else groups)
        try:
            table = parquet.read_row_groups(wanted, columns=columns)
        except (pa.ArrowException, OSError) as error:
            # Arrow checks the values of most dictionaries while it reads, and does not report which one is wrong.
            texts = [field.name for field in parquet.schema_arrow if _is_coded_text(field.type)]
            parquet = open_parquet(handle, texts)
            table = _read_columns(path, contract, parquet, wanted, columns, error)
    return conform(table, contract, path)


def _is_coded_text(kind: pa.DataType) -> bool:
    return pa.types.is_dictionary(kind) and is_text(kind.value_type)


def _read_columns(
    path: str,
    contract: Contract,
    parquet: pq.ParquetFile,
    groups: Iterable[int],
    columns: list[str] | None,
    error: Exception,
) -> pa.Table:
    """Read again after `error` to locate it.

    `error` ended the first reading.
    """
    tables = []
    for group in groups:
        try:
            tables.append(parquet.read_row_group(group, columns=columns))
        except (pa.ArrowException, OSError):
            for name in columns or parquet.schema_arrow.names:
                where = f"row group {group}: column '{name}' of table '{contract.name}' cannot be read"
                with reading(path, where):
                    parquet.read_row_group(group, columns=[name])
            raise error from None
    return pa.concat_tables(tables)


def list_slices(source: Source) -> list[Slice]:
    """List the row groups of a table's files, in order."""
    slices = []
    for path in source.files:
        with open_table(path, source.contract) as (_, parquet):
            metadata = parquet.metadata
        first = 0
        for group in range(metadata.num_row_groups):
            slices.append(Slice(path, group, first))
            first += metadata.row_group(group).num_rows
    return slices


def read_slice(where: Slice, contract: Contract, columns: list[str] | None = None) -> pa.Table:
    """Read one row group, conformed to its contract.

    It may have only some of the columns.
    """
    return read_groups(where.file, contract, [where.row_group], columns)


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


# Any: Beam takes the type of elements for a hint, and chooses coders by it.
@dataclass
class ReadTable(beam.PTransform[beam.Pipeline, beam.PCollection[Any]]):
    """A transform that reads a table by row group.

    It yields (Slice, Arrow table) per row group, conformed to its contract. Row groups are spread
    over the workers.

    `slices`: the row groups to read. None = all.
    """

    source: Source
    slices: tuple[Slice, ...] | None = None

    def expand(self, pipeline: beam.Pipeline) -> beam.PCollection[Any]:
        return (
            pipeline
            | "ListRowGroups" >> beam.Create(list_slices(self.source) if self.slices is None else self.slices)
            | "Spread" >> beam.Reshuffle()
            | "ReadRowGroup" >> beam.ParDo(_ReadSlice(self.source.contract))
        )


@dataclass(frozen=True)
class FileRecord:
    """A finished file, as the manifest lists it."""

    table: str
    path: str
    rows: int
    bytes: int
    split: str = ""
    """Part of the log, of example files"""
    sha256: str = ""
    """SHA-256 of its bytes, 64 hex digits, '' where an earlier version of camenn wrote it"""

    @classmethod
    def of(cls, table: str, path: str, rows: int, written: Written, split: str = "") -> "FileRecord":
        """Return the record of a file that was just written."""
        return cls(table, path, rows, written.bytes, split, written.sha256)


class _WriteTables(beam.DoFn):
    """A step that writes buffered Arrow tables to files.

    It buffers up to a file's number of rows, then writes one file with a unique name.
    """

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
class WriteTable(beam.PTransform[beam.PCollection[Any], beam.PCollection[Any]]):
    """A transform that writes Arrow tables under `directory`.

    They are uniquely named Parquet files that meet the contract. It yields a FileRecord per file.
    """

    contract: Contract
    directory: str
    rows_per_file: int = ROWS_PER_FILE

    def expand(self, tables: beam.PCollection[Any]) -> beam.PCollection[Any]:
        return tables | "WriteParquet" >> beam.ParDo(_WriteTables(self.contract, self.directory, self.rows_per_file))


def write_table(directory: str, name: str, table: pa.Table) -> FileRecord:
    """Write a small table from the submitting process, as DIRECTORY/NAME/part-0.parquet."""
    path = join(directory, name, "part-0.parquet")
    return FileRecord.of(name, path, table.num_rows, write_parquet(path, table))


def describe_not_utf8(name: str, text: pa.StringScalar) -> str:
    r"""Describe a text that is not UTF-8.

    The text has column, value (undecodable bytes as \xe9) and remedy.
    """
    return (
        f"column '{name}' is not UTF-8: '{show_text(text)}'. Convert the text to UTF-8 (from "
        "Latin-1, perhaps), or leave the row out."
    )


def show_text(text: pa.StringScalar) -> str:
    """Return a text for a person, whatever its bytes are."""
    return str(text.cast(pa.large_binary()).as_py().decode(errors="backslashreplace"))
