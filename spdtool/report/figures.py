"""Figures: score against cost, training curves, and where the zeros are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spdtool.report.curves import Curves, PhaseCurves, Quantity
from spdtool.report.drawing import (
    INK,
    MARKERS,
    MUTED,
    PAPER,
    SERIES,
    escape_dollars,
    figure_with_axes,
    save_png,
    styled,
)
from spdtool.run.records import CalibrationPair, Role, StudentRow
from spdtool.sweep.summary import Spread, Summary, pareto_front, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (5.4, 3.6)  # inches: two figures side by side on a page
COSTS = {
    "nonzeros": "nonzero weights in the encoder's matrices",
    "latency": "time in its best exported form (dense teacher: 1)",
    "bytes": "bytes of its best exported form",
}
LOG_SCALE_LOSS = 100  # largest over smallest loss from which the axis is logarithmic
LOG_SCALE_COST = 4  # the same for a cost
ENGINEERING_COST = 1000  # cost from which an axis counts in k, M and G


def pareto_figures(summaries: Sequence[Summary]) -> Iterator[tuple[str, Figure]]:
    """Yield `(name, figure)` for each task and each cost that was measured for at least one of its students."""
    by_task: dict[str, list[Summary]] = {}
    for summary in summaries:
        if summary.student.mean is not None:
            by_task.setdefault(summary.task, []).append(summary)
    for task, scored in by_task.items():
        for cost in COSTS:
            measured = [summary for summary in scored if cost_of(summary, cost).mean is not None]
            if measured:
                yield f"pareto-{_file_name(task)}-{cost}", pareto_figure(task, cost, measured)


def save_pareto_figures(rows: Sequence[StudentRow], folder: Path) -> list[Path]:
    """Write the Pareto figures of a sweep as PNG files, as far as something was measured; return the files."""
    return [save_png(figure, folder / f"{name}.png") for name, figure in pareto_figures(summarise(rows))]


def cost_of(summary: Summary, cost: str) -> Spread:
    """Return a cost of `COSTS` over seeds."""
    costs = {"nonzeros": summary.nonzeros, "latency": summary.slowness, "bytes": summary.bytes}
    return costs[cost]


@styled
def pareto_figure(task: str, cost: str, summaries: Sequence[Summary]) -> Figure:
    """Draw score against a cost: a colour for each recipe, bars for deviations, the Pareto front, the teacher."""
    figure, (axes,) = figure_with_axes(SIZE)
    points = []
    teachers = []
    by_recipe: dict[str, list[Summary]] = {}
    for summary in summaries:
        by_recipe.setdefault(summary.recipe, []).append(summary)
        points.append((cost_of(summary, cost).mean or 0.0, _percentage(summary.student.mean)))
        if summary.teacher.mean is not None:
            teachers.append(summary.teacher.mean)
    front = pareto_front(points)
    # a step: between two points only the cheaper one can be had
    axes.plot(*zip(*front, strict=True), color=MUTED, linewidth=1.0, drawstyle="steps-post", label="Pareto front")
    for index, of_recipe in enumerate(by_recipe.values()):
        _draw_recipe(axes, index, cost, of_recipe)
    if teachers:
        _draw_teacher(axes, sum(teachers) / len(teachers), "dense teacher")
    _scale_cost_axis(axes, [cost for cost, _ in points])
    title = f"{escape_dollars(task)}: dev score against {cost}"
    axes.set(title=title, xlabel=COSTS[cost], ylabel="dev score x 100")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@styled
def training_figure(curves: Curves, teacher_score: float | None) -> Figure:
    """Draw scores, loss, sparsity with replacing rate, and learning rate of the phases, over their steps.

    Args:
        teacher_score: its dev score, drawn as a dashed line.
    """
    sparse = any(phase.sparsity or phase.replacing_rate for phase in curves.phases)
    heights: tuple[float, ...] = (2.2, 1.6, 1.0)
    if sparse:  # a dense teacher has no panel for its zeros
        heights = (2.2, 1.6, 1.3, 1.0)
    figure, axes = figure_with_axes((SIZE[0], sum(heights) + 0.9), heights)
    _draw_scores(axes[0], curves, teacher_score)
    _draw_losses(axes[1], curves)
    if sparse:
        _draw_sparsity(axes[2], curves)
    _draw_series(axes[-1], curves, "learning_rate", SERIES[3])
    axes[-1].set_ylabel("learning rate")
    axes[-1].set_xlabel("optimiser steps")
    axes[-1].ticklabel_format(axis="y", scilimits=(-2, 3))
    _mark_phases(axes, curves)
    return figure


@styled
def sparsity_figure(layers: Sequence[str], matrices: Sequence[str], values: Mapping[tuple[str, str], float]) -> Figure:
    """Draw the sparsity of each matrix (rows) in each layer (columns)."""
    from matplotlib.patches import Rectangle

    figure, (axes,) = figure_with_axes((max(SIZE[0], 1.6 + 0.42 * len(layers)), 1.1 + 0.34 * len(matrices)))
    lowest, highest = min(values.values()), max(values.values())
    span = max(highest - lowest, 0.01)  # equal sparsities are one colour, not a division by zero
    for row, matrix in enumerate(matrices):
        for column, layer in enumerate(layers):
            if (layer, matrix) not in values:
                continue
            value = values[layer, matrix]
            opacity = 0.15 + 0.6 * (value - lowest) / span  # dark text stays readable on it
            corner = (column - 0.46, row - 0.44)
            axes.add_patch(Rectangle(corner, 0.92, 0.88, facecolor=SERIES[0], alpha=opacity, linewidth=0))
            axes.text(column, row, f"{100 * value:.3g}", ha="center", va="center", fontsize=7.5)
    axes.set(xlim=(-0.5, len(layers) - 0.5), ylim=(len(matrices) - 0.5, -0.5), title="zeros in % of each matrix")
    axes.set_xticks(range(len(layers)), list(map(_layer_number, layers)))
    axes.set_yticks(range(len(matrices)), list(map(escape_dollars, matrices)))
    axes.set_xlabel("layer")
    axes.grid(visible=False)  # the cells are one
    axes.tick_params(length=0)
    return figure


@styled
def reliability_figure(pairs: Mapping[Role, CalibrationPair]) -> Figure:
    """Draw how often answers are right by how sure a model is; on the diagonal probabilities are frequencies.

    The line is after the temperature, the pale one before it; larger points are more answers.
    """
    figure, (axes,) = figure_with_axes(SIZE)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=":")
    for index, (role, pair) in enumerate(pairs.items()):
        for calibration, alpha, label in ((pair.raw, 0.35, f"{role}, raw"), (pair.calibrated, 1.0, role)):
            confidence = [entry.confidence for entry in calibration.bins]
            accuracy = [entry.accuracy for entry in calibration.bins]
            areas = [6 + 120 * entry.answers / calibration.answers for entry in calibration.bins]
            axes.plot(
                confidence, accuracy, color=SERIES[index], alpha=alpha, label=f"{label}: ECE {calibration.ece:.3f}"
            )
            axes.scatter(confidence, accuracy, areas, color=SERIES[index], alpha=alpha, marker=MARKERS[index])
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("probability")
    axes.set_ylabel("share that is right")
    axes.legend(loc="upper left", handlelength=1.6)
    return figure


def _draw_recipe(axes: Axes, index: int, cost: str, summaries: Sequence[Summary]) -> None:
    """Draw means with hollow markers, so that one under another is visible, and bars for the deviations."""
    x, x_error, y, y_error = [], [], [], []
    for summary in summaries:
        spread, score = cost_of(summary, cost), summary.student
        x.append(spread.mean or 0.0)
        x_error.append(spread.deviation or 0.0)
        y.append(_percentage(score.mean))
        y_error.append(_percentage(score.deviation))
    colour, marker = SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]
    axes.errorbar(x, y, xerr=x_error, yerr=y_error, fmt="none", ecolor=colour, elinewidth=1.0, capsize=2.5)
    axes.plot(
        x,
        y,
        color=colour,
        label=escape_dollars(summaries[0].recipe),
        marker=marker,
        markerfacecolor="none",
        markersize=6,
        markeredgewidth=1.6,
        linestyle=":",
        linewidth=0.9,
    )


def _draw_teacher(axes: Axes, score: float, label: str) -> None:
    axes.axhline(100 * score, color=INK, linestyle=(0, (5, 3)), linewidth=1.1, label=label)


def _scale_cost_axis(axes: Axes, costs: Sequence[float]) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, ScalarFormatter

    if min(costs) > 0 and max(costs) / min(costs) > LOG_SCALE_COST:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    if max(costs) >= ENGINEERING_COST:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    else:
        axes.xaxis.set_major_formatter(ScalarFormatter())


def _draw_scores(axes: Axes, curves: Curves, teacher_score: float | None) -> None:
    lines: tuple[tuple[Quantity, str, str, str, str], ...] = (
        ("dev", SERIES[0], "-", "o", "dev"),
        ("train", SERIES[1], "--", "s", "train (scored rows)"),
    )
    for quantity, colour, line, marker, label in lines:
        steps: list[int] = []
        scores: list[float] = []
        for phase in curves.phases:
            if phase.series(quantity):
                shifted, values = phase.shift(phase.series(quantity))
                steps += shifted
                scores += map(_percentage, values)
        if steps:
            axes.plot(steps, scores, line, color=colour, marker=marker, ms=3.5, label=label)
    if teacher_score is not None:
        _draw_teacher(axes, teacher_score, "teacher, dev")
    axes.set_ylabel("score x 100")
    _add_legend(axes)


def _draw_losses(axes: Axes, curves: Curves) -> None:
    """Draw every loss term over all phases, the total as a thick line."""
    names: dict[str, None] = {}
    values: list[float] = []
    for phase in curves.phases:
        names |= dict.fromkeys(phase.losses)
        for series in phase.losses.values():
            values += dict(series).values()
    for index, name in enumerate(names):
        colour, width = SERIES[(index - 1) % len(SERIES)], 0.9
        if name == "loss":
            colour, width = INK, 1.6
        label: str | None = escape_dollars(name)
        for phase in curves.phases:
            if phase.losses.get(name):
                axes.plot(*phase.shift(phase.losses[name]), label=label, color=colour, linewidth=width)
                label = None  # one entry in the legend, whatever the number of phases
    if values and min(values) > 0 and max(values) / min(values) > LOG_SCALE_LOSS:
        axes.set_yscale("log")
        axes.minorticks_off()  # their labels overlap in a low panel
    axes.set_ylabel("loss")
    _add_legend(axes)


def _draw_sparsity(axes: Axes, curves: Curves) -> None:
    """Draw sparsity, and the replacing rate where anything is grafted."""
    _draw_series(axes, curves, "sparsity", SERIES[2], "sparsity", drawstyle="steps-post")
    if curves.grafted:
        _draw_series(axes, curves, "replacing_rate", SERIES[4], "replacing rate", linestyle="--")
    axes.set_ylim(-0.05, 1.08)  # lines at 0 and 1 stay visible
    axes.set_ylabel("share")
    _add_legend(axes)


def _draw_series(
    axes: Axes,
    curves: Curves,
    quantity: Quantity,
    colour: str,
    label: str | None = None,
    drawstyle: str = "default",
    linestyle: str = "-",
) -> None:
    for phase in curves.phases:
        series = phase.series(quantity)
        if series:
            steps, values = phase.shift(series)
            axes.plot(steps, values, color=colour, label=label, drawstyle=drawstyle, linestyle=linestyle)
            label = None


def _add_legend(axes: Axes) -> None:
    """Add a legend above the panel, if anything in it has a label."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=5, borderaxespad=0.1, handlelength=1.6)


