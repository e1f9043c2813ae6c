"""Bilinear and direct parts of the CVR logit.

They are the CVR task's direct paths from both sides and from the numeric features, beside the
transformer. [ours; docs/decisions/0010-direct-paths-to-cvr.md has the figures]

Shapes: R rows of a side (items or audience rows), d width.

Two small networks, one a side, give each item and each audience row one vector, which serves twice.
First, the dot product of the two vectors is added to the CVR logit, as in factorisation machines
(Rendle 2010) and two-tower models. A preference is a product by nature (of a user's and an item's
vector), which attention and feed-forward layers must approximate by sums.

A second product is added to it: of the item's image and text embeddings with a linear map of the
mean image and text embeddings of items that the audience row bought and clicked. For Gaussian
preferences the best estimate is such a map of means that are shrunk by their number of entries.

Second, both vectors are added to the ``[CVR]`` token before the first layer, so that every layer's
attention to the history depends on the item. The logit of that token below the first layer (from
both sides and all as-of numbers) is added too. That is the deep part of wide-and-deep models (Cheng
et al. 2016).

Each side is computed once per row. The scorer adds one matrix product per tile, and a small network
per pair.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camenn_model.config import ModelConfig
from camenn_model.model.layers import FAST, MASKED, drop, init_linear

ITEM_INPUTS, AUDIENCE_INPUTS = 3, 7
"""Number of summaries that each side's network reads.

For items: fields, mean image embedding (patches), mean text embedding (tokens). For the audience:
fields, and for purchases and for clicks each the means of identity, image and text embeddings.
"""
FACTORS = 3
"""Pieces of a side's factor, each of width d: of all summaries, of image embeddings, of text embeddings."""
LEAST_COEFFICIENT = 1.0
"""Least initial coefficient of the bilinear term in the order logit.

Near 0 it would pass no gradient to either vector.
"""
ENOUGH_COEFFICIENT = 0.25
"""Regression coefficient at which preferences learned from clicks are fully used.

The regression underestimates the coefficient, as both vectors are noisy. Where it is smaller, the
audience's vectors start smaller.
"""
LIKENESS = 0.1
"""Factor on the identity, from which the maps of past to preferred embeddings start.

Users prefer items similar to those that they clicked.
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

        They are float32 because the product is added to the logit directly.
        """
        hidden = F.gelu(self.hidden(drop(self.norm(summary), self.dropout, self.training)))
        with torch.autocast(summary.device.type, enabled=False):
            vector: Tensor = self.out(drop(hidden.float(), self.dropout, self.training))
        return vector


class Affinity(nn.Module):
    """The bilinear part of the CVR logit.

    It also computes both sides' input to the ``[CVR]`` token before the first layer.
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
        # One factor starts near 0, so that logits start near the base rate. The other has torch's
        # default initialization, as both near 0 would leave both without gradients.
        for part in (self.item_task, self.audience_task, self.audience.out, self.deep_hidden, self.deep, self.sought):
            init_linear(part)
        eye = LIKENESS * torch.eye(config.width)
        for part in (self.liked_looks, self.liked_words):
            part.weight.data.copy_(torch.cat([eye, eye], dim=1))

    def vectors(self, summary: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Return a side's factor and task part.

        The factor of the product, with its scale, is [R, 3 d]. The part added to the ``[CVR]``
        token is [R, d].

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
        """Weight the items' factors [I, 3 d] for orders.

        Features that attract clicks need not lead to orders.
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
        """Initialize the pieces' weights from regression coefficients.

        Image and text pieces take their coefficients, of [3], and preferences take at least
        ``LEAST_COEFFICIENT``. Where the coefficient of preferences is below ``ENOUGH_COEFFICIENT``,
        the audience's vectors are scaled down.

        Returns:
            Coefficient of preferences as a share of ``ENOUGH_COEFFICIENT``, [] float32 in [0, 1].
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

        Clicks are more frequent evidence of preferences than orders, and available earlier, so the
        product learns from both. General popularity of an item is no preference: it has its own
        term. Items of other stores, and other items that the same row clicked, are excluded from
        the comparison.

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
