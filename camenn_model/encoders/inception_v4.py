"""InceptionV4 without its classifier as a frozen patch encoder.

The model is timm's `inception_v4` (Szegedy et al. 2017).

Shapes: N patches, s pixels a side, 1536 features.
"""

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from camenn_model.encoders.device import DTYPES, LOADING, check_device
from camenn_model.encoders.random_weights import draw_weights
from camenn_model.encoders.spec import IMAGE_WIDTH, DeviceError, ImageSpec, has_compiler
from camenn_model.encoders.weights import IMAGE_FLAG, WeightsError, find_image_weights, hash_safetensors, random_seed

_LOGGER = logging.getLogger(__name__)

STEM = 2
"""Convolutions that always compute in fp32."""


class ImageEncoder:
    """Patches → features, whatever a patch's neighbours.

    Every forward pass has `spec.batch_size` patches, so that neighbours change nothing.

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
        started = time.monotonic()
        check_device(spec.device, spec.precision)
        self.spec = spec
        with LOADING:
            model = load_inception(spec)
            fold_batch_norm(model)
            self.model = MixedInception(model, DTYPES[spec.precision]).to(spec.device)
            self.model = self.model.to(memory_format=torch.channels_last)
        self.start_seconds = time.monotonic() - started
        """Loading and compiling"""
        self._compiled: Callable[[Tensor], Tensor] | None = None
        self._may_compile = True
        if spec.compile == "on":
            if not has_compiler():
                raise DeviceError(
                    "--compile on: this worker has no C++ compiler (g++, or what the variable "
                    "CXX names). Install one, or submit with --compile off."
                )
            self._compile()

    @property
    def fingerprint(self) -> str:
        """Return 16 hex digits, see `ImageSpec.parts`."""
        return self.spec.fingerprint

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

    def encode(self, patches: np.ndarray, *, compiled: bool = False) -> np.ndarray:
        """Encode patches.

        They are uint8 [N, s, s, 3], RGB. The features are float16 [N, 1536]. N may be anything, 0
        included: the last batch is padded.

        Raises:
            ValueError: another shape or dtype.
            FloatingPointError: features beyond float16, which only broken weights give.
        """
        return self.collect([self.forward(patches, compiled=self.prepare(compiled))])

    @torch.inference_mode()
    def forward(self, patches: np.ndarray, *, compiled: bool) -> Tensor:
        """Encode patches and leave the features on the device.

        Does as `encode`, but the features [N, 1536] stay on the device, whose work may not be done
        when this returns.
        """
        size, batch = self.spec.patch_size, self.spec.batch_size
        if patches.dtype != np.uint8 or patches.shape[1:] != (size, size, 3):
            raise ValueError(f"patches are {patches.dtype} {patches.shape}, expected uint8 [N, {size}, {size}, 3]")
        outputs = []
        for start in range(0, len(patches), batch):
            piece = patches[start : start + batch]
            padded = piece
            if len(piece) < batch:
                padded = np.zeros((batch, size, size, 3), dtype=np.uint8)
                padded[: len(piece)] = piece
            output = self._forward(torch.from_numpy(np.ascontiguousarray(padded)), compiled)
            outputs.append(output[: len(piece)])
        return torch.cat(outputs) if outputs else torch.empty((0, IMAGE_WIDTH), device=self.spec.device)

    def collect(self, outputs: Iterable[Tensor]) -> np.ndarray:
        """Wait for the device and copy its features to memory.

        Returns what `forward` returned, as float16 [N, 1536].

        Raises:
            FloatingPointError: features beyond float16, which only broken weights give.
        """
        features = np.concatenate(
            [np.empty((0, IMAGE_WIDTH), dtype=np.float16), *(output.half().cpu().numpy() for output in outputs)]
        )
        if not np.isfinite(features).all():
            raise FloatingPointError(
                f"{IMAGE_FLAG} {self.spec.source}: features beyond float16; these weights cannot be used"
            )
        return features

    def _forward(self, pixels: Tensor, compiled: bool) -> Tensor:
        if self.spec.device != "cpu":
            # From pinned memory the copy runs beside the passes before it.
            pixels = pixels.pin_memory().to(self.spec.device, non_blocking=True)
        # A view with channels second in memory order [N, s, s, 3] is what channels-last means: nothing is moved.
        values = pixels.permute(0, 3, 1, 2).float()
        # (x / 255 - 0.5) / 0.5: mean and standard deviation 0.5, as these weights were trained with.
        model = self._compiled if compiled and self._compiled is not None else self.model
        return model(values / 127.5 - 1)


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


def compile_model(model: nn.Module) -> Callable[[Tensor], Tensor]:
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
        _load_weights(model, spec)
    else:
        draw_weights(model, seed, spec.patch_size)
    return model


def _load_weights(model: nn.Module, spec: ImageSpec) -> None:
    # Workers on other machines have no file at the submitter's path, but may have the same weights from the hub.
    path = Path(spec.path) if Path(spec.path).is_file() else find_image_weights(spec.source)
    if hash_safetensors(path, IMAGE_FLAG) != spec.weights_hash:
        raise WeightsError(
            f"{IMAGE_FLAG} {spec.source}: {path} is not the file that the job was submitted with. Put the "
            "same one on every worker."
        )
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise WeightsError(f"{IMAGE_FLAG} {spec.source}: {path} cannot be read ({error}). Fetch it again.") from error
    # The count of training batches is of no use here, and some conversions leave it out.
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    missing = [name for name in wanted if name not in tensors or tensors[name].shape != wanted[name].shape]
    if missing:
        raise WeightsError(
            f"{IMAGE_FLAG} {spec.source}: {path} lacks {len(missing)} of InceptionV4's tensors, {missing[0]} "
            "first. Name timm inception_v4 weights."
        )
    model.load_state_dict({name: tensors[name] for name in wanted}, strict=False)


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
