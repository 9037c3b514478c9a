"""The picture of the README, drawn from measured figures, and the OpenVINO worker."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from spdtool.bench import latency
from spdtool.bench.engines import Engine, Shape

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "benchmarks"
STAND_IN = """
import os

import numpy as np

__version__ = "0"

class Input:
    def __init__(self, name):
        self.name = name

    def get_any_name(self):
        return self.name

class Model:
    inputs = [Input("input_ids"), Input("attention_mask")]

    def clone(self):
        return Model()

    def reshape(self, shapes):
        self.shapes = shapes

class Request:
    def __init__(self, model):
        self.model = model

    def infer(self, inputs):
        assert {name: list(array.shape) for name, array in inputs.items()} == self.model.shapes

class Compiled:
    def __init__(self, model):
        self.model = model

    def create_infer_request(self):
        return Request(self.model)

    def __call__(self, inputs):
        assert inputs["attention_mask"].all()
        return [np.array([[inputs["input_ids"].sum(), inputs["input_ids"].shape[1]]])]

class Core:
    def read_model(self, path):
        if path == "broken":
            raise RuntimeError("no such file")
        return Model()

    def compile_model(self, model, device, settings=None):
        precision = (settings or {}).get("INFERENCE_PRECISION_HINT", "its own")
        assert precision == os.environ.get("EXPECTED_PRECISION", "its own")
        return Compiled(model)
"""


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a script of benchmarks/ with its folder on the path."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def openvino(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a stub of OpenVINO, first on every path."""
    (tmp_path / "openvino.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    return tmp_path


def figures() -> dict[str, Any]:
    """Make figures as `measure` returns them, with one rival over budget and one missing value."""
    rows = [
        ("dense fp32", 80e6, 0.9, (1.0, 1.0, 1.0)),
        ("onnxruntime int8", 20e6, 0.899, (2.0, 1.9, 2.1)),
        ("OpenVINO int8", None, 0.8, (3.0, 2.5, 3.5)),
        ("student", 10e6, 0.89, (5.25, 5.0, 5.5)),
    ]
    engines = []
    for name, size, score, speed in rows:
        over = score == 0.8
        speeds = {"1x128": {"ms": 1.0, "speed": list(speed)}}
        engines.append(
            {
                "name": name,
                "is_student": name == "student",
                "bytes": size,
                "score": score,
                "over_budget": over,
                "speeds": speeds,
            }
        )
    fields: dict[str, Any] = {"cpu": "a CPU", "task": "sst2", "model": "6 layers, width 384"}
    fields |= {"recipe": "default", "dev_rows": 436, "unseen_rows": True}
    return fields | {"threads": 1, "rounds": 20, "engines": engines}


def test_the_picture_shows_every_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    headline = script("headline", monkeypatch)
    columns = headline.columns_of(figures(), "1x128")
    assert [column.texts for column in columns] == [
        ["1.0x", "2.0x", "3.0x", "5.2x"],
        ["80 MB", "20 MB", "", "10 MB"],
        ["90.0", "89.9", "80.0*", "89.0"],
    ]
    assert columns[0].bars[3] == (5.25, 5.0, 5.5)
    assert columns[1].bars[2] is None
    notes = headline.notes_of(figures())
    assert "a CPU, one thread" in notes
    assert "SST2, 436 rows that picked nothing, recipe default" in notes
    assert "436 dev rows" in headline.notes_of(figures() | {"unseen_rows": False})
    assert "* changes the score by more than 0.5 points" in notes
    for file in headline.draw(figures(), "1x128", tmp_path):
        assert file.stat().st_size > 1000
    ElementTree.parse(tmp_path / "headline.svg")


def test_a_panel_without_any_figure_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = figures()
    for engine in measured["engines"]:
        engine["score"] = None
        engine["over_budget"] = False
    columns = script("headline", monkeypatch).columns_of(measured, "1x128")
    assert [column.title for column in columns] == ["Speed, 1x128", "Model file"]


def test_every_colour_of_the_svg_has_a_form_for_dark_pages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    headline = script("headline", monkeypatch)
    headline.draw(figures(), "1x128", tmp_path)
    text = (tmp_path / "headline.svg").read_text("utf-8")
    style = text[text.index("<style>:root") : text.index("</style>")]
    assert "prefers-color-scheme:dark" in style
    assert not re.findall(r"(?:fill|stroke): #\w+", text.replace(style, ""))


def test_the_committed_picture_is_drawn_from_the_committed_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    headline = script("headline", monkeypatch)
    headline.draw(json.loads(headline.DATA.read_text("utf-8")), "1x128", tmp_path)
    drawn = ElementTree.parse(tmp_path / "headline.svg").getroot()
    committed = ElementTree.parse(headline.IMAGES / "headline.svg").getroot()
    assert text_groups(drawn) == text_groups(committed)


def text_groups(svg: ElementTree.Element) -> list[str]:
    """List the groups of the SVG that contain text; their number depends on the figures."""
    return [group.get("id", "") for group in svg.iter() if group.get("id", "").startswith("text_")]


def test_the_interval_of_a_median_comes_from_order_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    headline = script("headline", monkeypatch)
    assert headline.median_and_interval(np.arange(1.0, 21.0)) == [10.5, 6.0, 15.0]
    assert headline.median_and_interval(np.array([2.0])) == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(("job", "precision"), [((), "f32"), (("serve-rounded",), "its own")])
def test_the_worker_of_openvino_speaks_the_protocol(
    openvino: Path, monkeypatch: pytest.MonkeyPatch, job: tuple[str, ...], precision: str
) -> None:
    monkeypatch.setenv("EXPECTED_PRECISION", precision)
    engine = Engine("x", "onnxruntime", "m", 50, command=(sys.executable, str(SCRIPTS / "openvino_worker.py"), *job))
    shapes = [Shape(1, 4), Shape(2, 8, (8, 3))]
    timings = latency.time_engines([engine], shapes, threads=(1,), rounds=2, warmup=1).timings
    assert [timing.provider for timing in timings] == ["OpenVINO 0"]
    assert [len(timings[0].rounds[shape]) for shape in shapes] == [2, 2]


def test_the_worker_of_openvino_gives_logits_row_by_row(
    openvino: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker = script("openvino_worker", monkeypatch)
    np.savez(tmp_path / "rows.npz", input_ids=np.array([1, 2, 3, 4, 5]), offsets=np.array([0, 2, 5]))
    worker.logits("m", str(tmp_path / "rows.npz"), str(tmp_path / "logits.npy"))
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), [[3, 2], [12, 3]])
