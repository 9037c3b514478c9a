"""Time one encoder layer at every shape: every number of heads, and a grid of feed-forward widths.

Encoders of two layers with random weights are timed in interleaved rounds (`latency.py`). Both
layers have the same shape, and only heads or only neurons are removed. Differences of the times
give those of a layer's parts; a model of one layer tells what an encoder spends outside of its
layers. Six of the encoders are exported as any checkpoint is; the graphs of the others are derived
from these (`shape_graphs.py`).
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spdtool import console
from spdtool.bench.engines import Engine
from spdtool.bench.latency import Timing, time_engines
from spdtool.bench.profiles import TimedInput, layer_sizes
from spdtool.bench.ratios import fastest_at, paired_ratio
from spdtool.bench.runtimes import require_runtime, run_in, runtime_version
from spdtool.bench.shape_graphs import DEVIATION, GraphFamily
from spdtool.errors import ModelError
from spdtool.run.fingerprint import describe_processor
from spdtool.run.records import LayerCosts, Ratio, ShapeProfile

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from spdtool.models.structures import Structures
    from spdtool.pruning.structure import LayerShape

OPSET = 18
INPUTS = ("input_ids", "attention_mask")
TIMED_LAYERS = 2
TIMED_WIDTHS = 12  # between them times are interpolated
WIDTH_STEP = 32
# Random tokens out of these: a larger embedding costs memory in every timed process, and no time.
VOCABULARY = 1000
ROUNDS, WARMUP = 12, 2
SECONDS = 60.0  # for all rounds of a profile


@dataclass(frozen=True)
class TimedPoint:
    """A random encoder that is timed: `layers` layers of one shape."""

    layers: int
    heads: int
    neurons: int

    @property
    def name(self) -> str:
        """Name of its engine and its file."""
        return f"{self.layers} layers, {self.heads} heads, {self.neurons} neurons"


def measure_layer_times(
    config: PretrainedConfig, timed: TimedInput, *, rounds: int = ROUNDS, seconds: float = SECONDS
) -> ShapeProfile:
    """Time an encoder layer of every shape on this machine's processor.

    Args:
        config: of the dense encoder; its depth does not matter.
        rounds: most interleaved rounds.
        seconds: for all of them; at least six are made.

    Raises:
        DeviceError: the runtime cannot be timed here.
        ModelError: the architecture cannot be exported, or its heads and neurons cannot be removed.
        SpdError: a timed process died, or did not answer in time.
    """
    require_runtime(timed.runtime)
    heads, neurons = layer_sizes(build_random_encoder(config, 1))
    with tempfile.TemporaryDirectory() as folder:
        with console.busy("exporting random encoders of several shapes"):
            by_point = export_points(config, heads, neurons, Path(folder))
        dense = TimedPoint(TIMED_LAYERS, heads, neurons)
        points, engines = list[TimedPoint](), list[Engine]()
        for point, engine in by_point.items():
            is_dense = (point.heads, point.neurons) == (heads, neurons)
            for form in list_forms(engine, timed.runtime) if is_dense else [engine]:
                points.append(point)
                engines.append(run_in(form, timed.runtime))
        with console.busy(
            f"timing an encoder layer at {len(by_point)} shapes, batch {timed.batch}, length {timed.length}"
        ):
            result = time_engines(
                engines, [timed.shape], threads=(timed.threads,), rounds=rounds, warmup=WARMUP, seconds=seconds
            )
    times: dict[TimedPoint, float] = {}
    for point, milliseconds in zip(points, paired_medians(result.timings, points.index(dense)), strict=True):
        times[point] = min(milliseconds, times.get(point, milliseconds))
    return ShapeProfile(
        spdtool=metadata.version("spdtool"),
        runtime=timed.runtime,
        version=runtime_version(timed.runtime),
        processor=describe_processor(),
        threads=timed.threads,
        batch=timed.batch,
        length=timed.length,
        family=config.model_type,
        width=config.hidden_size,
        heads=heads,
        neurons=neurons,
        rounds=count_rounds(result.timings),
        costs=solve_costs(times, heads, neurons),
    )


class SpeedTrial:
    """Times whole random encoders of several shapes against the dense one, side by side in one runtime.

    The layers of a whole encoder do not fit into the caches together: the sum of a table's times
    does not know it. The dense one is exported once. Use it as a context: it holds a temporary
    folder.

    Args:
        config: of the dense encoder.
        layers: of it.
        timed: the input, and the runtime.
        rounds, seconds: as of `measure_layer_times`, of each trial.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        layers: int,
        timed: TimedInput,
        *,
        rounds: int = ROUNDS,
        seconds: float = SECONDS,
    ) -> None:
        self.config, self.layers, self.timed, self.rounds, self.seconds = config, layers, timed, rounds, seconds

    def __enter__(self) -> SpeedTrial:
        self.folder = tempfile.TemporaryDirectory()
        full = layer_sizes(build_random_encoder(self.config, 1))
        self.dense = export_engine(self.config, [full] * self.layers, Path(self.folder.name), "dense")
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.cleanup()

    def measure(self, shape: Sequence[LayerShape]) -> Ratio:
        """Return how many times faster an encoder of that shape is; raises as `measure_layer_times`."""
        sizes = [(layer.heads, layer.neurons) for layer in shape]
        small = export_engine(self.config, sizes, Path(self.folder.name), "small")
        forms = list_forms(self.dense, self.timed.runtime)
        result = time_engines(
            [run_in(engine, self.timed.runtime) for engine in (*forms, small)],
            [self.timed.shape],
            threads=(self.timed.threads,),
            rounds=self.rounds,
            warmup=WARMUP,
            seconds=self.seconds,
        )
        *dense_timings, small_timing = result.timings
        return paired_ratio([fastest_at(self.timed.shape, dense_timings)], small_timing, [self.timed.shape])


