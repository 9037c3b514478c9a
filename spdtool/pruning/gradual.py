"""Gradual pruning: prune events at their steps, by a criterion, with what the criterion asked to observe in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from spdtool import plugins
from spdtool.errors import RecipeError
from spdtool.pruning.criteria import KNOWN_NEEDS, Stats
from spdtool.pruning.masks import Masks


class Pruner:
    """Keeps the masks, the prune events still to come, and the gradient statistics since the last one.

    Args:
        events: `(optimiser step, sparsity)`, rising; see `schedules.prune_events`. None: the masks are only held.
        target: sparsity that the masks must have in the end.
        criterion, pattern: registered names.
        scope: `matrix` or `global`.

    Raises:
        UnknownName: no such criterion or pattern.
        RecipeError: the criterion needs what this tool does not observe, or observes too late.
        ModelError: more weights are zero already than the target asks for.
    """

    def __init__(
        self,
        masks: Masks,
        events: Sequence[tuple[int, float]],
        *,
        target: float,
        criterion: str,
        pattern: str,
        scope: str,
    ) -> None:
        part = plugins.criteria.part(criterion)
        self.masks, self.target, self.scope = masks, target, scope
        self.events = dict(events)
        self.last = max(self.events, default=0)
        self._criterion, self._pattern = part.value, plugins.patterns.get(pattern)
        self._needs = tuple(part.meta.get("needs", ()))
        self._dense_gradients = bool(part.meta.get("dense_gradients", False))
        unknown = set(self._needs) - set(KNOWN_NEEDS)
        if unknown:
            raise RecipeError(
                f"criterion {criterion!r} needs {', '.join(sorted(unknown))}, which is not observed",
                f"observed: {', '.join(KNOWN_NEEDS)}",
            )
        if self._needs and 0 in self.events:
            raise RecipeError(
                f"criterion {criterion!r} needs gradients, and the first prune event comes before the first step",
                "leave prune.first out: --set prune.first=none",
            )
        masks.check_room(target, scope)
        self._sums: dict[str, Tensor] = {}
        self._observed = 0

    def reached(self, step: int) -> bool:
        """Whether the last event lies behind, so that the target sparsity holds."""
        return step >= self.last

    @torch.no_grad()
    def observe(self, scale: float = 1.0) -> None:
        """After the backward pass: note what the criterion needs, of gradients that a loss scale multiplied."""
        if not self._needs:
            return
        self._observed += 1
        for name, weight in self.masks.parameters.items():
            if weight.grad is None:  # a layer that the draw left out
                continue
            for need in self._needs:
                gradient = weight.grad.float() / scale
                seen = gradient if need == "gradient" else gradient.square()
                key = f"{need}.{name}"
                self._sums[key] = self._sums[key].add_(seen) if key in self._sums else seen

    def silence(self) -> None:
        """Before clipping: zero the gradients of dead weights, unless the criterion lets them live."""
        if not self._dense_gradients:
            self.masks.silence()

    def step(self, step: int) -> float | None:
        """Prune if an event is due after optimiser step `step`; return the sparsity now, or None."""
        sparsity = self.events.get(step)
        if sparsity is None:
            return None
        scores = {name: self._criterion(weight.detach(), self._stats(name)) for name, weight in self._weights()}
        self.masks.prune(scores, sparsity, self._pattern, self.scope)
        self._sums, self._observed = {}, 0
        return sparsity

    def seal(self) -> None:
        """Before the weights are handed over: make the zeros say what the masks say.

        Raises:
            GateError: their number is not the requested one.
        """
        self.masks.seal()
        self.masks.check(self.target, self.scope)

    def state_dict(self) -> dict[str, Tensor]:
        """Masks and statistics as flat tensors."""
        state = {f"dead.{name}": dead for name, dead in self.masks.state_dict().items()}
        state |= {f"sum.{key}": value for key, value in self._sums.items()}
        return state | {"observed": torch.tensor(self._observed)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        self.masks.load_state_dict({key[5:]: value for key, value in state.items() if key.startswith("dead.")})
        device = next(iter(self.masks.parameters.values())).device
        self._sums = {key[4:]: value.to(device) for key, value in state.items() if key.startswith("sum.")}
        self._observed = int(state["observed"])

    def _weights(self) -> list[tuple[str, torch.nn.Parameter]]:
        return list(self.masks.parameters.items())

    def _stats(self, name: str) -> Stats:
        weight = self.masks.parameters[name]
        means = {
            need: self._sums[f"{need}.{name}"] / self._observed
            if f"{need}.{name}" in self._sums
            else torch.zeros_like(weight)
            for need in self._needs
        }
        return Stats(**means)
