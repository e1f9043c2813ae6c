"""Retrieval between photos and descriptions."""

import numpy as np
import pytest

from benchmarks.quality.photos import over_seeds, recalls


def test_each_description_stands_once() -> None:
    """Equal descriptions take no further place.

    Of three photos of class 0 and one of class 1, all with the description of their class, two rank
    it first.
    """
    classes = np.array([0, 0, 0, 1])
    of_photos = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]], dtype=np.float32)
    found = recalls(of_photos[:, classes], classes)
    assert found["photo_to_description"] == pytest.approx({"r_at_1": 0.5, "r_at_5": 1.0})
    # Description 0 is nearest to a photo of its own, description 1 to one of class 0.
    assert found["description_to_photo"] == pytest.approx({"r_at_1": 0.5, "r_at_5": 1.0})


def test_recalls_are_told_over_seeds() -> None:
    found = [
        {name: {way: {"r_at_1": recall} for way in ("photo_to_description", "description_to_photo")}}
        for name, recall in (("camenn", 0.5), ("camenn", 0.7))
    ]
    both = {"r_at_1": {"mean": pytest.approx(0.6), "error": pytest.approx(0.1)}}
    assert over_seeds(found) == {"camenn": {"photo_to_description": both, "description_to_photo": both}}
    alone = {"r_at_1": {"mean": 0.5, "error": None}}
    assert over_seeds(found[:1]) == {"camenn": {"photo_to_description": alone, "description_to_photo": alone}}
