"""What the student's three phases share: load student and teacher, train, and save exact zeros.

`prune`, `distill` and `finetune` differ in their sections of the recipe and in whether they prune.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from spdtool import console, plugins, ranks
from spdtool.data.tokens import Encoded, check_lengths, check_vocabulary
from spdtool.distillation.device_states import compute_device_states, count_state_bytes, should_keep_on_device
from spdtool.distillation.layer_map import check_phases
from spdtool.distillation.lesson import DistillationLesson, TokenizedModel
from spdtool.distillation.teacher_cache import cache_dev_outputs, cache_outputs, is_worth_caching
from spdtool.models import collectives
from spdtool.models.layers import (
    configure_layers,
    find_prunable_layers,
    find_prunable_weights,
    install_capture_hooks,
    max_positions,
    model_shape,
)
from spdtool.models.load import label_names, load_model, load_tokenizer, move_to_device
from spdtool.models.predict import torch_forward
from spdtool.models.structures import find_structures
from spdtool.models.student import (
    check_positions,
    check_tokenizers,
    choose_tokenizer,
    copy_teacher,
    drop_unread_columns,
    load_student,
    load_student_tokenizer,
)
from spdtool.pruning.masks import Masks
from spdtool.pruning.patterns import find_pattern
from spdtool.pruning.pruner import Pruner
from spdtool.pruning.structure import EncoderShape, LayerShape, choose_shape, full_shape, shape_sparsity
from spdtool.pruning.structured import StructuredMasks, StructuredPruner
from spdtool.recipe.fields import Recipe
from spdtool.recipe.training import Distilled, Finetune, TrainingLength
from spdtool.run.folder import Run
from spdtool.run.records import TrainingResult, TrimmedVocabulary, ZeroCount
from spdtool.tasks.prepare import check_teacher_score, find_task, prepare_data
from spdtool.training.accelerator import choose_threads, compare_arithmetic, create_accelerator
from spdtool.training.learner import Learner
from spdtool.training.loop import fit
from spdtool.training.precision import cast_linear_weights
from spdtool.training.quantize import RoundedProducts
from spdtool.training.trackers import track_events

Trim = Callable[["Run", "Phase"], TrimmedVocabulary]
"""Makes the vocabulary of a phase's student smaller."""


@dataclass(kw_only=True)
class Phase(Learner):
    """What one of the three phases trains: the student, with its masks, pruner and teacher.

    Attributes:
        masks: the zeros of the checkpoint that it starts from.
        teacher: frozen, on the same device.
        section: the recipe's section of the phase.
        length: of the phase.
        start: folder of the checkpoint that it starts from.
    """

    masks: Masks
    teacher: TokenizedModel
    section: Distilled
    length: TrainingLength
    start: Path

    def choose_shape(self, recipe: Recipe) -> EncoderShape | None:
        """Return the shape that the recipe asks for; None for a student at full width, pruned weight by weight.

        Raises:
            RecipeError: the shape does not fit the student.
        """
        if not isinstance(self.masks, StructuredMasks):
            return None
        return choose_shape(recipe.prune, full_shape(self.masks.layers))

    def shape_sparsity(self, shape: EncoderShape) -> float:
        """Return the share of zeros of a shape."""
        assert isinstance(self.masks, StructuredMasks)
        return shape_sparsity(self.masks.layers, shape)

    def prune_at(self, events: Sequence[tuple[int, float]], recipe: Recipe, shape: EncoderShape | None = None) -> None:
        """Prune at `events`, `(optimiser step, sparsity)`; raises as `Pruner` does.

        Args:
            shape: that a structured student has in the end.
        """
        layers = find_prunable_layers(self.model)
        if shape is None:
            self.pruner = Pruner(self.masks, events, recipe.prune, recipe.sparsity, layers)
        else:
            assert isinstance(self.masks, StructuredMasks)
            self.pruner = StructuredPruner(self.masks, events, recipe.prune, shape, layers)

    def keep_zeros(self, recipe: Recipe, pruned: TrainingResult) -> None:
        """Keep the zeros of the checkpoint, which must be those of the target.

        Args:
            pruned: result of the prune stage, whose shape a structured student has.

        Raises:
            GateError: the checkpoint has another sparsity or shape.
        """
        if isinstance(self.masks, StructuredMasks):
            shape = tuple(LayerShape(*layer) for layer in pruned.shape or ())
            self.masks.check_shape(shape, recipe.prune.zeros)
            self.pruner = StructuredPruner(self.masks, [], recipe.prune, shape)
            return
        self.masks.check_sparsity(recipe.sparsity, recipe.prune.scope)
        self.pruner = Pruner(self.masks, [], recipe.prune, recipe.sparsity)


