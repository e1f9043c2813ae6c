"""Products of pairs with shared rows equal those of copied rows, values and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camenn_model.model.layers import GROUPS, SHARED, Layout, Side


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 7), pairs=st.integers(1, 200), seed=st.integers(0, 10**6))
def test_every_pair_has_a_place_of_its_own_in_a_group_of_its_row(rows: int, pairs: int, seed: int) -> None:
    index = torch.randint(0, rows, (pairs,), generator=torch.Generator().manual_seed(seed))
    layout = Layout.of(index, rows)
    if pairs < SHARED * rows:
        assert layout is None
        return
    assert layout is not None and layout.size in GROUPS
    assert len(layout.place.unique()) == pairs
    assert torch.equal(layout.row[layout.place // layout.size], index)
    numbers = torch.arange(pairs, dtype=torch.float32)
    assert torch.equal(layout.take(layout.lay_out(numbers)), numbers)
    assert float(layout.lay_out(numbers + 1).sum()) == float((numbers + 1).sum())


@pytest.mark.parametrize(("rows", "used"), [(2, 2), (20, 20), (4, 3), (9, 5)])
@pytest.mark.parametrize("read", ["score", "read"])
def test_products_and_gradients_equal_those_of_copied_rows(rows: int, used: int, read: str) -> None:
    """Rows that no pair looks at must not stand in for the second group of another."""
    generator = torch.Generator().manual_seed(rows)
    index = torch.randint(0, used, (50,), generator=generator)
    tokens = torch.randn(rows, 6, 8, generator=generator, requires_grad=True)
    query = torch.randn(50, 3, 8 if read == "score" else 6, generator=generator, requires_grad=True)
    side = Side.of(tokens, torch.ones(rows, 6, dtype=torch.bool), index)
    assert (side.layout is None) == (rows == 20)
    found = getattr(side, read)(query)
    copied = tokens[index]
    expected = query @ (copied.transpose(1, 2) if read == "score" else copied)
    assert torch.allclose(found, expected, atol=1e-6)
    weight = torch.randn(expected.shape, generator=generator)
    ours = torch.autograd.grad((found * weight).sum(), (query, tokens))
    theirs = torch.autograd.grad((expected * weight).sum(), (query, tokens))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
