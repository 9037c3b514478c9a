"""Finished targets of an export in progress: committed one by one, and taken over only as they were."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from spdtool.errors import Stopped
from spdtool.export import finished as finished_module
from spdtool.export.bundle.manifest import seal
from spdtool.export.finished import FinishedTargets
from spdtool.export.target import ChosenTarget, Target
from spdtool.recipe.fields import Recipe
from spdtool.recipe.reading import override
from spdtool.run.folder import Run, Stage
from spdtool.run.records import DataRecord, ExportedModel, TargetExport
from spdtool.run.storage import write_json

FIGURES = ExportedModel(files=["model.onnx"], bytes=5, zeros=1, size=3, sparsity=1 / 3, positions=64)
EXPORTED = TargetExport(student=FIGURES, teacher=FIGURES)
REFUSED = "its logits differ"
FILES = ("teacher/model.onnx", "student/model.onnx", "second/student/model.onnx")
CHOSEN = ("first", "second", "third")


class Stub(Target):
    """A target that nobody calls."""


def choose(names: Sequence[str] = CHOSEN, kind: type[Target] = Stub) -> list[ChosenTarget]:
    choices = []
    for name in names:
        target = kind()
        target.name = name
        choices.append(ChosenTarget(name, target, False, "" if name == names[0] else name))
    return choices


def open_run(path: Path, *sets: str, rows: str = "rows") -> Run:
    run = Run(path, override(Recipe(task="cola"), sets))
    if not run.done("teacher"):
        with run.stage("teacher"):
            pass
    run.use_input("teacher")
    run.record_data(DataRecord(rows={"dev": 3}, digest=rows))
    return run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run whose export was stopped after its three targets, the last of which was refused."""
    run = open_run(tmp_path / "run")
    finished = FinishedTargets(run, choose(), ["cpu"])
    with (
        pytest.raises(Stopped, match="3 of 3 targets are finished"),
        finished.reported(),
        run.stage("export", finished.restore) as stage,
    ):
        for choice in finished.chosen:
            assert finished.find(choice.name) is None
            write_files(stage, choice)
            finished.save(choice, REFUSED if choice.name == "third" else EXPORTED)
        (stage.folder / "bundle").mkdir()
        raise KeyboardInterrupt
    return run


def write_files(stage: Stage, choice: ChosenTarget) -> None:
    for name in FILES:
        file = stage.folder / name
        if choice.prefix == ("second" if name.startswith("second/") else "") and choice.name != "third":
            file.parent.mkdir(parents=True)
            file.write_text(name)


def restore(
    run: Run, choices: list[ChosenTarget] | None = None, providers: Sequence[str] = ("cpu",)
) -> dict[str, object]:
    """Begin the export again, stop it at once, and return what it has taken over, the names of folders under ``."""
    finished = FinishedTargets(run, choices or choose(), providers)
    outcomes: dict[str, object] = {}
    with pytest.raises(ZeroDivisionError), run.stage("export", finished.restore) as stage:
        for choice in finished.chosen:
            outcome = finished.find(choice.name)
            if outcome is not None:
                outcomes[choice.name] = outcome
        outcomes[""] = sorted(path.name for path in stage.folder.iterdir())
        raise ZeroDivisionError
    return outcomes


def test_what_is_finished_is_taken_over_and_nothing_else_stays(run: Run) -> None:
    expected = {"first": EXPORTED, "second": EXPORTED, "third": REFUSED}
    for _ in range(2):
        outcomes = restore(open_run(run.path))
        assert outcomes.pop("") == ["second", "state", "student", "teacher"]
        assert outcomes == expected