def load_phase(run: Run, stage: str, start: str) -> Phase:
    """Load the student from the checkpoint of stage `start`, its teacher and the rows.

    Raises:
        StageMissing, Corrupt: the run does not hold what is needed.
        RunMismatch: the rows have changed since the earlier stages read them.
        DataError, ModelError, DeviceError: the data, the model or the device cannot be used.
        RecipeError: student and teacher cannot be compared as the recipe says.
    """
    recipe, section = run.recipe, run.recipe.section(stage)
    assert isinstance(section, Distilled)
    choose_threads(run)
    accelerator = create_accelerator(recipe)
    compare_arithmetic(run, accelerator.device)
    # attention maps need the eager implementation; on a CPU, the fused one's backward pass is slow
    eager = section.loss.attention > 0 or accelerator.device.type == "cpu"
    folder = run.use_input(start)
    teacher_folder = folder if start == "teacher" else run.use_input("teacher")
    teacher = TokenizedModel(load_model(teacher_folder, eager=eager), load_tokenizer(teacher_folder))
    teacher.model.requires_grad_(False)  # before it is sharded
    if stage == "prune" and recipe.student is not None:
        model, tokenizer = _load_other_student(recipe, teacher, eager=eager)
    else:
        model, tokenizer = load_model(folder, dropout=section.dropout, eager=eager), load_tokenizer(folder)
        if stage == "prune":
            model = copy_teacher(recipe, model)
    teacher = teacher._replace(model=move_to_device(teacher.model, recipe, accelerator.device))
    model = move_to_device(model, recipe, accelerator.device, section.train)
    check_phases(recipe, model_shape(model), model_shape(teacher.model))
    check_positions(recipe, model, teacher.model)
    shared_tokenizer = choose_tokenizer(tokenizer, teacher.tokenizer)
    task, splits = prepare_data(recipe, shared_tokenizer, label_names(model), run.record_data)
    if stage == "prune":  # the teacher of a run may have been finished and refused
        score = run.training_result("teacher").dev["score"]
        check_teacher_score(task, splits["dev"], score, recipe)
    if recipe.student is not None:  # the teacher stage has checked only the teacher
        check_lengths(splits, max_positions(model))
        check_vocabulary(splits, model.config.vocab_size)
    _configure_models(recipe, model, teacher.model)
    forward = drop_unread_columns(torch_forward(teacher.model, accelerator.device), teacher.tokenizer)
    splits = task.compare_with(splits, lambda: cache_dev_outputs(splits, teacher.model, forward))
    return Phase(
        model=model,
        tokenizer=tokenizer,
        task=task,
        splits=splits,
        scored_rows=task.sample_scored_rows(splits["train"], section.scored_train_rows, recipe.seed),
        accelerator=accelerator,
        masks=_read_masks(recipe, model),
        teacher=teacher,
        section=section,
        length=section.length(splits["train"].epoch_rows),
        start=folder,
    )


