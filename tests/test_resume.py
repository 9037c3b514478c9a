"""Every training stage killed by SIGKILL at any moment resumes and ends with the same weights to the last bit."""

from __future__ import annotations

import itertools
import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from spdtool.run.folder import Run

pytestmark = pytest.mark.slow  # it trains whole stages

STAGES = ("teacher", "prune", "distill", "finetune")
STEPS = 12  # of every stage of `killed.py`
ENDS = {name: 128 + getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")}
FREE = ("examples_per_second",)  # all that may differ in a log line


# Single deaths that stay in `make test`, beside several in a row and the signals.
OFTEN = ("older snapshot half removed", "committed")


def list_scenarios(stage: str, *, often: bool = False) -> list[dict[str, Any]]:
    """List the moments at which a stage is killed; `often`: those that `make test` goes through."""
    scenarios = [scenario for scenario in draw_scenarios() if scenario["stage"] == stage]
    if often:
        return [each for each in scenarios if each["deaths"][0][0] in OFTEN or len(each["deaths"]) > 1]
    return scenarios


def draw_scenarios() -> list[dict[str, Any]]:
    """Draw scenarios for every moment in every stage, at seeded steps."""
    draw, scenarios = random.Random(2), []
    for stage in STAGES:
        single_deaths: list[tuple[str, int]] = [
            ("before the optimiser's step", draw.randint(2, STEPS)),
            ("after the optimiser's step", draw.randint(1, STEPS)),
            ("snapshot half written", draw.randint(1, STEPS - 1)),
            ("snapshot written, not renamed", draw.randint(1, STEPS - 1)),
            ("older snapshot half removed", draw.randint(1, STEPS - 2)),
            ("checkpoint half written", 1),
            ("checkpoint written", 1),
            ("record written", 1),
            ("state put away", 2),
            ("committed", 1),
        ]
        scenarios += [{"stage": stage, "minutes": 0, "deaths": [death]} for death in single_deaths]
        several = [
            ("after the optimiser's step", draw.randint(2, 5)),
            ("snapshot half written", draw.randint(1, 3)),
            ("before the optimiser's step", draw.randint(1, 3)),
            ("checkpoint written", 1),
        ]
        scenarios.append({"stage": stage, "minutes": 0, "deaths": several})
        scenarios.append(
            {"stage": stage, "minutes": 1e9, "deaths": [("after the optimiser's step", draw.randint(7, STEPS))]}
        )
        # signals before any timed snapshot is due; steps count from the resumed one, so the third comes after the last
        signals: list[tuple[str, int]] = [("SIGTERM", 2), ("SIGINT", 1), ("SIGHUP", STEPS - 3)]
        if stage in ("teacher", "prune"):  # one without masks and one with them
            scenarios.append({"stage": stage, "minutes": 1e9, "deaths": signals})
    return scenarios


def name_of(scenario: dict[str, Any]) -> str:
    deaths = ", ".join(f"{moment} ({count})" for moment, count in scenario["deaths"])
    return f"{scenario['stage']}: {deaths}" + (", saved at evaluations only" if scenario["minutes"] else "")


def run_scenarios(root: Path, scenarios: list[dict[str, Any]], task: str = "toy") -> tuple[Path, list[dict[str, Any]]]:
    """Run `killed.py`; return the folder of the uninterrupted run, and the result of each scenario."""
    process = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killed.py")), str(root), task],
        input=json.dumps(scenarios),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return root / "uninterrupted", json.loads(process.stdout)


def log(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in FREE} for line in lines]


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_killed_at_any_moment_ends_with_the_same_bits(tmp_path: Path, stage: str) -> None:
    scenarios = list_scenarios(stage)
    uninterrupted, results = run_scenarios(tmp_path, scenarios)
    for scenario, result in zip(scenarios, results, strict=True):
        check_scenario(uninterrupted, scenario, result)


def test_a_killed_prune_stage_ends_with_the_same_bits(tmp_path: Path) -> None:
    """The phase with masks, events and grafting."""
    scenarios = list_scenarios("prune", often=True)
    assert [len(scenario["deaths"]) for scenario in scenarios] == [1, 1, 4, 3]
    uninterrupted, results = run_scenarios(tmp_path, scenarios)
    for scenario, result in zip(scenarios, results, strict=True):
        check_scenario(uninterrupted, scenario, result)
    check_draws_and_weights_vary(uninterrupted)


@pytest.mark.long
@pytest.mark.parametrize("task", ["toy-tags", "toy-questions", "toy-ranking", "toy-unlabeled", "toy-unlabeled-tags"])
def test_a_killed_stage_of_every_kind_ends_with_the_same_bits(tmp_path: Path, task: str) -> None:
    scenario = {"stage": "prune", "minutes": 0, "deaths": [("after the optimiser's step", 7)]}
    uninterrupted, (result,) = run_scenarios(tmp_path, [scenario], task)
    check_scenario(uninterrupted, scenario, result)


def check_scenario(uninterrupted: Path, scenario: dict[str, Any], result: dict[str, Any]) -> None:
    """Compare a killed stage with the uninterrupted one."""
    name = name_of(scenario)
    ends = [ENDS.get(moment, -signal.SIGKILL) for moment, _ in scenario["deaths"]]
    assert result["ends"] == ends, f"{name}: a death was not met"
    assert result["last"] == 0, name
    is_committed = scenario["deaths"][0][0] in ("committed", "state put away")
    assert result["done"] == is_committed, f"{name}: one rename commits"
    stage, folder = scenario["stage"], Path(result["folder"])
    leftovers = {"state"} if scenario["deaths"] == [("committed", 1)] else set()  # the next stage removes it
    assert {p.name for p in (folder / stage).iterdir()} - leftovers == {
        p.name for p in (uninterrupted / stage).iterdir()
    }
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (folder / stage / file).read_bytes() == (uninterrupted / stage / file).read_bytes(), f"{name}: {file}"
    assert log(folder / stage) == log(uninterrupted / stage), name
    steps = [event["step"] for event in log(folder / stage) if event["event"] == "step"]
    assert steps == list(range(1, STEPS + 1)), name
    result, expected = (Run.open(path).training_result(stage) for path in (folder, uninterrupted))
    expected.fit.examples_per_second = result.fit.examples_per_second
    assert result == expected, name
    leftovers = {path.name for path in folder.iterdir()} - {*STAGES, "run.json", ".lock", f".{stage}.spent"}
    assert leftovers == set(), name


def check_draws_and_weights_vary(uninterrupted: Path) -> None:
    """Check that draws differ and weights move; otherwise the comparison would prove nothing."""
    for earlier, stage in itertools.pairwise(STAGES):
        before, after = (load_file(uninterrupted / name / "model.safetensors") for name in (earlier, stage))
        assert any(not before[name].equal(after[name]) for name in before)
    draws = {tuple(event["drawn"]) for event in log(uninterrupted / "prune") if event["event"] == "step"}
    assert len(draws) > 2
