"""Patterns: which weights live and die together.

A pattern is a function `(scores, zeros) -> bool mask`. The mask is True where a weight lives, has
the shape of the scores [outputs, inputs], and exactly `zeros` entries that are False. Weights that
are dead already come with a score of minus infinity.

A pattern of blocks is registered with the shape of its blocks, outputs x inputs. Its function sees
one score for each block, and its mask and its number of zeros are of blocks:

    @patterns.register("1x8", block=(1, 8))
    def rows_of_eight(scores, zeros): ...

`find_pattern` builds every other block from its shape (`8x1`), and every other N:M (`1:4`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from spdtool.errors import ModelError, RecipeError
from spdtool.plugins import patterns


@dataclass(frozen=True)
class Pattern:
    """A rule that chooses what lives, and the weights that it chooses together.

    Attributes:
        choose: `(scores, zeros) -> bool mask`, over blocks.
        block: outputs and inputs of a block; (1, 1): single weights.
        group: consecutive inputs among which the rule chooses; they must divide each row.
        largest_sparsity: share of zeros that the rule can reach.
    """

    name: str
    choose: Callable[[Tensor, int], Tensor]
    block: tuple[int, int] = (1, 1)
    group: int = 1
    largest_sparsity: float = 1.0

    @property
    def block_size(self) -> int:
        """Number of weights that live and die together."""
        rows, columns = self.block
        return rows * columns

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise ModelError unless a matrix [outputs, inputs] divides into whole blocks and groups."""
        rows, columns = self.block
        if len(shape) != 2 or shape[0] % rows or shape[1] % max(columns, self.group):
            raise ModelError(
                f"{name} has the shape {tuple(shape)}, which the pattern {self.name} does not divide",
                "choose another one: --set prune.pattern=unstructured fits every matrix",
            )

    def check_sparsity(self, sparsity: float, scope: str) -> None:
        """Raise RecipeError if the pattern cannot have so many zeros, or not in this scope."""
        if sparsity > self.largest_sparsity:
            raise RecipeError(
                f"the pattern {self.name} has at most {self.largest_sparsity:.0%} zeros; "
                f"a sparsity of {sparsity:g} was asked for",
                f"--sparsity {self.largest_sparsity:g}, or another prune.pattern",
            )
        # Over several matrices, one could be given more zeros than it can have.
        if self.largest_sparsity < 1 and scope != "matrix":
            raise RecipeError(
                f"the pattern {self.name} gives every matrix the same zeros; prune.scope is {scope}",
                "--set prune.scope=matrix",
            )

    def check_dead(self, name: str, dead: Tensor) -> None:
        """Raise ModelError if a group of a matrix has more dead weights for good than the pattern gives it."""
        most = round(self.group * self.largest_sparsity)
        if self.group > 1 and int(dead.reshape(-1, self.group).sum(1).max()) > most:
            raise ModelError(
                f"{name} has more than {most} zeros in some {self.group} neighbouring inputs, "
                f"and the pattern {self.name} gives every {self.group} of them {most}",
                "start from a dense checkpoint, or set prune.regrowth to true",
            )

    def to_blocks(self, scores: Tensor) -> Tensor:
        """Average the scores [outputs, inputs] of each block: [outputs / rows, inputs / columns]."""
        if self.block_size == 1:
            return scores
        return sum_blocks(scores, self.block) / self.block_size

    def to_weights(self, blocks: Tensor) -> Tensor:
        """Repeat each block's value for all of its weights."""
        if self.block_size == 1:
            return blocks
        rows, columns = self.block
        return blocks.repeat_interleave(rows, 0).repeat_interleave(columns, 1)

    def whole_blocks(self, flags: Tensor) -> Tensor:
        """Clear the flags [outputs, inputs] of blocks that are not flagged everywhere."""
        if self.block_size == 1:
            return flags
        return self.to_weights(self.to_blocks(flags.float()) == 1)


