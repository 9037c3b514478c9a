"""Sparse products for training: against double precision, in layers, and in whole phases of a student."""

from __future__ import annotations

import copy
import importlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from spdtool_sparse_cpu import library, products
from spdtool_sparse_cpu.products import Products, SparseLinear
from torch import Tensor, nn

from spdtool import plugins
from spdtool.errors import DeviceError
from spdtool.models import onednn
from spdtool.pruning.masks import Masks
from spdtool.run.folder import Run

pytestmark = pytest.mark.skipif(not products.is_available(), reason="the library is not compiled")

SHAPES = [(1, 1), (7, 5), (40, 33), (193, 200), (64, 385)]
ZEROS = [0.0, 0.4, 0.5, 0.7, 0.9, 0.97, 0.999, 1.0]


def masked(shape: tuple[int, int], zeros: float, *, holes: bool = False, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw a weight and the mask of its dead; with `holes` some rows and columns are empty and one row is full."""
    draw = torch.Generator().manual_seed(seed)
    dead = torch.rand(shape, generator=draw) < zeros
    if holes:
        dead[::3], dead[:, ::4], dead[-1] = True, True, False
    return torch.randn(shape, generator=draw).masked_fill(dead, 0), dead


def assert_close(result: Tensor | None, expected: Tensor, case: str = "") -> None:
    assert result is not None
    scale = 1 + expected.abs().max()
    assert ((result.double() - expected).abs() <= 3e-6 * scale).all(), case


def compute_products(
    weight: Tensor, dead: Tensor, x: Tensor, gradient: Tensor, bias: Tensor | None = None
) -> list[Tensor]:
    matrix_products = Products(dead)
    y, tiles = matrix_products.forward(weight, bias, x, keep_tiles=True)
    input_gradient, weight_gradient = matrix_products.backward(weight, gradient, tiles, needs_x=True)
    assert input_gradient is not None
    assert weight_gradient is not None
    return [y, input_gradient, weight_gradient]


def check_products(weight: Tensor, dead: Tensor, n: int, case: str) -> None:
    """Compare the three products on `n` rows with double precision."""
    draw = torch.Generator().manual_seed(n)
    x, bias, gradient = (
        torch.randn(size, generator=draw) for size in ((n, weight.shape[1]), weight.shape[:1], (n, weight.shape[0]))
    )
    y, input_gradient, weight_gradient = compute_products(weight, dead, x, gradient, bias)
    assert_close(y, x.double() @ weight.double().T + bias, case)
    assert_close(input_gradient, gradient.double() @ weight.double(), case)
    assert_close(weight_gradient, (gradient.double().T @ x.double()).masked_fill(dead, 0), case)
    assert (weight_gradient[dead] == 0).all(), case
    assert_close(Products(dead).forward(weight, None, x, keep_tiles=False)[0], x.double() @ weight.double().T, case)


def test_the_three_products_equal_those_of_double_precision() -> None:
    for shape, zeros, holes in itertools.product(SHAPES, ZEROS, (False, True)):
        weight, dead = masked(shape, zeros, holes=holes)
        for n in (1, 7, 33, 500):
            check_products(weight, dead, n, f"{shape} with {zeros:.1%} zeros, holes={holes}, {n} rows")


def test_the_output_of_a_layer_may_be_changed_in_place() -> None:
    weight, dead = masked((40, 33), 0.9)
    layer = nn.Linear(33, 40)
    layer.weight.data.copy_(weight)
    products.use_sparse_products(
        {"weight": layer}, Masks.from_zeros({"weight": layer.weight}), skip_dead_gradients=True
    )
    x = torch.randn(3, 20, 33)
    doubled = layer(x).mul_(2.0)
    doubled.sum().backward()
    expected = 2 * (x.reshape(-1, 33).double().sum(0).expand(40, 33)).masked_fill(dead, 0)
    assert_close(layer.weight.grad, expected)


def test_the_products_of_a_large_matrix() -> None:
    check_products(*masked((1536, 384), 0.9), 350, "1536 x 384")


def test_no_rows_at_all() -> None:
    weight, dead = masked((6, 4), 0.5)
    y, input_gradient, weight_gradient = compute_products(weight, dead, torch.empty(0, 4), torch.empty(0, 6))
    assert y.shape == (0, 6)
    assert input_gradient.shape == (0, 4)
    assert (weight_gradient == 0).all()


def test_products_use_the_current_weights() -> None:
    weight, dead = masked((40, 33), 0.8)
    matrix_products, x = Products(dead), torch.randn(20, 33)
    matrix_products.forward(weight, None, x, keep_tiles=False)
    weight *= 2
    assert_close(matrix_products.forward(weight, None, x, keep_tiles=False)[0], x.double() @ weight.double().T)


@pytest.fixture
def one_thread_afterwards() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("one_thread_afterwards")
def test_threads_change_no_bit() -> None:
    weight, dead = masked((400, 390), 0.9)
    x, gradient = torch.randn(700, 390), torch.randn(700, 400)
    expected = compute_products(weight, dead, x, gradient)
    for threads in (2, 3, 2, 1):
        torch.set_num_threads(threads)
        for actual, expected_tensor in zip(compute_products(weight, dead, x, gradient), expected, strict=True):
            assert torch.equal(actual, expected_tensor)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.usefixtures("one_thread_afterwards")
def test_products_work_in_a_forked_child() -> None:
    weight, dead = masked((400, 390), 0.9)
    matrix_products, x = Products(dead), torch.randn(700, 390)
    torch.set_num_threads(2)
    y = matrix_products.forward(weight, None, x, keep_tiles=False)[0]
    child = os.fork()
    if child == 0:
        child_y = matrix_products.forward(weight, None, x, keep_tiles=False)[0]
        os._exit(0 if bytes(child_y.numpy().data) == bytes(y.numpy().data) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(matrix_products.forward(weight, None, x, keep_tiles=False)[0], y)


# ---- layers


def layer(
    zeros: float = 0.9, *, inputs: int = 33, outputs: int = 40, skip_dead_gradients: bool = True, bias: bool = True
) -> tuple[nn.Linear, nn.Linear, Masks]:
    """Build a layer that skips its zeros, a dense one with the same weights, and the masks."""
    torch.manual_seed(1)
    dense = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        weight, _ = masked((outputs, inputs), zeros)
        dense.weight.copy_(weight)
    sparse = copy.deepcopy(dense)
    masks = Masks.from_zeros({"weight": sparse.weight})
    products.use_sparse_products({"weight": sparse}, masks, skip_dead_gradients=skip_dead_gradients)
    return sparse, dense, masks


def output_and_gradients(module: nn.Linear, x: Tensor) -> list[Tensor]:
    """Return the output and the gradients of a nonlinear loss."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = module(x)
    (y * y.sin()).sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(weight.grad for weight in module.parameters())]  # type: ignore[list-item]


