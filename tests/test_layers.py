"""The architecture: which package may import which, read from the source, and light imports of the command line."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from typer.main import get_command

import spdtool
from spdtool.cli.main import app

ROOT = Path(spdtool.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py") if path.name != "__main__.py")

# A room imports rooms of lower floors and of its own, never upwards. Rooms of one floor do not know each other,
# except on the ground floor.
FLOORS = (
    {"spdtool", "errors", "escaping", "recipe", "plugins", "ranks", "run", "console"},
    {"data"},
    {"tasks"},
    {"models"},
    {"pruning", "distillation"},
    {"training"},
    {"export"},
    {"bench", "serving"},
    {"goals"},
    {"stages"},
    {"sweep"},
    {"report"},
    {"cli"},
)
HEAVY = {"torch", "transformers", "numpy", "datasets", "accelerate", "sklearn", "scipy", "onnx", "onnxruntime"}
HEAVY |= {"matplotlib", "jinja2"}
PLANNING = {"spdtool.stages.plan", "spdtool.stages.estimate", "spdtool.stages.cost", "spdtool.stages.trial"}
STARTERS = {f"spdtool.stages.{name}" for name in ("api", "run_stages", "search", "trial")}  # they start stages
PHASES = {"spdtool.stages.prune", "spdtool.stages.distill", "spdtool.stages.finetune"}

# Arrows that still point upwards. An entry that is no longer needed fails the test, so the list only shrinks.
PENDING: set[tuple[str, str]] = set()


def module_name(file: Path) -> str:
    segments = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(segments[:-1] if segments[-1] == "__init__" else segments)


def room_of(module: str) -> str:
    """Return the subpackage or top-level module of spdtool that contains `module`."""
    return module.split(".")[1] if "." in module else module


def floor_of(module: str) -> int | None:
    """Return the module's layer, counted from 0; None if `FLOORS` does not list its package."""
    for number, rooms in enumerate(FLOORS):
        if room_of(module) in rooms:
            return number
    return None


@functools.cache  # several tests read each module
def imported_names(source: str, *, top_only: bool = False) -> list[str]:
    """List the full names of all imports in `source`.

    Args:
        top_only: leave out imports inside functions and under `if TYPE_CHECKING`.
    """
    tree = ast.parse(source)
    nodes = tree.body if top_only else ast.walk(tree)
    names: list[str] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            assert node.module is not None
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                file = (ROOT.parent / Path(*submodule.split("."))).with_suffix(".py")
                is_module = file.exists() or file.with_suffix("").is_dir()
                names.append(submodule if is_module else node.module)
    return names


def wrong_arrows(module: str, source: str) -> Iterator[str]:
    """Yield every import that `FLOORS` forbids to `module`, with the reason."""
    floor = floor_of(module)
    if floor is None:
        yield f"{module} is in no room of the plan: add it to FLOORS"
        return
    names = list(imported_names(source))
    for name in names:
        if name.split(".")[0] != "spdtool" or name == "spdtool":
            continue
        imported_floor = floor_of(name)
        if imported_floor is None:
            yield f"{module} imports {name}, which is in no room of the plan"
        elif imported_floor > floor:
            if module != "spdtool" and (module, name) not in PENDING:
                yield f"{module} imports {name} from a higher floor"
        elif imported_floor == floor and floor > 0 and room_of(name) != room_of(module):
            if (module, name) not in PENDING:
                yield f"{module} imports {name}, a room of its own floor"
        elif room_of(module) == "stages" and room_of(name) == "stages" and name not in ("spdtool.stages", module):
            is_shared = (module in PHASES and name == "spdtool.stages.phase") or {module, name} <= PLANNING
            is_started = module in STARTERS or name == "spdtool.stages.run_stages"
            if not is_shared and not is_started and (module, name) not in PENDING:
                yield f"{module} imports the stage {name}: stages meet in the run folder"


def heavy_imports(module: str, source: str) -> Iterator[str]:
    """Yield the imports of large libraries that are forbidden to `module`."""
    room, floor = room_of(module), floor_of(module)
    everywhere = {name.split(".")[0] for name in imported_names(source)}
    at_the_top = {name.split(".")[0] for name in imported_names(source, top_only=True)}
    front_door = floor == 0 or (room == "cli" and "doctor" not in module)
    if front_door:
        for name in sorted(at_the_top & HEAVY):
            yield f"{module} imports {name} at its top: --help would wait for it"
    if room == "pruning" and everywhere & (HEAVY - {"torch"}):
        yield f"{module} imports {sorted(everywhere & (HEAVY - {'torch'}))}: pruning knows torch only"
    if room in ("bench", "serving") and "torch" in at_the_top:
        yield f"{module} imports torch at its top: timed processes and servers run without it"
    if "rich" in everywhere and module != "spdtool.console":
        yield f"{module} draws: only console imports rich"


def joins_pruning_and_distillation(source: str) -> bool:
    rooms = {room_of(name) for name in imported_names(source) if name.startswith("spdtool.")}
    return {"pruning", "distillation"} <= rooms


