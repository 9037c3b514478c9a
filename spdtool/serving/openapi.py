"""The OpenAPI document of a served model: its paths with their own name, and the texts that it takes."""

from __future__ import annotations

from importlib import metadata

from spdtool.export.classifier import Classifier
from spdtool.serving import protocol
from spdtool.serving.compatible import find_route
from spdtool.tasks.decision import Json, Object

EXAMPLE_TEXT, EXAMPLE_PAIR = "She sold the car.", "The car was sold."
STRING: Object = {"type": "string"}
REFUSED = {  # statuses that any path may answer
    "400": "the request is not valid",
    "404": "there is no such path, model or version",
    "408": "the request did not come in time",
    "421": "the header Host names another server",
    "431": "the head is too large",
    "500": "the server or the model failed on this request",
    "503": "the server is busy or about to end, or the model has changed on the disk",
}
BODY_REFUSED = {"413": "the body is too large", "415": "the body is compressed", "422": "the request is not valid"}


def describe_api(classify: Classifier, name: str, max_texts: int) -> Object:
    """Describe every path of the server, in OpenAPI 3.1."""
    model = f"/v2/models/{name}"
    version = f"{model}/versions/{protocol.MODEL_VERSION}"
    ready = record({"name": STRING, "ready": {"type": "boolean"}})
    paths: Object = {
        "/": get("Say what is served", STRING, media="text/plain"),
        "/docs": get("Show this description as a page", STRING, media="text/html"),
        "/openapi.json": get("Give this description", {"type": "object"}),
        "/predict": post(
            "Label texts", predict_request(classify, max_texts), predict_response(classify), predict_example(classify)
        ),
        "/metrics": get("Figures for Prometheus", STRING, media="text/plain"),
        "/v2": get("Describe the server", record({"name": STRING, "version": STRING, "extensions": list_of(STRING)})),
        "/v2/health/live": get("Say that the server lives", record({"live": {"type": "boolean"}})),
        "/v2/health/ready": get("Say whether requests are answered", record({"ready": {"type": "boolean"}})),
    }
    compatible = find_route(classify)
    for path in () if compatible is None else compatible.paths:
        assert compatible is not None
        paths[path] = post(compatible.summary, {"type": "object"}, {"type": "object"}, compatible.example)
    for path in (model, version):
        paths[path] = get("Describe the model", {"type": "object"})
        paths[f"{path}/ready"] = get("Say whether the model answers", ready)
        paths[f"{path}/infer"] = post(
            "Infer, as KServe v2 has it",
            infer_request(classify),
            describe_infer_response(classify),
            infer_example(classify),
        )
    return {
        "openapi": "3.1.0",
        "info": {"title": f"spdtool serve: {name}", "version": metadata.version("spdtool")},
        "paths": paths,
        "components": {"schemas": {"Error": record({"error": STRING})}},
    }


def predict_example(classify: Classifier) -> Object:
    """A request of /predict that the model takes."""
    example: Object = {"texts": [EXAMPLE_TEXT]}
    if takes_pair(classify):
        example["pairs"] = [EXAMPLE_PAIR]
    return example


def infer_example(classify: Classifier) -> Object:
    """A request of infer that the model takes."""
    texts = {protocol.TEXT: EXAMPLE_TEXT} | ({protocol.PAIR: EXAMPLE_PAIR} if takes_pair(classify) else {})
    inputs: list[Json] = []
    for name, text in texts.items():
        inputs.append({"name": name, "shape": [1], "datatype": "BYTES", "data": [text]})
    return {"inputs": inputs}


def takes_pair(classify: Classifier) -> bool:
    """Whether the model is known to take two texts."""
    return classify.text is not None and len(classify.text) == 2


def predict_request(classify: Classifier, max_texts: int) -> Object:
    """Schema of a request of /predict."""
    text: Object = {"type": "string", "pattern": r"\S"}  # a blank text is refused
    texts: Object = {"type": "array", "items": text, "maxItems": max_texts}
    properties: Object = {"texts": texts}
    if protocol.PAIR in protocol.request_inputs(classify):
        properties["pairs"] = texts | {"description": "as many as texts"}
    required: list[Json] = ["texts", "pairs"] if takes_pair(classify) else ["texts"]
    return record(properties, required) | {"additionalProperties": False}


def predict_response(classify: Classifier) -> Object:
    """Schema of a response of /predict."""
    row = classify.decision.prediction_schema()
    return record({"model": STRING, "predictions": list_of(row)})


def infer_request(classify: Classifier) -> Object:
    """Schema of a request of infer."""
    size: Object = {"type": "integer", "minimum": 0}
    names = protocol.request_inputs(classify)
    tensor = record(
        {
            "name": {"type": "string", "enum": [*names]},
            "shape": list_of(size) | {"minItems": 1, "maxItems": 2},
            "datatype": {"type": "string", "enum": ["BYTES"]},
            "data": {"type": "array", "description": "as many texts as the shape says"},
        }
    )
    outputs: list[Json] = [*protocol.response_outputs(classify)]
    output = record({"name": {"type": "string", "enum": outputs}})
    inputs = list_of(tensor) | {"minItems": len(names) if takes_pair(classify) else 1, "maxItems": len(names)}
    # Clients send null for what they leave out.
    request_id: Object = {"type": ["string", "null"]}
    wanted: Object = {"type": ["array", "null"], "items": output}
    return record({"id": request_id, "inputs": inputs, "outputs": wanted}, ["inputs"])


def describe_infer_response(classify: Classifier) -> Object:
    """Schema of a response of infer."""
    outputs: list[Json] = [*protocol.response_outputs(classify)]
    tensor = record(
        {
            "name": {"type": "string", "enum": outputs},
            "datatype": {"type": "string", "enum": ["BYTES", "FP32"]},
            "shape": list_of({"type": "integer"}),
            "data": {"type": "array", "items": {"type": ["number", "string"]}},
        }
    )
    fields: Object = {"model_name": STRING, "model_version": STRING, "id": STRING, "outputs": list_of(tensor)}
    return record(fields, ["model_name", "model_version", "outputs"])


def record(properties: Object, required: list[Json] | None = None) -> Object:
    """Schema of an object; without `required`, each of its properties is."""
    return {"type": "object", "properties": properties, "required": required or [*properties]}


def list_of(items: Object) -> Object:
    """Schema of a list."""
    return {"type": "array", "items": items}


def get(summary: str, schema: Object, media: str = "application/json") -> Object:
    """Describe a GET."""
    return {"get": {"summary": summary, "responses": responses(schema, media, REFUSED)}}


def post(summary: str, request: Object, response: Object, example: Object) -> Object:
    """Describe a POST of JSON."""
    body: Object = {"required": True, "content": {"application/json": {"schema": request, "example": example}}}
    answers = responses(response, "application/json", REFUSED | BODY_REFUSED)
    return {"post": {"summary": summary, "requestBody": body, "responses": answers}}


def responses(schema: Object, media: str, refused: dict[str, str]) -> Object:
    """Describe the answer to a valid request, and those to others."""
    error: Object = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    answers: Object = {"200": {"description": "the answer", "content": {media: {"schema": schema}}}}
    for status, description in sorted(refused.items()):
        answers[status] = {"description": description, "content": error}
    return answers
