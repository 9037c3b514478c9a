"""Sweeps: shared teachers, resuming, failed trials, equal epochs, output files."""

from __future__ import annotations

import json
import os
import pickle
import signal

import pytest

from spdtool import console
from spdtool.errors import RecipeError, RunMismatch, UnknownName
from spdtool.recipe import PHASES
from spdtool.recipe import reading as recipe
from spdtool.run.folder import Run
from spdtool.stages import distill
from spdtool.sweep.run_sweep import run_sweep, run_trial
from spdtool.sweep.trials import Sweep, data_by_task, plan_trials, scale_epochs

QUICK = (
    *(f"{stage}.batch_size=16" for stage in ("teacher", "prune", "distill", "finetune")),
    *("teacher.epochs=1", "prune.events=2", "prune.calibration=2"),
    *("max_length=16", "device=cpu", "export.optional=[]"),
    "teacher.accept=true",  # a toy may learn nothing in an epoch
)


@pytest.fixture
def planned(tmp_path, toy_task):
    """Return `planned(recipes=..., ...)`, which plans a quick sweep of the task `toy` in tmp_path/sweep."""
    toy_task()

    def make(**changes):
        defaults = {"recipes": ["default"], "sparsities": [0.5], "seeds": [0], "tasks": ["toy"], "epochs": 3}
        return plan_trials(Sweep(**defaults | {"out": tmp_path / "sweep", "sets": QUICK} | changes))

    return make


def run_all(trials):
    lines = []
    rows = run_sweep(trials, trials[0].folder.parent.parent, lines.append)
    return rows, lines


def stamps(folder):
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("stage.json")}


@pytest.mark.slow
def test_every_trial_is_a_run_with_the_teacher_of_its_task_and_seed(planned, tmp_path):
    trials = planned(recipes=["default", "no-distillation"], seeds=[0, 1])
    rows, lines = run_all(trials)
    assert [row.status for row in rows] == ["done"] * 4
    folder = tmp_path / "sweep" / "toy"
    names = [f"{name}-0.5-seed{seed}" for seed in (0, 1) for name in ("default", "no-distillation")]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "teacher-seed0", "teacher-seed1"])
    for name in names:
        run = Run.open(folder / name)
        shared_teacher = folder / f"teacher-seed{name[-1]}" / "teacher"
        assert run.recipe.given_teacher == str(shared_teacher)
        weights = [
            (folder_of_model / "model.safetensors").read_bytes()
            for folder_of_model in (shared_teacher, run.path / "teacher")
        ]
        assert weights[0] == weights[1]
    assert [line.split("]")[0] for line in lines] == ["[1/4", "[2/4", "[3/4", "[4/4"]
    assert "3 left, about" in lines[0]


def test_a_sweep_prints_one_line_for_each_trial(planned, capsys):
    console.configure()
    trials = planned()
    run_sweep(trials, trials[0].folder.parent.parent, lambda line: console.say(console.escape(line)))
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["[1/1] toy default 0.5 seed 0"]


def check_files(out, rows):
    """Compare the results as JSON and as Markdown with rows of sparsity 0.5 and 0.8."""
    written = json.loads((out / "sweep.json").read_text("utf-8"))["rows"]
    assert written == [row.model_dump(mode="json") for row in rows]
    for record, nonzeros in zip(written, (0.5, 0.2), strict=True):
        assert record["nonzeros"] == pytest.approx(nonzeros * record["weights"], rel=0.01)
        assert record["student_gap"] == pytest.approx(record["student_train"] - record["student"])
        assert record["run"] == f"toy/default-{record['sparsity']:g}-seed0"
    assert "| toy | default | 0.8 |" in (out / "sweep.md").read_text("utf-8")


@pytest.mark.slow
def test_a_finished_sweep_repeats_no_work_and_its_files_grow_with_it(planned, tmp_path):
    before, _ = run_all(planned())
    stamps_before = stamps(tmp_path)
    after, _ = run_all(planned())
    assert (stamps(tmp_path), after) == (stamps_before, before)
    wider, _ = run_all(planned(sparsities=[0.5, 0.8]))
    assert wider[0] == before[0]
    assert stamps_before.items() < stamps(tmp_path).items()
    check_files(tmp_path / "sweep", wider)


