"""`camenn embed`: every distinct photo and title of the catalog through its encoder, once.

catalog ──► Clean ──► Resolve (which photo, which title) ──► items/
                          │ wanted keys        ▲ previous items: unchanged photos are not read
                          ▼
              minus committed keys ──► chunks of ≤ 256 ──► RunInference ──► one part + commit marker each

Small parts, of this run and of those before, are merged once all are encoded, by runs that encoded something. `--plan` ends before RunInference: it counts.
"""

import argparse
import errno
import functools
import os
import re
import stat
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from apache_beam.ml.inference.base import RunInference
from apache_beam.transforms.window import GlobalWindows

from camenn_model.encoder_spec import ImageSpec, TextSpec, normalise_title
from camenn_model.hashing import stable_hash
from pipelines import files
from pipelines.catalog import add_origin, drop_duplicates
from pipelines.console import ProgressFile, closing_table, watch
from pipelines.files import ipc_bytes, ipc_table
from pipelines.inference import (
    EncodedImages,
    EncodedTitles,
    ImageChunk,
    MakeHandler,
    TitleChunk,
    chunk_handler,
    content_key,
    measure_pace,
)
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
)
from pipelines.options import (
    add_common_flags,
    add_encoder_flags,
    is_dataflow,
    is_local_run,
    local_workers,
    new_parser,
    open_pipeline,
    parse_with_beam,
    run_main,
    worker_threads,
)
from pipelines.patches import LIMITS, UriDefect, resolve_uri
from pipelines.publication import KEEP, published_manifests
from pipelines.store import (
    IMAGES,
    TITLES,
    Part,
    chunk_name,
    commit_part,
    drop_replaced,
    find_part,
    fixed_binary,
    generation,
    list_parts,
    merge_parts,
    plan_merges,
)
from pipelines.tables import FileRecord, ReadTable, ShuffleByBucket, Slice, Source, WriteTable, drop_nulls
from schemas.catalog import CATALOG
from schemas.contract import Contract, InputError
from schemas.embeddings import EMBEDDED_ITEMS, image_embeddings, title_embeddings
from schemas.rejects import DEFECTS, REJECTS

STAGE = "embed"
KEY_COLUMNS = {IMAGES: "image_key", TITLES: "title_key"}
CHUNK = 256
ROWS_PER_BUCKET = 16_384
ROWS_PER_FILE = 32_768
"""Of the run's own tables: what a worker holds until it writes."""
READ_THREADS = 8

_WANTED_IMAGE = pa.schema([("image_key", pa.string()), ("path", pa.string()), ("bytes", pa.binary())])
_WANTED_TITLE = pa.schema([("title_key", pa.string()), ("title", pa.string())])


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """One embed run, resolved."""

    data: str
    store: str
    image_root: str
    allow_absolute: bool
    image: ImageSpec
    text: TextSpec
    max_reject_rate: float
    accelerator: str | None = None
    """Dataflow's accelerator for the encoder steps; changes no row"""


class CleanRows(beam.DoFn):
    """(Slice, catalog rows) → rows with their origin; rejects and counts beside."""

    def process(self, element: tuple[Slice, pa.Table]) -> Iterator[Any]:
        where, table = element
        kept, rejects = drop_nulls(STAGE, where, add_origin(where, table), CATALOG)
        yield kept
        yield beam.pvalue.TaggedOutput("counts", Count("catalog", "in", table.num_rows))
        if rejects.num_rows:
            yield beam.pvalue.TaggedOutput("rejects", rejects)
            yield beam.pvalue.TaggedOutput("counts", Count("catalog", "rejected", rejects.num_rows))


@dataclass(frozen=True)
class _Photo:
    """What is known of one listing's photo."""

    key: str | None = None
    path: str | None = None
    size: int | None = None
    mtime: float | None = None
    data: bytes | None = None
    defect: str | None = None
    detail: str | None = None


def _stat(path: str) -> tuple[int, float]:
    if files.is_local(path):
        status = os.stat(path)
        if stat.S_ISFIFO(status.st_mode) or stat.S_ISSOCK(status.st_mode):
            # Reading one would wait for a writer, for ever.
            raise OSError(errno.EINVAL, "it is no file")
        return status.st_size, status.st_mtime
    found = files.find([path])
    if not found:
        raise FileNotFoundError(path)
    return found[0].bytes, found[0].written_at


