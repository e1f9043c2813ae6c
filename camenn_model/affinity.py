"""The CVR task's direct ways to the two sides and to the numbers, beside the transformer's. [ours; docs/decisions.md has the figures]

Shapes: R rows of a side (items or audience rows), d width.

Two small networks, one a side, give each item and each audience row one vector, which serves twice. Their dot product is added to the CVR logit, as in
factorisation machines (Rendle 2010) and two-tower models: tastes are products by nature (what someone likes times what a thing is), which attention and
feed-forward layers must approximate by sums. And both are told to the ``[CVR]`` token before the first layer, so that it looks for a given item in the history from
there on; what the token then says by itself (both sides and all as-of numbers) is added to the logit too, the deep part of wide-and-deep models (Cheng et al. 2016).
All of a side is computed once a row; the scorer has one matrix product more for a tile, and a small network for a pair.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camenn_model.config import ModelConfig
from camenn_model.layers import MASKED, drop, init_linear

ITEM_INPUTS, AUDIENCE_INPUTS = 3, 3
"""Summaries that each side is read from: fields, ``[TXT]``, mean of patches; fields, mean of purchases, mean of clicks."""


class SideVector(nn.Module):
    """From a side's summaries [R, n d] to its vector [R, d]."""

    def __init__(self, inputs: int, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.dropout = config.dropout
        self.norm = nn.LayerNorm(inputs * width)
        self.hidden = nn.Linear(inputs * width, 2 * width)
        self.out = nn.Linear(2 * width, width)

    def forward(self, summary: Tensor) -> Tensor:
        """float32, as the product goes into the logit as it is."""
        hidden = F.gelu(self.hidden(drop(self.norm(summary), self.dropout, self.training)))
        with torch.autocast(summary.device.type, enabled=False):
            vector: Tensor = self.out(drop(hidden.float(), self.dropout, self.training))
        return vector


class Affinity(nn.Module):
    """The bilinear part of the CVR logit, and what it tells the ``[CVR]`` token of both sides before the first layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.item = SideVector(ITEM_INPUTS, config)
        self.audience = SideVector(AUDIENCE_INPUTS, config)
        self.item_task = nn.Linear(config.width, config.width, bias=False)
        self.audience_task = nn.Linear(config.width, config.width, bias=False)
        self.deep_hidden = nn.Linear(config.width, 4 * config.width)
        self.deep = nn.Linear(4 * config.width, 1, bias=False)
        self.dropout = config.dropout
        self.scale = config.width**-0.5
        self.sought = nn.Linear(config.width, 1)
        self.log_sharpness = nn.Parameter(torch.zeros(()))
        # One factor starts near 0, so that logits start at the base rate; the other as torch has it, as both near 0 would leave both without gradients.
        for part in (self.item_task, self.audience_task, self.audience.out, self.deep_hidden, self.deep, self.sought):
            init_linear(part)

    def vectors(self, summary: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """(factor of the product, with its scale; what is added to the ``[CVR]`` token), two [R, d] of side 0 (items) or 1 (audience)."""
        vector = (self.item, self.audience)[side](summary)
        return vector * self.scale**0.5, (self.item_task, self.audience_task)[side](vector)

    def choice(self, ours: Tensor, theirs: Tensor, item: Tensor, audience: Tensor, store: Tensor) -> Tensor:
        """Log-odds [B] float32 that an audience row clicks the item that it clicked rather than others that were clicked in the same store.

        A click tells more often what someone likes than an order does, and does not wait for one, so the product learns from both. What draws everybody to an item
        is no taste: it has its own term. Nor is what another store sells, or what the same row clicked too: neither is compared with.

        Args:
            ours, theirs: factors of the product, items [I, d] and audience rows [S, d].
            item, audience: int64 [B], the pairs that were clicked.
            store: int64 [S], the store of each audience row.
        """
        with torch.autocast(ours.device.type, enabled=False):
            logits = theirs @ ours.T * self.log_sharpness.exp() + self.sought(ours).squeeze(-1)
        clicked = torch.zeros_like(logits, dtype=torch.bool)
        clicked[audience, item] = True
        stores, place = torch.unique(store, return_inverse=True)
        sold = clicked.new_zeros(len(stores), len(ours))
        sold[place[audience], item] = True
        others = logits.masked_fill(clicked | ~sold[place], MASKED)
        return logits[audience, item] - others.logsumexp(dim=1)[audience]

    def of_token(self, task: Tensor) -> Tensor:
        """What the ``[CVR]`` tokens [..., d] say below the first layer: logits [...] float32."""
        hidden = F.gelu(self.deep_hidden(task))
        with torch.autocast(task.device.type, enabled=False):
            logits: Tensor = self.deep(drop(hidden.float(), self.dropout, self.training))
        return logits.squeeze(-1)
