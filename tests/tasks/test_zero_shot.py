"""A student of MNLI works as a zero-shot classifier: its label names mark the logit of entailment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toys
from transformers import pipeline

from spdtool import plugins
from spdtool.models.load import load_model, relabel, save_model
from spdtool.tasks.prepare import task_of

CLASSES = ["good", "bad", "warm"]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_the_pipeline_scores_the_logit_of_entailment(tmp_path: Path, order: tuple[int, ...]) -> None:
    task = task_of(plugins.datasets.get("mnli"))
    names = [task.head_labels[index] for index in order]
    model = toys.bert(labels=3)
    relabel(model, names)
    save_model(model, toys.tokenizer(), tmp_path)
    classify = pipeline("zero-shot-classification", model=str(tmp_path), tokenizer=str(tmp_path))
    answer = classify("the film was very good", CLASSES, hypothesis_template="it was {}")
    entailment = names.index("entailment")
    assert classify.entailment_id == entailment
    student, tokenizer = load_model(tmp_path), toys.tokenizer()
    logits = []
    for name in CLASSES:
        encoding = tokenizer("the film was very good", f"it was {name}", return_tensors="pt")
        logits.append(student(**encoding).logits[0, entailment])
    expected = torch.stack(logits).softmax(0).tolist()
    scores = dict(zip(answer["labels"], answer["scores"], strict=True))
    assert [scores[name] for name in CLASSES] == pytest.approx(expected, abs=1e-5)
    assert task.label_order(names) == [names.index(name) for name in task.head_labels]
