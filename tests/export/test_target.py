"""The base class of targets, their registration, and the targets that a recipe requests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from spdtool import plugins
from spdtool.errors import PluginError, RecipeError, UnknownName
from spdtool.export.target import (
    StorageFormats,
    Target,
    get_target,
    optional_names,
    optional_targets,
    required_targets,
)
from spdtool.recipe.delivery import Export
from spdtool.recipe.fields import Recipe

pytestmark = pytest.mark.usefixtures("clean_plugins")


class StudentOnly(Target):
    """A target for the student alone, which rounds weights."""

    roles = ("student",)
    rounds_weights = True
    exported_by_default = True


def test_defaults_fit_an_unrounded_onnx_file() -> None:
    target = Target()
    assert target.roles == ("teacher", "student")
    assert target.providers == ("cpu", "cuda")
    assert (target.rounds_weights, target.rounds_arithmetic, target.calibrates) == (False, False, False)
    assert not target.exported_by_default
    assert target.libraries(Path("folder")) == []
    assert target.properties(Path("folder")) == {}
    assert target.float32_candidates(Path("checkpoint"), Recipe()) == []
    assert target.storage_formats(Recipe()) == StorageFormats("fp32", "fp32")
    assert StudentOnly().storage_formats(Recipe()) == StorageFormats("fp16", "fp16")


def test_missing_methods_of_a_target_raise_a_clear_error() -> None:
    with pytest.raises(NotImplementedError, match="StudentOnly has no `export`"):
        StudentOnly().export(Path("checkpoint"), Path("folder"), Recipe())
    with pytest.raises(NotImplementedError, match="StudentOnly rounds its arithmetic and has no `float32_form`"):
        StudentOnly().float32_form(Path("folder"))


def test_only_a_subclass_of_target_can_be_registered() -> None:
    class Foreign:
        """A class with the methods of a target that is no subclass of Target."""

        export = Target.export

    for value in (Foreign, Foreign(), Target(), "onnx"):
        with pytest.raises(PluginError, match=r"'foreign' is no subclass of spdtool\.Target") as error:
            plugins.targets.register("foreign")(value)
        assert "class Foreign(spdtool.Target)" in str(error.value.hint)
    assert plugins.targets.find("foreign") is None


def test_a_registered_class_is_returned_unchanged_and_looked_up_as_an_instance() -> None:
    assert plugins.targets.register("student-only")(StudentOnly) is StudentOnly
    assert isinstance(get_target("student-only"), StudentOnly)
    assert plugins.targets.entry("student-only").summary == "A target for the student alone, which rounds weights."


def test_the_first_target_has_no_prefix_and_the_others_their_names() -> None:
    plugins.targets.register("student-only")(StudentOnly)
    choices = required_targets(Export(targets=("onnx", "student-only", "onnx")))
    assert [(choice.name, choice.prefix, choice.optional) for choice in choices] == [
        ("onnx", "", False),
        ("student-only", "student-only", False),
    ]


def test_the_first_target_must_export_the_teacher_too() -> None:
    plugins.targets.register("student-only")(StudentOnly)
    with pytest.raises(RecipeError, match="'student-only' does not export the teacher") as error:
        required_targets(Export(targets=("student-only",)))
    assert error.value.hint == 'export.targets=["onnx", "student-only"]'
    with pytest.raises(RecipeError, match="export.targets is empty"):
        required_targets(Export(targets=()))


def test_a_required_target_that_nothing_provides_is_an_error() -> None:
    with pytest.raises(UnknownName, match="'onnx-int9'") as error:
        required_targets(Export(targets=("onnx", "onnx-int9")))
    assert "did you mean 'onnx-int8'" in str(error.value.hint)


def test_optional_targets_are_looked_up_once_each_and_missing_ones_explained() -> None:
    plugins.targets.register("student-only")(StudentOnly)
    names = ("onnx", "student-only", "student-only", "onnx-fp16", "absent")
    choices, errors = optional_targets(Recipe(export=Export(optional=names, skip=("onnx-fp16",))))
    assert [(choice.name, choice.prefix, choice.optional) for choice in choices] == [
        ("student-only", "student-only", True)
    ]
    assert list(errors) == ["absent"]


def test_installed_selects_all_default_targets_with_plugins_first() -> None:
    plugins.targets.register("student-only")(StudentOnly)
    names = optional_names(Recipe())
    assert names[-4:] == ["onnx-fp16", "onnx-int8", "onnx-ort", "onnx-ort-fp16"]
    assert "student-only" in names[:-4]
    assert "onnx-int8-static" not in names
    choices, errors = optional_targets(Recipe(export=Export(skip=("student-only", "onnx-ort"))))
    assert not {"student-only", "onnx-ort"} & {choice.name for choice in choices}
    assert errors == {}


def test_importing_the_base_class_imports_no_large_library() -> None:
    code = "import sys, spdtool.export.target; print(sorted({'torch', 'onnx', 'numpy'} & sys.modules.keys()))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
