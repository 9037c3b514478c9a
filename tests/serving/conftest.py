"""Fixtures for serving: bundles of a toy student, a stub classifier, and a server in a thread."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import uvicorn

from spdtool import plugins
from spdtool.export.bundle.manifest import seal
from spdtool.export.bundle.write import write_bundle
from spdtool.export.classifier import Classifier
from spdtool.export.targets import Onnx
from spdtool.export.token_rows import TokenRow
from spdtool.models.load import save_model
from spdtool.recipe.fields import Recipe
from spdtool.run.records import ExportedModel, ExportResult, TargetExport
from spdtool.serving import server
from spdtool.serving.connections import ConnectionLimits, Door, EndingServer
from spdtool.serving.http import Application, AppOptions, Limits
from spdtool.tasks.decision import OneLabel

FIGURES = {
    "files": ["onnx/model.onnx"],
    "bytes": 1,
    "zeros": 1,
    "size": 2,
    "sparsity": 0.5,
    "positions": 64,
    "providers": ["cpu"],
    "dev": {"score": 0.75, "accuracy": 0.75},
    "checkpoint_dev": {"score": 0.5, "accuracy": 0.5},
    "flipped": 3,
    "rows": 12,
    "largest_difference": 1e-6,
}


class ExportedRun(NamedTuple):
    """Everything that the export stage passes to `write_bundle`."""

    folder: Path
    checkpoint: Path
    recipe: Recipe
    result: ExportResult


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, toys: ModuleType) -> ExportedRun:
    """A student with three labels for text pairs, exported by two targets, and its bundle."""
    folder = tmp_path_factory.mktemp("served")
    toys.register(toys.dataset("served", pairs=True, dev=24))
    try:
        names = {0: "no", 1: "maybe", 2: "yes"}
        model = toys.bert(labels=3, id2label=names, label2id={name: index for index, name in names.items()})
        checkpoint = folder / "checkpoint"
        save_model(model, toys.tokenizer(), checkpoint)
        recipe = toys.recipe('export.optional=["onnx-fp16"]', task="served")
        for student in (folder / "export/student", folder / "export/onnx-fp16/student"):
            Onnx().export(checkpoint, student, recipe)
            toys.seal(student)
        unchanged = ExportedModel.model_validate(FIGURES)
        rounded = ExportedModel.model_validate(FIGURES | {"largest_change": 0.01})
        targets = {"onnx": TargetExport(student=unchanged), "onnx-fp16": TargetExport(student=rounded)}
        result = ExportResult(first="onnx", targets=targets)
        assert write_bundle(folder / "export", checkpoint, recipe, result) is None
    finally:
        plugins.datasets.unregister("served")
    return ExportedRun(folder / "export", checkpoint, recipe, result)


@pytest.fixture(scope="session")
def servable(exported: ExportedRun) -> Path:
    """The bundle; read only: copy it before changing it."""
    return exported.folder / "bundle"


def _copy_with_text(bundle: Path, folder: Path, text: dict[str, list[str]]) -> Path:
    """Copy the bundle and set the text columns in its manifest."""
    copy = shutil.copytree(bundle, folder)
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["text"]
    (copy / "manifest.json").write_text(json.dumps(seal(manifest | text)))
    return copy


@pytest.fixture(scope="session")
def older_bundle(servable: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle as an older spdtool wrote it: a row may have one text or two; read only."""
    return _copy_with_text(servable, tmp_path_factory.mktemp("older") / "bundle", {})


@pytest.fixture(scope="session")
def single(servable: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with one text column, `sentence`; read only."""
    return _copy_with_text(servable, tmp_path_factory.mktemp("single") / "bundle", {"text": ["sentence"]})


class StandIn(Classifier):
    """Stub classifier: the first logit of a row is its number of characters, the others are 0.

    Attributes:
        gate: event that every computation waits for.
        computed: number of computed rows.
    """

    def __init__(self, names: tuple[str, ...] = ("long", "short")) -> None:
        self.names, self.text = list(names), ("text",)
        self.decision = OneLabel(names)
        self.gate, self.computed = threading.Event(), 0
        self.gate.set()

    def encode(self, texts: list[str], pairs: str | Sequence[str] | None = None) -> list[TokenRow]:
        for text in texts:
            if text == "panic":
                raise Panic("the tokenizer panicked")
        return [TokenRow(np.full(len(text), 1), np.zeros(len(text)), np.ones(len(text))) for text in texts]

    def compute(self, rows: Sequence[TokenRow]) -> np.ndarray:
        assert self.gate.wait(10)
        self.computed += len(rows)
        if any(len(row.ids) == len("another shape") for row in rows):
            return np.zeros((len(rows), 7), np.float32)
        return np.array([[len(row.ids)] + [0] * (len(self.names) - 1) for row in rows], np.float32)


class Panic(BaseException):
    """Imitates pyo3's PanicException, which does not derive from Exception."""


class RunningServer(NamedTuple):
    """A server in a thread of this process."""

    port: int
    app: Application
    door: Door
    uvicorn: uvicorn.Server

    def call(
        self, method: str, path: str, body: Any = None, host: str = "localhost", **headers: str
    ) -> tuple[int, dict[str, str], Any]:
        """Send one request and return its status, headers and JSON (or text); bytes are sent unchanged."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, {"Host": host} | headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        is_json = response.headers["content-type"] == "application/json"
        return response.status, dict(response.headers), json.loads(text) if is_json and text else text

    def send(self, *chunks: bytes, half_close: bool = False) -> bytes:
        """Send raw bytes and return all that the server answers until it closes the connection."""
        with socket.create_connection(("127.0.0.1", self.port), 20) as plug:
            answer = b""
            try:
                for chunk in chunks:
                    plug.sendall(chunk)
                if half_close:
                    plug.shutdown(socket.SHUT_WR)
                while chunk := plug.recv(65536):
                    answer += chunk
            except ConnectionError:
                pass
        return answer

    def statuses(self) -> dict[str, float]:
        """Count the answers so far by `route status`."""
        counts = {}
        for metric in self.app.metrics.requests.collect():
            for sample in metric.samples:
                if sample.name.endswith("_total"):
                    counts[f"{sample.labels['route']} {sample.labels['status']}"] = sample.value
        return counts


Serve = Callable[..., RunningServer]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Return `serve(classify, **connection_limits)`, which runs a server of the model `toy` in a thread."""
    with ExitStack() as stack:

        def start(
            classify: Classifier | None = None,
            *,
            options: AppOptions | None = None,
            name: str = "toy",
            **limits: Any,
        ) -> RunningServer:
            app = Application(classify or StandIn(), name, Limits(connection=ConnectionLimits(**limits)), options)
            door = Door(app.limits.connection, app.observed.count_refusal)
            listener = server.open_listener("127.0.0.1", 0)
            port = listener.getsockname()[1]
            running = EndingServer(server.make_uvicorn_config(app, door), door)
            thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})

            def stop() -> None:
                running.should_exit = True
                thread.join(30)
                listener.close()

            thread.start()
            stack.callback(stop)
            while not running.started:
                time.sleep(0.01)
            return RunningServer(port, app, door, running)

        yield start


@pytest.fixture
def stand_in() -> type[StandIn]:
    """The class of the stub classifier."""
    return StandIn
