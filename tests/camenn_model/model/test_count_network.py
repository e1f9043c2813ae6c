"""Interactions of counts: fitted where a sum of their parts cannot represent them; 0 where there are none."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from camenn_model.evaluation import metrics
from camenn_model.model.count_network import Counts
from camenn_model.training.fit_counts import EPOCHS, CountRows, fit_counts, predict_logits
from tests.support.random_batches import FIELDS, tiny_config

CONFIG = tiny_config()
BASE = math.log(0.3 / 0.7)


def drawn(examples: int, seed: int) -> CountRows:
    """Random counts; an order where the audience row's and the item's lie on the same side of the middle."""
    generator = torch.Generator().manual_seed(seed)
    sides = [
        torch.stack([torch.randint(0, field.size, (examples,), generator=generator) for field in fields], dim=1)
        for fields in (CONFIG.audience_numeric, CONFIG.pair_numeric)
    ]
    values = [torch.where(buckets > 0, buckets - 3.0, 7.0) for buckets in sides]
    same = (sides[0][:, 0] > 2) == (sides[1][:, 0] > 2)
    label = (torch.rand(examples, generator=generator) < torch.where(same, 0.5, 0.1)).float()
    return CountRows(values[0], sides[0], values[1], sides[1], label)


def fit(counts: Counts, train: CountRows, stop: CountRows, reported: list[str] | None = None) -> float:
    return fit_counts(
        counts, BASE, train, stop, 0, lambda *given: reported.append(str(given)) if reported is not None else None
    )


def test_says_nothing_before_it_is_fitted() -> None:
    assert torch.equal(predict_logits(Counts(CONFIG), drawn(50, 0)), torch.zeros(50))


def test_finds_what_two_counts_say_together_where_none_says_anything_alone() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    train, stop, test = drawn(6_000, 1), drawn(2_000, 2), drawn(2_000, 3)
    counts = Counts(CONFIG)
    reported: list[str] = []
    found = fit(counts, train, stop, reported)
    assert len(reported) == EPOCHS
    logits = predict_logits(counts, test)
    # The best possible prediction is the two rates, each for half of the pairs.
    best = metrics.auc(test.label, (test.audience_buckets[:, 0] > 2) == (test.buckets[:, 0] > 2))
    assert metrics.auc(test.label, logits) > best - 0.02 > 0.65
    design = [
        F.one_hot(torch.cat([rows.audience_buckets, rows.buckets], 1), 6).flatten(1).numpy() for rows in (train, test)
    ]
    peer = linear_model.LogisticRegression().fit(design[0], train.label.numpy())
    assert metrics.auc(test.label, peer.decision_function(design[1])) < 0.55
    assert found == pytest.approx(
        float(F.binary_cross_entropy_with_logits(BASE + predict_logits(counts, stop), stop.label))
    )


def test_says_nothing_where_counts_tell_nothing() -> None:
    train, stop = drawn(300, 4), drawn(300, 5)
    # The learned relation is wrong on the early-stop part: every epoch is worse than none.
    turned = dataclasses.replace(stop, label=1 - stop.label)
    counts = Counts(CONFIG)
    found = fit(counts, train, turned)
    assert found == pytest.approx(float(F.binary_cross_entropy_with_logits(torch.full((300,), BASE), turned.label)))
    assert torch.equal(predict_logits(counts, stop), torch.zeros(300))


def test_the_same_seed_finds_the_same() -> None:
    train, stop = drawn(500, 6), drawn(200, 7)
    pair = []
    for _ in range(2):
        torch.manual_seed(1)
        counts = Counts(CONFIG)
        fit(counts, train, stop)
        pair.append(predict_logits(counts, stop))
    assert torch.equal(*pair) and float(pair[0].std()) > 0


def test_a_missing_number_has_no_value() -> None:
    train = drawn(500, 8)
    counts = Counts(CONFIG)
    fit(counts, train, train)
    other = dataclasses.replace(train, values=torch.where(train.buckets > 0, train.values, -100.0))
    assert not torch.equal(other.values, train.values)
    assert torch.equal(predict_logits(counts, other), predict_logits(counts, train))


def test_worth_multiplies_what_is_said() -> None:
    train = drawn(500, 9)
    counts = Counts(CONFIG)
    fit(counts, train, train)
    before = predict_logits(counts, train)
    counts.scale(0.5)
    assert torch.allclose(predict_logits(counts, train), before / 2, atol=1e-6)


def test_without_counts_it_says_a_number_at_most() -> None:
    config = tiny_config(fields=tuple(field for field in FIELDS if field.kind == "categorical"))
    counts = Counts(config)
    none, label = (torch.zeros(40, 0), torch.zeros(40, 0, dtype=torch.int64)), (torch.arange(40) % 2).float()
    rows = CountRows(*none, *none, label)
    fit(counts, rows, rows)
    assert len(predict_logits(counts, rows).unique()) == 1
