"""Projections from the student's width to the teacher's, trained with the student.

Where hidden states have different widths, each is multiplied by a matrix of its own before it is
compared (TinyBERT, arXiv 1909.10351). A phase saves the matrices in `projections.safetensors`,
from which the next one continues.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

FILE_NAME = "projections.safetensors"
PREFIX = "projection."

Projections = dict[str, nn.Parameter]
"""`projection.0` (the embeddings' output) to `projection.<layers>`: [teacher's width, student's width]."""


def create_projections(
    layers: int, student_width: int, teacher_width: int, *, seed: int, device: torch.device | str = "cpu"
) -> Projections:
    """Draw random projections that keep the norm of what they project; they depend on `seed` alone.

    Args:
        layers: number of the student's layers.
        student_width, teacher_width: numbers in a hidden state.
        seed: of a generator of their own.

    Returns:
        A matrix [teacher's width, student's width] for the embeddings and for each layer.
    """
    generator = torch.Generator().manual_seed(seed)  # the global one belongs to dropout
    projections = {}
    for index in range(layers + 1):
        # drawn on the CPU, so that every device starts from the same numbers
        matrix = torch.randn(teacher_width, student_width, generator=generator) / student_width**0.5
        projections[f"{PREFIX}{index}"] = nn.Parameter(matrix.to(device))
    return projections


def project(hidden_states: Sequence[Tensor], projections: Projections) -> Sequence[Tensor]:
    """Multiply each hidden state by its projection, if there are any.

    Args:
        hidden_states: the embeddings' output first, each [rows, tokens, student's width].

    Returns:
        The same with the teacher's width; without projections the hidden states as they are.
    """
    if not projections:
        return hidden_states
    return [F.linear(state, projections[f"{PREFIX}{index}"]) for index, state in enumerate(hidden_states)]


def load_projections(projections: Projections, folder: Path) -> bool:
    """Copy the projections that the phase in `folder` saved; return whether there are any that fit."""
    file = folder / FILE_NAME
    if not file.is_file():
        return False
    saved = load_file(file)
    # another student or teacher has taken the place of the one that they were trained for
    if {name: weight.shape for name, weight in saved.items()} != {n: w.shape for n, w in projections.items()}:
        return False
    for name, weight in saved.items():
        projections[name].data.copy_(weight)
    return True


def save_projections(projections: Projections, folder: Path) -> None:
    """Save the projections for the next phase; without any, write no file."""
    if projections:
        tensors = {name: weight.detach().cpu().contiguous() for name, weight in projections.items()}
        save_file(tensors, folder / FILE_NAME)
