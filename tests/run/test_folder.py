"""The run folder: commits are atomic, inputs are verified, two processes never write at once."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spdtool.errors import Corrupt, RunError, RunLocked, RunMismatch, StageMissing
from spdtool.recipe.fields import Recipe
from spdtool.recipe.reading import override
from spdtool.run import folder as runs
from spdtool.run.fingerprint import sha256
from spdtool.run.folder import Run
from spdtool.run.records import DataRecord, TrainingResult
from spdtool.run.storage import write_json


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.for_recipe(tmp_path / "run", Recipe(task="cola"))


def finish(run: Run, stage: str, text: str = "weights", reads: tuple[str, ...] = ()) -> Path:
    for name in reads:
        run.use_input(name)
    with run.stage(stage) as work:
        (work.folder / "model.safetensors").write_text(text)
        (work.folder / "onnx").mkdir()
        (work.folder / "onnx" / "model.onnx").write_text("graph")
        work.result = TrainingResult(dev={"score": 0.5})
    return run.path / stage


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != ".lock")


def test_nothing_is_written_until_the_first_stage_starts(run: Run) -> None:
    assert not run.path.exists()


def test_a_finished_stage_holds_its_files_and_a_record_of_them(run: Run) -> None:
    folder = finish(run, "teacher")
    assert names(run.path) == [
        "run.json",
        "teacher",
        "teacher/model.safetensors",
        "teacher/onnx",
        "teacher/onnx/model.onnx",
        "teacher/stage.json",
    ]
    record = json.loads((folder / "stage.json").read_text("utf-8"))
    assert [file["path"] for file in record["files"]] == ["model.safetensors", "onnx/model.onnx"]
    assert record["files"][0]["size"] == 7
    assert record["files"][0]["sha256"] == sha256(folder / "model.safetensors")
    assert record["result"]["dev"] == {"score": 0.5}
    assert record["inputs"] == {}
    assert record["recipe"]["task"] == "cola"
    assert record["recipe"]["teacher"] == run.recipe.teacher.model_dump(mode="json")
    assert run.done("teacher")
    assert run.use_input("teacher") == folder


def test_a_stage_records_the_hashes_of_its_inputs_only(run: Run) -> None:
    finish(run, "teacher")
    finish(run, "prune", reads=("teacher",))
    finish(run, "distill", reads=("teacher", "prune"))
    digest = {stage: sha256(run.path / stage / "stage.json") for stage in ("teacher", "prune")}
    assert run.record("prune").inputs == {"teacher": digest["teacher"]}
    assert run.record("distill").inputs == digest


def test_a_stage_that_fails_leaves_nothing(run: Run) -> None:
    with pytest.raises(ValueError, match="oh"), run.stage("teacher") as work:
        (work.folder / "model.safetensors").write_text("half")
        raise ValueError("oh")
    assert names(run.path) == ["run.json"]
    assert not run.done("teacher")


def test_a_stage_that_fails_keeps_a_state_to_resume_from(run: Run) -> None:
    with pytest.raises(KeyboardInterrupt), run.stage("teacher") as work:
        (work.state / "step-1").mkdir(parents=True)
        (work.folder / "metrics.jsonl").write_text("{}\n")
        (work.folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt
    assert not run.done("teacher")
    with run.stage("teacher") as work:
        assert names(work.folder) == ["metrics.jsonl", "state", "state/step-1"], "half-written files are gone"
        (work.folder / "model.safetensors").write_text("whole")
    assert names(run.path / "teacher") == ["metrics.jsonl", "model.safetensors", "stage.json"]
    assert names(run.path) == sorted(["run.json", "teacher", *(f"teacher/{n}" for n in names(run.path / "teacher"))])


def test_a_folder_without_a_record_is_not_trusted(run: Run) -> None:
    (run.path / "teacher").mkdir(parents=True)
    (run.path / "teacher" / "model.safetensors").write_text("somebody's")
    write_json(run.path / "run.json", {"recipe": run.recipe.model_dump(mode="json")})
    assert not run.done("teacher")
    folder = finish(run, "teacher", "mine")
    assert (folder / "model.safetensors").read_text() == "mine"


def test_a_finished_stage_is_not_written_again(run: Run) -> None:
    finish(run, "teacher")
    with pytest.raises(RunError, match="already done") as error, run.stage("teacher"):
        pytest.fail("it was opened")
    assert "--again" in str(error.value.hint)


def alter(folder: Path) -> None:
    (folder / "model.safetensors").write_text("WEIGHTS")


def cut(folder: Path) -> None:
    (folder / "model.safetensors").write_text("weigh")


def remove(folder: Path) -> None:
    (folder / "onnx" / "model.onnx").unlink()


def cut_record(folder: Path) -> None:
    text = (folder / "stage.json").read_text("utf-8")
    (folder / "stage.json").write_text(text[: len(text) // 2])


def empty_record(folder: Path) -> None:
    (folder / "stage.json").write_text("{}")


def strange_record(folder: Path) -> None:
    (folder / "stage.json").write_text("[1, 2]")


def binary_record(folder: Path) -> None:
    (folder / "stage.json").write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (alter, "was altered"),
        (cut, "holds 5 bytes; the stage wrote 7"),
        (remove, "is missing"),
        (cut_record, "cannot be read"),
        (empty_record, "cannot be read"),
        (strange_record, "cannot be read"),
        (binary_record, "cannot be read"),
    ],
)
def test_a_damaged_stage_is_refused_with_the_command_that_redoes_it(
    run: Run, damage: Callable[[Path], None], message: str
) -> None:
    damage(finish(run, "teacher"))
    with pytest.raises(Corrupt, match=message) as error:
        run.use_input("teacher")
    assert "spdtool teacher" in str(error.value.hint)
    assert "--again" in str(error.value.hint)


def test_a_stage_whose_input_was_replaced_is_refused(run: Run) -> None:
    finish(run, "teacher")
    finish(run, "prune", reads=("teacher",))
    (run.path / "teacher" / "stage.json").unlink()
    finish(run, "teacher", "another")
    with pytest.raises(Corrupt, match="prune was made from a teacher stage that has since been replaced"):
        run.use_input("prune")


def test_a_stage_that_is_not_finished_is_missing(run: Run) -> None:
    with pytest.raises(StageMissing, match="no finished stage 'teacher'") as error:
        run.use_input("teacher")
    assert "spdtool teacher" in str(error.value.hint)


def test_a_folder_that_is_not_a_run_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match="is not a run folder"):
        Run.for_recipe(tmp_path, Recipe())
    with pytest.raises(RunError, match="is not a run folder"):
        Run.open(tmp_path)
    with pytest.raises(RunError, match="is not a run folder"):
        Run.for_recipe(tmp_path / "thesis.txt", Recipe())
    assert names(tmp_path) == ["thesis.txt"]


def test_a_folder_whose_first_call_was_killed_before_run_json_can_be_used(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".run.json.tmp").write_text("{")
    run = Run.for_recipe(tmp_path, Recipe(task="cola"))
    finish(run, "teacher")
    assert Run.open(tmp_path).recipe == Recipe(task="cola")


@pytest.mark.parametrize("text", ["", "{", "{}", '{"recipe": {"sparsity": 2}}', '{"recipe": {"gone": 2}}', "[]"])
def test_a_run_json_that_cannot_be_read_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunError, match=r"run\.json"):
        Run.open(tmp_path)


def test_the_recipe_is_read_back_unchanged(run: Run) -> None:
    finish(run, "teacher")
    assert Run.open(run.path).recipe == run.recipe


@pytest.mark.parametrize(
    ("assignment", "allowed"),
    [
        ("sparsity=0.5", True),  # the teacher does not use it
        ("seed=1", False),
        ("teacher.epochs=1", False),
        ("prune.epochs=1", True),  # not done yet
        ("save_minutes=1", True),
        ("device=cpu", True),
    ],
)
def test_a_finished_stage_binds_the_recipe_that_made_it(run: Run, assignment: str, allowed: bool) -> None:
    finish(run, "teacher")
    recipe = override(run.recipe, [assignment])
    if allowed:
        reopened = Run.for_recipe(run.path, recipe)
        assert reopened.recipe == recipe
        assert reopened.done("teacher")
    else:
        with pytest.raises(RunMismatch, match=assignment.split("=")[0].replace(".", r"\.")):
            Run.for_recipe(run.path, recipe)
        assert Run.open(run.path).recipe == run.recipe


def test_a_setting_used_by_a_finished_student_cannot_change(run: Run) -> None:
    for stage in ("teacher", "prune"):
        finish(run, stage)
    with pytest.raises(RunMismatch, match="sparsity is") as error:
        Run.for_recipe(run.path, override(run.recipe, ["sparsity=0.5"]))
    assert f"`spdtool prune --run {run.path} --again --set sparsity=0.5`" in (error.value.hint or "")
    assert (
        Run.for_recipe(run.path, override(run.recipe, ["sparsity=0.5"]), redo="prune", dry=True).recipe.sparsity == 0.5
    )


@pytest.mark.parametrize(
    ("assignment", "remedy"),
    [
        ("seed=1", "--teacher {path}/teacher"),
        ("teacher.epochs=1", "`spdtool teacher --run {path} --again --set teacher.epochs=1.0`"),
        ("distill.epochs=1", "`spdtool distill --run {path} --again --set distill.epochs=1.0`"),
        ("prune.save_at=[0.1]", "`spdtool prune --run {path} --again --set 'prune.save_at=[0.1]'`"),
        ("finetune.max_steps=5", "`spdtool finetune --run {path} --again --set finetune.max_steps=5`"),
    ],
)
def test_a_mismatch_names_the_command_that_helps(run: Run, assignment: str, remedy: str) -> None:
    for stage in ("teacher", "prune", "distill", "finetune"):
        finish(run, stage)
    with pytest.raises(RunMismatch) as error:
        Run.for_recipe(run.path, override(run.recipe, [assignment]))
    assert remedy.format(path=run.path) in (error.value.hint or "")


def test_a_path_where_no_folder_can_be_created_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = Run.for_recipe(tmp_path / "file" / "run", Recipe())
    with pytest.raises(RunError, match="no run folder can be made at"), run.stage("teacher"):
        pass


def test_a_setting_no_finished_stage_used_may_change(run: Run) -> None:
    finish(run, "teacher")
    Run.for_recipe(run.path, override(run.recipe, ["prune.epochs=1"]))
    assert Run.open(run.path).recipe.prune.epochs == 1


def test_a_run_without_finished_stages_accepts_any_recipe(run: Run) -> None:
    with pytest.raises(ValueError, match="oh"), run.stage("teacher"):
        raise ValueError("oh")
    Run.for_recipe(run.path, Recipe(task="rte", sparsity=0.5))
    assert Run.open(run.path).recipe.task == "rte"


def test_discard_drops_a_stage_and_every_later_one(run: Run) -> None:
    for stage in ("teacher", "prune", "distill"):
        finish(run, stage)
    (run.path / ".finetune.partial").mkdir()
    assert run.discard("prune") == ["prune", "distill"]
    assert names(run.path) == sorted(["run.json", "teacher", *(f"teacher/{n}" for n in names(run.path / "teacher"))])
    assert run.discard("prune") == []


def test_smoke_marks_the_folder(tmp_path: Path) -> None:
    run = Run.for_recipe(tmp_path / "run", Recipe(smoke=True))
    finish(run, "teacher")
    assert (run.path / runs.SMOKE_MARK).is_file()
    assert run.record("teacher").smoke is True


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (Recipe(task="mrpc", sparsity=0.9), "runs/mrpc-0.9"),
        (Recipe(task="mrpc", sparsity=0.95, seed=3, name="reference"), "runs/mrpc-0.95-reference-seed3"),
        (Recipe(task="local", data="/data/my.csv"), "runs/my-0.9"),
        (Recipe(task="mrpc", smoke=True), "runs/smoke-mrpc-0.9"),
    ],
)
def test_default_paths(recipe: Recipe, expected: str) -> None:
    assert str(runs.default_path(recipe)) == expected


def test_the_fingerprint_covers_only_settings_that_decide_the_result(run: Run) -> None:
    def fingerprint(*assignments: str, stage: str = "prune") -> str:
        return Run(run.path, override(run.recipe, assignments)).fingerprint(stage)

    assert fingerprint() == fingerprint("save_minutes=1") == fingerprint("finetune.epochs=1") == fingerprint("name=x")
    assert (
        len(
            {
                fingerprint(),
                fingerprint("prune.epochs=1"),
                fingerprint("seed=1"),
                fingerprint("sparsity=0.5"),
                fingerprint(stage="distill"),
            }
        )
        == 5
    )
    finish(run, "teacher")
    reading = Run(run.path, run.recipe)
    reading.use_input("teacher")
    assert reading.fingerprint("prune") != fingerprint()


def raise_disk_full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_at_the_record_leaves_no_stage_and_keeps_the_state(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(run, "teacher")
    with monkeypatch.context() as patch, pytest.raises(RunError, match="the disk is full"), run.stage("prune") as work:
        (work.state / "step-1").mkdir(parents=True)
        (work.folder / "model.safetensors").write_text("whole")
        patch.setattr(os, "fsync", raise_disk_full)
    assert not run.done("prune")
    assert not (run.path / "prune").exists()
    assert (run.path / ".prune.partial" / "state" / "step-1").is_dir(), "hours of training are not thrown away"
    with run.stage("prune") as work:
        assert names(work.folder) == ["state", "state/step-1"]
    assert names(run.path / "prune") == ["stage.json"]


def test_a_full_disk_at_the_very_start_leaves_a_folder_that_can_be_used_again(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", raise_disk_full)
        with pytest.raises(RunError, match="No space left"):
            finish(run, "teacher")
    finish(Run.for_recipe(run.path, run.recipe), "teacher")


HOLDER = """
    import sys, time
    from spdtool.recipe.fields import Recipe
    from spdtool.run.folder import Run
    with Run.for_recipe(sys.argv[1], Recipe(task="cola")).stage("teacher") as work:
        (work.folder / "model.safetensors").write_text("half")
        sys.stdout.write("held\\n")
        sys.stdout.flush()
        time.sleep(600)
