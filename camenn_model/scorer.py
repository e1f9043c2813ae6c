"""The one scoring path: validation, ``camenn score`` and any service go through here.

Shapes: I items, S audience rows, N tokens of a side, X tokens of a pair, E experts, K kept, h heads, c = d / h, d width.

A tile is every item of one batch against every audience row of another. Item states are computed once per item and
audience states once per row; in the tile only the X tokens are computed, for the chosen experts alone. Attention is two
batched matrix products, one per side (all pairs of an item against its keys, all pairs of an audience row against its
keys), merged under one softmax: nothing of a side is gathered per pair. The tile equals the model's plain forward pass in
eval mode up to float32 rounding; pairs whose K-th and next gate logits nearly tie may choose differently (``margin``).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from camenn_model.batch import AudienceBatch, Batch, HistoryItems, ItemBatch
from camenn_model.experts import choose
from camenn_model.layers import EncoderLayer, mask_bias
from camenn_model.model import CameNN
from camenn_model.tokens import SideTokens

TILE_PAIRS = 4096
"""Pairs of a tile that are computed at a time: small enough that the X tokens stay in a core's cache (measured)."""

LEAST = -80.0
"""Scores this far below the largest of their part count no less than this."""


@dataclass
class SideStates:
    """What a side leaves for its pairs. Experts are filled in when a pair first chooses them."""

    gate: Tensor  # [R, E] float32, the side's part of the CVR gate's logits
    bias: Tensor  # [R, N] float32, 0 or MASKED
    shared: list[tuple[Tensor, Tensor]]  # per shared layer: keys [R, h, c, N], values [R, h, N, c]
    tokens: Tensor  # [R, N, d] out of the shared bottom
    filled: Tensor  # [E, R] bool: expert computed for this row
    experts: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # like shared; rows not filled are 0
    tower: tuple[Tensor, Tensor] | None = None  # keys [R, h, E, c, N], values [R, h, N, E, c]; not filled: 0

    def __len__(self) -> int:
        return self.gate.shape[0]


@dataclass(frozen=True)
class _Read:
    """Unnormalised attention of one part: weights are exp(score - top)."""

    top: Tensor  # [..., 1] largest score
    mass: Tensor  # [..., 1] sum of weights
    value: Tensor  # [..., c] weighted sum of values


