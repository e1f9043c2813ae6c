"""The token embeddings that the shared bottom reads.

Shapes: I items, S audience rows, G history items, B pairs, T text tokens, P patches, F fields, H
history, d width.

Every token is (features → d) + type + position embedding, then LayerNorm. ``[TXT]`` and ``[IMG]``
carry the mean of their modality's projected features plus a learned vector, so that they are
informative below the shared bottom too, where the gates read them. An absent modality keeps only
its summary token, with a learned ``no image`` / ``no text`` vector instead of the mean. Its other
tokens are masked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camenn_model.batch import AudienceBatch, HistoryItems, ItemBatch, PairBatch
from camenn_model.config import ITEM_HASH, SUBCATEGORY, USER_HASH, FieldSpec, ModelConfig
from camenn_model.content.preference_directions import PreferenceSpace
from camenn_model.model.layers import drop, init_embedding, init_linear, wide_scale
from schemas.training import CLICKED, PURCHASED

GAPS, GAPS_PER_UNIT = 32, 3.4
"""Number of buckets of an entry's age, and buckets for each unit of the log1p of its hours: a year is the last."""
DOUBT, GAIN = 3.0, 4.0
"""Initial shrinkage of a history's means, and their factor.

The mean of several entries is smaller than a single entry.
"""


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Average the real tokens.

    Tokens are x [R, N, d]. Real ones are those where mask [R, N] is True. The mean is 0 where there
    is none.
    """
    weight = mask.to(x.dtype).unsqueeze(-1)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1.0)


def forget_ids(ids: Tensor, rate: float, training: bool) -> Tensor:
    """Set a share of ids to unknown, in training only.

    ``ids`` is [R] int64, ``rate`` the share that is set to 0 (unknown). The model then generalizes
    to new items.
    """
    if not training or rate == 0.0:
        return ids
    return torch.where(torch.rand(ids.shape, device=ids.device) < rate, torch.zeros_like(ids), ids)


def age_bucket(gap: Tensor) -> Tensor:
    """Return the bucket of each entry's age, int64 [S, H], of ``AudienceBatch.history_gap``."""
    return (gap * GAPS_PER_UNIT).long().clamp(max=GAPS - 1)


class AgeTable(nn.Embedding):
    """A table of an entry's age, by its bucket.

    Histories grow older as the log does. An entry older than those of training is read like the
    oldest that were learned from (``limit``).
    """

    oldest: Tensor

    def __init__(self, width: int) -> None:
        super().__init__(GAPS, width)
        self.register_buffer("oldest", torch.tensor(GAPS - 1))

    def limit(self, oldest: int) -> None:
        """Set the last bucket that has a row of its own, in place."""
        self.oldest.fill_(oldest)

    def forward(self, gap: Tensor) -> Tensor:
        """Return the rows [S, H, width] of ``AudienceBatch.history_gap``."""
        return super().forward(torch.minimum(age_bucket(gap), self.oldest))


def init_tables(tables: Iterable[nn.Module]) -> None:
    """Initialize the tables' rows from a truncated normal."""
    for table in tables:
        for weight in table.parameters():
            init_embedding(weight)


def project_present(part: nn.Module, x: Tensor, present: Tensor, absent: Tensor) -> Tensor:
    """Map the rows that are present.

    Rows are [R, inputs]. Those where ``present`` [R] is False become ``absent`` [d].

    On a CPU absent rows are not computed: in many catalogs few listings have a photo.
    """
    if x.device.type == "cpu":
        rows = present.nonzero().squeeze(1)
        if len(rows) < len(present):
            known = part(x.index_select(0, rows))
            return absent.to(known.dtype).expand(len(x), -1).index_copy(0, rows, known)
    return torch.where(present[:, None], part(x), absent)


