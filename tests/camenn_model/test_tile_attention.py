from __future__ import annotations

import pytest
import torch

from camenn_model.layers import MASKED
from camenn_model.tile_attention import Part, find_places, merge, read_own, read_part

HEADS, WIDTH = 2, 3


def random_part(rows: int, tokens: int) -> Part:
    """Keys and values of which the last token is masked."""
    bias = torch.zeros(rows, tokens)
    bias[:, -1] = MASKED
    return Part(bias, torch.randn(rows, HEADS, WIDTH, tokens), torch.randn(rows, HEADS, tokens, WIDTH))


@pytest.mark.parametrize("largest", [1.0, 300.0])
def test_merged_reads_equal_one_softmax_over_all_keys(largest: float) -> None:
    """Also where one side's scores are far above the other's."""
    torch.manual_seed(0)
    some = torch.rand(5, 4) < 0.5
    some[2], some[:, 1] = True, True
    items, audience = random_part(5, 6), random_part(4, 3)
    by_item, by_audience = some.nonzero(as_tuple=True)
    count = len(by_item)
    query, kv = torch.randn(count, HEADS, 2, WIDTH) * largest, torch.randn(count, 2, 2, HEADS, WIDTH)
    place_i, place_s = find_places(some, HEADS)
    reads = [read_own(query, kv), read_part(query, items, place_i), read_part(query, audience, place_s)]
    for pair in range(count):
        i, s = by_item[pair], by_audience[pair]
        own_keys, own_values = kv[pair, :, 0].permute(1, 2, 0), kv[pair, :, 1].transpose(0, 1)
        keys = torch.cat([own_keys, items.keys[i, :, :, :-1], audience.keys[s, :, :, :-1]], dim=2)
        values = torch.cat([own_values, items.values[i, :, :-1], audience.values[s, :, :-1]], dim=1)
        expected = torch.softmax(query[pair] @ keys, dim=-1) @ values
        assert torch.allclose(merge(reads)[pair], expected, atol=1e-4)


def test_find_places_gives_every_pair_its_own() -> None:
    some = torch.tensor([[True, False, True], [False, False, True], [True, True, True]])
    by_item, by_audience = find_places(some, heads=1)
    assert (by_item.size, by_audience.size) == (3, 3)
    assert by_item.index.tolist() == [0, 1, 3, 6, 7, 8]
    assert by_audience.index.tolist() == [0, 6, 7, 1, 3, 8]
