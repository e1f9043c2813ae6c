"""Measure the shared bottom's representation of photos and titles."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from camenn_model.batch import AlignmentBatch, AlignmentPairs, ItemBatch
from camenn_model.data.item_table import Ints, ItemTable
from camenn_model.evaluation import metrics
from camenn_model.model.camenn import AlignOutput, CameNN

MOST_QUERIES = 2_000
"""Held-out listings that retrieval is measured over: R@k falls as the pool grows, so the pool's
size is reported beside it.
"""
SHOWN_QUERIES = 6


def match_scores(
    model: CameNN, table: ItemTable, image_of: Ints, text_of: Ints
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute ITA and TIA probabilities of photos and titles.

    They are the probabilities that photos and titles of given listings belong together, [n] each.
    """
    ita, tia = [], []
    for start in range(0, len(image_of), 512):
        output = align_pairs(model, table, image_of[start : start + 512], text_of[start : start + 512])
        ita.append(output.ita.sigmoid().double().cpu().numpy())
        tia.append(output.tia.sigmoid().double().cpu().numpy())
    return np.concatenate(ita), np.concatenate(tia)


def align_pairs(model: CameNN, table: ItemTable, image_of: Ints, text_of: Ints) -> AlignOutput:
    """Run the alignment tasks on photos and titles.

    These are of given listings [n], all at once.
    """
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
    """Compute unit vectors of listings' photos and titles.

    They are two [n, e] float32 on the CPU.
    """
    return _of_listings(model.content_vectors, model, table, rows)


def modality_states(model: CameNN, table: ItemTable, rows: Ints) -> tuple[Tensor, Tensor]:
    """Compute ``[IMG]`` and ``[TXT]`` states of listings.

    They come out of the shared bottom, two [n, d] float32 on the CPU.
    """
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
    """Measure retrieval and mismatch on held-out listings.

    Returns (figures or None where there are fewer than ten, some queries with their answers).
    """
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
