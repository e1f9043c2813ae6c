"""Representation on held-out listings.

Retrieval, mismatch and a linear probe are measured, of a model and of maps between the frozen
encoders' features.

Shapes: n listings, classes as integers [n]. A hit is a listing of the query's class.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from camenn_model.content.agreement import Agreement
from camenn_model.content.canonical_directions import canonical_directions
from camenn_model.data.item_table import Ints, ItemTable
from camenn_model.evaluation import metrics
from camenn_model.evaluation.representation import content_vectors, match_scores, modality_states
from camenn_model.model.camenn import CameNN

Floats = NDArray[np.float32]
Scores = NDArray[np.floating[Any]]
"""float32 of similarities, float64 of probabilities"""
KS = (1, 5, 10)
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Penalties of the maps, in units of the mean eigenvalue of the features' covariance"""
DIMENSIONS = (16, 32, 64, 128)
"""Numbers of directions of the correlation analysis"""
VALIDATION = 0.2


@dataclass(frozen=True)
class Held:
    """Held-out listings with photo and title."""

    rows: Ints
    classes: Ints
    mismatched: NDArray[np.bool_] | None
    """True where photo or title is another class's, None where unknown"""
    corrupted: NDArray[np.bool_] | None


def standardise(train: Floats, other: Floats) -> tuple[Floats, Floats]:
    """Standardise both by the mean and spread of `train`."""
    mean, spread = train.mean(axis=0), train.std(axis=0) + 1e-6
    return (train - mean) / spread, (other - mean) / spread


def unit(vectors: Floats) -> Floats:
    """Scale rows to length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def cca(images: Floats, titles: Floats, penalty: float, dimensions: int) -> tuple[Floats, Floats]:
    """Fit a regularised canonical correlation analysis.

    Returns projections of images and titles onto common axes, weighted by their correlations.
    """
    of_images, of_titles, correlations = canonical_directions(images, titles, penalty, dimensions)
    weight = np.sqrt(correlations)
    return of_images * weight, of_titles * weight


def ridge(images: Floats, titles: Floats, penalty: float) -> Floats:
    """Fit ridge regression from images to titles.

    It is least squares with an L2 penalty.
    """
    gram = images.T @ images
    return np.linalg.solve(
        gram + penalty * np.trace(gram) / len(gram) * np.eye(len(gram), dtype=gram.dtype), images.T @ titles
    )


def _similarities(
    kind: str, setting: tuple[float, int], train: tuple[Floats, Floats], test: tuple[Floats, Floats]
) -> Floats:
    """Return similarities [photos, titles] of the listings of `test`.

    The map is fitted on `train`.
    """
    if kind == "ridge":
        weights = ridge(*train, setting[0])
        return unit(test[0] @ weights) @ unit(test[1]).T
    of_images, of_titles = cca(*train, *setting)
    return unit(test[0] @ of_images) @ unit(test[1] @ of_titles).T


def _mean_first(similarities: Floats, classes: Ints) -> float:
    both = (metrics.recall_at_k(s, classes, classes, (1,))[1] for s in (similarities, similarities.T))
    return sum(both) / 2


def frozen_features(table: ItemTable, rows: Ints) -> tuple[Floats, Floats]:
    """Return mean patch features and mean token states.

    They are of listings that have both, two [n, width].
    """
    return (
        table.pooled_images[table.image_row[rows]].astype(np.float32),
        table.pooled_titles[table.title_row[rows]].astype(np.float32),
    )


def mapped_similarities(
    kind: str, train: tuple[Floats, Floats], train_classes: Ints, test: tuple[Floats, Floats], seed: int
) -> Floats:
    """Return similarities by the best `ridge` or `cca` map.

    They are [photos, titles]. The map is between photos' and titles' features [n, p] and [n, q],
    fitted on `train`.

    Settings are chosen by R@1 of both ways on a part of the training listings.
    """
    order = np.random.default_rng([seed, 13]).permutation(len(train_classes))
    cut = int(VALIDATION * len(order))
    pairs = [standardise(side[order[cut:]], side[order[:cut]]) for side in train]
    fit, check = (pairs[0][0], pairs[1][0]), (pairs[0][1], pairs[1][1])
    whole = [standardise(a, b) for a, b in zip(train, test, strict=True)]
    settings = [(penalty, size) for penalty in PENALTIES for size in (DIMENSIONS if kind == "cca" else (0,))]
    scores = {s: _mean_first(_similarities(kind, s, fit, check), train_classes[order[:cut]]) for s in settings}
    best = max(scores, key=lambda setting: scores[setting])
    return _similarities(kind, best, (whole[0][0], whole[1][0]), (whole[0][1], whole[1][1]))


def frozen_similarities(table: ItemTable, train: Ints, train_classes: Ints, test: Ints, seed: int) -> dict[str, Floats]:
    """Return similarities of frozen features by fitted maps.

    They are [photos, titles] of the listings `test`, by the best ridge map and the best CCA map
    between mean patch features and mean token states.
    """
    known, asked = frozen_features(table, train), frozen_features(table, test)
    return {kind: mapped_similarities(kind, known, train_classes, asked, seed) for kind in ("ridge", "cca")}


def swapped_pairs(held: Held, seed: int) -> tuple[Ints, Ints]:
    """Return places (photos, titles) of mismatched pairs.

    The pairs are of different classes, of listings that are correct themselves.
    """
    right = np.arange(len(held.rows)) if held.corrupted is None else np.flatnonzero(~held.corrupted)
    other = np.random.default_rng([seed, 17]).permutation(right)
    differs = held.classes[right] != held.classes[other]
    return right[differs], other[differs]


def both_ways(
    similarities: Floats, of_photos: Ints, of_titles: Ints, ks: tuple[int, ...]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return R@k, (photo to title, title to photo).

    It is computed from similarities [n, m] of photos and titles of given classes.
    """
    to_text, to_image = (
        {f"r_at_{k}": share for k, share in metrics.recall_at_k(found, queries, answers, ks).items()}
        for found, queries, answers in ((similarities, of_photos, of_titles), (similarities.T, of_titles, of_photos))
    )
    return to_text, to_image


