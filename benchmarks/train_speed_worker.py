"""Script of `train_speed.py`: measure one row in this process; print one line of JSON."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from train_speed_rows import QUICK, ROWS, find_attribute, patch, substitute


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row", help="a row, or peak")
    for name in ("task", "data", "model", "device", "random-model"):
        parser.add_argument(f"--{name}")
    for name in ("steps", "warm", "threads", "batch"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    print(json.dumps(measure(options.row, options)))


class Clock:
    """Measures the seconds of each part of a step, and of whole steps.

    Args:
        warm: number of warm-up steps before the measured ones.
        steps: number of measured steps.
        settle: waits until the device is idle; None on a CPU.
        with_parts: whether to time parts, which waits for the device around each.
    """

    def __init__(
        self, threads: int, warm: int, steps: int, settle: Callable[[], None] | None = None, *, with_parts: bool = True
    ) -> None:
        self.now = time.process_time if threads == 1 and settle is None else time.perf_counter
        self.warm, self.steps, self.with_parts = warm, steps, with_parts
        self.settle = settle or (lambda: None)
        self.parts: dict[str, float] = defaultdict(float)
        self.ticks: list[float] = []

    @property
    def is_measuring(self) -> bool:
        """Whether the present step is measured."""
        return len(self.ticks) > self.warm

    @property
    def is_finished(self) -> bool:
        """Whether all measured steps are done."""
        return len(self.ticks) > self.warm + self.steps

    def time_calls(self, name: str | Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        if not self.with_parts:
            return function

        def call(*args: Any, **options: Any) -> Any:
            self.settle()
            start = self.now()
            result = function(*args, **options)
            self.settle()
            self.parts[name if isinstance(name, str) else name(*args)] += self.now() - start
            return result

        return call

    def tick(self) -> None:
        if self.with_parts or len(self.ticks) in (self.warm, self.warm + self.steps):
            self.settle()
        self.ticks.append(self.now())
        if len(self.ticks) == self.warm + 1:
            self.parts.clear()


def measure(row: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run the stage of a row and return its measurements."""
    import torch

    torch.set_num_threads(options.threads)
    on_gpu = options.device == "cuda"
    if row == "peak":
        return gpu_peaks() if on_gpu else peak_speeds()
    from spdtool.models import predict as evaluation
    from spdtool.recipe import reading as recipe
    from spdtool.run import folder as run

    name, stage, sets, patches = ROWS[row]
    steps = options.warm + options.steps + 1
    stages = ("teacher", "prune", "distill", "finetune")
    limits = [f"{other_stage}.max_steps=2" for other_stage in stages if other_stage != stage]
    limits += [f"{other_stage}.scored_train_rows=0" for other_stage in stages]
    limits += ["teacher.accept=true"]  # two steps teach nothing, and only time is measured
    limits += [f"device={options.device}", f"{stage}.epochs={20 + steps}"]
    limits += [f"{other_stage}.batch_size={options.batch}" for other_stage in stages if options.batch]
    quick = QUICK if name != "reference" else ("prune.events=1", "prune.ramp=1e-9")
    substitute(evaluation, "evaluate", lambda *_, **__: {"score": 0.0})
    settle = torch.cuda.synchronize if on_gpu else None
    clock = Clock(options.threads, options.warm, options.steps, settle, with_parts=options.profile or not on_gpu)
    totals: dict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(options, Path(folder) / "model") if options.random_model else options.model
        flags = {"task": options.task, "data": options.data, "model": model}
        speed_run = run.Run.for_recipe(Path(folder) / "run", recipe.build_recipe(name, flags, [*limits, *quick, *sets]))
        before = stages[: stages.index(stage)]
        for other_stage in before:
            _stage(other_stage, speed_run)
        patch(patches)
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        _instrument(clock, totals, stage, profiler if options.profile and not on_gpu else None)
        with suppress(_Enough):
            _stage(stage, speed_run)
    seconds = clock.ticks[-1] - clock.ticks[options.warm]
    count = len(clock.ticks) - 1 - options.warm
    part_seconds = {part_name: spent / count for part_name, spent in clock.parts.items()}
    if "optimiser" in part_seconds:  # the hold on the masks works inside the optimiser's step
        after = part_seconds.pop("after step", 0.0)
        part_seconds["optimiser"], part_seconds["masks"] = (
            part_seconds["optimiser"] - after,
            part_seconds.get("masks", 0.0) + after,
        )
    part_seconds["rest"] = seconds / count - sum(part_seconds.values())
    result = {
        "examples_per_second": totals["rows"] / seconds,
        "tokens_per_second": totals["tokens"] / seconds,
        "step_seconds": seconds / count,
        "gflops": totals["flops"] / count / 1e9,
        "peak_megabytes": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else _high_water(),
        "parts": part_seconds,
    }
    if options.profile and not on_gpu:
        result["inside"] = _share_of_products(profiler)
    return result


def peak_speeds() -> dict[str, float]:
    """Return the best GFLOP/s of large square products, by torch and by oneDNN."""
    import torch

    best: dict[str, float] = {"fp32": 0.0, "bf16": 0.0, "fp32, torch alone": 0.0}
    for size in (512, 1024, 2048):
        for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            first, second = (torch.randn(size, size).to(kind) for _ in range(2))
            products: dict[str, Callable[[], torch.Tensor]] = {"torch": partial(torch.matmul, first, second)}
            if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
                product = torch.ops.mkldnn._linear_pointwise
                products["onednn"] = partial(product, first, second, None, "none", [], "")
            for library, multiply in products.items():
                multiply()
                for _ in range(8):
                    start = time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
                    multiply()
                    end = time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
                    speed = 2 * size**3 / (end - start) / 1e9
                    best[name] = max(best[name], speed)
                    if (name, library) == ("fp32", "torch"):
                        best["fp32, torch alone"] = max(best["fp32, torch alone"], speed)
    return best


