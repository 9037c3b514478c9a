"""The recipe: reading, overriding, refusing, saving, comparing."""

from __future__ import annotations

import json
from pathlib import Path

import pydantic
import pytest

from spdtool.errors import RecipeError, UnknownName
from spdtool.recipe import STAGES, TRAINING
from spdtool.recipe import reading as recipes
from spdtool.recipe.fields import Recipe, flatten
from spdtool.recipe.reading import (
    build_recipe,
    list_fields,
    override,
    parse_recipe,
    parse_value,
    read_settings,
    read_task_settings,
    request_recipe,
)
from spdtool.recipe.training import Teacher, Training


def test_the_default_recipe_changes_only_the_fields_of_its_file() -> None:
    recipe = build_recipe("default", {"task": "cola"})
    file_settings = flatten(read_settings("default"))
    assert {name: value for name, value, _ in recipe.diff(Recipe(task="cola"))}.items() <= file_settings.items()


def test_the_default_recipe_has_none_of_the_known_defects() -> None:
    recipe = build_recipe("default", {"task": "cola"})
    for section in (recipe.prune, recipe.distill, recipe.finetune):
        assert section.loss.attention_on == "scores"
        assert section.loss.mask_padding
        assert not section.loss.per_label
        assert section.loss.regression_hardness == 1
        assert not section.grafting.stand_in_dropout
        assert section.clip_over == "trained"
    assert recipe.finetune.grafting.start == 1, "the student is trained alone in the end"


def test_every_field_has_a_help_text() -> None:
    listed = dict(list_fields())
    assert set(listed) == set(Recipe().values())
    assert [name for name, text in listed.items() if not text.strip()] == []


def test_every_packaged_recipe_resolves_and_says_what_it_is() -> None:
    for name in recipes.recipe_names():
        assert build_recipe(name).name == name
        assert len(recipes.describe_recipe(name)) > 10, name


def test_the_reference_recipe_has_the_numbers_of_the_published_code() -> None:
    recipe = build_recipe("reference")
    assert (recipe.prune.epochs, recipe.distill.epochs, recipe.finetune.epochs) == (30, 10, 20)
    assert (recipe.prune.events, recipe.prune.schedule, recipe.prune.scope) == (12, "cubic", "matrix")
    assert recipe.prune.learning_rate == recipe.distill.learning_rate == 6.4e-4
    assert recipe.distill.learning_rate * recipe.distill.final_learning_rate == pytest.approx(
        recipe.finetune.learning_rate
    )
    assert recipe.teacher.learning_rate == 3e-5
    for section in (recipe.prune, recipe.distill, recipe.finetune):
        assert (section.weight_decay, section.warmup, section.clip, section.clip_over) == (0, 0, 1, "all")
        assert (section.loss.logits, section.loss.hidden, section.loss.attention) == (1, 1, 1)
        assert section.train == "layers"
    assert (recipe.prune.grafting.start, recipe.distill.grafting.start, recipe.finetune.grafting.start) == (0.8, 0.8, 1)


