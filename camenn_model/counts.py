"""What the as-of counts say together: a small network of their own, fitted before the linear part and kept. [ours; docs/decisions.md has the figures]

Shapes: S audience rows, B pairs or examples, n numeric fields, h ``HIDDEN``.

How often something was bought, how long ago, by someone who buys how often: such numbers tell together what none of them tells alone, as trees find and a linear part cannot. A network of some 26,000 weights
finds it too, but not in the single pass over the log that ids and tokens bear before they are learned by heart. Counts of a listing, an audience row and the two are no identity, so they bear as many passes as they need.
Each enters as its value, as its rank among training values, and as being missing or lowest; a weight for each bucket would be learned by heart again. Of the passes, the one with the least log loss on the
early-stop part is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camenn_model.batch import AudienceBatch
from camenn_model.config import FieldSpec, ModelConfig
from camenn_model.layers import drop
from camenn_model.optimizer import OptimizerConfig, build_schedule
from camenn_model.wide import WideRows

HIDDEN = 128
MEASURES = 4
"""Numbers that each field enters as"""
DROPOUT = 0.2
PASSES = 12
"""Over the training examples"""
BATCH_SIZE = 128
OPTIMIZER = OptimizerConfig(learning_rate=1e-3)
EVALUATED = 65_536
"""Examples at a time without gradients"""


class Measures(nn.Module):
    """Numeric fields' part of the first layer: a linear map of ``MEASURES`` numbers of each."""

    top: Tensor

    def __init__(self, fields: tuple[FieldSpec, ...]) -> None:
        super().__init__()
        self.register_buffer("top", torch.tensor([field.size - 1.0 for field in fields]), persistent=False)
        self.weight = nn.Parameter(torch.empty(MEASURES * len(fields), HIDDEN))

    def forward(self, values: Tensor, buckets: Tensor) -> Tensor:
        """values [..., n] float32, buckets [..., n] int64, 0 = missing → [..., h] float32."""
        known = buckets > 0
        rank = 2 * buckets / self.top - 1
        measures = [
            torch.where(known, values, 0.0),
            torch.where(known, rank, 0.0),
            (~known).to(values.dtype),
            (buckets == 1).to(values.dtype),
        ]
        return torch.cat(measures, dim=-1) @ self.weight


class Counts(nn.Module):
    """Two hidden layers on the counts of an audience row, of an item and of the pair. Says 0 until ``fit_counts``; no other optimiser moves it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.audience = Measures(config.audience_numeric)
        self.pairs = Measures(config.pair_numeric)
        inputs = MEASURES * (len(config.audience_numeric) + len(config.pair_numeric))
        self.bias = nn.Parameter(torch.zeros(HIDDEN))
        self.hidden = nn.Linear(HIDDEN, HIDDEN)
        self.out = nn.Linear(HIDDEN, 1)
        for part in (self.audience, self.pairs):
            # As torch begins a linear map of all inputs.
            nn.init.uniform_(part.weight, -(max(1, inputs) ** -0.5), max(1, inputs) ** -0.5)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.requires_grad_(False)

    def of_audience(self, audience: AudienceBatch) -> Tensor:
        """The audience rows' part of the first layer, [S, h] float32."""
        with torch.autocast(audience.values.device.type, enabled=False):
            part: Tensor = self.audience(audience.values, audience.buckets)
        return part

    def forward(self, of_audience: Tensor, values: Tensor, buckets: Tensor, dropout: float = 0.0) -> Tensor:
        """Logits [B] float32 of pairs, from their audience rows' part [B, h] and their numbers [B, n]; ``dropout`` of the hidden numbers."""
        with torch.autocast(values.device.type, enabled=False):
            first = F.gelu(of_audience + self.pairs(values, buckets) + self.bias)
            second = F.gelu(self.hidden(drop(first, dropout, True)))
            logits: Tensor = self.out(drop(second, dropout, True))
        return logits.squeeze(-1)

    @torch.no_grad()
    def scale(self, worth: float) -> None:
        """Makes what it says ``worth`` times as much."""
        self.out.weight.mul_(worth)
        self.out.bias.mul_(worth)


@dataclass(frozen=True)
class CountRows:
    """Examples as ``Counts`` sees them, [B] each."""

    audience_values: Tensor
    audience_buckets: Tensor
    values: Tensor
    buckets: Tensor
    label: Tensor  # float32

    @classmethod
    def of(cls, rows: WideRows) -> CountRows:
        """The same examples as the linear part sees."""
        return cls(rows.audience_values, rows.audience_buckets, rows.values, rows.buckets, rows.label)

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: Tensor | slice) -> CountRows:
        """Some of them."""
        return CountRows(**{name: column[rows] for name, column in vars(self).items()})

    def said_by(self, counts: Counts, dropout: float = 0.0) -> Tensor:
        """Logits [B], with gradients where there are any."""
        return counts(counts.audience(self.audience_values, self.audience_buckets), self.values, self.buckets, dropout)


@torch.no_grad()
def say(counts: Counts, rows: CountRows) -> Tensor:
    """Logits [B], some at a time."""
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
    """Fits all weights, in place, by AdamW. Where no pass lowers the log loss of the early-stop part, it goes on saying 0.

    Args:
        base: logit that everything else says.
        train, stop: what to fit on, and what to choose the pass by.

    Returns:
        Mean log loss on the early-stop part.
    """

    def loss_of(rows: CountRows) -> float:
        return float(F.binary_cross_entropy_with_logits(base + say(counts, rows), rows.label))

    best, kept = loss_of(stop), {name: tensor.clone() for name, tensor in counts.state_dict().items()}
    steps = PASSES * -(-len(train) // BATCH_SIZE)
    torch.manual_seed(seed)
    counts.requires_grad_(True)
    try:
        optimizer = torch.optim.AdamW(counts.parameters(), lr=OPTIMIZER.learning_rate)
        schedule = build_schedule(optimizer, steps, OPTIMIZER)
        for number in range(PASSES):
            order = torch.randperm(len(train)).to(train.label.device)
            for some in order.split(BATCH_SIZE):
                rows = train.take(some)
                optimizer.zero_grad()
                F.binary_cross_entropy_with_logits(base + rows.said_by(counts, DROPOUT), rows.label).backward()
                optimizer.step()
                schedule.step()
            found = loss_of(stop)
            progress(number + 1, PASSES, f"early-stop log loss {found:.4f}")
            if found < best:
                best, kept = found, {name: tensor.clone() for name, tensor in counts.state_dict().items()}
    finally:
        counts.requires_grad_(False)
        for weight in counts.parameters():
            weight.grad = None
    counts.load_state_dict(kept)
    return best
