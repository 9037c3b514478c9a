"""Figures: score against what it costs, the course of a training, and where the zeros are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spdtool.report.curves import Curves, Phase
from spdtool.report.drawing import INK, MARKERS, MUTED, SERIES, figure_of, literal, styled
from spdtool.sweep.summary import Spread, Summary, pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (5.4, 3.6)
MEASURES = {
    "nonzeros": ("nonzeros", "nonzero weights in the encoder's matrices"),
    "latency": ("slowness", "time in its best exported form (dense teacher: 1)"),
    "bytes": ("bytes", "bytes of its best exported form"),
}
WIDE_LOSS = 100  # the same for a loss
WITH_UNITS = 1000  # cost from which an axis counts in k, M and G
WIDE_RANGE = 4  # largest over smallest cost from which the axis is logarithmic


def pareto_figures(summaries: Sequence[Summary]) -> Iterator[tuple[str, Figure]]:
    """`(name, figure)` for each task and each measure that at least one student of it has."""
    for task in dict.fromkeys(summary.task for summary in summaries):
        mine = [summary for summary in summaries if summary.task == task and summary.student.mean is not None]
        for measure, (field, _) in MEASURES.items():
            shown = [summary for summary in mine if getattr(summary, field).mean is not None]
            if shown:
                yield f"pareto-{_file_name(task)}-{measure}", pareto(task, measure, shown)


@styled
def pareto(task: str, measure: str, shown: Sequence[Summary]) -> Figure:
    """Score against a measure of `MEASURES`: a colour for each recipe, bars for deviations, the front, the teacher."""
    field, label = MEASURES[measure]
    figure, (axes,) = figure_of(SIZE)
    recipes = list(dict.fromkeys(summary.recipe for summary in shown))
    points = [(getattr(summary, field).mean, 100 * (summary.student.mean or 0)) for summary in shown]
    best = pareto_front(points)
    axes.plot(*zip(*best, strict=True), color=MUTED, linewidth=1.0, drawstyle="steps-post", label="Pareto front")
    for index, name in enumerate(recipes):
        _recipe(axes, index, name, [summary for summary in shown if summary.recipe == name], field)
    teacher = _mean([summary.teacher for summary in shown])
    if teacher is not None:
        axes.axhline(100 * teacher, color=INK, linestyle=(0, (5, 3)), linewidth=1.1, label="dense teacher")
    _cost_axis(axes, [cost for cost, _ in points])
    axes.set(title=f"{literal(task)}: dev score against {measure}", xlabel=label, ylabel="dev score x 100")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@styled
def training_curves(found: Curves, teacher: float | None) -> Figure:
    """Scores, loss, sparsity with replacing rate, and learning rate of some phases, over their steps.

    Args:
        teacher: its dev score, to be drawn as a dashed line.
    """
    sparse = any(phase.sparsity or phase.replacing_rate for phase in found.phases)
    heights = (2.2, 1.6, 1.3, 1.0) if sparse else (2.2, 1.6, 1.0)
    figure, axes = figure_of((SIZE[0], sum(heights) + 0.9), heights)
    _scores(axes[0], found, teacher)
    _losses(axes[1], found)
    if sparse:
        _shares(axes[2], found)
    _lines(axes[-1], found, "learning_rate", SERIES[3], None)
    axes[-1].set_ylabel("learning rate")
    axes[-1].set_xlabel("optimiser steps")
    axes[-1].ticklabel_format(axis="y", scilimits=(-2, 3))
    _mark_phases(axes, found)
    return figure


@styled
def sparsity_map(layers: Sequence[str], matrices: Sequence[str], values: Mapping[tuple[str, str], float]) -> Figure:
    """Sparsity of each matrix (rows) in each layer (columns)."""
    figure, (axes,) = figure_of((max(SIZE[0], 1.6 + 0.42 * len(layers)), 1.1 + 0.34 * len(matrices)))
    low, high = min(values.values()), max(values.values())
    reach = max(high - low, 0.01)
    for row, matrix in enumerate(matrices):
        for column, layer in enumerate(layers):
            value = values.get((layer, matrix))
            if value is not None:
                depth = 0.15 + 0.6 * (value - low) / reach
                axes.add_patch(_cell(column, row, depth))
                axes.text(column, row, f"{100 * value:.3g}", ha="center", va="center", fontsize=7.5)
    axes.set(xlim=(-0.5, len(layers) - 0.5), ylim=(len(matrices) - 0.5, -0.5), title="zeros in % of each matrix")
    axes.set_xticks(range(len(layers)), [literal(_short(layer)) for layer in layers])
    axes.set_yticks(range(len(matrices)), [literal(matrix) for matrix in matrices])
    axes.set_xlabel("layer")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    return figure


def _recipe(axes: Axes, index: int, name: str, mine: Sequence[Summary], field: str) -> None:
    """Means with hollow markers, so that one that lies under another is seen, and bars for the deviations."""
    costs: list[Spread] = [getattr(summary, field) for summary in mine]
    at = [cost.mean or 0 for cost in costs]
    scores = [100 * (summary.student.mean or 0) for summary in mine]
    across = [cost.deviation or 0 for cost in costs]
    up = [100 * (summary.student.deviation or 0) for summary in mine]
    colour = SERIES[index % len(SERIES)]
    axes.errorbar(at, scores, xerr=across, yerr=up, fmt="none", ecolor=colour, elinewidth=1.0, capsize=2.5)
    hollow: dict[str, Any] = {"marker": MARKERS[index % len(MARKERS)], "markerfacecolor": "none", "markersize": 6}
    style: dict[str, Any] = {"linestyle": ":", "linewidth": 0.9, "markeredgewidth": 1.6}
    axes.plot(at, scores, color=colour, label=literal(name), **hollow, **style)


def _cost_axis(axes: Axes, costs: Sequence[float]) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, ScalarFormatter

    if min(costs) > 0 and max(costs) / min(costs) > WIDE_RANGE:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(EngFormatter(sep="") if max(costs) >= WITH_UNITS else ScalarFormatter())


def _scores(axes: Axes, found: Curves, teacher: float | None) -> None:
    for field, colour, style, marker, name in (
        ("dev", SERIES[0], "-", "o", "dev"),
        ("train", SERIES[1], "--", "s", "train (scored rows)"),
    ):
        points = [(phase.start + step, 100 * value) for phase in found.phases for step, value in getattr(phase, field)]
        if points:
            axes.plot(*zip(*points, strict=True), style, color=colour, marker=marker, ms=3.5, label=name)
    if teacher is not None:
        axes.axhline(100 * teacher, color=INK, linestyle=(0, (5, 3)), linewidth=1.1, label="teacher, dev")
    axes.set_ylabel("score x 100")
    _legend(axes)


def _losses(axes: Axes, found: Curves) -> None:
    names = list(dict.fromkeys(name for phase in found.phases for name in phase.losses))
    for index, name in enumerate(names):
        whole = name == "loss"
        style: dict[str, Any] = {
            "linewidth": 1.6 if whole else 0.9,
            "color": INK if whole else SERIES[(index - 1) % len(SERIES)],
        }
        for number, phase in enumerate(phase for phase in found.phases if phase.losses.get(name)):
            steps, values = zip(*phase.losses[name], strict=True)
            axes.plot(
                [phase.start + step for step in steps], values, label=literal(name) if number == 0 else None, **style
            )
    if _many_decades(found):
        axes.set_yscale("log")
        axes.minorticks_off()
    axes.set_ylabel("loss")
    _legend(axes)


def _many_decades(found: Curves) -> bool:
    values = [value for phase in found.phases for line in phase.losses.values() for _, value in line]
    return bool(values) and min(values) > 0 and max(values) / min(values) > WIDE_LOSS


def _shares(axes: Axes, found: Curves) -> None:
    _lines(axes, found, "sparsity", SERIES[2], "sparsity", drawstyle="steps-post")
    _lines(axes, found, "replacing_rate", SERIES[4], "replacing rate", linestyle="--")
    axes.set_ylim(-0.05, 1.08)
    axes.set_ylabel("share")
    _legend(axes)


def _lines(axes: Axes, found: Curves, field: str, colour: str, name: str | None, **style: Any) -> None:
    for number, phase in enumerate(phase for phase in found.phases if getattr(phase, field)):
        steps, values = zip(*getattr(phase, field), strict=True)
        at = [phase.start + step for step in steps]
        axes.plot(at, values, color=colour, label=name if number == 0 else None, **style)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=5, borderaxespad=0.1, handlelength=1.6)


def _mark_phases(axes: Sequence[Axes], found: Curves) -> None:
    """A line between phases, their names under the top panel, and a light line at each prune event."""
    named = len(found.phases) > 1
    end = max(phase.start + phase.last for phase in found.phases)
    axes[0].set_xlim(-0.02 * end, 1.02 * end)
    for phase in found.phases:
        for panel in axes:
            if phase.start:
                panel.axvline(phase.start, color=MUTED, linewidth=1.0)
            for step in phase.events:
                panel.axvline(phase.start + step, color=SERIES[2], linewidth=0.7, alpha=0.45)
        if named or not phase.finished:
            _name(axes[0], phase)


def _name(axes: Axes, phase: Phase) -> None:
    name = phase.name if phase.finished else f"{phase.name} (unfinished)"
    place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    axes.annotate(name, (phase.start, 0), (3, 3), fontsize=8, color=MUTED, **place).set_in_layout(False)


def _cell(column: int, row: int, depth: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.46, row - 0.44), 0.92, 0.88, facecolor=SERIES[0], alpha=depth, linewidth=0)


def _short(layer: str) -> str:
    found = re.search(r"(\d+)$", layer)
    return found.group(1) if found else layer


def _mean(spreads: Sequence[Spread]) -> float | None:
    known = [each.mean for each in spreads if each.mean is not None]
    return sum(known) / len(known) if known else None


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text)
