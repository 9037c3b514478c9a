"""An attention mask that answers, without asking the device, whether its batch has padding at all.

transformers asks that in every forward pass, `mask.all()`, to leave the mask out where there is
none. On a GPU the answer is read back, so everything queued has to end first. Here the batch was
asked while it was on the processor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


class PaddingMask(Tensor):
    """A mask [rows, tokens] that stores whether all of it is ones; what is computed from it is an ordinary tensor."""

    unpadded: bool

    @classmethod
    def of(cls, mask: Tensor, *, unpadded: bool) -> PaddingMask:
        """Wrap `mask`, which has no padding, or some; it is not copied."""
        padding_mask = mask.as_subclass(cls)
        padding_mask.unpadded = unpadded
        return padding_mask

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mask = args[0] if args and isinstance(args[0], cls) else None
        # `mask.all(dim=1)` is another question, and goes to the numbers.
        if mask is not None and func in (Tensor.all, torch.all) and len(args) == 1 and not kwargs:
            return np.bool_(mask.unpadded)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if mask is not None and func in (Tensor.to, Tensor.bool):  # another type or device, and the same mask
            return cls.of(result, unpadded=mask.unpadded)
        return result
