"""On a CPU: an export target, and products for training, that neither store nor multiply the zeros of an encoder."""

from collections.abc import Mapping
from typing import Any

from spdtool import plugins
from spdtool_sparse_cpu.target import SparseCpu

plugins.targets.register("sparse-cpu")(SparseCpu)


@plugins.products.register("sparse-cpu")
def skip_zeros(layers: Mapping[str, Any], masks: Any, *, sampled: bool) -> None:
    """Float32 products of the student's layers on a CPU, over their nonzeros alone."""
    from spdtool_sparse_cpu.products import use  # waits for torch

    use(layers, masks, sampled=sampled)