def figures(similarities: Floats, belongs: Scores, swaps: Scores, held: Held) -> dict[str, Any]:
    """Return R@k both ways and mismatch AUC.

    R@k is from similarities [n, n]. Mismatch AUC is from the alignment scores of own photos and
    titles [n], and of swapped ones [m].
    """
    to_text, to_image = both_ways(similarities, held.classes, held.classes, KS)
    found: dict[str, Any] = {"image_to_text": to_text, "text_to_image": to_image}
    right = belongs if held.corrupted is None else belongs[~held.corrupted]
    labels = np.concatenate([np.zeros(len(right)), np.ones(len(swaps))])
    found["swap_auc"] = metrics.mismatch_auc(labels, np.concatenate([right, swaps]))
    if held.mismatched is not None and held.mismatched.any():
        found["mismatch_auc"] = metrics.mismatch_auc(held.mismatched, belongs)
    return found


def probe(train: Floats, train_groups: Ints, test: Floats, test_groups: Ints) -> float:
    """Return the accuracy of a linear probe of groups.

    It is the share of the test listings whose group a ridge classifier on vectors names.
    """
    groups, target = np.unique(train_groups, return_inverse=True)
    train, test = standardise(train, test)
    onto = np.eye(len(groups), dtype=np.float32)[target]
    weights = ridge(train, onto - onto.mean(axis=0), 0.1)
    return float(np.mean(groups[(test @ weights + onto.mean(axis=0)).argmax(axis=1)] == test_groups))


def of_model(
    model: CameNN, table: ItemTable, train: Ints, train_classes: Ints, held: Held, seed: int
) -> dict[str, Any]:
    """Return the model's figures, with linear probes.

    The probes are of the subcategory.

    `states` are the same figures of the shared bottom's states of a photo and of a title, `[IMG]`
    and `[TXT]`, by the best CCA map between them that is fitted on the training listings. A model
    that was trained without alignment has these too.
    """

    def embed(by: Callable[[CameNN, ItemTable, Ints], tuple[Tensor, Tensor]], rows: Ints) -> tuple[Floats, Floats]:
        image, text = by(model, table, rows)
        return image.numpy(), text.numpy()

    image, text = embed(content_vectors, held.rows)
    ita, tia = match_scores(model, table, held.rows, held.rows)
    photos, titles = swapped_pairs(held, seed)
    swap_ita, swap_tia = match_scores(model, table, held.rows[photos], held.rows[titles])
    found = figures(image @ text.T, (ita + tia) / 2, (swap_ita + swap_tia) / 2, held)
    found["probe"] = _probes(table, train, embed(content_vectors, train), held, (image, text))
    known, asked = embed(modality_states, train), embed(modality_states, held.rows)
    mapped = mapped_similarities("cca", known, train_classes, asked, seed)
    found["states"] = figures(mapped, mapped.diagonal(), mapped[photos, titles], held)
    found["states"]["probe"] = _probes(table, train, known, held, asked)
    return found


def _probes(
    table: ItemTable, train: Ints, known: tuple[Floats, Floats], held: Held, asked: tuple[Floats, Floats]
) -> dict[str, float]:
    """Return `probe` of the subcategory, by modality."""
    groups = table.subcategory
    sides = zip(("image", "text"), known, asked, strict=True)
    return {name: probe(a, groups[train], b, groups[held.rows]) for name, a, b in sides}


def of_listing_quality(table: ItemTable, agreement: Agreement, held: Held) -> dict[str, float] | None:
    """Measure how well published listing quality finds mismatches.

    The figures are None where the mismatches are unknown, or nothing is judged.

    `mismatch_auc` is over the held-out listings. `worst_twentieth` is the share of mismatched ones
    in the twentieth of them with the worst judgement.
    """
    if held.mismatched is None or not held.mismatched.any() or not agreement.folds:
        return None
    belongs = table.judge(agreement).agreement[held.rows]
    worst = np.argsort(belongs, kind="stable")[: max(1, len(belongs) // 20)]
    return {
        "mismatch_auc": metrics.mismatch_auc(held.mismatched, belongs),
        "worst_twentieth": float(held.mismatched[worst].mean()),
    }


def of_frozen(table: ItemTable, train: Ints, train_classes: Ints, held: Held, seed: int) -> dict[str, Any]:
    """Return the figures of the frozen features.

    They are the same as the model's, with the better of the two maps for retrieval and the ridge
    map's cosine as the mismatch score.
    """
    maps = frozen_similarities(table, train, train_classes, held.rows, seed)
    photos, titles = swapped_pairs(held, seed)
    found: dict[str, Any] = {name: figures(s, s.diagonal(), s[photos, titles], held) for name, s in maps.items()}
    found["probe"] = _probes(table, train, frozen_features(table, train), held, frozen_features(table, held.rows))
    return found
