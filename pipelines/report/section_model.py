"""The report's figures about the model.

They are metrics beside baselines, training curves, and drift.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pipelines.report import plots
from pipelines.report.data import Work
from pipelines.report.labels import BASELINE_TITLES, DIGITS, METRICS, Metric, phrase
from pipelines.report.scores import Drift
from pipelines.runs.gate import MOST_PSI

_CALM_PSI = 0.1
"""Below it a distribution counts as unchanged. Above MOST_PSI a night is gated."""


@dataclass(frozen=True, kw_only=True)
class MetricRow:
    """One metric of the model and of each baseline.

    `best` is the index of the best value, None where there is nothing to compare.
    """

    metric: Metric
    values: list[float | None]
    best: int | None


def _best(metric: Metric, values: list[float | None]) -> int | None:
    """Return the index of the best value.

    It is None where there are fewer than two, or several share it as it is printed.
    """
    ways: dict[str, Callable[[float], float]] = {
        "high": lambda value: -value,
        "low": lambda value: value,
        "one": lambda value: abs(value - 1),
    }
    badness = ways[metric.best]
    known = sorted((round(badness(value), DIGITS), place) for place, value in enumerate(values) if value is not None)
    return known[0][1] if len(known) > 1 and known[0][0] < known[1][0] else None


def quality(work: Work) -> dict[str, Any] | None:
    """Compare the model with its baselines.

    Returns the metrics, the AUCs to draw, and the calibration plot.
    """
    if work.metrics is None or "test" not in work.metrics:
        return None
    test, baselines = work.metrics["test"], work.metrics.get("baselines", {})
    names = list(baselines)
    columns = [test, *(baselines[name] for name in names)]
    rows = []
    for metric in METRICS:
        values = [column.get(metric.name) for column in columns]
        if any(value is not None for value in values):
            rows.append(MetricRow(metric=metric, values=values, best=_best(metric, values)))
    titles = ["CameNN", *(BASELINE_TITLES.get(name, phrase(name)) for name in names)]
    aucs = sorted(
        (
            (title, column["auc"])
            for title, column in zip(titles, columns, strict=True)
            if column.get("auc") is not None
        ),
        key=lambda pair: -pair[1],
    )
    top = max((auc for _, auc in aucs), default=0.5)
    # The axis runs from a coin toss to a round number above the best.
    scale = max(np.ceil((top - 0.5) * 20 + 0.4) / 20, 0.05)
    bars = [
        {"title": title, "auc": auc, "share": max(0.0, (auc - 0.5) / scale), "ours": title == "CameNN"}
        for title, auc in aucs
    ]
    bins = pd.DataFrame(work.metrics.get("reliability") or [])
    reliability = (
        plots.plot_reliability(*(bins[name].to_numpy() for name in ("predicted", "observed", "rows")))
        if len(bins)
        else None
    )
    return {
        "titles": titles,
        "rows": rows,
        "test": test,
        "bars": bars,
        "axis_end": 0.5 + scale,
        "reliability": reliability,
        "words": quality_words(aucs, rows, test),
    }


def quality_words(aucs: list[tuple[str, float]], rows: list[MetricRow], test: dict[str, Any]) -> list[str]:
    """Describe the figures in sentences."""
    found = []
    if aucs:
        ours = dict(aucs).get("CameNN")
        others = ", ".join(f"{title} {100 * auc:.0f}" for title, auc in aucs if title != "CameNN")
        if ours is not None:
            found.append(
                "Of 100 pairs of a bought and an unbought click, CameNN puts "
                f"{100 * ours:.0f} in the right order{f' ({others})' if others else ''}."
            )
    compared = [row for row in rows if row.best is not None]
    if compared:
        found.append(f"It has the best value in {sum(row.best == 0 for row in compared)} of {len(compared)} measures.")
    if test.get("pcoc") is not None:
        excess = round(test["pcoc"] - 1, 3)
        much = (
            f"{abs(excess):.1%} {'more' if excess > 0 else 'fewer'} purchases than"
            if excess
            else "as many purchases as"
        )
        found.append(f"In all, it predicts {much} there were.")
    return found


def training(work: Work) -> dict[str, Any] | None:
    """Plot the training run.

    Experts that receive hardly any routed pairs are named beside the plots.
    """
    if work.curves is None or work.curves.empty:
        return None
    experts = sorted(
        (name for name in work.curves.columns if name.startswith("expert_")),
        key=lambda name: int(name.removeprefix("expert_")),
    )
    last = work.curves[experts].dropna().tail(max(1, len(work.curves) // 10)).mean()
    fair = 1 / max(len(experts), 1)
    return {
        "conversion": plots.plot_conversion_loss(work.curves),
        "alignment": plots.plot_alignment_loss(work.curves),
        "total": plots.plot_total_loss(work.curves),
        "experts": plots.plot_expert_use(work.curves, experts) if experts else None,
        "idle": [phrase(name) for name in experts if last[name] < fair / 10],
        "steps": int(work.curves["step"].max()),
        "examples": work.curves["examples"].max() if "examples" in work.curves else None,
    }


def drift_words(drift: Drift) -> tuple[str, str]:
    """Describe the population stability index in words.

    Returns ('ok' | 'warn' | 'bad', words).
    """
    if drift.psi < _CALM_PSI:
        return "ok", "The scores are spread as they were last night."
    if drift.psi <= MOST_PSI:
        return "warn", "The scores have moved somewhat since last night, within what publication allows."
    return (
        "bad",
        "The scores have moved a lot since last night: look at what changed in the inputs before you rely on them.",
    )
