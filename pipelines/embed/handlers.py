"""RunInference handlers for the two encoders.

The element is a chunk of at most 256 contents: decoded, encoded, pixels dropped at once.

torch, timm and transformers are imported where a worker loads a model.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from apache_beam.metrics import Metrics
from apache_beam.ml.inference.base import ModelHandler

from camenn_model.encoders.protocol import ImageEncoder, TextEncoder, open_image_encoder, open_text_encoder
from camenn_model.encoders.spec import ImageSpec, TextSpec
from camenn_model.hashing import content_key
from pipelines.inputs.photo_files import FileDefect, read_photo
from pipelines.inputs.photos import ImageDefect, ImageQuality, decode_image, grid_patches, image_quality
from schemas.reasons import Reason

Encoder = TypeVar("Encoder")
IMAGE_METRICS, TITLE_METRICS = "embed-images", "embed-titles"
"""Metrics namespaces of RunInference and of the counters below."""
_READ_THREADS = 4
"""Photos read and decoded at a time beside the encoder. Pillow and file reads let other threads run."""


@dataclass(frozen=True)
class ImageChunk:
    """A chunk of distinct photos to encode.

    `keys` are their `content_key`s. `uris` are paths to open. `bytes` is the photo itself, where
    the catalog has it inline. `compiled` says that they are encoded by the compiled kernels.
    """

    chunk_id: str
    keys: list[str]
    uris: list[str | None]
    bytes: list[bytes | None]
    compiled: bool = False


@dataclass(frozen=True)
class EncodedImages:
    """A chunk's photos, encoded.

    The arrays have one row per key. They are in memory only.
    """

    chunk_id: str
    keys: list[str]
    embeddings: np.ndarray
    """float16 [n, P, d], d the width of the encoder"""
    blur: np.ndarray
    """float32 [n]"""
    luminance: np.ndarray
    """float32 [n], 0 to 1"""
    width: np.ndarray
    """int32 [n], px"""
    height: np.ndarray
    """int32 [n], px"""
    kernels: str
    """What computed them: `ImageSpec.kernels`"""
    seconds: float
    """Reading, decoding and encoding"""
    defects: list[tuple[str, str, str]] = field(default_factory=list)
    """(key, reason, detail) of contents that no run will ever decode"""
    unread: list[tuple[str, str, str]] = field(default_factory=list)
    """(key, reason, detail) of contents that were not there any more: says nothing about the content, so it is not to
    be remembered"""


@dataclass(frozen=True)
class TitleChunk:
    """Distinct titles to encode, normalised and not empty."""

    chunk_id: str
    keys: list[str]
    titles: list[str]


@dataclass(frozen=True)
class EncodedTitles:
    """A chunk's titles, encoded.

    The arrays have one row per key. They are in memory only.
    """

    chunk_id: str
    keys: list[str]
    states: np.ndarray
    """float16 [n, T, d]"""
    lengths: np.ndarray
    """int32 [n]"""
    unknown_share: np.ndarray
    """float32 [n], 0 to 1"""
    kernels: str
    """What computed them: `TextSpec.kernels`"""
    seconds: float
    """Tokenising and encoding"""
    defects: list[tuple[str, str, str]] = field(default_factory=list)
    """None: every title has tokens"""
    unread: list[tuple[str, str, str]] = field(default_factory=list)
    """None: titles travel in the chunk"""


class _Photo(NamedTuple):
    key: str
    patches: np.ndarray
    quality: ImageQuality


class _Unread(Exception):
    """A photo that is no longer what was hashed."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class OnDemand(Generic[Encoder]):
    """An encoder that is loaded when the first chunk comes.

    A night on which nothing changed needs none.

    Args:
        load: raises WeightsError or DeviceError where this worker cannot honour the spec.
    """

    def __init__(self, load: Callable[[], Encoder]) -> None:
        self._load, self._lock = load, threading.Lock()
        self._encoder: Encoder | None = None

    def get(self) -> Encoder:
        """Return the encoder, loading it at the first call.

        It is loaded once, whichever thread asks first.
        """
        with self._lock:
            if self._encoder is None:
                self._encoder = self._load()
            return self._encoder


