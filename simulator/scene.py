"""Photos of products on a shelf, in which four visual factors can be read by eye.

A pack stands on a shelf; it is full up to `fill`, carries a label or none, and `pieces` pieces lie in front of it,
each in a paper cup. A share `browned` of the surface of all of the product is brown. Neighbours, price tags, light and camera vary.
"""

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from simulator.classes import Look
from simulator.shapes import PACKED_SHAPES, draw_piece

_BROWN = np.array([58, 38, 20], dtype=np.float32)
_LABEL = (255, 214, 40)
"""Every label is of the same paper, whatever the class."""
_FLOOR = 0.66
"""Where the plank begins, as a share of the height."""


def smooth_noise(size: tuple[int, int], cells: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [height, width] of soft blobs, about `cells` across; `size` is (width, height)."""
    coarse = (rng.random((cells, cells)) * 255).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), dtype=np.float32)


def brown_surface(image: Image.Image, surface: np.ndarray, share: float, rng: np.random.Generator) -> Image.Image:
    """`image` with `share` (0 to 1) of `surface` (bool [height, width]) turned brown, in blobs."""
    if share <= 0 or not surface.any():
        return image
    noise = smooth_noise(image.size, 16, rng)
    threshold = np.quantile(noise[surface], 1 - share)
    strength = np.clip((noise - threshold) / 10 + 0.5, 0, 1) * surface * 0.96
    pixels = np.asarray(image, dtype=np.float32)
    # Rot is mottled, and looks the same on every product.
    mottle = 0.55 + smooth_noise(image.size, 75, rng)[:, :, None] / 255.0
    browned = pixels + strength[:, :, None] * (_BROWN * mottle - pixels)
    return Image.fromarray(np.clip(browned, 0, 255).astype(np.uint8))


def _shelf(size: int, rng: np.random.Generator) -> Image.Image:
    """Wall, neighbours out of focus, a plank, and a price rail."""
    wall = rng.integers(150, 215) + rng.integers(-14, 15, size=3)
    # The background is drawn small and enlarged: that is what puts it out of focus.
    small = max(8, size // 6)
    gradient = np.linspace(0.82, 1.08, small, dtype=np.float32)[:, None, None]
    image = Image.fromarray(np.clip(np.ones((small, small, 1)) * gradient * wall, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for side in (0, 1):
        for _ in range(rng.integers(1, 4)):
            width, height = rng.uniform(0.06, 0.2), rng.uniform(0.15, 0.5)
            centre = rng.uniform(-0.02, 0.12) if side == 0 else rng.uniform(0.88, 1.02)
            colour = tuple(int(c) for c in rng.integers(60, 190, size=1) + rng.integers(-30, 31, size=3))
            box = tuple(v * small for v in (centre - width / 2, _FLOOR - height, centre + width / 2, _FLOOR + 0.02))
            if rng.random() < 0.5:
                draw.rectangle(box, fill=colour)
            else:
                draw.ellipse(box, fill=colour)
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    floor = round(_FLOOR * size)
    wood = rng.integers(0, 3)
    plank = ((196, 182, 160), (206, 206, 208), (178, 192, 198))[wood]
    draw.rectangle((0, floor, size, size), fill=plank)
    for _ in range(9):
        y = rng.uniform(floor, size)
        tone = tuple(int(c * rng.uniform(0.9, 1.0)) for c in plank)
        draw.line((0, y, size, y + rng.uniform(-0.02, 0.02) * size), fill=tone, width=max(1, size // 150))
    rail = round(0.945 * size)
    draw.rectangle((0, rail, size, size), fill=(226, 226, 222))
    tag = rng.uniform(0.1, 0.7) * size
    draw.rectangle((tag, rail + 2, tag + 0.18 * size, size - 2), fill=(252, 250, 200))
    draw.line((tag + 0.03 * size, (rail + size) / 2, tag + 0.12 * size, (rail + size) / 2), fill=(60, 60, 60), width=2)
    return image


_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "punnet": [(0.0, 0.0), (1.0, 0.0), (0.9, 1.0), (0.1, 1.0)],
    "crate": [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)],
    "bag": [
        (0.1, 0.0),
        (0.3, 0.06),
        (0.5, 0.0),
        (0.7, 0.06),
        (0.9, 0.0),
        (1.0, 0.9),
        (0.92, 1.0),
        (0.08, 1.0),
        (0.0, 0.9),
    ],
    "jar": [(0.16, 0.0), (0.84, 0.0), (0.84, 0.08), (0.94, 0.16), (0.94, 1.0), (0.06, 1.0), (0.06, 0.16), (0.16, 0.08)],
    "bottle": [
        (0.34, 0.0),
        (0.66, 0.0),
        (0.68, 0.1),
        (0.88, 0.24),
        (0.88, 1.0),
        (0.12, 1.0),
        (0.12, 0.24),
        (0.32, 0.1),
    ],
    "bowl": [(0.0, 0.1), (1.0, 0.1), (0.94, 0.55), (0.76, 1.0), (0.24, 1.0), (0.06, 0.55)],
    "box": [(0.04, 0.0), (0.96, 0.0), (1.0, 0.05), (1.0, 1.0), (0.0, 1.0), (0.0, 0.05)],
    "net": [
        (0.44, 0.0),
        (0.56, 0.0),
        (0.66, 0.1),
        (0.94, 0.4),
        (0.98, 0.8),
        (0.84, 1.0),
        (0.16, 1.0),
        (0.02, 0.8),
        (0.06, 0.4),
        (0.34, 0.1),
    ],
}

CONTAINERS = tuple(_OUTLINES)


def _pack(
    look: Look, fill: float, size: int, rng: np.random.Generator
) -> tuple[Image.Image, Image.Image, tuple[int, int, int, int]]:
    """(RGBA layer of the pack and what is in it, its contents' mask "L", box of the pack)."""
    left, right = round(0.19 * size), round(0.81 * size)
    top, bottom = round(0.07 * size), round(0.68 * size)
    width, height = right - left, bottom - top
    outline = [(left + x * width, top + y * height) for x, y in _OUTLINES[look.container]]
    inside = Image.new("L", (size, size))
    ImageDraw.Draw(inside).polygon(outline, fill=255)

    heap = Image.new("RGBA", (size, size))
    piece = draw_piece(look, max(12, round(0.17 * size)), rng)
    turns = [piece.rotate(float(angle), resample=Image.Resampling.BILINEAR) for angle in rng.uniform(-35, 35, size=8)]
    step = piece.width * 0.66
    level = bottom - fill * height * 0.94
    y = float(bottom)
    row = 0
    while y > level - 0.1 * step:
        for x in np.arange(left - step * (row % 2) / 2, right + step, step):
            spot = (round(x + rng.uniform(-0.1, 0.1) * step - piece.width / 2), round(y - piece.height / 2))
            heap.alpha_composite(turns[rng.integers(len(turns))], (max(0, spot[0]), max(0, spot[1])))
        y -= step * 0.8
        row += 1
    below = Image.new("L", (size, size))
    ImageDraw.Draw(below).rectangle((0, level, size, size), fill=255)
    below = ImageChops.multiply(below, inside)
    # Between the pieces of a heap are darker pieces.
    body = Image.new("RGBA", (size, size), (*(round(0.62 * c) for c in look.colour), 255))
    body.alpha_composite(heap)
    layer = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    # Ribbed see-through plastic, whatever the class: where the pack is empty, it shows.
    plastic = Image.new("RGBA", (size, size), (228, 236, 240, 245))
    ribs = ImageDraw.Draw(plastic)
    for x in range(0, size, max(4, size // 30)):
        ribs.line((x, 0, x, size), fill=(176, 190, 198, 255), width=max(1, size // 150))
    layer.paste(plastic, mask=inside)
    layer.paste(body, mask=below)
    draw = ImageDraw.Draw(layer)
    draw.line([*outline, outline[0]], fill=(*look.accent, 255), width=max(2, size // 60))
    if look.container == "crate":
        for share in (0.33, 0.66):
            y = top + share * height
            draw.line((left, y, right, y), fill=(*look.accent, 255), width=max(2, size // 60))
    if look.container in ("jar", "bottle"):
        lid = (outline[0][0] - 2, top - 0.03 * size, outline[1][0] + 2, top + 0.04 * size)
        draw.rectangle(lid, fill=(*look.accent, 255))
    return layer, below, (left, top, right, bottom)


def paper_label(
    layer: Image.Image, look: Look, box: tuple[int, int, int, int], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Stick a yellow label with a barcode and a coloured foot on the pack; returns its box."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    x0 = round(left + (0.2 + rng.uniform(-0.05, 0.05)) * width)
    y0 = round(top + (0.34 + rng.uniform(-0.05, 0.05)) * height)
    x1, y1 = round(x0 + 0.6 * width), round(y0 + 0.44 * height)
    draw = ImageDraw.Draw(layer)
    draw.rectangle((x0, y0, x1, y1), fill=_LABEL, outline=(40, 40, 40))
    draw.rectangle((x0 + 2, y0 + round(0.8 * (y1 - y0)), x1 - 2, y1 - 2), fill=look.accent)
    step = (x1 - x0) / 14
    for bar in range(1, 13):
        x = x0 + (bar + 0.3) * step
        y = y0 + 0.12 * (y1 - y0)
        draw.rectangle((x, y, x + rng.uniform(0.3, 0.6) * step, y0 + 0.68 * (y1 - y0)), fill=(20, 20, 20))
    return x0, y0, x1, y1


def _front_pieces(look: Look, count: int, size: int, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """RGBA layers (paper cups, pieces): `count` pieces, each in its cup, in up to two rows on the plank."""
    cups = Image.new("RGBA", (size, size))
    layer = Image.new("RGBA", (size, size))
    piece = draw_piece(look, max(12, round(0.15 * size)), rng)
    draw = ImageDraw.Draw(cups)
    radius = 0.092 * size
    back = count // 2 if count > 4 else 0
    for number, y in ((back, 0.72), (count - back, 0.86)):
        for i in range(number):
            x = 0.5 + (i - (number - 1) / 2) * 0.188 + rng.uniform(-0.012, 0.012)
            spread = 8 if look.shape in PACKED_SHAPES else 28
            turned = piece.rotate(float(rng.uniform(-spread, spread)), resample=Image.Resampling.BILINEAR)
            cx, cy = x * size, (y + rng.uniform(-0.008, 0.008)) * size
            cup = (cx - radius, cy - 0.85 * radius, cx + radius, cy + 0.85 * radius)
            draw.ellipse(cup, fill=(250, 250, 250), outline=(60, 70, 110), width=max(2, size // 75))
            spot = (round(cx - piece.width / 2), round(cy - piece.height / 2))
            layer.alpha_composite(turned, (max(0, spot[0]), max(0, spot[1])))
    return cups, layer


def _camera(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A slightly different stand, light and sensor for every photo."""
    width, height = image.size
    zoom, angle = rng.uniform(0.94, 1.0), np.radians(rng.uniform(-2, 2))
    x0, y0 = rng.uniform(0, 1 - zoom) * width, rng.uniform(0, 1 - zoom) * height
    c, s = zoom * np.cos(angle), zoom * np.sin(angle)
    matrix = (c, s, x0 + zoom * width / 2 - (c + s) * width / 2, -s, c, y0 + zoom * height / 2 - (c - s) * height / 2)
    framed = image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR, fillcolor=(190, 188, 184)
    )
    across = np.linspace(-1, 1, width)[None, :, None]
    gain = rng.uniform(0.9, 1.1) * (1 + rng.uniform(-0.1, 0.1) * across) * rng.uniform(0.97, 1.03, size=3)
    noise = rng.integers(-5, 6, size=(height, width, 1), dtype=np.int8)
    pixels = np.asarray(framed, dtype=np.float32) * gain.astype(np.float32)
    pixels += noise
    return Image.fromarray(np.clip(pixels, 0, 255, out=pixels).astype(np.uint8))


def draw_photo(
    look: Look, *, browned: float, pieces: int, fill: float, label: bool, size: int, rng: np.random.Generator
) -> Image.Image:
    """A drawn photo, RGB [size, size]: shares from 0 to 1; see the module's head."""
    image = _shelf(size, rng)
    pack, contents, box = _pack(look, fill, size, rng)
    surface = np.asarray(contents) > 127
    if label:
        x0, y0, x1, y1 = paper_label(pack, look, box, rng)
        surface = surface.copy()
        surface[y0 : y1 + 1, x0 : x1 + 1] = False
    cups, front = _front_pieces(look, pieces, size, rng)
    image = image.convert("RGBA")
    image.alpha_composite(pack)
    image.alpha_composite(cups)
    image.alpha_composite(front)
    surface = (surface & (np.asarray(cups)[:, :, 3] == 0)) | (np.asarray(front)[:, :, 3] > 200)
    return _camera(brown_surface(image.convert("RGB"), surface, browned, rng), rng)
