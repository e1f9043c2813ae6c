"""The preference space: against pairs of clicks taken one by one, and on clicks with known preferences."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from camenn_model.content import preference_directions
from camenn_model.content.preference_directions import find_preferences


def clicks(seed: int = 0, people: int = 40, each: int = 30) -> tuple[np.ndarray, ...]:
    """Return (features [200, 10], item, person, store) of clicks.

    People differ along feature 3, stores along feature 5. Feature 7 is loud and means nothing.
    """
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((200, 10))
    sold = np.arange(200) % 4
    features[:, 5] += 10 * sold
    features[:, 7] *= 20
    person = np.repeat(np.arange(people), each)
    store = rng.integers(0, 4, len(person))
    taste = rng.standard_normal(people) * 2
    item = np.zeros(len(person), dtype=np.int64)
    for number, (who, where) in enumerate(zip(person, store, strict=True)):
        offered = np.flatnonzero(sold == where)
        odds = np.exp(taste[who] * features[offered, 3])
        item[number] = rng.choice(offered, p=odds / odds.sum())
    return features, item, person, store


def test_it_finds_what_people_differ_in_and_not_what_stores_do() -> None:
    features, item, person, store = clicks()
    found = find_preferences(features, item, person, store, 4)
    first = found.directions[:, 0]
    assert np.abs(first).argmax() == 3
    # 40 people are few: the other directions contribute a little.
    assert np.abs(np.delete(first, 3)).max() < 0.4 * abs(first[3])
    assert found.shares[0] > 4 * found.shares[1]
    # Directions with little information are short.
    values = features[item] - np.stack([features[item[store == s]].mean(axis=0) for s in range(4)])[store]
    spread = (values @ found.directions).std(axis=0)
    expected = np.sqrt(found.shares / (found.shares + 1 / preference_directions.CLICKS)) * preference_directions.SPREAD
    assert np.allclose(spread, expected, rtol=1e-5)


def test_shares_are_those_of_pairs_taken_one_by_one() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    features, item, person, store = clicks(1, people=12, each=9)
    means = np.stack([features[item[store == s]].mean(axis=0) for s in range(4)])
    values = features[item] - means[store]
    between, pairs = np.zeros((10, 10)), 0
    for one, other in itertools.permutations(range(len(item)), 2):
        if person[one] == person[other] and item[one] != item[other]:
            between += np.outer(values[one], values[other])
            pairs += 1
    covariance = values.T @ values / len(values)
    penalty = preference_directions.PENALTY * np.trace(covariance) / 10 * np.eye(10)
    expected = linalg.eigh(between / pairs, covariance + penalty, eigvals_only=True)[::-1]
    found = find_preferences(features, item, person, store, 10)
    assert np.allclose(found.shares, expected[expected > 0], rtol=1e-6, atol=1e-9)
