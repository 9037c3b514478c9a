"""Ranking: scores of one output or two, losses within a query, batches of whole queries."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import toys

from spdtool.data.batches import training_batches
from spdtool.data.dataset import Dataset, Rows
from spdtool.data.kinds.ranking import METRICS
from spdtool.data.tokens import empty_split
from spdtool.errors import DataError, GateError, ModelError
from spdtool.export.gates.folder import check_configuration
from spdtool.models.load import load_model, save_model
from spdtool.recipe.training import Loss
from spdtool.tasks.prepare import task_of
from spdtool.tasks.ranking import Ranking, Relevance, listwise_loss, margin_loss

LABELS = torch.tensor([[0, 1], [0, 0], [1, 0], [1, 1], [1, 0]])


def make_rows(queries: int = 9, passages: int = 3) -> Rows:
    rows = toys.rows(queries * passages, longest=6)
    labels = np.array([[row // passages, int(row % passages == 0)] for row in range(len(rows))])
    return Rows([f"the film was {toys.FILLER[query % 12]}" for query, _ in labels], rows.first, labels)


@pytest.fixture
def task() -> Ranking:
    dataset = Dataset("local", "ranking", ("query", "passage"), (), METRICS, lambda _data, _seed: {})
    ranking = task_of(dataset)
    assert isinstance(ranking, Ranking)
    return ranking


def test_two_outputs_give_the_margin_of_the_relevant_one(task: Ranking) -> None:
    logits = np.array([[0.5, 2.0], [1.0, 0.0]])
    for names, expected in ((["0", "1"], [1.5, -1.0]), (["relevant", "irrelevant"], [-1.5, 1.0])):
        task.align_labels({}, names)
        assert task.predictions(logits).tolist() == expected, names
        assert task.margins(torch.tensor(logits)).tolist() == expected
    assert task.predictions(np.array([[3.0], [4.0]])).tolist() == [3.0, 4.0]
    with pytest.raises(ModelError, match="has 3 labels"):
        task.label_order(["a", "b", "c"])


def test_losses_vanish_for_the_teacher_itself_and_see_no_other_query(task: Ranking) -> None:
    teacher = torch.tensor([[1.0], [0.0], [4.0], [2.0], [3.0]])
    for ranking in ("pointwise", "pairwise", "listwise"):
        loss = Loss(ranking=ranking)
        assert float(task.logit_loss(teacher, teacher, LABELS, loss)) == pytest.approx(0, abs=1e-6), ranking
        assert float(task.logit_loss(teacher + 1, teacher, LABELS, loss)) == pytest.approx(1), (
            ranking
        )  # pointwise alone
    shifted = teacher[:, 0].clone()
    shifted[:2] += 5  # a whole query higher: no margin within a query changes
    assert float(margin_loss(shifted, teacher[:, 0], LABELS[:, 0])) == 0
    assert float(listwise_loss(shifted, teacher[:, 0], LABELS[:, 0], 2.0)) == pytest.approx(0, abs=1e-6)


def test_losses_agree_with_loops_over_queries() -> None:
    generator = torch.Generator().manual_seed(0)
    score, target = torch.randn(5, generator=generator), torch.randn(5, generator=generator)
    errors, divergences = [], []
    for rows in ([0, 1], [2, 3, 4]):
        for row in rows:
            for other_row in rows:
                if row != other_row:
                    errors.append(((score[row] - score[other_row]) - (target[row] - target[other_row])) ** 2)
        softened, soft_target = (torch.log_softmax(values[rows] / 2.0, dim=0) for values in (score, target))
        divergences.append((soft_target.exp() * (soft_target - softened)).sum() * 4)
    assert float(margin_loss(score, target, LABELS[:, 0])) == pytest.approx(float(torch.stack(errors).mean()))
    expected = float(torch.stack(divergences).mean())
    assert float(listwise_loss(score, target, LABELS[:, 0], 2.0)) == pytest.approx(expected)


def test_gold_labels_have_their_share(task: Ranking) -> None:
    logits = torch.tensor([[5.0], [-5.0], [-5.0], [5.0], [-5.0]])
    assert float(task.gold_loss(logits, LABELS)) < 0.01
    mixed_loss = task.logit_loss(logits, logits, LABELS, Loss(hardness=0.5))
    assert float(mixed_loss) == pytest.approx(0.5 * float(task.gold_loss(logits, LABELS)), abs=1e-6)


def test_batches_hold_whole_queries(task: Ranking) -> None:
    for queries, passages, size in ((9, 3, 8), (4, 10, 4), (1, 7, 3), (20, 1, 8)):
        rows = task.encode(toys.tokenizer(), {"train": make_rows(queries, passages)}, toys.recipe())["train"]
        assert rows.groups is not None
        for pool in (None, 2):
            batches = training_batches(rows, size, 0, 0, pool=pool)
            assert len(batches) == -(-len(rows) // size)
            assert sorted(np.concatenate(batches)) == list(range(len(rows)))
            assert min(map(len, batches)) > 0
            assert max(map(len, batches)) <= 2 * size
            if passages <= size:
                owners = [set(rows.groups[batch]) for batch in batches]
                assert sum(map(len, owners)) == queries, (queries, passages, size)
    first, second = (training_batches(rows, 8, 0, epoch, pool=None) for epoch in (0, 1))
    assert any(not np.array_equal(*pair) for pair in zip(first, second, strict=True))


def test_a_sample_of_training_rows_has_whole_queries(task: Ranking) -> None:
    rows = task.encode(toys.tokenizer(), {"train": make_rows()}, toys.recipe())["train"].sample(10, 0)
    assert len(rows) == 9
    assert rows.groups is not None
    assert set(np.unique(rows.groups, return_counts=True)[1]) == {3}


def test_chance_is_what_random_orders_score_and_a_perfect_ranking_is_above_it(task: Ranking) -> None:
    rows = make_rows(30)
    labels = np.asarray(rows.labels)
    chance = task.chance_score(rows)
    assert task.baseline(rows)["mrr@10"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3, abs=0.05)
    assert 0.5 < chance < 0.9
    perfect = labels[:, 1:].astype(np.float64)
    assert task.score_labels(perfect, labels)["score"] == 1.0


def test_a_bootstrap_draws_queries_that_have_a_relevant_passage(task: Ranking) -> None:
    rows = make_rows(6)
    labels = np.asarray(rows.labels, np.float32)
    labels[labels[:, 0] == labels[0, 0], 1] = 0
    encoded = replace(empty_split(toys.tokenizer()), labels=labels, groups=labels[:, 0])
    outputs = np.random.default_rng(1).normal(size=(len(labels), 1))
    resampler = task.resampler(outputs, encoded)
    assert resampler is not None
    assert (resampler.size, resampler.units) == (5, "queries")
    assert resampler.score(np.arange(5)) == pytest.approx(task.score(outputs, encoded)["score"])
    labels[:, 1] = 0
    assert task.resampler(outputs, encoded) is None


def test_rank_changes_within_the_tolerance_are_no_change(task: Ranking) -> None:
    before = np.array([[1.0], [0.99], [0.0], [3.0], [1.0]])
    encoded = replace(empty_split(toys.tokenizer()), labels=LABELS.numpy())
    after = before.copy()
    after[1] = 1.001
    changed, worsened = task.compare_predictions(before, after, encoded, 0.1)
    assert not changed.any()
    after[1] = 2.0
    changed, worsened = task.compare_predictions(before, after, encoded, 0.1)
    assert changed.tolist() == worsened.tolist() == [False, True, False, False, False]


def test_rows_without_relevance_information_are_refused_or_reported(task: Ranking) -> None:
    rows = make_rows()
    for relevance, amount in ((0, "no"), (1, "every")):
        labels = np.asarray(rows.labels).copy()
        labels[:, 1] = relevance
        with pytest.raises(DataError, match=f"{amount} training passage"):
            task.check_training_rows(Rows(rows.first, rows.second, labels))
    unanswered = np.asarray(rows.labels).copy()
    unanswered[:3, 1] = 0
    splits = {"train": rows, "dev": Rows(rows.first, rows.second, unanswered)}
    lines = task.data_warnings(splits)
    assert any("1 queries of dev have no relevant passage: they are left out of the metrics" in line for line in lines)
    assert any("dev queries are in train too" in line for line in lines)
    assert "9 queries, 9 of 27 relevant" in task.describe_labels(splits)


def test_a_score_is_that_of_a_cross_encoder() -> None:
    one_output, two_outputs = np.array([[0.0], [2.0]], np.float32), np.array([[0.0, 1.0], [3.0, 0.0]], np.float32)
    identity = {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}
    for config, outputs, names, expected in (
        ({}, one_output, ["score"], [0.5, 1 / (1 + np.exp(-2))]),
        (identity, one_output, ["score"], [0.0, 2.0]),
        (
            {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
            one_output,
            ["score"],
            [0.0, 2.0],
        ),
        ({}, two_outputs, ["no", "yes"], [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(3))]),
        ({}, two_outputs, ["relevant", "not_relevant"], [1 / (1 + np.exp(1)), 1 / (1 + np.exp(-3))]),
    ):
        decision = Relevance(names, Relevance.settings_of(config))
        assert decision.decide(outputs) == pytest.approx(expected, abs=1e-6), (config, names)
        assert decision.tensor("score", outputs) == decision.decide(outputs)
        prediction = decision.predictions(outputs)[1]
        assert prediction["logits"] == outputs[1].tolist()
        assert decision.line(prediction) == f"{decision.decide(outputs)[1]:.6g}"
    assert Relevance(["score"]).scored_answers(one_output) == [0.0, 2.0]


def test_a_changed_activation_is_caught_and_that_of_newer_folders_is_read(tmp_path: Path) -> None:
    model = toys.bert(labels=1)
    save_model(model, toys.tokenizer(), tmp_path / "checkpoint")
    identity = "torch.nn.modules.linear.Identity"
    # Version 6 of sentence-transformers stores it beside config.json.
    file = tmp_path / "checkpoint/config_sentence_transformers.json"
    file.write_text(json.dumps({"model_type": "CrossEncoder", "activation_fn": identity}), "utf-8")
    student = load_model(tmp_path / "checkpoint")
    assert Relevance.settings_of(student.config.to_dict()) == {"activation": "identity"}
    save_model(student, toys.tokenizer(), tmp_path / "exported")
    check_configuration(tmp_path / "exported", tmp_path / "checkpoint")
    config = json.loads((tmp_path / "exported/config.json").read_text("utf-8"))
    del config["sentence_transformers"]
    (tmp_path / "exported/config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(GateError, match="sentence_transformers"):
        check_configuration(tmp_path / "exported", tmp_path / "checkpoint")


def test_the_code_of_the_card_gives_the_score_of_the_model() -> None:
    outputs = {1: np.array([[0.75]], np.float32), 2: np.array([[0.25, 1.5]], np.float32)}
    for names, config in (
        (["score"], {}),
        (["score"], {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}),
        (["LABEL_0", "LABEL_1"], {}),
        (["relevant", "irrelevant"], {}),
    ):
        decision, logits = Relevance(names, Relevance.settings_of(config)), outputs[len(names)]
        code = decision.snippets().python
        assert eval(code, {"np": np, "logits": logits}) == pytest.approx(decision.decide(logits)[0]), (names, config)
