"""How fast is a training step, what does each of its parts cost, and what does each feature of the loop buy?

    python benchmarks/train_speed.py --task mrpc --data GLUE --model all-MiniLM-L6-v2 --out build/train-mrpc.json
    python benchmarks/train_speed.py                        # the embedded task and its small model

Every row is a setting of the product's own loop, run as its stage in a process of its own; rounds are interleaved, and
ratios are taken within a round. The row `published` does what the published code does: batches in random order padded
to `max_length`, attention maps of all layers, stand-in layers with dropout, AdamW one tensor at a time, masks applied
after every step, torch's own products. With one thread, time is the process's CPU time, so that a busy machine may be
used. Evaluations, prune events, loading and the first steps do not count.

The utilisation is that of matrix products by their shapes: per padded token 2 multiply-adds of every weight of the
layers, and attention; once for the teacher, three times for the student. `inside` is the speed within the products, by
their share of a profile. What the teacher shows is computed before the steps that count, once for all rounds; a row
without that tells what it saves.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

WARM = 4  # steps that do not count
QUICK = ("prune.criterion=magnitude", "prune.calibration=0", "prune.events=1", "prune.first=none", "prune.ramp=1e-9")
LOGITS = ("prune.loss.hidden=0.0",)
PUBLISHED = ("unfused", "masks every step", "torch products")

# name: (recipe, stage, --set assignments, what is patched)
ROWS: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    "published": ("reference", "prune", (), PUBLISHED),
    "fp32": ("default", "prune", (), ()),
    "bf16": ("default", "prune", ("precision=bf16",), ()),
    "fp32, teacher stage": ("default", "teacher", (), ()),
    "fp32, finetune stage": ("default", "finetune", (), ()),
    "fp32, teacher looks at each batch": ("default", "prune", (), ("teacher looks",)),
    "bf16, teacher looks at each batch": ("default", "prune", ("precision=bf16",), ("teacher looks",)),
    "fp32, logits alone": ("default", "prune", LOGITS, ()),
    "fp32, logits alone, teacher looks at each batch": ("default", "prune", LOGITS, ("teacher looks",)),
    "fp32, layers and head alone": ("default", "prune", ("prune.train=layers+head",), ()),
    "fp32 without bucketing": ("default", "prune", (), ("random order",)),
    "fp32 padded to max_length": ("default", "prune", ("bucketing=false",), ()),
    "fp32, AdamW unfused": ("default", "prune", (), ("unfused",)),
    "fp32, attention maps kept": ("default", "prune", (), ("attention maps",)),
    "fp32, torch's products": ("default", "prune", (), ("torch products",)),
    "fp32, masks after every step": ("default", "prune", (), ("masks every step",)),
    "fp32, sdpa": ("default", "prune", (), ("sdpa",)),
    "bf16, sdpa": ("default", "prune", ("precision=bf16",), ("sdpa",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="demo")
    parser.add_argument("--data", help="folder of the GLUE files")
    parser.add_argument("--model", help="encoder folder")
    parser.add_argument("--steps", type=int, default=16, help="steps that count, of each row in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    parser.add_argument("--against", default="published", help="the row that ratios are to")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options)))
        return
    with tempfile.TemporaryDirectory() as options.cache:  # shared by the rounds
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Measure the rows in turn, round after round, and print the table."""
    peaks = _child(options, "peak")
    print(f"peak, GFLOP/s: {', '.join(f'{name} {value:.0f}' for name, value in peaks.items())}", flush=True)
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for _ in range(options.rounds):
        for row in options.rows:
            found[row].append(_child(options, row))
            print(".", end="", file=sys.stderr, flush=True)
    inside = {row: _child(options, row, "--profile")["inside"] for row in options.rows if row in ("fp32", "bf16")}
    report = {
        row: summary(row, rounds, found.get(options.against), peaks, inside.get(row)) for row, rounds in found.items()
    }
    _draw(report)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        about = {"task": options.task, "threads": options.threads, "machine": platform.processor(), "peaks": peaks}
        options.out.write_text(json.dumps(about | {"rows": report, "rounds": found}, indent=1), "utf-8")


