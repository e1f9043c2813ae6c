"""Attribute orders to clicks."""

import numpy as np

from pipelines.features.time_index import NEVER, Ints, TimeIndex


def attribute_orders(
    click_pair: Ints, click_time: Ints, order_pair: Ints, order_time: Ints, window: int
) -> tuple[Ints, Ints]:
    """Credit each order to the latest click before it.

    The click is of the same (user, item), at or before the order, and no more than `window`
    microseconds back.

    Args:
        click_pair: code of each click's (user, item), int64 [clicks].
        click_time: time of each click, int64 microseconds. Of clicks at the same time the last in
            input order takes the order.
        order_pair: code of each order's (user, item), int64 [orders].
        order_time: time of each order, int64 microseconds.
        window: attribution window, microseconds.

    Returns:
        (credited click of each order, int64 [orders], -1 = none, and time of the first order
            credited to each click, int64 [clicks], NEVER = none).
    """
    index = TimeIndex.of_asked(order_pair, click_pair, click_time)
    start, end = index.bounds(order_pair, order_time, inclusive=True)
    credited = np.full(len(order_pair), -1, dtype=np.int64)
    some = end > start
    credited[some] = index.order[end[some] - 1]
    some[some] = order_time[some] - click_time[credited[some]] <= window
    credited[~some] = -1
    first = np.full(len(click_pair), NEVER)
    np.minimum.at(first, credited[some], order_time[some])
    return credited, first
