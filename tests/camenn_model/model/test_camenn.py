from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camenn_model.batch import Batch, check_batch
from camenn_model.config import ModelConfig, Tokens
from camenn_model.model.camenn import CameNN
from camenn_model.model.tokens import AgeTable, age_bucket
from tests.support.plain_reference import full_logits, reference_logits
from tests.support.random_batches import awake, random_alignment, random_batch, tiny_config


def woken_model(config: ModelConfig, seed: int = 0) -> CameNN:
    torch.manual_seed(seed)
    model = CameNN(config)
    awake(model, seed)
    return model.eval()


def test_forward_starts_at_the_base_rate() -> None:
    config = tiny_config()
    model = CameNN(config).eval()
    with torch.no_grad():
        probability = model(random_batch(config)).logits.sigmoid()
    assert torch.allclose(probability, torch.tensor(0.2), atol=0.02)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    items=st.integers(1, 6),
    audience=st.integers(1, 5),
    history=st.integers(0, 5),
    pairs=st.integers(1, 40),
    layers=st.integers(1, 3),
    routing=st.sampled_from([(1, 1), (3, 1), (4, 2), (3, 3)]),
    cvr_tokens=st.sampled_from(["all", "pooled"]),
    cvr_layers=st.sampled_from([True, True, False]),
)
def test_prefix_forward_equals_the_plain_reference(
    seed: int,
    items: int,
    audience: int,
    history: int,
    pairs: int,
    layers: int,
    routing: tuple[int, int],
    cvr_tokens: Tokens,
    cvr_layers: bool,
) -> None:
    config = tiny_config(
        shared_layers=layers, experts=routing[0], top_k=routing[1], cvr_tokens=cvr_tokens, cvr_layers=cvr_layers
    )
    model = woken_model(config, seed)
    batch = random_batch(config, items=items, audience=audience, history=history, pairs=pairs, seed=seed)
    check_batch(batch, config)
    with torch.no_grad():
        found, expected = model(batch).logits, reference_logits(model, batch)
    assert torch.allclose(found, expected, atol=1e-5), (found - expected).abs().max()


@pytest.mark.parametrize("seed", range(3))
def test_full_forward_equals_the_plain_reference(seed: int) -> None:
    config = tiny_config(attention="full")
    model = woken_model(config, seed)
    batch = random_batch(config, seed=seed)
    with torch.no_grad():
        assert torch.allclose(model(batch).logits, full_logits(model, batch), atol=1e-5)


def test_full_attention_lets_the_pair_reach_the_item() -> None:
    """In prefix, two pairs of one item share its states whatever their counts; in full they do not."""
    reached = {}
    for attention in ("prefix", "full"):
        config = tiny_config(attention=attention)
        model = woken_model(config)
        batch = random_batch(config, pairs=2)
        zero = torch.zeros(2, dtype=torch.int64)
        pairs = dataclasses.replace(batch.pairs, item=zero, audience=zero, buckets=torch.tensor([[1, 1, 1], [5, 5, 5]]))
        states: list[Any] = []
        model.shared[0].register_forward_hook(lambda _, __, output, keep=states: keep.append(output))
        with torch.no_grad():
            model(dataclasses.replace(batch, pairs=pairs))
        sides, x = states[0]
        if attention == "prefix":
            reached[attention] = len(sides[0].tokens) != len(batch.items)  # one state per item, not per pair
        else:
            first_item_token = len(model.pair_tokens.groups.parts) + 2
            reached[attention] = not torch.allclose(x[0, first_item_token], x[1, first_item_token], atol=1e-4)
    assert reached == {"prefix": False, "full": True}


def test_forward_of_a_pair_does_not_depend_on_the_rest_of_the_batch() -> None:
    config = tiny_config()
    model = woken_model(config)
    batch = random_batch(config, items=6, audience=4, pairs=9)
    rows = torch.tensor([3])
    alone = dataclasses.replace(batch, pairs=type(batch.pairs)(**{k: v[rows] for k, v in vars(batch.pairs).items()}))
    with torch.no_grad():
        assert torch.allclose(model(batch).logits[3], model(alone).logits[0], atol=1e-6)


