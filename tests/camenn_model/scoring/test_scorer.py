from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camenn_model.batch import Batch
from camenn_model.config import ModelConfig, Tokens
from camenn_model.model.camenn import CameNN
from camenn_model.scoring import scorer as scorer_module
from camenn_model.scoring.scorer import Scorer
from tests.support.random_batches import FIELDS, awake, random_batch, tiny_config


def woken(config: ModelConfig, seed: int = 0) -> CameNN:
    torch.manual_seed(seed)
    model = CameNN(config)
    awake(model, seed)
    return model.eval()


def grid_batch(config: ModelConfig, items: int, audience: int, history: int, seed: int) -> Batch:
    """A batch of every item with every audience row, row by row."""
    batch = random_batch(config, items=items, audience=audience, history=history, pairs=items * audience, seed=seed)
    pairs = dataclasses.replace(
        batch.pairs,
        item=torch.arange(items).repeat(audience),
        audience=torch.arange(audience).repeat_interleave(items),
    )
    return dataclasses.replace(batch, pairs=pairs)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    items=st.integers(1, 9),
    audience=st.integers(1, 7),
    history=st.integers(0, 5),
    layers=st.integers(1, 3),
    routing=st.sampled_from([(1, 1), (4, 1), (4, 2), (3, 3)]),
    tile=st.sampled_from([1, 5, 4096]),
    cvr_tokens=st.sampled_from(["all", "pooled"]),
    cvr_layers=st.sampled_from([True, True, False]),
)
def test_score_tile_equals_the_plain_forward(
    seed: int,
    items: int,
    audience: int,
    history: int,
    layers: int,
    routing: tuple[int, int],
    tile: int,
    cvr_tokens: Tokens,
    cvr_layers: bool,
) -> None:
    config = tiny_config(
        shared_layers=layers, experts=routing[0], top_k=routing[1], cvr_tokens=cvr_tokens, cvr_layers=cvr_layers
    )
    model = woken(config, seed)
    batch = grid_batch(config, items, audience, history, seed)
    scorer = Scorer(model)
    shape = (audience, items, -1)
    before, scorer_module.TILE_PAIRS = scorer_module.TILE_PAIRS, tile
    try:
        item_states = scorer.item_states(batch.items)
        audience_states = scorer.audience_states(batch.audience, batch.history)
        values, buckets = batch.pairs.values.view(shape), batch.pairs.buckets.view(shape)
        scores = scorer.score_tile(item_states, audience_states, values, buckets)
        again = scorer.score_tile(item_states, audience_states, values, buckets)
    finally:
        scorer_module.TILE_PAIRS = before
    settled = scorer.margin(item_states, audience_states) > 1e-5
    plain = scorer.score_pairs(batch).view(audience, items)
    assert torch.allclose(scores[settled], plain[settled], atol=3e-5), (scores - plain).abs().max()
    assert torch.allclose(scores, again, atol=1e-6)


def test_score_tile_computes_only_chosen_experts() -> None:
    config = tiny_config(experts=4, top_k=1)
    model = woken(config)
    with torch.no_grad():  # a gate that depends on items alone, with large margins
        of_items, of_users = model.cvr_gate.weights
        assert isinstance(of_items, torch.nn.Linear) and isinstance(of_users, torch.nn.Linear)
        of_items.weight.mul_(50)
        of_users.weight.zero_()
    batch = grid_batch(config, 8, 3, 4, seed=1)
    scorer = Scorer(model)
    items, audience = scorer.item_states(batch.items), scorer.audience_states(batch.audience, batch.history)
    assert not items.filled.any()
    scorer.score_tile(items, audience, batch.pairs.values.view(3, 8, -1), batch.pairs.buckets.view(3, 8, -1))
    chosen = items.gate.argmax(1)
    expected = torch.nn.functional.one_hot(chosen, 4).T.bool()
    assert torch.equal(items.filled, expected)
    assert torch.equal(audience.filled, expected.any(1, keepdim=True).expand(-1, 3))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_margin_is_what_the_last_expert_kept_is_ahead_of_the_next(keep: int) -> None:
    config = tiny_config(experts=4, top_k=keep)
    scorer = Scorer(woken(config))
    batch = grid_batch(config, 4, 3, 2, seed=3)
    items, audience = scorer.item_states(batch.items), scorer.audience_states(batch.audience, batch.history)
    found = scorer.margin(items, audience)
    for s in range(3):
        for i in range(4):
            ordered = sorted((items.gate[i] + audience.gate[s]).tolist(), reverse=True)
            assert float(found[s, i]) == pytest.approx(ordered[keep - 1] - ordered[keep], abs=1e-6)


def test_score_tile_leaves_out_what_is_not_wanted() -> None:
    config = tiny_config()
    scorer = Scorer(woken(config))
    batch = grid_batch(config, 5, 4, 3, seed=4)
    states = scorer.item_states(batch.items), scorer.audience_states(batch.audience, batch.history)
    given = batch.pairs.values.view(4, 5, -1), batch.pairs.buckets.view(4, 5, -1)
    wanted = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) < 0.4
    every, some = scorer.score_tile(*states, *given), scorer.score_tile(*states, *given, wanted)
    assert torch.equal(some == -torch.inf, ~wanted) and wanted.any() and not wanted.all()
    assert torch.allclose(some[wanted], every[wanted], atol=1e-5)


def test_states_do_not_depend_on_their_neighbours() -> None:
    config = tiny_config()
    scorer = Scorer(woken(config))
    batch = grid_batch(config, 6, 2, 3, seed=2)
    one = dataclasses.replace(batch.items, **{name: tensor[4:5] for name, tensor in vars(batch.items).items()})
    whole, alone = scorer.item_states(batch.items), scorer.item_states(one)
    assert torch.allclose(whole.tokens[4], alone.tokens[0], atol=1e-6)
    assert torch.allclose(whole.gate[4], alone.gate[0], atol=1e-6)


def test_scorer_runs_without_numeric_fields() -> None:
    fields = tuple(field for field in FIELDS if field.kind == "categorical")
    config = tiny_config(fields=fields)
    batch = grid_batch(config, 3, 2, 2, seed=0)
    scorer = Scorer(woken(config))
    scores = scorer.score_tile(
        scorer.item_states(batch.items),
        scorer.audience_states(batch.audience, batch.history),
        batch.pairs.values.view(2, 3, 0),
        batch.pairs.buckets.view(2, 3, 0),
    )
    assert torch.allclose(scores.flatten(), scorer.score_pairs(batch), atol=1e-5)


def test_scorer_refuses_training_mode_and_full_attention() -> None:
    batch = random_batch(tiny_config())
    training = Scorer(CameNN(tiny_config()).train())
    for call in (lambda: training.item_states(batch.items), lambda: training.score_pairs(batch)):
        with pytest.raises(ValueError, match="eval"):
            call()
    full = Scorer(CameNN(tiny_config(attention="full")).eval())
    with pytest.raises(ValueError, match="prefix"):
        full.item_states(batch.items)
    assert full.score_pairs(batch).shape == (12,)


def test_score_tile_refuses_wrong_shapes() -> None:
    config = tiny_config()
    batch = grid_batch(config, 3, 2, 2, seed=0)
    scorer = Scorer(woken(config))
    items, audience = scorer.item_states(batch.items), scorer.audience_states(batch.audience, batch.history)
    with pytest.raises(ValueError, match="2 audience rows x 3 items"):
        scorer.score_tile(items, audience, torch.zeros(3, 2, 3), torch.zeros(3, 2, 3, dtype=torch.int64))