class ImageChunkHandler(ModelHandler[ImageChunk, EncodedImages, "OnDemand[ImageEncoder]"]):
    """A handler from photos to patch features.

    A photo that cannot be decoded is a defect. The rest of its chunk goes on.
    """

    def __init__(self, spec: ImageSpec, *, torch_threads: int | None = None) -> None:
        """Keep the spec and the number of torch threads.

        `torch_threads` is per worker process. None leaves torch's default, one for each core.
        """
        # A GPU would be idle while the first photos of each chunk are decoded.
        super().__init__(min_batch_size=1, max_batch_size=1 if spec.device == "cpu" else 4)
        self._spec = spec
        self._torch_threads = torch_threads

    def load_model(self) -> OnDemand[ImageEncoder]:
        """Return the encoder, which is not loaded yet."""
        return OnDemand(self._load)

    def _load(self) -> ImageEncoder:
        _set_threads(self._torch_threads)
        return open_image_encoder(self._spec)

    def run_inference(
        self, batch: Sequence[ImageChunk], model: OnDemand[ImageEncoder], inference_args: dict[str, Any] | None = None
    ) -> Iterable[EncodedImages]:
        """Encode each chunk.

        Photos are read and decoded on threads while the encoder computes.
        """
        return encode_images(batch, model.get())

    def get_num_bytes(self, batch: Sequence[ImageChunk]) -> int:
        """Return the bytes of keys, paths and inline photos.

        The default would pickle them.
        """
        return sum(
            len(text or "") for chunk in batch for texts in (chunk.keys, chunk.uris, chunk.bytes) for text in texts
        )

    def get_metrics_namespace(self) -> str:
        """Return the namespace of RunInference's own metrics."""
        return IMAGE_METRICS

    def share_model_across_processes(self) -> bool:
        """Return whether processes share a model: they do not.

        There is one model for each process, because sharing would send every batch through a proxy.
        """
        return False


class TitleChunkHandler(ModelHandler[TitleChunk, EncodedTitles, "OnDemand[TextEncoder]"]):
    """A handler from titles to token states."""

    def __init__(self, spec: TextSpec, *, torch_threads: int | None = None) -> None:
        """Keep the spec and the number of torch threads.

        `torch_threads` is per worker process. None leaves torch's default, one for each core.
        """
        super().__init__(min_batch_size=1, max_batch_size=1)
        self._spec = spec
        self._torch_threads = torch_threads

    def load_model(self) -> OnDemand[TextEncoder]:
        """Return the encoder, which is not loaded yet."""
        return OnDemand(self._load)

    def _load(self) -> TextEncoder:
        _set_threads(self._torch_threads)
        return open_text_encoder(self._spec)

    def run_inference(
        self, batch: Sequence[TitleChunk], model: OnDemand[TextEncoder], inference_args: dict[str, Any] | None = None
    ) -> Iterable[EncodedTitles]:
        """Encode each chunk."""
        encoder = model.get()
        return [encode_titles(chunk, encoder) for chunk in batch]

    def get_num_bytes(self, batch: Sequence[TitleChunk]) -> int:
        """Return the characters of keys and titles.

        The default would pickle them.
        """
        return sum(len(text) for chunk in batch for texts in (chunk.keys, chunk.titles) for text in texts)

    def get_metrics_namespace(self) -> str:
        """Return the namespace of RunInference's own metrics."""
        return TITLE_METRICS

    def share_model_across_processes(self) -> bool:
        """Return whether processes share a model: they do not.

        There is one model for each process, because sharing would send every batch through a proxy.
        """
        return False


MakeHandler = Callable[[ImageSpec | TextSpec, int | None], ModelHandler[Any, Any, Any]]
"""Of an encoder's spec and the torch threads of a worker (None = torch's default): the handler of
its chunks, which travels to the workers."""


