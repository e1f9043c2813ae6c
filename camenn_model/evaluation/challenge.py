"""Trained models on days that they have not seen.

Two questions are answered: is the published one still calibrated, and does a new one predict as
well?

Both are evaluated on the latest closed days of a shard set. All of them are in its test part, which
is unseen by every model trained on this shard set or on an earlier one of the same log.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camenn_model.data.batching import list_units
from camenn_model.data.examples import ExampleReader, Unit
from camenn_model.data.item_table import ItemTable
from camenn_model.data.shard_set import ShardSet, date_of
from camenn_model.evaluation import metrics
from camenn_model.evaluation.predictions import predict_rows
from camenn_model.package import Package

LEAST_EXAMPLES = 2_000
"""Least number of evaluated examples, where there are as many: one quiet day is too noisy."""
MOST_EXAMPLES = 20_000
"""Most evaluated examples: more would cost minutes a night without adding information. Units are
then sampled at even distances."""


@dataclass(frozen=True)
class Days:
    """Examples of some days. `first` and `last`: dates, both included."""

    first: str
    last: str
    units: list[Unit]


@dataclass(frozen=True)
class Calibration:
    """A model's calibration on some days."""

    first_day: str
    last_day: str
    examples: int
    orders: int
    pcoc: float | None
    """Predicted over observed orders; None where nothing was ordered"""
    standard_error: float | None
    """Standard error of `pcoc`, from the chance of these days' orders, sqrt(Σ p (1 - p)) / Σ y, and
    of the orders that the model was calibrated on, pcoc / √n
    """
    log_loss: float
    expected: float = 0.0
    """Orders that the model predicts"""
    expected_error: float = 0.0
    """Standard error of `expected` as a prediction of the orders, from the chance of these days'
    orders and of those that the model was calibrated on
    """

    @property
    def orders_are_missing(self) -> bool:
        """Return whether orders are missing from the days.

        They are where nothing was ordered although more than two standard errors of orders were
        expected: that is more probably a fault of the logs than of the model.
        """
        return not self.orders and self.expected > 2 * self.expected_error

    def off_by(self) -> float:
        """Return the distance of `pcoc` from 1.

        The distance counts beyond two standard errors. 0 = no further than chance explains,
        infinite where orders are missing.
        """
        if self.pcoc is None or self.standard_error is None:
            return math.inf if self.orders_are_missing else 0.0
        return max(0.0, abs(self.pcoc - 1) - 2 * self.standard_error)

    def words(self) -> str:
        """Return a sentence for a log."""
        if self.pcoc is None:
            return (
                f"nothing was ordered after {self.examples:,} clicks of {self.first_day} to {self.last_day}, "
                f"{self.expected:,.1f} (± {self.expected_error:.1f}) orders were predicted"
            )
        return (
            f"predicted over observed orders is {self.pcoc:.3f} (± {self.standard_error:.3f}) on "
            f"{self.examples:,} clicks of {self.first_day} to {self.last_day}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the values for a manifest."""
        return asdict(self)


@dataclass(frozen=True)
class ModelComparison:
    """A challenger against the champion, the published model.

    Both predict the same clicks. Losses are mean log losses of calibrated probabilities.
    """

    first_day: str
    last_day: str
    examples: int
    champion_log_loss: float
    challenger_log_loss: float
    standard_error: float
    """Standard error of the losses' difference, paired by click"""
    champion_auc: float | None
    challenger_auc: float | None

    @property
    def passed(self) -> bool:
        """Return whether the challenger takes over.

        It does unless it is worse by more than a standard error. Of two equal models the one
        trained on later days is preferred.
        """
        return self.challenger_log_loss - self.champion_log_loss <= self.standard_error

    def words(self) -> str:
        """Return a sentence for a log and a gate."""
        return (
            f"the new model's log loss is {self.challenger_log_loss:.4f}, the published one's "
            f"{self.champion_log_loss:.4f} "
            f"(difference {self.challenger_log_loss - self.champion_log_loss:+.4f} ± {self.standard_error:.4f}) "
            f"on {self.examples:,} clicks of {self.first_day} to {self.last_day}; worse by one "
            "standard error is allowed"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the values for a manifest."""
        return asdict(self)


def latest_closed_days(shards: ShardSet) -> Days | None:
    """Find the latest days whose labels are complete.

    Their number is the least that gives `LEAST_EXAMPLES`. None where the test part has no closed
    day.
    """
    closed_before = shards.closed_before()
    by_date: dict[str, list[tuple[str, int]]] = {}
    for path, rows in shards.examples("test"):
        if date_of(path) < closed_before:
            by_date.setdefault(date_of(path), []).append((path, rows))
    chosen: list[str] = []
    found = 0
    for date in sorted(by_date, reverse=True):
        chosen.append(date)
        found += sum(rows for _, rows in by_date[date])
        if found >= LEAST_EXAMPLES:
            break
    if not found:
        return None
    units = list_units([file for date in sorted(chosen) for file in by_date[date]])
    share = min(1.0, MOST_EXAMPLES / found)
    kept = np.unique(np.linspace(0, len(units) - 1, max(1, math.ceil(share * len(units)))).round().astype(int))
    return Days(chosen[-1], chosen[0], [units[place] for place in kept])


def reads_embeddings_of(package: Package, shards: ShardSet) -> bool:
    """Return whether a model reads the shard set's embeddings.

    It does if it was trained on embeddings of the same encoders.
    """
    there = shards.manifest["options"]["encoders"]
    return all(package.encoders[kind]["fingerprint"] == there[kind]["fingerprint"] for kind in ("image", "text"))


def judge_calibration(package: Package, shards: ShardSet) -> Calibration | None:
    """Judge a model's calibration on the latest closed days.

    None where there are none, or the model reads other embeddings.
    """
    days = latest_closed_days(shards)
    if days is None or not reads_embeddings_of(package, shards):
        return None
    labels, probability, _ = _predict(package, shards, days)
    orders = float(labels.sum())
    expected, positives = float(probability.sum()), max(package.calibration.positives, 1)
    expected_error = math.sqrt(float((probability * (1 - probability)).sum()) + expected**2 / positives)
    return Calibration(
        first_day=days.first,
        last_day=days.last,
        examples=len(labels),
        orders=int(orders),
        pcoc=expected / orders if orders else None,
        standard_error=expected_error / orders if orders else None,
        log_loss=metrics.log_loss(labels, probability),
        expected=expected,
        expected_error=expected_error,
    )


def compare_with_champion(champion: Package, challenger: Package, shards: ShardSet) -> ModelComparison | None:
    """Compare champion and challenger on the latest closed days.

    None where there are none, or the published model cannot read the shard set's embeddings.
    """
    days = latest_closed_days(shards)
    if days is None or not reads_embeddings_of(champion, shards):
        return None
    labels, old, old_logits = _predict(champion, shards, days)
    _, new, new_logits = _predict(challenger, shards, days)
    old_loss, new_loss = (-np.log(np.where(labels == 1, p, 1 - p)) for p in (old, new))
    both_classes = 0 < labels.sum() < len(labels)
    return ModelComparison(
        first_day=days.first,
        last_day=days.last,
        examples=len(labels),
        champion_log_loss=float(old_loss.mean()),
        challenger_log_loss=float(new_loss.mean()),
        standard_error=float((new_loss - old_loss).std() / np.sqrt(len(labels))),
        champion_auc=metrics.auc(labels, old_logits) if both_classes else None,
        challenger_auc=metrics.auc(labels, new_logits) if both_classes else None,
    )


def _predict(
    package: Package, shards: ShardSet, days: Days
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Predict the examples of some days.

    Returns (labels, calibrated probabilities, logits), float64 [n] each.
    """
    model = package.model()
    table = ItemTable(shards.items, shards.images, shards.titles, config=package.config).encode(package.space)
    config = package.config
    reader = ExampleReader(package.space, table, shards.users, config.history_length, config.position_size)
    rows = [reader.read_unit(unit) for unit in days.units]
    labels = np.concatenate([piece.label.astype(np.float64) for piece in rows])
    logits = np.concatenate([predict_rows(model, table, piece) for piece in rows])
    # Log losses must be finite.
    return labels, np.clip(package.calibration(logits), 1e-12, 1 - 1e-12), logits