def test_flags_override_the_file_and_assignments_override_flags(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("seed = 3\nsparsity = 0.5\n[prune]\nepochs = 7\nloss = { hidden = 0.5 }\n")
    recipe = build_recipe(str(file), {"task": "cola", "seed": 4, "data": None}, ["prune.epochs=9", "sparsity=0.6"])
    assert (recipe.name, recipe.seed, recipe.sparsity, recipe.prune.epochs) == ("mine", 4, 0.6, 9)
    assert recipe.prune.loss.hidden == 0.5
    assert recipe.data is None, "a flag that was not given must not overwrite anything"


def test_task_settings_are_overridden_by_the_recipe() -> None:
    task_settings = flatten(read_task_settings("demo"))
    assert task_settings, "the embedded task has a file of its own"
    values = build_recipe("default", {"task": "demo"}).values()
    recipe_settings = flatten(read_settings("default"))
    assert {name: values[name] for name in task_settings} == task_settings | {
        name: recipe_settings[name] for name in task_settings.keys() & recipe_settings.keys()
    }
    assert build_recipe("reference", {"task": "demo"}).prune.epochs == build_recipe("reference").prune.epochs
    assert build_recipe("default", {"task": "demo"}, ["teacher.learning_rate=1e-9"]).teacher.learning_rate == 1e-9
    assert build_recipe("default", {"task": "cola"}).teacher == Recipe().teacher


def test_values_are_read_as_toml_or_else_as_text() -> None:
    values = {
        "3": 3,
        "1e-4": 1e-4,
        "true": True,
        "none": None,
        "None": None,
        "[1, 2]": [1, 2],
        '"a b"': "a b",
        "runs/x": "runs/x",
        "": "",
    }
    for text, value in values.items():
        assert parse_value(text) == value, text


def test_a_bad_setting_is_refused_by_name() -> None:
    settings: list[tuple[str, type[RecipeError], str]] = [
        ("prune.epochz=3", UnknownName, "prune.epochz"),
        ("prun.epochs=3", UnknownName, "prun"),
        ("seed.x=3", RecipeError, "seed"),
        ("prune.epochs", RecipeError, "field=value"),
        ("sparsity=1", RecipeError, "sparsity"),
        ("sparsity=1.5", RecipeError, "sparsity"),
        ("sparsity=-0.1", RecipeError, "sparsity"),
        ("sparsity=much", RecipeError, "sparsity"),
        ("sparsity=nan", RecipeError, "sparsity"),
        ("prune.batch_size=0", RecipeError, "prune.batch_size"),
        ("prune.scope=matrixx", RecipeError, "prune.scope"),
        ("prune.grafting.start=1.2", RecipeError, "prune.grafting.start"),
        ("prune.learning_rate=inf", RecipeError, "prune.learning_rate"),
        ("prune.epochs=inf", RecipeError, "prune.epochs"),
    ]
    for assignment, error, field in settings:
        with pytest.raises(error) as raised:
            build_recipe("default", {"task": "cola"}, [assignment])
        assert field in raised.value.message + str(raised.value.hint), assignment


def test_unknown_names_offer_near_matches() -> None:
    with pytest.raises(UnknownName) as error:
        build_recipe("default", {}, ["prune.epoch=3"])
    assert "prune.epochs" in error.value.near
    with pytest.raises(UnknownName) as error:
        build_recipe("referense")
    assert error.value.near == ["reference"]


def test_an_invalid_toml_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_bytes(b"sparsity = [")
    with pytest.raises(RecipeError, match="not valid TOML"):
        build_recipe(str(file))
    file.write_bytes(b"name = '\xff'")
    with pytest.raises(RecipeError, match="not valid TOML"):
        build_recipe(str(file))


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(pydantic.ValidationError):
        Recipe().seed = 3  # type: ignore[misc]


def test_a_recipe_survives_json(tmp_path: Path) -> None:
    recipe = build_recipe("reference", {"task": "local", "text": ("a", "b"), "seed": 3})
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"recipe": recipe.model_dump(mode="json")}))
    assert recipes.load_recipe(file) == recipe
    assert parse_recipe(recipe.model_dump()) == recipe


def test_amend_changes_only_the_given_fields() -> None:
    before = build_recipe("default", {"task": "cola"})
    after = override(before, ["finetune.epochs=3"])
    assert [name for name, _, _ in after.diff(before)] == ["finetune.epochs"]
    assert override(before, []) == before
    with pytest.raises(UnknownName):
        override(before, ["finetune.epoch=3"])


def test_a_smoke_recipe_has_few_steps() -> None:
    recipe = build_recipe("default", {"task": "cola", "smoke": True})
    assert recipe.smoke
    assert all(recipe.section(s).length(10_000).steps <= 4 for s in STAGES[:4])  # type: ignore[attr-defined]
    assert override(recipe, ["smoke=true"]).smoke


