"""The transformer layer of all parts of the model.

It works on sides that are shared between pairs.

Shapes: B pairs, R rows of a side (unique items or audience rows), N tokens of a side, X tokens of a
pair, h heads, c = d / h width of a head, d width.

In ``prefix`` attention a side attends to itself only and a pair's tokens attend to both sides and
themselves, so a side is computed once per unique row and pairs refer to it by index. ``full``
attention is the case without sides: the pair's tokens are then all tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camenn_model.config import ModelConfig

INIT_STD = 0.02
"""Standard deviation of the truncated normal that weights start from."""
FAST = 5.0
"""Factor on parameters that should change faster than the others.

Adam changes each by about the learning rate, whatever its gradient.
"""
SHARED = 3
"""Pairs for each row of a side from which they are laid out by row"""
GROUPS = (4, 8, 16, 32)
"""Sizes of such groups: at most half of the mean number of pairs, so that few places stay empty"""
MASKED = -1e9
"""Added to the score of a masked key: its weight underflows to exactly 0 in float32 and bfloat16."""


@dataclass(frozen=True)
class Layout:
    """Pairs laid out by the row that they look at.

    A group is of one row.

    A product of a group's queries with its row's keys reads the keys once, where a copy of them for
    each pair would be larger than everything else of a step.
    """

    row: Tensor  # [G] int64: the row of each group
    place: Tensor  # [B] int64: each pair's place among the G x size places
    size: int
    each: bool  # True where every row has exactly one group, in order

    @classmethod
    def of(cls, index: Tensor, rows: int) -> Layout | None:
        """Lay out pairs by their rows.

        ``index`` is [B] int64. None where so few pairs share a row that copies are cheaper.
        """
        count = len(index)
        if count < SHARED * rows:
            return None
        size = next((size for size in GROUPS if count < 2 * size * rows), GROUPS[-1])
        pairs = torch.bincount(index, minlength=rows)
        ordered, order = index.sort(stable=True)
        number = torch.arange(count, device=index.device) - (pairs.cumsum(0) - pairs)[ordered]
        groups = (pairs + size - 1) // size
        first = groups.cumsum(0) - groups
        place = torch.empty_like(index)
        place[order] = (first[ordered] + number // size) * size + number % size
        row = torch.arange(rows, device=index.device).repeat_interleave(groups)
        return cls(row, place, size, bool((groups == 1).all()))

    def lay_out(self, x: Tensor) -> Tensor:
        """Lay out pairs' tensors.

        [B, ...] gives [G, size, ...]. Places without a pair are 0.
        """
        laid: Tensor = _LayOut.apply(x, self.place, len(self.row) * self.size)
        return laid.unflatten(0, (len(self.row), self.size))

    def take(self, x: Tensor) -> Tensor:
        """Take pairs' tensors out of the layout.

        [G, size, ...] gives [B, ...].
        """
        taken: Tensor = _Take.apply(x.flatten(0, 1), self.place)
        return taken


class _LayOut(torch.autograd.Function):
    """Rows written to distinct places of a larger tensor.

    Its gradient is a copy, where autograd's of an indexed read would add row by row.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, places: int) -> Tensor:
        ctx.save_for_backward(place)
        return x.new_zeros(places, *x.shape[1:]).index_copy_(0, place, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].index_select(0, ctx.saved_tensors[0]), None, None


class _Take(torch.autograd.Function):
    """Rows read from distinct places, the reverse of ``_LayOut``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.places = x.shape[0]
        return x.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0]
        written = gradient.new_zeros(ctx.places, *gradient.shape[1:])
        return written.index_copy_(0, ctx.saved_tensors[0], gradient), None


@dataclass(frozen=True)
class Side:
    """Tokens that several pairs share."""

    tokens: Tensor  # [R, N, d] float
    mask: Tensor  # [R, N] bool, True = real
    index: Tensor | None  # [B] int64: the row that each pair looks at. None: pair b looks at row b
    memory: int = 0  # number of last tokens that are read by others, and stay as they are
    layout: Layout | None = None

    @classmethod
    def of(cls, tokens: Tensor, mask: Tensor, index: Tensor, memory: int = 0) -> Side:
        """Make a side, with the layout of its pairs."""
        return cls(tokens, mask, index, memory, Layout.of(index, tokens.shape[0]))

    def keep(self, pairs: Tensor) -> Side:
        """Keep the rows that the given pairs use, each once.

        The pairs are [b] int64. Returns the side indexed by these pairs.
        """
        if self.index is None:
            return Side(self.tokens.index_select(0, pairs), self.mask.index_select(0, pairs), None, self.memory)
        rows, index = torch.unique(self.index[pairs], return_inverse=True)
        if rows.shape[0] == self.tokens.shape[0]:
            return Side.of(self.tokens, self.mask, index, self.memory)
        return Side.of(self.tokens.index_select(0, rows), self.mask.index_select(0, rows), index, self.memory)

    def mask_of_pairs(self) -> Tensor:
        """Return the mask of each pair's row, [B, N] bool."""
        return self.mask if self.index is None else self.mask.index_select(0, self.index)

    def tokens_of_pairs(self) -> Tensor:
        """Return the tokens of each pair's row, [B, N, d]."""
        return self.tokens if self.index is None else self.tokens.index_select(0, self.index)

    def score(self, query: Tensor) -> Tensor:
        """Multiply pairs' queries with their rows' tokens.

        [B, h, d] gives [B, h, N].
        """
        return per_pair(query, self.tokens.transpose(1, 2), self.index, self.layout)

    def read(self, weights: Tensor) -> Tensor:
        """Sum rows' tokens by their pairs' weights.

        [B, h, N] gives [B, h, d].
        """
        return per_pair(weights, self.tokens, self.index, self.layout)


