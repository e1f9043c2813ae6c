"""Every kind of photo that a catalog may hold, good, odd and broken: each outcome is right, and no
other row is lost.

Expected pixels are computed from the arrays that the photos are drawn from, not by the decoder.
"""

import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from camenn_model.encoders.protocol import ImageEncoder
from camenn_model.encoders.spec import ImageSpec
from camenn_model.hashing import content_key
from pipelines import cli
from pipelines.embed.handlers import EncodedImages, ImageChunk, ImageChunkHandler, OnDemand
from pipelines.inputs.photos import LIMITS, ImageDefect, decode_image
from pipelines.runs.manifest import read_latest
from schemas.catalog import CATALOG
from tests.support.encoder_sources import PROJECT, SHARED, minilm

# pytest takes away the filter that pipelines.inputs.photos sets; test_decode_image_warns_of_nothing runs with it.
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

SIDE = 75
REASONS = {"truncated_image", "corrupt_image", "not_an_image", "too_many_pixels", "unsupported_mode", "empty_image"}

# --- what the photos show: smooth, and different under every turn and reflection

Y, X = np.mgrid[0:SIDE, 0:SIDE]
COLOUR = np.stack([3 * X + 10, 3 * Y + 5, 250 - (X + Y) * 8 // 5], axis=-1).astype(np.uint8)
OTHER = 255 - COLOUR
ALPHA = (3 * X + 20).astype(np.uint8)
GREY = (2 * X + Y).astype(np.uint8)
GREY16 = ((Y * SIDE + X) * 11).astype(np.uint16)
BITS = ((X // 10 + Y // 25) % 2).astype(np.uint8)
INDEX = (X // 8 + 10 * (Y // 8)).astype(np.uint8)
PALETTE = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
WIDE = np.asarray(Image.fromarray(COLOUR).resize((80, 60)))
CLEAR = 37
"""Palette index, or grey, that is transparent."""


def grey(values: np.ndarray) -> np.ndarray:
    """[h, w] → [h, w, 3]"""
    return np.repeat(values[..., None], 3, axis=-1)


def over_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colours * share + 255 * (1 - share)


def cleared(colours: np.ndarray, where: np.ndarray) -> np.ndarray:
    return np.where(where[..., None], 255, colours)


def resized(colours: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(colours).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def top(colours: np.ndarray, rows: int) -> np.ndarray:
    """Only the first rows are compared."""
    expected = colours.astype(float)
    expected[rows:] = np.nan
    return expected


# --- files, by Pillow


def save(image: np.ndarray | Image.Image, format: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(sink, format, **options)
    return sink.getvalue()


def jpeg(image: np.ndarray | Image.Image = COLOUR, **options: Any) -> bytes:
    return save(image, "JPEG", **({"quality": 95, "subsampling": 0} | options))


def raw(mode: str, values: np.ndarray) -> Image.Image:
    return Image.frombytes(mode, values.shape[1::-1], values.astype(np.uint8).tobytes())


def paletted() -> Image.Image:
    image = Image.fromarray(INDEX)
    image.putpalette(PALETTE.tobytes())
    return image


def frames(format: str, first: np.ndarray | Image.Image = COLOUR, **options: Any) -> bytes:
    more = [Image.fromarray(OTHER), Image.fromarray(GREY).convert("RGB")]
    return save(first, format, save_all=True, append_images=more, duration=50, **options)


# --- files, by hand


def chunk(kind: bytes, data: bytes, broken: bool = False) -> bytes:
    """Of a PNG."""
    check = zlib.crc32(kind + data) ^ broken
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


def png(depth: int, colour: int, lines: bytes, before: bytes = b"", after: bytes = b"", **header: int) -> bytes:
    """`lines`: filter byte and samples of each row. `before`, `after`: chunks around the pixels."""
    size = struct.pack(">II", header.get("width", SIDE), header.get("height", SIDE))
    ihdr = chunk(b"IHDR", size + bytes([depth, colour, 0, 0, header.get("interlace", 0)]))
    return b"\x89PNG\r\n\x1a\n" + ihdr + before + chunk(b"IDAT", zlib.compress(lines)) + after + chunk(b"IEND", b"")


def lines8(values: np.ndarray) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in values)


def lines16(values: np.ndarray) -> bytes:
    return lines8(values.astype(">u2"))


def lines_packed(values: np.ndarray, depth: int) -> bytes:
    """Samples of 1, 2 or 4 bits."""
    bits = np.unpackbits(values[..., None], axis=-1)[..., 8 - depth :]
    return lines8(np.packbits(bits.reshape(len(values), -1), axis=1))


def adam7(values: np.ndarray) -> bytes:
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    return b"".join(lines8(np.ascontiguousarray(values[y::dy, x::dx])) for y, x, dy, dx in passes)


def colour_png(before: bytes = b"", after: bytes = b"", **header: int) -> bytes:
    return png(8, 2, lines8(COLOUR), before, after, **header)


def text(name: bytes, value: bytes = b"hello") -> bytes:
    return chunk(b"tEXt", name + b"\0" + value)


def directory(entries: list[tuple[int, int, int, bytes]], order: str = "<") -> bytes:
    """A TIFF's header and tags (tag, type, count, value), as in EXIF."""
    start = 8 + 2 + 12 * len(entries) + 4
    body, values = b"", b""
    for tag, kind, count, value in sorted(entries):
        body += struct.pack(order + "HHI", tag, kind, count)
        if len(value) <= 4:
            body += value.ljust(4, b"\0")
        else:
            body += struct.pack(order + "I", start + len(values))
            values += value
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(order + "IH", 8, len(entries)) + body + bytes(4) + values


def tiff(
    samples: bytes, photometric: int = 2, bits: tuple[int, ...] = (8, 8, 8), order: str = "<", **tags: Any
) -> bytes:
    """Uncompressed, one strip. `tags`: more=[...]; width=, height=, format= (of samples)."""

    def shorts(*values: int) -> bytes:
        return struct.pack(f"{order}{len(values)}H", *values)

    def longs(*values: int) -> bytes:
        return struct.pack(f"{order}{len(values)}I", *values)

    def tagged(offset: int) -> bytes:
        width, height = tags.get("width", SIDE), tags.get("height", SIDE)
        entries = [
            (256, 4, 1, longs(width)),
            (257, 4, 1, longs(height)),
            (258, 3, len(bits), shorts(*bits)),
            (259, 3, 1, shorts(1)),
            (262, 3, 1, shorts(photometric)),
            (273, 4, 1, longs(offset)),
            (277, 3, 1, shorts(len(bits))),
            (278, 4, 1, longs(height)),
            (279, 4, 1, longs(len(samples))),
            (339, 3, 1, shorts(tags.get("format", 1))),
            *tags.get("more", []),
        ]
        return directory(entries, order)

    return tagged(len(tagged(0))) + samples


def bmp(width: int = SIDE, height: int = SIDE, colours: np.ndarray = COLOUR) -> bytes:
    """24 bits; a negative height = the first row is the top one."""
    rows = np.pad(colours[..., ::-1].reshape(len(colours), -1), ((0, 0), (0, -3 * colours.shape[1] % 4)))
    body = (rows if height < 0 else rows[::-1]).tobytes()
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, len(body), 2835, 2835, 0, 0)
    return struct.pack("<2sIHHI", b"BM", 54 + len(body), 0, 0, 54) + info + body


def gif_header(screen: tuple[int, int], frame: tuple[int, int]) -> bytes:
    """Two colours, and pixels that end at once."""
    return (
        struct.pack("<6sHHBBB", b"GIF89a", *screen, 0x80, 0, 0)
        + bytes(6)
        + struct.pack("<BHHHHB", 0x2C, 0, 0, *frame, 0)
        + b"\2\2\x4c\1\0;"
    )


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    return b"Exif\0\0" + directory(list(entries))


def orientation(value: int) -> tuple[int, int, int, bytes]:
    return 274, 3, 1, struct.pack("<H", value)


STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda up: up,
    2: lambda up: up[:, ::-1],
    3: lambda up: up[::-1, ::-1],
    4: lambda up: up[::-1],
    5: lambda up: up.swapaxes(0, 1),
    6: lambda up: up.swapaxes(0, 1)[::-1],
    7: lambda up: up.swapaxes(0, 1)[::-1, ::-1],
    8: lambda up: up.swapaxes(0, 1)[:, ::-1],
}
"""EXIF orientation → how an upright photo is stored.

The orientation names the sides of the first row and column (EXIF 2.3, 4.6.4 A).
"""


def turned(format: str, value: int, **options: Any) -> bytes:
    tags = Image.Exif()
    tags[274] = value
    return save(np.ascontiguousarray(STORED[value](WIDE)), format, exif=tags, **options)


def turned_tiff(value: int) -> bytes:
    stored = STORED[value](WIDE)
    return tiff(stored.tobytes(), width=stored.shape[1], height=stored.shape[0], more=[orientation(value)])


def patched(data: bytes, marker: bytes, skip: int, new: bytes) -> bytes:
    """`new` in place of what lies `skip` bytes after the start of `marker`."""
    at = data.index(marker) + skip
    return data[:at] + new + data[at + len(new) :]


SOF, DHT, DQT, SOS = b"\xff\xc0", b"\xff\xc4", b"\xff\xdb", b"\xff\xda"


def without(data: bytes, marker: bytes) -> bytes:
    """A JPEG without the segments of one kind."""
    while (at := data.find(marker)) >= 0:
        data = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4]) :]
    return data


def scrambled_scan(data: bytes) -> bytes:
    """A JPEG whose Huffman codes are nonsense from three quarters of its pixels on."""
    start = data.index(SOS) + 14
    at = start + (len(data) - start) * 3 // 4
    return data[:at] + bytes([0x55, 0xAA, 0x33]) * ((len(data) - 2 - at) // 3) + b"\xff\xd9"


def split_icc(data: bytes) -> bytes:
    """A JPEG whose colour profile lacks a piece."""
    return data[:2] + b"\xff\xe2" + struct.pack(">H", 20) + b"ICC_PROFILE\0\1\3half" + data[2:]


def bits12(values: np.ndarray) -> bytes:
    pairs = values.reshape(-1, 2)
    return b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs.tolist())


# --- the table


@dataclass(frozen=True)
class Case:
    """One photo and its expected outcome."""

    make: Callable[[], bytes]
    expected: str | np.ndarray
    """The reason, or the pixels [75, 75, 3]; not a number = not compared"""
    tolerance: float = 0
    """Largest difference in any pixel, of 255"""
    size: tuple[int, int] = (SIDE, SIDE)
    """(width, height) of the original, upright"""


LOSSY = 6
"""JPEG of quality 95, or WebP and AVIF of 90 to 95, of a smooth photo."""
ROUNDED = 1
"""16 bits to 8, alpha, CMYK"""
TURNED = 2
"""Resized before it is turned, instead of after"""

CASES: dict[str, Case] = {}


def add(name: str, make: Callable[[], bytes], expected: str | np.ndarray = COLOUR, *more: Any) -> None:
    assert name not in CASES, name
    CASES[name] = Case(make, expected, *more)


# JPEG
add("plain.jpg", jpeg, COLOUR, LOSSY)
add("subsampled.jpg", lambda: jpeg(subsampling=2, quality=90), COLOUR, LOSSY)
add("progressive.jpg", lambda: jpeg(progressive=True), COLOUR, LOSSY)
add("grey.jpg", lambda: jpeg(GREY), grey(GREY), LOSSY)
add("restart_markers.jpg", lambda: jpeg(restart_marker_blocks=1), COLOUR, LOSSY)
add("garbage_after_end.jpg", lambda: jpeg() + b"<!-- served in 3 ms -->" * 99, COLOUR, LOSSY)
add("photo_after_end.jpg", lambda: jpeg() + jpeg(OTHER), COLOUR, LOSSY)
add("several_photos.mpo.jpg", lambda: frames("MPO", quality=95, subsampling=0), COLOUR, LOSSY)
add("fill_bytes.jpg", lambda: jpeg().replace(DQT, b"\xff\xff\xff\xdb", 1), COLOUR, LOSSY)
add("large.jpg", lambda: jpeg(COLOUR.repeat(20, 0).repeat(20, 1)), COLOUR, LOSSY, (1500, 1500))
add("one_pixel.jpg", lambda: jpeg(COLOUR[:1, :1]), np.broadcast_to(COLOUR[0, 0], COLOUR.shape), LOSSY, (1, 1))
add("cmyk.jpg", lambda: jpeg(raw("CMYK", np.dstack([255 - COLOUR, 0 * GREY]))), COLOUR, LOSSY)
add(
    "cmyk_black.jpg",
    lambda: jpeg(raw("CMYK", np.dstack([255 - COLOUR, GREY]))),
    COLOUR * (1 - GREY[..., None] / 255),
    LOSSY,
)
add("icc_garbage.jpg", lambda: jpeg(icc_profile=b"no profile"), COLOUR, LOSSY)
add("icc_piece_missing.jpg", lambda: split_icc(jpeg()), COLOUR, LOSSY)
# The codes before the nonsense are whole, and libjpeg goes on after it: only the top rows can be checked.
add("scrambled_scan.jpg", lambda: scrambled_scan(jpeg()), top(COLOUR, 40), LOSSY)
add(
    "end_marker_too_early.jpg",
    lambda: jpeg()[: len(jpeg()) * 3 // 4] + b"\xff\xd9",
    top(COLOUR, 40),
    LOSSY,
)
add("bad_huffman_table.jpg", lambda: patched(jpeg(), DHT, 5, b"\xff" * 16), "corrupt_image")
# As in the frames of a film: the standard tables count.
add("no_huffman_table.jpg", lambda: without(jpeg(), DHT), COLOUR, LOSSY)
add("no_quantisation_table.jpg", lambda: without(jpeg(), DQT), "corrupt_image")
add("no_size.jpg", lambda: without(jpeg(), SOF), "corrupt_image")
add("12_bit.jpg", lambda: patched(jpeg(), SOF, 4, b"\x0c"), "corrupt_image")
add("lossless_process.jpg", lambda: patched(jpeg(), SOF, 1, b"\xc3"), "corrupt_image")
add("height_0.jpg", lambda: patched(jpeg(), SOF, 5, b"\0\0"), "corrupt_image")
add("height_65500.jpg", lambda: patched(jpeg(), SOF, 5, b"\xff\xdc\xff\xdc"), "too_many_pixels")
add("height_9000.jpg", lambda: patched(jpeg(), SOF, 5, struct.pack(">HH", 9000, 9000)), "too_many_pixels")

# EXIF
for value in range(1, 9):
    add(
        f"exif_{value}.jpg",
        partial(turned, "JPEG", value, quality=95, subsampling=0),
        resized(WIDE),
        LOSSY,
        (80, 60),
    )
    add(f"exif_{value}.tif", partial(turned_tiff, value), resized(WIDE), TURNED, (80, 60))
    add(f"exif_{value}.png", partial(turned, "PNG", value), resized(WIDE), TURNED, (80, 60))
add("exif_6.webp", lambda: turned("WEBP", 6, lossless=True), resized(WIDE), TURNED, (80, 60))
add("exif_6.avif", lambda: turned("AVIF", 6, quality=95, subsampling="4:4:4"), resized(WIDE), LOSSY, (80, 60))
for name, data in {
    "garbage": b"Exif\0\0MM\0*\xff\xff\xff\xff",
    "no_tiff": b"Exif\0\0hello, world",
    "empty": b"Exif\0\0",
    "cut_off": exif((270, 2, 40, b"x" * 40), orientation(1))[:-30],
    "loop": exif((34665, 4, 1, struct.pack("<I", 8)), (34853, 4, 1, struct.pack("<I", 8))),
    "4_billion_tags": exif((700, 1, 2**32 - 1, bytes(4))),
    "orientation_0": exif(orientation(0)),
    "orientation_9": exif(orientation(9)),
    "orientation_text": exif((274, 2, 2, b"6\0")),
    "orientation_6_of_0": exif((274, 5, 1, struct.pack("<II", 6, 0))),
    "resolution_0_of_0": exif((282, 5, 1, bytes(8)), (296, 3, 1, b"\2\0")),
}.items():
    add(f"exif_{name}.jpg", partial(jpeg, exif=data), COLOUR, LOSSY)

# PNG
add("plain.png", lambda: save(COLOUR, "PNG"))
add("interlaced.png", lambda: png(8, 2, adam7(COLOUR), interlace=1))
add("grey.png", lambda: save(GREY, "PNG"), grey(GREY))
add("1_bit.png", lambda: save(Image.fromarray(BITS.astype(bool)), "PNG"), grey(BITS * 255))
add("2_bit.png", lambda: png(2, 0, lines_packed(INDEX % 4, 2)), grey(INDEX % 4 * 85))
add("4_bit.png", lambda: png(4, 0, lines_packed(INDEX % 16, 4)), grey(INDEX % 16 * 17))
add("16_bit_grey.png", lambda: png(16, 0, lines16(GREY16)), grey(GREY16 / 257), ROUNDED)
add("16_bit.png", lambda: png(16, 2, lines16(COLOUR.astype(np.uint16) * 257)), COLOUR, ROUNDED)
add("palette.png", lambda: save(paletted(), "PNG"), PALETTE[INDEX])
add(
    "palette_too_short.png",
    lambda: png(8, 3, lines8(INDEX % 8), chunk(b"PLTE", PALETTE[:8].tobytes())),
    PALETTE[INDEX % 8],
)
add("alpha.png", lambda: save(np.dstack([COLOUR, ALPHA]), "PNG"), over_white(COLOUR, ALPHA), ROUNDED)
add("all_clear.png", lambda: save(np.dstack([COLOUR, 0 * ALPHA]), "PNG"), 0 * COLOUR + 255)
add("grey_alpha.png", lambda: save(np.dstack([GREY, ALPHA]), "PNG"), over_white(grey(GREY), ALPHA), ROUNDED)
add(
    "16_bit_alpha.png",
    lambda: png(16, 6, lines16(np.dstack([COLOUR, ALPHA]).astype(np.uint16) * 257)),
    over_white(COLOUR, ALPHA),
    ROUNDED,
)
add(
    "16_bit_grey_alpha.png",
    lambda: png(16, 4, lines16(np.dstack([GREY, ALPHA]).astype(np.uint16) * 257)),
    over_white(grey(GREY), ALPHA),
    ROUNDED,
)
add(
    "palette_clear_colour.png",
    lambda: save(paletted(), "PNG", transparency=CLEAR),
    cleared(PALETTE[INDEX], INDEX == CLEAR),
)
add(
    "palette_alpha.png",
    lambda: save(paletted(), "PNG", transparency=bytes(range(0, 200, 2))),
    over_white(PALETTE[INDEX], np.minimum(2 * INDEX.astype(int), 255)),
    ROUNDED,
)
for name, depth, colour, lines, clear, expected in (
    ("1_bit", 1, 0, lines_packed(BITS, 1), [0], cleared(grey(BITS * 255), BITS == 0)),
    ("2_bit", 2, 0, lines_packed(INDEX % 4, 2), [2], cleared(grey(INDEX % 4 * 85), INDEX % 4 == 2)),
    ("4_bit", 4, 0, lines_packed(INDEX % 16, 4), [9], cleared(grey(INDEX % 16 * 17), INDEX % 16 == 9)),
    ("8_bit", 8, 0, lines8(GREY), [CLEAR], cleared(grey(GREY), GREY == CLEAR)),
    ("16_bit", 16, 0, lines16(GREY16), [11 * CLEAR], cleared(grey(GREY16 / 257), GREY16 == 11 * CLEAR)),
    ("colour", 8, 2, lines8(COLOUR), COLOUR[9, 9], cleared(COLOUR, (COLOUR[9, 9] == COLOUR).all(axis=-1))),
    (
        "16_bit_colour",
        16,
        2,
        lines16(COLOUR.astype(np.uint16) * 256 + 7),
        COLOUR[9, 9].astype(int) * 256 + 7,
        cleared(COLOUR, (COLOUR[9, 9] == COLOUR).all(axis=-1)),
    ),
):
    clear_chunk = chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear))
    add(
        f"{name}_clear_colour.png",
        partial(png, depth, colour, lines, clear_chunk),
        expected,
        ROUNDED if depth == 16 else 0,
    )
