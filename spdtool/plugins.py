"""The plugin registries: what can be added to spdtool, and how it is discovered.

One registry for each kind of extension. Built-ins and plugins use the same decorator:

    from spdtool.plugins import criteria

    @criteria.register("sensitivity", needs=("gradient_squared",))
    def sensitivity(weight, stats):
        return weight.abs() * stats.gradient_squared.sqrt()

Plugins come from three sources: the built-in modules; installed distributions, through the
entry-point group `spdtool` (each entry names a module to import); and the `*.py` files of a folder
that `--plugins-dir` or `SPDTOOL_PLUGINS` names. A file that merely lies in the current folder is
never run. A plugin that fails to load is recorded and listed by `spdtool plugins`; it is fatal only
when a name is asked for that nothing else provides.

A target whose files need a library of custom operators names a module in a second entry-point
group, `spdtool.libraries`, under the target's name: see `find_library`.
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
from functools import lru_cache, partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from spdtool.errors import PluginError, SpdError, UnknownName

Function = Callable[..., Any]
T = TypeVar("T")
Registered = TypeVar("Registered")
PLUGIN_GROUP = "spdtool"
LIBRARY_GROUP = "spdtool.libraries"
BUILTIN = "spdtool."  # prefix of the sources that are no plugin


def install_hint(name: str) -> str:
    """Say how to install the plugin that provides `name`; plugins of this project are called after it."""
    return f"pip install spdtool-{name}; in a checkout of spdtool: pip install -e plugins/spdtool-{name}"


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One registered object: its name, the object, its source module or plugin, and the options of `register`."""

    name: str
    value: T
    source: str
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """One line for listings: the object's `about`, else the first line of its docstring."""
        text = getattr(self.value, "about", None) or getattr(self.value, "__doc__", None) or ""
        return str(text).strip().split("\n")[0]


@dataclass(frozen=True)
class Plugin:
    """One discovered plugin: its name, its module or file, and the error if it did not load."""

    name: str
    where: str
    error: str | None = None


@dataclass(frozen=True)
class Library:
    """The library of custom operators that an installed plugin provides for its target.

    Attributes:
        distribution, version: of the plugin.
        module: has `path() -> Path`, which raises an SpdError where the compiled library is
            missing, and may have `isa() -> str`, the instruction set that it uses on this machine,
            and `DOMAINS`, the operator domains that the library provides.
    """

    distribution: str
    version: str
    module: ModuleType


@dataclass
class _Discovery:
    """State of discovery: the plugins met so far by module or file, the one being imported, and the user's folder."""

    plugins: dict[str, Plugin] = field(default_factory=dict)
    importing: str | None = None
    folder: Path | None = None


_discovery = _Discovery()


