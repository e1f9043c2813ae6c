from __future__ import annotations

import pytest
import torch

from camenn_model.scoring.tile_attention import Part, divide, find_places, keys_values, read_own, read_part

HEADS, WIDTH = 2, 3


def random_kv(rows: int, tokens: int) -> tuple[torch.Tensor, Part]:
    """Keys and values [R, N, 2, h, c], and the part that they make, unscaled; the last token is masked."""
    kv, mask = torch.randn(rows, tokens, 2, HEADS, WIDTH), torch.ones(rows, tokens, dtype=torch.bool)
    mask[:, -1] = False
    return kv, keys_values(kv, 1.0, mask)


def read_all(largest: float, dense: bool = False) -> tuple[torch.Tensor, torch.Tensor, list[torch.dtype | None]]:
    """Return tile attention, its plain reference, and the dtypes.

    (attention of pairs to their own tokens and both sides', the same by one softmax over all keys,
    dtypes that were computed in)
    """
    torch.manual_seed(0)
    some = torch.rand(5, 4) < 0.5
    some[2], some[:, 1] = True, True
    some |= dense
    (item_kv, items), (audience_kv, audience) = random_kv(5, 6), random_kv(4, 3)
    by_item, by_audience = some.nonzero(as_tuple=True)
    count = len(by_item)
    query, kv = torch.randn(count, 2, HEADS, WIDTH) * largest, torch.randn(count, 2, 2, HEADS, WIDTH)
    place_i, place_s = find_places(some, HEADS)
    used = []

    def read(dtype: torch.dtype | None) -> torch.Tensor:
        used.append(dtype)
        asked = query if dtype is None else query.to(dtype)
        total = read_own(asked, kv if dtype is None else kv.to(dtype))
        for part, places in ((items, place_i), (audience, place_s)):
            answer = read_part(asked, part.to(dtype), places)
            total.view(answer.shape).add_(answer)
        return total

    found = divide(read)
    expected = []
    for pair in range(count):
        own = kv[pair].clone()
        own[:, 0] *= WIDTH**-0.5  # the sides' keys are scaled where they are made
        real = torch.cat([own, item_kv[by_item[pair], :-1], audience_kv[by_audience[pair], :-1]]).double()
        keys, values = real[:, 0].permute(1, 2, 0), real[:, 1].transpose(0, 1)
        expected.append((torch.softmax(query[pair].double().transpose(0, 1) @ keys, dim=-1) @ values).transpose(0, 1))
    return found, torch.stack(expected), used


@pytest.mark.parametrize("dense", [False, True])
def test_sums_of_parts_equal_one_softmax_over_all_keys(dense: bool) -> None:
    found, expected, used = read_all(1.0, dense)
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert used == [None]


def test_scores_too_large_for_float32_are_computed_in_float64() -> None:
    found, expected, used = read_all(30.0)
    assert torch.allclose(found, expected, atol=1e-9)
    assert used == [None, torch.float64]


def test_scores_too_large_for_float64_are_an_error() -> None:
    with pytest.raises(FloatingPointError, match="train again"):
        read_all(3000.0)


def test_find_places_gives_every_pair_its_own() -> None:
    some = torch.tensor([[True, False, True], [False, False, True], [True, True, True]])
    by_item, by_audience = find_places(some, heads=1)
    assert (by_item.size, by_audience.size) == (3, 3)
    assert by_item.index is not None and by_audience.index is not None
    assert by_item.index.tolist() == [0, 1, 3, 6, 7, 8]
    assert by_audience.index.tolist() == [0, 6, 7, 1, 3, 8]
