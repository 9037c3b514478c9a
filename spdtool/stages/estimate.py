"""What a run will take: minutes, disk, memory and the bytes of its result, for the plan.

Seconds come from a trial of the model's products on this machine (`cost.py`), sizes from the number
of parameters. What onnxruntime will take to export and to time is the roughest of it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spdtool.data.dataset import UNLABELED, Rows
from spdtool.data.tokens import tokenize
from spdtool.data.windows import tokenize_windows
from spdtool.distillation.teacher_cache import count_state_reads
from spdtool.export.sizes import estimate_files
from spdtool.export.target import ChosenTarget, optional_targets, required_targets
from spdtool.recipe import PHASES, TRAINING
from spdtool.recipe.fields import Recipe
from spdtool.recipe.training import Training
from spdtool.run.folder import Run
from spdtool.run.forecast import StageCost
from spdtool.run.records import Plan, ResourceEstimate, StageEstimate, WeightCounts
from spdtool.stages.cost import LEAST, MOST, CostModel, Workload
from spdtool.tasks.task import Task
from spdtool.training.snapshot import KEPT_SNAPSHOTS

FLOAT_BYTES = 4
ADAM_MOMENTS = 2
BEST_COPIES = 1  # of the weights in a snapshot: the best up to now
RELATION_MAPS = 4  # token-to-token maps per layer: two of the student, two of the teacher
SAVED_WIDTHS = 16  # numbers that a layer keeps of each token for its backward pass, in multiples of the hidden width
SAMPLED_ROWS = 256  # rows whose tokens are counted
SAMPLED_TEXTS = 5_000  # texts whose windows are counted: about a second
PADDED = 1.1  # tokens of a batch, padding included, over its real tokens, where rows of like length form a batch
# Measured (docs/log.md): to trace, convert, open and compare one file.
FILE_SECONDS, FILE_SECONDS_PER_PARAMETER = 4.0, 2.5e-7
ENGINE_SECONDS = 3.0  # to start an engine of the bench
FURTHER_ENGINES = 3  # of the bench, beside the exported files


@dataclass(frozen=True)
class Pair:
    """Student and teacher without weights, and the tokenizer of their rows."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


