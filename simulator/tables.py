"""The city's arrays as Arrow tables.

They are the platform's tables, and the truth.
"""

import numpy as np
import pyarrow as pa

from schemas.contract import TIMESTAMP
from simulator.behaviour import Clicks, Orders
from simulator.catalog import Catalog
from simulator.config import DAY_SECONDS, TEXT_FACTORS, VISUAL_FACTORS, CityConfig
from simulator.people import Users


def _ids(prefix: str, numbers: np.ndarray, width: int) -> pa.Array:
    return pa.array([f"{prefix}{number:0{width}d}" for number in numbers.tolist()], pa.string())


def item_ids(numbers: np.ndarray) -> pa.Array:
    """Return ids of listings."""
    return _ids("i", numbers, 7)


def user_ids(numbers: np.ndarray) -> pa.Array:
    """Return ids of users."""
    return _ids("u", numbers, 8)


def store_ids(numbers: np.ndarray) -> pa.Array:
    """Return ids of stores."""
    return _ids("s", numbers, 5)


def utc_times(seconds: np.ndarray, config: CityConfig) -> pa.Array:
    """Convert seconds to UTC times, timestamp[us].

    Seconds are since the local midnight of the first day.
    """
    start = np.datetime64(config.start_date, "us") - np.timedelta64(config.utc_offset_hours, "h")
    return pa.array(start + np.round(seconds * 1e6).astype("timedelta64[us]"), TIMESTAMP)


def _vectors(matrix: np.ndarray) -> pa.Array:
    """Return a row of `matrix` per value.

    It is a list of float32.
    """
    flat = pa.array(matrix.astype(np.float32).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1]).cast(pa.list_(pa.float32()))


def catalog_table(catalog: Catalog, config: CityConfig) -> pa.Table:
    """Return the catalog.

    Product keys are shuffled, so that they do not follow the classes.
    """
    listings, classes = catalog.listings, catalog.classes
    rng = np.random.default_rng([config.seed, 7])
    key = rng.permutation(len(classes) * config.products_per_class)
    return pa.table(
        {
            "item_id": item_ids(np.arange(config.listings)),
            "title": pa.array(listings.titles, pa.string()),
            "category": pa.array([classes[c].category for c in listings.class_id], pa.string()),
            "subcategory": pa.array([classes[c].subcategory for c in listings.class_id], pa.string()),
            "brand": _ids("b", listings.brand, 2),
            "price": pa.array(listings.price.astype(np.float32)),
            "image_uri": pa.array([catalog.bank.uri(photo) for photo in listings.photo], pa.string()),
            "product_key": _ids("p", key[listings.product], 6),
            "store_id": store_ids(listings.store),
            "listed_at": utc_times(listings.first_day * DAY_SECONDS, config),
        }
    )


def users_table(users: Users) -> pa.Table:
    """Return users with the columns that the platform knows."""
    return pa.table(
        {
            "user_id": user_ids(np.arange(len(users.activity))),
            "age_group": pa.array(users.age_group.tolist(), pa.string()),
            "household": pa.array(users.household.tolist(), pa.string()),
            "income": pa.array(users.income.tolist(), pa.string()),
        }
    )


def stores_table(config: CityConfig) -> pa.Table:
    """Return stores and their zone."""
    return pa.table(
        {
            "store_id": store_ids(np.arange(config.stores)),
            "timezone": pa.array([config.timezone] * config.stores, pa.string()),
        }
    )


def _session_ids(day: int, session: np.ndarray) -> list[str]:
    return [f"d{day:04d}-{number:07d}" for number in session.tolist()]


def clicks_table(clicks: Clicks, day: int, catalog: Catalog, config: CityConfig) -> pa.Table:
    """Return one day's clicks as the log has them."""
    sessions = _session_ids(day, clicks.session)
    return pa.table(
        {
            "exposure_id": pa.array([f"{s}-{p:02d}" for s, p in zip(sessions, clicks.position.tolist(), strict=True)]),
            "session_id": pa.array(sessions, pa.string()),
            "user_id": user_ids(clicks.user),
            "store_id": store_ids(catalog.listings.store[clicks.listing]),
            "item_id": item_ids(clicks.listing),
            "clicked_at": utc_times(clicks.clicked, config),
            "position": pa.array(clicks.position, pa.int64()),
        }
    )


def orders_table(orders: Orders, day: int, catalog: Catalog, config: CityConfig) -> pa.Table:
    """Return order lines as the log has them.

    They are those that follow from one day's clicks.
    """
    return pa.table(
        {
            "order_id": _ids(f"o{day:04d}-", orders.basket, 7),
            "user_id": user_ids(orders.user),
            "store_id": store_ids(catalog.listings.store[orders.listing]),
            "item_id": item_ids(orders.listing),
            "ordered_at": utc_times(orders.ordered, config),
            "quantity": pa.array(orders.quantity, pa.float64()),
        }
    )