class FrozenProjection(nn.Module):
    """A linear map from a frozen feature to the width.

    The feature is a frozen encoder's, and each number of it is standardised first. Mean and scale
    are buffers (0 and 1 until ``fit`` is called), stored with the weights.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, width)
        init_linear(self.linear, wide_scale(inputs, width))
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))

    def fit(self, sample: Tensor) -> None:
        """Fit mean and spread on a sample [n, inputs].

        A tenth of the mean spread is added, for rare features.
        """
        sample = sample.float()
        spread = sample.std(0, correction=0)
        self.mean.copy_(sample.mean(0))
        self.scale.copy_(1.0 / (spread + 0.1 * spread.mean() + 1e-6))

    def start(self, directions: Tensor, center: Tensor) -> None:
        """Set the first dimensions of the map to given directions.

        The first m dimensions become (x - ``center`` [inputs]) @ ``directions`` [inputs, m]. The
        others stay random. Call it after ``fit``.
        """
        count = directions.shape[1]
        self.linear.weight[:count] = (directions / self.scale[:, None]).T
        self.linear.bias[:count] = (self.mean - center) @ directions

    def forward(self, x: Tensor) -> Tensor:
        # Folded into the weight: the features are far larger than the map.
        weight = self.linear.weight * self.scale
        return F.linear(x.to(weight.dtype), weight, self.linear.bias - weight @ self.mean)


class PreferenceMap(nn.Module):
    """A map of listings to the preference space.

    It projects a listing's photo and title to that space (``preference_directions.py``), for
    offered listings and for those of a history. The maps are fitted on clicks before training and
    stay fixed. The vectors of an absent photo or title are learned.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.image = nn.Linear(config.image_width, config.width)
        self.text = nn.Linear(config.text_width, config.width)
        for part in (self.image, self.text):
            init_linear(part, wide_scale(part.in_features, config.width))
            part.requires_grad_(False)
        self.no_image = nn.Parameter(torch.zeros(config.width))
        self.no_text = nn.Parameter(torch.zeros(config.width))

    @torch.no_grad()
    def start(self, image: PreferenceSpace | None, text: PreferenceSpace | None) -> None:
        """Load the fitted directions.

        Dimensions beyond them, and a modality that no listing has, are 0.
        """
        for part, found in ((self.image, image), (self.text, text)):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)
            if found is not None:
                count = found.directions.shape[1]
                part.weight[:count] = torch.from_numpy(found.directions.T).to(part.weight)
                part.bias[:count] = torch.from_numpy(-found.center @ found.directions).to(part.bias)

    def forward(self, image: Tensor, has_image: Tensor, text: Tensor, has_text: Tensor) -> tuple[Tensor, Tensor]:
        """Return (image, text) embeddings, [R, d] float32 each.

        They map mean features [R, image_width] and [R, text_width].
        """
        with torch.autocast(image.device.type, enabled=False):
            image_vectors = project_present(self.image, image.float(), has_image, self.no_image)
            text_vectors = project_present(self.text, text.float(), has_text, self.no_text)
        return image_vectors, text_vectors


class NumericToken(nn.Module):
    """One token from a group of numeric fields.

    It is the sum over fields of bucket embedding + value x learned vector.
    """

    offsets: Tensor

    def __init__(self, fields: tuple[FieldSpec, ...], width: int) -> None:
        super().__init__()
        sizes = torch.tensor([field.size for field in fields])
        self.register_buffer("offsets", sizes.cumsum(0) - sizes, persistent=False)
        self.table = nn.Embedding(int(sizes.sum()), width)
        self.slope = nn.Parameter(torch.empty(len(fields), width))
        self.kind = nn.Parameter(torch.empty(width))
        for weight in (self.table.weight, self.slope, self.kind):
            init_embedding(weight)

    def forward(self, values: Tensor, buckets: Tensor) -> Tensor:
        """Return the group's token, [..., d].

        A value counts only where its bucket is not 0.

        Args:
            values: [..., n] float32.
            buckets: [..., n] int64.
        """
        count = buckets.shape[-1]
        rows = (buckets + self.offsets).reshape(-1, count)
        known = torch.where(buckets > 0, values, 0.0)
        total = F.embedding_bag(rows, self.table.weight, mode="sum").view(*buckets.shape[:-1], -1)
        return total + known.to(self.slope.dtype) @ self.slope + self.kind


