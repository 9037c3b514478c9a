"""Cost estimates of the stages: epochs, losses, evaluations, and second-order prune events."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
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
    """Make the time of a product or a solve depend on its size only, not on this machine."""
    monkeypatch.setattr(cost, "time_product", lambda shape, _: 1e-9 * shape[0] * shape[1])
    monkeypatch.setattr(cost, "time_update", lambda *_: 2.0)


@pytest.mark.usefixtures("fixed_products")
def test_the_cost_of_a_stage_grows_with_its_work(toys: ModuleType) -> None:
    model, cpu = toys.bert(), torch.device("cpu")

    def seconds(*sets: str, rows: int = 480, **flags: Any) -> float:
        recipe = toys.recipe(*sets, **flags)
        model_of_costs = CostModel(recipe, model, model, Workload(rows, 48, 10.0), cpu)
        return model_of_costs.estimate_stage("prune", recipe.prune).seconds

    cheapest = seconds("prune.criterion=magnitude", "prune.calibration=0", "prune.first=none")
    for assignment in ("prune.epochs=4", "prune.evaluations=4", "prune.loss.attention=1.0"):
        assert seconds("prune.criterion=magnitude", "prune.calibration=0", "prune.first=none", assignment) > cheapest, (
            assignment
        )
    matrices = sum(cost.count_shapes(model).values())
    layerwise = seconds()
    assert layerwise - cheapest >= 3 * 2.0 * matrices, "three events, each of which solves every matrix"
    assert seconds("prune.update=false") < layerwise
    assert seconds("teacher_states_gb=0") > layerwise, "the teacher computes each batch anew"


def test_solving_a_matrix_is_timed_and_a_failure_costs_nothing(toys: ModuleType) -> None:
    from spdtool.pruning.second_order import update_blocks, update_rows

    cpu, section = torch.device("cpu"), toys.recipe().prune
    for update, needs in ((update_rows, ("input_gram",)), (update_blocks, ("fisher_blocks",))):
        assert cost.time_update(update, needs, (32, 64), 0.5, section, cpu) > 0

    def fails(*_: Any) -> torch.Tensor:
        raise RuntimeError("needs more")

    assert cost.time_update(fails, (), (32, 64), 0.5, section, cpu) == 0


def test_a_plan_leaves_removed_heads_and_neurons_out_of_the_bytes_of_a_graph(toy_run: MakeRun) -> None:
    dense, halved, zeros = (
        make_plan(toy_run(folder=name, **{"sparsity": 0.5, "prune.first": 0.2} | fields))
        for name, fields in (
            ("dense", {"sparsity": 0.0, "prune.first": 0.0}),
            ("halved", {"prune.heads": 0.5, "prune.neurons": 0.5}),
            ("zeros", {}),
        )
    )
    assert halved.parameters.zeros > 0
    bytes_left_out = dense.estimate.files["onnx"] - halved.estimate.files["onnx"]
    assert bytes_left_out == 4 * halved.parameters.zeros
    assert zeros.estimate.files["onnx"] == dense.estimate.files["onnx"], "a graph stores every zero"


def test_the_plan_estimates_the_stages_still_to_do(toy_run: MakeRun) -> None:
    plan = make_plan(toy_run())
    seconds = {stage.stage: stage.estimate.seconds for stage in plan.stages if stage.estimate is not None}
    assert all(value > 0 for value in seconds.values())
    shortest, longest = plan.estimate.seconds
    assert shortest < sum(seconds.values()) < longest
    assert plan.estimate.disk_bytes < plan.estimate.peak_bytes
    assert plan.estimate.files["onnx"] >= 4 * plan.parameters.all
    plan_of_two = plan_for_processes(plan, 2, sharded=False)
    events = {
        each_plan.stages[1].estimate.events[-1][1] for each_plan in (plan_for_processes(plan, 2, sharded=True), plan)
    }
    assert len(events) == 1, "sharded, each of two processes has half of the cores and half of the rows"
    assert plan_of_two.stages[1].estimate.events[-1][1] == 2 * plan.stages[1].estimate.events[-1][1]
    assert plan_of_two.stages[1].estimate.step_seconds == plan.stages[1].estimate.step_seconds, "they share the cores"
    assert plan_of_two.stages[-1].estimate == plan.stages[-1].estimate, "one process exports and times"
    assert (plan_of_two.estimate.processes, plan_of_two.estimate.memory_bytes) == (2, plan.estimate.memory_bytes)
    partial_plan = make_plan(toy_run(until="prune"))
    assert [stage.estimate is None for stage in partial_plan.stages] == [True, True, False, False, False, False]
