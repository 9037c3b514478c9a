"""Decisions: what an exported model answers, from its outputs to labels, numbers or spans.

`spdtool.load`, `spdtool predict` and the server ask the decision of the folder's kind of task for everything that
depends on it. A kind names its class of decision in `Task.decision`. Neither torch nor transformers is imported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import numpy as np

from spdtool import plugins
from spdtool.errors import ModelError
from spdtool.escaping import make_visible
from spdtool.tasks.head import head_of_config
from spdtool.tasks.scores.probabilities import sigmoid, softmax

Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"
Object: TypeAlias = dict[str, Json]
Answer: TypeAlias = Any
"""What a row is answered with: the label; a number; a list of labels; whatever a kind of task has."""

Truncation: TypeAlias = Literal["longest_first", "only_first", "only_second"]
LOGITS, PROBABILITIES, LABEL = "logits", "probabilities", "label"
NUMBER: Object = {"type": "number"}
THRESHOLDS_NOTE = """
`spdtool.load` answers a label where its logit is above a threshold that was chosen on the dev rows: `settings` in
`manifest.json` has one for each label. Others answer above 0, a probability of one half.
"""


class Snippets(NamedTuple):
    """What a model card says of the answers.

    Attributes:
        answer: what one call answers, in words.
        python: expression of it, from arrays called as the outputs of the head.
        script: the same in JavaScript; empty where the pipeline of transformers.js says it.
        reason: why that pipeline does not.
        options: further arguments of that pipeline.
        note: what has to be said beside it.
    """

    answer: str
    python: str
    script: str = ""
    reason: str = ""
    options: str = ""
    note: str = ""


class ExampleCall(NamedTuple):
    """How documents call a loaded model of one kind.

    Attributes:
        name: of the variable that holds the model.
        text: stands for the only text. pair: stand for both texts of a pair.
    """

    name: str = "classify"
    text: str = "one text"
    pair: tuple[str, str] = ("first text", "second text")

    def texts(self, *, paired: bool) -> tuple[str, ...]:
        """Return one text, or both texts of a pair."""
        return self.pair if paired else (self.text,)


class Decision:
    """How the outputs of one model become answers. A subclass overrides what its kind of task has otherwise.

    Attributes:
        names: labels in the order of the logits.
        temperature: by which logits are divided before they become probabilities; 1: raw ones.
        settings: what the export stored for this kind in manifest.json, such as a threshold for each label.
        windows: which text of a row is cut into overlapping windows, where it is too long: 0 the first, 1 the second;
            None: a row that is too long is cut off. Settings may have the `stride`, tokens that windows share.
        output_names: outputs that the server offers in the protocol of KServe, the default answer first.
        route: name of a further route of the server for this kind, see `serving.compatible`; None: there is none.
        reads_words: whether a training row may have its text as a list of words, which are joined by spaces.
        example: how the model card and the page of a run call a model of this kind.
    """

    output_names: ClassVar[tuple[str, ...]] = (LOGITS, PROBABILITIES, LABEL)
    windows: ClassVar[int | None] = None
    route: ClassVar[str | None] = None
    reads_words: ClassVar[bool] = False
    example: ClassVar[ExampleCall] = ExampleCall()

    def __init__(self, names: Sequence[str], settings: Mapping[str, Json] | None = None) -> None:
        self.names, self.settings = list(names), dict(settings or {})
        self.temperature = read_temperature(self.settings)

    @classmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:
        """Tell whether a folder with this config.json is answered so, where its manifest names no kind of task."""
        raise NotImplementedError

    @classmethod
    def settings_of(cls, config: Mapping[str, Any]) -> dict[str, Json]:  # noqa: ARG003
        """Return the settings that config.json decides; those of the manifest come on top."""
        return {}

    @classmethod
    def truncation(cls) -> Truncation:
        """Return which text of a pair is cut where a row is too long, in the words of the library tokenizers."""
        if cls.windows is None:
            return "longest_first"
        return "only_second" if cls.windows == 1 else "only_first"

    # In Python

    def decide(self, outputs: np.ndarray) -> list[Answer]:
        """Turn outputs into answers.

        Args:
            outputs: logits [rows, labels]; for a kind that reads `windows`, for each text a list of `WindowOutput`.
        """
        raise NotImplementedError

    def scored_answers(self, outputs: np.ndarray) -> list[Answer]:
        """Return the answers in the form that is scored, which `Task.answers` returns too."""
        return self.decide(outputs)

    def join(self, outputs: Sequence[Any]) -> Any:
        """Put the outputs of single texts together, as `decide` takes them."""
        return np.array(outputs) if self.windows is None else list(outputs)

    def probabilities(self, outputs: np.ndarray) -> np.ndarray | None:
        """Return probabilities, float32 of the shape of the logits; None where the answers have none."""
        return None

    # In JSON

    def predictions(self, outputs: np.ndarray) -> list[Object]:
        """Return one JSON object for each answer: by default `label`, its `probability` or None, and `logits`."""
        probabilities, rows = self.probabilities(outputs), []
        for index, answer in enumerate(self.decide(outputs)):
            probability: Json = None
            if probabilities is not None:
                probability = self.describe_probability(answer, probabilities[index])
            rows.append({"label": answer, "probability": probability, "logits": outputs[index].tolist()})
        return rows

    def describe_probability(self, answer: Answer, probabilities: np.ndarray) -> Json:
        """Return the probability of an answer, from those of its row's labels."""
        return float(probabilities[self.names.index(str(answer))])

    def tensor(self, name: str, outputs: np.ndarray) -> list[Json]:
        """Return one of `output_names`, flat, as the protocol of KServe has it."""
        if name == LABEL:
            return [str(answer) for answer in self.decide(outputs)]
        values = outputs if name == LOGITS else self.probabilities(outputs)
        assert values is not None, f"{name} is not offered"
        flat: list[Json] = values.ravel().tolist()
        return flat

    def tensor_type(self, name: str) -> str:
        """Return the data type of an output in the protocol's words."""
        return "BYTES" if name == LABEL else "FP32"

    def tensor_shape(self, name: str, rows: int) -> list[int]:
        """Return the shape of an output for that many rows; -1 where their number is open."""
        return [rows] if name == LABEL else [rows, len(self.names)]

    def prediction_schema(self) -> Object:
        """Return the JSON schema of one object of `predictions`."""
        return self.describe_object({"type": "string", "enum": [*self.names]}, NUMBER)

    @staticmethod
    def describe_object(label: Object, probability: Object) -> Object:
        """Return the schema of an object with `label`, `probability` and `logits`."""
        properties: Object = {
            "label": label,
            "probability": probability,
            "logits": {"type": "array", "items": NUMBER},
        }
        return {"type": "object", "properties": properties, "required": [*properties]}

    # In text

    def describe(self) -> str:
        """Say in one line what is answered."""
        return ", ".join(map(make_visible, self.names))

    def line(self, prediction: Mapping[str, Any]) -> str:
        """Return a prediction as a line of `spdtool predict`; control characters are spelled out."""
        return f"{make_visible(prediction['label'])}\t{prediction['probability']:.4f}"

    def snippets(self) -> Snippets:
        """Return what a model card shows; of a single output that it is a number."""
        if len(self.names) == 1:
            reason = "turns a number into a probability"
            return Snippets("a number", "float(logits[0, 0])", "logits.data[0]", reason)
        labels = json.dumps(self.names, ensure_ascii=False)
        return Snippets(f"one of {', '.join(self.names)}", f"{labels}[logits[0].argmax()]")

    @property
    def unanswered(self) -> str:
        """The line of `spdtool predict` for a text without an answer, with as many columns."""
        return "-\t-"


