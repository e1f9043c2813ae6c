"""The expected AUC and its ladder."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.config import CityConfig
from simulator.truth import LADDER_RUNGS, ClickTerms, Draws, conditional_p_order, expected_auc, expected_ladder


def brute_force_auc(p: np.ndarray, s: np.ndarray) -> float:
    """The double sum as it is written in docs/explanation/city.md."""
    beats = (s[:, None] > s[None, :]) + 0.5 * (s[:, None] == s[None, :])
    return float((p[:, None] * (1 - p)[None, :] * beats).sum() / (p.sum() * (1 - p).sum()))


@given(st.lists(st.tuples(st.floats(0.01, 0.99), st.integers(-3, 3)), min_size=1, max_size=40))
def test_expected_auc_equals_double_sum_with_ties(pairs: list[tuple[float, int]]) -> None:
    p = np.array([pair[0] for pair in pairs])
    s = np.array([pair[1] for pair in pairs], dtype=float)
    assert expected_auc(p, s) == pytest.approx(brute_force_auc(p, s), abs=1e-12)


def test_expected_auc_of_a_constant_score_is_a_half() -> None:
    assert expected_auc(np.array([0.1, 0.5, 0.9]), np.zeros(3)) == pytest.approx(0.5)


def test_expected_auc_of_certain_labels_is_the_auc() -> None:
    labels = np.array([0.0, 1.0, 0.0, 1.0])
    assert expected_auc(labels, np.array([0.1, 0.4, 0.2, 0.3])) == 1.0
    assert expected_auc(labels, np.array([0.4, 0.4, 0.2, 0.1])) == pytest.approx(0.375)


@pytest.mark.parametrize(
    ("p", "s", "message"),
    [
        ([0.5, 0.5], [1.0], "one length"),
        ([0.5, 1.5], [1.0, 2.0], "probabilities"),
        ([0.5, 0.5], [1.0, np.nan], "not numbers"),
        ([1.0, 1.0], [1.0, 2.0], "both outcomes"),
        ([], [], "both outcomes"),
    ],
)
def test_expected_auc_rejects_what_has_no_auc(p: list[float], s: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expected_auc(np.array(p), np.array(s))


CONFIG = CityConfig()


def random_terms(n: int, draws: int, seed: int) -> tuple[ClickTerms, Draws]:
    """Draw clicks and draws from the same listings.

    The clicks follow the simulator's formula, on listings whose content takes few values.
    """
    rng = np.random.default_rng(seed)
    shape = (40 * n,)

    def listings(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
        image_ok, text_ok = rng.random(shape) < 0.7, rng.random(shape) < 0.8
        mismatched = (~image_ok & (rng.random(shape) < 0.3)) | (~text_ok & (rng.random(shape) < 0.4))
        return rng.choice((-1.5, 1.5), shape), rng.choice((-1.0, 1.0), shape), image_ok, text_ok, mismatched

    a, o = rng.choice((-0.5, 0.5), shape), rng.choice((-0.3, 0.3), shape)
    visual, text, image_ok, text_ok, mismatched = listings(shape)
    c = CONFIG
    p_click = 1 / (
        1
        + np.exp(
            -(
                c.click_bias
                + a
                + c.click_visual * visual * image_ok
                + c.click_text * text * text_ok
                + c.click_context * o
                + c.click_bad_image * ~image_ok
                + c.click_bad_text * ~text_ok
            )
        )
    )
    clicked = np.flatnonzero(rng.random(shape) < p_click)[:n]
    logit = (
        c.order_bias
        + c.order_class * a
        + c.order_visual * visual
        + c.order_text * text
        + c.order_context * o
        - mismatched
    )
    columns = (a, o, visual, text, image_ok, text_ok, mismatched, 1 / (1 + np.exp(-logit)))
    return ClickTerms(*(column[clicked] for column in columns)), Draws(*listings((len(clicked), draws)))


@pytest.mark.parametrize(
    ("known", "given"),
    [
        ((), ["class_term", "context_term"]),
        (("text_term",), ["class_term", "context_term", "text_term"]),
        (("visual_term",), ["class_term", "context_term", "visual_term"]),
    ],
)
def test_conditional_probability_is_the_mean_over_clicks_that_look_alike(
    known: tuple[str, ...], given: list[str]
) -> None:
    """Mean and computed probability agree for equal knowledge.

    Of very many clicks, those with equal knowledge have on average the probability that is computed
    for each of them.
    """
    terms, draws = random_terms(40_000, 256, seed=0)
    found = conditional_p_order(terms, draws, CONFIG, known)
    _, group = np.unique(np.stack([getattr(terms, name) for name in given]), axis=1, return_inverse=True)
    size = np.bincount(group)
    mean, computed = (np.bincount(group, weights=w) / size for w in (terms.p_order, found))
    spread = np.sqrt(np.bincount(group, weights=(terms.p_order - mean[group]) ** 2) / size**2)
    assert np.abs(computed - mean).max() < 0.004 + 5 * spread.max()


@pytest.mark.parametrize("mismatch", [False, True])
def test_conditional_probability_of_what_is_displayed(mismatch: bool) -> None:
    terms, draws = random_terms(60_000, 256, seed=1)
    known = ("image_ok", "text_ok", *(["mismatched"] if mismatch else []))
    found = conditional_p_order(terms, draws, CONFIG, known)
    seen = [
        terms.class_term,
        terms.context_term,
        terms.image_ok,
        terms.text_ok,
        terms.visual_term * terms.image_ok,
        terms.text_term * terms.text_ok,
        *([terms.mismatched] if mismatch else []),
    ]
    _, group = np.unique(np.stack(seen).astype(float), axis=1, return_inverse=True)
    size = np.bincount(group)
    mean, computed = (np.bincount(group, weights=w) / size for w in (terms.p_order, found))
    spread = np.sqrt(np.bincount(group, weights=(terms.p_order - mean[group]) ** 2)) / size
    assert (np.abs(computed - mean) < 0.006 + 5 * spread).all()


def test_expected_ladder_rises_with_what_is_known() -> None:
    ladder = expected_ladder(*random_terms(20_000, 64, seed=2), CONFIG)
    assert tuple(ladder) == LADDER_RUNGS
    assert ladder["class_context"] < ladder["clean_text"] < ladder["true_probability"]
    assert ladder["class_context"] < ladder["clean_image"] < ladder["true_probability"]
    assert ladder["as_displayed"] < ladder["mismatch_known"] < ladder["true_probability"]
