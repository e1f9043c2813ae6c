"""The registry of image encoders.

It has what a spec must know of each, and the class that builds it. InceptionV4 has a recipe of its
own. Every other name is one of timm's, and its facts are asked of timm, which brings torch along:
it is imported by the functions alone. Models are built without memory, on torch's device `meta`,
and shapes alone go through them.
"""

import difflib
import json
from dataclasses import dataclass
from typing import Any

from camenn_model.encoders.weights import IMAGE_FLAG, MODEL_FLAG, WeightsError
from schemas.errors import InputError

INCEPTION_V4 = "inception_v4"
IMAGE_ENCODERS = {INCEPTION_V4: "inception_v4:InceptionV4Encoder"}
"""'module:Class' by architecture, of those with a recipe of their own."""
TIMM_ENCODER = "timm_encoder:TimmEncoder"
"""That of all others"""
HALVES = (0.5, 0.5, 0.5)
"""Mean and standard deviation of InceptionV4's weights: pixels of 0 to 255 become -1 to 1."""
PATCH_SIZE = 75
"""px, where a model takes patches of any size: the least that InceptionV4's strides leave something of."""
LEAST_PATCH_SIZE, MOST_PATCH_SIZE = 16, 299


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """The facts of an image encoder that its spec records."""

    width: int
    """features of a patch"""
    patch_size: int
    mean: tuple[float, ...] = HALVES
    std: tuple[float, ...] = HALVES
    model_args: str = ""
    """JSON of what timm builds the model with, '' = nothing"""
    drawn_by: str = ""
    """what draws random weights, where others than camenn do"""


def image_facts(model: str, config: dict[str, Any], patch_size: int | None) -> ImageFacts:
    """Find the facts of an image architecture.

    They are of InceptionV4, or of any other model that timm has: that needs timm, and with it
    torch.

    Args:
        model: name of timm's, with or without a tag of pretrained weights.
        config: timm's `config.json` beside the weights, {} = none. It overrides what timm has.
        patch_size: px; None = the model's own choice.

    Raises:
        WeightsError: timm has no such model, or it gives no features of patches.
        InputError: it takes no patches of that size.
    """
    if model.partition(".")[0] != INCEPTION_V4:
        return find_timm_facts(model, config, patch_size)
    patch_size = patch_size or PATCH_SIZE
    if not PATCH_SIZE <= patch_size <= MOST_PATCH_SIZE:
        raise InputError(
            f"--patch_size {patch_size}: must be between {PATCH_SIZE} px, the least InceptionV4 takes, and "
            f"{MOST_PATCH_SIZE} px."
        )
    mean, std = normalisation(config, HALVES, HALVES)
    return ImageFacts(width=1536, patch_size=patch_size, mean=mean, std=std)


