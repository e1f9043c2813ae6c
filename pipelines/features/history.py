"""Find what a user clicked and ordered before a click."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.features.as_of import Events, Floats
from pipelines.features.time_index import HOUR_US, NEVER, Ints, TimeIndex
from schemas.training import CLICKED, NO_HISTORY, PURCHASED


@dataclass(frozen=True, kw_only=True)
class History:
    """The last entries of each query's user, latest first.

    They are item code (-1 = padding), kind and hours before, each [n, length].
    """

    item: NDArray[np.int32]
    kind: NDArray[np.int8]
    hours: Floats


CLICKS_OF_HISTORY = 4
"""One in so many places of a history is reserved for the latest clicks without a known purchase.
Older clicks yield their places to older purchases."""

CELLS = 2_000_000
"""Places of histories that are found at once"""


def user_history(events: Events, user: Ints, time: Ints, length: int) -> History:
    """Return the last entries of each user's history.

    These are a user's last purchases, and clicks without a known purchase, strictly before `time`,
    at most `length`, latest first.

    They are the last `length` of both, but a click that is not among the latest `length // 4`
    clicks yields its place to a purchase before all of them, if there is one. The reason: people
    click several listings for each that they buy, and purchases are more informative. A click whose
    credited order came before `time` is left out, as the purchase itself stands in the list. Ties
    in time are ordered purchases first, then by item code, so that the result does not depend on
    the order of files.
    """
    n_clicks, n_orders = len(events.click_user), len(events.order_user)
    if not n_clicks + n_orders or not len(user):
        shape = (len(user), length)
        return History(
            item=np.full(shape, -1, dtype=np.int32),
            kind=np.full(shape, NO_HISTORY, dtype=np.int8),
            hours=np.zeros(shape, dtype=np.float32),
        )
    who = np.concatenate([events.click_user, events.order_user])
    when = np.concatenate([events.clicked_at, events.ordered_at])
    item = np.concatenate([events.click_item, events.order_item])
    converted = np.concatenate([events.converted_at, np.full(n_orders, NEVER)])
    kind = np.concatenate([np.full(n_clicks, CLICKED), np.full(n_orders, PURCHASED)]).astype(np.int8)
    index = TimeIndex(who, when)
    same = index.combined[1:] == index.combined[:-1]
    tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
    event = index.order[tied]
    index.order[tied] = event[np.lexsort((-item[event], kind[event], index.combined[tied]))]
    bought = index.order[kind[index.order] == PURCHASED]
    log = _Log(when, item, kind, converted, index, bought, TimeIndex(who[bought], when[bought]))
    rows = max(1, CELLS // length)
    pieces = [_latest(log, user[at : at + rows], time[at : at + rows], length) for at in range(0, len(user), rows)]
    return History(
        **{name: np.concatenate([vars(piece)[name] for piece in pieces]) for name in ("item", "kind", "hours")}
    )


@dataclass(frozen=True)
class _Log:
    """All clicks and orders, by user and time."""

    when: Ints
    item: Ints
    kind: NDArray[np.int8]
    converted: Ints
    index: TimeIndex
    bought: Ints
    purchases: TimeIndex  # of `bought`


def _latest(log: _Log, user: Ints, time: Ints, length: int) -> History:
    """Return the histories of some queries."""
    index, bought, kind = log.index, log.bought, log.kind
    start, end = index.bounds(user, time)
    # Each click left out has its own order, later than the click and before `time`: of the last
    # 2·length events at least `length` stay.
    position = end[:, None] - np.arange(1, 2 * length + 1)[None, :]
    inside = position >= start[:, None]
    event = index.order[np.where(inside, position, 0)]
    keep = inside & (log.converted[event] >= time[:, None])
    place = np.argsort(~keep, axis=1, kind="stable")[:, :length]
    keep = np.take_along_axis(keep, place, axis=1)
    event = np.take_along_axis(event, place, axis=1)

    # Purchases alone, in the same order: those before the ones that are in the list already.
    if len(bought):
        first, last = log.purchases.bounds(user, time)
        listed = (keep & (kind[event] == PURCHASED)).sum(axis=1)
        clicked = keep & (kind[event] == CLICKED)
        yields = np.minimum(np.maximum(clicked.sum(axis=1) - length // CLICKS_OF_HISTORY, 0), last - first - listed)
        # The oldest clicks yield.
        gone = clicked & (clicked[:, ::-1].cumsum(axis=1)[:, ::-1] <= yields[:, None])
        place = np.argsort(gone | ~keep, axis=1, kind="stable")
        keep = np.take_along_axis(keep & ~gone, place, axis=1)
        event = np.take_along_axis(event, place, axis=1)
        number = np.arange(length)[None, :] - keep.sum(axis=1)[:, None]
        older = (number >= 0) & (number < yields[:, None])
        position = (last - listed - 1)[:, None] - number
        event = np.where(older, bought[log.purchases.order[np.where(older, position, 0)]], event)
        keep |= older
    hours = ((time[:, None] - log.when[event]) / HOUR_US).astype(np.float32)
    return History(
        item=np.where(keep, log.item[event], -1).astype(np.int32),
        kind=np.where(keep, kind[event], NO_HISTORY).astype(np.int8),
        hours=np.where(keep, hours, np.float32(0)),
    )
