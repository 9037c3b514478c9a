"""The bench report: verdict, factors, tables and Markdown follow the figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from spdtool.bench import factors, ledger_tables, ratios, report
from spdtool.bench.engines import Engine, Shape
from spdtool.bench.latency import Timing
from spdtool.bench.ledger import PrunedMatrix, ledger_entry
from spdtool.bench.ratios import BenchData, ModelFile
from spdtool.run.records import BenchEnvironment, LedgerEntry, MachinePeak, Ratio

SMALL, LARGE, PADDED = Shape(1, 16), Shape(8, 64), Shape(8, 64, (64, 40, 30, 30, 30, 20, 10, 32))


def timing(name: str, rounds: dict[Shape, Sequence[float]], threads: int = 1, **fields_changed: Any) -> Timing:
    engine = Engine(name, "onnxruntime", "somewhere", 9, threads=threads, baseline=name in ("teacher", "unfused"))
    fields: dict[str, Any] = {"provider": "CPU", "nodes": {"CPU": {"MatMul": 3, "Add": 2}}, "resident": 2**20}
    fields |= {"least": {shape: min(ms) / 2 for shape, ms in rounds.items()}, "peak": 3 * 2**20}
    return Timing(engine, rounds={shape: list(ms) for shape, ms in rounds.items()}, **fields | fields_changed)


def noisy(name: str, factor: float, seed: int = 0, *, count: int = 20, noise: float = 0.02, threads: int = 1) -> Timing:
    noise_factors = np.exp(noise * np.random.default_rng(seed).standard_normal((2, count)))
    return timing(name, {SMALL: factor * noise_factors[0], LARGE: 10 * factor * noise_factors[1]}, threads)


def file_of(size_in_bytes: int, sparsity: float = 0.0, **fields: Any) -> ModelFile:
    return ModelFile(size_in_bytes, sparsity=sparsity, score=0.9, **fields)


ENVIRONMENT = BenchEnvironment(
    python="3", system="s", cpus=2, versions={"a": "1", "b": "2"}, threads=[2], provider="CPU"
)


def bench_of(timings: Sequence[Timing], files: dict[str, ModelFile], **fields: Any) -> BenchData:
    return BenchData(timings, files, ENVIRONMENT, **fields)


def against(slow: Timing, fast: Timing, shapes: Sequence[Shape]) -> Ratio:
    return ratios.paired_ratio([slow] * len(shapes), fast, shapes)


def test_a_ratio_has_its_caveat() -> None:
    cases = [
        ((2.0, 1.9, 2.1), 2, "2 rounds are too few to tell it from noise"),
        ((1.0, 0.7, 1.4), 12, "the rounds scatter too much to tell"),
        ((1.0, 0.99, 1.02), 12, None),
        ((2.0, 1.9, 2.1), 12, None),
    ]
    for (median, low, high), rounds, caveat in cases:
        ratio = Ratio(median=median, low=low, high=high)
        assert ratios.ratio_caveat(ratio, rounds) == caveat, ratio
        assert (caveat or "beyond the noise") in report.meaning(ratio, rounds, 10.0), ratio


def test_a_record_has_percentiles_and_throughput() -> None:
    rounds = {Shape(8, 16): [1.0, 2.0, 3.0, 4.0]}
    bench = bench_of([timing("teacher", rounds)], {})
    record = ratios.latency_record(bench, bench.timings[0], Shape(8, 16))
    percentiles = (record.p50, record.p90, record.p95, record.p99, record.rows_per_second)
    assert percentiles == pytest.approx((2.5, 3.7, 3.85, 3.97, 3200))


def test_interval_of_the_median_is_that_of_the_sign_test() -> None:
    for count, outside in [(1, 0), (2, 0), (5, 0), (6, 0), (9, 1), (20, 5), (100, 39), (2000, 955)]:
        assert ratios.values_outside_interval(count) == outside, count


def test_ratio_is_paired_round_by_round() -> None:
    drift = np.linspace(1, 3, 20)  # the machine slows down threefold; pairs do not notice
    ratio = against(timing("t", {SMALL: 2 * drift}), timing("s", {SMALL: drift}), [SMALL])
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((2, 2, 2))


def test_ratio_over_shapes_is_their_geometric_mean() -> None:
    dense = timing("t", {SMALL: [4.0] * 8, LARGE: [9.0] * 8})
    ratio = against(dense, timing("s", {SMALL: [1.0] * 8, LARGE: [9.0] * 8}), [SMALL, LARGE])
    assert ratio.median == pytest.approx(2)


def test_the_dense_model_is_the_faster_of_its_two_forms_at_each_shape_and_number_of_threads() -> None:
    bench = bench_of(
        [
            timing("teacher", {SMALL: [2.0] * 6, LARGE: [8.0] * 6}),
            timing("unfused", {SMALL: [1.0] * 6, LARGE: [9.0] * 6}),
            timing("student", {SMALL: [1.0] * 6, LARGE: [1.0] * 6}),
            timing("teacher", {SMALL: [3.0] * 6, LARGE: [3.0] * 6}, threads=2),
            timing("unfused", {SMALL: [9.0] * 6, LARGE: [9.0] * 6}, threads=2),
            timing("student", {SMALL: [1.0] * 6, LARGE: [1.0] * 6}, threads=2),
        ],
        {},
    )
    speeds = [
        bench.speedup(bench.timing("student", threads), [shape]).median for threads in (1, 2) for shape in bench.grid
    ]
    assert speeds == pytest.approx([1, 8, 3, 3])
    assert [bench.fastest_dense(1, shape).engine.name for shape in bench.grid] == ["unfused", "teacher"]


def verdict_text(student: Timing, student_file: ModelFile, teacher: Timing | None = None, **fields: Any) -> str:
    """Return the verdict on a student against a teacher of 1000 bytes."""
    files = {"teacher": file_of(1000), "student": student_file}
    return " ".join(report.describe_verdict(bench_of([teacher or noisy("teacher", 1), student], files, **fields)))


class TestPlainStudent:
    def test_zeros_without_gain(self) -> None:
        text = verdict_text(noisy("student", 1, 1), file_of(1000, 0.9))
        speed = against(noisy("teacher", 1), noisy("student", 1, 1), [SMALL, LARGE])
        assert (
            f"Speed of student, 90.0% zeros, 1 thread: {speed} that of the dense teacher on CPU, over 20 paired" in text
        )
        assert "no difference beyond the noise: it multiplies the zeros" in text
        assert "1.00x smaller, 1,000 of 1,000 bytes: it stores the zeros" in text
        assert "What would help: for speed, " in text
        assert "; for size, " in text

    def test_zeros_with_gain_in_speed_and_size(self) -> None:
        text = verdict_text(noisy("student", 1, 1), file_of(200, 0.9), noisy("teacher", 3))
        assert "faster, beyond the noise (skipping every zero would make the matrix products 10.0x as fast)" in text
        assert "5.00x smaller, 200 of 1,000 bytes: it leaves zeros out" in text
        assert "What would help" not in text

    def test_zeros_that_slow_down(self) -> None:
        assert "slower, beyond the noise" in verdict_text(noisy("student", 2, 1), file_of(1000, 0.9))

    def test_differences_within_the_noise_are_called_noise(self) -> None:
        text = verdict_text(noisy("student", 1, 1, noise=0.4), file_of(1000, 0.9), noisy("teacher", 1, noise=0.4))
        assert "the rounds scatter too much to tell" in text
        assert "it multiplies" not in text

    def test_a_significant_but_tiny_difference(self) -> None:
        text = verdict_text(noisy("student", 1, 1, noise=0.001), file_of(500, 0.9), noisy("teacher", 1.02, noise=0.001))
        assert "next to nothing" in text
        assert "for size" not in text

    def test_few_rounds_allow_no_verdict(self) -> None:
        text = verdict_text(noisy("student", 1, 1, count=5), file_of(1000, 0.9), noisy("teacher", 2, count=5))
        assert "5 rounds are too few to tell it from noise" in text
        assert "faster" not in text

    def test_a_student_without_zeros(self) -> None:
        text = verdict_text(noisy("student", 1), file_of(1000))
        assert text == (
            "The student has no more zeros than the teacher; against it, it runs at 1.00x (1.00x to 1.00x) with "
            "1 thread."
        )

    def test_the_student_is_compared_with_the_teacher_of_the_same_form(self) -> None:
        """The unfused teacher is faster here, which must not count against the zeros."""
        timings = [noisy("teacher", 1), noisy("unfused", 0.5), noisy("student", 1, 1)]
        bench = bench_of(timings, {"teacher": file_of(1000), "student": file_of(1000, 0.9)})
        assert "no difference beyond the noise" in report.describe_verdict(bench)[0]
        assert report.overview_table(bench)[1][2][5] == "0.50x"

    def test_notes_come_last(self) -> None:
        assert verdict_text(noisy("student", 1), file_of(1000, 0.9), notes=["Not timed: x."]).endswith("Not timed: x.")


def sparse(factor: float = 0.25, padding: float = 0.125, int8: float = 0.5, **fields: Any) -> BenchData:
    """Make bench data with a sparse engine that takes `factor` of the teacher's time."""
    timings = []
    for threads in (1, 2):
        base = {SMALL: 8.0 / threads, LARGE: 80.0 / threads, PADDED: 80.0 / threads}
        for name, share, padded in (
            ("teacher", 1.0, 1.0), ("student", 1.0, 1.0), ("sparse-cpu", factor, padding), ("int8", int8, int8),
        ):  # fmt: skip
            shares = (
                {SMALL: share / 2, LARGE: share, PADDED: padded} if name == "sparse-cpu" else dict.fromkeys(base, share)
            )
            timings.append(timing(name, {shape: [ms * shares[shape]] * 6 for shape, ms in base.items()}, threads))
    files = {"teacher": file_of(1000), "student": file_of(1000, 0.9), "int8": ModelFile(260)}
    rounded = {
        "rounding": ("fp16", "int8"),
        "checkpoint_score": 0.9012,
        "prediction_change": "3 of 400 predictions flipped",
    }
    files["sparse-cpu"] = file_of(180, 0.9, **rounded)
    return bench_of(timings, files, sparse=["sparse-cpu"], **fields)


