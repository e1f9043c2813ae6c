from __future__ import annotations

import pytest
import torch
from torch import nn

from camenn_model.config import LossConfig
from camenn_model.model.camenn import CameNN
from camenn_model.training.losses import MultiTaskLoss
from camenn_model.training.optimizer import OptimizerConfig, WeightAverage, build_optimizer, build_schedule, rate_factor
from tests.support.random_batches import tiny_config


def test_build_optimizer_decays_linear_weights_only() -> None:
    model, loss = CameNN(tiny_config()), MultiTaskLoss(LossConfig(weighting="uncertainty"))
    decayed, free = build_optimizer([model, loss], OptimizerConfig()).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0.0)
    # The linear part and the preference space are fitted before, not learned with the rest.
    found = ("wide.", "item_tokens.tastes.image.", "item_tokens.tastes.text.")
    learned = [(name, p) for name, p in model.named_parameters() if not name.startswith(found)]
    names = {id(p): name for name, p in (*learned, *loss.named_parameters())}
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    assert all(names[id(p)].endswith("weight") and p.ndim == 2 for p in decayed["params"])
    kept = {names[id(p)] for p in free["params"]}
    assert {
        "log_variances",
        "item_tokens.tables.0.weight",
        "item_tokens.text_norm.weight",
        "cvr_tower.out.bias",
    } <= kept


def test_rate_factor_rises_then_falls_to_zero() -> None:
    factors = [rate_factor(step, 100, 0.1) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == 0.0
    assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))


def test_build_schedule_drives_the_rate() -> None:
    optimizer = build_optimizer([nn.Linear(2, 2)], OptimizerConfig(learning_rate=1.0))
    schedule = build_schedule(optimizer, 10, OptimizerConfig())
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == [rate_factor(step, 10, 0.1) for step in range(10)]


def test_weight_average_follows_and_is_applied_for_a_while() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    average = WeightAverage(module, 0.5)
    nn.init.ones_(module.weight)
    average.update(module)  # decay min(0.5, 1 / 10)
    assert float(average.average["weight"]) == pytest.approx(0.9)
    for _ in range(8):
        average.update(module)
    with average.applied_to(module):
        assert 0.99 < float(module.weight.detach()) < 1.0
    assert float(module.weight.detach()) == 1.0


def test_weight_average_state_survives() -> None:
    module = nn.Linear(3, 2)
    average = WeightAverage(module, 0.9)
    average.update(module)
    other = WeightAverage(nn.Linear(3, 2), 0.9)
    other.load_state_dict(average.state_dict())
    assert other.updates == 1
    assert all(torch.equal(other.average[name], average.average[name]) for name in average.average)
    with pytest.raises(ValueError, match="weight"):
        WeightAverage(nn.Linear(2, 2), 0.9).load_state_dict(average.state_dict())