"""


def test_a_second_process_is_refused_and_a_killed_process_releases_the_lock(run: Run) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(run.path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunLocked, match="another process"):
            finish(run, "teacher")
        with pytest.raises(RunLocked):
            Run.for_recipe(run.path, override(run.recipe, ["prune.epochs=1"]))
        with pytest.raises(RunLocked):
            run.discard("teacher")
        assert Run.open(run.path).recipe == run.recipe
        assert (run.path / ".teacher.partial" / "model.safetensors").read_text() == "half"
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate()
    finish(run, "teacher")
    assert (run.path / "teacher" / "model.safetensors").read_text() == "weights"


KILLED = """
    import os, shutil, signal, sys
    from pathlib import Path
    from spdtool.run import folder as runs
    from spdtool.recipe.fields import Recipe
    moment, count = sys.argv[2], 0

    def killing(function, name):
        def call(*args, **options):
            if name == moment.removeprefix("before-"):
                if moment.startswith("before-"):
                    os.kill(os.getpid(), signal.SIGKILL)
                function(*args, **options)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)
        return call

    run = runs.Run.for_recipe(sys.argv[1], Recipe(task="cola"))
    with run.stage("teacher") as work:
        (work.state / "step-1").mkdir(parents=True)
        (work.folder / "model.safetensors").write_text("whole")
        runs.write_json = killing(runs.write_json, "record")
        Path.rename = killing(Path.rename, "rename")
        shutil.rmtree = killing(shutil.rmtree, "rmtree")