class TestSparseEngine:
    def test_the_headline_names_threads_mean_and_range(self) -> None:
        lines = report.describe_verdict(sparse())
        assert lines[0] == (
            "Speed of sparse-cpu, 90.0% zeros, 1 thread: 5.66x (5.66x to 5.66x) that of the dense teacher on CPU, over "
            "6 paired rounds, 4.00x at 8x64 to 8.00x at 1x16: faster, beyond the noise."
        )
        assert lines[1] == (
            "How much of it is due to the zeros is not known, 1 thread: dense weights were not timed in the form "
            "sparse-cpu."
        )
        assert "2 threads: 5.66x" in lines[2]
        assert any(
            line.startswith("The same zeros in plain onnxruntime: 1.00x (1.00x to 1.00x) with 1") for line in lines
        )
        assert not any("What would help" in line for line in lines)

    def test_skipped_padding_is_not_credited_to_the_zeros(self) -> None:
        text = " ".join(report.describe_verdict(sparse()))
        assert "Padding: at 8x64 padded, where 50% of the tokens are real, sparse-cpu has 8.00x with 1 thread" in text
        assert "it computes such a batch 2.00x as fast as a full one: that part is padding left out, not zeros." in text
        text = " ".join(report.describe_verdict(sparse(padding=0.25)))
        assert (
            "sparse-cpu has 4.00x with 1 thread, 4.00x with 2 threads; it computes padding like any other token."
            in text
        )

    def test_a_little_padding_is_not_explained(self) -> None:
        bench, nearly = sparse(padding=0.25), Shape(8, 64, (64,) * 7 + (50,))
        for bench_timing in bench.timings:
            bench_timing.rounds[nearly] = bench_timing.rounds.pop(PADDED)
        (line,) = [line for line in report.describe_verdict(bench) if line.startswith("Padding")]
        assert line == (
            "Padding: at 8x64 padded, where 97% of the tokens are real, sparse-cpu has 4.00x with 1 thread, "
            "4.00x with 2 threads."
        )

    def test_padding_without_its_full_twin_is_not_explained(self) -> None:
        bench = sparse()
        for bench_timing in bench.timings:
            del bench_timing.rounds[LARGE]
        (line,) = [line for line in report.describe_verdict(bench) if line.startswith("Padding")]
        assert line.endswith("8.00x with 2 threads.")

    def test_rounding_is_reported_for_rounded_weights(self) -> None:
        text = " ".join(report.describe_verdict(sparse()))
        assert (
            "Rounding (pruned matrices as fp16, embeddings as int8): dev score 0.9000, that of its checkpoint 0.9012; "
            "3 of 400 predictions flipped." in text
        )
        bench = sparse()
        exact = bench.files | {"sparse-cpu": file_of(180, 0.9)}  # type: ignore[operator]
        assert "Rounding" not in " ".join(report.describe_verdict(replace(bench, files=exact)))

    def test_the_ledger_splits_the_size_of_the_file(self) -> None:
        assert "File of sparse-cpu: 5.56x smaller, 180 of 1,000 bytes: it leaves zeros out." in report.describe_verdict(
            sparse()
        )
        text = " ".join(report.describe_verdict(sparse(ledger=ledger())))
        assert "the pruned matrices went from 600 to 90 bytes" in text
        assert "all the rest from 400 to 90 (fewer bits only)" in text

    def test_int8_is_compared_at_every_shape(self) -> None:
        text = " ".join(report.describe_verdict(sparse()))
        assert (
            "int8 (whose score is not measured), sparse-cpu is faster at every point of the grid: 2.00x to 4.00x"
            in text
        )
        text = " ".join(report.describe_verdict(sparse(int8=0.2)))
        assert "sparse-cpu is slower at 8x64 with 1 thread (0.80x), 8x64 with 2 threads (0.80x): 0.80x to 1.60x" in text


