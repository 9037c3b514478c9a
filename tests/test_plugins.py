"""Plugins: one decorator for built-ins and plugins, listed failures, and no code runs that was not named."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spdtool import plugins
from spdtool.errors import PluginError, UnknownName
from spdtool.plugins import Registry

pytestmark = pytest.mark.usefixtures("clean_plugins")

GOOD = """
from spdtool.plugins import criteria

@criteria.register("upside-down", needs=("gradient",))
def upside_down(weight, stats):
    '''The largest go first.

    Not a good idea.'''
    return -weight.abs()
"""


def write(folder: Path, **modules: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    return folder


def test_builtins_are_registered_like_plugins() -> None:
    entry = plugins.criteria.entry("magnitude")
    assert entry.source == "spdtool.pruning.criteria"
    assert "absolute value" in entry.summary
    assert "unstructured" in [entry.name for entry in plugins.patterns.entries()]
    assert "demo" in [entry.name for entry in plugins.datasets.entries()]


def test_an_entry_keeps_the_options_of_its_registration() -> None:
    kind: Registry[object] = Registry("thing", options=("needs",))
    value = kind.register("a", needs=("x",))(lambda: 1)
    assert kind.get("a") is value
    assert kind.find("a") is value
    assert kind.find("b") is None
    assert kind.entry("a").meta == {"needs": ("x",)}
    assert [entry.name for entry in kind.entries()] == ["a"]


def test_an_unknown_name_offers_near_matches() -> None:
    with pytest.raises(UnknownName, match="no criterion 'magnitud'") as error:
        plugins.criteria.get("magnitud")
    assert error.value.near == ["magnitude"]


def test_a_name_belongs_to_the_source_that_registered_it() -> None:
    kind: Registry[object] = Registry("thing")
    kind.register("a")(1)
    kind.register("a")(2)  # the same source may register it again
    assert kind.get("a") == 2
    with pytest.raises(PluginError, match="already provided"):
        exec("kind.register('a')(3)", {"kind": kind, "__name__": "stranger"})
    assert kind.get("a") == 2


def test_an_option_that_means_nothing_is_refused() -> None:
    with pytest.raises(PluginError, match="criterion 'a' has the unknown option need") as error:
        plugins.criteria.register("a", need=("gradient",))
    assert error.value.hint == "options: needs, update, block_scores, dense_gradients"
    with pytest.raises(PluginError, match="unknown option speed"):
        plugins.targets.register("a", speed=1)


def test_an_unregistered_name_is_free_again() -> None:
    kind: Registry[object] = Registry("thing")
    kind.register("a")(1)
    kind.unregister("a")
    kind.unregister("a")  # as often as a test likes
    assert kind.find("a") is None
    exec("kind.register('a')(3)", {"kind": kind, "__name__": "stranger"})
    assert kind.entry("a").source == "stranger"


def test_changes_inside_isolated_are_undone(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", good=GOOD)
    with plugins.isolated():
        plugins.use_folder(folder)
        plugins.criteria.unregister("magnitude")
        assert plugins.criteria.find("upside-down") is not None
    assert plugins.criteria.find("upside-down") is None
    assert plugins.criteria.find("magnitude") is not None
    assert plugins.plugin_folder() is None
    assert "good" not in [plugin.name for plugin in plugins.loaded_plugins()]


def test_the_files_of_a_named_folder_are_loaded(tmp_path: Path) -> None:
    plugins.use_folder(write(tmp_path / "mine", good=GOOD))
    entry = plugins.criteria.entry("upside-down")
    assert (entry.source, entry.meta, entry.summary) == ("good", {"needs": ("gradient",)}, "The largest go first.")
    assert [(p.name, p.error) for p in plugins.loaded_plugins() if p.name == "good"] == [("good", None)]


def test_the_environment_may_name_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPDTOOL_PLUGINS", str(write(tmp_path / "mine", good=GOOD)))
    plugins.use_folder(None)
    assert plugins.criteria.find("upside-down") is not None


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="does not exist"):
        plugins.use_folder(tmp_path / "gone")


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import no_such_module_anywhere", "ModuleNotFoundError"),
        ("this is no python", "SyntaxError"),
        ("raise RuntimeError('tired')", "RuntimeError: tired"),
        ("import sys\nsys.exit('bye')", "SystemExit: bye"),
        ("from spdtool.plugins import criteria\ncriteria.register('magnitude')(lambda w, s: w)", "already provided"),
    ],
)
def test_a_failing_plugin_is_listed_and_mentioned_only_for_unknown_names(
    tmp_path: Path, source: str, error: str
) -> None:
    plugins.use_folder(write(tmp_path / "mine", broken=source, good=GOOD))
    assert plugins.criteria.get("magnitude") is not None
    assert plugins.criteria.get("upside-down") is not None, "the others load all the same"
    (broken,) = (p for p in plugins.loaded_plugins() if p.name == "broken")
    assert error in str(broken.error)
    with pytest.raises(UnknownName, match="no criterion 'unheard-of'") as raised:
        plugins.criteria.get("unheard-of")
    assert "broken" in str(raised.value.hint)
    assert error in str(raised.value.hint)


def test_a_plugin_that_takes_the_name_of_a_builtin_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "from spdtool.plugins import patterns\npatterns.register('unstructured')(lambda s, p: 'stolen')"
    for entry in plugins.patterns.entries():
        plugins.patterns.unregister(entry.name)
    plugins.use_folder(write(tmp_path / "mine", thief=source))
    monkeypatch.delitem(sys.modules, "spdtool.pruning.patterns", raising=False)
    plugins.criteria.load()  # runs every plugin before any pattern is looked up
    assert plugins.patterns.entry("unstructured").source == "spdtool.pruning.patterns"
    (thief,) = (p for p in plugins.loaded_plugins() if p.name == "thief")
    assert "already provided" in str(thief.error)


def test_a_plugin_may_use_a_registry_while_it_is_imported(tmp_path: Path) -> None:
    source = "from spdtool.plugins import criteria\ncriteria.register('twin')(criteria.get('magnitude'))"
    plugins.use_folder(write(tmp_path / "mine", asking=source))
    assert plugins.criteria.get("twin") is plugins.criteria.get("magnitude")


def test_each_plugin_is_run_once(tmp_path: Path) -> None:
    ran = tmp_path / "ran.txt"
    plugins.use_folder(
        write(
            tmp_path / "mine",
            counting=f"import os\nos.write(os.open({str(ran)!r}, os.O_CREAT | os.O_APPEND | os.O_WRONLY), b'x')",
        )
    )
    plugins.criteria.load()
    plugins.patterns.load()
    plugins.discover()
    assert ran.read_text() == "x"


def test_files_in_the_working_directory_are_never_run(tmp_path: Path) -> None:
    folder = write(tmp_path / "here", evil="open('ran.txt', 'w').write('x')", spdtool_plugin="open('ran.txt', 'w')")
    write(folder / "spdtool_plugins", evil="open('ran.txt', 'w').write('x')")
    write(folder / "plugins", evil="open('ran.txt', 'w').write('x')")
    environment = {name: value for name, value in os.environ.items() if name != "SPDTOOL_PLUGINS"}
    code = "import os; os.chdir('.'); from spdtool import plugins; plugins.use_folder(None); plugins.criteria.entries()"
    subprocess.run([sys.executable, "-P", "-c", code], cwd=folder, env=environment, check=True)
    assert not (folder / "ran.txt").exists()


def test_installed_distributions_are_found_by_their_entry_points(tmp_path: Path) -> None:
    site = write(tmp_path / "site", spdtool_kind=GOOD, spdtool_rude="raise OSError('no licence')")
    info = site / "spdtool_kind-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: spdtool-kind\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[spdtool]\nkind = spdtool_kind\nrude = spdtool_rude\n")
    code = """
