"""Results as tables, and their publication."""

import math
from pathlib import Path

from benchmarks.quality.claims import bar_of, city_claims
from benchmarks.quality.figures import Result, Results, by_model, over_truth, p_value, paired, shown
from benchmarks.quality.job import FROZEN, OF
from benchmarks.quality.judge import holm
from benchmarks.quality.plots import draw
from benchmarks.quality.variants import VARIANTS
from pipelines.io.files import write_json

HOLDS = {True: "yes", False: "**no**", None: "-"}
BEGIN, END = "<!-- quality: begin -->", "<!-- quality: end -->"
LEARNED = ("photo → title R@1", "title → photo R@1", "mismatch AUC")
DOCS = Path(__file__).resolve().parents[2] / "docs" / "results"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def _city(found: Results) -> list[str]:
    models = [model for kind, model in found if kind == "city" and model != FROZEN]
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
    # Results from before a stratum was reported lack it.
    for name in max((result["expected"]["strata"] for model in models for result in found["city", model]), key=len):
        row = [name.replace("_", " ")]
        for model in models:
            ratios = over_truth(found["city", model], name)
            row.append(shown(ratios) if ratios else "-")
        strata_rows.append(row)
    lines += ["Expected AUC over that of the truth, by stratum:", "", *_table(["stratum", *models], strata_rows)]
    by_seed = {model: {r["seed"]: r["expected"]["auc"] for r in found["city", model]} for model in models}
    seeds = sorted(set().union(*by_seed.values()))
    seed_rows = [
        [model, *(f"{of[seed]:.4f}" if seed in of else "-" for seed in seeds)] for model, of in by_seed.items()
    ]
    return [*lines, "Expected AUC, seed by seed:", "", *_table(["model", *map(str, seeds)], seed_rows)]


def _representation(found: Results, kind: str) -> list[str]:
    rows = []
    for model in [m for k, m in found if k == kind]:
        results = [r["representation"] for r in found[kind, model] if r.get("representation")]
        if not results:
            continue
        parts = {"": results}
        if model == FROZEN:
            parts = {f" {name}": [r[name] for r in results] for name in ("ridge", "cca")}
        if states := [r["states"] for r in results if "states" in r]:
            parts[", states by a fitted map"] = states
        for part, pieces in parts.items():
            row = [f"{model}{part}"]
            for way in ("image_to_text", "text_to_image"):
                row += [shown([piece[way][f"r_at_{k}"] for piece in pieces], 3) for k in (1, 5)]
            for name in ("mismatch_auc", "swap_auc"):
                row.append(shown([p[name] for p in pieces], 3) if all(name in p for p in pieces) else "-")
            rows.append(row)
    if judged := [
        r["listing_quality"]["mismatch_auc"] for r in found.get((kind, "full"), []) if r.get("listing_quality")
    ]:
        rows.append(["listing quality of full", "-", "-", "-", "-", shown(judged, 3), "-"])
    head = ["", "photo → title R@1", "R@5", "title → photo R@1", "R@5", "mismatch AUC", "swap AUC"]
    return _table(head, rows) if rows else []


def _log(found: Results, log: str) -> list[str]:
    models = [model for kind, model in found if kind == log and model != FROZEN]
    rows = []
    for model in models:
        tests = [result["test"] for result in found[log, model]]
        names = (("auc", 4), ("gauc", 4), ("session_auc", 4), ("log_loss", 4), ("ne", 4), ("pcoc", 3), ("ece", 4))
        rows.append(
            [model, str(len(tests)), *(shown([test[name] for test in tests], digits) for name, digits in names)]
        )
    head = ["model", "seeds", "AUC", "GAUC", "session AUC", "log loss", "NE", "PCOC", "ECE"]
    return [*_table(head, rows), *_worth(found, log), *_strata_of_log(found, log, models)] if rows else []


def _worth(found: Results, log: str) -> list[str]:
    """Compare CameNN with the models of its parts."""
    rows = []
    for kind, model in found:
        if kind != log or model not in VARIANTS or model == "full":
            continue
        row = [model, VARIANTS[model].about]
        for figure in ("auc", "session_auc"):
            above = paired(found, log, "full", model, "test", figure)
            row.append(f"{shown(above)}, must exceed {bar_of(found, log, model, figure, above):.4f}" if above else "-")
        rows.append(row)
    lines = ["What CameNN is above models of some of its parts by, and twice the standard error of seeds and users:"]
    return [*lines, "", *_table(["model", "", "AUC", "session AUC"], rows)] if rows else []


def _curve(found: Results) -> list[str]:
    logs = sorted({kind for kind, _ in found if kind.startswith(f"log_a{OF}")}, key=lambda kind: -_part(kind))
    logs += ["log_a"] if ("log_a", "full") in found else []
    rows = []
    for log in logs:
        row = ["all" if log == "log_a" else f"the latest {log.partition(OF)[2]}"]
        for model in ("full", "lightgbm"):
            tests = [result["test"] for result in found.get((log, model), [])]
            row += [shown([test[name] for test in tests]) if tests else "-" for name in ("auc", "session_auc")]
        rows.append(row)
    head = ["training clicks", "CameNN: AUC", "session AUC", "LightGBM: AUC", "session AUC"]
    return _table(head, rows) if len(rows) > 1 else []


