"""Fit the linear part by penalised maximum likelihood."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from camenn_model.model.wide import Catalog, Wide, WideRows

PENALTIES = (10_000.0, 3_000.0, 1_000.0, 300.0, 100.0, 30.0, 10.0)
"""L2 penalties λ on the weights of categories, crosses and content.

λ/2·‖w‖² is added to the summed log loss. They are tried from the largest on, as long as the
early-stop log loss falls.
"""
SLOPE_PENALTY, BUCKET_PENALTY = 10.0, 300.0
"""The L2 penalties of slopes and of buckets.

Every example determines the slopes. Buckets of numeric fields model a field's deviation from its
slope.
"""
ITERATIONS = 40
"""Most steps of L-BFGS for each penalty. Each fit starts from the previous one's weights."""


@dataclass(frozen=True)
class Fit:
    """The fitted penalty, loss and coefficients."""

    penalty: float
    loss: float  # mean log loss on the early-stop part
    coefficients: tuple[float, ...]  # coefficient of each of the other parts' logits


def fit_wide(
    wide: Wide,
    base: float,
    catalog: Catalog,
    train: WideRows,
    stop: WideRows,
    progress: Callable[[int, int, str], None],
) -> Fit:
    """Fit all weights of the linear part, in place.

    Args:
        wide: the linear part that is fitted.
        base: logit of the rest of the model, which the linear part's is added to.
        catalog: all items.
        train: rows to fit on.
        stop: rows to choose the penalty by.
        progress: called during the fit.
    """
    coefficients = torch.zeros(train.part_logits.shape[1], requires_grad=True, device=train.part_logits.device)
    weights = [*wide.parameters(), coefficients]
    numbers = (wide.item_numbers, wide.audience_numbers, wide.pair_numbers)
    slopes, buckets = [coefficients, *(part.slope for part in numbers)], [part.number for part in numbers]
    free = {id(weight) for weight in (wide.bias, *slopes, *buckets)}
    others = [weight for weight in wide.parameters() if id(weight) not in free]
    count = len(train.label)

    def loss_of(rows: WideRows) -> Tensor:
        logits = base + wide.of_examples(catalog, rows) + rows.part_logits @ coefficients
        return F.binary_cross_entropy_with_logits(logits, rows.label)

    best: Fit | None = None
    kept: list[Tensor] = []
    try:
        for weight in wide.parameters():
            weight.requires_grad_(True)
        for number, penalty in enumerate(PENALTIES):
            optimizer = torch.optim.LBFGS(
                weights, max_iter=ITERATIONS, history_size=10, line_search_fn="strong_wolfe", tolerance_change=1e-9
            )

            def closure(penalty: float = penalty, optimizer: torch.optim.LBFGS = optimizer) -> Tensor:
                optimizer.zero_grad()
                squares = ((slopes, SLOPE_PENALTY), (buckets, BUCKET_PENALTY), (others, penalty))
                loss = loss_of(train) + sum(_squares(weights, each / count) for weights, each in squares)
                loss.backward()
                return loss

            optimizer.step(closure)
            with torch.no_grad():
                found = Fit(penalty, float(loss_of(stop)), tuple(coefficients.tolist()))
            better = best is None or found.loss < best.loss
            progress(
                number + 1 if better else len(PENALTIES),
                len(PENALTIES),
                f"penalty {penalty:g}, early-stop log loss {found.loss:.4f}, "
                f"preference coefficient {found.coefficients[0]:.2f}",
            )
            if not better:
                break
            best, kept = found, [weight.detach().clone() for weight in wide.parameters()]
    finally:
        for weight in wide.parameters():
            weight.requires_grad_(False)
            weight.grad = None
    assert best is not None
    with torch.no_grad():
        for weight, value in zip(wide.parameters(), kept, strict=True):
            weight.copy_(value)
    return best


def _squares(weights: Sequence[Tensor], penalty: float) -> Tensor:
    return 0.5 * penalty * torch.stack([weight.square().sum() for weight in weights]).sum()