class OneLabel(Decision):
    """Each row has exactly one of the labels: that with the largest logit."""

    @classmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:  # noqa: ARG003
        """Tell whether this is a classifier of one label a row, which it is where nothing else fits."""
        return True

    def decide(self, outputs: np.ndarray) -> list[Answer]:
        """Return the label with the largest logit of each row."""
        return [self.names[index] for index in outputs.argmax(axis=1)]

    def probabilities(self, outputs: np.ndarray) -> np.ndarray | None:
        """Return the softmax of the logits, divided by the temperature."""
        return np.asarray(softmax(outputs / self.temperature), np.float32)


class SeveralLabels(Decision):
    """A row may have several labels or none: those whose logit is above the threshold that the export chose.

    Without thresholds it is 0, a probability of one half.
    """

    def __init__(self, names: Sequence[str], settings: Mapping[str, Json] | None = None) -> None:
        super().__init__(names, settings)
        self.thresholds = read_thresholds(self.settings, len(self.names))

    @classmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:
        """Tell whether config.json says so."""
        return config.get("problem_type") == "multi_label_classification"

    def decide(self, outputs: np.ndarray) -> list[Answer]:
        """Return the list of labels of each row."""
        answers: list[Answer] = []
        for row in outputs:
            answers.append([self.names[index] for index in np.flatnonzero(row > self.thresholds)])
        return answers

    def probabilities(self, outputs: np.ndarray) -> np.ndarray | None:
        """Return the sigmoid of each logit, divided by the temperature."""
        return sigmoid(outputs / self.temperature)

    def describe_probability(self, answer: Answer, probabilities: np.ndarray) -> Json:
        """Return the probability of each label of the answer by its name."""
        by_label = dict(zip(self.names, probabilities.tolist(), strict=True))
        return {name: by_label[name] for name in answer}

    def tensor(self, name: str, outputs: np.ndarray) -> list[Json]:
        """Return an output; the labels of a row are joined by commas."""
        if name == LABEL:
            return [",".join(labels) for labels in self.decide(outputs)]
        return super().tensor(name, outputs)

    def prediction_schema(self) -> Object:
        """Return the schema of an object with a list of labels, and their probabilities by name."""
        labels: Object = {"type": "array", "items": {"type": "string", "enum": [*self.names]}}
        return self.describe_object(labels, {"type": "object", "additionalProperties": NUMBER})

    def snippets(self) -> Snippets:
        """Return what a model card shows of several labels."""
        names = json.dumps(self.names, ensure_ascii=False)
        python = f"[name for name, logit in zip({names}, logits[0]) if logit > 0]"
        answer = f"some of {', '.join(self.names)}"
        return Snippets(answer, python, options=", { top_k: null }", note=THRESHOLDS_NOTE)

    def line(self, prediction: Mapping[str, Any]) -> str:
        """Return labels and probabilities, each joined by commas."""
        labels, probability = prediction["label"], prediction["probability"]
        probabilities = ",".join(f"{probability[name]:.4f}" for name in labels)
        return f"{','.join(map(make_visible, labels))}\t{probabilities}"


