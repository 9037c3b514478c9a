"""Embeddings: losses on vectors, scores on pairs and neighbours, prompts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import toys

import spdtool
from spdtool.data.kinds.embedding import RatedPairs, make_rows
from spdtool.data.tokens import empty_split
from spdtool.errors import DataError, ModelError, RecipeError
from spdtool.export.gates.reference import Reference, prepare_dev_sets
from spdtool.models.load import load_model, load_tokenizer, save_model
from spdtool.models.vocabulary import choose_tokens, trim_embeddings, trim_tokenizer
from spdtool.recipe.reading import request_recipe
from spdtool.recipe.training import Loss
from spdtool.stages.api import export_model
from spdtool.tasks.embedding import EMBEDDING, Embedding, Vector, sample_texts, vector_loss
from spdtool.tasks.prepare import find_task

PAIRS = RatedPairs(["a b", "c"], ["a", "d"], [5.0, 1.0])


@pytest.fixture
def task(tmp_path: Path) -> Embedding:
    teacher = toys.sentence_encoder(tmp_path / "teacher", prompts={"query": "good ", "passage": "bad "})
    (tmp_path / "texts.txt").write_text("\n".join(dict.fromkeys(toys.rows(40).first)), "utf-8")
    (tmp_path / "pairs.tsv").write_text("5\tthe film\ta film\n1\tgood\tbad\n3\tit was\tand then\n", "utf-8")
    recipe = request_recipe(
        data=tmp_path / "texts.txt", teacher=teacher, sets=[f"pairs={tmp_path / 'pairs.tsv'}", "neighbour_texts=5"]
    )
    found_task = find_task(recipe)
    assert isinstance(found_task, Embedding)
    found_task.read_rows(recipe)
    return found_task


def test_a_given_sentence_encoder_makes_the_task(tmp_path: Path, task: Embedding) -> None:
    recipe = request_recipe(
        data=tmp_path / "texts.txt", teacher=tmp_path / "teacher", sets=[f"pairs={tmp_path / 'pairs.tsv'}"]
    )
    splits = task.read_rows(recipe)
    line = task.describe_labels(splits)
    for words in ("no labels", "3 rated pairs", "pooling: mean, normalized", "prompts in turn: query, passage"):
        assert words in line, line
    count = len(splits["dev"]) - 6  # two texts for each pair
    few = f"nearest neighbours among {count} texts: with 11 or fewer every model finds all"
    assert task.data_warnings(splits)[-1] == few
    for setting in (f"unlabeled={tmp_path / 'texts.txt'}", "test_share=0.1"):
        with pytest.raises(DataError, match="no text of a sentence encoder has one"):
            request_and_find(tmp_path, setting)
    with pytest.raises(RecipeError, match="none was given"):
        task.read_rows(recipe.model_copy(update={"given_teacher": None}))


def request_and_find(folder: Path, setting: str) -> None:
    find_task(request_recipe(data=folder / "texts.txt", teacher=folder / "teacher", sets=[setting]))


def test_vector_losses_vanish_for_the_teacher_and_differ_in_what_they_measure() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(6, 8, generator=generator)
    rotated_vectors = teacher @ torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
    for weights, longer, rotated in (
        ({"cosine": 1, "distance": 0, "similarity": 0}, 0.0, None),
        ({"cosine": 0, "distance": 1, "similarity": 0}, 1.0, None),
        ({"cosine": 0, "distance": 0, "similarity": 1}, 0.0, 0.0),
    ):
        loss = Loss(**weights)
        assert float(vector_loss(teacher, teacher, loss)) == pytest.approx(0, abs=1e-5), weights
        assert float(vector_loss(2 * teacher, teacher, loss)) == pytest.approx(longer, abs=1e-5), weights
        if rotated is None:
            assert float(vector_loss(rotated_vectors, teacher, loss)) > 0.5, weights
        else:  # a rotation changes no similarity
            assert float(vector_loss(rotated_vectors, teacher, loss)) == pytest.approx(rotated, abs=1e-4)


def test_similarities_agree_with_a_loop() -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(5, 4, generator=generator), torch.randn(5, 4, generator=generator)
    losses = []
    for row in range(5):
        other_rows = [other_row for other_row in range(5) if other_row != row]
        shares = []
        for vectors in (student, teacher):
            similarity = torch.cosine_similarity(vectors[row : row + 1], vectors[other_rows])
            shares.append(torch.log_softmax(similarity / 0.05, dim=0))
        losses.append((shares[1].exp() * (shares[1] - shares[0])).sum())
    loss = Loss(cosine=0, similarity=1)
    assert float(vector_loss(student, teacher, loss)) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)


def test_matryoshka_dimensions_have_losses_and_scores_of_their_own(task: Embedding) -> None:
    assert task.settings_of_teacher is not None
    teacher = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    student = teacher.clone()
    student[:, :4] *= -1
    loss = Loss(similarity=0)
    full_loss = float(task.logit_loss(student, teacher, torch.zeros(6), loss))
    task.settings_of_teacher = replace(task.settings_of_teacher, dimensions=(4,))
    mean_loss = float(task.logit_loss(student, teacher, torch.zeros(6), loss))
    assert mean_loss == pytest.approx((full_loss + 2.0) / 2, abs=1e-5)  # the leading four point the other way
    with pytest.raises(ModelError, match="have 4 numbers"):
        task.logit_loss(student[:, :4], teacher, torch.zeros(6), loss)


def test_scores_are_those_of_pairs_and_of_the_teachers_neighbours(task: Embedding) -> None:
    generator = np.random.default_rng(0)
    rows = make_rows([f"text {number}" for number in range(30)], PAIRS)
    encoded = replace(
        empty_split(toys.tokenizer()), labels=np.asarray(rows.labels), offsets=np.arange(len(rows) + 1, dtype=np.int64)
    )
    vectors = generator.standard_normal((len(rows), 6)).astype(np.float32)
    vectors[1] = vectors[0] + 0.01  # the pair that is rated higher is nearer
    scores = task.score(vectors, encoded)
    assert scores == pytest.approx({"score": 1.0, "spearman": 1.0, "neighbours": 1.0})
    compared = task.compare_with({"dev": encoded}, lambda: {"dev": generator.standard_normal(vectors.shape)})["dev"]
    assert task.score(vectors, compared)["neighbours"] < 0.7
    compared_again = task.compare_with({"dev": compared}, lambda: pytest.fail("the teacher is there already"))
    assert compared_again["dev"] is compared


def test_texts_get_their_prompts(tmp_path: Path, task: Embedding) -> None:
    tokenizer = load_tokenizer(tmp_path / "teacher")
    splits = {"train": make_rows(["film"] * 4), "dev": make_rows(["film"])}
    encoded = task.encode(tokenizer, splits, toys.recipe())
    lengths = encoded["train"].lengths.tolist(), encoded["dev"].lengths.tolist()
    assert lengths == ([3, 4, 4, 3], [3])  # none, the query's, the passage's, none again


def test_a_sample_has_whole_pairs() -> None:
    rows = make_rows(["x", "y", "z"], PAIRS)
    assert sample_texts(rows, None, 0) is rows
    sample = sample_texts(rows, 1, 0)
    assert len(sample) == 3
    assert np.asarray(sample.labels)[:2, 0].tolist() in ([0, 0], [1, 1])


def test_a_vector_is_answered_in_every_form() -> None:
    outputs = np.array([[0.5, 1.0], [0.25, 0.0]], np.float32)
    decision = Vector(["0", "1"])
    assert [vector.tolist() for vector in decision.decide(outputs)] == outputs.tolist()
    assert decision.predictions(outputs) == [{"embedding": [0.5, 1.0]}, {"embedding": [0.25, 0.0]}]
    assert decision.line({"embedding": [0.5, 1.0]}) == '{"embedding":[0.5,1.0]}'
    assert decision.tensor("sentence_embedding", outputs) == [0.5, 1.0, 0.25, 0.0]
    assert decision.tensor_shape("sentence_embedding", 2) == [2, 2]


@pytest.mark.usefixtures("task")
def test_an_export_asks_the_teacher_once_and_in_its_own_tokens(tmp_path: Path) -> None:
    sets = [f"pairs={tmp_path / 'pairs.tsv'}", "neighbour_texts=5"]
    recipe = request_recipe(data=tmp_path / "texts.txt", teacher=tmp_path / "teacher", sets=sets)
    dev = prepare_dev_sets(tmp_path / "teacher", recipe)
    assert Reference(tmp_path / "teacher", dev, recipe).dev_logits("cpu") is dev.logits
    # The student is the teacher, but for the words that no dev text has: its tokens have other numbers.
    tokenizer, model = load_tokenizer(tmp_path / "teacher"), load_model(tmp_path / "teacher")
    tokens = choose_tokens(tokenizer, np.unique(dev.splits["dev"].columns["input_ids"]).tolist())
    assert tokens[-1] >= len(tokens), "no token has another number"
    trim_embeddings(model, tokens)
    save_model(model, trim_tokenizer(tokenizer, tokens), tmp_path / "student")
    student_dev = prepare_dev_sets(tmp_path / "student", recipe, teacher=dev)
    logits = Reference(tmp_path / "student", student_dev, recipe).dev_logits("cpu")
    np.testing.assert_allclose(logits["dev"], dev.logits["dev"], atol=1e-6)
    assert student_dev.task is not None
    assert student_dev.task.score_splits(logits, student_dev.splits)["neighbours"] == 1.0


def test_vectors_are_cut_where_the_folder_says_so(tmp_path: Path) -> None:
    source = toys.sentence_encoder(tmp_path / "source")
    whole = spdtool.load(export_model(source, to=tmp_path / "whole", device="cpu").folder)
    file = source / "config_sentence_transformers.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(config | {"truncate_dim": 5}))
    cut = spdtool.load(export_model(source, to=tmp_path / "cut", device="cpu").folder)
    texts = ["the film was good", "bad"]
    vectors = np.array(cut(texts))
    assert vectors.shape == (2, 5)
    np.testing.assert_array_equal(vectors, np.array(whole(texts))[:, :5])  # as they are, not scaled again
    outputs = cut.logits(texts)
    assert cut.decision.tensor_shape(EMBEDDING, 2) == [2, 5]
    np.testing.assert_array_equal(np.reshape(cut.decision.tensor(EMBEDDING, outputs), (2, 5)), vectors)
    assert [len(each["embedding"]) for each in cut.decision.predictions(outputs)] == [5, 5]
