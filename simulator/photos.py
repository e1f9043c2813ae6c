"""The photo bank as JPEG files.

They are drawn, or adapted from a folder of real photos.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from schemas.errors import InputError
from simulator.catalog import PhotoBank
from simulator.classes import Look, ProductClass
from simulator.config import CityConfig
from simulator.corruption import spoil_image
from simulator.scene import brown_surface, draw_photo, paper_label

_JPEG_QUALITY = 88

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


def adapt_photo(
    image: Image.Image,
    *,
    browned: float,
    pieces: int,
    most_pieces: int,
    fill: float,
    label: bool,
    size: int,
    rng: np.random.Generator,
) -> Image.Image:
    """Adapt a real photo, RGB.

    It is cropped, lit, browned and labelled, RGB [size, size].

    `pieces`: the more, the wider the crop, so the more of them are visible. `fill`: the share of
    the picture that is lit, from the left. `browned`, `label`: as in a drawn photo, over the whole
    picture.
    """
    side = (0.4 + 0.6 * pieces / most_pieces) * min(image.size)
    x0 = rng.uniform(0, 1) * (image.width - side)
    y0 = rng.uniform(0, 1) * (image.height - side)
    framed = image.resize((size, size), Image.Resampling.BICUBIC, box=(x0, y0, x0 + side, y0 + side))
    framed = brown_surface(framed, np.ones((size, size), dtype=bool), browned, rng)
    if label:
        look = Look("round", "box", "plain", (0, 0, 0), (200, 60, 50))
        paper_label(framed, look, (0, 0, round(0.8 * size), round(0.8 * size)), rng)
    lit = np.clip((fill - np.linspace(0, 1, size, dtype=np.float32)) * 12 + 0.5, 0, 1)[None, :, None]
    pixels = np.asarray(framed, dtype=np.float32) * (0.45 + 0.55 * lit)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def make_photo(bank: PhotoBank, photo: int, classes: list[ProductClass], config: CityConfig) -> Image.Image:
    """Make picture number `photo` of the bank.

    It is spoilt where the bank says so, and has its own random stream.

    Raises:
        InputError: a photo of `config.photo_folder` cannot be read.
    """
    rng = np.random.default_rng([config.seed, 6, photo])
    product = classes[bank.class_id[photo]]
    browned, pieces = float(bank.browned[photo]), int(bank.pieces[photo])
    fill, label, size = float(bank.fill[photo]), bool(bank.label[photo]), config.photo_pixels
    if product.look is not None:
        image = draw_photo(product.look, browned=browned, pieces=pieces, fill=fill, label=label, size=size, rng=rng)
    else:
        path = product.files[int(bank.source[photo]) % len(product.files)]
        try:
            with Image.open(path) as opened:
                source = opened.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise InputError(f"simulate: {path} is not a readable photo ({error}); remove it from --photos") from error
        image = adapt_photo(
            source,
            browned=browned,
            pieces=pieces,
            most_pieces=config.most_pieces,
            fill=fill,
            label=label,
            size=size,
            rng=rng,
        )
    return spoil_image(image, str(bank.corruption[photo]), rng)


def write_photos(
    bank: PhotoBank, classes: list[ProductClass], config: CityConfig, out: Path, progress: Progress | None = None
) -> int:
    """Write every picture of the bank as JPEG.

    They lie under `out` (paths: `PhotoBank.uri`). Returns their number.
    """
    count = len(bank.class_id)
    (out / "images").mkdir(parents=True, exist_ok=True)
    for photo in range(count):
        make_photo(bank, photo, classes, config).save(out / bank.uri(photo), "JPEG", quality=_JPEG_QUALITY)
        if progress is not None:
            progress(photo + 1, count)
    return count