class Scorer:
    """Scores tiles of items x audience rows with a model in eval mode."""

    def __init__(self, model: CameNN) -> None:
        self.model = model

    @torch.inference_mode()
    def item_states(self, items: ItemBatch) -> SideStates:
        """States of I items, on the model's device. Raises ValueError in training mode or with ``full`` attention."""
        self._check()
        return self._states(self.model.item_tokens(items), side=0)

    @torch.inference_mode()
    def audience_states(self, audience: AudienceBatch, history: HistoryItems) -> SideStates:
        """States of S audience rows. Raises ValueError in training mode or with ``full`` attention."""
        self._check()
        identity = self.model.item_tokens.identity(history.cats)
        return self._states(self.model.audience_tokens(audience, history, identity), side=1)

    @torch.inference_mode()
    def score_tile(self, items: SideStates, audience: SideStates, values: Tensor, buckets: Tensor) -> Tensor:
        """Raw logits [S, I] float32 of every pair; ``values`` float32 and ``buckets`` int64 are [S, I, n_pair_num].

        The display position is unknown. The states are completed on the way (experts that a pair is first to choose).
        """
        count_s, count_i = len(audience), len(items)
        if values.shape[:2] != (count_s, count_i) or buckets.shape != values.shape:
            raise ValueError(f"score_tile: values {tuple(values.shape)}, buckets {tuple(buckets.shape)} for "
                             f"{count_s} audience rows x {count_i} items")
        logits = torch.empty(count_s, count_i, device=values.device)
        step_s = min(count_s, max(1, int(TILE_PAIRS**0.5)))
        step_i = max(1, TILE_PAIRS // max(1, step_s))
        for start_i in range(0, count_i, step_i):
            rows_i = slice(start_i, min(start_i + step_i, count_i))
            for start_s in range(0, count_s, step_s):
                rows_s = slice(start_s, min(start_s + step_s, count_s))
                logits[rows_s, rows_i] = self._tile(
                    _Rows(items, rows_i), _Rows(audience, rows_s), values[rows_s, rows_i], buckets[rows_s, rows_i]
                )
        return logits

    @torch.inference_mode()
    def margin(self, items: SideStates, audience: SideStates) -> Tensor:
        """K-th minus next gate logit of each pair, [S, I] float32: below 1e-5 the choice of experts is a matter of
        rounding. Infinite where all experts are kept."""
        logits = audience.gate[:, None] + items.gate[None, :]
        keep = self.model.config.top_k
        if keep == self.model.config.experts:
            return torch.full(logits.shape[:2], torch.inf, device=logits.device)
        ordered = logits.sort(dim=-1, descending=True).values
        return ordered[..., keep - 1] - ordered[..., keep]

    @torch.inference_mode()
    def score_pairs(self, batch: Batch) -> Tensor:
        """Raw logits [B] float32 of listed pairs by the plain forward pass: either kind of attention, any pairs."""
        if self.model.training:
            raise ValueError("Scorer: call model.eval() first")
        return self.model(batch).logits

    def _check(self) -> None:
        if self.model.training:
            raise ValueError("Scorer: call model.eval() first")
        if self.model.config.attention != "prefix":
            raise ValueError("Scorer: states need attention='prefix'; use score_pairs with 'full'")

    def _states(self, side_tokens: SideTokens, side: int) -> SideStates:
        """Runs the shared bottom on one side."""
        tokens, shared = side_tokens.tokens, []
        for layer in self.model.shared:
            tokens, kv = layer.own(tokens, side_tokens.mask)
            shared.append(_keys_values(kv))
        gate = self.model.cvr_gate.part(side, side_tokens.gate)
        filled = torch.zeros(gate.shape[1], gate.shape[0], dtype=torch.bool, device=gate.device)
        return SideStates(gate, mask_bias(side_tokens.mask), shared, tokens, filled)

    def _tile(self, items: _Rows, audience: _Rows, values: Tensor, buckets: Tensor) -> Tensor:
        """Logits [S, I] of one cache-sized tile; values, buckets [S, I, n]. Inside, pairs run item by item: [I, S]."""
        model = self.model
        unknown = torch.zeros(values.shape[1], values.shape[0], dtype=torch.int64, device=values.device)
        x = model.pair_tokens.embed(values.transpose(0, 1), buckets.transpose(0, 1), unknown)  # [I, S, X, d]
        shape = x.shape
        x = x.flatten(0, 1)
        for number, layer in enumerate(model.shared):
            x = _run_layer(layer, x, None, items.shared(number), audience.shared(number))

        logits = items.gate[:, None] + audience.gate[None, :]  # [I, S, E]
        chosen, kept = choose(logits, model.config.top_k)
        weights = torch.zeros_like(logits).scatter_(-1, chosen, kept)
        picked = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, chosen, True)
        mixed = torch.zeros_like(x)
        for expert, (layer, norm) in enumerate(zip(model.mixture.experts, model.mixture.norms, strict=True)):
            some = picked[..., expert]
            rows_i, rows_s = some.any(1).nonzero().squeeze(1), some.any(0).nonzero().squeeze(1)
            if len(rows_i) == 0:
                continue
            for side, rows in ((items, rows_i), (audience, rows_s)):
                _fill(model, side.states, expert, rows + side.start)
            pairs = some.flatten().nonzero().squeeze(1)
            place = some[rows_i][:, rows_s].flatten().nonzero().squeeze(1)  # where the pairs lie among these rows
            whole = len(place) == len(rows_i) * len(rows_s)
            tokens = _run_layer(
                layer,
                x.index_select(0, pairs),
                None if whole else place,
                items.expert(expert, rows_i),
                audience.expert(expert, rows_s),
            )
            share = weights[..., expert].flatten().index_select(0, pairs)
            mixed.index_add_(0, pairs, norm(tokens) * share[:, None, None])
        return self._tower(mixed.view(shape), weights, items, audience).T

    def _tower(self, mixed: Tensor, weights: Tensor, items: _Rows, audience: _Rows) -> Tensor:
        """Logits [I, S] from the mixed X tokens [I, S, X, d] and dense gate weights [I, S, E].

        logit_j = sum over e of g_e q·kappa_{e,j}: as one product with the gate weights on the query's side.
        """
        tower = self.model.cvr_tower
        task = mixed[:, :, 0]
        query = tower.ask(task)  # [I, S, h, c]
        gated = query[:, :, :, None] * weights[:, :, None, :, None]  # [I, S, h, E, c]
        gated = gated.flatten(3)[:, :, None]  # one query: [I, S, 1, h, E c]
        parts = [_read_items(gated, items.tower()), _read_audience(gated, audience.tower())]
        # The X part, as in the tower's own forward: W_K and W_V moved to the query's side.
        width = task.shape[-1]
        by_head = (tower.heads, width // tower.heads, width)
        folded = torch.einsum("ishc,hcd->ishd", query, tower.key.weight.view(by_head))
        own = _weigh(folded @ mixed.transpose(2, 3))  # [I, S, h, X]
        read = own[0] @ mixed  # [I, S, h, d]
        value = torch.einsum("ishd,hcd->ishc", read, tower.value.weight.view(by_head))
        pieces = [_Read(own[1], own[2], value)]
        for part in parts:
            of_experts = part.value.squeeze(2).unflatten(-1, (weights.shape[-1], -1))  # [I, S, h, E, c]
            value = (of_experts * weights[:, :, None, :, None]).sum(3)
            pieces.append(_Read(part.top.squeeze(2), part.mass.squeeze(2), value))
        return tower.answer(task, _merge(pieces).flatten(2))


@dataclass(frozen=True)
class _Part:
    """Keys and values of some rows of a side."""

    bias: Tensor  # [R, N]
    keys: Tensor  # [R, h, c, N]
    values: Tensor  # [R, h, N, c]


@dataclass(frozen=True)
class _Rows:
    """A run of rows of a side's states."""

    states: SideStates
    rows: slice

    @property
    def start(self) -> int:
        return int(self.rows.start)

    @property
    def gate(self) -> Tensor:
        return self.states.gate[self.rows]

    def shared(self, number: int) -> _Part:
        keys, values = self.states.shared[number]
        return _Part(self.states.bias[self.rows], keys[self.rows], values[self.rows])

    def expert(self, expert: int, rows: Tensor) -> _Part:
        """``rows``: [r] int64, counted from the start of the run."""
        keys, values = self.states.experts[expert]
        bias = self.states.bias[self.rows]
        keys, values = keys[self.rows], values[self.rows]
        if len(rows) == len(bias):
            return _Part(bias, keys, values)
        return _Part(bias.index_select(0, rows), keys.index_select(0, rows), values.index_select(0, rows))

    def tower(self) -> _Part:
        """Keys [R, h, E c, N] and values [R, h, N, E c] of all experts; those not filled are 0."""
        assert self.states.tower is not None  # the tower is asked after the experts
        keys, values = self.states.tower
        return _Part(self.states.bias[self.rows], keys[self.rows].flatten(2, 3), values[self.rows].flatten(3, 4))


def _fill(model: CameNN, states: SideStates, expert: int, rows: Tensor) -> None:
    """Computes an expert and the tower's keys and values of its output for those of ``rows`` that lack them."""
    rows = rows[~states.filled[expert, rows]]
    if len(rows) == 0:
        return
    layer, norm, tower = model.mixture.experts[expert], model.mixture.norms[expert], model.cvr_tower
    bias = states.bias.index_select(0, rows)
    tokens, kv = layer.own(states.tokens.index_select(0, rows), bias == 0)
    keys, values = _keys_values(kv)
    count, (_, heads, width, length) = len(states), keys.shape
    if expert not in states.experts:
        states.experts[expert] = (keys.new_zeros(count, heads, width, length), values.new_zeros(count, heads, length, width))
    if states.tower is None:
        experts = model.config.experts
        states.tower = (
            keys.new_zeros(count, heads, experts, width, length),
            keys.new_zeros(count, heads, length, experts, width),
        )
    states.experts[expert][0][rows], states.experts[expert][1][rows] = keys, values
    normal = norm(tokens)
    by_head = (len(rows), length, heads, width)
    states.tower[0][rows, :, expert] = tower.key(normal).view(by_head).permute(0, 2, 3, 1)
    states.tower[1][rows, :, :, expert] = tower.value(normal).view(by_head).transpose(1, 2)
    states.filled[expert, rows] = True


def _run_layer(layer: EncoderLayer, x: Tensor, place: Tensor | None, items: _Part, audience: _Part) -> Tensor:
    """One layer on the X tokens [B, X, d] of the pairs at ``place`` [B] of the grid items x audience (None = all)."""
    query, kv = layer.project(x)
    query = query * query.shape[-1] ** -0.5
    grid = (len(items.bias), len(audience.bias))
    if place is None:
        dense = query
    else:
        dense = query.new_zeros(grid[0] * grid[1], *query.shape[1:])
        dense.index_copy_(0, place, query)
    dense = dense.view(*grid, *query.shape[1:])
    parts = []
    for read in (_read_items(dense, items), _read_audience(dense, audience)):
        flat = (read.top.flatten(0, 1), read.mass.flatten(0, 1), read.value.flatten(0, 1))
        parts.append(_Read(*(flat if place is None else (tensor.index_select(0, place) for tensor in flat))))
    keys, values = _keys_values(kv)  # [B, h, c, X], [B, h, X, c]
    weight, top, mass = _weigh(query.transpose(1, 2) @ keys)
    own = _Read(top.transpose(1, 2), mass.transpose(1, 2), (weight @ values).transpose(1, 2))
    return layer.finish(x, _merge([own, *parts]).flatten(2))


def _keys_values(kv: Tensor) -> tuple[Tensor, Tensor]:
    """[R, N, 2, h, c] → keys [R, h, c, N] and values [R, h, N, c], each contiguous."""
    return kv[:, :, 0].permute(0, 2, 3, 1).contiguous(), kv[:, :, 1].transpose(1, 2).contiguous()


def _weigh(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(scores - top) (in place), top, mass; the last axis is summed over.

    Differences below ``LEAST`` are cut off there: exp(-80) is nothing beside 1 in float32, and underflow, which every
    masked key would meet, makes exp some twenty times slower on a CPU.
    """
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).clamp_(min=LEAST).exp_()
    return weights, top, weights.sum(-1, keepdim=True)


def _read_items(query: Tensor, part: _Part) -> _Read:
    """Scaled queries [I, S, Q, h, c] against keys of I items; the parts of the answer are [I, S, Q, h, ·]."""
    count, others, queries, heads, width = query.shape
    rows = query.permute(0, 3, 1, 2, 4).reshape(count, heads, others * queries, width)
    weights, top, mass = _weigh((rows @ part.keys).add_(part.bias[:, None, None]))
    shape = (count, heads, others, queries, -1)
    return _Read(*(piece.view(shape).permute(0, 2, 3, 1, 4) for piece in (top, mass, weights @ part.values)))


def _read_audience(query: Tensor, part: _Part) -> _Read:
    """Scaled queries [I, S, Q, h, c] against keys of S audience rows; the parts of the answer are [I, S, Q, h, ·]."""
    read = _read_items(query.transpose(0, 1), part)
    return _Read(*(piece.transpose(0, 1) for piece in (read.top, read.mass, read.value)))


def _merge(parts: list[_Read]) -> Tensor:
    """Attention over the union of the parts, [..., c]."""
    top = parts[0].top
    for part in parts[1:]:
        top = torch.maximum(top, part.top)
    total, mass = 0.0, 0.0
    for part in parts:
        factor = (part.top - top).exp()
        total, mass = total + part.value * factor, mass + part.mass * factor
    return total / mass
