"""From results to tables, plots and claims that hold or do not."""

import json
import math
import re
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.judge import content_efficiency, holm
from benchmarks.quality.variants import VARIANTS

Result = dict[str, Any]
Results = dict[tuple[str, str], list[Result]]
"""By (kind of world: its name without the seed, model), ordered by seed"""

BEGIN, END = "<!-- quality: begin -->", "<!-- quality: end -->"
DOCS = Path(__file__).resolve().parents[2] / "docs"


def by_model(results: list[Result]) -> Results:
    """Results grouped, ordered by seed."""
    found: Results = defaultdict(list)
    for result in sorted(results, key=lambda result: result["seed"]):
        found[re.sub(r"\d+$", "", result["world"]), result["model"]].append(result)
    return found


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """(mean, its standard error; NaN for a single value)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def shown(values: list[float], digits: int = 4) -> str:
    """Mean ± standard error."""
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def paired(found: Results, kind: str, one: str, other: str, *path: str) -> list[float]:
    """Differences of a figure between two models, seed by seed."""
    values = [{r["seed"]: _figure(r, path) for r in found.get((kind, model), [])} for model in (one, other)]
    return [values[0][seed] - values[1][seed] for seed in sorted(values[0].keys() & values[1].keys())]


def _figure(result: Result, path: tuple[str, ...]) -> Any:
    value: Any = result
    for name in path:
        value = value[name]
    return value


def surely_above(differences: list[float], errors: float = 3.0) -> bool:
    """Whether all differences have one sign, and their mean is more than some standard errors above 0."""
    mean, error = mean_and_error(differences)
    return len(differences) > 1 and min(differences) > 0 and mean > errors * error


def sign_p_value(differences: list[float]) -> float:
    """Two-sided p value of a mean difference, by Student's t."""
    mean, error = mean_and_error(differences)
    if math.isnan(error):
        return math.nan
    if error == 0:
        return 0.0 if mean else 1.0
    t, degrees = abs(mean / error), len(differences) - 1
    # The t distribution's tail by numerical integration: no library of statistics is needed for this alone.
    grid = np.linspace(0, t, 20_001)
    density = (1 + grid**2 / degrees) ** (-(degrees + 1) / 2)
    scale = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
    return max(0.0, 1 - 2 * scale * float(np.trapezoid(density, grid)))


def quick_claims(results: list[Result]) -> tuple[dict[str, Any], list[str]]:
    """(the figures of --quick, the claims that do not hold)."""
    found = by_model(results)

    def expected(model: str) -> float:
        return float(found["quick", model][0]["expected"]["auc"])

    figures: dict[str, Any] = {
        "expected_auc": {model: round(expected(model), 4) for kind, model in found if kind == "quick"},
        "expected_pcoc": round(found["quick", "full"][0]["expected"]["pcoc"], 3),
    }
    claims = {
        "CameNN ranks better than chance": expected("full") > 0.6,
        # What noise teaches is a direction by chance, and truth lies along few of them: 0.5 holds for the mean of many seeds only (0.577 was seen).
        "labels that mean nothing teach little": expected("full") - expected("permuted_labels") > 0.05,
        "no expert is dead": min(min(g) for g in found["quick", "full"][0]["gates"].values()) > 0.001,
    }
    if ("real", "full") in found:
        full, trees = found["real", "full"][0], found["real", "lightgbm"][0]
        figures["beats_lightgbm"] = round(full["test"]["auc"] - trees["test"]["auc"], 4)
        claims["CameNN is above LightGBM on the real log"] = figures["beats_lightgbm"] > 0
    else:
        figures["beats_lightgbm"] = None
    figures["claims"] = claims
    return figures, [claim for claim, holds in claims.items() if not holds]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def _city(found: Results) -> list[str]:
    models = [model for kind, model in found if kind == "city" and model != "frozen"]
    if not models:
        return []
    rows = []
    for model in models:
        results = found["city", model]
        expected = [result["expected"] for result in results]
        rows.append(
            [
                model,
                str(len(results)),
                shown([e["auc"] for e in expected]),
                shown([e["attainable_share"] for e in expected], 3),
                shown(
                    [e["strata"]["uniform_sessions"]["auc"] for e in expected if e["strata"]["uniform_sessions"]["auc"]]
                ),
                shown([r["test"]["auc"] for r in results]),
                shown([r["test"]["log_loss"] for r in results]),
                shown([e["pcoc"] for e in expected], 3),
                shown([e["ece"] for e in expected]),
            ]
        )
    truth = [result["expected"]["auc_of_truth"] for result in found["city", models[0]]]
    head = [
        "model",
        "seeds",
        "expected AUC",
        "attainable share",
        "uniform sessions",
        "AUC",
        "log loss",
        "expected PCOC",
        "expected ECE",
    ]
    lines = [f"Expected AUC of the true probabilities: {shown(truth)}.", "", *_table(head, rows)]
    strata_rows = []
    for name in found["city", models[0]][0]["expected"]["strata"]:
        row = [name.replace("_", " ")]
        for model in models:
            ratios = [
                s["auc"] / s["auc_of_truth"]
                for r in found["city", model]
                if (s := r["expected"]["strata"][name])["auc"] is not None
            ]
            row.append(shown(ratios) if ratios else "-")
        strata_rows.append(row)
    return [*lines, "Expected AUC over that of the truth, by stratum:", "", *_table(["stratum", *models], strata_rows)]


