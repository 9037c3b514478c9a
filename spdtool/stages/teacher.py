"""`spdtool teacher`: fine-tune the dense encoder on the task, or copy a given fine-tuned one and measure it.

Reads: nothing of the run; of the data, the rows that every later stage must read unchanged.
Writes: `teacher/`, a Hugging Face checkpoint, with the dev metrics of its best epoch.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from spdtool import console
from spdtool.data.dataset import identify_rows
from spdtool.data.tokens import Encoded, check_lengths, check_vocabulary
from spdtool.distillation.lesson import GoldLabelLesson, TokenizedModel
from spdtool.errors import RunError, RunMismatch
from spdtool.models import collectives
from spdtool.models.config import check_kind
from spdtool.models.layers import configure_layers, find_layer_stack, max_positions
from spdtool.models.load import label_names, load_model, load_tokenizer, move_to_device
from spdtool.run.folder import RECORD, Run
from spdtool.run.records import DataRecord, TrainingResult
from spdtool.tasks.prepare import check_teacher_score, find_task, prepare_data
from spdtool.tasks.task import Task
from spdtool.training.accelerator import choose_threads, create_accelerator
from spdtool.training.learner import Learner
from spdtool.training.loop import fit
from spdtool.training.trackers import track_events


def teacher(run: Run) -> TrainingResult:
    """Fine-tune the teacher of `run`, or copy the given one; return the stage's result.

    Raises:
        DataError, ModelError, DeviceError: the data, the model or the device cannot be used;
            nothing is written. Or the finished teacher scores no better than chance.
    """
    if run.recipe.given_teacher is not None:
        return copy_given_teacher(run, run.recipe.given_teacher)
    recipe, section = run.recipe, run.recipe.teacher
    choose_threads(run)
    accelerator = create_accelerator(recipe)
    task = find_task(recipe)
    splits = task.read_rows(recipe.without_unlabeled())  # the teacher learns from gold labels alone
    run.record_data(identify_rows(task.dataset, splits))
    splits.pop("test", None)  # no stage that trains or chooses has it in its hands
    torch.manual_seed(recipe.seed)  # the new head is random
    model, tokenizer = _load_dense_model(run, task)
    find_layer_stack(model)  # refuse an unsupported architecture before hours are spent on it
    model = move_to_device(model, recipe, accelerator.device, section.train)
    # the head of a new model has the task's own order of labels, so nothing has to be aligned
    encoded = task.encode(tokenizer, splits, recipe)
    _check_rows_fit(model, encoded)
    configure_layers(model, checkpointing=recipe.gradient_checkpointing, compile_layers=recipe.compile)
    learner = Learner(
        model=model,
        tokenizer=tokenizer,
        task=task,
        splits=encoded,
        scored_rows=task.sample_scored_rows(encoded["train"], section.scored_train_rows, recipe.seed),
        accelerator=accelerator,
    )
    lesson = GoldLabelLesson(model, task.gold_loss)
    length = section.length(len(encoded["train"]))
    with run.stage("teacher") as work:
        with (
            console.progress("teacher", length.steps) as show,
            track_events(recipe, run.path, "teacher", show) as on_event,
        ):
            fitted = fit(learner, lesson, encoded["train"], section, length, recipe, work, on_event)
        dev, train, classes = learner.score_classes()
        learner.save(work.folder)
        work.result = result = TrainingResult(
            dev=dev, train=train, classes=classes, fit=fitted, chance=learner.chance_score
        )
    collectives.barrier()
    # Last: the hours are not lost, if the user accepts it.
    check_teacher_score(task, learner.splits["dev"], dev["score"], recipe)
    return result


def copy_given_teacher(run: Run, source: str) -> TrainingResult:
    """Copy the fine-tuned model at `source` as the teacher of `run`, after measuring its dev score.

    Raises:
        ModelError: it is no classifier of this task.
    """
    recipe = run.recipe
    choose_threads(run)
    accelerator = create_accelerator(recipe)
    torch.manual_seed(recipe.seed)  # a smoke run's model is random
    model, tokenizer = load_model(source, smoke=recipe.smoke), load_tokenizer(source)
    find_layer_stack(model)
    check_kind(source, model.config, find_task(recipe))

    def record_data(record: DataRecord) -> None:
        run.record_data(record)
        _warn_if_trained_on_other_rows(Path(source), run, record)

    task, encoded = prepare_data(recipe.without_unlabeled(), tokenizer, label_names(model), record_data)
    _check_rows_fit(model, encoded)
    learner = Learner(
        model=move_to_device(model, recipe, accelerator.device),
        tokenizer=tokenizer,
        task=task,
        splits=encoded,
        scored_rows=task.sample_scored_rows(encoded["train"], recipe.teacher.scored_train_rows, recipe.seed),
        accelerator=accelerator,
    )
    with console.busy(f"measuring the given teacher {source}"):
        dev, train, classes = learner.score_classes()
    console.say(f"given teacher: dev {console.format_scores(dev)}")
    check_teacher_score(task, learner.splits["dev"], dev["score"], recipe)
    with run.stage("teacher") as work:
        learner.save(work.folder)
        work.result = result = TrainingResult(
            dev=dev, train=train, classes=classes, given=source, chance=learner.chance_score
        )
    collectives.barrier()
    return result


def _load_dense_model(run: Run, task: Task) -> TokenizedModel:
    """Load the encoder of the recipe with a new head, or the model that the task builds."""
    recipe, dropout = run.recipe, run.recipe.teacher.dropout
    if task.dataset.build is None:
        tokenizer = load_tokenizer(recipe.model)
        model = load_model(
            recipe.model,
            labels=task.head_labels,
            head=task.head,
            problem_type=task.problem_type,
            dropout=dropout,
            smoke=recipe.smoke,
        )
        return TokenizedModel(model, tokenizer)
    model, tokenizer = task.dataset.build(recipe.seed)
    if dropout is not None:
        console.warn(f"teacher.dropout is ignored: task {task.name!r} builds its own model")
    return TokenizedModel(model, tokenizer)


def _warn_if_trained_on_other_rows(source: Path, run: Run, record: DataRecord) -> None:
    """Warn if the teacher comes from a run on other rows: what is dev here may have been train there."""
    if not (source / RECORD).is_file():
        return
    try:
        Run(source.parent, run.recipe).require_same_data(record, [source.name])
    except RunMismatch as error:
        console.warn(f"{error.message}; it may have been fine-tuned on dev rows of this run")
    except RunError:  # a record that cannot be read tells nothing
        return


def _check_rows_fit(model: PreTrainedModel, encoded: dict[str, Encoded]) -> None:
    """Refuse rows that are too long for the model, and tokens that it does not know."""
    check_lengths(encoded, max_positions(model))
    check_vocabulary(encoded, model.config.vocab_size)
