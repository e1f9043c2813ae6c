"""Buckets of numeric columns."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from camenn_model.feature_space import MISSING, QUANTILE_BUCKETS, Numeric


@settings(deadline=None)
@given(
    values=st.lists(st.sampled_from([-3.0, 0.0, 0.25, 1.0, 2.0, 7.0, 1e6]) | st.floats(-10, 10, width=32), min_size=1, max_size=300),
    others=st.lists(st.floats(-20, 20, width=32), max_size=20),
)  # fmt: skip
def test_buckets_keep_the_order_and_leave_common_values_alone(values: list[float], others: list[float]) -> None:
    column = np.array(values, dtype=np.float32)
    number = Numeric.fit(column)
    asked = np.sort(np.concatenate([column, np.array(others, dtype=np.float32)]))
    _, buckets = number.encode(asked)
    assert (np.diff(buckets) >= 0).all()
    assert buckets.min() > MISSING and buckets.max() < number.size <= 3 * QUANTILE_BUCKETS + 3
    distinct, counts = np.unique(column, return_counts=True)
    _, of_distinct = number.encode(distinct)
    for value, count, bucket in zip(distinct, counts, of_distinct, strict=True):
        if count > len(column) / QUANTILE_BUCKETS:
            assert (distinct[of_distinct == bucket] == value).all()


def test_rare_counts_are_told_apart() -> None:
    """Nine in ten are 0: the quantiles of all would leave one bucket for whatever is more."""
    column = np.concatenate([np.zeros(9_000), np.repeat(np.arange(1, 101), 10)]).astype(np.float32)
    number = Numeric.fit(column)
    _, buckets = number.encode(column)
    assert len(np.unique(buckets)) == 1 + QUANTILE_BUCKETS
    _, counts = np.unique(buckets[column > 0], return_counts=True)
    assert counts.max() <= 1.5 * counts.min()


def test_missing_values_have_their_own_bucket() -> None:
    number = Numeric.fit(np.array([1, np.nan, 2], dtype=np.float32))
    values, buckets = number.encode(np.array([np.nan, 1.5], dtype=np.float32))
    assert buckets[0] == MISSING and values[0] == 0 and buckets[1] > MISSING
    assert Numeric.fit(np.array([np.nan], dtype=np.float32)).size == 2
