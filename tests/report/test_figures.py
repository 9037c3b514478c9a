"""Figures: their contents, PNG files, and inline SVG that uses the colours of the page and no external address."""

from __future__ import annotations

import re
import xml.etree.ElementTree as tree

import pytest

from spdtool.report import drawing
from spdtool.report import figures as plots
from spdtool.report.curves import Curves, PhaseCurves
from spdtool.run.records import StudentRow
from spdtool.sweep import summary


def student_row(task, recipe, sparsity, seed, **fields):
    return StudentRow(task=task, recipe=recipe, sparsity=sparsity, seed=seed, run="r", status="done", **fields)


def summaries(**fields):
    rows = [
        student_row("toy", recipe, sparsity, seed, teacher=0.9, student=score + 0.01 * seed, nonzeros=count, **fields)
        for recipe, sparsity, score, count in (("a", 0.5, 0.8, 500), ("a", 0.9, 0.7, 100), ("b", 0.9, 0.6, 100))
        for seed in (0, 1)
    ]
    return summary.summarise(rows)


def course():
    dense = PhaseCurves("prune", 0, True, [(4, 0.5), (8, 0.7)], [(4, 0.6), (8, 0.8)], {"loss": [(2, 1.0), (8, 0.1)]})
    dense.sparsity, dense.replacing_rate, dense.learning_rate = [(2, 0.0), (8, 0.5)], [(2, 0.8)], [(2, 1e-3), (8, 0.0)]
    dense.prune_events = [2, 6]
    return Curves([dense, PhaseCurves("distill", 8, False, [(4, 0.75)], losses={"loss": [(4, 0.05)]}, last_step=4)])


def test_a_pareto_plot_has_a_colour_for_each_recipe_the_front_and_the_teacher():
    (axes,) = plots.pareto_figure("toy", "nonzeros", summaries()).axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert {"a", "b", "Pareto front", "dense teacher"} <= lines.keys()
    assert lines["a"].get_color() != lines["b"].get_color()
    assert lines["a"].get_marker() != lines["b"].get_marker()
    assert list(lines["Pareto front"].get_xdata()) == [100, 500]
    assert list(lines["Pareto front"].get_ydata()) == pytest.approx([70.5, 80.5])
    assert list(lines["dense teacher"].get_ydata()) == pytest.approx([90, 90])
    assert axes.get_xscale() == "log"


@pytest.mark.parametrize(
    ("fields", "measures"),
    [({}, ["nonzeros"]), ({"speed": 2.0, "bytes": 10}, ["nonzeros", "latency", "bytes"])],
)
def test_there_is_a_plot_for_each_measure_in_the_rows(fields, measures):
    assert [name for name, _ in plots.pareto_figures(summaries(**fields))] == [
        f"pareto-toy-{measure}" for measure in measures
    ]


def test_times_have_plain_tick_labels_and_bytes_thousands():
    for measure, tick in (("latency", "0.5"), ("bytes", "40k")):
        figure = plots.pareto_figure("toy", measure, summaries(speed=2.0, bytes=40_000))
        figure.draw_without_rendering()
        assert any(label.get_text().startswith(tick) for label in figure.axes[0].get_xticklabels())


def test_a_course_shows_scores_loss_shares_and_learning_rate_on_one_axis_of_steps():
    axes = plots.training_figure(course(), teacher_score=0.9).axes
    assert [panel.get_ylabel() for panel in axes] == ["score x 100", "loss", "share", "learning rate"]
    lines = {line.get_label(): line for line in axes[0].get_lines()}
    assert list(lines["dev"].get_xdata()) == [4, 8, 12]
    assert list(lines["train (scored rows)"].get_ydata()) == pytest.approx([60, 80])
    assert len({panel.get_xlim() for panel in axes}) == 1
    events = [line for line in axes[3].get_lines() if list(line.get_xdata()) in ([2, 2], [6, 6])]
    assert len(events) == 2


def test_a_course_without_zeros_has_no_panel_for_them():
    assert len(plots.training_figure(Curves([PhaseCurves("teacher", dev=[(1, 0.5)], last_step=1)]), None).axes) == 3


def test_svg_takes_its_colours_from_the_page_and_names_no_address():
    text = drawing.to_svg(plots.pareto_figure("toy", "nonzeros", summaries()), "one", 'about "it"')
    assert "http" not in text
    assert not any(colour in text for colour in drawing.VARIABLES)
    assert "var(--series-0)" in text
    assert 'aria-label="about &quot;it&quot;"' in text
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert ids
    assert all(name.startswith("one-") for name in ids)
    used = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', text)
    assert {a or b for a, b in used} <= set(ids)
    assert tree.fromstring(text).tag == "svg"


def test_names_with_signs_of_formulas_and_markup_are_text():
    hostile = [student_row("<b>$x_$&", "$\\frac", 0.9, 0, teacher=0.9, student=0.8, nonzeros=10)]
    ((name, figure),) = plots.pareto_figures(summary.summarise(hostile))
    assert re.fullmatch(r"[\w.-]+", name)
    text = drawing.to_svg(figure, name, "<b>")
    assert "<b>" not in text
    assert "&lt;b&gt;$x_$&amp;" in text


def test_every_colour_of_a_figure_is_a_variable_of_the_page_by_day_and_by_night():
    from importlib.resources import files

    style = files("spdtool.report").joinpath("page.css").read_text("utf-8")
    for variable in drawing.VARIABLES.values():
        assert len(re.findall(rf"--{variable}: #", style)) == 2


def test_png_files_are_images(tmp_path):
    values = {("l.0", "query"): 0.5, ("l.0", "key"): 0.9, ("l.1", "query"): 0.7}
    figure = plots.sparsity_figure(["l.0", "l.1"], ["query", "key"], values)
    assert {text.get_text() for text in figure.axes[0].texts} == {"50", "90", "70"}
    file = drawing.save_png(figure, tmp_path / "deep" / "map.png")
    assert file.read_bytes().startswith(b"\x89PNG")
