"""Attention of the pairs of a tile to keys that their item and their audience row hold, without gathering the keys.

Shapes: n pairs of a tile, R rows of a side, N tokens of a side, M places of a row, Q queries of a pair, X tokens of a
pair, h heads, c = d / h, d width.

For each side the pairs' queries are laid out row by row (all pairs of one item beside each other, padded to the largest
number M), so that attention is one batched matrix product per side. Each side's answer is kept with the largest score and
the sum of weights, and the sides and the pair's own tokens are then merged under one softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from camenn_model.layers import EncoderLayer, mask_bias

BLOCK = 4
"""Pairs whose own tokens are attended to in one matrix product (measured: 2.8 µs a pair, 9 µs for a product each)."""
LEAST = -80.0
"""Scores this far below the largest of their part count no less than this."""


@dataclass(frozen=True)
class Part:
    """Keys and values of R rows of a side."""

    bias: Tensor  # [R, N] float32, 0 or MASKED
    keys: Tensor  # [R, h, c, N]
    values: Tensor  # [R, h, N, c]


@dataclass(frozen=True)
class Places:
    """Where each pair stands in the layout of one side."""

    index: Tensor  # [n h] int64, into [R, h, M] flattened
    size: int  # M


@dataclass(frozen=True)
class Read:
    """Unnormalised attention to one part: weights are exp(score - top)."""

    top: Tensor  # [n, h, Q, 1] largest score
    mass: Tensor  # [n, h, Q, 1] sum of weights
    value: Tensor  # [n, h, Q, c] weighted sum of values


def find_places(some: Tensor, heads: int) -> tuple[Places, Places]:
    """Places of the pairs where ``some`` [I, S] is True, in row-major order, by item and by audience row."""
    by_item, by_audience = some.nonzero(as_tuple=True)
    places = []
    for row, axis in ((by_item, 1), (by_audience, 0)):
        rank = some.cumsum(axis)[by_item, by_audience] - 1
        size = int(some.sum(axis).max())
        index = (row[:, None] * heads + torch.arange(heads, device=row.device)) * size + rank[:, None]
        places.append(Places(index.flatten(), size))
    return places[0], places[1]


def read_part(query: Tensor, part: Part, places: Places) -> Read:
    """Attention of scaled queries [n, h, Q, c] to the keys of the row that each pair's place lies in."""
    count, heads, queries, width = query.shape
    rows = len(part.bias) * heads * places.size
    laid_out = query.new_zeros(rows, queries * width)
    laid_out.index_copy_(0, places.index, query.reshape(count * heads, queries * width))
    laid_out = laid_out.view(len(part.bias), heads, places.size * queries, width)
    weights, top, mass = weigh((laid_out @ part.keys).add_(part.bias[:, None, None]))
    value = weights @ part.values

    def take(answer: Tensor) -> Tensor:
        return answer.view(rows, -1).index_select(0, places.index).view(count, heads, queries, -1)

    return Read(take(top), take(mass), take(value))


def read_own(query: Tensor, kv: Tensor) -> Read:
    """Attention of scaled queries [n, h, X, c] to the pair's own tokens, kv [n, X, 2, h, c].

    ``BLOCK`` pairs go through one matrix product, with each other's tokens masked: products of 4 x 4 are all overhead.
    """
    count, heads, length, width = query.shape
    blocks = -(-count // BLOCK)
    spare = blocks * BLOCK - count
    if spare:
        query, kv = F.pad(query, (0, 0) * 3 + (0, spare)), F.pad(kv, (0, 0) * 4 + (0, spare))
    keys, values = keys_values(kv.reshape(blocks, BLOCK * length, 2, heads, width))
    rows = query.view(blocks, BLOCK, heads, length, width).transpose(1, 2).reshape(blocks, heads, -1, width)
    pair = torch.arange(BLOCK, device=query.device).repeat_interleave(length)
    weights, top, mass = weigh((rows @ keys).add_(mask_bias(pair[:, None] == pair[None, :])))

    def take(answer: Tensor) -> Tensor:
        answer = answer.view(blocks, heads, BLOCK, length, -1).transpose(1, 2)
        return answer.reshape(blocks * BLOCK, heads, length, -1)[:count]

    return Read(take(top), take(mass), take(weights @ values))


def weigh(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(scores - top) (in place), top, mass; the last axis is summed over.

    Differences below ``LEAST`` are cut off there: exp(-80) is nothing beside 1 in float32, and underflow, which every
    masked key would meet, makes exp some twenty times slower on a CPU.
    """
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).clamp_(min=LEAST).exp_()
    return weights, top, weights.sum(-1, keepdim=True)


def merge(reads: list[Read]) -> Tensor:
    """Attention over the union of the parts, [n, h, Q, c]."""
    top = reads[0].top
    for read in reads[1:]:
        top = torch.maximum(top, read.top)
    total, mass = torch.zeros_like(reads[0].value), torch.zeros_like(top)
    for read in reads:
        factor = (read.top - top).exp()
        total.addcmul_(read.value, factor)
        mass.addcmul_(read.mass, factor)
    return total.div_(mass)


def run_layer(layer: EncoderLayer, x: Tensor, sides: tuple[tuple[Part, Places], ...]) -> Tensor:
    """One layer in eval mode on the X tokens [n, X, d] of the pairs at the given places of each side."""
    query, kv = layer.project(x)
    query = (query * query.shape[-1] ** -0.5).transpose(1, 2).contiguous()  # [n, h, X, c]
    reads = [read_own(query, kv), *(read_part(query, part, places) for part, places in sides)]
    return layer.finish(x, merge(reads).transpose(1, 2).flatten(2))


def keys_values(kv: Tensor) -> tuple[Tensor, Tensor]:
    """[R, N, 2, h, c] → keys [R, h, c, N] and values [R, h, N, c], each contiguous."""
    return kv[:, :, 0].permute(0, 2, 3, 1).contiguous(), kv[:, :, 1].transpose(1, 2).contiguous()
