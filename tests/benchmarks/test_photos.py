"""Retrieval between photos and descriptions."""

import numpy as np
import pytest

from benchmarks.quality.photos import recalls


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
