import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipelines.inputs.photos import DecodedImage, ImageDefect, Limits, decode_image, grid_patches, image_quality


def photo(width: int = 120, height: int = 90) -> Image.Image:
    """Left half red, right half blue, top edge green."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, : width // 2, 0] = 255
    pixels[:, width // 2 :, 2] = 255
    pixels[: height // 3] = (0, 255, 0)
    return Image.fromarray(pixels)


def save(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def reason_of(data: bytes, limits: Limits | None = None) -> str:
    with pytest.raises(ImageDefect) as caught:
        decode_image(data, 75, limits or Limits())
    assert "Upload" in caught.value.detail or "Save" in caught.value.detail
    return caught.value.reason


@pytest.mark.parametrize(
    ("format", "mode"),
    [
        ("JPEG", "RGB"),
        ("JPEG", "L"),
        ("PNG", "RGB"),
        ("PNG", "P"),
        ("PNG", "1"),
        ("PNG", "LA"),
        ("PNG", "RGBA"),
        ("WEBP", "RGB"),
        ("WEBP", "RGBA"),
        ("GIF", "P"),
        ("BMP", "RGB"),
        ("TIFF", "RGB"),
        ("AVIF", "RGB"),
    ],
)
def test_decode_image_reads_every_format(format: str, mode: str) -> None:
    image = decode_image(save(photo().convert(mode), format), 75)
    assert image.pixels.shape == (75, 75, 3) and image.pixels.dtype == np.uint8
    assert (image.width, image.height) == (120, 90)
    assert image.pixels.std() > 20


def test_decode_image_converts_cmyk() -> None:
    pixels = decode_image(save(photo().convert("CMYK"), "JPEG", quality=95), 90).pixels
    np.testing.assert_allclose(pixels[70, 20], (255, 0, 0), atol=20)
    np.testing.assert_allclose(pixels[10, 40], (0, 255, 0), atol=20)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_decode_image_scales_16_bits(format: str) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    pixels = decode_image(save(Image.fromarray(ramp), format), 64).pixels
    np.testing.assert_allclose(pixels[..., 1], ramp / 257, atol=3)


def test_decode_image_refuses_floats() -> None:
    assert reason_of(save(photo().convert("F"), "TIFF")) == "unsupported_mode"


def test_decode_image_lays_transparency_over_white() -> None:
    clear = Image.new("RGBA", (80, 80), (0, 0, 0, 0))
    assert (decode_image(save(clear, "PNG"), 75).pixels == 255).all()
    palette = Image.new("P", (80, 80), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert (decode_image(save(palette, "PNG", transparency=0), 75).pixels == 255).all()


def test_decode_image_takes_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (80, 80), colour) for colour in ("red", "blue", "blue")]
    for format, loss in (("GIF", {}), ("WEBP", {"lossless": True})):
        data = save(frames[0], format, save_all=True, append_images=frames[1:], duration=50, **loss)
        assert (decode_image(data, 75).pixels == (255, 0, 0)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_image_turns_upright_by_exif(orientation: int) -> None:
    upright = photo(160, 80)
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(save(stored, "PNG", exif=exif), 80)
    expected = np.asarray(upright.resize((80, 80), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(decoded.pixels.astype(int), expected.astype(int), atol=2)
    assert (decoded.width, decoded.height) == (160, 80)


def test_decode_image_ignores_broken_exif() -> None:
    data = save(photo(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decode_image(data, 75).width == 120


def test_decode_image_names_bytes_that_are_no_photo() -> None:
    assert reason_of(b"") == "empty_image"
    assert reason_of(b"<!DOCTYPE html><html><body>404</body></html>") == "not_an_image"
    assert reason_of(save(photo(), "PPM")) == "not_an_image"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP"])
def test_decode_image_names_truncated_photos(format: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    data = save(noise, format)
    assert reason_of(data[: len(data) // 2]) in {"truncated_image", "corrupt_image"}
    if format in ("JPEG", "PNG", "BMP"):
        assert reason_of(data[: len(data) // 2]) == "truncated_image"
        assert reason_of(data[:30]) in {"truncated_image", "not_an_image"}


def test_decode_image_refuses_bombs_before_decoding() -> None:
    assert reason_of(png_header(8_001, 8_000)) == "too_many_pixels"
    assert reason_of(png_header(12_000, 12_000)) == "too_many_pixels"
    assert reason_of(png_header(60_000, 60_000)) == "too_many_pixels"
    assert reason_of(png_header(8_000, 8_000)) in {"truncated_image", "corrupt_image"}


def test_decode_image_holds_to_limits() -> None:
    data = save(photo(), "PNG")
    assert reason_of(data, Limits(bytes=len(data) - 1)) == "too_many_bytes"
    assert reason_of(data, Limits(pixels=120 * 90 - 1)) == "too_many_pixels"
    assert decode_image(data, 75, Limits(bytes=len(data), pixels=120 * 90)).width == 120
    assert reason_of(bytes(32 * 2**20 + 1)) == "too_many_bytes"


def test_decode_image_of_mutated_bytes_is_a_photo_or_a_defect() -> None:
    chance = random.Random(5)
    formats = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF")
    originals = [save(photo(40, 30), format) for format in formats]
    for _ in range(1_000):
        data = bytearray(chance.choice(originals))
        for _ in range(chance.choice((1, 3, 20))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            assert decode_image(bytes(data[: chance.randrange(1, 2 * len(data))]), 30).pixels.shape == (30, 30, 3)
        except ImageDefect as defect:
            assert defect.reason


def test_decode_image_scales_large_jpegs_down_alike() -> None:
    smooth = Image.fromarray(np.random.default_rng(1).integers(0, 256, (12, 16, 3), dtype=np.uint8))
    large = smooth.resize((1600, 1200), Image.Resampling.BICUBIC)
    from_jpeg = decode_image(save(large, "JPEG", quality=95), 150).pixels.astype(int)
    from_png = decode_image(save(large, "PNG"), 150).pixels.astype(int)
    assert np.abs(from_jpeg - from_png).mean() < 2


def test_grid_patches_are_the_photo_cut_row_by_row() -> None:
    image = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    patches = grid_patches(image, 4, 75)
    assert patches.shape == (16, 75, 75, 3) and patches.dtype == np.uint8
    for row in range(4):
        for column in range(4):
            expected = image[75 * row : 75 * row + 75, 75 * column : 75 * column + 75]
            assert (patches[4 * row + column] == expected).all()
    with pytest.raises(ValueError, match="expected"):
        grid_patches(image[:299], 4, 75)


def test_image_quality_orders_blur_and_luminance() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(noise).resize((20, 20)).resize((300, 300), Image.Resampling.BICUBIC))
    sharp, blurred = image_quality(DecodedImage(noise, 640, 480)), image_quality(DecodedImage(smooth, 640, 480))
    assert sharp.blur > 20 * blurred.blur > 0
    assert (sharp.width, sharp.height) == (640, 480)
    flat = np.full((300, 300, 3), 255, dtype=np.uint8)
    assert image_quality(DecodedImage(flat, 1, 1)) == (0.0, 1.0, 1, 1)
    assert image_quality(DecodedImage(0 * flat, 1, 1)).luminance == 0.0
