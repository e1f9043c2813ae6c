"""The loss and its parts.

Parts are returned as values, and nothing is stored on the model.

Shapes: B pairs, A alignment pairs, C items of the contrastive loss, E experts, K kept experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camenn_model.config import LossConfig
from camenn_model.model.camenn import AlignOutput, CvrOutput
from camenn_model.model.experts import GateOutput, choose
from camenn_model.model.layers import MASKED


class Losses(NamedTuple):
    """The parts of the loss, scalars in float32.

    All but ``total`` are before their weights.
    """

    cvr: Tensor
    ita: Tensor
    tia: Tensor
    contrastive: Tensor
    choice: Tensor  # of the clicked item among those of the batch
    balance: Tensor  # sum over gates
    z: Tensor  # sum over gates
    total: Tensor


def balance_loss(gate: GateOutput) -> Tensor:
    """Return the load-balancing loss of a gate's experts.

    It is E · Σ f_i · P_i (Fedus et al. 2021): f_i is the share of assignments, P_i the mean
    probability of expert i. It is 1 when all are used equally.

    It is computed on the choice without noise. With noise, gates that slightly prefer some experts
    look balanced, although without it they send nothing to the others.
    """
    experts = gate.quiet.shape[-1]
    chosen, _ = choose(gate.quiet, gate.chosen.shape[1])
    share = F.one_hot(chosen, experts).sum((0, 1)).float() / chosen.numel()
    return experts * (share * gate.quiet.softmax(dim=-1).mean(0)).sum()


def z_loss(gate: GateOutput) -> Tensor:
    """Return mean(logsumexp(logits)²), the z loss.

    It keeps gate logits small (ST-MoE).
    """
    return gate.logits.logsumexp(dim=-1).square().mean()


def contrastive_loss(similarities: Tensor, group: Tensor) -> Tensor:
    """Return the symmetric InfoNCE of similarities.

    Similarities are [C, C], group is [C]. Other items of the same group are not used as negatives.
    The loss is 0 where no row has a negative left.
    """
    count = len(group)
    same = (group[:, None] == group[None, :]) & ~torch.eye(count, dtype=torch.bool, device=group.device)
    if count < 2:
        return similarities.sum() * 0.0
    masked = similarities.masked_fill(same, MASKED)
    own = torch.arange(count, device=group.device)
    return (F.cross_entropy(masked, own) + F.cross_entropy(masked.T, own)) / 2


def smoothed_bce(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Return the mean binary cross-entropy with smoothed labels.

    Labels are shrunk towards a half: y(1 - s) + s/2. The mean is 0 for no rows.
    """
    if len(labels) == 0:
        return logits.sum()
    return F.binary_cross_entropy_with_logits(logits, labels * (1.0 - smoothing) + smoothing / 2)


class MultiTaskLoss(nn.Module):
    """The weighted sum of the tasks' losses.

    ``fixed``: cvr + w (w_ita ita + w_tia tia) / 2 + w_c contrastive.

    ``uncertainty`` (Kendall, Gal, Cipolla 2018): the sum over the four of exp(-s) loss + s / 2. s
    is a learned log variance without bounds: train ``parameters()`` with the model's.

    The clicked item's loss among the batch's items, and balance and z losses of all gates, are
    added with their own weights.
    """

    log_variances: nn.Parameter | None  # [4]: cvr, ita, tia, contrastive
    choices_count: Tensor  # [] float32 in [0, 1], times ``LossConfig.choice``: the weight of the clicked item's loss

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config
        self.log_variances = nn.Parameter(torch.zeros(4)) if config.weighting == "uncertainty" else None
        self.register_buffer("choices_count", torch.ones(()))

    def forward(
        self,
        cvr: CvrOutput,
        label: Tensor,
        align: AlignOutput | None = None,
        ita_label: Tensor | None = None,
        tia_label: Tensor | None = None,
    ) -> Losses:
        """Return the losses of a step.

        ``label`` is [B] float32. ``align`` comes with its labels [A] each. Without it this step has
        the CVR task only.
        """
        config = self.config
        gates = [cvr.gate]
        tasks = [F.binary_cross_entropy_with_logits(cvr.logits, label)]
        if align is not None:
            if ita_label is None or tia_label is None:
                raise ValueError("MultiTaskLoss: align needs ita_label and tia_label")
            gates += [gate for gate in (align.ita_gate, align.tia_gate) if len(gate.chosen)]
            tasks.append(smoothed_bce(align.ita, ita_label, config.label_smoothing))
            tasks.append(smoothed_bce(align.tia, tia_label, config.label_smoothing))
            tasks.append(contrastive_loss(align.similarities, align.group))
        balance = torch.stack([balance_loss(gate) for gate in gates]).sum()
        z = torch.stack([z_loss(gate) for gate in gates]).sum()
        choice = F.softplus(-cvr.choice).mean()
        stacked = torch.stack(tasks)
        if self.log_variances is None:
            half = config.alignment / 2
            weights = stacked.new_tensor([1.0, half * config.ita, half * config.tia, config.contrastive])
            total = (weights[: len(tasks)] * stacked).sum()
        else:
            log_variances = self.log_variances[: len(tasks)]
            total = ((-log_variances).exp() * stacked + log_variances / 2).sum()
        zero = stacked.new_zeros(())
        known, ita, tia, contrastive = [task.detach() for task in tasks] + [zero] * (4 - len(tasks))
        return Losses(
            cvr=known,
            ita=ita,
            tia=tia,
            contrastive=contrastive,
            choice=choice.detach(),
            balance=balance.detach(),
            z=z.detach(),
            total=total + config.choice * self.choices_count * choice + config.balance * balance + config.z * z,
        )
