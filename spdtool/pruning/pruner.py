"""Gradual pruning: prune events at their steps, by a criterion, with what the criterion asked to observe in between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from spdtool import plugins
from spdtool.errors import RecipeError
from spdtool.models import fsdp
from spdtool.pruning.masks import Masks
from spdtool.pruning.observation import Observation
from spdtool.pruning.statistics import STATISTICS, Settings


class Pruner:
    """Keeps the masks, the prune events still to come, and what was observed since the last one.

    Args:
        events: `(optimiser step, sparsity)`, rising; see `schedules.prune_events`. None: the masks are only held.
        target: sparsity that the masks must have in the end.
        criterion, pattern: registered names.
        scope: `matrix`, `type` or `global`.
        least: share of each matrix that stays alive if the scope is not `matrix`.
        regrowth: the dead compete again at each event, with the value that they had.
        update: let a criterion that can do so mend the survivors at each event.
        block, dampening, penalty, score_rate: see `statistics.Settings`.
        layers: parameter name to its linear layer, for criteria that look at inputs.

    Attributes:
        clamped: matrix to its zeros as the scores would have had them and as `least` has them, at the last event.
        lowered: group of matrices to the share that stayed alive there, where `least` left no room for the sparsity.
        agree: is given new masks and mended weights before they hold, to be made the same, in place, on all processes
            that hold whole parameters.

    Raises:
        UnknownName: no such criterion or pattern.
        RecipeError: the criterion needs what this tool does not observe.
        ModelError: more weights are zero for good already than the target asks for.
    """

    def __init__(
        self,
        masks: Masks,
        events: Sequence[tuple[int, float]],
        *,
        target: float,
        criterion: str,
        pattern: str = "unstructured",
        scope: str = "matrix",
        least: float = 0.0,
        regrowth: bool = False,
        update: bool = True,
        block: int = 16,
        dampening: float = 0.01,
        penalty: float = 1.0,
        score_rate: float = 0.01,
        layers: Mapping[str, nn.Linear] | None = None,
    ) -> None:
        part = plugins.criteria.entry(criterion)
        self.masks, self.target, self.scope, self.least = masks, target, scope, least
        self.events = dict(events)
        self.last = max(self.events, default=0)
        self.clamped: dict[str, tuple[int, int]] = {}
        self.lowered: dict[str, float] = {}
        self.criterion = criterion
        self._part, self._pattern = part, plugins.patterns.get(pattern)
        self._update = part.meta.get("update") if update else None
        self._dense_gradients = bool(part.meta.get("dense_gradients", False))
        needs = _known(criterion, part.meta.get("needs", ())) if events else ()  # nothing to rank: nothing to observe
        self.agree: Callable[[list[Tensor]], None] = lambda _: None
        self._observation = Observation(masks, needs, Settings(block, dampening, penalty, score_rate), layers)
        if regrowth and events:
            masks.regrow()
        masks.check_room(target, scope)

    @property
    def reads_gradients(self) -> bool:
        """Whether the criterion looks at gradients."""
        return self._observation.reads("gradient")

    @property
    def reads_dead(self) -> bool:
        """Whether anybody looks at the gradients of dead weights."""
        return self.reads_gradients or self._dense_gradients or bool(self.masks.kept)

    @property
    def reads_inputs(self) -> bool:
        """Whether the criterion looks at what goes into the layers."""
        return self._observation.reads("input")

    @property
    def learns(self) -> bool:
        """Whether the criterion learns its scores over the whole stage: it must see every training step."""
        return self._observation.learns

    def due(self, step: int) -> bool:
        """Whether an event falls after optimiser step `step`; 0: before the first."""
        return step in self.events

    def reached(self, step: int) -> bool:
        """Whether the last event lies behind, so that the target sparsity holds."""
        return step >= self.last

    def observe(self, scale: float = 1.0) -> None:
        """After the backward pass: note what the criterion needs, of gradients that a loss scale multiplied."""
        self._observation.gradients(scale)

    def watching(self, real: Tensor | None = None) -> AbstractContextManager[None]:
        """Note what goes into the layers in forward passes inside the context.

        Args:
            real: the batch's attention mask, [rows, tokens]: padding is left out of layers whose inputs are laid out
                so; without it every token counts.
        """
        return self._observation.watching(real)

    def pool(self, total: Callable[[Iterable[Tensor]], None]) -> None:
        """Add up what several processes have seen of the layers' inputs; `total` sums tensors over them, in place."""
        self._observation.pool(total)

    def forget(self) -> None:
        """Drop what was observed, except scores that are learned over the stage."""
        self._observation.forget()

    def silence(self) -> None:
        """Before clipping: zero the gradients of dead weights, unless the criterion lets them live."""
        if not self._dense_gradients:
            self.masks.silence()

    @torch.no_grad()
    def step(self, step: int) -> float | None:
        """Prune if an event is due after optimiser step `step`; return the sparsity now, or None.

        Raises:
            RecipeError: nothing was observed of what the criterion ranks by, or its scores are none.
            PluginError: the criterion of a plugin fails.
        """
        sparsity = self.events.get(step)
        if sparsity is None:
            return None
        if self._observation.empty():
            raise RecipeError(
                f"criterion {self.criterion!r} has observed nothing before the prune event at step {step}",
                "set prune.calibration to a number of batches, leave prune.first out, or set compile to false",
            )
        scores = {name: self._scored(name) for name in self.masks.dead}
        dead, made = self.masks.decide(scores, sparsity, self._pattern, self.scope, self.least)
        self.clamped, self.lowered = made.clamped, made.least
        mended = self._mended(dead)
        self.agree([*dead.values(), *(mended or {}).values()])
        self.masks.bury(dead, mended)
        self.forget()
        return sparsity

    def _scored(self, name: str) -> Tensor:
        """The criterion's scores of one matrix.

        Raises:
            RecipeError: they are of another shape than the weight, or not numbers.
            PluginError: the criterion of a plugin fails.
        """
        weight = self.masks.filled(name)
        with plugins.wrap_errors(self._part):
            scores = self._part.value(weight, self._observation.stats(name))
        asked = f"criterion {self.criterion!r} must give a score for each weight of {name}"
        if not torch.is_tensor(scores) or scores.shape != weight.shape:
            found = f"shape {tuple(scores.shape)}" if torch.is_tensor(scores) else type(scores).__name__
            raise RecipeError(f"{asked}, shape {tuple(weight.shape)}, and gives {found}")
        if bool(scores.isnan().any()):
            raise RecipeError(
                f"{asked}, and {int(scores.isnan().sum()):,} of {scores.numel():,} are not numbers",
                "if the losses before were none either, set prune.learning_rate lower",
            )
        return scores

    def seal(self) -> None:
        """Before the weights are handed over: make the zeros say what the masks say.

        Raises:
            GateError: their number is not the requested one.
        """
        self.masks.seal()
        self.masks.check(self.target, self.scope)

    def state_dict(self) -> dict[str, Tensor]:
        """Masks, the values kept of the dead, and statistics, as flat tensors."""
        state = {f"dead.{name}": dead for name, dead in self.masks.state_dict().items()}
        kept = ((name, fsdp.gather_rows(value, self.masks.parameters[name])) for name, value in self.masks.kept.items())
        state |= {f"kept.{name}": value for name, value in kept}
        return state | {f"seen.{key}": value for key, value in self._observation.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        self.masks.load_state_dict(_under("dead.", state))
        weights = self.masks.parameters
        kept = _under("kept.", state)
        self.masks.kept = {
            n: fsdp.take_local_rows(value, weights[n]).to(weights[n].device) for n, value in kept.items()
        }
        self._observation.load_state_dict(_under("seen.", state))

    def _mended(self, dead: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The weights with survivors that make up for the dying; regrown weights have no part in it."""
        if self._update is None:
            return None
        return {
            name: self._update(
                fsdp.local_rows(weight), ~(self.masks.dead[name] | dead[name]), self._observation.stats(name)
            )
            for name, weight in self.masks.parameters.items()
        }


def _known(criterion: str, needs: Sequence[str]) -> Sequence[str]:
    unknown = set(needs) - set(STATISTICS)
    if unknown:
        raise RecipeError(
            f"criterion {criterion!r} needs {', '.join(sorted(unknown))}, which is not observed",
            f"observed: {', '.join(STATISTICS)}",
        )
    return needs


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