def summary(
    row: str, rounds: list[Any], base: list[Any] | None, peaks: dict[str, float], inside: Any
) -> dict[str, Any]:
    """Medians over the rounds, and ratios to the row `base` within each round."""
    median = {name: statistics.median(each[name] for each in rounds) for name in rounds[0] if name != "parts"}
    parts = {name: statistics.median(each["parts"].get(name, 0.0) for each in rounds) for name in rounds[0]["parts"]}
    peak = peaks["bf16" if row.startswith("bf16") else "fp32"]
    of_peak = median["gflops"] / median["step_seconds"] / peak
    result = median | {"parts": parts, "of_peak": of_peak}
    if base is not None:
        pairs = zip(rounds, base, strict=True)
        ratios = sorted(mine["examples_per_second"] / its["examples_per_second"] for mine, its in pairs)
        result["ratio"] = [statistics.median(ratios), ratios[0], ratios[-1]]
    if inside is not None:
        result["inside"] = median["gflops"] / (inside * median["step_seconds"]) / peak
    return result


def _draw(report: dict[str, dict[str, Any]]) -> None:
    names = ("data", "teacher", "student", "loss", "backward", "clip", "optimiser", "masks", "rest")
    print("\n| row | examples/s | tokens/s | ratio | of peak | inside | MB |", " | ".join(names), "|")
    print("|" + "---|" * (7 + len(names)))
    for row, found in report.items():
        middle, low, high = found.get("ratio", (float("nan"),) * 3)
        figures = [f"{found['examples_per_second']:.1f}", f"{found['tokens_per_second']:.0f}"]
        figures += [f"{middle:.2f} ({low:.2f}-{high:.2f})", f"{found['of_peak']:.0%}"]
        figures += [f"{found['inside']:.0%}" if "inside" in found else "", f"{found['peak_megabytes']:.0f}"]
        figures += [f"{1000 * found['parts'].get(name, 0.0):.1f}" for name in names]
        print("|", " | ".join([row, *figures]), "|")


def _child(options: argparse.Namespace, row: str, *more: str) -> dict[str, Any]:
    words = [sys.executable, __file__, "--child", row, "--task", options.task, "--steps", str(options.steps), *more]
    words += [f"--threads={options.threads}"] + [f"--data={options.data}"] * bool(options.data)
    words += [f"--model={options.model}"] * bool(options.model)
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "XDG_CACHE_HOME": options.cache}
    ended = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    if ended.returncode != 0:
        raise SystemExit(f"{row}:\n{ended.stderr}")
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return result


