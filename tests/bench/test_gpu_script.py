"""`benchmarks/gpu.py` on a CPU with toy sizes: its items, its time guard, and reports of missing parts."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from spdtool import plugins

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
MODULES = ("gpu", "gpu_items", "gpu_spdtool_items")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module under its name."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("gpu", SCRIPTS / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module
    spec.loader.exec_module(module)
    dataset = plugins.datasets.get("demo")
    yield module
    plugins.datasets.unregister("demo")  # the script takes the task's own model away
    plugins.datasets.register("demo")(dataset)
    for name in MODULES:
        sys.modules.pop(name, None)


def run(gpu: ModuleType, folder: Path, *arguments: str) -> tuple[int, dict[str, dict[str, Any]], list[Any]]:
    file = folder / "out.jsonl"
    code = gpu.main(["--device", "cpu", "--tiny", "--out", str(file), *arguments])
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return code, {line["item"]: line for line in lines if "item" in line and "about_to_run" not in line}, lines


@pytest.mark.long
def test_every_item_of_training_runs_on_a_cpu(gpu: ModuleType, tmp_path: Path, capsys: Any) -> None:
    code, results, lines = run(gpu, tmp_path)
    assert code == 0, results
    assert all("measured" in result for result in results.values()), results
    assert [line["item"] for line in lines if "about_to_run" in line] == list(results)
    assert results["phases against the CPU"]["measured"] == {f"fp32 {stage}": 0 for stage in gpu_stages()}
    assert results["kill and resume"]["measured"] == {"largest difference of a weight": 0}
    assert results["training"]["measured"]["BERT-base 32 fp32"]["ms"] > 0
    assert results["profile of a step"]["measured"]["operations of a step"] > 50
    table = capsys.readouterr().out.split("| item |")[1]
    assert "| ceilings | bf16 TFLOP/s |" in table
    assert "700 (989 on paper)" in table
    assert results["plain training"]["measured"]["MiniLM 32 bf16 graph"] == "not possible: a CPU has no CUDA graph"


def gpu_stages() -> tuple[str, ...]:
    import gpu_spdtool_items

    return tuple(gpu_spdtool_items.STAGES)


def test_inference_in_torch_runs_on_a_cpu(gpu: ModuleType, tmp_path: Path) -> None:
    code, results, _ = run(gpu, tmp_path, "--part", "2", "--only", "facts", "torch inference")
    assert code == 0, results
    figures = results["torch inference"]["measured"]
    assert figures["fp32 2x8"]["client ms"] > 0
    assert figures["fp16 graph 2x8"] == "not possible: a CPU has no CUDA graph"
    assert results["facts"]["measured"]["processor"]


def test_an_item_that_would_not_end_in_time_is_skipped(gpu: ModuleType, tmp_path: Path) -> None:
    gpu_lines = gpu.Lines(None)
    item = gpu.Item("long", 60, {}, lambda _: {"never": 1})
    result = gpu.run_item(item, gpu.Context("cpu", False, tmp_path), 59.0, gpu_lines)
    assert result == {"item": "long", "skipped": "it may take 60 s, and 59 s are left"}


def test_what_is_missing_or_broken_is_said_and_the_others_go_on(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def need_pydantic(_: Any) -> Any:
        raise ModuleNotFoundError("No module named 'pydantic'", name="pydantic")

    def fail(_: Any) -> Any:
        raise ValueError("first line\nsecond")

    items = [
        gpu.Item("a", 1, {}, need_pydantic),
        gpu.Item("b", 1, {}, fail),
        gpu.Item("c", 1, {"x": "2"}, lambda _: {"x": 1}),
    ]
    monkeypatch.setattr(gpu, "choose_items", lambda _: items)
    monkeypatch.setattr(gpu, "NEEDED", ("torch", "no_such_package"))
    code, results, lines = run(gpu, tmp_path)
    assert code == 1
    assert lines[0]["not_installed"] == ["no_such_package"]
    assert results["a"]["not_available"].startswith("pydantic is not installed")
    assert results["b"]["error"] == "ValueError: first line"
    assert results["c"]["measured"] == {"x": 1}


def test_a_setting_that_this_spdtool_does_not_know_is_not_available(gpu: ModuleType, tmp_path: Path) -> None:
    import gpu_spdtool_items

    with pytest.raises(gpu.NotAvailableError, match="not known here"):
        gpu_spdtool_items.build_run(tmp_path, "cpu", "no_such_field=1")