class NumericTokens(nn.Module):
    """One ``NumericToken`` for each group that has fields.

    Columns run through the groups in order.
    """

    def __init__(self, config: ModelConfig, groups: tuple[str, ...]) -> None:
        super().__init__()
        fields = [config.group(group) for group in groups if config.group(group)]
        self.sizes = [len(group) for group in fields]
        self.parts = nn.ModuleList(NumericToken(group, config.width) for group in fields)

    def forward(self, values: Tensor, buckets: Tensor) -> list[Tensor]:
        """Return a token [..., d] for each group.

        ``values`` and ``buckets`` are [..., n].
        """
        columns = zip(self.parts, values.split(self.sizes, -1), buckets.split(self.sizes, -1), strict=True)
        return [part(value, bucket) for part, value, bucket in columns] if self.sizes else []


@dataclass(frozen=True)
class Content:
    """A listing's photo and title as tokens.

    ``*_gate`` are gate inputs, before dropout.
    """

    text: Tensor  # [I, 1 + T, d], [TXT] first
    text_mask: Tensor  # [I, 1 + T] bool
    image: Tensor  # [I, 1 + P, d], [IMG] first
    image_mask: Tensor  # [I, 1 + P] bool
    text_gate: Tensor  # [I, d]: [TXT]
    image_gate: Tensor  # [I, d]: mean of patches
    image_vectors: Tensor  # [I, d] float32, ``PreferenceMap``
    text_vectors: Tensor  # [I, d]
    image_mean: Tensor  # [I, d]: the projected mean of its patches, ``no image`` where there is none
    text_mean: Tensor  # [I, d]


@dataclass(frozen=True)
class SideTokens:
    """Tokens of one side and its gate input."""

    tokens: Tensor  # [R, N, d]
    mask: Tensor  # [R, N] bool
    gate: Tensor  # [R, gate width]
    summary: Tensor  # input of ``Affinity``: [I, 3 d] or [S, 7 d]
    memory: int = 0  # number of last tokens that no layer changes
    entry: Tensor | None = None  # [I, d]: each item as an entry of a history; None for audience rows


