"""The training log in accelerate's trackers: the logged values, and a missing package is refused early."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from accelerate import tracking
from accelerate.tracking import GeneralTracker

from spdtool.errors import RecipeError, UnknownName
from spdtool.run.folder import Run
from spdtool.stages.plan import check_run
from spdtool.stages.teacher import teacher
from spdtool.training import trackers

MakeRun = Callable[..., Run]


class Recorder(GeneralTracker):
    """A tracker that records the logged values."""

    name = "recorder"
    requires_logging_directory = True
    rows: ClassVar[list[tuple[int, dict[str, float]]]] = []
    finished: ClassVar[int] = 0

    def __init__(self, run_name: str, logging_dir: str) -> None:
        super().__init__()
        self.run_name, self.logging_dir = run_name, logging_dir

    @property
    def tracker(self) -> Any:
        return self

    def start(self) -> None:
        Path(self.logging_dir, self.run_name).write_text("started")

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        assert step is not None
        Recorder.rows.append((step, values))

    def finish(self) -> None:
        Recorder.finished += 1


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["recorder"])
    Recorder.rows, Recorder.finished = [], 0
    return Recorder


def test_a_tracker_gets_the_numbers_of_the_log(toy_run: MakeRun, recorder: type[Recorder]) -> None:
    run = toy_run("log=recorder")
    teacher(run)
    names = {name for _, values in recorder.rows for name in values}
    assert {"losses/loss", "learning_rate", "dev/score", "dev/accuracy", "train/score"} <= names
    assert [step for step, _ in recorder.rows] == sorted(step for step, _ in recorder.rows)
    assert recorder.rows[-1][0] == run.training_result("teacher").steps
    assert recorder.finished == 1
    assert (run.path / "logs/teacher").read_text() == "started"
    assert not any(file.path.startswith("logs") for file in run.record("teacher").files)


def test_the_log_changes_no_weight(toy_run: MakeRun, recorder: type[Recorder]) -> None:
    plain, logged = toy_run(folder="plain"), toy_run("log=recorder", folder="logged")
    for run in (plain, logged):
        teacher(run)
    weights = [(run.path / "teacher/model.safetensors").read_bytes() for run in (plain, logged)]
    assert weights[0] == weights[1]
    Run.for_recipe(plain.path, logged.recipe)


def test_trackers_that_cannot_log_are_refused_before_training(
    toy_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "get_available_trackers", list)
    with pytest.raises(RecipeError, match="log=tensorboard: the package") as error:
        check_run(toy_run("log=tensorboard"))
    assert "pip install tensorboard" in str(error.value.hint)
    with pytest.raises(UnknownName, match="tensorbord"):
        check_run(toy_run("log=tensorbord"))
