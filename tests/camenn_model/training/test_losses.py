from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from camenn_model.config import LossConfig
from camenn_model.model.camenn import CameNN
from camenn_model.model.experts import GateOutput
from camenn_model.training.losses import Losses, MultiTaskLoss, balance_loss, contrastive_loss, smoothed_bce, z_loss
from tests.support.random_batches import random_alignment, random_batch, tiny_config


def gate_output(
    quiet: list[list[float]], chosen: list[list[int]], noisy: list[list[float]] | None = None
) -> GateOutput:
    logits = torch.tensor(noisy or quiet)
    return GateOutput(logits, torch.tensor(quiet), torch.tensor(chosen), torch.ones(len(chosen), len(chosen[0])))


def test_balance_loss_is_one_when_even_and_grows_when_not() -> None:
    even = gate_output([[0.0, 0.0], [0.0, 0.0]], [[0], [1]])
    assert float(balance_loss(even)) == pytest.approx(1.0)
    skewed = gate_output([[5.0, 0.0], [5.0, 0.0]], [[0], [0]])
    p = 1 / (1 + math.exp(-5))
    assert float(balance_loss(skewed)) == pytest.approx(2 * p)
    # Noise spreads the pairs of training; scoring has none.
    assert float(balance_loss(gate_output([[5.0, 0.0], [5.0, 0.0]], [[0], [1]], [[5.0, 0.0], [5.0, 9.0]]))) == (
        pytest.approx(2 * p)
    )


def test_balance_loss_of_several_experts_a_pair_is_one_when_even() -> None:
    """The shares of assignments sum to 1, however many experts each pair has."""
    even = gate_output([[0.0] * 4, [0.0] * 4], [[0, 1], [2, 3]])
    assert float(balance_loss(even)) == pytest.approx(1.0)
    skewed = gate_output([[5.0, 5.0, 0.0, 0.0]] * 2, [[0, 1], [0, 1]])
    p = math.exp(5) / (2 * math.exp(5) + 2)
    assert float(balance_loss(skewed)) == pytest.approx(4 * (0.5 * p + 0.5 * p))


def test_z_loss_is_the_mean_square_of_logsumexp() -> None:
    gate = gate_output([[0.0, 0.0], [math.log(3), math.log(5)]], [[0], [1]])
    assert float(z_loss(gate)) == pytest.approx((math.log(2) ** 2 + math.log(8) ** 2) / 2)


def test_contrastive_loss_masks_the_same_product() -> None:
    similarities = torch.tensor([[3.0, 9.0, 1.0], [9.0, 3.0, 1.0], [1.0, 1.0, 3.0]])
    apart = contrastive_loss(similarities, torch.tensor([0, 1, 2]))
    together = contrastive_loss(similarities, torch.tensor([0, 0, 2]))
    row, last = math.log(math.exp(3) + math.exp(1)) - 3, math.log(math.exp(3) + 2 * math.exp(1)) - 3
    assert float(together) == pytest.approx((2 * row + last) / 3, rel=1e-5)
    assert apart > together


