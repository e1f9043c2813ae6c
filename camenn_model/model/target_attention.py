"""Target attention of an offered listing to a long history.

The listing asks, the entries of the audience row's history answer: what somebody bought of its
kind, how long ago, and how much of the history that is. The shared layers read the latest entries
only; here all are read, at the price of two small products for a pair. [ours;
docs/decisions/0044-target-attention.md has the figures; after Zhou et al. 2018, DIN]

Shapes: I items, S audience rows, B pairs, H history, h heads, c = d / h, d width.

Scores and sums of weights are folded into the products: a key's last number is the entry's bias (of
its age and kind, and of padding), which a query's last number, 1, reads; a value's last number is
1. A last entry of nothing takes the weight that no entry deserves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camenn_model.batch import AudienceBatch
from camenn_model.config import ModelConfig
from camenn_model.model.layers import INIT_STD, MASKED, Layout, init_embedding, init_linear, per_pair
from camenn_model.model.tokens import AgeTable

SHARPNESS = 2.0
"""Initial factor on scores, over that of a product of random vectors"""


@dataclass(frozen=True)
class Past:
    """Keys and values of the audience rows' histories."""

    keys: Tensor  # [S, h, c + 1, H + 1]
    values: Tensor  # [S, h, H + 1, c + 1]


class TargetAttention(nn.Module):
    """Attention of listings to the entries of a history.

    It starts as a comparison of a listing's entry with those of the history, head by head.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(SHARPNESS)))
        self.age_bias, self.kind_bias = AgeTable(heads), nn.Embedding(3, heads)
        self.age, self.kind = AgeTable(width), nn.Embedding(3, width)
        self.nothing = nn.Parameter(torch.zeros(heads))
        self.out = nn.Linear(3 * width + heads, width, bias=False)
        for part in (self.query, self.key, self.value):
            nn.init.eye_(part.weight)
        for table in (self.age_bias, self.kind_bias):
            nn.init.zeros_(table.weight)
        for table in (self.age, self.kind):
            init_embedding(table.weight)
        init_linear(self.out, self.out.in_features**-0.5 / INIT_STD)

    def remember(self, audience: AudienceBatch, entries: Tensor) -> Past:
        """Return keys and values of the histories.

        Args:
            audience: S rows.
            entries: the history items as entries, [G, d].
        """
        history, kind, age = audience.history, audience.history_kind, audience.history_gap
        projected = F.linear(entries, torch.cat([self.key.weight, self.value.weight]))
        padded = F.embedding(history + 1, F.pad(projected, (0, 0, 1, 0)))  # [S, H, 2 d]
        key, value = (part.unflatten(-1, (self.heads, -1)) for part in padded.chunk(2, dim=-1))
        value = value + (self.age(age) + self.kind(kind)).unflatten(-1, (self.heads, -1))
        real = (history >= 0)[..., None]
        bias = self.age_bias(age) + self.kind_bias(kind) + torch.where(real, 0.0, MASKED)  # [S, H, h]
        ones = real.to(value.dtype)[..., None].expand(-1, -1, self.heads, 1)
        key = torch.cat([key, bias[..., None].to(key.dtype)], dim=-1)
        value = torch.cat([value, ones], dim=-1)
        nothing = F.pad(self.nothing[:, None].to(key.dtype), (key.shape[-1] - 1, 0))
        key = torch.cat([key, nothing.expand(len(key), 1, -1, -1)], dim=1)
        return Past(
            key.permute(0, 2, 3, 1).contiguous(), F.pad(value, (0, 0) * 2 + (0, 1)).transpose(1, 2).contiguous()
        )

    def ask(self, entry: Tensor) -> Tensor:
        """Return the queries of listings.

        Their entries [I, d] give [I, h, c + 1].
        """
        query: Tensor = self.query(entry).unflatten(-1, (self.heads, -1))
        query = query * (self.log_sharpness.exp() * query.shape[-1] ** -0.5)
        return F.pad(query, (0, 1), value=1.0)

    def compare(self, entry: Tensor, read: Tensor) -> Tensor:
        """Return what was found of each pair, [B, 3 d + h].

        It is the listing's entry, what was read, their product, and the share of the history that
        answered.

        Args:
            entry: of the pairs' listings, [B, d].
            read: what they read, divided by the sum of weights, [B, h, c + 1]. The last number is the share
                of the weights that real entries have.
        """
        found = read[..., :-1].flatten(1)
        return torch.cat([entry, found, found * entry, read[..., -1]], dim=-1)

    def forward(self, entry: Tensor, past: Past, item: Tensor, audience: Tensor, layout: Layout | None) -> Tensor:
        """Return what was found of each pair, [B, 3 d + h].

        Args:
            entry: listings as entries, [I, d].
            past: of ``remember``.
            item: the listing of each pair, int64 [B].
            audience: the audience row of each pair, int64 [B].
            layout: of the pairs by audience row.
        """
        query = self.ask(entry).index_select(0, item)[:, :, None]  # [B, h, 1, c + 1]
        weights = per_pair(query, past.keys, audience, layout).softmax(dim=-1)
        read = per_pair(weights, past.values, audience, layout)[:, :, 0]
        return self.compare(entry.index_select(0, item), read)