def train_phase(run: Run, stage: str, phase: Phase, trim: Trim | None = None) -> TrainingResult:
    """Train the student on what its teacher shows, and write `stage`; return its result.

    Args:
        trim: makes the vocabulary smaller after the training.

    Raises:
        GateError: the zeros are not the requested ones in the end.
    """
    recipe, section, pruner = run.recipe, phase.section, phase.pruner
    assert pruner is not None
    _install_sparse_products(recipe, phase)
    if isinstance(section, Finetune) and section.quantize == "int8":
        layers = find_prunable_layers(phase.model).values()
        phase.rounding = RoundedProducts(layers, section.quantize_start, phase.length.steps)
    lesson = DistillationLesson(
        stage,
        section,
        TokenizedModel(phase.model, phase.tokenizer),
        phase.teacher,
        seed=recipe.seed,
        logit_loss=phase.task.logit_loss,
    )
    lesson.load_projections(phase.start)
    rows = _cache_teacher_outputs(recipe, phase, lesson)
    if phase.accelerator.mixed_precision == "bf16" and phase.section.clip_over == "trained":
        # after its outputs were computed in float32; gradients that count in the norm are float32
        cast_linear_weights(phase.teacher.model, torch.bfloat16)
    with run.stage(stage) as work:
        fitted = None
        if phase.length.steps > 0:  # a phase may be switched off with epochs=0
            steps, events = phase.length.steps, tuple(pruner.events)
            with (
                console.progress(stage, steps, grafting=lesson.has_grafting, prune_events=events) as show,
                track_events(recipe, run.path, stage, show) as on_event,
            ):
                fitted = fit(phase, lesson, rows, section, phase.length, recipe, work, on_event)
        pruner.finalize()  # a live weight may have landed on exactly 0
        if phase.rounding is not None:
            phase.rounding.is_on = True  # a stage that was killed after its last step has trained none since
        vocabulary = trim(run, phase) if trim is not None else None
        dev, train, classes = phase.score_classes()
        work.result = result = TrainingResult(
            dev=dev,
            train=train,
            classes=classes,
            fit=fitted,
            sparsity=phase.masks.sparsity(),
            vocabulary=vocabulary,
        )
        if isinstance(pruner, StructuredPruner):
            result.shape = [(layer.heads, layer.neurons) for layer in pruner.shape]
        phase.save(work.folder)
        if ranks.is_main():
            lesson.save_projections(work.folder)
            zeros = phase.count_saved_zeros(work.folder, recipe.sparsity)
            result.zeros = {name: ZeroCount(*count) for name, count in zeros.items()}
    collectives.barrier()
    return result


def _read_masks(recipe: Recipe, model: PreTrainedModel) -> Masks:
    """Read what is dead from the zeros of the model: heads and neurons, or weights in the recipe's pattern."""
    weights = find_prunable_weights(model)
    if recipe.prune.is_structured:
        inside = find_pattern(recipe.prune.pattern) if recipe.prune.zeros else None
        return StructuredMasks.from_structures(weights, find_structures(model), inside)
    return Masks.from_zeros(weights, find_pattern(recipe.prune.pattern))


def _load_other_student(recipe: Recipe, teacher: TokenizedModel, *, eager: bool) -> TokenizedModel:
    """Load the student that the recipe names, with the teacher's labels.

    Raises:
        ModelError, RecipeError: it cannot be read, or does not fit the teacher.
    """
    task = find_task(recipe).widen(label_names(teacher.model))
    tokenizer = load_student_tokenizer(recipe, task)
    check_tokenizers(tokenizer, teacher.tokenizer)
    return TokenizedModel(load_student(recipe, task, label_names(teacher.model), eager=eager), tokenizer)


def _configure_models(recipe: Recipe, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Install the hooks of hidden states and attentions, and the recipe's trade of time for memory."""
    for model in (student, teacher):
        # before any draw: transformers 5 hooks the layers that are in the list at the first
        # request, for good
        install_capture_hooks(model)
        # never recompute a stand-in: by the backward pass it is in eval mode again, and its dropout gone
        checkpointing = recipe.gradient_checkpointing and model is student
        configure_layers(model, checkpointing=checkpointing, compile_layers=recipe.compile)


def _install_sparse_products(recipe: Recipe, phase: Phase) -> None:
    """Let plugins compute the student's linear layers without their zeros."""
    if not recipe.sparse_products or recipe.compile:
        return
    assert phase.pruner is not None
    skip_dead_gradients = phase.section.clip_over == "trained" and not phase.pruner.needs_dead_gradients
    for entry in plugins.products.entries():
        entry.value(find_prunable_layers(phase.model), phase.masks, skip_dead_gradients=skip_dead_gradients)


def _cache_teacher_outputs(recipe: Recipe, phase: Phase, lesson: DistillationLesson) -> Encoded:
    """Return the training rows, with the teacher's outputs beside them if that saves time."""
    rows, layers, teacher = phase.splits["train"], lesson.compared_layers, phase.teacher.model
    device, precision = phase.accelerator.device, phase.accelerator.mixed_precision
    size = count_state_bytes(rows, teacher, layers)
    if should_keep_on_device(recipe, phase.section, rows, size, device, precision=precision):
        console.say(f"the teacher's hidden states of all rows stay on the GPU: {size / 1e9:.1f} GB")
        rows, lesson.device_states = compute_device_states(
            rows, teacher, lesson.compute_teacher_outputs, layers, phase.accelerator.autocast()
        )
        return rows
    if not is_worth_caching(recipe, phase.section, rows, teacher, layers):
        return rows
    with console.busy("reading or computing what the teacher shows"):
        return cache_outputs(rows, teacher, lesson.compute_teacher_outputs, layers)
