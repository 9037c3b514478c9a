"""Items of `gpu.py` that train with spdtool itself, or run its bench."""

from __future__ import annotations

import contextlib
import importlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpu import Context, Item, NotAvailableError, describe_error
from gpu_items import COMPILED_SECONDS, with_share

STAGES = ("teacher", "prune", "distill", "finetune")
SHORT_STEPS = 4  # of a stage whose result is compared, or that only prepares another one
WARM, STEPS = 6, 20  # steps of a timed stage: before the clock starts, and within it
TINY_WARM, TINY_STEPS = 1, 2
SYNC_FREE_STEPS = 20
RUN_SECONDS = 15  # that a run of BERT-base takes, with its teacher, up to the end of the timed steps
# What reads a number back. On a CPU, a step that has one would wait for a GPU.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "repeat_interleave"}
TRAINS = ("torch", "transformers", "pydantic", "datasets", "accelerate", "rich", "sklearn", "scipy", "safetensors")
EXPORTS = (*TRAINS, "onnx", "onnxscript", "onnxruntime")
COMPARED_TOKENS = 16
LAUNCHES = {
    "cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaMemcpyAsync",
    "cudaMemsetAsync",
}  # fmt: skip


class EnoughStepsError(Exception):
    """The steps that count are done."""


def build_run(folder: Path, device: str, *sets: str, model: str | None = None) -> Any:
    """A run of the embedded task with short stages.

    Raises:
        NotAvailableError: a setting is no field of this spdtool.
    """
    from spdtool.errors import RecipeError
    from spdtool.recipe.reading import build_recipe
    from spdtool.run.folder import Run

    short = [f"{stage}.max_steps={SHORT_STEPS}" for stage in STAGES]
    short += [f"{stage}.scored_train_rows=0" for stage in STAGES]
    short += [f"{stage}.batch_size=8" for stage in STAGES]
    short += ["max_rows=64", "teacher.accept=true", "prune.events=1", "prune.calibration=8", f"device={device}"]
    flags = {"task": "demo", **({"model": model} if model else {})}
    try:
        recipe = build_recipe("default", flags, [*short, *sets])
    except RecipeError as error:
        raise NotAvailableError(f"this recipe is not known here: {error.message}") from None
    return Run.for_recipe(folder, recipe)


def run_stage(name: str, run: Any) -> None:
    """Run one stage of a run."""
    getattr(importlib.import_module(f"spdtool.stages.{name}"), name)(run)


def read_weights(folder: Path) -> dict[str, Any]:
    """Read the weights of a checkpoint by name."""
    from safetensors.torch import load_file

    weights: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def largest_difference(before: Path, after: Path) -> float:
    """Largest difference of a weight between two checkpoints of one model."""
    expected, actual = read_weights(before), read_weights(after)
    return max(float((actual[name].float() - weight.float()).abs().max()) for name, weight in expected.items())


def compare_checkpoints(before: Path, after: Path) -> dict[str, float]:
    """Compare all weights of two checkpoints together, and where they are zero.

    Not weight by weight: AdamW moves one whose gradient is nothing but rounding, as that of a key's
    bias, as far as any other.
    """
    import torch

    expected, actual = read_weights(before), read_weights(after)
    differences, alike = [], []
    for name, weight in expected.items():
        differences.append((actual[name].float() - weight.float()).norm())
        if weight.dim() == 2:
            alike.append(((actual[name] == 0) == (weight == 0)).float().mean())
    norms = [weight.float().norm() for weight in expected.values()]
    return {
        "distance": float(torch.stack(differences).norm() / torch.stack(norms).norm()),
        "zeros alike": float(torch.stack(alike).mean()),
    }


def measure_phases(context: Context) -> dict[str, Any]:
    """Compare each stage on the device, in each precision, with the CPU in float32; both begin with the same weights.

    Else the smallest difference of one stage decides which of two like weights the next one prunes:
    on one CPU, another order of sums alone leaves 0.1 % of the zeros elsewhere.
    """
    from spdtool.errors import SpdError

    figures = context.figures
    settings = ("teacher.dropout=0", "prune.criterion=magnitude", "prune.ramp=1e-9")
    reference = build_run(context.folder / "phases-cpu", "cpu", "precision=fp32", *settings)
    for stage in STAGES:
        run_stage(stage, reference)
    for precision in ("fp32",) if context.tiny else ("fp32", "bf16", "fp16"):
        run = build_run(context.folder / f"phases-{precision}", context.device, f"precision={precision}", *settings)
        try:
            for stage in STAGES:
                run_stage(stage, run)
                name = f"{precision} {stage}"
                figures[name] = compare_checkpoints(reference.use_input(stage), run.use_input(stage))
                shutil.rmtree(run.path / stage)
                shutil.copytree(reference.path / stage, run.path / stage)
        except SpdError as error:
            figures[precision] = f"refused: {error.message}"
    return figures


