"""Photos and titles that belong together: against a slow reference, inserted swaps, and held-out information."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from camenn_model.content.agreement import (
    BLOCK,
    FOLDS,
    HEADS,
    LEAST_FITTED,
    NEIGHBOURS,
    PENALTY,
    Agreement,
    FoldJudge,
    fit_logistic,
)
from camenn_model.evaluation import metrics
from schemas.errors import InputError

Floats = NDArray[np.float32]


class Catalog:
    """Listings of products, each of one of some classes.

    Photos and titles are noisy maps of the class, some of them vague.
    """

    def __init__(self, count: int, seed: int = 0, *, vague: float = 0.0, foreign: float = 0.0) -> None:
        rng = np.random.default_rng(seed)
        latent = rng.normal(size=(40, 8))
        self.product = rng.integers(0, count // 2, count).astype(np.uint64)
        shown = said = (self.product % np.uint64(40)).astype(np.int64)
        self.foreign = rng.random(count) < foreign
        said = np.where(self.foreign, rng.permutation(said), said)
        sides = []
        for classes, width in ((shown, 30), (said, 20)):
            clear = np.where(rng.random(count) < vague, 0.1, 1.0)[:, None]
            reported = clear * latent[classes] @ rng.normal(size=(8, width))
            sides.append((reported + rng.normal(size=reported.shape)).astype(np.float32))
        self.images, self.titles = sides
        self.fold = (self.product // np.uint64(40) % np.uint64(FOLDS)).astype(np.int64)
        self.rows = np.arange(count)

    def fit(self) -> Agreement:
        return Agreement.fit(self.images, self.titles, self.product, self.fold)

    def judge(self, agreement: Agreement, image_row: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        photos = self.rows if image_row is None else image_row
        return agreement.judge(self.images, self.titles, photos, self.rows, self.fold).agreement


def cosine(a: Floats, b: Floats) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_figures_equal_a_slow_reference() -> None:
    catalog = Catalog(400)
    agreement = catalog.fit()
    for place in (3, 17, 250):
        fold = int(catalog.fold[place])
        judge = agreement.folds[fold]
        photo = (catalog.images[place].astype(np.float64) - judge.image_mean) @ judge.image_map
        title = (catalog.titles[place].astype(np.float64) - judge.text_mean) @ judge.text_map
        others = np.flatnonzero(catalog.fold != fold)
        of_titles = [
            cosine(photo, (catalog.titles[o].astype(np.float64) - judge.text_mean) @ judge.text_map) for o in others
        ]
        of_photos = [
            cosine(title, (catalog.images[o].astype(np.float64) - judge.image_mean) @ judge.image_map) for o in others
        ]
        expected = [cosine(photo, title), *(np.mean(sorted(found)[-NEIGHBOURS:]) for found in (of_titles, of_photos))]
        figures = judge.figures(catalog.images[[place]], catalog.titles[[place]])
        assert figures[0] == pytest.approx(expected, abs=1e-6)
        standard = (figures[0] - agreement.center) / agreement.scale
        c, p, t = standard
        odds = np.array([c, p, t, c * p, c * t, p * t, c * c, p * p, t * t, 1.0]) @ agreement.weights["both"]
        assert catalog.judge(agreement)[place] == pytest.approx(odds, abs=1e-5)


def test_wrong_titles_are_told_from_vague_ones() -> None:
    """A cosine mistakes vague listings for wrong ones."""
    catalog = Catalog(3_000, vague=0.3, foreign=0.1)
    agreement = catalog.fit()
    found = agreement.judge(catalog.images, catalog.titles, catalog.rows, catalog.rows, catalog.fold)
    by_cosine, by_all = (metrics.mismatch_auc(catalog.foreign, figure) for figure in (found.cosine, found.agreement))
    assert by_all > by_cosine + 0.03 and by_all > 0.85
    worst = np.argsort(found.agreement)[: len(found.agreement) // 20]
    assert catalog.foreign[worst].mean() > catalog.foreign[np.argsort(found.cosine)[: len(worst)]].mean() + 0.1
    assert np.allclose(found.mismatch, 1 / (1 + np.exp(found.agreement.astype(np.float64))), atol=1e-6)
    for head in ("ita", "tia"):
        assert ((getattr(found, head) > 0) & (getattr(found, head) < 1)).all()


def test_half_of_the_pairs_that_look_even_belong_together() -> None:
    """Probabilities are for pairs half of which are own ones, and are calibrated."""
    catalog = Catalog(4_000, vague=0.2)
    agreement = catalog.fit()
    rng = np.random.default_rng(1)
    photos = catalog.rows.copy()
    for fold in range(FOLDS):
        photos[catalog.fold == fold] = rng.permutation(photos[catalog.fold == fold])
    foreign = catalog.judge(agreement, photos)[catalog.product != catalog.product[photos]]
    odds = np.concatenate([catalog.judge(agreement), foreign]).astype(np.float64)
    label = np.concatenate([np.ones(4_000), np.zeros(len(foreign))])
    probability = 1 / (1 + np.exp(-odds))
    gaps = [probability[part].mean() - label[part].mean() for part in np.array_split(np.argsort(probability), 8)]
    assert np.abs(gaps).mean() < 0.04 and np.ptp(probability) > 0.5


@pytest.mark.parametrize("fold", [0, FOLDS - 2])
def test_a_fold_s_judge_knows_nothing_of_its_pairs(fold: int) -> None:
    """Other titles for the listings of a fold do not change the fold's judge."""
    catalog = Catalog(300)
    mine = np.flatnonzero(catalog.fold == fold)
    swapped = Catalog(300)
    swapped.titles[mine] = np.roll(catalog.titles[mine], 1, axis=0)
    with pytest.MonkeyPatch.context() as patch:
        # The penalty is one number, chosen on all.
        patch.setattr("camenn_model.content.agreement.choose_penalty", lambda *_: 0.1)
        first, second = catalog.fit(), swapped.fit()
    for name, value in vars(first.folds[fold]).items():
        assert np.array_equal(value, getattr(second.folds[fold], name)), name
    other = (fold + 1) % (FOLDS - 1)
    assert not np.array_equal(first.folds[other].text_map, second.folds[other].text_map)


