"""`spdtool compress` from end to end: its files, repeated calls, and the same run stage by stage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spdtool import compress, load
from spdtool.errors import ModelError, RecipeError
from spdtool.recipe import STAGES

Call = Callable[..., Any]
pytestmark = pytest.mark.slow  # whole runs


def snapshot(folder: Path) -> dict[str, bytes]:
    """Read every file below `folder`."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def run(compressed: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, which the test may change."""
    return shutil.copytree(compressed, tmp_path / "run")


def test_compress_leaves_six_stages_and_their_recipe(compressed: Path) -> None:
    assert sorted(path.name for path in compressed.iterdir() if path.name != ".lock") == sorted([*STAGES, "run.json"])
    for stage in STAGES:
        assert json.loads((compressed / stage / "stage.json").read_text())["stage"] == stage
    assert json.loads((compressed / "run.json").read_text())["recipe"]["sparsity"] == 0.5


def test_the_zeros_are_in_the_checkpoint_and_in_the_exported_file(compressed: Path) -> None:
    finetuned = json.loads((compressed / "finetune/stage.json").read_text())["result"]
    exported = json.loads((compressed / "export/stage.json").read_text())["result"]
    assert finetuned["sparsity"] == 0.5
    assert exported["targets"]["onnx"]["student"]["sparsity"] == 0.5
    assert exported["targets"]["onnx"]["teacher"]["zeros"] == 0


def test_a_second_call_does_nothing_and_shows_the_result(
    run: Path, quick_words: tuple[str, ...], spdtool: Call
) -> None:
    before = snapshot(run)
    result = spdtool("compress", *quick_words, "--run", run)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("done, skipped") == 6
    assert "student" in result.stdout
    assert snapshot(run) == before


def test_compress_runs_only_the_missing_stages(run: Path, quick_words: tuple[str, ...], spdtool: Call) -> None:
    before = snapshot(run)
    shutil.rmtree(run / "finetune")
    shutil.rmtree(run / "export")
    shutil.rmtree(run / "bench")
    result = spdtool("finetune", "--run", run)
    assert result.exit_code == 0, result.output
    after = snapshot(run)
    assert after["finetune/model.safetensors"] == before["finetune/model.safetensors"]
    assert {name: data for name, data in after.items() if name.split("/")[0] in ("teacher", "prune", "distill")} == {
        name: data for name, data in before.items() if name.split("/")[0] in ("teacher", "prune", "distill")
    }


def test_stage_by_stage_gives_the_same_bytes(
    compressed: Path, tmp_path: Path, quick_words: tuple[str, ...], spdtool: Call
) -> None:
    folder = tmp_path / "by hand"
    for stage in STAGES[:-1]:
        arguments = quick_words if stage == "teacher" else ()
        result = spdtool(stage, *arguments, "--run", folder)
        assert result.exit_code == 0, result.output
        assert f"{stage}: done in" in result.stdout
    files = [file for file in snapshot(compressed) if file.endswith((".safetensors", ".onnx"))]
    assert {file.split("/")[0] for file in files} == {"teacher", "prune", "distill", "finetune", "export"}
    for file in files:
        assert (folder / file).read_bytes() == (compressed / file).read_bytes(), file