def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of the compiled functions that are called from now on."""
    calls: list[str] = []
    functions = products.load_functions()
    for name in ("forward", "backward"):

        def record(*arguments: Any, name: str = name, function: Any = functions[name]) -> Any:
            calls.append(name)
            return function(*arguments)

        monkeypatch.setitem(functions, name, record)
    return calls


INPUTS: dict[str, Callable[[], Tensor]] = {
    "rows": lambda: torch.randn(50, 33),
    "tokens": lambda: torch.randn(3, 7, 33),
    "first tokens": lambda: torch.randn(20, 5, 33)[:, 0],
    "transposed": lambda: torch.randn(3, 33, 9).transpose(1, 2),
    "expanded": lambda: torch.randn(1, 33).expand(40, 33),
}


def test_a_sparse_layer_has_the_outputs_and_gradients_of_a_dense_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record_calls(monkeypatch)
    for shape, skip_dead_gradients, bias in itertools.product(INPUTS, (True, False), (True, False)):
        case = f"{shape}, skip_dead_gradients={skip_dead_gradients}, bias={bias}"
        sparse, dense, masks = layer(skip_dead_gradients=skip_dead_gradients, bias=bias)
        x = INPUTS[shape]()
        calls.clear()
        results = output_and_gradients(sparse, x)
        assert calls == ["forward", "backward"], case
        expected = output_and_gradients(dense, x)
        if skip_dead_gradients:
            expected[2] = expected[2].masked_fill(masks.dead["weight"], 0)
            assert (results[2][masks.dead["weight"]] == 0).all(), case
        for result, expected_result in zip(results, expected, strict=True):
            assert torch.allclose(result, expected_result, rtol=1e-4, atol=1e-3), case


def test_gradients_equal_finite_differences() -> None:
    sparse, _, masks = layer(zeros=0.6, inputs=6, outputs=5)
    x, alive = torch.randn(20, 6), ~masks.dead["weight"]
    weight_gradient = output_and_gradients(sparse, x)[2]
    for row, column in alive.nonzero().tolist():
        losses = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                sparse.weight[row, column] += step
                y = sparse(x).double()
                sparse.weight[row, column] -= step
            losses.append(float((y * y.sin()).sum()))
        assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(float(weight_gradient[row, column]), rel=2e-2, abs=2e-2)


def test_strided_gradients_and_inputs_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse, dense, _ = layer(skip_dead_gradients=False)
    calls, x = record_calls(monkeypatch), torch.randn(20, 33)
    for each_layer in (sparse, dense):
        each_layer.zero_grad()
        each_layer(x).t().contiguous().square().sum().backward()  # x needs none
    torch.testing.assert_close(sparse.weight.grad, dense.weight.grad, rtol=1e-4, atol=1e-4)
    sparse.requires_grad_(False)
    x.requires_grad_()
    sparse(x).sum().backward()
    with torch.no_grad():
        sparse(x)
    assert calls == ["forward", "backward"] * 2 + ["forward"]
    torch.testing.assert_close(x.grad, dense.weight.sum(0).expand(20, 33), rtol=1e-4, atol=1e-4)


def test_a_changed_mask_rebuilds_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse, _, masks = layer(zeros=0.6)
    x = torch.randn(20, 33)
    sparse(x)
    before = sparse.live_weights.products()
    assert sparse.live_weights.products() is before
    dead = masks.dead["weight"] | (torch.rand(40, 33) < 0.5)
    masks.set({"weight": dead})
    calls = record_calls(monkeypatch)
    assert_close(sparse(x).detach(), (x.double() @ sparse.weight.double().T + sparse.bias).detach())
    assert sparse.live_weights.products() is not before
    masks.load_state_dict({"weight": torch.ones_like(dead)})
    masks.apply()
    assert torch.equal(sparse(x), sparse.bias.expand(20, 40))
    assert calls == ["forward"] * 2


def test_unsupported_inputs_use_the_dense_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record_calls(monkeypatch)
    x = torch.randn(50, 33)
    for zeros in (0.0, products.least_zeros() - 0.05):
        sparse, dense, _ = layer(zeros)
        for sparse_result, dense_result in zip(
            output_and_gradients(sparse, x), output_and_gradients(dense, x), strict=True
        ):
            assert torch.equal(sparse_result, dense_result)
    sparse, dense, masks = layer()
    assert torch.equal(sparse(x[:15]), dense(x[:15]))
    with torch.autocast("cpu", torch.bfloat16):
        assert sparse(x).dtype == torch.bfloat16
        assert torch.equal(sparse(x), dense(x))
    assert torch.equal(sparse.double()(x.double()), dense.double()(x.double()))
    assert sparse.to("meta")(x.to("meta")).shape == (50, 40)
    sparse, dense, masks = layer()
    masks.dead["weight"] = torch.ones(3, 3, dtype=torch.bool)
    assert torch.equal(sparse(x), dense(x))
    assert calls == []


def test_names_hooks_and_the_previous_class_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "is_faster", lambda: True)
    plain = nn.Linear(8, 8)
    onednn.use_onednn(plain)
    names, hooked = list(plain.state_dict()), []
    plain.register_forward_hook(lambda *_: hooked.append(1))
    masks = Masks({"weight": plain.weight})
    for _ in range(2):
        products.use_sparse_products({"weight": plain}, masks, skip_dead_gradients=True)
    assert isinstance(plain, SparseLinear)
    assert isinstance(plain, onednn.OneDNNLinear)
    assert [kind.__name__ for kind in type(plain).__mro__[:4]] == [
        "SparseOneDNNLinear",
        "SparseLinear",
        "OneDNNLinear",
        "Linear",
    ]
    assert list(plain.state_dict()) == names
    plain(torch.randn(20, 8))
    assert hooked
    assert copy.deepcopy(plain).live_weights.masks is masks


def test_without_a_compiled_library_everything_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise DeviceError("not there")

    monkeypatch.setattr(products, "load_functions", missing)
    plain = nn.Linear(8, 8)
    plugins.products.get("sparse-cpu")({"weight": plain}, Masks({"weight": plain.weight}), skip_dead_gradients=True)
    assert type(plain) is nn.Linear


def test_an_old_library_counts_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load_library", lambda: object())
    products.load_functions.cache_clear()
    assert not products.is_available()
    monkeypatch.undo()
    products.load_functions.cache_clear()
    assert products.is_available()


# ---- whole phases

STEADY = tuple(
    f"{stage}.epsilon=1e-4" for stage in ("prune", "distill", "finetune")
)  # see docs/explanation/reproducibility.md


@pytest.fixture
def trained(toys: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Return `trained("prune.epochs=1", folder="one")`: weights after each phase, and the compiled calls."""
    toys.register(toys.dataset(dropout=0.1))

    def train(*sets: str, folder: str = "run", until: str = "finetune") -> tuple[list[dict[str, Tensor]], list[str]]:
        with monkeypatch.context() as patch:
            calls = record_calls(patch)
            run = Run.for_recipe(tmp_path / folder, toys.recipe(*STEADY, *sets, sparsity=0.8))
            weights = []
            for stage in ("teacher", "prune", "distill", "finetune"):
                getattr(importlib.import_module(f"spdtool.stages.{stage}"), stage)(run)
                weights.append(load_file(run.path / stage / "model.safetensors"))
                if stage == until:
                    break
        return weights[1:], calls

    yield train
    plugins.datasets.unregister("toy")


