"""What the documents say is run: commands exist with the options shown, --help blocks are what --help prints."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from spdtool.cli.main import app
from spdtool.recipe import reading as recipe

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("plugins/*/README.md")])


def commands():
    """Every `spdtool ...` line in a fenced or indented block, or in backticks, with its document."""
    for document in DOCUMENTS:
        text = document.read_text("utf-8").replace("\\\n", " ")
        found = re.findall(r"^(?:    |\$ )?(spdtool [a-z].*)$", text, re.MULTILINE)
        found += re.findall(r"`(spdtool [a-z][^`\n]*)`", text)
        for line in found:
            yield pytest.param(line.split("  #")[0].strip(), id=f"{document.name}: {line[:60]}")


@pytest.mark.parametrize("line", list(commands()))
def test_every_command_in_the_documents_parses(line):
    name, *words = shlex.split(line)[1:]
    listed = get_command(app).commands
    assert name in listed, f"no command {name}"
    known = {option for parameter in listed[name].params for option in parameter.opts}
    for index, word in enumerate(words):
        if word.startswith("--") and word != "--help":
            assert word in known, f"spdtool {name} has no {word}"
        if word == "--set":
            field = words[index + 1].split("=")[0]
            assert field in dict(recipe.fields()), f"the recipe has no {field}"


@pytest.mark.parametrize("target", re.findall(r"`make ([a-z-]+)", (ROOT / "README.md").read_text("utf-8")))
def test_every_make_target_in_the_readme_exists(target):
    makefile = (ROOT / "Makefile").read_text("utf-8")
    stages = re.search(r"^STAGES := (.*)$", makefile, re.MULTILINE).group(1).split()
    assert re.search(rf"^{target}:", makefile, re.MULTILINE) or target in stages


def test_the_help_in_the_readme_is_what_help_prints(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("NO_COLOR", "1")
    printed = CliRunner().invoke(app, ["--help"], prog_name="spdtool", terminal_width=100).output
    shown = re.search(r"<!-- help -->\n```\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL).group(1)
    words = [line.strip() for line in printed.splitlines() if line.strip()]
    assert [line.strip() for line in shown.splitlines() if line.strip()] == words


def test_every_packaged_recipe_is_in_the_readme_and_reads():
    text = (ROOT / "README.md").read_text("utf-8")
    for name in recipe.names():
        assert f"`{name}`" in text
        assert recipe.resolve(name).name == name


def test_the_constraints_satisfy_the_ranges():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    ranges = [Requirement(line) for line in project["dependencies"]]
    for extra in ("cpu", "serve", "dev"):
        ranges += [Requirement(line) for line in project["optional-dependencies"][extra]]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text("utf-8").split() if "==" in line)
    for wanted in ranges:
        assert wanted.name in pins, f"constraints.txt does not pin {wanted.name}"
        assert wanted.specifier.contains(pins[wanted.name]), f"{wanted} does not admit {pins[wanted.name]}"
