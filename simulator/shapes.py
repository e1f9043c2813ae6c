"""Sprites of single pieces.

A sprite is one piece of a product, shaded and textured, as an RGBA picture.
"""

import math

import numpy as np
from PIL import Image, ImageDraw

from simulator.classes import Look

_OVERSAMPLE = 3
"""Masks are drawn this much larger and reduced, for smooth edges."""

Box = tuple[float, float, float, float]


def _ellipse(draw: ImageDraw.ImageDraw, size: int, box: Box, fill: int = 255) -> None:
    x0, y0, x1, y1 = (round(v * size) for v in box)
    draw.ellipse((x0, y0, x1, y1), fill=fill)


def _rounded(draw: ImageDraw.ImageDraw, size: int, box: Box, radius: float) -> None:
    x0, y0, x1, y1 = (round(v * size) for v in box)
    draw.rounded_rectangle((x0, y0, x1, y1), radius=round(radius * size), fill=255)


def _polygon(draw: ImageDraw.ImageDraw, size: int, points: list[tuple[float, float]]) -> None:
    draw.polygon([(x * size, y * size) for x, y in points], fill=255)


def _arc(cx: float, cy: float, rx: float, ry: float, start: float, end: float) -> list[tuple[float, float]]:
    angles = np.linspace(math.radians(start), math.radians(end), 24)
    return [(cx + rx * math.cos(t), cy + ry * math.sin(t)) for t in angles]


def _star(points: int, inner: float) -> list[tuple[float, float]]:
    out = []
    for i in range(2 * points):
        radius = 0.46 if i % 2 == 0 else 0.46 * inner
        angle = math.pi * i / points - math.pi / 2
        out.append((0.5 + radius * math.cos(angle), 0.5 + radius * math.sin(angle)))
    return out


_ELLIPSES: dict[str, list[Box]] = {
    "round": [(0.06, 0.08, 0.94, 0.94)],
    "biground": [(0.0, 0.02, 1.0, 0.98)],
    "oval": [(0.04, 0.2, 0.96, 0.82)],
    "egg": [(0.16, 0.06, 0.84, 0.96)],
    "bun": [(0.03, 0.25, 0.97, 0.9)],
    "berry": [(0.05, 0.1, 0.5, 0.55), (0.48, 0.08, 0.93, 0.53), (0.27, 0.45, 0.75, 0.93)],
    "bulb": [(0.1, 0.24, 0.9, 0.96), (0.4, 0.04, 0.6, 0.5)],
    "pepper": [(0.12, 0.14, 0.58, 0.92), (0.42, 0.14, 0.88, 0.92)],
    "drumstick": [(0.05, 0.05, 0.68, 0.64), (0.76, 0.76, 0.97, 0.97)],
    "steak": [(0.03, 0.12, 0.7, 0.86), (0.34, 0.26, 0.97, 0.9)],
    "fish": [(0.02, 0.28, 0.78, 0.74)],
    "pod": [(0.02, 0.36, 0.98, 0.64)],
    "leaf": [(0.22, 0.03, 0.78, 0.7), (0.05, 0.3, 0.55, 0.75), (0.45, 0.3, 0.95, 0.75)],
}

_POLYGONS: dict[str, list[list[tuple[float, float]]]] = {
    "crescent": [_arc(0.5, 0.2, 0.5, 0.62, 5, 175) + _arc(0.5, 0.12, 0.42, 0.36, 170, 10)],
    "cone": [[(0.3, 0.04), (0.7, 0.04), (0.76, 0.2), (0.53, 0.98), (0.47, 0.98), (0.24, 0.2)]],
    "wedge": [[(0.02, 0.8), (0.02, 0.5), (0.72, 0.2), (0.98, 0.46), (0.98, 0.8)]],
    "star": [_star(5, 0.5)],
    "stalk": [[(0.08 + s, 0.96), (0.3 + s, 0.04), (0.42 + s, 0.04), (0.2 + s, 0.96)] for s in (0.0, 0.22, 0.44)],
    "fish": [[(0.66, 0.5), (0.98, 0.24), (0.92, 0.5), (0.98, 0.78)]],
    "drumstick": [[(0.5, 0.62), (0.62, 0.5), (0.95, 0.85), (0.85, 0.95)]],
    "leaf": [[(0.47, 0.6), (0.53, 0.6), (0.53, 0.98), (0.47, 0.98)]],
    "mushroom": [_arc(0.5, 0.52, 0.46, 0.44, 180, 360), [(0.36, 0.5), (0.64, 0.5), (0.68, 0.95), (0.32, 0.95)]],
    "carton": [[(0.22, 0.3), (0.34, 0.06), (0.66, 0.06), (0.78, 0.3), (0.78, 0.97), (0.22, 0.97)]],
}

