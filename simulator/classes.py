"""Product classes.

A class has a noun, a look, and the latent vector z that photo and title both express.
"""

import colorsys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from schemas.errors import InputError
from simulator.class_table import CLASS_TABLE
from simulator.config import CityConfig

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png")
SUBCATEGORIES = 42
TEXTURES = ("plain", "speckle", "stripes", "bands", "gloss", "net")


@dataclass(frozen=True)
class Look:
    """The look of a drawn class.

    It has piece shape, container, texture, and RGB colours of the product and of its packaging.
    """

    shape: str
    container: str
    texture: str
    colour: tuple[int, int, int]
    accent: tuple[int, int, int]


@dataclass(frozen=True)
class ProductClass:
    """One thing that is sold.

    `look` is None and `files` holds its photos where photos come from a folder.
    """

    class_id: int
    noun: str
    category: str
    subcategory: str
    look: Look | None
    files: tuple[Path, ...] = ()


def _hex_colour(text: str) -> tuple[int, int, int]:
    return int(text[0:2], 16), int(text[2:4], 16), int(text[4:6], 16)


def drawn_classes(count: int) -> list[ProductClass]:
    """Take the first `count` classes of the table.

    They are spread evenly over the 42 subcategories.

    Raises:
        InputError: the table holds fewer.
    """
    columns: list[list[ProductClass]] = []
    lines = CLASS_TABLE.strip().splitlines()
    for row, (kind, nouns) in enumerate(zip(lines[::2], lines[1::2], strict=True)):
        category, subcategory, shape, container = kind.split(" | ")
        column = []
        for number, entry in enumerate(nouns.split(", ")):
            noun, colour = entry.split("=")
            # Golden-ratio steps keep the accents of neighbouring classes apart.
            hue = (0.618034 * (5 * row + number)) % 1.0
            accent = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.55, 0.8))
            texture = TEXTURES[(row + number) % len(TEXTURES)]
            look = Look(shape, container, texture, _hex_colour(colour), (accent[0], accent[1], accent[2]))
            column.append(ProductClass(0, noun, category, subcategory, look))
        columns.append(column)
    ordered = [column[number] for number in range(len(columns[0])) for column in columns]
    if count > len(ordered):
        raise InputError(f"simulate: classes is {count}, and {len(ordered)} can be drawn; lower it, or give --photos")
    return [ProductClass(i, c.noun, c.category, c.subcategory, c.look) for i, c in enumerate(ordered[:count])]


def folder_classes(folder: Path, count: int) -> list[ProductClass]:
    """Make one class per sub-folder of `folder` with photos.

    Such a sub-folder (at any depth) directly holds .jpg, .jpeg or .png files.

    There are at most `count`, in order of path. The class's noun is the sub-folder's name. Two or
    more consecutive classes share a subcategory, so that it stays coarse.

    Raises:
        InputError: no such folder, or fewer than two sub-folders with photos.
    """
    if not folder.is_dir():
        raise InputError(
            f"simulate: --photos {folder} is not a folder; give one with one sub-folder of photos per class"
        )
    by_folder: dict[Path, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in PHOTO_SUFFIXES and path.parent != folder:
            by_folder.setdefault(path.parent, []).append(path)
    found = sorted(by_folder.items())[:count]
    if len(found) < 2:
        raise InputError(f"simulate: --photos {folder} has {len(found)} sub-folders with photos; at least 2 are needed")
    groups = min(SUBCATEGORIES, len(found) // 2)
    classes = []
    for i, (path, files) in enumerate(found):
        parts = path.relative_to(folder).parts
        category = parts[0].lower() if len(parts) > 1 else "goods"
        noun = path.name.replace("-", " ").replace("_", " ").lower()
        group = i * groups // len(found)
        classes.append(ProductClass(i, noun, category, f"group {group:02d}", None, tuple(files)))
    return classes


def make_classes(config: CityConfig) -> list[ProductClass]:
    """Make the city's classes.

    They are drawn ones, or those of `config.photo_folder`.
    """
    if config.photo_folder is not None:
        return folder_classes(Path(config.photo_folder), config.classes)
    return drawn_classes(config.classes)


def class_vectors(classes: list[ProductClass], config: CityConfig, rng: np.random.Generator) -> np.ndarray:
    """Draw z of each class, float64 [classes, class_dims].

    It has unit variance. Classes of one subcategory share `group_share` of it.
    """
    names = sorted({c.subcategory for c in classes})
    group_ZD = rng.standard_normal((len(names), config.class_dims))
    own_CD = rng.standard_normal((len(classes), config.class_dims))
    index = [names.index(c.subcategory) for c in classes]
    return np.sqrt(config.group_share) * group_ZD[index] + np.sqrt(1.0 - config.group_share) * own_CD
