"""Bilinear and direct parts of the CVR logit.

They are the CVR task's direct ways to the two sides and to the numbers, beside the transformer's.
[ours; docs/decisions/0010-direct-paths-to-cvr.md has the figures]

Shapes: R rows of a side (items or audience rows), d width.

Two small networks, one a side, give each item and each audience row one vector, which serves twice.
First, the dot product of the two vectors is added to the CVR logit, as in factorisation machines
(Rendle 2010) and two-tower models. Tastes are products by nature (what someone likes times what a
thing is), which attention and feed-forward layers must approximate by sums.

Beside it stands the product of two things: how the item looks and reads, and a linear map of how
that looked and read which the audience row bought and clicked. Of Gaussian tastes the best estimate
is such a map of means that are shrunk by their number.

Second, both vectors are told to the ``[CVR]`` token before the first layer, so that it looks for a
given item in the history from there on. What the token then says by itself (both sides and all
as-of numbers) is added to the logit too. That is the deep part of wide-and-deep models (Cheng et
al. 2016).

All of a side is computed once a row. The scorer has one matrix product more for a tile, and a small
network for a pair.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camenn_model.config import ModelConfig
from camenn_model.model.layers import FAST, MASKED, drop, init_linear

ITEM_INPUTS, AUDIENCE_INPUTS = 3, 7
"""Number of summaries that each side is read from.

Of items: fields, mean looks (patches), mean words (tokens). Of the audience: fields, and of
purchases and of clicks the means of identity, looks and words.
"""
FACTORS = 3
"""Pieces of a side's factor, each of width d: of all together, of looks, of words."""
LEAST_COEFFICIENT = 1.0
"""Worth to an order of the product of the two vectors, where orders begin to teach.

Near 0 it would hand their gradients neither vector.
"""
ENOUGH_COEFFICIENT = 0.25
"""Worth of tastes that clicks taught, in the regression.

It takes them for less than they are: both vectors carry noise. Where they are worth less, the
audience's vectors begin smaller.
"""
LIKENESS = 0.1
"""Factor on the identity, where the maps from looks and words of the past to liked ones start.

Who clicked something likes what is like it.
"""


