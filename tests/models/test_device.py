"""Recording in a CUDA graph, on doubles: what a failure leaves behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from spdtool.models import device


class Generator:
    """A double of a CUDA generator in a recording that failed: it refuses to draw until its state is replaced."""

    def __init__(self) -> None:
        self.state = "stuck"

    def clone_state(self) -> str:
        return "a copy"

    def graphsafe_set_state(self, state: str) -> None:
        self.state = state


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> Generator:
    @contextlib.contextmanager
    def nothing(*_: object, **__: object) -> Iterator[None]:
        yield

    generator = Generator()
    monkeypatch.setattr(torch.cuda, "default_generators", ("of another device", generator))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "main")
    monkeypatch.setattr(torch.cuda, "stream", nothing)
    monkeypatch.setattr(torch.cuda, "graph", nothing)
    return generator


def test_a_failed_recording_leaves_a_generator_that_draws(generator: Generator) -> None:
    with device.recorded_in(object()):
        pass
    assert generator.state == "stuck", "only a failure touches it"
    with pytest.raises(RuntimeError, match="not permitted"), device.recorded_in(object()):
        raise RuntimeError("operation not permitted when stream is capturing")
    assert generator.state == "a copy"


def test_a_generator_that_cannot_be_replaced_does_not_hide_the_failure(generator: Generator, monkeypatch: Any) -> None:
    def refuse() -> str:
        raise RuntimeError("another error")

    monkeypatch.setattr(generator, "clone_state", refuse)
    with pytest.raises(RuntimeError, match="not permitted"), device.recorded_in(object()):
        raise RuntimeError("operation not permitted when stream is capturing")