@contextlib.contextmanager
def watched_steps(on_step: Any) -> Iterator[None]:
    """Call `on_step(number)` before each step of a training stage, and let its EnoughStepsError end the stage."""
    from spdtool.training import prefetch

    original = prefetch.prefetch_batches

    @contextlib.contextmanager
    def watched(*arguments: Any, **options: Any) -> Iterator[Iterator[Any]]:
        with original(*arguments, **options) as batches:
            yield counted(batches)

    def counted(batches: Iterator[Any]) -> Iterator[Any]:
        for number, batch in enumerate(batches):
            on_step(number)
            yield batch

    prefetch.prefetch_batches = watched
    try:
        with contextlib.suppress(EnoughStepsError):
            yield
    finally:
        prefetch.prefetch_batches = original


@contextlib.contextmanager
def without_evaluation() -> Iterator[None]:
    """Leave evaluations and log lines out of a stage: they read numbers back, and would count as steps."""
    from spdtool.training import loop

    originals = loop.choose_evaluation_steps, loop._log_step
    loop.choose_evaluation_steps = lambda *_: set()
    loop._log_step = lambda *_: None
    try:
        yield
    finally:
        loop.choose_evaluation_steps, loop._log_step = originals


def measure_sync_free(context: Context) -> dict[str, Any]:
    """Run steps in which any wait of the host for the device is an error; on a CPU, any read of a number."""
    figures, prepared = context.figures, None
    for name, graphs in (("launched one by one", "off"), ("in graphs", "auto")):
        # one length of batches, so that in the watched steps none is seen for the first time
        settings = ("bucketing=false", f"max_length={COMPARED_TOKENS}", "distill.epochs=50", "distill.max_steps=40")
        run = build_run(context.folder / f"sync-{graphs}", context.device, f"cuda_graph={graphs}", *settings)
        for stage in ("teacher", "prune"):
            if prepared is None:
                run_stage(stage, run)
            else:
                shutil.copytree(prepared.path / stage, run.path / stage)
        prepared = run
        try:
            figures[name] = count_free_steps(context, run)
        except RuntimeError as error:
            figures[name] = f"a step waits: {describe_error(error)}"
    return figures


def count_free_steps(context: Context, run: Any) -> int:
    """Return the number of steps of `distill` without a wait; raises RuntimeError at one that waits."""
    import torch

    first, count = (2, 2) if context.tiny else (WARM, SYNC_FREE_STEPS)
    watched = contextlib.ExitStack()

    def on_step(number: int) -> None:
        if number == first and context.device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        if number == first and context.device == "cpu":
            watched.enter_context(refused_reads())
        if number == first + count:
            raise EnoughStepsError

    try:
        with watched, without_evaluation(), watched_steps(on_step):
            run_stage("distill", run)
    finally:
        if context.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return count


