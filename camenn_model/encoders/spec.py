"""Specifications of the encoders, resolved once at submission.

A spec tells where an encoder's weights lie, their hash, device, precision and fixed shapes.

Nothing here imports torch: a pipeline is built, and a store looked up by fingerprint, without
loading a model. Only timm can tell the facts of its own models: it is asked about those that have
no recipe in `image_models.py`. Workers build encoders from specs (`protocol.py`) and fail where
they cannot honour them.
"""

import hashlib
import json
from dataclasses import dataclass

from camenn_model.encoders.image_models import HALVES, INCEPTION_V4, PATCH_SIZE, choose_image_model, image_facts
from camenn_model.encoders.machine import resolve_device_precision
from camenn_model.encoders.text_models import (
    BERT,
    count_special_tokens,
    find_text_encoder,
    hash_config,
    hash_vocabulary,
    most_tokens,
    text_config,
    text_facts,
    text_width,
)
from camenn_model.encoders.weights import (
    IMAGE_FLAG,
    TEXT_FLAG,
    find_image_weights,
    hash_safetensors,
    image_config,
    random_seed,
)
from schemas.errors import InputError

IMAGE_PREPROCESSING, TITLE_PREPROCESSING = 2, 1
"""Raised when decoding, resizing and normalising, or title cleaning and tokenising, change what an encoder sees."""
CPU_BATCH, CUDA_BATCH = 128, 1024
"""Patches of `PATCH_SIZE` in a forward pass. On a CPU fewer of them read InceptionV4's weights (82 MB
in bf16) too often, more leave the caches; a GPU is idle with fewer.
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
    """A timm model on the patches of a photo.

    There are `grid` × `grid` patches of `patch_size` × `patch_size` px. What is not named is
    InceptionV4's, as in manifests from before there were other models.
    """

    grid: int
    patch_size: int
    batch_size: int = CPU_BATCH
    """patches in every forward pass, at least `LEAST_BATCH`; another one gives other last bits"""
    compile: str = "off"
    """on, off, or auto: where the photos of a run are enough to pay for compiling"""
    model: str = INCEPTION_V4
    """timm's name of the architecture"""
    width: int = 1536
    """features of a patch"""
    mean: tuple[float, ...] = HALVES
    std: tuple[float, ...] = HALVES
    """of red, green and blue, 0 to 1, as the weights were trained with"""
    named_model: str = ""
    """--image_model as the user gave it, '' = not given"""
    model_args: str = ""
    """JSON of what timm builds the model with, '' = nothing"""

    def __post_init__(self) -> None:
        if self.batch_size < LEAST_BATCH:
            raise ValueError(f"batch_size {self.batch_size}: must be at least {LEAST_BATCH} patches")

    @classmethod
    def resolve(
        cls,
        source: str,
        *,
        grid: int,
        patch_size: int | None = None,
        device: str,
        precision: str,
        compile: str = "off",
        model: str | None = None,
    ) -> "ImageSpec":
        """Find and hash the weights, settle everything else.

        `patch_size`: None = what suits the model. `model`: timm's name; None = what `config.json`
        beside the weights says, or InceptionV4.

        Raises:
            WeightsError: the weights cannot be had, or are not of that model.
            DeviceError: no such device.
            InputError: grid or patch size out of range, or nothing to compile.
        """
        if not 1 <= grid <= 16:
            raise InputError(f"--grid {grid}: must be between 1 and 16 patches per side.")
        seed = random_seed(source)
        path = find_image_weights(source) if seed is None else None
        config = image_config(source, path)
        named = choose_image_model(source, model, config)
        facts = image_facts(named, config, patch_size)
        name = named.partition(".")[0]
        if name != INCEPTION_V4:
            if compile == "on":
                raise InputError(f"--compile on: only {INCEPTION_V4} is compiled, not {name}. Leave it out.")
            compile = "off"
        # Random weights are hashed by what they are drawn from: settling them is arithmetic, whose last bits differ
        # between processors.
        drawn = f" arch {name} by {facts.drawn_by}" if facts.drawn_by else ""
        text = f"random:{seed} scheme {RANDOM_SCHEME}{drawn} patch {facts.patch_size}"
        weights = hashlib.sha256(text.encode()).hexdigest() if path is None else hash_safetensors(path, IMAGE_FLAG)
        device, precision = resolve_device_precision(device, precision)
        return cls(
            source=source,
            path=str(path.resolve()) if path else "",
            weights_hash=weights,
            device=device,
            precision=precision,
            grid=grid,
            patch_size=facts.patch_size,
            batch_size=_batch_size(name, device, facts.patch_size),
            compile=compile,
            model=name,
            named_model=model or "",
            width=facts.width,
            mean=facts.mean,
            std=facts.std,
            model_args=facts.model_args,
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
        return self.grid * self.grid, self.width

    @property
    def parts(self) -> dict[str, str | int]:
        """Return all that the fingerprint covers.

        These are model, weights, precision, patches and preprocessing. Kernels change last bits
        only, and are recorded with each file instead. Of what InceptionV4 has by default nothing is
        said, so that its stores stay valid.
        """
        mixed = self.precision == "bf16" and self.model == INCEPTION_V4
        parts: dict[str, str | int] = {
            "model": self.model,
            "weights": self.weights_hash,
            "precision": "bf16, two convolutions fp32" if mixed else self.precision,
            "grid": self.grid,
            "patch_size": self.patch_size,
            "preprocessing": IMAGE_PREPROCESSING,
        }
        if (self.mean, self.std) != (HALVES, HALVES):
            parts |= {"mean": str(list(self.mean)), "std": str(list(self.std))}
        if self.model_args:
            parts["model_args"] = self.model_args
        return parts

    def describe(self) -> str:
        """Return one line for a manifest or report."""
        text = super().describe()
        return text if self.model == INCEPTION_V4 else f"{self.model}: {text}"

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


def _batch_size(model: str, device: str, patch_size: int) -> int:
    """Choose the patches of a forward pass.

    Of InceptionV4 it was measured. Others get as many pixels, in powers of two.
    """
    batch = CPU_BATCH if device == "cpu" else CUDA_BATCH
    if model == INCEPTION_V4:
        return batch
    fitting = int(batch * (PATCH_SIZE / patch_size) ** 2)
    return max(LEAST_BATCH, min(batch, 2 ** (fitting.bit_length() - 1) if fitting else 0))


@dataclass(frozen=True, kw_only=True)
class TextSpec(EncoderSpec):
    """A text encoder on a title.

    It gives last hidden states of at most `max_tokens` tokens, special ones included. What is not
    named is BERT's, as in manifests from before there were other models.
    """

    vocabulary_hash: str
    width: int
    max_tokens: int
    tokens_per_batch: int = 512
    """titles of one length bucket × its length, in every forward pass"""
    model: str = BERT
    """`model_type` of its config.json"""
    config_hash: str = ""
    """of the other keys that change states, '' of BERT"""
    special_tokens: int = 2
    """tokens that are put around a title's own, such as [CLS] and [SEP]"""

    @classmethod
    def resolve(cls, source: str, *, max_tokens: int, device: str, precision: str = "auto") -> "TextSpec":
        """Find and hash the encoder, settle device and precision.

        Found and hashed are its weights and its vocabulary.

        Raises:
            WeightsError: the encoder cannot be had or is of no type that is read.
            DeviceError: no such device.
            InputError: max_tokens out of range.
        """
        path = find_text_encoder(source)
        config = text_config(path)
        facts = text_facts(source, config)
        model = config["model_type"]
        special = 2 if model == BERT else count_special_tokens(path)
        longest = most_tokens(facts, config)
        if not special < max_tokens <= longest:
            raise InputError(
                f"--max_tokens {max_tokens}: must be between {special + 1} (one token, and {special} special ones as "
                f"[CLS] and [SEP]) and {longest}, the most that {source} takes."
            )
        weights = hash_safetensors(path / "model.safetensors", TEXT_FLAG)
        device, precision = resolve_device_precision(device, precision)
        return cls(
            source=source,
            path=str(path.resolve()),
            weights_hash=weights,
            device=device,
            precision=precision,
            vocabulary_hash=hash_vocabulary(path, model),
            width=text_width(source, facts, config),
            max_tokens=max_tokens,
            model=model,
            config_hash="" if model == BERT else hash_config(config),
            special_tokens=special,
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
        parts: dict[str, str | int] = {
            "model": self.model,
            "weights": self.weights_hash,
            "vocabulary": self.vocabulary_hash,
            "precision": self.precision,
            "max_tokens": self.max_tokens,
            "preprocessing": TITLE_PREPROCESSING,
        }
        if self.config_hash:
            parts["config"] = self.config_hash
        return parts

    @property
    def kernels(self) -> str:
        """Name the kernels that compute the states.

        The name goes into a file's metadata. Other kernels give other last bits.
        """
        return f"eager-{self.device.split(':')[0]}-{self.precision}-tokens{self.tokens_per_batch}"