class ResolveItems(beam.DoFn):
    """One bucket of the catalog → its items, and the photos and titles that they want.

    A photo whose (address, size, modification time) is the previous run's is not opened: its key is known.
    """

    def __init__(self, image_root: str, allow_absolute: bool) -> None:
        self.image_root = image_root
        self.allow_absolute = allow_absolute
        self.real_directory: Callable[[str], str] = os.path.realpath
        self.read = beam.metrics.Metrics.counter(STAGE, "photos-read")

    def process(self, element: tuple[int, dict[str, pa.Table]]) -> Iterator[Any]:
        _, kinds = element
        if "catalog" not in kinds:
            return
        rows, rejects, copies = drop_duplicates(STAGE, kinds["catalog"])
        known: dict[str, tuple[str, int, float, str]] = {}
        if "previous" in kinds:
            columns = [
                kinds["previous"][name].to_pylist()
                for name in ("item_id", "image_uri", "image_size", "image_mtime", "image_key")
            ]
            known = {
                item: (uri, size, mtime, key)
                for item, uri, size, mtime, key in zip(*columns, strict=True)
                if key is not None
            }
        items, uris, inline = (rows[name].to_pylist() for name in ("item_id", "image_uri", "image_bytes"))
        # Anew for each bucket: links may be changed between runs of a worker that lives on.
        self.real_directory = functools.lru_cache(4_096)(os.path.realpath)
        with ThreadPoolExecutor(READ_THREADS) as pool:
            photos = list(
                pool.map(
                    lambda row: self._photo(row[1], row[2], known.get(row[0])), zip(items, uris, inline, strict=True)
                )
            )
        titles = [normalise_title(title) for title in rows["title"].to_pylist()]
        title_keys = [content_key(title.encode()) if title else None for title in titles]
        yield pa.table(
            {
                "item_id": items,
                "title_key": title_keys,
                "image_key": [photo.key for photo in photos],
                "image_uri": uris,
                "image_size": [photo.size for photo in photos],
                "image_mtime": [photo.mtime for photo in photos],
                "image_defect": [photo.defect for photo in photos],
                "image_defect_detail": [photo.detail for photo in photos],
            },
            schema=EMBEDDED_ITEMS.schema,
        )
        wanted = {photo.key: photo for photo in photos if photo.key is not None}
        yield beam.pvalue.TaggedOutput(
            "images",
            pa.table(
                {
                    "image_key": list(wanted),
                    "path": [p.path for p in wanted.values()],
                    "bytes": [p.data for p in wanted.values()],
                },
                schema=_WANTED_IMAGE,
            ),
        )
        by_key = {key: title for key, title in zip(title_keys, titles, strict=True) if key is not None}
        yield beam.pvalue.TaggedOutput(
            "titles", pa.table({"title_key": list(by_key), "title": list(by_key.values())}, schema=_WANTED_TITLE)
        )
        if rejects.num_rows:
            yield beam.pvalue.TaggedOutput("rejects", rejects)
        yield beam.pvalue.TaggedOutput("counts", Count("catalog", "out", rows.num_rows))
        yield beam.pvalue.TaggedOutput("counts", Count("catalog", "rejected", rejects.num_rows))
        yield beam.pvalue.TaggedOutput("counts", Count("catalog", "duplicates", copies))

    def _photo(self, uri: str | None, data: bytes | None, known: tuple[str, int, float, str] | None) -> _Photo:
        if data is not None:
            return _Photo(key=content_key(data), data=data, size=len(data), mtime=0.0)
        if uri is None or not uri.strip():
            return _Photo()
        try:
            path = resolve_uri(uri, self.image_root, self.allow_absolute, self.real_directory)
            size, mtime = _stat(path)
            if size > LIMITS.bytes:
                detail = f"column 'image_uri': '{uri}' has {size:,} bytes, more than {LIMITS.bytes:,}. Upload a smaller photo."
                return _Photo(defect="too_many_bytes", detail=detail)
            if known is not None and known[:3] == (uri, size, mtime):
                return _Photo(key=known[3], path=path, size=size, mtime=mtime)
            with files.open_read(path) as handle:
                key = content_key(handle.read())
            self.read.inc()
            return _Photo(key=key, path=path, size=size, mtime=mtime)
        except UriDefect as defect:
            return _Photo(defect=defect.reason, detail=defect.detail)
        except FileNotFoundError:
            detail = f"column 'image_uri': '{uri}' is not a file under {self.image_root}. Upload the photo, or mend the address."
            return _Photo(defect="missing_image", detail=detail)
        except OSError as error:
            detail = f"column 'image_uri': '{uri}' cannot be read ({error.strerror or error}). Mend its permissions, or upload it again."
            return _Photo(defect="unreadable_image", detail=detail)


class ReadKeys(beam.DoFn):
    """A committed part → the table of its content keys, those that could not be encoded included."""

    def __init__(self, column: str) -> None:
        self.column = column

    def process(self, part: Part) -> Iterator[pa.Table]:
        keys = pa.chunked_array([[key for key, _, _ in part.failures]], pa.string())
        if part.rows:
            with files.open_read(part.path) as handle:
                stored = pq.read_table(handle, columns=[self.column])[self.column]
            keys = pa.chunked_array([*stored.chunks, *keys.chunks])
        yield pa.table({self.column: keys})


