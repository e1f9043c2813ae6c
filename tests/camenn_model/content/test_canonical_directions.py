"""Where projections start, against a latent that is known and against the definition of canonical correlation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from camenn_model.content.canonical_directions import (
    PENALTIES,
    PENALTY_FOLDS,
    SPREAD,
    canonical_directions,
    choose_penalty,
    find_start,
    own_directions,
)
from camenn_model.model.camenn import CameNN
from tests.support.random_batches import random_items, tiny_config

LISTINGS, SHARED = 2_000, 5


def views(seed: int, wide: int = 40, narrow: int = 24) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(features [n, wide], [n, narrow], shared latent [n, 5]): each view has as many latents of its own, and noise."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(LISTINGS, SHARED))
    found = []
    for width in (wide, narrow):
        own = 3.0 * rng.normal(size=(LISTINGS, SHARED))
        mixed = np.concatenate([common, own], axis=1) @ rng.normal(size=(2 * SHARED, width))
        found.append((mixed + 0.1 * rng.normal(size=mixed.shape) + 7.0).astype(np.float32))
    return found[0], found[1], common.astype(np.float32)


def explained(latent: np.ndarray, features: np.ndarray) -> np.ndarray:
    """R² of each column of `latent` in a least-squares fit of it on `features`."""
    centred = features - features.mean(axis=0)
    target = latent - latent.mean(axis=0)
    rest = target - centred @ np.linalg.lstsq(centred, target, rcond=None)[0]
    return 1 - rest.var(axis=0) / target.var(axis=0)


def test_canonical_directions_solve_their_eigenproblem() -> None:
    images, titles, _ = (values.astype(np.float64) for values in views(0))
    images, titles = images - images.mean(axis=0), titles - titles.mean(axis=0)
    a, b, correlations = canonical_directions(images, titles, 0.0, 8)
    along = np.corrcoef((images @ a).T, (titles @ b).T)[:8, 8:]
    assert np.allclose(along, np.diag(correlations), atol=1e-6)
    # The definition: eigenvalues of Sxx⁻¹ Sxy Syy⁻¹ Syx are the squared correlations.
    cross = images.T @ titles
    product = np.linalg.solve(images.T @ images, cross) @ np.linalg.solve(titles.T @ titles, cross.T)
    assert np.allclose(np.sort(np.linalg.eigvals(product).real)[::-1][:8], correlations**2, atol=1e-6)


def test_shared_directions_hold_what_both_tell_and_own_ones_the_rest() -> None:
    images, titles, common = views(1)
    start = find_start(images, titles, 2 * SHARED, 2 * SHARED, aligned=True)
    image_map, text_map, shared = start.image, start.text, SHARED
    assert start.correlations[:shared].min() > 0.9 > 0.3 > start.correlations[shared:].max()
    assert np.array_equal(start.shared_image[:, :shared], image_map[:, :shared])
    for features, found in ((images, image_map), (titles, text_map)):
        projected = (features - features.mean(axis=0)) @ found
        assert found.shape[1] == 2 * SHARED
        assert np.allclose(projected.std(axis=0), SPREAD, rtol=1e-3)
        assert explained(common, projected[:, :shared]).min() > 0.95
        # What is not shared is in the other half, and nothing of the shared part is.
        assert np.abs(np.corrcoef(projected.T)[:shared, shared:]).max() < 0.02
    # The same sign and order on both sides: a photo's coordinates are its title's.
    ours, theirs = ((f - f.mean(axis=0)) @ m[:, :shared] for f, m in ((images, image_map), (titles, text_map)))
    assert np.diag(np.corrcoef(ours.T, theirs.T)[:shared, shared:]).min() > 0.9


@pytest.mark.parametrize("listings", [10, 30, 200])
def test_directions_of_few_listings_are_those_of_the_definition(listings: int) -> None:
    images, titles, _ = (values[:listings].astype(np.float64) for values in views(7))
    images, titles = images - images.mean(axis=0), titles - titles.mean(axis=0)
    a, b, correlations = canonical_directions(images, titles, 0.1, 4)
    covariances = [f.T @ f / listings for f in (images, titles)]
    one, other = (c + 0.1 * np.trace(c) / len(c) * np.eye(len(c)) for c in covariances)
    cross = images.T @ titles / listings
    product = np.linalg.solve(one, cross) @ np.linalg.solve(other, cross.T)
    assert np.allclose(product @ a, a * correlations**2, atol=1e-8)
    assert np.allclose(b * correlations, np.linalg.solve(other, cross.T @ a), atol=1e-8)
    assert np.allclose(a.T @ one @ a, np.eye(4), atol=1e-8)


def slowly_chosen(images: np.ndarray, titles: np.ndarray, product: np.ndarray, count: int) -> float:
    """`choose_penalty` a photo at a time."""
    products = np.unique(product)
    fold = dict(
        zip(products.tolist(), np.random.default_rng(0).permutation(len(products)) % PENALTY_FOLDS, strict=True)
    )
    folds = np.array([fold[one] for one in product.tolist()])
    ranks: dict[float, list[float]] = {penalty: [] for penalty in PENALTIES}
    for number in range(PENALTY_FOLDS):
        known, asked = np.flatnonzero(folds != number), np.flatnonzero(folds == number)
        for penalty in PENALTIES:
            start = find_start(images[known], titles[known], 2, count, aligned=True, penalty=penalty)
            sides = []
            for features, shared in ((images, start.shared_image), (titles, start.shared_text)):
                centred = features[asked] - features[known].mean(axis=0)
                along = centred @ (shared * np.sqrt(start.correlations))
                sides.append(along / np.linalg.norm(along, axis=1, keepdims=True))
            for place in range(len(asked)):
                both = []
                for one, other in (sides, sides[::-1]):
                    similar = other @ one[place]
                    ahead = [
                        p
                        for p in range(len(asked))
                        if product[asked[p]] != product[asked[place]] and similar[p] > similar[place]
                    ]
                    both.append(1 / (1 + len(ahead)))
                ranks[penalty].append(sum(both) / 2)
    best = max(ranks.values(), key=np.mean)
    alike = []
    for penalty, found in ranks.items():
        worse = np.subtract(best, found)
        if worse.mean() <= worse.std() / np.sqrt(len(worse)):
            alike.append(penalty)
    return max(alike)


@pytest.mark.parametrize(("listings", "noise"), [(40, 1.0), (120, 0.3), (120, 3.0), (500, 1.0)])
def test_the_penalty_is_that_of_the_slow_reference(listings: int, noise: float) -> None:
    images, titles, _ = (values[:listings] for values in views(8))
    rng = np.random.default_rng(0)
    images = images + (noise * rng.normal(size=images.shape)).astype(np.float32)
    product = rng.permutation(listings) // 2
    assert choose_penalty(images, titles, product, 8) == slowly_chosen(images, titles, product, 8)


def test_few_listings_want_a_larger_penalty_than_many() -> None:
    # The shared latent is faint beside each view's own: a penalty on faint directions removes it.
    rng = np.random.default_rng(0)
    common = rng.normal(size=(500, SHARED))
    views = []
    for width in (100, 60):
        reported = np.concatenate([common, 3.0 * rng.normal(size=(500, 20))], axis=1) @ rng.normal(size=(25, width))
        views.append((reported + rng.normal(size=reported.shape)).astype(np.float32))
    few, many = (choose_penalty(views[0][:n], views[1][:n], np.arange(n), 10) for n in (50, 500))
    assert few >= 100 * many


def test_copies_of_a_product_do_not_speak_for_small_penalties() -> None:
    images, titles, _ = (values[:100] for values in views(9, 200, 100))
    product = np.arange(100)
    once = choose_penalty(images, titles, product, 12)
    images, titles, product = (np.repeat(values, 5, axis=0) for values in (images, titles, product))
    assert choose_penalty(images, titles, product, 12) == once > PENALTIES[0]


@pytest.mark.parametrize("listings", [2, 4, 9])
def test_too_few_listings_to_tell_have_the_largest_penalty(listings: int) -> None:
    images, titles, _ = (values[:listings] for values in views(10))
    assert choose_penalty(images, titles, np.arange(listings), 8) == PENALTIES[-1]
    assert choose_penalty(images, titles, np.zeros(listings, np.int64), 8) == PENALTIES[-1]


def test_without_alignment_titles_tell_nothing_of_photos() -> None:
    images, titles, _ = views(2)
    order = np.random.default_rng(0).permutation(LISTINGS)
    found, other = (find_start(images, t, 10, 10, aligned=False) for t in (titles, titles[order]))
    assert len(found.correlations) == 0
    assert np.array_equal(found.image, other.image)


@pytest.mark.parametrize("listings", [2, 9, 40])
def test_few_listings_give_few_directions(listings: int) -> None:
    images, titles, _ = (values[:listings] for values in views(3))
    start = find_start(images, titles, 16, 32, aligned=True)
    assert len(start.correlations) <= listings // 8
    for found in (start.image, start.text, start.shared_image, start.shared_text):
        assert found.shape[1] <= 2 * (listings // 8)
        assert np.isfinite(found).all()


def test_constant_features_give_no_direction() -> None:
    titles = views(4)[1]
    start = find_start(np.ones((LISTINGS, 6), np.float32), titles, 8, 16, aligned=True)
    assert len(start.correlations) == 0 and start.image.shape == (6, 0)


def test_nothing_is_left_where_all_directions_are_shared() -> None:
    titles = views(4)[1]
    start = find_start(titles[:, :3] * np.float32(2), titles, 16, 16, aligned=True)
    assert start.image.shape == (3, 3) and np.allclose(start.correlations, 1.0, atol=0.01)
    assert all(np.isfinite(found).all() for found in (start.image, start.text, start.shared_image, start.shared_text))


def test_own_directions_are_principal_ones_where_nothing_is_shared() -> None:
    features = views(5)[0]
    features = features - features.mean(axis=0)
    found = own_directions(features, np.zeros((40, 0), np.float32), 4)
    _, _, expected = np.linalg.svd(features, full_matrices=False)
    assert np.allclose(np.abs(np.sum(found * expected[:4].T, axis=0)), 1.0, atol=1e-3)


def test_a_started_model_finds_titles_of_photos_before_any_step() -> None:
    torch.manual_seed(0)
    config = tiny_config()
    images, titles, _ = views(6, config.image_width, config.text_width)
    model = CameNN(config).eval()
    yes = torch.ones(64, dtype=torch.bool)
    items = dataclasses.replace(
        random_items(config, 64, torch.Generator().manual_seed(0)),
        patches=torch.from_numpy(images[:64])[:, None].expand(-1, config.patches, -1).contiguous(),
        text=torch.from_numpy(titles[:64])[:, None].expand(-1, config.text_tokens, -1).contiguous(),
        has_image=yes,
        has_text=yes,
        text_mask=yes[:, None].expand(-1, config.text_tokens).contiguous(),
    )

    def first() -> float:
        with torch.no_grad():
            image, title = model.content_vectors(items)
        return float(((image @ title.T).argmax(1) == torch.arange(64)).float().mean())

    model.fit_features(items)
    before = first()
    model.start_projections(torch.from_numpy(images), torch.from_numpy(titles))
    assert first() > max(0.5, 5 * before)
    # The projection is the map: the features it was computed from have mean 0 and the requested spread.
    with torch.no_grad():
        projected = model.item_tokens.patch(torch.from_numpy(images))[:, :SHARED]
    assert projected.mean(0).abs().max() < 1e-3
    assert torch.allclose(projected.std(0), torch.tensor(SPREAD), rtol=1e-2)
