"""A model family without tests goes through a trial run of two random layers before real work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import XLNetConfig, XLNetForSequenceClassification

from spdtool.errors import ModelError
from spdtool.models.layers import TESTED_FAMILIES
from spdtool.models.load import save_model
from spdtool.stages import trial
from spdtool.tasks.prepare import task_of


@pytest.fixture(scope="module")
def xlnet(tmp_path_factory: pytest.TempPathFactory, toys: ModuleType) -> Path:
    """A tiny XLNet: spdtool can prune it, and torch.onnx cannot export it."""
    config = XLNetConfig(vocab_size=25, d_model=32, n_head=2, d_inner=64, n_layer=3, pad_token_id=0)
    folder = tmp_path_factory.mktemp("xlnet") / "xlnet"
    save_model(XLNetForSequenceClassification(config).eval(), toys.tokenizer(), folder)
    return folder


def test_the_list_of_tested_families_matches_the_toys(toys: ModuleType) -> None:
    assert set(TESTED_FAMILIES) == set(toys.ARCHITECTURES)


@pytest.mark.long  # torch.onnx tries several ways before it gives up
def test_a_family_that_cannot_be_exported_is_refused_at_once(
    xlnet: Path, rows_file: Path, tmp_path: Path, spdtool: Callable[..., Any]
) -> None:
    arguments = ["--data", rows_file, "--model", xlnet, "--run", tmp_path / "run", "--device", "cpu"]
    result = spdtool("compress", *arguments)
    assert (result.exit_code, result.exception.__class__) == (2, SystemExit), result.output
    message = " ".join(result.stderr.split())
    assert "'xlnet' does not go through export, tried with two random layers: torch.onnx cannot" in message
    assert "families that are tested: bert, " in message
    assert not list(tmp_path.glob("*/*.json"))


@pytest.mark.long
def test_the_export_of_a_family_that_torch_cannot_export_is_refused(
    xlnet: Path, tmp_path: Path, spdtool: Callable[..., Any]
) -> None:
    result = spdtool("export", "--from", xlnet, "--to", tmp_path / "out")
    assert result.exit_code == 2
    assert "torch.onnx cannot export 'xlnet': " in " ".join(result.stderr.split())


def test_a_family_without_linear_layers_is_refused_with_advice(
    tmp_path: Path, toys: ModuleType, spdtool: Callable[..., Any]
) -> None:
    model = toys.classifier("gpt2", n_embd=32, n_layer=2, n_head=2)
    save_model(model, toys.tokenizer(), tmp_path / "gpt2")
    result = spdtool("export", "--from", tmp_path / "gpt2", "--to", tmp_path / "out")
    assert result.exit_code == 2
    assert "'gpt2' has no linear layer to prune" in result.stderr
    assert "families that are tested" in result.stderr


def test_only_untested_families_are_tried_and_their_failures_are_user_errors(
    toys: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, bool, tuple[str, ...]]] = []

    def run_stage(run: Any, stage: str) -> None:
        calls.append((stage, run.recipe.smoke, run.recipe.export.targets))
        if stage == "distill":
            raise KeyError("a head that is not there")

    monkeypatch.setattr(trial, "run_stage", run_stage)
    task = task_of(toys.dataset(build=False))
    untested_config, tested_config = toys.classifier("roformer").config, toys.classifier("bert").config
    recipe = toys.recipe('export.targets=["onnx", "onnx-int8"]')
    trial.try_families(recipe, task, (tested_config, tested_config))
    assert calls == []
    with pytest.raises(ModelError, match="'roformer' does not go through distill, .* 'a head that is not there'"):
        trial.try_families(recipe, task, (tested_config, untested_config))
    assert calls == [(stage, True, ("onnx",)) for stage in ("teacher", "prune", "distill")]
    trial.try_families(recipe.model_copy(update={"smoke": True}), task, (untested_config,))
    assert len(calls) == 3, "a smoke run is a trial itself"