def with_dense(
    fusion: float = 2.0, rounding: float = 1.25, padding: float = 1.6, *, exact: bool = True, **fields: Any
) -> BenchData:
    """Add dense weights in the form of the sparse engine, `fusion` x `rounding` times faster than the teacher."""
    bench = sparse(**fields)
    names = ["sparse-cpu dense", "sparse-cpu dense fp32"] if exact else ["sparse-cpu dense"]
    timings = list(bench.timings)
    for threads in (1, 2):
        base = {SMALL: 8.0 / threads, LARGE: 80.0 / threads, PADDED: 80.0 / threads / padding}
        for name, gain in zip(names, (fusion * rounding, fusion), strict=False):
            timings.append(timing(name, {shape: [ms / gain] * 6 for shape, ms in base.items()}, threads))
    return replace(bench, timings=timings, dense_forms={"sparse-cpu": names})


class TestFactors:
    def test_the_factors_multiply_to_the_total_speedup(self) -> None:
        for exact in (True, False):
            bench = with_dense(exact=exact)
            total_speed = bench.speedup(bench.timing("sparse-cpu", 1), bench.grid).median
            split = factors.split_speed(bench, "sparse-cpu", 1)
            assert split is not None
            assert split.whole == pytest.approx(total_speed) == pytest.approx(4 * 2**0.5)
            assert split.zeros == pytest.approx(total_speed / 2.5) == pytest.approx(split.zeros_ratio.median)
            expected = (2.0, 1.25) if exact else (2.5, 1.0)
            assert (split.fusion, split.rounding, split.padding) == pytest.approx((*expected, 1.0)), exact
            padded = factors.split_padded_speed(bench, "sparse-cpu", 1, PADDED)
            assert padded is not None
            assert (padded.padding, padded.whole) == pytest.approx((1.6, 8.0))
            assert padded.fusion == pytest.approx(split.fusion)

    def test_shape_and_zeros_inside_of_it_have_a_factor_each(self) -> None:
        dense = with_dense(leaves_out=True, zeros_inside=0.8)
        shapes = []
        for threads in (1, 2):
            base = {SMALL: 8.0 / threads, LARGE: 80.0 / threads, PADDED: 80.0 / threads}
            shapes.append(timing("sparse-cpu shape", {shape: [ms / 3.75] * 6 for shape, ms in base.items()}, threads))
        bench = replace(dense, timings=[*dense.timings, *shapes], shape_forms={"sparse-cpu": "sparse-cpu shape"})
        split, before = factors.split_speed(bench, "sparse-cpu", 1), factors.split_speed(dense, "sparse-cpu", 1)
        assert split is not None
        assert before is not None
        assert (split.fusion, split.rounding, split.shape) == pytest.approx((2.0, 1.25, 1.5))
        assert split.zeros == pytest.approx(before.zeros / 1.5) == pytest.approx(split.zeros_ratio.median)
        assert split.whole == pytest.approx(before.whole)
        assert before.shape == 1
        text = " ".join(report.describe_verdict(bench))
        assert "rounding 1.25x, smaller shape 1.50x, zeros inside 1.51x; together 5.66x" in text
        assert "measured against the same shape without zeros inside, through the same operators" in text
        assert "products 5.0x as fast" in text
        assert "smaller shape and its zeros 2.26x" in " ".join(report.describe_verdict(dense))

    def test_factors_use_the_faster_teacher_and_paired_rounds(self) -> None:
        slow = timing("teacher", {SMALL: [4.0] * 6, LARGE: [40.0] * 6})
        unfused = timing("unfused", {SMALL: [3.0] * 6, LARGE: [50.0] * 6})
        dense = timing("x dense", {SMALL: [2.0, 1.9, 2.1] * 2, LARGE: [20.0] * 6})
        zeros = timing("x", {SMALL: [1.0, 0.9, 1.2] * 2, LARGE: [10.0] * 6})
        bench = bench_of([slow, unfused, dense, zeros], TWO_FILES, sparse=["x"], dense_forms={"x": ["x dense"]})
        split = factors.split_speed(bench, "x", 1)
        assert split is not None
        assert (split.fusion, split.zeros) == pytest.approx(((3 / 2 * 40 / 20) ** 0.5, 2.0))
        assert split.zeros_ratio.low < 2 < split.zeros_ratio.high

    def test_the_headline_credits_the_zeros_only_with_their_factor(self) -> None:
        lines = report.describe_verdict(with_dense())
        assert lines[1] == (
            "Where it comes from, 1 thread: fusion 2.00x, rounding 1.25x, zeros 2.26x; together 5.66x. The gain "
            "by the zeros is measured against dense weights through the same operators: 2.26x (2.26x to 2.26x): "
            "faster, beyond the noise (skipping every zero would make the matrix products 10.0x as fast)."
        )
        text = " ".join(lines)
        assert "8.00x with 1 thread, 8.00x with 2 threads (fusion 2.00x, padding left out 1.60x, rounding" in text
        without_zeros = " ".join(report.describe_verdict(with_dense(fusion=5.65685, rounding=1.0)))
        assert "zeros 1.00x; together 5.66x" in without_zeros
        assert "it multiplies the zeros like any other number" in without_zeros

    def test_a_ratio_above_the_bound_is_reported(self) -> None:
        sums = {entry.name: entry for entry in ledger()}
        assert len(sums) == 3  # 4.00x by measurement, 4 / 2.56 by the bound
        bench = with_dense(ledger=ledger())
        (line,) = [
            line for line in report.describe_verdict(bench) if line.startswith("Above the bound, 1 thread: 5.66x")
        ]
        assert line == (
            "Above the bound, 1 thread: 5.66x is more than zeros can give the matrix products (10.0x if every zero "
            "were skipped, 1.56x by the ledger's bound, and 4.00x is what the ledger's matrices gain one by one); the "
            "rest is not sparsity."
        )
        assert any("even the zeros' 2.26x is more" in line for line in report.describe_verdict(bench))
        few = with_dense()
        files = few.files | {"sparse-cpu": file_of(180, 0.8)}  # type: ignore[operator]
        assert "5.66x is more than zeros can give the matrix products (5.0x if" in " ".join(
            report.describe_verdict(replace(few, files=files))
        )
        assert not any(line.startswith("Above") for line in report.describe_verdict(few))  # ten times is not reached

    def test_bytes_are_compared_with_dense_int8(self) -> None:
        bench = sparse()
        text = " ".join(report.describe_verdict(bench))
        assert "Against dense int8: sparse-cpu is 1.44x smaller than the teacher in int8, 260 bytes." in text
        files = bench.files | {"onnx-int8 teacher": ModelFile(90)}  # type: ignore[operator]
        text = " ".join(report.describe_verdict(replace(bench, files=files)))
        assert "Against dense int8: sparse-cpu is 2.00x larger than the teacher in onnx-int8, 90 bytes." in text


