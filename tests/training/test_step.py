"""One optimiser step: fp16 that overflows, what is read from the device, and how many operations it has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spdtool.distillation.lesson import DistillationLesson, GoldLabelLesson, Lesson, TokenizedModel
from spdtool.distillation.losses import WHOLE_BATCH
from spdtool.models.layers import (
    find_prunable_layers,
    find_prunable_weights,
    install_capture_hooks,
    select_trained_parameters,
)
from spdtool.pruning.masks import Masks
from spdtool.pruning.pruner import Pruner
from spdtool.recipe.fields import Recipe
from spdtool.recipe.training import Loss, Prune
from spdtool.tasks.classification import Classification
from spdtool.training.accelerator import create_accelerator
from spdtool.training.graphs import Recording, StepGraphs
from spdtool.training.learner import Learner
from spdtool.training.microbatches import Microbatch
from spdtool.training.optimizer import create_adamw
from spdtool.training.precision import CastWeights, LossScale, cast_linear_weights
from spdtool.training.statistics_collector import StatisticsCollector
from spdtool.training.step import LossWindow, Stepper

CPU = torch.device("cpu")
EPSILON = 1e-3  # a key's bias has no gradient but rounding, which AdamW would blow up
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def accelerator_of(precision: str) -> Accelerator:
    """An Accelerator of the CPU; that of fp16 is one which accelerate itself gives to GPUs alone."""
    accelerator = create_accelerator(Recipe(device="cpu", precision="fp32" if precision == "fp32" else "bf16"))
    if precision == "fp16":
        accelerator.state._mixed_precision = "fp16"
    return accelerator


class Repeated:
    """The double of a CUDA graph: the same buffers, and the operations launched again."""

    def __init__(self, step: Callable[[], Any]) -> None:
        self.replay = step


class RepeatingRecorder:
    """Records nothing, but repeats; can refuse, as CUDA does with what waits for the device."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.refuses, self.recorded = refuses, 0

    def warm_up(self, step: Callable[[], Any]) -> Any:
        return step()

    def record(self, step: Callable[[], Any]) -> Recording:
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        self.recorded += 1
        return Repeated(step)


class Rig:
    """A small model and all that one of its steps needs."""

    def __init__(
        self,
        toys: Any,
        precision: str = "fp32",
        *,
        layers: int = 2,
        section: Prune | None = None,
        events: Iterable[tuple[int, float]] = (),
        distilled: bool = False,
        recorder: RepeatingRecorder | None = None,
        pruned: bool = False,
    ) -> None:
        self.toys, self.section = toys, section or Prune(warmup=0.0)
        self.model = toys.bert(layers, attn_implementation="sdpa").train()
        install_capture_hooks(self.model)
        self.masks = Masks(find_prunable_weights(self.model))
        layers_by_name = find_prunable_layers(self.model)
        self.pruner = Pruner(self.masks, list(events), self.section, 0.0 if not events else 0.5, layers_by_name)
        if pruned:
            self.masks.set({name: weight.abs() < 0.1 for name, weight in self.masks.parameters.items()})
        accelerator = accelerator_of(precision)
        learner = Learner(
            model=self.model,
            tokenizer=toys.tokenizer(),
            task=None,  # type: ignore[arg-type]
            splits={},
            scored_rows=None,  # type: ignore[arg-type]
            accelerator=accelerator,
            pruner=self.pruner,
        )
        self.trained = select_trained_parameters(self.model, self.section.train)
        half = HALF.get(precision)
        self.lesson: Lesson = GoldLabelLesson(self.model, nn.functional.cross_entropy)
        if distilled:
            teacher = toys.bert(layers, seed=1, attn_implementation="sdpa").requires_grad_(False)
            install_capture_hooks(teacher)
            if precision == "bf16":
                cast_linear_weights(teacher, torch.bfloat16)
            pair = [TokenizedModel(model, toys.tokenizer()) for model in (self.model, teacher)]
            self.lesson = DistillationLesson("prune", self.section, *pair, seed=0, logit_loss=Classification.logit_loss)
        self.optimizer = create_adamw(self.trained.values(), self.section, CPU, capturable=recorder is not None)
        self.masks.attach(self.optimizer)
        self.said: list[str] = []
        self.stepper = Stepper(
            learner=learner,
            lesson=self.lesson,
            section=self.section,
            recipe=Recipe(device="cpu"),
            steps=100,
            trained=self.trained,
            optimizer=self.optimizer,
            learning_rate=lambda _: 1e-3,
            collector=StatisticsCollector(self.pruner, self.section) if events else None,
            loss_scale=LossScale(CPU) if precision == "fp16" else None,
            cast_weights=None if half is None else CastWeights(self.model, half),
            graphs=None if recorder is None else StepGraphs(CPU, recorder, self.said.append),
        )

    def set_scale(self, scale: float) -> None:
        assert self.stepper.loss_scale is not None
        steady = torch.zeros((), dtype=torch.int32)
        self.stepper.loss_scale.load_state_dict({"scale": torch.tensor(scale), "steady_steps": steady})

    def scale(self) -> float:
        assert self.stepper.loss_scale is not None
        return float(self.stepper.loss_scale.state_dict()["scale"])

    def microbatch(self, seed: int = 0, **shape: int) -> Microbatch:
        columns = self.toys.batch(seed=seed, **shape)
        return Microbatch({name: column.numpy() for name, column in columns.items()}, WHOLE_BATCH)

    def take(self, *seeds: int, window: LossWindow | None = None, **shape: int) -> None:
        for step, seed in enumerate(seeds):
            self.stepper.take(step, [self.microbatch(seed, **shape)], window or LossWindow())

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.trained.items()}


