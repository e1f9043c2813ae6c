from __future__ import annotations

import torch

from camenn_model.model.layers import Side, drop


def test_drop_keeps_mean_and_rate() -> None:
    torch.manual_seed(0)
    x = torch.ones(401, 999, requires_grad=True)
    dropped = drop(x, 0.1, training=True)
    values = dropped.detach()
    assert abs(float((values == 0).float().mean()) - 26 / 256) < 2e-3
    assert abs(float(values.mean()) - 1.0) < 5e-3
    dropped.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, dropped.detach())


def test_drop_does_nothing_outside_training() -> None:
    x = torch.randn(3, 4)
    assert drop(x, 0.5, training=False) is x
    assert drop(x, 0.0, training=True) is x


def test_drop_follows_the_seed() -> None:
    x = torch.ones(100)
    torch.manual_seed(5)
    first = drop(x, 0.3, training=True)
    torch.manual_seed(5)
    assert torch.equal(first, drop(x, 0.3, training=True))


def test_side_keep_leaves_out_unused_rows() -> None:
    side = Side(torch.arange(4.0).view(4, 1, 1), torch.ones(4, 1, dtype=torch.bool), torch.tensor([3, 1, 3, 0]))
    kept = side.keep(torch.tensor([0, 1, 2]))
    assert kept.tokens.flatten().tolist() == [1.0, 3.0]
    assert kept.index is not None
    assert kept.index.tolist() == [1, 0, 1]
