"""Attention of a tile's pairs to keys of their rows.

The keys of an item and an audience row serve all their pairs, without being gathered per pair.

Shapes: n pairs of a tile, I items, S audience rows, R rows of a side (I or S), N tokens of a side,
M places of a row, Q queries of a pair, X tokens of a pair, h heads, c = d / h, d width.

For each side the pairs' queries are laid out row by row (all pairs of one item beside each other,
padded to the largest number M), so that attention is one batched matrix product per side. Weights
are exp(score), without subtracting the largest score first, which would take another read of all
scores. Values carry a column of ones, so that the same product gives the sum of weights. Masked
tokens have keys and values of 0, ones included. The parts' sums are added and divided. Where a sum
of weights comes near the limits of float32 (scores beyond about 57), all is computed again in
float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from camenn_model.model.layers import EncoderLayer

BLOCK = 4
"""Pairs whose own tokens are attended to in one matrix product (measured: 2.8 µs a pair, 9 µs for a product each)."""
LIMIT = 1e25
"""Sums of weights above it, or below its inverse, are not trusted in float32."""
WIDE_LIMIT = 1e300


@dataclass(frozen=True)
class Part:
    """Keys and values of R rows of a side.

    Keys are times the scale of scores. Both are 0 where masked.
    """

    keys: Tensor  # [R, h, c, N]
    values: Tensor  # [R, h, N, c + 1], the last column 1

    def to(self, dtype: torch.dtype | None) -> Part:
        """Convert to a dtype, or leave as it is.

        ``dtype`` None means as it is.
        """
        return self if dtype is None else Part(self.keys.to(dtype), self.values.to(dtype))


@dataclass(frozen=True)
class Places:
    """The positions of pairs in the layout of one side."""

    shape: tuple[int, int]  # (I, S)
    side: int  # 0: laid out by item, 1: by audience row
    size: int  # M
    index: Tensor | None  # [n h] int64, into [R, h, M] flattened; None: every item meets every audience row

    def lay_out(self, query: Tensor) -> Tensor:
        """Lay out the pairs' queries by the rows.

        [n, Q, h, c] gives [R, h, M Q, c].
        """
        count, queries, heads, width = query.shape
        rows = self.shape[self.side]
        if self.index is None:
            order = (0, 3, 1, 2, 4) if self.side == 0 else (1, 3, 0, 2, 4)
            laid_out = query.unflatten(0, self.shape).permute(order).contiguous()
        else:
            laid_out = query.new_zeros(rows * heads * self.size, queries * width)  # places without a pair
            laid_out.index_copy_(0, self.index, query.transpose(1, 2).reshape(count * heads, queries * width))
        return laid_out.view(rows, heads, self.size * queries, width)

    def take(self, answer: Tensor, queries: int) -> Tensor:
        """Take the pairs' results out of the layout.

        [R, h, M Q, c] gives a view or copy [n, Q, h, c] (dense: [I, S, Q, h, c]).
        """
        rows, heads, _, width = answer.shape
        if self.index is None:
            order = (0, 2, 3, 1, 4) if self.side == 0 else (2, 0, 3, 1, 4)
            return answer.view(rows, heads, self.size, queries, width).permute(order)
        taken = answer.view(rows * heads * self.size, queries * width).index_select(0, self.index)
        return taken.view(-1, heads, queries, width).transpose(1, 2)


def find_places(some: Tensor, heads: int) -> tuple[Places, Places]:
    """Find the places of a tile's pairs on both sides.

    The pairs are those where ``some`` [I, S] is True, in row-major order. The places are by item
    and by audience row.
    """
    shape = (some.shape[0], some.shape[1])
    if bool(some.all()):
        return Places(shape, 0, shape[1], None), Places(shape, 1, shape[0], None)
    by_item, by_audience = some.nonzero(as_tuple=True)
    places = []
    for side, row in enumerate((by_item, by_audience)):
        axis = 1 - side
        rank = some.cumsum(axis)[by_item, by_audience] - 1
        size = int(some.sum(axis).max())
        index = (row[:, None] * heads + torch.arange(heads, device=row.device)) * size + rank[:, None]
        places.append(Places(shape, side, size, index.flatten()))
    return places[0], places[1]


def read_part(query: Tensor, part: Part, places: Places) -> Tensor:
    """Sum the weighted values of the pairs' rows.

    A pair's row is the one that contains its place. The sums are [n, Q, h, c + 1] (dense: [I, S, Q,
    h, c + 1]), of queries [n, Q, h, c].
    """
    weights = (places.lay_out(query) @ part.keys).exp_()
    return places.take(weights @ part.values, query.shape[1])


def read_own(query: Tensor, kv: Tensor) -> Tensor:
    """Sum the weighted values of the pairs' own tokens.

    The sums are [n, X, h, c + 1], of queries [n, X, h, c] and kv [n, X, 2, h, c]. ``BLOCK`` pairs
    go through one matrix product, with each other's tokens masked: products of 4 x 4 are mostly
    overhead.
    """
    count, length, heads, width = query.shape
    spare = -count % BLOCK
    if spare:
        query, kv = F.pad(query, (0, 0) * 3 + (0, spare)), F.pad(kv, (0, 0) * 4 + (0, spare))
    part = keys_values(_in_blocks(kv), width**-0.5)
    rows = _in_blocks(query).transpose(1, 2).contiguous()
    pair = torch.arange(BLOCK, device=query.device).repeat_interleave(length)
    weights = (rows @ part.keys).exp_().mul_(pair[:, None] == pair[None, :])
    answer = (weights @ part.values).transpose(1, 2).reshape(count + spare, length, heads, width + 1)
    return answer[:count]


def _in_blocks(x: Tensor) -> Tensor:
    """Join pairs in blocks.

    [n, X, ...] gives [n / BLOCK, BLOCK X, ...].
    """
    return x.unflatten(0, (-1, BLOCK)).flatten(1, 2)


def divide(read: Callable[[torch.dtype | None], Tensor]) -> Tensor:
    """Divide the weighted sums into attention [..., c].

    ``read(dtype)`` gives the parts' weighted sums, added up, [..., c + 1], computed in the dtype
    (None: as things are).

    Raises:
        FloatingPointError: scores beyond about 700, which no trained model has.
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
    """Run one layer in eval mode on the pairs' tokens.

    The tokens are X, [n, X, d], of the pairs at the given places of each side.
    """
    query, kv = layer.project(x)

    def read(dtype: torch.dtype | None) -> Tensor:
        asked = query if dtype is None else query.to(dtype)
        total = read_own(asked, kv if dtype is None else kv.to(dtype))
        for part, places in sides:
            answer = read_part(asked, part.to(dtype), places)
            total.view(answer.shape).add_(answer)
        return total

    return layer.finish(x, divide(read).to(x.dtype).flatten(2))


def keys_values(kv: Tensor, scale: float, mask: Tensor | None = None) -> Part:
    """Return keys, times ``scale``, and values of kv.

    kv is [R, N, 2, h, c]. Both are 0 where ``mask`` [R, N] is False. None means that all are real.
    """
    if mask is not None:
        kv = kv * mask[:, :, None, None, None]
    rows, length, _, heads, width = kv.shape
    keys, values = kv.new_empty(rows, heads, width, length), kv.new_empty(rows, heads, length, width + 1)
    torch.mul(kv[:, :, 0].permute(0, 2, 3, 1), scale, out=keys)
    values[..., :-1] = kv[:, :, 1].transpose(1, 2)
    values[..., -1] = 1.0 if mask is None else mask[:, None]
    return Part(keys, values)
