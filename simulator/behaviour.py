"""People's behaviour on one day.

It is made of sessions, exposures, clicks and orders.

Every day has its own random stream, so a day can be regenerated alone. Axes: N sessions of one
store, L its listings on offer, E exposures per session. Formulas: docs/explanation/city.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from simulator.catalog import Catalog
from simulator.config import DAY_SECONDS, CityConfig
from simulator.people import Users

_MATRIX_CELLS = 2_000_000
"""Sessions × listings held at once: bounds memory whatever the sizes."""

_HOUR_SHARES = np.array(
    [1, 0.5, 0.3, 0.2, 0.2, 0.6, 2, 4, 5, 4.5, 4.5, 5.5, 6, 4.5, 3.5, 3.5, 4.5, 7, 8.5, 8.5, 7, 5, 3.5, 2]
)
_WEEKDAY_SHARES = np.array([0.95, 0.9, 0.9, 0.95, 1.05, 1.2, 1.15])
_HOUR = 3_600.0


@dataclass(frozen=True, kw_only=True)
class Clicks:
    """Columns of one day's clicks.

    Times: float64 seconds since local midnight of the first day.
    """

    session: np.ndarray
    """int64: number of the session within the day."""
    user: np.ndarray
    listing: np.ndarray
    position: np.ndarray
    clicked: np.ndarray
    uniform: np.ndarray
    """bool: the session's exposure was uniform over the candidates."""
    class_term: np.ndarray
    """a."""
    visual_term: np.ndarray
    """v̂, of the true product, including `content_weight`."""
    text_term: np.ndarray
    """t̂, of the true product, including `content_weight`."""
    context_term: np.ndarray
    """o."""
    p_click: np.ndarray
    """Probability of this click given its exposure, examination included."""
    p_order: np.ndarray
    """Probability of an order, ever, given the click."""
    ordered: np.ndarray

    def __len__(self) -> int:
        return len(self.user)


@dataclass(frozen=True, kw_only=True)
class Orders:
    """Columns of order lines. Times as in Clicks."""

    basket: np.ndarray
    """int64: number of the order within the day's output. Its lines share it."""
    user: np.ndarray
    listing: np.ndarray
    ordered: np.ndarray
    quantity: np.ndarray

    def __len__(self) -> int:
        return len(self.user)


@dataclass(frozen=True, kw_only=True)
class Day:
    """One day of the city.

    It has the number of exposures, clicks in time order, and the order lines that follow, on
    whichever day.
    """

    day: int
    exposures: int
    clicks: Clicks
    orders: Orders


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def sessions_per_day(config: CityConfig) -> np.ndarray:
    """Return the sessions of each day, int64 [days].

    They sum to `config.sessions`. Weekends are busier.
    """
    rng = np.random.default_rng([config.seed, 3])
    first = np.datetime64(config.start_date, "D")
    weekday = (first + np.arange(config.days)).astype(int) + 3  # 1970-01-01 was a Thursday.
    share = _WEEKDAY_SHARES[weekday % 7]
    return rng.multinomial(config.sessions, share / share.sum())


def _context(
    catalog: Catalog,
    users: Users,
    config: CityConfig,
    peak_hours: np.ndarray,
    user: np.ndarray,
    km: np.ndarray,
    hour: np.ndarray,
    store: int,
    on_offer: np.ndarray,
) -> np.ndarray:
    """Compute o, float64 [N, L]."""
    price = users.price_sensitivity[user][:, None] * catalog.listings.relative_price[on_offer][None, :]
    peak = peak_hours[catalog.listings.class_id[on_offer]][None, :]
    return (
        config.price_weight * price
        + config.hour_weight * np.cos(2 * np.pi * (hour[:, None] - peak) / 24)
        + config.distance_weight * km[:, None]
        + config.quality_weight * catalog.stores.quality[store]
    )


def category_peaks(catalog: Catalog, config: CityConfig) -> np.ndarray:
    """Return the peak hour of each class's category.

    φ, float64 [C], is the local hour at which the class's category is most wanted.
    """
    rng = np.random.default_rng([config.seed, 4])
    names = sorted({c.category for c in catalog.classes})
    peak = rng.uniform(0, 24, size=len(names))
    return peak[[names.index(c.category) for c in catalog.classes]]


