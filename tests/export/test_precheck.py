"""An architecture that nobody has tried is exported with two random layers before it is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from transformers import XLNetConfig, XLNetForSequenceClassification

from spdtool import plugins
from spdtool.errors import ModelError
from spdtool.export import precheck
from spdtool.export.target import Target
from spdtool.models.layers import TESTED_FAMILIES
from spdtool.models.load import save_model


@pytest.fixture(scope="module")
def xlnet(tmp_path_factory: pytest.TempPathFactory, toys: ModuleType) -> Path:
    """A tiny XLNet, whose layers are found and pruned like any other's, and which torch.onnx cannot export."""
    config = XLNetConfig(vocab_size=24, d_model=32, n_head=2, d_inner=64, n_layer=3)
    folder = tmp_path_factory.mktemp("xlnet") / "xlnet"
    save_model(XLNetForSequenceClassification(config).eval(), toys.tokenizer(), folder)
    return folder


def test_the_tested_families_are_those_of_the_tests(toys: ModuleType) -> None:
    assert set(TESTED_FAMILIES) == set(toys.ARCHITECTURES)


@pytest.mark.parametrize("command", ["teacher", "compress", "export"])
def test_one_that_cannot_be_exported_is_refused_at_once(
    command: str, xlnet: Path, rows_file: Path, tmp_path: Path, spdtool: Callable[..., Any]
) -> None:
    words = ["--data", rows_file, "--model", xlnet, "--run", tmp_path / "run", "--device", "cpu"]
    called = spdtool(command, *(["--from", xlnet, "--to", tmp_path / "out"] if command == "export" else words))
    assert (called.exit_code, called.exception.__class__) == (2, SystemExit), called.output
    told = " ".join(called.stderr.split())
    assert "torch.onnx cannot export 'xlnet': " in told
    assert "families that are tested: bert, " in told
    assert not list(tmp_path.glob("*/*.json"))


def test_one_without_linear_layers_is_told_so_and_what_to_try(
    tmp_path: Path, toys: ModuleType, spdtool: Callable[..., Any]
) -> None:
    model = toys.classifier("gpt2", n_embd=32, n_layer=2, n_head=2)
    save_model(model, toys.tokenizer(), tmp_path / "gpt2")
    called = spdtool("export", "--from", tmp_path / "gpt2", "--to", tmp_path / "out")
    assert called.exit_code == 2
    assert "'gpt2' has no linear layer to prune" in called.stderr
    assert "families that are tested" in called.stderr


def test_another_family_is_tried_and_a_tested_one_is_not(toys: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[Any] = []

    def trace(model: Any, names: list[str], opset: int) -> Any:
        traced.append(model.config)
        return real(model, names, opset)

    real = precheck.trace_model
    monkeypatch.setattr(precheck, "trace_model", trace)
    strange = toys.classifier("roformer", layers=5).config
    precheck.check_exportable(toys.recipe(), (strange, toys.classifier("bert").config, strange))
    assert [(config.model_type, config.num_hidden_layers) for config in traced] == [("roformer", 2)]
    assert strange.num_hidden_layers == 5, "the caller's own is left alone"


def test_other_logits_are_an_error_too(toys: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        precheck, "onnx_forward", lambda _session: lambda batch: np.full((len(batch["input_ids"]), 2), 9.0)
    )
    with pytest.raises(ModelError, match="'roformer' is not exported as it is: checkpoint and exported file differ"):
        precheck.check_exportable(toys.recipe(), [toys.classifier("roformer").config])


def test_nothing_is_tried_where_no_target_is_made_of_the_graph(
    toys: ModuleType, clean_plugins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Foreign(Target):
        """A target that does not trace the model."""

    plugins.targets.register("foreign")(Foreign)
    monkeypatch.setattr(precheck, "trace_model", lambda *_: pytest.fail("it was tried"))
    precheck.check_exportable(toys.recipe('export.targets=["foreign"]'), [toys.classifier("roformer").config])


def test_a_configuration_that_cannot_be_cut_is_left_to_the_real_export(toys: ModuleType) -> None:
    class Uncut:
        model_type, num_hidden_layers = "uncut", 7

    precheck.check_exportable(toys.recipe(), [Uncut()])
