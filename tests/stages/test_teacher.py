"""`spdtool teacher`: fine-tuning, given teachers, and teachers that are refused without writing a file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from spdtool.data.dataset import Rows
from spdtool.errors import DataError, ModelError, UnknownName
from spdtool.models.load import label_names, load_model, load_tokenizer, save_model
from spdtool.run.folder import Run
from spdtool.stages.prune import prune
from spdtool.stages.teacher import teacher
from spdtool.tasks.task import Task

FILES = ["config.json", "model.safetensors", "stage.json", "tokenizer.json", "tokenizer_config.json"]


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != ".lock")


@pytest.fixture
def make_teacher(tmp_path: Path, toys: ModuleType) -> Callable[..., str]:
    """Return `make_teacher(labels=2, **config)`, which saves a fine-tuned model and returns its folder."""

    def make(labels: int = 2, **config: Any) -> str:
        folder = tmp_path / "given"
        save_model(toys.bert(2, labels=labels, **config), toys.tokenizer(), folder)
        return str(folder)

    return make


def test_it_writes_a_checkpoint_that_stock_transformers_opens(toy_run: Callable[..., Run], toys: ModuleType) -> None:
    run = toy_run()
    metrics = teacher(run)
    assert names(run.path / "teacher") == sorted([*FILES, "metrics.jsonl"])
    assert names(run.path) == sorted(["run.json", "teacher", *(f"teacher/{n}" for n in names(run.path / "teacher"))])
    model = AutoModelForSequenceClassification.from_pretrained(run.path / "teacher")
    assert label_names(model) == ["bad", "good"]
    assert not torch.equal(model.classifier.weight, toys.bert(2).classifier.weight), "it was trained"
    assert run.training_result("teacher") == metrics
    assert run.record("teacher").inputs == {}
    assert metrics.given is None
    assert metrics.steps == 12
    assert len(metrics.fit.evaluations) == 2
    assert metrics.dev["score"] == metrics.fit.best.score
    assert metrics.dev["score"] == max(e.score for e in metrics.fit.evaluations)


def test_it_learns(toy_run: Callable[..., Run], toy_task: Callable[..., Task]) -> None:
    toy_task(train=256, dev=64)
    metrics = teacher(toy_run("teacher.epochs=6", "teacher.learning_rate=5e-3"))
    assert metrics.dev["accuracy"] > 0.9


def test_a_regression_teacher(toy_run: Callable[..., Run], toy_task: Callable[..., Task]) -> None:
    toy_task(labels=())
    run = toy_run()
    metrics = teacher(run)
    assert set(metrics.dev) == {"score", "pearson"}
    config = json.loads((run.path / "teacher" / "config.json").read_text("utf-8"))
    assert config["id2label"] == {"0": "score"}


def test_a_pretrained_encoder_is_fine_tuned_with_the_tasks_labels(
    toy_run: Callable[..., Run], toy_task: Callable[..., Task], make_teacher: Callable[..., str]
) -> None:
    toy_task(build=False, labels=("no", "maybe", "yes"))
    run = toy_run("teacher.dropout=0.3", model=make_teacher(hidden_dropout_prob=0.1))
    teacher(run)
    config = json.loads((run.path / "teacher" / "config.json").read_text("utf-8"))
    assert config["id2label"] == {"0": "no", "1": "maybe", "2": "yes"}
    assert config["hidden_dropout_prob"] == 0.1, "the training's own dropout is not handed over"


def test_a_given_teacher_is_measured_and_copied_bit_by_bit(
    toy_run: Callable[..., Run], toy_task: Callable[..., Task], make_teacher: Callable[..., str], capsys: Any
) -> None:
    toy_task()
    source = make_teacher()
    run = toy_run(given_teacher=source)
    metrics = teacher(run)
    assert names(run.path / "teacher") == FILES
    assert metrics.given == source
    assert 0 <= metrics.dev["accuracy"] <= 1
    assert f"given teacher: dev score {metrics.score:.4f}" in capsys.readouterr().out
    before = AutoModelForSequenceClassification.from_pretrained(source).state_dict()
    after = AutoModelForSequenceClassification.from_pretrained(run.path / "teacher").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_given_teachers_own_order_of_labels_is_respected(
    toy_run: Callable[..., Run], toy_task: Callable[..., Task], make_teacher: Callable[..., str]
) -> None:
    toy_task()
    in_order = teacher(toy_run(folder="straight", given_teacher=make_teacher(id2label={0: "bad", 1: "good"})))
    reversed_labels = teacher(toy_run(folder="turned", given_teacher=make_teacher(id2label={0: "good", 1: "bad"})))
    assert reversed_labels.dev["accuracy"] == pytest.approx(1 - in_order.dev["accuracy"])


def test_a_teacher_trained_on_other_rows_is_reported(
    toy_run: Callable[..., Run], toy_task: Callable[..., Task], capsys: Any
) -> None:
    first = toy_run(folder="first", until="teacher")
    shutil.copytree(first.path / "teacher", first.path.parent / "copied" / "teacher")
    source = str(first.path.parent / "copied" / "teacher")
    teacher(toy_run(folder="same", given_teacher=source))
    assert "fine-tuned on dev rows" not in capsys.readouterr().err
    toy_task(train=40)
    teacher(toy_run(folder="other", given_teacher=source))
    output = capsys.readouterr().err
    assert (
        "48 train, 24 dev there, 40 train, 24 dev here; it may have been fine-tuned on dev rows of this run" in output
    )


def test_a_teacher_at_chance_is_refused_unless_it_is_accepted(
    toy_run: Callable[..., Run], toy_task: Callable[..., Task], make_teacher: Callable[..., str], capsys: Any
) -> None:
    toy_task()
    folder = Path(make_teacher())
    model = load_model(folder)
    torch.nn.init.zeros_(model.classifier.weight)
    save_model(model, load_tokenizer(folder), folder)
    message = r"dev score 0\.5000 is no better than the 0\.5000 that chance gives on 24 rows"
    assert_refused(toy_run("teacher.accept=false", given_teacher=str(folder), folder="refused"), DataError, message)
    accepted = {"accept": ("teacher.accept=true", "teacher.accept is set"), "smoke": ("smoke=true", "smoke run: ")}
    for name, (setting, words) in accepted.items():
        teacher(toy_run("teacher.accept=false", setting, given_teacher=str(folder), folder=name))
        output = capsys.readouterr()
        assert words in output.out + output.err, name


def test_a_trained_teacher_at_chance_is_kept_and_stops_the_run(
    toy_run: Callable[..., Run], toy_task: Callable[..., Task]
) -> None:
    toy_task(labels=())
    untrained = ("teacher.learning_rate=1e-12", "teacher.epochs=1")
    run = toy_run(*untrained, "teacher.accept=false")
    for stage in (teacher, prune):
        with pytest.raises(DataError, match="that chance gives on 24 rows"):
            stage(run)
        assert run.done("teacher")
        assert not run.done("prune")
    prune(Run.for_recipe(run.path, toy_run(*untrained, "teacher.accept=true", folder="other").recipe))


def assert_refused(run: Run, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        teacher(run)
    assert not run.done("teacher")
    assert not (run.path / "teacher").exists()
    assert not (run.path / ".teacher.partial").exists()


@pytest.mark.parametrize(("labels", "model_labels"), [(("bad", "good"), 3), (("bad", "good"), 1), ((), 2)])
def test_a_teacher_with_another_number_of_labels_is_refused(
    toy_run: Callable[..., Run], toy_task: Callable[..., Task], make_teacher: Callable[..., str],
    labels: tuple[str, ...], model_labels: int,
) -> None:  # fmt: skip
    toy_task(labels=labels)
    assert_refused(
        toy_run(given_teacher=make_teacher(model_labels)), ModelError, f"the model has {model_labels} labels"
    )


def test_a_teacher_that_is_not_there_is_refused(toy_run: Callable[..., Run], tmp_path: Path) -> None:
    assert_refused(toy_run(given_teacher=str(tmp_path / "gone")), ModelError, "cannot load the model")


def test_rows_longer_than_the_model_allows_are_refused(
    toy_run: Callable[..., Run], toy_task: Callable[..., Task], make_teacher: Callable[..., str]
) -> None:
    toy_task(build=False)
    source = make_teacher(max_position_embeddings=5)
    assert_refused(toy_run(model=source), DataError, "the model has 5 positions")
    assert_refused(toy_run(given_teacher=source, folder="other"), DataError, "the model has 5 positions")


@pytest.mark.parametrize("empty", ["train", "dev"])
def test_an_empty_split_is_refused(
    toy_run: Callable[..., Run], toy_task: Callable[..., Task], toys: ModuleType, empty: str
) -> None:
    from dataclasses import replace

    task = toy_task()
    splits = {"train": toys.rows(8), "dev": toys.rows(8)} | {empty: Rows([], None, [])}
    toys.register(replace(task.dataset, load=lambda _data, _seed: splits))
    assert_refused(toy_run(), DataError, f"no rows in its {empty} split")


def test_one_class_only_is_refused(
    toy_run: Callable[..., Run], toy_task: Callable[..., Task], toys: ModuleType
) -> None:
    from dataclasses import replace

    splits = {"train": Rows(["a", "the"], None, [1, 1]), "dev": toys.rows(8)}
    toys.register(replace(toy_task().dataset, load=lambda _data, _seed: splits))
    assert_refused(toy_run(), DataError, "every training row of 'toy' has the label 'good'")


def test_an_unsupported_architecture_is_refused_before_it_is_trained(
    toy_run: Callable[..., Run], toy_task: Callable[..., Task], toys: ModuleType
) -> None:
    from dataclasses import replace

    def build(seed: int) -> Any:
        return toys.classifier("albert", embedding_size=16), toys.tokenizer()

    toys.register(replace(toy_task().dataset, build=build))
    assert_refused(toy_run(), ModelError, "'albert' is not supported")


def test_an_unknown_task_is_refused(toy_run: Callable[..., Run]) -> None:
    assert_refused(toy_run(task="toyy"), UnknownName, "no task 'toyy'")