def ledger(packed: bool = True) -> list[LedgerEntry]:
    """Make entries of three matrices in two layers, each of 200 dense bytes."""
    names = ("e.layer.0.query.weight", "e.layer.0.key.weight", "e.layer.1.query.weight")
    times = {tokens: {"dense": [0.004] * 3, "sparse": [0.001] * 3 if packed else None} for tokens in (32, 128)}
    matrices = [PrunedMatrix(name, 5, 10, 10, 200, 30 if packed else None) for name in names]
    return [ledger_entry(matrix, times, MachinePeak(flops=1e9, bandwidth=1e9)) for matrix in matrices]


def test_the_ledger_is_shown_by_layer() -> None:
    columns, rows = ledger_tables.ledger_table(ledger())
    assert columns[5] == "dense us (128 tokens)"
    assert rows == [
        ["e.layer.0", 20, "20.00%", 400, 60, 8.0, 2.0, "4.00x", pytest.approx(5.12)],
        ["e.layer.1", 10, "20.00%", 200, 30, 4.0, 1.0, "4.00x", pytest.approx(2.56)],
    ]
    assert [row[4:8] for row in ledger_tables.ledger_table(ledger(packed=False))[1]] == [
        ["-", 8.0, "-", "-"],
        ["-", 4.0, "-", "-"],
    ]


