"""The training loop: schedules, clipping, the returned weights, and exact resuming."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from spdtool.data import tokens as data
from spdtool.data.batches import training_batches
from spdtool.distillation.lesson import GoldLabelLesson
from spdtool.errors import DeviceError, GateError
from spdtool.models.layers import find_prunable_weights
from spdtool.models.predict import to_device
from spdtool.pruning.masks import Masks
from spdtool.pruning.pruner import Pruner
from spdtool.recipe.fields import Recipe
from spdtool.recipe.training import Prune, Training, TrainingLength
from spdtool.run.folder import Stage
from spdtool.run.records import Evaluation, FitResult, Scores
from spdtool.tasks.task import Task
from spdtool.training.accelerator import create_accelerator
from spdtool.training.learner import Learner
from spdtool.training.loop import choose_evaluation_steps, fit
from spdtool.training.optimizer import create_adamw


@dataclass(kw_only=True)
class ScriptedLearner(Learner):
    """A learner with given dev scores, one for each evaluation; None measures them."""

    script: Iterator[float] | None = None

    def score(self) -> tuple[Scores, Scores | None]:
        return super().score() if self.script is None else ({"score": next(self.script)}, None)


class Bench:
    """Makes a tiny model, rows and all other arguments of `fit`, anew for every call."""

    def __init__(self, folder: Path, toys: ModuleType, task: Task) -> None:
        self.folder, self.toys, self.task = folder, toys, task
        self.events: list[dict[str, Any]] = []
        self.model: Any = None

    def fit(
        self,
        section: Training,
        *,
        recipe: Recipe | None = None,
        stop: int | None = None,
        name: str = "work",
        fingerprint: str = "f",
        pruning: bool = False,
        scores: list[float] | None = None,
        dropout: float = 0.0,
        on_step: Callable[[int, Any], None] = lambda _step, _model: None,
        clipped: Callable[[Any], list[nn.Parameter]] = lambda _model: [],
    ) -> FitResult:
        """Train; `stop` raises KeyboardInterrupt after the log line of that step; `scores` are the dev scores."""
        recipe = recipe or Recipe(device="cpu", save_minutes=1e9, bucketing=False, max_length=32)
        self.model = model = self.toys.bert(2, dropout=dropout)
        splits = data.encode_splits(self.toys.tokenizer(), self.task.dataset.load(None, 0), 32)
        pruner = None
        if pruning:
            pruner = Pruner(Masks(find_prunable_weights(model)), [(3, 0.3), (8, 0.6)], Prune(), 0.6)

        def on_event(event: dict[str, Any]) -> None:
            self.events.append(event)
            if event["event"] == "step":
                on_step(event["step"], model)
                if event["step"] == stop:
                    raise KeyboardInterrupt

        stage = Stage("teacher", self.folder / name, fingerprint)
        stage.folder.mkdir(exist_ok=True)
        torch.manual_seed(123)  # whatever was random before must not matter
        learner = ScriptedLearner(
            model=model,
            tokenizer=self.toys.tokenizer(),
            task=self.task,
            splits=splits,
            scored_rows=splits["train"].sample(0, seed=0),
            accelerator=create_accelerator(recipe),
            pruner=pruner,
            script=iter(scores) if scores else None,
        )
        gold_lesson = GoldLabelLesson(model, self.task.gold_loss)
        gold_lesson.clipped_parameters = clipped(model)
        rows = splits["train"]
        return fit(learner, gold_lesson, rows, section, section.length(len(rows)), recipe, stage, on_event)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def log(self, name: str = "work") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture
def bench(tmp_path: Path, toys: ModuleType, toy_task: Callable[..., Task]) -> Bench:
    return Bench(tmp_path, toys, toy_task(train=32, dev=16))


def section(**settings: Any) -> Training:
    return Training(
        **{"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "warmup": 0.0, "keep_best": False} | settings
    )


def have_equal_weights(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)


def test_the_dev_set_is_scored_evenly_and_after_the_last_step() -> None:
    cases = [
        (10, 30, 1, {10, 20, 30}),
        (10, 25, 1, {10, 20, 25}),
        (10, 5, 1, {5}),
        (10, 20, 2, {5, 10, 15, 20}),
        (3, 6, 2, {2, 3, 4, 6}),
        (1, 3, 5, {1, 2, 3}),
        (7, 7, 3, {2, 5, 7}),
    ]
    for case in cases:
        steps_per_epoch, steps, evaluations, expected = case
        length = TrainingLength(steps / steps_per_epoch, steps, steps_per_epoch, "")
        assert choose_evaluation_steps(length, evaluations) == expected, case


def test_biases_and_normalisation_do_not_decay(toys: ModuleType) -> None:
    model = toys.bert(2)
    optimizer = create_adamw(model.parameters(), section(weight_decay=0.1, epsilon=1e-6), torch.device("cpu"))
    decayed = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        plain = name.endswith("bias") or "LayerNorm" in name
        assert decayed.pop(id(parameter)) == (0.0 if plain else 0.1), name
    assert not decayed
    assert {group["eps"] for group in optimizer.param_groups} == {1e-6}


def test_every_step_has_the_scheduled_learning_rate_and_one_batch_of_its_epoch(bench: Bench) -> None:
    summary = bench.fit(section(warmup=0.25, final_learning_rate=0.2))
    steps = [event for event in bench.log() if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 9))
    for index, event in enumerate(steps):  # the rate of the step that was just done
        progress = index / 8
        factor = progress / 0.25 if progress < 0.25 else 1 - 0.8 * (progress - 0.25) / 0.75
        assert event["learning_rate"] == pytest.approx(1e-3 * factor)
        assert event["epoch"] == pytest.approx((index + 1) / 4)
        assert event["examples_per_second"] > 0
    assert [event["step"] for event in bench.log() if event["event"] == "eval"] == [4, 8]
    assert summary.steps == 8
    assert summary.epochs == 2
    assert [evaluation.step for evaluation in summary.evaluations] == [4, 8]
    assert bench.log() == [event for event in bench.events if event["event"] != "resume"]


def test_training_equals_plain_adamw_on_plain_batches(bench: Bench, toys: ModuleType) -> None:
    bench.fit(section(weight_decay=0.05, epsilon=1e-3))
    model = toys.bert(2).train()
    rows = data.encode_splits(toys.tokenizer(), bench.task.dataset.load(None, 0), 32)["train"]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0}], lr=1e-3, eps=1e-3
    )
    step = 0
    for epoch in range(2):
        for batch in training_batches(rows, 8, 0, epoch, pool=None):
            inputs = to_device(rows.collate(batch, 32), "cpu")
            labels = inputs.pop("labels")
            F.cross_entropy(model(**inputs).logits, labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (1 - step / 8)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(bench.model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("accumulate", [2, 3, 8, 20])
def test_micro_batches_give_the_same_weights_up_to_rounding(bench: Bench, accumulate: int) -> None:
    plan = {"epsilon": 1e-3}  # large, so that gradients that are only rounding stay small
    bench.fit(section(**plan), name="whole")
    expected = bench.weights()
    bench.fit(section(accumulate=accumulate, **plan), name="pieces")
    for name, tensor in bench.weights().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    losses = [[e["losses"]["loss"] for e in bench.log(n) if e["event"] == "step"] for n in ("whole", "pieces")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_frozen_parameters_do_not_change(bench: Bench, toys: ModuleType) -> None:
    bench.fit(section(train="layers", weight_decay=0.1))
    before, after = toys.bert(2).state_dict(), bench.weights()
    for name in before:
        has_changed = not torch.equal(before[name], after[name])
        assert has_changed == name.startswith("bert.encoder.layer."), name


@pytest.mark.parametrize("over", ["trained", "all"])
def test_the_clipped_norm_covers_the_parameters_of_the_recipe(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, over: str
) -> None:
    clipped_norms: list[tuple[float, set[int]]] = []

    def step(optimizer: Any, *args: Any, **options: Any) -> Any:
        parameters = [p for p in bench.model.parameters() if p.grad is not None]
        parameter_ids = {id(p) for p in parameters}
        clipped_norms.append((math.sqrt(sum(float(p.grad.square().sum()) for p in parameters)), parameter_ids))
        return original(optimizer, *args, **options)

    original = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", step)

    def frozen(model: Any) -> list[nn.Parameter]:
        return [p for name, p in model.named_parameters() if not name.startswith("bert.encoder.layer.")]

    bench.fit(section(train="layers", clip=1e-3, clip_over=over), clipped=frozen if over == "all" else lambda _: [])
    for norm, parameter_ids in clipped_norms:
        assert norm == pytest.approx(1e-3, rel=1e-2)  # exactly the norm of all that was counted
        assert ({id(p) for p in frozen(bench.model)} <= parameter_ids) == (over == "all")
    before = bench.toys.bert(2).state_dict()
    assert torch.equal(before["classifier.weight"], bench.weights()["classifier.weight"])


@pytest.mark.parametrize("over", ["trained", "all"])
def test_gradients_of_pruned_weights_are_clipped_only_with_clip_over_all(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, over: str
) -> None:
    has_dead_gradients: list[bool] = []

    def clip(accelerator: Any, parameters: Any, max_norm: float) -> Any:
        for weight in find_prunable_weights(bench.model).values():
            assert weight.grad is not None
            has_dead_gradients.append(bool((weight.grad[weight == 0] != 0).any()))
        return original(accelerator, parameters, max_norm)

    original = Accelerator.clip_grad_norm_
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", clip)
    bench.fit(section(epochs=3, clip_over=over), pruning=True)
    assert any(has_dead_gradients) == (over == "all")
    zeros = {int((w == 0).sum()) for w in find_prunable_weights(bench.model).values()}
    assert zeros == {round(32 * 32 * 0.6), round(32 * 64 * 0.6)}, "and stay dead either way"


@pytest.mark.parametrize(("keep", "step", "score"), [(True, 4, 0.9), (False, 12, 0.7)])
def test_the_best_or_the_last_weights_are_returned(bench: Bench, keep: bool, step: int, score: float) -> None:
    weights_after: dict[int, dict[str, torch.Tensor]] = {}

    def copy_weights(current_step: int, _model: Any) -> None:
        weights_after[current_step] = bench.weights()

    summary = bench.fit(section(epochs=3, keep_best=keep), scores=[0.9, 0.8, 0.7], on_step=copy_weights)
    assert summary.best == Evaluation(step=step, metrics={"score": score})
    assert have_equal_weights(bench.weights(), weights_after[step])


def test_of_equal_scores_the_earlier_is_the_best(bench: Bench) -> None:
    assert bench.fit(section(keep_best=True), scores=[0.9, 0.9]).best.step == 4


def test_nothing_counts_as_best_before_the_target_sparsity(bench: Bench) -> None:
    summary = bench.fit(section(epochs=3, keep_best=True), scores=[0.99, 0.5, 0.6], pruning=True)
    assert summary.best == Evaluation(step=12, metrics={"score": 0.6})
    evaluations = [event for event in bench.log() if event["event"] == "eval"]
    assert [event["best"] for event in evaluations] == [False, True, True]
    assert [(e["step"], e["sparsity"]) for e in bench.log() if e["event"] == "prune"] == [(3, 0.3), (8, 0.6)]


@pytest.mark.slow
@pytest.mark.parametrize("pruning", [False, True])
@pytest.mark.parametrize("minutes", [0.0, 1e9], ids=["every step", "every epoch"])
def test_a_resumed_training_equals_an_uninterrupted_one(bench: Bench, pruning: bool, minutes: float) -> None:
    options: dict[str, Any] = {
        "recipe": Recipe(device="cpu", save_minutes=minutes, bucketing=True), "pruning": pruning, "dropout": 0.2,
    }  # fmt: skip
    plan = section(epochs=3, keep_best=True, weight_decay=0.1)
    summary = bench.fit(plan, name="undisturbed", **options)
    expected, log = bench.weights(), bench.log("undisturbed")
    for stop in (1, 3, 4, 5, 8, 11, 12):
        name = f"stopped-{stop}"
        with pytest.raises(KeyboardInterrupt):
            bench.fit(plan, name=name, stop=stop, **options)
        bench.events.clear()
        resumed_result = bench.fit(plan, name=name, **options)
        resumed_steps = [event["step"] for event in bench.events if event["event"] == "resume"]
        assert resumed_steps == ([stop - 1] if minutes == 0 and stop > 1 else [(stop - 1) // 4 * 4] if stop > 4 else [])
        assert have_equal_weights(bench.weights(), expected), stop
        for key in ("steps", "epochs", "best", "evaluations"):
            assert getattr(resumed_result, key) == getattr(summary, key)
        drop = ("examples_per_second",)
        events = [{k: v for k, v in event.items() if k not in drop} for event in bench.log(name)]
        assert events == [{k: v for k, v in event.items() if k not in drop} for event in log]


def test_the_loss_scale_of_fp16_is_in_the_snapshot(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    create = create_accelerator

    def create_for_fp16(recipe: Recipe) -> Any:  # which accelerate itself gives to GPUs alone
        accelerator = create(recipe.model_copy(update={"precision": "bf16"}))
        accelerator.state._mixed_precision = "fp16"
        return accelerator

    monkeypatch.setitem(Bench.fit.__globals__, "create_accelerator", create_for_fp16)
    recipe = Recipe(device="cpu", save_minutes=0)
    with pytest.raises(KeyboardInterrupt):
        bench.fit(section(), stop=4, recipe=recipe)
    folder = sorted((bench.folder / "work" / "state").glob("step-*"))[-1]
    tensors = load_file(folder / "state.safetensors")
    assert int(tensors["loss_scale/steady_steps"]) == int(folder.name.removeprefix("step-"))


def test_a_snapshot_of_another_recipe_is_ignored(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Recipe(device="cpu", save_minutes=0)
    bench.fit(section(), name="fresh", recipe=recipe)
    expected = bench.weights()
    with pytest.raises(KeyboardInterrupt):
        bench.fit(section(), name="stopped", stop=5, fingerprint="another recipe", recipe=recipe)
    bench.events.clear()
    bench.fit(section(), name="stopped", recipe=recipe)
    assert "begins anew: its snapshot belongs to other settings or other rows" in capsys.readouterr().err
    assert not [event for event in bench.events if event["event"] == "resume"]
    assert have_equal_weights(bench.weights(), expected)
    assert [event["step"] for event in bench.log("stopped") if event["event"] == "step"] == list(range(1, 9))


def test_the_seed_decides_the_weights(bench: Bench) -> None:
    def weights(seed: int, name: str) -> dict[str, torch.Tensor]:
        bench.fit(section(), recipe=Recipe(device="cpu", seed=seed), name=name, dropout=0.3)
        return bench.weights()

    first = weights(0, "a")
    assert have_equal_weights(first, weights(0, "b"))
    assert not have_equal_weights(first, weights(1, "c"))


def test_a_pruned_weight_that_became_nonzero_is_not_saved(bench: Bench) -> None:
    def revive(step: int, model: Any) -> None:
        if step == 5:
            with torch.no_grad():
                for weight in find_prunable_weights(model).values():
                    weight[weight == 0] = 1.0

    with pytest.raises(GateError, match="a pruned weight"):
        bench.fit(section(epochs=3), pruning=True, on_step=revive, recipe=Recipe(device="cpu", save_minutes=0))


def test_bf16_trains_and_leaves_float32_weights_and_a_plain_model(bench: Bench) -> None:
    bench.fit(section(), recipe=Recipe(device="cpu", precision="bf16"), name="bf16")
    bf16_weights = bench.weights()
    assert {tensor.dtype for tensor in bf16_weights.values()} == {torch.float32}
    assert bench.model.forward.__func__ is type(bench.model).forward, "no autocast is left, and nothing else is gone"
    bench.fit(section(), name="fp32")
    assert not have_equal_weights(bf16_weights, bench.weights())
    for name, tensor in bench.weights().items():
        assert float((bf16_weights[name] - tensor).abs().max()) < 0.05, name


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="no CUDA device answers"):
        create_accelerator(Recipe(device="cuda"))
    with pytest.raises(DeviceError, match="fp16 training needs a CUDA device"):
        create_accelerator(Recipe(device="auto", precision="fp16"))
    assert create_accelerator(Recipe(device="auto")).device.type == "cpu"
