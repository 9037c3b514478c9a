"""Extractive question answering: windows point to answers, which are compared as SQuAD compares them."""

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
from spdtool.data.windows import TextWindow, WindowOutput
from spdtool.errors import DataError, GateError, ModelError
from spdtool.export.gates.files import check_manifest
from spdtool.export.gates.logits import check_logits
from spdtool.export.gates.reference import Reference
from spdtool.export.gates.score import check_score
from spdtool.export.target import get_target
from spdtool.models.load import load_model
from spdtool.recipe.training import Loss
from spdtool.serving.batching import Batcher
from spdtool.serving.predict import InputLine, predict_lines
from spdtool.tasks.answers import LONGEST_ANSWER, BestSpan
from spdtool.tasks.prepare import task_of
from spdtool.tasks.scores.answer_metrics import exact_match, normalize_answer, word_f1
from spdtool.tasks.spans import SPAN_FINDER, Spans


@pytest.fixture(scope="module")
def toy_kind(toys: ModuleType) -> tuple[Dataset, Any]:
    """Questions, every third without an answer, and a model that points to begin and end."""
    return toys.question_dataset(without=3), toys.span_finder()


def toy(toys: ModuleType, **options: Any) -> Spans:
    task = task_of(toys.question_dataset(**options))
    assert isinstance(task, Spans)
    return task


def perfect_outputs(encoded: Any, scale: float = 5.0) -> np.ndarray:
    """Outputs that point where the labels of every window do."""
    outputs = np.zeros((int(encoded.offsets[-1]), 2), np.float32)
    for row, (start, end) in enumerate(encoded.labels):
        outputs[encoded.offsets[row] + start, 0] = outputs[encoded.offsets[row] + end, 1] = scale
    return outputs


def test_the_gates_count_each_question_as_a_prediction(toy_export: Any) -> None:
    assert toy_export.model.rows == 24


def test_answers_are_compared_as_the_official_script_does() -> None:
    assert normalize_answer("The  Café, a 'new' one.") == "café new one"
    for predicted, gold, match, f1 in (
        ("The cat", ["cat"], 1.0, 1.0),
        ("black cat", ["cat", "dog"], 0.0, 2 / 3),
        ("cat cat", ["cat"], 0.0, 2 / 3),
        ("", [], 1.0, 1.0),
        ("cat", [], 0.0, 0.0),
        ("", ["cat"], 0.0, 0.0),
        ("the", ["a"], 1.0, 1.0),
        ("dog", ["cat", "Dog!"], 1.0, 1.0),
    ):
        assert (exact_match(predicted, gold), word_f1(predicted, gold)) == (match, pytest.approx(f1)), (predicted, gold)


def test_each_window_points_to_the_answer_or_to_its_first_token(toys: ModuleType) -> None:
    for side in ("right", "left"):
        rows = Rows(["a film"] * 2, ["the good book was " + "it " * 30 + "bad", "so it was"], [[(4, 8)], []])
        task = toy(toys)
        encoded = task.encode(toys.tokenizer(side), {"train": rows}, toys.recipe(max_length=16))["train"]
        windows = encoded.details.windows  # type: ignore[union-attr]
        marked_texts = [
            windows[row].text[slice(*windows[row].spans[encoded.labels[row, 0]])] for row in range(len(encoded))
        ]
        assert marked_texts[0] == "good"
        assert encoded.labels[1:].tolist() == [[0, 0]] * (len(encoded) - 1)
        assert task.threshold == 0.0
        batch = encoded.collate([len(encoded) - 1, 0])
        assert batch["input_ids"][1, batch["labels"][1, 0]] == toys.WORDS.index("good")
        assert batch["input_ids"][0, batch["labels"][0, 0]] == toys.WORDS.index("[CLS]")


