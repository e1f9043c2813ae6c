"""Corruption of photos and titles by careless stores.

It defines the rates and the kinds of corruption.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from simulator.config import CityConfig

CLEAN = "clean"
SWAPPED = "swapped"
IMAGE_SPOILS = ("blur", "downscaled", "dark", "occluded")
"""Corruptions of pixels. A swapped photo is another class's, unspoilt."""

TEXT_SPOILS = ("generic", "dropped", "typos")
"""Corruptions of words: naming nothing, attributes left out, misspelt. A swapped title is another class's, unspoilt."""


def store_rates(config: CityConfig, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw the stores' rates of corruption.

    Returns (small, rate). small is bool [stores], exactly `small_share` of them. rate is the
    probability, per modality, that a listing is spoilt, float64 [stores].
    """
    small = np.zeros(config.stores, dtype=bool)
    small[rng.permutation(config.stores)[: round(config.small_share * config.stores)]] = True
    rate = np.where(
        small, rng.beta(*config.small_beta, size=config.stores), rng.beta(*config.large_beta, size=config.stores)
    )
    return small, config.corruption * rate


def choose_corruption(
    rate: np.ndarray, spoils: tuple[str, ...], swap_share: float, rng: np.random.Generator
) -> np.ndarray:
    """Choose the corruption of each listing.

    It is CLEAN, SWAPPED or one of `spoils`: object array of str. `rate`: the listing's probability
    of any.
    """
    count = len(rate)
    kind = np.array(spoils, dtype=object)[rng.integers(len(spoils), size=count)]
    kind[rng.random(count) < swap_share] = SWAPPED
    kind[rng.random(count) >= rate] = CLEAN
    return kind


def other_class(class_id: np.ndarray, classes: int, rng: np.random.Generator) -> np.ndarray:
    """Draw another class for each class.

    It is uniform over the rest, int64.
    """
    return (class_id + rng.integers(1, classes, size=len(class_id))) % classes


def spoil_image(image: Image.Image, kind: str, rng: np.random.Generator) -> Image.Image:
    """Return a spoilt copy of `image`.

    `kind` is one of IMAGE_SPOILS, or CLEAN for the image itself.

    Raises:
        ValueError: an unknown kind.
    """
    width, height = image.size
    if kind == CLEAN:
        return image
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(width * rng.uniform(0.018, 0.03)))
    if kind == "downscaled":
        small = image.resize((max(1, width // 8), max(1, height // 8)), Image.Resampling.BOX)
        return small.resize((width, height), Image.Resampling.NEAREST)
    if kind == "dark":
        gain = rng.uniform(0.12, 0.25)
        return image.point([round(value * gain) for value in range(256)] * 3)
    if kind == "occluded":
        return _occlude(image, rng)
    raise ValueError(f"unknown corruption '{kind}'; one of {(CLEAN, *IMAGE_SPOILS)}")


def _occlude(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Cover part of the picture with a plain card.

    The card covers 45 to 60 % of the picture from one side, at an angle.
    """
    width, height = image.size
    card = image.copy()
    draw = ImageDraw.Draw(card)
    share, slant = rng.uniform(0.45, 0.6), rng.uniform(-0.12, 0.12)
    colour = tuple(int(c) for c in rng.integers(60, 215, size=3))
    if rng.random() < 0.5:
        top, bottom = (share + slant) * width, (share - slant) * width
        shape = [(0.0, 0.0), (top, 0.0), (bottom, float(height)), (0.0, float(height))]
        if rng.random() < 0.5:
            shape = [(width - x, y) for x, y in shape]
    else:
        left, right = (1 - share + slant) * height, (1 - share - slant) * height
        shape = [(0.0, left), (float(width), right), (float(width), float(height)), (0.0, float(height))]
    draw.polygon(shape, fill=colour)
    return card
