"""Lessons: the teacher learns from the gold labels, the student from the teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import JsonValue
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spdtool import console
from spdtool.data.tokens import LABELED
from spdtool.distillation.device_states import ROW_NUMBERS, DeviceStates
from spdtool.distillation.grafting import LayerDraw, LayerMixing, create_mixing, replacing_rate
from spdtool.distillation.layer_map import map_layers, select_layers
from spdtool.distillation.losses import LogitLoss, LossTerms, LossWeight, distillation_loss
from spdtool.distillation.outputs import ModelOutputs, compute_outputs
from spdtool.distillation.projections import Projections, create_projections, load_projections, save_projections
from spdtool.distillation.teacher_cache import needs_hidden_states, pop_cached_outputs
from spdtool.errors import ModelError
from spdtool.models.layers import find_layer_stack, model_shape, select_trained_parameters
from spdtool.models.student import same_architecture, unread_columns
from spdtool.recipe.training import Distilled
from spdtool.tasks.head import head_of_model


class TokenizedModel(NamedTuple):
    """A model and the tokenizer that makes its inputs."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


class Lesson:
    """Base class of what the training loop minimises; a lesson overrides `loss`.

    Attributes:
        parameters: trained together with the model, but no part of it.
        clipped_parameters: frozen parameters whose gradients count when the gradient norm is
            clipped.
        counts_padding: whether a term is a mean over padding too, so that all micro-batches of a
            batch must be padded alike.
    """

    def __init__(self) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        self.clipped_parameters: list[nn.Parameter] = []
        self.counts_padding = False

    def loss(self, batch: dict[str, Tensor], progress: float, weight: LossWeight) -> LossTerms:
        """Compute the loss terms of some rows.

        Args:
            batch: columns [rows, tokens] and `labels`, on the device.
            progress: of the stage, in [0, 1).
            weight: fraction of the global batch that these rows hold.
        """
        raise NotImplementedError

    @property
    def has_grafting(self) -> bool:
        """Whether layers of a teacher stand in at all."""
        return False

    def log_values(self, progress: float) -> dict[str, object]:  # noqa: ARG002
        """Return what to log beside the losses."""
        return {}

    def state_dict(self) -> list[JsonValue]:
        """Return the random state of the lesson, as JSON can hold it."""
        return []

    def load_state_dict(self, state: list[JsonValue]) -> None:
        """Restore what `state_dict` returned."""


