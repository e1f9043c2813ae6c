"""Any image model of timm's as a frozen patch encoder.

Its features are what `timm.create_model(name, num_classes=0)` gives: pooled, before the classifier
(Wightman 2019).
"""

import json

import timm
import torch
from torch import Tensor, nn

from camenn_model.encoders.device import DTYPES
from camenn_model.encoders.patch_encoder import PatchEncoder, load_weights
from camenn_model.encoders.random_weights import draw_weights
from camenn_model.encoders.spec import ImageSpec
from camenn_model.encoders.weights import random_seed


class TimmEncoder(PatchEncoder):
    """Patches → pooled features, all in one precision, never compiled."""

    def _load(self) -> nn.Module:
        return InPrecision(load_timm_model(self.spec), DTYPES[self.spec.precision])


class InPrecision(nn.Module):
    """A model in one precision, with float32 in and out."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model.to(dtype)
        self.dtype = dtype

    def forward(self, patches: Tensor) -> Tensor:
        """Compute the pooled features of each patch."""
        return self.model(patches.to(self.dtype)).float()


def load_timm_model(spec: ImageSpec) -> nn.Module:
    """Load a model of timm's without its classifier.

    It has the weights that `spec` names, and maps patches [N, 3, s, s] → [N, d], fp32, on the CPU.

    Raises:
        WeightsError: they cannot be had here, or are not those of the submission, or not of the
            spec's model.
    """
    seed = random_seed(spec.source)
    arguments = json.loads(spec.model_args or "{}")
    # timm initialises from torch's own generator, which others of this process use.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed or 0)
        model = timm.create_model(spec.model, pretrained=False, num_classes=0, **arguments).eval()
        if seed is None:
            load_weights(model, spec)
        else:
            draw_weights(model, seed, spec.patch_size)
    return model