def three_timings() -> list[Timing]:
    shapes = {SMALL: [2.0] * 6, LARGE: [20.0] * 6}
    faster = {shape: [value / 2 for value in values] for shape, values in shapes.items()}
    return [
        timing("teacher", shapes),
        timing("student", faster),
        timing("torch", shapes, nodes=None, provider="torch"),
    ]


TWO_FILES = {"teacher": file_of(1000), "student": file_of(900, 0.9)}


def test_overview_has_a_row_for_each_engine() -> None:
    columns, rows = report.overview_table(bench_of(three_timings(), TWO_FILES))
    assert columns == ["engine", "score", "zeros", "bytes", "RAM", "speed", "ms 1x16", "ms 8x64"]
    assert rows == [
        ["teacher", 0.9, "0.00%", 1000, "3M", "1.00x", 2.0, 20.0],
        ["student", 0.9, "90.00%", 900, "3M", "2.00x", 1.0, 10.0],
        ["torch", "-", "-", "-", "3M", "1.00x", 2.0, 20.0],
    ]


def test_overview_has_a_speed_for_each_number_of_threads_and_nothing_of_padding() -> None:
    columns, rows = report.overview_table(sparse())
    assert columns == ["engine", "score", "zeros", "bytes", "RAM", "speed 1t", "2t", "ms 1x16", "ms 8x64"]
    assert rows[2] == ["sparse-cpu", 0.9, "90.00%", 180, "3M", "5.66x", "5.66x", 0.5, 10.0]
    assert rows[3][:4] == ["int8", "-", "-", 260]


