"""What the student's three phases share: load student and teacher, graft, train, and hand over exact zeros.

`prune`, `distill` and `finetune` differ in their schedules and in whether they prune; this is their common story.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from spdtool import console, plugins
from spdtool import ranks as processes
from spdtool.data import tokens as data
from spdtool.distillation import teacher_cache as teacher_outputs
from spdtool.distillation.grafting import LayerDraw, LayerMixing, create_mixing
from spdtool.distillation.layer_map import check_phases, map_layers, select_layers
from spdtool.distillation.losses import LogitLoss, distillation_loss
from spdtool.distillation.outputs import compute_outputs
from spdtool.distillation.projections import (
    Projections,
    create_projections,
    load_projections,
    save_projections,
)
from spdtool.errors import ModelError
from spdtool.models import collectives
from spdtool.models import predict as evaluation
from spdtool.models.layers import (
    configure_layers,
    count_zeros,
    find_layer_stack,
    find_prunable_layers,
    find_prunable_weights,
    install_capture_hooks,
    max_positions,
    model_shape,
    select_trained_parameters,
)
from spdtool.models.load import label_names, load_model, load_tokenizer, move_to_device, save_on_rank_zero
from spdtool.models.student import (
    check_positions,
    check_tokenizers,
    choose_tokenizer,
    drop_unread_columns,
    load_student,
    load_student_tokenizer,
    same_architecture,
    unread_columns,
)
from spdtool.pruning.masks import Masks, check_counts
from spdtool.pruning.pruner import Pruner
from spdtool.recipe.fields import Distilled, Recipe
from spdtool.run.folder import STUDENTS, Run
from spdtool.run.records import IntermediateStudent, Scores, TrainingResult, ZeroCount
from spdtool.tasks import find_task, prepare_data
from spdtool.training import loop as training
from spdtool.training.microbatches import LossWeight
from spdtool.training.schedules import Schedule, constant, replacing_rate

MakePruner = Callable[[Any, Masks, int], Pruner]


def phase(run: Run, stage: str, start: str, make_pruner: MakePruner) -> TrainingResult:
    """Train the student from the checkpoint of stage `start`; write `stage`; return its result.

    Args:
        make_pruner: given the student, the masks of its checkpoint and the number of steps, what prunes and holds.

    Raises:
        StageMissing, Corrupt: the run does not hold what is needed.
        RunMismatch: the rows have changed since the earlier stages read them.
        DataError, ModelError, DeviceError: the data, the model or the device cannot be used.
        GateError: the zeros are not the requested ones in the end.
    """
    recipe = run.recipe
    section = recipe.section(stage)
    assert isinstance(section, Distilled)
    front = training.accelerator(recipe)
    eager = section.loss.attention > 0 or front.device.type == "cpu"  # the fused one's backward pass is slow there
    folder = run.read(start)
    teacher_folder = folder if start == "teacher" else run.read("teacher")
    teacher = load_model(teacher_folder, eager=eager).requires_grad_(False)
    tokenizers = [load_tokenizer(folder), load_tokenizer(teacher_folder)]
    if stage == "prune" and recipe.student is not None:
        student, tokenizers[0] = _given(recipe, teacher, tokenizers[1], eager=eager)
    else:
        student = load_model(folder, dropout=section.dropout, eager=eager)
    teacher = move_to_device(teacher, recipe, front.device)
    student, tokenizer = move_to_device(student, recipe, front.device, section.train), tokenizers[0]
    check_phases(recipe, model_shape(student), model_shape(teacher))
    check_positions(recipe, student, teacher)
    names = label_names(student)
    task, splits = prepare_data(recipe, choose_tokenizer(*tokenizers), names, run.record_data)
    if recipe.student is not None:
        data.check_lengths(splits, max_positions(student))
        data.check_vocabulary(splits, student.config.vocab_size)
    forward = drop_unread_columns(evaluation.torch_forward(student, front.device), tokenizer)
    for model in (student, teacher):
        install_capture_hooks(model)
        # never recompute a stand-in: by the backward pass it is in eval mode again, and its dropout gone
        checkpointing = recipe.gradient_checkpointing and model is student
        configure_layers(model, checkpointing=checkpointing, compile_layers=recipe.compile)

    steps = section.length(len(splits["train"])).steps
    masks = Masks.from_zeros(find_prunable_weights(student))
    pruner = make_pruner(student, masks, steps)
    if recipe.sparse_products and not recipe.compile:
        sampled = section.clip_over == "trained" and not pruner.reads_dead
        for part in plugins.products.entries():
            part.value(find_prunable_layers(student), masks, sampled=sampled)
    grafting, rate = _grafting(stage, recipe, student, teacher)
    projections = _projections(recipe, section, student, teacher, folder)
    mapped = map_layers(section.loss.layer_map, *(model_shape(model)[0] for model in (student, teacher)))
    look = _look(section, teacher, tokenizers[1], mapped)
    loss = _lesson(section, student, tokenizer, look, grafting, rate, projections, logit_loss=task.logit_loss)

    sample = splits["train"].sample(section.scored_train_rows, recipe.seed)
    score_train = functools.partial(evaluation.evaluate_split, task, forward, sample, across_ranks=True)
    evaluate_train = score_train if len(sample) else None

    def save_student(sparsity: float, step: int) -> IntermediateStudent:
        folder = work.folder / STUDENTS / f"{sparsity:g}"
        save_on_rank_zero(student, tokenizer, folder)
        if processes.is_main():
            check_counts(count_zeros(folder, list(masks.parameters)), sparsity, pruner.section.scope)
        dev, train = _measured(task, forward, splits, evaluate_train)
        name = f"{STUDENTS}/{folder.name}"
        return IntermediateStudent(sparsity=sparsity, step=step, folder=name, dev=dev, train=train)

    rows, shown = splits["train"], (0, *mapped) if teacher_outputs.needs_hidden_states(section.loss) else ()
    if teacher_outputs.is_worth_caching(recipe, section, rows, teacher, shown):
        with console.busy("reading or computing what the teacher shows"):
            rows = teacher_outputs.cache_outputs(rows, teacher, look, shown)
    parts = training.Fit(
        student,
        loss,
        rows,
        lambda: evaluation.evaluate(task, forward, splits, across_ranks=True),
        evaluate_train,
        pruner,
        save_student,
        extra=projections,
        bystanders=_frozen(student, teacher, section),
        random_state=grafting.state_dict,
        restore_random=grafting.load_state_dict,
        facts=lambda progress: {"replacing_rate": rate(progress), "drawn": grafting.drawn},
        padding_counts=not section.loss.mask_padding,
    )
    with run.stage(stage) as work:
        fitted = None
        if steps > 0:
            with console.progress(stage, steps) as watch:
                fitted = training.fit(parts, section, recipe, work, run.fingerprint(stage), front, watch)
        pruner.finalize()
        dev, train = _measured(task, forward, splits, evaluate_train)
        result = TrainingResult(dev=dev, train=train, fit=fitted, sparsity=masks.sparsity())
        save_on_rank_zero(student, tokenizer, work.folder)
        if processes.is_main():
            save_projections(projections, work.folder)
            saved = count_zeros(work.folder, list(masks.parameters))
            check_counts(saved, pruner.target, pruner.section.scope)
            result.zeros = {name: ZeroCount(*count) for name, count in saved.items()}
        work.result = result
    collectives.barrier()
    return result


def _measured(task: Any, forward: Any, splits: Any, evaluate_train: Any) -> tuple[Scores, Scores | None]:
    """Scores on the dev set, and beside them those on training rows."""
    dev = evaluation.evaluate(task, forward, splits, across_ranks=True)
    return dev, None if evaluate_train is None else evaluate_train()


def holding(run: Run) -> MakePruner:
    """For the phases after pruning: the masks of the checkpoint, held; they must already be at the target.

    Raises (when called on a checkpoint):
        GateError: the checkpoint has another sparsity.
    """

    def make(_model: Any, masks: Masks, _steps: int) -> Pruner:
        masks.check_sparsity(run.recipe.sparsity, run.recipe.prune.scope)
        return Pruner(masks, [], run.recipe.prune, run.recipe.sparsity)

    return make


def _given(recipe: Recipe, teacher: Any, taught: Any, *, eager: bool) -> tuple[Any, Any]:
    """The student that the recipe names, with the teacher's labels, and its tokenizer.

    Args:
        taught: the teacher's tokenizer.

    Raises:
        ModelError, RecipeError: it cannot be read, or does not fit the teacher.
    """
    task = find_task(recipe)
    tokenizer = load_student_tokenizer(recipe, task)
    check_tokenizers(tokenizer, taught)
    return load_student(recipe, task, label_names(teacher), eager=eager), tokenizer


def _grafting(stage: str, recipe: Recipe, student: Any, teacher: Any) -> tuple[LayerMixing, Schedule]:
    """What lets the teacher's layers stand in, and how often; never, and said so, where they cannot."""
    section = recipe.section(stage)
    assert isinstance(section, Distilled)
    own, rate = find_layer_stack(student), rate_of(section)
    if same_architecture(student, teacher):
        its, dropout = find_layer_stack(teacher), section.grafting.stand_in_dropout
        return create_mixing(section.grafting.kind, own, its, seed=recipe.seed, stand_in_dropout=dropout), rate
    if any(rate(step / 100) < 1 for step in range(100)):
        console.warn(
            f"{stage}.grafting is ignored: the student ({_described(student)}) has another shape than the teacher "
            f"({_described(teacher)}), whose layers cannot stand in for its own"
        )
    return LayerDraw(own, own, seed=recipe.seed), constant(1.0)


