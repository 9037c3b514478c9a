"""Whether a device is a GPU: its launches cost, its numbers are not read, its memory is its own."""

from __future__ import annotations

import torch


def is_gpu(device: torch.device) -> bool:
    """Whether to train as on a GPU. Tests let a CPU say so, and run every stage on that double."""
    return device.type == "cuda"
