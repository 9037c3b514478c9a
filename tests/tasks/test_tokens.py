"""Token classification: tags of words are learned, scored as spans, and answered as the stock pipeline answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import spdtool
from spdtool.data.dataset import Dataset, Rows
from spdtool.data.tokens import IGNORED
from spdtool.errors import DataError, GateError, ModelError
from spdtool.export.gates.files import check_manifest
from spdtool.export.gates.folder import check_folder
from spdtool.export.gates.reference import Reference, prepare_dev_sets
from spdtool.export.gates.score import check_score
from spdtool.export.target import get_target
from spdtool.models.load import save_model
from spdtool.recipe.fields import Recipe
from spdtool.recipe.training import Loss
from spdtool.serving.batching import Batcher
from spdtool.serving.predict import InputLine, predict_lines
from spdtool.tasks.classification import Classification
from spdtool.tasks.prepare import task_of
from spdtool.tasks.tokens import Tokens


@pytest.fixture(scope="module")
def toy_kind(toys: ModuleType) -> tuple[Dataset, Any]:
    """Tagged words, and a model that labels each token."""
    return toys.tag_dataset(), toys.tagger()


def toy(toys: ModuleType, metrics: tuple[str, ...] = ("span_f1",)) -> Tokens:
    from dataclasses import replace

    task = task_of(replace(toys.tag_dataset(), metrics=metrics))
    assert isinstance(task, Tokens)
    return task


def encode(task: Tokens, toys: ModuleType, rows: Rows, **flags: Any) -> Any:
    return task.encode(toys.tokenizer(), {"dev": rows}, toys.recipe(task="toy-tags", **flags))["dev"]


def logits_of(encoded: Any, tags: Any) -> np.ndarray:
    """Logits that choose these tags, by number, at the tokens that count; O elsewhere."""
    logits = np.zeros((int(encoded.offsets[-1]), 5), np.float32)
    chosen = np.zeros(len(logits), np.int64)
    chosen[encoded.labels != IGNORED] = tags
    logits[np.arange(len(logits)), chosen] = 4.0
    return logits


def test_the_gates_count_each_word_as_a_prediction(toy_export: Any, reference: Reference) -> None:
    assert toy_export.model.rows == sum(len(words) for words in reference.dev.texts["dev"].labels)


def test_the_first_piece_of_each_word_has_its_tag_and_padding_has_none(toys: ModuleType) -> None:
    encoded = encode(
        toy(toys), toys, Rows(["good fine film", "bad"], None, [[(0, 4, 1), (5, 9, 2), (10, 14, 0)], [(0, 3, 3)]])
    )
    batch = encoded.collate([0, 1])
    assert batch["labels"].tolist() == [[-100, 1, 2, 0, -100], [-100, 3, -100, -100, -100]]
    assert encoded.label_counts.tolist() == [3, 1]
    assert encoded.select(np.array([1])).collate([0])["labels"].tolist() == [[-100, 3, -100]]


def test_a_span_counts_as_right_only_whole_and_with_its_type(toys: ModuleType) -> None:
    task = toy(toys)
    gold = [[(0, 4, 1), (5, 9, 2), (10, 14, 0), (15, 18, 3)]]
    encoded = encode(task, toys, Rows(["good fine film bad"], None, gold))
    for tags, score in (
        ([1, 2, 0, 3], 1.0),
        ([1, 0, 0, 3], 0.5),
        ([2, 2, 0, 3], 1.0),  # I- after nothing begins a span, as seqeval has it
        ([1, 1, 0, 3], 0.4),
        ([3, 4, 0, 1], 0.0),
        ([0, 0, 0, 0], 0.0),
    ):
        assert task.score(logits_of(encoded, tags), encoded)["score"] == pytest.approx(score), tags
    classes = task.score_classes(logits_of(encoded, [1, 0, 0, 3]), encoded, [])
    assert {name: (scores.f1, scores.rows) for name, scores in classes.items()} == {"bad": (1.0, 1), "good": (0.0, 1)}
    assert task.baseline(encoded) == task.baseline(Rows(["good fine film bad"], None, gold))
    assert task.chance_score(encoded) == 0.0
    plain = toy(toys, ("accuracy", "f1_macro"))
    assert plain.score(logits_of(encoded, [1, 0, 0, 3]), encoded)["accuracy"] == 0.75
    assert plain.baseline(encoded)["accuracy"] == 0.25


def test_a_bootstrap_draws_whole_texts(toys: ModuleType) -> None:
    for metrics in (("span_f1",), ("accuracy", "f1_macro")):
        task = toy(toys, metrics)
        encoded = encode(task, toys, toys.tag_rows(9))
        outputs = np.random.default_rng(0).normal(size=(int(encoded.offsets[-1]), len(task.tags)))
        gold, predicted = task.read_tags(task.predictions(outputs), encoded)
        resampler = task.resampler(outputs, encoded)
        assert resampler is not None
        assert (resampler.size, resampler.units) == (9, "texts")
        for drawn in (range(9), [3, 3, 0, 7]):
            expected = task.score_tags([gold[text] for text in drawn], [predicted[text] for text in drawn])["score"]
            assert resampler.score(np.array(drawn)) == pytest.approx(expected), (metrics, drawn)


def test_words_of_long_texts_are_scored_once_whatever_the_window(toys: ModuleType) -> None:
    task, rows = toy(toys), toys.tag_rows(12, longest=50)
    tags = np.concatenate([[tag for _, _, tag in words] for words in rows.labels])
    for length in (8, 16, 64):
        encoded = encode(task, toys, rows, max_length=length)
        assert int((encoded.labels != IGNORED).sum()) == len(tags)
        gold, _ = task.read_tags(np.zeros(int(encoded.offsets[-1]), np.int64), encoded)
        assert [len(words) for words in gold] == [len(words) for words in rows.labels]
        assert [tag for words in gold for tag in words] == [toys.TAGS[tag] for tag in tags]


def test_a_word_without_a_token_counts_as_outside(toys: ModuleType) -> None:
    task = toy(toys)
    encoded = encode(task, toys, Rows(["good \u200b"], None, [[(0, 4, 1), (5, 6, 3)]]))
    gold, predicted = task.read_tags(np.zeros(int(encoded.offsets[-1]), np.int64), encoded)
    assert (gold, predicted) == ([["B-good", "B-bad"]], [["O", "O"]])


def test_losses_are_means_over_words(toys: ModuleType) -> None:
    task, generator = toy(toys), torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 5, generator=generator, requires_grad=index == 0) for index in range(2))
    labels = torch.tensor([[IGNORED, 1, 2], [3, IGNORED, IGNORED]])
    flat = [(0, 1), (0, 2), (1, 0)]
    expected = -torch.stack([student[i, j].log_softmax(-1)[labels[i, j]] for i, j in flat]).mean()
    torch.testing.assert_close(task.gold_loss(student, labels), expected)
    chosen = [torch.stack([logits[i, j] for i, j in flat]) for logits in (student, teacher)]
    loss = Loss(hardness=0.5)
    expected = Classification.logit_loss(chosen[0], chosen[1], torch.tensor([1, 2, 3]), loss)
    torch.testing.assert_close(task.logit_loss(student, teacher, labels, loss), expected)
    nothing = torch.full_like(labels, IGNORED)  # a window may have no word of its own
    for value in (task.gold_loss(student, nothing), task.logit_loss(student, teacher, nothing, loss)):
        assert value.item() == 0.0
        value.backward()


def test_tags_go_by_the_names_of_a_model(toys: ModuleType) -> None:
    task, rows = toy(toys), {"dev": toys.tag_rows(6)}
    names = ["B-bad", "B-good", "I-bad", "I-good", "O"]
    aligned = task.align_labels(rows, names)["dev"]
    assert task.tags == names
    for before, after in zip(rows["dev"].labels, aligned.labels, strict=True):
        assert [toys.TAGS[tag] for _, _, tag in before] == [names[tag] for _, _, tag in after]
    with pytest.raises(ModelError, match="the model has 2 labels"):
        task.align_labels(rows, ["O", "B-x"])


def test_the_answers_are_those_of_the_stock_pipeline(exported: Path, checkpoint: Path, toys: ModuleType) -> None:
    from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

    find = spdtool.load(exported)
    texts = toys.tag_rows(200, 5, longest=40).first
    model, tokenizer = (
        AutoModelForTokenClassification.from_pretrained(checkpoint),
        AutoTokenizer.from_pretrained(checkpoint),
    )
    stock = pipeline("token-classification", model=model, tokenizer=tokenizer, aggregation_strategy="simple")
    expected = stock(texts)
    assert sum(map(len, expected)) > 200
    for text, entities, wanted in zip(texts, find(texts), expected, strict=True):
        assert len(entities) == len(wanted)
        for entity, stock_entity in zip(entities, wanted, strict=True):
            assert {**entity, "score": 0} == {**stock_entity, "score": 0}, text
            assert entity["score"] == pytest.approx(stock_entity["score"], abs=1e-5)
    assert find(texts[0]) == find(texts)[0]
    windows = spdtool.load(exported)
    windows.limit_length(16)
    windows.decision.settings["stride"] = 4
    windows.limit_length(16)
    stock = pipeline("token-classification", model=model, tokenizer=tokenizer, aggregation_strategy="simple", stride=4)
    tokenizer.model_max_length = 16
    for text, wanted in zip(texts[:50], stock(texts[:50]), strict=True):
        answers = [(entity["entity_group"], entity["start"], entity["end"]) for entity in windows(text)]
        assert answers == [(entity["entity_group"], entity["start"], entity["end"]) for entity in wanted], text


def test_lines_and_requests_get_the_same_entities(exported: Path) -> None:
    find = spdtool.load(exported)
    texts = ["good film", "bad " * 100 + "good", "the book was very kind and cold"]
    expected = find(texts)
    lines = list(predict_lines(find, [InputLine(number, text) for number, text in enumerate(texts)], 2))
    assert [line["entities"] for line in lines] == expected
    assert find.decision.line(lines[0]).count("\t") == len(expected[0]) - 1
    batcher = Batcher(find)
    outputs = [batcher.submit(group).result(20) for group in (texts[:1], texts[1:], [])]
    batcher.close()
    assert [answer for each in outputs for answer in find.decide(each)] == expected
    assert find.decision.predictions(outputs[1])[1] == {"entities": expected[2]}
    (tensor,) = find.decision.tensor("label", outputs[0])
    assert json.loads(str(tensor)) == expected[0]
    with pytest.raises(DataError, match="places in a text"):
        find([[2, 5, 3]])


def test_planted_faults_are_caught(exported: Path, reference: Reference, toys: ModuleType, tmp_path: Path) -> None:
    target = get_target("onnx")
    names = dict(enumerate(toys.TAGS))
    for fault, changes in (
        ("two labels are swapped", names | {1: "B-bad", 3: "B-good"}),
        ("a tag is lost", {number: name for number, name in names.items() if number < 4}),
    ):
        folder = tmp_path / fault
        shutil.copytree(exported, folder)
        config = json.loads((folder / "config.json").read_text())
        config["id2label"] = {str(number): name for number, name in changes.items()}
        config["label2id"] = {name: number for number, name in changes.items()}
        (folder / "config.json").write_text(json.dumps(config))
        toys.seal(folder)
        with pytest.raises(GateError, match="label"):
            check_folder(target, reference, folder, "cpu")
        with pytest.raises((GateError, ModelError)):
            check_score(target, reference, folder, "cpu")
    folder = tmp_path / "windows overlap otherwise"
    shutil.copytree(exported, folder)
    toys.seal(folder, settings={"stride": 1})
    with pytest.raises(GateError, match="has the settings"):
        check_manifest(target, reference, folder, [folder / "onnx/model.onnx"], "cpu")
    assert json.loads((exported / "manifest.json").read_text())["settings"] == {"stride": 32}


def test_a_teacher_with_another_head_is_refused(toys: ModuleType, recipe: Recipe, tmp_path: Path) -> None:
    save_model(toys.bert(labels=5), toys.tokenizer(), tmp_path / "classifier")
    with pytest.raises(ModelError, match="is a classifier of whole texts .* needs a model that labels each token"):
        prepare_dev_sets(tmp_path / "classifier", recipe)
