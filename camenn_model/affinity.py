"""How well an audience row and an item go together, beside what the tower says: a product of two vectors.

Shapes: I items, S audience rows, d width.

Tastes are products by nature (what someone likes times what a thing is), which attention and feed-forward layers must approximate by sums. Two small
networks, one a side, give each item and each audience row one vector; their dot product is added to the CVR logit, as in factorisation machines (Rendle 2010)
and two-tower models. A pair costs d multiplications, and the scorer has one matrix product for a tile. [ours]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camenn_model.config import ModelConfig
from camenn_model.layers import drop

ITEM_INPUTS, AUDIENCE_INPUTS = 3, 3
"""Summaries that each side is read from: fields, ``[TXT]``, mean of patches; fields, mean of purchases, mean of clicks."""


class SideVector(nn.Module):
    """From a side's summaries [R, n d] to its vector [R, d]."""

    def __init__(self, inputs: int, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.dropout = config.dropout
        self.norm = nn.LayerNorm(inputs * width)
        # torch's own initialisation: a product of two vectors near 0 has gradients near 0 on both sides.
        self.hidden = nn.Linear(inputs * width, 2 * width)
        self.out = nn.Linear(2 * width, width)

    def forward(self, summary: Tensor) -> Tensor:
        """float32, as the product goes into the logit as it is."""
        hidden = F.gelu(self.hidden(drop(self.norm(summary), self.dropout, self.training)))
        with torch.autocast(summary.device.type, enabled=False):
            vector: Tensor = self.out(drop(hidden.float(), self.dropout, self.training))
        return vector


class Affinity(nn.Module):
    """The bilinear part of the CVR logit."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.item = SideVector(ITEM_INPUTS, config)
        self.audience = SideVector(AUDIENCE_INPUTS, config)
        self.scale = config.width**-0.5

    def forward(self, items: Tensor, audience: Tensor, item: Tensor, row: Tensor) -> Tensor:
        """Logits [B] of pairs: summaries of I items [I, 3 d] and S audience rows [S, 3 d], and each pair's item and row, int64 [B]."""
        ours = self.item(items).index_select(0, item)
        theirs = self.audience(audience).index_select(0, row)
        return (ours * theirs).sum(-1) * self.scale
