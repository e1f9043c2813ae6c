"""Every constant of the city, written once.

The lower half of `CityConfig` is the behaviour model of docs/explanation/city.md, the upper half is sizes. Two
cities with equal configurations are equal file by file.
"""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from schemas.errors import InputError

VISUAL_FACTORS = ("freshness", "pieces", "fill", "label")
"""Factors that only the photo shows: share of unbrowned surface, number of pieces, fill of the
pack, a label present."""

TEXT_FACTORS = ("organic", "imported", "seedless", "heavy_pack", "brand_name", "promotion")
"""Factors that only the title mentions."""

DAY_SECONDS = 86_400.0

MAX_PHOTOS = 4000
"""Largest photo bank: every distinct picture is encoded once, however many listings use it."""

GENERATOR_VERSION = 4
"""Raised by one whenever the same configuration would give other files."""


@dataclass(frozen=True, kw_only=True)
class CityConfig:
    """Sizes, seed and behaviour of a city.

    Times are hours unless a name says otherwise. Distances are km.

    Raises:
        InputError: a size out of its range, naming the field and the range.
    """

    # Sizes.
    seed: int = 0
    clicks: int = 200_000
    """Clicks aimed at: fixes the number of sessions. The count that comes out differs by a few per cent."""
    listings: int = 8_000
    classes: int = 210
    products_per_class: int = 6
    stores: int = 80
    users: int = 1_500
    """Some 130 clicks each, as in a real grocery's log: a dozen do not determine a preference.

    Figures: docs/decisions/0025-simulated-city-and-controls.md
    """
    days: int = 56
    photos: int = 4_000
    photo_pixels: int = 300
    photo_folder: str | None = None
    """Folder of real photos (one sub-folder per class) used instead of drawings. Then `classes` is an upper limit."""
    start_date: str = "2024-03-04"
    timezone: str = "Asia/Shanghai"
    utc_offset_hours: int = 8
    """Local minus UTC. The zone above has no daylight saving."""

    # Listings.
    class_dims: int = 16
    group_share: float = 0.5
    """Share of the variance of z that the classes of one subcategory have in common."""
    text_rates: tuple[float, ...] = (0.3, 0.3, 0.25, 0.3, 0.4, 0.25)
    """Rate at which each of TEXT_FACTORS is 1."""
    most_pieces: int = 9
    most_browned: float = 0.8
    """Share of the product's surface that is brown at the lowest freshness."""
    label_rate: float = 0.5
    price_spread: float = 0.25
    """Standard deviation of log price around the class's own."""
    cold_share: float = 0.2
    """Share of listings that first appear in the test days."""
    test_share: float = 0.2
    """Share of days, the last ones, that are test days."""

    # People.
    taste_groups: int = 6
    taste_concentration: float = 0.3
    class_noise: float = 0.5
    content_noise: float = 0.3
    freshness_weight: float = 0.8
    price_sensitivity_spread: float = 0.4
    activity_spread: float = 0.8
    km_between_stores: float = 4.6
    """Side of the city, over the square root of the number of stores: all cities are equally dense."""
    store_choice_km: float = 3.0
    """How much farther than the nearest store people go, on average: an exponential mean."""
    stores_per_user: int = 3
    store_visit_shares: tuple[float, ...] = (0.6, 0.3, 0.1)

    # Context utility o.
    price_weight: float = -0.5
    hour_weight: float = 0.4
    distance_weight: float = -0.12
    quality_weight: float = 0.35

    # Exposure and clicks.
    candidates: int = 60
    shown: int = 20
    exposure_sharpness: float = 0.6
    exposure_context: float = 0.5
    uniform_share: float = 0.1
    examination_power: float = 0.6
    expected_ctr: float = 0.047
    """Used only to turn `clicks` into a number of sessions."""
    click_bias: float = -2.15
    click_class: float = 1.0
    click_visual: float = 0.7
    click_text: float = 0.5
    click_context: float = 0.5
    click_bad_image: float = -0.35
    click_bad_text: float = -0.2
    seconds_between_clicks: float = 25.0

    # Orders.
    order_bias: float = -2.75
    order_class: float = 0.7
    order_visual: float = 0.9
    order_text: float = 0.8
    order_context: float = 0.9
    order_mismatch: float = -1.0
    content_weight: float = 1.0
    """Multiplies the four weights of visual and text content: 0 is the control in which content has no effect."""
    quick_share: float = 0.75
    quick_hours: float = 0.35
    slow_hours: float = 5.0
    extra_pieces: float = 0.2
    return_rate: float = 0.005
    regular_share: float = 0.3
    rebuy_probability: float = 0.35
    rebuy_days: float = 6.0

    # Corruption.
    small_share: float = 0.6
    small_beta: tuple[float, float] = (3.0, 5.0)
    large_beta: tuple[float, float] = (1.0, 12.0)
    corruption: float = 1.0
    """Multiplies every store's corruption rate: 0 is the control in which every photo and title is right."""
    text_swap_share: float = 0.25
    image_swap_share: float = 0.2
    corrupted_photo_share: float = 0.2
    """Share of the photo bank that is blurred, downscaled, dark or occluded."""

    def __post_init__(self) -> None:
        ranges = {
            "seed": (0, 2**31 - 1),
            "clicks": (100, 10**9),
            "classes": (2, 5_000),
            "products_per_class": (1, 1_000),
            "stores": (2, 100_000),
            "users": (10, 10**8),
            "days": (2, 3_650),
            "photos": (2, MAX_PHOTOS),
            "photo_pixels": (75, 1_024),
            "content_weight": (0, 10),
            "corruption": (0, 1),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise InputError(f"simulate: {name} is {value}; choose it from {low} to {high}")
        pairs = self.stores * self.classes * self.products_per_class
        if not self.shown * self.stores <= self.listings <= pairs:
            raise InputError(
                f"simulate: listings is {self.listings}; with {self.stores} stores and {self.classes} classes of "
                f"{self.products_per_class} products choose it from {self.shown * self.stores} (a full page per store) "
                f"to {pairs} (every store lists everything), or change stores"
            )

    @property
    def sessions(self) -> int:
        """Return the number of sessions for about `clicks` clicks."""
        return math.ceil(self.clicks / (self.shown * self.expected_ctr))

    @property
    def city_side_km(self) -> float:
        """Return the side of the square city."""
        return self.km_between_stores * math.sqrt(self.stores)

    @property
    def first_test_day(self) -> int:
        """Return the index of the first test day, from 0."""
        return self.days - max(1, round(self.test_share * self.days))

    def to_json(self) -> dict[str, Any]:
        """Return plain values, with the generator's version.

        Tuples become lists.
        """
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {"generator_version": GENERATOR_VERSION, **values}


PRESETS: dict[str, CityConfig] = {
    "default": CityConfig(),
    "demo": CityConfig(
        clicks=20_000, listings=1_200, classes=84, products_per_class=4, stores=12, users=1_500, days=21, photos=600
    ),
    "tiny": CityConfig(
        clicks=2_000,
        listings=120,
        classes=12,
        products_per_class=5,
        stores=4,
        users=150,
        days=8,
        photos=60,
        photo_pixels=160,
    ),
}
"""`default`: docs/explanation/city.md's size; `demo`: under a minute; `tiny`: seconds, for tests."""


def preset_config(name: str, overrides: dict[str, Any]) -> CityConfig:
    """Return the preset `name` with `overrides` put over it.

    `overrides` maps field name → value.

    Raises:
        InputError: unknown preset or field, or a value out of range.
    """
    if name not in PRESETS:
        raise InputError(f"simulate: no preset '{name}'; choose one of {', '.join(sorted(PRESETS))}")
    unknown = set(overrides) - {f.name for f in fields(CityConfig)}
    if unknown:
        raise InputError(f"simulate: no such setting: {', '.join(sorted(unknown))}")
    return replace(PRESETS[name], **overrides)
