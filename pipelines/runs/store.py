"""The embedding store.

Its parts are content-addressed and lie under one generation per encoder fingerprint, each with a
commit marker.

    STORE/images/FINGERPRINT/part-X.parquet    distinct photos' patch features
    STORE/images/FINGERPRINT/part-X.keys.parquet   the same rows without the patch features
    STORE/images/FINGERPRINT/part-X.json       commit marker: rows, bytes, kernels, photos that
                                               could not be decoded, photos that were gone
    STORE/titles/FINGERPRINT/...               the same for titles
    STORE/runs/RUN/items/...                   which photo and title each listing has
    STORE/runs/RUN/...                         also rejects/, defects/, manifest.json
    STORE/latest.json

A part without its marker was cut off by a crash: nobody reads it. Every night adds small parts, so
every run that encoded something also merges small ones into large ones. The marker of a merged part
names the parts that it replaces, and from that moment on nobody reads them. They are removed once
they have been replaced for two days and the published run does not list them.
"""

import datetime
import hashlib
import itertools
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from camenn_model.integrity import check_file
from pipelines.io import clock, files
from pipelines.io.lease import Writer
from pipelines.io.tables import FileRecord
from pipelines.runs.part_keys import (
    files_of_part,
    keys_path,
    marker_path,
    read_keys,
    read_part,
    write_keys,
)
from schemas.contract import Contract, check_output
from schemas.embeddings import stamp_embeddings
from schemas.manifest import MARKER_FIELDS, remedy

IMAGES, TITLES = "images", "titles"
MERGED_BYTES = 256 * 2**20
"""Parts of half this size or more are left alone. Smaller ones are merged up to it."""
SMALL_PARTS = 32
"""So many small parts of a generation are left unmerged: a night adds a few, and merging them every
night would rewrite the same rows again and again."""
READERS_HAVE = datetime.timedelta(hours=48)
"""How long a part that was replaced stays, for readers who began before."""
REMOVED_AT_ONCE = 100
"""Parts between two looks at whether the store is still this process's to write to"""
ROW_GROUP = 256
"""Rows: what is held in memory when a part is read or merged."""
_READ_THREADS = 4
_REMEDY = remedy("embed", "image_embeddings")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A committed part of a generation."""

    path: str
    rows: int
    bytes: int
    sha256: str = ""
    """64 hex digits over its bytes, '' where an earlier version of camenn wrote it"""
    keys_bytes: int = 0
    """Of its keys file, 0 where an earlier version of camenn wrote none"""
    keys_sha256: str = ""
    failures: tuple[tuple[str, str, str], ...] = ()
    """(content key, reason, detail) of contents in the chunk that could not be encoded."""
    unread: tuple[tuple[str, str, str], ...] = ()
    """The same of contents that were not there any more: true of that run only, so that later ones try again."""
    kernels: str = ""
    """What computed the embeddings, see `EncoderSpec.kernels`: other ones give other last bits."""
    seconds: float = 0.0
    """Time of encoding: from the chunk to the arrays, reading and decoding included. 0 = not known."""
    replaces: tuple[str, ...] = ()
    """Names of the parts that were merged into this one."""
    written_at: str = ""
    """ISO time, UTC"""

    def check(self) -> None:
        """Check that part and keys file are whole.

        Raises:
            DamagedError: one is gone, or has another size or other bytes than the marker says.
        """
        if files.is_local(self.path):
            check_file(self.path, self.bytes, self.sha256, _REMEDY)
            if self.keys_bytes:
                check_file(keys_path(self.path), self.keys_bytes, self.keys_sha256, _REMEDY)

    def record(self, table: str) -> FileRecord:
        """Return the part as a file of a manifest's table."""
        return FileRecord(table, self.path, self.rows, self.bytes, sha256=self.sha256)

    def keys_record(self, table: str) -> FileRecord:
        """Return the keys file as a manifest's file."""
        return FileRecord(table, keys_path(self.path), self.rows, self.keys_bytes, sha256=self.keys_sha256)

    def read_keys(self, columns: list[str]) -> pa.Table:
        """Read columns other than the embedding.

        They come from the keys file where there is one.
        """
        if self.keys_bytes:
            return read_keys(keys_path(self.path), self.keys_bytes, self.keys_sha256, columns)
        return read_part(self.path, columns)

    @property
    def name(self) -> str:
        """Return the part's own name.

        It is what `part-` and `.parquet` stand around.
        """
        return self.path.rpartition("/")[2].removeprefix("part-").removesuffix(".parquet")


def generation(store: str, kind: str, fingerprint: str) -> str:
    """Return the directory of one kind's generation."""
    return files.join(store, kind, fingerprint)