def _representation(found: Results, kind: str) -> list[str]:
    rows = []
    for model in [m for k, m in found if k == kind]:
        results = [r["representation"] for r in found[kind, model] if r.get("representation")]
        if not results:
            continue
        parts = {"": results} if model != "frozen" else {name: [r[name] for r in results] for name in ("ridge", "cca")}
        for part, pieces in parts.items():
            row = [f"{model} {part}".strip()]
            for way in ("image_to_text", "text_to_image"):
                row += [shown([piece[way][f"r_at_{k}"] for piece in pieces], 3) for k in (1, 5)]
            for name in ("mismatch_auc", "swap_auc"):
                row.append(shown([p[name] for p in pieces], 3) if all(name in p for p in pieces) else "-")
            rows.append(row)
    head = ["", "photo → title R@1", "R@5", "title → photo R@1", "R@5", "mismatch AUC", "swap AUC"]
    return _table(head, rows) if rows else []


def _real(found: Results) -> list[str]:
    models = [model for kind, model in found if kind == "real" and model != "frozen"]
    rows = []
    for model in models:
        tests = [result["test"] for result in found["real", model]]
        names = (("auc", 4), ("gauc", 4), ("session_auc", 4), ("log_loss", 4), ("ne", 4), ("pcoc", 3), ("ece", 4))
        rows.append(
            [model, str(len(tests)), *(shown([test[name] for test in tests], digits) for name, digits in names)]
        )
    head = ["model", "seeds", "AUC", "GAUC", "session AUC", "log loss", "NE", "PCOC", "ECE"]
    return _table(head, rows) if rows else []


def _ablations(found: Results) -> list[str]:
    models = [model for kind, model in found if kind == "small" and model not in ("full", "frozen")]
    if not models or ("small", "full") not in found:
        return []
    differences = {model: paired(found, "small", model, "full", "expected", "auc") for model in models}
    p_values = holm({m: p for m, d in differences.items() if not math.isnan(p := sign_p_value(d))})
    rows = [
        [model, VARIANTS[model].about, shown(values), f"{p_values[model]:.3f}" if model in p_values else "-"]
        for model, values in differences.items()
        if values
    ]
    return _table(["model", "", "expected AUC minus full's", "p (Holm)"], rows)


def city_claims(found: Results) -> dict[str, tuple[bool, str]]:
    """Claims about the city and the real log: (whether they hold, by what figure); those without results are left out."""
    claims: dict[str, tuple[bool, str]] = {}
    full = found.get(("city", "full"), [])
    if {("city", m) for m in ("full", "no_content", "displayed")} <= set(found):
        columns = {
            m: {r["seed"]: r["expected"]["auc"] for r in found["city", m]} for m in ("full", "no_content", "displayed")
        }
        seeds = sorted(set.intersection(*(set(c) for c in columns.values())))
        values = [content_efficiency(*(columns[m][seed] for m in columns)) for seed in seeds]
        claims["content efficiency ≥ 0.65"] = (statistics.mean(values) >= 0.65, shown(values, 3))
    for other in ("lightgbm_content", "mmoe"):
        if differences := paired(found, "city", "full", other, "expected", "auc"):
            claims[f"expected AUC above {other} by 3 SE"] = (surely_above(differences), shown(differences))
    if full:
        for name, low, high in (("pcoc", 0.97, 1.03), ("ece", 0.0, 0.01)):
            values = [result["expected"][name] for result in full]
            claims[f"expected {name.upper()} in [{low}, {high}]"] = (
                low <= statistics.mean(values) <= high,
                shown(values),
            )
        ratio = {
            part: [
                s["auc"] / s["auc_of_truth"] for r in full if (s := r["expected"]["strata"][part])["auc"] is not None
            ]
            for part in ("cold_start", "warm")
        }
        if all(ratio.values()):
            gap = statistics.mean(ratio["warm"]) - statistics.mean(ratio["cold_start"])
            claims["cold-start listings within 0.02 of warm ones"] = (gap <= 0.02, f"{gap:.4f}")
        dead = min(min(gate) for result in full for gate in result["gates"].values())
        claims["no dead expert"] = (dead > 0.001, f"least mean gate weight {dead:.4f}")
        apart = [
            0.5 * sum(abs(a - b) for a, b in zip(r["gates"]["cvr"], r["gates"]["ita"], strict=True))
            for r in full
            if "ita" in r["gates"]
        ]
        if apart:
            claims["gates differ between tasks"] = (min(apart) > 0.01, f"total variation {shown(apart, 3)}")
    if differences := paired(found, "city", "full", "no_alignment", "expected", "strata", "corrupted", "auc"):
        mean, error = mean_and_error(differences)
        holds = mean > (0 if math.isnan(error) else -2 * error)
        claims["alignment costs no CVR AUC in corrupted strata"] = (holds, shown(differences))
    claims |= _representation_claims(found) | _real_claims(found)
    return claims


