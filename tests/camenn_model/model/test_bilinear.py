"""The preference product: the alternatives in a click's loss, against loops."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from camenn_model.batch import Batch
from camenn_model.config import STORE
from camenn_model.model.bilinear import ENOUGH_COEFFICIENT, FACTORS, LEAST_COEFFICIENT
from camenn_model.model.camenn import CameNN
from tests.support.random_batches import awake, random_batch, tiny_config


def woken() -> CameNN:
    torch.manual_seed(0)
    model = CameNN(tiny_config())
    awake(model)
    return model.eval()


def factors(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_choice_is_the_log_odds_among_what_the_store_sells() -> None:
    model = woken()
    width = FACTORS * model.config.width
    ours, theirs = factors(9, width, 1), factors(5, width, 2)
    store = torch.tensor([3, 3, 1, 1, 2])
    audience = torch.tensor([0, 0, 1, 2, 2, 3, 3, 1])
    item = torch.tensor([0, 1, 2, 3, 4, 5, 6, 1])
    with torch.no_grad():
        found = model.affinity.choice(ours, theirs, item, audience, store)
        drawn = theirs @ ours.T * model.affinity.log_sharpness.exp() + model.affinity.sought(ours).squeeze(-1)
    for place, (row, clicked) in enumerate(zip(audience.tolist(), item.tolist(), strict=True)):
        pairs = list(zip(audience.tolist(), item.tolist(), strict=True))
        own = {i for a, i in pairs if a == row}
        others = {i for a, i in pairs if store[a] == store[row]} - own
        total = sum(math.exp(float(drawn[row, i])) for i in others)
        expected = float(drawn[row, clicked]) - (math.log(total) if others else -1e9)
        assert math.isclose(float(found[place]), expected, rel_tol=1e-5, abs_tol=1e-6)


def test_a_click_without_alternatives_costs_nothing() -> None:
    model = woken()
    ours, theirs = factors(2, FACTORS * model.config.width, 1), factors(2, FACTORS * model.config.width, 2)
    # Two stores, one listing each: neither of the two clicks has an alternative.
    places = torch.tensor([0, 1])
    with torch.no_grad():
        choice = model.affinity.choice(ours, theirs, places, places, torch.tensor([1, 2]))
    assert float(torch.nn.functional.softplus(-choice).max()) == 0.0


def test_what_other_stores_sell_changes_no_choice() -> None:
    model = woken()
    ours, theirs = factors(4, FACTORS * model.config.width, 1), factors(4, FACTORS * model.config.width, 2)
    # Rows 0 and 1 click listings 0 and 1 in the first store, rows 2 and 3 listings 2 and 3 in the second.
    places, store = torch.arange(4), torch.tensor([1, 1, 2, 2])
    moved = ours.clone()
    moved[2:] *= -2.0
    with torch.no_grad():
        before, after = (model.affinity.choice(f, theirs, places, places, store) for f in (ours, moved))
    assert torch.equal(before[:2], after[:2])
    assert not torch.isclose(before[2:], after[2:]).any()


def test_choose_is_what_the_whole_forward_pass_says() -> None:
    model = woken()
    batch = random_batch(model.config, items=12, audience=6, pairs=30)
    with torch.no_grad():
        whole, alone = model(batch).choice, model.choose(batch)
        assert torch.equal(whole, alone)
        # Its stores are the audience's.
        names = [field.name for field in model.config.audience_categorical]
        cats = batch.audience.cats.clone()
        cats[:, names.index(STORE)] = torch.arange(len(cats)) % 2
        audience = dataclasses.replace(batch.audience, cats=cats)
        assert not torch.equal(model.choose(dataclasses.replace(batch, audience=audience)), alone)


@pytest.mark.parametrize("coefficients", [-0.5, 0.0, 0.1, ENOUGH_COEFFICIENT, 2.5])
def test_tastes_start_as_large_as_they_are_worth_and_hand_both_sides_gradients(coefficients: float) -> None:
    model = woken()
    batch = random_batch(model.config, items=12, audience=6, pairs=30)
    with torch.no_grad():
        liked = model.liked(batch)
        share = float(model.affinity.start_coefficients(torch.tensor([coefficients, 0.3, -0.7])))
    assert share == pytest.approx(min(max(coefficients / ENOUGH_COEFFICIENT, 0.0), 1.0))
    found = liked_by_orders(model, batch)
    expected = liked * torch.tensor([max(coefficients, LEAST_COEFFICIENT) * share, 0.3, -0.7])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found[:, 0].sum().backward()
    given = [model.affinity.audience.out.weight] + ([model.affinity.item.out.weight] if coefficients > 0 else [])
    assert all(weight.grad is not None and bool((weight.grad != 0).any()) for weight in given)


def liked_by_orders(model: CameNN, batch: Batch) -> torch.Tensor:
    """Pieces of the product [B, 3] as in the CVR logit."""
    items = model.item_tokens(batch.items)
    audience = model.audience_tokens(batch.audience, *model.item_tokens.liked(batch.history))
    ours, _ = model.affinity.vectors(items.summary, side=0)
    theirs, _ = model.affinity.vectors(audience.summary, side=1)
    return model.affinity.pieces(model.affinity.of_orders(ours), theirs, batch.pairs.item, batch.pairs.audience)
