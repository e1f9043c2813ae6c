"""Photos of products on a shelf.

Four visual factors can be read in them by eye and by a small network.

On the left stands a pack, full up to `fill`. Where it is empty, its checked liner shows. On the
right lie two cut faces of the product on plates. In front lie `pieces` pieces, each in a striped
paper cup, and beside them a yellow label or none. A share `browned` of the surface of all of the
product is brown and mouldy. Each factor is an area, and has a texture of its own that is the same
for every class. Neighbours, price tags, light and camera vary.
"""

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from simulator.classes import Look
from simulator.shapes import PACKED_SHAPES, draw_piece, texture_gain

_BROWN = np.array([58, 38, 20], dtype=np.float32)
_MOULD = np.float32(235)
_LABEL = (255, 214, 40)
"""Every label is of the same paper, whatever the class."""
_LINER = ((250, 250, 250, 255), (40, 70, 150, 255))
_CUP = ((250, 250, 250), (200, 20, 60))
_LABEL_BOX = (0.632, 0.503, 1.072, 1.117)
_FLOOR = 0.66
"""Where the plank begins, as a share of the height."""


def smooth_noise(size: tuple[int, int], cells: int, rng: np.random.Generator) -> np.ndarray:
    """Draw soft blobs, float32 [height, width].

    There are about `cells` across. `size` is (width, height).
    """
    coarse = (rng.random((cells, cells)) * 255).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), dtype=np.float32)


def brown_surface(image: Image.Image, surface: np.ndarray, share: float, rng: np.random.Generator) -> Image.Image:
    """Return `image` with a share of its surface browned.

    `share` (0 to 1) of `surface` (bool [height, width]) is turned brown, in blobs.
    """
    if share <= 0 or not surface.any():
        return image
    noise = smooth_noise(image.size, 16, rng)
    threshold = np.quantile(noise[surface], 1 - share)
    strength = np.clip((noise - threshold) / 10 + 0.5, 0, 1) * surface * 0.96
    pixels = np.asarray(image, dtype=np.float32)
    # Rot is mottled with specks of mould, and looks the same on every product.
    mottle = 0.55 + smooth_noise(image.size, 75, rng)[:, :, None] / 255.0
    mould = (smooth_noise(image.size, 90, rng) > 175)[:, :, None]
    browned = pixels + strength[:, :, None] * (np.where(mould, _MOULD, _BROWN * mottle) - pixels)
    return Image.fromarray(np.clip(browned, 0, 255).astype(np.uint8))


