"""InceptionV4 without its classifier as a frozen patch encoder (timm `inception_v4`, Szegedy et al. 2017).

Shapes: N patches, s pixels a side, 1536 features.
"""

from pathlib import Path

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from camenn_model.device import DTYPES, LOADING, check_device
from camenn_model.encoder_spec import IMAGE_WIDTH, ImageSpec
from camenn_model.random_weights import draw_weights
from camenn_model.weights import IMAGE_FLAG, WeightsError, find_image_weights, hash_safetensors, random_seed


class ImageEncoder:
    """Patches → features: every forward pass has `spec.batch_size` patches, so that neighbours change nothing.

    Measured on AMX: row, neighbours and number of threads change no bit; bf16 keeps a cosine of 0.9995 or more to fp32.
    """

    def __init__(self, spec: ImageSpec) -> None:
        """Load the weights that `spec` names.

        Raises:
            WeightsError: they cannot be had here, or are not those of the submission, or not InceptionV4's.
            DeviceError: this machine cannot honour the spec's device or precision.
        """
        check_device(spec.device, spec.precision)
        self.spec = spec
        with LOADING:
            model = timm.create_model("inception_v4", pretrained=False, num_classes=0, global_pool="avg").eval()
            seed = random_seed(spec.source)
            if seed is None:
                _load_weights(model, spec)
            else:
                draw_weights(model, seed, spec.patch_size)
            fold_batch_norm(model)
            self.model = model.to(spec.device, DTYPES[spec.precision]).to(memory_format=torch.channels_last)

    @property
    def fingerprint(self) -> str:
        """16 hex digits: see `ImageSpec.parts`."""
        return self.spec.fingerprint

    @torch.inference_mode()
    def encode(self, patches: np.ndarray) -> np.ndarray:
        """Patches uint8 [N, s, s, 3], RGB → features float16 [N, 1536].

        N may be anything, 0 included: the last batch is padded.

        Raises:
            ValueError: another shape or dtype.
            FloatingPointError: features beyond float16, which only broken weights give.
        """
        size, batch = self.spec.patch_size, self.spec.batch_size
        if patches.dtype != np.uint8 or patches.shape[1:] != (size, size, 3):
            raise ValueError(f"patches are {patches.dtype} {patches.shape}, expected uint8 [N, {size}, {size}, 3]")
        features = np.empty((len(patches), IMAGE_WIDTH), dtype=np.float16)
        for start in range(0, len(patches), batch):
            piece = patches[start : start + batch]
            padded = piece
            if len(piece) < batch:
                padded = np.zeros((batch, size, size, 3), dtype=np.uint8)
                padded[: len(piece)] = piece
            output = self._forward(torch.from_numpy(np.ascontiguousarray(padded)))
            features[start : start + batch] = output[: len(piece)].float().cpu().numpy()
        if not np.isfinite(features).all():
            raise FloatingPointError(
                f"{IMAGE_FLAG} {self.spec.source}: features beyond float16; these weights cannot be used"
            )
        return features

    def _forward(self, pixels: Tensor) -> Tensor:
        # A view with channels second in memory order [N, s, s, 3] is what channels-last means: nothing is moved.
        values = pixels.to(self.spec.device).permute(0, 3, 1, 2).float()
        # (x / 255 - 0.5) / 0.5: mean and standard deviation 0.5, as these weights were trained with.
        return self.model((values / 127.5 - 1).to(DTYPES[self.spec.precision]))


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
    """Fold batch norms into their convolutions, in place: the same function in eval mode, closer to fp32 in bf16."""
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
