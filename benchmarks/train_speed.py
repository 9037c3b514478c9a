"""How fast is a training step, what does each of its parts cost, and what does each feature of the loop buy?

    python benchmarks/train_speed.py --task mrpc --data GLUE --model all-MiniLM-L6-v2 --out build/train-mrpc.json
    python benchmarks/train_speed.py                        # the embedded task and its small model
    python benchmarks/train_speed.py --device cuda --random-model 768x12 --batch 128 --steps 100
    python benchmarks/train_speed.py --padding cola mrpc rte sst2 qnli --data GLUE --model all-MiniLM-L6-v2

Every row is a setting of the product's own loop, run as its stage in a process of its own; rounds are interleaved, and
ratios are taken within a round. The row `published` does what the published code does: batches in random order padded
to `max_length`, attention maps of all layers, stand-in layers with dropout, AdamW one tensor at a time, masks applied
after every step, torch's own products. With one thread, time is the process's CPU time, so that a busy machine may be
used. Evaluations, prune events, loading and the first steps do not count.

The utilisation is that of matrix products by their shapes: per padded token 2 multiply-adds of every weight of the
layers, and attention; once for the teacher, three times for the student. `inside` is the speed within the products, by
their share of a profile. What the teacher shows is computed before the steps that count, once for all rounds; a row
without that tells what it saves.

On a GPU a timed round waits for the device before the first step that counts and after the last one, and nowhere else;
what the parts of a step take is measured in a round of its own, which waits around each. Memory is the most that torch
had allocated in the steps that count. `--padding` measures something else: how much of what is computed is padding.
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
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

WARM = {"cpu": 4, "cuda": 30}  # steps that do not count: in the first ones layers are compiled
QUICK = ("prune.criterion=magnitude", "prune.calibration=0", "prune.events=1", "prune.first=none", "prune.ramp=1e-9")
LOGITS = ("prune.loss.hidden=0.0",)
BF16 = ("precision=bf16",)
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
    "fp32, with a sync in every step": ("default", "prune", (), ("sync",)),
    "bf16, with a sync in every step": ("default", "prune", BF16, ("sync",)),
    "bf16, compiled": ("default", "prune", (*BF16, "compile=true"), ()),
    "bf16, no prefetching": ("default", "prune", BF16, ("no prefetching",)),
    "bf16, AdamW unfused": ("default", "prune", BF16, ("unfused",)),
    "bf16, masks after every step": ("default", "prune", BF16, ("masks every step",)),
    "bf16, attention maps kept": ("default", "prune", BF16, ("attention maps",)),
    "bf16, 128 tokens": ("default", "prune", (*BF16, "bucketing=false"), ()),
    "bf16, 128 tokens, compiled": ("default", "prune", (*BF16, "bucketing=false", "compile=true"), ()),
    "bf16, teacher stage": ("default", "teacher", BF16, ()),
}
GPU_ALONE = (
    "bf16, compiled", "bf16, no prefetching", "bf16, AdamW unfused", "bf16, masks after every step",
    "bf16, attention maps kept", "bf16, 128 tokens", "bf16, 128 tokens, compiled", "bf16, teacher stage",
)  # fmt: skip
ON_GPU = ("published", "fp32", "bf16", "bf16, with a sync in every step", *GPU_ALONE)
ON_CPU = tuple(row for row in ROWS if row not in GPU_ALONE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="demo")
    parser.add_argument("--data", help="folder of the GLUE files")
    parser.add_argument("--model", help="encoder folder")
    parser.add_argument("--steps", type=int, default=16, help="steps that count, of each row in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", type=int, help="steps before those; in them layers are compiled")
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), metavar="ROW", help=f"of: {'; '.join(ROWS)}")
    parser.add_argument("--against", default="published", help="the row that ratios are to")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=list(WARM), default="cpu")
    parser.add_argument("--batch", type=int, help="rows of a batch; the recipe's 32 leave a large GPU waiting")
    parser.add_argument("--random-model", metavar="768x12", help="a BERT of that width and depth, without a file")
    parser.add_argument("--padding", nargs="*", metavar="TASK", help="measure the padding of these tasks, no speed")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.warm = WARM[options.device] if options.warm is None else options.warm
    options.rows = options.rows or list(ON_GPU if options.device == "cuda" else ON_CPU)
    if options.child:
        print(json.dumps(measure(options.child, options)))
        return
    if options.padding is not None:
        _draw_padding(options)
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
    looked_into = options.rows if options.device == "cuda" else [row for row in options.rows if row in ("fp32", "bf16")]
    profiles = {row: _child(options, row, "--profile") for row in looked_into}
    report = {
        row: summary(row, rounds, found.get(options.against), peaks, profiles.get(row)) for row, rounds in found.items()
    }
    _draw(report)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        about = {"task": options.task, "threads": options.threads, "machine": _machine(options.device), "peaks": peaks}
        options.out.write_text(json.dumps(about | {"rows": report, "rounds": found}, indent=1), "utf-8")


def summary(
    row: str, rounds: list[Any], base: list[Any] | None, peaks: dict[str, float], profile: dict[str, Any] | None
) -> dict[str, Any]:
    """Medians over the rounds, and ratios to the row `base` within each round.

    Args:
        profile: a round that was looked into; the parts of a step are its own where the timed rounds have none.
    """
    median = {name: statistics.median(each[name] for each in rounds) for name in rounds[0] if name != "parts"}
    parts = {name: statistics.median(each["parts"].get(name, 0.0) for each in rounds) for name in rounds[0]["parts"]}
    peak = peaks["bf16" if row.startswith("bf16") else "fp32"]
    of_peak = median["gflops"] / median["step_seconds"] / peak
    result = median | {"parts": parts, "of_peak": of_peak}
    if base is not None:
        pairs = zip(rounds, base, strict=True)
        ratios = sorted(mine["examples_per_second"] / its["examples_per_second"] for mine, its in pairs)
        result["ratio"] = [statistics.median(ratios), ratios[0], ratios[-1]]
    if profile is not None and "inside" in profile:
        result["inside"] = median["gflops"] / (profile["inside"] * median["step_seconds"]) / peak
    if profile is not None and parts.keys() == {"rest"}:
        result["parts"] = profile["parts"]
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
    words += [f"--model={options.model}"] * bool(options.model) + [f"--batch={options.batch}"] * bool(options.batch)
    words += [f"--random-model={options.random_model}"] * bool(options.random_model)
    words += [f"--device={options.device}", f"--warm={options.warm}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "XDG_CACHE_HOME": options.cache}
    ended = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    if ended.returncode != 0:
        raise SystemExit(f"{row}:\n{ended.stderr}")
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return result


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
    """Run the row's stage with its parts timed; in a process of its own."""
    import torch

    torch.set_num_threads(options.threads)
    on_gpu = options.device == "cuda"
    if row == "peak":
        return gpu_peaks() if on_gpu else peak_speeds()
    from spdtool import evaluation, recipe, run

    name, stage, sets, patches = ROWS[row]
    steps = options.warm + options.steps + 1
    stages = ("teacher", "prune", "distill", "finetune")
    limits = [f"{each}.max_steps=2" for each in stages if each != stage]
    limits += [f"{each}.scored_train_rows=0" for each in stages]
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
        made = run.Run.at(Path(folder) / "run", recipe.resolve(name, flags, [*limits, *quick, *sets]))
        before = stages[: stages.index(stage)]
        for each in before:
            _stage(each, made)
        _patch(patches)
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

    from spdtool import encoders, plugins
    from spdtool.tasks import demo

    width, layers = (int(word) for word in options.random_model.split("x"))
    tokenizer = encoders.load_tokenizer(options.model) if options.model else demo.tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width,
    )
    BertModel(config).save_pretrained(folder)
    encoders.save_tokenizer(tokenizer, folder)
    task = plugins.tasks.get(options.task)
    if task.build is not None:  # the embedded task would build its own
        plugins.tasks._parts.pop(options.task)
        plugins.tasks.register(options.task)(replace(task, build=None))
    return str(folder)


