"""Listings, their photos and titles, and their corruption by careless stores."""

from dataclasses import replace

import numpy as np
import pytest

from schemas.errors import InputError
from simulator.catalog import make_catalog
from simulator.classes import make_classes
from simulator.config import PRESETS
from simulator.corruption import CLEAN, IMAGE_SPOILS, SWAPPED
from tests.simulator.conftest import City

WIDE = replace(PRESETS["tiny"], stores=400, listings=20_000, products_per_class=10, classes=42, photos=840)
"""Many stores and listings, for rates; nothing is drawn."""


@pytest.mark.parametrize("kind", ["image_corruption", "text_corruption"])
def test_make_listings_corrupts_as_often_as_the_kind_of_store_says(kind: str) -> None:
    catalog = make_catalog(make_classes(WIDE), WIDE)
    listings, small = catalog.listings, catalog.stores.small
    assert small.mean() == pytest.approx(WIDE.small_share)
    spoilt = getattr(listings, kind) != CLEAN
    by_store = np.bincount(listings.store, weights=spoilt) / np.bincount(listings.store)
    # Beta(3, 5) has mean 0.375 and sd 0.16; Beta(1, 12) 0.077 and 0.071.
    assert by_store[small].mean() == pytest.approx(3 / 8, abs=4 * 0.19 / np.sqrt(small.sum()))
    assert by_store[~small].mean() == pytest.approx(1 / 13, abs=4 * 0.09 / np.sqrt((~small).sum()))
    swap_share = WIDE.image_swap_share if kind == "image_corruption" else WIDE.text_swap_share
    swapped = (getattr(listings, kind) == SWAPPED)[spoilt].mean()
    assert swapped == pytest.approx(swap_share, abs=4 * 0.5 / np.sqrt(spoilt.sum()))


def test_make_listings_cold_share_first_appears_in_the_test_days(city: City) -> None:
    listings = city.catalog.listings
    assert listings.cold.mean() == pytest.approx(0.2)
    assert (listings.first_day[listings.cold] >= city.config.first_test_day).all()
    assert (listings.first_day[~listings.cold] == 0).all()


def test_make_listings_swapped_ones_show_another_class() -> None:
    catalog = make_catalog(make_classes(WIDE), WIDE)
    listings, bank = catalog.listings, catalog.bank
    shown = bank.class_id[listings.photo]
    swapped = listings.image_corruption == SWAPPED
    assert swapped.any()
    assert (shown[swapped] != listings.class_id[swapped]).all()
    assert (shown[~swapped] == listings.class_id[~swapped]).all()
    assert (bank.corruption[listings.photo[swapped]] == CLEAN).all()
    assert (bank.class_id[listings.true_photo] == listings.class_id).all()
    spoilt = np.isin(listings.image_corruption, IMAGE_SPOILS)
    assert (bank.corruption[listings.photo[spoilt]] == listings.image_corruption[spoilt]).all()
    for i in np.flatnonzero(listings.text_corruption == SWAPPED)[:200]:
        assert listings.text_class[i] != listings.class_id[i]
        assert catalog.classes[listings.text_class[i]].noun in listings.titles[i].lower()
    for i in np.flatnonzero(listings.text_ok)[:200]:
        assert catalog.classes[listings.class_id[i]].noun in listings.titles[i].lower()


def test_make_catalog_without_corruption_spoils_nothing() -> None:
    config = replace(PRESETS["tiny"], corruption=0.0)
    catalog = make_catalog(make_classes(config), config)
    assert catalog.listings.image_ok.all()
    assert catalog.listings.text_ok.all()
    assert (catalog.bank.corruption == CLEAN).all()


def test_make_listings_lists_a_product_once_per_store(city: City) -> None:
    listings = city.catalog.listings
    pairs = set(zip(listings.store.tolist(), listings.product.tolist(), strict=True))
    assert len(pairs) == city.config.listings


def test_make_bank_standardises_the_visual_factors() -> None:
    bank = make_catalog(make_classes(WIDE), WIDE).bank
    assert np.abs(bank.visual.mean(axis=0)).max() < 4 / np.sqrt(840)
    assert np.abs(bank.visual.std(axis=0) - 1).max() < 0.1
    assert bank.pieces.min() == 1
    assert bank.pieces.max() == WIDE.most_pieces


def test_make_bank_too_small_for_the_classes_is_an_error() -> None:
    config = replace(PRESETS["tiny"], photos=20)
    with pytest.raises(InputError, match="need at least 24"):
        make_catalog(make_classes(config), config)
