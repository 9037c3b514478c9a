"""Projections from the student's width to the teacher's: learned with the student, and never part of it.

Where hidden states have different widths, each is multiplied by a matrix of its own before it is compared (TinyBERT,
arXiv 1909.10351). A phase leaves the matrices in `projections.safetensors`, from which the next one goes on.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

FILE = "projections.safetensors"
PREFIX = "projection."

Projections = dict[str, nn.Parameter]
"""`projection.0` (the embeddings' output) to `projection.<layers>`: [teacher's width, student's width]."""


def fresh(layers: int, student: int, teacher: int, *, seed: int, device: torch.device | str = "cpu") -> Projections:
    """Random projections that keep the size of what they project; they depend on `seed` alone.

    Args:
        layers: of the student.
        student, teacher: widths.
    """
    draw = torch.Generator().manual_seed(seed)
    return {
        f"{PREFIX}{index}": nn.Parameter((torch.randn(teacher, student, generator=draw) / student**0.5).to(device))
        for index in range(layers + 1)
    }


def take_over(projections: Projections, folder: Path) -> bool:
    """Go on from those that the phase in `folder` has left, if it has left any that fit; return whether."""
    file = folder / FILE
    found = load_file(file) if file.is_file() else {}
    fits = {name: weight.shape for name, weight in found.items()} == {n: w.shape for n, w in projections.items()}
    if fits:
        for name, weight in found.items():
            projections[name].data.copy_(weight)
    return fits


def save(projections: Projections, folder: Path) -> None:
    """Leave them for the next phase; nothing is written where there are none."""
    if projections:
        save_file({name: weight.detach().cpu().contiguous() for name, weight in projections.items()}, folder / FILE)
