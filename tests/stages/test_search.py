"""The search for the fastest student within a drop of the score: which students it tries and finishes."""

from __future__ import annotations

from pathlib import Path

import pytest

from spdtool.errors import GateError, RecipeError
from spdtool.goals import shape as goal_shape
from spdtool.recipe.fields import Recipe
from spdtool.recipe.reading import build_recipe
from spdtool.stages.api import CompressionResult
from spdtool.stages.search import SPEEDUPS, compress_fastest


class FakeRuns:
    """Fake runs in which an n-fold speedup costs n - 1 points of the score.

    Args:
        fastest: largest speedup that any shape reaches.
    """

    def __init__(self, fastest: float = 100.0) -> None:
        self.fastest = fastest
        self.calls: list[tuple[str, str]] = []

    def compress(self, recipe: Recipe, folder: Path, until: str) -> CompressionResult:
        """Record the call; return scores that follow from the recipe."""
        self.calls.append((folder.name, until))
        if until == "teacher":
            return CompressionResult(folder, finished=True, teacher={"score": 0.9})
        size = recipe.goal.speedup or 10 * recipe.sparsity
        if size > self.fastest:
            raise RecipeError("no shape is so fast")
        assert recipe.given_teacher is not None
        student = {"score": 0.9 - 0.01 * (size - 1)}
        return CompressionResult(folder, finished=True, teacher={"score": 0.9}, student=student)


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a table of layer times in which the smallest shape is 11 times faster."""
    monkeypatch.setattr(goal_shape, "largest_speedup", lambda recipe: 11.0)


def recipe_of(max_drop: float, kind: str = "auto") -> Recipe:
    """Build a recipe whose only goal is the largest drop of the score."""
    return build_recipe("default", {"task": "demo", "goal.max_drop": max_drop, "goal.kind": kind})


def test_the_fastest_student_within_the_drop_is_finished_after_few_trials(tmp_path: Path) -> None:
    for max_drop in (0.3, 1.0, 2.2, 5.0, 50.0):
        runs = FakeRuns()
        result = compress_fastest(recipe_of(max_drop), tmp_path, "bench", runs.compress)
        best = max(speedup for speedup in SPEEDUPS if speedup <= 11 and speedup - 1 <= max_drop + 1e-9)
        assert result.run == tmp_path / "goals" / f"{best:g}x", max_drop
        assert runs.calls[0] == (tmp_path.name, "teacher")
        assert runs.calls[-1] == (f"{best:g}x", "bench"), max_drop
        trials = [call for call in runs.calls if call[1] == "finetune"]
        assert len(trials) <= 4, max_drop


def test_a_sparse_student_is_searched_among_sparsities(tmp_path: Path) -> None:
    result = compress_fastest(recipe_of(7.6, "sparse"), tmp_path, "bench", FakeRuns().compress)
    assert result.run.name == "0.85"  # 10 times the sparsity, less 1, is at most 7.6


def test_a_speedup_that_no_shape_reaches_is_passed_over(tmp_path: Path) -> None:
    result = compress_fastest(recipe_of(50), tmp_path, "bench", FakeRuns(fastest=3).compress)
    assert result.run.name == "3x"


def test_every_student_tried_is_named_if_none_keeps_its_score(tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"1\.25x loses 0\.25") as error:
        compress_fastest(recipe_of(0.1), tmp_path, "bench", FakeRuns().compress)
    assert error.value.exit_code == 3
