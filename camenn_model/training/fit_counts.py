"""Fit the network over counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from camenn_model.model.count_network import Counts
from camenn_model.model.wide import WideRows
from camenn_model.training.optimizer import OptimizerConfig, build_schedule

DROPOUT = 0.2
EPOCHS = 12
"""Epochs over the training examples"""
BATCH_SIZE = 128
OPTIMIZER = OptimizerConfig(learning_rate=1e-3)
EVALUATED = 65_536
"""Examples computed at once without gradients"""


@dataclass(frozen=True)
class CountRows:
    """The input of ``Counts``, [B] each."""

    audience_values: Tensor
    audience_buckets: Tensor
    values: Tensor
    buckets: Tensor
    label: Tensor  # float32

    @classmethod
    def of(cls, rows: WideRows) -> CountRows:
        """Take the same examples from the linear part's input."""
        return cls(rows.audience_values, rows.audience_buckets, rows.values, rows.buckets, rows.label)

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: Tensor | slice) -> CountRows:
        """Take some of the examples."""
        return CountRows(**{name: column[rows] for name, column in vars(self).items()})

    def said_by(self, counts: Counts, dropout: float = 0.0) -> Tensor:
        """Return the logits [B], with gradients where there are any."""
        return counts(counts.audience(self.audience_values, self.audience_buckets), self.values, self.buckets, dropout)


@torch.no_grad()
def predict_logits(counts: Counts, rows: CountRows) -> Tensor:
    """Return the logits [B], computed in blocks."""
    blocks = [rows.take(slice(start, start + EVALUATED)) for start in range(0, len(rows), EVALUATED)]
    return torch.cat([block.said_by(counts) for block in blocks])


def fit_counts(
    counts: Counts,
    base: float,
    train: CountRows,
    stop: CountRows,
    seed: int,
    progress: Callable[[int, int, str], None],
) -> float:
    """Fit all weights, in place, by AdamW.

    Where no epoch lowers the log loss of the early-stop part, the network still predicts 0.

    Args:
        counts: the network that is fitted.
        base: logit of all other parts.
        train: rows to fit on.
        stop: rows to choose the epoch by.
        seed: seed of torch's random numbers.
        progress: called during the fit.

    Returns:
        Mean log loss on the early-stop part.
    """

    def loss_of(rows: CountRows) -> float:
        return float(F.binary_cross_entropy_with_logits(base + predict_logits(counts, rows), rows.label))

    best, kept = loss_of(stop), {name: tensor.clone() for name, tensor in counts.state_dict().items()}
    steps = EPOCHS * -(-len(train) // BATCH_SIZE)
    torch.manual_seed(seed)
    counts.requires_grad_(True)
    try:
        optimizer = torch.optim.AdamW(counts.parameters(), lr=OPTIMIZER.learning_rate)
        schedule = build_schedule(optimizer, steps, OPTIMIZER)
        for number in range(EPOCHS):
            order = torch.randperm(len(train)).to(train.label.device)
            for some in order.split(BATCH_SIZE):
                rows = train.take(some)
                optimizer.zero_grad()
                F.binary_cross_entropy_with_logits(base + rows.said_by(counts, DROPOUT), rows.label).backward()
                optimizer.step()
                schedule.step()
            found = loss_of(stop)
            progress(number + 1, EPOCHS, f"early-stop log loss {found:.4f}")
            if found < best:
                best, kept = found, {name: tensor.clone() for name, tensor in counts.state_dict().items()}
    finally:
        counts.requires_grad_(False)
        for weight in counts.parameters():
            weight.grad = None
    counts.load_state_dict(kept)
    return best