class Registry(Generic[T]):
    """Registry of one kind of extension by name; loads the modules that provide them when first asked."""

    def __init__(self, kind: str, *builtins: str, options: tuple[str, ...] = (), check: str = "") -> None:
        """Create an empty registry.

        Args:
            kind: what it holds, for messages.
            builtins: modules to import before the plugins.
            options: keywords that `register` accepts beside the name.
            check: `module:function` that turns a name and what was registered under it into what is
                stored, or raises PluginError; empty: the object is stored as it is.
        """
        self.kind = kind
        self._builtins = builtins
        self._options = options
        self._check = check
        self._entries: dict[str, Entry[T]] = {}

    def register(self, name: str, **meta: Any) -> Callable[[Registered], Registered]:
        """Register the decorated object under `name`; `meta` is kept with it.

        Raises:
            PluginError: another source already provides that name, the object is not of this kind,
                or an option is unknown.
        """
        unknown = ", ".join(option for option in meta if option not in self._options)
        if unknown:  # else a misspelt option would change nothing, in silence
            accepted = ", ".join(self._options) or "none"
            raise PluginError(f"{self.kind} {name!r} has the unknown option {unknown}", f"options: {accepted}")
        module = sys._getframe(1).f_globals.get("__name__", "?")
        source = module if module.startswith(BUILTIN) else (_discovery.importing or module)

        def keep(value: Registered) -> Registered:
            present = self._entries.get(name)
            if present is not None and present.source != source:
                if not source.startswith(BUILTIN):
                    raise PluginError(f"{self.kind} {name!r} is already provided by {present.source}")
                # The plugin was loaded before the built-in whose name it uses: the built-in wins.
                _record_error(
                    present.source,
                    f"PluginError: {self.kind} {name!r} is already provided by {source}",
                )
            self._entries[name] = Entry(name, self._checked(name, value), source, meta)
            return value

        return keep

    def _checked(self, name: str, value: Any) -> T:
        if not self._check:
            return value  # type: ignore[no-any-return]
        module, _, function = self._check.partition(":")
        checked: T = getattr(importlib.import_module(module), function)(name, value)
        return checked

    def unregister(self, name: str) -> None:
        """Forget the object called `name`, if there is one."""
        self._entries.pop(name, None)

    def entry(self, name: str) -> Entry[T]:
        """Return the entry called `name`.

        Raises:
            UnknownName: with near matches, and the plugins that failed to load: one of them may
                have held it.
        """
        self.load()
        if name not in self._entries:
            hint = None
            broken = [f"{plugin.name} ({plugin.error})" for plugin in loaded_plugins() if plugin.error]
            if broken:
                hint = f"These plugins failed to load: {'; '.join(broken)}."
            raise UnknownName(self.kind, name, self._entries, hint)
        return self._entries[name]

    def get(self, name: str) -> T:
        """Return the object called `name`; raises as `entry` does."""
        return self.entry(name).value

    def find(self, name: str) -> T | None:
        """Return the object called `name`, or None."""
        self.load()
        entry = self._entries.get(name)
        return None if entry is None else entry.value

    def entries(self) -> list[Entry[T]]:
        """List every entry of this kind by name."""
        self.load()
        return [self._entries[name] for name in sorted(self._entries)]

    def builtin_entries(self) -> list[Entry[T]]:
        """List the built-in entries by name, without importing a plugin."""
        for module in self._builtins:
            importlib.import_module(module)
        return [self._entries[name] for name in sorted(self._entries) if self._entries[name].source.startswith(BUILTIN)]

    def load(self) -> None:
        """Import the built-in modules of this kind, then every plugin."""
        for module in self._builtins:
            importlib.import_module(module)
        discover()


# A criterion's functions: see `pruning/criteria.py`. `dense_gradients`: it wants the gradients of
# dead weights too.
criteria: Registry[Function] = Registry(
    "criterion",
    "spdtool.pruning.criteria",
    "spdtool.pruning.second_order",
    options=("needs", "update", "block_scores", "dense_gradients"),
)
patterns: Registry[Function] = Registry(
    "pattern", "spdtool.pruning.patterns", options=("block", "group", "largest_sparsity")
)
datasets: Registry[Any] = Registry("task", "spdtool.data.glue", "spdtool.data.demo")
task_kinds: Registry[Any] = Registry(
    "kind of task",
    "spdtool.tasks.classification",
    "spdtool.tasks.multilabel",
    "spdtool.tasks.regression",
    "spdtool.tasks.ranking",
    "spdtool.tasks.embedding",
    "spdtool.tasks.tokens",
    "spdtool.tasks.spans",
)
targets: Registry[Any] = Registry(
    "export target", "spdtool.export.targets", "spdtool.export.narrow", check="spdtool.export.target:check_target"
)
stacks: Registry[Function] = Registry("layer stack")
products: Registry[Callable[..., None]] = Registry("sparse product")
REGISTRIES: tuple[Registry[Any], ...] = (
    criteria,
    patterns,
    datasets,
    task_kinds,
    targets,
    stacks,
    products,
)


def use_folder(folder: Path | str | None) -> None:
    """Also load the `*.py` files of `folder` (None: the folder that SPDTOOL_PLUGINS names, if any).

    Raises:
        PluginError: the folder does not exist.
    """
    _discovery.folder = None
    chosen = folder or os.environ.get("SPDTOOL_PLUGINS")
    if not chosen:
        return
    path = Path(chosen).resolve()
    if not path.is_dir():
        hint = "check --plugins-dir or SPDTOOL_PLUGINS"
        raise PluginError(f"the plugins folder {path} does not exist", hint)
    _discovery.folder = path


def plugin_folder() -> Path | None:
    """Return the folder whose files are loaded too."""
    return _discovery.folder