def test_other_settings_rows_code_or_versions_make_a_target_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run.path

    def count(*sets: str, rows: str = "rows", kind: type[Target] = Stub, providers: Sequence[str] = ("cpu",)) -> int:
        """Return how many targets would be taken over."""
        finished = FinishedTargets(open_run(path, *sets, rows=rows), choose(kind=kind), providers)
        finished._stage = Stage("export", run.partial_folder("export"), "")
        return sum(finished._restore_outcome(choice) is not None for choice in finished.chosen)

    assert count() == 3
    assert count('export.skip=["fourth"]', "finetune.epochs=1", "save_minutes=1") == 3
    assert count("export.opset=20") == 0
    assert count("seed=1") == 0
    assert count(rows="others") == 0
    assert count(providers=("cpu", "cuda")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(finished_module, "describe_processor", lambda: "another")
        assert count() == 0
    with monkeypatch.context() as patch:
        patch.setattr("importlib.metadata.version", lambda _: "another")
        assert count() == 0
    with monkeypatch.context() as patch:
        patch.setattr(finished_module, "_hash_package", lambda name: "other code" if name == "spdtool" else "")
        assert count() == 0
    record = path / "teacher/stage.json"
    record.write_text(record.read_text("utf-8") + " ", "utf-8")
    assert count() == 0


def test_a_target_whose_place_has_changed_is_made_again(run: Run) -> None:
    outcomes = restore(open_run(run.path), choose(("second", "first", "third")))
    assert outcomes == {"": ["state"], "third": REFUSED}


def test_a_target_that_is_no_longer_asked_for_is_removed(run: Run) -> None:
    outcomes = restore(open_run(run.path), choose(("first", "third")))
    assert outcomes == {"": ["state", "student", "teacher"], "first": EXPORTED, "third": REFUSED}
    assert sorted(path.name for path in (run.partial_folder("export") / "state").iterdir()) == [
        "first.json",
        "third.json",
    ]


def test_damage_makes_a_target_again_and_only_that(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    partial = run.partial_folder("export")
    record = partial / "state/second.json"
    fields = json.loads(record.read_text("utf-8"))
    model = partial / "second/student/model.onnx"

    def flip() -> None:
        model.write_bytes(bytes([model.read_bytes()[0] ^ 1]) + model.read_bytes()[1:])

    def add() -> None:
        (partial / "second/student/more.onnx").write_text("more")

    def change_figure() -> None:
        changed = json.loads(record.read_text("utf-8"))
        changed["outcome"]["student"]["bytes"] += 1
        record.write_text(json.dumps(changed), "utf-8")

    damages = {
        "flip": (flip, "its files have changed since"),
        "cut": (lambda: model.write_bytes(b""), "its files have changed since"),
        "remove": (model.unlink, "its files have changed since"),
        "add": (add, "its files have changed since"),
        "figure": (change_figure, "second.json is damaged"),
        "half a record": (lambda: record.write_text("{", "utf-8"), "second.json cannot be read"),
        "other version": (lambda: write_json(record, seal({"files": fields["files"]})), "is of another version"),
    }
    for name, (damage, reason) in damages.items():
        model.parent.mkdir(parents=True, exist_ok=True)
        model.write_text("second/student/model.onnx", "utf-8")
        write_json(record, fields)
        damage()
        assert set(restore(open_run(run.path))) == {"first", "third", ""}, name
        assert not model.parent.exists(), name
        output = capsys.readouterr().out
        assert "second: exported before this command was stopped, and made again: " in output, name
        assert reason in output, name


def test_without_a_finished_target_ctrl_c_is_what_it_was(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    finished = FinishedTargets(run, choose(), ["cpu"])
    with pytest.raises(KeyboardInterrupt) as error, finished.reported(), run.stage("export", finished.restore):
        raise KeyboardInterrupt
    assert not isinstance(error.value, Stopped)
    assert not run.partial_folder("export").exists()


def test_the_code_of_a_plugin_counts_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "some_plugin"
    folder.mkdir()
    for name in ("__init__", "helper"):
        (folder / f"{name}.py").write_text("", "utf-8")
    (folder / "single.py").write_text("", "utf-8")
    package, single = ModuleType("some_plugin"), ModuleType("single")
    package.__file__, package.__path__ = str(folder / "__init__.py"), [str(folder)]
    single.__file__ = str(folder / "single.py")
    for module in (package, single):
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def hash_code(name: str) -> list[str]:
        finished_module._hash_package.cache_clear()
        return finished_module._hash_code(type("Plugin", (Target,), {"__module__": name})())

    before = {name: hash_code(name) for name in ("some_plugin.target", "single", "builtins")}
    (folder / "helper.py").write_text("changed = True", "utf-8")
    after = {name: hash_code(name) for name in before}
    assert {name for name in before if before[name] != after[name]} == {"some_plugin.target"}
    assert before["single"][0] != before["builtins"][0]
