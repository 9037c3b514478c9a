"""The plugin door: what can be added to spdtool, and how it is found.

Six registries, one for each kind of part. A built-in part and a stranger's part use the same decorator:

    from spdtool.plugins import criteria

    @criteria.register("sensitivity", needs=("gradient_squared",))
    def sensitivity(weight, stats):
        return weight.abs() * stats.gradient_squared.sqrt()

Plugins come from three places: the built-in modules; installed distributions, through the entry-point group `spdtool`
(each entry names a module to import); and the `*.py` files of a folder that `--plugins-dir` or `SPDTOOL_PLUGINS`
names. A file that merely lies in the current folder is never run. A plugin that fails to load is recorded and listed
by `spdtool plugins`; it is fatal only when a name is asked for that nothing else provides.

A target whose files need a library of custom operators names the module that knows it in a second entry-point group,
`spdtool.libraries`, under the target's name: see `library`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from spdtool.errors import PluginError, SpdError, UnknownName

T = TypeVar("T")
GROUP = "spdtool"
LIBRARIES = "spdtool.libraries"
OURS = {
    "sparse-cpu": "spdtool-sparse-cpu"
}  # parts in distributions of this project, for whoever has not installed them


@dataclass(frozen=True)
class Part(Generic[T]):
    """One registered thing: its name, the thing, where it came from, and what it declared about itself."""

    name: str
    value: T
    source: str
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """One line for listings: what the part says it is about, else the first line of its docstring."""
        said = getattr(self.value, "about", None) or getattr(self.value, "__doc__", None) or ""
        return str(said).strip().split("\n")[0]


class Registry(Generic[T]):
    """Keeps the parts of one kind by name, and loads the modules that provide them when first asked."""

    def __init__(self, kind: str, *builtins: str) -> None:
        self.kind = kind
        self._builtins = builtins
        self._parts: dict[str, Part[T]] = {}

    def register(self, name: str, **meta: Any) -> Callable[[T], T]:
        """Decorator: makes the decorated object available under `name`; `meta` is kept with it.

        Raises:
            PluginError: another source already provides that name.
        """

        module = sys._getframe(1).f_globals.get("__name__", "?")
        source = module if module.startswith("spdtool.") else (_loading or module)

        def keep(value: T) -> T:
            taken = self._parts.get(name)
            if taken is not None and taken.source != source:
                if not source.startswith("spdtool."):
                    raise PluginError(f"{self.kind} {name!r} is already provided by {taken.source}")
                _blame(taken.source, f"PluginError: {self.kind} {name!r} is already provided by {source}")
            self._parts[name] = Part(name, value, source, meta)
            return value

        return keep

    def part(self, name: str) -> Part[T]:
        """The part called `name`.

        Raises:
            UnknownName: with near matches, and the plugins that failed to load: one of them may have held it.
        """
        self.load()
        if name not in self._parts:
            broken = [f"{p.name} ({p.error})" for p in loaded() if p.error]
            hints = [f"These plugins failed to load: {'; '.join(broken)}."] if broken else []
            if name in OURS:
                hints.insert(0, f"({how_to_get(name)})")
            raise UnknownName(self.kind, name, self._parts, " ".join(hints) or None)
        return self._parts[name]

    def get(self, name: str) -> T:
        """The registered object called `name`; raises as `part` does."""
        return self.part(name).value

    def find(self, name: str) -> T | None:
        """The registered object called `name`, or None."""
        self.load()
        return self._parts[name].value if name in self._parts else None

    def parts(self) -> list[Part[T]]:
        """Every part of this kind, by name."""
        self.load()
        return [self._parts[name] for name in sorted(self._parts)]

    def load(self) -> None:
        """Import the built-in modules of this kind, then every plugin."""
        for module in self._builtins:
            importlib.import_module(module)
        discover()


criteria: Registry[Callable[..., Any]] = Registry(
    "criterion", "spdtool.pruning.criteria", "spdtool.pruning.second_order"
)
patterns: Registry[Callable[..., Any]] = Registry("pattern", "spdtool.pruning.patterns")
tasks: Registry[Any] = Registry("task", "spdtool.data.glue", "spdtool.data.demo")
targets: Registry[Any] = Registry("export target", "spdtool.export.graph.trace", "spdtool.export.targets")
stacks: Registry[Callable[..., Any]] = Registry("layer stack")
products: Registry[Callable[..., None]] = Registry("sparse product")
REGISTRIES: tuple[Registry[Any], ...] = (criteria, patterns, tasks, targets, stacks, products)


@dataclass(frozen=True)
class Plugin:
    """One plugin that discovery met: its name, where it lies, and the error if it did not load."""

    name: str
    where: str
    error: str | None = None


_loading: str | None = None  # the plugin being imported, so that its parts know their source
_found: dict[str, Plugin] = {}
_folder: Path | None = None


def use_folder(folder: Path | str | None) -> None:
    """Also load the `*.py` files of `folder` (None: the folder that SPDTOOL_PLUGINS names, if any).

    Raises:
        PluginError: the folder does not exist.
    """
    global _folder
    chosen = folder or os.environ.get("SPDTOOL_PLUGINS")
    _folder = Path(chosen).resolve() if chosen else None
    if _folder is not None and not _folder.is_dir():
        raise PluginError(f"the plugins folder {_folder} does not exist", "check --plugins-dir or SPDTOOL_PLUGINS")


def folder() -> Path | None:
    """The folder whose files are loaded too."""
    return _folder


def discover() -> None:
    """Import every plugin that has not been met yet. Never raises: failures are kept in `loaded()`."""
    if _loading is not None:  # a plugin that asks a registry while it is imported
        return
    for entry in entry_points(group=GROUP):
        _import(f"{entry.dist.name if entry.dist else '?'}:{entry.name}", entry.value, entry.load)
    for file in sorted(_folder.glob("*.py")) if _folder else []:
        _import(file.stem, str(file), lambda file=file: _import_file(file))  # type: ignore[misc]


def how_to_get(name: str) -> str:
    """What to do so that the part called `name`, which is not installed, is there."""
    return f"the plugin {OURS[name]} has it: {install(OURS[name])}" if name in OURS else "install the plugin with it"


def install(distribution: str) -> str:
    """The command that installs a plugin of this project."""
    return f"pip install {distribution}, or in a checkout of spdtool: pip install -e plugins/{distribution}"


@dataclass(frozen=True)
class Library:
    """What an installed plugin says of the custom operators of its target.

    Attributes:
        distribution, version: of the plugin.
        module: has `path() -> Path`, which raises an SpdError where the compiled library is missing, and may have
            `isa() -> str`, the instruction set that it uses on this machine.
    """

    distribution: str
    version: str
    module: Any


def library(target: str) -> Library:
    """The library of custom operators that the files of `target` need, from the installed plugin.

    Only the plugin's module for this is imported, not its target: `spdtool.load` must not wait for torch.

    Raises:
        PluginError: no installed plugin has it, or it does not load.
    """
    found: list[EntryPoint] = list(entry_points(group=LIBRARIES, name=target))
    if not found:
        raise PluginError(f"no installed plugin has the library that {target!r} needs", how_to_get(target))
    entry = found[0]
    distribution, version = (entry.dist.name, entry.dist.version) if entry.dist else ("?", "?")
    try:
        return Library(distribution, version, importlib.import_module(entry.module))
    except SpdError:
        raise
    except Exception as error:  # as in `_import`
        raise PluginError(
            f"the plugin {distribution} {version} does not load: {type(error).__name__}: {error}", "install it again"
        ) from None


def loaded() -> list[Plugin]:
    """Every plugin met so far, those that failed among them."""
    return list(_found.values())


def _import(name: str, where: str, load: Callable[[], Any]) -> None:
    global _loading
    if where in _found:
        return
    error = None
    _loading = name
    try:
        load()
    except (Exception, SystemExit) as caught:  # a stranger's module may raise anything; the tool must go on
        error = f"{type(caught).__name__}: {caught}"
    finally:
        _loading = None
    _found[where] = Plugin(name, where, error)


@contextmanager
def blamed(part: Part[Any]) -> Iterator[None]:
    """Run a part of a plugin inside the block: what it raises is told as its failure, and where.

    Raises:
        PluginError: the part comes from a plugin, and has failed.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, SpdError) or part.source.startswith("spdtool."):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename}, line {last.lineno}"
        raise PluginError(
            f"{part.name!r} of {part.source} has failed: {type(error).__name__}: {error} ({where})"
        ) from error


def _blame(name: str, error: str) -> None:
    """Record that the plugin called `name` took what is not its own, found out after it was loaded."""
    for where, plugin in _found.items():
        if plugin.name == name:
            _found[where] = Plugin(name, where, error)


def _import_file(file: Path) -> None:
    spec = importlib.util.spec_from_file_location(f"spdtool_plugin_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
