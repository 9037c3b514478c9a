"""The forecast of the remaining time: plan estimates, corrected by measured speed; prune events apart."""

from __future__ import annotations

import pytest

from spdtool.run.forecast import Forecast, StageCost, format_duration


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_forecast_uses_the_estimates_before_any_measurement() -> None:
    clock = Clock()
    costs = {"prune": StageCost(100, 2.0, ((50, 30.0), (100, 30.0)), 10.0), "bench": StageCost(other_seconds=90.0)}
    assert costs["prune"].seconds == 270
    forecast = Forecast(costs, clock)
    forecast.begin("prune", 100, [50, 100])
    assert forecast.seconds_left() == 270 + 90
    clock.now = 30
    forecast.begin("bench")
    assert forecast.seconds_left() == 90
    clock.now = 50
    assert forecast.seconds_left() == 70
    clock.now = 500
    assert forecast.seconds_left() == 0


def test_without_estimates_a_stage_is_forecast_from_its_steps() -> None:
    clock = Clock()
    forecast = Forecast(clock=clock)
    assert forecast.seconds_left() is None
    forecast.begin("prune", 100, [0, 60])
    assert forecast.seconds_left() is None
    for step, now in ((0, 5.0), (0, 20.0)):
        clock.now = now
        forecast.observe({"event": "pruning" if now == 5 else "prune", "step": step})
    clock.now = 30
    forecast.observe({"event": "step", "step": 10})
    assert forecast.seconds_left() == pytest.approx(90 * (5 + 10) / 10 + 15), "the event to come counts as the first"
    assert not forecast.covers_all


def test_a_prune_event_does_not_slow_the_steps() -> None:
    clock = Clock()
    forecast = Forecast({"prune": StageCost(100, 1.0, ((10, 5.0), (20, 1.0)))}, clock)
    forecast.begin("prune", 100, [10, 20])
    clock.now = 10
    forecast.observe({"event": "pruning", "step": 10})
    clock.now = 610
    forecast.observe({"event": "pruning", "step": 10})
    assert forecast.seconds_left() == 90, "more than was estimated for both events is over"
    clock.now = 1010
    forecast.observe({"event": "prune", "step": 10})
    assert forecast.seconds_left() == 90 + 1000 / 5, "the second one is estimated to take a fifth of the first"


def test_measured_speed_corrects_the_forecast_of_later_stages() -> None:
    clock = Clock()
    costs = {
        "prune": StageCost(100, 1.0),
        "distill": StageCost(100, 2.0, (), 50.0),
        "export": StageCost(other_seconds=60.0),
    }
    forecast = Forecast(costs, clock)
    forecast.begin("prune", 100)
    clock.now = 30
    forecast.observe({"event": "step", "step": 10})
    assert forecast.seconds_left() == pytest.approx(90 * 3 + 3 * 250 + 60)


def test_steps_of_an_earlier_session_are_not_forecast_again() -> None:
    clock = Clock()
    forecast = Forecast({"prune": StageCost(100, 1.0, ((0, 10.0), (40, 10.0), (80, 10.0)))}, clock)
    forecast.begin("prune", 100, [0, 40, 80])
    forecast.observe({"event": "resume", "step": 50})
    assert forecast.seconds_left() == 50 + 10


def test_durations_are_printed_no_more_exactly_than_they_are_known() -> None:
    texts = {20: "under 1 min", 90: "2 min", 89 * 60: "89 min", 7500: "2 h 5 min", 3 * 86400: "3 days"}
    for seconds, text in texts.items():
        assert format_duration(seconds) == text
