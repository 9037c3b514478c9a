"""`spdtool prune`: exact counts of zeros in every matrix, for any recipe and starting checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from spdtool import console, plugins
from spdtool.errors import Corrupt, GateError, ModelError, RecipeError, RunError, StageMissing, UnknownName
from spdtool.models.layers import find_prunable_weights
from spdtool.models.load import load_model, load_tokenizer, save_model
from spdtool.pruning.allocation import zeros_in
from spdtool.run.folder import Run
from spdtool.stages.prune import prune
from spdtool.stages.teacher import teacher
from spdtool.tasks.task import Task


def zeros(folder: Path) -> dict[str, tuple[int, int]]:
    """Return `(zeros, size)` of every prunable matrix, read with stock transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    return {n: (int((w == 0).sum()), w.numel()) for n, w in find_prunable_weights(model).items()}


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    lines = (run.path / "prune" / "metrics.jsonl").read_text("utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def sparse_teacher(run: Run, sparsity: float) -> None:
    """Replace the teacher by a checkpoint that is already sparse, with a fresh record."""
    folder = run.path / "teacher"
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    with torch.no_grad():
        for weight in find_prunable_weights(model).values():
            weight.view(-1)[: zeros_in(weight.numel(), sparsity)] = 0.0
    result = run.training_result("teacher")
    run.discard("teacher")
    with run.stage("teacher") as work:
        save_model(model, tokenizer, work.folder)
        work.result = result


@pytest.mark.parametrize("sparsity", [0.0, pytest.param(0.5, marks=pytest.mark.long), 0.9, 0.999])
def test_every_matrix_has_exactly_the_zeros_that_were_asked_for(
    toy_run: Callable[..., Run], sparsity: float, stage_files: list[str]
) -> None:
    run = toy_run(sparsity=sparsity, until="teacher")
    metrics = prune(run)
    assert sorted(path.name for path in (run.path / "prune").iterdir()) == stage_files
    counts = zeros(run.path / "prune")
    assert len(counts) == 12
    assert counts == {name: (zeros_in(size, sparsity), size) for name, (_, size) in counts.items()}
    assert metrics.zeros == counts
    total = sum(size for _, size in counts.values())
    assert metrics.sparsity == pytest.approx(sum(count for count, _ in counts.values()) / total)
    assert run.training_result("prune") == metrics
    assert list(run.record("prune").inputs) == ["teacher"]
    assert not (run.path / ".prune.partial").exists()


def test_nothing_else_is_zeroed_and_no_key_is_renamed(toy_run: Callable[..., Run]) -> None:
    run = toy_run(sparsity=0.9, until="prune")
    before, after = (load_file(run.path / stage / "model.safetensors") for stage in ("teacher", "prune"))
    assert before.keys() == after.keys()
    prunable = zeros(run.path / "prune")
    for name, weight in after.items():
        if name not in prunable:
            assert int((weight == 0).sum()) <= int((before[name] == 0).sum()), name


def test_the_events_are_those_of_the_recipe(toy_run: Callable[..., Run]) -> None:
    run = toy_run("prune.first=none", "prune.events=3", "prune.ramp=0.5", sparsity=0.8, until="prune")
    pruned = [(event["step"], event["sparsity"]) for event in events(run, "prune")]
    assert pruned == [(2, pytest.approx(0.8 * (1 - (2 / 3) ** 3))), (4, pytest.approx(0.8 * (1 - (1 / 3) ** 3))),
                      (6, 0.8)]  # fmt: skip
    steps = events(run, "step")
    assert [step["step"] for step in steps] == list(range(1, 13))
    assert [step["sparsity"] for step in steps[5:]] == [pytest.approx(0.8, abs=1e-3)] * 7


def test_the_first_jump_comes_before_the_first_step(toy_run: Callable[..., Run]) -> None:
    run = toy_run("prune.first=0.7", sparsity=0.9, until="prune")
    assert (events(run, "prune")[0]["step"], events(run, "prune")[0]["sparsity"]) == (0, 0.7)
    assert len(events(run, "prune")) == 3


def test_the_global_scope_has_the_exact_total(toy_run: Callable[..., Run]) -> None:
    run = toy_run("prune.scope=global", sparsity=0.77, until="prune")
    counts = zeros(run.path / "prune")
    size = sum(size for _, size in counts.values())
    assert sum(count for count, _ in counts.values()) == zeros_in(size, 0.77)
    assert len({count / size for count, size in counts.values()}) > 3, "the matrices share unevenly"


@pytest.mark.slow
def test_second_order_criteria_prune_whole_blocks(toy_run: Callable[..., Run]) -> None:
    for criterion in ("obert", "layerwise"):
        sets = ("prune.pattern=1x4", f"prune.criterion={criterion}", "prune.calibration=2", "prune.first=none")
        run = toy_run(*sets, sparsity=0.8, until="finetune", folder=criterion)
        for stage in ("prune", "finetune"):
            model = AutoModelForSequenceClassification.from_pretrained(run.path / stage)
            for name, weight in find_prunable_weights(model).items():
                dead_weights = (weight == 0).unflatten(1, (-1, 4)).sum(-1)
                assert set(dead_weights.flatten().tolist()) <= {0, 4}, (criterion, stage, name)
                assert int(dead_weights.sum()) == zeros_in(weight.numel(), 0.8, 4), (criterion, stage, name)


@pytest.mark.parametrize("train", ["layers", "layers+head", "all"])
def test_only_the_chosen_part_is_trained(toy_run: Callable[..., Run], train: str) -> None:
    run = toy_run(f"prune.train={train}", "prune.learning_rate=0.01", until="prune")
    before, after = (load_file(run.path / stage / "model.safetensors") for stage in ("teacher", "prune"))
    trained = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("bert.encoder.layer.") for name in trained)
    assert ("classifier.weight" in trained) == (train != "layers")
    assert any("embeddings" in name for name in trained) == (train == "all")


