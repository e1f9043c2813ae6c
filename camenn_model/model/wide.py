"""The linear part of the CVR logit: a logistic regression.

It is fitted before the network and kept fixed. The network learns the residual. [ours;
docs/decisions/0011-linear-part-fitted.md has the figures]

Shapes: I items, S audience rows, B examples, C values of the crossed item field, k directions of
content.

The effect of a price, a count, a store or a weekday that is equal for all users is additive, and
some hundred steps of Adam through LayerNorms and attention do not learn it: Adam changes a slope
with a gradient in every example no faster than a table's row with a gradient in a single one.
Penalised maximum likelihood has no learning rates. So a wide part as in wide-and-deep models (Cheng
et al. 2016) is fitted by L-BFGS in seconds.

It has a weight for each category, a slope for each numeric field and a weight for each of its
buckets. It has a weight for each category of the item crossed with each category of the audience
(such as what sells at which hour, in which store), and slopes of the principal directions of photos
and titles. It also has coefficients for the three pieces of ``Affinity``'s product and the logit of
``Counts``.

Hashed ids have no weight: they would overfit. Of several penalties, the one with the least log loss
on the early-stop part is chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from camenn_model.batch import AudienceBatch, ItemBatch
from camenn_model.config import CATEGORY, ITEM_HASH, USER_HASH, FieldSpec, ModelConfig
from camenn_model.content.canonical_directions import principal_directions
from camenn_model.data.item_table import Ints, ItemTable
from camenn_model.model.tokens import masked_mean

DIRECTIONS = 64
"""Number of widest directions, of photos and of titles each"""
MOST_FITTED, BLOCK = 8_192, 65_536
"""Photos, and titles, that the directions are fitted on (up to twice as many), and contents mapped at once."""
MOST_CROSSED = 256
"""Most values of the crossed item field: where it has more, there is no cross."""


class Slopes(nn.Module):
    """A slope for each numeric field, and weights for buckets.

    Each of a field's buckets has a weight, including 0 = missing.
    """

    offsets: Tensor

    def __init__(self, fields: tuple[FieldSpec, ...]) -> None:
        super().__init__()
        sizes = torch.tensor([field.size for field in fields], dtype=torch.int64)
        self.register_buffer("offsets", sizes.cumsum(0) - sizes, persistent=False)
        self.slope = _frozen(len(fields))
        self.number = _frozen(int(sizes.sum()))

    def forward(self, values: Tensor, buckets: Tensor) -> Tensor:
        """Return the sum of the numeric fields' terms, [...].

        A value counts only where its bucket is not 0.

        Args:
            values: [..., n] float32.
            buckets: [..., n] int64.
        """
        return torch.where(buckets > 0, values, 0.0) @ self.slope + self.number[buckets + self.offsets].sum(-1)


class Categories(nn.Module):
    """A weight for each value of each categorical field.

    A hashed id has none. The fields' weights are concatenated.
    """

    offsets: Tensor

    def __init__(self, fields: tuple[FieldSpec, ...], hashed: str) -> None:
        super().__init__()
        self.columns = [column for column, field in enumerate(fields) if field.name != hashed]
        sizes = torch.tensor([fields[column].size for column in self.columns], dtype=torch.int64)
        self.register_buffer("offsets", sizes.cumsum(0) - sizes, persistent=False)
        self.number = _frozen(int(sizes.sum()))

    def places(self, cats: Tensor) -> Tensor:
        """Convert codes [R, n] to indices into ``number`` [R, m]."""
        return cats[:, self.columns] + self.offsets

    def forward(self, cats: Tensor) -> Tensor:
        """Return the sum of the categories' weights, [R]."""
        return self.number[self.places(cats)].sum(-1)


class Content(nn.Module):
    """Slopes of a modality's mean features along some directions.

    An absent modality has one weight instead.
    """

    center: Tensor
    directions: Tensor

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(inputs))
        self.register_buffer("directions", torch.zeros(inputs, DIRECTIONS))
        self.slope = _frozen(DIRECTIONS)
        self.absent = _frozen(1)

    @torch.no_grad()
    def start(self, features: NDArray[np.floating]) -> None:
        """Fit the widest directions of mean features [n, inputs].

        Listings have mean 0 and spread 1 along each. Those that are missing are 0.
        """
        if not len(features):
            return
        found = principal_directions(features, DIRECTIONS)
        self.center.copy_(torch.from_numpy(features.mean(axis=0)))
        self.directions.zero_()
        self.directions[:, : found.shape[1]] = torch.from_numpy(found)

    def along(self, features: Tensor) -> Tensor:
        """Map mean features [R, inputs] to the directions, [R, k]."""
        return (features.float() - self.center) @ self.directions

    def of_rows(self, features: NDArray[np.float16], row: Ints) -> Tensor:
        """Map rows of a table of features, as `along` does.

        The rows are int64 [N]. The result is 0 where a row is -1.
        """
        device = self.center.device
        every = torch.zeros(len(features) + 1, DIRECTIONS, device=device)
        for start in range(0, len(features), BLOCK):
            block = torch.from_numpy(features[start : start + BLOCK])
            every[start : start + len(block)] = self.along(block.to(device))
        return every[torch.from_numpy(row).to(device)]

    def forward(self, along: Tensor, present: Tensor) -> Tensor:
        """Return the modality's term, [R]."""
        return torch.where(present, along @ self.slope, self.absent)


