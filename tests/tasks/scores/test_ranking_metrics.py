"""Metrics of rankings against examples that are worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from spdtool.tasks.scores.ranking_metrics import average_precision, ndcg, reciprocal_rank, score_rankings

# (relevance in the order of the ranking, reciprocal rank, nDCG@10, average precision)
WORKED = (
    ((1, 0, 0), 1.0, 1.0, 1.0),
    ((0, 1, 0), 1 / 2, 0.6309297536, 1 / 2),
    ((0, 0, 1, 1), 1 / 3, (0.5 + 0.4306765581) / 1.6309297536, (1 / 3 + 2 / 4) / 2),
    # Järvelin and Kekäläinen's grades: gains 3, 2, 3, 0, 1, 2 give DCG 6.8611 and the best order 7.1410.
    ((3, 2, 3, 0, 1, 2), 1.0, 6.861126688 / 7.140995158, (1 + 1 + 1 + 4 / 5 + 5 / 6) / 5),
    ((*[0] * 10, 1), 0.0, 0.0, 1 / 11),
)


def test_metrics_agree_with_worked_examples() -> None:
    for relevance, *expected in WORKED:
        ranked = np.array(relevance)
        values = [metric(ranked) for metric in (reciprocal_rank, ndcg, average_precision)]
        assert values == pytest.approx(expected, abs=1e-8), relevance


def test_metrics_agree_with_ir_measures() -> None:
    measures = pytest.importorskip("ir_measures")
    generator = np.random.default_rng(0)
    qrels, run, labels, scores = [], [], [], []
    for query in range(20):
        for passage in range(15):
            relevance, score = int(generator.integers(0, 3)), float(generator.random())
            qrels.append(measures.Qrel(str(query), str(passage), relevance))
            run.append(measures.ScoredDoc(str(query), str(passage), score))
            labels.append((query, relevance))
            scores.append(score)
    wanted = {"mrr@10": measures.RR @ 10, "ndcg@10": measures.nDCG @ 10, "map": measures.AP}
    expected = measures.calc_aggregate(wanted.values(), qrels, run)
    values = score_rankings(np.array(scores), np.array(labels))
    for name, measure in wanted.items():
        assert values[name] == pytest.approx(expected[measure], abs=1e-6), name


def test_queries_without_a_relevant_passage_are_left_out_and_ties_do_not_help() -> None:
    labels = np.array([[0, 1], [0, 0], [1, 0], [1, 0]])
    assert score_rankings(np.array([2.0, 1.0, 5.0, 6.0]), labels)["map"] == 1.0
    assert score_rankings(np.zeros(4), labels)["mrr@10"] == 0.5  # the relevant passage comes last
    assert score_rankings(np.zeros(2), labels[2:])["map"] == 0.0