class OneNumber(Decision):
    """Each row has a number: the only logit."""

    output_names = (LOGITS,)
    example = ExampleCall("predict")

    @classmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:
        """Tell whether there is one output, and its rows do not have several labels."""
        labels = config.get("id2label")
        is_single = isinstance(labels, Mapping) and len(labels) == 1
        return is_single and not SeveralLabels.fits(config)

    def decide(self, outputs: np.ndarray) -> list[Answer]:
        """Return the value of each row."""
        return [float(value) for value in outputs[:, 0]]

    def prediction_schema(self) -> Object:
        """Return the schema of an object with a number."""
        return self.describe_object(NUMBER, {"type": "null"})

    def describe(self) -> str:
        """Say that it is a number."""
        return "a value"

    def line(self, prediction: Mapping[str, Any]) -> str:
        """Return the number."""
        return f"{prediction['label']:.6g}"


def read_temperature(settings: Mapping[str, Json]) -> float:
    """Return the temperature of some settings, 1 without one; a stranger may have written them.

    Raises:
        ModelError: it is no number above 0.
    """
    temperature = settings.get("temperature", 1.0)
    if not _is_number(temperature) or float(temperature) <= 0:  # type: ignore[arg-type]
        raise ModelError(
            f"manifest.json has the temperature {str(temperature)[:40]!r}", "a number above 0 was expected"
        )
    return float(temperature)  # type: ignore[arg-type]


def read_thresholds(settings: Mapping[str, Json], count: int) -> np.ndarray:
    """Return the thresholds of some settings, [labels]; zeros without any.

    Raises:
        ModelError: they are not one number for each label.
    """
    thresholds = settings.get("thresholds")
    if thresholds is None:
        return np.zeros(count)
    if not isinstance(thresholds, list) or len(thresholds) != count or not all(map(_is_number, thresholds)):
        raise ModelError(
            f"manifest.json has the thresholds {str(thresholds)[:60]}",
            f"a number for each of {count} labels was expected",
        )
    return np.array(thresholds, np.float64)


def read_stride(settings: Mapping[str, Json], default: int) -> int:
    """Return how many tokens neighbouring windows share, by some settings.

    Raises:
        ModelError: it is no number of tokens.
    """
    stride = settings.get("stride", default)
    if type(stride) is not int or stride < 0:
        raise ModelError(f"manifest.json has the stride {str(stride)[:40]!r}", "a number of tokens was expected")
    return stride


def read_optional_number(settings: Mapping[str, Json], name: str) -> float | None:
    """Return a number of some settings; None where it is null, or not there.

    Raises:
        ModelError: it is something else.
    """
    value = settings.get(name)
    if value is not None and not _is_number(value):
        raise ModelError(f"manifest.json has the {name} {str(value)[:40]!r}", "a number, or null, was expected")
    return None if value is None else float(value)  # type: ignore[arg-type]


def _is_number(value: Json) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def find_decision(config: Mapping[str, Any], kind: str | None = None) -> type[Decision]:
    """Return the class that answers for an exported folder.

    Args:
        config: content of its config.json.
        kind: registered name of its kind of task, from its manifest; None: config.json decides.

    Raises:
        UnknownName: the manifest names a kind of task that no installed plugin has.
    """
    # built-in kinds first: a server imports a plugin only for a folder that needs it
    if kind is not None:
        by_name = {entry.name: entry.value for entry in plugins.task_kinds.builtin_entries()}
        named: type[Decision] = (by_name.get(kind) or plugins.task_kinds.get(kind)).decision
        return named
    head = head_of_config(config)
    for entries in (plugins.task_kinds.builtin_entries, plugins.task_kinds.entries):
        decisions = [entry.value.decision for entry in entries() if entry.value.head == head]
        decision: type[Decision]
        for decision in dict.fromkeys([*decisions, SeveralLabels]):
            if decision is not OneLabel and decision.fits(config):
                return decision
    return OneLabel
