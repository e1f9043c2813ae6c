"""The base of image encoders.

Patches go through a model in fixed batches, and its weights are checked.

Shapes: N patches, s pixels a side, d features.
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from camenn_model.encoders.device import LOADING, check_device
from camenn_model.encoders.image_models import HALVES
from camenn_model.encoders.spec import ImageSpec
from camenn_model.encoders.weights import IMAGE_FLAG, MODEL_FLAG, WeightsError, find_image_weights, hash_safetensors

CompiledModel = Callable[[Tensor], Tensor]


class PatchEncoder:
    """Patches → features, whatever a patch's neighbours.

    Every forward pass has `spec.batch_size` patches, so that neighbours change nothing.
    """

    def __init__(self, spec: ImageSpec) -> None:
        """Load the weights that `spec` names.

        Raises:
            WeightsError: they cannot be had here, or are not those of the submission, or not of
                the spec's model.
            DeviceError: this machine cannot honour the spec's device or precision.
        """
        started = time.monotonic()
        check_device(spec.device, spec.precision)
        self.spec = spec
        with LOADING:
            model = self._load().to(spec.device)
            self.model: nn.Module = model.to(memory_format=torch.channels_last)
        self.start_seconds = time.monotonic() - started
        """Loading and compiling"""

    def _load(self) -> nn.Module:
        """Load the model on the CPU.

        It maps float32 [N, 3, s, s] → float32 [N, d].
        """
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """Return 16 hex digits, see `ImageSpec.parts`."""
        return self.spec.fingerprint

    def prepare(self, compiled: bool) -> bool:
        """Make ready to encode, with compiled kernels if asked.

        Returns whether they will be used. Without a recipe for them they are not.
        """
        return False

    def encode(self, patches: np.ndarray, *, compiled: bool = False) -> np.ndarray:
        """Encode patches.

        They are uint8 [N, s, s, 3], RGB. The features are float16 [N, d]. N may be anything, 0
        included: the last batch is padded.

        Raises:
            ValueError: another shape or dtype.
            FloatingPointError: features beyond float16, which only broken weights give.
        """
        return self.collect([self.forward(patches, compiled=self.prepare(compiled))])

    @torch.inference_mode()
    def forward(self, patches: np.ndarray, *, compiled: bool) -> Tensor:
        """Encode patches and leave the features on the device.

        Does as `encode`, but the features [N, d] stay on the device, whose work may not be done
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
        return torch.cat(outputs) if outputs else torch.empty((0, self.spec.width), device=self.spec.device)

    def collect(self, outputs: Iterable[Tensor]) -> np.ndarray:
        """Wait for the device and copy its features to memory.

        Returns what `forward` returned, as float16 [N, d].

        Raises:
            FloatingPointError: features beyond float16, which only broken weights give.
        """
        features = np.concatenate(
            [np.empty((0, self.spec.width), dtype=np.float16), *(output.half().cpu().numpy() for output in outputs)]
        )
        if not np.isfinite(features).all():
            raise FloatingPointError(
                f"{IMAGE_FLAG} {self.spec.source}: features beyond float16; these weights cannot be used"
            )
        return features

    def _forward(self, pixels: Tensor, compiled: bool) -> Tensor:
        if self.spec.device != "cpu":
            # From pinned memory the copy runs beside the batches before it.
            pixels = pixels.pin_memory().to(self.spec.device, non_blocking=True)
        # A view with channels second in memory order [N, s, s, 3] is what channels-last means: nothing is moved.
        values = pixels.permute(0, 3, 1, 2).float()
        return self._model_of(compiled)(normalise(values, self.spec.mean, self.spec.std))

    def _model_of(self, compiled: bool) -> nn.Module | CompiledModel:
        return self.model


def normalise(values: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Shift and scale pixels as in a model's training.

    float32 [N, 3, s, s] of 0 to 255 → (x / 255 - mean) / std, by colour.
    """
    if mean == std == HALVES:
        # The same to the last bit as ever: embeddings of before stay valid.
        return values / 127.5 - 1
    shift, scale = (
        torch.tensor(numbers, dtype=torch.float32, device=values.device).view(1, 3, 1, 1) for numbers in (mean, std)
    )
    return (values / 255 - shift) / scale


def load_weights(model: nn.Module, spec: ImageSpec) -> None:
    """Fill `model` in place with the weights that `spec` names.

    Raises:
        WeightsError: they cannot be had here, or are not those of the submission, or not of
            the spec's model.
    """
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
            f"{IMAGE_FLAG} {spec.source}: {path} lacks {len(missing)} of {spec.model}'s tensors, {missing[0]} "
            f"first. Name timm weights of {spec.model}, or the model of these: {MODEL_FLAG} NAME."
        )
    model.load_state_dict({name: tensors[name] for name in wanted}, strict=False)
