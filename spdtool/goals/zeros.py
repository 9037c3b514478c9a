"""Choose the sparsity of a sparse student that is so many times faster than its dense teacher.

A random encoder of the teacher's architecture gets random zeros in the recipe's pattern, is written
by the target that skips zeros, and timed against the dense one in onnxruntime. How fast it is
depends on how many zeros there are, hardly on where they are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spdtool import console
from spdtool.bench.engines import Engine
from spdtool.bench.latency import time_engines
from spdtool.bench.layer_times import WARMUP
from spdtool.bench.ratios import paired_ratio
from spdtool.bench.shape_graphs import DEVIATION
from spdtool.errors import PluginError, RecipeError
from spdtool.export.graph.trace import cached_traces
from spdtool.export.target import MODEL_FILE, Target, optional_targets, required_targets
from spdtool.goals.shape import timed_input
from spdtool.models.config import read_config
from spdtool.models.layers import find_prunable_weights
from spdtool.models.load import build_shallow, load_tokenizer, save_model
from spdtool.plugins import install_hint, library_targets
from spdtool.pruning.allocation import zeros_in
from spdtool.pruning.patterns import find_pattern
from spdtool.recipe.fields import Recipe
from spdtool.run.records import Ratio
from spdtool.tasks.prepare import find_task

SPARSITIES = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97)


def choose_sparsity(recipe: Recipe) -> tuple[float, Ratio]:
    """Return the lowest of `SPARSITIES` that is as fast as the goal asks for, and how fast it was.

    Raises:
        PluginError: no target that skips zeros is installed.
        RecipeError: even the highest is too slow.
        ModelError: the model cannot be read or exported.
    """
    target = find_skipping_target(recipe)
    speedup = recipe.goal.speedup
    assert speedup is not None
    model, tokenizer = build_random_model(recipe)
    timed = timed_input(recipe, model)
    ratios: dict[float, Ratio] = {}
    with (
        tempfile.TemporaryDirectory() as scratch,
        console.busy("timing random encoders of several sparsities"),
        cached_traces(),  # of all sparsities the graph is one
    ):
        dense = export_random(recipe, required_targets(recipe.export)[0].target, model, tokenizer, Path(scratch) / "0")

        def is_fast(sparsity: float) -> bool:
            clear_weights(model, recipe.prune.pattern, sparsity)
            engine = export_random(recipe, target, model, tokenizer, Path(scratch) / f"{sparsity:g}")
            result = time_engines(
                [replace(dense, baseline=True), engine],  # in the same rounds: the machine's state is that of both
                [timed.shape],
                threads=(timed.threads,),
                rounds=recipe.bench.rounds,
                warmup=WARMUP,
                seconds=recipe.bench.seconds,
            )
            ratios[sparsity] = paired_ratio([result.timings[0]], result.timings[1], [timed.shape])
            return ratios[sparsity].median >= speedup

        # 2:4 cannot have more than half of its weights zero.
        most = find_pattern(recipe.prune.pattern).largest_sparsity
        sparsity = bisect_first([candidate for candidate in SPARSITIES if candidate <= most], is_fast)
    if sparsity is None:
        best = max(ratios.values(), key=lambda ratio: ratio.median)
        raise RecipeError(
            f"a speed-up of {speedup:g} was asked for; {max(ratios):.0%} zeros give this encoder {best}",
            # A little less than measured: the next measurement differs in its last digit.
            f"ask for --speedup {best.median * 0.98:.2g} or less, or for another --kind",
        )
    return sparsity, ratios[sparsity]


def bisect_first(candidates: Sequence[float], holds: Callable[[float], bool]) -> float | None:
    """Return the first of rising candidates that holds, where all after it do; None: not even the last."""
    low, high = 0, len(candidates)
    while low < high:
        middle = (low + high) // 2
        if holds(candidates[middle]):
            high = middle
        else:
            low = middle + 1
    return candidates[low] if low < len(candidates) else None


def find_skipping_target(recipe: Recipe) -> Target:
    """Return the installed target whose operators skip zeros, in float32 or, for blocks, in int8.

    Raises:
        PluginError: there is none.
    """
    skipping = library_targets()
    for choice in (*required_targets(recipe.export), *optional_targets(recipe)[0]):
        if choice.name in skipping and choice.target.rounds_arithmetic == (recipe.goal.kind == "blocks"):
            return choice.target
    raise PluginError(
        "a sparse student is faster only in operators that skip zeros, and no plugin with such a target is installed",
        f"{install_hint('NAME')}, or ask for --kind small",
    )


def build_random_model(recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Build the recipe's model with random weights, with its tokenizer."""
    build = find_task(recipe).dataset.build
    if build is not None and recipe.given_teacher is None:
        model, tokenizer = build(recipe.seed)
        return model, tokenizer
    source = recipe.given_teacher or recipe.model
    config = read_config(source, new_head=recipe.given_teacher is None)
    # As many as `load_model` builds for a smoke run.
    layers = 2 if recipe.smoke else config.num_hidden_layers
    return build_shallow(config, layers), load_tokenizer(source)


@torch.no_grad()
def clear_weights(model: PreTrainedModel, pattern_name: str, sparsity: float) -> None:
    """Give every prunable matrix new random weights, of which a share is zero in the pattern."""
    pattern = find_pattern(pattern_name)
    rows, columns = pattern.block
    for weight in find_prunable_weights(model).values():
        # Random scores: where zeros lie hardly changes the time.
        blocks = torch.rand(weight.shape[0] // rows, weight.shape[1] // columns)
        zeros = zeros_in(weight.numel(), sparsity, pattern.block_size) // pattern.block_size
        alive = pattern.choose(blocks, zeros).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        weight.copy_(torch.randn(weight.shape) * DEVIATION * alive)


def export_random(
    recipe: Recipe, target: Target, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> Engine:
    """Save a model, export it for a target, and return the engine that runs it."""
    save_model(model, tokenizer, folder / "checkpoint")
    # What the smallest storage mostly is; which it is, the dev score of the trained student decides.
    export = recipe.export.model_copy(update={"values": "int8", "embeddings": "int8"})
    exported = folder / "exported"
    target.export(folder / "checkpoint", exported, recipe.model_copy(update={"export": export}))
    return Engine(
        name=target.name or "dense",
        kind="onnxruntime",
        path=str(exported / MODEL_FILE),
        vocabulary=model.config.vocab_size,
        pad=model.config.pad_token_id or 0,
        libraries=tuple(map(str, target.libraries(exported))),
    )