class ItemTokens(nn.Module):
    """Tokens of group I: title, photo, static fields."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.dropout = config.dropout
        self.text = FrozenProjection(config.text_width, width)
        self.patch = FrozenProjection(config.image_width, width)
        self.text_summary = nn.Parameter(torch.empty(width))
        self.image_summary = nn.Parameter(torch.empty(width))
        self.no_text = nn.Parameter(torch.empty(width))
        self.no_image = nn.Parameter(torch.empty(width))
        self.text_type = nn.Parameter(torch.empty(width))
        self.patch_type = nn.Parameter(torch.empty(width))
        self.text_position = nn.Parameter(torch.empty(config.text_tokens, width))
        self.row = nn.Parameter(torch.empty(config.patch_grid, width))
        self.column = nn.Parameter(torch.empty(config.patch_grid, width))
        self.tables = nn.ModuleList(nn.Embedding(field.size, width) for field in config.item_categorical)
        self.field_type = nn.Parameter(torch.empty(len(config.item_categorical), width))
        self.groups = NumericTokens(config, ("item_numeric", "item_quality"))
        self.tastes = PreferenceMap(config)
        self.text_norm = nn.LayerNorm(width)
        self.image_norm = nn.LayerNorm(width)
        self.field_norm = nn.LayerNorm(width)
        self.entry_norm = nn.LayerNorm(width)
        names = [field.name for field in config.item_categorical]
        self.identity_columns = (names.index(ITEM_HASH), names.index(SUBCATEGORY))
        for weight in self.parameters(recurse=False):
            init_embedding(weight)
        init_tables(self.tables)

    def content(self, items: ItemBatch) -> Content:
        """Return each item's photo and title, token by token."""
        return self._every_token(items, items.has_text, items.has_image)

    def _pooled(self, items: ItemBatch, has_text: Tensor, has_image: Tensor) -> Content:
        """Return each item's photo and title, one token each.

        A projection of means is the mean of projections.
        """
        title = masked_mean(items.text.float(), items.text_mask & has_text[:, None])
        photo = items.patches.mean(1, dtype=torch.float32)
        text_mean = project_present(self.text, title, has_text, self.no_text)
        image_mean = project_present(self.patch, photo, has_image, self.no_image)
        text, image = self.text_norm(text_mean + self.text_summary), self.image_norm(image_mean + self.image_summary)
        image_vectors, text_vectors = self.tastes(photo, has_image, title, has_text)
        always = torch.ones_like(has_text)[:, None]
        return Content(
            text=drop(text, self.dropout, self.training)[:, None],
            text_mask=always,
            image=drop(image, self.dropout, self.training)[:, None],
            image_mask=always,
            text_gate=text,
            image_gate=image,
            image_vectors=image_vectors,
            text_vectors=text_vectors,
            image_mean=image_mean,
            text_mean=text_mean,
        )

    def _every_token(self, items: ItemBatch, has_text: Tensor, has_image: Tensor) -> Content:
        text_mask = items.text_mask & has_text[:, None]
        patch_mask = has_image[:, None].expand(-1, items.patches.shape[1])

        text = self.text(items.text)
        text_mean = torch.where(has_text[:, None], masked_mean(text, text_mask), self.no_text)
        text = text + self.text_type + self.text_position[: text.shape[1]]
        text = torch.cat([(text_mean + self.text_summary)[:, None], text], dim=1)
        patches = self.patch(items.patches)
        image_mean = torch.where(has_image[:, None], masked_mean(patches, patch_mask), self.no_image)
        place = (self.row[:, None] + self.column[None, :]).flatten(0, 1)  # row-major
        patches = patches + self.patch_type + place
        image = torch.cat([(image_mean + self.image_summary)[:, None], patches], dim=1)

        image_vectors, text_vectors = self.tastes(
            items.patches.mean(1, dtype=torch.float32), has_image, masked_mean(items.text.float(), text_mask), has_text
        )
        text, image = self.text_norm(text), self.image_norm(image)
        mean_patch = torch.where(has_image[:, None], masked_mean(image[:, 1:], patch_mask), image[:, 0])
        always = torch.ones_like(has_text)[:, None]
        return Content(
            text=drop(text, self.dropout, self.training),
            text_mask=torch.cat([always, text_mask], dim=1),
            image=drop(image, self.dropout, self.training),
            image_mask=torch.cat([always, patch_mask], dim=1),
            text_gate=text[:, 0],
            image_gate=mean_patch,
            image_vectors=image_vectors,
            text_vectors=text_vectors,
            image_mean=image_mean,
            text_mean=text_mean,
        )

    def forward(self, items: ItemBatch) -> SideTokens:
        """Return all item tokens: text, image, fields.

        The gate input is mean of fields ‖ [TXT] ‖ mean of patches, [I, 3 d].
        """
        has_text, has_image, rate = items.has_text, items.has_image, self.config.modality_dropout
        if self.training and rate > 0.0:
            has_text = has_text & (torch.rand(has_text.shape, device=has_text.device) >= rate)
            has_image = has_image & (torch.rand(has_image.shape, device=has_image.device) >= rate)
        content = (self._pooled if self.config.pooled else self._every_token)(items, has_text, has_image)
        values = []
        for column, table in enumerate(self.tables):
            ids = items.cats[:, column]
            if column == self.identity_columns[0]:
                ids = forget_ids(ids, self.config.id_dropout, self.training)
            values.append(table(ids))
        identity = sum((values[column] for column in self.identity_columns[1:]), values[self.identity_columns[0]])
        fields = [value + self.field_type[column] for column, value in enumerate(values)]
        fields += self.groups(items.values, items.buckets)
        field_tokens = self.field_norm(torch.stack(fields, dim=1))
        mean_field = field_tokens.mean(1)
        if self.config.pooled:
            field_tokens = mean_field[:, None]
        field_tokens = drop(field_tokens, self.dropout, self.training)
        real = torch.ones(field_tokens.shape[:2], dtype=torch.bool, device=field_tokens.device)
        gate = torch.cat([mean_field, content.text_gate, content.image_gate], dim=-1)
        return SideTokens(
            tokens=torch.cat([content.text, content.image, field_tokens], dim=1),
            mask=torch.cat([content.text_mask, content.image_mask, real], dim=1),
            gate=gate,
            summary=torch.cat([mean_field, content.image_vectors, content.text_vectors], dim=-1),
            entry=self.entry(identity, content.image_mean, content.text_mean),
        )

    def entry(self, identity: Tensor, image: Tensor, text: Tensor) -> Tensor:
        """Return items as entries of a history, [R, d].

        The same map makes the entries of a history and the listing that is compared with them, so
        attention finds similar ones from the first step on.
        """
        return self.entry_norm(identity + image + text)

    def identity(self, cats: Tensor) -> Tensor:
        """Embed history items by item hash and subcategory.

        cats [G, 2] give [G, d], the sum of both, from the item fields' own tables.
        """
        hashes = forget_ids(cats[:, 0], self.config.id_dropout, self.training)
        item_table, subcategory_table = (self.tables[column] for column in self.identity_columns)
        return item_table(hashes) + subcategory_table(cats[:, 1])

    def liked(self, history: HistoryItems) -> tuple[Tensor, Tensor]:
        """Return the history items' features for preferences, and their entries.

        The features are identity, image and text embedding, [G, 3 d], the entries [G, d].
        """
        identity = self.identity(history.cats)
        # Converted once for both maps.
        photo, title = history.image.float(), history.text.float()
        vectors = self.tastes(photo, history.has_image, title, history.has_text)
        image = project_present(self.patch, photo, history.has_image, self.no_image)
        text = project_present(self.text, title, history.has_text, self.no_text)
        return torch.cat([identity, *vectors], dim=-1), self.entry(identity, image, text)