@contextlib.contextmanager
def refused_reads() -> Iterator[None]:
    """Raise RuntimeError where a number is read back from a tensor, as torch does on a GPU in its debug mode."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Refusal(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ in READS:
                raise RuntimeError(f"called a synchronizing operation: {func}")
            return func(*args, **(kwargs or {}))

    with Refusal():  # type: ignore[no-untyped-call]
        yield


def measure_resume(context: Context) -> dict[str, Any]:
    """Stop a stage after its first snapshot, resume it, and compare the weights with an uninterrupted run."""
    figures = context.figures
    for name, setting in (("as it is", "false"), ("deterministic=true", "true")):
        try:
            difference = resume_difference(context, context.folder / setting, f"deterministic={setting}")
            figures[f"largest difference of a weight, {name}"] = difference
        except RuntimeError as error:  # an operation without a fixed order
            figures[f"largest difference of a weight, {name}"] = f"not possible: {describe_error(error)}"
    return figures


def resume_difference(context: Context, folder: Path, *sets: str) -> float:
    """Largest difference of a weight between a stage that was stopped and resumed, and one that was not."""
    from spdtool.training import snapshot

    uninterrupted = build_run(folder / "whole", context.device, "save_minutes=0", *sets)
    interrupted = build_run(folder / "stopped", context.device, "save_minutes=0", *sets)
    run_stage("teacher", uninterrupted)
    # the same teacher to the last bit, which a GPU need not train twice
    shutil.copytree(uninterrupted.path / "teacher", interrupted.path / "teacher")
    run_stage("prune", uninterrupted)
    original = snapshot.Snapshotter.save

    def save_and_die(self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        raise EnoughStepsError

    snapshot.Snapshotter.save = save_and_die  # type: ignore[method-assign]
    try:
        with contextlib.suppress(EnoughStepsError):
            run_stage("prune", interrupted)
    finally:
        snapshot.Snapshotter.save = original  # type: ignore[method-assign]
    run_stage("prune", interrupted)
    return largest_difference(uninterrupted.use_input("prune"), interrupted.use_input("prune"))


# model (width x layers), rows, further settings
TRAINING_ROWS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "BERT-base 32 bf16": ("768x12", 32, ("precision=bf16", "cuda_graph=off")),
    "BERT-base 32 bf16 graph": ("768x12", 32, ("precision=bf16", "cuda_graph=auto")),
    "BERT-base 128 bf16": ("768x12", 128, ("precision=bf16", "cuda_graph=off")),
    "BERT-base 128 bf16 graph": ("768x12", 128, ("precision=bf16", "cuda_graph=auto")),
    "MiniLM 32 bf16": ("384x6", 32, ("precision=bf16", "cuda_graph=off")),
    "MiniLM 32 bf16 graph": ("384x6", 32, ("precision=bf16", "cuda_graph=auto")),
    "BERT-base 32 fp32": ("768x12", 32, ("precision=fp32", "cuda_graph=off")),
    "BERT-base 32 tf32": ("768x12", 32, ("precision=fp32", "tf32=true", "cuda_graph=off")),
    "BERT-base 32 bf16 compiled": ("768x12", 32, ("precision=bf16", "compile=true")),
}


def measure_training(context: Context) -> dict[str, Any]:
    """Milliseconds of a pruning step with a teacher, and operations a second, of each row."""
    figures = context.figures
    for name, (model, rows, sets) in TRAINING_ROWS.items():
        if context.tiny and name != "BERT-base 32 fp32":
            continue
        if not context.has_time(RUN_SECONDS + COMPILED_SECONDS * ("compile=true" in sets)):
            figures[name] = "skipped: the item would not end in time"
            continue
        folder = context.folder / name.replace(" ", "-")
        try:
            figures[name] = with_share(context, *time_steps(context, folder, model, rows, *sets))
        except Exception as error:  # compilers raise many kinds
            figures[name] = f"not possible: {describe_error(error)}"
        shutil.rmtree(folder, ignore_errors=True)  # a gigabyte
    return figures


def time_steps(context: Context, folder: Path, model: str, rows: int, *sets: str) -> tuple[float, float]:
    """Milliseconds and floating-point operations of a step of the prune stage behind its only event."""
    import torch

    width, layers = (32, 2) if context.tiny else map(int, model.split("x"))
    tokens, rows = (16, 2) if context.tiny else (128, rows)
    warm, steps = (TINY_WARM, TINY_STEPS) if context.tiny else (WARM, STEPS)
    further = [f"prune.batch_size={rows}", f"prune.max_steps={warm + steps + 2}", f"max_length={tokens}"]
    further += ["max_rows=512", "bucketing=false", "prune.criterion=magnitude", "prune.ramp=1e-9", "prune.epochs=50"]
    # the teacher computes in every step: with its states kept, the count of operations below would be another
    further += ["teacher_states_share=0"]
    checkpoint = random_model(folder / "model", width, layers)
    run = build_run(folder / "run", context.device, *further, *sets, model=checkpoint)
    run_stage("teacher", run)
    wait: Callable[[], object] = torch.cuda.synchronize if context.device == "cuda" else lambda: None
    ticks: list[float] = []

    def on_step(number: int) -> None:
        if number in (warm, warm + steps):
            wait()
            ticks.append(time.perf_counter())
        if number == warm + steps:
            raise EnoughStepsError

    with without_evaluation(), watched_steps(on_step):
        run_stage("prune", run)
    weights = layers * 12 * width * width
    # two passes forward, of teacher and student, and the student's backward, which costs twice a forward
    flops = 4 * rows * tokens * (2 * weights + 4 * tokens * width * layers)
    return (ticks[1] - ticks[0]) / steps * 1000, float(flops)


def random_model(folder: Path, width: int, layers: int) -> str:
    """Write a BERT of random weights, with the tokenizer of the embedded task, whose own model it replaces."""
    from dataclasses import replace

    from transformers import BertConfig, BertModel

    from spdtool import plugins
    from spdtool.data import demo
    from spdtool.models.load import save_tokenizer

    tokenizer = demo.demo_tokenizer()
    heads = max(1, width // 64)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
    )
    BertModel(config).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    dataset = plugins.datasets.get("demo")
    if dataset.build is not None:  # the embedded task would build its own model
        plugins.datasets.unregister("demo")
        plugins.datasets.register("demo")(replace(dataset, build=None))
    return str(folder)


def measure_profile(context: Context) -> dict[str, Any]:
    """Operations of one step as the host launches them, and the kernels that take the most time."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = context.device == "cuda"
    first = 1 if context.tiny else WARM
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    profiler = profile(activities=activities)
    model = random_model(context.folder / "profiled-model", *((32, 2) if context.tiny else (768, 12)))
    sets = [f"prune.max_steps={first + 4}", "prune.epochs=50", "prune.ramp=1e-9", "prune.criterion=magnitude"]
    sets += ["cuda_graph=off", *(["precision=bf16"] if on_gpu else [])]  # a graph is one launch
    run = build_run(context.folder / "profiled", context.device, *sets, model=model)
    run_stage("teacher", run)

    def on_step(number: int) -> None:
        if number == first:
            profiler.start()
        if number == first + 1:
            if on_gpu:
                torch.cuda.synchronize()
            profiler.stop()
            raise EnoughStepsError

    with without_evaluation(), watched_steps(on_step):
        run_stage("prune", run)
    events = profiler.key_averages()
    figures = context.figures
    if on_gpu:  # what the driver was asked for; torch's own operations are nested, and views among them
        figures["launches of a step"] = sum(event.count for event in events if event.key in LAUNCHES)
    figures["operations of a step"] = sum(event.count for event in events if event.key.startswith("aten::"))
    timed = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    largest = sorted(events, key=lambda event: -getattr(event, timed))[:10]
    for event in largest:
        figures[f"largest {event.key[:60]}"] = f"{getattr(event, timed) / 1000:.3f} ms, {event.count} calls"
    return figures