class _Enough(Exception):
    """The steps that count are done."""


def _stage(name: str, made: Any) -> None:
    import importlib

    getattr(importlib.import_module(f"spdtool.stages.{name}"), name)(made)


def _patch(patches: tuple[str, ...]) -> None:
    """Take a feature of the loop away."""
    import torch

    from spdtool import encoders, onednn, padding, prefetch, teacher_outputs, training
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
    if "sync" in patches:
        add = training._Window.add

        def reading(window: Any, terms: Any) -> None:
            float(terms["loss"])
            add(window, terms)

        training._Window.add = reading  # type: ignore[method-assign]
        padding.PaddingMask.of = lambda mask, **_: mask  # type: ignore[assignment,method-assign]
    if "no prefetching" in patches:
        prefetch.ready = lambda batches, _: nullcontext(batches)  # type: ignore[assignment]
    if "teacher looks" in patches:
        teacher_outputs.worth_keeping = lambda *_: False  # type: ignore[assignment]


def _instrument(clock: Clock, counted: dict[str, float], stage: str, profiler: Any) -> None:
    """Time the parts of a step where the loop calls them, and stop when enough steps are done."""
    import torch
    from accelerate import Accelerator

    from spdtool import encoders, prefetch, training
    from spdtool.pruning.masks import Masks
    from spdtool.stages import student

    ready, adamw, fit = prefetch.ready, training.adamw, training.fit
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

    def fitting(parts: Any, *args: Any, **options: Any) -> Any:
        sizes["weights"] = sum(weight.numel() for weight in encoders.prunable_linears(parts.model).values())
        sizes["attention"] = parts.model.config.num_hidden_layers * parts.model.config.hidden_size
        return fit(parts, *args, **options)

    training.fit = fitting  # type: ignore[assignment]
    prefetch.ready = watched  # type: ignore[assignment]
    training.adamw = optimiser
    observe = student.observe  # type: ignore[attr-defined]
    who = lambda model, *_: "student" if model.training else "teacher"  # noqa: E731
    student.observe = clock.timed(who, observe)  # type: ignore[attr-defined]
    student.distillation = clock.timed("loss", student.distillation)  # type: ignore[attr-defined]
    Accelerator.backward = clock.timed("backward", Accelerator.backward)  # type: ignore[method-assign]
    Accelerator.clip_grad_norm_ = clock.timed("clip", Accelerator.clip_grad_norm_)  # type: ignore[method-assign]
    Masks.silence = clock.timed("masks", Masks.silence)  # type: ignore[method-assign]
    Masks._after_step = clock.timed("after step", Masks._after_step)  # type: ignore[method-assign]