from spdtool import plugins
part = plugins.criteria.entry("upside-down")
print(part.source)
for plugin in sorted(plugins.loaded_plugins(), key=lambda p: p.name):
    if plugin.name.startswith("spdtool-kind"):
        print(plugin.name, plugin.where, plugin.error)
"""
    environment = os.environ | {"PYTHONPATH": str(site)}
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert process.stdout.splitlines() == [
        "spdtool-kind:kind",
        "spdtool-kind:kind spdtool_kind None",
        "spdtool-kind:rude spdtool_rude OSError: no licence",
    ]


class TestLibrary:
    """The library of custom operators of an installed plugin, found without importing its target."""

    @pytest.fixture
    def install(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
        """Return `install(source)`, which installs `their-plugin` 1.2 for the target `theirs`."""
        monkeypatch.syspath_prepend(tmp_path)

        def make(source: str) -> None:
            (tmp_path / "their_plugin.py").write_text(source)
            dist_info = tmp_path / "their_plugin-1.2.dist-info"
            dist_info.mkdir()
            (dist_info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-plugin\nVersion: 1.2\n")
            (dist_info / "entry_points.txt").write_text("[spdtool.libraries]\ntheirs = their_plugin\n")
            importlib.invalidate_caches()

        yield make
        sys.modules.pop("their_plugin", None)

    def test_the_module_and_its_distribution(self, install: Callable[[str], None]) -> None:
        install("def path():\n    return '/there/ops.so'\n")
        library = plugins.find_library("theirs")
        assert (library.distribution, library.version, library.module.path()) == (
            "their-plugin",
            "1.2",
            "/there/ops.so",
        )

    def test_one_that_does_not_load_is_an_error_of_the_plugin(self, install: Callable[[str], None]) -> None:
        install("import no_such_module_anywhere\n")
        with pytest.raises(PluginError, match=r"their-plugin 1.2 does not load: .*no_such_module_anywhere"):
            plugins.find_library("theirs")

    def test_one_that_is_not_installed_is_an_error_that_says_how(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plugins, "entry_points", lambda **_: [])
        with pytest.raises(PluginError, match="'theirs'") as error:
            plugins.find_library("theirs")
        assert "pip install spdtool-theirs" in str(error.value.hint)
        assert plugins.library_targets() == []
