"""`spdtool doctor` reports what works on this machine, and survives every broken component."""

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
from spdtool.export import cuda_libraries, onnx_session


@pytest.fixture
def checks_by_name(clean_plugins: None) -> Callable[[], dict[str, Check]]:
    """Return a function that runs every check of the doctor and maps names to results."""
    return lambda: {check.name: check for check in examine()}


def test_this_machine_can_run_spdtool(checks_by_name: Callable[[], dict[str, Check]]) -> None:
    checks = checks_by_name()
    assert {
        "Python",
        "torch",
        "training device",
        "transformers",
        "onnxruntime",
        "CPUExecutionProvider",
    } <= checks.keys()
    assert {"processors", "free disk", "C++ compiler"} <= checks.keys()
    assert not [check for check in checks.values() if check.status == "fail"]
    assert all(check.advice for check in checks.values() if check.status != "ok")
    assert checks["CPUExecutionProvider"].found == "runs a small model"


def test_both_runtimes_are_a_failure(
    checks_by_name: Callable[[], dict[str, Check]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_session, "installed_distributions", lambda: {"onnxruntime": "1", "onnxruntime-gpu": "1"})
    check = checks_by_name()["onnxruntime"]
    assert check.status == "fail"
    assert "both installed" in check.found
    assert "pip uninstall" in check.advice


def test_a_provider_that_is_listed_and_does_not_run_is_shown(
    checks_by_name: Callable[[], dict[str, Check]], monkeypatch: pytest.MonkeyPatch
) -> None:
    onnxruntime = SimpleNamespace(
        get_available_providers=lambda: list(onnx_session.PROVIDERS.values()), __version__="9"
    )
    monkeypatch.setattr(onnx_session, "require_onnxruntime", lambda: onnxruntime)
    monkeypatch.setattr(onnx_session, "provider_problem", {"cpu": None, "cuda": "libcublas is missing"}.get)
    check = checks_by_name()["CUDAExecutionProvider"]
    assert check.status == "warn"
    assert check.found == "listed, but does not run: libcublas is missing"
    assert "spdtool[gpu]" in check.advice


@pytest.mark.parametrize(("listed", "problem"), [([], None), (["CPUExecutionProvider"], "wrong")])
def test_a_cpu_provider_that_does_not_work_is_a_failure(
    listed: list[str],
    problem: str | None,
    checks_by_name: Callable[[], dict[str, Check]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    onnxruntime = SimpleNamespace(get_available_providers=lambda: listed, __version__="9")
    monkeypatch.setattr(onnx_session, "require_onnxruntime", lambda: onnxruntime)
    monkeypatch.setattr(onnx_session, "provider_problem", lambda _provider: problem)
    assert checks_by_name()["CPUExecutionProvider"].status == "fail"


def test_a_missing_package_is_a_failure_and_the_rest_is_still_examined(
    checks_by_name: Callable[[], dict[str, Check]], monkeypatch: pytest.MonkeyPatch
) -> None:
    original_import = builtins.__import__

    def import_without_torch(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "torch":
            raise ImportError("no torch here")
        return original_import(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", import_without_torch)
    checks = checks_by_name()
    assert (checks["torch"].status, checks["torch"].found) == ("fail", "ImportError: no torch here")
    assert checks["free disk"].found.endswith("GB")


class TestCuda:
    @pytest.fixture(autouse=True)
    def built_with_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "cuda", "13.0")

    def test_no_device(self, checks_by_name: Callable[[], dict[str, Check]], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        check = checks_by_name()["training device"]
        assert (check.status, check.found) == ("warn", "cpu; CUDA does not work: no CUDA device answers")

    def test_a_device_that_answers_and_does_not_compute(
        self, checks_by_name: Callable[[], dict[str, Check]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*shape: int, device: str) -> Any:
            raise RuntimeError("no kernel image\nand more")

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch, "ones", fail)
        check = checks_by_name()["training device"]
        assert (check.status, check.found) == ("warn", "cpu; CUDA does not work: no kernel image")

    def test_a_device_that_computes(
        self, checks_by_name: Callable[[], dict[str, Check]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ones = torch.ones

        def on_the_cpu(*shape: int, device: str) -> torch.Tensor:
            assert device == "cuda"
            return ones(*shape)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
        monkeypatch.setattr(torch, "ones", on_the_cpu)
        check = checks_by_name()["training device"]
        assert (check.status, check.found) == ("ok", "cuda: a device")


def test_an_idle_gpu_is_mentioned(
    checks_by_name: Callable[[], dict[str, Check]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/bin/nvidia-smi" if name == "nvidia-smi" else None)
    monkeypatch.delenv("CXX", raising=False)
    checks = checks_by_name()
    assert checks["training device"].status == "warn"
    assert (checks["C++ compiler"].status, checks["C++ compiler"].found) == ("warn", "none")


def runtime_of(cuda: str) -> SimpleNamespace:
    """A double of onnxruntime; `cuda`: the version that it was built with, or nothing."""
    providers = ["CUDAExecutionProvider"] * bool(cuda) + ["CPUExecutionProvider"]
    return SimpleNamespace(get_available_providers=lambda: providers, cuda_version=cuda, __version__="9")


def test_a_gpu_beside_an_onnxruntime_for_the_cpu_is_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_session, "require_onnxruntime", lambda: runtime_of(""))
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for has_gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        checks = list(doctor._check_cuda())
        assert bool(checks) == has_gpu
    assert checks[0].status == "warn"
    assert "computes on the CPU only" in checks[0].found
    assert "spdtool[gpu-cu12]" in checks[0].advice


def test_torch_and_onnxruntime_of_different_cuda_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    for torch_cuda, onnx_cuda, status, extra in (
        ("12.8", "13.0", "warn", "spdtool[gpu-cu12]"),
        ("13.0", "12.9", "warn", "spdtool[gpu]"),
        ("13.2", "13.0", "ok", ""),
    ):
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(onnx_session, "require_onnxruntime", lambda onnx_cuda=onnx_cuda: runtime_of(onnx_cuda))
        check = {check.name: check for check in doctor._check_cuda()}["CUDA versions"]
        assert check.status == status, check
        assert extra in check.advice


def test_nvidia_libraries_are_looked_for_in_every_site_packages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(onnx_session, "require_onnxruntime", lambda: runtime_of("13.0"))
    monkeypatch.setattr("ctypes.util.find_library", lambda _: None)
    monkeypatch.setattr("sys.path", [*doctor.sys.path, str(tmp_path / "own"), str(tmp_path / "shared")])
    places = {"own/nvidia/cu13/lib": cuda_libraries.required_libraries(13)[:-1]}
    places["shared/nvidia/cudnn/lib"] = ("libcudnn.so.9", "libcublas.so.12")  # that of another CUDA is none
    for folder, names in places.items():
        (tmp_path / folder).mkdir(parents=True)
        for name in names:
            (tmp_path / folder / name).touch()
    check = {check.name: check for check in doctor._check_cuda()}["NVIDIA libraries"]
    assert (check.status, check.found) == ("ok", f"7 in {tmp_path / 'own'}, {tmp_path / 'shared'}")
    loaded: list[str] = []
    monkeypatch.setattr(cuda_libraries.ctypes, "CDLL", loaded.append)
    runtime = runtime_of("13.0")
    runtime.preload_dlls = lambda: loaded.append("onnxruntime")
    cuda_libraries.preload_libraries(runtime)
    assert [Path(file).name for file in loaded] == [*cuda_libraries.required_libraries(13), "onnxruntime"]
    (tmp_path / "shared/nvidia/cudnn/lib/libcudnn.so.9").unlink()
    check = {check.name: check for check in doctor._check_cuda()}["NVIDIA libraries"]
    assert check.status == "warn"
    assert "nowhere: libcudnn.so.9" in check.found


def test_too_many_threads_and_a_full_disk(
    checks_by_name: Callable[[], dict[str, Check]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_session, "usable_cores", lambda: 0)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _folder: SimpleNamespace(free=10**8))
    checks = checks_by_name()
    assert checks["processors"].status == "warn"
    assert (checks["free disk"].status, checks["free disk"].found) == ("warn", "0.1 GB")


def test_a_broken_plugin_is_listed(checks_by_name: Callable[[], dict[str, Check]], tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise ValueError('not today')")
    plugins.use_folder(tmp_path)
    check = checks_by_name()["plugin broken"]
    assert check.status == "warn"
    assert "ValueError: not today" in check.found


def test_an_old_python_is_a_failure(
    checks_by_name: Callable[[], dict[str, Check]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "OLDEST_PYTHON", (9, 9))
    assert checks_by_name()["Python"].status == "fail"


class TestSparseCpu:
    """The operator library sparse-cpu: installed, missing, or not compiled."""

    def install(self, monkeypatch: pytest.MonkeyPatch, **module: Any) -> None:
        library = plugins.Library("spdtool-sparse-cpu", "0.1.0", SimpleNamespace(**module))
        monkeypatch.setattr(plugins, "library_targets", lambda: ["sparse-cpu"])
        monkeypatch.setattr(plugins, "find_library", lambda _target: library)

    def test_installed(self, checks_by_name: Callable[[], dict[str, Check]], monkeypatch: pytest.MonkeyPatch) -> None:
        self.install(monkeypatch, path=lambda: "ops.so", isa=lambda: "avx2")
        assert checks_by_name()["sparse-cpu"] == Check("sparse-cpu", "ok", "spdtool-sparse-cpu 0.1.0, avx2")

    def test_not_installed(
        self, checks_by_name: Callable[[], dict[str, Check]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(plugins, "LIBRARY_GROUP", "no such group")
        check = checks_by_name()["operator libraries"]
        assert check.status == "warn"
        assert "pip install spdtool-NAME" in check.advice

    def test_not_compiled(
        self, checks_by_name: Callable[[], dict[str, Check]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def path() -> str:
            raise DeviceError("the library was not compiled", "install a compiler")

        self.install(monkeypatch, path=path)
        assert checks_by_name()["sparse-cpu"] == Check(
            "sparse-cpu", "warn", "the library was not compiled", "install a compiler"
        )
