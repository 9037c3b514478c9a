"""The doctor: honest about what works, and not to be killed by what does not."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spdtool import plugins
from spdtool.cli import doctor
from spdtool.cli.doctor import Check, examine
from spdtool.errors import DeviceError
from spdtool.export import onnx_session


@pytest.fixture
def look(clean_plugins: None) -> Callable[[], dict[str, Check]]:
    """`look()`: every check by its name."""
    return lambda: {check.name: check for check in examine()}


def test_this_machine_can_run_spdtool(look: Callable[[], dict[str, Check]]) -> None:
    found = look()
    assert {"Python", "torch", "training device", "transformers", "onnxruntime", "CPUExecutionProvider"} <= found.keys()
    assert {"processors", "free disk", "C++ compiler"} <= found.keys()
    assert not [check for check in found.values() if check.status == "fail"]
    assert all(check.advice for check in found.values() if check.status != "ok")
    assert found["CPUExecutionProvider"].found == "runs a small model"


def test_both_runtimes_are_a_failure(look: Callable[[], dict[str, Check]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_session, "installed_distributions", lambda: {"onnxruntime": "1", "onnxruntime-gpu": "1"})
    check = look()["onnxruntime"]
    assert check.status == "fail"
    assert "both installed" in check.found
    assert "pip uninstall" in check.advice


def test_a_provider_that_is_listed_and_does_not_run_is_shown(
    look: Callable[[], dict[str, Check]], monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = SimpleNamespace(get_available_providers=lambda: list(onnx_session.PROVIDERS.values()), __version__="9")
    monkeypatch.setattr(onnx_session, "require_onnxruntime", lambda: claims)
    monkeypatch.setattr(onnx_session, "provider_problem", {"cpu": None, "cuda": "libcublas is missing"}.get)
    check = look()["CUDAExecutionProvider"]
    assert check.status == "warn"
    assert check.found == "listed, but does not run: libcublas is missing"
    assert "spdtool[gpu]" in check.advice


@pytest.mark.parametrize(("listed", "trouble"), [([], None), (["CPUExecutionProvider"], "wrong")])
def test_a_cpu_provider_that_does_not_work_is_a_failure(
    listed: list[str], trouble: str | None, look: Callable[[], dict[str, Check]], monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = SimpleNamespace(get_available_providers=lambda: listed, __version__="9")
    monkeypatch.setattr(onnx_session, "require_onnxruntime", lambda: claims)
    monkeypatch.setattr(onnx_session, "provider_problem", lambda _provider: trouble)
    assert look()["CPUExecutionProvider"].status == "fail"


def test_a_missing_package_is_a_failure_and_the_rest_is_still_examined(
    look: Callable[[], dict[str, Check]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def no_torch(name: str, *rest: Any, **named: Any) -> Any:
        if name == "torch":
            raise ImportError("no torch here")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", no_torch)
    found = look()
    assert (found["torch"].status, found["torch"].found) == ("fail", "ImportError: no torch here")
    assert found["free disk"].found.endswith("GB")


class TestCuda:
    @pytest.fixture(autouse=True)
    def built_with_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "cuda", "13.0")

    def test_no_device(self, look: Callable[[], dict[str, Check]], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        check = look()["training device"]
        assert (check.status, check.found) == ("warn", "cpu; CUDA does not work: no CUDA device answers")

    def test_a_device_that_answers_and_does_not_compute(
        self, look: Callable[[], dict[str, Check]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*shape: int, device: str) -> Any:
            raise RuntimeError("no kernel image\nand more")

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch, "ones", fail)
        check = look()["training device"]
        assert (check.status, check.found) == ("warn", "cpu; CUDA does not work: no kernel image")

    def test_a_device_that_computes(
        self, look: Callable[[], dict[str, Check]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ones = torch.ones

        def on_the_cpu(*shape: int, device: str) -> torch.Tensor:
            assert device == "cuda"
            return ones(*shape)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
        monkeypatch.setattr(torch, "ones", on_the_cpu)
        check = look()["training device"]
        assert (check.status, check.found) == ("ok", "cuda: a device")


def test_an_idle_gpu_is_mentioned(look: Callable[[], dict[str, Check]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/bin/nvidia-smi" if name == "nvidia-smi" else None)
    monkeypatch.delenv("CXX", raising=False)
    found = look()
    assert found["training device"].status == "warn"
    assert (found["C++ compiler"].status, found["C++ compiler"].found) == ("warn", "none")


def test_too_many_threads_and_a_full_disk(
    look: Callable[[], dict[str, Check]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_session, "usable_cores", lambda: 0)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _folder: SimpleNamespace(free=10**8))
    found = look()
    assert found["processors"].status == "warn"
    assert (found["free disk"].status, found["free disk"].found) == ("warn", "0.1 GB")


def test_a_broken_plugin_is_listed(look: Callable[[], dict[str, Check]], tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise ValueError('not today')")
    plugins.use_folder(tmp_path)
    check = look()["plugin broken"]
    assert check.status == "warn"
    assert "ValueError: not today" in check.found


def test_an_old_python_is_a_failure(look: Callable[[], dict[str, Check]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OLDEST_PYTHON", (9, 9))
    assert look()["Python"].status == "fail"


class TestSparseCpu:
    """The plugin that makes zeros pay, or what is missing of it."""

    def install(self, monkeypatch: pytest.MonkeyPatch, **module: Any) -> None:
        made = plugins.Library("spdtool-sparse-cpu", "0.1.0", SimpleNamespace(**module))
        monkeypatch.setattr(plugins, "library_targets", lambda: ["sparse-cpu"])
        monkeypatch.setattr(plugins, "find_library", lambda _target: made)

    def test_installed(self, look: Callable[[], dict[str, Check]], monkeypatch: pytest.MonkeyPatch) -> None:
        self.install(monkeypatch, path=lambda: "ops.so", isa=lambda: "avx2")
        assert look()["sparse-cpu"] == Check("sparse-cpu", "ok", "spdtool-sparse-cpu 0.1.0, avx2")

    def test_not_installed(self, look: Callable[[], dict[str, Check]], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plugins, "LIBRARY_GROUP", "no such group")
        check = look()["operator libraries"]
        assert check.status == "warn"
        assert "pip install spdtool-NAME" in check.advice

    def test_not_compiled(self, look: Callable[[], dict[str, Check]], monkeypatch: pytest.MonkeyPatch) -> None:
        def path() -> str:
            raise DeviceError("the library was not compiled", "install a compiler")

        self.install(monkeypatch, path=path)
        assert look()["sparse-cpu"] == Check("sparse-cpu", "warn", "the library was not compiled", "install a compiler")
