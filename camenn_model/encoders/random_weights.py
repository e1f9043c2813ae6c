"""Image models without training, for machines that no weights reach.

It is an explicit choice (`random:SEED`), never a fallback.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_SAMPLE = 128
"""Generated patches on which batch-norm statistics settle."""


def draw_weights(model: nn.Module, seed: int, patch_size: int) -> None:
    """Fill `model` in place with random weights.

    Convolutions are drawn from N(0, 2 / fan_in) (He 2015), which keeps the variance through ReLUs.
    Batch norms get the statistics of generated patches. With statistics of 0 and 1 instead, the
    signal dies: outputs of about 1e-12.

    NumPy draws the weights: its stream is the same on every processor. The sample is made and the
    statistics settle on one thread, as the number of threads changes their last bits.

    A model without batch norms stays as it is: nothing would settle its scales, and its own
    initialisation is made for it.
    """
    if not any(isinstance(module, _NORMS) for module in model.modules()):
        return
    random = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 4:
                fan_in = math.prod(parameter.shape[1:])
                values = random.standard_normal(parameter.shape, dtype=np.float32) * np.float32(math.sqrt(2 / fan_in))
                parameter.copy_(torch.from_numpy(values))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            _settle(model, generate_patches(random, _SAMPLE, patch_size))
        finally:
            torch.set_num_threads(threads)


def generate_patches(random: np.random.Generator, count: int, size: int) -> Tensor:
    """Generate patches that vary as photos do.

    They vary by colour, shading and texture: float32 [count, 3, size, size], -1 to 1.
    """
    colour, shading, texture = (
        torch.from_numpy(random.standard_normal((count, 3, cells, cells), dtype=np.float32)) for cells in (1, 5, size)
    )
    shading = functional.interpolate(shading, size=(size, size), mode="bilinear", align_corners=False)
    return (0.4 * colour + 0.4 * shading + 0.1 * texture).clamp(-1, 1)


def _settle(model: nn.Module, sample: Tensor) -> None:
    norms = [module for module in model.modules() if isinstance(module, _NORMS)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        if norm.affine:
            # Residual networks begin with scales of 0, which would leave out most of their layers.
            nn.init.ones_(norm.weight)
            nn.init.zeros_(norm.bias)
        # None = the plain mean over all batches seen: after one batch, that batch's statistics.
        norm.momentum = None
        norm.train()
    model(sample.contiguous(memory_format=torch.channels_last))
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
