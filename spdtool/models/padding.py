"""An attention mask that answers, without asking the device, whether its batch has padding at all.

transformers asks that in every forward pass, `mask.all()`, to leave the mask out where there is none. On a GPU the
answer is read back, so everything queued has to end first. Here it is known since the batch was made on the processor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


class PaddingMask(Tensor):
    """Keeps a mask [rows, tokens] and whether all of it is real; what is computed from it is an ordinary tensor."""

    unpadded: bool

    @classmethod
    def of(cls, mask: Tensor, *, unpadded: bool) -> PaddingMask:
        """`mask`, known to have no padding, or some; it is not copied."""
        made = mask.as_subclass(cls)
        made.unpadded = unpadded
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = args[0] if args and isinstance(args[0], cls) else None
        if asked is not None and func in (Tensor.all, torch.all) and len(args) == 1 and not kwargs:
            return np.bool_(asked.unpadded)
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        if asked is not None and func in (Tensor.to, Tensor.bool):  # another type or device, and the same mask
            return cls.of(found, unpadded=asked.unpadded)
        return found