def list_forms(dense: Engine, runtime: str) -> list[Engine]:
    """Return the dense engine, and in onnxruntime also without fused operators, which may be the faster form.

    The bench takes the faster one for 1x, so a goal that knew the fused one alone would miss its promise.
    """
    if runtime != "onnxruntime":
        return [dense]
    return [dense, replace(dense, name=f"{dense.name}, unfused", fused=False)]


def export_points(config: PretrainedConfig, heads: int, neurons: int, folder: Path) -> dict[TimedPoint, Engine]:
    """Write the graphs of all encoders to time.

    Args:
        heads, neurons: of a dense layer.

    Returns:
        One dense layer, two dense ones, and two with fewer heads or fewer neurons, to the engine of
        each. Where graphs cannot be derived, only three sizes of either.
    """
    import onnx

    from spdtool.export.graph.trace import write_model

    dense, half = TimedPoint(TIMED_LAYERS, heads, neurons), (heads // 2, round_to_step(neurons / 2))
    corners = [TimedPoint(1, heads, neurons), dense]
    corners += [TimedPoint(TIMED_LAYERS, count, neurons) for count in {0, half[0]}]
    corners += [TimedPoint(TIMED_LAYERS, heads, width) for width in {0, half[1]} - {neurons}]
    engines = {}
    for point in corners:
        engines[point] = export_engine(config, [(point.heads, point.neurons)] * point.layers, folder, point.name)
    others: dict[str, list[TimedPoint]] = {"heads": [], "neurons": []}
    others["heads"] = [TimedPoint(TIMED_LAYERS, count, neurons) for count in range(1, heads)]
    others["neurons"] = [TimedPoint(TIMED_LAYERS, heads, width) for width in timed_widths(neurons)]
    for size, points in others.items():
        derived = [point for point in points if point not in engines]
        if not derived:
            continue
        small = (
            TimedPoint(TIMED_LAYERS, half[0], neurons) if size == "heads" else TimedPoint(TIMED_LAYERS, heads, half[1])
        )
        with contextlib.suppress(ModelError):
            family = GraphFamily(
                onnx.load(engines[dense].path),
                onnx.load(engines[small].path),
                (getattr(dense, size), getattr(small, size)),
            )
            for point in derived:
                file = folder / f"{point.name}.onnx"
                write_model(family.graph_at(getattr(point, size)), file)
                engines[point] = replace(engines[dense], name=point.name, path=str(file))
    return engines


def timed_widths(neurons: int) -> list[int]:
    """List the widths to time, rising: none, the narrowest, and even steps up to all."""
    widths = {round_to_step(width) for width in np.linspace(0, neurons, TIMED_WIDTHS - 1).tolist()}
    narrow = {width for width in widths | {WIDTH_STEP, round_to_step(neurons / 2)} if width < neurons}
    return [*sorted(narrow), neurons]


def round_to_step(width: float) -> int:
    """Round to a multiple of 32, which the vectors of every kernel divide."""
    return WIDTH_STEP * round(width / WIDTH_STEP)


def solve_costs(times: Mapping[TimedPoint, float], heads: int, neurons: int) -> LayerCosts:
    """Split the times of encoders into those of a layer's attention and feed-forward and of all outside of layers.

    Args:
        times: milliseconds of one dense layer, of two, and of two with fewer heads or fewer neurons.
        heads, neurons: of a dense layer.
    """
    dense = times[TimedPoint(TIMED_LAYERS, heads, neurons)]
    # What noise makes negative costs nothing.
    layer = max(0.0, (dense - times[TimedPoint(1, heads, neurons)]) / (TIMED_LAYERS - 1))
    by_heads: dict[int, float] = {}
    by_width: dict[int, float] = {}
    for point, milliseconds in times.items():
        if point.layers != TIMED_LAYERS:
            continue
        saved = (dense - milliseconds) / TIMED_LAYERS
        if point.neurons == neurons:
            by_heads[point.heads] = saved
        if point.heads == heads:
            by_width[point.neurons] = saved
    head_savings, width_savings = make_falling(by_heads), make_falling(by_width)
    # What remains of a layer without heads and neurons: two normalisations, one for either half.
    remainder = max(0.0, layer - head_savings[0] - width_savings[0]) / 2
    return LayerCosts(
        unit="ms",
        heads=[head_savings[0] - saved + remainder for saved in interpolate(head_savings, heads)],
        neurons={width: width_savings[0] - saved + remainder for width, saved in width_savings.items()},
        outside=max(0.0, dense - TIMED_LAYERS * layer),
    )


def interpolate(values: Mapping[int, float], most: int) -> list[float]:
    """Return a value for every whole number from 0 to `most`, of which at least these two have one."""
    keys = sorted(values)
    known_values = [values[key] for key in keys]
    return [float(value) for value in np.interp(range(most + 1), keys, known_values)]


def make_falling(values: Mapping[int, float]) -> dict[int, float]:
    """Smooth noise out of values that cannot rise with their key: the mean of the nearest bounds, least changed."""
    keys = sorted(values)
    ordered = np.asarray([values[key] for key in keys])
    # The least falling curve above all values, and the largest one below them.
    above = np.maximum.accumulate(ordered[::-1])[::-1]
    below = np.minimum.accumulate(ordered)
    return dict(zip(keys, ((above + below) / 2).tolist(), strict=True))


def build_random_encoder(config: PretrainedConfig, layers: int) -> PreTrainedModel:
    """Build a classifier of that architecture with random weights, a small vocabulary and `layers` layers."""
    import torch

    from spdtool.models.load import build_shallow

    small = copy.deepcopy(config)
    small.vocab_size = min(VOCABULARY, config.vocab_size)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
        token = getattr(small, name, None)
        if isinstance(token, int) and token >= small.vocab_size:
            setattr(small, name, 0)
    model = build_shallow(small, layers)
    model.set_attn_implementation("eager")  # as `trace_checkpoint` does for this operator set
    with torch.no_grad():
        for parameter in model.parameters():  # equal biases would become one constant of the graph
            parameter.add_(torch.randn_like(parameter), alpha=DEVIATION)
    return model


def export_engine(config: PretrainedConfig, shape: Sequence[tuple[int, int]], folder: Path, name: str) -> Engine:
    """Export a random encoder whose layers have those numbers of heads and neurons; return the engine that runs it."""
    from spdtool.export.graph.trace import trace_model, write_model
    from spdtool.models.shrink import shrink
    from spdtool.models.structures import find_structures

    model = build_random_encoder(config, len(shape))
    for layer, (heads, neurons) in zip(find_structures(model), shape, strict=True):
        clear_structures(layer.heads, heads)
        clear_structures(layer.neurons, neurons)
    names = [name for name in INPUTS if name in inspect.signature(model.forward).parameters]
    file = folder / f"{name}.onnx"
    write_model(trace_model(shrink(model), names, OPSET), file)
    pad = getattr(model.config, "pad_token_id", None) or 0
    return Engine(name=name, kind="onnxruntime", path=str(file), vocabulary=model.config.vocab_size, pad=pad)


def clear_structures(structures: Structures, live: int) -> None:
    """Set all structures of a layer but the first `live` to zero, so that they can be left out."""
    import torch

    dead = torch.arange(structures.count) >= live
    with torch.no_grad():
        for linear in structures.inputs.values():
            for parameter in linear.parameters():
                parameter[structures.rows(dead, linear)] = 0
        structures.output.weight[:, structures.columns(dead)] = 0


def paired_medians(timings: Sequence[Timing], reference: int) -> list[float]:
    """Return milliseconds of engines that were timed at one shape.

    The ratio to a reference is taken within each round, which sees one state of the machine, and
    the median of the ratios is put in the unit of the reference's median.
    """
    rounds = np.asarray([next(iter(timing.rounds.values())) for timing in timings])
    ratios = np.median(rounds / rounds[reference], axis=1)
    return [float(ratio) for ratio in ratios * np.median(rounds[reference])]


def count_rounds(timings: Sequence[Timing]) -> int:
    """Number of rounds that were made."""
    (rounds,) = timings[0].rounds.values()
    return len(rounds)