def list_parts(directory: str) -> list[Part]:
    """List the committed parts of a generation, by path.

    They are those that no other one replaces: each content is in one of them.
    """
    return standing_parts(all_parts(directory))


def standing_parts(parts: list[Part]) -> list[Part]:
    """Leave out the parts that others replace."""
    replaced = {name for part in parts for name in part.replaces}
    return [part for part in parts if part.name not in replaced]


def all_parts(directory: str, known: Iterable[Part] = ()) -> list[Part]:
    """List the committed parts, replaced ones included.

    They are a generation's, by path. `known`: parts of an earlier listing in this run, whose
    markers are not read again.
    """
    markers = sorted(marker.path for marker in files.match(directory, "part-*.json"))
    found = {marker_path(part.path): part for part in known}
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        return list(pool.map(lambda path: found.get(path) or read_marker(path), markers))


def read_marker(path: str) -> Part:
    """Read the part that a commit marker vouches for."""
    return _part(path, files.read_document(path, MARKER_FIELDS, _REMEDY))


def _part(path: str, value: dict[str, Any]) -> Part:
    failures, unread = (
        tuple((key, reason, detail) for key, reason, detail in value[name]) for name in ("failures", "unread")
    )
    return Part(
        path=path.removesuffix(".json") + ".parquet",
        rows=value["rows"],
        bytes=value["bytes"],
        sha256=value.get("sha256", ""),
        keys_bytes=value.get("keys_bytes", 0),
        keys_sha256=value.get("keys_sha256", ""),
        failures=failures,
        unread=unread,
        kernels=value["kernels"],
        seconds=value["seconds"],
        replaces=tuple(value["replaces"]),
        written_at=value["written_at"],
    )


def chunk_name(run: str, keys: list[str]) -> str:
    """Name the part that one run makes of some keys.

    They are content keys. A retried bundle writes the same part again, not a second one.
    """
    return hashlib.sha256("\n".join([run, *keys]).encode()).hexdigest()[:32]


def find_part(directory: str, name: str) -> Part | None:
    """Find the committed part of that name, if any."""
    marker = files.join(directory, f"part-{name}.json")
    value = files.read_document_if_there(marker, MARKER_FIELDS, _REMEDY)
    return None if value is None else _part(marker, value)


def fixed_binary(arrays: NDArray[np.float16]) -> pa.FixedSizeBinaryArray:
    """Convert an array to values of an `embedding` column.

    The array is [n, rows, width], in row-major order.
    """
    size = arrays.dtype.itemsize * arrays.shape[1] * arrays.shape[2]
    buffer = pa.py_buffer(np.ascontiguousarray(arrays))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), len(arrays), [None, buffer])


def commit_part(
    directory: str,
    contract: Contract,
    shape: tuple[int, int],
    name: str,
    table: pa.Table,
    *,
    kernels: str,
    seconds: float = 0.0,
    failures: Iterable[tuple[str, str, str]] = (),
    unread: Iterable[tuple[str, str, str]] = (),
) -> Part:
    """Write a part, its keys file and then its marker.

    From that moment on its contents are never encoded again.
    """
    stamped = stamp_embeddings(check_output(table, contract), shape, kernels)
    path = files.join(directory, f"part-{name}.parquet")
    written = files.write_parquet(path, stamped, row_group_size=ROW_GROUP, durable=True)
    keys = write_keys(path, stamped.drop_columns(["embedding"]), ROW_GROUP)
    part = Part(
        path=path,
        rows=table.num_rows,
        bytes=written.bytes,
        sha256=written.sha256,
        keys_bytes=keys.bytes,
        keys_sha256=keys.sha256,
        failures=tuple(failures),
        unread=tuple(unread),
        kernels=kernels,
        seconds=seconds,
    )
    return _write_marker(part)


def _write_marker(part: Part) -> Part:
    # Durable, and after its part and its keys: what it vouches for is never encoded again.
    files.write_document(
        marker_path(part.path),
        {
            "rows": part.rows,
            "bytes": part.bytes,
            "sha256": part.sha256,
            "keys_bytes": part.keys_bytes,
            "keys_sha256": part.keys_sha256,
            "kernels": part.kernels,
            "seconds": round(part.seconds, 3),
            "failures": part.failures,
            "unread": part.unread,
            "replaces": part.replaces,
            "written_at": clock.utc_stamp(),
        },
        durable=True,
    )
    return part


# --- merging