"""


@pytest.mark.parametrize("moment", ["before-record", "record", "before-rename", "rename", "before-rmtree", "rmtree"])
def test_a_commit_killed_at_any_moment_is_complete_or_absent(run: Run, moment: str) -> None:
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), str(run.path), moment], check=False)
    assert process.returncode == -signal.SIGKILL
    reopened = Run.for_recipe(run.path, run.recipe)
    assert reopened.done("teacher") == (moment in ("rename", "before-rmtree", "rmtree"))
    if reopened.done("teacher"):
        assert reopened.record("teacher").files[0].path == "model.safetensors"
        reopened.use_input("teacher")
        finish(reopened, "prune")  # starting a stage removes leftover states
    else:
        with reopened.stage("teacher") as work:
            assert (work.state / "step-1").is_dir(), "nothing was lost"
            (work.folder / "model.safetensors").write_text("whole")
    assert not list(reopened.path.glob("*/state"))
    assert not list(reopened.path.glob(".*.spent"))
    assert names(reopened.path / "teacher") == ["model.safetensors", "stage.json"]


DATA = DataRecord(rows={"train": 9, "dev": 3}, digest="0123456789")


def test_a_stage_records_the_rows_it_read(run: Run) -> None:
    run.record_data(DATA)
    before = run.fingerprint("teacher")
    finish(run, "teacher")
    assert run.record("teacher").data == DATA
    run.record_data(DATA.model_copy(update={"digest": "other"}))  # no input was read, as in the first stage of a run
    assert run.fingerprint("teacher") != before
    run.use_input("teacher")
    run.record_data(DATA)
    finish(run, "prune")
    assert run.record("prune").data == DATA


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataRecord(rows={"train": 10, "dev": 3}, digest="x"), "9 train, 3 dev there, 10 train, 3 dev here"),
        (DATA.model_copy(update={"digest": "abcdefghij"}), r"as many .* \(digest 01234567, now abcdefgh\)"),
    ],
)
def test_rows_that_differ_from_those_of_earlier_stages_are_refused(run: Run, data: DataRecord, message: str) -> None:
    run.record_data(DATA)
    finish(run, "teacher")
    run.use_input("teacher")
    with pytest.raises(RunMismatch, match=f"the rows are not those of the stage 'teacher' in .*{message}") as error:
        run.record_data(data)
    assert f"`spdtool teacher --run {run.path} --again`" in str(error.value.hint)


def test_a_stage_without_a_record_of_its_rows_is_accepted(run: Run) -> None:
    finish(run, "teacher")
    run.require_same_data(DATA, ["teacher"])
