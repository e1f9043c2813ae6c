"""InceptionV4 without its classifier as a frozen patch encoder.

The model is timm's `inception_v4` (Szegedy et al. 2017).

Shapes: N patches, s pixels a side, 1536 features.
"""

import logging
import time

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from camenn_model.encoders.device import DTYPES, LOADING
from camenn_model.encoders.machine import DeviceError, has_compiler
from camenn_model.encoders.patch_encoder import CompiledModel, PatchEncoder, load_weights
from camenn_model.encoders.random_weights import draw_weights
from camenn_model.encoders.spec import ImageSpec
from camenn_model.encoders.weights import random_seed

_LOGGER = logging.getLogger(__name__)

STEM = 2
"""Convolutions that always compute in fp32."""


class InceptionV4Encoder(PatchEncoder):
    """Patches → features by a folded InceptionV4 of mixed precision.

    Measured on AMX and on AVX2: row, neighbours and number of threads change no bit. bf16 keeps a
    cosine of 0.999 or more to fp32.
    """

    def __init__(self, spec: ImageSpec) -> None:
        """Load the weights that `spec` names.

        The model is compiled where the spec says `on`.

        Raises:
            WeightsError: they cannot be had here, or are not those of the submission, or not
                InceptionV4's.
            DeviceError: this machine cannot honour the spec's device, precision or compilation.
        """
        super().__init__(spec)
        self._compiled: CompiledModel | None = None
        self._may_compile = True
        if spec.compile == "on":
            if not has_compiler():
                raise DeviceError(
                    "--compile on: this worker has no C++ compiler (g++, or what the variable "
                    "CXX names). Install one, or submit with --compile off."
                )
            self._compile()

    def _load(self) -> nn.Module:
        model = load_inception(self.spec)
        fold_batch_norm(model)
        return MixedInception(model, DTYPES[self.spec.precision])

    def prepare(self, compiled: bool) -> bool:
        """Make ready to encode with compiled kernels, if asked.

        Returns whether they will be used. They are not where `spec.compile` is `auto` and compiling
        fails.
        """
        if self.spec.compile != "auto":
            return self.spec.compile == "on"
        if compiled and self._compiled is None and self._may_compile:
            self._may_compile = has_compiler()
            try:
                if self._may_compile:
                    self._compile()
            except RuntimeError as error:
                # A compiler that lacks Python's headers, say. The eager kernels give the same
                # features, and each file says that it has them.
                self._compiled, self._may_compile = None, False
                _LOGGER.warning("InceptionV4 cannot be compiled here, eager kernels take its place: %s", error)
        return compiled and self._compiled is not None

    def _compile(self) -> None:
        started = time.monotonic()
        with LOADING:
            self._compiled = compile_model(self.model)
            size = self.spec.patch_size
            blank = np.zeros((self.spec.batch_size, size, size, 3), dtype=np.uint8)
            # Kernels are made by the first pass.
            self.collect([self.forward(blank, compiled=True)])
        self.start_seconds += time.monotonic() - started

    def _model_of(self, compiled: bool) -> nn.Module | CompiledModel:
        return self._compiled if compiled and self._compiled is not None else self.model


class MixedInception(nn.Module):
    """A folded InceptionV4 of mixed precision.

    Its first `STEM` convolutions compute in fp32 and the others in `dtype`. It maps patches float32
    [N, 3, s, s] → float32 [N, 1536].

    Nearly all that bf16 loses, it loses in the first three convolutions, on patches of little
    contrast. Lowest cosine to fp32 over 1,024 patches of real photos: 0.989 all in bf16, 0.9985
    with two in fp32, 0.9992 with those and `round_filters`, or with three.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        features = list(model.get_submodule("features").children())
        self.stem = nn.Sequential(*features[:STEM])
        self.body = nn.Sequential(*features[STEM:])
        if dtype == torch.bfloat16:
            for module in self.body.modules():
                if isinstance(module, nn.Conv2d):
                    module.weight = nn.Parameter(round_filters(module.weight.detach()), requires_grad=False)
        self.body.to(dtype)
        self.pool = model.get_submodule("global_pool")
        self.dtype = dtype

    def forward(self, patches: Tensor) -> Tensor:
        """Compute the features of each patch.

        They are its last feature map, averaged over the pixels.
        """
        return self.pool(self.body(self.stem(patches).to(self.dtype)).float())


def round_filters(weights: Tensor) -> Tensor:
    """Round weights to bfloat16 and keep each filter's sum.

    Weights are float32 [out, in, h, w]. Some are rounded to the farther neighbour, so that each
    filter's sum is kept as nearly as possible.

    Where a patch has little contrast, a filter sees nearly the same value at each of its taps.
    Rounding each tap to its nearest shifts all of its outputs alike, and the next layers amplify
    the shift. The idea is that of bias correction after quantisation (Nagel et al. 2019, 4.2),
    without data.
    """
    taps = weights.flatten(2)
    rounded = taps.to(torch.bfloat16)
    # The next value of bfloat16 on the other side: one step in the bits, as magnitudes are ordered like integers.
    outward = (taps - rounded.float()) * rounded.float().sign() > 0
    bits = rounded.view(torch.int16)
    farther = torch.where(outward, bits + 1, bits - 1).view(torch.bfloat16)
    movable = (rounded != 0) & (rounded.float() != taps)
    for _ in range(4):
        missing = (taps - rounded.float()).sum(-1, keepdim=True)
        left = (missing - (farther.float() - rounded.float())).abs().masked_fill(~movable, torch.inf)
        best = left.argmin(-1, keepdim=True)
        better = left.gather(-1, best) < missing.abs()
        move = torch.zeros_like(movable).scatter_(-1, best, better)
        rounded = torch.where(move, farther, rounded)
        movable &= ~move
    return rounded.float().view_as(weights)


def compile_model(model: nn.Module) -> CompiledModel:
    """Compile `model` for inference.

    Its weights are frozen into the kernels. These are made by the first call, for its shape alone.
    """
    return torch.compile(model, dynamic=False, options={"freezing": True})


def load_inception(spec: ImageSpec) -> nn.Module:
    """Load timm's InceptionV4 without its classifier.

    It has the weights that `spec` names, and maps patches [N, 3, s, s] → [N, 1536], fp32, on the
    CPU.

    Raises:
        WeightsError: they cannot be had here, or are not those of the submission, or not
            InceptionV4's.
    """
    model = timm.create_model("inception_v4", pretrained=False, num_classes=0, global_pool="avg").eval()
    seed = random_seed(spec.source)
    if seed is None:
        load_weights(model, spec)
    else:
        draw_weights(model, seed, spec.patch_size)
    return model


def fold_batch_norm(module: nn.Module) -> None:
    """Fold batch norms into their convolutions, in place.

    The result is the same function in eval mode, and closer to fp32 in bf16.
    """
    for name, child in module.named_children():
        convolution, norm = getattr(child, "conv", None), getattr(child, "bn", None)
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, name, nn.Sequential(_folded(convolution, norm), nn.ReLU(inplace=True)))
        else:
            fold_batch_norm(child)


def _folded(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    assert norm.running_mean is not None and norm.running_var is not None
    weight, bias = fuse_conv_bn_weights(
        convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    folded = nn.Conv2d(
        convolution.in_channels,
        convolution.out_channels,
        kernel_size=convolution.kernel_size,  # type: ignore[arg-type]
        stride=convolution.stride,  # type: ignore[arg-type]
        padding=convolution.padding,  # type: ignore[arg-type]
        device="meta",
    )
    folded.weight, folded.bias = weight, bias
    return folded
