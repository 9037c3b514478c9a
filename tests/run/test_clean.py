"""Cleaning a run removes the named stages and no file that spdtool did not write."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from spdtool.errors import Corrupt, RunError, RunLocked, StageMissing, UnknownName
from spdtool.run.clean import clean_run, plan_cleaning
from spdtool.run.folder import Run
from spdtool.run.lock import lock_folder


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {".lock"}


@pytest.fixture
def run(distilled: Path, tmp_path: Path) -> Run:
    """A run with a teacher and a pruned student, and a bundle as an export leaves it."""
    finished_run = Run.open(shutil.copytree(distilled, tmp_path / "run"))
    shutil.rmtree(finished_run.path / "distill")
    bundle = finished_run.path / "export/bundle"
    bundle.mkdir(parents=True)
    (bundle / "manifest.json").write_text("{}")
    return finished_run


def test_cleaning_removes_everything_except_the_named_exceptions(run: Run) -> None:
    before = files_below(run.path)
    cleaning = plan_cleaning(run, ["teacher", "bundle"])
    assert files_below(run.path) == before, "planning removes nothing"
    assert cleaning.stages == ["prune"]
    assert cleaning.bytes == sum(path.stat().st_size for path in (run.path / "prune").rglob("*"))
    clean_run(run, cleaning)
    assert files_below(run.path) == {name for name in before if not name.startswith("prune/")}
    assert not (run.path / "prune").exists()
    with pytest.raises(StageMissing):
        run.record("prune")
    clean_run(run, plan_cleaning(run, ["bundle"]))
    assert files_below(run.path) == {"run.json", "export/bundle/manifest.json"}


def test_files_not_written_by_spdtool_stay(run: Run, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/weights").write_text("of another")
    foreign_names = ["notes.txt", "prune/notes.txt", "prune/more/notes.txt", "thesis/chapter.tex"]
    for name in foreign_names:
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).write_text("years of work")
    (run.path / "teacher/link").symlink_to(tmp_path / "elsewhere")
    model = run.path / "prune/model.safetensors"
    model.rename(tmp_path / "elsewhere/model")
    model.symlink_to(tmp_path / "elsewhere/model")
    cleaning = plan_cleaning(run, ["bundle"])
    unknown = {str(path.relative_to(run.path)) for path in cleaning.unknown}
    assert unknown == {"prune/notes.txt", "prune/more/notes.txt", "teacher/link", "prune/model.safetensors"}
    clean_run(run, cleaning)
    for name in foreign_names:
        assert (run.path / name).read_text() == "years of work", name
    assert (tmp_path / "elsewhere/weights").is_file()
    assert (tmp_path / "elsewhere/model").is_file()
    assert not (run.path / "prune/config.json").exists()


def test_a_stage_in_progress_goes_with_its_state(run: Run) -> None:
    state = run.partial_folder("distill") / "state/step-1"
    state.mkdir(parents=True)
    (state / "state.json").write_text("{}")
    assert plan_cleaning(run, ["teacher", "prune", "distill"]).folders == []
    cleaning = plan_cleaning(run, ["teacher", "prune"])
    assert cleaning.bytes == 2
    clean_run(run, cleaning)
    assert not run.partial_folder("distill").exists()


def test_nothing_is_removed_under_another_process(run: Run) -> None:
    before = files_below(run.path)
    with lock_folder(run.path), pytest.raises(RunLocked):
        clean_run(run, plan_cleaning(run, ["bundle"]))
    assert files_below(run.path) == before


def test_unknown_names_to_keep_are_refused(run: Run) -> None:
    with pytest.raises(UnknownName, match="bundel"):
        plan_cleaning(run, ["bundel"])
    with pytest.raises(RunError, match="nothing is to be kept"):
        plan_cleaning(run, [])
    (run.path / "export/bundle/manifest.json").unlink()
    (run.path / "export/bundle").rmdir()
    with pytest.raises(RunError, match="has no bundle to keep"):
        plan_cleaning(run, ["bundle"])
    (run.path / "prune/stage.json").write_text("{")
    with pytest.raises(Corrupt):
        plan_cleaning(run, ["teacher"])


def test_the_command_lists_the_removals_and_asks_first(run: Run, spdtool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files_below(run.path)
    arguments = ("clean", run.path, "--keep", "bundle")
    for bad_arguments, message in (
        (("clean",), "give a run folder or --cache"),
        (("clean", run.path), "--keep is missing"),
        (("clean", "--cache", "--keep", "bundle"), "--keep belongs to a run"),
        (arguments, "add --yes"),
    ):
        result = spdtool(*bad_arguments)
        assert result.exit_code == 2, bad_arguments
        assert message in " ".join(result.stderr.split()), bad_arguments
    assert "prune" in spdtool(*arguments, "--dry-run").stdout
    monkeypatch.setattr("spdtool.console.can_ask", lambda: True)
    monkeypatch.setattr("typer.confirm", lambda *_, **__: False)
    assert spdtool(*arguments).exit_code == 0
    assert files_below(run.path) == before
    result = spdtool(*arguments, "--yes")
    assert result.exit_code == 0, result.output
    assert "removed" in result.stdout
    assert files_below(run.path) == {"run.json", "export/bundle/manifest.json"}
    assert "nothing to remove" in spdtool(*arguments).stdout


def test_the_cache_is_measured_and_emptied(spdtool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    entry = tmp_path / "spdtool/tokens/abc"
    entry.mkdir(parents=True)
    (entry / "contents.json").write_text("{}")
    (entry / "ids").write_bytes(bytes(98))
    (tmp_path / "spdtool/notes.txt").write_text("not an entry")
    (tmp_path / "spdtool/tokens/other").mkdir()
    assert "1 entries, 100 bytes" in spdtool("clean", "--cache", "--dry-run").stdout
    assert "100 bytes in 1 entries" in spdtool("doctor").stdout
    assert spdtool("clean", "--cache", "--yes").exit_code == 0
    assert not entry.exists()
    assert (tmp_path / "spdtool/notes.txt").is_file()
    assert (tmp_path / "spdtool/tokens/other").is_dir()
