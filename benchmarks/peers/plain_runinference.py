"""RunInference as in Beam's documentation.

A DoFn opens a photo and makes a tensor, and Beam's own PyTorch handler runs in fp32, one photo an
element.
"""

import time
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import apache_beam as beam
import numpy as np
import torch
from apache_beam.ml.inference.base import ModelHandler, PredictionResult, RunInference
from PIL import Image
from torch import Tensor

from benchmarks.peers.bare_encoders import BareImages
from camenn_model.encoders.bert import BertEncoder
from camenn_model.encoders.inception_v4 import InceptionV4Encoder, load_inception
from camenn_model.encoders.spec import ImageSpec, TextSpec

EVERY = 16
"""Photos between two runs of the bare loop."""


class _OnePhoto(ModelHandler[Tensor, PredictionResult, Any]):
    """A handler like Beam's PytorchModelHandlerTensor.

    Beam's requires a pickled state dict of a class that it can call. A photo's patches are one
    element.

    Now and then, with the clock stopped, a bare loop encodes some of the same photos.
    """

    def __init__(self, spec: ImageSpec, fast: ImageSpec, variant: Sequence[Any]) -> None:
        super().__init__(min_batch_size=1, max_batch_size=1)
        self.spec, self.fast, self.variant = spec, fast, variant

    def load_model(self) -> Any:
        """Load InceptionV4 as timm builds it, and the bare loop."""
        mode, size = self.variant
        self.bare = BareImages(InceptionV4Encoder(self.fast), (mode, size))
        self.last: list[np.ndarray] = []
        return load_inception(self.spec)

    @torch.inference_mode()
    def run_inference(
        self, batch: Sequence[Tensor], model: Any, inference_args: dict[str, Any] | None = None
    ) -> Iterable[PredictionResult]:
        """Run one forward pass an element."""
        results = [PredictionResult(patches, model(patches)) for patches in batch]
        started = time.monotonic()
        self.last += [(patches.permute(0, 2, 3, 1).numpy() * 127.5 + 127.5).astype(np.uint8) for patches in batch]
        if len(self.last) == EVERY:
            contents = np.concatenate(self.last)
            if not _Clock.bare:
                # Beam may have loaded the model on another thread: torch compiles again for this one.
                self.bare.seconds(contents)
            _Clock.bare.append((EVERY, self.bare.seconds(contents)))
            self.last = []
        _Clock.paused += time.monotonic() - started
        return results


class _OneTitle(ModelHandler[str, PredictionResult, Any]):
    """The same handler with BERT."""

    def __init__(self, spec: TextSpec) -> None:
        super().__init__(min_batch_size=1, max_batch_size=1)
        self.spec = spec

    def load_model(self) -> Any:
        """Load the encoder's own model and tokenizer."""
        return BertEncoder(self.spec)

    @torch.inference_mode()
    def run_inference(
        self, batch: Sequence[str], model: Any, inference_args: dict[str, Any] | None = None
    ) -> Iterable[PredictionResult]:
        """Run one forward pass an element."""
        results = []
        for title in batch:
            tokens = model.tokenizer(
                title, return_tensors="pt", truncation=True, max_length=self.spec.max_tokens, padding="max_length"
            )
            results.append(PredictionResult(title, model.model(**tokens).last_hidden_state))
        return results


def read_photo(path: str, spec: ImageSpec) -> Tensor:
    """Return a photo's patches, float32 [P, 3, s, s]."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB").resize((spec.side, spec.side)))
    grid, size = spec.grid, spec.patch_size
    patches = pixels.reshape(grid, size, grid, size, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, size, size)
    return torch.from_numpy(patches.astype(np.float32) / 127.5 - 1)


class _Clock(beam.DoFn):
    """Records the time of each result.

    The clock is stopped while the bare loop runs.
    """

    times: ClassVar[list[float]] = []
    paused: ClassVar[float] = 0.0
    bare: ClassVar[list[tuple[int, float]]] = []

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Beam's own has no annotations

    def process(self, result: PredictionResult) -> Iterable[Any]:
        _Clock.times.append(time.monotonic() - _Clock.paused)
        yield np.asarray(result.inference)


def _pace(steps: Any, elements: list[str]) -> float:
    """Return seconds an element, from first result to last."""
    _Clock.times, _Clock.paused, _Clock.bare = [], 0.0, []
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        _ = pipeline | beam.Create(elements) | beam.Reshuffle() | steps | beam.ParDo(_Clock())
    assert len(_Clock.times) == len(elements)
    return (_Clock.times[-1] - _Clock.times[0]) / (len(elements) - 1)


def time_images(spec: ImageSpec, paths: list[str], fast: ImageSpec, variant: Sequence[Any]) -> tuple[float, float]:
    """Return seconds a photo of (this pipeline, the bare loop).

    The bare loop's are measured beside the pipeline's.
    """
    pace = _pace(beam.Map(read_photo, spec) | RunInference(_OnePhoto(spec, fast, variant)), paths)
    return pace, sum(seconds for _, seconds in _Clock.bare) / sum(photos for photos, _ in _Clock.bare)


def time_titles(spec: TextSpec, titles: list[str]) -> float:
    """Return the seconds a title."""
    return _pace(RunInference(_OneTitle(spec)), titles)
