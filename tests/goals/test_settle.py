"""The choice of a shape for a goal is recorded: the same command reuses it, another goal chooses anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from spdtool import plugins
from spdtool.errors import PluginError, RecipeError
from spdtool.export.target import Target
from spdtool.goals import settle, zeros
from spdtool.goals.settle import adopt_recorded, needs_shape, put_shape, settle_goal, settle_sparsity
from spdtool.goals.shape import CHOICE, goal_key
from spdtool.goals.zeros import bisect_first, find_skipping_target
from spdtool.recipe.fields import Recipe, first_stage_using
from spdtool.recipe.reading import build_recipe, override, request_recipe
from spdtool.run.folder import Run, default_path
from spdtool.run.records import FamilyMember, LayerCosts, Ratio, ShapeChoice, ShapeProfile
from spdtool.run.storage import write_json

SHAPE = [(1, 32), (2, 64)]


def recipe_of(**goal: object) -> Recipe:
    """Build a recipe with the goal."""
    return build_recipe("default", {"task": "demo", **{f"goal.{name}": value for name, value in goal.items()}})


def choice_of(recipe: Recipe) -> ShapeChoice:
    """Make the record of a choice for the goal of a recipe."""
    return ShapeChoice(key=goal_key(recipe), goal="2x", shape=SHAPE, dense=(2, 64), table="abc", bytes=1)


def test_the_recorded_shape_is_adopted_only_for_the_same_goal() -> None:
    recipe = recipe_of(speedup=2)
    recorded = put_shape(recipe, SHAPE, "abc")
    adopted = adopt_recorded(recipe, recorded)
    assert adopted == recorded
    assert adopted.prune.shape == tuple(SHAPE)
    for other_recipe in (recipe_of(speedup=3), recipe_of(), recipe_of(speedup=2, batch=8)):
        assert adopt_recorded(other_recipe, recorded) == other_recipe
    # A goal that is only measured at the end does not change the shape.
    assert adopt_recorded(recipe_of(speedup=2, max_drop=1), recorded).prune.shape == tuple(SHAPE)


def test_the_students_on_the_way_are_recorded_and_adopted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(speedup=3, family=[2, 1.5])
    members = [
        FamilyMember(speedup=1.5, sparsity=0.25, expected=1.6),
        FamilyMember(speedup=2, sparsity=0.4, expected=2),
    ]
    choice = choice_of(recipe).model_copy(update={"family": tuple(members)})
    monkeypatch.setattr(settle, "choose_goal_shape", lambda *_: choice)
    run = Run(tmp_path, recipe)
    monkeypatch.setattr(run, "use_input", lambda _: tmp_path)
    settle_goal(run)
    assert run.recipe.prune.save_at == (0.25, 0.4)
    assert adopt_recorded(recipe, run.recipe) == run.recipe
    assert adopt_recorded(recipe_of(speedup=3), run.recipe).prune.save_at == ()
    assert put_shape(override(recipe, ["prune.save_at=0.1"]), SHAPE, "abc", members).prune.save_at == (0.1, 0.25, 0.4)


def test_sparsities_that_the_user_names_are_not_replaced_by_those_of_the_run() -> None:
    recorded = put_shape(recipe_of(speedup=2), SHAPE, "abc")
    assert adopt_recorded(override(recipe_of(speedup=2), ["prune.save_at=0.1"]), recorded).prune.save_at == (0.1,)


def test_a_shape_is_chosen_once_for_each_goal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(speedup=2)
    speedups: list[float | None] = []

    def choose(recipe: Recipe, teacher: Path) -> ShapeChoice:
        speedups.append(recipe.goal.speedup)
        return choice_of(recipe)

    monkeypatch.setattr(settle, "choose_goal_shape", choose)
    run = Run(tmp_path, recipe)
    monkeypatch.setattr(run, "use_input", lambda _: tmp_path)
    settle_goal(run)
    settle_goal(run)
    assert speedups == [2]
    assert run.recipe.prune.shape == tuple(SHAPE)
    assert Run.open(tmp_path).recipe == run.recipe
    assert Run.open(tmp_path).recipe.goal.table == "abc"
    assert needs_shape(put_shape(recipe_of(speedup=3), SHAPE, "abc"), tmp_path)


def test_an_unreadable_choice_leaves_the_shape_of_the_recipe(tmp_path: Path) -> None:
    recipe = put_shape(recipe_of(speedup=2), SHAPE, "abc")
    (tmp_path / CHOICE).write_text("{")
    assert not needs_shape(recipe, tmp_path)
    write_json(tmp_path / CHOICE, choice_of(recipe))
    assert not needs_shape(recipe, tmp_path)


def test_the_sparsity_of_a_goal_is_recorded_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratio = Ratio(median=2.1, low=2, high=2.2)
    monkeypatch.setattr(settle, "choose_sparsity", lambda recipe: (0.8, ratio))
    recipe = recipe_of(speedup=2, kind="sparse")
    settled = settle_sparsity(recipe, tmp_path / "run")
    assert settled.sparsity == 0.8
    assert Run.open(tmp_path / "run").recipe == settled
    assert adopt_recorded(recipe, settled) == settled
    small = recipe_of(speedup=2)
    assert settle_sparsity(small, tmp_path / "other") == small


def test_a_student_of_blocks_is_pruned_and_trained_for_int8_products() -> None:
    recipe = recipe_of(speedup=2, kind="blocks")
    assert (recipe.prune.pattern, recipe.finetune.quantize) == ("1x4", "int8")
    flags = {"task": "demo", "goal.speedup": 2, "goal.kind": "blocks", "prune.pattern": "4x4"}
    recipe = build_recipe("default", flags, ["finetune.quantize=off"])
    assert (recipe.prune.pattern, recipe.finetune.quantize) == ("4x4", "off")
    with pytest.raises(RecipeError, match="needs a pattern of blocks"):
        build_recipe("default", flags | {"prune.pattern": "unstructured"})
    with pytest.raises(RecipeError, match=r"goal.kind = 'blocks' is not faster in cuda"):
        build_recipe("default", flags | {"goal.runtime": "cuda", "goal.profile": "table.json"})


def test_a_sparse_student_and_one_of_blocks_are_timed_by_different_targets(
    clean_plugins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, rounds in (("skips-float", False), ("skips-int8", True)):
        target = type("Skipping", (Target,), {"exported_by_default": True, "rounds_arithmetic": rounds})
        plugins.targets.register(name)(target)
    monkeypatch.setattr(zeros, "library_targets", lambda: ["skips-float", "skips-int8"])
    for kind, name in (("sparse", "skips-float"), ("blocks", "skips-int8")):
        assert find_skipping_target(recipe_of(speedup=2, kind=kind)).name == name, kind
    plugins.targets.unregister("skips-int8")
    with pytest.raises(PluginError, match="skips zeros|skip zeros"):
        find_skipping_target(recipe_of(speedup=2, kind="blocks"))


def test_bisection_finds_the_first_candidate_that_holds() -> None:
    candidates = (0.5, 0.6, 0.7, 0.8, 0.9)
    for least in (0.1, 0.5, 0.65, 0.9, 0.95):
        expected = next((candidate for candidate in candidates if candidate >= least), None)
        assert bisect_first(candidates, lambda candidate, least=least: candidate >= least) == expected, least


def test_sparsity_and_a_goal_exclude_each_other() -> None:
    with pytest.raises(RecipeError, match="a sparsity and a goal were given"):
        request_recipe("demo", sparsity=0.9, goal={"speedup": 2})
    with pytest.raises(RecipeError, match="prune.shape"):
        build_recipe("default", {"task": "demo", "goal.speedup": 2, "prune.heads": 0.5})


def test_a_run_with_a_goal_is_named_after_it_and_its_teacher_does_not_depend_on_it() -> None:
    assert default_path(recipe_of(speedup=3, max_mb=20)).name == "demo-3x-20MB"
    assert first_stage_using("goal.speedup") == "prune"
    assert first_stage_using("goal.max_drop") == "bench"


def test_the_plan_names_the_machine_of_a_given_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = LayerCosts(unit="ms", heads=[0.1, 0.6], neurons={0: 0.1, 64: 1.1}, outside=0.2)
    values = {"spdtool": "1", "runtime": "web", "version": "1.2", "processor": "a phone", "threads": 1, "batch": 1}
    sizes = {"length": 64, "family": "bert", "width": 32, "heads": 1, "neurons": 64, "rounds": 6, "costs": costs}
    profile = ShapeProfile.model_validate(values | sizes)
    recipe = recipe_of(speedup=2, runtime="web", profile="table.json")
    foreseen = choice_of(recipe).model_copy(update={"profile": profile})
    monkeypatch.setattr(settle, "build_empty_teacher", lambda *_: None)
    monkeypatch.setattr(settle, "foresee_shape", lambda *_, **__: foreseen)
    lines = settle.foresee_recipe(recipe, tmp_path, "guess", measure=False)[1]
    assert "the times in table.json are of web 1.2 on a phone, not of this machine" in lines
    monkeypatch.setattr(settle, "is_of_this_machine", lambda _: True)
    assert "phone" not in str(settle.foresee_recipe(recipe, tmp_path, "guess", measure=False)[1])
