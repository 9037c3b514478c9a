"""Gradual pruning: prune events at their steps, by a criterion and what it observed in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from spdtool import plugins
from spdtool.errors import RecipeError
from spdtool.models import collectives, fsdp
from spdtool.pruning.masks import Masks, check_counts, find_flagged
from spdtool.pruning.observer import Observer, full_float32
from spdtool.pruning.statistics import STATISTICS, Stats
from spdtool.recipe.training import Prune

OnWork = Callable[[str], None]


class Pruner:
    """The masks, the prune events of the stage, and the statistics since the last event.

    Args:
        events: `(optimiser step, sparsity)`, rising; see `schedules.prune_events`. Empty: the
            masks stay as they are.
        section: the recipe's choices: criterion, scope and the settings of each.
        target: sparsity that the masks must have in the end.
        layers: parameter name to its linear layer, for criteria that look at inputs.

    Attributes:
        last_event: step of the last event; 0 without events.
        has_dense_gradients: whether the gradients of dead weights stay, and count in the clipped norm.
        clamped: matrix to `(zeros by the scores alone, zeros above the floor of prune.least)`, at
            the last event.
        lowered: group of matrices to the share that stayed alive there, where `prune.least` left
            no room for the sparsity.

    Raises:
        UnknownName: no such criterion.
        RecipeError: the criterion needs what this tool does not observe, or the pattern of the
            masks cannot reach the target.
        ModelError: more weights are zero for good already than the target asks for.
    """

    def __init__(
        self,
        masks: Masks,
        events: Sequence[tuple[int, float]],
        section: Prune,
        target: float,
        layers: Mapping[str, nn.Linear] | None = None,
    ) -> None:
        self.masks, self.section, self.target = masks, section, target
        self.events = dict(events)
        self.last_event = max(self.events, default=0)
        self.clamped: dict[str, tuple[int, int]] = {}
        self.lowered: dict[str, float] = {}
        self._criterion = plugins.criteria.entry(section.criterion)
        self._update = self._criterion.meta.get("update") if section.update else None
        self.has_dense_gradients = bool(self._criterion.meta.get("dense_gradients", False))
        # a statistic of a large encoder may take more memory than its weights
        needs: Sequence[str] = ()
        if events:  # otherwise nothing will be ranked, so nothing has to be observed
            needs = self._criterion.meta.get("needs", ())
            _check_needs(section.criterion, needs)
        self._observer = Observer(masks, needs, section, layers)
        if section.regrowth and events:
            masks.allow_regrowth()
        masks.pattern.check_sparsity(target, section.scope)
        masks.check_reachable(target, section.scope)  # after `allow_regrowth`, which makes any target reachable

    @property
    def reads_gradients(self) -> bool:
        """Whether the criterion looks at gradients."""
        return self._observer.reads("gradient")

    @property
    def reads_inputs(self) -> bool:
        """Whether the criterion looks at the inputs of the layers."""
        return self._observer.reads("input")

    @property
    def needs_dead_gradients(self) -> bool:
        """Whether the gradients of dead weights are needed."""
        return self.reads_gradients or self.has_dense_gradients or self.masks.can_regrow

    @property
    def learns(self) -> bool:
        """Whether the criterion learns its scores over the whole stage, from every step."""
        return self._observer.learns

    def is_due(self, step: int) -> bool:
        """Whether an event falls after optimiser step `step`; 0: before the first."""
        return step in self.events

    def is_done(self, step: int) -> bool:
        """Whether the last event is over after optimiser step `step`: the target is reached."""
        return step >= self.last_event

    def observe_gradients(self, overflow: Tensor | None = None) -> None:
        """Add the gradients of a step to the statistics, after its backward passes.

        Args:
            overflow: scalar on the device, above 0 if fp16 overflowed: the step then does not count.
        """
        self._observer.add_gradients(overflow)

    def observe_inputs(self, attention_mask: Tensor | None = None) -> AbstractContextManager[None]:
        """Add the layers' inputs to the statistics, in forward passes inside the context.

        Args:
            attention_mask: of the batch, [rows, tokens]: padding is left out of layers whose
                inputs are laid out so; without it every token counts.
        """
        return self._observer.observe_inputs(attention_mask)

    def sum_inputs_over_ranks(self) -> None:
        """Sum what the ranks observed of the layers' inputs. Collective: call on every rank."""
        self._observer.sum_inputs_over_ranks()

    def reset_statistics(self) -> None:
        """Drop what was observed, except scores that are learned over the stage."""
        self._observer.reset()

    def zero_gradients(self) -> None:
        """Zero the gradients of dead weights, before clipping, unless the criterion wants them."""
        if not self.has_dense_gradients:
            self.masks.zero_gradients()

    @torch.no_grad()
    @full_float32()
    def prune(self, step: int, on_work: OnWork = lambda _: None) -> float | None:
        """Prune if an event is due after optimiser step `step`; return the sparsity now, or None.

        Args:
            on_work: is called with what comes next, matrix by matrix: a second-order event may take many minutes.

        Raises:
            RecipeError: nothing was observed of what the criterion ranks by, or its scores contain
                NaN.
            PluginError: the criterion of a plugin fails.
        """
        sparsity = self.events.get(step)
        if sparsity is None:
            return None
        self._check_observed(step)
        scores = {}
        for number, name in enumerate(self.masks.parameters, 1):
            on_work(f"scoring matrix {number} of {len(self.masks.parameters)}")
            scores[name] = self._score(name)
        # After all matrices are scored: one read from the device for all of them.
        self._check_scores(scores)
        dead, allocation = self.masks.choose(scores, sparsity, self.section.scope, self.section.least)
        self.clamped, self.lowered = allocation.clamped, allocation.lowered
        updated = self._update_survivors(dead, on_work)
        # Replicas whose statistics differ in the last bit may rank two weights differently, so all
        # take the choice of rank 0. Sharded weights are ranked whole, and each rank has other rows.
        if not any(map(fsdp.is_sharded, self.masks.parameters.values())):
            collectives.broadcast([*dead.values(), *(updated or {}).values()])
        self.masks.set(dead, updated)
        self.reset_statistics()  # they were of the weights before
        return sparsity

    def finalize(self) -> None:
        """Make the zeros say what the masks say, before the weights are saved.

        Raises:
            GateError: their number is not the requested one.
        """
        self.masks.finalize()
        self.masks.check_sparsity(self.target, self.section.scope)

    def check_counts(self, counts: Mapping[str, tuple[int, int]], sparsity: float) -> None:
        """Assert that a saved checkpoint has the zeros that `sparsity` asks for.

        Args:
            counts: matrix to `(zeros, size)`.

        Raises:
            GateError: names the first matrix that is off.
        """
        # Of the file that was written, which is what the next stage reads.
        check_counts(counts, sparsity, self.section.scope, self.masks.pattern.block_size)

    def state_dict(self) -> dict[str, Tensor]:
        """Masks, values of the dead that can regrow, and statistics, as flat tensors. Collective."""
        state = {f"dead.{name}": dead for name, dead in self.masks.state_dict().items()}
        for name, value in self.masks.dead_values.items():
            state[f"dead_values.{name}"] = fsdp.gather_rows(value, self.masks.parameters[name])
        for key, value in self._observer.state_dict().items():
            state[f"statistics.{key}"] = value
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `state_dict`."""
        self.masks.load_state_dict(_under("dead.", state))
        self.masks.dead_values = {}
        for name, value in _under("dead_values.", state).items():
            weight = self.masks.parameters[name]
            self.masks.dead_values[name] = fsdp.take_local_rows(value, weight).to(weight.device)
        self._observer.load_state_dict(_under("statistics.", state))

    def _check_observed(self, step: int) -> None:
        """Raise RecipeError if nothing was observed of what the criterion ranks by."""
        if self._observer.is_empty():
            raise RecipeError(
                f"criterion {self.section.criterion!r} has observed nothing before the prune event at step {step}",
                "set prune.calibration to a number of batches, leave prune.first out, or set compile to false",
            )

    def _score(self, name: str) -> Tensor:
        """Ask the criterion for the scores of one matrix.

        Raises:
            RecipeError: they are of another shape than the weight.
            PluginError: the criterion of a plugin fails.
        """
        weight = self.masks.build_full_weight(name)  # the dead are ranked with the value that they had
        with plugins.wrap_errors(self._criterion):
            scores = self._call_criterion(weight, self._observer.stats(name))
        expected = f"criterion {self.section.criterion!r} must give a score for each weight of {name}"
        if not torch.is_tensor(scores):
            raise RecipeError(f"{expected}, shape {tuple(weight.shape)}, and gives {type(scores).__name__}")
        if scores.shape != weight.shape:
            raise RecipeError(f"{expected}, shape {tuple(weight.shape)}, and gives shape {tuple(scores.shape)}")
        return scores

    def _check_scores(self, scores: Mapping[str, Tensor]) -> None:
        """Raise RecipeError if a score is not a number."""
        name = find_flagged(list(scores), [score.isnan().any() for score in scores.values()])
        if name is not None:
            wrong, size = int(scores[name].isnan().sum()), scores[name].numel()
            raise RecipeError(
                f"criterion {self.section.criterion!r} must give a score for each weight of {name}, and {wrong:,} of "
                f"{size:,} are not numbers",
                "if the loss was not a number either, set prune.learning_rate lower",
            )

    def _call_criterion(self, weight: Tensor, stats: Stats) -> Tensor:
        """Score every weight; with a pattern of blocks, by its block where the criterion can."""
        score_blocks = self._criterion.meta.get("block_scores")
        pattern = self.masks.pattern
        if pattern.block_size == 1 or score_blocks is None:
            scores: Tensor = self._criterion.value(weight, stats)
            return scores
        return pattern.to_weights(score_blocks(weight, stats, pattern.block))

    def _update_survivors(self, dead: Mapping[str, Tensor], on_work: OnWork) -> dict[str, Tensor] | None:
        """Update the survivors to make up for the dying; None if the criterion cannot, or must not."""
        if self._update is None:
            return None
        updated = {}
        for number, (name, weight) in enumerate(self.masks.parameters.items(), 1):
            on_work(f"solving matrix {number} of {len(self.masks.parameters)}")
            # regrown weights are no survivors: their old value has no part in the solution
            alive = ~(self.masks.dead[name] | dead[name])
            updated[name] = self._update(fsdp.local_rows(weight), alive, self._observer.stats(name))
        return updated


def _check_needs(criterion: str, needs: Sequence[str]) -> None:
    unknown = set(needs) - set(STATISTICS)
    if unknown:
        raise RecipeError(
            f"criterion {criterion!r} needs {', '.join(sorted(unknown))}, which is not observed",
            f"observed: {', '.join(STATISTICS)}",
        )


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries whose names begin with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