def print_lines(source: str) -> list[int]:
    """List the lines on which `print` is called."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def plugin_names() -> set[str]:
    """Collect the names of the plugins of this repository: distributions, modules, and targets with a library."""
    names = set()
    for file in ROOT.parent.glob("plugins/*/pyproject.toml"):
        project = tomllib.loads(file.read_text("utf-8"))["project"]
        groups = project["entry-points"]
        names |= {project["name"], *groups["spdtool"].values(), *groups.get("spdtool.libraries", {})}
    return names


def test_nothing_names_a_plugin() -> None:
    names = plugin_names()
    assert {"spdtool-random", "spdtool_random"} <= names
    for file in ROOT.rglob("*"):
        if file.suffix in (".py", ".toml", ".html"):
            content = file.read_text("utf-8")
            assert [name for name in names if name in content] == [], file


def test_imports_point_downwards() -> None:
    violations = []
    for file in FILES:
        violations += wrong_arrows(module_name(file), file.read_text("utf-8"))
    assert violations == [], "\n".join(violations)


def test_every_pending_exception_is_still_needed() -> None:
    imports = {module_name(file): set(imported_names(file.read_text("utf-8"))) for file in FILES}
    spent = [(module, name) for module, name in PENDING if name not in imports.get(module, ())]
    assert spent == [], "take these out of PENDING"


def test_large_libraries_are_imported_only_where_allowed() -> None:
    violations = []
    for file in FILES:
        violations += heavy_imports(module_name(file), file.read_text("utf-8"))
    assert violations == [], "\n".join(violations)


def test_only_stages_join_pruning_and_distillation() -> None:
    for file in FILES:
        if room_of(module_name(file)) not in ("stages", "sweep", "cli"):
            assert not joins_pruning_and_distillation(file.read_text("utf-8")), module_name(file)


def test_only_the_console_draws() -> None:
    for file in FILES:
        assert print_lines(file.read_text("utf-8")) == [], module_name(file)


def test_a_forbidden_import_is_reported() -> None:
    examples = [
        ("spdtool.run.folder", "from spdtool.training import loop", "higher floor"),
        ("spdtool.pruning.masks", "from spdtool.training.loop import fit", "higher floor"),
        ("spdtool.distillation.losses", "from spdtool.pruning.masks import Masks", "its own floor"),
        ("spdtool.training.loop", "from spdtool.cli import main", "higher floor"),
        ("spdtool.stages.prune", "from spdtool.stages import teacher", "imports the stage"),
        ("spdtool.stages.export", "from spdtool.stages import phase", "imports the stage"),
        ("spdtool.utils", "", "no room"),
    ]
    for module, source, reason in examples:
        assert any(reason in sentence for sentence in wrong_arrows(module, source)), (module, source)


def test_a_large_import_is_reported() -> None:
    examples = [
        ("spdtool.run.folder", "import torch", "--help would wait"),
        ("spdtool.cli.main", "import numpy", "--help would wait"),
        ("spdtool.pruning.masks", "def f():\n    from transformers import BertModel", "torch only"),
        ("spdtool.serving.http", "import torch", "without it"),
        ("spdtool.export.onnx_session", "from rich.table import Table", "draws"),
    ]
    for module, source, reason in examples:
        assert any(reason in sentence for sentence in heavy_imports(module, source)), (module, source)
    assert joins_pruning_and_distillation("import spdtool.pruning.masks\nimport spdtool.distillation.losses")
    assert print_lines("x = 1\nprint(x)") == [2]


def test_the_shared_phase_may_be_imported_by_its_three_phases() -> None:
    for module in PHASES:
        assert list(wrong_arrows(module, "from spdtool.stages import phase")) == []


def test_the_command_line_imports_no_large_library() -> None:
    code = f"import sys, spdtool.cli.main; print(sorted(set({sorted(HEAVY)}) & sys.modules.keys()))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"


HELP = """
try:
    app(["--help"])
except SystemExit:
    pass
print(*sorted(sys.modules), file=sys.stderr)
"""
BARE = """
import sys, typer
app = typer.Typer(rich_markup_mode="rich")
for number in range({commands}):
    app.command(f"command-{{number}}")(lambda: None)
"""
# What the front door needs beside typer: its own modules, json, importlib.metadata and what these import.
OWN_MODULES, LIBRARY_MODULES = 20, 45


def modules_after(code: str) -> set[str]:
    """Run `code`, which prints the names of loaded modules, in a fresh interpreter; return the names."""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    return set(printed.split())


def test_help_loads_no_pydantic_and_little_more_than_a_bare_typer_app() -> None:
    loaded = modules_after("import sys\nfrom spdtool.cli.main import app" + HELP)
    commands = len(get_command(app).commands)
    extra = loaded - modules_after(BARE.format(commands=commands) + HELP)
    spdtool_modules = {name for name in extra if room_of(name) in ("spdtool", "cli") or name.startswith("spdtool.")}
    assert "pydantic" not in loaded
    assert len(spdtool_modules) <= OWN_MODULES, sorted(spdtool_modules)
    assert len(extra - spdtool_modules) <= LIBRARY_MODULES, sorted(extra - spdtool_modules)