def discover() -> None:
    """Import every plugin that was not imported yet. Never raises: `loaded_plugins` lists failures."""
    if _discovery.importing is not None:  # a plugin may ask a registry while it is imported
        return
    for entry_point in _list_entry_points(_stamp_search_path()):
        distribution = entry_point.dist.name if entry_point.dist else "?"
        # Two distributions may both call their entry `target`.
        _import(f"{distribution}:{entry_point.name}", entry_point.value, entry_point.load)
    if _discovery.folder is not None:
        for file in sorted(_discovery.folder.glob("*.py")):
            _import(file.stem, str(file), partial(_import_file, file))


def _stamp_search_path() -> tuple[tuple[str, int], ...]:
    """Return the folders of `sys.path` with the times of their last change, in nanoseconds."""
    stamps = []
    for folder in sys.path:
        try:
            changed = os.stat(folder or ".").st_mtime_ns
        except OSError:
            changed = 0
        stamps.append((folder, changed))
    return tuple(stamps)


@lru_cache(maxsize=1)
def _list_entry_points(_stamps: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    """List the installed plugins, once for each state of the search path.

    Listing reads the metadata of every distribution, and each look into a registry asks for it.
    """
    return tuple(entry_points(group=PLUGIN_GROUP))


def loaded_plugins() -> list[Plugin]:
    """List every plugin discovered so far, with those that failed."""
    return list(_discovery.plugins.values())


@contextmanager
def isolated() -> Iterator[None]:
    """Restore all registries and the state of discovery when the block ends, for tests."""
    global _discovery
    # Load first: a module imported inside the block would lose its entries with it.
    for registry in REGISTRIES:
        registry.load()
    before = _discovery, [registry._entries for registry in REGISTRIES]
    _discovery = _Discovery(dict(_discovery.plugins))
    for registry in REGISTRIES:
        registry._entries = dict(registry._entries)
    try:
        yield
    finally:
        _discovery = before[0]
        for registry, entries in zip(REGISTRIES, before[1], strict=True):
            registry._entries = entries


def library_targets() -> list[str]:
    """List the targets whose library of custom operators is installed."""
    return sorted({entry_point.name for entry_point in entry_points(group=LIBRARY_GROUP)})


def find_library(target: str) -> Library:
    """Return the library of custom operators that the files of `target` need, from the installed plugin.

    Only the plugin's library module is imported, not its target: `spdtool.load` must not wait for torch.

    Raises:
        PluginError: no installed plugin has it, or it does not load.
    """
    matches: list[EntryPoint] = list(entry_points(group=LIBRARY_GROUP, name=target))
    if not matches:
        raise PluginError(f"no installed plugin has the library that {target!r} needs", install_hint(target))
    match = matches[0]
    distribution, version = (match.dist.name, match.dist.version) if match.dist else ("?", "?")
    try:
        return Library(distribution, version, importlib.import_module(match.module))
    except SpdError:
        raise
    except Exception as error:  # a plugin's module may raise anything
        message = f"the plugin {distribution} {version} does not load: {type(error).__name__}: {error}"
        raise PluginError(message, "install it again") from None


@contextmanager
def wrap_errors(entry: Entry[T]) -> Iterator[None]:
    """Turn an unexpected error of a plugin inside the block into one that names the plugin and the line.

    Raises:
        PluginError: the entry comes from a plugin, and has failed.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, SpdError) or entry.source.startswith(BUILTIN):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise PluginError(
            f"{entry.name!r} of {entry.source} has failed: {type(error).__name__}: {error} "
            f"({frame.filename}, line {frame.lineno})"
        ) from error


def _import(name: str, where: str, load: Callable[[], object]) -> None:
    if where in _discovery.plugins:
        return
    error = None
    _discovery.importing = name
    try:
        load()
    except (Exception, SystemExit) as caught:  # a plugin may raise anything; the tool must go on
        error = f"{type(caught).__name__}: {caught}"
    finally:
        _discovery.importing = None
    _discovery.plugins[where] = Plugin(name, where, error)


def _import_file(file: Path) -> None:
    spec = importlib.util.spec_from_file_location(f"spdtool_plugin_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pickle and dataclasses look modules up there
    spec.loader.exec_module(module)


def _record_error(name: str, error: str) -> None:
    """Record an error of the plugin called `name` that shows after it was loaded."""
    for where, plugin in _discovery.plugins.items():
        if plugin.name == name:
            _discovery.plugins[where] = Plugin(name, where, error)
