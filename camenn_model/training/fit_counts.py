"""Fit the network over counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from camenn_model.model.count_network import Counts
from camenn_model.model.wide import WideRows
from camenn_model.training.optimizer import OptimizerConfig, build_schedule, choose_batch_size

DROPOUT = 0.2
EPOCHS, LEAST_EPOCHS, EXAMPLES = 12, 3, 6_000_000
"""Most and least epochs over the training examples, and examples of all epochs in between"""
OPTIMIZER = OptimizerConfig(learning_rate=1e-3)
EVALUATED = 65_536
"""Examples computed at once without gradients"""


@dataclass(frozen=True)
class CountRows:
    """The input of ``Counts``, [B] each.

    Buckets may be of any integer type.
    """

    audience_values: Tensor
    audience_buckets: Tensor
    values: Tensor
    buckets: Tensor
    label: Tensor  # float32

    @classmethod
    def of(cls, rows: WideRows) -> CountRows:
        """Take the same examples from the linear part's input."""
        return cls(**{name: getattr(rows, name) for name in cls.__dataclass_fields__})

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: Tensor | slice) -> CountRows:
        """Take some of the examples."""
        return CountRows(**{name: column[rows] for name, column in vars(self).items()})

    def said_by(self, counts: Counts, dropout: float = 0.0) -> Tensor:
        """Return the logits [B], with gradients where there are any."""
        given = counts.audience(self.audience_values, self.audience_buckets.long())
        return counts(given, self.values, self.buckets.long(), dropout)


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
    epochs = max(LEAST_EPOCHS, min(EPOCHS, EXAMPLES // len(train)))
    size = choose_batch_size(len(train))
    steps = epochs * -(-len(train) // size)
    config = OPTIMIZER.of_batch(size)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(counts.parameters(), lr=config.learning_rate, fused=True)
    schedule = build_schedule(optimizer, steps, config)
    for number in range(epochs):
        order = torch.randperm(len(train)).to(train.label.device)
        for some in order.split(size):
            rows = train.take(some)
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(base + rows.said_by(counts, DROPOUT), rows.label).backward()
            optimizer.step()
            schedule.step()
        found = loss_of(stop)
        progress(number + 1, epochs, f"early-stop log loss {found:.4f}")
        if found < best:
            best, kept = found, {name: tensor.clone() for name, tensor in counts.state_dict().items()}
    for weight in counts.parameters():
        weight.grad = None
    counts.load_state_dict(kept)
    return best