def largest_difference(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    return max(float((tensor - expected[name]).abs().max()) for name, tensor in tensors.items())


@pytest.mark.parametrize("criterion", ["movement", "movement-soft", "taylor"])
@pytest.mark.parametrize("saliency", ["loss", "logits"])
def test_the_criterion_never_sees_gradients_that_overflowed(toys: Any, criterion: str, saliency: str) -> None:
    section = Prune(criterion=criterion, saliency=saliency, warmup=0.0, loss=Loss(hardness=0.5))
    scores = {}
    for precision in ("fp32", "fp16"):
        rig = Rig(toys, precision, section=section, events=[(50, 0.5)], distilled=True)
        if precision == "fp16":
            before = rig.weights()
            rig.set_scale(2.0**60)
            rig.take(3)
            assert largest_difference(before, rig.weights()) == 0, "the step is skipped"
            assert rig.scale() == 2.0**59
            rig.set_scale(2.0**8)
        rig.take(0)
        name = next(iter(rig.masks.parameters))
        stats = rig.pruner._observer.stats(name)
        scores[precision] = next(value for value in vars(stats).values() if value is not None)
    assert bool(scores["fp16"].isfinite().all())
    difference = (scores["fp16"] - scores["fp32"]).norm() / scores["fp32"].norm()
    assert float(difference) < 0.05, "and the skipped step does not count"


def test_small_gradients_of_the_logit_term_do_not_vanish(toys: Any) -> None:
    section = Prune(criterion="taylor", saliency="logits", warmup=0.0, loss=Loss(hardness=0.5))
    rig = Rig(toys, "fp16", section=section, events=[(50, 0.5)], distilled=True)
    loss = rig.lesson.loss
    # as of a student that has nearly learnt: without the scale all of it would be below the least number of fp16
    rig.lesson.loss = lambda *args: {name: term * 1e-7 for name, term in loss(*args).items()}  # type: ignore[method-assign]
    rig.take(0)
    for name in rig.masks.parameters:
        gradient = rig.pruner._observer.stats(name).gradient
        assert gradient is None or float((gradient == 0).float().mean()) < 0.2, name


def test_bystanders_that_count_in_the_norm_are_unscaled(toys: Any) -> None:
    moved = {}
    for precision in ("fp32", "fp16"):
        section = Prune(warmup=0.0, clip_over="all", clip=1e-2, train="layers", epsilon=1.0)
        rig = Rig(toys, precision, section=section)
        frozen = [weight for name, weight in rig.model.named_parameters() if name not in rig.trained]
        for weight in frozen:
            weight.requires_grad_(True)
        rig.lesson.clipped_parameters = frozen
        before = rig.weights()
        if precision == "fp16":
            rig.set_scale(2.0**10)
        rig.take(0)
        moved[precision] = {name: weight - before[name] for name, weight in rig.weights().items()}
        assert all(weight.grad is None for weight in frozen)
    # of the gradients' order, since epsilon is large: scaled bystanders would leave nothing of them
    norms = {
        precision: float(torch.stack([change.norm() for change in changes.values()]).norm())
        for precision, changes in moved.items()
    }
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=0.02)


