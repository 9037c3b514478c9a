"""Routes of other servers' APIs: vectors as OpenAI gives them, rankings as Cohere and Jina do."""

from __future__ import annotations

import base64
from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("starlette", reason='pip install "spdtool[serve]"')

from spdtool.tasks.embedding import Vector
from spdtool.tasks.ranking import Relevance


def test_vectors_are_answered_as_openai_does(serve: Callable, stand_in: Callable) -> None:
    classify = stand_in(("0", "1"))
    classify.decision = Vector(classify.names)
    running = serve(classify)
    status, _, answer = running.call("POST", "/v1/embeddings", {"input": ["abc", "a"], "model": "any", "user": "me"})
    assert status == 200
    assert answer["data"] == [
        {"object": "embedding", "index": 0, "embedding": [3.0, 0.0]},
        {"object": "embedding", "index": 1, "embedding": [1.0, 0.0]},
    ]
    assert (answer["object"], answer["model"], answer["usage"]) == (
        "list",
        "toy",
        {"prompt_tokens": 4, "total_tokens": 4},
    )
    _, _, answer = running.call("POST", "/v1/embeddings", {"input": "abc", "encoding_format": "base64"})
    content = base64.b64decode(answer["data"][0]["embedding"])
    assert np.frombuffer(content, "<f4").tolist() == [3.0, 0.0]
    _, _, answer = running.call("POST", "/v1/embeddings", {"input": "abc", "dimensions": 1})
    assert answer["data"][0]["embedding"] == [1.0]  # of length one again
    for body in (
        {},
        {"input": []},
        {"input": [1]},
        {"input": "a", "dimensions": 3},
        {"input": "a", "dimensions": 0},
        {"input": "a", "encoding_format": "int8"},
    ):
        status, _, answer = running.call("POST", "/v1/embeddings", body)
        assert (status, bool(answer["error"])) == (400, True), body
    status, _, answer = running.call("POST", "/predict", {"texts": ["abc"]})
    assert answer["predictions"] == [{"embedding": [3.0, 0.0]}]
    assert "/v1/embeddings" in running.call("GET", "/openapi.json")[2]["paths"]
    assert running.call("POST", "/rerank", {"query": "a", "documents": ["b"]})[0] == 404


def test_documents_are_ranked_as_cohere_and_jina_do(serve: Callable, stand_in: Callable) -> None:
    classify = stand_in(("score",))
    classify.text = ("query", "passage")
    classify.decision = Relevance(classify.names, {"activation": "identity"})
    # the score of the stand-in is the length of a row's first text: here that of the document
    classify.encode = lambda texts, pairs=None: stand_in.encode(classify, list(pairs or texts))
    running = serve(classify)
    documents = ["abc", {"text": "abcde"}, "a"]
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        status, _, answer = running.call("POST", path, {"query": "q", "documents": documents, "model": "any"})
        assert (status, answer["results"]) == (
            200,
            [
                {"index": 1, "relevance_score": 5.0},
                {"index": 0, "relevance_score": 3.0},
                {"index": 2, "relevance_score": 1.0},
            ],
        ), path
    body = {"query": "q", "documents": documents, "top_n": 1, "return_documents": True}
    _, _, answer = running.call("POST", "/rerank", body)
    assert answer["results"] == [{"index": 1, "relevance_score": 5.0, "document": {"text": "abcde"}}]
    classify.decision = Relevance(classify.names)  # 20 and 30 have the same sigmoid
    _, _, answer = running.call("POST", "/rerank", {"query": "q", "documents": ["a" * 20, "a" * 30]})
    assert [(each["index"], each["relevance_score"]) for each in answer["results"]] == [(1, 1.0), (0, 1.0)]
    long_query = {"query": "q" * 10_000, "documents": ["a"] * 500}
    status, _, answer = running.call("POST", "/rerank", long_query)
    assert (status, "read with each of 500 documents" in answer["error"]) == (400, True)
    assert running.call("POST", "/rerank", long_query | {"documents": ["a"] * 5})[0] == 200
    for refused in ({"query": "q"}, {"documents": ["a"]}, {"query": "q", "documents": [1]}, {**body, "top_n": 0}):
        assert running.call("POST", "/rerank", refused)[0] == 400, refused


@pytest.mark.parametrize("path", ["/v1/embeddings", "/rerank"])
def test_a_classifier_has_no_such_route(serve: Callable, path: str) -> None:
    assert serve().call("POST", path, {"input": "a"})[0] == 404
