"""Specifications of the encoders, resolved once at submission.

A spec tells where an encoder's weights lie, their hash, device, precision and fixed shapes.

Nothing here imports torch: a pipeline is built, and a store looked up by fingerprint, without
loading a model. Workers build `ImageEncoder` and `TextEncoder` from a spec and fail where they
cannot honour it.
"""

import ctypes
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from camenn_model.encoders.weights import (
    IMAGE_FLAG,
    TEXT_FLAG,
    find_image_weights,
    find_text_encoder,
    hash_safetensors,
    hash_vocabulary,
    random_seed,
    text_config,
)
from schemas.errors import InputError

PRECISIONS = ("fp32", "bf16")
IMAGE_WIDTH = 1536
"""Features of one patch: InceptionV4's last feature map, averaged over its pixels."""
MIN_PATCH_SIZE = 75
"""px; InceptionV4's strides leave nothing of a smaller crop."""
IMAGE_PREPROCESSING, TITLE_PREPROCESSING = 2, 1
"""Raised when decoding, resizing and normalising, or title cleaning and tokenising, change what an encoder sees."""
CPU_BATCH, CUDA_BATCH = 128, 1024
"""Patches in a forward pass. On a CPU fewer of them read the weights (82 MB in bf16) too often,
more leave the caches; a GPU is idle with fewer.
"""
LEAST_BATCH = 16
"""Patches: torch gives a 1 × 1 convolution of fewer to another kernel where it has one thread than
where it has more, and last bits would depend on that.
"""
COMPILE_PAYS_AT = 200_000
"""Patches from which on compiled kernels save more than compiling takes.

Figures: docs/decisions/0013-embedding-throughput.md
"""
RANDOM_SCHEME = 1
"""Raised when `random:SEED` gives other weights for the same seed."""


class DeviceError(InputError):
    """A device or precision that a machine cannot honour.

    The machine cannot compute on the device, or in the precision, that the job was submitted with.
    """


def _has_cuda() -> bool:
    try:
        # Asking torch takes seconds for its import. Without the driver's library the answer is known.
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    import torch

    return torch.cuda.is_available()


@lru_cache(maxsize=1)
def has_native_bf16() -> bool:
    """Tell whether this machine's processor multiplies bf16 itself.

    That is by AMX or AVX-512 BF16. Elsewhere bf16 is slower than fp32.
    """
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and bool({"amx_bf16", "avx512_bf16"} & set(cpuinfo.read_text().split()))


def has_compiler() -> bool:
    """Tell whether torch can compile kernels for the CPU here."""
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "g++", "clang++"))