def test_redoing_a_stage_drops_the_later_ones(run: Path, spdtool: Call) -> None:
    result = spdtool("distill", "--run", run, "--again", "--set", "distill.learning_rate=1e-3")
    assert result.exit_code == 0, result.output
    assert "dropped distill, finetune, export, bench" in result.stdout
    assert [stage for stage in STAGES if (run / stage).exists()] == ["teacher", "prune", "distill"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "prune.epochs=x"), "should be a valid number"),
        (("--set", "prune.events=1000"), "do not fit"),
        (("--set", "prune.criterion=magnitud"), "did you mean 'magnitude'"),
        (("--set", "seed=1"), "belongs to another recipe"),
    ],
)
def test_bad_arguments_are_refused_before_a_redo_drops_stages(
    run: Path, spdtool: Call, arguments: tuple[str, ...], message: str
) -> None:
    before = snapshot(run)
    result = spdtool("prune", "--run", run, "--again", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert snapshot(run) == before


def test_a_failed_redo_of_the_teacher_keeps_the_old_one(
    run: Path, quick_words: tuple[str, ...], spdtool: Call, tmp_path: Path
) -> None:
    before = snapshot(run)
    result = spdtool("teacher", *quick_words, "--model", tmp_path / "gone", "--run", run, "--again")
    assert result.exit_code == 2
    assert "does not exist" in result.stderr
    assert snapshot(run) == before


def test_a_setting_may_change_until_its_stage_is_done(run: Path, quick_words: tuple[str, ...], spdtool: Call) -> None:
    shutil.rmtree(run / "bench")
    arguments = ("compress", *quick_words, "--run", run, "--set", "bench.rounds=2")
    dry = spdtool(*arguments, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert json.loads((run / "run.json").read_text())["recipe"]["bench"]["rounds"] == 1, "a dry run wrote"
    result = spdtool(*arguments)
    assert result.exit_code == 0, result.output
    assert json.loads((run / "run.json").read_text())["recipe"]["bench"]["rounds"] == 2
    late = spdtool(*arguments, "--set", "bench.rounds=3")
    assert late.exit_code == 2
    assert "bench.rounds is 2 there and 3 here" in late.stderr


def test_a_dry_run_writes_nothing(tmp_path: Path, quick_words: tuple[str, ...], spdtool: Call) -> None:
    result = spdtool("compress", *quick_words, "--run", tmp_path / "run", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert [stage["stage"] for stage in plan["stages"]] == list(STAGES)
    assert plan["rows"]["train"] + plan["rows"]["dev"] == 60
    assert 3 <= plan["rows"]["dev"] <= 12
    assert plan["parameters"]["zeros"] == plan["parameters"]["prunable"] // 2
    assert plan["recipe"]["prune"]["events"] == 2
    assert list(tmp_path.iterdir()) == []


def test_a_smoke_run_is_marked_everywhere(tmp_path: Path, quick_words: tuple[str, ...], spdtool: Call) -> None:
    result = spdtool("compress", *quick_words, "--run", tmp_path / "run", "--smoke", "--json")
    assert result.exit_code == 0, result.output
    assert [row[0] for row in json.loads(result.stdout)["rows"]] == ["teacher", "student"]
    assert "SMOKE RUN" in result.stderr
    assert (tmp_path / "run/SMOKE-RUN-NOT-A-RESULT.txt").exists()
    assert json.loads((tmp_path / "run/prune/stage.json").read_text())["smoke"] is True
    inspection = spdtool("inspect", tmp_path / "run")
    assert "SMOKE RUN, NO RESULT" in inspection.stdout


def test_a_run_continues_from_another_working_directory(
    tmp_path: Path,
    encoder_folder: Path,
    rows_file: Path,
    quick_words: tuple[str, ...],
    spdtool: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    project = tmp_path / "hör zu"
    shutil.copytree(encoder_folder, project / "mödel")
    shutil.copy(rows_file, project / "rows.csv")
    monkeypatch.chdir(project)
    arguments = [*quick_words, "--data", "rows.csv", "--model", "mödel/", "--run", project / "run"]
    assert spdtool("teacher", *arguments).exit_code == 0
    monkeypatch.chdir(tmp_path)
    result = spdtool("prune", "--run", project / "run")
    assert result.exit_code == 0, result.output


def test_a_given_teacher_is_measured_and_used(
    compressed: Path, quick_words: tuple[str, ...], tmp_path: Path, spdtool: Call
) -> None:
    result = spdtool("teacher", *quick_words, "--teacher", compressed / "teacher", "--run", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "given teacher: dev score" in result.stdout
    copied, given_file = tmp_path / "run/teacher/model.safetensors", compressed / "teacher/model.safetensors"
    assert copied.read_bytes() == given_file.read_bytes()


def test_a_run_continues_with_its_recorded_recipe(tmp_path: Path, quick_words: tuple[str, ...], spdtool: Any) -> None:
    run = tmp_path / "run"
    assert spdtool("teacher", *quick_words, "--run", run).exit_code == 0
    recorded = json.loads((run / "run.json").read_text())["recipe"]
    calls: dict[tuple[str, ...], dict[str, object]] = {
        ("compress", "--run", str(run)): {},
        ("resume", str(run)): {},
        ("compress", "--run", str(run), "--sparsity", "0.6"): {"sparsity": 0.6},
        ("resume", str(run), "--set", "sparsity=0.6"): {"sparsity": 0.6},
    }
    for arguments, changes in calls.items():
        result = spdtool(*arguments, "--dry-run", "--json")
        assert result.exit_code == 0, result.output
        plan = json.loads(result.stdout)
        assert plan["recipe"] == recorded | changes, arguments
        assert [stage["done"] for stage in plan["stages"]] == [True, *[False] * 5]
    for arguments, message in (
        (("compress", "--run", run, "--recipe", "spd"), "--recipe spd names another"),
        (("compress", "--run", tmp_path / "none"), "neither --task nor --data was given"),
        (("resume", tmp_path / "none"), "has no run.json"),
        (("compress", "--run", run, "--seed", "1"), "seed is 0 there and 1 here"),
    ):
        result = spdtool(*arguments)
        assert result.exit_code == 2, arguments
        assert message in " ".join(result.stderr.split()), arguments
    redone = spdtool("teacher", "--run", run, "--again", "--set", "teacher.epochs=2")
    assert redone.exit_code == 0, redone.output
    assert json.loads((run / "run.json").read_text())["recipe"]["teacher"]["epochs"] == 2


def test_the_api_continues_with_the_recorded_recipe(tmp_path: Path, toy_run: Any) -> None:
    run = toy_run(until="prune")
    result = compress(run=run.path, until="distill")
    assert result.finished
    assert run.done("distill")
    with pytest.raises(RecipeError, match="neither a task nor data"):
        compress(run=tmp_path / "none")


def test_a_finished_run_is_loaded_by_its_folder(compressed: Path, tmp_path: Path) -> None:
    classify = load(compressed)
    assert classify.bundle.folder == compressed / "export/bundle"
    assert classify("the film was good") in ("bad", "good")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ModelError, match="has no exported model"):
        load(tmp_path)


@pytest.mark.slow
def test_the_dev_score_is_the_chosen_metric(tmp_path: Path, quick_words: tuple[str, ...], spdtool: Any) -> None:
    for metric in ("accuracy", "f1"):
        run = tmp_path / metric
        result = spdtool("teacher", *quick_words, "--run", run, "--metric", metric)
        assert result.exit_code == 0, result.output
        dev = json.loads((run / "teacher/stage.json").read_text())["result"]["dev"]
        assert dev["score"] == dev[metric]
        assert dev.keys() == {"score", "accuracy", "f1"}