def test_a_bystander_that_overflows_skips_the_step(toys: Any) -> None:
    rig = Rig(toys, "fp16", section=Prune(warmup=0.0, clip_over="all", train="layers"))
    bystander = nn.Parameter(torch.ones(2))
    rig.lesson.clipped_parameters = [bystander]
    loss = rig.lesson.loss

    def with_bystander(*args: Any) -> Any:
        terms = loss(*args)
        return {"loss": terms["loss"] + (bystander * 1e38).sum() * 0 + bystander.sum() * 3e38}

    rig.lesson.loss = with_bystander  # type: ignore[method-assign]
    before = rig.weights()
    rig.take(0)
    assert largest_difference(before, rig.weights()) == 0


def test_calibration_of_fp16_is_that_of_float32(toys: Any) -> None:
    section = Prune(criterion="taylor", calibration=1, loss=Loss(hardness=0.5))
    gradients = []
    for precision in ("fp32", "fp16"):
        rig = Rig(toys, precision, section=section, events=[(5, 0.5)])
        assert rig.stepper.collector is not None
        rig.stepper.collector.calibrate(
            rig.model, lambda each, rig=rig: rig.stepper.compute_calibration_terms(each, 5), [[rig.microbatch()]]
        )
        gradients.append(rig.pruner._observer.state_dict())
    for name, tensor in gradients[0].items():
        assert torch.equal(tensor, gradients[1][name]), name


VIEWS = ("view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze")
MORE_VIEWS = ("detach", "alias", "split", "unbind", "as_strided", "split_with_sizes", "narrow", "_reshape_alias")
FREE = {*VIEWS, *MORE_VIEWS, "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty"}
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "repeat_interleave"}


