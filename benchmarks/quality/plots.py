"""The results as one picture.

It shows the comparisons, each seed as a dot, the mean as a bar.
"""

import io
import statistics
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from benchmarks.quality.figures import Result, Results, over_truth
from benchmarks.quality.job import BASELINES, FROZEN, POPULARITY

INK, MUTED, OURS, OTHERS, LEFT_OUT = "#1b1e23", "#6b7280", "#2563eb", "#94a3b8", "#93c5fd"
EXPERTS = ("#1d4ed8", "#60a5fa", "#0f766e", "#5eead4", "#b45309", "#fbbf24", "#7c3aed", "#c4b5fd")
STRATA = {
    "warm": "warm listings",
    "cold_start": "cold start",
    "warm_first_click": "warm, user's first click",
    "cold_start_first_click": "cold, user's first click",
    "no_prior_click": "no click before",
    "uncorrupted": "uncorrupted",
    "corrupted": "corrupted",
}
STRATA_MODELS = {"full": OURS, "no_content": LEFT_OUT, "lightgbm_content": OTHERS, "displayed": INK}
LABELS = {
    "full": "CameNN",
    "no_content": "without content",
    "displayed": "given displayed content",
    "no_alignment": "without alignment",
    "no_ids": "without ids",
    "no_history": "without history",
    "lightgbm": "LightGBM",
    "lightgbm_content": "LightGBM + embeddings",
    "mmoe": "MMOE",
    "popularity": "popularity",
}


def _dots(axes: Axes, place: float, values: Sequence[float], colour: str, mark: str = "o") -> None:
    axes.plot(values, [place] * len(values), mark, color=colour, ms=5, alpha=0.55, mew=0)
    axes.plot([statistics.mean(values)] * 2, [place - 0.3, place + 0.3], color=colour, lw=2.4, solid_capstyle="round")


def _models(axes: Axes, found: Results, kind: str, figure: Callable[[Result], float]) -> None:
    models = [model for of, model in found if of == kind and model in LABELS]
    models.sort(key=lambda model: statistics.mean(map(figure, found[kind, model])))
    for place, model in enumerate(models):
        colour = OURS if model == "full" else OTHERS if model in (*BASELINES, POPULARITY) else LEFT_OUT
        _dots(axes, place, [figure(result) for result in found[kind, model]], colour)
    axes.set_yticks(range(len(models)), [LABELS[model] for model in models])


def _city(axes: Axes, found: Results) -> None:
    _models(axes, found, "city", lambda result: float(result["expected"]["auc"]))
    truth = statistics.mean(
        r["expected"]["auc_of_truth"]
        for (kind, _), of in found.items()
        if kind == "city"
        for r in of
        if "expected" in r
    )
    axes.axvline(truth, color=INK, lw=1, ls=":")
    axes.annotate(
        "truth ",
        (truth, 0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 6),
        textcoords="offset points",
        ha="right",
        color=MUTED,
    )
    axes.set_title("Expected AUC, simulated city", loc="left")


def _real(axes: Axes, found: Results) -> None:
    _models(axes, found, "real", lambda result: float(result["test"]["auc"]))
    axes.set_title("AUC, real purchase log", loc="left")


def _strata(axes: Axes, found: Results) -> None:
    shown = {model: colour for model, colour in STRATA_MODELS.items() if ("city", model) in found}
    for number, (model, colour) in enumerate(shown.items()):
        for place, name in enumerate(STRATA):
            if values := over_truth(found["city", model], name):
                off = ((len(shown) - 1) / 2 - number) * 0.16
                axes.plot(
                    statistics.mean(values),
                    -place + off,
                    "o",
                    color=colour,
                    ms=6,
                    mew=0,
                    label=LABELS[model] if not place else None,
                )
    axes.set_yticks([-place for place in range(len(STRATA))], list(STRATA.values()))
    axes.set_title("Expected AUC over the truth's, by listing", loc="left")
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.08), ncols=2, frameon=False, labelcolor=MUTED)