@pytest.mark.slow
def test_training_is_reproducible_and_near_that_with_dense_products(trained: Callable[..., Any]) -> None:
    sparse, calls = trained(folder="sparse")
    repeated, _ = trained(folder="again")
    dense, dense_calls = trained("sparse_products=false", folder="dense")
    assert {"forward", "backward"} == set(calls)
    assert dense_calls == []
    for sparse_weights, repeated_weights, dense_weights in zip(sparse, repeated, dense, strict=True):
        for name, weight in sparse_weights.items():
            assert torch.equal(weight, repeated_weights[name])
            assert torch.equal(weight == 0, dense_weights[name] == 0)
            torch.testing.assert_close(weight, dense_weights[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sets", ["gradient_checkpointing=true", "prune.accumulate=2", "prune.clip_over=all"])
def test_checkpointing_accumulation_and_clipping_over_all_parameters(trained: Callable[..., Any], sets: str) -> None:
    settings = (sets, "prune.max_steps=3", "prune.events=1", "prune.ramp=0.01", "teacher.max_steps=1")
    (sparse_weights,), calls = trained(*settings, folder="sparse", until="prune")
    (dense_weights,), _ = trained(*settings, "sparse_products=false", folder="dense", until="prune")
    assert {"forward", "backward"} == set(calls)
    for name, weight in sparse_weights.items():
        torch.testing.assert_close(weight, dense_weights[name], rtol=1e-4, atol=1e-4)
