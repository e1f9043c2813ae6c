"""Protocols of the encoders, and how a spec becomes one.

An encoder is an entry of the registry (`image_models.py`, `text_models.py`) and a class with these
methods. Importing this module imports no torch: the class is imported where a worker loads it.
"""

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from camenn_model.encoders.image_models import IMAGE_ENCODERS, TIMM_ENCODER
from camenn_model.encoders.spec import ImageSpec, TextSpec
from camenn_model.encoders.text_models import TEXT_ENCODERS

if TYPE_CHECKING:
    from torch import Tensor


class TitleStates(NamedTuple):
    """Titles, encoded."""

    states: np.ndarray
    """float16 [N, T, d]; zero beyond each title's own tokens"""
    lengths: np.ndarray
    """int32 [N]: tokens in use, special ones such as [CLS] and [SEP] included; 0 = no text"""
    unknown_share: np.ndarray
    """float32 [N]: share of the tokens in use, special ones aside, that the vocabulary does not know"""


class ImageEncoder(Protocol):
    """An encoder of patches.

    It has the model and weights that its spec names. A patch has the same bits whatever its
    neighbours. Shapes: N patches, s = `spec.patch_size`, d = `spec.width`.
    """

    spec: ImageSpec
    start_seconds: float

    def prepare(self, compiled: bool) -> bool:
        """Make ready to encode. Returns whether by compiled kernels."""

    def forward(self, patches: np.ndarray, *, compiled: bool) -> "Tensor":
        """Begin to encode uint8 [N, s, s, 3].

        The features, float32 [N, d], stay on the device.
        """

    def collect(self, outputs: "Iterable[Tensor]") -> np.ndarray:
        """Wait for what `forward` began, as float16 [N, d]."""

    def encode(self, patches: np.ndarray, *, compiled: bool = False) -> np.ndarray:
        """Encode uint8 [N, s, s, 3] → float16 [N, d]."""


class TextEncoder(Protocol):
    """An encoder of titles.

    It has the model and vocabulary that its spec names. A title has the same bits whatever its
    neighbours.
    """

    spec: TextSpec
    start_seconds: float

    def encode(self, titles: list[str]) -> TitleStates:
        """Encode titles, normalised or not."""


def open_image_encoder(spec: ImageSpec) -> ImageEncoder:
    """Load the image encoder that a spec describes.

    Raises:
        WeightsError: its weights cannot be had here, or are not those of the submission.
        DeviceError: this machine cannot honour the spec's device or precision.
    """
    return _import(IMAGE_ENCODERS.get(spec.model, TIMM_ENCODER))(spec)


def open_text_encoder(spec: TextSpec) -> TextEncoder:
    """Load the text encoder that a spec describes.

    Raises:
        WeightsError: it cannot be had here, or is not that of the submission.
        DeviceError: this machine cannot honour the spec's device or precision.
    """
    return _import(TEXT_ENCODERS[spec.model].encoder)(spec)


def _import(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(f"camenn_model.encoders.{module}"), attribute)
