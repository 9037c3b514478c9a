"""Fixtures that any test may use: toy models, toy tasks, finished toy runs. See `toys.py`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach for the network
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="spdtool-tests-cache-")  # not the user's own

import pytest
import torch

from spdtool import console, plugins
from spdtool.recipe.fields import Recipe
from spdtool.run.folder import Run
from spdtool.tasks.task import Task

WHOLE_RUNS = {"compressed", "distilled", "toy_run"}  # fixtures that train
# Nearly every test of these traces a model, which takes seconds.
EXPORTING_MODULES = {"test_classifier.py", "test_graph.py", "test_target.py", "test_targets.py", "test_trace.py"}
CACHE = os.environ["XDG_CACHE_HOME"]  # a test may set another
torch.set_num_threads(1)  # threads cost more than they gain on tiny models
# What a test writes need not outlive the machine. `fstat` refuses a bad descriptor as `fsync` does.
vars(os)["fsync"] = os.fstat


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test slow that needs a run, is in a module that exports, or was measured to be slow."""
    root = Path(__file__).parents[1]
    slow_tests = set(Path(__file__).with_name("slow_tests.txt").read_text("utf-8").split())
    for item in items:
        needs_run = WHOLE_RUNS & set(getattr(item, "fixturenames", ()))
        # the name without the parameters of the case
        test = f"{item.path.relative_to(root).as_posix()}::{item.nodeid.split('::', 1)[1].split('[')[0]}"
        if needs_run or item.path.name in EXPORTING_MODULES or test in slow_tests:
            item.add_marker(pytest.mark.slow)


def pytest_unconfigure() -> None:
    """Remove the cache of this session, in each of its workers."""
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def plain_console() -> None:
    """Print as a run without options does, whatever a test before this one chose."""
    console.configure()


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_toys = _load("toys")
_load("faults")
_load("fuzz_folders")


@pytest.fixture(scope="session")
def toys() -> ModuleType:
    """The module `toys.py` itself."""
    return _toys


@pytest.fixture(scope="session")
def power() -> ModuleType:
    """The module `power.py`, which simulates power cuts."""
    return _load("power")


traced_once = _load("shared_traces").traced_once


@pytest.fixture
def rounded(clean_plugins: None) -> Any:
    """An export target that rounds the weights, registered as `rounded` until the test ends; see `rounding.py`."""
    target = type("Rounded", (_load("rounding").Rounded,), {})
    plugins.targets.register("rounded")(target)
    return target


