"""The verdict follows the figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from spdtool.bench import report
from spdtool.bench.latency import Engine, Shape, Timing

SMALL, LARGE = (1, 16), (8, 64)


def timing(name: str, rounds: dict[Shape, Sequence[float]], **how: Any) -> Timing:
    engine = Engine(name, "onnxruntime", "somewhere", vocabulary=9)
    facts: dict[str, Any] = {"provider": "CPU", "nodes": {"CPU": {"MatMul": 3, "Add": 2}}, "resident": 2**20}
    return Timing(engine, rounds={shape: list(ms) for shape, ms in rounds.items()}, **facts | {"peak": 3 * 2**20} | how)


def rounds(factor: float, count: int = 20, noise: float = 0.02, seed: int = 0) -> Timing:
    drawn = 1 + noise * np.random.default_rng(seed).standard_normal((2, count))
    return timing("x", {SMALL: factor * drawn[0], LARGE: 10 * factor * drawn[1]})


def test_summary_is_percentiles_and_throughput() -> None:
    found = report.summary([1.0, 2.0, 3.0, 4.0], batch=8)
    assert found == pytest.approx({"p50": 2.5, "p90": 3.7, "p95": 3.85, "p99": 3.97, "rows_per_second": 3200})


@pytest.mark.parametrize(("count", "rank"), [(1, 0), (2, 0), (5, 0), (6, 0), (9, 1), (20, 5), (100, 39), (2000, 955)])
def test_interval_of_the_median_is_that_of_the_sign_test(count: int, rank: int) -> None:
    assert report._rank(count) == rank


def test_ratio_is_paired_round_by_round() -> None:
    drift = np.linspace(1, 3, 20)  # the machine slows down threefold; pairs do not notice
    found = report.ratio(timing("t", {SMALL: 2 * drift}), timing("s", {SMALL: drift}), [SMALL])
    assert (found.median, found.low, found.high) == pytest.approx((2, 2, 2))


def test_ratio_over_shapes_is_their_geometric_mean() -> None:
    dense = timing("t", {SMALL: [4.0] * 8, LARGE: [9.0] * 8})
    found = report.ratio(dense, timing("s", {SMALL: [1.0] * 8, LARGE: [9.0] * 8}), [SMALL, LARGE])
    assert found.median == pytest.approx(2)


def facts(size: int, sparsity: float = 0.0) -> dict[str, Any]:
    return {"bytes": size, "sparsity": sparsity, "dev": {"score": 0.9}}


def said(speed: report.Ratio, student: dict[str, Any], count: int = 20) -> str:
    return " ".join(report.verdict(speed, count, "CPU", facts(1000), student))


class TestVerdict:
    def test_zeros_that_buy_nothing(self) -> None:
        speed = report.ratio(rounds(1), rounds(1, seed=1), [SMALL, LARGE])
        text = said(speed, facts(1000, 0.9))
        assert f"with 90.0% zeros, {speed} that of the dense teacher on CPU, over 20 paired rounds" in text
        assert "no difference beyond the noise: it multiplies the zeros" in text
        assert "1.00x smaller, 1,000 of 1,000 bytes: it stores the zeros" in text
        assert "What would help: for speed, " in text
        assert "; for size, " in text

    def test_zeros_that_buy_speed_and_size(self) -> None:
        text = said(report.ratio(rounds(3), rounds(1, seed=1), [SMALL, LARGE]), facts(200, 0.9))
        assert "faster, beyond the noise (skipping every zero would make the matrix products 10.0x as fast)" in text
        assert "5.00x smaller, 200 of 1,000 bytes: it leaves zeros out" in text
        assert "What would help" not in text

    def test_zeros_that_cost(self) -> None:
        text = said(report.ratio(rounds(1), rounds(2, seed=1), [SMALL]), facts(1000, 0.9))
        assert "slower, beyond the noise" in text

    def test_noise_is_called_noise(self) -> None:
        for speed in (report.Ratio(1.18, 0.96, 1.55), report.Ratio(0.95, 0.7, 1.01)):
            text = said(speed, facts(1000, 0.9))
            assert "the rounds scatter too much to tell" in text
            assert "it multiplies" not in text

    def test_a_difference_that_is_real_and_worthless(self) -> None:
        text = said(report.Ratio(1.02, 1.01, 1.03), facts(500, 0.9))
        assert "next to nothing" in text
        assert "for size" not in text

    def test_few_rounds_say_nothing(self) -> None:
        text = said(report.Ratio(2.0, 2.0, 2.0), facts(1000, 0.9), count=5)
        assert "5 rounds are too few to tell it from noise" in text
        assert "faster" not in text

    def test_no_zeros_promise_nothing(self) -> None:
        text = said(report.Ratio(1.0, 0.9, 1.1), facts(1000))
        assert (
            text
            == "The student has no more zeros than the teacher, and runs at 1.00x (0.90x to 1.10x) its speed on CPU."
        )


def three() -> list[Timing]:
    shapes = {SMALL: [2.0] * 6, LARGE: [20.0] * 6}
    half = {shape: [value / 2 for value in values] for shape, values in shapes.items()}
    return [
        timing("teacher", shapes),
        timing("student", half),
        timing("torch", shapes, nodes=None, provider="torch"),
    ]


def test_overview_has_a_row_for_each_engine() -> None:
    exported = {"teacher": facts(1000), "student": facts(900, 0.9)}
    columns, rows = report.overview(three(), exported)
    assert columns == ["engine", "score", "zeros", "bytes", "RAM", "speed", "ms 1x16", "ms 8x64"]
    assert rows == [
        ["teacher", 0.9, "0.00%", 1000, "3M", "1.00x", 2.0, 20.0],
        ["student", 0.9, "90.00%", 900, "3M", "2.00x", 1.0, 10.0],
        ["torch", "-", "-", "-", "3M", "1.00x", 2.0, 20.0],
    ]


def test_overview_shows_the_first_and_the_last_shape() -> None:
    shapes = {(1, 4): [1.0] * 6, (1, 8): [2.0] * 6, (2, 8): [3.0] * 6}
    columns, rows = report.overview([timing("teacher", shapes)], {})
    assert columns[-2:] == ["ms 1x4", "ms 2x8"]
    assert rows[0][-2:] == [1.0, 3.0]


def test_details_have_every_engine_at_every_shape() -> None:
    entries = report.details(three())
    assert [(entry["engine"], entry["batch"], entry["length"]) for entry in entries] == [
        (name, *shape) for shape in (SMALL, LARGE) for name in ("teacher", "student", "torch")
    ]
    assert entries[1]["ratio"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert entries[4]["rows_per_second"] == pytest.approx(800)


def test_markdown_shows_verdict_percentiles_nodes_and_machine() -> None:
    text = report.markdown("toy", three(), ["It multiplies."], {"threads": 2, "versions": {"a": "1", "b": "2"}})
    assert text.startswith("# toy\n\nIt multiplies.\n")
    assert "| student | CPU | 8 | 64 | 10.000 | 10.000 | 10.000 | 10.000 | 800.0 | 2.00x (2.00x to 2.00x) |" in text
    assert "| teacher | CPU 5 | 1 | 3 |" in text
    assert "| torch | torch | 1 | 3 |" in text
    assert "| teacher | CPU | 1 | 16 | 2.000 | 2.000 | 2.000 | 2.000 | 500.0 | 1x |" in text
    assert "| threads | 2 |" in text
    assert "| versions | a 1, b 2 |" in text