def test_epochs_scale_with_the_data_and_report_the_reason() -> None:
    cases = [
        (Training(epochs=3, batch_size=8), 20, 3, 9, "recipe"),
        (Training(epochs=0.5, batch_size=8), 32, 0.5, 2, "recipe"),
        (Training(steps=2000), 32_000, 2, 2000, "2000 steps"),
        (Training(steps=2000), 320_000, 2, 20_000, "min_epochs"),
        (Training(steps=2000), 320, 10, 100, "max_epochs"),
        (Training(epochs=3, max_steps=5, batch_size=8), 20, 3, 5, "recipe"),
        (Training(epochs=0), 20, 0, 0, "recipe"),
    ]
    for section, rows, epochs, steps, reason in cases:
        length = section.length(rows)
        case = f"{section.epochs} epochs or {section.steps} steps on {rows} rows"
        assert (length.epochs, length.steps) == (epochs, steps), case
        assert length.steps_per_epoch == -(-rows // section.batch_size), case
        assert reason in length.reason, case


def test_a_limit_on_steps_is_reported() -> None:
    length = Training(epochs=3, max_steps=5, batch_size=8).length(20)
    assert length.reason == "as the recipe says; at most 5 steps"


def test_a_stage_starts_from_defaults_of_its_own_and_shares_the_descriptions() -> None:
    recipe = Recipe()
    assert (recipe.teacher.steps, recipe.prune.steps, recipe.distill.steps) == (1200, 4000, 2000)
    assert (recipe.prune.max_epochs, recipe.finetune.warmup, recipe.distill.initial_learning_rate) == (20, 0, 0.5)
    assert Teacher(steps=7).steps == 7, "a value that is given wins"
    described = dict(list_fields())
    for name, text in described.items():
        section, _, field = name.partition(".")
        if section in TRAINING and field in Training.model_fields:
            assert text == described[f"teacher.{field}"], name


def test_a_recipe_lists_the_phases_with_grafting() -> None:
    grafted = {"default": (), "spd": ("prune", "distill"), "theseus": ("prune", "distill"), "gmp": ()}
    for name, phases in grafted.items():
        assert build_recipe(name).grafted_phases == phases, name
    jump = ["distill.grafting.schedule=constant-then-linear-with-gap", "distill.grafting.base=0.5"]
    assert build_recipe("default", sets=jump).grafted_phases == ("distill",)


def test_a_request_makes_existing_paths_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    recipe = request_recipe("CoLA", model="model", teacher="hub/name", sets=["student=model"])
    assert (recipe.task, recipe.model, recipe.student) == ("cola", str(tmp_path / "model"), str(tmp_path / "model"))
    assert recipe.given_teacher == "hub/name"


def test_shared_fields_leave_out_settings_without_effect_on_the_result() -> None:
    first, second = Recipe(save_minutes=0, name="x"), Recipe(save_minutes=5, name="y", device="cpu")
    assert first.shared_fields() == second.shared_fields()
    assert Recipe(seed=1).shared_fields() != Recipe(seed=2).shared_fields()
    assert Recipe(sparsity=0.5).shared_fields() != Recipe(sparsity=0.6).shared_fields()


def test_the_default_budget_follows_the_coarsest_storage() -> None:
    budgets = {("fp16", "fp16"): 0.002, ("fp32", "fp32"): 0.001, ("fp32", "int8"): 0.005, ("int8", "fp16"): 0.005}
    for (values, embeddings), rounded in budgets.items():
        sets = [f"export.values={values}", f"export.embeddings={embeddings}"]
        section = build_recipe("default", {}, sets).export
        assert section.allowed_change(rounds=False) == 0.001, sets
        assert section.allowed_change(rounds=True, storage=(values, embeddings)) == rounded, sets
        section = build_recipe("default", {}, [*sets, "export.budget=0.5"]).export
        assert section.allowed_change(rounds=True, storage=(values, embeddings)) == 0.5, sets


def test_an_unknown_storage_is_refused() -> None:
    with pytest.raises(RecipeError, match="export.values = 'int4'"):
        build_recipe("default", {}, ["export.values=int4"])


def test_a_list_field_accepts_one_value_or_comma_separated_values() -> None:
    values: dict[str, tuple[object, ...]] = {
        "export.optional=nosuch": ("nosuch",),
        "export.optional=a, b": ("a", "b"),
        'export.optional=["a"]': ("a",),
        "export.optional=": (),
        "export.optional=[]": (),
        "bench.batches=4": (4,),
        "bench.batches=1,8": (1, 8),
        "bench.threads=2": (2,),
        "prune.save_at=0.5,0.8": (0.5, 0.8),
        "text=premise,hypothesis": ("premise", "hypothesis"),
    }
    for assignment, value in values.items():
        section, _, field = assignment.split("=")[0].rpartition(".")
        recipe = build_recipe("default", sets=[assignment])
        assert getattr(recipe.section(section) if section else recipe, field) == value, assignment


def test_a_list_of_the_wrong_type_is_refused_with_an_example() -> None:
    for assignment in ("bench.padded=8", "bench.padded=[8, 128]", "bench.batches=a"):
        with pytest.raises(RecipeError) as error:
            build_recipe("default", sets=[assignment])
        assert "for example --set bench." in str(error.value.hint), assignment
        assert "'[" in str(error.value.hint), assignment


def test_every_value_that_a_field_lists_can_be_given_as_an_assignment() -> None:
    """Except `none`, which an assignment reads as None."""
    sections = {"Recipe": Recipe.model_json_schema(), **Recipe.model_json_schema()["$defs"]}
    listed = 0
    for section, schema in sections.items():
        for name, field in schema["properties"].items():
            for value in field.get("enum", ()):
                assert parse_value(value) == value, f"{section}.{name} cannot be set to {value}"
                listed += 1
    assert listed > 40