def test_a_perfect_model_scores_one_whatever_the_length_of_windows(toys: ModuleType) -> None:
    rows = toys.question_rows(30, longest=60, without=4)
    for length in (16, 24, 64):
        task = toy(toys)
        encoded = task.encode(toys.tokenizer(), {"train": rows, "dev": rows}, toys.recipe(max_length=length))["dev"]
        assert task.score(perfect_outputs(encoded), encoded) == {"score": 1.0, "exact_match": 1.0, "f1": 1.0}
    short = task.encode(toys.tokenizer(), {"dev": rows}, toys.recipe(max_length=16))["dev"]
    sample = task.sample_scored_rows(short, 7, 0)
    assert len(task.answers(perfect_outputs(sample), sample, ["start", "end"])) == 7
    assert task.score(perfect_outputs(sample), sample)["score"] == 1.0
    assert len(task.sample_scored_rows(short, 0, 0)) == 0
    assert task.baseline(encoded) == task.baseline(rows)
    assert task.chance_score(rows) == pytest.approx(8 / 30)
    assert task.chance_score(toys.question_rows(9)) == 0.0
    nothing = np.zeros_like(perfect_outputs(encoded))
    changed, worse = task.compare_predictions(perfect_outputs(encoded), nothing, encoded, 0.0)
    assert len(changed) == 30
    assert changed.sum() == worse.sum() > 20


def test_a_bootstrap_draws_questions_with_all_of_their_windows(toys: ModuleType) -> None:
    task = toy(toys)
    rows = toys.question_rows(6, longest=30)
    encoded = task.encode(toys.tokenizer(), {"dev": rows}, toys.recipe(max_length=16))["dev"]
    outputs = perfect_outputs(encoded) + np.random.default_rng(0).normal(0, 5, (int(encoded.offsets[-1]), 2))
    resampler = task.resampler(outputs, encoded)
    assert resampler is not None
    assert (resampler.size, resampler.units) == (6, "questions")
    assert resampler.score(np.arange(6)) == pytest.approx(task.score(outputs, encoded)["score"])
    single = [resampler.score(np.array([question])) for question in range(6)]
    assert len(set(single)) > 1
    assert resampler.score(np.array([1, 1, 4])) == pytest.approx(np.mean([single[1], single[1], single[4]]))


def test_the_threshold_is_the_best_on_dev_rows(toys: ModuleType) -> None:
    rows = toys.question_rows(30, without=3)
    task = toy(toys)
    encoded = task.encode(toys.tokenizer(), {"train": rows, "dev": rows}, toys.recipe())["dev"]
    outputs = perfect_outputs(encoded)
    outputs[encoded.offsets[:-1]] += 6.0  # "no answer" looks far too likely
    before = task.score(outputs, encoded)["f1"]
    settings = task.settings(outputs, encoded)
    task.adopt_settings(settings)
    assert before < task.score(outputs, encoded)["f1"] == 1.0
    assert 2 < settings["no_answer_threshold"] < 22  # type: ignore[operator]
    always = toy(toys)
    encoded = always.encode(toys.tokenizer(), {"train": toys.question_rows(9)}, toys.recipe())["train"]
    assert always.settings(perfect_outputs(encoded), encoded) == {"stride": 32, "no_answer_threshold": None}


def test_losses_ignore_padding(toys: ModuleType) -> None:
    task, generator = toy(toys), torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 6, 2, generator=generator) for _ in range(2))
    labels = torch.tensor([[1, 2], [0, 0]])
    padded = [
        torch.cat([logits, torch.full((2, 3, 2), value)], dim=1)
        for logits, value in ((student, SPAN_FINDER.padding_value), (teacher, 0.0))
    ]  # cached outputs are padded with zeros
    torch.testing.assert_close(task.gold_loss(padded[0], labels), task.gold_loss(student, labels))
    expected = task.logit_loss(student, teacher, labels, Loss())
    torch.testing.assert_close(task.logit_loss(padded[0], padded[1], labels, Loss()), expected)
    flat = torch.cat([student[..., 0], student[..., 1]]).log_softmax(-1)
    assert float(task.gold_loss(student, labels)) == pytest.approx(
        -float(flat[[0, 1, 2, 3], [1, 0, 2, 0]].mean()), rel=1e-5
    )