def test_details_have_every_engine_at_every_shape_with_every_number_of_threads() -> None:
    entries = ratios.latency_records(bench_of(three_timings(), TWO_FILES))
    assert [(entry.engine, entry.batch, entry.length) for entry in entries] == [
        (name, shape.batch, shape.length) for shape in (SMALL, LARGE) for name in ("teacher", "student", "torch")
    ]
    assert entries[1].ratio == Ratio(median=2.0, low=2.0, high=2.0)
    assert entries[4].rows_per_second == pytest.approx(800)
    assert entries[4].min == 5.0
    assert [entry.threads for entry in ratios.latency_records(sparse())] == [1] * 12 + [2] * 12
    assert ratios.latency_records(sparse())[-1].shape == "8x64 padded"


def test_markdown_shows_verdict_percentiles_ledger_nodes_and_machine() -> None:
    text = report.render_markdown("toy", bench_of(three_timings(), TWO_FILES, ledger=ledger()))
    assert text.startswith("# toy\n\n- Speed of student, 90.0% zeros")
    assert (
        "| student | CPU | 1 | 8x64 | 5.000 | 10.000 | 10.000 | 10.000 | 10.000 | 800.0 | 2.00x (2.00x to 2.00x) |"
        in text
    )
    assert "| student | 0.9 | 90.00% | 900 | 3M | 2.00x | 1 | 10 |" in text
    assert "| teacher | CPU 5 | 1 | 3 |" in text
    assert "| torch | torch | 1 | 3 |" in text
    assert "| teacher | CPU | 1 | 1x16 | 1.000 | 2.000 | 2.000 | 2.000 | 2.000 | 500.0 | 1x |" in text
    assert (
        "| e.layer.1.query.weight | 5x10 | 10 | 20.00% | 200 | 30 | 128 | 4.0 | 3.2 | 1.0 | 2.6 | 4.00x | 2.6 | 256% |"
        in text
    )
    assert "| threads | 2 |" in text
    assert "| versions | a 1, b 2 |" in text


