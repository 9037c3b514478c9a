"""What the student's three phases share: load student and teacher, graft, train, and hand over exact zeros.

`prune`, `distill` and `finetune` differ in their schedules and in whether they prune; this is their common story.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from spdtool import console, data, encoders, evaluation, training
from spdtool.distillation.grafting import Grafting
from spdtool.distillation.losses import distillation
from spdtool.distillation.observation import observe
from spdtool.errors import ModelError
from spdtool.pruning.gradual import Pruner
from spdtool.pruning.masks import Masks, check_counts
from spdtool.recipe import Distilled, Recipe
from spdtool.run import Run
from spdtool.schedules import Schedule, replacing_rate

MakePruner = Callable[[Masks, int], Pruner]


def phase(run: Run, stage: str, start: str, make_pruner: MakePruner) -> dict[str, Any]:
    """Train the student from the checkpoint of stage `start`; write `stage`; return its metrics.

    Args:
        make_pruner: given the masks found in the checkpoint and the number of steps, what prunes and holds.

    Raises:
        StageMissing, Corrupt: the run does not hold what is needed.
        DataError, ModelError, DeviceError: the data, the model or the device cannot be used.
        GateError: the zeros are not the requested ones in the end.
    """
    recipe = run.recipe
    section = recipe.section(stage)
    assert isinstance(section, Distilled)
    front = training.accelerator(recipe)
    eager = section.loss.attention > 0
    folder = run.read(start)
    teacher_folder = folder if start == "teacher" else run.read("teacher")
    student = encoders.load(folder, dropout=section.dropout, eager=eager).to(front.device)
    teacher = encoders.load(teacher_folder, eager=eager).to(front.device).requires_grad_(False)
    tokenizer = encoders.load_tokenizer(folder)
    task, splits = data.prepare(recipe, tokenizer, encoders.label_names(student))
    forward = evaluation.torch_forward(student, front.device)
    for model in (student, teacher):
        encoders.prime(model)
        # never recompute a stand-in: by the backward pass it is in eval mode again, and its dropout gone
        checkpointing = recipe.gradient_checkpointing and model is student
        encoders.tune(model, checkpointing=checkpointing, compile_layers=recipe.compile)

    steps = section.steps_for(len(splits["train"]))
    masks = Masks.from_zeros(encoders.prunable_linears(student))
    pruner = make_pruner(masks, steps)
    grafting = Grafting(
        encoders.layer_stack(student),
        encoders.layer_stack(teacher),
        seed=recipe.seed,
        stand_in_dropout=section.grafting.stand_in_dropout,
    )
    rate = rate_of(section)
    depth = len(encoders.layer_stack(student))
    hidden, attention = section.loss.hidden > 0, section.loss.attention_on if eager else None

    def loss(batch: dict[str, torch.Tensor], progress: float) -> training.LossTerms:
        with torch.no_grad():
            taught = observe(teacher, batch, hidden=hidden, attention=attention)
        with grafting.draw(rate(progress)):
            learnt = observe(student, batch, hidden=hidden, attention=attention)
        _check_attention(learnt.attention, taught.attention, depth, student)
        return distillation(learnt, taught, batch, section.loss, regression=task.regression)

    parts = training.Fit(
        student,
        loss,
        splits["train"],
        lambda: evaluation.evaluate(task, forward, splits),
        pruner,
        bystanders=_frozen(student, teacher, section),
        random_state=grafting.state,
        restore_random=grafting.restore,
        facts=lambda progress: {"replacing_rate": rate(progress), "drawn": grafting.drawn},
    )
    with run.stage(stage) as work:
        if steps > 0:
            with console.progress(stage, steps) as watch:
                work.metrics |= training.fit(parts, section, recipe, work, run.fingerprint(stage), front, watch)
        pruner.seal()
        encoders.save(student, tokenizer, work.folder)
        saved = encoders.zeros(work.folder, list(masks.parameters))
        check_counts(saved, pruner.target, pruner.scope)
        work.metrics |= {
            "dev": evaluation.evaluate(task, forward, splits),
            "sparsity": masks.sparsity(),
            "zeros": {name: list(count) for name, count in saved.items()},
        }
    return work.metrics


def holding(run: Run) -> MakePruner:
    """For the phases after pruning: the masks of the checkpoint, held; they must already be at the target.

    Raises (when called on a checkpoint):
        GateError: the checkpoint has another sparsity.
    """

    def make(masks: Masks, steps: int) -> Pruner:  # noqa: ARG001
        masks.check(run.recipe.sparsity, run.recipe.prune.scope)
        return pruner_of(run.recipe, masks, [])

    return make


def pruner_of(recipe: Recipe, masks: Masks, events: list[tuple[int, float]]) -> Pruner:
    """What prunes `masks` at `events` as the recipe says, and holds them."""
    section = recipe.prune
    return Pruner(
        masks,
        events,
        target=recipe.sparsity,
        criterion=section.criterion,
        pattern=section.pattern,
        scope=section.scope,
    )


def rate_of(section: Distilled) -> Schedule:
    """The replacing rate over the phase."""
    grafting = section.grafting
    return replacing_rate(
        grafting.schedule, start=grafting.start, hold=grafting.hold, base=grafting.base, rise=grafting.rise
    )


def _frozen(student: Any, teacher: Any, section: Distilled) -> list[torch.nn.Parameter]:
    """What the published code's clipping counts beside the trained weights: the rest of the student, the stand-ins."""
    if section.clip_over == "trained":
        return []
    trained = encoders.trained_parameters(student, section.train)
    rest = [parameter for name, parameter in student.named_parameters() if name not in trained]
    return rest + list(encoders.layer_stack(teacher).parameters())


def _check_attention(learnt: Any, taught: Any, depth: int, student: Any) -> None:
    if learnt is not None and not len(learnt) == len(taught) == depth:
        raise ModelError(
            f"{student.config.model_type!r} shows {len(learnt)} attention maps for {depth} layers",
            "set the attention loss to 0 for this architecture",
        )
