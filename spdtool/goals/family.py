"""Place smaller speed-ups on the way to the one that is asked for, so that one run leaves a family of students.

Every prune event removes heads and neurons in proportion, from the dense shape to the chosen one. A member of the
family is the student at the event from which on it is as fast as asked for. Its shape lies on this way, so it is not
the best one for its speed; that takes a run of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from spdtool.models.structures import LayerStructures
from spdtool.pruning.search import cost_of_shape
from spdtool.pruning.structure import EncoderShape, LayerShape, interpolate_shape, shape_sparsity
from spdtool.run.records import FamilyMember, ShapeChoice

POINTS = 200  # on the way, of which the first that is fast enough is taken
DECIMALS = 4  # of the sparsity of an event, which names the folder of the student


def place_family(
    speedups: Sequence[float], choice: ShapeChoice, dense: EncoderShape, layers: Sequence[LayerStructures]
) -> tuple[FamilyMember, ...]:
    """Return the members of a family, the slowest first.

    Args:
        speedups: that are asked for; one that the chosen shape does not exceed is left out.
        choice: the smallest shape, by a table of times.
        dense: the shape from which nothing is removed.
        layers: of the encoder.
    """
    assert choice.profile is not None, "a family has speed-ups, and these need times"
    target = tuple(LayerShape(*sizes) for sizes in choice.shape)
    sparsity_of_target = shape_sparsity(layers, target)
    # The table was off by this much for the whole encoder, and by nothing for the dense one.
    correction = 1.0
    if choice.trial is not None and choice.expected is not None:
        correction = choice.trial.median / choice.expected
    costs = choice.profile.costs
    members = []
    for speedup in sorted(set(speedups)):
        for point in range(1, POINTS):
            progress = point / POINTS
            shape = interpolate_shape(dense, target, progress)
            expected = costs.of_dense(len(dense)) / cost_of_shape(shape, costs) * correction**progress
            if expected >= speedup:
                sparsity = math.ceil(progress * sparsity_of_target * 10**DECIMALS) / 10**DECIMALS
                members.append(FamilyMember(speedup=speedup, sparsity=sparsity, expected=expected))
                break
    return tuple(members)
