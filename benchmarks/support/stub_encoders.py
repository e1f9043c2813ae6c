"""Stub encoders, which compute cheap, meaningless embeddings.

An embedding is a cheap function of the content key, so that a benchmark measures the pipelines and
not the networks.

They serve nothing else: their embeddings carry no information about a photo or a title.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from apache_beam.ml.inference.base import ModelHandler
from numpy.typing import NDArray

from camenn_model.encoders.spec import ImageSpec, TextSpec
from pipelines.embed.handlers import IMAGE_METRICS, TITLE_METRICS, EncodedImages, EncodedTitles, ImageChunk, TitleChunk


def stub_embeddings(keys: Sequence[str], shape: tuple[int, int]) -> NDArray[np.float16]:
    """Return embeddings computed from keys alone.

    They are float16 [n, *shape] in [-1, 1): the same for the same key, and no easier to compress
    than real ones.
    """
    halves = np.frombuffer(bytes.fromhex("".join(keys)), dtype="<u8").reshape(-1, 2)
    columns = np.arange(1, shape[0] * shape[1] + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (halves[:, :1] ^ columns) * (halves[:, 1:] | np.uint64(1))
    values = (mixed >> np.uint64(48)).astype(np.float32) / np.float32(2**15) - np.float32(1)
    return values.astype(np.float16).reshape(len(keys), *shape)


@dataclass(frozen=True, kw_only=True)
class StubImageSpec(ImageSpec):
    """A spec for the stub of the image encoder.

    A photo has `grid` × `grid` patches of `width` features.
    """

    @property
    def parts(self) -> dict[str, str | int]:
        """Return all that changes an embedding."""
        return {"model": "stub", "grid": self.grid, "width": self.width}


@dataclass(frozen=True, kw_only=True)
class StubTextSpec(TextSpec):
    """A spec for the stub of the text encoder."""

    @property
    def parts(self) -> dict[str, str | int]:
        """Return all that changes an embedding."""
        return {"model": "stub", "tokens": self.max_tokens, "width": self.width}


def stub_specs(image_shape: Sequence[int], text_shape: Sequence[int]) -> tuple[StubImageSpec, StubTextSpec]:
    """Return specs of stub encoders of these shapes.

    The number of patches is a square.
    """
    common: dict[str, Any] = {
        "source": "stub",
        "path": "",
        "weights_hash": "stub",
        "device": "cpu",
        "precision": "fp32",
    }
    grid = round(image_shape[0] ** 0.5)
    return (
        StubImageSpec(**common, grid=grid, patch_size=75, width=image_shape[1]),
        StubTextSpec(**common, vocabulary_hash="stub", width=text_shape[1], max_tokens=text_shape[0]),
    )


class StubImageHandler(ModelHandler[ImageChunk, EncodedImages, None]):
    """A stub of `ImageChunkHandler`.

    Nothing is read or decoded.
    """

    def __init__(self, spec: ImageSpec) -> None:
        super().__init__(min_batch_size=1, max_batch_size=1)
        self._spec = spec

    def load_model(self) -> None:
        """Load nothing: there is no model."""

    def run_inference(
        self, batch: Sequence[ImageChunk], model: None, inference_args: dict[str, Any] | None = None
    ) -> Iterable[EncodedImages]:
        """Return stub embeddings and made-up quality for each chunk."""
        return [
            EncodedImages(
                chunk_id=chunk.chunk_id,
                keys=chunk.keys,
                embeddings=stub_embeddings(chunk.keys, self._spec.shape),
                blur=np.full(len(chunk.keys), 100, dtype=np.float32),
                luminance=np.full(len(chunk.keys), 0.5, dtype=np.float32),
                width=np.full(len(chunk.keys), 300, dtype=np.int32),
                height=np.full(len(chunk.keys), 300, dtype=np.int32),
                kernels="stub",
                seconds=0.0,
            )
            for chunk in batch
        ]

    def get_num_bytes(self, batch: Sequence[ImageChunk]) -> int:
        """Count the bytes of keys."""
        return sum(len(key) for chunk in batch for key in chunk.keys)

    def get_metrics_namespace(self) -> str:
        """Return the namespace of the real handler."""
        return IMAGE_METRICS


class StubTitleHandler(ModelHandler[TitleChunk, EncodedTitles, None]):
    """A stub of `TitleChunkHandler`."""

    def __init__(self, spec: TextSpec) -> None:
        super().__init__(min_batch_size=1, max_batch_size=1)
        self._spec = spec

    def load_model(self) -> None:
        """Load nothing: there is no model."""

    def run_inference(
        self, batch: Sequence[TitleChunk], model: None, inference_args: dict[str, Any] | None = None
    ) -> Iterable[EncodedTitles]:
        """Return stub states for each chunk.

        A title has as many tokens as words and two, if there is room.
        """
        return [
            EncodedTitles(
                chunk_id=chunk.chunk_id,
                keys=chunk.keys,
                states=stub_embeddings(chunk.keys, self._spec.shape),
                lengths=np.array(
                    [min(len(title.split()) + 2, self._spec.max_tokens) for title in chunk.titles], dtype=np.int32
                ),
                unknown_share=np.zeros(len(chunk.keys), dtype=np.float32),
                kernels="stub",
                seconds=0.0,
            )
            for chunk in batch
        ]

    def get_num_bytes(self, batch: Sequence[TitleChunk]) -> int:
        """Count the bytes of keys."""
        return sum(len(key) for chunk in batch for key in chunk.keys)

    def get_metrics_namespace(self) -> str:
        """Return the namespace of the real handler."""
        return TITLE_METRICS


def stub_handler(spec: ImageSpec | TextSpec, threads: int | None) -> Any:
    """Make a stub handler.

    It replaces `pipelines.embed.handlers.chunk_handler`.
    """
    return StubImageHandler(spec) if isinstance(spec, ImageSpec) else StubTitleHandler(spec)
