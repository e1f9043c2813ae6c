"""Claims about the results, and whether each holds."""

import math
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks.quality.figures import (
    Result,
    Results,
    by_model,
    mean_and_error,
    over_truth,
    paired,
    shown,
    surely_above,
)
from benchmarks.quality.job import BASELINES, TUNED
from benchmarks.quality.judge import content_efficiency
from benchmarks.quality.variants import VARIANTS

DEAD = 0.001
"""Mean gate weight below which an expert counts as dead"""
NOTHING = 0.001
"""A difference of expected AUC that counts as none"""
MISSING = "not measured"


def quick_claims(results: list[Result]) -> tuple[dict[str, Any], list[str]]:
    """Return (figures of --quick, claims that do not hold)."""
    found = by_model(results)

    def expected(model: str) -> float:
        return float(found["quick", model][0]["expected"]["auc"])

    figures: dict[str, Any] = {
        "expected_auc": {model: round(expected(model), 4) for kind, model in found if kind == "quick"},
        "expected_pcoc": round(found["quick", "full"][0]["expected"]["pcoc"], 3),
    }
    claims = {
        "CameNN ranks better than chance": expected("full") > 0.6,
        # A model trained on noise learns a random direction, and truth lies along few of them: 0.5
        # holds for the mean of many seeds only (0.577 was seen).
        "labels that mean nothing teach little": expected("full") - expected("permuted_labels") > 0.05,
        "no expert is dead": least_used(found["quick", "full"][0]) > DEAD,
    }
    if ("real", "full") in found:
        full, trees = found["real", "full"][0], found["real", "lightgbm"][0]
        figures["beats_lightgbm"] = round(full["test"]["auc"] - trees["test"]["auc"], 4)
        claims["CameNN is above LightGBM on the real log"] = figures["beats_lightgbm"] > 0
    else:
        figures["beats_lightgbm"] = None
    figures["claims"] = claims
    return figures, [claim for claim, holds in claims.items() if not holds]


class Claim(NamedTuple):
    """A claim with its outcome.

    `holds` is None where results are missing. `seeds` is the number of results behind the figure:
    one per seed, except where all runs are examined.
    """

    holds: bool | None
    figure: str
    seeds: int


class _Claims(dict[str, Claim]):
    """Claims by name, in the order of their definition."""

    def judge(
        self,
        claim: str,
        values: list[float],
        holds: Callable[[list[float]], bool],
        figure: Callable[[list[float]], str] = shown,
    ) -> None:
        """Judge a claim on values of so many seeds.

        With none it is not measured.
        """
        self[claim] = Claim(bool(holds(values)), figure(values), len(values)) if values else Claim(None, MISSING, 0)


def at_least(bar: float) -> Callable[[list[float]], bool]:
    """Make a test of whether a mean reaches `bar`."""
    return lambda values: statistics.mean(values) >= bar


def nothing(differences: list[float]) -> bool:
    """Return whether their mean counts as none."""
    return abs(statistics.mean(differences)) < NOTHING


