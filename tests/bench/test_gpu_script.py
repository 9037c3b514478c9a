"""`benchmarks/gpu.py` on a CPU with toy sizes: its items, its time guard, and reports of missing parts."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from spdtool import plugins

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
MODULES = ("gpu", "gpu_guard", "gpu_items", "gpu_spdtool_items")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module under its name."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("PYTHONPATH", "CUBLAS_WORKSPACE_CONFIG"):  # the script sets them, for its engines and for cuBLAS
        monkeypatch.setenv(name, os.environ.get(name, ""))
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


NO_GRAPH = "not possible: RuntimeError: a CPU has no CUDA graph"


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
    alike = {"distance": 0, "zeros alike": 1}
    assert results["phases against the CPU"]["measured"] == {f"fp32 {stage}": alike for stage in gpu_stages()}
    assert results["no wait in a step"]["measured"] == {"launched one by one": 2, "in graphs": 2}
    resumed = {f"largest difference of a weight, {how}": 0 for how in ("as it is", "deterministic=true")}
    assert results["kill and resume"]["measured"] == resumed
    assert results["training"]["measured"]["BERT-base 32 fp32"]["ms"] > 0
    assert results["profile of a step"]["measured"]["operations of a step"] > 50
    table = capsys.readouterr().out.split("| item |")[1]
    assert "| ceilings | bf16 TFLOP/s |" in table
    assert "700 (989 on paper)" in table
    assert results["plain training"]["measured"]["MiniLM 32 bf16 graph"].startswith(NO_GRAPH)


def gpu_stages() -> tuple[str, ...]:
    import gpu_spdtool_items

    return tuple(gpu_spdtool_items.STAGES)


def test_inference_in_torch_runs_on_a_cpu(gpu: ModuleType, tmp_path: Path) -> None:
    code, results, _ = run(gpu, tmp_path, "--part", "2", "--only", "facts", "torch inference")
    assert code == 0, results
    figures = results["torch inference"]["measured"]
    assert figures["fp32 2x8"]["client ms"] > 0
    assert figures["fp16 graph 2x8"].startswith(NO_GRAPH)
    assert results["facts"]["measured"]["processor"]


def guard_of_nothing(gpu: ModuleType) -> Any:
    return gpu.Guard(list, print, can_restart=False)


def test_an_item_that_would_not_end_in_time_is_skipped(gpu: ModuleType, tmp_path: Path) -> None:
    gpu_lines = gpu.Lines(None)
    item = gpu.Item("long", 60, {}, lambda _: {"never": 1})
    result = gpu.run_item(item, gpu.Context("cpu", False, tmp_path), 59.0, gpu_lines, guard_of_nothing(gpu))
    assert result == {"item": "long", "skipped": "it may take 60 s, and 59 s are left"}


def test_a_row_that_would_not_end_in_time_is_skipped_and_a_broken_one_costs_no_other(
    gpu: ModuleType, tmp_path: Path
) -> None:
    import gpu_items

    def measure(context: Any) -> Any:
        def fail(_: Any) -> Any:
            raise KeyError("no compiler")

        gpu_items.add_row(context, "broken", fail)
        gpu_items.add_row(context, "slow", lambda _: {"ms": 1.0}, seconds=25)
        gpu_items.add_row(context, "fast", lambda _: {"ms": 2.0}, seconds=15)
        raise ValueError("after all rows")

    item = gpu.Item("rows", 10, {}, measure)
    result = gpu.run_item(item, gpu.Context("cpu", False, tmp_path), 500.0, gpu.Lines(None), guard_of_nothing(gpu))
    assert result["measured"]["broken"].startswith("not possible: KeyError: 'no compiler' (test_gpu_script.py:") or (
        result["measured"]["broken"].startswith("not possible: KeyError: 'no compiler' (gpu_items.py:")
    )
    assert result["measured"]["slow"].startswith("skipped: it may take 25 s")
    assert result["measured"]["fast"] == {"ms": 2.0}
    assert result["error"].startswith("ValueError: after all rows")


HANGS = """
    import sys, threading, time
    sys.path.insert(0, {scripts!r})
    import gpu, gpu_guard

    def hang(context):
        context.figures["before"] = 1
        threading.Event().wait()

    def lose(_):
        gpu.device_is_lost = lambda _: True
        raise RuntimeError("an illegal memory access was encountered")

    items = [
        gpu.Item("hangs", 0.3, dict(), hang),
        gpu.Item("loses the device", 5, dict(), lose),
        gpu.Item("goes on", 1, dict(), lambda context: {{"seen": sorted(context.measured)}}),
    ]
    gpu.choose_items = lambda _: items
    raise SystemExit(gpu.main())
