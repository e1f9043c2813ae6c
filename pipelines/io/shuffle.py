"""Shuffle tables by bucket.

On the local runner tables are spilled to files of the run. On other runners they are sent as bytes.
"""

import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import apache_beam as beam
import numpy as np
import pyarrow as pa

from camenn_model.hashing import stable_hash
from pipelines.io import files

SpilledPartition = bytes | tuple[str, int, int]
"""Arrow IPC bytes, or their (path, offset, length): a tuple, as Beam encodes tuples of plain values quickly."""


class Packer:
    """A packer of tables into partitions.

    It is serialized to workers, and opens its file there.

    Args:
        scratch: directory of the files, on a disk that all workers share. None = partitions are bytes.
        compression: lz4 is the faster one, zstd the smaller.
    """

    def __init__(self, scratch: str | None, compression: str = "lz4") -> None:
        self.scratch, self.compression = scratch, compression
        self._file: BinaryIO | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"scratch": self.scratch, "compression": self.compression, "_file": None}

    def pack(self, table: pa.Table) -> SpilledPartition:
        """Pack a table into a partition.

        The partition can be unpacked immediately.
        """
        data = files.ipc_bytes(table, self.compression)
        if self.scratch is None:
            return data
        if self._file is None:
            os.makedirs(self.scratch, exist_ok=True)
            # A unique name: a retried bundle leaves the first attempt's file alone. It is closed by
            # `close`.
            self._file = open(os.path.join(self.scratch, f"{uuid.uuid4().hex}.arrows"), "ab")  # noqa: SIM115
        start = self._file.tell()
        self._file.write(data)
        self._file.flush()
        return (self._file.name, start, len(data))

    def close(self) -> None:
        """End the file.

        The next table begins another one.
        """
        if self._file is not None:
            self._file.close()
            self._file = None


def unpack(partition: SpilledPartition) -> pa.Table:
    """Return the table of a partition."""
    if isinstance(partition, tuple):
        path, start, length = partition
        with files.open_read(path) as handle:
            handle.seek(start)
            partition = handle.read(length)
    return files.ipc_table(partition)


def hash_buckets(column: pa.ChunkedArray, buckets: int) -> np.ndarray:
    """Compute each value's bucket number, int64 [n].

    Values are strings or integer codes, and 0 <= b < buckets. The number is the same on every
    machine and in every process (`stable_hash`).
    """
    if buckets == 1:
        return np.zeros(len(column), dtype=np.int64)
    if pa.types.is_integer(column.type):
        return column.to_numpy() % buckets
    return (stable_hash(column) % np.uint64(buckets)).astype(np.int64)


def split_by_bucket(table: pa.Table, column: str, buckets: int) -> Iterator[tuple[int, pa.Table]]:
    """Cut a table into one piece per bucket of `column`.

    Row order within a piece is kept.
    """
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

    def process(self, table: pa.Table) -> Iterator[tuple[int, tuple[str, SpilledPartition]]]:
        for number, piece in split_by_bucket(table, self.column, self.buckets):
            yield number, (self.tag, self.packer.pack(piece))

    def finish_bundle(self) -> None:
        self.packer.close()


@dataclass
class ShuffleByBucket(beam.PTransform[Any, beam.PCollection[Any]]):
    """A transform that groups several tables by a column's hash.

    Takes a dict kind -> (PCollection of Arrow tables, column). Yields (bucket, {kind: Arrow table
    or None}). Batches travel as Arrow IPC bytes: a shuffle costs by element, so rows never travel
    alone. Row order within a bucket is not defined: sort before depending on it.

    `compression`: lz4 is the faster one. zstd takes half of the memory where FnApiRunner holds the
    shuffle, above all of content keys.

    `scratch`: directory into which batches are spilled, so that only their locations travel (see
    pipelines/io/shuffle.py).

    `placed`: (bucket, (kind, partition)) of tables that are stored by bucket already.
    """

    kinds: dict[str, str]
    buckets: int
    compression: str = "lz4"
    scratch: str | None = None
    placed: tuple[tuple[int, tuple[str, SpilledPartition]], ...] = ()

    def expand(self, tables: Any) -> beam.PCollection[Any]:
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


def _decode_group(group: tuple[int, Iterable[tuple[str, SpilledPartition]]]) -> tuple[int, dict[str, pa.Table]]:
    bucket, pieces = group
    found: dict[str, list[pa.Table]] = {}
    for tag, partition in pieces:
        found.setdefault(tag, []).append(unpack(partition))
    return bucket, {tag: pa.concat_tables(tables) for tag, tables in found.items()}
