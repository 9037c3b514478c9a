"""Whether a device is a GPU: its launches cost, its numbers are not read, its memory is its own; and CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


def is_gpu(device: torch.device) -> bool:
    """Whether to train as on a GPU. Tests let a CPU say so, and run every stage on that double."""
    return device.type == "cuda"


@contextmanager
def recorded_in(graph: Any, **options: Any) -> Iterator[None]:
    """Record what the block launches in a CUDA graph; a failure leaves stream and generator as they were.

    Args:
        options: of `torch.cuda.graph`.
    """
    try:
        # the outer block puts the stream back: torch.cuda.graph does not where its end raises
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, **options):
            yield
    except RuntimeError:
        renew_generator()
        raise


def renew_generator() -> None:
    """Let dropout draw again after a recording that failed.

    torch ends such a recording without telling its generator, which would refuse every later draw
    ("offset increment outside graph capture"). A copy with the same seed and position takes its place.
    """
    generators = torch.cuda.default_generators
    if generators:
        generator = generators[torch.cuda.current_device()]
        with suppress(RuntimeError):  # the recording's own error says more
            generator.graphsafe_set_state(generator.clone_state())