def gpu_peaks() -> dict[str, float]:
    """Return the best GFLOP/s of large square products, in the precision that spdtool leaves torch at."""
    import torch

    best = {"fp32": 0.0, "bf16": 0.0}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    for size in (4096, 8192):
        for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            first, second = (torch.randn(size, size, device="cuda", dtype=kind) for _ in range(2))
            for _ in range(6):  # the first one warms up
                start.record()
                for _ in range(5):
                    first @ second
                end.record()
                end.synchronize()
                best[name] = max(best[name], 5 * 2 * size**3 / start.elapsed_time(end) / 1e6)
    return best


def random_model(options: argparse.Namespace, folder: Path) -> str:
    """Save a BERT of random weights with the tokenizer of `--model`, or of the embedded task; return its folder."""
    from transformers import BertConfig, BertModel

    from spdtool import plugins
    from spdtool.data import demo
    from spdtool.models.load import load_tokenizer, save_tokenizer

    width, layers = (int(word) for word in options.random_model.split("x"))
    tokenizer = load_tokenizer(options.model) if options.model else demo.demo_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width,
    )
    BertModel(config).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    task = plugins.datasets.get(options.task)
    if task.build is not None:  # the embedded task would build its own
        plugins.datasets.unregister(options.task)
        plugins.datasets.register(options.task)(replace(task, build=None))
    return str(folder)


class _Enough(Exception):
    """Raised when all measured steps are done."""


def _stage(name: str, run: Any) -> None:
    import importlib

    getattr(importlib.import_module(f"spdtool.stages.{name}"), name)(run)


def _instrument(clock: Clock, totals: dict[str, float], stage: str, profiler: Any) -> None:
    """Patch the loop to time the parts of a step, and to stop after the measured steps."""
    import torch
    from accelerate import Accelerator

    from spdtool.distillation import lesson
    from spdtool.models.layers import find_prunable_weights
    from spdtool.pruning.masks import Masks
    from spdtool.stages import phase, teacher
    from spdtool.training import loop, prefetch
    from spdtool.training.step import Stepper

    original_prefetch, adamw, fit = prefetch.prefetch_batches, find_attribute(loop, "create_adamw"), loop.fit
    take = clock.time_calls("data", next)
    sizes: dict[str, int] = {}

    @contextmanager
    def prefetch_watched(batches: Any, device: Any) -> Iterator[Iterator[Any]]:
        with original_prefetch(batches, device) as prepared:
            yield time_steps(prepared)

    def time_steps(prepared: Iterator[Any]) -> Iterator[Any]:
        while True:
            clock.tick()
            if clock.is_measuring and len(clock.ticks) == clock.warm + 1:
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
                if profiler is not None:
                    profiler.start()
            if clock.is_finished:
                if profiler is not None:
                    profiler.stop()
                raise _Enough
            step, size, micro_batches = take(prepared)
            yield step, size, count_each(iter(micro_batches))

    def count_each(micro_batches: Iterator[Any]) -> Iterator[Any]:
        while (micro_batch := take(micro_batches, None)) is not None:
            if clock.is_measuring:
                count(micro_batch.batch)
            yield micro_batch

    def count(batch: Any) -> None:
        rows, length = batch["input_ids"].shape
        passes = 3 + (stage != "teacher" and "teacher_logits" not in batch)
        totals["rows"] += rows
        totals["tokens"] += int(batch["attention_mask"].sum())
        totals["flops"] += passes * rows * length * (2 * sizes["weights"] + 4 * length * sizes["attention"])

    def create_timed_adamw(trained: Any, *args: Any, **options: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = adamw(trained, *args, **options)
        optimizer.step = clock.time_calls("optimiser", optimizer.step)  # type: ignore[method-assign]
        return optimizer

    def fit_with_sizes(learner: Any, *args: Any, **options: Any) -> Any:
        sizes["weights"] = sum(weight.numel() for weight in find_prunable_weights(learner.model).values())
        sizes["attention"] = learner.model.config.num_hidden_layers * learner.model.config.hidden_size
        return fit(learner, *args, **options)

    substitute(phase, "fit", fit_with_sizes)
    substitute(teacher, "fit", fit_with_sizes)
    substitute(prefetch, "prefetch_batches", prefetch_watched)
    substitute(loop, "create_adamw", create_timed_adamw)
    role_of = lambda model, *_: "student" if model.training else "teacher"  # noqa: E731
    timed_calls: tuple[tuple[Any, str, str | Callable[..., str]], ...] = (
        (lesson, "compute_outputs", role_of),
        (lesson, "distillation_loss", "loss"),
        (Stepper, "_backward", "backward"),
        (Accelerator, "clip_grad_norm_", "clip"),
        (Masks, "zero_gradients", "masks"),
        (Masks, "_after_step", "after step"),
    )
    for owner, name, title in timed_calls:
        substitute(owner, name, clock.time_calls(title, find_attribute(owner, name)))


def _high_water() -> float:
    status = Path("/proc/self/status").read_text("utf-8")
    return float(status.split("VmHWM:")[1].split()[0]) / 1024


def _share_of_products(profiled: Any) -> float:
    names = {"mkldnn::_linear_pointwise", "aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm"}
    events = profiled.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    return float(sum(event.self_cpu_time_total for event in events if event.key in names) / total)


if __name__ == "__main__":
    main()
