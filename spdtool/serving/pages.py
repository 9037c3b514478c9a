"""What a person reads: a page of plain text at /, and the API as a page at /docs. Neither loads anything else."""

from __future__ import annotations

import html
import json
import shlex
from urllib.parse import quote

from spdtool.escaping import make_visible
from spdtool.export.classifier import Classifier
from spdtool.serving import openapi, protocol
from spdtool.tasks.decision import Json, Object

ADDRESS = "http://localhost:8000"  # in examples
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:50rem;margin:2rem auto;padding:0 1rem}"
    "pre{background:#f2f2f2;padding:.6rem;overflow-x:auto}"
    "h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse}td{padding:0 1rem 0 0;vertical-align:top}"
)


def front_page(classify: Classifier, name: str) -> str:
    """Say what is served and how to ask for it, as plain text for a browser and for a terminal."""
    lines = (
        f"spdtool serves the model {make_visible(name)}",
        f"takes    {', '.join(protocol.request_inputs(classify))}",
        f"answers  {classify.decision.describe()}",
        "",
        f"  {predict_curl(classify)}",
        "",
        "GET /docs          every path, with an example of each",
        "GET /openapi.json  the same for machines (OpenAPI)",
        "GET /metrics       figures for Prometheus",
    )
    return "\n".join(lines) + "\n"


def predict_curl(classify: Classifier) -> str:
    """The command that labels one text."""
    return curl("/predict", openapi.predict_example(classify))


def docs_page(document: Object, name: str) -> str:
    """Show an OpenAPI document as a page, with a command for each path."""
    sections = []
    paths = document["paths"]
    assert isinstance(paths, dict)
    for path, methods in paths.items():
        assert isinstance(methods, dict)
        for method, operation in methods.items():
            assert isinstance(operation, dict)
            sections.append(_section(path, method, operation))
    title = html.escape(f"spdtool serve: {name}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>"
        '<p>Errors are <code>{"error": "..."}</code>. For machines: <a href="/openapi.json">openapi.json</a>.</p>'
        f"{''.join(sections)}</body></html>"
    )


def _section(path: str, method: str, operation: Object) -> str:
    """Show one path: what it does, a command, the schema of its request, and its answers."""
    body = operation.get("requestBody")
    example, schema = None, ""
    if isinstance(body, dict):
        content = body["content"]
        assert isinstance(content, dict)
        media = content["application/json"]
        assert isinstance(media, dict)
        example = media["example"]
        text = html.escape(json.dumps(media["schema"], ensure_ascii=False, indent=1))
        schema = f"<details><summary>schema of the request</summary><pre>{text}</pre></details>"
    answers = operation["responses"]
    assert isinstance(answers, dict)
    rows = []
    for status, answer in answers.items():
        assert isinstance(answer, dict)
        rows.append(f"<tr><td>{status}</td><td>{html.escape(str(answer['description']))}</td></tr>")
    return (
        f"<h2>{method.upper()} {html.escape(path)}</h2><p>{html.escape(str(operation['summary']))}.</p>"
        f"<pre>{html.escape(curl(path, example))}</pre>{schema}"
        f"<details><summary>answers</summary><table>{''.join(rows)}</table></details>"
    )


def curl(path: str, example: Json) -> str:
    """The command that asks for a path, with an example as its body."""
    command = f"curl {shlex.quote(ADDRESS + quote(path))}"
    if example is not None:
        command += f" -H 'content-type: application/json' -d {shlex.quote(json.dumps(example))}"
    return command