def _store_clicks(
    catalog: Catalog,
    users: Users,
    config: CityConfig,
    peak_hours: np.ndarray,
    store: int,
    on_offer: np.ndarray,
    session: np.ndarray,
    user: np.ndarray,
    km: np.ndarray,
    start: np.ndarray,
    rng: np.random.Generator,
) -> tuple[int, Clicks]:
    """Simulate the sessions in one store.

    Returns their (exposures, clicks). `start` is in seconds since the first midnight.
    """
    listings = catalog.listings
    class_id = listings.class_id[on_offer]
    hour = (start % DAY_SECONDS) / _HOUR
    a_NL = users.class_taste[user] @ catalog.vectors[class_id].T / np.sqrt(config.class_dims)
    o_NL = _context(catalog, users, config, peak_hours, user, km, hour, store, on_offer)

    many = min(config.candidates, len(on_offer))
    shown = min(config.shown, many)
    keys_NL = rng.random((len(user), len(on_offer)))
    chosen_NC = np.argpartition(keys_NL, many - 1, axis=1)[:, :many]
    appeal_NC = np.take_along_axis(a_NL + config.exposure_context * o_NL, chosen_NC, axis=1)
    uniform = rng.random(len(user)) < config.uniform_share
    score_NC = config.exposure_sharpness * np.where(uniform[:, None], 0.0, appeal_NC) + rng.gumbel(size=appeal_NC.shape)
    top_NE = np.argsort(-score_NC, axis=1)[:, :shown]
    item_NE = np.take_along_axis(chosen_NC, top_NE, axis=1)

    listing_NE = on_offer[item_NE]
    a = np.take_along_axis(a_NL, item_NE, axis=1)
    o = np.take_along_axis(o_NL, item_NE, axis=1)
    visual_NL = config.content_weight * (users.visual_taste[user] @ listings.visual[on_offer].T / 2.0)
    text_NL = config.content_weight * (users.text_taste[user] @ listings.text[on_offer].T / np.sqrt(6.0))
    visual = np.take_along_axis(visual_NL, item_NE, axis=1)
    text = np.take_along_axis(text_NL, item_NE, axis=1)
    image_ok = listings.image_ok[listing_NE]
    text_ok = listings.text_ok[listing_NE]
    examined = (1.0 + np.arange(shown)) ** -config.examination_power
    p_click = examined[None, :] * _sigmoid(
        config.click_bias
        + config.click_class * a
        + config.click_visual * visual * image_ok
        + config.click_text * text * text_ok
        + config.click_context * o
        + config.click_bad_image * ~image_ok
        + config.click_bad_text * ~text_ok
    )
    hit = rng.random(p_click.shape) < p_click
    row, position = np.nonzero(hit)
    p_order = _sigmoid(
        config.order_bias
        + config.order_class * a[hit]
        + config.order_visual * visual[hit]
        + config.order_text * text[hit]
        + config.order_context * o[hit]
        + config.order_mismatch * listings.mismatched[listing_NE[hit]]
    )
    # Clicks go down the page, each a little after the one before.
    pause = rng.exponential(config.seconds_between_clicks, size=len(row))
    total = np.cumsum(pause)
    first = np.searchsorted(row, row, side="left")
    clicked = start[row] + total - (total - pause)[first]
    clicks = Clicks(
        session=session[row],
        user=user[row],
        listing=listing_NE[hit],
        position=position,
        clicked=clicked,
        uniform=uniform[row],
        class_term=a[hit],
        visual_term=visual[hit],
        text_term=text[hit],
        context_term=o[hit],
        p_click=p_click[hit],
        p_order=p_order,
        ordered=rng.random(len(row)) < p_order,
    )
    return hit.size, clicks


def _concatenate(parts: list[Clicks]) -> Clicks:
    """Concatenate all parts, in order of time."""
    names = list(Clicks.__dataclass_fields__)
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    order = np.lexsort((columns["position"], columns["session"], columns["clicked"]))
    return Clicks(**{name: column[order] for name, column in columns.items()})


