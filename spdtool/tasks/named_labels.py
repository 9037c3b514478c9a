"""Tasks whose labels have names: those of a data set are matched with those of a model, by name or by position."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from spdtool.data.labels import parse_number
from spdtool.data.overview import list_names
from spdtool.errors import LISTED, ModelError
from spdtool.tasks.task import Task

if TYPE_CHECKING:
    from torch import Tensor


METRICS_OF_SEVERAL = {"f1": "f1_macro"}  # what stands for a metric of two classes where there are more


class NamedLabels(Task):
    """A task of named labels, one of which each prediction is: the one with the largest logit."""

    def label_order(self, names: Sequence[str]) -> list[int]:
        """Return, for each class, its index among a model's label names.

        Names are matched as they are written; else without case, `-`, `_` and spaces, if that leaves them different;
        else `LABEL_2` as 2. Where one side has mere numbers (`matches_by_position`), the order decides.
        """
        labels = self.dataset.labels
        if len(names) != len(labels):
            raise ModelError(
                f"the model has {len(names)} labels ({_enumerate(names)}); "
                f"task {self.name!r} has {len(labels)} ({_enumerate(labels)})",
                self._explain_other_count(names),
            )
        for spell in SPELLINGS:
            index = {spell(name): number for number, name in enumerate(names)}
            if len(index) == len(names) and index.keys() == {spell(label) for label in labels}:
                return [index[spell(label)] for label in labels]
        if not self.matches_by_position(names):
            raise ModelError(
                f"the model calls its labels {_enumerate(names)}; those of task {self.name!r} are {_enumerate(labels)}",
                "rename them in the data, or under id2label in the model's config.json: "
                "a model that calls them LABEL_0, LABEL_1, ... is taken to follow the task's order",
            )
        return list(range(len(names)))

    def _explain_other_count(self, names: Sequence[str]) -> str:
        """Say what may be the reason why a model has another number of labels."""
        labels = self.dataset.labels
        for kind, spell in (("surrounding spaces", str.strip), ("their Unicode form", compose_accents)):
            alike = [label for label in labels if spell(label) != label]
            if alike and len({spell(label) for label in labels}) < len(labels):
                pairs = list_names([f"{spell(label)!r} and {label!r}" for label in alike])
                return f"labels in the data differ by {kind} only: {pairs}; write each in one way"
        if len(names) == 1 and all(parse_number(label) is not None for label in labels):
            return "a model with one output predicts a number: --set regression=true reads the labels as numbers"
        return "give a teacher that was fine-tuned on this task"

    def widen(self, names: Sequence[str]) -> Task:
        """Return the task with the classes that only a model has, after those of the rows."""
        labels = self.dataset.labels
        if len(names) <= len(labels):
            return self
        for spell in SPELLINGS:
            spelled = {spell(name): name for name in names}
            if len(spelled) < len(names) or not spelled.keys() >= {spell(label) for label in labels}:
                continue
            further = spelled.keys() - {spell(label) for label in labels}
            added = []
            for name in names:
                if spell(name) in further:
                    # A placeholder names no class: LABEL_2 becomes the class 2.
                    added.append(spell(name) if spell is _number_of else name)
            metrics = self.dataset.metrics
            if len(names) > 2:  # that of two classes knows one that is positive
                metrics = tuple(METRICS_OF_SEVERAL.get(metric, metric) for metric in metrics)
            widened = type(self)(replace(self.dataset, labels=(*labels, *added), metrics=metrics))
            if self.metric is not None:
                widened.metric = metrics[self.dataset.metrics.index(self.metric)]
            return widened
        return self

    def matches_by_position(self, names: Sequence[str]) -> bool:
        """Tell whether the model or the data set has numbers from 0 for names."""
        if set(names) == set(self.dataset.labels):
            return False
        numbers = [str(number) for number in range(len(names))]
        placeholders = [f"LABEL_{number}" for number in numbers]  # what transformers writes for want of names
        return any(list(side) in (numbers, placeholders) for side in (names, self.dataset.labels))

    def predictions(self, logits: np.ndarray) -> np.ndarray:
        """Return the class of the largest logit, int64 [rows], or [all tokens]."""
        predicted: np.ndarray = logits.argmax(axis=1)
        return predicted


def compose_accents(label: str) -> str:
    """Return the label in the Unicode form that most programs write: one character for a letter with its accent."""
    return unicodedata.normalize("NFC", label)


def _plain_label(label: str) -> str:
    return compose_accents(label).lower().replace("-", "_").replace(" ", "_")


def _number_of(label: str) -> str:
    """Return the number in a placeholder such as LABEL_2; anything else as it is."""
    number = label.removeprefix("LABEL_")
    return number if number.isdecimal() else label


# Tried in this order: names that differ by case alone stay apart if the model keeps them apart too.
SPELLINGS: tuple[Callable[[str], str], ...] = (str, _plain_label, _number_of)


def _enumerate(names: Sequence[str]) -> str:
    """Join the first names, and count the others."""
    further = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + further


def soften(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the student's log-probabilities and the teacher's probabilities of logits divided by a temperature.

    Args:
        student, teacher: logits [..., labels], of any float type.

    Returns:
        Both float32 [..., labels].
    """
    from torch.nn import functional as F

    softened = F.log_softmax(student.float() / temperature, dim=-1)
    return softened, F.softmax(teacher.float() / temperature, dim=-1)
