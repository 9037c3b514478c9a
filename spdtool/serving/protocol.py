"""Requests and responses without the network: KServe v2 (Open Inference Protocol), and a plain form of our own.

    POST /v2/models/NAME/infer   {"inputs": [{"name": "text", "shape": [2], "datatype": "BYTES", "data": ["a", "b"]}]}
    POST /predict                {"texts": ["a", "b"], "pairs": ["c", "d"]}

https://github.com/kserve/open-inference-protocol
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from reprlib import repr as shorten  # limits depth as well as length

import numpy as np

from spdtool.errors import DataError
from spdtool.export.bundle.manifest import unique_fields
from spdtool.export.classifier import Classifier
from spdtool.tasks.decision import Json, Object

MODEL_VERSION = "1"
TEXT, PAIR = "text", "pair"
MOST_NAMES = 6  # of what a client sent that an error repeats


@dataclass(frozen=True)
class InferenceRequest:
    """A valid request.

    Attributes:
        pairs: as many as texts, or None.
        outputs: names of the wanted outputs.
        id: sent back with the response.
    """

    texts: list[str]
    pairs: list[str] | None
    outputs: tuple[str, ...] = ()
    id: str | None = None


def parse_predict(body: bytes, max_texts: int) -> InferenceRequest:
    """Parse the body of /predict. Raises DataError."""
    request = parse_object(body)
    unknown = request.keys() - {"texts", "pairs"}
    if unknown or "texts" not in request:
        raise DataError(
            f"the request holds {shorten_names(request) or 'nothing'}", 'send {"texts": [...], "pairs": [...]}'
        )
    texts = text_list(request["texts"], "texts")
    pairs = None
    if request.get("pairs") is not None:
        pairs = text_list(request["pairs"], "pairs")
    return check_size(InferenceRequest(texts, pairs), max_texts)


def parse_infer(body: bytes, available_outputs: tuple[str, ...], max_texts: int) -> InferenceRequest:
    """Parse the body of /v2/models/NAME/infer. Raises DataError."""
    request = parse_object(body)
    tensors = request_tensors(request.get("inputs"), "inputs")
    unknown = tensors.keys() - {TEXT, PAIR}
    if unknown or TEXT not in tensors:
        raise DataError(f"the inputs are {shorten_names(tensors) or 'none'}", f"{TEXT}, and {PAIR} for a task of pairs")
    texts = tensor_texts(tensors[TEXT], TEXT)
    pairs = tensor_texts(tensors[PAIR], PAIR) if PAIR in tensors else None
    wanted = request.get("outputs")  # null is as good as none, but {} and "" are mistakes
    outputs = tuple(request_tensors([] if wanted is None else wanted, "outputs")) or available_outputs
    for name in outputs:
        if name not in available_outputs:
            raise DataError(f"there is no output {shorten(name)}", f"known: {', '.join(available_outputs)}")
    request_id = request.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise DataError(f"id is {shorten(request_id)}: a string was expected")
    return check_size(InferenceRequest(texts, pairs, outputs, request_id), max_texts)


def model_metadata(classify: Classifier, name: str) -> Object:
    """The response to GET /v2/models/NAME."""
    # -1 stands for the number of rows, which every request chooses.
    inputs: list[Json] = []
    for tensor in request_inputs(classify):
        inputs.append({"name": tensor, "datatype": "BYTES", "shape": [-1]})
    outputs: list[Json] = []
    for tensor in response_outputs(classify):
        shape: list[Json] = [*classify.decision.tensor_shape(tensor, -1)]
        outputs.append({"name": tensor, "datatype": classify.decision.tensor_type(tensor), "shape": shape})
    return {
        "name": name,
        "versions": [MODEL_VERSION],
        "platform": "onnxruntime_onnx",
        "inputs": inputs,
        "outputs": outputs,
    }


def request_inputs(classify: Classifier) -> tuple[str, ...]:
    """Inputs of a model; the pair is one unless the model is known to take single texts."""
    if classify.text is not None and len(classify.text) == 1:
        return (TEXT,)
    return (TEXT, PAIR)


def response_outputs(classify: Classifier) -> tuple[str, ...]:
    """Outputs of a model, as its kind of task has them."""
    return classify.decision.output_names


def infer_response(classify: Classifier, name: str, request: InferenceRequest, logits: np.ndarray) -> Object:
    """The response to an inference request."""
    outputs: list[Json] = []
    for tensor in request.outputs:
        datatype, data = classify.decision.tensor_type(tensor), classify.decision.tensor(tensor, logits)
        shape: list[Json] = [*classify.decision.tensor_shape(tensor, len(request.texts))]
        outputs.append({"name": tensor, "datatype": datatype, "shape": shape, "data": data})
    response: Object = {"model_name": name, "model_version": MODEL_VERSION, "outputs": outputs}
    if request.id is not None:
        response["id"] = request.id
    return response


def parse_object(body: bytes) -> Object:
    """Parse a JSON object. Raises DataError."""
    try:
        text = body.decode("utf-8-sig")  # json.loads would guess other encodings, and let surrogates pass
        value = json.loads(text, object_pairs_hook=unique_fields)
        # A lone surrogate cannot be sent back, neither in an answer nor in the error that names it.
        has_surrogate = "\\u" in text and not is_unicode(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the body is no JSON: {error}") from None
    if has_surrogate:
        raise DataError("the body holds a lone surrogate, which is no Unicode text")
    if not isinstance(value, dict):
        raise DataError(f"the body is {type(value).__name__}: a JSON object was expected")
    return value


def is_unicode(value: Json) -> bool:
    """Return whether every text in a JSON value, keys too, can be encoded as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def request_tensors(values: Json, field: str) -> dict[str, Mapping[str, Json]]:
    """Index a list of tensors by their names. Raises DataError."""
    problem = DataError(f"{field} has to be a list of objects, each with a name")
    if not isinstance(values, list):
        raise problem
    tensors: dict[str, Mapping[str, Json]] = {}
    names: list[str] = []
    for value in values:
        if not isinstance(value, dict) or not isinstance(name := value.get("name"), str):
            raise problem
        names.append(name)
        tensors[name] = value
    # Of two tensors with one name the later would silently win.
    if len(tensors) < len(names):
        raise DataError(f"{field} names one twice: {shorten_names(names)}")
    return tensors