@pytest.mark.slow
def test_a_killed_sweep_resumes(planned, tmp_path, monkeypatch):
    trials = planned(seeds=[0, 1])
    child = os.fork()
    if child == 0:  # dies in the second phase of the second trial
        runs = []
        phase = distill.distill

        def die(run):
            runs.append(run)
            return os.kill(os.getpid(), signal.SIGKILL) if len(runs) == 2 else phase(run)

        distill.distill = die
        run_all(trials)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    stamps_before = stamps(tmp_path)
    assert "sweep/toy/default-0.5-seed1/prune/stage.json" in stamps_before
    assert "sweep/toy/default-0.5-seed1/distill/stage.json" not in stamps_before
    assert len(json.loads((tmp_path / "sweep" / "sweep.json").read_text("utf-8"))["rows"]) == 2
    rows, _ = run_all(planned(seeds=[0, 1]))
    assert [row.status for row in rows] == ["done"] * 2
    assert stamps_before.items() < stamps(tmp_path).items()


@pytest.mark.slow
def test_a_changed_recipe_of_a_finished_trial_is_refused_before_anything_runs(planned, tmp_path):
    run_all(planned())
    stamps_before = stamps(tmp_path)
    for change in ({"epochs": 6}, {"sets": (*QUICK, "finetune.learning_rate=0.1")}, {"sets": (*QUICK, "max_rows=20")}):
        with pytest.raises(RunMismatch):
            planned(seeds=[5, 0], **change)
    assert stamps(tmp_path) == stamps_before


def test_a_failed_trial_is_a_row_and_the_others_run(planned, toy_task):
    toy_task("empty", train=0)
    rows, lines = run_all(planned(tasks=["empty", "toy"]))
    assert [row.status for row in rows] == ["failed", "done"]
    assert "failed: DataError" in lines[0]
    assert "no rows in its train split" in rows[0].error
    assert rows[1].student is not None


def test_a_trial_is_a_plain_value_that_another_process_can_run(planned):
    (trial,) = planned()
    row = run_trial(pickle.loads(pickle.dumps(trial)))
    assert pickle.loads(pickle.dumps(row)) == row
    assert row.status == "done"


def test_epochs_are_scaled_to_the_same_sum_in_the_proportions_of_the_recipe():
    examples = [
        ("default", [], (2.0, 1.0, 1.0)),
        ("reference", [], (2.0, 40 / 60, 80 / 60)),
        ("default", ["prune.epochs=1", "distill.epochs=0", "finetune.epochs=3"], (1.0, 0.0, 3.0)),
        ("default", ["prune.epochs=0"], (0.0, 2.0, 2.0)),
    ]
    for name, sets, expected in examples:
        scaled = scale_epochs(recipe.build_recipe(name, {"task": "mrpc"}, sets), 4)
        epochs = (scaled.prune.epochs, scaled.distill.epochs, scaled.finetune.epochs)
        assert epochs == pytest.approx(expected), (name, sets)
        assert sum(epochs) == pytest.approx(4), (name, sets)


@pytest.mark.parametrize("sets", [["prune.epochs=3"], [f"{phase}.epochs=0" for phase in PHASES]])
def test_epochs_that_cannot_be_scaled_to_the_sum_are_refused(sets):
    with pytest.raises(RecipeError, match="--epochs cannot scale"):
        scale_epochs(recipe.build_recipe("default", {"task": "mrpc"}, sets), 4)


def test_data_is_one_folder_for_all_tasks_or_a_folder_for_each(tmp_path):
    folder = str(tmp_path)
    examples = [
        (None, {"cola": None, "sst2": None}),
        (folder, {"cola": folder, "sst2": folder}),
        (f"sst2={folder}", {"cola": None, "sst2": folder}),
        (f"SST-2={folder},CoLA={folder}/x", {"cola": f"{folder}/x", "sst2": folder}),
    ]
    for text, expected in examples:
        assert data_by_task(text, ["cola", "sst2"]) == expected, text


