"""A cache of traced graphs shared by all workers of a session; tracing is the slow step of an export."""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path

import pytest

from spdtool.export.graph.trace import cached_traces


class SharedTraces(MutableMapping[str, bytes]):
    """A mapping of traced graphs, stored as one file each in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def __getitem__(self, key: str) -> bytes:
        try:
            return (self.folder / key).read_bytes()
        except FileNotFoundError:
            raise KeyError(key) from None

    def __setitem__(self, key: str, graph: bytes) -> None:
        partial = self.folder / f"{key}.{os.getpid()}"  # another worker may be reading
        partial.write_bytes(graph)
        partial.rename(self.folder / key)

    def __delitem__(self, key: str) -> None:
        (self.folder / key).unlink()

    def __iter__(self) -> Iterator[str]:
        return (file.name for file in self.folder.iterdir())

    def __len__(self) -> int:
        return len(list(self.folder.iterdir()))


@pytest.fixture(scope="session", autouse=True)
def traced_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Trace each configuration once for the whole session."""
    base = tmp_path_factory.getbasetemp()
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    with cached_traces(SharedTraces((base.parent if is_worker else base) / "traces")):
        yield
