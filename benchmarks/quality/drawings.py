"""The visual factors that an encoder reads in drawings.

    python -m benchmarks.quality.drawings --image_weights FILE

It is a precondition of any claim about images in a city, whose photos are the simulator's drawings.

Ridge regression runs from the mean patch features of drawn, unspoilt photos to each visual factor,
for the given weights and for random ones. Three quarters of the photos are to fit (the penalty is
chosen on a quarter of them), the last quarter is to measure R². The last line of stdout is one JSON
object.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.quality.representation import ridge, standardise
from benchmarks.support.command import machine, progress_log
from camenn_model.encoders.inception_v4 import InceptionV4Encoder
from camenn_model.encoders.spec import ImageSpec
from pipelines.inputs.photos import grid_patches
from simulator.catalog import PhotoBank, make_catalog
from simulator.classes import ProductClass, make_classes
from simulator.config import VISUAL_FACTORS, CityConfig, preset_config
from simulator.photos import make_photo

log = progress_log("drawings")

GRID, PATCH = 4, 75
PENALTIES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
"""Penalties, in units of the mean eigenvalue of the features' covariance"""
SHEET, COLUMNS = 48, 8


def r_squared(features: NDArray[np.float32], factors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return R² of each factor on held-out rows.

    The factors are [n, F], predicted from features [n, d]. The last quarter of the rows is held
    out.
    """
    n = len(features)
    fit, check, test = (
        np.arange(n) < 9 * n // 16,
        (np.arange(n) >= 9 * n // 16) & (np.arange(n) < 3 * n // 4),
        np.arange(n) >= 3 * n // 4,
    )

    def of(train: NDArray[np.bool_], judged: NDArray[np.bool_], penalty: float) -> NDArray[np.float64]:
        x, other = standardise(features[train].astype(np.float64), features[judged].astype(np.float64))
        base = factors[train].mean(axis=0)
        weights = ridge(x, factors[train] - base, penalty)
        wrong = factors[judged] - base - other @ weights
        return np.asarray(
            1 - (wrong**2).sum(axis=0) / ((factors[judged] - factors[judged].mean(axis=0)) ** 2).sum(axis=0)
        )

    by_penalty = np.stack([of(fit, check, penalty) for penalty in PENALTIES])
    best = by_penalty.argmax(axis=0)
    found = [of(fit | check, test, PENALTIES[place])[factor] for factor, place in enumerate(best)]
    return np.asarray(found)


_Bank = tuple[PhotoBank, list[ProductClass], CityConfig]


def _draw(given: tuple[_Bank, list[int]]) -> NDArray[np.uint8]:
    (bank, classes, config), photos = given
    return np.stack([np.asarray(make_photo(bank, photo, classes, config)) for photo in photos])


def draw_photos(bank: _Bank, photos: list[int]) -> NDArray[np.uint8]:
    """Draw pictures of a bank, uint8 [n, side, side, 3]."""
    pieces = [photos[start : start + 64] for start in range(0, len(photos), 64)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return np.concatenate(list(pool.map(_draw, [(bank, piece) for piece in pieces])))


def pooled_features(weights: str, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return mean patch features of photos, float32 [n, 1536]."""
    encoder = InceptionV4Encoder(
        ImageSpec.resolve(weights, grid=GRID, patch_size=PATCH, device="cpu", precision="auto", compile="off")
    )
    found, reported_at = [], time.monotonic()
    for start in range(0, len(photos), 64):
        patches = np.concatenate([grid_patches(photo, GRID, PATCH) for photo in photos[start : start + 64]])
        found.append(encoder.encode(patches).astype(np.float32).reshape(-1, GRID * GRID, 1536).mean(axis=1))
        if time.monotonic() - reported_at > 30:
            reported_at = time.monotonic()
            log(f"{weights}: {start} of {len(photos)} photos")
    return np.concatenate(found)


def colours(photos: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return colour histograms of photos, float32 [n, 512].

    They have 8 × 8 × 8 colours. They are the reference without an encoder.
    """
    codes = (photos[..., 0] // 32).astype(np.int64) * 64 + (photos[..., 1] // 32) * 8 + photos[..., 2] // 32
    return np.stack([np.bincount(code.ravel(), minlength=512) / code.size for code in codes]).astype(np.float32)


def contact_sheet(photos: NDArray[np.uint8], path: Path) -> None:
    """Write the first photos side by side, to look at."""
    shown = photos[:SHEET]
    side = shown.shape[1]
    sheet = Image.new("RGB", (COLUMNS * side, -(-len(shown) // COLUMNS) * side))
    for place, photo in enumerate(shown):
        sheet.paste(Image.fromarray(photo), (place % COLUMNS * side, place // COLUMNS * side))
    sheet.resize((sheet.width // 2, sheet.height // 2)).save(path)


def main(argv: list[str] | None = None) -> int:
    """Draw, encode, fit, and print one JSON line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.drawings", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--image_weights", required=True, help="InceptionV4, as for camenn embed")
    parser.add_argument("--photos", type=int, default=4_000, help="drawings (default %(default)s)")
    parser.add_argument("--preset", default="default", help="size of the city (default %(default)s)")
    parser.add_argument(
        "--random",
        type=int,
        default=0,
        metavar="SEED",
        help="seed of the random weights (default %(default)s; -1 = none)",
    )
    parser.add_argument("--sheet", type=Path, help="PNG to write some of the drawings to")
    arguments = parser.parse_args(argv)
    config = preset_config(
        arguments.preset, {"corruption": 0.0, "corrupted_photo_share": 0.0, "photos": arguments.photos}
    )
    classes = make_classes(config)
    bank = make_catalog(classes, config).bank
    order = np.random.default_rng(0).permutation(len(bank.class_id))
    photos = draw_photos((bank, classes, config), order.tolist())
    log(f"{len(photos)} photos drawn")
    if arguments.sheet:
        contact_sheet(photos, arguments.sheet)
    readers: dict[str, Callable[[], NDArray[Any]]] = {
        "given": lambda: pooled_features(arguments.image_weights, photos),
        "colours": lambda: colours(photos),
    }
    if arguments.random >= 0:
        readers["random"] = lambda: pooled_features(f"random:{arguments.random}", photos)
    found: dict[str, dict[str, float]] = {}
    for name, read in readers.items():
        values = r_squared(read(), bank.visual[order])
        found[name] = {factor: round(float(value), 3) for factor, value in zip(VISUAL_FACTORS, values, strict=True)}
        log(f"{name}: {found[name]}")
    print(
        json.dumps({"r_squared": found, "least": min(found["given"].values()), "photos": len(photos), **machine()}),
        flush=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