def pending(kinds: dict[str, pa.Table], column: str) -> pa.Table:
    """Of the wanted contents, one row per key that is not stored yet, ordered by key."""
    if "wanted" not in kinds:
        return pa.table({})
    wanted = kinds["wanted"].sort_by(column)
    keys = np.asarray(wanted[column].to_pylist(), dtype=object)
    keep = np.ones(len(keys), dtype=bool)
    keep[1:] = keys[1:] != keys[:-1]
    if "stored" in kinds:
        stored = set(kinds["stored"][column].to_pylist())
        keep &= np.fromiter((key not in stored for key in keys), bool, len(keys))
    return wanted.filter(pa.array(keep))


class CountPending(beam.DoFn):
    """A bucket's wanted and stored contents → how many are stored, and how many are not: what `--plan` asks."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def process(self, element: tuple[int, dict[str, pa.Table]]) -> Iterator[Count]:
        _, kinds = element
        column = KEY_COLUMNS[self.kind]
        wanted = pc.count_distinct(kinds["wanted"][column]).as_py() if "wanted" in kinds else 0
        due = pending(kinds, column).num_rows
        yield Count(self.kind, "in", wanted)
        yield Count(self.kind, "stored", wanted - due)
        yield Count(self.kind, "due", due)


@dataclass(frozen=True)
class PackedChunk:
    """A chunk as it travels: FnApiRunner holds all of them at once."""

    chunk_id: str
    contents: int
    data: bytes
    """Arrow IPC of its rows"""
    compiled: bool = False

    def unpack(self) -> ImageChunk | TitleChunk:
        """The chunk that the encoder takes."""
        rows = ipc_table(self.data).to_pydict()
        if "image_key" in rows:
            return ImageChunk(self.chunk_id, rows["image_key"], rows["path"], rows["bytes"], self.compiled)
        return TitleChunk(self.chunk_id, rows["title_key"], rows["title"])


class CutChunks(beam.DoFn):
    """A bucket's wanted and stored contents → chunks of at most 256 pending ones: the unit of work. A kill loses two, one being encoded, one being written."""

    def __init__(self, kind: str, run: str, progress: str | None) -> None:
        self.kind = kind
        self.run = run
        self.progress_directory = progress

    def setup(self) -> None:
        self.progress = ProgressFile(self.progress_directory)

    def process(self, element: tuple[int, dict[str, pa.Table]]) -> Iterator[PackedChunk]:
        _, kinds = element
        table = pending(kinds, KEY_COLUMNS[self.kind])
        self.progress.add(0, expected=table.num_rows)
        self.progress.flush()
        for start in range(0, table.num_rows, CHUNK):
            piece = table.slice(start, CHUNK)
            name = chunk_name(self.run, piece[KEY_COLUMNS[self.kind]].to_pylist())
            yield PackedChunk(name, piece.num_rows, ipc_bytes(piece, "zstd"))


def _report(contract: Contract, part: Part) -> Iterator[beam.pvalue.TaggedOutput]:
    """What a committed part is to the run: a file of the store, and photos that were gone."""
    if part.unread:
        # Not a failure in the store: it says something about this moment, not about the content.
        keys, reasons, details = zip(*part.unread, strict=True)
        yield beam.pvalue.TaggedOutput(
            "unread", pa.table([[STAGE] * len(keys), keys, reasons, details], schema=DEFECTS.schema)
        )
    yield beam.pvalue.TaggedOutput("files", FileRecord(contract.name, part.path, part.rows, part.bytes))


class SkipCommitted(beam.DoFn):
    """Chunks that an earlier attempt of this run committed are reported; the others go on to the encoder."""

    def __init__(self, directory: str, contract: Contract) -> None:
        self.directory, self.contract = directory, contract

    def process(self, chunk: PackedChunk) -> Iterator[Any]:
        part = find_part(self.directory, chunk.chunk_id)
        if part is None:
            yield chunk.unpack()
        else:
            yield from _report(self.contract, part)


