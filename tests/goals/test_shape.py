"""The choice of a shape for a goal, from tables of fake times; nothing is timed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import toys

from spdtool.bench.profiles import TimedInput
from spdtool.errors import RecipeError
from spdtool.goals import shape as goal_shape
from spdtool.goals.shape import (
    MEGABYTE,
    GoalTables,
    check_reachable,
    even_losses,
    foresee_shape,
    make_tables,
    search_shape,
)
from spdtool.goals.sizes import count_bytes
from spdtool.models.structures import find_structures
from spdtool.pruning.search import cost_of_shape, find_shape_within
from spdtool.pruning.structure import EncoderShape, LayerShape, full_shape
from spdtool.recipe.fields import Recipe
from spdtool.recipe.reading import build_recipe
from spdtool.run.records import LayerCosts, Ratio, ShapeProfile
from spdtool.run.storage import write_json

HEADS, NEURONS, LAYERS = 2, 256, 3
COSTS = LayerCosts(
    unit="ms", heads=[0.1, 1.1, 2.1], neurons={width: 0.1 + width / 64 for width in range(0, 257, 32)}, outside=0.5
)
MODEL = toys.bert(LAYERS, intermediate_size=NEURONS)


def recipe_of(**goal: object) -> Recipe:
    """Build a recipe with the goal."""
    return build_recipe("default", {"task": "demo", **{f"goal.{name}": value for name, value in goal.items()}})


def profile_of(model: object = MODEL, **fields: object) -> ShapeProfile:
    """Make a profile with the fake times."""
    values = {
        **{"spdtool": "1", "runtime": "onnxruntime", "version": "1", "processor": "a", "threads": 1, "batch": 1},
        **{"length": 64, "family": "bert", "width": 32, "heads": HEADS, "neurons": NEURONS, "rounds": 6},
    }
    return ShapeProfile.model_validate(values | {"costs": COSTS} | fields)


def tables_of() -> GoalTables:
    """Make the cost tables of a goal with the fake times."""
    return GoalTables(full_shape(find_structures(MODEL)), profile_of(), count_bytes(MODEL), TimedInput(1, 64))


def table_speed(shape: Sequence[LayerShape], slower: float = 1.0) -> float:
    """Compute the speedup of a shape by the table, with its layers `slower` times slower."""
    return COSTS.of_dense(LAYERS) / (slower * cost_of_shape(shape, COSTS))


def fake_trial(monkeypatch: pytest.MonkeyPatch, slower: float) -> list[EncoderShape]:
    """Make whole encoders `slower` times slower than the sum of their layers; return the list of timed shapes.

    Fake tables of onnxruntime count as those of this machine.
    """
    timed_shapes: list[EncoderShape] = []

    class FakeTrial:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def __enter__(self) -> FakeTrial:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def measure(self, shape: EncoderShape) -> Ratio:
            timed_shapes.append(shape)
            speed = table_speed(shape, slower)
            return Ratio(median=speed, low=speed, high=speed)

    monkeypatch.setattr(goal_shape, "SpeedTrial", FakeTrial)
    monkeypatch.setattr(goal_shape, "is_of_this_machine", lambda profile: profile.runtime == "onnxruntime")
    return timed_shapes


def test_a_speedup_is_reached_even_if_layer_times_do_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for slower in (0.9, 1.0, 1.1):
        timed_shapes = fake_trial(monkeypatch, slower)
        recipe, tables = recipe_of(speedup=2), tables_of()
        choice = search_shape(recipe, MODEL, tables, even_losses(tables.dense))
        shape = tuple(LayerShape(*sizes) for sizes in choice.shape)
        assert table_speed(shape, slower) >= 2, slower
        assert choice.trial is not None, slower
        assert choice.trial.median >= 2, slower
        assert choice.expected == pytest.approx(table_speed(shape)), slower
        assert 1 <= len(timed_shapes) <= goal_shape.TRIALS, slower
        assert choice.table == profile_of().digest


def test_a_speedup_beyond_the_smallest_shape_is_refused_with_the_largest() -> None:
    largest = COSTS.of_dense(LAYERS) / (COSTS.outside + LAYERS * 0.2)
    with pytest.raises(RecipeError, match=f"a speed-up of 40 was asked for.* is {largest:.2f} times as fast"):
        check_reachable(recipe_of(speedup=40), tables_of())
    check_reachable(recipe_of(speedup=largest * 0.99), tables_of())


def test_a_whole_encoder_that_stays_too_slow_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_trial(monkeypatch, 2.0)
    largest = table_speed([LayerShape(0, 0)] * LAYERS)
    with pytest.raises(RecipeError, match="was asked for"):
        search_shape(recipe_of(speedup=0.9 * largest), MODEL, tables_of(), even_losses(tables_of().dense))


def test_a_goal_in_megabytes_limits_the_file_and_must_be_reachable() -> None:
    tables = tables_of()
    dense_megabytes = tables.bytes.of_dense(LAYERS) / MEGABYTE
    recipe = recipe_of(max_mb=0.8 * dense_megabytes)
    choice = search_shape(recipe, MODEL, tables, even_losses(tables.dense))
    assert choice.trial is None
    assert 0.7 * dense_megabytes < choice.bytes / MEGABYTE <= 0.8 * dense_megabytes
    with pytest.raises(RecipeError, match="the smallest shape of this encoder has"):
        check_reachable(recipe_of(max_mb=0.01), tables)


def test_counted_bytes_equal_those_of_the_model() -> None:
    costs = count_bytes(MODEL)
    layer = MODEL.bert.encoder.layer[0]
    attention = [layer.attention.self.query, layer.attention.self.key, layer.attention.self.value]
    of_heads = sum(parameter.numel() for linear in attention for parameter in linear.parameters())
    assert costs.heads[HEADS] == 4 * (of_heads + layer.attention.output.dense.weight.numel())
    assert costs.neurons[NEURONS] == 4 * NEURONS * (32 + 1 + 32)
    assert costs.of_dense(LAYERS) == pytest.approx(4 * MODEL.num_parameters(), abs=200_000)


def test_two_goals_are_both_met(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_trial(monkeypatch, 1.0)
    tables = tables_of()
    megabytes = 0.85 * tables.bytes.of_dense(LAYERS) / MEGABYTE
    choice = search_shape(recipe_of(speedup=1.5, max_mb=megabytes), MODEL, tables, even_losses(tables.dense))
    assert choice.expected is not None
    assert choice.expected >= 1.5 - 1e-9
    assert choice.bytes / MEGABYTE <= megabytes


def test_a_table_of_another_runtime_is_read_and_nothing_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed_shapes = fake_trial(monkeypatch, 1.0)
    write_json(tmp_path / "web.json", profile_of(runtime="web", length=64))
    recipe = recipe_of(speedup=2, runtime="web", profile=str(tmp_path / "web.json"))
    tables = make_tables(recipe, MODEL)
    choice = search_shape(recipe, MODEL, tables, even_losses(tables.dense))
    assert timed_shapes == []
    assert choice.expected is not None
    assert choice.expected >= 2
    with pytest.raises(RecipeError, match="does not fit: runtime web there, cuda here"):
        make_tables(recipe_of(speedup=2, runtime="cuda", profile=str(tmp_path / "web.json")), MODEL)


def test_a_table_of_a_runtime_that_is_timed_here_is_tried_out_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed_shapes = fake_trial(monkeypatch, 1.0)
    monkeypatch.setattr(goal_shape, "is_of_this_machine", lambda profile: profile.processor == "a")
    for processor, tried in (("a", True), ("of a phone", False)):
        write_json(tmp_path / "web.json", profile_of(runtime="web", length=64, processor=processor))
        recipe = recipe_of(speedup=2, runtime="web", profile=str(tmp_path / "web.json"))
        tables = make_tables(recipe, MODEL)  # of any machine
        choice = search_shape(recipe, MODEL, tables, even_losses(tables.dense))
        assert (choice.trial is not None) is tried, processor
        assert bool(timed_shapes) is tried, processor
        timed_shapes.clear()


def test_without_a_table_the_plan_guesses_by_the_number_of_weights() -> None:
    forecast = foresee_shape(recipe_of(speedup=2), MODEL, measure=False)
    assert forecast.profile is None
    assert 0 < sum(neurons for _, neurons in forecast.shape) < LAYERS * NEURONS
    assert "heads and" in forecast.describe()


def test_contradictory_goals_are_refused_with_the_reason() -> None:
    cases: list[tuple[dict[str, object], str]] = [
        ({"speedup": 2, "runtime": "cuda"}, "needs goal.profile"),
        ({"speedup": 2, "runtime": "openvino", "kind": "sparse"}, "not faster in openvino"),
        ({"speedup": 2, "kind": "sparse", "profile": "x.json"}, "a sparse student has all"),
        ({"max_mb": 20, "profile": "x.json"}, "no speed-up is asked for"),
        ({"speedup": 1.0}, "greater than 1"),
        ({"speedup": 0.5}, "greater than 1"),
        ({"speedup": -3}, "greater than 1"),
        ({"speedup": float("nan")}, "finite number"),
        ({"speedup": float("inf")}, "finite number"),
        ({"speedup": "fast"}, "valid number"),
        ({"max_mb": 0}, "greater than 0"),
        ({"max_mb": float("inf")}, "finite number"),
        ({"max_drop": float("nan")}, "finite number"),
        ({"max_drop": -1}, "greater than or equal to 0"),
        ({"speedup": 3, "family": [2, 3]}, "below goal.speedup"),
        ({"speedup": 3, "family": [float("nan")]}, "finite number"),
    ]
    for goal, reason in cases:
        with pytest.raises(RecipeError, match=reason):
            recipe_of(**goal)


def test_a_guessed_shape_keeps_heads_and_neurons_where_the_goal_allows() -> None:
    tables = tables_of()
    for factor in (1.2, 1.5, 2.0):
        budget = COSTS.of_dense(LAYERS) / factor
        for layer in find_shape_within(even_losses(tables.dense), [COSTS], [budget]):
            assert layer.heads > 0, factor
            assert layer.neurons > 0, factor
