"""A small network over the as-of counts.

It learns interactions between the counts. It is fitted before the linear part and kept fixed.
[ours; docs/decisions/0023-count-network.md has the figures]

Shapes: S audience rows, B pairs or examples, n numeric fields, h ``HIDDEN``.

How often a listing was bought, how long ago, and how often the user buys: such counts interact,
which trees can learn and a linear part cannot. A network of some 26,000 weights learns it too, but
not in the single epoch over the log after which ids and tokens overfit. Counts of a listing, an
audience row and the pair do not identify one, so they can be trained for as many epochs as needed.

Each count enters as its value, as its rank among training values, and as indicators of being
missing or lowest. A weight for each bucket would overfit again. Of the epochs, the one with the
least log loss on the early-stop part is kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camenn_model.batch import AudienceBatch
from camenn_model.config import FieldSpec, ModelConfig
from camenn_model.model.layers import drop

HIDDEN = 256
MEASURES = 4
"""Number of inputs for each field"""


class Measures(nn.Module):
    """The numeric fields' part of the first layer.

    It is a linear map of ``MEASURES`` numbers of each field.
    """

    top: Tensor

    def __init__(self, fields: tuple[FieldSpec, ...]) -> None:
        super().__init__()
        self.register_buffer("top", torch.tensor([field.size - 1.0 for field in fields]), persistent=False)
        self.weight = nn.Parameter(torch.empty(MEASURES * len(fields), HIDDEN))

    def forward(self, values: Tensor, buckets: Tensor) -> Tensor:
        """Return the fields' part of the first layer.

        It is [..., h] float32.

        Args:
            values: [..., n] float32.
            buckets: [..., n] int64, 0 = missing.
        """
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
    """A network of two hidden layers over counts.

    The counts are of an audience row, of an item and of the pair. It predicts 0 until
    ``fit_counts``. No other optimiser changes it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.audience = Measures(config.audience_numeric)
        self.pairs = Measures(config.pair_numeric)
        parts = (self.audience, self.pairs)
        inputs = sum(len(part.weight) for part in parts)
        self.found = nn.Linear(3 * config.width + config.heads, HIDDEN, bias=False)
        self.bias = nn.Parameter(torch.zeros(HIDDEN))
        self.hidden = nn.Linear(HIDDEN, HIDDEN)
        self.out = nn.Linear(HIDDEN, 1)
        for part in parts:
            # Torch's default initialization of a linear map of all inputs.
            nn.init.uniform_(part.weight, -(max(1, inputs) ** -0.5), max(1, inputs) ** -0.5)
        for weight in (self.found.weight, self.out.weight, self.out.bias):
            nn.init.zeros_(weight)

    def of_audience(self, audience: AudienceBatch) -> Tensor:
        """Return the audience rows' first-layer part, [S, h] float32."""
        with torch.autocast(audience.values.device.type, enabled=False):
            part: Tensor = self.audience(audience.values, audience.buckets)
        return part

    def forward(self, given: Tensor, values: Tensor, buckets: Tensor, dropout: float = 0.0) -> Tensor:
        """Return the logits [B] float32 of pairs.

        Args:
            given: of the first layer, the part of the pairs' audience rows, and what `found` makes of
                what target attention found, [B, h].
            values: the pairs' numbers, [B, n].
            buckets: the buckets of the pairs' numbers, [B, n].
            dropout: share of the hidden numbers that is dropped.
        """
        with torch.autocast(values.device.type, enabled=False):
            first = F.gelu(given + self.pairs(values, buckets) + self.bias)
            second = F.gelu(self.hidden(drop(first, dropout, True)))
            logits: Tensor = self.out(drop(second, dropout, True))
        return logits.squeeze(-1)

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply the network's logits by ``factor``."""
        self.out.weight.mul_(factor)
        self.out.bias.mul_(factor)