class CommitChunk(beam.DoFn):
    """An encoded chunk → one part and its commit marker, written while the encoder goes on with the next chunk."""

    def __init__(
        self, kind: str, directory: str, contract: Contract, shape: tuple[int, int], progress: str | None
    ) -> None:
        self.kind, self.directory, self.contract, self.shape = kind, directory, contract, shape
        self.progress_directory = progress
        self.contents = beam.metrics.Metrics.counter(STAGE, f"{kind}-encoded")

    def setup(self) -> None:
        self.progress = ProgressFile(self.progress_directory)
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="commit")

    def start_bundle(self) -> None:
        self.writing: deque[Future[Part]] = deque()

    def process(self, encoded: Any) -> Iterator[Any]:
        self.writing.append(self.writer.submit(self._commit, encoded))
        # One chunk is in memory while it is written, and no more than one.
        while len(self.writing) > 1:
            yield from self._done(self.writing.popleft().result())

    def finish_bundle(self) -> Iterator[Any]:
        while self.writing:
            for output in self._done(self.writing.popleft().result()):
                yield beam.pvalue.TaggedOutput(output.tag, GlobalWindows.windowed_value(output.value))

    def teardown(self) -> None:
        self.writer.shutdown()

    def _commit(self, encoded: EncodedImages | EncodedTitles) -> Part:
        if isinstance(encoded, EncodedImages):
            columns = {
                "image_key": encoded.keys,
                "embedding": fixed_binary(encoded.embeddings),
                "blur": encoded.blur,
                "luminance": encoded.luminance,
                "width": encoded.width,
                "height": encoded.height,
            }
        else:
            columns = {
                "title_key": encoded.keys,
                "embedding": fixed_binary(encoded.states),
                "tokens": encoded.lengths,
                "unknown_share": encoded.unknown_share,
            }
        return commit_part(
            self.directory,
            self.contract,
            self.shape,
            encoded.chunk_id,
            pa.table(columns, schema=self.contract.schema),
            kernels=encoded.kernels,
            seconds=encoded.seconds,
            failures=encoded.defects,
            unread=encoded.unread,
        )

    def _done(self, part: Part) -> Iterator[beam.pvalue.TaggedOutput]:
        self.contents.inc(part.rows)
        self.progress.add(part.rows + len(part.failures))
        self.progress.flush()
        yield from _report(self.contract, part)


class ChooseKernels(beam.DoFn):
    """Photo chunks → the same, marked for compiled kernels where the photos of the whole run pay for compiling."""

    def __init__(self, spec: ImageSpec) -> None:
        self.spec = spec

    def process(self, chunk: PackedChunk, due: list[int]) -> Iterator[PackedChunk]:
        yield replace(chunk, compiled=self.spec.pays_to_compile(sum(due)))


class MergeParts(beam.DoFn):
    """A directory and some of its small parts → one part with their contents, in the store."""

    def process(self, element: tuple[str, list[Part]]) -> None:
        directory, group = element
        merge_parts(directory, group)