def test_forward_ignores_what_padding_holds() -> None:
    config = tiny_config()
    model = woken_model(config)
    batch = random_batch(config, seed=3)
    items, history = batch.items, batch.history
    junk = dataclasses.replace(
        items,
        text=torch.where(items.text_mask[..., None], items.text, torch.full_like(items.text, 50.0)),
        patches=torch.where(items.has_image[:, None, None], items.patches, torch.full_like(items.patches, -50.0)),
        values=torch.where(items.buckets > 0, items.values, torch.full_like(items.values, 9.0)),
    )
    other = dataclasses.replace(
        history,
        image=torch.where(history.has_image[:, None], history.image, torch.full_like(history.image, 7.0)),
        text=torch.where(history.has_text[:, None], history.text, torch.full_like(history.text, 7.0)),
    )
    past = batch.audience.history >= 0
    audience = dataclasses.replace(
        batch.audience, history_gap=torch.where(past, batch.audience.history_gap, torch.full((1,), 99.0))
    )
    with torch.no_grad():
        changed = model(Batch(items=junk, audience=audience, history=other, pairs=batch.pairs)).logits
        assert torch.allclose(changed, model(batch).logits, atol=1e-6)


def test_forward_takes_shorter_padding() -> None:
    """Text and history cut to the longest present give the same result."""
    config = tiny_config()
    model = woken_model(config)
    batch = random_batch(config, seed=4)
    mask = batch.items.text_mask & (torch.arange(config.text_tokens) < 3)
    past = torch.where(torch.arange(config.history_length) < 2, batch.audience.history, torch.tensor(-1))
    kind = torch.where(past >= 0, batch.audience.history_kind, torch.tensor(0))
    padded = dataclasses.replace(
        batch,
        items=dataclasses.replace(batch.items, text_mask=mask),
        audience=dataclasses.replace(batch.audience, history=past, history_kind=kind),
    )
    cut = dataclasses.replace(
        batch,
        items=dataclasses.replace(batch.items, text_mask=mask[:, :3], text=batch.items.text[:, :3]),
        audience=dataclasses.replace(
            batch.audience,
            history=past[:, :2],
            history_kind=kind[:, :2],
            history_gap=batch.audience.history_gap[:, :2],
        ),
    )
    with torch.no_grad():
        assert torch.allclose(model(padded).logits, model(cut).logits, atol=1e-6)


def test_forward_in_eval_takes_every_position_as_unknown() -> None:
    config = tiny_config()
    model = woken_model(config)
    batch = random_batch(config)
    unknown = dataclasses.replace(batch, pairs=dataclasses.replace(batch.pairs, position=batch.pairs.position * 0))
    with torch.no_grad():
        assert torch.equal(model(batch).logits, model(unknown).logits)


def test_forward_in_training_sees_about_half_of_the_positions() -> None:
    config = dataclasses.replace(tiny_config(), dropout=0.0)
    tokens = woken_model(config).pair_tokens.train()
    pairs = random_batch(config, pairs=2000).pairs
    pairs = dataclasses.replace(pairs, position=torch.full_like(pairs.position, 3), values=pairs.values * 0)
    with torch.no_grad():
        last = tokens(pairs, torch.zeros(len(pairs), config.width))[:, -1]
    distinct, counts = last.unique(dim=0, return_counts=True)
    assert len(distinct) == 2
    assert 850 < counts[0] < 1150


def test_gradient_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    config = tiny_config()
    model = CameNN(config)
    awake(model)
    batch, alignment = random_batch(config, items=40, pairs=200), random_alignment(config, items=30, pairs=60)
    output, aligned = model(batch), model.align(alignment)
    total = output.logits.square().sum() + aligned.ita.square().sum() + aligned.tia.square().sum()
    (total + aligned.similarities.diagonal().sum() + output.choice.square().sum()).backward()
    unreached = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    # The linear part and the preference space are fitted before, and stay fixed.
    found = ("wide.", "item_tokens.tastes.image.", "item_tokens.tastes.text.")
    assert unreached == {name for name, _ in model.named_parameters() if name.startswith(found)}