def sum_blocks(values: Tensor, block: tuple[int, int]) -> Tensor:
    """Sum the values [outputs, inputs] of each block: [outputs / rows, inputs / columns]."""
    rows, columns = block
    return values.reshape(-1, rows, values.shape[1] // columns, columns).sum((1, 3))


def find_pattern(name: str) -> Pattern:
    """Look up a pattern.

    Raises:
        UnknownName: nothing provides it.
        RecipeError: N:M with N not below M.
    """
    if patterns.find(name) is None:
        if shape := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name):
            return Pattern(name, unstructured, block=(int(shape[1]), int(shape[2])))
        if ratio := re.fullmatch(r"([1-9]\d*):([1-9]\d*)", name):
            return _make_n_of_m(name, int(ratio[1]), int(ratio[2]))
    entry = patterns.entry(name)  # raises for an unknown one, with near names
    return Pattern(name, entry.value, **entry.meta)


def _make_n_of_m(name: str, alive: int, group: int) -> Pattern:
    if alive >= group:
        raise RecipeError(f"the pattern {name} has no zeros", "for example --set prune.pattern=2:4")
    choose = partial(at_most_n_of_m, alive=alive, group=group)
    return Pattern(name, choose, group=group, largest_sparsity=1 - alive / group)


def kth_lowest(scores: Tensor, count: int) -> Tensor:
    """Return the highest of the `count` lowest scores of a vector, a scalar; nan ranks highest.

    Args:
        scores: [n].
        count: from 1 to n.
    """
    if scores.device.type == "cpu":
        return scores.kthvalue(count).values
    # torch refuses `kthvalue` on a GPU where algorithms must be deterministic
    return scores.sort().values[count - 1]


@patterns.register("unstructured")
def unstructured(scores: Tensor, zeros: int) -> Tensor:
    """Any weight may go: the lowest scores do, wherever they stand. Ties go in the order of their position."""
    flat = scores.flatten()
    if zeros == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = kth_lowest(flat, zeros)
    below = flat < threshold
    tied = flat == threshold
    # a mere `<= threshold` would take every tied weight, and miss the exact count
    pruned = below | (tied & (tied.cumsum(0) <= zeros - below.sum()))
    return ~pruned.view_as(scores)


SINGLE_WEIGHTS = Pattern("unstructured", unstructured)


@patterns.register("1x4", block=(1, 4))
def blocks_of_1x4(scores: Tensor, zeros: int) -> Tensor:
    """Four neighbouring inputs of one output go together; any other RxC (outputs x inputs) works as well."""
    return unstructured(scores, zeros)


@patterns.register("4x4", block=(4, 4))
def blocks_of_4x4(scores: Tensor, zeros: int) -> Tensor:
    """Four inputs of four neighbouring outputs go together."""
    return unstructured(scores, zeros)


@patterns.register("2:4", group=4, largest_sparsity=0.5)
def two_of_four(scores: Tensor, zeros: int) -> Tensor:
    """At least two of every four neighbouring inputs go, half of all weights; any other N:M works as well."""
    return at_most_n_of_m(scores, zeros, alive=2, group=4)


def at_most_n_of_m(scores: Tensor, zeros: int, alive: int, group: int) -> Tensor:
    """Choose the lowest scores, but leave `alive` weights in every `group` neighbouring inputs.

    With as many zeros as that allows, every group has exactly `alive` weights. With fewer, as at
    the prune events on the way, some groups have more.

    Args:
        scores: [outputs, inputs]; `group` divides the inputs.
        zeros: entries of the mask that are False, at most 1 - alive / group of all.
        alive: weights of a group that live at least.
        group: neighbouring inputs.
    """
    grouped = scores.reshape(-1, group)
    # Rank inside of each group; a stable sort breaks ties by position, as `unstructured` does.
    ranks = grouped.argsort(stable=True, dim=-1).argsort(-1)
    is_candidate = (ranks < group - alive).view_as(scores)
    assert zeros <= int(is_candidate.sum()), "Pattern.check_sparsity refuses more zeros"
    # Among the candidates any may go first. A NaN ranks highest in `kthvalue`, above infinity.
    return unstructured(scores.masked_fill(~is_candidate, torch.nan), zeros)