def _described(model: Any) -> str:
    layers, width, _ = model_shape(model)
    return f"{model.config.model_type}, {layers} layers of width {width}"


def _projections(recipe: Recipe, section: Distilled, student: Any, teacher: Any, before: Path) -> Projections:
    """Projections to the teacher's width, those of the phase in `before` where it left some; none for equal widths."""
    (layers, width, _), (_, its, _) = model_shape(student), model_shape(teacher)
    if width == its or section.loss.hidden == 0:
        return {}
    made = create_projections(layers, width, its, seed=recipe.seed, device=student.device)
    load_projections(made, before)
    return made


def _look(section: Distilled, teacher: Any, tokenizer: Any, mapped: tuple[int, ...]) -> teacher_outputs.TeacherForward:
    """What the teacher shows of a batch, in the order of the student's layers."""
    asked, unread = _asked(section), unread_columns(tokenizer)

    @torch.no_grad()
    def look(batch: dict[str, torch.Tensor]) -> Any:
        shown = compute_outputs(teacher, {name: batch[name] for name in batch if name not in unread}, **asked)
        _check_attention(shown.attentions, teacher)
        return select_layers(shown, mapped)

    return look


def _asked(section: Distilled) -> dict[str, Any]:
    """What the losses of the phase look at, as `compute_outputs` takes it."""
    attention = section.loss.attention_on if section.loss.attention > 0 else None
    return {"hidden_states": teacher_outputs.needs_hidden_states(section.loss), "attention": attention}


