"""benchmarks/glue.py with tiny files and a stub of spdtool: splits, resuming, pausing, rows and the table."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "glue.py"
TOOL = """#!{python}
import json, pathlib, sys
stage, run = sys.argv[1], pathlib.Path(sys.argv[sys.argv.index("--run") + 1])
if "--set=fail=true" in sys.argv:
    sys.exit("no such setting")
rate = next((word.split("=")[2] for word in sys.argv if word.startswith("--set=teacher.learning_rate")), "0")
scores = {{"score": {{"0.0002": 0.5}}.get(rate, 0.25 if "x4-" in run.name else 0.5)}}
(run / stage).mkdir(parents=True)
(run / stage / "model.safetensors").write_text("weights")
fit = {{"steps": 3, "epochs": 1.0}}
result = {{"dev": scores, "train": {{"score": 1.0}}, "fit": fit, "sparsity": 0.9}}
record = {{"result": result, "machine": {{}}, "spdtool": "1", "finished": "today"}}
(run / stage / "stage.json").write_text(json.dumps(record))
"""


@pytest.fixture
def glue(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with classifiers that predict the two labels in turn."""
    spec = importlib.util.spec_from_file_location("glue", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "glue", module)
    spec.loader.exec_module(module)

    def predict_in_turn(checkpoint: Path, columns: Sequence[Sequence[str]]) -> list[int]:
        assert (checkpoint / "model.safetensors").exists()
        return [row % 2 for row in range(len(columns[0]))]

    monkeypatch.setattr(module, "predict", predict_in_turn)
    return module


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A command line for the stub, with 16 rows of RTE that are all entailed."""
    (tmp_path / "tool").write_text(TOOL.format(python=sys.executable))
    (tmp_path / "tool").chmod(0o755)
    (tmp_path / "data" / "RTE").mkdir(parents=True)
    (tmp_path / "model").mkdir()
    rows = ["index\tsentence1\tsentence2\tlabel"]
    rows += [f"{number}\ta\tb\tentailment" for number in range(16)]
    for split in ("train", "dev"):
        (tmp_path / "data" / "RTE" / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    folders = {"spdtool": "tool", "data": "data", "model": "model", "work": "work"}
    return [f"--{option}={tmp_path / name}" for option, name in folders.items()]


def test_the_halves_share_no_row_and_are_reproducible(glue: ModuleType) -> None:
    content = b"\xef\xbb\xbflabel\ttext\n" + b"".join(b"%d\tline \x85 %d\r\n" % (row % 2, row) for row in range(9))
    picking, reporting = glue.halve(content, header=True)
    lines = [half.decode("utf-8", "replace").split("\n") for half in (picking, reporting)]
    assert [half[0] for half in lines] == ["\ufefflabel\ttext"] * 2
    assert [len(half) - 2 for half in lines] == [5, 4]
    assert not set(lines[0][1:-1]) & set(lines[1][1:-1])
    assert glue.halve(content, header=True) == (picking, reporting)
    assert sum(half.count(b"\n") for half in glue.halve(content, header=False)) == 10


def test_rows_are_read_as_the_tool_reads_them(glue: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "dev.tsv"
    file.write_bytes('\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\ta "b\tc\u2028d\r\n'.encode())
    assert glue.read_rows(glue.TASKS["mrpc"], file) == ([['a "b'], ["c\u2028d"]], [1])


def test_scores_are_the_official_metrics_and_their_mean(glue: ModuleType) -> None:
    assert glue.score(glue.TASKS["rte"], [0, 1, 1, 0], [0, 1, 0, 0]) == {"score": 0.75, "accuracy": 0.75}
    expected = {"score": (0.75 + 2 / 3) / 2, "accuracy": 0.75, "f1": 2 / 3}
    assert glue.score(glue.TASKS["mrpc"], [0, 1, 1, 0], [0, 1, 0, 0]) == pytest.approx(expected)
    assert glue.score(glue.TASKS["cola"], [0, 1, 1, 0], [1, 0, 0, 1]) == pytest.approx({"score": -1, "matthews": -1})


def test_the_default_plan_starts_small_and_repeats_no_trial(glue: ModuleType) -> None:
    trials = glue.plan(glue.parse_options(["--table=x"]))
    assert [trial.folder for trial in trials[:4]] == [
        "trials/rte/default-0.9-seed0",
        "trials/mrpc/default-0.9-seed0",
        "trials/cola/default-0.9-seed0",
        "trials/rte/spd-0.9-seed0",
    ]
    assert len({trial.key for trial in trials}) == len(trials) == len({trial.folder for trial in trials})
    of_each_task = {task: sum(trial.task == task for trial in trials) for task in glue.TASKS}
    assert set(of_each_task.values()) == {8 * 3 + 2 * 3}, of_each_task


def test_each_trial_gets_one_row_and_a_second_call_resumes(
    glue: ModuleType, arguments: list[str], tmp_path: Path
) -> None:
    one_trial = [*arguments, "--recipes=default", "--tasks=rte", "--seeds=1"]
    assert glue.main(one_trial) == 0
    assert glue.main(one_trial) == 0
    assert glue.main([*one_trial, "--variant=blocks", "--set=prune.pattern=1x4"]) == 0
    rows = glue.read_rows_of(tmp_path / "work" / "glue.jsonl")
    assert [(row["recipe"], row["variant"]) for row in rows] == [("default", ""), ("default", "blocks")]
    teachers = sorted(path.name for path in (tmp_path / "work" / "teachers" / "rte").iterdir() if path.is_dir())
    assert teachers == ["0.0001x4-seed0", "0.0002x4-seed0", "0.0002x4-seed1", "0.0002x8-seed0", "0.0004x4-seed0"]
    assert rows[0]["teacher_setting"] == {"learning_rate": 2e-4, "epochs": 4}, "of equals the shorter one"
    assert set(rows[0]["student"]) == {"pick", "report", "train"}
    assert rows[0]["steps"] == dict.fromkeys(glue.STAGES, 3)
    assert rows[0]["cpu_seconds"].keys() == set(glue.STAGES)
    assert rows[0]["student"]["report"]["score"] == rows[0]["gap_train_report"]["student"] == 0.5
    assert str(tmp_path) not in json.dumps(rows), "a row tells nothing of this machine's folders"
    trial = tmp_path / "work" / "trials" / "rte" / "default-0.9-seed1"
    assert [path.parent.name for path in trial.rglob("*.safetensors")] == ["finetune"]


def test_a_failing_trial_does_not_stop_the_others(
    glue: ModuleType, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra_arguments = ["--recipes=default", "--tasks=rte", "--seeds=0,1", "--variant=wrong", "--set=fail=true"]
    assert glue.main([*arguments, *extra_arguments]) == 1
    output = capsys.readouterr().out
    assert "no such setting" in output
    assert "2 trials failed" in output
    assert not (tmp_path / "work" / "glue.jsonl").exists()


def test_two_calls_do_not_work_in_one_folder(
    glue: ModuleType, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "work").mkdir()
    with (tmp_path / "work" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert glue.main(arguments) == 1
    assert "another call works in" in capsys.readouterr().err


def test_nothing_starts_while_the_pause_file_exists(glue: ModuleType, arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "pause").touch()
    assert glue.main([*arguments, "--minutes=0.01"]) == 0
    assert not (tmp_path / "work" / "teachers").exists() or not list((tmp_path / "work").rglob("stage.json"))


def test_a_running_command_is_paused_and_resumed(glue: ModuleType, tmp_path: Path) -> None:
    clock = tmp_path / "clock"
    program = f"import time, pathlib\nwhile True: pathlib.Path({str(clock)!r}).write_text('x'); time.sleep(0.01)"
    runner = glue.Runner(tmp_path / "tool", tmp_path / "model", tmp_path, time.monotonic() + 60, (1e-4,), (1,))
    errors: list[BaseException] = []

    def run() -> None:
        try:
            runner.run_command([sys.executable, "-c", program], tmp_path / "log")
        except glue.TimeUp as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(clock.exists)
    (tmp_path / "pause").touch()
    wait_until(lambda: not ticks(clock))
    (tmp_path / "pause").unlink()
    wait_until(lambda: ticks(clock))
    (tmp_path / "pause").touch()
    wait_until(lambda: not ticks(clock))
    object.__setattr__(runner, "deadline", time.monotonic())
    thread.join(timeout=60)
    assert len(errors) == 1, "a stopped command is ended by the deadline too"


def test_the_table_has_means_over_seeds(glue: ModuleType) -> None:
    rows = []
    for seed, student in enumerate((0.8, 0.9)):
        scores = {"teacher": {"report": {"score": 1.0}}, "student": {"report": {"score": student}}}
        numbers = {"gap_train_report": {"teacher": 0.0, "student": 0.1}, "cpu_seconds": {"prune": 90, "distill": 30}}
        names = {"task": "rte", "recipe": "default", "variant": "", "sparsity": 0.9, "seed": seed}
        rows.append(names | scores | numbers | {"share_of_teacher": student})
    lines = glue.table([*rows, rows[0] | {"variant": "blocks"}]).splitlines()
    assert lines[2] == "| 90 % | rte | `default` | 2 | 100.0 ± 0.0 | 85.0 ± 7.1 | 85.0 % | 0.0 | 10.0 | 2 |"
    assert lines[3].startswith("| 90 % | rte | `default-blocks` | 1 | 100.0 | 80.0 |")


def ticks(clock: Path) -> bool:
    """Tell whether the file is still being written."""
    before = clock.stat().st_mtime_ns
    time.sleep(0.3)
    return clock.stat().st_mtime_ns != before


def wait_until(condition: Callable[[], bool]) -> None:
    """Return once the condition holds, or fail."""
    for _ in range(200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen")
