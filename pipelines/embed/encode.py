"""Encode wanted contents into parts of the store.

Contents that are not stored yet go in chunks through their encoder. Each chunk is committed.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.ml.inference.base import RunInference
from apache_beam.transforms.window import GlobalWindows

from camenn_model.encoders.spec import ImageSpec
from pipelines.embed.handlers import EncodedImages, EncodedTitles, ImageChunk, TitleChunk
from pipelines.embed.options import STAGE, EmbedJob, store_place
from pipelines.io.files import ipc_bytes, ipc_table
from pipelines.io.shuffle import ShuffleByBucket
from pipelines.runner.console import ProgressFile
from pipelines.runs.accounting import Count
from pipelines.runs.store import IMAGES, TITLES, Part, chunk_name, commit_part, find_part, fixed_binary
from schemas.contract import Contract
from schemas.rejects import DEFECTS

KEY_COLUMNS = {IMAGES: "image_key", TITLES: "title_key"}
CHUNK = 256
ENCODED = "photos_encoded"
"""What counts bytes of photo files to encode"""


class ReadKeys(beam.DoFn):
    """A step from a committed part to its content keys.

    It yields a table of the keys, those that could not be encoded included.
    """

    def __init__(self, column: str) -> None:
        self.column = column

    def process(self, part: Part) -> Iterator[pa.Table]:
        keys = pa.chunked_array([[key for key, _, _ in part.failures]], pa.string())
        # Also where nothing is read of it: the run that is published names it.
        part.check()
        if part.rows:
            stored = part.read_keys([self.column])[self.column]
            keys = pa.chunked_array([*stored.chunks, *keys.chunks])
        yield pa.table({self.column: keys})


def pending(kinds: dict[str, pa.Table], column: str) -> pa.Table:
    """Return the wanted contents that are not stored yet.

    There is one row per key, ordered by key.
    """
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
    """A count of a bucket's stored and pending contents.

    The step takes a bucket's wanted and stored contents, and counts how many are stored and how
    many are not. This is what `--plan` asks.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def process(self, element: tuple[int, dict[str, pa.Table]]) -> Iterator[Count]:
        _, kinds = element
        column = KEY_COLUMNS[self.kind]
        wanted = pc.count_distinct(kinds["wanted"][column]).as_py() if "wanted" in kinds else 0
        due = pending(kinds, column)
        yield Count(self.kind, "in", wanted)
        yield Count(self.kind, "stored", wanted - due.num_rows)
        yield Count(self.kind, "due", due.num_rows)
        if self.kind == IMAGES and due.num_rows:
            # Photos in the catalog itself travel with it.
            size = pc.sum(due["size"].filter(pc.is_null(due["bytes"]))).as_py() or 0
            yield Count(ENCODED, "in", size)
            yield Count(ENCODED, "due", size)


@dataclass(frozen=True)
class PackedChunk:
    """A chunk in the form in which it travels.

    It is packed because FnApiRunner holds all chunks at once.
    """

    chunk_id: str
    contents: int
    data: bytes
    """Arrow IPC of its rows"""
    compiled: bool = False

    def unpack(self) -> ImageChunk | TitleChunk:
        """Return the chunk that the encoder takes."""
        rows = ipc_table(self.data).to_pydict()
        if "image_key" in rows:
            return ImageChunk(self.chunk_id, rows["image_key"], rows["path"], rows["bytes"], self.compiled)
        return TitleChunk(self.chunk_id, rows["title_key"], rows["title"])


class CutChunks(beam.DoFn):
    """A step that cuts a bucket's pending contents into chunks.

    It takes a bucket's wanted and stored contents, and yields chunks of at most 256 pending ones. A
    chunk is the unit of work. A kill loses two: one being encoded, one being written.
    """

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


def _report(contract: Contract, part: Part) -> Iterator[beam.pvalue.TaggedOutput[str, Any]]:
    """Yield what a committed part means to the run.

    That is a file of the store, and photos that were gone.
    """
    if part.unread:
        # Not a failure in the store: it says something about this moment, not about the content.
        keys, reasons, details = zip(*part.unread, strict=True)
        yield beam.pvalue.TaggedOutput(
            "unread", pa.table([[STAGE] * len(keys), keys, reasons, details], schema=DEFECTS.schema)
        )
    yield beam.pvalue.TaggedOutput("files", part.record(contract.name))


class SkipCommitted(beam.DoFn):
    """A step that passes over chunks already committed.

    Chunks that an earlier attempt of this run committed are reported. The others go on to the
    encoder.
    """

    def __init__(self, directory: str, contract: Contract) -> None:
        self.directory, self.contract = directory, contract

    def process(self, chunk: PackedChunk) -> Iterator[Any]:
        part = find_part(self.directory, chunk.chunk_id)
        if part is None:
            yield chunk.unpack()
        else:
            yield from _report(self.contract, part)


class CommitChunk(beam.DoFn):
    """A step that writes an encoded chunk as one part.

    The part and its commit marker are written while the encoder goes on with the next chunk.
    """

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

    def _done(self, part: Part) -> Iterator[beam.pvalue.TaggedOutput[str, Any]]:
        self.contents.inc(part.rows)
        self.progress.add(part.rows + len(part.failures))
        self.progress.flush()
        yield from _report(self.contract, part)


class ChooseKernels(beam.DoFn):
    """A step that marks photo chunks for compiled kernels.

    It yields the same chunks. They are marked where the photos of the whole run pay for compiling.
    """

    def __init__(self, spec: ImageSpec) -> None:
        self.spec = spec

    def process(self, chunk: PackedChunk, due: list[int]) -> Iterator[PackedChunk]:
        yield replace(chunk, compiled=self.spec.pays_to_compile(sum(due)))


@dataclass
class EncodeChunks(beam.PTransform[beam.PCollection[Any], Any]):
    """The composite that turns chunks into parts of the store.

    All of it is in one composite: a resource hint makes another environment, and steps of two
    environments are never fused.
    """

    kind: str
    job: EmbedJob

    def expand(self, chunks: beam.PCollection[Any]) -> Any:
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
class EncodeContents(beam.PTransform[beam.PCollection[Any], Any]):
    """The composite that encodes wanted contents of one kind.

    Contents that are stored already are left out. The others go through the encoder into the store.
    A plan only counts them.
    """

    kind: str
    job: EmbedJob

    def expand(self, wanted: beam.PCollection[Any]) -> Any:
        job, column = self.job, KEY_COLUMNS[self.kind]
        stored = (
            wanted.pipeline
            | "ListParts" >> beam.Create(job.stored[self.kind])
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