def test_dropout_is_set_in_every_part() -> None:
    """With all rates 0 a model in training says what it says in evaluation, but for what is forgotten or noise."""
    config = dataclasses.replace(
        tiny_config(), dropout=0.5, attention_dropout=0.5, id_dropout=0.0, modality_dropout=0.0, position_dropout=0.0
    )
    model = woken_model(config)
    batch = random_batch(config)
    batch = dataclasses.replace(batch, pairs=dataclasses.replace(batch.pairs, position=batch.pairs.position * 0))
    with torch.no_grad():
        exact = model(batch).logits
        model.train()
        # Softplus of 0 is not 0: without this the gate would be noisy.
        model.cvr_gate.eval()
        assert torch.allclose(model(batch).logits, exact, atol=1e-6), "orders are learned without dropout"
        with model.before_orders():
            assert not torch.allclose(model(batch).logits, exact, atol=1e-3)
        assert torch.allclose(model(batch).logits, exact, atol=1e-6)
        model.set_dropout(0.5)
        assert not torch.allclose(model(batch).logits, exact, atol=1e-3)


def test_forward_runs_in_bf16_autocast() -> None:
    config = tiny_config()
    model = woken_model(config)
    batch = random_batch(config)
    exact = model(batch).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(batch)
        output.logits.sum().backward()
        aligned = model.align(random_alignment(config))
    assert output.gate.logits.dtype == output.logits.dtype == aligned.similarities.dtype == torch.float32
    assert torch.allclose(output.logits, exact, atol=0.1)


def test_forward_takes_half_precision_features() -> None:
    config = tiny_config()
    model = woken_model(config)
    batch = random_batch(config)
    half = dataclasses.replace(
        batch, items=dataclasses.replace(batch.items, text=batch.items.text.half(), patches=batch.items.patches.half())
    )
    with torch.no_grad():
        assert torch.allclose(model(half).logits, model(batch).logits, atol=1e-2)


def test_fit_features_standardises() -> None:
    config = tiny_config()
    model = CameNN(config)
    items = random_batch(config, items=200).items
    shifted = dataclasses.replace(items, patches=items.patches * 3 + 5)
    model.fit_features(shifted)
    projection = model.item_tokens.patch
    normal = (shifted.patches[items.has_image] - projection.mean) * projection.scale
    assert normal.mean().abs() < 1e-3
    assert 0.8 < normal.std() < 1.0
    expected = projection.linear(normal)
    assert torch.allclose(projection(shifted.patches[items.has_image]), expected, atol=1e-5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.fit_features(dataclasses.replace(items, has_image=torch.zeros_like(items.has_image)))
    assert torch.equal(before["item_tokens.patch.mean"], model.item_tokens.patch.mean)
    assert model.item_tokens.text.mean.isfinite().all()


@pytest.mark.slow
def test_model_learns_a_rule_that_joins_photo_and_title() -> None:
    """Ordered when the photo's sign equals the title's: neither alone is informative."""
    torch.manual_seed(0)
    config = dataclasses.replace(
        tiny_config(shared_layers=1, width=32, heads=4), dropout=0.0, attention_dropout=0.0, modality_dropout=0.0
    )
    model = CameNN(config).train()
    batch = random_batch(config, items=256, pairs=256, seed=1)
    photo, title = torch.randint(0, 2, (2, 256)) * 2.0 - 1.0
    items = dataclasses.replace(
        batch.items,
        has_image=torch.ones(256, dtype=torch.bool),
        has_text=torch.ones(256, dtype=torch.bool),
        text_mask=torch.ones(256, config.text_tokens, dtype=torch.bool),
        cats=torch.zeros_like(batch.items.cats),
        buckets=torch.zeros_like(batch.items.buckets),
        patches=batch.items.patches * 0.1 + photo[:, None, None],
        text=batch.items.text * 0.1 + title[:, None, None],
    )
    pairs = dataclasses.replace(batch.pairs, item=torch.arange(256), label=(photo == title).float())
    batch = dataclasses.replace(batch, items=items, pairs=pairs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(batch).logits, pairs.label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        right = (model(batch).logits > 0) == (pairs.label > 0.5)
    assert right.float().mean() > 0.95


def test_an_entry_older_than_any_learned_from_is_read_as_the_oldest_of_them() -> None:
    table = AgeTable(3)
    gaps = torch.tensor([[0.0, 3.0, 6.0, 7.5, 9.0, 50.0]])
    assert len({tuple(row) for row in table(gaps)[0].tolist()}) == 6, "each age has its own row"
    table.limit(int(age_bucket(gaps)[0, 2]))
    rows = table(gaps)[0]
    assert (rows[2:] == rows[2]).all() and not torch.allclose(rows[0], rows[1]) and not torch.allclose(rows[1], rows[2])
    assert torch.equal(rows[:3], table.weight[age_bucket(gaps)[0, :3]])
