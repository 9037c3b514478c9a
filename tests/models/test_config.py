"""config.json: contradictory labels are refused, and switches of `forward` are reset."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from spdtool.data.dataset import Dataset
from spdtool.errors import ModelError
from spdtool.models.config import check_kind, read_config, require_head
from spdtool.models.load import label_names, load_model, save_model
from spdtool.tasks.head import Head
from spdtool.tasks.task import Task

AB = {"0": "a", "1": "b"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, toys: ModuleType) -> Path:
    folder = tmp_path_factory.mktemp("config") / "whole"
    save_model(toys.bert(layers=1), toys.tokenizer(), folder)
    return folder


def configure(source: Path, folder: Path, **fields: Any) -> Path:
    """Copy a checkpoint with other fields in its config.json; None removes a field."""
    shutil.copytree(source, folder)
    content = json.loads((folder / "config.json").read_text("utf-8")) | fields
    content = {name: value for name, value in content.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_labels_are_read_from_id2label_or_label2id(checkpoint: Path, tmp_path: Path) -> None:
    cases: list[tuple[Any, Any, list[str]]] = [
        (AB, {"a": 0, "b": 1}, ["a", "b"]),
        (AB, None, ["a", "b"]),
        (None, {"b": 0, "a": 1}, ["b", "a"]),
        ({"0": "LABEL_0", "1": "LABEL_1"}, {"b": 0, "a": 1}, ["b", "a"]),
        (AB, {"LABEL_0": 0, "LABEL_1": 1}, ["a", "b"]),
        (["a", "b"], None, ["a", "b"]),
        (AB, {"A": 0, "B": "1"}, ["a", "b"]),
        (None, None, ["LABEL_0", "LABEL_1"]),
    ]
    for number, (id2label, label2id, expected) in enumerate(cases):
        folder = configure(checkpoint, tmp_path / str(number), id2label=id2label, label2id=label2id)
        model = load_model(folder)
        assert label_names(model) == expected, (id2label, label2id)
        assert model.config.label2id == {name: index for index, name in enumerate(expected)}


def test_labels_that_contradict_themselves_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"id2label": {"1": "a", "2": "b"}, "label2id": {"a": 1, "b": 2}}, "the numbers 1, 2"),
        ({"id2label": AB, "label2id": {"b": 0, "a": 1}}, "calls logit 0 'a', and label2id gives it 1"),
        ({"id2label": AB, "label2id": {"x": 0, "y": 1}}, "gives it no number"),
        ({"id2label": {"0": "a", "1": "a"}, "label2id": None}, "two labels are called 'a'"),
        ({"id2label": {"a": "0", "b": "1"}, "label2id": None}, "id2label is"),
        ({"id2label": {"0": "a", "1": None}, "label2id": None}, "without a name"),
        ({"id2label": None, "label2id": {"a": 0, "b": 0}}, "several names one number"),
        ({"id2label": None, "label2id": {"a": "x"}}, "label2id is"),
        ({"id2label": AB, "label2id": None, "num_labels": 3}, "num_labels is 3, and there are 2"),
    ]
    for number, (fields, message) in enumerate(cases):
        folder = configure(checkpoint, tmp_path / str(number), **fields)
        with pytest.raises(ModelError) as error:
            load_model(folder)
        assert message in error.value.message, fields
        assert '"id2label": {"0": ' in str(error.value.hint)
        assert load_model(folder, labels=("x", "y")).config.id2label == {0: "x", 1: "y"}


def test_switches_of_the_forward_pass_are_set_back(checkpoint: Path, tmp_path: Path) -> None:
    switches = {"return_dict": False, "output_attentions": True, "output_hidden_states": True, "torchscript": True}
    folder = configure(checkpoint, tmp_path / "switched", **switches, attn_implementation="flash_attention_2")
    config = load_model(folder).config
    assert config.return_dict
    assert not config.output_attentions
    assert not config.output_hidden_states
    assert config._attn_implementation == "sdpa"


def task_with(problem_type: Any) -> Task:
    """A task whose checkpoints have this `problem_type`."""
    task = Task(Dataset("toy", "classification", ("text",), ("a", "b"), ("accuracy",), lambda *_: {}))
    task.problem_type = problem_type
    return task


def test_another_head_than_the_tasks_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    task = task_with(None)
    task.head = Head("AutoModelForTokenClassification", "ForTokenClassification", "a tagger", per_token=True)
    with pytest.raises(ModelError, match="is a classifier of whole texts .*; the task 'toy' needs a tagger"):
        check_kind(checkpoint, read_config(checkpoint), task)


def test_the_problem_type_must_match_the_task(checkpoint: Path, tmp_path: Path) -> None:
    for stored, expected in (
        ("multi_label_classification", "single_label_classification"),
        ("regression", "single_label_classification"),
        ("single_label_classification", "regression"),
    ):
        folder = configure(checkpoint, tmp_path / f"{stored} {expected}", problem_type=stored)
        with pytest.raises(ModelError) as error:
            check_kind(folder, read_config(folder), task_with(expected))
        assert repr(stored) in error.value.message
        assert repr(expected) in error.value.message
        check_kind(folder, read_config(folder), task_with(stored))
    single_label = {
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "problem_type": "single_label_classification",
    }
    config = read_config(configure(checkpoint, tmp_path / "one", **single_label))
    check_kind(tmp_path / "one", config, task_with("regression"))  # with one output the types are equivalent


def test_a_model_for_another_task_is_refused_by_its_task(checkpoint: Path, tmp_path: Path) -> None:
    for architecture, kind in (
        ("BertForMultipleChoice", "multiple choice"),
        ("BertLMHeadModel", "text generation"),
    ):
        folder = configure(checkpoint, tmp_path / architecture, architectures=[architecture])
        with pytest.raises(ModelError, match=kind) as error:
            require_head(folder, read_config(folder))
        assert "--model" not in str(error.value.hint)
    for architecture, head in (
        ("BertForTokenClassification", "a model that labels each token"),
        ("BertForQuestionAnswering", "a model that finds answers in a text"),
    ):
        config = read_config(configure(checkpoint, tmp_path / architecture, architectures=[architecture]))
        with pytest.raises(ModelError, match=f"is {head} .*needs a classifier of whole texts"):
            check_kind(tmp_path / architecture, config, task_with(None))