_ROUNDED: dict[str, list[tuple[Box, float]]] = {
    "loaf": [((0.02, 0.26, 0.98, 0.86), 0.26)],
    "brick": [((0.06, 0.22, 0.94, 0.82), 0.05)],
    "tub": [((0.12, 0.2, 0.88, 0.92), 0.1)],
    "can": [((0.2, 0.06, 0.8, 0.96), 0.08)],
    "pet": [((0.28, 0.28, 0.72, 0.98), 0.1), ((0.41, 0.04, 0.59, 0.4), 0.04)],
}

SHAPES = tuple(sorted({*_ELLIPSES, *_POLYGONS, *_ROUNDED}))
PACKED_SHAPES = ("carton", "brick", "tub", "can", "pet")
"""Shapes that stand upright and carry a stripe of the class's accent colour."""


def piece_mask(shape: str, size: int) -> np.ndarray:
    """Draw a mask, float32 [size, size], 1 inside the piece.

    Raises:
        ValueError: an unknown shape.
    """
    if shape not in SHAPES:
        raise ValueError(f"unknown shape '{shape}'; one of {SHAPES}")
    big = size * _OVERSAMPLE
    mask = Image.new("L", (big, big))
    draw = ImageDraw.Draw(mask)
    for box in _ELLIPSES.get(shape, []):
        _ellipse(draw, big, box)
    for points in _POLYGONS.get(shape, []):
        _polygon(draw, big, points)
    for box, radius in _ROUNDED.get(shape, []):
        _rounded(draw, big, box, radius)
    return np.asarray(mask.resize((size, size), Image.Resampling.BOX), dtype=np.float32) / 255.0


def texture_gain(texture: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return a gain that multiplies the colour.

    It is float32 [size, size] around 1.

    Raises:
        ValueError: an unknown texture.
    """
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    if texture == "plain":
        return np.ones((size, size), dtype=np.float32)
    if texture == "speckle":
        coarse = Image.fromarray((rng.random((14, 14)) > 0.78).astype(np.uint8) * 255)
        dots = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / 255.0
        return 1.0 + 0.28 * dots
    if texture == "stripes":
        return (1.0 - 0.2 * (np.sin(34 * x + 4 * y) > 0.35)).astype(np.float32)
    if texture == "bands":
        return (1.0 - 0.2 * (np.sin(26 * y) > 0.3)).astype(np.float32)
    if texture == "gloss":
        return (1.0 + 0.5 * np.exp(-(((x - 0.36) / 0.09) ** 2) - ((y - 0.36) / 0.2) ** 2)).astype(np.float32)
    if texture == "net":
        return (1.0 - 0.22 * ((np.sin(30 * (x + y)) > 0.75) | (np.sin(30 * (x - y)) > 0.75))).astype(np.float32)
    raise ValueError(f"unknown texture '{texture}'")


def draw_piece(look: Look, size: int, rng: np.random.Generator) -> Image.Image:
    """Draw one piece as RGBA [size, size].

    It is colour × texture × light from the upper left.
    """
    mask = piece_mask(look.shape, size)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    light = 1.16 - 0.75 * np.hypot(x - 0.38, y - 0.34) ** 1.5
    gain = light * texture_gain(look.texture, size, rng)
    rgb = np.array(look.colour, dtype=np.float32) * gain[:, :, None]
    if look.shape in PACKED_SHAPES:
        band = ((y > 0.48) & (y < 0.66))[:, :, None]
        rgb = np.where(band, np.array(look.accent, dtype=np.float32) * light[:, :, None], rgb)
    # A darker rim parts the pieces of a heap.
    inner = np.asarray(Image.fromarray((mask * 255).astype(np.uint8)).resize((size - size // 8,) * 2), dtype=np.float32)
    edge = np.zeros_like(mask)
    start = size // 16
    edge[start : start + inner.shape[0], start : start + inner.shape[1]] = inner / 255.0
    rgb *= (0.72 + 0.28 * edge)[:, :, None]
    rgba = np.dstack([np.clip(rgb, 0, 255), mask * 255]).astype(np.uint8)
    return Image.fromarray(rgba, "RGBA")