def plain_answer(model: Any, tokenizer: Any, question: str, context: str, threshold: float | None, **cut: Any) -> str:
    """The answer by loops over every window and pair of tokens, with stock transformers."""
    encoding = tokenizer(
        question,
        context,
        truncation="only_second",
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding=True,
        return_tensors="pt",
        **cut,
    )
    names = ("input_ids", "attention_mask", "token_type_ids")
    with torch.no_grad():
        outputs = model(**{name: encoding[name] for name in names})
    best, answer, null = -np.inf, "", np.inf
    for row in range(len(encoding["input_ids"])):
        begins, ends = outputs.start_logits[row].double().numpy(), outputs.end_logits[row].double().numpy()
        null = min(null, begins[0] + ends[0])
        of_context = [token for token, source in enumerate(encoding.sequence_ids(row)) if source == 1]
        for first in of_context:
            for last in of_context:
                if first <= last < first + LONGEST_ANSWER and begins[first] + ends[last] > best:
                    best = begins[first] + ends[last]
                    start, end = encoding["offset_mapping"][row, first, 0], encoding["offset_mapping"][row, last, 1]
                    answer = context[start:end]
    return "" if threshold is not None and null - best > threshold else answer


def test_the_answers_are_those_of_a_plain_reference(exported: Path, checkpoint: Path, toys: ModuleType) -> None:
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    answer = spdtool.load(exported)
    rows = toys.question_rows(40, 5, longest=70)
    assert rows.second is not None
    model, tokenizer = (
        AutoModelForQuestionAnswering.from_pretrained(checkpoint),
        AutoTokenizer.from_pretrained(checkpoint),
    )
    assert isinstance(answer.decision, BestSpan)
    threshold = answer.decision.threshold
    assert isinstance(threshold, float)
    for chosen in (None, threshold, -1.0, 1.0):
        answer.decision.threshold = chosen
        answers = answer(list(rows.first), list(rows.second))
        for question, context, each in zip(rows.first, rows.second, answers, strict=True):
            wanted = plain_answer(model, tokenizer, question, context, chosen, max_length=64, stride=6)
            assert each["answer"] == wanted == context[each["start"] : each["end"]], (chosen, question, context)
            assert 0 <= each["score"] <= 1


def test_lines_and_requests_get_the_same_answers(exported: Path) -> None:
    answer = spdtool.load(exported)
    questions, contexts = ["a film", "the good book"], ["the film was good", "it was " * 60 + "very bad"]
    expected = answer(questions, contexts)
    lines = [InputLine(number, *pair) for number, pair in enumerate(zip(questions, contexts, strict=True))]
    predictions = list(predict_lines(answer, lines, 1))
    assert [{name: line[name] for name in expected[0]} for line in predictions] == expected
    assert answer.decision.line(predictions[0]).split("\t")[0] == expected[0]["answer"]
    batcher = Batcher(answer)
    outputs = [
        batcher.submit([question], [context]).result(20) for question, context in zip(questions, contexts, strict=True)
    ]
    batcher.close()
    assert [decision for each in outputs for decision in answer.decide(each)] == expected
    assert set(expected[0]) == set(answer.decision.prediction_schema()["required"])  # type: ignore[arg-type]
    for arguments, message in (
        ((["a film"],), "the model takes two texts"),
        ((["good " * 60], ["bad"]), "has 60 tokens: the text beside it has no room"),
        ((["a"], [" "]), "empty text"),
    ):
        with pytest.raises(DataError, match=message):
            answer(*arguments)