def _shelf(size: int, rng: np.random.Generator) -> Image.Image:
    """Draw wall, plank and price rail.

    Neighbours are out of focus.
    """
    wall = rng.integers(178, 200) + rng.integers(-4, 5, size=3)
    # The background is drawn small and enlarged: that is what puts it out of focus.
    small = max(8, size // 6)
    gradient = np.linspace(0.82, 1.08, small, dtype=np.float32)[:, None, None]
    image = Image.fromarray(np.clip(np.ones((small, small, 1)) * gradient * wall, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for side in (0, 1):
        for _ in range(rng.integers(1, 4)):
            width, height = rng.uniform(0.06, 0.2), rng.uniform(0.15, 0.5)
            centre = rng.uniform(-0.02, 0.12) if side == 0 else rng.uniform(0.88, 1.02)
            colour = tuple(int(c) for c in rng.integers(100, 180, size=1) + rng.integers(-20, 21, size=3))
            box = tuple(v * small for v in (centre - width / 2, _FLOOR - height, centre + width / 2, _FLOOR + 0.02))
            if rng.random() < 0.5:
                draw.rectangle(box, fill=colour)
            else:
                draw.ellipse(box, fill=colour)
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    floor = round(_FLOOR * size)
    wood = rng.integers(0, 3)
    plank = ((196, 190, 180), (198, 194, 184), (192, 188, 180))[wood]
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


def _pack(look: Look, fill: float, size: int, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Draw the pack and what is in it.

    Returns (RGBA layer of the pack and what is in it, its contents' mask "L").
    """
    left, right = round(0.03 * size), round(0.60 * size)
    top, bottom = round(0.05 * size), round(0.68 * size)
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
    y_HW, x_HW = np.mgrid[0:size, 0:size] // max(3, round(size / 33))
    checks = np.array(_LINER, dtype=np.uint8)[(x_HW + y_HW) % 2]
    layer.paste(Image.fromarray(checks, "RGBA"), mask=inside)
    layer.paste(body, mask=below)
    draw = ImageDraw.Draw(layer)
    draw.line([*outline, outline[0]], fill=(*look.accent, 255), width=max(2, size // 60))
    if look.container in ("jar", "bottle"):
        lid = (outline[0][0] - 2, top - 0.03 * size, outline[1][0] + 2, top + 0.04 * size)
        draw.rectangle(lid, fill=(*look.accent, 255))
    return layer, below


def paper_label(layer: Image.Image, look: Look, box: tuple[int, int, int, int], rng: np.random.Generator) -> None:
    """Stick a yellow label into the middle of `box`.

    It has a barcode and a coloured foot.
    """
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    x0 = round(left + (0.2 + rng.uniform(-0.05, 0.05)) * width)
    y0 = round(top + (0.34 + rng.uniform(-0.05, 0.05)) * height)
    x1, y1 = round(x0 + 0.6 * width), round(y0 + 0.44 * height)
    draw = ImageDraw.Draw(layer)
    draw.rectangle((x0, y0, x1, y1), fill=_LABEL, outline=(40, 40, 40))
    draw.rectangle((x0 + 2, y0 + round(0.8 * (y1 - y0)), x1 - 2, y1 - 2), fill=look.accent)
    step = (x1 - x0) / 10
    for bar in range(1, 9):
        x = x0 + (bar + 0.3) * step
        y = y0 + 0.12 * (y1 - y0)
        draw.rectangle((x, y, x + rng.uniform(0.3, 0.6) * step, y0 + 0.68 * (y1 - y0)), fill=(20, 20, 20))


def _cut_faces(look: Look, size: int, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Draw the cut faces and their plates.

    Returns RGBA layers (plates, cut faces). They are as large for every class, so that a browned
    share is as large an area.
    """
    side = round(0.33 * size)
    y_SS, x_SS = np.mgrid[0:side, 0:side] / side - 0.5
    radius_SS = np.hypot(y_SS, x_SS)
    gain_SS = texture_gain(look.texture, side, rng) * (1.05 - 0.5 * radius_SS)
    rgb = np.clip(np.array(look.colour, dtype=np.float32) * gain_SS[:, :, None], 0, 255)
    face = Image.fromarray(np.dstack([rgb, 255 * (radius_SS < 0.49)]).astype(np.uint8), "RGBA")
    plates, faces = Image.new("RGBA", (size, size)), Image.new("RGBA", (size, size))
    draw = ImageDraw.Draw(plates)
    x, plate = 0.81 * size, 0.18 * size
    for y in (0.18 * size, 0.52 * size):
        box = (x - plate, y - plate, x + plate, y + plate)
        draw.ellipse(box, fill=(244, 244, 246), outline=(120, 130, 150), width=max(2, size // 100))
        faces.alpha_composite(face, (round(x - side / 2), max(0, round(y - side / 2))))
    return plates, faces


def _front_pieces(look: Look, count: int, size: int, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Draw the pieces in front and their cups.

    Returns RGBA layers (paper cups, pieces): `count` pieces, each in its striped cup, in rows of
    five on the plank.
    """
    cups, layer = Image.new("RGBA", (size, size)), Image.new("RGBA", (size, size))
    piece = draw_piece(look, max(12, round(0.085 * size)), rng)
    draw = ImageDraw.Draw(cups)
    radius = 0.07 * size
    spread = 8 if look.shape in PACKED_SHAPES else 28
    for number in range(count):
        row, place = divmod(number, 5)
        cx = (0.08 + 0.14 * place + 0.07 * row + rng.uniform(-0.01, 0.01)) * size
        cy = (0.765 + 0.125 * row + rng.uniform(-0.006, 0.006)) * size
        cup = (cx - radius, cy - 0.9 * radius, cx + radius, cy + 0.9 * radius)
        draw.ellipse(cup, fill=_CUP[0])
        for stripe in range(16):
            draw.pieslice(cup, 22.5 * stripe, 22.5 * stripe + 11.25, fill=_CUP[1])
        turned = piece.rotate(float(rng.uniform(-spread, spread)), resample=Image.Resampling.BILINEAR)
        spot = (round(cx - piece.width / 2), round(cy - piece.height / 2))
        layer.alpha_composite(turned, (max(0, spot[0]), max(0, spot[1])))
    return cups, layer


def _opaque(layer: Image.Image) -> np.ndarray:
    """Return where a layer hides what is under it.

    It is bool [height, width].
    """
    return np.asarray(layer)[:, :, 3] > 200


def _camera(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Apply a slightly different stand, light and sensor.

    They differ for every photo.
    """
    width, height = image.size
    zoom, angle = rng.uniform(0.94, 1.0), np.radians(rng.uniform(-2, 2))
    x0, y0 = rng.uniform(0, 1 - zoom) * width, rng.uniform(0, 1 - zoom) * height
    c, s = zoom * np.cos(angle), zoom * np.sin(angle)
    matrix = (c, s, x0 + zoom * width / 2 - (c + s) * width / 2, -s, c, y0 + zoom * height / 2 - (c - s) * height / 2)
    framed = image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR, fillcolor=(190, 188, 184)
    )
    across = np.linspace(-1, 1, width)[None, :, None]
    gain = rng.uniform(0.95, 1.05) * (1 + rng.uniform(-0.05, 0.05) * across) * rng.uniform(0.985, 1.015, size=3)
    noise = rng.integers(-5, 6, size=(height, width, 1), dtype=np.int8)
    pixels = np.asarray(framed, dtype=np.float32) * gain.astype(np.float32)
    pixels += noise
    return Image.fromarray(np.clip(pixels, 0, 255, out=pixels).astype(np.uint8))


def draw_photo(
    look: Look, *, browned: float, pieces: int, fill: float, label: bool, size: int, rng: np.random.Generator
) -> Image.Image:
    """Draw a photo, RGB [size, size].

    Shares are from 0 to 1, see the module's head.
    """
    image = _shelf(size, rng).convert("RGBA")
    pack, contents = _pack(look, fill, size, rng)
    plates, faces = _cut_faces(look, size, rng)
    cups, front = _front_pieces(look, pieces, size, rng)
    for layer in (pack, plates, faces, cups, front):
        image.alpha_composite(layer)
    if label:
        x0, y0, x1, y1 = (round(share * size) for share in _LABEL_BOX)
        paper_label(image, look, (x0, y0, x1, y1), rng)
    image = image.convert("RGB")
    in_pack = (np.asarray(contents) > 127) & (np.asarray(cups)[:, :, 3] == 0)
    # Each of the three has its share, so that a few pieces in a full pack are as informative as a
    # full row beside an empty one.
    for surface in (in_pack, _opaque(front), _opaque(faces)):
        image = brown_surface(image, surface, browned, rng)
    return _camera(image, rng)
