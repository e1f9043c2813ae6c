"""Copy embeddings from the store into a run's `contents/`."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from camenn_model.integrity import DamagedError
from pipelines.inputs.items import read_stored
from pipelines.io import cache, files
from pipelines.io.tables import FileRecord
from pipelines.runner.log import stage_logger
from pipelines.runs.manifest import CONTENTS, Manifest, check_records
from pipelines.runs.store import ROW_GROUP, chunk_name
from schemas.embeddings import embedding_shape

CONTENT_FILE_BYTES = 128 * 2**20
"""Most embeddings of a contents file: they are in memory while it is written"""
KEY_BYTES = 36
"""Of a content key in a contents file: 32 hex digits and where they begin"""
FRAME_BYTES = 900
"""Of a contents file beside its rows: Arrow's schema, footer and padding, measured on files of few rows"""


KINDS = ("images", "titles")
_LOG = stage_logger("contents")


@dataclass(frozen=True)
class ContentJob:
    """Rows of some store parts that become one contents file."""

    kind: str
    groups: tuple[tuple[str, tuple[int, ...]], ...]
    """Store parts, by path, and the row groups of each that have the rows"""
    wanted: str
    """Path of an Arrow IPC stream: the content keys to copy from there, ordered.

    A job is serialized into the submitted pipeline, so it holds the file's name, not the keys.
    """


@dataclass(frozen=True)
class ContentPiece:
    """The content and origin of one contents file."""

    groups: tuple[tuple[str, tuple[int, ...]], ...]
    """See `ContentJob`"""
    keys: pa.Table
    """One column, ordered"""
    row_bytes: int
    """Of one embedding"""

    @property
    def bytes(self) -> int:
        """Compute the size of the file, to within its frame."""
        return self.keys.num_rows * (self.row_bytes + KEY_BYTES) + FRAME_BYTES


def plan_contents(
    kind: str, store: Manifest, wanted: pa.ChunkedArray, present: list[str], directory: str
) -> list[ContentJob]:
    """Plan how the embeddings of `wanted` keys are copied.

    Keys that a file of `present` holds already are left out. Each job's keys are written under
    `directory`.
    """
    jobs = []
    for number, piece in enumerate(cut_contents(kind, store, wanted, present)):
        path = files.join(directory, f"{kind}-{number}.arrows")
        with files.atomic_write(path) as handle:
            handle.write(files.ipc_bytes(piece.keys))
        jobs.append(ContentJob(kind, piece.groups, path))
    return jobs