def test_contrastive_loss_looks_both_ways() -> None:
    """A photo that is nearest to every title is wrong for the titles, though each photo's nearest title is its own."""
    similarities = torch.tensor([[2.0, 0.0], [5.0, 6.0]])
    photos = [math.log(1 + math.exp(0.0 - 2.0)), math.log(1 + math.exp(5.0 - 6.0))]
    titles = [math.log(1 + math.exp(5.0 - 2.0)), math.log(1 + math.exp(0.0 - 6.0))]
    expected = (sum(photos) / 2 + sum(titles) / 2) / 2
    assert float(contrastive_loss(similarities, torch.tensor([0, 1]))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("count", [0, 1])
def test_contrastive_loss_of_too_few_is_zero(count: int) -> None:
    assert float(contrastive_loss(torch.ones(count, count), torch.arange(count))) == 0.0


def test_smoothed_bce_draws_labels_to_a_half() -> None:
    loss = smoothed_bce(torch.tensor([2.0]), torch.tensor([1.0]), 0.1)
    p = 1 / (1 + math.exp(-2))
    assert float(loss) == pytest.approx(-(0.95 * math.log(p) + 0.05 * math.log(1 - p)), rel=1e-5)
    assert float(smoothed_bce(torch.zeros(0), torch.zeros(0), 0.1)) == 0.0


def step(config: LossConfig, with_alignment: bool = True) -> tuple[CameNN, MultiTaskLoss, Losses]:
    torch.manual_seed(0)
    sizes = tiny_config()
    model, loss = CameNN(sizes), MultiTaskLoss(config)
    batch, alignment = random_batch(sizes), random_alignment(sizes)
    output = model(batch)
    if not with_alignment:
        return model, loss, loss(output, batch.pairs.label)
    aligned = model.align(alignment)
    return model, loss, loss(output, batch.pairs.label, aligned, alignment.ita.label, alignment.tia.label)


def test_fixed_weighting_adds_up() -> None:
    _, _, parts = step(LossConfig(alignment=0.5, ita=0.3, tia=1.9, contrastive=0.2))
    expected = parts.cvr + 0.5 * (0.3 * parts.ita + 1.9 * parts.tia) / 2 + 0.2 * parts.contrastive
    expected = expected + 0.1 * parts.choice + 0.01 * parts.balance + 0.001 * parts.z
    assert torch.allclose(parts.total, expected)
    assert parts.total.requires_grad
    assert not parts.cvr.requires_grad


def test_choices_count_for_a_share_of_their_weight() -> None:
    sizes = tiny_config()
    torch.manual_seed(0)
    output, label = CameNN(sizes)(random_batch(sizes)), random_batch(sizes).pairs.label
    loss, without = MultiTaskLoss(LossConfig()), MultiTaskLoss(LossConfig(choice=0.0))
    loss.choices_count.fill_(0.25)
    parts = loss(output, label)
    assert torch.allclose(parts.total - without(output, label).total, 0.25 * 0.1 * parts.choice)
    assert float(parts.choice) > 0


def test_the_loss_of_a_choice_falls_with_its_log_odds() -> None:
    sizes = tiny_config()
    torch.manual_seed(0)
    output, label = CameNN(sizes)(random_batch(sizes)), random_batch(sizes).pairs.label
    odds = torch.linspace(-3, 5, len(label))
    parts = MultiTaskLoss(LossConfig())(type(output)(**(vars(output) | {"choice": odds})), label)
    assert float(parts.choice) == pytest.approx(np.mean([-math.log(1 / (1 + math.exp(-z))) for z in odds.tolist()]))


def test_loss_without_alignment_is_the_cvr_task_alone() -> None:
    _, _, parts = step(LossConfig(choice=0.0, balance=0.0, z=0.0), with_alignment=False)
    assert float(parts.ita) == float(parts.contrastive) == 0.0
    assert torch.allclose(parts.total, parts.cvr)


def test_uncertainty_weights_move_towards_twice_the_loss() -> None:
    """The optimum of exp(-s) L + s / 2 is exp(s) = 2 L, above and below 0: nothing clamps s."""
    loss = MultiTaskLoss(LossConfig(weighting="uncertainty"))
    assert loss.log_variances is not None
    sizes = tiny_config()
    torch.manual_seed(0)
    model = CameNN(sizes).eval()
    batch, alignment = random_batch(sizes), random_alignment(sizes)
    with torch.no_grad():
        output, aligned = model(batch), model.align(alignment)
    aligned = type(aligned)(**(vars(aligned) | {"similarities": aligned.similarities * 10}))
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    for _ in range(1_000):
        parts = loss(output, batch.pairs.label, aligned, alignment.ita.label, alignment.tia.label)
        optimizer.zero_grad()
        parts.total.backward()
        optimizer.step()
    target = (2 * torch.stack([parts.cvr, parts.ita, parts.tia, parts.contrastive])).log()
    assert torch.allclose(loss.log_variances.detach(), target, atol=0.05)
    assert float(target.max()) > 2


def test_uncertainty_weights_receive_a_gradient_in_training() -> None:
    _, loss, parts = step(LossConfig(weighting="uncertainty"))
    parts.total.backward()
    assert loss.log_variances is not None and loss.log_variances.grad is not None
    assert loss.log_variances.grad.abs().min() > 0


def test_loss_refuses_alignment_without_labels() -> None:
    sizes = tiny_config()
    model, batch = CameNN(sizes), random_batch(sizes)
    with pytest.raises(ValueError, match="ita_label"):
        MultiTaskLoss(LossConfig())(model(batch), batch.pairs.label, model.align(random_alignment(sizes)))
