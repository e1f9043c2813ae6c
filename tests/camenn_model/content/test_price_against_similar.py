"""Prices against similar listings, compared with a slow obvious reference."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from camenn_model.content import price_against_similar
from camenn_model.content.price_against_similar import Likeness, alike_prices
from schemas.errors import InputError


def slow(
    vectors: np.ndarray, price: np.ndarray, group: np.ndarray, rank: np.ndarray, neighbours: int, most: int
) -> np.ndarray:
    """Listing by listing, neighbour by neighbour."""
    found = np.full(len(price), np.nan, dtype=np.float32)
    usable = [n for n in range(len(price)) if price[n] > 0 and np.abs(vectors[n]).sum() > 0]
    for n in usable:
        references = sorted((m for m in usable if group[m] == group[n]), key=lambda m: int(rank[m]))[:most]
        others = [m for m in references if m != n]
        others.sort(key=lambda m: (-round(float(vectors[m] @ vectors[n]), 9), int(rank[m])))
        if others:
            found[n] = np.log(price[n]) - np.median([np.log(price[m]) for m in others[:neighbours]])
    return found


def draw(count: int, groups: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Listings with unknown and zero prices, without content, and with the same photo and title as another."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((count, 6))
    vectors[rng.random(count) < 0.1] = 0
    copies = rng.random(count) < 0.3
    vectors[copies] = vectors[rng.integers(0, count, int(copies.sum()))]
    price = np.exp(rng.standard_normal(count))
    price[rng.random(count) < 0.1] = np.nan
    price[rng.random(count) < 0.1] = 0
    return vectors, price, rng.integers(0, groups, count), rng.permutation(count).astype(np.uint64)


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 60), groups=st.integers(1, 4), seed=st.integers(0, 10_000))
def test_equals_the_slow_reference(count: int, groups: int, seed: int) -> None:
    given_ = draw(count, groups, seed)
    for neighbours, most, block in ((10, 2_048, 1_024), (3, 8, 4)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(price_against_similar, "NEIGHBOURS", neighbours)
            patch.setattr(price_against_similar, "MOST_REFERENCES", most)
            patch.setattr(price_against_similar, "BLOCK", block)
            found = alike_prices(*given_)
        np.testing.assert_allclose(found, slow(*given_, neighbours, most), rtol=1e-6, atol=1e-7)


def test_rows_in_another_order_and_other_groups_change_no_bit() -> None:
    vectors, price, group, rank = draw(500, 3, 1)
    whole = alike_prices(vectors, price, group, rank)
    order = np.random.default_rng(2).permutation(500)
    assert np.array_equal(
        alike_prices(vectors[order], price[order], group[order], rank[order]), whole[order], equal_nan=True
    )
    one = group == 1
    assert np.array_equal(alike_prices(vectors[one], price[one], group[one], rank[one]), whole[one], equal_nan=True)


def shelf(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Photos and titles that identify which of two kinds a listing is of, among much else."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 2, count)
    images, titles = rng.standard_normal((count, 40)), rng.standard_normal((count, 30))
    images[:, 0] += 6 * kind
    titles[:, 0] += 6 * kind
    return images, titles, kind


def test_a_price_is_compared_within_its_kind() -> None:
    images, titles, kind = shelf(800)
    relative = 0.2 * np.random.default_rng(3).standard_normal(800)
    price = np.exp(2.0 * kind + relative)
    found = Likeness.fit(images, titles)
    vectors = found.vectors(images, titles, np.arange(800), np.arange(800))
    reported = alike_prices(vectors, price, np.zeros(800, dtype=np.int64), np.arange(800, dtype=np.uint64))
    assert np.corrcoef(reported, relative)[0, 1] > 0.9
    assert np.corrcoef(np.log(price) - np.median(np.log(price)), relative)[0, 1] < 0.5


def test_vectors_are_cosines_of_what_there_is() -> None:
    images, titles, _ = shelf(400)
    found = Likeness.fit(images, titles)
    has_image, has_title = np.arange(400) % 3 > 0, np.arange(400) % 5 > 0
    rows = np.arange(400)
    vectors = found.vectors(images, titles, np.where(has_image, rows, -1), np.where(has_title, rows, -1))
    assert np.allclose((vectors**2).sum(axis=1), has_image.astype(int) + has_title)
    # The rows of photo and title do not matter, nor the number of others.
    swapped = found.vectors(images[:50], titles, np.arange(50)[::-1], np.arange(50))
    assert np.array_equal(
        swapped[:, : vectors.shape[1] // 2][::-1][has_image[:50]], vectors[:50, : vectors.shape[1] // 2][has_image[:50]]
    )
    half = vectors.shape[1] // 2
    assert half > 0 and not vectors[~has_image, :half].any() and not vectors[~has_title, half:].any()


@pytest.mark.parametrize("count", [0, 1, 5])
def test_too_few_listings_tell_nothing(count: int) -> None:
    images, titles, _ = shelf(8)
    found = Likeness.fit(images[:count], titles[:count])
    vectors = found.vectors(images, titles, np.arange(8), np.arange(8))
    assert vectors.shape == (8, 0)
    reported = alike_prices(vectors, np.ones(8), np.zeros(8, dtype=np.int64), np.arange(8, dtype=np.uint64))
    assert np.isnan(reported).all()


def test_is_read_as_written(tmp_path: Path) -> None:
    images, titles, _ = shelf(200)
    written = Likeness.fit(images, titles)
    written.write(tmp_path)
    read = Likeness.read(tmp_path)
    for name, value in vars(written).items():
        assert np.array_equal(getattr(read, name), value) and getattr(read, name).dtype == value.dtype
    (tmp_path / price_against_similar.FILE).write_bytes(b"no tensors")
    with pytest.raises(InputError, match="camenn train"):
        Likeness.read(tmp_path)
    with pytest.raises(InputError, match="camenn train"):
        Likeness.read(tmp_path / "nowhere")