def cut_contents(kind: str, store: Manifest, wanted: pa.ChunkedArray, present: list[str]) -> Iterator[ContentPiece]:
    """Cut the embeddings to copy into contents files.

    Keys that a file of `present` holds already are left out. All pieces together read the store's
    parts once. Pieces cut in order of keys, which are hashes and occur in all parts, would read
    every part once for each contents file.
    """
    key, table = f"{kind[:-1]}_key", f"{kind[:-1]}_embeddings"
    stored = read_stored(store, table, [key])
    keep = pc.is_in(stored[key], pc.drop_null(wanted).unique())
    for path in present:
        keep = pc.and_not(keep, pc.is_in(stored[key], read_keys(path, key)))
    chosen = stored.filter(keep)
    if not chosen.num_rows:
        return
    paths = sorted(store.paths(table))
    with files.open_read(paths[0]) as handle:
        shape = embedding_shape(pq.ParquetFile(handle).schema_arrow)
    row_bytes = 2 * shape[0] * shape[1]
    limit = max(1, CONTENT_FILE_BYTES // row_bytes)
    numbers, groups = chosen["part"].to_numpy(), chosen["group"].to_numpy()
    edges = np.append(np.flatnonzero((np.diff(numbers) != 0) | (np.diff(groups) != 0)) + 1, len(numbers))
    start = 0
    while start < len(numbers):
        # Whole row groups, at least one: none is read by two jobs.
        place = int(np.searchsorted(edges, start + limit, side="right")) - 1
        end = int(edges[place]) if place >= 0 and edges[place] > start else int(edges[place + 1])
        read = {
            paths[number]: tuple(np.unique(groups[start:end][numbers[start:end] == number]).tolist())
            for number in np.unique(numbers[start:end])
        }
        keys = chosen.slice(start, end - start).select([key]).sort_by(key)
        yield ContentPiece(tuple(read.items()), keys, row_bytes)
        start = end


def read_keys(path: str, key: str) -> pa.ChunkedArray:
    """Read the keys of a contents file, no embeddings."""
    with files.open_read(path) as handle:
        names = pa.ipc.open_file(handle).schema.names
        options = pa.ipc.IpcReadOptions(included_fields=[names.index(key)])
        return pa.ipc.open_file(handle, options=options).read_all()[key]


def copy_contents(
    job: ContentJob, directory: str, keep_in: str | None = None, uploads: cache.Uploads | None = None
) -> FileRecord:
    """Copy a job's rows into one Arrow IPC file.

    `keep_in`: output whose copies on this machine get it too, where it lies on an object store.
    `uploads`: of those, which go on meanwhile.

    It is not compressed, so that a reader can map it and gather rows without decoding. Columns: the
    content key, in order, and `embedding` as fixed_size_binary (float16, shape in the field's
    metadata). The file is named by its keys: a job that is done again, by a retried bundle or after
    a crash, writes the same file again.

    Raises:
        RuntimeError: the store's parts no longer hold all planned contents.
    """
    key = f"{job.kind[:-1]}_key"
    with files.open_read(job.wanted) as source:
        wanted = files.ipc_table(source.read())[key].combine_chunks()
    rows: NDArray[np.void] | None = None
    missing = np.ones(len(wanted), dtype=bool)
    field = None
    for batch in _read_batches(job, [key, "embedding"]):
        keys, column = batch[key], batch["embedding"]
        if rows is None:
            field = batch.schema.field("embedding")
            rows = np.empty(len(wanted), dtype=np.dtype((np.void, field.type.byte_width)))
        place = pc.fill_null(pc.index_in(keys, value_set=wanted), -1).to_numpy()
        fresh = np.flatnonzero(place >= 0)
        fresh = fresh[missing[place[fresh]]]
        # Where a retry wrote a key twice the first row stays.
        found, first = np.unique(place[fresh], return_index=True)
        values = np.frombuffer(column.buffers()[1], dtype=rows.dtype)[column.offset : column.offset + len(column)]
        rows[found] = values[fresh[first]]
        missing[found] = False
    if rows is None or field is None or missing.any():
        raise RuntimeError(
            f"{', '.join(path for path, _ in job.groups)}: {missing.sum():,} of "
            f"{len(wanted):,} contents that were there a moment ago are not "
            f"({wanted[int(np.argmax(missing))]} is the first)."
        )
    path = files.join(directory, f"part-{chunk_name(CONTENTS, wanted.to_pylist())}.arrow")
    schema = pa.schema([pa.field(key, pa.string()), pa.field("embedding", field.type, metadata=field.metadata)])
    embeddings = pa.FixedSizeBinaryArray.from_buffers(field.type, len(rows), [None, pa.py_buffer(rows)])
    opened = files.atomic_write(path) if keep_in is None else cache.write_through(keep_in, path, uploads)
    with opened as handle, pa.ipc.new_file(handle, schema) as writer:
        writer.write_batch(pa.record_batch([wanted, embeddings], schema=schema))
    return FileRecord.of(f"contents_{job.kind}", path, len(wanted), handle.written)


def _read_batches(job: ContentJob, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield some columns of a job's row groups in batches.

    A batch has `ROW_GROUP` rows at a time. Of an object, the next row group is downloaded meanwhile.
    """
    for path, groups in job.groups:
        with files.open_read(path) as source:
            # With read-ahead, each reading thread would hold 33 MB until the process ends.
            parquet = pq.ParquetFile(source, pre_buffer=False)
            if files.is_local(path):
                yield from parquet.iter_batches(ROW_GROUP, row_groups=list(groups), columns=columns, use_threads=False)
            else:
                yield from _read_ahead(parquet, groups, columns)


def _read_ahead(parquet: pq.ParquetFile, groups: Sequence[int], columns: list[str]) -> Iterator[pa.RecordBatch]:
    def read(group: int) -> list[pa.RecordBatch]:
        batches: list[pa.RecordBatch] = parquet.read_row_group(group, columns=columns, use_threads=False).to_batches()
        return batches

    with ThreadPoolExecutor(1, thread_name_prefix="contents") as thread:
        waiting = [thread.submit(read, group) for group in groups[:1]]
        for group in [*groups[1:], None]:
            batches = waiting.pop().result()
            if group is not None:
                waiting.append(thread.submit(read, group))
            yield from batches


@dataclass(frozen=True)
class PlacedJob:
    """A job and the directory that its file goes to."""

    directory: str
    job: ContentJob
    keep_in: str | None = None
    """Output whose copies on this machine get it too: what runs here next reads it"""


class CopyContents(beam.DoFn):
    """PlacedJob → FileRecord of the contents file it wrote."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Beam's own has no annotations

    @staticmethod
    def copy(placed: PlacedJob, uploads: cache.Uploads) -> FileRecord:
        """Do one job, here and now, but for its upload."""
        return copy_contents(placed.job, placed.directory, placed.keep_in, uploads)

    def start_bundle(self) -> None:
        self.uploads = cache.Uploads()

    def process(self, placed: PlacedJob) -> Iterator[FileRecord]:
        yield self.copy(placed, self.uploads)

    def finish_bundle(self) -> None:
        # What a bundle emitted counts from here on.
        with self.uploads as uploads:
            uploads.wait()


def contents_jobs(
    store: Manifest, items: pa.Table, latest: Manifest | None, root: str, run_directory: str, *, keep: bool
) -> tuple[list[PlacedJob], list[FileRecord]]:
    """List the jobs that remain to be copied into `contents/`.

    The directory is `root`/contents/KIND/FINGERPRINT/. Returns the jobs and the files of the last
    run that stay in use.

    `keep`: whether the jobs are done on this machine, where their files are read next.

    Contents are only ever added. Those of another encoder lie in another directory and are not
    used.
    """
    jobs: list[PlacedJob] = []
    kept: list[FileRecord] = []
    for kind in KINDS:
        directory = _contents_directory(kind, store, root)
        files.make_directory(directory)
        files.mark_own(directory)
        present = _present(kind, latest, directory)
        kept += present
        jobs += [
            PlacedJob(directory, job, root if keep else None)
            for job in plan_contents(
                kind,
                store,
                items[f"{kind[:-1]}_key"],
                [record.path for record in present],
                files.join(run_directory, "wanted"),
            )
        ]
    return jobs, kept


@dataclass(frozen=True)
class ContentsPlan:
    """The result of `look_at_contents`."""

    pieces: tuple[ContentPiece, ...]
    """To copy from the store"""
    kept: tuple[FileRecord, ...]

    @property
    def bytes(self) -> int:
        """Compute the size of all contents files in use then."""
        return sum(piece.bytes for piece in self.pieces) + sum(record.bytes for record in self.kept)

    @property
    def rows(self) -> int:
        """Count the contents in them."""
        return sum(piece.keys.num_rows for piece in self.pieces) + sum(record.rows for record in self.kept)


def look_at_contents(store: Manifest, items: pa.Table, latest: Manifest | None, root: str) -> ContentsPlan:
    """Find what lies in `contents/` and what is lacking.

    Nothing is written.
    """
    pieces: list[ContentPiece] = []
    kept: list[FileRecord] = []
    for kind in KINDS:
        present = _present(kind, latest, _contents_directory(kind, store, root))
        kept += present
        pieces += cut_contents(kind, store, items[f"{kind[:-1]}_key"], [record.path for record in present])
    return ContentsPlan(tuple(pieces), tuple(kept))


def _contents_directory(kind: str, store: Manifest, root: str) -> str:
    generation = str(store.options["image" if kind == "images" else "text"]["fingerprint"])
    return files.join(root, CONTENTS, kind, generation)


def _present(kind: str, latest: Manifest | None, directory: str) -> list[FileRecord]:
    """List the last run's contents files that stay."""
    return [
        record
        for record in (latest.records(f"contents_{kind}") if latest else [])
        if record.path.startswith(directory) and _is_whole(record)
    ]


def _is_whole(record: FileRecord) -> bool:
    """Return whether a contents file can stay in use.

    Otherwise its contents are copied from the store again.
    """
    try:
        check_records([record], "Its embeddings are copied again from the store.")
    except DamagedError as error:
        _LOG.warning("%s", error)
        return False
    return True
