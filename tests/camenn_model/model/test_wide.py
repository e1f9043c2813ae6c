"""The linear part of the model.

It is compared with scikit-learn's logistic regression, and its two ways of being computed with each
other.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from camenn_model.batch import Batch
from camenn_model.config import CATEGORY, ITEM_HASH, USER_HASH, ModelConfig
from camenn_model.model.camenn import CameNN
from camenn_model.model.wide import MOST_CROSSED, Catalog, Wide, WideRows
from camenn_model.training.fit_wide import PENALTIES, fit_wide
from tests.support.random_batches import FIELDS, awake, random_batch, tiny_config

BASE = -1.0


def seen(wide: Wide, batch: Batch, liked: torch.Tensor | None = None) -> tuple[Catalog, WideRows]:
    """A batch's listings as a catalog, and its pairs as examples."""
    items, audience, pairs = batch.items, batch.audience, batch.pairs
    mask = (items.text_mask & items.has_text[:, None])[..., None]
    titles = (items.text * mask).sum(1) / mask.sum(1).clamp(min=1)
    catalog = Catalog(
        items.cats,
        items.values,
        items.buckets,
        (wide.image.along(items.patches.mean(1)), items.has_image),
        (wide.text.along(titles), items.has_text),
    )
    rows = pairs.audience
    return catalog, WideRows(
        pairs.item,
        audience.cats[rows],
        audience.values[rows],
        audience.buckets[rows],
        pairs.values,
        pairs.buckets,
        pairs.label,
        torch.zeros(len(pairs), 3) if liked is None else liked,
    )


def no_progress(done: int, total: int, note: str) -> None:
    """Report nothing."""


def one_hot(codes: torch.Tensor, size: int) -> np.ndarray:
    return torch.nn.functional.one_hot(codes, size).numpy().astype(np.float64)


def design_matrix(config: ModelConfig, catalog: Catalog, rows: WideRows) -> np.ndarray:
    """Every column written out."""
    blocks = []
    category = None
    for column, field in enumerate(config.item_categorical):
        if field.name != ITEM_HASH:
            blocks.append(one_hot(catalog.cats[rows.item, column], field.size))
        if field.name == CATEGORY:
            category = blocks[-1]
    assert category is not None
    for column, field in enumerate(config.audience_categorical):
        if field.name != USER_HASH:
            own = one_hot(rows.audience_cats[:, column], field.size)
            blocks += [own, (own[:, :, None] * category[:, None, :]).reshape(len(own), -1)]
    for fields, values, buckets in (
        (config.item_numeric, catalog.values[rows.item], catalog.buckets[rows.item]),
        (config.audience_numeric, rows.audience_values, rows.audience_buckets),
        (config.pair_numeric, rows.values, rows.buckets),
    ):
        blocks.append(np.where((buckets > 0).numpy(), values.numpy(), 0))
        blocks += [one_hot(buckets[:, column], field.size) for column, field in enumerate(fields)]
    for along, present in (catalog.image, catalog.text):
        there = present[rows.item].numpy()[:, None]
        blocks += [along[rows.item].numpy() * there, (~there).astype(np.float64)]
    return np.concatenate([*blocks, rows.part_logits.numpy()], axis=1)


def learnable(examples: int, seed: int) -> tuple[ModelConfig, Wide, Catalog, WideRows]:
    """Examples whose labels follow from another linear part and from preferences."""
    config = tiny_config()
    batch = random_batch(config, items=60, audience=80, pairs=examples, seed=seed)
    torch.manual_seed(seed)
    truth = CameNN(config)
    awake(truth)
    wide = CameNN(config).wide
    wide.image.start(batch.items.patches.mean(1).numpy())
    wide.text.start(batch.items.text.mean(1).numpy())
    generator = torch.Generator().manual_seed(seed)
    liked = torch.randn(examples, 3, generator=generator)
    catalog, rows = seen(wide, batch, liked)
    with torch.no_grad():
        logits = BASE + truth.wide.of_examples(catalog, rows) + liked @ torch.tensor([1.0, 0.0, -0.5])
    label = (torch.rand(examples, generator=generator) < logits.sigmoid()).float()
    return config, wide, catalog, dataclasses.replace(rows, label=label)


