"""Common to all kinds of task: lookup, rows, scores, and kinds of task from plugins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import spdtool
from spdtool import plugins
from spdtool.data.tokens import LABELED, tokenize
from spdtool.distillation.outputs import compute_outputs
from spdtool.distillation.teacher_cache import LOGITS, STATES, cache_outputs
from spdtool.errors import DataError, RecipeError, UnknownName
from spdtool.models.load import label_names
from spdtool.recipe.fields import Recipe
from spdtool.run.records import DataRecord
from spdtool.stages.estimate import count_inputs
from spdtool.tasks.prepare import find_task, prepare_data, task_of
from spdtool.tasks.scores.metrics import METRICS
from spdtool.tasks.task import Task

ToyTask = Callable[..., Task]


def test_score_is_the_mean_of_the_metrics_of_the_data_set(toy_task: ToyTask) -> None:
    gold, predicted = np.array([1, 1, 0, 1, 0]), np.array([1, 0, 0, 1, 1])
    scores = toy_task(metrics=("accuracy", "f1")).score_labels(np.eye(2)[predicted], gold)
    assert scores["accuracy"] == METRICS["accuracy"](gold, predicted)
    assert scores["f1"] == METRICS["f1"](gold, predicted)
    assert scores["score"] == pytest.approx((scores["accuracy"] + scores["f1"]) / 2)
    assert list(scores) == ["score", "accuracy", "f1"]


def test_a_second_dev_set_has_a_suffix_and_does_not_count_in_the_score(toys: ModuleType, toy_task: ToyTask) -> None:
    splits = {"dev": tokenize(toys.tokenizer(), toys.rows(10), 16)}
    splits["dev_mm"] = tokenize(toys.tokenizer(), toys.rows(7, seed=3), 16)
    logits = {name: np.tile([0.0, 1.0], (len(rows), 1)) for name, rows in splits.items()}
    assert toy_task().score_splits(logits, splits) == {
        "score": 0.5,
        "accuracy": 0.5,
        "accuracy_mm": pytest.approx(3 / 7),
    }


def test_rows_are_cut_after_they_are_checked(toys: ModuleType, toy_task: ToyTask) -> None:
    toy_task(train=40)
    rows = find_task(toys.recipe(max_rows=10)).read_rows(toys.recipe(max_rows=10))
    assert len(rows["train"]) == len(rows["dev"]) == 10


def test_the_rows_are_handed_out_before_they_are_tokenized(toys: ModuleType, toy_task: ToyTask) -> None:
    toy_task(train=8, dev=4)

    def refuse(record: DataRecord) -> None:
        assert record.rows == {"train": 8, "dev": 4}
        raise DataError("other rows")

    with pytest.raises(DataError, match="other rows"):
        prepare_data(toys.recipe(), toys.tokenizer(), ["bad", "good"], refuse)


@pytest.mark.parametrize("kind", ["tag", "question", "ranking"])
def test_rows_without_labels_are_trained_on_and_never_scored(
    toys: ModuleType, tmp_path: Path, clean_plugins: None, kind: str
) -> None:
    dataset = getattr(toys, f"{kind}_dataset")()
    toys.register(dataset)
    long_text = " ".join(toys.FILLER * 5)  # 60 words: three windows, or one row that is cut
    pairs = [f"a good film\t{long_text}", "a bad meal\tthe meal was bad", "a good film\tit was good"]
    lines = [line.split("\t")[1] for line in pairs] if kind == "tag" else pairs
    (tmp_path / "more.txt").write_text("\n".join(lines), "utf-8")
    recipe = toys.recipe(task=dataset.name, unlabeled=str(tmp_path / "more.txt"))
    teacher, tokenizer = dataset.build(0)

    records: list[DataRecord] = []
    task, splits = prepare_data(recipe, tokenizer, label_names(teacher), records.append)
    rows, read = splits["train"], task.read_rows(recipe)
    assert records[0].rows["unlabeled"] == len(read["unlabeled"]) == 3
    assert set(splits) == {"train", "dev"}
    windows = count_inputs(task, recipe, tokenizer, read["unlabeled"])
    assert windows == (3 if kind == "ranking" else 5)
    assert rows.mixture is not None
    assert (rows.mixture.labeled, rows.mixture.unlabeled, rows.epoch_rows) == (
        len(rows) - windows,
        windows,
        len(rows),
    )
    assert rows.collate(range(len(rows)))[LABELED].tolist() == [True] * (len(rows) - windows) + [False] * windows
    assert rows.label_counts.min() > 0, "every row has something to learn from the teacher"
    for count in (4, 1_000):
        scored = task.sample_scored_rows(rows, count, 0)
        assert 0 < len(scored) <= rows.mixture.labeled
        assert scored.mixture is None
        assert scored.collate(range(len(scored)))[LABELED].all()
        outputs = np.zeros((int(scored.offsets[-1]) if task.head.per_token else len(scored), 5), np.float32)
        assert task.score(outputs[:, : len(label_names(teacher))], scored)["score"] >= 0

    stored = cache_outputs(rows, teacher, lambda batch: compute_outputs(teacher, batch, hidden_states=True), (0, 1, 2))
    batch = stored.collate([0, len(rows) - windows])
    states, logits = batch.pop(STATES), batch.pop(LOGITS)
    batch.pop(LABELED)
    with torch.no_grad():
        direct = compute_outputs(teacher, {n: torch.tensor(c) for n, c in batch.items()}, hidden_states=True)
    assert direct.hidden_states is not None
    mask = batch["attention_mask"].astype(bool)
    np.testing.assert_allclose(states[mask][:, 2], direct.hidden_states[2].numpy()[mask], atol=1e-5)
    if task.head.per_token:
        np.testing.assert_allclose(logits[mask], direct.logits.numpy()[mask], atol=1e-5)
    else:
        np.testing.assert_allclose(logits, direct.logits.numpy(), atol=1e-5)


def test_a_kind_that_learns_from_no_rows_without_labels_says_so(
    toys: ModuleType, toy_task: ToyTask, clean_plugins: None
) -> None:
    @plugins.task_kinds.register("plain")
    class Plain(Task):
        """A kind that says nothing of rows without labels."""

    toys.register(replace(toy_task().dataset, kind="plain"))
    recipe = toys.recipe(unlabeled="more.txt")
    with pytest.raises(RecipeError, match="kind 'plain' learns from no texts without labels"):
        find_task(recipe).read_rows(recipe)


def test_every_kind_says_which_checkpoints_it_opens() -> None:
    for entry in plugins.task_kinds.entries():
        assert issubclass(entry.value, Task), entry.name
        config = transformers.BertConfig(problem_type=entry.value.problem_type)  # refuses what it does not know
        assert config.problem_type == entry.value.problem_type


def test_a_kind_that_is_not_supported_is_named(toys: ModuleType, toy_task: ToyTask) -> None:
    toys.register(toy_task().dataset)
    with pytest.raises(UnknownName, match="kind of task 'captions'") as error:
        task_of(replace(toy_task().dataset, kind="captions"))
    assert "classification" in str(error.value.hint)


def test_a_plugin_can_add_a_kind_of_task(toys: ModuleType, toy_task: ToyTask, clean_plugins: None) -> None:
    @plugins.task_kinds.register("shifted")
    class Shifted(spdtool.Task):
        """A class whose numbers start at 1."""

        def predictions(self, logits: np.ndarray) -> np.ndarray:
            return logits.argmax(axis=1) + 1

        def gold_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
            return (logits.argmax(1) + 1 != labels).float().mean()

    toys.register(replace(toy_task().dataset, kind="shifted"))
    task = find_task(Recipe(task="toy"))
    assert type(task) is Shifted
    assert task.score_labels(np.eye(2), np.array([1, 2]))["accuracy"] == 1.0
    names = [entry.name for entry in plugins.task_kinds.entries()]
    assert {"classification", "regression", "shifted"} < set(names)
