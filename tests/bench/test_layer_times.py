"""Layer times by shape: splitting measured times into layers, and one real measurement of a tiny encoder."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import toys

from spdtool.bench import layer_times
from spdtool.bench.engines import Engine, Shape
from spdtool.bench.latency import Timing
from spdtool.bench.layer_times import (
    TIMED_LAYERS,
    TimedPoint,
    build_random_encoder,
    clear_structures,
    make_falling,
    measure_layer_times,
    paired_medians,
    solve_costs,
    timed_widths,
)
from spdtool.bench.profiles import TimedInput, check_profile, expected_fields, is_of_this_machine, read_profile
from spdtool.errors import RecipeError
from spdtool.models.structures import find_structures
from spdtool.run.records import LayerCosts, ShapeProfile
from spdtool.run.storage import write_json

OUTSIDE, HEAD, NEURON, REMAINDER = 2.0, 0.5, 0.01, 0.3


def fake_profile(**fields: object) -> ShapeProfile:
    """Make a profile in which every head and neuron takes the same time."""
    costs = LayerCosts(unit="ms", heads=[0.1, 0.6, 1.1], neurons={0: 0.1, 64: 1.1}, outside=0.2)
    values = {
        **{"spdtool": "1", "runtime": "onnxruntime", "version": "1.2", "processor": "a", "threads": 1, "batch": 1},
        **{"length": 16, "family": "bert", "width": 32, "heads": 2, "neurons": 64, "rounds": 6, "costs": costs},
    }
    return ShapeProfile.model_validate(values | fields)


def fake_time(point: TimedPoint) -> float:
    """Return the milliseconds of an encoder with fixed times per layer, head and neuron."""
    return OUTSIDE + point.layers * (REMAINDER + HEAD * point.heads + NEURON * point.neurons)


def test_times_are_split_into_layers_their_halves_and_what_is_outside() -> None:
    heads, neurons = 4, 256
    widths = timed_widths(neurons)
    points = [TimedPoint(1, heads, neurons), TimedPoint(TIMED_LAYERS, heads, neurons)]
    points += [TimedPoint(TIMED_LAYERS, count, neurons) for count in (0, 1, 2)]  # 3 is interpolated
    points += [TimedPoint(TIMED_LAYERS, heads, width) for width in widths]
    times = {point: fake_time(point) for point in points}
    costs = solve_costs(times, heads, neurons)
    assert costs.outside == pytest.approx(OUTSIDE)
    for count in range(heads + 1):
        assert costs.heads[count] == pytest.approx(HEAD * count + REMAINDER / 2)
    for width in (0, 32, 100, 256):
        assert costs.of_width(width) == pytest.approx(NEURON * width + REMAINDER / 2)
    assert costs.of_dense(12) == pytest.approx(fake_time(TimedPoint(12, heads, neurons)))


def test_widths_are_multiples_of_32_from_none_to_all() -> None:
    for neurons in (32, 64, 100, 1536, 3072):
        widths = timed_widths(neurons)
        assert (widths[0], widths[-1]) == (0, neurons)
        assert widths == sorted(set(widths))
        assert all(width % 32 == 0 for width in widths[:-1]), neurons
        assert len(widths) <= 13, neurons


def test_noise_does_not_make_a_larger_shape_cheaper() -> None:
    assert make_falling({0: 3.0, 1: 2.0, 2: 2.5, 3: 0.0}) == {0: 3.0, 1: 2.25, 2: 2.25, 3: 0.0}


def test_a_cleared_structure_has_no_weight() -> None:
    model = build_random_encoder(toys.bert().config, 1)
    (layer,) = find_structures(model)
    clear_structures(layer.heads, 1)
    clear_structures(layer.neurons, 32)
    assert layer.heads.find_live().tolist() == [True, False]
    assert int(layer.neurons.find_live().sum()) == 32


def test_a_machine_that_is_slow_for_a_round_is_slow_for_every_engine_of_it() -> None:
    engine, shape = Engine(name="x", kind="onnxruntime", path="", vocabulary=9), Shape(1, 8)
    load = [1.0, 3.0, 1.0, 2.0, 1.0]
    timings = []
    for milliseconds in (4.0, 2.0):
        rounds = [milliseconds * factor for factor in load]
        timings.append(Timing(engine, "cpu", None, 0, 0, {shape: rounds}, {shape: min(rounds)}))
    assert paired_medians(timings, 0) == [4.0, 2.0]
    timings[1].rounds[shape][1] = 50.0  # interrupted once
    assert paired_medians(timings, 0) == [4.0, 2.0]


@pytest.mark.parametrize(("runtime", "speed"), [("onnxruntime", 3.0), ("web", 4.0)])
def test_a_trial_compares_with_the_faster_form_of_the_dense_encoder(
    monkeypatch: pytest.MonkeyPatch, runtime: str, speed: float
) -> None:
    shape = Shape(1, 8)

    def export_engine(config: object, sizes: object, folder: Path, name: str) -> Engine:
        return Engine(name=name, kind="onnxruntime", path=name, vocabulary=9)

    def time_engines(engines: list[Engine], shapes: list[Shape], **_: object) -> SimpleNamespace:
        times = {"dense": 4.0, "dense, unfused": 3.0, "small": 1.0}
        rounds = [(engine, [times[engine.name]] * 6) for engine in engines]
        return SimpleNamespace(
            timings=[Timing(engine, "cpu", None, 0, 0, {shape: row}, {shape: row[0]}) for engine, row in rounds]
        )

    monkeypatch.setattr(layer_times, "export_engine", export_engine)
    monkeypatch.setattr(layer_times, "time_engines", time_engines)
    monkeypatch.setattr(layer_times, "run_in", lambda engine, runtime: engine)
    with layer_times.SpeedTrial(toys.bert().config, 2, TimedInput(1, 8, runtime=runtime)) as trial:
        assert trial.measure([]).median == pytest.approx(speed)


@pytest.mark.parametrize(("runtime", "dense_layer"), [("onnxruntime", 3.0), ("web", 4.0)])
def test_a_table_holds_the_faster_form_of_a_dense_layer(
    monkeypatch: pytest.MonkeyPatch, runtime: str, dense_layer: float
) -> None:
    config = toys.bert().config

    def export_points(config: object, heads: int, neurons: int, folder: Path) -> dict[TimedPoint, Engine]:
        shapes = [(1, heads, neurons), (2, heads, neurons), (2, 0, neurons), (2, heads, 0)]
        points = [TimedPoint(*shape) for shape in shapes]
        return {point: Engine(name=point.name, kind="onnxruntime", path="", vocabulary=9) for point in points}

    def time_engines(engines: list[Engine], shapes: list[Shape], **_: object) -> SimpleNamespace:
        timings = []
        for engine in engines:
            layers = int(engine.name[0])
            halves = 1 if " 0 " in engine.name else 2
            row = [layers * halves * (2.0 if engine.fused else 1.5)] * 6
            timings.append(Timing(engine, "cpu", None, 0, 0, {shapes[0]: row}, {shapes[0]: row[0]}))
        return SimpleNamespace(timings=timings)

    monkeypatch.setattr(layer_times, "export_points", export_points)
    monkeypatch.setattr(layer_times, "time_engines", time_engines)
    monkeypatch.setattr(layer_times, "run_in", lambda engine, runtime: engine)
    monkeypatch.setattr(layer_times, "require_runtime", lambda runtime: None)
    monkeypatch.setattr(layer_times, "runtime_version", lambda runtime: "1")
    profile = measure_layer_times(config, TimedInput(1, 8, runtime=runtime))
    assert profile.costs.of_dense(1) == pytest.approx(dense_layer)


@pytest.mark.long  # four exports
def test_a_tiny_encoder_is_timed_and_its_table_read_back(tmp_path: Path) -> None:
    config = toys.bert(num_attention_heads=1, intermediate_size=32).config
    timed_input = TimedInput(batch=1, length=8)
    profile = measure_layer_times(config, timed_input, rounds=1, seconds=0)
    assert (profile.heads, profile.neurons, profile.runtime) == (1, 32, "onnxruntime")
    assert len(profile.costs.heads) == 2
    assert set(profile.costs.neurons) == {0, 32}
    write_json(tmp_path / "table.json", profile)
    reread = read_profile(tmp_path / "table.json")
    assert reread.digest == profile.digest
    check_profile(
        reread, expected_fields(toys.bert(num_attention_heads=1, intermediate_size=32), timed_input), "table.json"
    )


def test_a_table_of_another_model_machine_or_input_is_refused_with_what_differs() -> None:
    profile = fake_profile()
    model = toys.bert()
    matching = fake_profile(**expected_fields(model, TimedInput(1, 16)))
    check_profile(matching, expected_fields(model, TimedInput(1, 16)), "x")
    with pytest.raises(RecipeError, match="processor a there"):
        check_profile(profile, expected_fields(model, TimedInput(1, 16)), "x")
    with pytest.raises(RecipeError, match="does not fit: length 16 there, 32 here"):
        check_profile(matching, expected_fields(model, TimedInput(1, 32)), "x")
    # The file of a browser may be of any machine.
    web_profile = fake_profile(runtime="web")
    check_profile(web_profile, expected_fields(model, TimedInput(1, 16, runtime="web"), given=True), "x")
    assert not is_of_this_machine(web_profile)
    assert not is_of_this_machine(profile)
    assert is_of_this_machine(matching)
    assert not is_of_this_machine(matching.model_copy(update={"version": "0.1"}))
    with pytest.raises(RecipeError, match="runtime web there, onnxruntime here"):
        check_profile(web_profile, expected_fields(model, TimedInput(1, 16)), "x")


def test_a_file_that_holds_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        read_profile(tmp_path / "missing.json")
    good = fake_profile().model_dump(mode="json")
    costs = good["costs"]
    damaged = [
        *(
            "",
            "not json",
            "[]",
            "null",
            json.dumps({"format": 1}),
            json.dumps(good | {"format": 2}),
            json.dumps(good)[:-9],
        ),
        json.dumps(good | {"heads": 3}),  # a layer of whom the times are not
        json.dumps(good | {"neurons": 128}),
        json.dumps(good | {"threads": "many"}),
    ]
    for change in (
        {"heads": [0.1, -0.6, 1.1]},
        {"heads": [0.1, float("nan"), 1.1]},
        {"heads": []},
        {"neurons": {"0": -1, "64": 1.1}},
        {"neurons": {"64": 1.1}},
        {"outside": float("inf")},
        {"heads": [0, 0, 0], "neurons": {"0": 0, "64": 0}, "outside": 0},
    ):
        damaged.append(json.dumps(good | {"costs": costs | change}))
    for content in damaged:
        (tmp_path / "file.json").write_text(content)
        with pytest.raises(RecipeError, match="is no profile"):
            read_profile(tmp_path / "file.json")
    (tmp_path / "file.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is no profile"):
        read_profile(tmp_path / "file.json")
    (tmp_path / "file.json").write_text(json.dumps(good))
    assert read_profile(tmp_path / "file.json") == fake_profile()
