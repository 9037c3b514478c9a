"""Fixtures: the toy encoders of the core's tests, and the two operators in plain numpy."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach for the network

import pytest
import torch

HERE = Path(__file__).parent
INSTALLED = importlib.util.find_spec("spdtool_sparse_cpu") is not None

if not INSTALLED:  # no compiler was available; the other tests still run
    collect_ignore_glob = ["test_*.py"]

torch.set_num_threads(1)


def _load(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_toys = sys.modules.get("toys") or _load("toys", HERE.parents[2] / "tests" / "toys.py")
if "faults" not in sys.modules:
    _load("faults", HERE.parents[2] / "tests" / "faults.py")
if "shared_traces" not in sys.modules:
    _load("shared_traces", HERE.parents[2] / "tests" / "shared_traces.py")
traced_once = sys.modules["shared_traces"].traced_once
_reference = _load("sparse_reference", HERE / "reference.py") if INSTALLED else None


@pytest.fixture(scope="session")
def toys() -> ModuleType:
    """Tiny random encoders of every family, and a tokenizer: `tests/toys.py` of the core."""
    return _toys


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """The operators in plain numpy: the module `reference.py` of this folder."""
    return _reference
