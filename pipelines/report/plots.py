"""The report's plots.

They are inline SVG that takes its colours from the page, so that it is legible in light and dark
mode.
"""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

CHANCE_LOSS = float(np.log(2))
"""Binary cross-entropy of always predicting 0.5."""

_MOST_POINTS = 300
_SMOOTHING = 15

# Matplotlib writes these into the SVG as they are; the page's own colours take their place afterwards.
_INK, _MUTED, _GRID = "#000001", "#000002", "#000003"
_SERIES = tuple(f"#0000{number:02x}" for number in range(0xA1, 0xA9))
_VARIABLES = {_INK: "var(--ink)", _MUTED: "var(--muted)", _GRID: "var(--line)"} | {
    colour: f"var(--s{number})" for number, colour in enumerate(_SERIES, 1)
}

# Matplotlib types its settings by a literal of every name.
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "camenn",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 10.5,
    "axes.titlesize": 10,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.labelsize": 10.5,
    "axes.axisbelow": True,
    "text.color": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


def _new_axes(rows: int = 1, ratios: Sequence[float] = (1,)) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.5, 2.9), layout="constrained")
    grid = figure.subplots(rows, 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": ratios})
    axes = list(grid[:, 0])
    for axis in axes:
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(length=0)
        axis.grid(axis="y")
    return figure, axes


def _svg(figure: Figure, name: str, label: str) -> str:
    """Write a figure as an `<svg>` element.

    It has no fixed size, ids that are its own, and colours from the page.
    """
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\g<1>#{name}-", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a series to at most `_MOST_POINTS` points.

    Each is the mean of its neighbours: a long run must not make a heavy page.
    """
    if len(steps) <= _MOST_POINTS:
        return steps, values
    pieces = np.array_split(np.arange(len(steps)), _MOST_POINTS)
    return np.array([steps[p].mean() for p in pieces]), np.array([values[p].mean() for p in pieces])


def _draw(axis: Axes, curves: pd.DataFrame, column: str, colour: str, label: str) -> None:
    """Draw a noisy series.

    The raw series is faint, its running mean strong.
    """
    known = curves[["step", column]].dropna()
    if known.empty:
        return
    steps, values = _thin(known["step"].to_numpy(float), known[column].to_numpy(float))
    window = min(_SMOOTHING, max(1, len(values) // 8))
    smooth = pd.Series(values).rolling(window, center=True, min_periods=1).mean().to_numpy()
    if window > 1:
        axis.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    axis.plot(steps, smooth, color=colour, label=label, marker="o" if len(values) < 3 else None)


def plot_trend(
    values: Sequence[float | None], new_model: Sequence[bool], label: str, *, even: float | None = None
) -> str:
    """Plot one figure night after night.

    A dashed line shows where another model took over. `even`: a value to compare with. NaN and None
    are gaps.
    """
    with matplotlib.rc_context(_STYLE):
        figure, (axis,) = _new_axes()
        figure.set_size_inches(4.5, 2.0)
        nights = np.arange(len(values))
        known = np.array([np.nan if value is None else value for value in values], dtype=float)
        for place in np.flatnonzero(new_model):
            axis.axvline(place - 0.5, color=_MUTED, linewidth=0.9, linestyle=(0, (3, 3)))
        if even is not None:
            axis.axhline(even, color=_MUTED, linewidth=0.9)
        axis.plot(nights, known, color=_SERIES[0], marker="o", markersize=3.5 if len(known) < 40 else 2)
        axis.margins(y=0.25)
        axis.set_xlim(-0.6, len(values) - 0.4)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.xaxis.set_major_formatter(
            FuncFormatter(
                lambda place, _: f"{int(place) - len(values) + 1:+d}" if place < len(values) - 1 else "tonight"
            )
        )
        axis.yaxis.set_major_locator(MaxNLocator(4))
        return _svg(figure, re.sub(r"[^a-z]+", "-", label.lower()), label)


def _finish_steps(axis: Axes, ylabel: str, columns: int) -> None:
    axis.set_xlabel("training step")
    axis.set_ylabel(ylabel)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if axis.get_legend_handles_labels()[0]:
        axis.legend(
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            ncols=columns,
            handlelength=1.2,
            columnspacing=1.2,
            borderaxespad=0.2,
        )


def plot_conversion_loss(curves: pd.DataFrame) -> str:
    """Plot the loss of the conversion task.

    It is the training loss, and the log loss on the early-stop part where it was evaluated.
    """
    with matplotlib.rc_context(_STYLE):
        figure, (axis,) = _new_axes()
        _draw(axis, curves, "cvr", _SERIES[0], "training clicks")
        checked = curves[["step", "early_stop_log_loss"]].dropna()
        if len(checked):
            axis.plot(
                checked["step"],
                checked["early_stop_log_loss"],
                color=_SERIES[1],
                marker="o",
                markersize=4,
                label="held-out clicks (early stop)",
            )
            best = checked.sort_values("early_stop_log_loss").iloc[0]
            axis.annotate(
                f"best {best['early_stop_log_loss']:.4f}",
                (best["step"], best["early_stop_log_loss"]),
                xytext=(0, -14),
                textcoords="offset points",
                ha="right",
                fontsize=9,
                color=_SERIES[1],
            )
            axis.margins(y=0.15)
        _finish_steps(axis, "log loss", 2)
        return _svg(figure, "plot-conversion", "Conversion loss over training steps")


def plot_alignment_loss(curves: pd.DataFrame) -> str:
    """Plot the losses of the two matching tasks.

    The loss of a coin toss is shown beside them.
    """
    with matplotlib.rc_context(_STYLE):
        figure, (axis,) = _new_axes()
        for number, (column, label) in enumerate((("ita", "photo → title"), ("tia", "title → photo"))):
            _draw(axis, curves, column, _SERIES[number], label)
        axis.axhline(CHANCE_LOSS, color=_MUTED, linewidth=1, linestyle=(0, (3, 3)))
        axis.annotate(
            "coin toss",
            (1, CHANCE_LOSS),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8.5,
            color=_MUTED,
        )
        axis.margins(y=0.12)
        _finish_steps(axis, "loss", 2)
        return _svg(figure, "plot-alignment", "Alignment losses over training steps")


def plot_total_loss(curves: pd.DataFrame) -> str:
    """Plot the total loss that the optimiser minimised.

    It is shown with its contrastive term and the gates' balance and z losses, on a logarithmic
    scale.
    """
    with matplotlib.rc_context(_STYLE):
        figure, (axis,) = _new_axes()
        for number, (column, label) in enumerate(
            (("total", "total"), ("contrastive", "contrastive"), ("balance", "balance"), ("z", "z"))
        ):
            known = curves.assign(**{column: curves[column].where(curves[column] > 0)})
            _draw(axis, known, column, _SERIES[number], label)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        _finish_steps(axis, "loss, log scale", 4)
        return _svg(figure, "plot-total", "Total, contrastive, balance and z loss over training steps")


def plot_expert_use(curves: pd.DataFrame, experts: Sequence[str]) -> str:
    """Plot each expert's share of the routed pairs.

    Shares are stacked to one.

    Args:
        curves: has the columns `step` and those of the experts.
        experts: the columns `expert_0` ... in order.
    """
    with matplotlib.rc_context(_STYLE):
        figure, (axis,) = _new_axes()
        known = curves[["step", *experts]].dropna()
        series = [_thin(known["step"].to_numpy(float), known[name].to_numpy(float)) for name in experts]
        if len(known):
            shares = np.stack([values for _, values in series])
            shares = shares / np.maximum(shares.sum(axis=0), 1e-12)
            colours = [_SERIES[number % len(_SERIES)] for number in range(len(experts))]
            # Short, as eight of them stand in one line.
            labels = [f"expert {number}" if number == 0 else str(number) for number in range(len(experts))]
            axis.stackplot(series[0][0], shares, colors=colours, labels=labels, alpha=0.85, linewidth=0)
            axis.set_xlim(series[0][0][0], max(series[0][0][-1], series[0][0][0] + 1))
        axis.set_ylim(0, 1)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        _finish_steps(axis, "share of pairs", 8)
        return _svg(figure, "plot-experts", "Share of pairs routed to each expert over training steps")


def plot_reliability(predicted: np.ndarray, observed: np.ndarray, rows: np.ndarray) -> str:
    """Plot predicted against observed conversion rate per bin.

    There are 95 % Wilson intervals, and below it the rows of each bin.

    Args:
        predicted: float64 [bins], 0 to 1.
        observed: float64 [bins], 0 to 1.
        rows: int64 [bins].
    """
    with matplotlib.rc_context(_STYLE):
        figure, (axis, below) = _new_axes(2, (4, 1))
        n, z = np.maximum(rows, 1), 1.96
        centre = (observed + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * np.sqrt(observed * (1 - observed) / n + z * z / (4 * n * n))
        top = float(max(predicted.max(), (centre + half).max())) * 1.06
        axis.plot([0, top], [0, top], color=_MUTED, linewidth=1, linestyle=(0, (3, 3)))
        axis.vlines(predicted, centre - half, centre + half, color=_SERIES[0], linewidth=1.4, alpha=0.45)
        axis.plot(predicted, observed, "o", color=_SERIES[0], markersize=5)
        axis.set_xlim(0, top)
        axis.set_ylim(0, top)
        axis.set_ylabel("bought")
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(MaxNLocator(4))
            side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}" if top > 0.1 else f"{value:.1%}"))
        gaps = np.diff(np.sort(predicted))
        width = max(float(np.median(gaps)) * 0.7 if len(gaps) else 0.0, top * 0.008)
        below.bar(predicted, rows, width=width, color=_SERIES[0], alpha=0.45)
        below.set_ylabel("clicks")
        below.set_xlabel("predicted")
        below.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        return _svg(figure, "plot-reliability", "Predicted against observed conversion rate")


def plot_deciles(shares: np.ndarray) -> str:
    """Plot the share of tonight's scores in last night's deciles.

    The shares are float64 [10]. 10 % each = no drift.
    """
    with matplotlib.rc_context(_STYLE):
        figure, (axis,) = _new_axes()
        axis.bar(np.arange(1, len(shares) + 1), shares, color=_SERIES[0], width=0.72)
        axis.axhline(1 / len(shares), color=_MUTED, linewidth=1, linestyle=(0, (3, 3)))
        axis.set_xticks(range(1, len(shares) + 1))
        axis.set_xlabel("tenth of last night's scores, low to high")
        axis.set_ylabel("share tonight")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        return _svg(figure, "plot-deciles", "Share of tonight's scores in each decile of last night's")