def test_a_report_without_a_ledger_has_none() -> None:
    assert "Ledger" not in report.render_markdown("toy", replace(bench_of(three_timings(), TWO_FILES), ledger=()))


def test_a_smaller_student_is_reported_and_not_credited_to_zeros() -> None:
    def lines(size: int) -> list[str]:
        files = {"teacher": file_of(1000, size=400), "student": file_of(250, 0.9, size=size)}
        return report.describe_verdict(bench_of([noisy("teacher", 3.0), noisy("student", 1.0, 1)], files))

    verdict = lines(100)
    assert verdict[0].startswith("The student is another model than the teacher: its matrices hold 100 weights")
    assert any(line.endswith("faster, beyond the noise.") for line in verdict)
    assert "File of student: 4.00x smaller, 250 of 1,000 bytes." in verdict
    assert not any("another model" in line for line in lines(400))
    assert any("skipping every zero" in line for line in lines(400))


def test_a_smaller_model_without_zeros_is_not_said_to_have_them() -> None:
    engines = {"teacher": 4.0, "student": 2.0, "sparse-cpu": 1.0, "dense": 3.0}
    timings = [timing(name, {SMALL: [ms] * 8, LARGE: [ms] * 8}) for name, ms in engines.items()]
    files = {"teacher": file_of(1000, size=400), "student": file_of(500, size=200)}
    files |= {"sparse-cpu": file_of(500, size=200), "dense": file_of(900, size=400)}
    bench = bench_of(timings, files, sparse=["sparse-cpu"], dense_forms={"sparse-cpu": ["dense"]})
    text = "\n".join(report.describe_verdict(bench))
    assert "fusion 1.33x, smaller model 3.00x; together 4.00x" in text
    assert "The gain by the smaller model is measured against dense weights through the same operators" in text
    assert "Speed and bytes are those of the other model, which has no zeros." in text
    assert "zeros among them" not in text


