"""Photos as arrays: decoding, grid patches and quality.

All are pure functions. A fault of a photo is a value with a reason.
"""

import re
import struct
import warnings
import zlib
from dataclasses import dataclass
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from schemas.reasons import Reason

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Formats that are tried. The rarer ones of Pillow are left closed."""

# Pillow loads the decoders of WebP, TIFF and AVIF only on request, and does not know them by name before.
Image.init()

# Pillow warns of odd tags and large sizes, and names no photo: noise in the logs, and an exception
# under python -W error.
warnings.filterwarnings("ignore", module=r"PIL\.")

# First bytes that only photos have: a file that begins so and cannot be opened is a broken photo,
# not another kind of file.
_SIGNATURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|II[*+]\0|MM\0[*+]|....ftypavi[fs]", re.DOTALL
)

_QUALITY_SIDE = 256
"""px. Photos are compared in sharpness at one size."""

# What Pillow's decoders raise on bytes that are broken, never on good ones: tags of the wrong type or number included.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    TypeError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)

_OPAQUE = ("RGB", "L", "P", "1")
"""Modes of pixels that may have one transparent colour beside them."""

_FOUND: dict[str, tuple[type, ...]] = {"transparency": (int, bytes, tuple), "xmp": (bytes,)}
"""Keys that are read from `Image.info`, and their types."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → the turn that undoes it."""