"""


def test_an_item_that_hangs_is_broken_off_and_the_next_ones_run(tmp_path: Path) -> None:
    """Without torch, so that a start takes no time; the process is replaced twice by one like it."""
    script, out = tmp_path / "hangs.py", tmp_path / "out.jsonl"
    script.write_text(textwrap.dedent(HANGS.format(scripts=str(SCRIPTS))))
    command = [sys.executable, str(script), "--device", "cpu", "--budget", "60", "--out", str(out)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert answer.returncode == 1
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    results = {line["item"]: line for line in lines if "item" in line and "about_to_run" not in line}
    assert results["hangs"]["error"] == "it did not end within 1 s"
    assert results["hangs"]["measured"] == {"before": 1}
    assert results["loses the device"]["error"].startswith("RuntimeError: an illegal memory access")
    assert results["goes on"]["measured"] == {"seen": ["hangs", "loses the device"]}
    assert len([line for line in lines if "part" in line]) == 1
    table = answer.stdout.split("| item |")[1]
    assert all(f"| {name} |" in table for name in results)
    assert "hangs.py" in answer.stderr, "where it hung"


def test_a_checkout_that_is_not_installed_tells_its_version(gpu: ModuleType, tmp_path: Path) -> None:
    import tomllib

    import gpu_guard

    folder = gpu_guard.describe_checkout(tmp_path)
    code = "import importlib.metadata as m; print([d.version for d in m.distributions(name='spdtool', path=['.'])])"
    answer = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    project = tomllib.loads((SCRIPTS.parent / "pyproject.toml").read_text("utf-8"))["project"]
    assert answer.stdout.strip() == f"['{project['version']}']"


def test_processes_of_the_bench_find_the_checkout_and_the_vendor(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_guard

    (tmp_path / "vendored_package.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", "before")
    gpu_guard.add_packages(tmp_path, tmp_path)
    assert os.environ["PYTHONPATH"].split(os.pathsep) == ["before", str(SCRIPTS.parent), str(tmp_path)]
    code = "import vendored_package, spdtool.bench.engines"
    # as an engine is started: nothing from the current folder
    subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, check=True)


def test_a_step_that_reads_a_number_back_is_found(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_spdtool_items

    from spdtool.training.step import Stepper

    take = Stepper.take

    def take_and_read(self: Any, step: int, *arguments: Any) -> None:
        take(self, step, *arguments)
        if self.stage_name == "distill" and step == 3:
            float(next(iter(self.trained.values())).sum())

    monkeypatch.setattr(Stepper, "stage_name", "distill", raising=False)
    monkeypatch.setattr(Stepper, "take", take_and_read)
    monkeypatch.setattr(gpu_spdtool_items, "SHORT_STEPS", 2)
    context = gpu.Context("cpu", True, tmp_path)
    gpu_spdtool_items.measure_sync_free(context)
    assert "a step waits: RuntimeError: called a synchronizing operation" in context.figures["launched one by one"]


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
        gpu.Item("d", 1, {}, fail, ("json", "no_such_package")),
    ]
    monkeypatch.setattr(gpu, "choose_items", lambda _: items)
    code, results, lines = run(gpu, tmp_path)
    assert code == 1
    assert lines[0]["not_installed"] == ["no_such_package"]
    assert results["a"]["not_available"].startswith("pydantic is not installed")
    assert lines[0]["cannot_run"] == {"d": ["no_such_package"]}
    assert results["b"]["error"].startswith("ValueError: first line")
    assert results["d"]["not_available"] == "not installed: no_such_package"
    assert results["c"]["measured"] == {"x": 1}


def test_a_setting_that_this_spdtool_does_not_know_is_not_available(gpu: ModuleType, tmp_path: Path) -> None:
    import gpu_spdtool_items

    with pytest.raises(gpu.NotAvailableError, match="not known here"):
        gpu_spdtool_items.build_run(tmp_path, "cpu", "no_such_field=1")
