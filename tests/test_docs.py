"""The documents: commands parse, targets and links exist, snippets compile, the reference is complete."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from typer.main import get_command

import spdtool
from spdtool import errors, plugins
from spdtool.cli.main import app
from spdtool.recipe import reading
from spdtool.run import records

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("plugins/*/README.md")])
PLACEHOLDER = re.compile(r"\b[A-Z]+\b")  # RUN, FOLDER, HOST: for the reader to fill in


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """The module that writes the generated pages."""
    spec = importlib.util.spec_from_file_location("reference_hook", ROOT / "docs/hooks/reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(reference: ModuleType) -> dict[str, str]:
    """Generate every page of the reference; return them by name."""
    return {name: write() for name, write in reference.PAGES.items()}


def read(document: Path) -> str:
    """Return a document with continued lines joined."""
    return document.read_text("utf-8").replace("\\\n", " ")


def name_of(document: Path) -> str:
    """Return the path of a document inside the repository."""
    return str(document.relative_to(ROOT))


def command_lines(text: str) -> Iterator[str]:
    """Yield every `spdtool ...` line in a block, behind a launcher, or in backticks."""
    lines = re.findall(r"^(?:    |\$ )(?:.* (?:-m|--|\|) )?(spdtool [a-z].*)$", text, re.MULTILINE)
    lines += re.findall(r"`(spdtool [a-z][^`\n]*)`", text)
    for line in lines:
        yield re.split(r"  #| &$", line)[0].strip()


def test_every_command_in_the_documents_parses() -> None:
    listed: Any = get_command(app)
    fields = dict(reading.list_fields())
    lines = [(name_of(document), line) for document in DOCUMENTS for line in command_lines(read(document))]
    assert len(lines) > 50
    for document, line in lines:
        name, *words = shlex.split(line)[1:]
        assert name in listed.commands, f"{document}: {line}: no command {name}"
        options = {option for parameter in listed.commands[name].params for option in parameter.opts}
        for word, value in pairwise([*words, ""]):
            if word.startswith("--") and word != "--help":
                assert word in options, f"{document}: {line}: spdtool {name} has no {word}"
            if word == "--set":
                assert value.split("=")[0] in fields, f"{document}: {line}: no recipe field {value}"
            if word == "--recipe":
                assert value in reading.recipe_names() or PLACEHOLDER.fullmatch(value), (
                    f"{document}: {line}: no such recipe"
                )


def test_every_recipe_field_with_a_value_in_backticks_exists() -> None:
    sections = {field.split(".")[0] for field in dict(reading.list_fields()) if "." in field}
    for document in DOCUMENTS:
        for path in re.findall(r"`([a-z]+(?:\.[a-z_]+)+)(?:=[^`]*)?`", read(document)):
            if path.split(".")[0] in sections and not path.endswith((".json", ".md", ".py")):
                fields = [field for field in dict(reading.list_fields()) if f"{field}.".startswith(f"{path}.")]
                assert fields, f"{name_of(document)}: the recipe has no {path}"


def test_every_make_target_in_the_documents_exists() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    stages = re.search(r"^STAGES := (.*)$", makefile, re.MULTILINE)
    assert stages is not None
    targets |= {*stages.group(1).split(), "style"}
    for document in DOCUMENTS:
        for target in re.findall(r"(?:^    |`|^run: )make ([a-z-]+)", read(document), re.MULTILINE):
            assert target in targets, f"{name_of(document)}: no target {target} in the Makefile"


def test_every_script_in_the_documents_exists() -> None:
    for document in DOCUMENTS:
        for script in re.findall(r"(?<![\w-])((?:benchmarks|plugins)/[\w./-]+\.(?:py|sh))\b", read(document)):
            assert (ROOT / script).is_file(), f"{name_of(document)}: no file {script}"


def test_every_relative_link_leads_to_a_file(reference: ModuleType) -> None:
    generated = {ROOT / f"docs/reference/{name}.md" for name in reference.PAGES}
    for document in DOCUMENTS:
        folder = ROOT / "docs/reference" if document.parent.name == "hooks" else document.parent
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", read(document)):
            if "://" not in link:
                target = (folder / link).resolve()
                assert target.exists() or target in generated, f"{name_of(document)}: {link} leads nowhere"


def test_every_python_snippet_compiles() -> None:
    snippets = 0
    for document in DOCUMENTS:
        for snippet in re.findall(r"^```python\n(.*?)^```", document.read_text("utf-8"), re.DOTALL | re.MULTILINE):
            compile(snippet, name_of(document), "exec")
            snippets += 1
    assert snippets > 5


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 125


def test_lines_of_prose_are_short() -> None:
    for document in DOCUMENTS:
        if document.name == "architecture.md":
            continue
        for number, line in enumerate(document.read_text("utf-8").splitlines(), start=1):
            assert len(line) <= 120 or line.startswith("|"), f"{name_of(document)}, line {number}: {len(line)}"


def test_the_reference_has_every_command_and_option(pages: dict[str, str]) -> None:
    listed: Any = get_command(app)
    for name, command in listed.commands.items():
        assert f"## `spdtool {name}`" in pages["command-line"], name
        section = pages["command-line"].split(f"## `spdtool {name}`")[1].split("\n## ")[0]
        for parameter in command.params:
            names = parameter.opts if parameter.param_type_name == "option" else [parameter.name.upper()]
            for option in names:
                assert f"`{option}`" in section, f"spdtool {name}: {option} is not in the reference"


def test_the_reference_has_every_recipe_field_with_its_help(pages: dict[str, str]) -> None:
    for field, meaning in reading.list_fields():
        row = next((row for row in pages["recipe-fields"].splitlines() if row.startswith(f"| `{field}` |")), None)
        assert row is not None, f"{field} is not in the reference"
        assert meaning.split("`")[0].split("|")[0].split("<")[0] in row, f"the help of {field} is not in the reference"


def test_the_reference_has_every_recipe_and_each_resolves(pages: dict[str, str]) -> None:
    for name in reading.recipe_names():
        assert f"## `{name}`" in pages["recipes"], name
        assert reading.build_recipe(name).name == name


def test_the_reference_has_everything_that_is_built_in(pages: dict[str, str]) -> None:
    registries = {"tasks": plugins.datasets, "targets": plugins.targets, "criteria": plugins.criteria}
    for page, registry in registries.items():
        for entry in registry.entries():
            if entry.source.startswith("spdtool."):
                assert f"`{entry.name}`" in pages[page], f"{page}: {entry.name}"
    for entry in plugins.patterns.entries():
        assert f"`{entry.name}`" in pages["criteria"], entry.name


def test_the_reference_has_every_field_of_the_recorded_files(pages: dict[str, str], reference: ModuleType) -> None:
    roots = {
        "stage-json": [records.StageRecord, records.RunRecord],
        "manifest-json": [records.BundleManifest, records.FolderManifest],
        "other-files": [records.BenchFile, records.SweepRecord, records.Plan],
    }
    for page, types in roots.items():
        for root in types:
            for record in reference.reachable_records(root):
                section = pages[page].split(f"# {record.__name__} {{")[1].split("\n#")[0]
                for field in record.model_fields:
                    assert f"| `{field}` |" in section, f"{page}: {record.__name__}.{field}"


def test_the_attributes_of_a_record_are_split_by_field(reference: ModuleType) -> None:
    meanings = reference.attribute_meanings(records.TrainingResult)
    assert meanings["dev"] == "scores of the saved weights"
    assert meanings["sparsity"].startswith("share of zeros")
    assert meanings["zeros"].startswith("by name")


def test_the_reference_has_every_error_and_its_exit_code(pages: dict[str, str]) -> None:
    public = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(public) > 10
    for error in public:
        assert f"| `{error.__name__}` | {error.exit_code} |" in pages["errors"], error.__name__


def test_the_reference_has_every_public_name(pages: dict[str, str]) -> None:
    for name in spdtool.__all__:
        page = "errors" if f"| `{name}` |" in pages["errors"] else "python-api"
        assert name.startswith("_") or f"`{name}`" in pages[page] or f"::: spdtool.{name}\n" in f"{pages[page]}\n", name


def test_the_snippets_use_public_names_only() -> None:
    for document in DOCUMENTS:
        for snippet in re.findall(r"^```python\n(.*?)^```", document.read_text("utf-8"), re.DOTALL | re.MULTILINE):
            used = set()
            for node in ast.walk(ast.parse(snippet)):
                if isinstance(node, ast.Attribute) and is_package(node.value):
                    used.add(node.attr)
                if isinstance(node, ast.ImportFrom) and node.module == "spdtool":
                    used |= {alias.name for alias in node.names}
            assert used <= set(spdtool.__all__), f"{name_of(document)}: {used - set(spdtool.__all__)} is not public"


def is_package(node: ast.expr) -> bool:
    """Tell whether an expression is the name `spdtool`."""
    return isinstance(node, ast.Name) and node.id == "spdtool"


def test_every_page_of_the_site_is_in_the_navigation(reference: ModuleType) -> None:
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8").split("\nnav:")[1]
    written = {str(file.relative_to(ROOT / "docs")) for file in ROOT.glob("docs/**/*.md")}
    expected = {page for page in written if not page.startswith("hooks/")}
    expected |= {f"reference/{name}.md" for name in reference.PAGES}
    assert expected == set(re.findall(r"[\w/-]+\.md", navigation))


def test_the_documents_say_that_the_default_recipe_grafts_nothing() -> None:
    default = reading.build_recipe("default")
    assert all(getattr(default, phase).grafting.start == 1 for phase in ("prune", "distill", "finetune"))
    assert "grafting: off in this recipe" in (ROOT / "docs/explanation/method.md").read_text("utf-8")
    assert reading.build_recipe("spd").prune.grafting.start < 1


def test_the_architecture_page_names_every_room_and_where_each_type_is() -> None:
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    section = text.partition("## Rooms\n")[2].partition("\n## ")[0]
    rooms = {path.parent.name for path in ROOT.glob("spdtool/*/__init__.py")}
    in_spdtool = section.partition("Beside it:")[0]
    assert set(re.findall(r"^\| `(\w+)/`", in_spdtool, re.MULTILINE)) == rooms
    assert set(re.findall(r"\w+\.py", section)) <= {path.name for path in ROOT.glob("spdtool/**/*.py")}
    table = re.findall(r"^\| (`.*?`) \| `([\w/]+\.py)` \|", text, re.MULTILINE)
    assert len(table) > 10
    for types, file in table:
        source = (ROOT / "spdtool" / file).read_text("utf-8")
        for name in re.findall(r"`(\w+)`", types):
            assert re.search(rf"^class {name}\b", source, re.MULTILINE), f"{name} is not in {file}"


def test_each_formula_of_the_method_is_where_the_page_says() -> None:
    text = (ROOT / "docs/explanation/method.md").read_text("utf-8")
    places = re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", text)
    assert len(places) > 8
    for file, functions in places:
        source = (ROOT / "spdtool" / file).read_text("utf-8")
        for name in re.findall(r"`([\w.]+)`", functions):
            assert re.search(rf"def {name.split('.')[-1]}\b", source), f"{name} is not in {file}"


def test_the_constraints_satisfy_the_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    ranges = [Requirement(line) for line in project["dependencies"]]
    for extra in ("cpu", "serve", "dev", "docs"):
        ranges += [Requirement(line) for line in project["optional-dependencies"][extra]]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text("utf-8").split() if "==" in line)
    for wanted in ranges:
        assert wanted.name in pins, f"constraints.txt does not pin {wanted.name}"
        assert wanted.specifier.contains(pins[wanted.name]), f"{wanted} does not admit {pins[wanted.name]}"


def test_pre_commit_uses_the_versions_of_the_constraints() -> None:
    pins = (ROOT / "constraints.txt").read_text("utf-8")
    hooks = (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    ruff = set(re.findall(r"\bruff==([\d.]+)", hooks))
    assert ruff == set(re.findall(r"^ruff==([\d.]+)", pins, re.MULTILINE))


def test_the_project_names_its_license_and_the_version_of_the_changelog() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")
