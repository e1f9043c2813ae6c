"""The catalog as columns.

It has photo bank, stores and listings. Axes: L listings, C classes, G photos, S stores.
"""

from dataclasses import dataclass

import numpy as np

from schemas.errors import InputError
from simulator.classes import ProductClass, class_vectors
from simulator.config import TEXT_FACTORS, CityConfig
from simulator.corruption import (
    CLEAN,
    IMAGE_SPOILS,
    SWAPPED,
    TEXT_SPOILS,
    choose_corruption,
    other_class,
    store_rates,
)
from simulator.titles import generic_title, misspell, word_title


@dataclass(frozen=True, kw_only=True)
class PhotoBank:
    """The distinct pictures.

    Columns: class int64 [G], corruption (object array of str) [G], factors.
    """

    class_id: np.ndarray
    corruption: np.ndarray
    visual: np.ndarray
    """v, float64 [G, 4], standardised."""
    browned: np.ndarray
    """Share of the product's surface that is browned, 0 to `most_browned`."""
    pieces: np.ndarray
    """int64, 1 to `most_pieces`."""
    fill: np.ndarray
    """Share of the pack that is full, 0.15 to 1."""
    label: np.ndarray
    """bool."""
    source: np.ndarray
    """int64: which of the class's files, where photos come from a folder."""

    def uri(self, photo: int) -> str:
        """Return a photo's path relative to the data directory."""
        return f"images/{photo:06d}.jpg"


@dataclass(frozen=True, kw_only=True)
class Stores:
    """Columns of length S."""

    small: np.ndarray
    corruption_rate: np.ndarray
    quality: np.ndarray
    """Mean 0 and variance 1 over the stores."""
    place_km: np.ndarray
    """float64 [S, 2]: where it stands."""


@dataclass(frozen=True, kw_only=True)
class Listings:
    """Columns of length L.

    They describe the true product, and the displayed one.
    """

    store: np.ndarray
    class_id: np.ndarray
    product: np.ndarray
    """Index of (class, variant). The same product in several stores shares it."""
    brand: np.ndarray
    """Index of the supplier: unrelated to the brand-name attribute, which only the title mentions."""
    attributes: np.ndarray
    """bool [L, 6] in the order of TEXT_FACTORS."""
    text: np.ndarray
    """t, float64 [L, 6], standardised attributes."""
    visual: np.ndarray
    """v, float64 [L, 4], of the true product."""
    photo: np.ndarray
    """Index of the displayed picture in the bank."""
    true_photo: np.ndarray
    """Index of the picture that shows the true product. Differs from `photo` where swapped."""
    titles: list[str]
    image_corruption: np.ndarray
    text_corruption: np.ndarray
    image_class: np.ndarray
    """Class that the displayed photo shows."""
    text_class: np.ndarray
    """Class that the displayed title names; -1 where it names none."""
    price: np.ndarray
    relative_price: np.ndarray
    """Standardised log price relative to the class."""
    first_day: np.ndarray
    cold: np.ndarray

    @property
    def image_ok(self) -> np.ndarray:
        """Return which photos show the product, unspoilt, bool [L]."""
        return self.image_corruption == CLEAN

    @property
    def text_ok(self) -> np.ndarray:
        """Return which titles describe the product, unspoilt, bool [L]."""
        return self.text_corruption == CLEAN

    @property
    def mismatched(self) -> np.ndarray:
        """Return which listings are mismatched, bool [L].

        Photo or title is another class's.
        """
        return (self.image_corruption == SWAPPED) | (self.text_corruption == SWAPPED)


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """Everything that is for sale, and the city's stores."""

    classes: list[ProductClass]
    vectors: np.ndarray
    """z, float64 [C, 16]."""
    bank: PhotoBank
    stores: Stores
    listings: Listings


def make_bank(classes: list[ProductClass], config: CityConfig, rng: np.random.Generator) -> PhotoBank:
    """Make the photo bank.

    It has the same number of pictures of every class, give or take one. `corrupted_photo_share` of
    a class's pictures are spoilt, at least one, and at least one is not.

    Raises:
        InputError: fewer than two pictures per class.
    """
    count = config.photos
    if count < 2 * len(classes):
        raise InputError(f"simulate: photos is {count}; {len(classes)} classes need at least {2 * len(classes)}")
    class_id = np.sort(np.arange(count) % len(classes))
    corruption = np.full(count, CLEAN, dtype=object)
    if config.corruption > 0:
        for number in range(len(classes)):
            members = np.flatnonzero(class_id == number)
            spoilt = min(len(members) - 1, max(1, round(config.corrupted_photo_share * len(members))))
            first = rng.integers(len(IMAGE_SPOILS))
            for i in range(spoilt):
                corruption[members[-1 - i]] = IMAGE_SPOILS[(first + i) % len(IMAGE_SPOILS)]
    fresh = rng.random(count)
    pieces = rng.integers(1, config.most_pieces + 1, size=count)
    fill = rng.random(count)
    label = rng.random(count) < config.label_rate
    uniform_sd = np.sqrt(1 / 12)
    visual = np.stack(
        [
            (fresh - 0.5) / uniform_sd,
            (pieces - (config.most_pieces + 1) / 2) / np.sqrt((config.most_pieces**2 - 1) / 12),
            (fill - 0.5) / uniform_sd,
            (label - config.label_rate) / np.sqrt(config.label_rate * (1 - config.label_rate)),
        ],
        axis=1,
    )
    source = rng.integers(2**31, size=count)
    return PhotoBank(
        class_id=class_id,
        corruption=corruption,
        visual=visual,
        browned=config.most_browned * (1 - fresh),
        pieces=pieces,
        fill=0.15 + 0.85 * fill,
        label=label,
        source=source,
    )