@pytest.mark.parametrize(
    "sets",
    [
        pytest.param(("prune.loss.attention=1",), marks=pytest.mark.long),
        pytest.param(("prune.loss.hidden=0", "prune.loss.hardness=0"), marks=pytest.mark.long),
        ("prune.grafting.start=0.5", "prune.grafting.stand_in_dropout=true"),
        ("prune.accumulate=3",),
        ("precision=bf16",),
        pytest.param(("prune.dropout=0.3",), marks=pytest.mark.long),
        ("prune.weight_decay=0.5", "prune.clip=0"),
        ("gradient_checkpointing=true", "prune.loss.attention=1"),
    ],
    ids=lambda sets: " ".join(sets),
)
def test_the_zeros_are_exact_with_any_recipe(toy_run: Callable[..., Run], sets: tuple[str, ...]) -> None:
    run = toy_run(*sets, "teacher.epochs=1", sparsity=0.9, until="prune")
    assert all(count == zeros_in(size, 0.9) for count, size in zeros(run.path / "prune").values())


def test_regression_is_pruned_like_the_rest(toy_run: Callable[..., Run], toy_task: Callable[..., Task]) -> None:
    toy_task(labels=())
    run = toy_run(sparsity=0.9, until="prune")
    assert all(count == zeros_in(size, 0.9) for count, size in zeros(run.path / "prune").values())


@pytest.mark.parametrize("dropout", [pytest.param(False, marks=pytest.mark.long), True])
def test_gradient_checkpointing_changes_no_weight(
    toy_run: Callable[..., Run], toy_task: Callable[..., Task], dropout: bool
) -> None:
    """Recomputation draws the same dropout masks, in the student and in the grafted teacher layers."""
    toy_task(dropout=0.2)
    sets = ["teacher.epochs=1", "prune.loss.attention=1", f"prune.grafting.stand_in_dropout={str(dropout).lower()}",
            "prune.grafting.start=0.6"]  # fmt: skip
    plain = toy_run(*sets, folder="plain", until="prune")
    saving = toy_run(*sets, "gradient_checkpointing=true", folder="saving", until="teacher")
    prune(saving)
    before, after = (load_file(run.path / "prune" / "model.safetensors") for run in (plain, saving))
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_the_same_recipe_gives_the_same_bytes_and_another_seed_others(toy_run: Callable[..., Run]) -> None:
    first, repeated = (toy_run(folder=folder, until="prune") for folder in ("one", "again"))
    other_seed = toy_run(folder="other", seed=1, until="prune")
    files = [(run.path / "prune" / "model.safetensors").read_bytes() for run in (first, repeated, other_seed)]
    assert files[0] == files[1] != files[2]


def test_a_criterion_of_a_plugin_is_used(toy_run: Callable[..., Run], clean_plugins: None) -> None:
    has_gradient = []

    @plugins.criteria.register("taylor-of-the-test", needs=("gradient",))
    def taylor(weight: torch.Tensor, stats: Any) -> torch.Tensor:
        has_gradient.append(bool((stats.gradient != 0).any()))
        return (weight * stats.gradient).abs()

    run = toy_run("prune.criterion=taylor-of-the-test", "prune.loss.hardness=0.5", until="prune")
    assert len(has_gradient) == 3 * 12
    assert all(has_gradient)
    assert all(count == zeros_in(size, 0.5) for count, size in zeros(run.path / "prune").values())


