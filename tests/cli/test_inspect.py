"""`spdtool inspect`: lineage by hash, sparsity by layer, and damaged files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from spdtool.cli.inspect import inspect_run
from spdtool.errors import Corrupt, StageMissing
from spdtool.run.fingerprint import sha256
from spdtool.run.folder import Run


@pytest.fixture
def run(distilled: Path, tmp_path: Path) -> Run:
    """A copy of a run that is done up to `distill`."""
    return Run.open(shutil.copytree(distilled, tmp_path / "run"))


def test_every_stage_has_a_row_with_its_state(run: Run) -> None:
    (run.path / ".finetune.partial").mkdir()
    states = {line.stage: line.state.split()[0] for line in inspect_run(run).stages}
    finished = dict.fromkeys(("teacher", "prune", "distill"), "done")
    assert states == finished | {"finetune": "in", "export": "missing", "bench": "missing"}


def test_the_lineage_follows_the_records(run: Run) -> None:
    digest = {stage: sha256(run.path / stage / "stage.json")[:8] for stage in ("teacher", "prune", "distill")}
    rows = {line.stage: line for line in inspect_run(run).stages}
    assert rows["prune"].state == f"done {digest['prune']}"
    assert rows["prune"].made_from == f"teacher {digest['teacher']}"
    assert set(rows["distill"].made_from.split(", ")) == {
        f"prune {digest['prune']}",
        f"teacher {digest['teacher']}",
    }


def test_scores_and_sparsity(run: Run) -> None:
    rows = {line.stage: line for line in inspect_run(run).stages}
    assert rows["teacher"].sparsity is None
    assert rows["distill"].sparsity == 0.25
    assert rows["distill"].dev_score == run.training_result("distill").score
    assert rows["distill"].steps == 12
    assert rows["finetune"].seconds is None


def test_the_layers_are_those_of_the_latest_sparse_stage(run: Run) -> None:
    inspection = inspect_run(run)
    assert inspection.sparsest == "distill"
    assert len(inspection.layers) == 12
    for matrix in inspection.layers:
        assert matrix.weight.startswith("bert.encoder.layer.")
        assert matrix.zeros == round(0.25 * matrix.size)
        assert matrix.sparsity == matrix.zeros / matrix.size


def test_a_damaged_file_is_named(run: Run) -> None:
    file = run.path / "prune/config.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(Corrupt, match=r"prune/config\.json"):
        inspect_run(run)


def test_a_stage_made_from_a_replaced_one_is_named(run: Run) -> None:
    record = run.path / "teacher/stage.json"
    record.write_text(record.read_text().replace('"finished"', '"ended"'))
    with pytest.raises(Corrupt, match="prune was made from a teacher stage that has since been replaced"):
        inspect_run(run)


def test_no_result_before_the_bench(run: Run) -> None:
    with pytest.raises(StageMissing, match="bench"):
        run.bench_result()
