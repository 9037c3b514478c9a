"""Estimated costs: what makes a stage longer, and that a second-order criterion is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from spdtool.run.folder import Run
from spdtool.stages import cost
from spdtool.stages.cost import CostModel, Workload
from spdtool.stages.estimate import plan_for_processes
from spdtool.stages.plan import make_plan

MakeRun = Callable[..., Run]


@pytest.fixture
def fixed_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products and solutions that take a time of their size, not of this machine."""
    monkeypatch.setattr(cost, "time_product", lambda shape, _: 1e-9 * shape[0] * shape[1])
    monkeypatch.setattr(cost, "time_update", lambda *_: 2.0)


@pytest.mark.usefixtures("fixed_products")
def test_the_cost_of_a_stage_is_that_of_its_work(toys: Any) -> None:
    model, cpu = toys.bert(), torch.device("cpu")

    def seconds(*sets: str, rows: int = 480, **flags: Any) -> float:
        recipe = toys.recipe(*sets, **flags)
        model_of_costs = CostModel(recipe, model, model, Workload(rows, 48, 10.0), cpu)
        return model_of_costs.estimate_stage("prune", recipe.prune).seconds

    plain = seconds("prune.criterion=magnitude", "prune.calibration=0", "prune.first=none")
    for more in ("prune.epochs=4", "prune.evaluations=4", "prune.loss.attention=1.0"):
        assert seconds("prune.criterion=magnitude", "prune.calibration=0", "prune.first=none", more) > plain, more
    matrices = sum(cost.count_shapes(model).values())
    layerwise = seconds()
    assert layerwise - plain >= 3 * 2.0 * matrices, "three events, each of which solves every matrix"
    assert seconds("prune.update=false") < layerwise
    assert seconds("teacher_states_gb=0") > layerwise, "the teacher computes each batch anew"


def test_the_solution_of_a_matrix_is_tried(toys: Any) -> None:
    from spdtool.pruning.second_order import update_blocks, update_rows

    cpu, section = torch.device("cpu"), toys.recipe().prune
    for update, needs in ((update_rows, ("input_gram",)), (update_blocks, ("fisher_blocks",))):
        assert cost.time_update(update, needs, (32, 64), 0.5, section, cpu) > 0

    def fails(*_: Any) -> torch.Tensor:
        raise RuntimeError("needs more")

    assert cost.time_update(fails, (), (32, 64), 0.5, section, cpu) == 0


def test_the_plan_estimates_what_is_to_do(toy_run: MakeRun) -> None:
    plan = make_plan(toy_run())
    seconds = {stage.stage: stage.estimate.seconds for stage in plan.stages if stage.estimate is not None}
    assert all(value > 0 for value in seconds.values())
    least, most = plan.estimate.seconds
    assert least < sum(seconds.values()) < most
    assert plan.estimate.disk_bytes < plan.estimate.peak_bytes
    assert plan.estimate.files["onnx"] >= 4 * plan.parameters.all
    two = plan_for_processes(plan, 2, sharded=False)
    events = {kind.stages[1].estimate.events[-1][1] for kind in (plan_for_processes(plan, 2, sharded=True), plan)}
    assert len(events) == 1, "sharded, each of two processes has half of the cores and half of the rows"
    assert two.stages[1].estimate.events[-1][1] == 2 * plan.stages[1].estimate.events[-1][1]
    assert two.stages[1].estimate.step_seconds == plan.stages[1].estimate.step_seconds, "they share the cores"
    assert two.stages[-1].estimate == plan.stages[-1].estimate, "one process exports and times"
    assert (two.estimate.processes, two.estimate.memory_bytes) == (2, plan.estimate.memory_bytes)
    done = make_plan(toy_run(until="prune"))
    assert [stage.estimate is None for stage in done.stages] == [True, True, False, False, False, False]