def test_it_starts_from_a_sparse_checkpoint_that_someone_else_made(toy_run: Callable[..., Run]) -> None:
    run = toy_run(sparsity=0.8, until="teacher")
    sparse_teacher(run, 0.4)
    zero_masks = {n: w == 0 for n, w in load_file(run.path / "teacher" / "model.safetensors").items()}
    prune(run)
    after = load_file(run.path / "prune" / "model.safetensors")
    for name, (count, size) in zeros(run.path / "prune").items():
        assert count == zeros_in(size, 0.8)
        assert bool((after[name][zero_masks[name]] == 0).all()), "what was dead stays dead"
    assert events(run, "prune")[0]["sparsity"] > 0.4, "the ramp starts where it is"


def test_a_start_that_is_too_sparse_is_refused_before_the_work(toy_run: Callable[..., Run]) -> None:
    run = toy_run(sparsity=0.5, until="teacher")
    sparse_teacher(run, 0.6)
    assert_refused(run, ModelError, "zeros of 1024 already; sparsity 0.5")


def assert_refused(run: Run, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prune(run)
    assert not run.done("prune")
    assert not (run.path / ".prune.partial").exists()


def test_it_is_refused_before_the_teacher(toy_run: Callable[..., Run]) -> None:
    run = toy_run()
    assert_refused(run, StageMissing, "no finished stage 'teacher'")
    assert not run.path.exists()


def test_it_is_refused_on_an_altered_teacher(toy_run: Callable[..., Run]) -> None:
    run = toy_run(until="teacher")
    with (run.path / "teacher" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert_refused(run, Corrupt, "was altered")


def test_prune_refuses_to_run_twice(toy_run: Callable[..., Run]) -> None:
    run = toy_run(until="prune")
    with pytest.raises(RunError, match="already done"):
        prune(run)
    assert run.done("prune")


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ("prune.criterion=magnitud", UnknownName, "no criterion"),
        ("prune.pattern=blocky", UnknownName, "no pattern"),
        ("prune.grafting.schedule=liner", UnknownName, "replacing-rate schedule"),
        ("prune.events=13", RecipeError, "13 prune events do not fit in 8"),
        ("prune.epochs=0", RecipeError, "do not fit"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_before_the_work(
    toy_run: Callable[..., Run], setting: str, error: type[Exception], message: str
) -> None:
    assert_refused(toy_run(setting, until="teacher"), error, message)


def test_a_checkpoint_with_a_wrong_count_of_zeros_is_refused(
    toy_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = toy_run(until="teacher")

    def save_other_weights(model: Any, tokenizer: Any, folder: Path, *weights: Any) -> None:
        with torch.no_grad():
            next(iter(find_prunable_weights(model).values())).add_(1.0)
        original(model, tokenizer, folder)

    original = save_model
    monkeypatch.setattr("spdtool.models.load.save_model", save_other_weights)
    with pytest.raises(GateError, match=r"has 0 zeros of 1024; sparsity 0\.5 asks for 512"):
        prune(run)
    assert not run.done("prune")
    assert not (run.path / "prune").exists()


def test_given_and_fine_tuned_teachers_lead_to_the_same_student(toy_run: Callable[..., Run]) -> None:
    trained = toy_run(folder="one", until="prune")
    with_given_teacher = toy_run(folder="other", given_teacher=str(trained.path / "teacher"))
    teacher(with_given_teacher)
    prune(with_given_teacher)
    files = [(run.path / "prune" / "model.safetensors").read_bytes() for run in (trained, with_given_teacher)]
    assert files[0] == files[1]


def test_a_prune_event_says_which_batch_and_which_matrix_it_is_at(
    toy_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = toy_run("prune.calibration=2", until="teacher")
    events_shown: list[dict[str, Any]] = []
    with console.listen(lambda stage, steps, event: events_shown.append(event)):
        prune(run)
    works = [event["work"] for event in events_shown if event["event"] == "pruning"]
    works = [work for work in works if work.startswith("event 2 of 3")]
    matrices = len(run.training_result("prune").zeros)
    expected = ["looking at rows"]
    expected += [f"calibration batch {number} of 2" for number in (1, 2)]
    expected += [f"scoring matrix {number} of {matrices}" for number in range(1, matrices + 1)]
    expected += [f"solving matrix {number} of {matrices}" for number in range(1, matrices + 1)]
    assert works == [f"event 2 of 3, {text}" for text in expected]
    assert "pruning" not in (run.path / "prune/metrics.jsonl").read_text(), "for the display alone"
