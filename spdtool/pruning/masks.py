"""Masks: which weights are zero, and what keeps them zero while the model is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spdtool.errors import GateError, ModelError
from spdtool.models import device, fsdp
from spdtool.models.fsdp import local_rows
from spdtool.pruning.allocation import Allocation, allocate, group_by_scope, zeros_in
from spdtool.pruning.patterns import SINGLE_WEIGHTS, Pattern


class Masks:
    """Which weights are dead, by parameter name, beside the parameters themselves.

    The model is not touched: no parametrisation, no buffer, no renamed key. What is saved is the
    model with exact zeros, from which `from_zeros` recovers the masks at the next stage.

    Of sharded parameters (`models/fsdp.py`) every tensor here is this rank's rows, and so are
    scores and updated weights; what counts or ranks weights is collective.

    Attributes:
        parameters: name to parameter.
        pattern: which weights live and die together.
        dead: name to bool tensor, True where the weight is dead.
        dead_values: name to the values that dead weights had when they died, zero where a weight
            lives; empty where the dead stay dead (see `allow_regrowth`).
        zeroes_together: zero the gradients of all matrices in one operation, as on a GPU; it takes 4 more bytes a
            weight.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], pattern: Pattern = SINGLE_WEIGHTS) -> None:
        """Begin with nothing dead.

        Raises:
            ModelError: the pattern does not divide a matrix, or the rows that this rank keeps of it.
        """
        self.parameters = dict(parameters)
        self.pattern = pattern
        for name, weight in self.parameters.items():
            pattern.check_shape(name, tuple(weight.shape))
            pattern.check_shape(f"this rank's shard of {name}", tuple(local_rows(weight).shape))
        self.dead: dict[str, Tensor] = {}
        for name, weight in self.parameters.items():
            self.dead[name] = torch.zeros_like(local_rows(weight), dtype=torch.bool)
        self.dead_values: dict[str, Tensor] = {}
        self.zeroes_together = any(device.is_gpu(weight.device) for weight in self.parameters.values())
        self._optimizer: torch.optim.Optimizer | None = None
        # an optimiser step leaves a weight zero whose moments and gradient are zero: nothing is
        # left to do
        self._moments_are_zero = False  # dead weights and their moments, since the last `apply`
        self._gradients_are_zero = False  # of dead weights, for the coming step
        self._alive: dict[str, Tensor] = {}  # 1 and 0 for live and dead weights, see `_refresh_alive`
        self._alive_sources: dict[str, tuple[Tensor, int]] = {}  # the `dead` that each was made of, and its version

    @classmethod
    def from_zeros(cls, parameters: Mapping[str, nn.Parameter], pattern: Pattern = SINGLE_WEIGHTS) -> Masks:
        """Read the masks from the weights themselves: dead is what equals zero, whoever pruned it.

        With a pattern of blocks, dead is a block of zeros. A lone zero lives, and may move again.
        """
        masks = cls(parameters, pattern)
        for name, weight in masks.parameters.items():
            masks.dead[name] = pattern.whole_blocks(local_rows(weight) == 0)  # -0.0 too
        return masks

    @property
    def can_regrow(self) -> bool:
        """Whether the dead compete again at each event."""
        return bool(self.dead_values)

    def allow_regrowth(self) -> None:
        """Let the dead compete at each event with the value that they had: 0 for those dead now."""
        for name, weight in self.parameters.items():
            self.dead_values[name] = torch.zeros_like(local_rows(weight))

    def build_full_weight(self, name: str) -> Tensor:
        """Return the local rows of a weight, with the values of the dead where they can regrow."""
        weight = local_rows(self.parameters[name])
        if not self.can_regrow:
            return weight
        return torch.where(self.dead[name], self.dead_values[name], weight)

    def choose(
        self,
        scores: Mapping[str, Tensor],
        sparsity: float,
        scope: str = "matrix",
        least: float = 0.0,
    ) -> tuple[dict[str, Tensor], Allocation]:
        """Choose the weights or blocks of lowest score, until `sparsity` is reached; nothing is changed.
        Collective.

        Args:
            scores: parameter name to scores shaped like the parameter.
            sparsity: share of zeros: of every matrix (scope `matrix`), of all matrices of one
                type together (`type`), or of all of them together (`global`).
            least: share of each matrix that stays alive if the scope is not `matrix`.

        Returns:
            the new `dead`, and how the zeros are distributed, in blocks of the pattern.
        """
        compared: dict[str, Tensor] = {}
        if scope == "matrix":
            allocation = Allocation()
            for name, weight in self.parameters.items():
                allocation.zeros[name] = zeros_in(weight.numel() // self.pattern.block_size, sparsity)
        else:
            for name in self.dead:
                compared[name] = self._gather_scores(name, scores[name])
            allocation = allocate(compared, sparsity, scope, least)
        dead = {}
        for name, weight in self.parameters.items():
            # in the scope `matrix` gathered only now: one full matrix exists at a time
            score = compared[name] if compared else self._gather_scores(name, scores[name])
            alive = self.pattern.to_weights(self.pattern.choose(score, allocation.zeros[name]))
            pruned = fsdp.take_local_rows(~alive, weight)
            # a lower sparsity than before must not bring back what is dead for good
            dead[name] = pruned if self.can_regrow else self.dead[name] | pruned
        return dead, allocation

    @torch.no_grad()
    def set(self, dead: Mapping[str, Tensor], updated: Mapping[str, Tensor] | None = None) -> None:
        """Set the masks; where weights can regrow, store and restore their values.

        Args:
            dead: parameter name to bool tensor of the rank's rows, True where a weight is to be
                dead.
            updated: parameter name to the weight with new values, taken where it was alive and
                stays so.
        """
        for name, parameter in self.parameters.items():
            weight, was_dead, is_dead = local_rows(parameter), self.dead[name], dead[name]
            if self.can_regrow:
                # with the old masks, before they are replaced below
                full = self.build_full_weight(name)
                self.dead_values[name] = torch.where(is_dead, full, 0)
                weight.copy_(full)
            if updated is not None:
                weight.copy_(torch.where(was_dead | is_dead, weight, updated[name]))
            self.dead[name] = is_dead
        self.apply()
        if self._alive:  # a recorded step reads these very tensors
            self._refresh_alive()

    @torch.no_grad()
    def apply(self) -> None:
        """Set every dead weight to zero, and the moments that an attached optimiser has for it."""
        for name, weight in self.parameters.items():
            for tensor in (local_rows(weight), *self._moments(weight)):
                clear_dead(tensor, self.dead[name])
        self._moments_are_zero = self._optimizer is not None

    @torch.no_grad()
    def zero_gradients(self) -> None:
        """Set the gradients of dead weights to zero, before they count in the clipped norm."""
        gradients = {}
        for name, weight in self.parameters.items():
            if weight.grad is not None:
                gradients[name] = local_rows(weight.grad)
        if self.zeroes_together:
            self._zero_together(gradients)
        else:
            for name, gradient in gradients.items():
                clear_dead(gradient, self.dead[name])
        self._gradients_are_zero = True

    def _zero_together(self, gradients: Mapping[str, Tensor]) -> None:
        """Zero the gradients of all dead weights in one operation, where launching one for each matrix takes longer."""
        alive = self._refresh_alive()
        torch._foreach_mul_(list(gradients.values()), [alive[name] for name in gradients])

    def _refresh_alive(self) -> dict[str, Tensor]:
        """Bring `_alive` up to date with `dead`, in place; return it: 1 for each live weight, 0 for each dead one."""
        for name, dead in self.dead.items():
            source = self._alive_sources.get(name)
            if source is not None and source[0] is dead and source[1] == dead._version:
                continue
            if name not in self._alive:
                self._alive[name] = torch.empty_like(local_rows(self.parameters[name]))
            self._alive[name].copy_(~dead)
            self._alive_sources[name] = dead, dead._version
        return self._alive

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Keep the dead and their moments zero after every step, until the handle is removed."""
        self._optimizer, self._moments_are_zero = optimizer, False
        return optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, *_: object) -> None:
        if not (self._moments_are_zero and self._gradients_are_zero):
            self.apply()
        self._gradients_are_zero = False  # the next backward pass makes new ones

    @torch.no_grad()
    def finalize(self) -> None:
        """Make the zeros equal to the masks: a live weight of exactly 0 becomes the least number."""
        self.apply()
        for name, parameter in self.parameters.items():
            weight = local_rows(parameter)
            is_live_zero = (weight == 0) & ~self.dead[name]
            # `tiny` is normal: a subnormal may become zero in a runtime that flushes them
            weight.masked_fill_(is_live_zero, torch.finfo(weight.dtype).tiny)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Parameter name to `(dead weights, all weights)`. Collective."""
        return self._count_true(self.dead)

    def sparsity(self) -> float:
        """Share of dead weights over all the matrices. Collective."""
        counts = self.counts().values()
        return sum(zeros for zeros, _ in counts) / sum(size for _, size in counts)

    def check_sparsity(self, sparsity: float, scope: str = "matrix") -> None:
        """Assert that the zeros in the weights are the requested ones, to the nearest block.
        Collective.

        Raises:
            GateError: a count is off, or a zero stands outside of a block of zeros.
        """
        # of the weights, not of the masks: those are what is saved
        zeros = {name: local_rows(weight) == 0 for name, weight in self.parameters.items()}
        for name, is_zero in zeros.items():
            if not torch.equal(self.pattern.whole_blocks(is_zero), is_zero):
                raise GateError(f"{name}: not all of its zeros are in whole blocks of {self.pattern.name}")
        check_counts(self._count_true(zeros), sparsity, scope, self.pattern.block_size)

    def check_reachable(self, sparsity: float, scope: str = "matrix") -> None:
        """Assert that no more weights are dead for good than `sparsity` asks for. Collective.

        Raises:
            ModelError: the weights are too sparse.
        """
        if self.can_regrow:
            return
        for name, dead in self.dead.items():
            self.pattern.check_dead(name, dead)
        for name, (zeros, size) in _sum_in_scope(self.counts(), scope).items():
            wanted = zeros_in(size, sparsity, self.pattern.block_size)
            if zeros > wanted:
                raise ModelError(
                    f"{name} has {zeros} zeros of {size} already; sparsity {sparsity} asks for "
                    f"{wanted}, and pruned weights do not grow again",
                    "ask for a higher sparsity, set prune.scope to global, or prune.regrowth to true",
                )

    def check_dead(self) -> None:
        """Assert that dead weights, their gradients and their moments are zero.

        Raises:
            GateError: names the first parameter for which one is not.
        """
        names, flags = [], []
        for name, weight in self.parameters.items():
            for tensor in (weight, weight.grad, *self._moments(weight)):
                if tensor is not None:
                    names.append(name)
                    flags.append((local_rows(tensor).ne(0) & self.dead[name]).any())
        revived = find_flagged(names, flags)
        # It would come back through momentum or weight decay, and the file would lack a zero.
        if revived is not None:
            raise GateError(f"{revived}: a pruned weight, its gradient or one of its moments is not zero")

    def state_dict(self) -> dict[str, Tensor]:
        """Parameter name to the bool tensor of the dead, gathered. Collective."""
        state = {}
        for name, dead in self.dead.items():
            state[name] = fsdp.gather_rows(dead, self.parameters[name])
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `state_dict`."""
        for name, weight in self.parameters.items():
            self.dead[name] = fsdp.take_local_rows(state[name], weight).to(weight.device)
        if self._alive:
            self._refresh_alive()
        self._moments_are_zero = False  # the snapshotter restores them, not this

    def _gather_scores(self, name: str, scores: Tensor) -> Tensor:
        """Gather the scores of one matrix's blocks, with minus infinity where a weight stays dead."""
        scores = scores.detach()
        if not self.can_regrow:
            scores = scores.masked_fill(self.dead[name], float("-inf"))
        return self.pattern.to_blocks(fsdp.gather_rows(scores, self.parameters[name]))

    def _moments(self, weight: nn.Parameter) -> list[Tensor]:
        """Everything that the optimiser stores for each number of `weight`."""
        if self._optimizer is None:
            return []
        moments = []
        for value in self._optimizer.state.get(weight, {}).values():
            if torch.is_tensor(value) and value.shape == weight.shape:  # the step count is a scalar
                moments.append(local_rows(value))
        return moments

    def _count_true(self, flags: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
        """Parameter name to `(True entries, all entries)`. Collective."""
        local_counts = torch.stack([flag.sum() for flag in flags.values()])
        # one read from the device for all of them
        totals = fsdp.sum_over_shards(local_counts, next(iter(self.parameters.values()))).tolist()
        counts = {}
        for name, total in zip(flags, totals, strict=True):
            counts[name] = (total, self.parameters[name].numel())
        return counts


def find_flagged(names: Sequence[str], flags: Sequence[Tensor]) -> str | None:
    """Return the first name whose flag is set.

    Args:
        flags: a bool scalar on the device for each name; all are read in one synchronisation.
    """
    if not flags:
        return None
    for name, is_set in zip(names, torch.stack(list(flags)).tolist(), strict=True):
        if is_set:
            return name
    return None


def clear_dead(tensor: Tensor, dead: Tensor) -> None:
    """Set the dead to zero, in place.

    Args:
        dead: bool, of the shape of the tensor.
    """
    if tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous():
        # True is 1, so its bits meet 0, and those of False all ones: half the time of `masked_fill_`
        tensor.view(torch.int32).bitwise_and_(dead.view(torch.int8) - 1)
    else:
        tensor.masked_fill_(dead, 0.0)


def check_counts(
    counts: Mapping[str, tuple[int, int]], sparsity: float, scope: str = "matrix", block_size: int = 1
) -> None:
    """Assert that each matrix has the zeros that `sparsity` asks for, to the nearest block.

    Args:
        counts: matrix to `(zeros, size)`.
        scope: over what the sparsity holds, see `group_by_scope`.
        block_size: weights that live and die together.

    Raises:
        GateError: names the first matrix that is off, or the total over those that share the
            sparsity.
    """
    for name, (zeros, size) in _sum_in_scope(counts, scope).items():
        wanted = zeros_in(size, sparsity, block_size)
        if zeros != wanted:
            raise GateError(f"{name} has {zeros} zeros of {size}; sparsity {sparsity} asks for {wanted}")


def _sum_in_scope(counts: Mapping[str, tuple[int, int]], scope: str) -> dict[str, tuple[int, int]]:
    """Sum `(zeros, size)` over the matrices that share the sparsity."""
    sums = {}
    for group, names in group_by_scope(counts, scope).items():
        sums[group] = (
            sum(counts[name][0] for name in names),
            sum(counts[name][1] for name in names),
        )
    return sums