def truth_clicks_table(clicks: Clicks, day: int, table: pa.Table, catalog: Catalog, config: CityConfig) -> pa.Table:
    """Return the truth of each row of `table`.

    `table` is one day's clicks. The truth is terms, probabilities, and outcomes.
    """
    listings = catalog.listings
    shown = clicks.listing
    return pa.table(
        {
            "exposure_id": table["exposure_id"],
            "item_id": table["item_id"],
            "day": pa.array(np.full(len(clicks), day), pa.int32()),
            "test": pa.array(np.full(len(clicks), day >= config.first_test_day)),
            "uniform": pa.array(clicks.uniform),
            "p_click": pa.array(clicks.p_click),
            "p_order": pa.array(clicks.p_order),
            "ordered": pa.array(clicks.ordered),
            "class_term": pa.array(clicks.class_term),
            "context_term": pa.array(clicks.context_term),
            "visual_term": pa.array(clicks.visual_term),
            "text_term": pa.array(clicks.text_term),
            "image_ok": pa.array(listings.image_ok[shown]),
            "text_ok": pa.array(listings.text_ok[shown]),
            "mismatched": pa.array(listings.mismatched[shown]),
            "cold_start": pa.array(listings.cold[shown]),
        }
    )


def truth_listings_table(catalog: Catalog, config: CityConfig) -> pa.Table:
    """Return the truth of each listing.

    It has each listing's product, its displayed content, and its first day.
    """
    listings = catalog.listings
    columns: dict[str, pa.Array] = {
        "item_id": item_ids(np.arange(config.listings)),
        "store_id": store_ids(listings.store),
        "class_id": pa.array(listings.class_id, pa.int32()),
        "product": pa.array(listings.product, pa.int32()),
    }
    for i, name in enumerate(VISUAL_FACTORS):
        columns[name] = pa.array(listings.visual[:, i])
    for i, name in enumerate(TEXT_FACTORS):
        columns[name] = pa.array(listings.attributes[:, i])
    columns |= {
        "relative_price": pa.array(listings.relative_price),
        "image_corruption": pa.array(listings.image_corruption.tolist(), pa.string()),
        "text_corruption": pa.array(listings.text_corruption.tolist(), pa.string()),
        "image_class_id": pa.array(listings.image_class, pa.int32()),
        "text_class_id": pa.array(listings.text_class, pa.int32(), mask=listings.text_class < 0),
        "mismatched": pa.array(listings.mismatched),
        "true_image_uri": pa.array([catalog.bank.uri(photo) for photo in listings.true_photo], pa.string()),
        "first_day": pa.array(listings.first_day, pa.int32()),
        "cold_start": pa.array(listings.cold),
    }
    return pa.table(columns)


def truth_photos_table(catalog: Catalog) -> pa.Table:
    """Return the truth of each picture of the bank.

    It has the picture's content: the raw factors, and the standardised ones as `*_v`.
    """
    bank = catalog.bank
    columns: dict[str, pa.Array] = {
        "image_uri": pa.array([bank.uri(photo) for photo in range(len(bank.class_id))], pa.string()),
        "class_id": pa.array(bank.class_id, pa.int32()),
        "corruption": pa.array(bank.corruption.tolist(), pa.string()),
        "browned": pa.array(bank.browned),
        "pieces": pa.array(bank.pieces, pa.int32()),
        "fill": pa.array(bank.fill),
        "label": pa.array(bank.label),
    }
    for i, name in enumerate(VISUAL_FACTORS):
        columns[f"{name}_v"] = pa.array(bank.visual[:, i])
    return pa.table(columns)


def truth_classes_table(catalog: Catalog) -> pa.Table:
    """Return product classes with z."""
    classes = catalog.classes
    return pa.table(
        {
            "class_id": pa.array([c.class_id for c in classes], pa.int32()),
            "noun": pa.array([c.noun for c in classes], pa.string()),
            "category": pa.array([c.category for c in classes], pa.string()),
            "subcategory": pa.array([c.subcategory for c in classes], pa.string()),
            "z": _vectors(catalog.vectors),
        }
    )


def truth_stores_table(catalog: Catalog, config: CityConfig) -> pa.Table:
    """Return stores: size, corruption, quality, place."""
    stores = catalog.stores
    return pa.table(
        {
            "store_id": store_ids(np.arange(config.stores)),
            "small": pa.array(stores.small),
            "corruption_rate": pa.array(stores.corruption_rate),
            "quality": pa.array(stores.quality),
            "east_km": pa.array(stores.place_km[:, 0]),
            "north_km": pa.array(stores.place_km[:, 1]),
        }
    )


def truth_users_table(users: Users) -> pa.Table:
    """Return users: preferences and price sensitivity."""
    return pa.table(
        {
            "user_id": user_ids(np.arange(len(users.activity))),
            "taste_mixture": _vectors(users.mixture),
            "class_taste": _vectors(users.class_taste),
            "visual_taste": _vectors(users.visual_taste),
            "text_taste": _vectors(users.text_taste),
            "price_sensitivity": pa.array(users.price_sensitivity),
            "regular": pa.array(users.regular),
        }
    )