def test_each_penalty_fits_as_scikit_learn_does(monkeypatch: pytest.MonkeyPatch) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    for penalty in (30.0, 1.0):
        monkeypatch.setattr("camenn_model.training.fit_wide.PENALTIES", (penalty,))
        monkeypatch.setattr("camenn_model.training.fit_wide.SLOPE_PENALTY", penalty)
        monkeypatch.setattr("camenn_model.training.fit_wide.BUCKET_PENALTY", penalty)
        monkeypatch.setattr("camenn_model.training.fit_wide.ITERATIONS", 500)
        config, wide, catalog, rows = learnable(1_500, 3)
        found = fit_wide(wide, BASE, catalog, rows, rows, no_progress)
        design = design_matrix(config, catalog, rows)
        peer = linear_model.LogisticRegression(C=1 / penalty, max_iter=5_000, tol=1e-8)
        expected = peer.fit(design, rows.label.numpy()).decision_function(design)
        with torch.no_grad():
            logits = BASE + wide.of_examples(catalog, rows) + rows.part_logits @ torch.tensor(found.coefficients)
        assert np.abs(logits.numpy() - expected).max() < 0.01 * expected.std()
        assert np.allclose(found.coefficients, peer.coef_[0, -3:], atol=0.01)


def test_the_penalty_is_the_one_with_the_least_loss_on_other_examples() -> None:
    _, wide, catalog, rows = learnable(6_000, 4)
    half = len(rows.label) // 2
    train, stop = (
        WideRows(**{name: value[part] for name, value in vars(rows).items()})
        for part in (slice(None, half), slice(half, None))
    )
    reported: list[str] = []
    found = fit_wide(
        wide, BASE, catalog, train, stop, lambda done, total, note: reported.append(f"{done}/{total} {note}")
    )
    assert found.penalty in PENALTIES[1:]
    assert reported[-1].startswith(f"{len(PENALTIES)}/{len(PENALTIES)}")
    with torch.no_grad():
        logits = BASE + wide.of_examples(catalog, stop) + stop.part_logits @ torch.tensor(found.coefficients)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, stop.label)
    assert float(loss) == pytest.approx(found.loss, abs=1e-6)
    # Unexplained labels are best predicted by the base rate.
    order = torch.randperm(half, generator=torch.Generator().manual_seed(0))
    noise = dataclasses.replace(train, label=train.label[order])
    assert fit_wide(wide, BASE, catalog, noise, stop, no_progress).penalty == PENALTIES[0]


def test_factors_and_pairs_add_up_to_what_was_fitted() -> None:
    config = tiny_config()
    model = CameNN(config)
    awake(model)
    batch = random_batch(config, items=9, audience=5, pairs=40)
    wide = model.wide
    with torch.no_grad():
        expected = wide.of_examples(*seen(wide, batch))
        items, audience = wide.item_factors(batch.items), wide.audience_factors(batch.audience)
        found = (items @ audience.T)[batch.pairs.item, batch.pairs.audience]
        found = found + wide.of_pairs(batch.pairs.values, batch.pairs.buckets)
    assert expected.std() > 0.5
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("size", [0, MOST_CROSSED + 1])
def test_without_a_category_or_with_too_many_nothing_is_crossed(size: int) -> None:
    """``size`` of the category, 0 = there is no such field."""
    fields = tuple(
        dataclasses.replace(field, size=size or 2) if field.name == CATEGORY else field
        for field in FIELDS
        if size or field.name != CATEGORY
    )
    config = tiny_config(fields=fields)
    model = CameNN(config)
    awake(model)
    batch = random_batch(config, pairs=20)
    wide = model.wide
    assert wide.cross.numel() == 0
    with torch.no_grad():
        factors = wide.item_factors(batch.items), wide.audience_factors(batch.audience)
        found = (factors[0] @ factors[1].T)[batch.pairs.item, batch.pairs.audience]
        found = found + wide.of_pairs(batch.pairs.values, batch.pairs.buckets)
        assert torch.allclose(found, wide.of_examples(*seen(wide, batch)), atol=1e-5)


def test_no_optimiser_moves_it() -> None:
    model = CameNN(tiny_config())
    batch = random_batch(model.config)
    awake(model)
    before = [weight.clone() for weight in model.wide.parameters()]
    from camenn_model.training.optimizer import OptimizerConfig, build_optimizer

    optimizer = build_optimizer((model,), OptimizerConfig())
    model(batch).logits.sum().backward()
    optimizer.step()
    assert all(torch.equal(weight, old) for weight, old in zip(model.wide.parameters(), before, strict=True))