def tensor_texts(tensor: Mapping[str, Json], name: str) -> list[str]:
    """The texts of a BYTES tensor of shape [n] or [n, 1], flat or nested. Raises DataError."""
    if tensor.get("datatype") != "BYTES":
        raise DataError(f"{name} has the datatype {shorten(tensor.get('datatype'))}: BYTES was expected")
    rows = row_count(tensor.get("shape"))
    if rows is None:
        raise DataError(f"{name} has the shape {shorten(tensor.get('shape'))}: [rows] or [rows, 1] was expected")
    data = tensor.get("data")
    if not isinstance(data, list):
        raise DataError(f"{name} has no data as a list in the JSON", "the binary extension is not spoken here")
    # Clients send a tensor flat or nested by rows; the protocol allows both.
    cells: list[Json] = []
    for row in data:
        if isinstance(row, list):
            cells += row
        else:
            cells.append(row)
    if len(cells) != rows:
        raise DataError(f"{name} has the shape {shorten(tensor.get('shape'))} and {len(cells)} elements")
    return text_list(cells, name)


def row_count(shape: Json) -> int | None:
    """Number of rows of a shape [n] or [n, 1]; None for any other."""
    if not isinstance(shape, list) or len(shape) not in (1, 2) or shape[1:] not in ([], [1]):
        return None
    sizes = [size for size in shape if type(size) is int and size >= 0]  # True is an int too, and no size
    if len(sizes) < len(shape):
        return None
    return math.prod(sizes)


def text_list(values: Json, field: str) -> list[str]:
    """Check that `values` is a list of texts. Raises DataError."""
    if not isinstance(values, list):
        raise DataError(f"{field} has to be a list of texts, found {type(values).__name__}")
    texts: list[str] = []
    for index, text in enumerate(values):
        if not isinstance(text, str):
            raise DataError(f"{field}[{index}] has to be a text, found {type(text).__name__}")
        texts.append(text)
    return texts


def shorten_names(names: Iterable[str]) -> str:
    """Join some names of a client for an error: the first few, and none of them long."""
    shortened = [shorten(name) for name in islice(names, MOST_NAMES + 1)]
    if len(shortened) > MOST_NAMES:
        shortened[MOST_NAMES:] = ["..."]
    return ", ".join(shortened)


def check_size(request: InferenceRequest, max_texts: int) -> InferenceRequest:
    """Return the request if every text has its pair and there are not too many. Raises DataError."""
    if request.pairs is not None and len(request.pairs) != len(request.texts):
        raise DataError(f"{len(request.texts)} texts and {len(request.pairs)} pairs: as many of each were expected")
    if len(request.texts) > max_texts:
        raise DataError(f"{len(request.texts)} texts in one request: {max_texts} are the most", "send several requests")
    return request