def test_judgements_do_not_depend_on_what_is_judged_with_them() -> None:
    catalog = Catalog(BLOCK * FOLDS + 700)
    agreement = catalog.fit()
    whole = catalog.judge(agreement)
    order = np.random.default_rng(0).permutation(len(whole))
    some = order[:300]
    found = agreement.judge(catalog.images, catalog.titles, some, some, catalog.fold[some]).agreement
    assert np.array_equal(found, whole[some])


def test_without_photo_or_title_nothing_is_judged() -> None:
    catalog = Catalog(300)
    photos, titles = catalog.rows.copy(), catalog.rows.copy()
    photos[::3], titles[::2] = -1, -1
    found = catalog.fit().judge(catalog.images, catalog.titles, photos, titles, catalog.fold)
    missing = (photos < 0) | (titles < 0)
    for figure in (*vars(found).values(), found.mismatch):
        assert np.array_equal(np.isnan(figure), missing)


@pytest.mark.parametrize("count", [0, 1, LEAST_FITTED])
def test_few_listings_are_not_judged(count: int) -> None:
    catalog = Catalog(300)
    few = slice(0, count)
    agreement = Agreement.fit(catalog.images[few], catalog.titles[few], catalog.product[few], catalog.fold[few])
    assert agreement.folds == ()
    assert np.isnan(catalog.judge(agreement)).all()


def test_one_product_in_all_listings_is_not_judged() -> None:
    catalog = Catalog(300)
    catalog.product[:] = 7
    assert catalog.fit().folds == ()


def test_contents_that_are_all_alike_are_judged_alike() -> None:
    catalog = Catalog(300)
    catalog.images[:], catalog.titles[:] = 1.0, 2.0
    odds = catalog.judge(catalog.fit())
    assert np.isfinite(odds).all() and np.ptp(odds) == 0


@pytest.mark.parametrize("count", [300, 10])
def test_what_is_written_is_read(tmp_path: Path, count: int) -> None:
    catalog = Catalog(count)
    agreement = catalog.fit()
    agreement.write(tmp_path)
    found = Agreement.read(tmp_path)
    assert len(found.folds) == len(agreement.folds) and found.penalty == agreement.penalty
    assert np.array_equal(catalog.judge(found), catalog.judge(agreement), equal_nan=True)
    (tmp_path / "agreement.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match=r"agreement\.safetensors.*camenn train"):
        Agreement.read(tmp_path)


def test_logistic_regression_is_where_its_gradient_is_0() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(500, 3)), np.ones((500, 1))], axis=1)
    for slope in (1.0, 50.0):
        y = (rng.random(500) < 1 / (1 + np.exp(-slope * (x @ [2.0, -1.0, 0.0, 0.3])))).astype(float)
        weights = fit_logistic(x, y)
        residual = x.T @ (1 / (1 + np.exp(-(x @ weights))) - y)
        assert residual == pytest.approx([*(-PENALTY * weights[:3]), 0.0], abs=1e-6)


def test_the_heads_read_what_they_are_named_for() -> None:
    """ITA keeps the photo: the title's similarity to other photos is not used. TIA keeps the title:
    the photo's similarity to other titles is not used.
    """
    catalog = Catalog(300)
    agreement = catalog.fit()
    figures = np.array([[0.4, 0.5, 0.6], [0.4, 0.5, 0.1], [0.4, 0.1, 0.6]])
    ita, tia, both = (agreement.log_odds(figures, head) for head in HEADS)
    assert ita[0] == ita[1] != ita[2] and tia[0] == tia[2] != tia[1]
    assert len(np.unique(both)) == 3


def test_a_bank_has_unit_vectors() -> None:
    catalog = Catalog(200)
    judge = FoldJudge.fit(catalog.images, catalog.titles, 0.1)
    for bank in (judge.image_bank, judge.text_bank):
        assert len(bank) == 200 and np.linalg.norm(bank, axis=1) == pytest.approx(1.0, abs=1e-5)
