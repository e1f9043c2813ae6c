"""Product classes, drawn or from a folder."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from schemas.errors import InputError
from simulator.classes import SUBCATEGORIES, TEXTURES, class_vectors, drawn_classes, folder_classes
from simulator.config import PRESETS
from simulator.scene import CONTAINERS
from simulator.shapes import SHAPES


def test_drawn_classes_have_distinct_nouns_looks_and_42_subcategories() -> None:
    classes = drawn_classes(210)
    assert len({c.noun for c in classes}) == 210
    assert len({c.look for c in classes}) == 210
    assert len({c.subcategory for c in classes}) == SUBCATEGORIES
    for c in classes:
        assert c.look is not None
        assert c.look.shape in SHAPES
        assert c.look.container in CONTAINERS
        assert c.look.texture in TEXTURES


def test_drawn_classes_spread_over_subcategories() -> None:
    subcategories = [c.subcategory for c in drawn_classes(84)]
    assert all(subcategories.count(name) == 2 for name in set(subcategories))


def test_drawn_classes_beyond_the_table_is_an_error() -> None:
    with pytest.raises(InputError, match="210 can be drawn"):
        drawn_classes(211)


def test_class_vectors_share_a_part_within_a_subcategory() -> None:
    config = replace(PRESETS["default"], class_dims=400)
    classes = drawn_classes(210)
    z = class_vectors(classes, config, np.random.default_rng(0))
    cosine = z @ z.T / 400
    same = np.array([[a.subcategory == b.subcategory for a in classes] for b in classes])
    np.fill_diagonal(cosine, np.nan)
    assert np.nanmean(cosine[same]) == pytest.approx(0.5, abs=0.05)
    assert np.nanmean(cosine[~same]) == pytest.approx(0.0, abs=0.05)


def test_folder_classes_are_the_folders_with_photos(tmp_path: Path) -> None:
    for name in ("fruit/red-apple", "fruit/pear", "dairy/milk", "dairy/empty"):
        (tmp_path / name).mkdir(parents=True)
        if "empty" not in name:
            Image.new("RGB", (90, 80)).save(tmp_path / name / "a.jpg")
    classes = folder_classes(tmp_path, 10)
    assert [c.noun for c in classes] == ["milk", "pear", "red apple"]
    assert [c.category for c in classes] == ["dairy", "fruit", "fruit"]
    assert all(c.look is None and len(c.files) == 1 for c in classes)


@pytest.mark.parametrize("make", [False, True])
def test_folder_classes_without_classes_is_an_error(tmp_path: Path, make: bool) -> None:
    folder = tmp_path / "photos"
    if make:
        folder.mkdir()
    with pytest.raises(InputError, match="photos"):
        folder_classes(folder, 10)