class AudienceTokens(nn.Module):
    """Tokens of group U: fields and history.

    The fields are those of user and context.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.dropout = config.dropout
        self.tables = nn.ModuleList(nn.Embedding(field.size, width) for field in config.audience_categorical)
        self.field_type = nn.Parameter(torch.empty(len(config.audience_categorical), width))
        counts = config.audience_numeric
        self.counts = NumericToken(counts, width) if counts else None
        self.history_type = nn.Parameter(torch.empty(width))
        self.kind = nn.Embedding(3, width)
        self.gap = AgeTable(width)
        self.log_doubt = nn.Parameter(torch.full((2,), math.log(DOUBT)))
        self.log_gain = nn.Parameter(torch.full((2,), math.log(GAIN)))
        self.field_norm = nn.LayerNorm(width)
        self.history_norm = nn.LayerNorm(width)
        self.user_column = [field.name for field in config.audience_categorical].index(USER_HASH)
        for name, weight in self.named_parameters(recurse=False):
            if not name.startswith("log_"):
                init_embedding(weight)
        init_tables([*self.tables, self.kind, self.gap])

    def forward(self, audience: AudienceBatch, liked: Tensor, entries: Tensor) -> SideTokens:
        """Return all audience tokens: fields and history.

        ``liked`` [G, 3 d] and ``entries`` [G, d] are the output of ``ItemTokens.liked``. The
        history's tokens are its latest ``history_tokens`` entries. The gate input is mean of fields
        ‖ mean of their tokens, [S, 2 d].
        """
        field_tokens = self._fields(audience)
        mean_field = field_tokens.mean(1)
        if self.config.pooled:
            field_tokens = mean_field[:, None]
        # Without layers nothing but target attention reads the history, and it reads entries.
        latest = slice(self.config.history_tokens if self.config.cvr_layers else 0)
        history, kind = audience.history[:, latest], audience.history_kind[:, latest]
        past = _padded(entries, history) + self.kind(kind) + self.gap(audience.history_gap[:, latest])
        past = self.history_norm(past + self.history_type)
        past_mask = history >= 0
        real = torch.ones(field_tokens.shape[:2], dtype=torch.bool, device=past.device)
        return SideTokens(
            tokens=drop(torch.cat([field_tokens, past], dim=1), self.dropout, self.training),
            mask=torch.cat([real, past_mask], dim=1),
            gate=torch.cat([mean_field, masked_mean(past, past_mask)], dim=-1),
            summary=self._summary(audience, mean_field, liked),
            memory=past.shape[1] if self.config.pooled else 0,
        )

    def summary(self, audience: AudienceBatch, liked: Tensor) -> Tensor:
        """Return the input of ``Affinity`` alone, [S, 7 d]."""
        return self._summary(audience, self._fields(audience).mean(1), liked)

    def _fields(self, audience: AudienceBatch) -> Tensor:
        """Return a token for each field, [S, F, d]."""
        fields = []
        for column, table in enumerate(self.tables):
            ids = audience.cats[:, column]
            if column == self.user_column:
                ids = forget_ids(ids, self.config.id_dropout, self.training)
            fields.append(table(ids) + self.field_type[column])
        if self.counts is not None:
            fields.append(self.counts(audience.values, audience.buckets))
        tokens: Tensor = self.field_norm(torch.stack(fields, dim=1))
        return tokens

    def _summary(self, audience: AudienceBatch, mean_field: Tensor, liked: Tensor) -> Tensor:
        doubts, gains = self.log_doubt.exp(), self.log_gain.exp()
        kinds = [
            gain * _mean_of_kind(liked, audience, kind, doubt)
            for kind, doubt, gain in zip((PURCHASED, CLICKED), doubts, gains, strict=True)
        ]
        return torch.cat([mean_field, *kinds], dim=-1)


def _padded(known: Tensor, history: Tensor) -> Tensor:
    """Return rows of ``known`` [G, n] at ``history`` [S, H].

    They are 0 where ``history`` is -1.
    """
    return F.embedding(history + 1, F.pad(known, (0, 0, 1, 0)))


def _mean_of_kind(known: Tensor, audience: AudienceBatch, kind: int, doubt: Tensor) -> Tensor:
    """Average one kind of entries of each history, [S, n].

    It is the mean of ``known`` [G, n] over those entries, shrunk towards 0 as if by ``doubt``
    additional entries of 0. That is the posterior mean of a Gaussian preference of which each entry
    is a noisy observation.
    """
    weight = ((audience.history >= 0) & (audience.history_kind == kind)).to(known.dtype)
    every = F.pad(known, (0, 0, 1, 0))  # row 0: padding
    total = F.embedding_bag(audience.history + 1, every, per_sample_weights=weight, mode="sum")
    return total / (weight.sum(1, keepdim=True) + doubt)


class PairTokens(nn.Module):
    """Tokens of group X, those of a pair.

    ``[CVR]`` comes first, then the item's counts, the pair's counts, the display position.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.dropout = config.dropout
        self.task = nn.Parameter(torch.empty(config.width))
        self.position = nn.Embedding(config.position_size, config.width)
        self.groups = NumericTokens(config, ("item_counts", "pair_counts"))
        self.norm = nn.LayerNorm(config.width)
        init_embedding(self.task)
        init_embedding(self.position.weight)

    def forward(self, pairs: PairBatch, context: Tensor) -> Tensor:
        """Return the pair tokens, [B, X, d].

        ``context`` [B, d] is added to the task token. In training ``position_dropout`` of the
        positions become unknown. In eval mode all are.
        """
        if self.training:
            position = forget_ids(pairs.position, self.config.position_dropout, True)
        else:
            position = torch.zeros_like(pairs.position)
        return drop(self.embed(pairs.values, pairs.buckets, position, context), self.dropout, self.training)

    def embed(self, values: Tensor, buckets: Tensor, position: Tensor, context: Tensor) -> Tensor:
        """Embed the pairs without any dropout, [..., X, d].

        ``values`` and ``buckets`` are [..., n], ``position`` [...], ``context`` [..., d].
        """
        groups = self.groups(values, buckets)
        task, place = sum(groups, self.task + context), self.position(position)
        tokens = [task + place] if self.config.pooled else [task, *groups, place]
        return self.norm(torch.stack(tokens, dim=-2))
