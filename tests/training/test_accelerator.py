"""Device, threads and precision come from the recipe only, never from the environment."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from spdtool.errors import DeviceError
from spdtool.models import arithmetic
from spdtool.pruning.observer import full_float32
from spdtool.recipe.fields import Recipe
from spdtool.recipe.reading import override
from spdtool.run.folder import Run
from spdtool.stages.prune import prune
from spdtool.training.accelerator import choose_precision, choose_threads, compare_arithmetic, create_accelerator

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def test_accelerate_reads_nothing_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
        "ACCELERATE_TORCH_DEVICE": "meta",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_SIZE": "4",
        "PMI_SIZE": "4",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    accelerator = create_accelerator(Recipe(device="cpu"))
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.mixed_precision == "no"
    assert accelerator.state.dynamo_plugin.backend.value == "NO"
    assert accelerator.device == CPU
    assert accelerator.num_processes == 1
    assert {name: os.environ[name] for name in variables} == variables, "they are put back"


def test_auto_takes_bf16_where_a_gpu_has_it_and_float32_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    emulation: list[bool] = []
    for has_bf16, on_cpu, precision, expected in (
        (True, False, "auto", "bf16"),
        (False, False, "auto", "fp32"),
        (True, True, "auto", "fp32"),
        (True, False, "fp32", "fp32"),
        (False, False, "fp16", "fp16"),
    ):

        def is_supported(including_emulation: bool = True, *, has_bf16: bool = has_bf16) -> bool:
            emulation.append(including_emulation)
            return has_bf16

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
        chosen = choose_precision(Recipe(precision=precision), on_cpu=on_cpu)  # type: ignore[arg-type]
        assert chosen == expected, (has_bf16, on_cpu, precision)
    assert not any(emulation), "emulated bf16 is slower than float32"
    assert create_accelerator(Recipe(device="cpu")).mixed_precision == "no", "the default on a CPU"


def test_fp16_is_refused_where_bf16_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    with pytest.raises(DeviceError, match="this GPU has bf16") as error:
        create_accelerator(Recipe(precision="fp16"))
    assert "precision=bf16" in (error.value.hint or "")


def test_switches_of_torch_follow_the_recipe_on_and_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    inside = []
    for is_on in (True, False):
        create_accelerator(Recipe(device="cpu", tf32=is_on, deterministic=is_on))
        assert torch.backends.cuda.matmul.allow_tf32 == is_on
        assert torch.are_deterministic_algorithms_enabled() == is_on
        assert torch.backends.cudnn.deterministic == is_on
        with full_float32():
            inside.append(torch.backends.cuda.matmul.allow_tf32)
        assert torch.backends.cuda.matmul.allow_tf32 == is_on
    assert inside == [False, False], "statistics and prune events have all bits"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_accumulation_set_by_a_surrounding_program_has_no_effect() -> None:
    Accelerator(cpu=True, gradient_accumulation_steps=8)
    assert create_accelerator(Recipe(device="cpu")).gradient_accumulation_steps == 1


def test_stale_launcher_variables_are_reported_or_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for rank, size in (("0", "1"), ("", "2"), ("x", ""), ("0", "-3")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", size)
        if size == "2":
            continue
        assert create_accelerator(Recipe(device="cpu")).num_processes == 1, (rank, size)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DeviceError, match="one of 2 processes, and MASTER_ADDR is not") as error:
        create_accelerator(Recipe(device="cpu"))
    assert "unset RANK and WORLD_SIZE" in (error.value.hint or "")


def test_a_run_keeps_its_number_of_threads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(2)
    run = Run.for_recipe(tmp_path / "run", Recipe())
    choose_threads(run)
    with run.stage("teacher"):
        pass
    torch.set_num_threads(1)
    reopened = Run.open(run.path)
    assert reopened.threads == 2
    capsys.readouterr()
    choose_threads(reopened)
    assert torch.get_num_threads() == 2
    assert "computing with 2 threads, as this run began" in capsys.readouterr().out
    other_run = Run.for_recipe(run.path, override(reopened.recipe, ["threads=3"]))
    choose_threads(other_run)
    assert (torch.get_num_threads(), other_run.threads) == (3, 3)
    assert capsys.readouterr().out == ""
    torch.set_num_threads(1)
    reopened.discard("teacher")  # all begins anew
    choose_threads(Run.open(run.path))
    assert torch.get_num_threads() == 1


@pytest.mark.slow
def test_different_arithmetic_than_in_earlier_stages_is_reported(
    toy_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = toy_run("prune.epochs=1", until="teacher")
    machine = run.record("teacher").machine
    assert machine is not None
    assert (machine.training_threads, machine.arithmetic) == (1, arithmetic.probe_arithmetic())
    assert (machine.precision, machine.device) == ("fp32", "cpu")
    compare_arithmetic(run, CPU)
    assert "same last bits" not in capsys.readouterr().err
    monkeypatch.setattr(arithmetic, "_probe", lambda *_: "another")
    prune(run)
    assert "this process does not compute the same last bits as the one that trained teacher" in capsys.readouterr().err
