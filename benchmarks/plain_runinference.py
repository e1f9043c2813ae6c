"""RunInference as Beam's documentation writes it: a DoFn that opens a photo and makes a tensor, Beam's own PyTorch handler in fp32, one photo an element."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import torch
from apache_beam.ml.inference.base import ModelHandler, PredictionResult, RunInference
from PIL import Image
from torch import Tensor

from camenn_model.encoder_spec import ImageSpec, TextSpec
from camenn_model.image_encoder import load_inception
from camenn_model.text_encoder import TextEncoder


class _OnePhoto(ModelHandler[Tensor, PredictionResult, Any]):
    """As Beam's PytorchModelHandlerTensor, which wants a pickled state dict of a class that it can call; a photo's patches are one element."""

    def __init__(self, spec: ImageSpec) -> None:
        super().__init__(min_batch_size=1, max_batch_size=1)
        self.spec = spec

    def load_model(self) -> Any:
        """InceptionV4 as timm builds it."""
        return load_inception(self.spec)

    @torch.inference_mode()
    def run_inference(
        self, batch: Sequence[Tensor], model: Any, inference_args: dict[str, Any] | None = None
    ) -> Iterable[PredictionResult]:
        """One forward pass an element."""
        return [PredictionResult(patches, model(patches)) for patches in batch]


class _OneTitle(ModelHandler[str, PredictionResult, Any]):
    """The same with BERT."""

    def __init__(self, spec: TextSpec) -> None:
        super().__init__(min_batch_size=1, max_batch_size=1)
        self.spec = spec

    def load_model(self) -> Any:
        """The encoder's own model and tokenizer."""
        return TextEncoder(self.spec)

    @torch.inference_mode()
    def run_inference(
        self, batch: Sequence[str], model: Any, inference_args: dict[str, Any] | None = None
    ) -> Iterable[PredictionResult]:
        """One forward pass an element."""
        results = []
        for title in batch:
            tokens = model.tokenizer(
                title, return_tensors="pt", truncation=True, max_length=self.spec.max_tokens, padding="max_length"
            )
            results.append(PredictionResult(title, model.model(**tokens).last_hidden_state))
        return results


def read_photo(path: str, spec: ImageSpec) -> Tensor:
    """Patches float32 [P, 3, s, s] of a photo."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB").resize((spec.side, spec.side)))
    grid, size = spec.grid, spec.patch_size
    patches = pixels.reshape(grid, size, grid, size, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, size, size)
    return torch.from_numpy(patches.astype(np.float32) / 127.5 - 1)


class _Clock(beam.DoFn):
    """Notes when each result came."""

    times: list[float] = []

    def process(self, result: PredictionResult) -> Iterable[Any]:
        _Clock.times.append(time.monotonic())
        yield np.asarray(result.inference)


def _pace(steps: Any, elements: list[str]) -> float:
    """Seconds an element, from the first result to the last."""
    _Clock.times = []
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        _ = pipeline | beam.Create(elements) | beam.Reshuffle() | steps | beam.ParDo(_Clock())
    assert len(_Clock.times) == len(elements)
    return (_Clock.times[-1] - _Clock.times[0]) / (len(elements) - 1)


def time_images(spec: ImageSpec, paths: list[str]) -> float:
    """Seconds a photo."""
    return _pace(beam.Map(read_photo, spec) | RunInference(_OnePhoto(spec)), paths)


def time_titles(spec: TextSpec, titles: list[str]) -> float:
    """Seconds a title."""
    return _pace(RunInference(_OneTitle(spec)), titles)
