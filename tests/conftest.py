"""Fixtures that any test may use: toy models, toy tasks, finished toy runs. See `toys.py`."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach for the network
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch

from spdtool import plugins
from spdtool.recipe import Recipe
from spdtool.run import Run
from spdtool.tasks import Task

torch.set_num_threads(1)  # tiny models: threads cost more than they give


def _load_toys() -> ModuleType:
    spec = importlib.util.spec_from_file_location("toys", Path(__file__).with_name("toys.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["toys"] = module
    spec.loader.exec_module(module)
    return module


_toys = _load_toys()


@pytest.fixture(scope="session")
def toys() -> ModuleType:
    """The module `toys.py` itself."""
    return _toys


@pytest.fixture
def tiny_tokenizer() -> Any:
    """A fast tokenizer of 24 words, padding on the right."""
    return _toys.tokenizer()


@pytest.fixture
def tiny_bert() -> Callable[..., Any]:
    """`tiny_bert(layers=2, hidden=32, dropout=0.0, labels=2, seed=0, **config)` gives a random BERT classifier."""
    return _toys.bert


@pytest.fixture
def toy_task() -> Iterator[Callable[..., Task]]:
    """`toy_task(name="toy", **how)` registers a task of in-memory rows until the test ends; see `toys.task`."""
    names: list[str] = []

    def make(name: str = "toy", **how: Any) -> Task:
        names.append(name)
        task: Task = _toys.register(_toys.task(name, **how))
        return task

    yield make
    for name in names:
        plugins.tasks._parts.pop(name, None)


@pytest.fixture
def toy_recipe() -> Callable[..., Recipe]:
    """`toy_recipe("prune.epochs=1", sparsity=0.5, **flags)` gives a quick recipe for the task `toy` on the CPU."""
    return _toys.recipe


@pytest.fixture
def toy_run(tmp_path: Path, toy_task: Callable[..., Task]) -> Callable[..., Run]:
    """`toy_run("prune.epochs=1", until="prune", **flags)`: a run of the task `toy`, its stages done up to `until`.

    The task `toy` is registered with its defaults unless the test has done so itself.
    """

    def make(*sets: str, until: str | None = None, folder: str = "run", **flags: Any) -> Run:
        if "toy" not in plugins.tasks._parts:
            toy_task()
        run = Run.at(tmp_path / folder, _toys.recipe(*sets, **flags))
        order = ("teacher", "prune", "distill", "finetune", "export")
        for stage in order[: order.index(until) + 1] if until else ():
            module = importlib.import_module(f"spdtool.stages.{stage}")
            getattr(module, stage)(run)
        return run

    return make


@pytest.fixture
def clean_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registries and discovery as they are now, put back afterwards; no plugin folder."""
    for registry in plugins.REGISTRIES:
        registry.load()  # now: a module that is imported under the patch would lose its parts with it
    for registry in plugins.REGISTRIES:
        monkeypatch.setattr(registry, "_parts", dict(registry._parts))
    monkeypatch.setattr(plugins, "_found", dict(plugins._found))
    monkeypatch.setattr(plugins, "_folder", None)
    monkeypatch.delenv("SPDTOOL_PLUGINS", raising=False)