@dataclass(frozen=True, kw_only=True)
class EmbedJob:
    """One job of the stage. `plan`: it ends where encoding would begin."""

    options: EmbedOptions
    source: Source
    previous: Source | None
    run_directory: str
    progress: str | None
    threads: int | None
    make_handler: MakeHandler = chunk_handler
    plan: bool = False

    @property
    def run(self) -> str:
        """Name of the run."""
        return self.run_directory.rsplit("/", 1)[-1]

    @property
    def buckets(self) -> int:
        """Buckets that contents and listings are shuffled into."""
        return max(1, -(-self.source.rows // ROWS_PER_BUCKET))

    def spec(self, kind: str) -> ImageSpec | TextSpec:
        """The encoder of one kind."""
        return self.options.image if kind == IMAGES else self.options.text


@dataclass
class EncodeChunks(beam.PTransform):
    """Chunks → parts of the store, all of it in one composite: a resource hint makes another environment, and steps of two are never fused."""

    kind: str
    job: EmbedJob

    def expand(self, chunks: beam.PCollection) -> Any:
        job, spec = self.job, self.job.spec(self.kind)
        directory, contract = store_place(job.options, self.kind)
        skip = SkipCommitted(directory, contract)
        commit = CommitChunk(self.kind, directory, contract, spec.shape, job.progress)
        due = chunks | "SkipCommitted" >> beam.ParDo(skip).with_outputs("files", "unread", main="chunks")
        encoded = (
            due.chunks
            | "Encode" >> RunInference(job.make_handler(spec, job.threads))
            | "Commit" >> beam.ParDo(commit).with_outputs("files", "unread")
        )
        return {
            "skipped_files": due.files,
            "skipped_unread": due.unread,
            "files": encoded.files,
            "unread": encoded.unread,
        }


@dataclass
class EncodeContents(beam.PTransform):
    """Wanted contents of one kind, minus the stored ones, through the encoder into the store; a plan counts them."""

    kind: str
    job: EmbedJob

    def expand(self, wanted: beam.PCollection) -> Any:
        job, column = self.job, KEY_COLUMNS[self.kind]
        stored = (
            wanted.pipeline
            | "ListParts" >> beam.Create(list_parts(store_place(job.options, self.kind)[0]))
            | "SpreadParts" >> beam.Reshuffle()
            | "ReadKeys" >> beam.ParDo(ReadKeys(column))
        )
        by_key = {"wanted": wanted, "stored": stored} | "ByKey" >> ShuffleByBucket(
            {"wanted": column, "stored": column}, job.buckets, "zstd"
        )
        if job.plan:
            return {"counts": by_key | "CountPending" >> beam.ParDo(CountPending(self.kind))}
        cut = by_key | "CutChunks" >> beam.ParDo(CutChunks(self.kind, job.run, job.progress))
        chunks = cut | "SpreadChunks" >> beam.Reshuffle()
        if self.kind == IMAGES and job.options.image.compile == "auto":
            due = cut | "CountPhotos" >> beam.Map(lambda chunk: chunk.contents)
            chunks = chunks | "ChooseKernels" >> beam.ParDo(ChooseKernels(job.options.image), beam.pvalue.AsList(due))
        encode = EncodeChunks(self.kind, job)
        if job.options.accelerator:
            encode.with_resource_hints(accelerator=job.options.accelerator)
        encoded = chunks | "EncodeChunks" >> encode
        return {
            "files": [encoded["skipped_files"], encoded["files"]] | "MergeFiles" >> beam.Flatten(),
            "unread": [encoded["skipped_unread"], encoded["unread"]] | "MergeUnread" >> beam.Flatten(),
        }


@dataclass
class EmbedCatalog(beam.PTransform):
    """The whole stage: catalog in, store parts and the run's tables out; yields what `FinishRun` wants."""

    job: EmbedJob

    def expand(self, pipeline: beam.Pipeline) -> Any:
        job, options = self.job, self.job.options
        clean = (
            pipeline
            | "ReadCatalog" >> ReadTable(job.source)
            | "Clean" >> beam.ParDo(CleanRows()).with_outputs("rejects", "counts", main="rows")
        )
        if job.previous is None:
            previous = pipeline | "NoPreviousItems" >> beam.Create([])
        else:
            previous = pipeline | "ReadPrevious" >> ReadTable(job.previous) | "DropSlice" >> beam.Values()
        resolved = (
            {"catalog": clean.rows, "previous": previous}
            | "ByItem" >> ShuffleByBucket({"catalog": "item_id", "previous": "item_id"}, job.buckets, "zstd")
            | "Resolve"
            >> beam.ParDo(ResolveItems(options.image_root, options.allow_absolute)).with_outputs(
                "images", "titles", "rejects", "counts", main="items"
            )
        )
        images = resolved.images | "EncodeImages" >> EncodeContents(IMAGES, job)
        titles = resolved.titles | "EncodeTitles" >> EncodeContents(TITLES, job)
        counts = [clean.counts, resolved.counts]
        if job.plan:
            counts += [images["counts"], titles["counts"]]
            written = pipeline | "NoFiles" >> beam.Create([])
        else:
            rejects = [clean.rejects, resolved.rejects] | "MergeRejects" >> beam.Flatten()
            tables = [
                (resolved.items, "Items", EMBEDDED_ITEMS),
                (rejects, "Rejects", REJECTS),
                (images["unread"], "Unread", DEFECTS),
            ]
            written = [
                *(
                    rows
                    | f"Write{name}" >> WriteTable(contract, files.join(job.run_directory, name.lower()), ROWS_PER_FILE)
                    for rows, name, contract in tables
                ),
                images["files"],
                titles["files"],
            ] | "MergeFiles" >> beam.Flatten()
        return {"files": written, "counts": counts | "MergeCounts" >> beam.Flatten()}


def store_place(options: EmbedOptions, kind: str) -> tuple[str, Contract]:
    """Directory and contract of one kind's generation in the store."""
    spec = options.image if kind == IMAGES else options.text
    contract = image_embeddings(*spec.shape) if kind == IMAGES else title_embeddings(*spec.shape)
    return generation(options.store, kind, spec.fingerprint), contract


def _read_items(item_files: list[str], columns: list[str]) -> Iterator[pa.Table]:
    """The run's items, a row group at a time: all of them at once would grow with the catalog."""
    for path in item_files:
        with files.open_read(path) as handle:
            source = pq.ParquetFile(handle)
            for group in range(source.num_row_groups):
                yield source.read_row_group(group, columns=columns)


def failed_photos(parts: list[Part], unread_files: list[str]) -> dict[str, tuple[str, str]]:
    """{content key: (reason, detail)} of photos that could not be decoded, or not be read tonight."""
    failures = {key: (reason, detail) for part in parts for key, reason, detail in part.failures}
    for path in unread_files:
        with files.open_read(path) as handle:
            for row in pq.read_table(handle).to_pylist():
                failures[row["key"]] = (row["reason"], row["detail"])
    return failures


def write_defects(run_directory: str, item_files: list[str], failures: dict[str, tuple[str, str]]) -> list[FileRecord]:
    """Listings whose photo is missing, unreadable or undecodable, as the run's `defects` table: one file, ordered by key."""
    failed = pa.array(list(failures), pa.string())
    keys: list[str] = []
    reasons: list[str] = []
    details: list[str] = []
    for table in _read_items(item_files, ["item_id", "image_uri", "image_key", "image_defect", "image_defect_detail"]):
        bad = pc.or_(pc.is_valid(table["image_defect"]), pc.is_in(table["image_key"], failed))
        rows = (column.to_pylist() for column in table.filter(bad).columns)
        for item, uri, key, defect, detail in zip(*rows, strict=True):
            if key in failures:
                defect, detail = failures[key]
                detail = f"column 'image_uri': '{uri}': {detail}" if uri else f"column 'image_bytes': {detail}"
            keys.append(f"catalog:{item}")
            reasons.append(defect)
            details.append(f"item_id '{item}': {detail}")
    if not keys:
        return []
    defects = pa.table(
        {"stage": [STAGE] * len(keys), "key": keys, "reason": reasons, "detail": details}, schema=DEFECTS.schema
    ).sort_by("key")
    path = files.join(run_directory, "defects", "part-0.parquet")
    return [FileRecord("defects", path, defects.num_rows, files.write_parquet(path, defects))]


def content_request(options: EmbedOptions, item_files: list[str], failures: Iterable[str]) -> str:
    """What a reader of the store gets, as 16 hex digits: each listing's contents, the encoders, and which photos have no embedding (content keys).

    Listings come in any order, so their hashes are added up.
    """
    sums = [0, 0]
    for table in _read_items(item_files, ["item_id", "title_key", "image_key"]):
        columns = [pc.fill_null(column, "") for column in table.columns]
        for place, salt in enumerate("ab"):
            rows = pc.binary_join_element_wise(pa.scalar(salt), *columns, "\t")
            sums[place] = (sums[place] + int(stable_hash(rows).sum())) % 2**64
    fingerprints = {"image": options.image.fingerprint, "text": options.text.fingerprint}
    digest = "".join(f"{value:016x}" for value in sums)
    return request_fingerprint({"items": digest, **fingerprints}, {"failed": sorted(failures)})


def describe_options(options: EmbedOptions) -> dict[str, Any]:
    """The options for the manifest; the encoders with the fingerprints of their generations."""
    record = asdict(options)
    for name, spec in (("image", options.image), ("text", options.text)):
        record[name] |= {"fingerprint": spec.fingerprint, "description": spec.describe()}
    return record


def _items_of(latest: Manifest | None) -> Source | None:
    """Items of the published run, if there are any."""
    paths = latest.paths("items") if latest else []
    if not latest or not paths:
        return None
    return Source(contract=EMBEDDED_ITEMS, files=tuple(paths), rows=latest.rows("items"), fingerprint="")


def _run_job(job: EmbedJob, beam_flags: list[str]) -> tuple[list[FileRecord], dict[str, dict[str, int]]]:
    """Run the pipeline to its end; returns the files and counts that it emitted."""
    with open_pipeline(beam_flags) as pipeline:
        pipeline | "Embed" >> EmbedCatalog(job) | "Finish" >> FinishRun(job.run_directory)
    records, counts = read_finished(job.run_directory)
    check_accounting(counts)
    return records, counts


def _merge_small(options: EmbedOptions, parts: dict[str, list[Part]], beam_flags: list[str]) -> dict[str, list[Part]]:
    """Merge small parts where there are many, as a job of its own: what is encoded tonight is whole before, and is merged tonight too. Returns the parts after it."""
    groups = [(store_place(options, kind)[0], group) for kind, found in parts.items() for group in plan_merges(found)]
    if not groups:
        return parts
    with open_pipeline(beam_flags) as pipeline:
        pipeline | "PlanMerges" >> beam.Create(groups) | beam.Reshuffle() | "MergeParts" >> beam.ParDo(MergeParts())
    return _list_parts(options)


def _list_parts(options: EmbedOptions) -> dict[str, list[Part]]:
    """Committed parts of both kinds' generations."""
    return {kind: list_parts(store_place(options, kind)[0]) for kind in (IMAGES, TITLES)}


def run(options: EmbedOptions, beam_flags: list[str], make_handler: MakeHandler = chunk_handler) -> dict[str, Any]:
    """Run the stage and publish; returns the closing table."""
    started = time.monotonic()
    source = Source.find(options.data, CATALOG)
    with files.single_writer(options.store):
        latest = read_latest(options.store)
        before = {kind: {part.path for part in found} for kind, found in _list_parts(options).items()}
        run_name, run_directory = new_run(options.store)
        with watch("embed", None, "contents", is_local_run(beam_flags)) as progress:
            job = EmbedJob(
                options=options,
                source=source,
                previous=_items_of(latest),
                run_directory=run_directory,
                progress=progress,
                threads=worker_threads(beam_flags),
                make_handler=make_handler,
            )
            records, counts = _run_job(job, beam_flags)
        check_reject_rate(counts, options.max_reject_rate, read_rejects(records))
        parts = _list_parts(options)
        new = {kind: [part for part in found if part.path not in before[kind]] for kind, found in parts.items()}
        if any(new.values()):
            # A run that encoded nothing does next to nothing.
            parts = _merge_small(options, parts, beam_flags)
        run_records = [record for record in records if record.table in ("items", "rejects")]
        item_files, unread_files = (
            [record.path for record in records if record.table == table] for table in ("items", "defects")
        )
        failures = failed_photos(parts[IMAGES], unread_files)
        defects = write_defects(run_directory, item_files, failures)
        manifest = Manifest(
            stage=STAGE,
            run=run_name,
            request=content_request(options, item_files, failures),
            inputs={"catalog": source.fingerprint},
            options=describe_options(options),
            counts=counts,
        )
        contracts = {
            c.name: c.fingerprint()
            for c in (
                EMBEDDED_ITEMS,
                REJECTS,
                DEFECTS,
                store_place(options, IMAGES)[1],
                store_place(options, TITLES)[1],
            )
        }
        stored = [
            FileRecord(f"{kind[:-1]}_embeddings", part.path, part.rows, part.bytes)
            for kind, found in parts.items()
            for part in found
        ]
        add_files(manifest, contracts, [*run_records, *defects, *stored])
        seconds = time.monotonic() - started
        manifest.seconds = seconds
        catalog = counts["catalog"]
        manifest.summary = {
            "rows_in": catalog["in"],
            "rows_out": catalog.get("out", 0),
            "rejected": catalog.get("rejected", 0),
            "duplicates": catalog.get("duplicates", 0),
            "defects": sum(record.rows for record in defects),
            "encoded_images": sum(part.rows for part in new[IMAGES]),
            "encoded_titles": sum(part.rows for part in new[TITLES]),
            "images_in_store": sum(part.rows for part in parts[IMAGES]),
            "titles_in_store": sum(part.rows for part in parts[TITLES]),
            "image_weights": options.image.describe(),
            "text_encoder": options.text.describe(),
            "kernels": ", ".join(sorted({part.kernels for found in new.values() for part in found})) or None,
            "seconds": round(seconds, 1),
            "rows_per_second": round(catalog["in"] / seconds, 1),
            "run": run_name,
            "out": options.store,
        }
        publish(options.store, manifest)
        # What was published may be published again, as far back as `camenn gc` keeps it.
        listed = {
            path
            for manifest in published_manifests(options.store, KEEP)
            for name in ("image_embeddings", "title_embeddings")
            for path in manifest.paths(name)
        }
        for kind in (IMAGES, TITLES):
            # Parts that were written and merged tonight were never listed.
            drop_replaced(store_place(options, kind)[0], listed, unseen={part.name for part in new[kind]})
    return manifest.summary


def plan(options: EmbedOptions, beam_flags: list[str]) -> dict[str, Any]:
    """What `run` would have to do; returns the closing table. Photos that are new or changed are read, nothing is encoded or published."""
    started = time.monotonic()
    threads = worker_threads(beam_flags)
    _, run_directory = new_run(options.store)
    try:
        job = EmbedJob(
            options=options,
            source=Source.find(options.data, CATALOG),
            previous=_items_of(read_latest(options.store)),
            run_directory=run_directory,
            progress=None,
            threads=threads,
            plan=True,
        )
        _, counts = _run_job(job, beam_flags)
    finally:
        files.delete_directory(run_directory)
    due = {kind: counts.get(kind, {}).get("due", 0) for kind in (IMAGES, TITLES)}
    summary: dict[str, Any] = {"rows_in": counts["catalog"]["in"], "rejected": counts["catalog"].get("rejected", 0)}
    encode_seconds: float | None = 0.0
    sources = []
    for kind, rows in due.items():
        summary[f"distinct_{kind}"] = counts.get(kind, {}).get("in", 0)
        summary[f"{kind}_to_encode"] = rows
        if not rows:
            continue
        pace, source = _stored_pace(options, kind), f"{kind}: earlier runs"
        if pace is None and is_local_run(beam_flags):
            pace, source = measure_pace(job.spec(kind), threads), f"{kind}: a batch encoded just now"
        if pace is None:
            # On other machines, and no run tells how fast they are.
            encode_seconds, source = None, f"{kind}: nothing yet"
        elif encode_seconds is not None:
            encode_seconds += rows * pace / local_workers(beam_flags)
        sources.append(source)
    return summary | {
        # Three digits, not tenths: a fast machine's small run is no run of 0 seconds.
        "encode_seconds": None if encode_seconds is None else float(f"{encode_seconds:.3g}"),
        "estimated_from": "; ".join(sources) or None,
        "seconds": round(time.monotonic() - started, 1),
        "out": options.store,
    }


def _stored_pace(options: EmbedOptions, kind: str) -> float | None:
    """Seconds that one worker took for one content of this generation; None = none was encoded."""
    parts = [part for part in list_parts(store_place(options, kind)[0]) if part.seconds]
    contents = sum(part.rows + len(part.failures) for part in parts)
    return sum(part.seconds for part in parts) / contents if contents else None


def build_parser() -> argparse.ArgumentParser:
    """The flags of `camenn embed`."""
    parser = new_parser(
        STAGE, "Encode every distinct photo (InceptionV4 on grid patches) and title (BERT) of the catalog, once."
    )
    parser.add_argument("--data", required=True, help="data directory with the table `catalog`")
    parser.add_argument("--store", required=True, help="embedding store; made if it is not there")
    parser.add_argument("--image_root", help="directory that image_uri is relative to (default: --data)")
    parser.add_argument(
        "--allow_absolute", action="store_true", help="let image_uri be an absolute path, or leave --image_root"
    )
    add_encoder_flags(parser)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto (default %(default)s)")
    parser.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "fp32", "bf16"),
        help="of both encoders; auto = bf16 where the device has it (default %(default)s)",
    )
    parser.add_argument(
        "--compile",
        default="auto",
        choices=("auto", "on", "off"),
        help="compile InceptionV4 for this processor: other kernels, so other last bits; auto = where a run has photos enough to pay for compiling (default %(default)s)",
    )
    parser.add_argument(
        "--plan", action="store_true", help="print what a run would encode and how long that takes, and encode nothing"
    )
    parser.add_argument(
        "--accelerator",
        help="GPU of the workers that encode, on Dataflow only, as in type:nvidia-l4;count:1;install-nvidia-driver (default: none)",
    )
    add_common_flags(parser)
    return parser