def _representation_claims(found: Results) -> dict[str, tuple[bool, str]]:
    claims: dict[str, tuple[bool, str]] = {}
    models = {r["seed"]: r["representation"] for r in found.get(("city", "full"), []) if "representation" in r}
    frozen = {r["seed"]: r["representation"] for r in found.get(("city", "frozen"), [])}
    seeds = sorted(models.keys() & frozen.keys())
    for way in ("image_to_text", "text_to_image") if seeds else ():
        closed = []
        for seed in seeds:
            best = max(frozen[seed][name][way]["r_at_1"] for name in ("ridge", "cca"))
            closed.append((models[seed][way]["r_at_1"] - best) / (1 - best))
        claims[f"R@1 {way} closes 30 % of the gap"] = (statistics.mean(closed) >= 0.3, shown(closed, 3))
    for name, bar in (("mismatch_auc", 0.90), ("swap_auc", 0.95)) if seeds else ():
        values = [models[seed][name] for seed in seeds]
        above = [models[seed][name] - frozen[seed]["ridge"][name] for seed in seeds]
        claims[f"{name} ≥ {bar} and above ridge"] = (
            statistics.mean(values) >= bar and min(above) > 0,
            f"{shown(values, 3)}, above ridge by {shown(above, 3)}",
        )
    return claims


def _real_claims(found: Results) -> dict[str, tuple[bool, str]]:
    claims: dict[str, tuple[bool, str]] = {}
    differences = paired(found, "real", "full", "lightgbm", "test", "auc")
    if differences:
        drawn = {
            model: {r["seed"]: np.array(r["test"]["auc_of_draws"]) for r in found["real", model]}
            for model in ("full", "lightgbm")
        }
        of_users = statistics.mean(
            float(np.std(drawn["full"][seed] - drawn["lightgbm"][seed], ddof=1))
            for seed in drawn["full"].keys() & drawn["lightgbm"].keys()
        )
        mean, error = mean_and_error(differences)
        bar = 2 * math.hypot(0 if math.isnan(error) else error, of_users)
        claims["AUC above tuned LightGBM on the real log"] = (mean > bar, f"{mean:+.4f}, must exceed {bar:.4f}")
        sessions = paired(found, "real", "full", "lightgbm", "test", "session_auc")
        claims["session AUC above tuned LightGBM"] = (statistics.mean(sessions) > 0, shown(sessions))
    return claims


def write_tables(results: list[Result], work: Path, *, docs: bool) -> None:
    """WORK/quality.md and WORK/claims.json; with `docs` the same between two marks of docs/results.md."""
    found = by_model(results)
    claims = city_claims(found)
    lines = ["### Claims", ""]
    lines += _table(
        ["claim", "holds", "figure"],
        [[c, "yes" if holds else "**no**", figure] for c, (holds, figure) in claims.items()],
    )
    for title, part in (
        ("Known truth: the default city", _city(found)),
        ("Representation, held-out listings of the city", _representation(found, "city")),
        ("The real log", _real(found)),
        ("Representation, held-out listings of the real log", _representation(found, "real")),
        ("Ablations and controls, a city of 60,000 clicks", _ablations(found)),
    ):
        if part:
            lines += [f"### {title}", "", *part]
    text = "\n".join(lines)
    (work / "quality.md").write_text(text)
    (work / "claims.json").write_text(
        json.dumps({name: {"holds": h, "figure": f} for name, (h, f) in claims.items()}, indent=1)
    )
    print(text)
    if docs:
        path = DOCS / "results.md"
        before, rest = path.read_text().split(BEGIN)
        path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.split(END)[1]}")