def normalisation(
    config: dict[str, Any], mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Read mean and standard deviation of a `config.json`.

    They are those given where it has none.

    Raises:
        WeightsError: they are not three numbers, or cannot be divided by.
    """
    found = []
    given = pretrained_part(config)
    for name, default in (("mean", mean), ("std", std)):
        values = given.get(name) or default
        if not (
            isinstance(values, list | tuple) and len(values) == 3 and all(isinstance(v, int | float) for v in values)
        ):
            raise WeightsError(
                f"{IMAGE_FLAG}: config.json beside the weights has '{name}' {values!r}, which must be three numbers, "
                "one a colour. Correct it, or name other weights."
            )
        found.append(tuple(float(value) for value in values))
    if min(found[1]) <= 0:
        raise WeightsError(f"{IMAGE_FLAG}: config.json beside the weights has 'std' {found[1]}, which must be above 0.")
    return found[0], found[1]


def pretrained_part(config: dict[str, Any]) -> dict[str, Any]:
    """Return what `config.json` says of the weights.

    Early versions of timm wrote it beside the architecture, without a part of its own.
    """
    part = config.get("pretrained_cfg")
    return part if isinstance(part, dict) else config


def choose_image_model(source: str, named: str | None, config: dict[str, Any]) -> str:
    """Choose the architecture of image weights.

    It is the one `config.json` says, the one that is named, or InceptionV4.

    Raises:
        WeightsError: both say one, and they differ, or `config.json` is not timm's.
    """
    written = config.get("architecture")
    if config and not isinstance(written, str):
        if named is None:
            raise WeightsError(
                f"{IMAGE_FLAG} {source}: config.json beside the weights is not timm's: it has no 'architecture'. "
                f"Name the model: {MODEL_FLAG} NAME, as in timm.list_models()."
            )
        written = None
    if named is None:
        return str(written or INCEPTION_V4)
    if written is not None and written.split(".")[0] != named.split(".")[0]:
        raise WeightsError(
            f"{MODEL_FLAG} {named}: config.json beside {IMAGE_FLAG} {source} says that the weights are of "
            f"'{written}'. Leave {MODEL_FLAG} out, or name weights of {named}."
        )
    return named


def find_timm_facts(model: str, config: dict[str, Any], patch_size: int | None) -> ImageFacts:
    """Find a model's width, patch size, mean and standard deviation.

    Arguments and exceptions are those of `image_facts`. Without `patch_size`, the patches
    have the size of InceptionV4's where the model takes it, else the model's own.
    """
    import timm

    name = model.split(".")[0]
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise WeightsError(f"{MODEL_FLAG} {model}: timm {timm.__version__} has no such model{hint}")
    known = _pretrained_config(model)
    given = pretrained_part(config)
    arguments = _model_arguments(config)
    expected = known | {key: value for key, value in given.items() if value is not None}
    if expected["input_size"][0] != 3:
        raise WeightsError(
            f"{MODEL_FLAG} {model}: takes images of {expected['input_size'][0]} channels, and photos have 3. Name a "
            "model of colour photos."
        )
    own = _own_side(expected, arguments)
    mean, std = normalisation(config, known["mean"], known["std"])
    if patch_size is None:
        fixed = given.get("fixed_input_size", known["fixed_input_size"])
        sizes = [own] if fixed or arguments.get("img_size") else [PATCH_SIZE, own]
    else:
        sizes = [patch_size]
        most = max(MOST_PATCH_SIZE, own)
        if not LEAST_PATCH_SIZE <= patch_size <= most:
            raise InputError(
                f"--patch_size {patch_size}: must be between {LEAST_PATCH_SIZE} and {most} px for {model}."
            )
    for size in sizes:
        width, error = _measure_width(name, arguments, size)
        if width:
            return ImageFacts(
                width=width,
                patch_size=size,
                mean=mean,
                std=std,
                model_args=json.dumps(arguments, sort_keys=True) if arguments else "",
                drawn_by=f"timm {timm.__version__}",
            )
    raise InputError(
        f"--patch_size {sizes[-1]}: {model} gives no features of such patches (timm: {error}). "
        f"It was trained with --patch_size {own}."
    )


def _pretrained_config(model: str) -> dict[str, Any]:
    """Return what timm knows of a model's weights."""
    import timm

    name, _, tag = model.partition(".")
    tags = [line.partition(".")[2] for line in timm.list_pretrained(f"{name}.*")]
    if tag and tag not in tags:
        raise WeightsError(
            f"{MODEL_FLAG} {model}: timm {timm.__version__} knows no weights '{tag}' of {name}. Leave it out, or "
            f"name one of {', '.join(tags)}."
        )
    found = timm.get_pretrained_cfg(model)
    assert found is not None  # only where unregistered names are not allowed
    return found.to_dict()


def _model_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Return what `config.json` says a model is built with.

    timm writes all that its model was made with. What the classifier and training alone need is
    left out: it changes no feature.
    """
    written = config.get("model_args")
    if not isinstance(written, dict):
        return {}
    return {
        key: value for key, value in written.items() if key not in ("num_classes", "in_chans") and "drop" not in key
    }


def _own_side(known: dict[str, Any], arguments: dict[str, Any]) -> int:
    size = arguments.get("img_size") or known["input_size"][1:]
    return int(size if isinstance(size, int) else size[0])


def _measure_width(name: str, arguments: dict[str, Any], size: int) -> tuple[int, str]:
    """Return a model's features of a patch of that size.

    They are 0 where it takes none, with the reason. `num_features` is not asked: models with layers
    after their pooling, such as MobileNetV3, give more.
    """
    import timm
    import torch

    try:
        with torch.device("meta"), torch.inference_mode():
            model = timm.create_model(name, pretrained=False, num_classes=0, **arguments).eval()
            shape = model(torch.empty(2, 3, size, size)).shape
    except Exception as error:
        # Models refuse with whatever their layers raise: assertions, runtime errors, type errors of wrong arguments.
        return 0, str(error).split("\n")[0] or type(error).__name__
    if len(shape) != 2:
        return 0, f"features are {list(shape)}, not pooled"
    return int(shape[1]), ""