def city_claims(found: Results) -> dict[str, Claim]:
    """Return the claims about all results.

    They are about the city, the real log and the controls, whether measured or not.
    """
    claims = _Claims()
    full = found.get(("city", "full"), [])
    _content_claim(claims, found)
    for other in ("lightgbm_content", "mmoe"):
        claims.judge(
            f"expected AUC above {other} by 3 SE", paired(found, "city", "full", other, "expected", "auc"), surely_above
        )
    for name, low, high in (("pcoc", 0.97, 1.03), ("ece", 0.0, 0.01)):
        claims.judge(
            f"expected {name.upper()} in [{low}, {high}], every seed",
            [result["expected"][name] for result in full],
            partial(_all_within, low, high),
            lambda values: f"{shown(values)}, {min(values):.4f} to {max(values):.4f}",
        )
    for where, suffix in (("", ""), (", on a user's first click on a listing", "_first_click")):
        # A result in which either stratum is too small has no difference.
        strata = [[over_truth([result], name + suffix) for name in ("warm", "cold_start")] for result in full]
        claims.judge(
            f"cold-start listings within 0.02 of warm ones{where}",
            [warm[0] - cold[0] for warm, cold in strata if warm and cold],
            lambda gaps: statistics.mean(gaps) <= 0.02,
        )
    claims.judge(
        "warm listings at least as the model without ids",
        paired(found, "city", "full", "no_ids", "expected", "strata", "warm", "auc"),
        at_least(0),
    )
    # Only a model with layers in the CVR task has a gate for it.
    mixed = [*full, *found.get(("city", "layers"), [])]
    apart = [result["gates_apart"] for result in mixed if "gates_apart" in result]
    between, users = ([each[name] for each in apart] for name in ("ita_tia", "cvr_users"))
    claims.judge(
        "gates differ between tasks",
        [each["cvr_ita"] for each in apart],
        lambda values: all(min(tasks) > 2 * of_users for *tasks, of_users in zip(values, between, users, strict=True)),
        lambda values: (
            f"on a listing CVR's and ITA's by {shown(values, 3)} (total variation), "
            f"ITA's and TIA's by {shown(between, 3)}, CVR's between two users by {shown(users, 3)}"
        ),
    )
    claims.judge(
        "alignment costs no CVR AUC in corrupted strata",
        paired(found, "city", "full", "no_alignment", "expected", "strata", "corrupted", "auc"),
        at_least(0),
    )
    gated = [result for results in found.values() for result in results if trained_gates(result)]
    claims.judge(
        "no dead expert in any run",
        [least_used(result) for result in gated],
        lambda values: min(values) > DEAD,
        lambda values: (
            f"least mean gate weight {min(values):.4f}, {_name(min(gated, key=least_used))} of {len(values)} runs"
        ),
    )
    _representation_claims(claims, found)
    _alignment_claims(claims, found)
    _log_claims(claims, found, "real", "real log", TUNED)
    for kind, title in (("log_a", "full log"), ("log_b", "full log, the other half")):
        _log_claims(claims, found, kind, title, [other for other in BASELINES if (kind, other) in found])
    _control_claims(claims, found)
    return claims


def _all_within(low: float, high: float, values: list[float]) -> bool:
    return low <= min(values) and max(values) <= high


def _content_claim(claims: _Claims, found: Results) -> None:
    models = ("full", "no_content", "displayed")
    columns = [{r["seed"]: r["expected"] for r in found.get(("city", model), [])} for model in models]
    seeds = sorted(set.intersection(*(set(column) for column in columns)))
    shares = [columns[2][seed]["attainable_share"] for seed in seeds]
    claims.judge(
        "content efficiency ≥ 0.65",
        [content_efficiency(*(column[seed]["auc"] for column in columns)) for seed in seeds],
        lambda values: statistics.mean(values) >= 0.65 and statistics.mean(shares) >= 0.5,
        lambda values: (
            f"{shown(values, 3)}; with the displayed content, the model has {shown(shares, 3)} of the attainable gap "
            f"({min(shares):.3f} to {max(shares):.3f}), 0.5 is required"
        ),
    )


def _name(result: Result) -> str:
    return f"{result['world']}-{result['model']}-{result['seed']}"


def trained_gates(result: Result) -> dict[str, list[float]]:
    """Return the mean weights of experts in each gate that was trained.

    Without alignment, ITA's and TIA's are not.
    """
    gates: dict[str, list[float]] = result.get("gates", {})
    aligned = gates and VARIANTS[result["model"]].options.get("alignment", True)
    return {task: weights for task, weights in gates.items() if aligned or task == "cvr"}


def least_used(result: Result) -> float:
    """Return the least mean weight of an expert."""
    return min(min(weights) for weights in trained_gates(result).values())


def _representation_claims(claims: _Claims, found: Results) -> None:
    models = {r["seed"]: r["representation"] for r in found.get(("city", "full"), []) if "representation" in r}
    frozen = {r["seed"]: r["representation"] for r in found.get(("city", "frozen"), [])}
    seeds = sorted(models.keys() & frozen.keys())

    def close_gap(way: str) -> None:
        def closed(*kinds: str) -> list[float]:
            best = [max(frozen[seed][kind][way]["r_at_1"] for kind in kinds) for seed in seeds]
            return [(models[seed][way]["r_at_1"] - rate) / (1 - rate) for seed, rate in zip(seeds, best, strict=True)]

        claims.judge(
            f"R@1 {way} closes 30 % of the gap",
            closed("ridge", "cca"),
            at_least(0.3),
            lambda values: f"{shown(values, 3)} of the better map's, {shown(closed('ridge'), 3)} of the ridge map's",
        )

    def compare(name: str, bar: float) -> None:
        above = {kind: [models[seed][name] - frozen[seed][kind][name] for seed in seeds] for kind in ("ridge", "cca")}
        claims.judge(
            f"{name} ≥ {bar} and above ridge",
            [models[seed][name] for seed in seeds],
            lambda values: statistics.mean(values) >= bar and min(above["ridge"]) > 0,
            lambda values: (
                f"{shown(values, 3)}, above ridge by {shown(above['ridge'], 3)}, above CCA by {shown(above['cca'], 3)}"
            ),
        )

    close_gap("image_to_text")
    close_gap("text_to_image")
    compare("mismatch_auc", 0.90)
    compare("swap_auc", 0.95)
    judged = [r["listing_quality"] for r in found.get(("city", "full"), []) if r.get("listing_quality")]
    shares = [each["worst_twentieth"] for each in judged]
    claims.judge(
        "listing quality: mismatch_auc ≥ 0.90",
        [each["mismatch_auc"] for each in judged],
        at_least(0.9),
        lambda values: f"{shown(values, 3)}; of the twentieth that is judged worst {shown(shares, 3)} are mismatched",
    )