class GoldLabelLesson(Lesson):
    """The labels of the training rows.

    Args:
        gold_loss: mean loss of the logits against the labels of a batch, see `Task.gold_loss`.
    """

    def __init__(self, model: PreTrainedModel, gold_loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.gold_loss, self._head = model, gold_loss, head_of_model(model)

    def loss(self, batch: dict[str, Tensor], progress: float, weight: LossWeight) -> LossTerms:  # noqa: ARG002
        """Compute the loss of the model's logits; see `Lesson`."""
        labels = batch.pop("labels")
        logits = self._head.collect(self.model(**batch), batch).float()  # autocast gives bf16, whose loss is too coarse
        return {"loss": weight.labels * self.gold_loss(logits, labels)}


class DistillationLesson(Lesson):
    """The outputs of a frozen teacher, compared with those of the grafted student.

    One step of Sparse Progressive Distillation (Huang et al., ACL 2022, arXiv 2110.08190): graft
    the student's layers (`grafting.py`) and compare the outputs with the teacher's (`losses.py`).

    Args:
        stage: name of the phase, for messages.
        section: its loss and grafting.
        student, teacher: on the same device.
        seed: of the draws and of new projections.
        logit_loss: compares the logits, see `Task.logit_loss`.

    Raises:
        RecipeError: the layer map does not fit the two models.
    """

    def __init__(
        self,
        stage: str,
        section: Distilled,
        student: TokenizedModel,
        teacher: TokenizedModel,
        *,
        seed: int,
        logit_loss: LogitLoss,
    ) -> None:
        super().__init__()
        self.section, self.student, self.teacher = section, student.model, teacher.model
        self._logit_loss = logit_loss
        self._ignored_by_student = unread_columns(student.tokenizer)
        self._ignored_by_teacher = unread_columns(teacher.tokenizer)
        self._mixing, self._rate = _choose_grafting(stage, section, self.student, self.teacher, seed)
        student_shape, teacher_shape = model_shape(self.student), model_shape(self.teacher)
        self._layers = map_layers(section.loss.layer_map, student_shape.layers, teacher_shape.layers)
        self.projections: Projections = {}
        if section.loss.hidden > 0 and student_shape.width != teacher_shape.width:
            self.projections = create_projections(
                student_shape.layers, student_shape.width, teacher_shape.width, seed=seed, device=self.student.device
            )
        self.device_states: DeviceStates | None = None  # set where they fit
        self.parameters = dict(self.projections)
        self.counts_padding = not section.loss.mask_padding
        if section.clip_over == "all":
            self.clipped_parameters = _find_frozen_parameters(self.student, self.teacher, section)

    @property
    def has_grafting(self) -> bool:
        """Whether layers of the teacher stand in at all."""
        return self.section.grafting.enabled and same_architecture(self.student, self.teacher)

    @property
    def compared_layers(self) -> tuple[int, ...]:
        """The teacher's layers whose hidden states the loss compares; 0 is the embeddings' output."""
        return (0, *self._layers) if needs_hidden_states(self.section.loss) else ()

    def loss(self, batch: dict[str, Tensor], progress: float, weight: LossWeight) -> LossTerms:
        """Compare the student's outputs with the teacher's, which may be cached; see `Lesson`."""
        # first, because it takes the cached columns out of the batch
        cached = self._read_teacher_outputs(batch)
        is_labeled = batch.pop(LABELED, None)  # no model reads it
        teacher_outputs = cached or self.compute_teacher_outputs(batch)
        with self._mixing.mix(self._rate(progress)):
            student_outputs = self._compute_outputs(self.student, batch, self._ignored_by_student)
        if is_labeled is not None:
            batch[LABELED] = is_labeled
        return distillation_loss(
            student_outputs,
            teacher_outputs,
            batch,
            self.section.loss,
            logit_loss=self._logit_loss,
            projections=self.projections,
            weight=weight,
        )

    @torch.no_grad()
    def compute_teacher_outputs(self, batch: dict[str, Tensor]) -> ModelOutputs:
        """Run the teacher; return its outputs in the order of the student's layers."""
        return select_layers(self._compute_outputs(self.teacher, batch, self._ignored_by_teacher), self._layers)

    def _read_teacher_outputs(self, batch: dict[str, Tensor]) -> ModelOutputs | None:
        """Return the teacher's outputs from the GPU or the batch; None if nothing is cached and it has to run."""
        if self.device_states is not None:
            return self.device_states.read(batch.pop(ROW_NUMBERS), batch["attention_mask"].shape[1])
        return pop_cached_outputs(batch)

    def log_values(self, progress: float) -> dict[str, object]:
        """Return the replacing rate, and the layers that the last draw left to the student."""
        return {"replacing_rate": self._rate(progress), "drawn": self._mixing.drawn}

    def state_dict(self) -> list[JsonValue]:
        """Return the state of the draws."""
        return self._mixing.state_dict()

    def load_state_dict(self, state: list[JsonValue]) -> None:
        """Restore what `state_dict` returned."""
        self._mixing.load_state_dict(state)

    def load_projections(self, folder: Path) -> None:
        """Continue with the projections of the phase in `folder`, if it saved any that fit."""
        load_projections(self.projections, folder)

    def save_projections(self, folder: Path) -> None:
        """Save the projections for the next phase."""
        save_projections(self.projections, folder)

    def _compute_outputs(
        self, model: PreTrainedModel, batch: dict[str, Tensor], ignored_columns: set[str]
    ) -> ModelOutputs:
        """Compute what the loss of the phase compares.

        Raises:
            ModelError: the attention maps are not one for each layer.
        """
        loss = self.section.loss
        inputs = {name: column for name, column in batch.items() if name not in ignored_columns}
        outputs = compute_outputs(
            model,
            inputs,
            hidden_states=needs_hidden_states(loss),
            attention=loss.attention_on if loss.attention > 0 else None,
        )
        if outputs.attentions is not None:
            maps, depth = len(outputs.attentions), model_shape(model).layers
            if maps != depth:
                raise ModelError(
                    f"{model.config.model_type!r} shows {maps} attention maps for {depth} layers",
                    "set the attention loss to 0 for this architecture",
                )
        return outputs


def _choose_grafting(
    stage: str, section: Distilled, student: PreTrainedModel, teacher: PreTrainedModel, seed: int
) -> tuple[LayerMixing, Callable[[float], float]]:
    """Return the mixing of layers and the replacing rate; warn if the shapes do not allow it."""
    layers, rate = find_layer_stack(student), replacing_rate(section.grafting)
    if same_architecture(student, teacher):
        mixing = create_mixing(
            section.grafting.kind,
            layers,
            find_layer_stack(teacher),
            seed=seed,
            stand_in_dropout=section.grafting.stand_in_dropout,
        )
        return mixing, rate
    if section.grafting.enabled:
        console.warn(
            f"{stage}.grafting is ignored: the student ({_describe_shape(student)}) has another shape than the teacher "
            f"({_describe_shape(teacher)}), whose layers cannot stand in for its own"
        )
    # at rate 1 nothing is swapped, and the draws are as many as with grafting
    return LayerDraw(layers, layers, seed=seed), lambda _: 1.0


def _describe_shape(model: PreTrainedModel) -> str:
    shape = model_shape(model)
    return f"{model.config.model_type}, {shape.layers} layers of width {shape.width}"


def _find_frozen_parameters(
    student: PreTrainedModel, teacher: PreTrainedModel, section: Distilled
) -> list[nn.Parameter]:
    """Return the frozen parameters over which the published code clips too, the stand-ins' among them."""
    trained = select_trained_parameters(student, section.train)
    frozen = [parameter for name, parameter in student.named_parameters() if name not in trained]
    return frozen + list(find_layer_stack(teacher).parameters())
