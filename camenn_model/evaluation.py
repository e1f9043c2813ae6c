"""What a trained model is worth: predictions over a split, CVR metrics, and the representation on held-out listings."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from camenn_model import metrics
from camenn_model.batch import AlignmentBatch, AlignmentPairs, Batch, ItemBatch
from camenn_model.calibration import PlattScaling, fit_platt
from camenn_model.dataset import ExampleReader, Rows, Unit, collate, count_rows, cut_batches, prefetch
from camenn_model.item_table import Ints, ItemTable
from camenn_model.model import AlignOutput, CameNN
from camenn_model.scorer import Scorer

EVALUATION_BATCH = 1_024
CALIBRATED_ON = ("early_stop", "calibration")
"""Parts that the calibration is fitted on. Early stop only chose among a few states of the model, and a calibration of half as many orders is off by 1.4 times as much by chance."""
MOST_QUERIES = 2_000
"""Held-out listings that retrieval is measured over: R@k falls as the pool grows, so the pool's size is reported beside it."""
SHOWN_QUERIES = 6


@dataclass(frozen=True)
class Predictions:
    """Raw logits and what is needed to judge them, in order of time; [n] each."""

    logits: NDArray[np.float64]
    labels: NDArray[np.float64]
    users: NDArray[np.int64]
    sessions: NDArray[np.int64]

    def log_loss(self) -> float:
        """Mean log loss of the uncalibrated probabilities."""
        return float(np.mean(np.logaddexp(0.0, self.logits) - self.labels * self.logits))

    def with_logits(self, logits: NDArray[np.float64]) -> "Predictions":
        """The same examples under another model."""
        return replace(self, logits=logits)