def padding_shares(lengths: Any, batch_size: int, max_length: int, epochs: int = 3) -> dict[str, float]:
    """What share of all positions is padding, by how batches are made.

    Args:
        lengths: tokens of each row.
    """
    import numpy as np

    from spdtool import data

    split = data.Encoded({}, np.concatenate([[0], np.cumsum(lengths)]), np.zeros(len(lengths)), {}, left=False)

    def share(bucketing: bool, length: int | None) -> float:
        positions = 0
        for epoch in range(epochs):
            batches = data.training_batches(split, batch_size, 0, epoch, bucketing=bucketing)
            positions += sum(len(batch) * int(length or lengths[batch].max()) for batch in batches)
        return 1 - epochs * int(lengths.sum()) / positions

    return {
        "batches of like length": share(True, None),
        "random batches": share(False, None),
        f"all padded to {max_length}": share(False, max_length),
    }


def _draw_padding(options: argparse.Namespace) -> None:
    from spdtool import data, encoders, recipe, tasks

    tokenizer = encoders.load_tokenizer(options.model)
    for number, name in enumerate(options.padding):
        chosen = recipe.resolve("default", {"task": name, "data": options.data})
        task = tasks.resolve(chosen)
        rows = data.tokenise(tokenizer, tasks.rows(task, chosen)["train"], chosen.max_length)
        shares = padding_shares(rows.lengths, options.batch or 32, chosen.max_length)
        if number == 0:
            print("| task | rows | tokens a row |", " | ".join(shares), "|\n|" + "---|" * (3 + len(shares)))
        cells = [name, f"{len(rows):,}", f"{rows.lengths.mean():.1f}", *(f"{share:.1%}" for share in shares.values())]
        print("|", " | ".join(cells), "|", flush=True)


def _machine(device: str) -> str:
    if device == "cpu":
        return platform.processor()
    import torch

    return torch.cuda.get_device_name()


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