def test_gains_of_other_treatments_are_not_credited_to_zeros() -> None:
    engines = {"teacher": 4.0, "student": 4.0, "onnx-int8": 2.0, "onnx-int8 teacher": 2.0}
    bench = bench_of(
        [timing(name, {SMALL: [ms] * 8, LARGE: [ms] * 8}) for name, ms in engines.items()],
        {"teacher": file_of(400), "student": file_of(400, 0.9), "onnx-int8": file_of(100, 0.9)}
        | {"onnx-int8 teacher": file_of(100)},
        pairs={"onnx-int8": "onnx-int8 teacher"},
    )
    (line,) = [line for line in report.describe_verdict(bench) if line.startswith("Treatment")]
    assert "Treatment onnx-int8, which is not sparsity: it gives the dense teacher 2.00x" in line
    assert "4.00x fewer bytes. The gain by the zeros, student against teacher" in line
    assert "student against teacher in the same form: 1.00x (1.00x to 1.00x)" in line
    assert line.endswith("1.00x fewer bytes.")


def test_the_speed_of_a_smaller_dense_student_is_not_credited_to_zeros() -> None:
    timings = [noisy("teacher", 1.0), noisy("student", 0.5, 1), noisy("int8 teacher", 0.6, 2), noisy("int8", 0.3, 3)]
    files = {"teacher": file_of(1000), "student": file_of(600, 0.5), "int8": file_of(200, 0.5)}
    files["int8 teacher"] = file_of(300)
    bench = bench_of(timings, files, pairs={"int8": "int8 teacher"}, leaves_out=True)
    text = "\n".join(report.describe_verdict(bench))
    for line in (
        "Speed of student, 50.0% of its matrices left out, 1 thread",
        "The student is a smaller dense model: 50.0% of the weights in its matrices were removed, as whole heads",
        "The gain by the smaller shape, student against teacher in the same form",
    ):
        assert line in text, line
    assert "if every zero were skipped" not in text


def test_the_fastest_dense_row_is_named_with_the_ratio_to_it() -> None:
    dense, fast, student = noisy("teacher", 2), noisy("torch fp16 graph", 1, 1), noisy("student", 0.5, 2)
    files = {"teacher": file_of(1000), "student": file_of(1000, 0.9)}
    on_cpu = bench_of([dense, fast, student], files, dense=["teacher", "torch fp16 graph", "never timed"])
    verdict = report.describe_verdict(on_cpu)
    assert verdict[0].startswith("Speed of student")
    (line,) = [line for line in verdict if line.startswith("Fastest dense row")]
    assert "torch fp16 graph at 1x16, 8x64. Against it student runs at " in line
    ratio = on_cpu.speed_over_rivals(student)
    assert ratio is not None
    assert ratio.median == pytest.approx(2, rel=0.05)
    assert "was not timed" not in line
    fields: dict[str, Any] = {"dense": on_cpu.dense, "on_gpu": True}
    on_gpu = bench_of([dense, replace(fast, engine=replace(fast.engine, baseline=True)), student], files, **fields)
    verdict = report.describe_verdict(on_gpu)
    assert verdict[0].startswith("1x is the fastest dense row whose score passes, 1 thread: torch fp16 graph")
    assert verdict[0].endswith("The student was not timed in the form torch fp16 graph.")
    columns, rows = report.overview_table(on_gpu)
    assert columns[-2:] == ["device 1x16", "device 8x64"]
    assert rows[0][-1] is None  # without a clock of the device
    assert not any("Fastest dense row" in line for line in report.describe_verdict(bench_of([dense, student], files)))