def _mark_phases(axes: Sequence[Axes], curves: Curves) -> None:
    """Draw a line between phases, their names in the top panel, and a light line at each prune event."""
    end = max(phase.start + phase.last_step for phase in curves.phases)
    axes[0].set_xlim(-0.02 * end, 1.02 * end)  # all panels share it
    for phase in curves.phases:
        for panel in axes:
            if phase.start:
                panel.axvline(phase.start, color=MUTED, linewidth=1.0)
            for step in phase.prune_events:
                panel.axvline(phase.start + step, color=SERIES[2], linewidth=0.7, alpha=0.45)
        if len(curves.phases) > 1 or not phase.finished:
            _write_name(axes[0], phase)


def _write_name(axes: Axes, phase: PhaseCurves) -> None:
    name = phase.name
    if not phase.finished:
        name += " (unfinished)"
    label = axes.annotate(
        name,
        (phase.start, 0),
        (3, 3),
        fontsize=8,
        color=MUTED,
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1.0},  # no line strikes the name through
        zorder=4,
    )
    label.set_in_layout(False)  # a long name must not make the panel narrower


def _layer_number(layer: str) -> str:
    match = re.search(r"(\d+)$", layer)
    return match.group(1) if match else escape_dollars(layer)


def _percentage(value: float | None) -> float:
    return 100 * (value or 0.0)


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text)
