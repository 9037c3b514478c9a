"""Masks: which weights are zero, and the hold that keeps them zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spdtool.errors import GateError, ModelError
from spdtool.pruning.patterns import zeros_in

Pattern = Callable[[Tensor, float], Tensor]


class Masks:
    """Keeps, by parameter name, which weights are dead, beside the parameters themselves.

    The model is not touched: no parametrisation, no buffer, no renamed key. What is saved is the model with exact
    zeros, from which `from_zeros` recovers the masks at the next stage.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.dead = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in parameters.items()}
        self._held: torch.optim.Optimizer | None = None

    @classmethod
    def from_zeros(cls, parameters: Mapping[str, nn.Parameter]) -> Masks:
        """The masks that the weights themselves tell: dead is what equals zero, whoever pruned it."""
        masks = cls(parameters)
        masks.dead = {name: weight.detach() == 0 for name, weight in masks.parameters.items()}
        return masks

    def prune(self, scores: Mapping[str, Tensor], sparsity: float, pattern: Pattern, scope: str = "matrix") -> None:
        """Kill the weights of lowest score until `sparsity` is reached; the dead stay dead.

        Args:
            scores: parameter name to scores shaped like the parameter.
            sparsity: share of zeros, of every matrix (scope `matrix`) or of all of them together (`global`).
        """
        low = float("-inf")
        ranked = {name: scores[name].detach().masked_fill(dead, low) for name, dead in self.dead.items()}
        if scope == "global":
            joined = torch.cat([score.flatten() for score in ranked.values()])
            pieces = pattern(joined, sparsity).split([score.numel() for score in ranked.values()])
            alive = {name: piece.view_as(ranked[name]) for name, piece in zip(ranked, pieces, strict=True)}
        else:
            alive = {name: pattern(score, sparsity) for name, score in ranked.items()}
        self.dead = {name: self.dead[name] | ~alive[name] for name in self.dead}
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Set every dead weight to zero, and the moments that a held optimiser keeps for it."""
        for name, weight in self.parameters.items():
            for tensor in (weight, *self._moments(weight)):
                tensor.masked_fill_(self.dead[name], 0.0)

    @torch.no_grad()
    def silence(self) -> None:
        """Set the gradients of dead weights to zero, so that they do not count when gradients are clipped."""
        for name, weight in self.parameters.items():
            if weight.grad is not None:
                weight.grad.masked_fill_(self.dead[name], 0.0)

    def hold(self, optimizer: torch.optim.Optimizer) -> Any:
        """Zero dead weights and their moments after every step of `optimizer`; returns the hook's handle."""
        self._held = optimizer
        return optimizer.register_step_post_hook(lambda *_: self.apply())

    @torch.no_grad()
    def seal(self) -> None:
        """Make the zeros say what the masks say: a live weight that landed on exactly 0 becomes the least number."""
        self.apply()
        for name, weight in self.parameters.items():
            landed = (weight == 0) & ~self.dead[name]
            weight.masked_fill_(landed, torch.finfo(weight.dtype).tiny)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Parameter name to `(dead weights, all weights)`."""
        return {name: (int(dead.sum()), dead.numel()) for name, dead in self.dead.items()}

    def sparsity(self) -> float:
        """Share of dead weights over all the matrices."""
        counts = self.counts().values()
        return sum(zeros for zeros, _ in counts) / sum(size for _, size in counts)

    def check(self, sparsity: float, scope: str = "matrix") -> None:
        """Assert that the zeros in the weights are the requested ones, to the nearest weight.

        Raises:
            GateError: a count is off.
        """
        check_counts({name: (int((w == 0).sum()), w.numel()) for name, w in self.parameters.items()}, sparsity, scope)

    def check_room(self, sparsity: float, scope: str = "matrix") -> None:
        """Assert, before hours are spent, that not more is dead already than `sparsity` asks for.

        Raises:
            ModelError: the weights are too sparse.
        """
        for name, (zeros, size) in _in_scope(self.counts(), scope).items():
            if zeros > zeros_in(size, sparsity):
                raise ModelError(
                    f"{name} has {zeros} zeros of {size} already; sparsity {sparsity} asks for "
                    f"{zeros_in(size, sparsity)}, and pruned weights do not grow again",
                    "ask for a higher sparsity, or set prune.scope to global",
                )

    def check_dead(self) -> None:
        """Assert that dead weights, their gradients and their moments are zero.

        Raises:
            GateError: names the first parameter for which one is not.
        """
        for name, weight in self.parameters.items():
            for tensor in (weight, weight.grad, *self._moments(weight)):
                if tensor is not None and bool((tensor.detach()[self.dead[name]] != 0).any()):
                    raise GateError(f"{name}: a pruned weight, its gradient or one of its moments is not zero")

    def _moments(self, weight: nn.Parameter) -> list[Tensor]:
        state = {} if self._held is None else self._held.state.get(weight, {})
        return [value for value in state.values() if torch.is_tensor(value) and value.shape == weight.shape]

    def state_dict(self) -> dict[str, Tensor]:
        """Parameter name to bool tensor of the dead."""
        return dict(self.dead)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        self.dead = {name: state[name].to(weight.device) for name, weight in self.parameters.items()}


def check_counts(counts: Mapping[str, tuple[int, int]], sparsity: float, scope: str = "matrix") -> None:
    """Assert that `(zeros, size)` of each matrix is what `sparsity` asks for, to the nearest weight.

    Raises:
        GateError: names the first matrix that is off, or the total for scope `global`.
    """
    for name, (zeros, size) in _in_scope(counts, scope).items():
        if zeros != zeros_in(size, sparsity):
            raise GateError(
                f"{name} has {zeros} zeros of {size}; sparsity {sparsity} asks for {zeros_in(size, sparsity)}"
            )


def _in_scope(counts: Mapping[str, tuple[int, int]], scope: str) -> Mapping[str, tuple[int, int]]:
    if scope == "matrix":
        return counts
    return {"all matrices": (sum(zeros for zeros, _ in counts.values()), sum(size for _, size in counts.values()))}
