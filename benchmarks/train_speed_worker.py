"""Measures one row of `train_speed.py` in a process of its own; prints one line of JSON."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from train_speed_rows import QUICK, ROWS, patch


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
    """Keeps the seconds of each part of a step, and those of whole steps.

    Args:
        warm, steps: how many do not count, and how many do.
        settle: waits until the device has done what it was given; None: there is none to wait for.
        parts: whether to time parts, and so to wait around each.
    """

    def __init__(
        self, threads: int, warm: int, steps: int, settle: Callable[[], None] | None = None, *, parts: bool = True
    ) -> None:
        self.now = time.process_time if threads == 1 and settle is None else time.perf_counter
        self.warm, self.steps, self.with_parts = warm, steps, parts
        self.settle = settle or (lambda: None)
        self.parts: dict[str, float] = defaultdict(float)
        self.ticks: list[float] = []

    @property
    def counts(self) -> bool:
        """Whether the present step is one of those that count."""
        return len(self.ticks) > self.warm

    @property
    def enough(self) -> bool:
        """Whether all of them are done."""
        return len(self.ticks) > self.warm + self.steps

    def timed(self, name: str | Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
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
    """Run the row's stage with its parts timed."""
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
    limits = [f"{each}.max_steps=2" for each in stages if each != stage]
    limits += [f"{each}.scored_train_rows=0" for each in stages]
    limits += ["teacher.accept=true"]  # two steps teach nothing, and only time is measured
    limits += [f"device={options.device}", f"{stage}.epochs={20 + steps}"]
    limits += [f"{each}.batch_size={options.batch}" for each in stages if options.batch]
    quick = QUICK if name != "reference" else ("prune.events=1", "prune.ramp=1e-9")
    evaluation.evaluate = lambda *_, **__: {"score": 0.0}  # type: ignore[assignment]
    settle = torch.cuda.synchronize if on_gpu else None
    clock = Clock(options.threads, options.warm, options.steps, settle, parts=options.profile or not on_gpu)
    counted: dict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(options, Path(folder) / "model") if options.random_model else options.model
        flags = {"task": options.task, "data": options.data, "model": model}
        made = run.Run.for_recipe(Path(folder) / "run", recipe.build_recipe(name, flags, [*limits, *quick, *sets]))
        before = stages[: stages.index(stage)]
        for each in before:
            _stage(each, made)
        patch(patches)
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        _instrument(clock, counted, stage, profiler if options.profile and not on_gpu else None)
        with suppress(_Enough):
            _stage(stage, made)
    seconds = clock.ticks[-1] - clock.ticks[options.warm]
    count = len(clock.ticks) - 1 - options.warm
    parts = {part: spent / count for part, spent in clock.parts.items()}
    if "optimiser" in parts:  # the hold on the masks works inside the optimiser's step
        after = parts.pop("after step", 0.0)
        parts["optimiser"], parts["masks"] = parts["optimiser"] - after, parts.get("masks", 0.0) + after
    parts["rest"] = seconds / count - sum(parts.values())
    result = {
        "examples_per_second": counted["rows"] / seconds,
        "tokens_per_second": counted["tokens"] / seconds,
        "step_seconds": seconds / count,
        "gflops": counted["flops"] / count / 1e9,
        "peak_megabytes": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else _high_water(),
        "parts": parts,
    }
    if options.profile and not on_gpu:
        result["inside"] = _share_of_products(profiler)
    return result


def peak_speeds() -> dict[str, float]:
    """GFLOP/s of the best of a few large square products, by torch and by oneDNN."""
    import torch

    best: dict[str, float] = {"fp32": 0.0, "bf16": 0.0, "fp32, torch alone": 0.0}
    for size in (512, 1024, 2048):
        for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            left, right = (torch.randn(size, size).to(kind) for _ in range(2))
            ways = {"torch": lambda left=left, right=right: left @ right}
            if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
                product = torch.ops.mkldnn._linear_pointwise
                ways["onednn"] = lambda left=left, right=right, product=product: product(
                    left, right, None, "none", [], ""
                )
            for way, multiply in ways.items():
                multiply()
                for _ in range(8):
                    start = time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
                    multiply()
                    end = time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
                    speed = 2 * size**3 / (end - start) / 1e9
                    best[name] = max(best[name], speed)
                    if (name, way) == ("fp32", "torch"):
                        best["fp32, torch alone"] = max(best["fp32, torch alone"], speed)
    return best