def _part(kind: str) -> int:
    return int(kind.partition(OF)[2].removesuffix("th"))


def _strata_of_log(found: Results, log: str, models: list[str]) -> list[str]:
    # Results from before strata were reported have none.
    tests = {
        model: of_seeds
        for model in models
        if (of_seeds := [result["test"] for result in found[log, model] if "strata" in result["test"]])
    }
    if not tests:
        return []
    any_test = next(iter(tests.values()))[0]
    rows = []
    for name, stratum in any_test["strata"].items():
        aucs = [[test["strata"][name]["auc"] for test in of_seeds] for of_seeds in tests.values()]
        rows.append(
            [
                name.replace("_", " "),
                f"{stratum['rows'] / any_test['rows']:.1%}",
                f"{stratum['orders'] / any_test['positives']:.1%}",
                *("-" if None in each else shown(each) for each in aucs),
            ]
        )
    return _table(["AUC by what is known", "of the clicks", "of the orders", *tests], rows)


def _ablations(found: Results) -> list[str]:
    models = [model for kind, model in found if kind == "small" and model not in ("full", FROZEN)]
    if not models or ("small", "full") not in found:
        return []
    differences = {model: paired(found, "small", model, "full", "expected", "auc") for model in models}
    p_values = holm({m: p for m, d in differences.items() if not math.isnan(p := p_value(d))})
    rows = [["full", VARIANTS["full"].about, "", "", *_learned(found["small", "full"])]]
    rows += [
        [model, VARIANTS[model].about, shown(values), _of(p_values, model), *_learned(found["small", model])]
        for model, values in differences.items()
        if values
    ]
    return _table(["model", "", "expected AUC minus full's", "p (Holm)", *LEARNED], rows)


def _learned(results: list[Result]) -> list[str]:
    pieces = [result["representation"] for result in results if "representation" in result]
    if not pieces:
        return ["-"] * len(LEARNED)
    ways = [shown([piece[way]["r_at_1"] for piece in pieces], 3) for way in ("image_to_text", "text_to_image")]
    return [*ways, shown([piece["mismatch_auc"] for piece in pieces], 3)]


def _of(p_values: dict[str, float], model: str) -> str:
    return f"{p_values[model]:.3f}" if model in p_values else "-"


def _gates(found: Results) -> list[str]:
    rows = []
    for kind in ("city", "real"):
        for result in found.get((kind, "full"), []):
            for task, weights in result["gates"].items():
                rows.append([result["world"], str(result["seed"]), task.upper(), *(f"{w:.3f}" for w in weights)])
    experts = max((len(row) - 3 for row in rows), default=0)
    head = ["log", "seed", "gate", *(f"expert {number}" for number in range(1, experts + 1))]
    return _table(head, rows) if rows else []


def publish(results: list[Result], work: Path, *, docs: bool) -> None:
    """Write WORK/quality.md, quality.png and claims.json.

    With `docs`, the tables are also written between two marks of docs/results/quality.md, and the
    picture beside it.
    """
    found = by_model(results)
    claims = city_claims(found)
    aligned_or_not = {key: results for key, results in found.items() if key[1] in ("full", "no_alignment")}
    lines = ["![Figures of the models](quality.png)", "", "### Claims", ""]
    lines += _table(
        ["claim", "holds", "figure", "seeds"],
        [[name, HOLDS[claim.holds], claim.figure, str(claim.seeds)] for name, claim in claims.items()],
    )
    for title, part in (
        ("Known truth: the default city", _city(found)),
        ("Representation, held-out listings of the city", _representation(found, "city")),
        ("The full log, half a", _log(found, "log_a")),
        ("The full log: what more clicks are worth", _curve(found)),
        ("The full log, half b", _log(found, "log_b")),
        ("The real log", _log(found, "real")),
        ("Representation, held-out listings of the real log", _representation(found, "real")),
        ("Ablations and controls, a city of 60,000 clicks", _ablations(found)),
        ("Representation in that city, with and without alignment", _representation(aligned_or_not, "small")),
        ("Mean weights of the experts", _gates(found)),
    ):
        if part:
            lines += [f"### {title}", "", *part]
    text = "\n".join(lines)
    (work / "quality.md").write_text(text)
    write_json(str(work / "claims.json"), {name: claim._asdict() for name, claim in claims.items()})
    picture = draw(found)
    (work / "quality.png").write_bytes(picture)
    print(text)
    if docs:
        path = DOCS / "quality.md"
        before, rest = path.read_text().split(BEGIN)
        path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.split(END)[1]}")
        (DOCS / "quality.png").write_bytes(picture)