def _representation(axes: Axes, found: Results) -> None:
    figures: dict[str, Callable[[Result], float]] = {
        "photo → title R@1": lambda piece: float(piece["image_to_text"]["r_at_1"]),
        "title → photo R@1": lambda piece: float(piece["text_to_image"]["r_at_1"]),
        "mismatch AUC": lambda piece: float(piece["mismatch_auc"]),
        "swap AUC": lambda piece: float(piece["swap_auc"]),
    }
    frozen = [result["representation"] for result in found.get(("city", FROZEN), [])]
    learned = [result["representation"] for result in found.get(("city", "full"), []) if "representation" in result]
    parts = [
        ("CameNN", learned, OURS),
        ("frozen CCA map", [r["cca"] for r in frozen], INK),
        ("frozen ridge map", [r["ridge"] for r in frozen], OTHERS),
    ]
    for number, (label, pieces, colour) in enumerate(parts):
        for place, figure in enumerate(figures.values()):
            if pieces:
                off = (1 - number) * 0.2
                axes.plot(
                    statistics.mean(map(figure, pieces)),
                    -place + off,
                    "o",
                    color=colour,
                    ms=6,
                    mew=0,
                    label=label if not place else None,
                )
    axes.set_yticks([-place for place in range(len(figures))], list(figures))
    axes.set_title("Photos and titles of held-out listings", loc="left")
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.08), ncols=3, frameon=False, labelcolor=MUTED)


def _ablations(axes: Axes, found: Results) -> None:
    full = {result["seed"]: result["expected"]["auc"] for result in found["small", "full"]}
    differences = {
        model: values
        for (kind, model), results in found.items()
        if kind == "small"
        and model != "full"
        # Permuted labels lose a hundred times as much as anything else: they are in the table only.
        and model != "permuted_labels"
        and (values := [r["expected"]["auc"] - full[r["seed"]] for r in results if r["seed"] in full])
    }
    order = sorted(differences, key=lambda model: statistics.mean(differences[model]))
    for place, model in enumerate(order):
        _dots(axes, place, differences[model], LEFT_OUT)
    axes.axvline(0, color=OURS, lw=1)
    axes.set_yticks(range(len(order)), [model.replace("_", " ") for model in order])
    axes.set_title("Expected AUC minus CameNN's, small city", loc="left")


def _gates(axes: Axes, found: Results) -> None:
    rows = [
        (
            f"{name}, {task.upper()}",
            [statistics.mean(weights) for weights in zip(*(r["gates"][task] for r in results), strict=True)],
        )
        for name, kind in (("city", "city"), ("real log", "real"))
        if (results := found.get((kind, "full")))
        for task in results[0]["gates"]
    ]
    for place, (_, weights) in enumerate(rows):
        left = 0.0
        for expert, weight in enumerate(weights):
            axes.barh(-place, weight, left=left, color=EXPERTS[expert % len(EXPERTS)], height=0.7, edgecolor="white")
            left += weight
    axes.set_yticks([-place for place in range(len(rows))], [name for name, _ in rows])
    axes.set_xlim(0, 1)
    axes.set_title("Mean weight of each expert", loc="left")


def draw(found: Results) -> bytes:
    """Draw the picture, PNG.

    A panel whose results are missing is left out.
    """
    panels: list[tuple[tuple[str, str], Callable[[Axes, Results], None]]] = [
        (("city", "full"), _city),
        (("real", "full"), _real),
        (("city", "full"), _strata),
        (("city", "full"), _representation),
        (("small", "full"), _ablations),
        (("city", "full"), _gates),
    ]
    there = [panel for needed, panel in panels if needed in found]
    rows = max((len(there) + 1) // 2, 1)
    figure = Figure(figsize=(12, 4.2 * rows), layout=ConstrainedLayoutEngine(h_pad=0.15, w_pad=0.15), facecolor="white")
    grid = figure.subplots(rows, 2, squeeze=False).ravel()
    for axes, panel in zip(grid, there, strict=False):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color("#d1d5db")
        axes.tick_params(length=0, colors=MUTED)
        axes.grid(axis="x", color="#e5e7eb", lw=0.8)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.title.set_color(INK)
        panel(axes, found)
    for axes in grid[len(there) :]:
        axes.set_axis_off()
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()
