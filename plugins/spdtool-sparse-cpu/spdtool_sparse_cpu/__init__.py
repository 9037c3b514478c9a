"""Skip the zeros of an encoder on a CPU: an export target, and products for training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from spdtool import plugins
from spdtool_sparse_cpu.target import INT8_NAME, NAME, SparseCpu, SparseCpuInt8

if TYPE_CHECKING:
    from torch import nn

    from spdtool.pruning.masks import Masks

plugins.targets.register(NAME)(SparseCpu)
plugins.targets.register(INT8_NAME)(SparseCpuInt8)


@plugins.products.register(NAME)
def skip_zeros(layers: Mapping[str, nn.Linear], masks: Masks, *, skip_dead_gradients: bool) -> None:
    """Multiply only the nonzeros of the student's float32 layers on a CPU."""
    from spdtool_sparse_cpu.products import use_sparse_products  # waits for torch

    use_sparse_products(layers, masks, skip_dead_gradients=skip_dead_gradients)
