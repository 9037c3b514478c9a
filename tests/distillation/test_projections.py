"""Projections: seeded, saved for the next phase, loaded only if the shapes fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spdtool.distillation import projections
from spdtool.distillation.projections import project


def test_projections_depend_only_on_the_seed_and_keep_the_scale() -> None:
    torch.manual_seed(5)
    matrices = projections.create_projections(2, 48, 96, seed=1)
    torch.manual_seed(6)
    same_seed, other_seed = (
        projections.create_projections(2, 48, 96, seed=1),
        projections.create_projections(2, 48, 96, seed=2),
    )
    assert list(matrices) == ["projection.0", "projection.1", "projection.2"]
    assert all(weight.shape == (96, 48) and weight.requires_grad for weight in matrices.values())
    assert all(
        torch.equal(matrices[name], same_seed[name]) and not torch.equal(matrices[name], other_seed[name])
        for name in matrices
    )
    hidden = [torch.randn(4, 6, 48) for _ in range(3)]
    assert float(torch.stack(list(project(hidden, matrices))).detach().std()) == pytest.approx(1.0, rel=0.1)


def test_each_layer_has_its_own_projection(tmp_path: Path) -> None:
    matrices = projections.create_projections(1, 3, 5, seed=0)
    hidden = [torch.randn(2, 4, 3), torch.randn(2, 4, 3)]
    for index, state in enumerate(project(hidden, matrices)):
        assert state.shape == (2, 4, 5)
        torch.testing.assert_close(state, hidden[index] @ matrices[f"projection.{index}"].T)
    assert project(hidden, {}) is hidden


def test_saved_projections_are_loaded_by_the_next_phase(tmp_path: Path) -> None:
    saved = projections.create_projections(2, 3, 5, seed=0)
    projections.save_projections(saved, tmp_path)
    loaded = projections.create_projections(2, 3, 5, seed=9)
    assert projections.load_projections(loaded, tmp_path)
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_saved_projections_of_another_shape_are_ignored(tmp_path: Path) -> None:
    projections.save_projections(projections.create_projections(2, 3, 5, seed=0), tmp_path)
    for shape in ((1, 3, 5), (2, 4, 5), (2, 3, 6)):
        fresh = projections.create_projections(*shape, seed=9)
        before = {name: weight.clone() for name, weight in fresh.items()}
        assert not projections.load_projections(fresh, tmp_path), shape
        assert all(torch.equal(before[name], fresh[name]) for name in fresh), shape


def test_without_projections_no_file_is_written(tmp_path: Path) -> None:
    projections.save_projections({}, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert not projections.load_projections(projections.create_projections(1, 2, 3, seed=0), tmp_path)
