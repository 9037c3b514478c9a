"""Facts of the NVIDIA GPU that a figure depends on, and the memory that is used on it.

They come from NVML (the package nvidia-ml-py) where it is installed, else from the program
nvidia-smi; without either, nothing is known. Both see the whole card, also from inside a container
that hides other processes.
"""

from __future__ import annotations

import ctypes
import importlib
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the processes that are timed read memory only, and carry no pydantic
    from spdtool.run.records import GpuRecord

FIELDS = (
    "name", "driver_version", "memory.total", "clocks.sm", "clocks.max.sm", "power.limit", "mig.mode.current",
)  # fmt: skip
SMI_TIMEOUT = 10.0  # seconds; the first call after a boot loads the driver
MIB = 2**20


def describe_gpu() -> GpuRecord | None:
    """Describe the first GPU; None where neither NVML nor nvidia-smi answers."""
    nvml = _load_nvml()
    record = None
    if nvml is not None:
        record = _describe_by_nvml(nvml)
    if record is None:
        values = _ask_smi(FIELDS)
        if values is None:
            return None
        record = record_of_smi(values)
    record.cuda = cuda_of_torch()
    return record


def used_gpu_memory() -> int | None:
    """Bytes that are in use on the first GPU, by all processes together; None where nothing tells."""
    nvml = _load_nvml()
    if nvml is not None:
        try:
            return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(0)).used)
        except nvml.NVMLError:
            return None
    values = _ask_smi(("memory.used",))
    number = None if values is None else number_of(values[0])
    return None if number is None else int(number * MIB)


def free_gpu_memory() -> int | None:
    """Bytes that are free on the first GPU; None where nothing tells."""
    used, record = used_gpu_memory(), describe_gpu()
    if used is None or record is None or record.memory_bytes is None:
        return None
    return record.memory_bytes - used


class GpuMemory:
    """Bytes by which the used memory of the card grew while this process worked and all others waited."""

    def __init__(self) -> None:
        self.grown = 0
        self._reads_driver = False  # before an engine is open, this process has no context that could be asked
        self._before = self._read()

    @property
    def is_known(self) -> bool:
        """Whether the card tells."""
        return self._before is not None

    def mark(self) -> None:
        """Note what is used now: what others took since the last `add` is not counted."""
        self._reads_driver = True
        self._before = self._read()

    def add(self) -> int:
        """Add what came since the last mark; return the sum.

        Allocators of torch and onnxruntime give nothing back, so the sum after a batch is its peak.
        """
        used = self._read()
        if used is not None and self._before is not None:
            self.grown += max(0, used - self._before)
            self._before = used
        return self.grown

    def _read(self) -> int | None:
        used = used_by_driver() if self._reads_driver else None
        return used_gpu_memory() if used is None else used


def used_by_driver() -> int | None:
    """Bytes that are in use on this process's GPU, as CUDA's driver says; None without a context.

    It takes microseconds, nvidia-smi up to a second. The two count the driver's own memory
    differently: only what one of them says before and after can be subtracted.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    if driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)):
        return None
    return total.value - free.value


def record_of_smi(values: list[str]) -> GpuRecord:
    """Read the values of FIELDS as nvidia-smi prints them; what it calls N/A is None."""
    from spdtool.run.records import GpuRecord

    name, driver, memory, clock, max_clock, power, mig = values
    megabytes = number_of(memory)
    return GpuRecord(
        name=name,
        driver=driver,
        memory_bytes=None if megabytes is None else int(megabytes * MIB),
        clock_mhz=number_of(clock),
        max_clock_mhz=number_of(max_clock),
        power_limit_w=number_of(power),
        mig=mig.lower() if mig in ("Enabled", "Disabled") else None,
    )


def number_of(text: str) -> float | None:
    """The number at the start of a value such as `700.00 W`; None for `[N/A]` and the like."""
    try:
        return float(text.split()[0])
    except (ValueError, IndexError):
        return None


def cuda_of_torch() -> str | None:
    """CUDA version that torch was built with; None without torch or CUDA."""
    try:
        version = importlib.import_module("torch").version.cuda
    except (ImportError, OSError, AttributeError):
        return None
    return None if version is None else str(version)


def _load_nvml() -> Any | None:
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml


def _describe_by_nvml(nvml: Any) -> GpuRecord | None:
    """Describe the first GPU; a figure that this card does not tell is None."""

    from spdtool.run.records import GpuRecord

    def ask(function: str, *arguments: Any) -> Any | None:
        try:
            return getattr(nvml, function)(*arguments)
        except (nvml.NVMLError, AttributeError):
            return None

    handle = ask("nvmlDeviceGetHandleByIndex", 0)
    name = None if handle is None else ask("nvmlDeviceGetName", handle)
    if name is None:
        return None
    memory = ask("nvmlDeviceGetMemoryInfo", handle)
    power = ask("nvmlDeviceGetEnforcedPowerLimit", handle)
    mig = ask("nvmlDeviceGetMigMode", handle)
    return GpuRecord(
        name=_as_text(name),
        driver=_as_text(ask("nvmlSystemGetDriverVersion") or ""),
        memory_bytes=None if memory is None else int(memory.total),
        clock_mhz=ask("nvmlDeviceGetClockInfo", handle, getattr(nvml, "NVML_CLOCK_SM", 1)),
        max_clock_mhz=ask("nvmlDeviceGetMaxClockInfo", handle, getattr(nvml, "NVML_CLOCK_SM", 1)),
        power_limit_w=None if power is None else power / 1000,
        mig=None if mig is None else ("enabled" if mig[0] else "disabled"),
    )


def _as_text(value: Any) -> str:
    """Older versions of the package return bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)


def _ask_smi(fields: tuple[str, ...]) -> list[str] | None:
    """Values of the first GPU, as text; None where the program is missing or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SMI_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = answer.stdout.splitlines()
    if answer.returncode or not lines:
        return None
    values = [value.strip() for value in lines[0].split(",")]
    return values if len(values) == len(fields) else None
