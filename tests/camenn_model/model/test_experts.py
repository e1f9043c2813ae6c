from __future__ import annotations

from typing import Any

import torch
from torch import nn

from camenn_model.model.camenn import CameNN
from camenn_model.model.experts import Gate, choose
from tests.support.random_batches import awake, random_alignment, random_batch, tiny_config


def test_choose_breaks_ties_by_the_lowest_index() -> None:
    chosen, weights = choose(torch.tensor([[0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]), 2)
    assert chosen.tolist() == [[1, 2], [0, 1]]
    assert torch.allclose(weights, torch.full((2, 2), 0.5))


def test_choose_takes_softmax_over_the_kept_only() -> None:
    chosen, weights = choose(torch.tensor([3.0, 5.0, 4.0]), 2)
    assert chosen.tolist() == [1, 2]
    assert torch.allclose(weights, torch.softmax(torch.tensor([5.0, 4.0]), 0))


def test_gate_starts_at_zero_and_is_noisy_in_training_only() -> None:
    torch.manual_seed(0)
    gate = Gate((4, 3), tiny_config())
    features, indexes = (torch.randn(5, 4), torch.randn(2, 3)), (torch.arange(5), torch.tensor([0, 1, 0, 1, 0]))
    assert gate.eval()(features, indexes).logits.abs().max() == 0
    noisy = gate.train()(features, indexes)
    assert noisy.logits.abs().min() > 0
    assert torch.allclose(noisy.weights.sum(-1), torch.ones(5))
    assert float(noisy.use.sum()) == 2.0


def test_in_training_pairs_go_where_the_noise_sends_them() -> None:
    """Otherwise experts that start slightly behind are never tried. The balance is measured without noise."""
    torch.manual_seed(0)
    gate = Gate((4, 3), tiny_config())
    awake(gate)
    features = (torch.randn(40, 4), torch.randn(40, 3))
    indexes = (torch.arange(40), torch.arange(40))
    still = gate.eval()(features, indexes)
    noisy = gate.train()(features, indexes)
    assert torch.equal(noisy.quiet, still.logits) and torch.equal(still.quiet, still.logits)
    assert not torch.allclose(noisy.logits, noisy.quiet)
    for logits, chosen, weights in zip(noisy.logits.detach(), noisy.chosen, noisy.weights, strict=True):
        best = sorted(range(len(logits)), key=lambda expert: -float(logits[expert]))[: gate.keep]
        assert chosen.tolist() == best
        assert torch.allclose(weights, torch.softmax(logits[best], dim=0))
    assert not torch.equal(noisy.chosen, still.chosen)


def test_gate_reads_rows_by_index() -> None:
    gate = Gate((4, 3), tiny_config()).eval()
    awake(gate)
    items, users = torch.randn(5, 4), torch.randn(2, 3)
    logits = gate((items, users), (torch.tensor([4]), torch.tensor([1]))).logits[0]
    of_items, of_users = gate.weights
    assert isinstance(of_items, nn.Linear) and isinstance(of_users, nn.Linear)
    assert torch.allclose(logits, of_items.weight @ items[4] + of_users.weight @ users[1], atol=1e-6)


def test_only_chosen_experts_are_computed() -> None:
    config = tiny_config(experts=4, top_k=1)
    model = CameNN(config)
    awake(model)
    seen: dict[int, tuple[int, int, int]] = {}

    def record(number: int) -> None:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: object) -> None:
            sides, x, _ = arguments
            seen[number] = (len(x), len(sides[0].tokens), len(sides[1].tokens))

        model.mixture.experts[number].register_forward_hook(hook)

    for number in range(4):
        record(number)
    for seed in range(5):
        seen.clear()
        batch = random_batch(config, items=6, audience=4, pairs=10, seed=seed)
        output = model(batch)
        expected = {}
        for expert in range(4):
            pairs = (output.gate.chosen == expert).any(1)
            if pairs.any():
                rows = batch.pairs.item[pairs].unique(), batch.pairs.audience[pairs].unique()
                expected[expert] = (int(pairs.sum()), len(rows[0]), len(rows[1]))
        assert seen == expected
        assert {e: tuple(row) for e, row in enumerate(output.computed.tolist()) if row[0]} == expected


def test_alignment_computes_only_chosen_experts() -> None:
    config = tiny_config(experts=4, top_k=2)
    model = CameNN(config)
    output = model.align(random_alignment(config, pairs=8))
    uses = output.ita_gate.use + output.tia_gate.use
    assert torch.equal(output.computed.float(), uses * 8)
