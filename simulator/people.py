"""Users of the city.

They have preferences, price sensitivity, places, and the columns that the users table shows.

Axes: U users, K preference groups.
"""

from dataclasses import dataclass

import numpy as np

from simulator.catalog import Stores
from simulator.config import TEXT_FACTORS, VISUAL_FACTORS, CityConfig

AGE_GROUPS = ("18-24", "25-34", "35-44", "45-54", "55-64", "65+")
HOUSEHOLDS = ("single", "couple", "family", "shared")
INCOMES = ("low", "middle", "high")


@dataclass(frozen=True, kw_only=True)
class Users:
    """Columns of length U."""

    mixture: np.ndarray
    """p_u, float64 [U, K], rows sum to 1."""
    class_taste: np.ndarray
    """w^c, float64 [U, 16]."""
    visual_taste: np.ndarray
    """w^v, float64 [U, 4]."""
    text_taste: np.ndarray
    """w^t, float64 [U, 6]."""
    price_sensitivity: np.ndarray
    activity: np.ndarray
    """Share of all sessions; sums to 1."""
    stores: np.ndarray
    """int64 [U, stores_per_user]: where the user shops, the most visited first."""
    store_km: np.ndarray
    """float64 [U, stores_per_user]: how far that is."""
    regular: np.ndarray
    """bool: rebuys without a click."""
    age_group: np.ndarray
    household: np.ndarray
    income: np.ndarray


def make_users(stores: Stores, config: CityConfig) -> Users:
    """Draw everybody.

    Age group and household depend on the preference mixture and income on price sensitivity, so
    that a new user's columns are partly informative.
    """
    rng = np.random.default_rng([config.seed, 2])
    count, groups = config.users, config.taste_groups
    mixture = rng.dirichlet(np.full(groups, config.taste_concentration), size=count)

    def taste(dims: int, noise: float) -> np.ndarray:
        loading_KD = rng.standard_normal((groups, dims))
        # All preference groups are equally strong, so that cities of different seeds are equally hard.
        loading_KD *= np.sqrt(dims) / np.linalg.norm(loading_KD, axis=1, keepdims=True)
        return mixture @ loading_KD + noise * rng.standard_normal((count, dims))

    class_taste = taste(config.class_dims, config.class_noise)
    visual_taste = taste(len(VISUAL_FACTORS), config.content_noise)
    visual_taste[:, VISUAL_FACTORS.index("freshness")] += config.freshness_weight
    text_taste = taste(len(TEXT_FACTORS), config.content_noise)
    sensitivity = np.exp(rng.normal(0.0, config.price_sensitivity_spread, size=count))
    activity = np.exp(rng.normal(0.0, config.activity_spread, size=count))

    home = rng.uniform(0, config.city_side_km, size=(count, 2))
    kept = min(config.stores_per_user, config.stores)
    nearest = np.empty((count, kept), dtype=np.int64)
    km = np.empty((count, kept))
    for start in range(0, count, 4096):
        block = slice(start, min(start + 4096, count))
        distance = np.linalg.norm(home[block, None, :] - stores.place_km[None, :, :], axis=2)
        # People do not always use the nearest store.
        nearest[block] = np.argsort(distance + rng.exponential(config.store_choice_km, size=distance.shape), axis=1)[
            :, :kept
        ]
        km[block] = np.take_along_axis(distance, nearest[block], axis=1)

    group = np.argmax(mixture, axis=1)
    age = np.where(rng.random(count) < 0.6, group % len(AGE_GROUPS), rng.integers(len(AGE_GROUPS), size=count))
    household = np.where(rng.random(count) < 0.4, group % len(HOUSEHOLDS), rng.integers(len(HOUSEHOLDS), size=count))
    third = np.searchsorted(np.quantile(-sensitivity, [1 / 3, 2 / 3]), -sensitivity)
    income = np.where(rng.random(count) < 0.6, third, rng.integers(len(INCOMES), size=count))
    return Users(
        mixture=mixture,
        class_taste=class_taste,
        visual_taste=visual_taste,
        text_taste=text_taste,
        price_sensitivity=sensitivity,
        activity=activity / activity.sum(),
        stores=nearest,
        store_km=km,
        regular=rng.random(count) < config.regular_share,
        age_group=np.array(AGE_GROUPS)[age],
        household=np.array(HOUSEHOLDS)[household],
        income=np.array(INCOMES)[income],
    )
