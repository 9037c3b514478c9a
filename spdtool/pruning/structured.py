"""Gradual removal of heads and neurons: masks of coupled rows and columns, and the pruner that shrinks a shape.

With `prune.zeros`, weights inside of the finished shape go too, in a pattern. Then neurons go in groups as wide as a
block: what remains of them stands in whole blocks, and so it does in the matrices that leave the others out.

The student stays as wide as its teacher; what is removed is exactly zero. `models/shrink.py` leaves it out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from spdtool.errors import GateError, ModelError, RecipeError
from spdtool.models import collectives
from spdtool.models.structures import LayerStructures, Structures
from spdtool.pruning.masks import Masks, clear_dead, find_flagged
from spdtool.pruning.observer import Observer, full_float32
from spdtool.pruning.patterns import SINGLE_WEIGHTS, Pattern
from spdtool.pruning.pruner import OnWork, Pruner
from spdtool.pruning.structure import (
    EncoderShape,
    LayerShape,
    center_gram,
    interpolate_shape,
    removals_at_once,
    remove_structures,
    shape_sparsity,
)
from spdtool.recipe.training import Prune

NEEDS: Mapping[str, tuple[str, ...]] = {
    "layerwise": ("input_gram", "input_mean"),
    "magnitude": (),
    "taylor": ("gradient",),
}
"""Statistics of each criterion that can rank structures."""


class StructuredMasks(Masks):
    """Masks in which whole heads and neurons are dead: their rows with the biases, and their columns.

    Inside of those that live, weights or blocks of the pattern may be dead too.

    Attributes:
        layers: the structures of each layer.
        biases: name of a weight whose rows belong to structures, to its bias.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        layers: Sequence[LayerStructures],
        pattern: Pattern = SINGLE_WEIGHTS,
    ) -> None:
        """Begin with nothing dead; raises ModelError as `Masks` does."""
        super().__init__(parameters, pattern)
        self.layers = list(layers)
        self.biases: dict[str, nn.Parameter] = {}
        for structures in self.each():
            for name, linear in structures.inputs.items():
                if linear.bias is not None:
                    self.biases[f"{name}.weight"] = linear.bias

    @classmethod
    def from_structures(
        cls,
        parameters: Mapping[str, nn.Parameter],
        layers: Sequence[LayerStructures],
        inside: Pattern | None = None,
    ) -> StructuredMasks:
        """Read the masks from the weights: dead is a structure whose rows, biases and columns are all zero.

        Args:
            inside: pattern in which weights of live structures are dead too; None: these all live.
        """
        masks = cls(parameters, layers, inside or SINGLE_WEIGHTS)
        for structures in masks.each():
            masks.dead |= masks.mask_structures(structures, ~structures.find_live())
        if inside is not None:
            for name, weight in parameters.items():
                masks.dead[name] = masks.dead[name] | inside.whole_blocks(weight == 0)
        return masks

    def each(self) -> list[Structures]:
        """List the heads and the neurons of every layer."""
        return [structures for layer in self.layers for structures in (layer.heads, layer.neurons)]

    def mask_structures(self, structures: Structures, gone: Tensor) -> dict[str, Tensor]:
        """Mask the weights of some structures of a layer.

        Args:
            gone: flag of each structure, [count].

        Returns:
            Parameter name to bool tensor, True where the weight is dead.
        """
        masks = {}
        for name, linear in structures.inputs.items():
            masks[f"{name}.weight"] = structures.rows(gone, linear).unsqueeze(1).expand_as(linear.weight).clone()
        columns = structures.columns(gone)
        masks[f"{structures.output_name}.weight"] = columns.expand_as(structures.output.weight).clone()
        return masks

    def live(self, structures: Structures) -> Tensor:
        """Flag the structures of a layer that live: [count]."""
        # Rows and columns: zeros inside may leave one of them empty, which is not removed for that.
        columns = self.dead[f"{structures.output_name}.weight"].all(0)
        gone = columns.view(structures.count, structures.size).all(1)
        for name in structures.inputs:
            rows = self.dead[f"{name}.weight"].all(1)
            gone = gone & rows.view(-1, structures.count, structures.size).all(2).all(0)
        return ~gone

    def shape(self) -> EncoderShape:
        """Count what lives in each layer."""
        shapes = []
        for layer in self.layers:
            shapes.append(LayerShape(int(self.live(layer.heads).sum()), int(self.live(layer.neurons).sum())))
        return tuple(shapes)

    def removed(self) -> dict[str, Tensor]:
        """Parameter name to the mask of the weights that belong to removed structures."""
        removed = {name: torch.zeros_like(dead) for name, dead in self.dead.items()}
        for structures in self.each():
            removed |= self.mask_structures(structures, ~self.live(structures))
        return removed

    def choose_inside(self, scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        """Choose the blocks of lowest score inside the live structures, a share of each matrix; nothing is changed.

        Every live row keeps its best block, or a structure could vanish that the shape keeps.

        Args:
            scores: parameter name to scores shaped like the parameter.
            share: of the blocks that any live structure has a part in.

        Returns:
            The new `dead`.
        """
        dead, pattern, removed = {}, self.pattern, self.removed()
        for name, score in scores.items():
            is_removed = pattern.to_blocks(removed[name].float()) == 1
            is_dead = pattern.to_blocks(self.dead[name].float()) == 1
            # Columns that are removed inside of a live block count nothing.
            blocks = pattern.to_blocks(score.detach().masked_fill(removed[name], 0)).masked_fill(is_dead, -torch.inf)
            best = torch.zeros_like(is_dead).scatter_(1, blocks.argmax(1, keepdim=True), 1) & ~is_dead
            blocks = blocks.masked_fill(best, torch.inf)
            alive = pattern.choose(blocks, self.count_inside(is_removed, share))
            dead[name] = self.dead[name] | ~pattern.to_weights(alive)
        return dead

    @staticmethod
    def count_inside(is_removed: Tensor, share: float) -> int:
        """Return how many blocks of a matrix are dead: those that are removed, and a share of the others.

        Args:
            is_removed: flag of each block, [block rows, block columns].
        """
        usable = int((~is_removed).sum())
        kept_rows = int((~is_removed).any(1).sum())
        return int(is_removed.sum()) + min(round(share * usable), usable - kept_rows)

    @torch.no_grad()
    def apply(self) -> None:
        """Set every dead weight and bias to zero, and the moments that an attached optimiser has for it."""
        super().apply()
        for name, bias in self.biases.items():
            for tensor in (bias, *self._moments(bias)):
                clear_dead(tensor, self._dead_rows(name))

    @torch.no_grad()
    def zero_gradients(self) -> None:
        """Set the gradients of dead weights and biases to zero."""
        super().zero_gradients()
        for name, bias in self.biases.items():
            if bias.grad is not None:
                clear_dead(bias.grad, self._dead_rows(name))

    def check_dead(self) -> None:
        """As of weights, also of biases; raises GateError."""
        super().check_dead()
        names, flags = [], []
        for name, bias in self.biases.items():
            for tensor in (bias, bias.grad, *self._moments(bias)):
                if tensor is not None:
                    names.append(name)
                    flags.append((tensor.ne(0) & self._dead_rows(name)).any())
        revived = find_flagged(names, flags)
        if revived is not None:
            raise GateError(f"{revived}: the bias of a removed head or neuron is not zero")

    def check_reachable(self, sparsity: float, scope: str = "matrix") -> None:
        """Do nothing: the pruner compares shapes, layer by layer."""

    def check_shape(self, shape: EncoderShape, share: float = 0.0) -> None:
        """Assert that the zeros in the weights are exactly those of a shape, and a share of each matrix inside of it.

        Raises:
            GateError: names the layer or the matrix that is off.
        """
        actual = self.shape()
        if actual != shape:
            raise GateError(
                f"the student has the shape {describe_shape(actual)}; asked for was {describe_shape(shape)}"
            )
        removed = self.removed()
        for name, weight in self.parameters.items():
            if not torch.equal(weight == 0, self.dead[name]):
                raise GateError(f"{name}: not all of its zeros are those of removed heads and neurons")
            expected = self.count_inside(self.pattern.to_blocks(removed[name].float()) == 1, share)
            dead_blocks = int((self.pattern.to_blocks(self.dead[name].float()) == 1).sum())
            if dead_blocks != expected:
                raise GateError(
                    f"{name} has {dead_blocks} blocks of zeros; the shape and prune.zeros ask for {expected}"
                )

    def _dead_rows(self, name: str) -> Tensor:
        return self.dead[name].all(1)


class StructuredPruner(Pruner):
    """Prune events that remove heads and neurons until the encoder has its shape, then weights inside of it.

    Args:
        events: `(optimiser step, sparsity)`, rising to that of the shape, or beyond with `prune.zeros`.
        shape: the target.

    Raises:
        RecipeError: the criterion cannot rank structures.
        ModelError: more is removed already than the target asks for.
    """

    masks: StructuredMasks

    def __init__(
        self,
        masks: StructuredMasks,
        events: Sequence[tuple[int, float]],
        section: Prune,
        shape: EncoderShape,
        layers: Mapping[str, nn.Linear] | None = None,
    ) -> None:
        shape_zeros = shape_sparsity(masks.layers, shape)
        super().__init__(masks, (), section, shape_zeros + (1 - shape_zeros) * section.zeros)
        self.shape, self.shape_zeros = shape, shape_zeros
        self.events = dict(events)
        self.last_event = max(self.events, default=0)
        needs = find_needs(section)
        outputs = [f"{structures.output_name}.weight" for structures in masks.each()]
        names = outputs if section.criterion == "layerwise" and not section.zeros else None
        if section.zeros:
            needs = tuple(dict.fromkeys((*needs, *self._criterion.meta.get("needs", ()))))
        self._observer = Observer(masks, needs if events else (), section, layers, names)
        self._start = masks.shape()
        for number, (start, end) in enumerate(zip(self._start, shape, strict=True), 1):
            if start.heads < end.heads or start.neurons < end.neurons:
                raise ModelError(
                    f"layer {number} has {start.heads} heads and {start.neurons} neurons; "
                    f"{end.heads} and {end.neurons} were asked for, and what is removed does not grow again",
                    "start from a dense checkpoint, or ask for a smaller shape",
                )

    @torch.no_grad()
    @full_float32()
    def prune(self, step: int, on_work: OnWork = lambda _: None) -> float | None:
        """Remove what is due after optimiser step `step`; return the sparsity now, or None."""
        sparsity = self.events.get(step)
        if sparsity is None:
            return None
        self._check_observed(step)
        # An event names a sparsity; heads and neurons go in proportion, so both arrive together.
        progress = min(1.0, sparsity / self.shape_zeros) if self.shape_zeros else 1.0
        shape = interpolate_shape(self._start, self.shape, progress)
        dead = dict(self.masks.dead)
        updated = {name: weight.detach() for name, weight in self.masks.parameters.items()}
        for number, (layer, remaining) in enumerate(zip(self.masks.layers, shape, strict=True), 1):
            on_work(f"removing heads and neurons of layer {number} of {len(shape)}")
            self._remove(layer.heads, remaining.heads, dead, updated)
            self._remove(layer.neurons, remaining.neurons, dead, updated)
        # replicas whose statistics differ in the last bit may rank two structures differently
        collectives.broadcast([*dead.values(), *updated.values()])
        self.masks.set(dead, updated)
        for structures in self.masks.each():
            if (bias := updated.get(f"{structures.output_name}.bias")) is not None:
                structures.output.bias.copy_(bias)
        if sparsity > self.shape_zeros:
            self._prune_inside((sparsity - self.shape_zeros) / (1 - self.shape_zeros), on_work)
        self.reset_statistics()
        return self.masks.sparsity()

    def finalize(self) -> None:
        """Make the zeros say what the masks say, before the weights are saved; raises GateError."""
        self.masks.finalize()
        self.masks.check_shape(self.shape, self.section.zeros)

    def check_counts(self, counts: Mapping[str, tuple[int, int]], sparsity: float) -> None:  # noqa: ARG002
        """Assert that a saved checkpoint has the zeros of the shape; raises GateError."""
        expected = self.masks.counts()
        for name, count in counts.items():
            if count != expected[name]:
                raise GateError(f"{name} has {count[0]} zeros of {count[1]}; the shape asks for {expected[name][0]}")

    def _remove(
        self, structures: Structures, remaining: int, dead: dict[str, Tensor], updated: dict[str, Tensor]
    ) -> None:
        """Remove all but `remaining` structures of a layer; update both dicts, of parameters by name."""
        live = self.masks.live(structures)
        count = int(live.sum()) - remaining
        unit = self._removed_together(structures, live)
        if remaining != self._target_of(structures) or count % unit == 0:
            count -= count % unit  # the others go with a later event
        else:
            unit = 1
        if count <= 0:
            return
        name = f"{structures.output_name}.weight"
        if self.section.criterion == "layerwise":
            stats = self._observer.stats(name)
            gram, mean, bias = stats.input_gram, stats.input_mean, structures.output.bias
            assert gram is not None
            assert mean is not None
            if bias is not None:
                # The bias takes over the mean of what goes, so only what varies around it is lost.
                gram = center_gram(gram, mean)
            weight, group = structures.output.weight.detach(), removals_at_once(structures.count // unit)
            units = live.view(-1, unit).all(1)
            removal = remove_structures(weight, gram, unit * structures.size, count // unit, units, group)
            gone = expand_units(torch.tensor(removal.order, device=live.device), unit)
            if self.section.update:
                updated[name] = removal.weight
                if bias is not None:
                    updated[f"{structures.output_name}.bias"] = bias + (weight - removal.weight) @ mean
        else:
            # What is gone already must not be chosen again.
            scores = self._score_structures(structures).masked_fill(~live, torch.inf).view(-1, unit).sum(1)
            gone = expand_units(scores.topk(count // unit, largest=False).indices, unit)
        live[gone] = False
        dead.update(self.masks.mask_structures(structures, ~live))

    def _removed_together(self, structures: Structures, live: Tensor) -> int:
        """Return how many neighbouring neurons go together, so that what remains stands in blocks of the pattern."""
        unit = self.masks.pattern.block[1]
        if structures.size > 1 or structures.count % unit:  # a head is wider than any block
            return 1
        units = live.view(-1, unit)
        # A student that somebody else made smaller may have started blocks.
        return unit if torch.equal(units.all(1), units.any(1)) else 1

    def _target_of(self, structures: Structures) -> int:
        """Number of structures of that kind and layer that remain in the end."""
        for layer, shape in zip(self.masks.layers, self.shape, strict=True):
            if structures is layer.heads:
                return shape.heads
            if structures is layer.neurons:
                return shape.neurons
        raise AssertionError("structures of another model")

    def _prune_inside(self, share: float, on_work: OnWork) -> None:
        """Prune a share of every matrix's weights inside the shape, by the scores of single weights or blocks."""
        scores = {}
        for number, name in enumerate(self.masks.parameters, 1):
            on_work(f"scoring matrix {number} of {len(self.masks.parameters)}")
            scores[name] = self._score(name)
        self._check_scores(scores)
        dead = self.masks.choose_inside(scores, share)
        updated = self._update_survivors(dead, on_work)
        collectives.broadcast([*dead.values(), *(updated or {}).values()])
        self.masks.set(dead, updated)

    def _score_structures(self, structures: Structures) -> Tensor:
        """Score each structure over all its weights: their norm, or the first-order change of the loss."""
        total = torch.zeros(structures.count, device=structures.output.weight.device)
        for name, linear in structures.inputs.items():
            by_row = self._contributions(name, linear).sum(1)
            total += by_row.view(-1, structures.count, structures.size).sum((0, 2))
        by_column = self._contributions(structures.output_name, structures.output).sum(0)
        total += by_column.view(structures.count, structures.size).sum(1)
        return total.abs()  # of the sum: changes of the loss by single weights may cancel

    def _contributions(self, name: str, linear: nn.Linear) -> Tensor:
        weight = linear.weight.detach().float()
        if self.section.criterion == "magnitude":
            return weight.square()
        gradient = self._observer.stats(f"{name}.weight").gradient
        assert gradient is not None
        return weight * gradient


def expand_units(units: Tensor, size: int) -> Tensor:
    """Return the indices of the neighbouring structures that make up some units."""
    return (units.unsqueeze(1) * size + torch.arange(size, device=units.device)).flatten()


def find_needs(section: Prune) -> tuple[str, ...]:
    """Return the statistics that the recipe's criterion ranks heads and neurons by.

    Raises:
        RecipeError: it ranks single weights only.
    """
    needs = NEEDS.get(section.criterion)
    if needs is None:
        raise RecipeError(
            f"criterion {section.criterion!r} ranks single weights, not heads and neurons",
            f"--set prune.criterion=layerwise, or {' or '.join(list(NEEDS)[1:])}",
        )
    return needs


def describe_shape(shape: EncoderShape) -> str:
    """Spell out a shape: heads x neurons of each layer."""
    return " ".join(f"{layer.heads}x{layer.neurons}" for layer in shape)