def make_stores(config: CityConfig, rng: np.random.Generator) -> Stores:
    """Scatter stores over the city."""
    small, rate = store_rates(config, rng)
    quality = rng.standard_normal(config.stores)
    return Stores(
        small=small,
        corruption_rate=rate,
        quality=(quality - quality.mean()) / quality.std(),
        place_km=rng.uniform(0, config.city_side_km, size=(config.stores, 2)),
    )


def _pick(groups: list[np.ndarray], which: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pick one member of groups[which[i]] for every i, uniformly."""
    sizes = np.array([len(group) for group in groups])
    starts = np.cumsum(sizes) - sizes
    return np.concatenate(groups)[starts[which] + rng.integers(sizes[which])]


def _word_titles(
    classes: list[ProductClass],
    class_id: np.ndarray,
    attributes: np.ndarray,
    corruption: np.ndarray,
    rates: np.ndarray,
    rng: np.random.Generator,
) -> tuple[list[str], np.ndarray]:
    """Return (titles, class named), see `Listings`."""
    named = np.where(corruption == SWAPPED, other_class(class_id, len(classes), rng), class_id)
    titles = []
    for i, kind in enumerate(corruption):
        shown = classes[named[i]]
        said = attributes[i]
        if kind == SWAPPED:
            said = rng.random(len(rates)) < rates
        elif kind == "dropped":
            said = np.zeros_like(said)
        title = word_title(shown.noun, shown.category, said, rng)
        if kind == "typos":
            title = misspell(title, rng)
        elif kind == "generic":
            title = generic_title(rng)
        titles.append(title)
    return titles, np.where(corruption == "generic", -1, named)


def make_listings(
    classes: list[ProductClass], bank: PhotoBank, stores: Stores, config: CityConfig, rng: np.random.Generator
) -> Listings:
    """Choose listings and their displayed content.

    Listings are (store, product) pairs without repetition. Each gets a photo, a title, a price and
    a first day.

    Raises:
        InputError: a photo folder has too few classes for that many listings.
    """
    count, products = config.listings, len(classes) * config.products_per_class
    if count > config.stores * products:
        raise InputError(
            f"simulate: {len(classes)} classes allow {config.stores * products} listings, not {count}; lower listings"
        )
    rates = np.array(config.text_rates)
    product_attributes = rng.random((products, len(TEXT_FACTORS))) < rates
    product_brand = rng.integers(8, size=products)
    class_price = np.exp(rng.normal(2.2, 0.5, size=len(classes)))

    # The same number of listings in every store, give or take one.
    store = rng.permutation(np.arange(count) % config.stores)
    product = np.empty(count, dtype=np.int64)
    for number in range(config.stores):
        mine = np.flatnonzero(store == number)
        product[mine] = rng.choice(products, size=len(mine), replace=False)
    class_id = product // config.products_per_class

    attributes = product_attributes[product].copy()
    promotion = TEXT_FACTORS.index("promotion")
    # A promotion is the store's, the other attributes are the product's.
    attributes[:, promotion] = rng.random(count) < rates[promotion]

    rate = stores.corruption_rate[store]
    image_corruption = choose_corruption(rate, IMAGE_SPOILS, config.image_swap_share, rng)
    text_corruption = choose_corruption(rate, TEXT_SPOILS, config.text_swap_share, rng)
    clean = [np.flatnonzero((bank.class_id == c) & (bank.corruption == CLEAN)) for c in range(len(classes))]
    true_photo = _pick(clean, class_id, rng)
    if config.corruption > 0:
        spoilt = [np.flatnonzero((bank.class_id == c) & (bank.corruption != CLEAN)) for c in range(len(classes))]
        is_spoilt = np.isin(image_corruption, IMAGE_SPOILS)
        true_photo = np.where(is_spoilt, _pick(spoilt, class_id, rng), true_photo)
        # The bank is bounded, so the kind of corruption is that of an existing corrupted picture of this class.
        image_corruption = np.where(is_spoilt, bank.corruption[true_photo], image_corruption)
    image_class = np.where(image_corruption == SWAPPED, other_class(class_id, len(classes), rng), class_id)
    photo = np.where(image_corruption == SWAPPED, _pick(clean, image_class, rng), true_photo)
    titles, text_class = _word_titles(classes, class_id, attributes, text_corruption, rates, rng)

    relative = rng.standard_normal(count)
    price = class_price[class_id] * np.exp(config.price_spread * relative)
    cold = np.zeros(count, dtype=bool)
    cold[rng.permutation(count)[: round(config.cold_share * count)]] = True
    first_day = np.where(cold, rng.integers(config.first_test_day, config.days, size=count), 0)
    return Listings(
        store=store,
        class_id=class_id,
        product=product,
        brand=product_brand[product],
        attributes=attributes,
        text=(attributes - rates) / np.sqrt(rates * (1 - rates)),
        visual=bank.visual[true_photo],
        photo=photo,
        true_photo=true_photo,
        titles=titles,
        image_corruption=image_corruption,
        text_corruption=text_corruption,
        image_class=image_class,
        text_class=text_class,
        price=np.maximum(0.05, np.round(price, 2)),
        relative_price=relative,
        first_day=first_day,
        cold=cold,
    )


def make_catalog(classes: list[ProductClass], config: CityConfig) -> Catalog:
    """Make the whole catalog, from the seed alone."""
    rng = np.random.default_rng([config.seed, 1])
    vectors = class_vectors(classes, config, rng)
    bank = make_bank(classes, config, rng)
    stores = make_stores(config, rng)
    listings = make_listings(classes, bank, stores, config, rng)
    return Catalog(classes=classes, vectors=vectors, bank=bank, stores=stores, listings=listings)
