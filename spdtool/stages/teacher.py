"""`spdtool teacher`: fine-tune the dense encoder on the task, or take a given fine-tuned one and measure it.

Reads: nothing of the run; of the data, the rows that every later stage must find unchanged. Writes: `teacher/`, a
Hugging Face checkpoint, with the dev metrics of its best epoch.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from spdtool import console
from spdtool.data import tokens as data
from spdtool.data.dataset import identify_rows
from spdtool.errors import RunError, RunMismatch
from spdtool.models import collectives
from spdtool.models import predict as evaluation
from spdtool.models.layers import configure_layers, find_layer_stack, max_positions
from spdtool.models.load import label_names, load_model, load_tokenizer, move_to_device, save_on_rank_zero
from spdtool.run.folder import RECORD, Run
from spdtool.run.records import DataRecord, TrainingResult
from spdtool.tasks import Task, find_task, prepare_data
from spdtool.training import loop as training
from spdtool.training.microbatches import LossWeight


def teacher(run: Run) -> TrainingResult:
    """Make the teacher of `run`; return its result.

    Raises:
        DataError, ModelError, DeviceError: the data, the model or the device cannot be used; nothing is written.
    """
    if run.recipe.given_teacher is not None:
        return take(run, run.recipe.given_teacher)
    recipe, section = run.recipe, run.recipe.teacher
    front = training.accelerator(recipe)
    task = find_task(recipe)
    splits = task.read_rows(recipe)
    run.record_data(identify_rows(task.dataset, splits))
    torch.manual_seed(recipe.seed)  # the new head is random
    if task.dataset.build is not None:
        model, tokenizer = task.dataset.build(recipe.seed)
        if section.dropout is not None:
            console.warn(f"teacher.dropout is ignored: task {task.name!r} builds its own model")
    else:
        tokenizer = load_tokenizer(recipe.model)
        model = load_model(
            recipe.model,
            labels=task.head_labels,
            problem_type=task.problem_type,
            dropout=section.dropout,
            smoke=recipe.smoke,
        )
    find_layer_stack(model)  # refuse an unsupported architecture before hours are spent on it
    model = move_to_device(model, recipe, front.device, section.train)
    encoded = task.encode(tokenizer, splits, recipe.max_length)
    _refuse_misfit(model, encoded)
    forward = evaluation.torch_forward(model, front.device)

    def loss(batch: dict[str, torch.Tensor], progress: float, share: LossWeight) -> training.LossTerms:  # noqa: ARG001
        labels = batch.pop("labels")
        logits = model(**batch).logits.float()
        return {"loss": share.rows * task.gold_loss(logits, labels)}

    configure_layers(model, checkpointing=recipe.gradient_checkpointing, compile_layers=recipe.compile)
    with (
        run.stage("teacher") as work,
        console.progress("teacher", section.length(len(encoded["train"])).steps) as watch,
    ):
        sample = encoded["train"].sample(section.scored_train_rows, recipe.seed)
        score = functools.partial(evaluation.evaluate, task, forward, encoded, across_ranks=True)
        score_train = functools.partial(evaluation.evaluate_split, task, forward, sample, across_ranks=True)
        evaluate_train = score_train if len(sample) else None
        parts = training.Fit(model, loss, encoded["train"], score, evaluate_train)
        summary = training.fit(parts, section, recipe, work, run.fingerprint("teacher"), front, watch)
        result = TrainingResult(dev=score(), fit=summary)
        _warn_if_worthless(run, task, encoded, result.dev)
        result.train = None if evaluate_train is None else evaluate_train()
        work.result = result
        save_on_rank_zero(model, tokenizer, work.folder)
    collectives.barrier()
    return result


def take(run: Run, source: str) -> TrainingResult:
    """Copy the fine-tuned model at `source` as the teacher of `run`, after measuring its dev score.

    Raises:
        ModelError: it is no classifier of this task.
    """
    front = training.accelerator(run.recipe)
    torch.manual_seed(run.recipe.seed)  # a smoke run's model is random
    model, tokenizer = load_model(source, smoke=run.recipe.smoke), load_tokenizer(source)
    find_layer_stack(model)

    def note(facts: DataRecord) -> None:
        run.record_data(facts)
        _warn_if_taught_otherwise(Path(source), run, facts)

    task, encoded = prepare_data(run.recipe, tokenizer, label_names(model), note)
    _refuse_misfit(model, encoded)
    model = move_to_device(model, run.recipe, front.device)
    with console.busy(f"measuring the given teacher {source}"):
        forward = evaluation.torch_forward(model, front.device)
        metrics = evaluation.evaluate(task, forward, encoded, across_ranks=True)
        sample = encoded["train"].sample(run.recipe.teacher.scored_train_rows, run.recipe.seed)
        train = evaluation.evaluate_split(task, forward, sample, across_ranks=True) if len(sample) else None
    console.say(f"given teacher: dev {console.format_scores(metrics)}")
    _warn_if_worthless(run, task, encoded, metrics)
    with run.stage("teacher") as work:
        save_on_rank_zero(model, tokenizer, work.folder)
        result = TrainingResult(dev=metrics, train=train, given=source)
        work.result = result
    collectives.barrier()
    return result


def _warn_if_worthless(run: Run, task: Task, encoded: dict[str, data.Encoded], dev: dict[str, float]) -> None:
    """Say so if the teacher scores no better than without a look at the text; of a smoke run nothing is expected."""
    floor = task.baseline(encoded["dev"].labels)["score"]
    if dev["score"] <= floor and not run.recipe.smoke:
        console.warn(
            f"the teacher's dev score {dev['score']:.4f} is no better than the {floor:.4f} of always giving the same "
            "answer: there is nothing in it for a student to learn"
        )


def _warn_if_taught_otherwise(source: Path, run: Run, facts: DataRecord) -> None:
    """Say so if the teacher comes from a run that saw other rows: what is dev here may have been train there."""
    if not (source / RECORD).is_file():
        return
    try:
        Run(source.parent, run.recipe).require_same_data(facts, [source.name])
    except RunMismatch as error:
        console.warn(f"{error.message}; it may have been fine-tuned on dev rows of this run")
    except RunError:  # a record that cannot be read says nothing
        return


def _refuse_misfit(model: Any, encoded: dict[str, data.Encoded]) -> None:
    """Refuse rows that are too long for the model, and tokens that it does not know."""
    data.check_lengths(encoded, max_positions(model))
    data.check_vocabulary(encoded, model.config.vocab_size)
