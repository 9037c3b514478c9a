"""sentence-transformers opens exported folders and gives the vectors and scores of `spdtool.load`.

SPDTOOL_SENTENCE_TRANSFORMERS names the interpreter of an environment with `sentence-transformers[onnx]`.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import toys

import spdtool
from spdtool.models.load import save_model
from spdtool.stages.api import export_model

INTERPRETER = os.environ.get("SPDTOOL_SENTENCE_TRANSFORMERS", "")
pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(not INTERPRETER, reason="SPDTOOL_SENTENCE_TRANSFORMERS names no interpreter"),
]
ROWS = toys.rows(200, pairs=True)


def ask(folder: Path, backend: str, pairs: list[str] | None) -> np.ndarray:
    script = Path(__file__).with_name("sentence_transformers_answers.py")
    question = json.dumps({"texts": ROWS.first, "pairs": pairs})
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [INTERPRETER, str(script), str(folder), backend]
    process = subprocess.run(command, input=question, capture_output=True, text=True, env=clean, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    return np.array(json.loads(process.stdout.splitlines()[-1])["answers"])


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", True), ("cls", False)])
def test_vectors_are_those_of_a_sentence_transformer(tmp_path: Path, pooling: str, normalize: bool) -> None:
    prompts = {"query": "the ", "passage": "a "}
    source = toys.sentence_encoder(
        tmp_path / "source", pooling=pooling, normalize=normalize, prompts=prompts, default_prompt="query"
    )
    folder = export_model(source, to=tmp_path / "out", device="cpu").folder
    expected = np.array(spdtool.load(folder)(list(ROWS.first)))
    np.testing.assert_allclose(ask(source, "torch", None), expected, atol=1e-5)
    np.testing.assert_allclose(ask(folder, "onnx", None), expected, atol=1e-5)


@pytest.mark.parametrize("activation", ["Sigmoid", "Identity"])
def test_scores_are_those_of_a_cross_encoder(tmp_path: Path, activation: str) -> None:
    model = toys.bert(labels=1)
    names = {"Sigmoid": "torch.nn.modules.activation.Sigmoid", "Identity": "torch.nn.modules.linear.Identity"}
    model.config.sentence_transformers = {"activation_fn": names[activation], "version": "5.0.0"}
    source = tmp_path / "source"
    save_model(model, toys.tokenizer(), source)
    folder = export_model(source, to=tmp_path / "out", device="cpu").folder
    assert ROWS.second is not None
    expected = np.array(spdtool.load(folder)(list(ROWS.first), list(ROWS.second)))
    np.testing.assert_allclose(ask(source, "torch", list(ROWS.second)), expected, atol=1e-5)
    np.testing.assert_allclose(ask(folder, "onnx", list(ROWS.second)), expected, atol=1e-5)
