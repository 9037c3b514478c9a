"""The probe of the arithmetic: reproducible, sensitive to one bit, and without side effects."""

from __future__ import annotations

import pytest
import torch

from spdtool.models import arithmetic
from spdtool.models.arithmetic import probe_arithmetic


def probe_anew() -> str:
    arithmetic._probe.cache_clear()
    return probe_arithmetic()


def test_the_probe_repeats_and_does_not_advance_the_random_generators() -> None:
    state = torch.get_rng_state()
    first = probe_anew()
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        assert probe_anew() == first


def test_a_change_of_one_bit_changes_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    first = probe_anew()
    numbers = arithmetic._numbers
    with monkeypatch.context() as patch:
        patch.setattr(arithmetic, "_numbers", lambda *shape: numbers(*shape).nextafter(torch.tensor(1.0)))
        assert probe_anew() != first
    assert probe_anew() == first