@pytest.fixture
def stage_files() -> list[str]:
    """The names of the files in the folder of a finished training stage, sorted."""
    return [
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
        "stage.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.fixture
def tiny_tokenizer() -> Any:
    """A fast tokenizer of 24 words, padding on the right."""
    return _toys.tokenizer()


@pytest.fixture
def tiny_bert() -> Callable[..., Any]:
    """Return `tiny_bert(layers=2, hidden=32, dropout=0.0, labels=2, seed=0, **config)`: a random BERT classifier."""
    return _toys.bert


@pytest.fixture
def toy_task() -> Iterator[Callable[..., Task]]:
    """`toy_task(name="toy", **how)` registers a task of in-memory rows until the test ends; see `toys.dataset`."""
    names: list[str] = []

    def make(name: str = "toy", **how: Any) -> Task:
        names.append(name)
        task: Task = _toys.register(_toys.dataset(name, **how))
        return task

    yield make
    for name in names:
        plugins.datasets.unregister(name)


@pytest.fixture
def toy_recipe() -> Callable[..., Recipe]:
    """Return `toy_recipe("prune.epochs=1", sparsity=0.5, **flags)`: a quick recipe for the task `toy` on the CPU."""
    return _toys.recipe


def _run_stages(run: Run, until: str | None) -> None:
    """Run the stages from the first up to `until` (None: none)."""
    order = ("teacher", "prune", "distill", "finetune", "export")
    for stage in order[: order.index(until) + 1] if until else ():
        module = importlib.import_module(f"spdtool.stages.{stage}")
        getattr(module, stage)(run)


@pytest.fixture
def toy_run(tmp_path: Path, toy_task: Callable[..., Task]) -> Callable[..., Run]:
    """`toy_run("prune.epochs=1", until="prune", **flags)`: a run of the task `toy`, its stages done up to `until`.

    The task `toy` is registered with its defaults unless the test has done so itself.
    """

    def make(*sets: str, until: str | None = None, folder: str = "run", **flags: Any) -> Run:
        if plugins.datasets.find("toy") is None:
            toy_task()
        run = Run.for_recipe(tmp_path / folder, _toys.recipe(*sets, **flags))
        _run_stages(run, until)
        return run

    return make


@pytest.fixture(scope="session")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a toy run at sparsity 0.25 that is done up to `distill`; read only: copy it before changing it."""
    _toys.register(_toys.dataset())
    run = Run.for_recipe(tmp_path_factory.mktemp("distilled") / "run", _toys.recipe(sparsity=0.25))
    _run_stages(run, "distill")
    plugins.datasets.unregister("toy")
    return run.path


@pytest.fixture
def clean_plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore the plugin registries after the test; no plugin folder is set."""
    monkeypatch.delenv("SPDTOOL_PLUGINS", raising=False)
    with plugins.isolated():
        yield


QUICK = (
    *("--device", "cpu", "--sparsity", "0.5", "--set", "max_length=32"),
    *("--set", "prune.events=2", "--set", "prune.calibration=2"),
    *("--set", "export.optional=[]"),
    *("--set", "teacher.accept=true"),  # a toy may learn nothing in an epoch
    *(word for stage in ("teacher", "prune", "distill", "finetune") for word in ("--set", f"{stage}.epochs=1")),
    *(word for stage in ("teacher", "prune", "distill", "finetune") for word in ("--set", f"{stage}.batch_size=8")),
    *("--set", "export.sentences=4", "--set", "bench.rounds=1", "--set", "bench.warmup=0"),
    *("--set", "bench.batches=[1]", "--set", "bench.lengths=[16]", "--set", "bench.torch=false"),
    *("--set", "bench.int8=false", "--set", "bench.unfused=false", "--set", "bench.ledger=false"),
    *("--set", "bench.padded=[]", "--set", "bench.threads=[1]"),
)


@pytest.fixture
def spdtool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`spdtool("prune", "--run", folder)` calls the command line in this process; gives exit_code, stdout, stderr."""
    from typer.testing import CliRunner

    from spdtool.cli.main import app

    for name in ("COLUMNS", "SPDTOOL_PLUGINS", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def call(*words: Any) -> Any:
        return CliRunner().invoke(app, [str(word) for word in words], prog_name="spdtool")

    return call


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with its tokenizer, as a model folder of Hugging Face; read only."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    _toys.bert().save_pretrained(folder)
    _toys.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A csv file of 60 rows with the columns `sentence` and `label` (`bad` or `good`); read only."""
    rows = _toys.rows(60, 1)
    lines = [f"{text},{('bad', 'good')[label]}" for text, label in zip(rows.first, rows.labels, strict=True)]
    file = tmp_path_factory.mktemp("data") / "rows.csv"
    file.write_text("\n".join(["sentence,label", *lines]) + "\n", "utf-8")
    return file


@pytest.fixture(scope="session")
def quick_words(encoder_folder: Path, rows_file: Path) -> tuple[str, ...]:
    """The words after `spdtool compress` (or `teacher`) that make a run of seconds."""
    return ("--data", str(rows_file), "--model", str(encoder_folder), *QUICK)


@pytest.fixture(scope="session")
def compressed(tmp_path_factory: pytest.TempPathFactory, quick_words: tuple[str, ...]) -> Path:
    """The folder of a run that `spdtool compress` has finished; read only: copy it before changing it."""
    from typer.testing import CliRunner

    from spdtool.cli.main import app

    folder = tmp_path_factory.mktemp("runs") / "done"
    result = CliRunner().invoke(app, ["compress", *quick_words, "--run", str(folder)])
    assert result.exit_code == 0, result.output
    return folder
