"""Facts of a GPU, from doubles of nvidia-smi and NVML."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from spdtool.bench.gpu import hardware

LINE = "NVIDIA H200, 570.86.15, 143771 MiB, 345 MHz, 1980 MHz, 700.00 W, Disabled"


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`smi(answer)`: a program nvidia-smi that prints the answer, and no NVML."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def install(answer: str, code: int = 0) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\nprintf '%s\\n' '{answer}'\nexit {code}\n")
        program.chmod(0o755)

    return install


def test_nvidia_smi_tells_the_facts_of_the_card(smi: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cuda_of_torch", lambda: "13.0")
    smi(LINE)
    record = hardware.describe_gpu()
    assert record is not None
    assert (record.name, record.driver, record.cuda, record.mig) == ("NVIDIA H200", "570.86.15", "13.0", "disabled")
    assert (record.memory_bytes, record.clock_mhz, record.power_limit_w) == (143771 * 2**20, 345, 700)
    assert ("GPU clock", "345 MHz of 1980") in record.lines()
    smi(LINE.replace("700.00 W", "[N/A]").replace("Disabled", "[N/A]"))
    record = hardware.describe_gpu()
    assert record is not None
    assert (record.power_limit_w, record.mig) == (None, None)
    assert "MIG" not in dict(record.lines())


def test_without_a_driver_nothing_is_known(smi: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    for answer, code in (("NVIDIA-SMI has failed", 9), ("No devices were found", 0)):
        smi(answer, code)
        assert hardware.describe_gpu() is None
        assert hardware.used_gpu_memory() is None
    monkeypatch.setenv("PATH", "")
    assert hardware.describe_gpu() is None
    assert hardware.free_gpu_memory() is None


class Nvml(ModuleType):
    """A double of the package nvidia-ml-py, on a card that knows no MIG."""

    class NVMLError(Exception):
        """Its base class of errors."""

    used = 3 * 2**30

    def __getattr__(self, name: str) -> Any:
        values: dict[str, Any] = {
            "nvmlDeviceGetHandleByIndex": "first",
            "nvmlDeviceGetName": b"NVIDIA T4",
            "nvmlSystemGetDriverVersion": "570.1",
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=15 * 2**30, used=Nvml.used),
            "nvmlDeviceGetEnforcedPowerLimit": 70_000,
            "nvmlDeviceGetClockInfo": 585,
            "nvmlDeviceGetMaxClockInfo": 1590,
            "nvmlInit": None,
        }
        if name not in values:
            raise AttributeError(name)
        return lambda *_: values[name]


def test_nvml_tells_the_facts_and_the_growth_of_used_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml("pynvml"))
    record = hardware.describe_gpu()
    assert record is not None
    assert (record.name, record.driver, record.power_limit_w, record.mig) == ("NVIDIA T4", "570.1", 70, None)
    assert hardware.free_gpu_memory() == 12 * 2**30
    monkeypatch.setattr(hardware, "used_by_driver", lambda: None)
    memory = hardware.GpuMemory()
    assert memory.is_known
    monkeypatch.setattr(Nvml, "used", 4 * 2**30)
    assert memory.add() == 2**30
    monkeypatch.setattr(Nvml, "used", 9 * 2**30)  # of another process: it does not count
    memory.mark()
    monkeypatch.setattr(Nvml, "used", 9 * 2**30 + 5)
    assert memory.add() == 2**30 + 5
    answers = iter([100, 130])  # of the driver, which counts otherwise: both figures are its
    monkeypatch.setattr(hardware, "used_by_driver", lambda: next(answers))
    memory.mark()
    assert memory.add() == 2**30 + 5 + 30
