"""The Python API: every public name exists, is imported lazily, and equals the command of its name."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import spdtool
from spdtool.errors import RecipeError
from spdtool.recipe import STAGES, TRAINING

QUICK_BENCH = (
    *("bench.rounds=1", "bench.warmup=0", "bench.batches=1", "bench.lengths=16", "bench.padded=[]", "bench.threads=1"),
    *("bench.torch=false", "bench.int8=false", "bench.unfused=false", "bench.ledger=false", "export.sentences=4"),
)


def test_every_public_name_is_listed_and_can_be_used() -> None:
    for name in spdtool.__all__:
        assert name in dir(spdtool), name
        assert getattr(spdtool, name) is not None, name
    for error in ("SpdError", "RecipeError", "GateError"):
        assert issubclass(getattr(spdtool, error), Exception), error
    assert spdtool.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="'spdtool' has no attribute 'nothing'"):
        spdtool.nothing  # noqa: B018


def test_every_error_class_is_public() -> None:
    def tree(kind: type[Exception]) -> set[str]:
        names = {kind.__name__}
        for child in kind.__subclasses__():
            if child.__module__ == "spdtool.errors":
                names |= tree(child)
        return names

    assert tree(spdtool.SpdError) <= set(spdtool.__all__)


def test_importing_spdtool_loads_no_submodule() -> None:
    code = "import sys, spdtool; dir(spdtool); print(*(name for name in sys.modules if name.startswith('spdtool')))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["spdtool"]


def test_every_public_function_documents_each_argument_what_it_returns_and_raises() -> None:
    functions = [value for name in spdtool.__all__ if inspect.isfunction(value := getattr(spdtool, name))]
    assert len(functions) >= 4
    for function in functions:
        text = inspect.getdoc(function) or ""
        arguments = text.partition("Args:\n")[2].partition("\n\n")[0]
        for name in inspect.signature(function).parameters:
            assert re.search(rf"^    {name}: ", arguments, re.MULTILINE), f"{function.__name__}: {name}"
        assert "Returns:\n" in text, function.__name__
        assert "Raises:\n" in text, function.__name__


@pytest.mark.slow
def test_compress_runs_the_missing_stages_and_returns_the_result(
    toys: ModuleType, toy_task: Any, tmp_path: Path
) -> None:
    toy_task()
    recipe = toys.recipe(*QUICK_BENCH)
    plans: list[Any] = []
    trained = spdtool.compress(recipe=recipe, run=tmp_path / "run", until="finetune", on_plan=plans.append)
    assert [stage.stage for stage in plans[0].stages] == list(STAGES)
    assert sorted(path.name for path in trained.run.iterdir() if path.is_dir()) == sorted(TRAINING)
    assert (trained.finished, trained.bundle, trained.files, trained.sparsity) == (True, None, (), 0.5)
    result = spdtool.compress(recipe=recipe, run=tmp_path / "run")
    assert all((result.run / stage / "stage.json").is_file() for stage in STAGES)
    assert (result.teacher, result.student) == (trained.teacher, trained.student)
    assert result.teacher is not None
    assert "score" in result.teacher
    assert all((result.run / file).is_file() for file in result.files)
    assert Path("export/student/model.onnx") in result.files or any(file.suffix == ".onnx" for file in result.files)
    assert result.refused == {}
    assert result.bundle is not None
    assert spdtool.load(result.bundle)("a good film") is not None
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.run = tmp_path  # type: ignore[misc]


@pytest.mark.slow
def test_compress_accepts_the_options_of_the_command(
    encoder_folder: Path, rows_file: Path, quick_words: tuple[str, ...], tmp_path: Path
) -> None:
    sets = [word for option, word in zip(quick_words, quick_words[1:], strict=False) if option == "--set"]
    result = spdtool.compress(
        data=rows_file, model=encoder_folder, device="cpu", sparsity=0.5, sets=sets, run=tmp_path, until="teacher"
    )
    recipe = json.loads((tmp_path / "run.json").read_text("utf-8"))["recipe"]
    assert (recipe["task"], recipe["data"], recipe["sparsity"]) == ("local", str(rows_file), 0.5)
    assert (result.finished, result.student) == (True, None)
    with pytest.raises(RecipeError, match="neither a task nor data"):
        spdtool.compress(sparsity=0.5)


@pytest.mark.slow
def test_export_model_writes_any_checkpoint(
    encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spdtool: Callable[..., Any]
) -> None:
    from spdtool import export_model

    monkeypatch.chdir(tmp_path)
    exported = export_model(encoder_folder, sets=["device=cpu"])
    assert (exported.folder, exported.target) == (Path(f"{encoder_folder.name}-onnx"), "onnx")
    assert exported.model.bytes == sum((exported.folder / file).stat().st_size for file in exported.model.files)
    result = spdtool("export", "--from", encoder_folder, "--to", "again", "--set", "device=cpu", "--json")
    assert json.loads(result.stdout)["sparsity"] == exported.model.sparsity