class Clock:
    """Keeps the seconds of each part of a step, and those of whole steps."""

    def __init__(self, threads: int) -> None:
        self.now = time.process_time if threads == 1 else time.perf_counter
        self.parts: dict[str, float] = defaultdict(float)
        self.ticks: list[float] = []

    def timed(self, name: str | Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start = self.now()
            result = function(*args, **options)
            self.parts[name if isinstance(name, str) else name(*args)] += self.now() - start
            return result

        return call

    def tick(self) -> None:
        self.ticks.append(self.now())
        if len(self.ticks) == WARM + 1:
            self.parts.clear()


def measure(row: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run the row's stage with its parts timed; in a process of its own."""
    import torch

    torch.set_num_threads(options.threads)
    if row == "peak":
        return peak_speeds()
    from spdtool import evaluation, recipe, run

    name, stage, sets, patches = ROWS[row]
    steps = WARM + options.steps + 1
    stages = ("teacher", "prune", "distill", "finetune")
    limits = [f"{each}.max_steps=2" for each in stages if each != stage]
    limits += [f"{each}.scored_train_rows=0" for each in stages]
    limits += ["device=cpu", f"{stage}.epochs={20 + steps}"]
    quick = QUICK if name != "reference" else ("prune.events=1", "prune.ramp=1e-9")
    flags = {"task": options.task, "data": options.data, "model": options.model}
    chosen = recipe.resolve(name, flags, [*limits, *quick, *sets])
    evaluation.evaluate = lambda *_, **__: {"score": 0.0}  # type: ignore[assignment]
    clock = Clock(options.threads)
    counted: dict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        made = run.Run.at(Path(folder) / "run", chosen)
        before = stages[: stages.index(stage)]
        for each in before:
            _stage(each, made)
        _patch(patches)
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        _instrument(clock, counted, options.steps, stage, profiler if options.profile else None)
        with suppress(_Enough):
            _stage(stage, made)
    seconds = clock.ticks[-1] - clock.ticks[WARM]
    count = len(clock.ticks) - 1 - WARM
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
        "peak_megabytes": _high_water(),
        "parts": parts,
    }
    if options.profile:
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


class _Enough(Exception):
    """The steps that count are done."""


def _stage(name: str, made: Any) -> None:
    import importlib

    getattr(importlib.import_module(f"spdtool.stages.{name}"), name)(made)


def _patch(patches: tuple[str, ...]) -> None:
    """Take a feature of the loop away."""
    import torch

    from spdtool import encoders, onednn, teacher_outputs, training
    from spdtool.pruning import masks
    from spdtool.stages import student

    if "torch products" in patches:
        onednn.pays = lambda: False  # type: ignore[assignment]
    if "unfused" in patches:
        adamw = torch.optim.AdamW
        slow = lambda *args, **options: adamw(*args, **options | {"fused": False, "foreach": False})  # noqa: E731
        training.torch.optim.AdamW = slow  # type: ignore[attr-defined,misc,assignment]
    if "masks every step" in patches:
        masks._clear = lambda tensor, dead: tensor.masked_fill_(dead, 0.0)  # type: ignore[assignment]
        masks.Masks._after_step = lambda self, *_: self.apply()  # type: ignore[method-assign]
    if "random order" in patches:
        batches = training.training_batches
        training.training_batches = lambda *args, **options: batches(*args, **options | {"bucketing": False})  # type: ignore[attr-defined]
    if "attention maps" in patches:
        observe = student.observe
        keep = lambda *args, **options: observe(*args, **options | {"attention": "probabilities"})  # noqa: E731
        student.observe = keep  # type: ignore[attr-defined,assignment]
    if "sdpa" in patches:
        load = encoders.load
        encoders.load = lambda *args, **options: load(*args, **options | {"eager": False})  # type: ignore[assignment]
    if "teacher looks" in patches:
        teacher_outputs.worth_keeping = lambda *_: False  # type: ignore[assignment]


def _instrument(clock: Clock, counted: dict[str, float], steps: int, stage: str, profiler: Any) -> None:
    """Time the parts of a step where the loop calls them, and stop when enough steps are done."""
    from accelerate import Accelerator

    from spdtool import encoders, training
    from spdtool.data import Encoded
    from spdtool.pruning.masks import Masks
    from spdtool.stages import student

    steps_of, adamw, fit = training._steps, training.adamw, training.fit
    sizes: dict[str, int] = {}

    def ticking(*args: Any, **options: Any) -> Iterator[Any]:
        for each in steps_of(*args, **options):
            clock.tick()
            if profiler is not None and len(clock.ticks) == WARM + 1:
                profiler.start()
            if len(clock.ticks) == WARM + 1 + steps:
                if profiler is not None:
                    profiler.stop()
                raise _Enough
            yield each

    collate = Encoded.collate

    def collated(self: Encoded, *args: Any, **options: Any) -> Any:
        batch = collate(self, *args, **options)
        if clock.ticks and len(clock.ticks) > WARM:
            rows, length = batch["input_ids"].shape
            passes = 3 + (stage != "teacher" and "teacher_logits" not in batch)
            counted["rows"] += rows
            counted["tokens"] += int(batch["attention_mask"].sum())
            counted["flops"] += passes * rows * length * (2 * sizes["weights"] + 4 * length * sizes["attention"])
        return batch

    def optimiser(trained: Any, *args: Any) -> Any:
        made = adamw(trained, *args)
        step = made.step
        made.step = clock.timed("optimiser", step)
        return made

    def fitting(parts: Any, *args: Any, **options: Any) -> Any:
        sizes["weights"] = sum(weight.numel() for weight in encoders.prunable_linears(parts.model).values())
        sizes["attention"] = parts.model.config.num_hidden_layers * parts.model.config.hidden_size
        return fit(parts, *args, **options)

    training.fit = fitting  # type: ignore[assignment]
    training._steps = ticking
    training.adamw = optimiser
    Encoded.collate = clock.timed("data", collated)  # type: ignore[method-assign]
    observe = student.observe  # type: ignore[attr-defined]
    who = lambda model, *_: "student" if model.training else "teacher"  # noqa: E731
    student.observe = clock.timed(who, observe)  # type: ignore[attr-defined]
    student.distillation = clock.timed("loss", student.distillation)  # type: ignore[attr-defined]
    Accelerator.backward = clock.timed("backward", Accelerator.backward)  # type: ignore[method-assign]
    Accelerator.clip_grad_norm_ = clock.timed("clip", Accelerator.clip_grad_norm_)  # type: ignore[method-assign]
    Masks.silence = clock.timed("masks", Masks.silence)  # type: ignore[method-assign]
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