def order_lines(clicks: Clicks, users: Users, config: CityConfig, rng: np.random.Generator) -> Orders:
    """Draw the order lines that follow from clicks.

    Returns are included, and direct repurchases by regulars without a click.

    A session's quick lines are one basket, bought `quick_hours` on average after its last click.
    Its slow ones are another.
    """
    bought = np.flatnonzero(clicks.ordered)
    slow = rng.random(len(bought)) >= config.quick_share
    basket_key, basket = np.unique(2 * clicks.session[bought] + slow, return_inverse=True)
    last_click = np.full(len(basket_key), -np.inf)
    np.maximum.at(last_click, basket, clicks.clicked[bought])
    hours = rng.exponential(np.where(basket_key % 2 == 1, config.slow_hours, config.quick_hours))
    user, listing = clicks.user[bought], clicks.listing[bought]
    ordered = (last_click + hours * _HOUR)[basket]
    quantity = 1.0 + rng.poisson(config.extra_pieces, size=len(bought))
    parts = [(basket, user, listing, ordered, quantity)]
    next_basket = len(basket_key)

    returned = rng.random(len(bought)) < config.return_rate
    parts.append(
        (
            next_basket + np.arange(returned.sum()),
            user[returned],
            listing[returned],
            ordered[returned] + DAY_SECONDS * rng.uniform(0.5, 3.0, size=returned.sum()),
            -quantity[returned],
        )
    )
    next_basket += int(returned.sum())

    end = config.days * DAY_SECONDS
    while len(user):
        again = users.regular[user] & (rng.random(len(user)) < config.rebuy_probability)
        user, listing = user[again], listing[again]
        ordered = ordered[again] + DAY_SECONDS * (1.0 + rng.exponential(config.rebuy_days - 1.0, size=len(user)))
        inside = ordered < end
        user, listing, ordered = user[inside], listing[inside], ordered[inside]
        number = next_basket + np.arange(len(user))
        parts.append((number, user, listing, ordered, 1.0 + rng.poisson(config.extra_pieces, size=len(user))))
        next_basket += len(user)

    columns = [np.concatenate([part[i] for part in parts]) for i in range(5)]
    # Events after the log's end are not in the log.
    kept = np.flatnonzero(columns[3] < end)
    kept = kept[np.lexsort((columns[2][kept], columns[0][kept], columns[3][kept]))]
    return Orders(
        basket=columns[0][kept],
        user=columns[1][kept],
        listing=columns[2][kept],
        ordered=columns[3][kept],
        quantity=columns[4][kept],
    )


def simulate_day(catalog: Catalog, users: Users, config: CityConfig, day: int, sessions: int) -> Day:
    """Simulate everything that starts on `day` (from 0).

    Its number of sessions is given.
    """
    rng = np.random.default_rng([config.seed, 5, day])
    peak_hours = category_peaks(catalog, config)
    user = rng.choice(config.users, size=sessions, p=users.activity)
    visits = np.array(config.store_visit_shares[: users.stores.shape[1]])
    slot = rng.choice(len(visits), size=sessions, p=visits / visits.sum())
    store, km = users.stores[user, slot], users.store_km[user, slot]
    hour = rng.choice(24, size=sessions, p=_HOUR_SHARES / _HOUR_SHARES.sum())
    start = np.sort(hour * _HOUR + rng.uniform(0, _HOUR, size=sessions)) + day * DAY_SECONDS
    available = catalog.listings.first_day <= day

    exposures, parts = 0, []
    for number in np.unique(store):
        on_offer = np.flatnonzero((catalog.listings.store == number) & available)
        mine = np.flatnonzero(store == number)
        step = max(1, _MATRIX_CELLS // len(on_offer))
        for block in (mine[i : i + step] for i in range(0, len(mine), step)):
            shown, clicks = _store_clicks(
                catalog,
                users,
                config,
                peak_hours,
                int(number),
                on_offer,
                block,
                user[block],
                km[block],
                start[block],
                rng,
            )
            exposures += shown
            parts.append(clicks)
    clicks = _concatenate(parts)
    return Day(day=day, exposures=exposures, clicks=clicks, orders=order_lines(clicks, users, config, rng))


def simulate_days(catalog: Catalog, users: Users, config: CityConfig) -> Iterator[Day]:
    """Simulate every day with sessions, in order.

    One is in memory at a time.
    """
    for day, sessions in enumerate(sessions_per_day(config)):
        if sessions:
            yield simulate_day(catalog, users, config, day, int(sessions))