def _alignment_claims(claims: _Claims, found: Results) -> None:
    """Add claims about alignment and representation, in the smaller city.

    They are about the effect of alignment on the model's own vectors, and on its `[IMG]` and
    `[TXT]` states compared by a map that is fitted to them.
    """
    judged = {
        key: [result for result in found.get(key, []) if "states" in result.get("representation", {})]
        for key in (("small", "full"), ("small", "no_alignment"))
    }
    for of, about in (((), ""), (("states",), ", states by a fitted map")):
        for name, path in (
            ("R@1 image_to_text", ("image_to_text", "r_at_1")),
            ("R@1 text_to_image", ("text_to_image", "r_at_1")),
            ("mismatch AUC", ("mismatch_auc",)),
        ):
            claims.judge(
                f"alignment: {name} above the model without it by 3 SE{about}",
                paired(judged, "small", "full", "no_alignment", "representation", *of, *path),
                surely_above,
                partial(shown, digits=3),
            )


def _log_claims(claims: _Claims, found: Results, kind: str, title: str, others: Iterable[str]) -> None:
    def compare(other: str, figure: str) -> None:
        above = paired(found, kind, "full", other, "test", figure)
        bar = bar_of(found, kind, other, figure, above) if above else math.nan
        claims.judge(
            f"{title}: {figure.replace('_', ' ').replace('auc', 'AUC')} above {other} by 2 SE of seeds and users",
            above,
            lambda values: statistics.mean(values) > bar,
            lambda values: f"{shown(values)}, must exceed {bar:.4f}",
        )

    for other in others:
        for figure in ("auc", "session_auc"):
            compare(other, figure)


def bar_of(found: Results, kind: str, other: str, figure: str, differences: list[float]) -> float:
    """Return twice the standard error of a difference.

    The difference is between CameNN and another model of a log. The error covers the choice of seeds, and of
    users.
    """
    drawn = [
        {r["seed"]: np.array(r["test"][f"{figure}_of_draws"]) for r in found[kind, model]} for model in ("full", other)
    ]
    of_users = statistics.mean(
        float(np.std(drawn[0][seed] - drawn[1][seed], ddof=1)) for seed in drawn[0].keys() & drawn[1].keys()
    )
    _, error = mean_and_error(differences)
    return 2 * math.hypot(0 if math.isnan(error) else error, of_users)


def _control_claims(claims: _Claims, found: Results) -> None:
    def compare(claim: str, kind: str, one: str, other: str, holds: Callable[[list[float]], bool]) -> None:
        claims.judge(f"control: {claim}", paired(found, kind, one, other, "expected", "auc"), holds)

    # A loss is allowed: a model that fits its noise loses.
    compare(
        "content that is worth nothing wins nothing",
        "worthless",
        "full",
        "no_content",
        lambda d: statistics.mean(d) < NOTHING,
    )
    compare("without corruption, alignment adds nothing", "clean", "full", "no_alignment", nothing)
    compare("photos of other listings cost AUC", "small", "full", "shuffled_patches", lambda d: min(d) > NOTHING)
    # A model trained on noise learns a random direction, and truth lies along few of them: 0.5
    # holds for the mean of many seeds only.
    compare("permuted labels teach little", "small", "full", "permuted_labels", lambda d: min(d) > 0.05)
    compare("shuffled alignment adds nothing", "small", "shuffled_alignment", "no_alignment", nothing)
    claims.judge(
        "control: shuffled alignment finds no swaps",
        [r["representation"]["swap_auc"] for r in found.get(("small", "shuffled_alignment"), [])],
        lambda values: max(values) < 0.6,
        lambda values: f"swap AUC {shown(values, 3)}",
    )
