"""Platt scaling: calibrated probability = sigmoid(slope · logit + intercept)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, kw_only=True)
class PlattScaling:
    """Slope and intercept, float64.

    ``reason`` explains why nothing was fitted (then the identity), else it is empty.
    """

    slope: float = 1.0
    intercept: float = 0.0
    examples: int = 0
    positives: int = 0
    reason: str = ""

    def __call__(self, logits: ArrayLike) -> NDArray[np.float64]:
        """Return probabilities float64 of raw logits, any shape."""
        return sigmoid(self.slope * np.asarray(logits, dtype=np.float64) + self.intercept)

    def to_json(self) -> str:
        """Return the values as JSON text."""
        return json.dumps(asdict(self), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> PlattScaling:
        """Read what ``to_json`` wrote.

        Raises:
            TypeError: an unknown key.
        """
        return cls(**json.loads(text))


def fit_platt(labels: ArrayLike, logits: ArrayLike, *, tolerance: float = 1e-10, rounds: int = 100) -> PlattScaling:
    """Fit slope and intercept by Newton's method.

    It has step halving and computes in float64.

    Targets are Platt's smoothed ones, (n₊ + 1) / (n₊ + 2) and 1 / (n₋ + 2), so that a separable
    sample has a finite answer (Platt 1999; Lin, Lin, Weng 2007). With one class only, or fewer than
    two distinct logits, or where the best slope is not positive (ranks must not be reversed), the
    identity is returned with its ``reason``. A constant logit and both classes give slope 1 and the
    intercept that meets the base rate.

    Raises:
        ValueError: logits that are not finite.
    """
    y, z = np.asarray(labels, dtype=np.float64), np.asarray(logits, dtype=np.float64)
    if y.shape != z.shape or y.ndim != 1:
        raise ValueError(f"fit_platt: labels {y.shape} and logits {z.shape} must be vectors of one length")
    if not np.isfinite(z).all():
        raise ValueError(f"fit_platt: {int((~np.isfinite(z)).sum())} of {len(z)} logits are not finite")
    positives = int(y.sum())
    if positives in (0, len(y)):
        reason = f"one class only: {positives} positives of {len(y)}"
        return PlattScaling(reason=reason, examples=len(y), positives=positives)
    if z.min() == z.max():
        intercept = float(np.log(positives / (len(y) - positives)) - z[0])
        reason = "all logits are equal: the intercept alone was fitted"
        return PlattScaling(intercept=intercept, reason=reason, examples=len(y), positives=positives)
    target = np.where(y == 1, (positives + 1) / (positives + 2), 1 / (len(y) - positives + 2))
    centre, spread = z.mean(), z.std()
    x = np.stack([(z - centre) / spread, np.ones(len(z))], axis=1)  # well-conditioned whatever the logits' scale

    def loss(w: NDArray[np.float64]) -> float:
        a = x @ w
        return float((np.logaddexp(0.0, a) - target * a).mean())

    w = np.array([spread, centre])  # the identity
    value = loss(w)
    for _ in range(rounds):
        p = sigmoid(x @ w)
        gradient = x.T @ (p - target) / len(y)
        if np.abs(gradient).max() < tolerance:
            break
        hessian = (x * (p * (1 - p))[:, None]).T @ x / len(y) + 1e-12 * np.eye(2)
        step, size = np.linalg.solve(hessian, gradient), 1.0
        while size > 1e-10 and loss(w - size * step) > value - 1e-4 * size * float(gradient @ step):
            size /= 2
        if size <= 1e-10:
            break  # no descent left at this precision
        w = w - size * step
        value = loss(w)
    slope, intercept = float(w[0] / spread), float(w[1] - w[0] * centre / spread)
    if slope <= 0.0:
        reason = f"the best slope, {slope:.4g}, is not positive: it would reverse the ranks"
        return PlattScaling(reason=reason, examples=len(y), positives=positives)
    return PlattScaling(slope=slope, intercept=intercept, examples=len(y), positives=positives)


def sigmoid(x: NDArray[np.floating]) -> NDArray[np.float64]:
    """Compute 1 / (1 + exp(-x)) without overflow."""
    e = np.exp(-np.abs(x))
    positive: NDArray[np.float64] = np.where(x >= 0, 1.0 / (1.0 + e), e / (1.0 + e))
    return positive