def test_data_for_a_task_outside_the_sweep_is_refused():
    for text in ("rte=x", "cola=", "cola=x,sst2"):
        with pytest.raises(RecipeError, match="none of the sweep's tasks"):
            data_by_task(text, ["cola", "sst2"])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"recipes": ["defualt"]}, UnknownName, "default"),
        ({"tasks": ["toi"]}, UnknownName, "toy"),
        ({"sparsities": [1.5]}, RecipeError, "sparsity"),
        ({"sets": ["sparsity=0.3"]}, RecipeError, "a sweep decides 'sparsity'"),
        ({"sets": ["prune.epoch=1"]}, UnknownName, "prune.epochs"),
    ],
)
def test_a_wrong_setting_is_refused_before_any_trial(planned, tmp_path, changes, error, message):
    with pytest.raises(error) as raised:
        planned(**changes)
    assert message in f"{raised.value.message} {raised.value.hint}"
    assert list(tmp_path.iterdir()) == []


def test_two_recipes_of_one_name_are_refused(planned, tmp_path):
    (tmp_path / "default.toml").write_text("bucketing = false\n", "utf-8")
    with pytest.raises(RecipeError, match="two recipes are called 'default'"):
        planned(recipes=["default", str(tmp_path / "default.toml")])


def test_intermediate_students_are_rows_of_the_table(planned, tmp_path):
    rows, _ = run_all(planned(sparsities=[0.8], sets=(*QUICK, "prune.first=0.5", "prune.save_at=[0.5]")))
    (student,) = rows[0].students
    assert (student.sparsity, student.label, student.run) == (
        0.5, "default, on the way to 0.8", "toy/default-0.8-seed0/prune/students/0.5",
    )  # fmt: skip
    assert (tmp_path / "sweep" / student.run / "config.json").is_file()
    assert "default, on the way to 0.8" in (tmp_path / "sweep" / "sweep.md").read_text("utf-8")


@pytest.mark.slow
def test_the_sweep_command_prints_a_table_and_fails_with_its_trials(planned, toy_task, spdtool, tmp_path):
    toy_task("empty", train=0)
    arguments = ["--epochs", 3, "--sparsities", 0.5, "--seeds", 0, "--out", tmp_path / "s"]
    arguments += [word for assignment in QUICK for word in ("--set", assignment)]
    result = spdtool("sweep", "--tasks", "toy", *arguments)
    assert result.exit_code == 0, result.output
    assert "kept on average" in result.output
    assert (tmp_path / "s" / "pareto-toy-nonzeros.png").is_file()
    assert "prune 3/" not in result.output  # the lines of the stages are not printed
    failing = spdtool("sweep", "--tasks", "toy,empty", *arguments, "--json")
    assert failing.exit_code == 3
    assert [row["status"] for row in json.loads(failing.stdout)] == ["done", "failed"]
    report = spdtool("report", tmp_path / "s", "--json")
    assert report.exit_code == 0
    assert json.loads(report.stdout)["page"] == str(tmp_path / "s" / "report" / "report.html")
    assert "DataError" in (tmp_path / "s" / "report" / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tasks", "toy", "--seeds", "0,x"], "--seeds '0,x' is no list of whole numbers"),
        (["--tasks", ","], "--tasks is empty"),
        (["--tasks", "toy", "--sparsities", "many"], "no list of numbers"),
    ],
)
def test_the_sweep_command_refuses_malformed_lists(spdtool, arguments, named):
    result = spdtool("sweep", *arguments)
    assert result.exit_code == 2
    assert named in result.stderr


def test_report_refuses_a_folder_that_is_no_run(spdtool, tmp_path):
    result = spdtool("report", tmp_path)
    assert result.exit_code == 2
    assert "is not a run folder" in result.stderr