def predict(
    model: CameNN,
    reader: ExampleReader,
    table: ItemTable,
    blocks: list[Unit],
    progress: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Logits of every example of some blocks. The display position is unknown, as it is in scoring."""
    total = count_rows(blocks)
    logits, labels, users, done = [], [], [], 0
    sessions: list[NDArray[np.int64]] = []
    base = 0

    def tell(rows: int) -> None:
        if progress is not None:
            progress(done + rows, total)

    for block in blocks:
        rows = reader.read_unit(block)
        logits.append(predict_rows(model, table, rows, tell))
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
    """Logits of encoded examples, [n] in their order. The display position is unknown."""
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
    """The calibration of a model's logits, by its predictions of the parts `CALIBRATED_ON`."""
    labels, logits = (
        np.concatenate([getattr(found[split], name) for split in CALIBRATED_ON]) for name in ("labels", "logits")
    )
    return fit_platt(labels, logits)


def cvr_metrics(found: Predictions, calibration: PlattScaling, base_rate: float) -> dict[str, Any]:
    """All metrics of the CVR task. Ranks and AUC from raw logits; losses from calibrated probabilities."""
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
    """JSON has no NaN: a figure that does not exist is null."""
    return None if math.isnan(value) else value


def reliability(found: Predictions, calibration: PlattScaling, bins: int = 15) -> list[dict[str, float]]:
    """Mean predicted and observed rate in equal-mass bins of the prediction."""
    probability = calibration(found.logits)
    order = np.argsort(probability, kind="stable")
    pieces = [rows for rows in np.array_split(order, bins) if len(rows)]
    return [
        {"predicted": float(probability[rows].mean()), "observed": float(found.labels[rows].mean()), "rows": len(rows)}
        for rows in pieces
    ]


def match_scores(
    model: CameNN, table: ItemTable, image_of: Ints, text_of: Ints
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """ITA and TIA probabilities that photos and titles of given listings belong together, [n] each."""
    ita, tia = [], []
    for start in range(0, len(image_of), 512):
        output = align_pairs(model, table, image_of[start : start + 512], text_of[start : start + 512])
        ita.append(output.ita.sigmoid().double().cpu().numpy())
        tia.append(output.tia.sigmoid().double().cpu().numpy())
    return np.concatenate(ita), np.concatenate(tia)


def align_pairs(model: CameNN, table: ItemTable, image_of: Ints, text_of: Ints) -> AlignOutput:
    """What the alignment tasks say of photos and titles of given listings [n], all at once."""
    rows, place = np.unique(np.concatenate([image_of, text_of]), return_inverse=True)
    half = len(place) // 2
    pairs = AlignmentPairs(
        image_of=torch.from_numpy(place[:half]), text_of=torch.from_numpy(place[half:]), label=torch.zeros(half)
    )
    none = torch.zeros(0, dtype=torch.int64)
    batch = AlignmentBatch(items=table.batch(rows, content_only=True), ita=pairs, tia=pairs, index=none, group=none)
    with torch.inference_mode():
        return model.align(batch.to(next(model.parameters()).device))


def content_vectors(model: CameNN, table: ItemTable, rows: Ints) -> tuple[Tensor, Tensor]:
    """Unit vectors of photos and titles of listings, two [n, e] float32 on the CPU."""
    return _of_listings(model.content_vectors, model, table, rows)


def modality_states(model: CameNN, table: ItemTable, rows: Ints) -> tuple[Tensor, Tensor]:
    """``[IMG]`` and ``[TXT]`` of listings out of the shared bottom, two [n, d] float32 on the CPU."""
    return _of_listings(model.modality_states, model, table, rows)


def _of_listings(
    of: Callable[[ItemBatch], tuple[Tensor, Tensor]], model: CameNN, table: ItemTable, rows: Ints
) -> tuple[Tensor, Tensor]:
    device = next(model.parameters()).device
    images, texts = [], []
    with torch.inference_mode():
        for start in range(0, len(rows), 512):
            image, text = of(table.batch(rows[start : start + 512], content_only=True).to(device))
            images.append(image.float().cpu())
            texts.append(text.float().cpu())
    return torch.cat(images), torch.cat(texts)


def representation(model: CameNN, table: ItemTable, seed: int) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Retrieval and mismatch on held-out listings: (figures or None where there are fewer than ten, some queries with their answers)."""
    rng = np.random.default_rng([seed, 5])
    rows = np.flatnonzero(table.held_out & table.with_content())
    if len(rows) < 10:
        return None, []
    rows = np.sort(rng.choice(rows, min(len(rows), MOST_QUERIES), replace=False))
    image, text = content_vectors(model, table, rows)
    similarity = (image @ text.T).numpy()
    product = table.product[rows]
    relevant = product[:, None] == product[None, :]
    figures: dict[str, Any] = {"listings": len(rows)}
    queries: list[dict[str, Any]] = []
    shown = rng.choice(len(rows), min(SHOWN_QUERIES, len(rows)), replace=False)
    for direction, scores in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        figures[direction] = {f"r_at_{k}": share for k, share in metrics.recall_at_k(scores, product, product).items()}
        for query in shown:
            best = np.argsort(-scores[query], kind="stable")[:5]
            results = [
                {
                    "item_id": table.ids[int(rows[b])].as_py(),
                    "cosine": float(scores[query, b]),
                    "same_product": bool(relevant[query, b]),
                }
                for b in best
            ]
            queries.append({"direction": direction, "item_id": table.ids[int(rows[query])].as_py(), "results": results})
    other = rng.permutation(len(rows))
    swapped = product != product[other]
    own_ita, own_tia = match_scores(model, table, rows, rows)
    labels = np.concatenate([np.zeros(len(rows)), np.ones(int(swapped.sum()))])
    if swapped.any():
        ita, tia = match_scores(model, table, rows[other[swapped]], rows[swapped])
        scores = np.concatenate([1 - (own_ita + own_tia) / 2, 1 - (ita + tia) / 2])
        figures["mismatch_auc"] = metrics.auc(labels, scores)
    else:
        figures["mismatch_auc"] = None
    return figures, queries
