"""Evaluation of a trained model.

It covers predictions over a split, CVR metrics, and the representation on held-out listings.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camenn_model.batch import Batch
from camenn_model.calibration import PlattScaling, fit_platt
from camenn_model.data.batching import collate, cut_batches
from camenn_model.data.examples import ExampleReader, Rows, Unit, count_rows
from camenn_model.data.item_table import Ints, ItemTable
from camenn_model.data.prefetch import prefetch
from camenn_model.evaluation import metrics
from camenn_model.model.camenn import CameNN
from camenn_model.scoring.scorer import Scorer

EVALUATION_BATCH = 1_024
CALIBRATED_ON = ("early_stop", "calibration")
"""Parts that the calibration is fitted on. Early stop only chose among a few states of the model,
and a calibration on half as many orders has a standard error 1.4 times as large.
"""


@dataclass(frozen=True)
class Predictions:
    """Raw logits with the data to evaluate them.

    They are in order of time, [n] each.
    """

    logits: NDArray[np.float64]
    labels: NDArray[np.float64]
    users: NDArray[np.int64]
    sessions: NDArray[np.int64]

    def log_loss(self) -> float:
        """Return the mean log loss of the uncalibrated probabilities."""
        return float(np.mean(np.logaddexp(0.0, self.logits) - self.labels * self.logits))

    def with_logits(self, logits: NDArray[np.float64]) -> "Predictions":
        """Return the same examples with another model's logits."""
        return replace(self, logits=logits)


def predict(
    model: CameNN,
    reader: ExampleReader,
    table: ItemTable,
    blocks: list[Unit],
    progress: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Predict the logits of every example of some blocks.

    The display position is unknown, as it is in scoring.
    """
    total = count_rows(blocks)
    logits, labels, users, done = [], [], [], 0
    sessions: list[NDArray[np.int64]] = []
    base = 0

    def report(rows: int) -> None:
        if progress is not None:
            progress(done + rows, total)

    for block in blocks:
        rows = reader.read_unit(block)
        logits.append(predict_rows(model, table, rows, report))
        done += len(rows)
        labels.append(rows.label.astype(np.float64))
        users.append(rows.user)
        sessions.append(rows.session + base)
        base += int(rows.session.max(initial=-1)) + 1
    _, user = np.unique(np.concatenate(users), return_inverse=True)
    return Predictions(np.concatenate(logits), np.concatenate(labels), user.astype(np.int64), np.concatenate(sessions))


def predict_rows(
    model: CameNN, table: ItemTable, rows: Rows, progress: Callable[[int], None] | None = None
) -> NDArray[np.float64]:
    """Predict the logits of encoded examples.

    They are [n] in the order of the examples. The display position is unknown.
    """
    scorer, device = Scorer(model), next(model.parameters()).device
    # Batches keep sessions whole, so they come in another order: `start` carries each row's place.
    indexed = replace(rows, start=np.arange(len(rows)))
    values, done = np.empty(len(rows)), 0
    for place, batch in prefetch(_batches(indexed, table)):
        values[place] = scorer.score_pairs(batch.to(device)).double().cpu().numpy()
        done += len(place)
        if progress is not None:
            progress(done)
    return values


def _batches(rows: Rows, table: ItemTable) -> Iterator[tuple[Ints, Batch]]:
    for piece in cut_batches(rows, EVALUATION_BATCH, None):
        yield piece.start, collate(piece, table)


def calibrate(found: Mapping[str, Predictions]) -> PlattScaling:
    """Calibrate a model's logits.

    It is done by its predictions of the parts `CALIBRATED_ON`.
    """
    labels, logits = (
        np.concatenate([getattr(found[split], name) for split in CALIBRATED_ON]) for name in ("labels", "logits")
    )
    return fit_platt(labels, logits)


def cvr_metrics(found: Predictions, calibration: PlattScaling, base_rate: float) -> dict[str, Any]:
    """Compute all metrics of the CVR task.

    Ranks and AUC come from raw logits, losses from calibrated probabilities.
    """
    probability = calibration(found.logits)
    by_user = metrics.gauc(found.labels, found.logits, found.users)
    by_session = metrics.gauc(found.labels, found.logits, found.sessions)
    return {
        "auc": metrics.auc(found.labels, found.logits),
        "gauc": _or_none(by_user.value),
        "gauc_users": by_user.groups,
        "gauc_users_of_one_class": by_user.left_out,
        "session_auc": _or_none(by_session.value),
        "log_loss": metrics.log_loss(found.labels, probability),
        "log_loss_uncalibrated": found.log_loss(),
        "ne": metrics.normalised_entropy(found.labels, probability),
        "pcoc": metrics.pcoc(found.labels, probability),
        "ece": metrics.ece(found.labels, probability),
        "ndcg_at_10": metrics.ndcg_at_k(found.labels, found.logits, found.sessions, 10),
        "hr_at_10": metrics.hit_rate_at_k(found.labels, found.logits, found.sessions, 10),
        "rows": len(found.labels),
        "positives": int(found.labels.sum()),
        "base_rate": float(found.labels.mean()),
        "train_base_rate": base_rate,
    }


def _or_none(value: float) -> float | None:
    """Return None for a figure that does not exist.

    JSON has no NaN: such a figure is null.
    """
    return None if math.isnan(value) else value


def reliability(found: Predictions, calibration: PlattScaling, bins: int = 15) -> list[dict[str, float]]:
    """Compute the mean predicted and observed rate in bins.

    The bins have equal mass of the prediction.
    """
    probability = calibration(found.logits)
    order = np.argsort(probability, kind="stable")
    pieces = [rows for rows in np.array_split(order, bins) if len(rows)]
    return [
        {"predicted": float(probability[rows].mean()), "observed": float(found.labels[rows].mean()), "rows": len(rows)}
        for rows in pieces
    ]