def check_workers(device: str, precision: str, accelerator: str | None, dataflow: bool) -> None:
    """Hold the flags about the encoders' machines against each other.

    Raises:
        InputError: on Dataflow, where the submitting machine encodes nothing, the workers' device must be named; elsewhere there is no accelerator to ask for.
    """
    if dataflow and "auto" in (device, precision):
        raise InputError(
            f"--device {device} --precision {precision}: 'auto' looks at this machine, but Dataflow's workers are others. "
            "Name both: --device cuda --precision bf16, or --device cpu --precision fp32."
        )
    if accelerator is None:
        return
    if not dataflow:
        raise InputError(
            f"--accelerator {accelerator}: only DataflowRunner gives GPUs to a step, and elsewhere the hint would only end fusion. Leave it out; --device cuda asks for a GPU."
        )
    if not re.fullmatch(r"type:[^;]+;count:\d+(;[^;]+)*", accelerator):
        raise InputError(
            f"--accelerator {accelerator}: not an accelerator. Write it as 'type:nvidia-l4;count:1;install-nvidia-driver', in quotes."
        )
    if device == "cpu":
        raise InputError(
            f"--accelerator {accelerator}: with --device cpu its GPUs would be paid for and not used. Give --device cuda."
        )


def main(argv: list[str] | None = None) -> int:
    """Parse, resolve the encoders once, run, print."""
    arguments, beam_flags = parse_with_beam(build_parser(), argv)
    check_workers(arguments.device, arguments.precision, arguments.accelerator, is_dataflow(beam_flags))
    image = ImageSpec.resolve(
        arguments.image_weights,
        grid=arguments.grid,
        patch_size=arguments.patch_size,
        device=arguments.device,
        precision=arguments.precision,
        compile=arguments.compile,
    )
    text = TextSpec.resolve(
        arguments.text_encoder,
        max_tokens=arguments.max_tokens,
        device=arguments.device,
        precision=arguments.precision,
    )
    options = EmbedOptions(
        data=files.absolute(arguments.data),
        store=files.absolute(arguments.store),
        image_root=files.absolute(arguments.image_root or arguments.data),
        allow_absolute=arguments.allow_absolute,
        image=image,
        text=text,
        max_reject_rate=arguments.max_reject_rate,
        accelerator=arguments.accelerator,
    )
    closing_table(STAGE, (plan if arguments.plan else run)(options, beam_flags), as_json=arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