def plan_merges(parts: Iterable[Part], *, target: int = MERGED_BYTES, leave: int | None = None) -> list[list[Part]]:
    """Choose which parts to merge, smallest first.

    Chosen are none as long as there are at most `leave` small ones.

    `target`: bytes of a merged part, about. `leave`: `SMALL_PARTS` by default. Parts of different
    kernels are never merged, so that a file's embeddings come from the same ones.
    """
    small = [part for part in parts if part.bytes < target // 2]
    if len(small) <= (SMALL_PARTS if leave is None else leave):
        return []
    groups: list[list[Part]] = []
    order = sorted(small, key=lambda part: (part.kernels, part.bytes, part.path))
    for _, alike in itertools.groupby(order, key=lambda part: part.kernels):
        group: list[Part] = []
        for part in alike:
            group.append(part)
            if sum(member.bytes for member in group) >= target:
                groups.append(group)
                group = []
        groups.append(group)
    return [group for group in groups if len(group) > 1]


def merge_parts(directory: str, group: list[Part]) -> Part:
    """Merge several parts into one.

    A row group is in memory at a time. Merging the same ones again finds it done.
    """
    names = [part.name for part in group]
    name = chunk_name("merge", names)
    done = find_part(directory, name)
    if done is not None:
        return done
    # What a merged part replaced must stay replaced when its own marker is gone.
    older = [name for part in group for name in part.replaces]
    if older:
        there = {part.name for part in all_parts(directory)}
        names += [name for name in older if name in there]
    path = files.join(directory, f"part-{name}.parquet")
    for part in group:
        part.check()
    rows: list[pa.Table] = []
    with files.atomic_write(path, durable=True) as sink:
        with files.open_read(group[0].path) as handle:
            schema = pq.ParquetFile(handle).schema_arrow
        # The writer closes only what it opened itself.
        with pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True) as writer:
            for table in _row_groups(group):
                writer.write_table(table, row_group_size=ROW_GROUP)
                rows.append(table.drop_columns(["embedding"]))
    nothing = schema.empty_table().drop_columns(["embedding"])
    keys = write_keys(path, pa.concat_tables([nothing, *rows]), ROW_GROUP)
    return _write_marker(
        Part(
            path=path,
            rows=sum(part.rows for part in group),
            bytes=sink.written.bytes,
            sha256=sink.written.sha256,
            keys_bytes=keys.bytes,
            keys_sha256=keys.sha256,
            failures=tuple(sorted({failure for part in group for failure in part.failures})),
            kernels=group[0].kernels,
            seconds=sum(part.seconds for part in group),
            replaces=tuple(names),
        )
    )


def _row_groups(group: list[Part]) -> Iterator[pa.Table]:
    """Yield the rows of several parts in tables.

    They have `ROW_GROUP` rows, but the last.
    """
    waiting: list[pa.Table] = []
    rows = 0
    for part in group:
        with files.open_read(part.path) as handle:
            source = pq.ParquetFile(handle)
            for number in range(source.num_row_groups):
                waiting.append(source.read_row_group(number))
                rows += waiting[-1].num_rows
                while rows >= ROW_GROUP:
                    whole = pa.concat_tables(waiting)
                    yield whole.slice(0, ROW_GROUP)
                    waiting, rows = [whole.slice(ROW_GROUP)], rows - ROW_GROUP
    if rows:
        yield pa.concat_tables(waiting)


def drop_replaced(
    parts: Iterable[Part],
    listed: Callable[[], set[str]],
    now: datetime.datetime | None = None,
    *,
    unseen: Container[str] = (),
    writer: Writer | None = None,
) -> int:
    """Remove parts that were replaced long enough ago.

    `parts`: all of a generation. That is `READERS_HAVE` ago, and they are not among `listed` (paths
    of runs that are or may be published, which is asked only where it matters). Returned is how
    many.

    Those named in `unseen`, which no published run ever listed, go as soon as they are replaced.

    Markers go last: a removal that was cut off is finished by the next one.

    `writer`: the right to write to the store, which is checked before anything is removed.
    """
    named = {part.name: part for part in parts}
    limit = (now or clock.utc_now()) - READERS_HAVE
    replaced = {
        name
        for part in named.values()
        if part.replaces
        for name in part.replaces
        if name in unseen or datetime.datetime.fromisoformat(part.written_at) <= limit
    }
    old = [part for name, part in named.items() if name in replaced]
    kept = listed() if old else set()
    gone = [files_of_part(part.path) for part in old if part.path not in kept]
    for start in range(0, len(gone), REMOVED_AT_ONCE):
        if writer is not None:
            writer.check()
        some = gone[start : start + REMOVED_AT_ONCE]
        files.delete_any([path for part, keys, _ in some for path in (part, keys)])
        files.delete_any([marker for _, _, marker in some])
    return len(gone)
