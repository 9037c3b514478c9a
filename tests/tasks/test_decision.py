"""Decisions: the kind of task turns the logits of an exported folder into answers."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from spdtool import plugins
from spdtool.errors import ModelError, UnknownName
from spdtool.recipe.training import Loss
from spdtool.tasks.answers import BestSpan
from spdtool.tasks.decision import Decision, OneLabel, OneNumber, SeveralLabels, find_decision, read_stride
from spdtool.tasks.prepare import task_of
from spdtool.tasks.ranking import Relevance
from spdtool.tasks.task import Task

MULTI: dict[str, Any] = {"problem_type": "multi_label_classification"}
ONE: dict[str, Any] = {"id2label": {"0": "score"}}


def test_config_json_decides_where_the_manifest_names_no_kind() -> None:
    for config, expected in (
        ({}, OneLabel),
        ({"problem_type": "single_label_classification"}, OneLabel),
        (ONE, OneNumber),
        (ONE | {"problem_type": "regression"}, OneNumber),
        (MULTI, SeveralLabels),
        (ONE | MULTI, SeveralLabels),
    ):
        assert find_decision(config) is expected, config


def test_the_manifest_names_a_kind_of_a_plugin(clean_plugins: None) -> None:
    class Loudest(OneLabel):
        """A label in capitals."""

        def decide(self, outputs: np.ndarray) -> list[str]:
            return [name.upper() + self.settings["mark"] for name in super().decide(outputs)]

    @plugins.task_kinds.register("loud")
    class Loud(Task):
        decision = Loudest

    assert find_decision(MULTI, "loud") is Loudest
    assert Loudest(["a", "b"], {"mark": "!"}).decide(np.eye(2)) == ["A!", "B!"]
    with pytest.raises(UnknownName, match="kind of task 'quiet'"):
        find_decision({}, "quiet")


def test_the_kind_of_the_guide_scores_and_answers_alike(toys: ModuleType, clean_plugins: None) -> None:
    guide = Path(__file__).parents[2] / "docs/how-to/write-a-kind-of-task.md"
    code = re.search(r"```python\n(# my-plugins/ordinal.py.*?)```", guide.read_text("utf-8"), re.DOTALL)
    assert code is not None
    exec(compile(code[1], "ordinal.py", "exec"), {"__name__": "ordinal"})
    task = task_of(replace(toys.dataset(labels=("1", "2", "3")), kind="ordinal"))
    logits = np.log(np.array([[0.4, 0.1, 0.5], [0.9, 0.05, 0.05]]))
    assert task.answers(logits, toys.rows(2), ["1", "2", "3"]) == ["2", "1"]
    assert find_decision({}, "ordinal")(["1", "2", "3"]).decide(logits) == ["2", "1"]
    tensor = torch.from_numpy(logits)
    assert float(task.gold_loss(tensor, torch.tensor([0, 0]))) > float(task.gold_loss(tensor, torch.tensor([2, 0])))
    assert float(task.logit_loss(tensor, tensor, torch.tensor([2, 0]), Loss())) == 0.0


def test_each_decision_gives_objects_tensors_and_lines_that_agree() -> None:
    logits = np.array([[2.0, -1.0], [0.5, 3.0]], np.float32)
    cases: tuple[tuple[Decision, np.ndarray, list[Any], list[str]], ...] = (
        (OneLabel(["a\x1b", "b"]), logits, ["a\x1b", "b"], ["a\\x1b\t0.9526", "b\t0.9241"]),
        (SeveralLabels(["a", "b"]), logits, [["a"], ["a", "b"]], ["a\t0.8808", "a,b\t0.6225,0.9526"]),
        (OneNumber(["score"]), logits[:, :1], [2.0, 0.5], ["2", "0.5"]),
    )
    for decision, outputs, answers, lines in cases:
        assert decision.decide(outputs) == answers
        predictions = decision.predictions(outputs)
        assert [prediction["label"] for prediction in predictions] == answers
        assert [decision.line(prediction) for prediction in predictions] == lines
        schema = decision.prediction_schema()
        assert all(prediction.keys() == set(schema["required"]) for prediction in predictions)  # type: ignore[arg-type]
        for name in decision.output_names:
            shape, values = decision.tensor_shape(name, 2), decision.tensor(name, outputs)
            assert np.prod(shape) == len(values), (decision, name)


def test_decisions_import_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from spdtool.tasks.decision import find_decision; find_decision({}); "
        "find_decision({}, 'regression'); print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"


def test_settings_that_are_not_what_they_say_are_refused() -> None:
    cross_encoder = {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Tanh"}}
    cases: tuple[tuple[Callable[[], object], str], ...] = (
        (lambda: BestSpan(["start", "end"], {"no_answer_threshold": "1"}), "has the no_answer_threshold '1'"),
        (lambda: BestSpan(["start", "end"], {"no_answer_threshold": True}), "has the no_answer_threshold 'True'"),
        (lambda: read_stride({"stride": -1}, 8), "has the stride '-1'"),
        (lambda: read_stride({"stride": 4.5}, 8), "has the stride '4.5'"),
        (lambda: Relevance(["score"], {"activation": "tanh"}), "the activation is 'tanh'"),
        (lambda: Relevance.settings_of(cross_encoder), "scores are the torch.nn.modules.activation.Tanh of the output"),
    )
    for read, message in cases:
        with pytest.raises(ModelError, match=message):
            read()
    assert BestSpan(["start", "end"], {"no_answer_threshold": 1}).threshold == 1.0
    assert (read_stride({}, 8), BestSpan(["start", "end"]).threshold) == (8, None)
    linear = {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}
    assert [Relevance.settings_of(config)["activation"] for config in ({}, linear)] == ["sigmoid", "identity"]