def gpu_peaks() -> dict[str, float]:
    """GFLOP/s of the best of a few large square products, in the precision that the product leaves torch at."""
    import torch

    best = {"fp32": 0.0, "bf16": 0.0}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for size in (4096, 8192):
        for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            left, right = (torch.randn(size, size, device="cuda", dtype=kind) for _ in range(2))
            for _ in range(6):  # the first one warms up
                start.record()
                for _ in range(5):
                    left @ right
                end.record()
                end.synchronize()
                best[name] = max(best[name], 5 * 2 * size**3 / start.elapsed_time(end) / 1e6)
    return best


def random_model(options: argparse.Namespace, folder: Path) -> str:
    """A folder with a BERT of random weights and the tokenizer of `--model`, without it that of the embedded task."""
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
    """The steps that count are done."""


def _stage(name: str, made: Any) -> None:
    import importlib

    getattr(importlib.import_module(f"spdtool.stages.{name}"), name)(made)


def _instrument(clock: Clock, counted: dict[str, float], stage: str, profiler: Any) -> None:
    """Time the parts of a step where the loop calls them, and stop when enough steps are done."""
    import torch
    from accelerate import Accelerator

    from spdtool.distillation import lesson
    from spdtool.models.layers import find_prunable_weights
    from spdtool.pruning.masks import Masks
    from spdtool.stages import phase, teacher
    from spdtool.training import loop, prefetch

    ready, adamw, fit = prefetch.prefetch_batches, loop.create_adamw, loop.fit
    take = clock.timed("data", next)
    sizes: dict[str, int] = {}

    @contextmanager
    def watched(batches: Any, device: Any) -> Iterator[Iterator[Any]]:
        with ready(batches, device) as made:
            yield stepping(made)

    def stepping(made: Iterator[Any]) -> Iterator[Any]:
        while True:
            clock.tick()
            if clock.counts and len(clock.ticks) == clock.warm + 1:
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
                if profiler is not None:
                    profiler.start()
            if clock.enough:
                if profiler is not None:
                    profiler.stop()
                raise _Enough
            step, size, pieces = take(made)
            yield step, size, counting(iter(pieces))

    def counting(pieces: Iterator[Any]) -> Iterator[Any]:
        while (piece := take(pieces, None)) is not None:
            if clock.counts:
                count(piece.batch)
            yield piece

    def count(batch: Any) -> None:
        rows, length = batch["input_ids"].shape
        passes = 3 + (stage != "teacher" and "teacher_logits" not in batch)
        counted["rows"] += rows
        counted["tokens"] += int(batch["attention_mask"].sum())
        counted["flops"] += passes * rows * length * (2 * sizes["weights"] + 4 * length * sizes["attention"])

    def optimiser(trained: Any, *args: Any) -> Any:
        made = adamw(trained, *args)
        step = made.step
        made.step = clock.timed("optimiser", step)
        return made

    def fitting(learner: Any, *args: Any, **options: Any) -> Any:
        sizes["weights"] = sum(weight.numel() for weight in find_prunable_weights(learner.model).values())
        sizes["attention"] = learner.model.config.num_hidden_layers * learner.model.config.hidden_size
        return fit(learner, *args, **options)

    phase.fit = teacher.fit = fitting  # type: ignore[assignment]
    prefetch.prefetch_batches = watched  # type: ignore[assignment]
    loop.create_adamw = optimiser
    compute_outputs = lesson.compute_outputs  # type: ignore[attr-defined]
    who = lambda model, *_: "student" if model.training else "teacher"  # noqa: E731
    lesson.compute_outputs = clock.timed(who, compute_outputs)  # type: ignore[attr-defined]
    lesson.distillation_loss = clock.timed("loss", lesson.distillation_loss)  # type: ignore[attr-defined]
    Accelerator.backward = clock.timed("backward", Accelerator.backward)  # type: ignore[method-assign]
    Accelerator.clip_grad_norm_ = clock.timed("clip", Accelerator.clip_grad_norm_)  # type: ignore[method-assign]
    Masks.zero_gradients = clock.timed("masks", Masks.zero_gradients)  # type: ignore[method-assign]
    Masks._after_step = clock.timed("after step", Masks._after_step)  # type: ignore[method-assign]


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
