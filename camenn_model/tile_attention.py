"""Attention of the pairs of a tile to keys that their item and their audience row hold, without gathering the keys.

Shapes: n pairs of a tile, R rows of a side, N tokens of a side, M places of a row, Q queries of a pair, X tokens of a
pair, h heads, c = d / h, d width.

For each side the pairs' queries are laid out row by row (all pairs of one item beside each other, padded to the largest
number M), so that attention is one batched matrix product per side. Weights are exp(score) as it is, without taking off
the largest score first, which would be a pass over all scores; values carry a column of ones, so that the same product
gives the sum of weights. Masked tokens have keys and values of 0, ones included. The parts' sums are added and divided;
where a sum of weights comes near the limits of float32 (scores beyond about 57), all is computed again in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from camenn_model.layers import EncoderLayer

BLOCK = 4
"""Pairs whose own tokens are attended to in one matrix product (measured: 2.8 µs a pair, 9 µs for a product each)."""
LIMIT = 1e25
"""Sums of weights above it, or below its inverse, are not trusted in float32."""
WIDE_LIMIT = 1e300


@dataclass(frozen=True)
class Part:
    """Keys and values of R rows of a side, 0 where masked."""

    keys: Tensor  # [R, h, c, N]
    values: Tensor  # [R, h, N, c + 1], the last column 1


@dataclass(frozen=True)
class Places:
    """Where each pair stands in the layout of one side."""

    index: Tensor  # [n h] int64, into [R, h, M] flattened
    size: int  # M


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


def read_part(query: Tensor, part: Part, places: Places) -> Tensor:
    """Weighted sums of the values of the row that each pair's place lies in, [n, h, Q, c + 1], of scaled queries [n, h, Q, c]."""
    count, heads, queries, width = query.shape
    rows = len(part.keys) * heads * places.size
    query = query.reshape(count * heads, queries * width)
    # Places that no pair takes must hold numbers.
    laid_out = (query.new_empty if len(query) == rows else query.new_zeros)(rows, queries * width)
    laid_out.index_copy_(0, places.index, query)
    weights = (laid_out.view(len(part.keys), heads, -1, width) @ part.keys).exp_()
    answer = (weights @ part.values).view(rows, -1).index_select(0, places.index)
    return answer.view(count, heads, queries, -1)


def read_own(query: Tensor, kv: Tensor) -> Tensor:
    """Weighted sums of the values of the pair's own tokens, [n, h, X, c + 1], of scaled queries [n, h, X, c] and kv [n, X, 2, h, c].

    ``BLOCK`` pairs go through one matrix product, with each other's tokens masked: products of 4 x 4 are all overhead.
    """
    count, heads, length, width = query.shape
    blocks = -(-count // BLOCK)
    spare = blocks * BLOCK - count
    if spare:
        query, kv = F.pad(query, (0, 0) * 3 + (0, spare)), F.pad(kv, (0, 0) * 4 + (0, spare))
    part = keys_values(kv.reshape(blocks, BLOCK * length, 2, heads, width))
    rows = query.view(blocks, BLOCK, heads, length, width).transpose(1, 2).reshape(blocks, heads, -1, width)
    pair = torch.arange(BLOCK, device=query.device).repeat_interleave(length)
    weights = (rows @ part.keys).exp_().mul_(pair[:, None] == pair[None, :])
    answer = (weights @ part.values).view(blocks, heads, BLOCK, length, -1).transpose(1, 2)
    return answer.reshape(blocks * BLOCK, heads, length, -1)[:count]


def divide(read: Callable[[torch.dtype | None], Tensor]) -> Tensor:
    """Attention [..., c] from ``read(dtype)``: the parts' weighted sums, added up, [..., c + 1], computed in the dtype (None: as things are).

    Raises FloatingPointError for scores beyond about 700, which no trained model has.
    """
    for dtype, limit in ((None, LIMIT), (torch.float64, WIDE_LIMIT)):
        total = read(dtype)
        mass = total[..., -1:]
        if bool(((mass > 1 / limit) & (mass < limit)).all()):
            return total[..., :-1] / mass
    raise FloatingPointError(
        "attention: sums of weights are not finite, or all but 0: the model's weights are broken; train again"
    )


def run_layer(layer: EncoderLayer, x: Tensor, sides: tuple[tuple[Part, Places], ...]) -> Tensor:
    """One layer in eval mode on the X tokens [n, X, d] of the pairs at the given places of each side."""
    query, kv = layer.project(x)
    query = (query * query.shape[-1] ** -0.5).transpose(1, 2)  # [n, h, X, c]

    def read(dtype: torch.dtype | None) -> Tensor:
        asked = query.to(dtype).contiguous()
        total = read_own(asked, kv.to(dtype))
        for part, places in sides:
            total += read_part(asked, Part(part.keys.to(dtype), part.values.to(dtype)), places)
        return total

    return layer.finish(x, divide(read).to(x.dtype).transpose(1, 2).flatten(2))


def keys_values(kv: Tensor, mask: Tensor | None = None) -> Part:
    """Keys and values of kv [R, N, 2, h, c], 0 where ``mask`` [R, N] is False; None = all real."""
    if mask is not None:
        kv = kv * mask[:, :, None, None, None]
    values = F.pad(kv[:, :, 1].transpose(1, 2), (0, 1), value=1.0)
    if mask is not None:
        values[..., -1] = mask[:, None]
    return Part(kv[:, :, 0].permute(0, 2, 3, 1).contiguous(), values)
