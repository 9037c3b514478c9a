"""The probe of this process's arithmetic: the same for the same, another for another, and without a trace."""

from __future__ import annotations

import pytest
import torch

from spdtool.models import arithmetic
from spdtool.models.arithmetic import probe_arithmetic


def probe_anew() -> str:
    arithmetic._probe.cache_clear()
    return probe_arithmetic()


def test_it_repeats_and_leaves_the_generators_alone() -> None:
    state = torch.get_rng_state()
    first = probe_anew()
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        assert probe_anew() == first


def test_one_bit_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    first = probe_anew()
    numbers = arithmetic._numbers
    with monkeypatch.context() as patch:
        patch.setattr(arithmetic, "_numbers", lambda *shape: numbers(*shape).nextafter(torch.tensor(1.0)))
        assert probe_anew() != first
    assert probe_anew() == first
