"""Which targets a recipe means, and what a target that says nothing of itself is taken for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spdtool import plugins
from spdtool.errors import RecipeError, UnknownName
from spdtool.export import target as targets
from spdtool.export.graph.trace import Onnx
from spdtool.recipe.fields import Export

pytestmark = pytest.mark.usefixtures("clean_plugins")


class Bare:
    """A stranger's target that has none of the optional attributes."""


class Full:
    """One that has them all."""

    roles = ("student",)
    providers = ("cpu",)

    @staticmethod
    def weights(folder: Path) -> Any:
        yield "a", np.ones(2, np.float32)

    @staticmethod
    def libraries(folder: Path) -> list[Path]:
        return [folder / "lib.so"]


@pytest.mark.parametrize("target", [Bare, Onnx])
def test_what_a_target_need_not_say(target: Any) -> None:
    assert targets.roles(target) == ("teacher", "student")
    assert targets.providers(target) == ("cpu", "cuda")
    assert not targets.rounds(target)
    assert targets.libraries(target, Path("here")) == []


def test_what_a_target_says_counts() -> None:
    assert (targets.roles(Full), targets.providers(Full), targets.rounds(Full)) == (("student",), ("cpu",), True)
    assert [name for name, _ in targets.weights(Full, Path("here"))] == ["a"]
    assert targets.libraries(Full, Path("here")) == ["here/lib.so"]


def test_the_first_target_has_no_prefix_and_the_others_their_names() -> None:
    plugins.targets.register("full")(Full)
    chosen = targets.demanded(Export(targets=("onnx", "full", "onnx")))
    assert [(choice.name, choice.prefix, choice.optional) for choice in chosen] == [
        ("onnx", "", False),
        ("full", "full", False),
    ]


def test_the_first_target_must_export_the_teacher_too() -> None:
    plugins.targets.register("full")(Full)
    with pytest.raises(RecipeError, match="'full' does not export the teacher") as caught:
        targets.demanded(Export(targets=("full",)))
    assert caught.value.hint == 'export.targets=["onnx", "full"]'
    with pytest.raises(RecipeError, match="export.targets is empty"):
        targets.demanded(Export(targets=()))


def test_a_demanded_target_that_is_not_installed_names_its_plugin() -> None:
    plugins.targets.unregister("sparse-cpu")
    with pytest.raises(UnknownName) as caught:
        targets.demanded(Export(targets=("onnx", "sparse-cpu")))
    assert "pip install spdtool-sparse-cpu" in str(caught.value.hint)


def test_optional_ones_are_found_or_told_and_never_twice() -> None:
    plugins.targets.unregister("sparse-cpu")
    plugins.targets.register("full")(Full)
    found, missing = targets.offered(Export(optional=("onnx", "full", "full", "sparse-cpu", "fulll")))
    assert [(choice.name, choice.prefix, choice.optional) for choice in found] == [("full", "full", True)]
    assert list(missing) == ["sparse-cpu", "fulll"]
    assert "did you mean 'full'" in str(missing["fulll"].hint)
