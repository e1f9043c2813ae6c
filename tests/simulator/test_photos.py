"""Drawn and adapted photos show their factors."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from schemas.errors import InputError
from simulator.catalog import make_catalog
from simulator.classes import Look, drawn_classes, make_classes
from simulator.config import PRESETS
from simulator.corruption import CLEAN, IMAGE_SPOILS, spoil_image
from simulator.photos import adapt_photo, make_photo
from simulator.scene import CONTAINERS, brown_surface, draw_photo
from simulator.shapes import SHAPES, draw_piece
from tests.simulator.conftest import City

LOOK = Look("round", "punnet", "plain", (230, 60, 40), (60, 160, 90))


def draw(seed: int = 0, browned: float = 0.0, pieces: int = 3, fill: float = 0.6, label: bool = False) -> np.ndarray:
    """A drawn tomato, float32 [160, 160, 3]."""
    rng = np.random.default_rng(seed)
    photo = draw_photo(LOOK, browned=browned, pieces=pieces, fill=fill, label=label, size=160, rng=rng)
    return np.asarray(photo, dtype=np.float32)


def red_share(image: np.ndarray) -> float:
    """Share of pixels that are clearly red."""
    return float((image[..., 0] > 1.8 * image[..., 1:].max(axis=2)).mean())


def test_draw_photo_fill_and_pieces_show_as_area() -> None:
    by_fill = [np.mean([red_share(draw(seed, fill=f)) for seed in range(3)]) for f in (0.2, 0.6, 1.0)]
    by_pieces = [np.mean([red_share(draw(seed, pieces=n)) for seed in range(3)]) for n in (1, 5, 9)]
    assert by_fill[0] + 0.05 < by_fill[1] < by_fill[2] - 0.05
    assert by_pieces[0] + 0.03 < by_pieces[1] < by_pieces[2] - 0.03


def test_draw_photo_browning_darkens_the_product() -> None:
    dark = [np.mean([(draw(s, browned=b, fill=1.0).max(axis=2) < 100).mean() for s in range(3)]) for b in (0, 0.3, 0.6)]
    assert dark[0] + 0.05 < dark[1] < dark[2] - 0.05


def test_draw_photo_label_shows_as_yellow_paper() -> None:
    yellow = [
        [
            ((image[..., 1] > 150) & (image[..., 2] < 0.5 * image[..., 1])).mean()
            for image in (draw(seed, label=label, fill=1.0) for seed in range(3))
        ]
        for label in (False, True)
    ]
    assert max(yellow[0]) + 0.02 < min(yellow[1])


def test_brown_surface_changes_the_share_it_is_told() -> None:
    image = Image.new("RGB", (200, 200), (220, 200, 60))
    surface = np.zeros((200, 200), dtype=bool)
    surface[50:150, 20:180] = True
    browned = np.asarray(brown_surface(image, surface, 0.4, np.random.default_rng(0)), dtype=int)
    changed = (np.abs(browned - np.array([220, 200, 60])).sum(axis=2) > 150) & surface
    assert changed.sum() / surface.sum() == pytest.approx(0.4, abs=0.03)
    assert (browned[~surface] == [220, 200, 60]).all()


def test_draw_photo_can_draw_every_class_and_they_differ() -> None:
    seen = set()
    for c in drawn_classes(210)[::5]:
        assert c.look is not None
        photo = draw_photo(c.look, browned=0.1, pieces=4, fill=0.7, label=True, size=75, rng=np.random.default_rng(0))
        assert photo.size == (75, 75)
        seen.add(photo.tobytes())
    assert len(seen) == 42


@pytest.mark.parametrize("shape", SHAPES)
def test_draw_piece_fills_a_fair_part_of_its_square(shape: str) -> None:
    piece = draw_piece(Look(shape, CONTAINERS[0], "plain", (200, 90, 90), (0, 0, 0)), 48, np.random.default_rng(0))
    assert 0.15 < (np.asarray(piece)[:, :, 3] > 127).mean() < 0.95


@pytest.mark.parametrize("kind", IMAGE_SPOILS)
def test_spoil_image_changes_the_picture(kind: str) -> None:
    clean = Image.fromarray(draw().astype(np.uint8))
    spoilt = spoil_image(clean, kind, np.random.default_rng(0))
    assert spoilt.size == clean.size
    difference = np.abs(np.asarray(spoilt, dtype=float) - np.asarray(clean, dtype=float)).mean()
    assert difference > 4
    assert spoil_image(clean, CLEAN, np.random.default_rng(0)) is clean


def test_spoil_image_unknown_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown corruption 'torn'"):
        spoil_image(Image.new("RGB", (80, 80)), "torn", np.random.default_rng(0))


def test_written_photos_are_readable_and_of_the_asked_size(city: City) -> None:
    files = sorted((city.path / "images").glob("*.jpg"))
    assert len(files) == city.config.photos
    for path in files:
        with Image.open(path) as image:
            image.load()
            assert (image.mode, image.size) == ("RGB", (city.config.photo_pixels,) * 2)


def test_adapt_photo_browns_lights_and_labels() -> None:
    source = Image.fromarray(np.full((120, 200, 3), 180, dtype=np.uint8))

    def mean(browned: float, fill: float, label: bool) -> float:
        photo = adapt_photo(
            source,
            browned=browned,
            pieces=5,
            most_pieces=9,
            fill=fill,
            label=label,
            size=100,
            rng=np.random.default_rng(0),
        )
        return float(np.asarray(photo).mean())

    assert mean(0.5, 1.0, False) < mean(0.0, 1.0, False) - 20
    assert mean(0.0, 0.3, False) < mean(0.0, 1.0, False) - 20
    assert mean(0.0, 1.0, True) != mean(0.0, 1.0, False)


def test_make_photo_names_the_unreadable_file(tmp_path: Path) -> None:
    for name in ("apple", "pear"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "bad.jpg").write_bytes(b"not a photo")
    config = replace(PRESETS["tiny"], photo_folder=str(tmp_path), products_per_class=20)
    classes = make_classes(config)
    with pytest.raises(InputError, match=r"bad\.jpg is not a readable photo"):
        make_photo(make_catalog(classes, config).bank, 0, classes, config)