def test_planted_faults_are_caught(exported: Path, reference: Reference, toys: ModuleType, tmp_path: Path) -> None:
    import onnx

    target = get_target("onnx")
    shutil.copytree(exported, tmp_path / "swapped")
    file = tmp_path / "swapped/onnx/model.onnx"
    proto = onnx.load(file)
    start, end = (value.name for value in proto.graph.output)
    for node in proto.graph.node:
        swapped = [{start: end, end: start}.get(name, name) for name in node.output]
        del node.output[:]
        node.output.extend(swapped)
    onnx.save(proto, file)
    toys.seal(tmp_path / "swapped")
    with pytest.raises(GateError, match="checkpoint and exported file differ"):
        check_logits(target, reference, tmp_path / "swapped", ["cpu"])
    shutil.copytree(exported, tmp_path / "other threshold")
    toys.seal(tmp_path / "other threshold", settings={"stride": 32, "no_answer_threshold": -1e9})
    folder = tmp_path / "other threshold"
    with pytest.raises(GateError, match="has the settings"):
        check_manifest(target, reference, folder, [folder / "onnx/model.onnx"], "cpu")
    with pytest.raises(GateError, match="spdtool.load answers"):
        check_score(target, reference, tmp_path / "other threshold", "cpu")


def test_a_model_with_another_number_of_outputs_is_refused(toys: ModuleType, checkpoint: Path) -> None:
    with pytest.raises(ModelError, match="needs two: begin and end"):
        toy(toys).label_order(["a", "b", "c"])
    assert load_model(checkpoint).config.id2label == {0: "start", 1: "end"}


def test_the_score_of_an_empty_answer_is_the_probability_that_there_is_none() -> None:
    spans = np.array([[0, 0], [0, 3], [4, 7]])
    window = TextWindow(0, "one two", spans, np.array([-1, 1, 1]))
    values = np.array([[3.0, 2.0], [1.0, 0.0], [0.0, 1.0]])
    begins, ends = (np.exp(values[:, side]) / np.exp(values[:, side]).sum() for side in (0, 1))
    for threshold, answer, score in ((0.0, "", begins[0] * ends[0]), (None, "one two", begins[1] * ends[2])):
        decision = BestSpan(["start", "end"], {"no_answer_threshold": threshold})
        (found_answer,) = decision.decide([[WindowOutput(window, values)]])
        assert (found_answer["answer"], found_answer["score"]) == (answer, pytest.approx(score))


def test_questions_without_answers_are_read_from_every_layout(toys: ModuleType, tmp_path: Path) -> None:
    task, train = toy(toys), toys.question_rows(4)
    questions = [{"id": "1", "question": "a good film"}, {"id": "2", "question": "a bad film", "answers": []}]
    squad = {"data": [{"title": "t", "paragraphs": [{"context": "it was good and bad", "qas": questions}]}]}
    rows = [{"question": each["question"], "context": "it was good and bad"} for each in questions]
    contents = {
        "a.json": json.dumps(squad),
        "a.jsonl": "\n".join(map(json.dumps, rows)),
        "a.txt": "\n".join("\t".join(row.values()) for row in rows),
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content, "utf-8")
        unlabeled = task.read_unlabeled(tmp_path / name, (), train)
        assert unlabeled.first == ["a good film", "a bad film"], name
        assert unlabeled.second == ["it was good and bad"] * 2, name
        assert list(unlabeled.labels) == [[], []], name
        encoded = task.encode(toys.tokenizer(), {"train": train, "unlabeled": unlabeled}, toys.recipe())
        assert encoded["unlabeled"].labels.tolist() == [[0, 0], [0, 0]], name
        assert task.threshold is None, "rows without labels do not say whether questions may have no answer"
    for name, content, message in (
        ("a.jsonl", '{"question": "a", "text": "b"}', "has no column 'context'"),
        ("a.jsonl", '{"question": "a", "context": ""}', "line 1: no text in the column 'context'"),
        ("a.txt", "a question alone", "line 1: 1 texts where 2 were expected"),
    ):
        (tmp_path / name).write_text(content, "utf-8")
        with pytest.raises(DataError, match=message):
            task.read_unlabeled(tmp_path / name, (), train)