class Wide(nn.Module):
    """The linear part.

    All weights are 0 until ``fit_wide``, and no optimiser changes them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.items = Categories(config.item_categorical, ITEM_HASH)
        self.item_numbers = Slopes(config.item_numeric)
        self.image, self.text = Content(config.image_width), Content(config.text_width)
        self.audience = Categories(config.audience_categorical, USER_HASH)
        self.audience_numbers = Slopes(config.audience_numeric)
        self.pair_numbers = Slopes(config.pair_numeric)
        names = [field.name for field in config.item_categorical]
        self.crossed = names.index(CATEGORY) if CATEGORY in names else -1
        size = config.item_categorical[self.crossed].size if self.crossed >= 0 else 0
        if size > MOST_CROSSED:
            self.crossed, size = -1, 0
        self.cross = _frozen(len(self.audience.number), size)
        self.bias = _frozen(1)

    def item_factors(self, items: ItemBatch) -> Tensor:
        """Return the items' factors, [I, C + 2] float32.

        They are the one-hot category, 1, and the item's term. Their product with an audience row's
        factors is the linear logit without the pair's numbers.
        """
        title = masked_mean(items.text.float(), items.text_mask & items.has_text[:, None])
        with torch.autocast(title.device.type, enabled=False):
            own = self._of_items(
                items.cats,
                items.values,
                items.buckets,
                (self.image.along(items.patches.mean(1, dtype=torch.float32)), items.has_image),
                (self.text.along(title), items.has_text),
            )
        which = [F.one_hot(items.cats[:, self.crossed], self.cross.shape[1])] if self.crossed >= 0 else []
        return torch.cat([*which, torch.ones_like(own)[:, None], own[:, None]], dim=1)

    def audience_factors(self, audience: AudienceBatch) -> Tensor:
        """Return the audience rows' factors, [S, C + 2] float32.

        They are each category's term, the row's term, and 1.
        """
        with torch.autocast(audience.cats.device.type, enabled=False):
            own = self.audience(audience.cats) + self.audience_numbers(audience.values, audience.buckets) + self.bias
            places = self.audience.places(audience.cats)
            crossed = [F.embedding_bag(places, self.cross, mode="sum")] if self.crossed >= 0 else []
        return torch.cat([*crossed, own[:, None], torch.ones_like(own)[:, None]], dim=1)

    def of_pairs(self, values: Tensor, buckets: Tensor) -> Tensor:
        """Return the term of pairs' numbers [..., n], [...] float32."""
        with torch.autocast(values.device.type, enabled=False):
            added: Tensor = self.pair_numbers(values, buckets)
        return added

    def _of_items(
        self, cats: Tensor, values: Tensor, buckets: Tensor, image: tuple[Tensor, Tensor], text: tuple[Tensor, Tensor]
    ) -> Tensor:
        return self.items(cats) + self.item_numbers(values, buckets) + self.image(*image) + self.text(*text)

    @torch.no_grad()
    def see(self, table: ItemTable) -> Catalog:
        """Gather all items, and fit the directions of their content.

        The directions of photos and titles are fitted on the training listings that have any.
        """
        sides = []
        for content, pooled, row in (
            (self.image, table.pooled_images, table.image_row),
            (self.text, table.pooled_titles, table.title_row),
        ):
            present = row >= 0
            training = row[present & ~table.held_out]
            contents = np.unique(training if len(training) else row[present])
            content.start(pooled[contents[:: max(1, len(contents) // MOST_FITTED)]])
            sides.append((content.of_rows(pooled, row), torch.from_numpy(present).to(self.bias.device)))
        cats, values, buckets = (
            torch.from_numpy(column).to(self.bias.device) for column in (table.cats, table.values, table.buckets)
        )
        return Catalog(cats, values, buckets, *sides)

    def of_examples(self, catalog: Catalog, rows: WideRows) -> Tensor:
        """Return the linear logits [B] of examples.

        They come from the examples' codes alone.
        """
        own = self._of_items(catalog.cats, catalog.values, catalog.buckets, catalog.image, catalog.text)[rows.item]
        own = (
            own + self.audience(rows.audience_cats) + self.audience_numbers(rows.audience_values, rows.audience_buckets)
        )
        if self.crossed >= 0:
            cells = self.audience.places(rows.audience_cats) * self.cross.shape[1]
            cells = cells + catalog.cats[rows.item, self.crossed][:, None]
            own = own + self.cross.flatten()[cells].sum(-1)
        return own + self.pair_numbers(rows.values, rows.buckets) + self.bias


@dataclass(frozen=True)
class Catalog:
    """All items of a table, [N] each."""

    cats: Tensor
    values: Tensor
    buckets: Tensor
    image: tuple[Tensor, Tensor]  # along the directions [N, k]; whether there is one
    text: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class WideRows:
    """The linear part's input of examples, [B] each."""

    item: Tensor  # int64, row of the catalog
    audience_cats: Tensor
    audience_values: Tensor
    audience_buckets: Tensor
    values: Tensor
    buckets: Tensor
    label: Tensor  # float32
    part_logits: Tensor  # [B, p] float32: logits of other parts, the pieces of the preference product first


def _frozen(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape), requires_grad=False)