def resolve_device_precision(device: str, precision: str) -> tuple[str, str]:
    """Settle 'auto' of device and precision once, at submission.

    Returns ('cpu' | 'cuda' | 'cuda:N', 'fp32' | 'bf16'). A device that is named is not looked for
    here, as the workers may be other machines. They check it.

    Raises:
        DeviceError: no such device or precision.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise DeviceError(f"--device {device}: no such device. Use auto, cpu, cuda or cuda:N.")
    if precision not in ("auto", *PRECISIONS):
        raise DeviceError(f"--precision {precision}: no such precision. Use auto, {' or '.join(PRECISIONS)}.")
    if device == "auto":
        device = "cuda" if _has_cuda() else "cpu"
    if precision == "auto":
        precision = "bf16" if device != "cpu" or has_native_bf16() else "fp32"
    return device, precision


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """The part of a spec that both encoders have.

    All of it is plain values, so that a spec travels to workers and into a manifest.
    """

    source: str
    """as the user gave it: hub name, path or random:SEED"""
    path: str
    """where it lay at submission; '' for random weights"""
    weights_hash: str
    device: str
    precision: str

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of one content's embedding."""
        raise NotImplementedError

    @property
    def parts(self) -> dict[str, str | int]:
        """Return everything that changes an embedding, by name."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """Return 16 hex digits of the sha256 over `parts`.

        Embeddings of two equal ones may be mixed.
        """
        return hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()[:16]

    def describe(self) -> str:
        """Return one line for a manifest or report."""
        note = ", untrained weights" if self.source.startswith("random:") else ""
        return f"{self.source} ({self.precision}, weights {self.weights_hash[:12]}{note})"


@dataclass(frozen=True, kw_only=True)
class ImageSpec(EncoderSpec):
    """InceptionV4 on the patches of a photo.

    There are `grid` × `grid` patches of `patch_size` × `patch_size` px.
    """

    grid: int
    patch_size: int
    batch_size: int = CPU_BATCH
    """patches in every forward pass, at least `LEAST_BATCH`; another one gives other last bits"""
    compile: str = "off"
    """on, off, or auto: where the photos of a run are enough to pay for compiling"""

    def __post_init__(self) -> None:
        if self.batch_size < LEAST_BATCH:
            raise ValueError(f"batch_size {self.batch_size}: must be at least {LEAST_BATCH} patches")

    @classmethod
    def resolve(
        cls, source: str, *, grid: int, patch_size: int, device: str, precision: str, compile: str = "off"
    ) -> "ImageSpec":
        """Find and hash the weights, settle device and precision.

        Raises:
            WeightsError: the weights cannot be had.
            DeviceError: no such device.
            InputError: grid or patch size out of range.
        """
        if not 1 <= grid <= 16:
            raise InputError(f"--grid {grid}: must be between 1 and 16 patches per side.")
        if not MIN_PATCH_SIZE <= patch_size <= 299:
            raise InputError(
                f"--patch_size {patch_size}: must be between {MIN_PATCH_SIZE} px, the least InceptionV4 "
                "takes, and 299 px."
            )
        seed = random_seed(source)
        path = find_image_weights(source) if seed is None else None
        # Random weights are hashed by what they are drawn from: settling them is arithmetic, whose last bits differ
        # between processors.
        text = f"random:{seed} scheme {RANDOM_SCHEME} patch {patch_size}"
        weights = hashlib.sha256(text.encode()).hexdigest() if path is None else hash_safetensors(path, IMAGE_FLAG)
        device, precision = resolve_device_precision(device, precision)
        return cls(
            source=source,
            path=str(path.resolve()) if path else "",
            weights_hash=weights,
            device=device,
            precision=precision,
            grid=grid,
            patch_size=patch_size,
            batch_size=CPU_BATCH if device == "cpu" else CUDA_BATCH,
            compile=compile,
        )

    @property
    def side(self) -> int:
        """Return the side in px of a resized photo.

        A photo is resized to it before it is cut.
        """
        return self.grid * self.patch_size

    @property
    def shape(self) -> tuple[int, int]:
        """Return (patches of a photo, features of a patch)."""
        return self.grid * self.grid, IMAGE_WIDTH

    @property
    def parts(self) -> dict[str, str | int]:
        """Return all that the fingerprint covers.

        These are model, weights, precision, patches and preprocessing. Kernels change last bits
        only, and are recorded with each file instead.
        """
        return {
            "model": "inception_v4",
            "weights": self.weights_hash,
            "precision": "bf16, two convolutions fp32" if self.precision == "bf16" else self.precision,
            "grid": self.grid,
            "patch_size": self.patch_size,
            "preprocessing": IMAGE_PREPROCESSING,
        }

    def kernels(self, compiled: bool) -> str:
        """Name the kernels that compute the features.

        The name goes into a file's metadata. Other kernels give other last bits.
        """
        return (
            f"{'compiled' if compiled else 'eager'}-{self.device.split(':')[0]}-{self.precision}-batch{self.batch_size}"
        )

    def pays_to_compile(self, photos: int) -> bool:
        """Tell whether compiling saves more time than it takes.

        It is judged for so many photos.
        """
        return self.device == "cpu" and photos * self.shape[0] >= COMPILE_PAYS_AT


@dataclass(frozen=True, kw_only=True)
class TextSpec(EncoderSpec):
    """BERT on a title.

    It gives last hidden states of at most `max_tokens` tokens, [CLS] and [SEP] included.
    """

    vocabulary_hash: str
    width: int
    max_tokens: int
    tokens_per_batch: int = 512
    """titles of one length bucket × its length, in every forward pass"""

    @classmethod
    def resolve(cls, source: str, *, max_tokens: int, device: str, precision: str = "auto") -> "TextSpec":
        """Find and hash the encoder, settle device and precision.

        Found and hashed are its weights and its vocabulary.

        Raises:
            WeightsError: the encoder cannot be had or is no BERT.
            DeviceError: no such device.
            InputError: max_tokens out of range.
        """
        path = find_text_encoder(source)
        config = text_config(path)
        longest = min(config.get("max_position_embeddings", 512), 512)
        if not 3 <= max_tokens <= longest:
            raise InputError(
                f"--max_tokens {max_tokens}: must be between 3 ([CLS], one token, [SEP]) and {longest}, the "
                f"most that {source} takes."
            )
        weights = hash_safetensors(path / "model.safetensors", TEXT_FLAG)
        device, precision = resolve_device_precision(device, precision)
        return cls(
            source=source,
            path=str(path.resolve()),
            weights_hash=weights,
            device=device,
            precision=precision,
            vocabulary_hash=hash_vocabulary(path),
            width=config["hidden_size"],
            max_tokens=max_tokens,
        )

    @property
    def buckets(self) -> tuple[int, ...]:
        """Return the lengths to which titles are padded.

        They are 8, 16, 32, ... and `max_tokens`.
        """
        powers = [2**n for n in range(3, 9) if 2**n < self.max_tokens]
        return (*powers, self.max_tokens)

    def batch_size(self, bucket: int) -> int:
        """Return the titles in every forward pass of a bucket."""
        return max(1, self.tokens_per_batch // bucket)

    @property
    def shape(self) -> tuple[int, int]:
        """Return (tokens, features of a token)."""
        return self.max_tokens, self.width

    @property
    def parts(self) -> dict[str, str | int]:
        """Return all that the fingerprint covers.

        These are model, weights, vocabulary, precision, length and preprocessing.
        """
        return {
            "model": "bert",
            "weights": self.weights_hash,
            "vocabulary": self.vocabulary_hash,
            "precision": self.precision,
            "max_tokens": self.max_tokens,
            "preprocessing": TITLE_PREPROCESSING,
        }

    @property
    def kernels(self) -> str:
        """Name the kernels that compute the states.

        The name goes into a file's metadata. Other kernels give other last bits.
        """
        return f"eager-{self.device.split(':')[0]}-{self.precision}-tokens{self.tokens_per_batch}"