class Defect(ValueError):
    """A reason why something cannot be used.

    It has a short, stable `reason`, and `detail` for a person.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["Defect"], tuple[Reason, str]]:
        return type(self), (self.reason, self.detail)


class ImageDefect(Defect):
    """A photo that cannot be used.

    `reason`: empty_image, too_many_bytes, too_many_pixels, not_an_image, truncated_image,
    corrupt_image or unsupported_mode. `detail`: what was found and what to do, for a person. The
    caller prefixes the address.
    """


@dataclass(frozen=True)
class Limits:
    """Limits that are checked before a single pixel is decoded."""

    bytes: int = 32 * 2**20
    pixels: int = 64_000_000


LIMITS = Limits()


class DecodedImage(NamedTuple):
    """A photo, upright, in RGB, resized."""

    pixels: np.ndarray
    """uint8 [side, side, 3]"""
    width: int
    """of the original, upright, px"""
    height: int
    """of the original, upright, px"""


class ImageQuality(NamedTuple):
    """Quality figures of a photo, independent of what it shows."""

    blur: float
    """variance of the Laplacian of the grey photo at 256 × 256 px, values 0 to 255. Low = blurred

    (Pech-Pacheco et al. 2000)."""
    luminance: float
    """mean, 0 = black to 1 = white (Rec. 601)"""
    width: int
    """of the original, px"""
    height: int
    """of the original, px"""


# --- decoding


def decode_image(data: bytes, side: int, limits: Limits = LIMITS) -> DecodedImage:
    """Decode a photo into RGB of side × side px.

    It is turned upright, converted to RGB and resized (bicubic, antialiased, without keeping the
    aspect).

    The first frame of an animation is used. Transparency becomes white. JPEGs are decoded at a
    reduced scale where that suffices.

    Raises:
        ImageDefect: the bytes are beyond `limits`, which is checked before decoding, or no photo.
    """
    if not data:
        raise ImageDefect(Reason.EMPTY_IMAGE, "the photo has no bytes. Upload it again.")
    if len(data) > limits.bytes:
        raise ImageDefect(
            Reason.TOO_MANY_BYTES,
            f"the photo has {len(data):,} bytes, more than {limits.bytes:,}. Upload a smaller one.",
        )
    try:
        with _open(data) as image:
            width, height = image.size
            if width * height > limits.pixels:
                raise ImageDefect(
                    Reason.TOO_MANY_PIXELS,
                    f"the photo has {width} × {height} pixels, more than {limits.pixels:,}. Upload a smaller one.",
                )
            small = _decode(image, side)
            orientation = _orientation(image)
    except _BOMBS as error:
        raise ImageDefect(
            Reason.TOO_MANY_PIXELS, f"the photo unpacks to more than {limits.pixels:,} pixels. Upload a smaller one."
        ) from error
    if orientation in _TURNS:
        # The resized photo is square, so turning it after is the same and cheaper.
        small = np.asarray(Image.fromarray(small).transpose(_TURNS[orientation]))
    if orientation >= 5:
        width, height = height, width
    return DecodedImage(small, width, height)


class _Tape(BytesIO):
    """A file that remembers reads beyond its end.

    It records whether more bytes were requested than there are.
    """

    short = False

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.short = self.short or (size is not None and len(data) < size)
        return data


def _open(data: bytes) -> ImageFile.ImageFile:
    tape = _Tape(data)
    try:
        return Image.open(tape, formats=FORMATS)
    except _BROKEN as error:
        cause: Exception | str = error
        if isinstance(error, UnidentifiedImageError):
            if not _SIGNATURE.match(data):
                start = data[:16].decode("ascii", errors="replace")
                formats = ", ".join(FORMATS)
                raise ImageDefect(
                    Reason.NOT_AN_IMAGE,
                    f"the file starts with {start!r} and is none of {formats}. Upload the photo itself.",
                ) from error
            # Pillow's own message contains a memory address, which differs in every run.
            cause = "its header is broken or of a rare kind"
        # A WebP is read in one piece; its header gives its length.
        cut = data[:4] == b"RIFF" and len(data) < 8 + int.from_bytes(data[4:8], "little")
        raise _name_damage(cause, cut or tape.short) from error


def _decode(image: ImageFile.ImageFile, side: int) -> np.ndarray:
    """Decode the first frame, RGB, uint8 [side, side, 3]."""
    try:
        image.draft("RGB", (side, side))
        _drop_texts(image)
        _scale_clear_colour(image)
        image.load()
        _drop_texts(image)
    except _BROKEN as error:
        raise _name_damage(error) from error
    return resize(to_rgb(image), side)


def resize(image: Image.Image, side: int) -> np.ndarray:
    """Resize an RGB photo to uint8 [side, side, 3], bicubic.

    The method is torch's, which is Pillow's to two of 255 and takes a third of its time. It is
    antialiased.
    """
    import torch
    from torch.nn.functional import interpolate

    # As Pillow's `reducing_gap`: a far larger photo is first averaged down to no less than three times the target size.
    factors = tuple(max(1, int(pixels / side / 3)) for pixels in image.size)
    if max(factors) > 1:
        image = image.reduce((factors[0], factors[1]))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    with torch.inference_mode():
        small = interpolate(pixels.permute(2, 0, 1)[None], size=(side, side), mode="bicubic", antialias=True)
    return np.ascontiguousarray(small[0].permute(1, 2, 0).numpy())


def _drop_texts(image: Image.Image) -> None:
    # A PNG's text chunks, under whatever name, share a dict with the decoders' values and overwrite them.
    for name, types in _FOUND.items():
        if not isinstance(image.info.get(name, b""), types):
            del image.info[name]


def _scale_clear_colour(image: ImageFile.ImageFile) -> None:
    # Pillow unpacks a PNG's pixels to 8 bits, and leaves its transparent colour as it was stored.
    raw, clear = image.tile[0][3] if image.tile else None, image.info.get("transparency")
    if isinstance(clear, int) and raw in ("L;2", "L;4"):
        image.info["transparency"] = clear * (85 if raw == "L;2" else 17)
    elif isinstance(clear, tuple) and raw == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in clear)


def _name_damage(error: Exception | str, cut: bool = False) -> ImageDefect:
    if cut or isinstance(error, EOFError) or "truncat" in str(error).lower():
        return ImageDefect(Reason.TRUNCATED_IMAGE, f"the photo is cut off ({error}). Upload it again.")
    return ImageDefect(Reason.CORRUPT_IMAGE, f"the photo cannot be decoded ({error}). Upload it again.")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any photo's mode to RGB.

    16 bits a channel are scaled to 8, and transparency is laid over white.

    Raises:
        ImageDefect: unsupported_mode, for values whose range is not known (floats, 32-bit integers)
            or colour spaces Pillow cannot convert.
    """
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit values at 255 instead of scaling them.
        values = np.asarray(image)
        if values.min() >= 0 and values.max() <= 65535:
            tags: Any = getattr(image, "tag_v2", {})
            if tags.get(ExifTags.Base.BitsPerSample) == (12,):
                # Pillow leaves them in the low bits, where they would be black.
                values = values << 4 | values >> 8
            grey = (values // 257).astype(np.uint8)
            if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:
                # 0 is white, which Pillow knows up to 8 bits only.
                grey = 255 - grey
            if "transparency" in image.info:
                grey = np.where(values == image.info["transparency"], np.uint8(255), grey)
            return Image.fromarray(grey).convert("RGB")
    elif image.mode in ("RGBA", "RGBa", "LA", "PA") or (image.mode in _OPAQUE and "transparency" in image.info):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    elif image.mode in (*_OPAQUE, "CMYK", "YCbCr", "RGBX"):
        return image.convert("RGB")
    raise ImageDefect(
        Reason.UNSUPPORTED_MODE,
        f"the photo's pixels are of mode '{image.mode}', which has no known range or colours. Save it as RGB.",
    )


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8.

    It is 1 where the tag is absent or unreadable: the pixels are good all the same.
    """
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _BROKEN:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


# --- patches and quality


def grid_patches(image: np.ndarray, grid: int, size: int) -> np.ndarray:
    """Cut a square image into a grid of patches.

    uint8 [grid·size, grid·size, 3] becomes uint8 [grid·grid, size, size, 3], row by row from the
    top left.

    Raises:
        ValueError: the image is not of that size.
    """
    side = grid * size
    if image.shape != (side, side, 3):
        raise ValueError(
            f"image is {image.shape}, expected ({side}, {side}, 3) for {grid} × {grid} patches of {size} px"
        )
    return image.reshape(grid, size, grid, size, 3).swapaxes(1, 2).reshape(grid * grid, size, size, 3)


def image_quality(image: DecodedImage) -> ImageQuality:
    """Measure blur, luminance and size of a decoded photo."""
    small = Image.fromarray(image.pixels).convert("L").resize((_QUALITY_SIDE, _QUALITY_SIDE), Image.Resampling.BILINEAR)
    # Integers of 16 bits hold every value, and are the fastest.
    grey = np.asarray(small, dtype=np.int16)
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1]
    laplacian += grey[1:-1, :-2]
    laplacian += grey[1:-1, 2:]
    laplacian -= 4 * grey[1:-1, 1:-1]
    return ImageQuality(float(laplacian.var(dtype=np.float32)), float(grey.mean() / 255), image.width, image.height)