def per_pair(x: Tensor, rows: Tensor, index: Tensor | None, layout: Layout | None) -> Tensor:
    """Multiply each pair's matrix with its row's.

    They are [..., n, k] and [..., k, m].

    ``x`` is [B, n, k] and ``rows`` [R, k, m], or both have a dimension of heads after the first.
    """
    if index is None:
        return x @ rows
    if layout is None:
        return x @ rows.index_select(0, index)
    laid = layout.lay_out(x)  # [G, size, (h,) n, k]
    if x.dim() == 4:
        laid = laid.transpose(1, 2)
    asked = laid.flatten(-3, -2)  # [G, (h,) size n, k]
    answer = asked @ (rows if layout.each else rows.index_select(0, layout.row))
    answer = answer.unflatten(-2, (layout.size, -1))
    return layout.take(answer.transpose(1, 2) if x.dim() == 4 else answer)


class _ByteDropout(torch.autograd.Function):
    """Dropout whose mask comes from random bytes.

    Eight draws come from one 64-bit number. On a CPU the draws of ``F.dropout`` cost more than the
    layer they sit in (measured: 75 ms for 5 million values on one core, against 25 ms here). The
    rate is rounded to a multiple of 1/256 and the scale uses the rounded rate.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: int) -> Tensor:
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        keep = words.view(torch.uint8)[: x.numel()].view(x.shape) >= threshold
        ctx.save_for_backward(keep)
        ctx.scale = 256.0 / (256 - threshold)
        return torch.where(keep, x * ctx.scale, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return torch.where(keep, gradients[0] * ctx.scale, 0.0), None


def drop(x: Tensor, rate: float, training: bool) -> Tensor:
    """Apply dropout to any tensor.

    On a CPU it is done by ``_ByteDropout``.
    """
    if not training or rate == 0.0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, rate)
    dropped: Tensor = _ByteDropout.apply(x, max(1, round(rate * 256)))
    return dropped


def mask_bias(mask: Tensor) -> Tensor:
    """Convert a mask to its additive term of scores, float32.

    It has ``mask``'s shape: 0 where True, ``MASKED`` where False.
    """
    return torch.where(mask, 0.0, MASKED)


@dataclass(frozen=True)
class Keys:
    """Keys and values of R rows, and their mask.

    The mask marks the keys that may be attended to. ``index`` [B] maps queries to rows. None means
    row by row.
    """

    kv: Tensor  # [R, N, 2, h, c]
    mask: Tensor | None  # [R, N] bool, None = all real
    index: Tensor | None
    layout: Layout | None = None


def attend(query: Tensor, parts: list[Keys], dropout: float, training: bool) -> Tensor:
    """Attend from the queries to the union of all parts.

    ``query`` is [B, Q, h, c], the result [B, Q, d]. It is softmax attention.
    """
    rows, queries, heads, head_width = query.shape
    query = query.transpose(1, 2) * head_width**-0.5  # [B, h, Q, c]
    scores = []
    for part in parts:
        score = per_pair(query, part.kv[:, :, 0].permute(0, 2, 3, 1), part.index, part.layout)  # [B, h, Q, N]
        if part.mask is not None:
            mask = part.mask if part.index is None else part.mask.index_select(0, part.index)
            score = score + mask_bias(mask)[:, None, None, :]
        scores.append(score)
    joint = scores[0] if len(scores) == 1 else torch.cat(scores, dim=-1)
    weights = drop(joint.softmax(dim=-1), dropout, training)
    split = weights.split([score.shape[-1] for score in scores], dim=-1)
    reads = [
        per_pair(weight, part.kv[:, :, 1].transpose(1, 2), part.index, part.layout)
        for weight, part in zip(split, parts, strict=True)
    ]
    mixed = sum(reads[1:], start=reads[0])
    return mixed.transpose(1, 2).reshape(rows, queries, heads * head_width)


class FeedForward(nn.Module):
    """The feed-forward part, d → ffn → d with GELU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.rise = nn.Linear(config.width, config.ffn)
        self.fall = nn.Linear(config.ffn, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fall(F.gelu(self.rise(x)))


class EncoderLayer(nn.Module):
    """A pre-LN transformer encoder layer.

    It works on sides and pairs' tokens, all with the same weights.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.attention_dropout = config.attention_dropout
        self.attention_norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.ffn_norm = nn.LayerNorm(config.width)
        self.ffn = FeedForward(config)

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return query and key-value of the normalised tokens.

        They are [..., N, h, c] and [..., N, 2, h, c], of LN(tokens [..., N, d]).
        """
        qkv = self.qkv(self.attention_norm(tokens))
        qkv = qkv.view(*tokens.shape[:-1], 3, self.heads, tokens.shape[-1] // self.heads)
        return qkv[..., 0, :, :], qkv[..., 1:, :, :]

    def finish(self, tokens: Tensor, attended: Tensor) -> Tensor:
        """Add attention and feed-forward parts to the residual stream."""
        tokens = tokens + drop(self.out(attended), self.dropout, self.training)
        return tokens + drop(self.ffn(self.ffn_norm(tokens)), self.dropout, self.training)

    def own(self, tokens: Tensor, mask: Tensor | None, memory: int = 0) -> tuple[Tensor, Tensor]:
        """Run the layer on tokens that attend to themselves only.

        The tokens are [R, N, d]. The last ``memory`` of them are attended to and stay as they are.
        Returns their output and their key-value [R, N, 2, h, c].
        """
        if not memory:
            query, kv = self.project(tokens)
            attended = attend(query, [Keys(kv, mask, None)], self.attention_dropout, self.training)
            return self.finish(tokens, attended), kv
        active, kept = tokens.split([tokens.shape[1] - memory, memory], dim=1)
        query, kv = self.project(active)
        width = tokens.shape[-1]
        kept_kv = F.linear(self.attention_norm(kept), self.qkv.weight[width:], self.qkv.bias[width:])
        kv = torch.cat([kv, kept_kv.unflatten(-1, kv.shape[2:])], dim=1)
        attended = attend(query, [Keys(kv, mask, None)], self.attention_dropout, self.training)
        return torch.cat([self.finish(active, attended), kept], dim=1), kv

    def forward(self, sides: tuple[Side, ...], x: Tensor, x_mask: Tensor | None) -> tuple[tuple[Side, ...], Tensor]:
        """Run the layer on the sides and the pairs' tokens.

        Sides attend to themselves, ``x`` [B, X, d] to the sides and itself (``x_mask`` [B, X], None
        = all real).
        """
        after, parts = [], []
        for side in sides:
            tokens, kv = self.own(side.tokens, side.mask, side.memory)
            after.append(Side(tokens, side.mask, side.index, side.memory, side.layout))
            parts.append(Keys(kv, side.mask, side.index, side.layout))
        query, kv = self.project(x)
        parts.append(Keys(kv, x_mask, None))
        return tuple(after), self.finish(x, attend(query, parts, self.attention_dropout, self.training))


def layers_of(modules: nn.ModuleList) -> list[EncoderLayer]:
    """Return a list's encoder layers, with their type.

    The list holds nothing else.
    """
    return cast("list[EncoderLayer]", list(modules))


def init_linear(layer: nn.Linear, scale: float = 1.0) -> None:
    """Initialize a linear layer from a truncated normal.

    Its standard deviation is ``INIT_STD`` times ``scale``. The bias is 0.
    """
    nn.init.trunc_normal_(layer.weight, std=INIT_STD * scale, a=-2 * INIT_STD * scale, b=2 * INIT_STD * scale)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def init_embedding(weight: Tensor) -> None:
    """Initialize a table from a truncated normal of ``INIT_STD``."""
    nn.init.trunc_normal_(weight, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)


def wide_scale(inputs: int, width: int) -> float:
    """Return the starting scale of a wide feature's map.

    It scales a map from a wide frozen feature: its output starts as large as that of a map from
    ``width``.
    """
    return math.sqrt(width / inputs)
