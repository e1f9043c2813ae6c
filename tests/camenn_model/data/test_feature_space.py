"""Buckets of numeric columns, and codes of ids."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from camenn_model.content.agreement import Agreement
from camenn_model.content.price_against_similar import Likeness
from camenn_model.data import field_encoders
from camenn_model.data.feature_space import CatalogFeatures, FeatureSpace
from camenn_model.data.field_encoders import MIN_ID_CLICKS, MISSING, QUANTILE_BUCKETS, RARE, Numeric, Vocabulary
from schemas.contract import TIMESTAMP
from schemas.training import AUDIENCE_COUNTS, ITEM_COUNTS, ITEM_NUMBERS, ITEM_QUALITY, PAIR_COUNTS


@settings(deadline=None)
@given(
    values=st.lists(
        st.sampled_from([-3.0, 0.0, 0.25, 1.0, 2.0, 7.0, 1e6]) | st.floats(-10, 10, width=32), min_size=1, max_size=300
    ),
    others=st.lists(st.floats(-20, 20, width=32), max_size=20),
)
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


@settings(deadline=None)
@given(
    values=st.lists(st.floats(-10, 10, width=32) | st.floats(0, 1e6, width=32), min_size=1, max_size=50),
    asked=st.lists(st.floats(-1e7, 1e7, width=32), min_size=1, max_size=20),
)
def test_beyond_what_training_has_seen_nothing_changes(values: list[float], asked: list[float]) -> None:
    column = np.array(values, dtype=np.float32)
    number = Numeric.fit(column)
    beyond = np.array(asked, dtype=np.float32)
    found, within = number.encode(beyond), number.encode(np.clip(beyond, column.min(), column.max()))
    np.testing.assert_array_equal(found[0], within[0])
    np.testing.assert_array_equal(found[1], within[1])


def test_missing_values_have_their_own_bucket() -> None:
    number = Numeric.fit(np.array([1, np.nan, 2], dtype=np.float32))
    values, buckets = number.encode(np.array([np.nan, 1.5], dtype=np.float32))
    assert buckets[0] == MISSING and values[0] == 0 and buckets[1] > MISSING
    unknown = Numeric.fit(np.array([np.nan], dtype=np.float32))
    assert unknown.size == 2
    # Nothing was learned of its values.
    value, bucket = unknown.encode(np.array([np.nan, 0, 7], dtype=np.float32))
    assert value.tolist() == [0, 0, 0] and bucket.tolist() == [0, 0, 0]


def test_a_listing_offered_since_training_is_not_taken_for_one_that_nobody_wants() -> None:
    seen = ["often"] * MIN_ID_CLICKS + ["rare"] * (MIN_ID_CLICKS - 1)
    day = 86_400_000_000
    text = {name: pa.array(["x"] * 5, pa.string()) for name in ("category", "subcategory", "brand")}
    numbers = {c.name: pa.array([1.0] * 5, pa.float32()) for c in (*ITEM_NUMBERS, *ITEM_QUALITY)}
    items = pa.table(
        {
            "item_id": pa.array(["often", "rare", "unknown", "new", "at the end"], pa.string()),
            **text,
            "listed_at": pa.array([None, 0, None, 10 * day + 1, 10 * day], TIMESTAMP),
            **numbers,
        }
    )
    counts = {
        c.name: pa.array(np.ones(len(seen)), pa.float32()) for c in (*AUDIENCE_COUNTS, *ITEM_COUNTS, *PAIR_COUNTS)
    }
    examples = pa.table(
        {
            "item_id": pa.array(seen, pa.string()),
            "user_id": pa.array(["u"] * len(seen), pa.string()),
            "store_id": pa.array(["s"] * len(seen), pa.string()),
            "session_start": pa.array(np.linspace(0, 10, len(seen)).astype(int) * day, TIMESTAMP),
            **counts,
        }
    )
    users = pa.table({"user_id": pa.array([], pa.string())})
    some = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    reported = CatalogFeatures(np.ones(5, dtype=np.float32), np.ones(5, dtype=np.float32))
    space = FeatureSpace.fit(items, users, examples, Likeness.fit(some, some), Agreement.none(), reported)
    cats, _, _ = space.encode_items(items, reported)
    often, *others = cats[:, 3].tolist()
    assert often > RARE and others == [RARE, RARE, MISSING, RARE]


def test_a_full_vocabulary_does_not_depend_on_the_order_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(field_encoders, "MAX_VOCABULARY", 3)
    values = ["rare", "b", "d", "a", "c", "a", "d", "b", "c", "d", None]
    for seed in range(10):
        mixed = np.random.default_rng(seed).permutation(np.array(values, dtype=object)).tolist()
        assert Vocabulary.fit(pa.array(mixed, pa.string())).values == ("a", "b", "d")
