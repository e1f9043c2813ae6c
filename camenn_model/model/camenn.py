"""The CameNN network: shared transformer bottom and gated transformer experts.

Three tasks share the bottom and the mixture of experts.

Source: "Cross-Modal Alignment with Mixture Experts Neural Network for Intral-City Retail
Recommendation" (arXiv 2009.09926). ``docs/explanation/model.md`` lists the parts that come from it
and the
choices of this project.

Shapes: B pairs, I items, S audience rows, A alignment pairs, C items of the contrastive loss, E
experts, d width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from camenn_model.batch import AlignmentBatch, AlignmentPairs, Batch, ItemBatch
from camenn_model.config import STORE, ModelConfig
from camenn_model.content.canonical_directions import PENALTY, find_start
from camenn_model.model.alignment import ContrastiveHead, TaskTokens, init_heads, pair_content
from camenn_model.model.bilinear import Affinity
from camenn_model.model.count_network import Counts
from camenn_model.model.experts import Gate, GateOutput, Mixed, Mixture
from camenn_model.model.layers import EncoderLayer, Side, init_linear, layers_of
from camenn_model.model.target_attention import TargetAttention
from camenn_model.model.tokens import (
    AgeTable,
    AudienceTokens,
    Content,
    ItemTokens,
    PairTokens,
    SideTokens,
    masked_mean,
)
from camenn_model.model.towers import Tower, init_tower
from camenn_model.model.wide import Wide


@dataclass(frozen=True)
class CvrOutput:
    """The output of the CVR task."""

    logits: Tensor  # [B] float32, raw (before calibration)
    gate: GateOutput
    computed: Tensor  # [E, 1 + sides] int64: pairs and side rows each expert was computed for
    choice: Tensor  # [B] float32, ``Affinity.choice``


@dataclass(frozen=True)
class AlignOutput:
    """The output of the alignment tasks."""

    ita: Tensor  # [A_ita] float32 logits
    tia: Tensor  # [A_tia] float32 logits
    ita_gate: GateOutput
    tia_gate: GateOutput
    similarities: Tensor  # [C, C] float32, images x texts, over the temperature
    group: Tensor  # [C] int64, the product of each; items that lack a modality are left out
    image: Tensor  # [C, e] float32 unit vectors
    text: Tensor  # [C, e]
    computed: Tensor  # [E] int64: pairs each expert was computed for, ITA and TIA together


class CameNN(nn.Module):
    """The whole model.

    ``forward`` is the CVR task, ``align`` the alignment tasks. Both train the same bottom and
    experts.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.item_tokens = ItemTokens(config)
        self.audience_tokens = AudienceTokens(config)
        self.pair_tokens = PairTokens(config)
        self.task_tokens = TaskTokens(config)
        self.shared = nn.ModuleList(EncoderLayer(config) for _ in range(config.shared_layers))
        self.mixture = Mixture(config)
        self.cvr_gate = Gate((3 * width, 2 * width), config)
        self.ita_gate = Gate((2 * width,), config)
        self.tia_gate = Gate((2 * width,), config)
        self.affinity = Affinity(config)
        self.wide = Wide(config)
        self.counts = Counts(config)
        self.target_attention = TargetAttention(config)
        self.cvr_tower = Tower(config, config.base_rate)
        self.ita_tower = Tower(config, 0.5)
        self.tia_tower = Tower(config, 0.5)
        self.contrastive = ContrastiveHead(config)
        for part in (self.shared, self.mixture):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    init_linear(module)
        for tower in (self.cvr_tower, self.ita_tower, self.tia_tower):
            init_tower(tower)
        init_heads(self.contrastive)
        self.set_dropout(config.order_dropout)

    def set_dropout(self, rate: float, of_attention: float | None = None) -> None:
        """Set every dropout of the model, in place.

        ``of_attention``: the rate of attention's weights, where it is another one.
        """
        rates = {"dropout": rate, "attention_dropout": rate if of_attention is None else of_attention}
        for module in self.modules():
            for name in rates.keys() & vars(module).keys():
                setattr(module, name, rates[name])

    @contextmanager
    def before_orders(self) -> Iterator[None]:
        """Drop as the phases before orders do, inside the block."""
        self.set_dropout(self.config.dropout, self.config.attention_dropout)
        try:
            yield
        finally:
            self.set_dropout(self.config.order_dropout)

    def limit_ages(self, oldest: int) -> None:
        """Read every entry of a history as at most so old.

        ``oldest`` is a bucket of ``age_bucket``, the last that training can learn from.
        """
        for module in self.modules():
            if isinstance(module, AgeTable):
                module.limit(oldest)

    @torch.no_grad()
    def fit_features(self, items: ItemBatch) -> None:
        """Set the standardisation of the frozen features.

        It is computed from a sample of training items (some hundred are enough). Call it once,
        before training. Without it the features are not standardised, nor are those of a modality
        that no item has.
        """
        text, mask = items.text.float(), items.text_mask & items.has_text[:, None]
        patches = items.patches[items.has_image].float()
        titled = mask.any(1)
        pooled = (text * mask[..., None]).sum(1)[titled] / mask.sum(1)[titled, None]
        if len(pooled):
            self.item_tokens.text.fit(text[mask])
            self.contrastive.text_frozen.fit(pooled)
        if len(patches):
            self.item_tokens.patch.fit(patches.flatten(0, 1))
            self.contrastive.image_frozen.fit(patches.mean(1))

    @torch.no_grad()
    def start_projections(
        self, images: Tensor, titles: Tensor, *, aligned: bool = True, penalty: float = PENALTY
    ) -> None:
        """Start the projections from canonical and principal directions.

        They start on the directions that photos and titles share (unless not ``aligned``), and on
        each one's own (``canonical_directions.py``). Call it once, after ``fit_features``, with
        mean patch features [n, image_width] and mean token states [n, text_width] of the same n
        training items.
        """
        images, titles = images.float(), titles.float()
        given = images.numpy(), titles.numpy(), self.config.width, self.contrastive.size
        start = find_start(*given, aligned=aligned, penalty=penalty)
        center = images.mean(0), titles.mean(0)
        self.item_tokens.patch.start(torch.from_numpy(start.image), center[0])
        self.item_tokens.text.start(torch.from_numpy(start.text), center[1])
        if aligned:
            self.contrastive.start(start, *center)

    def forward(self, batch: Batch) -> CvrOutput:
        """Return the logit of an order for each pair.

        In eval mode every display position counts as unknown.
        """
        pairs = batch.pairs
        items = self.item_tokens(batch.items)
        liked, entries = self.item_tokens.liked(batch.history)
        audience = self.audience_tokens(batch.audience, liked, entries)
        gate = self.cvr_gate((items.gate, audience.gate), (pairs.item, pairs.audience))
        sides = (
            Side.of(items.tokens, items.mask, pairs.item),
            Side.of(audience.tokens, audience.mask, pairs.audience, audience.memory),
        )
        ours, our_task = self.vectors(items, side=0)
        theirs, their_task = self.vectors(audience, side=1)
        context = our_task.index_select(0, pairs.item) + their_task.index_select(0, pairs.audience)
        past = self.target_attention.remember(batch.audience, entries)
        found = self.target_attention(items.entry, past, pairs.item, pairs.audience, sides[1].layout)
        context = context + self.target_attention.out(found)
        factors = (
            torch.cat([self.affinity.of_orders(ours), self.wide.item_factors(batch.items)], dim=1),
            torch.cat([theirs, self.wide.audience_factors(batch.audience)], dim=1),
        )
        direct = (factors[0].index_select(0, pairs.item) * factors[1].index_select(0, pairs.audience)).sum(-1)
        direct = direct + self.wide.of_pairs(pairs.values, pairs.buckets)
        counted = self.counts.of_audience(batch.audience).index_select(0, pairs.audience)
        direct = direct + self.counts(counted + self.counts.found(found), pairs.values, pairs.buckets)
        x = self.pair_tokens(pairs, context)
        if self.config.cvr_layers:
            mixed = self._bottom_and_experts(sides, x, gate)
            above, computed = self.cvr_tower(mixed), mixed.computed
        else:
            above = self.cvr_tower.head.bias.expand(len(pairs))
            computed = torch.zeros(self.config.experts, 1 + len(sides), dtype=torch.int64)
        logits = above + direct + self.affinity.of_token(x[:, 0])
        choice = self.affinity.choice(ours, theirs, pairs.item, pairs.audience, self._stores(batch))
        return CvrOutput(logits, gate, computed, choice)

    def vectors(self, tokens: SideTokens, side: int) -> tuple[Tensor, Tensor]:
        """Return a side's factors and its part of ``[CVR]``.

        The factors are those of ``Affinity.vectors``, [R, 3 d]. The part is [R, d], for items with
        the item's entry. Side 0 is the items.
        """
        factors, task = self.affinity.vectors(tokens.summary, side)
        return factors, task if tokens.entry is None else task + tokens.entry

    def choose(self, batch: Batch) -> Tensor:
        """Return ``CvrOutput.choice`` alone, [B].

        No layer is computed for it.
        """
        ours, theirs = self._tastes(batch)
        return self.affinity.choice(ours, theirs, batch.pairs.item, batch.pairs.audience, self._stores(batch))

    def liked(self, batch: Batch) -> Tensor:
        """Return the pieces of the preference product.

        They are [B, 3] float32. No layer is computed for them.
        """
        return self.affinity.pieces(*self._tastes(batch), batch.pairs.item, batch.pairs.audience)

    def _tastes(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the factors of the preference product.

        They are items' [I, 3 d] and audience rows' [S, 3 d].
        """
        items = self.item_tokens(batch.items)
        audience = self.audience_tokens.summary(batch.audience, self.item_tokens.liked(batch.history)[0])
        return self.affinity.vectors(items.summary, side=0)[0], self.affinity.vectors(audience, side=1)[0]

    def _stores(self, batch: Batch) -> Tensor:
        """Return the store of each audience row, int64 [S].

        Without such a field all are one store.
        """
        names = [field.name for field in self.config.audience_categorical]
        if STORE not in names:
            return torch.zeros_like(batch.audience.cats[:, 0])
        return batch.audience.cats[:, names.index(STORE)]

    def align(self, batch: AlignmentBatch) -> AlignOutput:
        """Return ITA and TIA logits and the contrastive similarities.

        Fields are hidden. Photos and titles are the only inputs.

        Raises:
            ValueError: an ITA or TIA pair lacks a photo or a title.
        """
        items = batch.items
        for pairs in (batch.ita, batch.tia):
            if not (items.has_image[pairs.image_of].all() and items.has_text[pairs.text_of].all()):
                raise ValueError("align: every ITA and TIA pair needs a photo and a title")
        content = self.item_tokens.content(items)
        image, text = self._states(items, content)
        states = (image, text)
        ita, ita_gate, ita_computed = self._match(0, self.ita_gate, self.ita_tower, content, states, batch.ita)
        tia, tia_gate, tia_computed = self._match(1, self.tia_gate, self.tia_tower, content, states, batch.tia)
        whole = items.has_image[batch.index] & items.has_text[batch.index]
        index = batch.index[whole]
        image, text = image.index_select(0, index), text.index_select(0, index)
        return AlignOutput(
            ita=ita,
            tia=tia,
            ita_gate=ita_gate,
            tia_gate=tia_gate,
            similarities=self.contrastive.similarities(image, text),
            group=batch.group[whole],
            image=image,
            text=text,
            computed=ita_computed + tia_computed,
        )

    def content_vectors(self, items: ItemBatch) -> tuple[Tensor, Tensor]:
        """Return each item's photo and title as unit vectors.

        They are two [I, e] float32, each from its own modality alone. Their dot product is the
        cosine used for retrieval. Where a modality is absent its vector is that of ``no image`` or
        ``no text``: check ``has_image`` and ``has_text``.
        """
        return self._states(items, self.item_tokens.content(items))

    def modality_states(self, items: ItemBatch) -> tuple[Tensor, Tensor]:
        """Return each item's ``[IMG]`` and ``[TXT]`` states.

        They come out of the shared bottom, two [I, d], each from its own modality alone. Absent
        ones are as in `content_vectors`.
        """
        return self._alone(self.item_tokens.content(items))

    def _match(
        self,
        task: int,
        gate: Gate,
        tower: Tower,
        content: Content,
        states: tuple[Tensor, Tensor],
        pairs: AlignmentPairs,
    ) -> tuple[Tensor, GateOutput, Tensor]:
        """Score the pairs of one alignment task.

        Returns logits [A], gate and computed pairs [E]. ``states`` are the ``_states`` of the
        content.
        """
        side = pair_content(content, pairs.image_of, pairs.text_of)
        features = torch.cat([content.text_gate[pairs.text_of], content.image_gate[pairs.image_of]], dim=-1)
        chosen = gate((features,), (torch.arange(len(pairs), device=features.device),))
        if len(pairs) == 0:
            return chosen.logits.sum(1), chosen, torch.zeros(self.config.experts, dtype=torch.int64)
        mixed = self._bottom_and_experts((side,), self.task_tokens(task, len(pairs)), chosen)
        cosine = (states[0].index_select(0, pairs.image_of) * states[1].index_select(0, pairs.text_of)).sum(-1)
        return tower(mixed) + self.contrastive.belongs(task, cosine), chosen, mixed.computed[:, 0]

    def _states(self, items: ItemBatch, content: Content) -> tuple[Tensor, Tensor]:
        """Return each item's photo and title as unit vectors.

        They are [I, e], each from its own modality alone. They are read from ``[IMG]`` and
        ``[TXT]`` out of the shared bottom, and from the frozen features.
        """
        image, text = self._alone(content)
        seen = items.has_image[:, None], (items.text_mask & items.has_text[:, None])
        patches = items.patches.float().mean(1) * seen[0]
        tokens = masked_mean(items.text.float(), seen[1])
        return self.contrastive(image, text, patches, tokens, seen[0], seen[1].any(1, keepdim=True))

    def _alone(self, content: Content) -> tuple[Tensor, Tensor]:
        """Return ``[IMG]`` and ``[TXT]`` out of the shared bottom.

        They are two [I, d].
        """
        image, text = content.image, content.text
        for layer in layers_of(self.shared):
            image, text = layer.own(image, content.image_mask)[0], layer.own(text, content.text_mask)[0]
        return image[:, 0], text[:, 0]

    def _bottom_and_experts(self, sides: tuple[Side, ...], x: Tensor, gate: GateOutput) -> Mixed:
        """Run shared layers, experts and mixture.

        It serves either kind of attention. x [B, X, d] starts with the task token.
        """
        x_mask = None
        if self.config.attention == "full":
            real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            x_mask = torch.cat([real, *(side.mask_of_pairs() for side in sides)], dim=1)
            x = torch.cat([x, *(side.tokens_of_pairs() for side in sides)], dim=1)
            sides = ()
        for layer in layers_of(self.shared):
            sides, x = layer(sides, x, x_mask)
        return self.mixture(sides, x, x_mask, gate)
