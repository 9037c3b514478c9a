"""The house keeps its plan: which module may import which, read from the source, and a light front door."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import spdtool

ROOT = Path(spdtool.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py") if path.name != "__main__.py")
HEAVY = {"torch", "transformers", "numpy", "datasets", "accelerate", "sklearn", "scipy", "onnx", "onnxruntime"}
HEAVY |= {"matplotlib", "jinja2"}
STUDENTS = {"spdtool.stages.prune", "spdtool.stages.distill", "spdtool.stages.finetune"}

OWN_DOOR = ("spdtool", "spdtool.classifier")  # `spdtool.load`, imported when it is asked for

# A module or package, and its layer; the longest name that fits a module counts.
LAYERS = {
    "spdtool": 0,  # the package itself: a version and nothing else
    "spdtool.errors": 0,
    "spdtool.console": 0,
    "spdtool.schedules": 0,
    "spdtool.recipe": 0,
    "spdtool.recipes": 0,
    "spdtool.run": 0,
    "spdtool.plugins": 0,
    "spdtool.commands": 0,
    "spdtool.processes": 0,
    "spdtool.pruning": 1,
    "spdtool.shards": 1,
    "spdtool.distillation": 2,
    "spdtool.encoders": 2,
    "spdtool.cache": 2,
    "spdtool.onednn": 1,
    "spdtool.pairing": 2,
    "spdtool.data": 2,
    "spdtool.tasks": 2,
    "spdtool.pieces": 2,
    "spdtool.padding": 2,
    "spdtool.prefetch": 3,
    "spdtool.collectives": 3,
    "spdtool.launcher": 3,
    "spdtool.training": 3,
    "spdtool.teacher_outputs": 3,
    "spdtool.journal": 3,
    "spdtool.saliency": 3,
    "spdtool.snapshot": 3,
    "spdtool.evaluation": 3,
    "spdtool.export": 3,
    "spdtool.bench": 3,
    "spdtool.planning": 3,  # what a recipe will cost
    "spdtool.inspection": 3,  # what a run has done
    "spdtool.report": 3,  # what several have shown, and a page of it
    "spdtool.doctor": 3,  # what the machine can do
    "spdtool.classifier": 3,  # what was exported, for its user
    "spdtool.stages": 4,
    "spdtool.sweep": 4,  # runs the stages of many runs
    "spdtool.cluster": 4,
    "spdtool.standings": 0,
    "spdtool.serving": 4,
    "spdtool.cli": 5,
}


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> int | None:
    """The layer of a module of ours, or None when the table does not know it."""
    fitting = [known for known in LAYERS if known != "spdtool" and f"{module}.".startswith(f"{known}.")]
    return LAYERS[max(fitting, key=len)] if fitting else (0 if module == "spdtool" else None)


def imports(source: str) -> Iterator[str]:
    """Full names of everything imported anywhere in `source`, inside functions as well."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            assert node.module is not None
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                ours = (ROOT.parent / Path(*submodule.split("."))).with_suffix(".py")
                yield submodule if ours.exists() or ours.with_suffix("").is_dir() else node.module


def wrong_arrows(module: str, source: str) -> list[str]:
    """Every import of `module` that the plan forbids, as a sentence."""
    found, layer = list(imports(source)), layer_of(module)
    if layer is None:
        return [f"{module} has no layer: add it to the table"]
    wrong = []
    for name in found:
        top = name.split(".")[0]
        if top == "spdtool":
            target = layer_of(name)
            if target is None:
                wrong.append(f"{module} imports {name}, which has no layer")
            elif target > layer and (module, name) != OWN_DOOR:
                wrong.append(f"{module} (layer {layer}) imports {name} (layer {target})")
            elif name.startswith("spdtool.cli") and module != "spdtool.cli":
                wrong.append(f"{module} imports the command line")
            elif module.startswith("spdtool.stages.") and name.startswith("spdtool.stages."):
                shared = name == "spdtool.stages.student" and module in STUDENTS
                if name != module and not shared:
                    wrong.append(f"stage {module} imports stage {name}")
            elif module.startswith("spdtool.distillation") and name.startswith("spdtool.pruning"):
                wrong.append(f"{module} imports pruning")
        elif top in HEAVY and (layer == 0 or module == "spdtool.cli"):
            wrong.append(f"{module} imports {top}, and the front door waits for it")
        elif top in HEAVY - {"torch"} and layer == 1:
            wrong.append(f"{module} imports {top}; pruning knows torch only")
        elif top == "rich" and module != "spdtool.console":
            wrong.append(f"{module} draws: it imports rich")
    if not module.startswith("spdtool.stages") and all(
        any(name.startswith(f"spdtool.{half}") for name in found) for half in ("pruning", "distillation")
    ):
        wrong.append(f"{module} joins pruning with distillation, which only a stage may")
    return wrong


def prints(source: str) -> list[int]:
    """Lines on which `print` is called."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_point_downwards(file: Path) -> None:
    assert wrong_arrows(name_of(file), file.read_text("utf-8")) == []


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_only_the_console_draws(file: Path) -> None:
    assert prints(file.read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source", "named"),
    [
        ("spdtool.run", "import torch", "waits for it"),
        ("spdtool.run", "def f():\n    import torch.nn", "waits for it"),
        ("spdtool.run", "from spdtool import training", "layer 3"),
        ("spdtool.pruning.masks", "from transformers import BertModel", "torch only"),
        ("spdtool.pruning.masks", "from spdtool.encoders import load", "layer 2"),
        ("spdtool.distillation.losses", "from spdtool.pruning.masks import Masks", "imports pruning"),
        ("spdtool.training", "from spdtool import cli", "layer 5"),
        ("spdtool.stages.prune", "from spdtool.stages import teacher", "imports stage"),
        ("spdtool.stages.export", "from spdtool.stages import student", "imports stage"),
        ("spdtool.training", "import spdtool.pruning.masks\nimport spdtool.distillation.losses", "only a stage"),
        ("spdtool.export.onnx", "from rich.table import Table", "draws"),
        ("spdtool.utils", "", "has no layer"),
        ("spdtool.cli", "import numpy", "waits for it"),
    ],
)
def test_a_wrong_arrow_is_named(module: str, source: str, named: str) -> None:
    assert any(named in sentence for sentence in wrong_arrows(module, source))


def test_a_print_is_seen() -> None:
    assert prints("x = 1\nprint(x)") == [2]


def test_the_shared_story_of_the_student_may_be_imported_by_its_three_phases() -> None:
    for phase in STUDENTS:
        assert wrong_arrows(phase, "from spdtool.stages import student") == []


def test_the_front_door_imports_nothing_heavy() -> None:
    code = f"import sys, spdtool.cli; print(sorted(set({sorted(HEAVY)}) & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def modules_loaded_by(code: str) -> int:
    """Number of modules that a fresh interpreter holds after `code`."""
    printed = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; print(len(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return int(printed.split()[-1])


def test_help_imports_little_more_than_its_libraries() -> None:
    libraries = "import typer.main, typer.rich_utils, pydantic, rich.live, rich.progress, filelock"
    ours = len(list(ROOT.rglob("*.py")))
    assert modules_loaded_by("import spdtool.cli") <= modules_loaded_by(libraries) + ours