class Estimator:
    """Estimates the stages of a run and what all of them take.

    Args:
        inputs: of each split, see `count_inputs`.
        tokens: of an input of an epoch of the student, see `count_epoch_tokens`.
        counts: weights of the student.
    """

    def __init__(
        self,
        run: Run,
        inputs: Mapping[str, int],
        tokens: float,
        pair: Pair,
        counts: WeightCounts,
        device: torch.device,
    ) -> None:
        self.run, self.recipe, self.pair, self.counts, self.device = run, run.recipe, pair, counts, device
        dev_rows = sum(count for name, count in inputs.items() if name.startswith("dev"))
        rows, unlabeled = inputs["train"], inputs.get(UNLABELED, 0)
        self.workload = Workload(rows + self.recipe.unlabeled_per_epoch(rows, unlabeled), dev_rows, tokens)
        self.stored_rows = rows + unlabeled
        self.cost_model = CostModel(
            self.recipe, pair.student, pair.teacher, self.workload, device, counts.shape_sparsity
        )
        self.chosen = [*required_targets(self.recipe.export), *optional_targets(self.recipe)[0]]

    def estimate_stage(self, stage: str) -> StageEstimate:
        """Estimate the time of a stage."""
        section = self.recipe.section(stage)
        if stage == "teacher" and self.recipe.given_teacher is not None:
            cost = StageCost(other_seconds=self.cost_model.dev_pass_seconds("teacher"))
        elif isinstance(section, Training):
            cost = self.cost_model.estimate_stage(stage, section)
        elif stage == "export":
            cost = StageCost(other_seconds=self._export_seconds())
        else:
            cost = StageCost(other_seconds=self._bench_seconds())
        return StageEstimate(
            steps=cost.steps,
            step_seconds=cost.step_seconds,
            events=list(cost.events),
            other_seconds=cost.other_seconds,
            seconds=cost.seconds,
        )

    def estimate_run(self, seconds: float) -> ResourceEstimate:
        """Estimate what the run takes beside the `seconds` of its stages."""
        embeddings = self.pair.student.get_input_embeddings().weight
        assert isinstance(embeddings, torch.Tensor)
        files = estimate_files(self.recipe, self.chosen, self.counts, embeddings.numel())
        teacher, student = FLOAT_BYTES * self.pair.teacher.num_parameters(), FLOAT_BYTES * self.counts.all
        checkpoints = teacher + (len(PHASES) + len(self.recipe.prune.save_at)) * student
        exported = sum(files.values()) + sum(files[choice.name] for choice in self.chosen if _has_teacher(choice))
        bundle = sum(files.values())
        # A snapshot has the weights themselves, their moments, and a copy of the best.
        snapshots = KEPT_SNAPSHOTS * (1 + ADAM_MOMENTS + BEST_COPIES) * max(student, teacher)
        return ResourceEstimate(
            seconds=(LEAST * seconds, MOST * seconds),
            device=str(self.device.type),
            disk_bytes=checkpoints + exported + bundle,
            # Not the sum: snapshots go before the exports come.
            peak_bytes=checkpoints + max(exported + bundle, snapshots),
            cache_bytes=self._cache_bytes(),
            memory_bytes=estimate_memory(self.recipe, self.pair.student, self.pair.teacher),
            files=files,
        )

    def _export_seconds(self) -> float:
        """Every file answers all dev rows once, and so does each checkpoint, for all of its files."""
        seconds = sum(self.cost_model.dev_pass_seconds(role) for role in ("teacher", "student"))
        for choice in self.chosen:
            for role in choice.target.roles:
                seconds += FILE_SECONDS + FILE_SECONDS_PER_PARAMETER * self.counts.all
                seconds += self.cost_model.dev_pass_seconds(role)
        return seconds

    def _bench_seconds(self) -> float:
        """Every engine at every shape in every round, as far as the recipe's limit lets them."""
        section = self.recipe.bench
        engines = FURTHER_ENGINES + sum(len(choice.target.roles) for choice in self.chosen)
        tokens = sum(section.batches) * sum(section.lengths) + sum(batch * length for batch, length in section.padded)
        round_seconds = engines * tokens * self.cost_model.teacher_forward
        timed = min(section.seconds, (section.rounds + section.warmup) * round_seconds)
        return len(section.threads) * (timed + engines * ENGINE_SECONDS)

    def _cache_bytes(self) -> int:
        """Bytes of the teacher's hidden states, where they are stored: on a CPU, if they fit and are read twice."""
        if self.device.type != "cpu" or count_state_reads(self.recipe, self.workload.rows) < 2 * self.stored_rows:
            return 0
        config = self.pair.teacher.config
        tokens = self.stored_rows * self.workload.tokens / PADDED
        size = round(FLOAT_BYTES * tokens * (config.num_hidden_layers + 1) * config.hidden_size)
        # Beyond the limit the teacher runs on every batch, and nothing is stored.
        return size if size <= self.recipe.teacher_states_gb * 1e9 else 0


