"""Criteria: what makes a weight worth keeping. A criterion is a function `(weight, stats) -> scores`.

The weight is [outputs, inputs], and its scores have that shape; of a sharded weight both are the
rows of this rank. The lowest scores are pruned first. A criterion declares what it reads besides the weight (a name of
`statistics.py`). Two further functions are optional:

    update         `(weight, alive, stats) -> weight` updates the weights that survive an event; the criteria that do
                   so are in `second_order.py`
    block_scores   `(weight, stats, block) -> scores [outputs / rows, inputs / columns]` ranks
                   blocks of weights that go together; without it, a block's score is the mean over
                   its weights

    @criteria.register("obert", needs=("fisher_blocks",), update=update_blocks, block_scores=obert_of_blocks)
    def obert(weight, stats): ...
"""

from __future__ import annotations

from torch import Tensor

from spdtool.plugins import criteria
from spdtool.pruning.patterns import sum_blocks
from spdtool.pruning.statistics import Stats

Block = tuple[int, int]
"""Outputs and inputs of the weights that go together."""


def magnitude_of_blocks(weight: Tensor, stats: Stats, block: Block) -> Tensor:  # noqa: ARG001
    """The root of the sum of squares: the distance by which the matrix moves."""
    return sum_blocks(weight.float().square(), block).sqrt()


@criteria.register("magnitude", block_scores=magnitude_of_blocks)
def magnitude(weight: Tensor, stats: Stats) -> Tensor:  # noqa: ARG001
    """The absolute value (Han et al. 2015, arXiv 1506.02626).

    It is the criterion of Sparse Progressive Distillation (Huang et al., ACL 2022).
    """
    return weight.abs()


def taylor_of_blocks(weight: Tensor, stats: Stats, block: Block) -> Tensor:
    """The absolute value of the block's change of the loss, in which its weights may cancel out."""
    assert stats.gradient is not None
    return sum_blocks(weight * stats.gradient, block).abs()


@criteria.register("taylor", needs=("gradient",), block_scores=taylor_of_blocks)
def taylor(weight: Tensor, stats: Stats) -> Tensor:
    """|weight x mean gradient|: the first-order change of the loss.

    Molchanov et al. 2019, arXiv 1906.10771.
    """
    assert stats.gradient is not None
    # of the mean: over the steps the noise of single batches cancels out
    return (weight * stats.gradient).abs()


@criteria.register("fisher", needs=("gradient_squared",))
def fisher(weight: Tensor, stats: Stats) -> Tensor:
    """Weight^2 x mean squared gradient / 2: the second-order change, by a diagonal Fisher matrix.

    Theis et al. 2018, arXiv 1801.05787; Singh & Alistarh 2020, arXiv 2004.14340.
    """
    assert stats.gradient_squared is not None
    return weight.float().square() * stats.gradient_squared / 2


def wanda_of_blocks(weight: Tensor, stats: Stats, block: Block) -> Tensor:
    """The root of the sum of squares over the block."""
    return sum_blocks(wanda(weight, stats).float().square(), block).sqrt()


@criteria.register("wanda", needs=("input_norm",), block_scores=wanda_of_blocks)
def wanda(weight: Tensor, stats: Stats) -> Tensor:
    """|weight| x root mean square of its input (Sun et al. 2023, arXiv 2306.11695).

    The paper ranks the weights of each output against each other; here the scope says what is ranked together.
    """
    assert stats.input_norm is not None
    return weight.abs() * stats.input_norm


@criteria.register("movement", needs=("movement",))
def movement(weight: Tensor, stats: Stats) -> Tensor:
    """Scores learned as -sum(weight x gradient) over the stage: the hard variant of movement pruning.

    Sanh et al. 2020, arXiv 2005.07683. The paper lets pruned weights come back: `prune.regrowth`.
    """
    # an event before the first step has no scores yet
    return weight.abs() if stats.movement is None else stats.movement


@criteria.register("movement-soft", needs=("movement_soft",))
def movement_soft(weight: Tensor, stats: Stats) -> Tensor:
    """Movement scores under the sigmoid penalty of the paper's soft variant (arXiv 2005.07683).

    The paper fixes a threshold and gets some sparsity; here the threshold is the one that gives
    exactly the sparsity of the event.
    """
    # as in `movement`
    return weight.abs() if stats.movement_soft is None else stats.movement_soft