class Operations(TorchDispatchMode):
    """Counts what a GPU would launch, and what would wait for it: neither views nor memory that is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.counts[name] += 1
        if name in READS:
            self.reads.append(name)
        return func(*args, **(kwargs or {}))


# Of 12 layers with a teacher beside them. These only go down: see docs/log.md for what they were.
MOST_OPERATIONS = {"bf16": 978, "fp16": 1136}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_launches_few_operations_and_reads_nothing(toys: Any, precision: str) -> None:
    rig = Rig(toys, precision, layers=12, distilled=True, pruned=True)
    rig.masks.zeroes_together = True  # as on a GPU
    microbatch, window = rig.microbatch(), LossWindow()
    rig.take(0, 1, window=window)
    with Operations() as operations:
        rig.stepper.take(2, [microbatch], window)
    assert not operations.reads
    assert sum(operations.counts.values()) <= MOST_OPERATIONS[precision], operations.counts.most_common(12)
    rig.masks.check_dead()
    with Operations() as operations:
        assert torch.ones(2).sum().item() == 2
    assert operations.reads, "a read is seen"


def test_weights_cast_together_are_those_that_autocast_casts_one_by_one(toys: Any) -> None:
    trained = []
    for together in (True, False):
        rig = Rig(toys, "bf16")
        if not together:
            rig.stepper.cast_weights = None
        rig.take(0, 1, 2)
        trained.append(rig.weights())
    assert largest_difference(*trained) == 0


def test_a_replayed_step_is_a_step(toys: Any) -> None:
    """The buffers, the optimiser and the learning rate of a graph, on a CPU, where the step is launched again."""
    seeds = (0, 1, 2, 3)
    section, recorder = Prune(warmup=0.0, epsilon=EPSILON), RepeatingRecorder()
    plain = Rig(toys, distilled=True, pruned=True, section=section)
    graphed = Rig(toys, distilled=True, pruned=True, section=section, recorder=recorder)
    windows = LossWindow(), LossWindow()
    for rig, window in zip((plain, graphed), windows, strict=True):
        rig.take(*seeds, window=window, rows=4, length=11)
        rig.take(*seeds, window=window, rows=3, length=8)
    assert recorder.recorded == 2, "one for each shape, the second time it comes"
    assert not graphed.said
    # a learning rate on the device is float32
    assert largest_difference(plain.weights(), graphed.weights()) < 1e-6
    assert windows[1].compute_means()["loss"] == pytest.approx(windows[0].compute_means()["loss"], rel=1e-5)


def test_the_learning_rate_of_a_graph_changes_where_the_graph_reads_it(toys: Any) -> None:
    """The double launches again what a graph would replay, and would see any number: so look at the memory."""
    rig = Rig(toys, recorder=RepeatingRecorder())
    rig.stepper.learning_rate = lambda progress: 1e-3 * (1 - progress)
    rates = [group["lr"] for group in rig.optimizer.param_groups]
    for step in (0, 50):
        rig.stepper.take(step, [rig.microbatch()], LossWindow())
        for group, rate in zip(rig.optimizer.param_groups, rates, strict=True):
            assert group["lr"] is rate
            assert isinstance(rate, Tensor)
            assert float(rate) == pytest.approx(1e-3 * (1 - step / 100))
    assert all(group["capturable"] for group in rig.optimizer.param_groups)


def test_a_recorded_step_follows_the_masks_of_an_event(toys: Any) -> None:
    rig = Rig(toys, recorder=RepeatingRecorder(), pruned=True)
    rig.masks.zeroes_together = True
    rig.take(0, 1, 2)
    alive = dict(rig.masks._alive)
    rig.masks.set({name: weight.abs() < 0.2 for name, weight in rig.masks.parameters.items()})
    assert all(rig.masks._alive[name] is tensor for name, tensor in alive.items()), (
        "the graph reads them where they are"
    )
    for name, tensor in alive.items():
        assert torch.equal(tensor, (~rig.masks.dead[name]).float()), name
    rig.take(3)
    rig.masks.check_dead()


def test_what_cannot_be_recorded_is_launched_and_said(toys: Any) -> None:
    section = Prune(warmup=0.0, epsilon=EPSILON)
    plain, refused = Rig(toys, section=section), Rig(toys, section=section, recorder=RepeatingRecorder(refuses=True))
    for rig in (plain, refused):
        rig.take(0, 1, 2)
    assert refused.said == ["no CUDA graphs: operation not permitted when stream is capturing"]
    assert largest_difference(plain.weights(), refused.weights()) < 1e-6


class FailingLate(RepeatingRecorder):
    """Records steps until it meets what cannot be recorded, behind a backward pass whose gradients nobody computed."""

    def __init__(self, rig_of: Callable[[], Rig]) -> None:
        super().__init__()
        self.rig_of = rig_of

    def record(self, step: Callable[[], Any]) -> Recording:
        if not self.recorded:
            return super().record(step)
        for parameter in self.rig_of().trained.values():
            parameter.grad = torch.full_like(parameter, 1e6)
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_recording_that_fails_leaves_no_gradients_and_no_earlier_graphs(toys: Any) -> None:
    section = Prune(warmup=0.0, epsilon=EPSILON)
    rigs: list[Rig] = []
    recorder = FailingLate(lambda: rigs[0])
    rigs.append(Rig(toys, section=section, recorder=recorder))
    plain = Rig(toys, section=section)
    for rig in (plain, rigs[0]):
        rig.take(0, 1, rows=4, length=11)
        rig.take(0, 1, 2, rows=3, length=8)
    assert recorder.recorded == 1
    assert rigs[0].stepper.graphs is not None
    assert not rigs[0].stepper.graphs._recorded, "they draw from a generator that is no longer torch's"
    assert largest_difference(plain.weights(), rigs[0].weights()) < 1e-6


@pytest.fixture(autouse=True)
def plain_accelerator() -> Iterator[None]:
    yield
    create_accelerator(Recipe(device="cpu"))