def plan_for_processes(plan: Plan, processes: int, *, sharded: bool) -> Plan:
    """Return the plan of a run whose training stages run in several processes.

    Each has a GPU of its own, or they share the cores that one process would use. Unless the
    weights are sharded, every process solves every matrix of a prune event.
    """
    if processes == 1:
        return plan
    speedup = 1
    if plan.estimate.device == "cuda":
        speedup = min(processes, torch.cuda.device_count())
    event_factor = processes / speedup  # on a CPU a process has fewer cores for it
    if sharded:
        event_factor /= processes
    plan = plan.model_copy(deep=True)
    for stage in plan.stages:
        if stage.stage not in TRAINING or stage.estimate is None:
            continue
        estimate = stage.estimate
        estimate.step_seconds /= speedup
        estimate.other_seconds /= speedup
        estimate.events = [(step, event_factor * seconds) for step, seconds in estimate.events]
        cost = StageCost(estimate.steps, estimate.step_seconds, tuple(estimate.events), estimate.other_seconds)
        estimate.seconds = cost.seconds
    seconds = sum(stage.estimate.seconds for stage in plan.stages if stage.estimate is not None)
    plan.estimate.seconds, plan.estimate.processes = (LEAST * seconds, MOST * seconds), processes
    return plan


def count_inputs(task: Task, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> int:
    """Count the inputs that a split has for a model: its rows, or the windows into which a kind of task cuts texts.

    Windows are counted on `SAMPLED_TEXTS` rows.
    """
    if task.decision.windows is None:
        return len(rows)
    sample = rows.sample(SAMPLED_TEXTS, recipe.seed)
    cut = tokenize_windows(tokenizer, sample, recipe.max_length, recipe.window_stride)
    return round(len(cut.windows) * len(rows) / len(sample))


def count_tokens(task: Task, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> float:
    """Return the mean number of tokens of an input in a batch, padding included, from a sample."""
    if not recipe.bucketing:
        return recipe.max_length
    # Drawn: the first rows of a sorted file are all short.
    numbers = sorted(random.Random(recipe.seed).sample(range(len(rows)), min(SAMPLED_ROWS, len(rows))))
    sample = rows.select(numbers)
    if task.decision.windows is None:
        lengths = tokenize(tokenizer, sample, recipe.max_length).lengths
    else:
        lengths = tokenize_windows(tokenizer, sample, recipe.max_length, recipe.window_stride).encoded.lengths
    return min(float(lengths.mean()) * PADDED, recipe.max_length)


def count_epoch_tokens(
    task: Task,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    splits: Mapping[str, Rows],
    inputs: Mapping[str, int],
) -> float:
    """Return the mean number of tokens of an input of the student's epochs, with those without labels.

    Args:
        inputs: of each split, see `count_inputs`.
    """
    tokens = count_tokens(task, recipe, tokenizer, splits["train"])
    if UNLABELED not in splits:
        return tokens
    unlabeled = recipe.unlabeled_per_epoch(inputs["train"], inputs[UNLABELED])
    share = unlabeled / (inputs["train"] + unlabeled)
    return (1 - share) * tokens + share * count_tokens(task, recipe, tokenizer, splits[UNLABELED])


def estimate_memory(recipe: Recipe, student: PreTrainedModel, teacher: PreTrainedModel) -> int:
    """Estimate the peak bytes of the student's phases, right to about a factor of 1.5.

    Two models, gradients, AdamW's moments, and the activations that the backward pass needs.
    """
    section = recipe.prune
    # Only a micro-batch has its activations in memory.
    micro_batch = -(-section.batch_size // section.accumulate)
    tokens = micro_batch * recipe.max_length
    config = student.config
    per_token: int = SAVED_WIDTHS * config.hidden_size
    # Three maps of [heads, length] for each token.
    if section.loss.attention > 0:
        per_token += 3 * getattr(config, "num_attention_heads", 0) * recipe.max_length
    if section.loss.relation > 0:
        per_token += RELATION_MAPS * section.loss.relation_heads * recipe.max_length
    layers: int = config.num_hidden_layers
    # The gradients of a blend pass through the teacher's layers too.
    if section.grafting.kind == "blend":
        layers *= 2
    weights = student.num_parameters()
    trained = weights * (1 + 1 + ADAM_MOMENTS)
    return FLOAT_BYTES * (teacher.num_parameters() + trained + tokens * per_token * layers)


def _has_teacher(choice: ChosenTarget) -> bool:
    return "teacher" in choice.target.roles