def measure_bench(context: Context) -> dict[str, Any]:
    """Run `spdtool bench` on a smaller student of the embedded task; return its figures."""
    import spdtool
    from spdtool.export import onnx_session
    from spdtool.run.folder import Run

    sets = ["prune.heads=0.5", "prune.neurons=0.5", "bench.batches=[1,32]", "bench.lengths=[128]", "bench.seconds=40"]
    # files that nothing times here would only cost their gates' time
    runs = onnx_session.provider_problem(context.device) is None
    targets = "['onnx-fp16','onnx-ort-fp16']" if runs else "[]"
    sets += [f"export.optional={targets}", "bench.compiled=false", "bench.ledger=false"]
    sets += [f"{stage}.max_steps={SHORT_STEPS}" for stage in STAGES]
    sets += [f"{stage}.batch_size=8" for stage in STAGES]
    sets += ["max_rows=256", "teacher.accept=true", "prune.events=1"]
    folder = context.folder / "bench"
    # a smoke run has one shape only, of 16 tokens
    spdtool.compress("demo", run=folder, device=context.device, smoke=context.tiny, sets=sets)
    result = Run.open(folder).bench_result()
    figures = context.figures
    figures |= {"best": result.best, "speed": str(result.speed)}
    for record in result.latency:
        device = "-" if record.device_p50 is None else f"{record.device_p50:.3f}"
        figures[f"{record.engine} {record.shape}"] = f"{record.p50:.3f} ms, device {device}, {record.ratio}"
    return figures


FIRST = [
    Item(
        "phases against the CPU",
        60,
        {
            "fp32": "distance below 1e-4, zeros alike 1",
            "bf16": "distance below 3e-3, zeros alike 1",
            "fp16": "refused: the device has bf16",
        },
        measure_phases,
        TRAINS,
    ),
    Item("no wait in a step", 30, {"launched": "20", "in graphs": "20"}, measure_sync_free, TRAINS),
    Item(
        "training",
        110,
        {
            "BERT-base 32 fp32": "60 ms: 2.9 TFLOP at 50 TFLOP/s",
            "BERT-base 32 tf32": "15 ms",
            "BERT-base 32 bf16": "12 ms: the host launches 1,000 operations",
            "BERT-base 32 bf16 graph": "9 ms: 40 % of the peak",
            "BERT-base 128 bf16": "35 ms: 40 % of the peak",
            "MiniLM 32 bf16 graph": "2 ms",
            "BERT-base 32 bf16 compiled": "9 ms",
        },
        measure_training,
        TRAINS,
    ),
    Item("kill and resume", 35, {"largest": "0, or 1e-6 by atomic sums"}, measure_resume, TRAINS),
    Item(
        "profile of a step",
        25,
        {"launches of a step": "1,000 or fewer for 12 layers in bf16"},
        measure_profile,
        TRAINS,
    ),
]
SECOND = [
    Item(
        "spdtool bench",
        90,
        {"best": "student in torch fp16 graph", "speed": "1.1x: the embedded model is too small for a GPU"},
        measure_bench,
        EXPORTS,
    ),
]