class SideVector(nn.Module):
    """A network from a side's summaries to its vector.

    Summaries are [R, n d], vectors [R, d].
    """

    def __init__(self, inputs: int, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.dropout = config.dropout
        self.norm = nn.LayerNorm(inputs * width)
        self.hidden = nn.Linear(inputs * width, 2 * width)
        self.out = nn.Linear(2 * width, width)

    def forward(self, summary: Tensor) -> Tensor:
        """Return the side's vectors in float32.

        They are float32 because the product goes into the logit as it is.
        """
        hidden = F.gelu(self.hidden(drop(self.norm(summary), self.dropout, self.training)))
        with torch.autocast(summary.device.type, enabled=False):
            vector: Tensor = self.out(drop(hidden.float(), self.dropout, self.training))
        return vector


class Affinity(nn.Module):
    """The bilinear part of the CVR logit.

    It also gives what the ``[CVR]`` token is told of both sides before the first layer.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.liked_looks = nn.Linear(2 * config.width, config.width, bias=False)
        self.liked_words = nn.Linear(2 * config.width, config.width, bias=False)
        self.item = SideVector(ITEM_INPUTS, config)
        self.audience = SideVector(AUDIENCE_INPUTS, config)
        self.item_task = nn.Linear(config.width, config.width, bias=False)
        self.audience_task = nn.Linear(config.width, config.width, bias=False)
        self.deep_hidden = nn.Linear(config.width, 4 * config.width)
        self.deep = nn.Linear(4 * config.width, 1, bias=False)
        self.dropout = config.dropout
        self.scale = config.width**-0.5
        self.sought = nn.Linear(FACTORS * config.width, 1)
        self.worth = nn.Parameter(torch.full((FACTORS * config.width,), 1 / FAST))
        self.log_sharpness = nn.Parameter(torch.zeros(()))
        # One factor starts near 0, so that logits start near the base rate. The other starts as torch
        # has it, as both near 0 would leave both without gradients.
        for part in (self.item_task, self.audience_task, self.audience.out, self.deep_hidden, self.deep, self.sought):
            init_linear(part)
        eye = LIKENESS * torch.eye(config.width)
        for part in (self.liked_looks, self.liked_words):
            part.weight.data.copy_(torch.cat([eye, eye], dim=1))

    def vectors(self, summary: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Return a side's factor and task part.

        The factor of the product, with its scale, is [R, 3 d]. What is added to the ``[CVR]`` token
        is [R, d].

        Args:
            summary: the side's summaries.
            side: 0 (items) or 1 (audience).
        """
        vector = (self.item, self.audience)[side](summary)
        width = self.item_task.in_features
        with torch.autocast(summary.device.type, enabled=False):
            if side == 0:
                _, image_vectors, text_vectors = summary.float().split(width, dim=-1)
            else:
                _, _, bought_images, bought_texts, _, clicked_images, clicked_texts = summary.float().split(
                    width, dim=-1
                )
                image_vectors = self.liked_looks(torch.cat([bought_images, clicked_images], dim=-1))
                text_vectors = self.liked_words(torch.cat([bought_texts, clicked_texts], dim=-1))
        task = (self.item_task, self.audience_task)[side](vector)
        return torch.cat([vector * self.scale**0.5, image_vectors, text_vectors], dim=-1), task

    def of_orders(self, ours: Tensor) -> Tensor:
        """Weigh the items' factors [I, 3 d] as orders do.

        What draws a click need not be what sells.
        """
        return ours * (FAST * self.worth)

    @staticmethod
    def pieces(ours: Tensor, theirs: Tensor, item: Tensor, audience: Tensor) -> Tensor:
        """Multiply the factors of pairs, piece by piece.

        The products are [B, 3] float32, before ``of_orders``. The arguments are as in ``choice``.
        """
        return (ours[item] * theirs[audience]).unflatten(-1, (FACTORS, -1)).sum(-1)

    @torch.no_grad()
    def start_coefficients(self, coefficients: Tensor) -> Tensor:
        """Start the weights of the pieces from a regression's.

        Looks and words become worth what the regression says, of worth [3], and tastes become worth
        ``LEAST_COEFFICIENT`` or more. Where tastes are not worth ``ENOUGH_COEFFICIENT``, the audience's vectors
        are made smaller.

        Returns:
            Share of ``ENOUGH_COEFFICIENT`` that tastes are worth, [] float32 in [0, 1].
        """
        smaller = (coefficients[0] / ENOUGH_COEFFICIENT).clamp(0, 1)
        for weight in self.audience.out.parameters():
            weight.mul_(smaller)
        coefficients = torch.cat([coefficients[:1].clamp(min=LEAST_COEFFICIENT), coefficients[1:]])
        self.worth.copy_((coefficients / FAST).repeat_interleave(len(self.worth) // FACTORS))
        return smaller

    def choice(self, ours: Tensor, theirs: Tensor, item: Tensor, audience: Tensor, store: Tensor) -> Tensor:
        """Return the log-odds of each click among the store's items.

        They are [B] float32: the log-odds that an audience row clicks the item that it clicked
        rather than others that were clicked in the same store.

        A click tells more often what someone likes than an order does, and does not wait for one,
        so the product learns from both. What draws everybody to an item is no taste: it has its own
        term. Nor is what another store sells, or what the same row clicked too: neither is compared
        with.

        Args:
            ours: factors of the product, items [I, 3 d].
            theirs: factors of the product, audience rows [S, 3 d].
            item: int64 [B], the items of the pairs that were clicked.
            audience: int64 [B], the audience rows of the pairs that were clicked.
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
        """Return the logits of ``[CVR]`` tokens below the first layer.

        Args:
            task: the tokens, [..., d]. The logits are [...] float32.
        """
        hidden = F.gelu(self.deep_hidden(task))
        with torch.autocast(task.device.type, enabled=False):
            logits: Tensor = self.deep(drop(hidden.float(), self.dropout, self.training))
        return logits.squeeze(-1)
