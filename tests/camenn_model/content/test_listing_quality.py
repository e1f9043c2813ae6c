"""Lost orders of flagged listings: by hand, and properties of any input."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from camenn_model.content.listing_quality import PRIOR_CLICKS, Activity, lost_orders


def test_lost_orders_by_hand() -> None:
    # Two subcategories; in the first, sound listings convert at 30 of 100, in the second nothing was clicked.
    group = np.array([0, 0, 0, 0, 1, 1])
    flagged = np.array([False, True, True, True, False, True])
    activity = Activity(clicks=np.array([100, 60, 60, 0, 0, 40]), orders=np.array([30, 3, 30, 0, 0, 0]))
    lost = lost_orders(group, flagged, activity)
    # The catalog's rate is 0.3 too, so smoothing changes nothing.
    assert lost == pytest.approx([0, 60 / 80 * (18 - 3), 0, 0, 0, 40 / 60 * 12])
    assert PRIOR_CLICKS == 20


def test_a_catalog_without_clicks_or_listings_lost_nothing() -> None:
    none = np.zeros(3, dtype=np.int64)
    assert not lost_orders(none, np.ones(3, dtype=bool), Activity(none, none)).any()
    assert len(lost_orders(none[:0], np.zeros(0, dtype=bool), Activity(none[:0], none[:0]))) == 0


ROWS = st.lists(
    st.tuples(st.integers(-1, 4), st.booleans(), st.integers(0, 500), st.integers(0, 500)), min_size=1, max_size=30
)


@given(ROWS)
def test_no_more_is_lost_than_was_to_be_had(rows: list[tuple[int, bool, int, int]]) -> None:
    group, flagged, clicks, bought = (np.array(column) for column in zip(*rows, strict=True))
    activity = Activity(clicks=clicks, orders=np.minimum(clicks, bought))
    lost = lost_orders(group, flagged, activity)
    assert (lost >= 0).all() and not lost[~flagged].any()
    assert (lost <= clicks - activity.orders + 1e-9).all()