add("animated.png", lambda: frames("PNG"))
add("animated_beside_the_photo.png", lambda: frames("PNG", default_image=True))
add("animation_of_no_frames.png", lambda: colour_png(chunk(b"acTL", bytes(8))))
add("icc_garbage.png", lambda: colour_png(chunk(b"iCCP", b"name\0\0no profile")))
add("icc_without_method.png", lambda: colour_png(chunk(b"iCCP", b"name\0")), "corrupt_image")
add("icc_without_method_after.png", lambda: colour_png(b"", chunk(b"iCCP", b"name\0")), "corrupt_image")
add("icc_bomb.png", lambda: colour_png(chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(5 << 20)))), "corrupt_image")
add("text_bomb.png", lambda: colour_png(chunk(b"zTXt", b"name\0\0" + zlib.compress(bytes(5 << 20)))), "corrupt_image")
add("pixels_bomb.png", lambda: png(8, 2, lines8(COLOUR) + bytes(50 << 20)))
for name in ("transparency", "xmp", "exif", "icc_profile", "Raw profile type exif", "XML:com.adobe.xmp"):
    add(f"text {name}.png", partial(colour_png, text(name.encode())))
    add(f"text {name} after.png", partial(colour_png, b"", text(name.encode())))
add("exif_garbage.png", lambda: colour_png(chunk(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff")))
add("short_gamma.png", lambda: colour_png(chunk(b"gAMA", b"")), "corrupt_image")
add("short_gamma_after.png", lambda: colour_png(b"", chunk(b"gAMA", b"")), "corrupt_image")
add("private_chunk.png", lambda: colour_png(chunk(b"vpAg", b"hello")))
add("bad_header_crc.png", lambda: patched(colour_png(), b"IHDR", 17, b"\0\0\0\0"), "corrupt_image")
add("bad_text_crc.png", lambda: colour_png(chunk(b"tEXt", b"a\0b", broken=True)), "corrupt_image")
add("bad_pixels_crc.png", lambda: patched(colour_png(), b"\0\0\0\0IEND", -4, b"\0\0\0\0"))
add("bad_pixels.png", lambda: patched(colour_png(), b"IDAT", 60, b"\xff" * 20), "corrupt_image")
add("bad_filter.png", lambda: png(8, 2, lines8(COLOUR).replace(b"\0", b"\x09", 1)), "corrupt_image")
add("no_pixels.png", lambda: colour_png().replace(b"IDAT", b"tEXt"), "corrupt_image")
add("width_0.png", lambda: colour_png(width=0), "corrupt_image")
add("height_0.png", lambda: colour_png(height=0), "corrupt_image")
add("3_bit.png", lambda: png(3, 2, lines8(COLOUR)), "corrupt_image")
add("8001_by_8000.png", lambda: colour_png(width=8001, height=8000), "too_many_pixels")
add("12000_by_12000.png", lambda: colour_png(width=12_000, height=12_000), "too_many_pixels")
add("60000_by_60000.png", lambda: colour_png(width=60_000, height=60_000), "too_many_pixels")
add("bomb.png", lambda: save(Image.new("1", (12_000, 10_000)), "PNG"), "too_many_pixels")

# GIF
add("plain.gif", lambda: save(paletted(), "GIF"), PALETTE[INDEX])
add("not_interlaced.gif", lambda: save(paletted(), "GIF", interlace=0), PALETTE[INDEX])
add("grey.gif", lambda: save(GREY, "GIF"), grey(GREY))
add("clear_colour.gif", lambda: save(paletted(), "GIF", transparency=CLEAR), cleared(PALETTE[INDEX], INDEX == CLEAR))
add("animated.gif", lambda: frames("GIF", paletted(), loop=0), PALETTE[INDEX])
add("no_trailer.gif", lambda: save(paletted(), "GIF")[:-1], PALETTE[INDEX])
add("garbage_after_end.gif", lambda: save(paletted(), "GIF") + b"hello", PALETTE[INDEX])
add("size_0.gif", lambda: gif_header((0, 0), (0, 0)), "corrupt_image")
add("20000_by_20000.gif", lambda: gif_header((20_000, 20_000), (1, 1)), "too_many_pixels")
add("large_frame.gif", lambda: gif_header((10, 10), (9_000, 9_000)), "too_many_pixels")
add("larger_frame.gif", lambda: gif_header((10, 10), (60_000, 60_000)), "too_many_pixels")

# WebP and AVIF
add("lossless.webp", lambda: save(COLOUR, "WEBP", lossless=True))
add("lossy.webp", lambda: save(COLOUR, "WEBP", quality=95), COLOUR, LOSSY + 4)
add("alpha.webp", lambda: save(np.dstack([COLOUR, ALPHA]), "WEBP", lossless=True), over_white(COLOUR, ALPHA), ROUNDED)
add("animated.webp", lambda: frames("WEBP", lossless=True))
add("icc_garbage.webp", lambda: save(COLOUR, "WEBP", lossless=True, icc_profile=b"no profile"))
add("garbage_after_end.webp", lambda: save(COLOUR, "WEBP", lossless=True) + b"hello")
add("bad_pixels.webp", lambda: patched(save(COLOUR, "WEBP", quality=95), b"VP8 ", 18, b"\xff" * 60), "corrupt_image")
add("plain.avif", lambda: save(COLOUR, "AVIF", quality=95, subsampling="4:4:4"), COLOUR, LOSSY)
add(
    "alpha.avif",
    lambda: save(np.dstack([COLOUR, ALPHA]), "AVIF", quality=95, subsampling="4:4:4"),
    over_white(COLOUR, ALPHA),
    LOSSY,
)

# BMP
add("plain.bmp", bmp)
add("top_down.bmp", lambda: bmp(height=-SIDE))
add("palette.bmp", lambda: save(paletted(), "BMP"), PALETTE[INDEX])
add("1_bit.bmp", lambda: save(Image.fromarray(BITS.astype(bool)), "BMP"), grey(BITS * 255))
add("width_0.bmp", lambda: bmp(width=0), "not_an_image")
add("30000_by_30000.bmp", lambda: bmp(width=30_000, height=30_000), "too_many_pixels")
add("negative_height_bomb.bmp", lambda: bmp(width=30_000, height=-30_000), "too_many_pixels")

# TIFF
COLOURS = COLOUR.tobytes()
XMP = b"<x>hello</x>"
add("plain.tif", lambda: tiff(COLOURS))
add("big_endian.tif", lambda: tiff(COLOURS, order=">"))
for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
    add(f"{compression}.tif", partial(save, COLOUR, "TIFF", compression=compression))
add("jpeg_inside.tif", lambda: save(COLOUR, "TIFF", compression="jpeg", quality=95), COLOUR, LOSSY)
add("big.tif", lambda: save(COLOUR, "TIFF", big_tiff=True))
add("fax.tif", lambda: save(Image.fromarray(BITS.astype(bool)), "TIFF", compression="group4"), grey(BITS * 255))
add("several_pages.tif", lambda: frames("TIFF"))
add("grey_0_is_white.tif", lambda: tiff((255 - GREY).tobytes(), 0, (8,)), grey(GREY))
add("16_bit.tif", lambda: tiff(GREY16.tobytes(), 1, (16,)), grey(GREY16 / 257), ROUNDED)
add("16_bit_big_endian.tif", lambda: tiff(GREY16.astype(">u2").tobytes(), 1, (16,), ">"), grey(GREY16 / 257), ROUNDED)
add("16_bit_0_is_white.tif", lambda: tiff((65535 - GREY16).tobytes(), 0, (16,)), grey(GREY16 / 257), ROUNDED)
add(
    "12_bit.tif",
    lambda: tiff(bits12(GREY.repeat(2, axis=1).astype(int) * 16), 1, (12,), width=2 * SIDE),
    resized(grey(GREY.repeat(2, axis=1))),
    ROUNDED + 1,
    (2 * SIDE, SIDE),
)
add("16_bit_colour.tif", lambda: tiff((COLOUR.astype(np.uint16) * 257).tobytes(), 2, (16, 16, 16)), COLOUR, ROUNDED)
add(
    "alpha.tif",
    lambda: tiff(np.dstack([COLOUR, ALPHA]).tobytes(), 2, (8,) * 4, more=[(338, 3, 1, b"\2\0")]),
    over_white(COLOUR, ALPHA),
    ROUNDED,
)
add(
    "palette_alpha.tif",
    lambda: tiff(
        np.dstack([INDEX, ALPHA]).tobytes(),
        3,
        (8, 8),
        more=[(338, 3, 1, b"\2\0"), (320, 3, 768, (PALETTE.T.astype("<u2") * 257).tobytes())],
    ),
    over_white(PALETTE[INDEX], ALPHA),
    ROUNDED,
)
add("cmyk.tif", lambda: tiff(np.dstack([255 - COLOUR, 0 * GREY]).tobytes(), 5, (8,) * 4), COLOUR, ROUNDED)
add("float.tif", lambda: tiff(GREY.astype("<f4").tobytes(), 1, (32,), format=3), "unsupported_mode")
add("32_bit.tif", lambda: tiff((GREY.astype("<u4") << 20).tobytes(), 1, (32,)), "unsupported_mode")
add("signed.tif", lambda: tiff((GREY.astype("<i2") - 200).tobytes(), 1, (16,), format=2), "unsupported_mode")
add("lab.tif", lambda: save(Image.fromarray(COLOUR).convert("LAB"), "TIFF"), "unsupported_mode")
add("unknown_tag.tif", lambda: tiff(COLOURS, more=[(65000, 99, 1, b"abcd")]))
add("two_widths.tif", lambda: patched(tiff(COLOURS), struct.pack("<HHI", 256, 4, 1), 4, struct.pack("<I", 1)))
add("icc_garbage.tif", lambda: tiff(COLOURS, more=[(34675, 7, 10, b"no profile")]))
for kind, name in ((1, "bytes"), (2, "text"), (3, "numbers"), (7, "undefined")):
    add(f"xmp_as_{name}.tif", partial(tiff, COLOURS, more=[(700, kind, len(XMP) // (1 + (kind == 3)), XMP)]))
add("exif_far_away.tif", lambda: tiff(COLOURS, more=[(34665, 4, 1, struct.pack("<I", 1 << 30))]))
add("exif_text.tif", lambda: tiff(COLOURS, more=[(34665, 2, 4, b"abc\0")]))
add("two_gps.tif", lambda: tiff(COLOURS, more=[(34853, 3, 2, b"abcd")]))
add("orientation_9.tif", lambda: tiff(COLOURS, more=[orientation(9)]))
add("width_0.tif", lambda: tiff(COLOURS, width=0), "corrupt_image")
add("no_colours.tif", lambda: tiff(COLOURS, photometric=77), "corrupt_image")
add("bomb.tif", lambda: save(Image.new("1", (9_000, 9_000)), "TIFF", compression="group4"), "too_many_pixels")
add("100000_by_100000.tif", lambda: tiff(COLOURS, width=100_000, height=100_000), "too_many_pixels")

# Other names than the contents'
add("jpeg.png", lambda: jpeg(quality=94), COLOUR, LOSSY)
add("png.jpg", lambda: save(COLOUR, "PNG", compress_level=1))
add("gif.webp", lambda: save(paletted(), "GIF", comment=b"a"), PALETTE[INDEX])
add("no_extension", lambda: jpeg(quality=93), COLOUR, LOSSY)
add("фото яблок №1 (100%).JPG", lambda: jpeg(quality=96), COLOUR, LOSSY)

# No photos
for name, data in {
    "html.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "text.jpg": b"apples, red, 1 kg\n",
    "json.jpg": b'{"error": "no such photo"}',
    "zip.jpg": b"PK\3\4\x14\0\0\0\x08\0" + bytes(90),
    "gzip.jpg": b"\x1f\x8b\x08\0" + bytes(90),
    "pdf.jpg": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n",
    "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 75 75\n",
    "svg.jpg": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="75" height="75"/>',
    "mp4.jpg": b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(90),
    "heic.jpg": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(90),
    "heif.jpg": b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(90),
    "photoshop.jpg": b"8BPS\0\1" + bytes(90),
    "icon.jpg": b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0" + bytes(90),
    "wave.jpg": b"RIFF\x64\0\0\0WAVEfmt " + bytes(90),
    "zeros.jpg": bytes(5000),
    "noise.jpg": random.Random(0).randbytes(5000),
    "line_before.jpg": b"\r\n" + jpeg(),
    "ppm.jpg": save(COLOUR, "PPM"),
}.items():
    add(name, partial(bytes, data), "not_an_image")
add("empty.jpg", lambda: b"", "empty_image")
add("too_large.jpg", lambda: jpeg() + bytes(LIMITS.bytes), "too_many_bytes")

# Cut off: (bytes left, or a share of all of them)
CUTS: dict[str, tuple[Callable[[], bytes], list[float]]] = {
    "jpg": (lambda: jpeg(comment=b"cut"), [3, 10, 21, 100, 300, 0.4, 0.5, 0.75, 0.9, -10, -2, -1]),
    "progressive.jpg": (lambda: jpeg(progressive=True, comment=b"cut"), [0.4, 0.5, 0.75, -50, -2]),
    "png": (lambda: save(COLOUR, "PNG", compress_level=0), [8, 13, 20, 30, 33, 40, 60, 0.25, 0.5, 0.75, -99]),
    "gif": (lambda: save(paletted(), "GIF", comment=b"cut"), [6, 8, 13, 20, 100, 0.5, 0.75, 0.9, -8]),
    "webp": (lambda: save(COLOUR, "WEBP", quality=90), [20, 40, 100, 0.5, 0.75, -1]),
    "lossless.webp": (lambda: save(OTHER, "WEBP", lossless=True), [20, 40, 0.5, -1]),
    "bmp": (lambda: bmp(colours=OTHER), [20, 40, 60, 0.25, 0.5, 0.75, -20]),
    "tif": (lambda: tiff(OTHER.tobytes()), [6, 8, 20, 60, 100, 0.25, 0.5, 0.75, -1]),
    # The tags are at the end.
    "lzw.tif": (lambda: save(OTHER, "TIFF", compression="tiff_lzw"), [8, 0.25, 0.5, 0.75, -1]),
    "avif": (lambda: save(OTHER, "AVIF", quality=90), [0.75, -20, -1]),
}


def cut(make: Callable[[], bytes], place: float) -> bytes:
    whole = make()
    return whole[: int(place * len(whole)) if 0 < place < 1 else int(place)]


for name, (make, places) in CUTS.items():
    for place in places:
        add(
            f"cut_at_{place}.{name}",
            partial(cut, make, place),
            "truncated_image",
        )
# At the marker of the scan; the file is not recognized as a photo before its signature is complete.
add("cut_at_scan.jpg", lambda: jpeg()[: jpeg().index(SOS)], "truncated_image")
add("cut_in_signature.jpg", lambda: jpeg()[:2], "not_an_image")
add("cut_in_signature.png", lambda: save(COLOUR, "PNG")[:6], "not_an_image")
# All pixels are there; only the end mark is not.
add("cut_at_end_mark.png", lambda: save(COLOUR, "PNG", compress_level=2)[:-12])

GOOD = {name: case for name, case in CASES.items() if not isinstance(case.expected, str)}


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    return {name: case.make() for name, case in CASES.items()}


# --- 1: one photo


@pytest.mark.parametrize("name", CASES)
def test_decode_image_of_every_kind(name: str, contents: dict[str, bytes]) -> None:
    case = CASES[name]
    if isinstance(case.expected, str):
        with pytest.raises(ImageDefect) as caught:
            decode_image(contents[name], SIDE)
        assert caught.value.reason == case.expected, caught.value.detail
        assert "Upload" in caught.value.detail or "Save" in caught.value.detail
        # The same words in every run: they are stored.
        assert "0x" not in caught.value.detail
        return
    image = decode_image(contents[name], SIDE)
    assert image.pixels.shape == (SIDE, SIDE, 3) and image.pixels.dtype == np.uint8
    assert (image.width, image.height) == case.size
    worst = float(np.nanmax(np.abs(image.pixels.astype(float) - case.expected)))
    assert worst <= case.tolerance


DECODE = """
import pickle, sys
from pipelines.inputs.photos import ImageDefect, decode_image
outcomes = []
for data in pickle.load(sys.stdin.buffer):
    try:
        outcomes.append(decode_image(data, 75).pixels.tobytes())
    except ImageDefect as defect:
        outcomes.append(defect.reason)
pickle.dump(outcomes, sys.stdout.buffer)
"""


def test_decode_image_warns_of_nothing(contents: dict[str, bytes]) -> None:
    """Where warnings are errors, every photo has the same outcome."""
    tables = [contents[name] for name in CASES]
    command = [sys.executable, "-W", "error", "-c", DECODE]
    done = subprocess.run(command, input=pickle.dumps(tables), capture_output=True, cwd=PROJECT, timeout=120)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    for name, outcome in zip(CASES, pickle.loads(done.stdout), strict=True):
        expected = CASES[name].expected
        if isinstance(expected, str):
            assert outcome == expected, name
        else:
            assert outcome == decode_image(contents[name], SIDE).pixels.tobytes(), name


# --- 2: one chunk

SPEC = replace(
    ImageSpec.resolve("random:0", grid=1, patch_size=SIDE, device="cpu", precision="auto"),
    batch_size=16,
)


@pytest.fixture(scope="module")
def encoder() -> OnDemand[ImageEncoder]:
    return ImageChunkHandler(SPEC, torch_threads=1).load_model()


def encode(encoder: OnDemand[ImageEncoder], photos: list[tuple[str, str | None, bytes | None]]) -> EncodedImages:
    keys, uris, data = [key for key, _, _ in photos], [uri for _, uri, _ in photos], [given for _, _, given in photos]
    (encoded,) = ImageChunkHandler(SPEC).run_inference([ImageChunk("chunk", keys, uris, data)], encoder)
    return encoded


def test_chunk_of_every_kind_loses_no_photo(
    contents: dict[str, bytes], encoder: OnDemand[ImageEncoder], tmp_path: Path
) -> None:
    """Every second photo in a file, the others inline; some files are not what they were."""
    outcomes = {content_key(contents[name]): CASES[name] for name in CASES}
    photos: dict[str, tuple[str, str | None, bytes | None]] = {}
    for place, (name, data) in enumerate(contents.items()):
        key = content_key(data)
        if place % 2:
            photos[key] = (key, None, data)
        else:
            (tmp_path / name).write_bytes(data)
            photos[key] = (key, str(tmp_path / name), None)
    (tmp_path / "directory.jpg").mkdir()
    (tmp_path / "changed.jpg").write_bytes(jpeg(OTHER))
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    gone = {
        "directory.jpg": "not_a_file",
        "dangling.jpg": "missing_image",
        "vanished.jpg": "missing_image",
        "plain.jpg/below_a_file.jpg": "missing_image",
        "changed.jpg": "changed_image",
    }
    if os.geteuid():
        (tmp_path / "forbidden.jpg").write_bytes(jpeg(OTHER))
        (tmp_path / "forbidden.jpg").chmod(0)
        gone["forbidden.jpg"] = "missing_image"
    everything = [*photos.values(), *((f"gone-{name}", str(tmp_path / name), None) for name in gone)]
    random.Random(0).shuffle(everything)

    encoded = encode(encoder, everything)

    found = [*encoded.keys, *(key for key, _, _ in encoded.defects), *(key for key, _, _ in encoded.unread)]
    assert sorted(found) == sorted(key for key, _, _ in everything)
    assert {key: reason for key, reason, _ in encoded.defects} == {
        key: case.expected for key, case in outcomes.items() if isinstance(case.expected, str)
    }
    assert {key: reason for key, reason, _ in encoded.unread} == {f"gone-{name}": gone[name] for name in gone}
    assert [(w, h) for w, h in zip(encoded.width, encoded.height, strict=True)] == [
        outcomes[key].size for key in encoded.keys
    ]
    good = encode(encoder, [photos[key] for key in encoded.keys])
    assert good.keys == encoded.keys and not good.defects and not good.unread
    assert encoded.embeddings.tobytes() == good.embeddings.tobytes()
    assert np.isfinite(encoded.embeddings).all() and encoded.embeddings.any(axis=(1, 2)).all()


# --- 3: one catalog


def write_catalog(data: Path, rows: list[dict[str, Any]]) -> None:
    columns = [name for name in CATALOG.names if name not in ("product_key", "store_id")]
    pq.write_table(
        pa.table(
            {name: pa.array([row.get(name) for row in rows], CATALOG.schema.field(name).type) for name in columns}
        ),
        data / "catalog.parquet",
    )


def add_path_faults(root: Path, outside: Path) -> dict[str, str | None]:
    """Photos with a wrong location: image_uri → reason; None = it is read."""
    outside.mkdir()
    (outside / "photo.jpg").write_bytes(jpeg(OTHER))
    (root / "directory.jpg").mkdir()
    (root / "out.jpg").symlink_to(outside / "photo.jpg")
    (root / "out").symlink_to(outside)
    (root / "inside.jpg").symlink_to(root / "plain.jpg")
    (root / "dangling.jpg").symlink_to(root / "nowhere.jpg")
    (root / "circle.jpg").symlink_to(root / "circle.jpg")
    faults: dict[str, str | None] = {
        "directory.jpg": "not_a_file",
        "out.jpg": "outside_root",
        "out/photo.jpg": "outside_root",
        "../outside/photo.jpg": "outside_root",
        str(outside / "photo.jpg"): "outside_root",
        "dangling.jpg": "missing_image",
        "vanished.jpg": "missing_image",
        "circle.jpg": "unreadable_image",
        "plain.jpg/below_a_file.jpg": "unreadable_image",
        "n" * 300 + ".jpg": "unreadable_image",
        "nul\0.jpg": "malformed_uri",
        "https://example.com/photo.jpg": "unsupported_scheme",
        "data:image/png;base64,AAAA": "unsupported_scheme",
        "inside.jpg": None,
        "   ": None,
    }
    if os.geteuid():
        (root / "forbidden.jpg").write_bytes(jpeg(OTHER))
        (root / "forbidden.jpg").chmod(0)
        faults["forbidden.jpg"] = "unreadable_image"
    return faults


def test_embed_of_every_kind_keeps_every_row(
    contents: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, store = tmp_path / "data", tmp_path / "store"
    data.mkdir()
    rows: list[dict[str, Any]] = []
    expected: dict[str, str] = {}

    def list_item(item: str, reason: str | None, **photo: Any) -> None:
        rows.append({"item_id": item, "title": "apples", **photo})
        if reason is not None:
            expected[f"catalog:{item}"] = reason

    for name, case in CASES.items():
        (data / name).write_bytes(contents[name])
        reason = case.expected if isinstance(case.expected, str) else None
        list_item(f"file-{name}", reason, image_uri=name)
        list_item(f"inline-{name}", reason, image_bytes=contents[name])
    for place, (uri, reason) in enumerate(add_path_faults(data, tmp_path / "outside").items()):
        list_item(f"path-{place}", reason, image_uri=uri)
    list_item("none", None)
    random.Random(0).shuffle(rows)
    write_catalog(data, rows)

    flags = ["--data", str(data), "--store", str(store), "--text_encoder", minilm(), "--image_weights", "random:0"]
    assert cli.main(["embed", *flags, "--grid", "1", "--max_tokens", "8", "--json"]) == 0

    summary = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    manifest = read_latest(str(store))
    assert manifest is not None
    items, defects, embeddings = (
        [row for path in manifest.paths(table) for row in pq.ParquetFile(path).read().to_pylist()]
        for table in ("items", "defects", "image_embeddings")
    )
    assert summary["rows_in"] == summary["rows_out"] == len(rows) and summary["rejected"] == 0
    assert Counter(row["item_id"] for row in items) == Counter(row["item_id"] for row in rows)
    assert len(defects) == summary["defects"] == len(expected)
    assert {row["key"]: row["reason"] for row in defects} == expected
    keys = {row["item_id"]: row["image_key"] for row in items}
    for name in GOOD:
        assert keys[f"file-{name}"] == keys[f"inline-{name}"] == content_key(contents[name])
    assert keys["none"] is None
    sizes = {content_key(contents[name]): case.size for name, case in GOOD.items()}
    assert {row["image_key"]: (row["width"], row["height"]) for row in embeddings} == sizes
    assert len(embeddings) == summary["encoded_images"] == len(sizes)


# --- 4: photos with random damage


def real_jpegs() -> list[bytes]:
    """Photos of groceries where there are some, and drawn ones."""
    noisy = COLOUR.repeat(3, 0).repeat(3, 1) ^ np.random.default_rng(1).integers(0, 32, (225, 225, 3), dtype=np.uint8)
    drawn = [jpeg(noisy, quality=quality, subsampling=2) for quality in (30, 75, 95)]
    drawn += [jpeg(noisy, progressive=True), jpeg(noisy, restart_marker_blocks=4), turned("JPEG", 6)]
    found = sorted((SHARED / "grocery_photos" / "train").rglob("*.jpg"))
    return drawn + [path.read_bytes() for path in found[:: max(1, len(found) // 6)][:6]]


def damaged(chance: random.Random, photos: list[bytes]) -> bytes:
    data = bytearray(chance.choice(photos))
    for _ in range(chance.choice((1, 1, 2, 5))):
        # Half of the damage in the headers, which are a small part of the bytes.
        at = chance.randrange(min(len(data), 700) if chance.random() < 0.5 else len(data))
        length = chance.choice((1, 2, 16, 400))
        match chance.choice(("flip", "set", "cut", "drop", "double", "splice")):
            case "flip":
                data[at] ^= 1 << chance.randrange(8)
            case "set":
                data[at : at + length] = bytes([chance.choice((0, 1, 0x7F, 0xD9, 0xFF))]) * length
            case "cut":
                del data[max(at, 1) :]
            case "drop":
                del data[at : at + length]
            case "double":
                data[at:at] = data[at : at + length]
            case "splice":
                other = chance.choice(photos)
                start = chance.randrange(len(other))
                data[at:at] = other[start : start + length]
    return bytes(data)


def test_damaged_jpegs_are_photos_or_defects() -> None:
    chance, photos = random.Random(11), real_jpegs()
    outcomes: Counter[str] = Counter()
    for _ in range(600):
        data = damaged(chance, photos)
        try:
            image = decode_image(data, SIDE)
        except ImageDefect as defect:
            assert defect.reason in REASONS, defect
            outcomes[defect.reason] += 1
        else:
            assert image.pixels.shape == (SIDE, SIDE, 3) and image.pixels.dtype == np.uint8
            assert image.width * image.height <= LIMITS.pixels
            outcomes["photo"] += 1
    assert min(outcomes[kind] for kind in ("photo", "truncated_image", "corrupt_image")) > 50, outcomes