def chunk_handler(spec: ImageSpec | TextSpec, threads: int | None) -> ModelHandler[Any, Any, Any]:
    """Return the handler of the encoder that `spec` describes."""
    if isinstance(spec, ImageSpec):
        return ImageChunkHandler(spec, torch_threads=threads)
    return TitleChunkHandler(spec, torch_threads=threads)


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def encode_images(chunks: Sequence[ImageChunk], model: ImageEncoder) -> Iterator[EncodedImages]:
    """Read, decode, cut and encode the photos of some chunks.

    Each chunk is prepared while the encoder computes those before it.

    Raises:
        OSError: a file system that fails in other ways than by not having the photo. The chunks are
            to be tried again.
    """
    spec = model.spec
    # As many photos as fill whole batches: padding is left to a chunk's tail.
    step = spec.batch_size // math.gcd(spec.batch_size, spec.shape[0])
    threads = _READ_THREADS if spec.device == "cpu" else max(_READ_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        photos = _decode_ahead(chunks, spec, pool, step + 2 * threads)
        for chunk in chunks:
            yield _encode_chunk(chunk, model, step, itertools.islice(photos, len(chunk.keys)))


def _encode_chunk(
    chunk: ImageChunk, model: ImageEncoder, step: int, photos: Iterator[tuple[str, Future[_Photo]]]
) -> EncodedImages:
    compiled = model.prepare(chunk.compiled)
    found: list[tuple[str, ImageQuality]] = []
    outputs: list[Any] = []
    waiting: list[_Photo] = []
    defects: list[tuple[str, str, str]] = []
    unread: list[tuple[str, str, str]] = []
    encode_s = 0.0

    def flush() -> None:
        nonlocal encode_s
        started = time.monotonic()
        outputs.append(model.forward(np.concatenate([photo.patches for photo in waiting]), compiled=compiled))
        encode_s += time.monotonic() - started
        found.extend((photo.key, photo.quality) for photo in waiting)
        waiting.clear()

    started = time.monotonic()
    for key, result in photos:
        try:
            waiting.append(result.result())
        except ImageDefect as defect:
            defects.append((key, defect.reason, defect.detail))
        except _Unread as change:
            unread.append((key, change.reason, change.detail))
        if len(waiting) == step:
            flush()
    if waiting:
        flush()
    collecting = time.monotonic()
    features = model.collect(outputs)
    ended = time.monotonic()
    encode_s += ended - collecting
    for name, count in (
        ("photos-encoded", len(found)),
        ("photos-defective", len(defects)),
        ("photos-unread", len(unread)),
        ("encode-msec", int(1000 * encode_s)),
        ("wait-for-decode-msec", int(1000 * (ended - started - encode_s))),
    ):
        Metrics.counter(IMAGE_METRICS, name).inc(count)
    qualities = [quality for _, quality in found]
    return EncodedImages(
        chunk_id=chunk.chunk_id,
        keys=[key for key, _ in found],
        embeddings=features.reshape(len(found), *model.spec.shape),
        blur=np.array([quality.blur for quality in qualities], dtype=np.float32),
        luminance=np.array([quality.luminance for quality in qualities], dtype=np.float32),
        width=np.array([quality.width for quality in qualities], dtype=np.int32),
        height=np.array([quality.height for quality in qualities], dtype=np.int32),
        kernels=model.spec.kernels(compiled),
        seconds=ended - started,
        defects=defects,
        unread=unread,
    )


def encode_titles(chunk: TitleChunk, model: TextEncoder) -> EncodedTitles:
    """Tokenise and encode a chunk's titles."""
    started = time.monotonic()
    states = model.encode(chunk.titles)
    return EncodedTitles(
        chunk.chunk_id, chunk.keys, *states, kernels=model.spec.kernels, seconds=time.monotonic() - started
    )


def measure_pace(spec: ImageSpec | TextSpec, threads: int | None) -> float:
    """Measure the seconds for one content on this machine.

    The encoder is loaded and given one batch to warm up and one to be timed.
    """
    model = chunk_handler(spec, threads).load_model().get()
    work: Any
    if isinstance(spec, ImageSpec):
        contents = -(-spec.batch_size // spec.shape[0])
        work = np.zeros((contents * spec.shape[0], spec.patch_size, spec.patch_size, 3), dtype=np.uint8)
    else:
        contents = spec.batch_size(spec.buckets[0])
        work = ["fresh apples"] * contents
    model.encode(work)
    started = time.monotonic()
    model.encode(work)
    return (time.monotonic() - started) / contents


def _decode_ahead(
    chunks: Sequence[ImageChunk], spec: ImageSpec, pool: ThreadPoolExecutor, ahead: int
) -> Iterator[tuple[str, Future[_Photo]]]:
    """Yield photos in the chunks' order, decoded ahead.

    At most `ahead` of them are decoded before they are requested.
    """
    queue: deque[tuple[str, Future[_Photo]]] = deque()
    for chunk in chunks:
        for key, uri, data in zip(chunk.keys, chunk.uris, chunk.bytes, strict=True):
            queue.append((key, pool.submit(_load_photo, key, uri, data, spec)))
            if len(queue) == ahead:
                yield queue.popleft()
    while queue:
        yield queue.popleft()


def _load_photo(key: str, uri: str | None, data: bytes | None, spec: ImageSpec) -> _Photo:
    if data is None:
        data = _read(key, uri)
    image = decode_image(data, spec.side)
    return _Photo(key, grid_patches(image.pixels, spec.grid, spec.patch_size), image_quality(image))


def _read(key: str, uri: str | None) -> bytes:
    """Read the photo's bytes.

    No more than the limit and one are read.
    """
    if uri is None:
        raise ValueError(f"photo {key}: neither a path nor bytes")
    again = "The next run reads it again."
    try:
        # Wherever it led meanwhile: it is the photo that was let in, or its bytes are others.
        data = read_photo(uri)
    except FileDefect as defect:
        raise _Unread(defect.reason, f"{uri} {defect.detail}") from defect
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise _Unread(Reason.MISSING_IMAGE, f"{uri} cannot be opened any more ({error.strerror}). {again}") from error
    if content_key(data) != key:
        raise _Unread(Reason.CHANGED_IMAGE, f"{uri} changed while the run was reading. {again}")
    return data
