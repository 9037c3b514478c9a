"""What goes over the wire, without the wire: KServe v2 (Open Inference Protocol), and a plain form of our own.

    POST /v2/models/NAME/infer   {"inputs": [{"name": "text", "shape": [2], "datatype": "BYTES", "data": ["a", "b"]}]}
    POST /predict                {"texts": ["a", "b"], "pairs": ["c", "d"]}

https://github.com/kserve/open-inference-protocol
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from spdtool.errors import DataError
from spdtool.serving.classifier import Classifier

VERSION = "1"
TEXT, PAIR = "text", "pair"
LOGITS, PROBABILITIES, LABEL = "logits", "probabilities", "label"


@dataclass(frozen=True)
class Asked:
    """A request that was understood: as many pairs as texts, or none; the outputs that are wanted; its id."""

    texts: list[str]
    pairs: list[str] | None
    outputs: tuple[str, ...] = ()
    id: str | None = None


def plain(body: bytes, max_texts: int) -> Asked:
    """The request of /predict.

    Raises:
        DataError: the body is none.
    """
    value = _object(body)
    unknown = sorted(value.keys() - {"texts", "pairs"})
    if unknown or "texts" not in value:
        raise DataError(
            f"the request holds {', '.join(map(repr, value)) or 'nothing'}", 'send {"texts": [...], "pairs": [...]}'
        )
    texts = _texts(value["texts"], "texts")
    pairs = None if value.get("pairs") is None else _texts(value["pairs"], "pairs")
    return _checked(Asked(texts, pairs), max_texts)


def inference(body: bytes, offered: tuple[str, ...], max_texts: int) -> Asked:
    """The request of /v2/models/NAME/infer.

    Args:
        offered: the names of the outputs.

    Raises:
        DataError: the body is none.
    """
    value = _object(body)
    tensors = _named(value.get("inputs"), "inputs")
    unknown = sorted(tensors.keys() - {TEXT, PAIR})
    if unknown or TEXT not in tensors:
        raise DataError(f"the inputs are {', '.join(tensors) or 'none'}", f"{TEXT}, and {PAIR} for a task of pairs")
    pairs = _elements(tensors[PAIR], PAIR) if PAIR in tensors else None
    wanted = tuple(_named(value.get("outputs") or [], "outputs")) or offered
    missing = [name for name in wanted if name not in offered]
    if missing:
        raise DataError(f"there is no output {missing[0]!r}", f"known: {', '.join(offered)}")
    given = value.get("id")
    if given is not None and not isinstance(given, str):
        raise DataError(f"id is {given!r}: a string was expected")
    return _checked(Asked(_elements(tensors[TEXT], TEXT), pairs, wanted, given), max_texts)


def metadata(classify: Classifier, name: str) -> dict[str, Any]:
    """What GET /v2/models/NAME says."""
    return {
        "name": name,
        "versions": [VERSION],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": each, "datatype": "BYTES", "shape": [-1]} for each in inputs(classify)],
        "outputs": [
            {"name": each, "datatype": "BYTES" if each == LABEL else "FP32", "shape": _shape(each, -1, classify)}
            for each in outputs(classify)
        ],
    }


def inputs(classify: Classifier) -> tuple[str, ...]:
    """The inputs of a model: a pair only where it takes one, or where its bundle does not say."""
    return (TEXT,) if classify.text is not None and len(classify.text) == 1 else (TEXT, PAIR)


def outputs(classify: Classifier) -> tuple[str, ...]:
    """The outputs of a model: a regression has its value as its logit, and nothing else."""
    return (LOGITS,) if classify.regression else (LOGITS, PROBABILITIES, LABEL)


def answer(classify: Classifier, name: str, asked: Asked, logits: np.ndarray) -> dict[str, Any]:
    """The response to an inference request; labels of a row with several are joined by commas."""
    tensors = []
    for each in asked.outputs:
        if each == LABEL:
            data = [found if isinstance(found, str) else ",".join(found) for found in classify.decide(logits)]
        else:
            source = logits if each == LOGITS else classify.probabilities(logits)
            assert source is not None
            data = source.ravel().tolist()
        datatype = "BYTES" if each == LABEL else "FP32"
        tensors.append({"name": each, "datatype": datatype, "shape": _shape(each, len(logits), classify), "data": data})
    told = {"model_name": name, "model_version": VERSION, "outputs": tensors}
    return told if asked.id is None else {"id": asked.id} | told


def predictions(classify: Classifier, logits: np.ndarray) -> list[dict[str, Any]]:
    """Of each row its label, that label's probability (a regression has none) and the logits."""
    labels, probabilities = classify.decide(logits), classify.probabilities(logits)
    told = []
    for place, (label, row) in enumerate(zip(labels, logits.tolist(), strict=True)):
        likely = None
        if probabilities is not None:
            several = {name: float(p) for name, p in zip(classify.names, probabilities[place], strict=True)}
            likely = {name: several[name] for name in label} if classify.multi_label else several[label]
        told.append({"label": label, "probability": likely, "logits": row})
    return told


def _shape(name: str, rows: int, classify: Classifier) -> list[int]:
    return [rows] if name == LABEL else [rows, len(classify.names)]


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the body is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"the body is {type(value).__name__}: a JSON object was expected")
    return value


def _named(values: Any, what: str) -> dict[str, Mapping[str, Any]]:
    """The tensors of a list by their names."""
    if not isinstance(values, list) or not all(isinstance(v, dict) and isinstance(v.get("name"), str) for v in values):
        raise DataError(f"{what} has to be a list of objects, each with a name")
    found = {value["name"]: value for value in values}
    if len(found) < len(values):
        raise DataError(f"{what} names one twice: {', '.join(value['name'] for value in values)}")
    return found


def _elements(tensor: Mapping[str, Any], name: str) -> list[str]:
    """The texts of a BYTES tensor of the shape [n] or [n, 1], flat or nested."""
    if tensor.get("datatype") != "BYTES":
        raise DataError(f"{name} has the datatype {tensor.get('datatype')!r}: BYTES was expected")
    shape, data = tensor.get("shape"), tensor.get("data")
    numbers = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    if not numbers or not isinstance(shape, list) or len(shape) not in (1, 2) or shape[1:] not in ([], [1]):
        raise DataError(f"{name} has the shape {shape!r}: [rows] or [rows, 1] was expected")
    if not isinstance(data, list):
        raise DataError(f"{name} has no data as a list in the JSON", "the binary extension is not spoken here")
    flat = [cell for row in data for cell in (row if isinstance(row, list) else [row])]
    if len(flat) != math.prod(shape):
        raise DataError(f"{name} has the shape {shape} and {len(flat)} elements")
    return _texts(flat, name)


def _texts(value: Any, what: str) -> list[str]:
    if not isinstance(value, list):
        raise DataError(f"{what} has to be a list of texts, found {type(value).__name__}")
    for place, text in enumerate(value):
        if not isinstance(text, str):
            raise DataError(f"{what}[{place}] has to be a text, found {type(text).__name__}")
    return value


def _checked(asked: Asked, max_texts: int) -> Asked:
    if asked.pairs is not None and len(asked.pairs) != len(asked.texts):
        raise DataError(f"{len(asked.texts)} texts and {len(asked.pairs)} pairs: as many of each were expected")
    if len(asked.texts) > max_texts:
        raise DataError(f"{len(asked.texts)} texts in one request: {max_texts} are the most", "send several requests")
    return asked