def _lesson(
    section: Distilled,
    student: Any,
    tokenizer: Any,
    look: teacher_outputs.TeacherForward,
    grafting: LayerMixing,
    rate: Schedule,
    projections: Projections,
    *,
    logit_loss: LogitLoss,
) -> Callable[[dict[str, torch.Tensor], float, LossWeight], training.LossTerms]:
    """The loss of a batch: both models look at it, and what they show is compared.

    The teacher does not look at a batch that has its outputs beside the rows (`teacher_outputs.py`).
    """
    asked, unread = _asked(section), unread_columns(tokenizer)

    def loss(batch: dict[str, torch.Tensor], progress: float, share: LossWeight) -> training.LossTerms:
        taught = teacher_outputs.pop_cached_outputs(batch) or look(batch)
        with grafting.draw(rate(progress)):
            learnt = compute_outputs(student, {name: batch[name] for name in batch if name not in unread}, **asked)
        _check_attention(learnt.attentions, student)
        return distillation_loss(
            learnt, taught, batch, section.loss, logit_loss=logit_loss, projections=projections, weight=share
        )

    return loss


def rate_of(section: Distilled) -> Schedule:
    """The replacing rate over the phase."""
    grafting = section.grafting
    return replacing_rate(
        grafting.schedule, start=grafting.start, hold=grafting.hold, base=grafting.base, rise=grafting.rise
    )


def _frozen(student: Any, teacher: Any, section: Distilled) -> list[torch.nn.Parameter]:
    """What the published code's clipping counts beside the trained weights: the rest of the student, the stand-ins."""
    if section.clip_over == "trained":
        return []
    trained = select_trained_parameters(student, section.train)
    rest = [parameter for name, parameter in student.named_parameters() if name not in trained]
    return rest + list(find_layer_stack(teacher).parameters())


def _check_attention(seen: Any, model: Any) -> None:
    depth = model_shape(model)[0]
    if seen is not None and len(seen) != depth:
        raise ModelError(
            f"{model.config.model_type!r} shows {len(seen)} attention maps for {depth} layers",
            "set the attention loss to 0 for this architecture",
        )
