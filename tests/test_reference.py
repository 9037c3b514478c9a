"""`recipes/reference.toml` against the published algorithm, written here as slow plain code, step by step.

Huang et al., ACL 2022, arXiv 2110.08190, follows its published code. The encoder is written out too, from tensors
named as in a checkpoint, so that the plain code uses nothing of spdtool or transformers but the order of the rows.
Deliberate differences of `reference.toml` from the published code are the same here: the 12 events end at the target,
each phase resets AdamW's moments and the random generators, and regression learns from the gold values.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spdtool.data import tokens as data
from spdtool.data.batches import training_batches
from spdtool.models.load import load_model, load_tokenizer, save_model
from spdtool.run.folder import Run
from spdtool.tasks.task import Task
from spdtool.training import loop, snapshot

pytestmark = pytest.mark.slow  # it trains whole stages

LAYERS, HEADS, WIDTH, LENGTH = 3, 2, 16, 16
EPOCHS = {
    "prune": 6,
    "distill": 2,
    "finetune": 4,
}  # room for 12 events; distill : finetune is 1 : 2 as in the recipe, so that the learning rates join
BATCH, SPARSITY = 4, 0.9
PEAK, EPSILON, BETAS, CLIP = 6.4e-4, 1e-8, (0.9, 0.999), 1.0
SIX = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
       "intermediate.dense", "output.dense")  # fmt: skip
Weights = dict[str, Tensor]


class Plain:
    """The published algorithm, one phase after the other."""

    def __init__(self, teacher: Weights, dropout: float, seed: int, regression: bool) -> None:
        self.teacher = {name: weight.clone().requires_grad_() for name, weight in teacher.items()}
        self.student = {name: weight.clone().requires_grad_() for name, weight in teacher.items()}
        self.dropout, self.seed, self.regression = dropout, seed, regression
        self.trained = [name for name in teacher if ".encoder.layer." in name]
        self.pruned = [f"bert.encoder.layer.{i}.{linear}.weight" for i in range(LAYERS) for linear in SIX]
        self.masks = {name: torch.ones_like(teacher[name], dtype=torch.bool) for name in self.pruned}

    def start_phase(self) -> None:
        """Start from the float32 checkpoint of the phase before, with new moments and generators."""
        self.student = {n: w.detach().float().to(w.dtype).requires_grad_() for n, w in self.student.items()}
        self.first = {name: torch.zeros_like(self.student[name]) for name in self.trained}
        self.second = {name: torch.zeros_like(self.student[name]) for name in self.trained}
        self.updates = dict.fromkeys(self.trained, 0)
        self.draws = random.Random(self.seed)
        torch.manual_seed(self.seed)

    def forward(
        self, is_student: list[bool] | None, batch: dict[str, Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Compute logits, hidden states and attention probabilities; None runs the teacher without dropout."""
        outer = self.teacher if is_student is None else self.student
        rate = 0.0 if is_student is None else self.dropout

        def drop(x: Tensor) -> Tensor:
            return F.dropout(x, rate, training=True) if rate > 0 else x

        def norm(x: Tensor, weights: Weights, name: str) -> Tensor:
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-12).sqrt()
            return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

        def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
            return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

        rows, length = batch["input_ids"].shape
        e = "bert.embeddings"
        words = outer[f"{e}.word_embeddings.weight"]
        words = torch.cat([words[:1].detach(), words[1:]])  # the padding word has no gradient
        x = words[batch["input_ids"]]
        x = x + outer[f"{e}.token_type_embeddings.weight"][batch["token_type_ids"]]
        x = x + outer[f"{e}.position_embeddings.weight"][torch.arange(length)]
        x = drop(norm(x, outer, f"{e}.LayerNorm"))
        hidden, attentions = [x], []
        for index in range(LAYERS):
            weights = self.teacher if is_student is None or not is_student[index] else self.student
            layer = f"bert.encoder.layer.{index}"
            query, key, value = (
                linear(x, weights, f"{layer}.attention.self.{projection}").view(rows, length, HEADS, -1).transpose(1, 2)
                for projection in ("query", "key", "value")
            )
            scores = query @ key.transpose(-1, -2) / math.sqrt(WIDTH / HEADS)
            scores = scores.masked_fill(batch["attention_mask"][:, None, None, :] == 0, -math.inf)
            attention = drop(scores.softmax(-1))
            attentions.append(attention)
            mixed = (attention @ value).transpose(1, 2).reshape(rows, length, WIDTH)
            mixed = drop(linear(mixed, weights, f"{layer}.attention.output.dense"))
            x = norm(mixed + x, weights, f"{layer}.attention.output.LayerNorm")
            wide = linear(x, weights, f"{layer}.intermediate.dense")
            wide = 0.5 * wide * (1 + torch.erf(wide / math.sqrt(2)))
            x = norm(drop(linear(wide, weights, f"{layer}.output.dense")) + x, weights, f"{layer}.output.LayerNorm")
            hidden.append(x)
        pooled = drop(torch.tanh(linear(x[:, 0], outer, "bert.pooler.dense")))
        return linear(pooled, outer, "classifier"), hidden, attentions

    def step(self, batch: dict[str, Tensor], rate: float, learning_rate: float) -> dict[str, Any]:
        """Do one optimiser step; return the loss terms and the draw."""
        with torch.no_grad():
            teacher_outputs = self.forward(None, batch)
        is_student = [self.draws.random() < rate for _ in range(LAYERS)]
        student_outputs = self.forward(is_student, batch)
        terms = {
            "logits": self.logit_term(student_outputs[0], teacher_outputs[0], batch["labels"]),
            "hidden": sum((a - b).square().mean() for a, b in zip(student_outputs[1], teacher_outputs[1], strict=True)),
            "attention": sum(
                (a - b).float().square().mean() for a, b in zip(student_outputs[2], teacher_outputs[2], strict=True)
            ),
        }
        total = terms["logits"] + terms["hidden"] + terms["attention"]
        all_weights = [*self.student.values(), *self.teacher.values()]
        for weight in all_weights:
            weight.grad = None
        total.backward()
        norm = math.sqrt(sum(float(w.grad.square().sum()) for w in all_weights if w.grad is not None))
        factor = min(1.0, CLIP / (norm + 1e-6))
        with torch.no_grad():
            for name in self.trained:
                if self.student[name].grad is not None:
                    self.update(name, self.student[name].grad * factor, learning_rate)
            for name, mask in self.masks.items():
                self.student[name].mul_(mask)
        return {"drawn": is_student, "loss": float(total.detach())} | {
            n: float(term.detach()) for n, term in terms.items()
        }

    def logit_term(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the logit loss in float32, as spdtool does, although the model here is in float64."""
        student, teacher = student_logits.float(), teacher_logits.float()
        if self.regression:
            return (student[:, 0] - labels).square().mean()
        return -(teacher.softmax(-1) * student.log_softmax(-1)).mean()

    def update(self, name: str, gradient: Tensor, learning_rate: float) -> None:
        """Update by AdamW without decay; moments of pruned weights continue, which affects no live weight."""
        self.updates[name] += 1
        count, (slow, slower) = self.updates[name], BETAS
        self.first[name].mul_(slow).add_(gradient, alpha=1 - slow)
        self.second[name].mul_(slower).add_(gradient.square(), alpha=1 - slower)
        mean = self.first[name] / (1 - slow**count)
        square = self.second[name] / (1 - slower**count)
        self.student[name].sub_(learning_rate * mean / (square.sqrt() + EPSILON))

    def prune(self, event: int, events: int) -> None:
        """Prune the smallest weights of each matrix, dead ones included, at event `event` of `events`."""
        target = SPARSITY + (0 - SPARSITY) * (1 - event / events) ** 3
        with torch.no_grad():
            for name in self.pruned:
                flat = self.student[name].view(-1)
                sizes = [abs(value) for value in flat.tolist()]
                smallest = sorted(range(len(sizes)), key=sizes.__getitem__)
                flat[smallest[: round(len(sizes) * target)]] = 0.0
                self.masks[name] = self.student[name] != 0


@pytest.mark.parametrize(
    ("regression", "dropout"),
    [
        (False, 0.1),
        (True, 0.0),
        pytest.param(False, 0.0, marks=pytest.mark.long),
        pytest.param(True, 0.1, marks=pytest.mark.long),
    ],
)
def test_every_step_equals_that_of_the_published_algorithm(
    regression: bool, dropout: float, toys: ModuleType, toy_task: Callable[..., Task], toy_run: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Train in float64, because AdamW would amplify the rounding of almost-zero gradients in float32.

    The fused AdamW of the CPU corrects its bias in float32 anyway, so the unfused one runs here.
    """

    def load(*args: Any, **options: Any) -> Any:
        return original_load(*args, **options).double()

    def write(root: Any, state: snapshot.Snapshot) -> None:
        snapshots[state.step] = {name: weight.clone() for name, weight in state.tensors["model"].items()}
        dead[state.step] = {n[5:]: d.clone() for n, d in state.tensors["pruner"].items() if n.startswith("dead.")}

    def unfused(*args: Any, **options: Any) -> torch.optim.AdamW:
        optimizer = original_adamw(*args, **options)
        for group in optimizer.param_groups:
            group["fused"] = False
        return optimizer

    original_load, original_adamw = load_model, loop.create_adamw
    task = toy_task(train=14, dev=6, labels=() if regression else ("bad", "good", "mixed"))
    folder = encoders_folder(toys, toy_run, dropout, 1 if regression else 3)
    run = toy_run(
        *[f"{stage}.epochs={count}" for stage, count in EPOCHS.items()],
        *[f"{stage}.batch_size={BATCH}" for stage in EPOCHS],
        "prune.events=12", f"max_length={LENGTH}", "save_minutes=0",
        name="reference", sparsity=SPARSITY, given_teacher=folder, seed=5, until="teacher",
    )  # fmt: skip
    monkeypatch.setattr("spdtool.stages.teacher.load_model", load)
    monkeypatch.setattr("spdtool.stages.phase.load_model", load)
    monkeypatch.setattr(snapshot, "write_snapshot", write)
    monkeypatch.setattr(loop, "create_adamw", unfused)
    teacher = load(run.path / "teacher")
    plain = Plain(teacher.state_dict(), dropout, 5, regression)
    rows = data.encode_splits(load_tokenizer(run.path / "teacher"), task.dataset.load(None, 5), LENGTH)["train"]
    per_epoch = math.ceil(len(rows) / BATCH)
    steps = {stage: count * per_epoch for stage, count in EPOCHS.items()}
    events = {round(index * steps["prune"] / 12): index for index in range(1, 13)}
    assert len(events) == 12

    for stage in EPOCHS:
        snapshots: dict[int, Weights] = {}
        dead: dict[int, Weights] = {}
        getattr(__import__(f"spdtool.stages.{stage}", fromlist=[stage]), stage)(run)
        log = [json.loads(line) for line in (run.path / stage / "metrics.jsonl").read_text("utf-8").splitlines()]
        logged = {event["step"]: event for event in log if event["event"] == "step"}
        pruned = {event["step"]: event["sparsity"] for event in log if event["event"] == "prune"}
        assert sorted(logged) == list(range(1, steps[stage] + 1))
        assert sorted(pruned) == (sorted(events) if stage == "prune" else [])
        final = {name: weight.detach() for name, weight in load(run.path / stage).named_parameters()}

        plain.start_phase()
        for step in range(1, steps[stage] + 1):
            epoch, index = divmod(step - 1, per_epoch)
            batch = training_batches(rows, BATCH, 5, epoch, pool=None)[index]
            inputs = {name: torch.from_numpy(column) for name, column in rows.collate(batch, LENGTH).items()}
            rate, learning_rate = schedules(stage, step - 1, steps)
            expected = plain.step(inputs, rate, learning_rate)
            if stage == "prune" and step in events:
                plain.prune(events[step], 12)
                assert pruned[step] == pytest.approx(SPARSITY - SPARSITY * (1 - events[step] / 12) ** 3, abs=1e-9)
            logged_step = logged[step]
            assert logged_step["drawn"] == expected["drawn"], (stage, step)
            assert logged_step["replacing_rate"] == pytest.approx(rate, abs=1e-9)
            assert logged_step["learning_rate"] == pytest.approx(learning_rate, rel=1e-9)
            for term in ("loss", "logits", "hidden", "attention"):
                assert logged_step["losses"][term] == pytest.approx(expected[term], rel=1e-5, abs=1e-7), (
                    stage,
                    step,
                    term,
                )
            for name, weight in snapshots.get(step, final).items():
                if not name.endswith("key.bias"):  # a key bias has no effect, so its gradient is only rounding
                    error = float((weight - plain.student[name].detach()).abs().max())
                    assert error < 1e-6, (stage, step, name, error)
            for name, mask in plain.masks.items():
                assert torch.equal(snapshots.get(step, final)[name] != 0, mask), (stage, step, name)
                if step in dead:
                    assert torch.equal(dead[step][name], ~mask), (stage, step, name)
    for name in plain.pruned:
        size = plain.masks[name].numel()
        assert int((~plain.masks[name]).sum()) == round(size * SPARSITY)


def schedules(stage: str, step: int, steps: dict[str, int]) -> tuple[float, float]:
    """Replacing rate and learning rate of a step, counted from 0."""
    if stage == "prune":
        return 0.8, PEAK * (1 - step / steps["prune"])
    after = steps["distill"] + steps["finetune"]  # the learning rate restarts, and falls once over both phases
    if stage == "distill":
        return 0.8 + 0.2 * step / steps["distill"], PEAK * (1 - step / after)
    return 1.0, PEAK * (1 - (steps["distill"] + step) / after)


def encoders_folder(toys: ModuleType, toy_run: Any, dropout: float, labels: int) -> str:
    """Save a random model and return its folder, to use as the fine-tuned teacher."""
    from spdtool import plugins

    names = {0: "score"} if labels == 1 else dict(enumerate(plugins.datasets.get("toy").labels))
    model = toys.bert(
        LAYERS, hidden=WIDTH, dropout=dropout, labels=labels, seed=3, num_attention_heads=HEADS, id2label=names,
        label2id={name: index for index, name in names.items()},
    )  # fmt: skip
    folder = toy_run().path.parent / "given"
    save_model(model, toys.tokenizer(), folder)
    return str(folder)
