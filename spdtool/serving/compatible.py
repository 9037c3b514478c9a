"""Routes that clients of other servers expect, beside our own, for kinds of task that have one.

    POST /v1/embeddings   {"input": ["a", "b"], "encoding_format": "float"}     as OpenAI has it
    POST /rerank          {"query": "q", "documents": ["a", "b"], "top_n": 1}   as Cohere and Jina have it
                          also as /v1/rerank and /v2/rerank

A kind of task names its route in `Decision.route`. Fields that change nothing here, such as `user`, are accepted.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from reprlib import repr as shorten

import numpy as np

from spdtool.errors import DataError
from spdtool.export.classifier import Classifier
from spdtool.serving.protocol import InferenceRequest, check_size, parse_object, text_list
from spdtool.tasks.decision import Json, Object

# Of the query times documents: a body of 1 MB could otherwise make the tokenizer read 250 MB, and hold
# 20 times as much.
MOST_QUERY_CHARACTERS = 2**22


@dataclass(frozen=True)
class CompatibleRequest:
    """A request in another server's form: the texts to compute, and the fields that shape the answer."""

    inference: InferenceRequest
    fields: Mapping[str, Json]


@dataclass(frozen=True)
class CompatibleRoute:
    """One route.

    Attributes:
        paths: at which it is served.
        summary: one line for the description of the server.
        parse: reads a body, given the most texts of a request; raises DataError.
        answer: makes the response of the outputs, [rows, ...].
        example: a request that is valid.
    """

    paths: tuple[str, ...]
    summary: str
    parse: Callable[[bytes, int], CompatibleRequest]
    answer: Callable[[Classifier, str, CompatibleRequest, np.ndarray], Object]
    example: Object


def parse_embeddings(body: bytes, max_texts: int) -> CompatibleRequest:
    """Parse the body of /v1/embeddings. Raises DataError."""
    fields = parse_object(body)
    texts = fields.get("input")
    if isinstance(texts, str):
        texts = [texts]
    if not isinstance(texts, list) or not texts:
        raise DataError("input has to be a text or a list of texts", 'send {"input": ["a text"]}')
    if fields.get("encoding_format", "float") not in ("float", "base64", None):
        raise DataError(f"encoding_format is {shorten(fields['encoding_format'])}", "float or base64")
    dimensions = fields.get("dimensions")
    if dimensions is not None and (type(dimensions) is not int or dimensions < 1):
        raise DataError(f"dimensions is {shorten(dimensions)}: a number above 0 was expected")
    return CompatibleRequest(check_size(InferenceRequest(text_list(texts, "input"), None), max_texts), fields)


def answer_embeddings(classify: Classifier, name: str, request: CompatibleRequest, outputs: np.ndarray) -> Object:
    """Answer with a vector for each text; fewer dimensions are the leading ones, scaled to length one again.

    Raises:
        DataError: more dimensions are asked for than there are.
    """
    dimensions = request.fields.get("dimensions")
    if isinstance(dimensions, int):
        if dimensions > outputs.shape[1]:
            raise DataError(f"dimensions is {shorten(dimensions)}: the model has {outputs.shape[1]}")
        vectors = outputs[:, :dimensions]
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    else:
        vectors = np.stack(classify.decision.decide(outputs))  # of the width that the folder asks for
    data: list[Json] = []
    for index, vector in enumerate(vectors):
        embedding: Json = vector.tolist()
        if request.fields.get("encoding_format") == "base64":  # what OpenAI's own client asks for
            embedding = base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
        data.append({"object": "embedding", "index": index, "embedding": embedding})
    tokens = sum(len(row.ids) for row in classify.encode(request.inference.texts))
    usage: Object = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": name, "usage": usage}


def parse_rerank(body: bytes, max_texts: int) -> CompatibleRequest:
    """Parse the body of /rerank. Raises DataError."""
    fields = parse_object(body)
    query, documents = fields.get("query"), fields.get("documents")
    if not isinstance(query, str) or not isinstance(documents, list) or not documents:
        raise DataError("a query and documents were expected", 'send {"query": "a text", "documents": ["a", "b"]}')
    texts: list[Json] = []
    for document in documents:
        texts.append(document.get("text") if isinstance(document, dict) else document)
    top = fields.get("top_n")
    if top is not None and (type(top) is not int or top < 1):
        raise DataError(f"top_n is {shorten(top)}: a number above 0 was expected")
    passages = text_list(texts, "documents")
    if len(query) * len(passages) > MOST_QUERY_CHARACTERS:
        raise DataError(
            f"a query of {len(query):,} characters is read with each of {len(passages)} documents: "
            f"{MOST_QUERY_CHARACTERS:,} characters are the most",
            "shorten the query, or send fewer documents at once",
        )
    return CompatibleRequest(check_size(InferenceRequest([query] * len(passages), passages), max_texts), fields)


def answer_rerank(classify: Classifier, name: str, request: CompatibleRequest, outputs: np.ndarray) -> Object:
    """Answer with the documents in the order of their scores, the best first."""
    scores = np.array(classify.decide(outputs))
    # not by the scores: the sigmoid of every logit above 17 is 1 in float32
    order = np.argsort(-np.array(classify.decision.scored_answers(outputs)), kind="stable").tolist()
    top = request.fields.get("top_n")
    if isinstance(top, int):
        order = order[:top]
    results: list[Json] = []
    assert request.inference.pairs is not None
    for index in order:
        result: Object = {"index": index, "relevance_score": float(scores[index])}
        if request.fields.get("return_documents") is True:
            result["document"] = {"text": request.inference.pairs[index]}
        results.append(result)
    return {"model": name, "results": results}


ROUTES: dict[str, CompatibleRoute] = {
    "embeddings": CompatibleRoute(
        ("/v1/embeddings",),
        "Give vectors of texts, as OpenAI's API does",
        parse_embeddings,
        answer_embeddings,
        {"input": ["She sold the car."]},
    ),
    "rerank": CompatibleRoute(
        ("/rerank", "/v1/rerank", "/v2/rerank"),
        "Put documents in the order of their relevance to a query, as Cohere's and Jina's APIs do",
        parse_rerank,
        answer_rerank,
        {"query": "Who sold the car?", "documents": ["She sold the car.", "It rained."], "top_n": 1},
    ),
}
"""Name of a route, as `Decision.route` has it, to the route."""


def find_route(classify: Classifier) -> CompatibleRoute | None:
    """Return the route of the model's kind of task; None where it has none."""
    name = classify.decision.route
    return None if name is None else ROUTES.get(name)
