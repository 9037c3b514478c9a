"""Products for training against plain ones in double precision, layers that use them, and whole phases of a student."""

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
    """A weight and its dead; with `holes` whole rows and columns, and one full row."""
    draw = torch.Generator().manual_seed(seed)
    dead = torch.rand(shape, generator=draw) < zeros
    if holes:
        dead[::3], dead[:, ::4], dead[-1] = True, True, False
    return torch.randn(shape, generator=draw).masked_fill(dead, 0), dead


def close(result: Tensor | None, expected: Tensor, case: str = "") -> None:
    assert result is not None
    scale = 1 + expected.abs().max()
    assert ((result.double() - expected).abs() <= 3e-6 * scale).all(), case


def three(weight: Tensor, dead: Tensor, x: Tensor, gradient: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    made = Products(dead)
    y, tiles = made.forward(weight, bias, x, keep_tiles=True)
    of_x, of_weight = made.backward(weight, gradient, tiles, needs_x=True)
    assert of_x is not None
    assert of_weight is not None
    return [y, of_x, of_weight]


def check_products(weight: Tensor, dead: Tensor, n: int, case: str) -> None:
    """Compare the three products on `n` rows with double precision."""
    draw = torch.Generator().manual_seed(n)
    x, bias, gradient = (
        torch.randn(size, generator=draw) for size in ((n, weight.shape[1]), weight.shape[:1], (n, weight.shape[0]))
    )
    y, of_x, of_weight = three(weight, dead, x, gradient, bias)
    close(y, x.double() @ weight.double().T + bias, case)
    close(of_x, gradient.double() @ weight.double(), case)
    close(of_weight, (gradient.double().T @ x.double()).masked_fill(dead, 0), case)
    assert (of_weight[dead] == 0).all(), case
    close(Products(dead).forward(weight, None, x, keep_tiles=False)[0], x.double() @ weight.double().T, case)


def test_the_three_products_are_those_of_double_precision() -> None:
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
    changed = layer(x).mul_(2.0)
    changed.sum().backward()
    expected = 2 * (x.reshape(-1, 33).double().sum(0).expand(40, 33)).masked_fill(dead, 0)
    close(layer.weight.grad, expected)


def test_the_products_of_a_large_matrix() -> None:
    check_products(*masked((1536, 384), 0.9), 350, "1536 x 384")


def test_no_rows_at_all() -> None:
    weight, dead = masked((6, 4), 0.5)
    y, of_x, of_weight = three(weight, dead, torch.empty(0, 4), torch.empty(0, 6))
    assert y.shape == (0, 6)
    assert of_x.shape == (0, 4)
    assert (of_weight == 0).all()


def test_the_weights_are_those_of_the_call() -> None:
    weight, dead = masked((40, 33), 0.8)
    made, x = Products(dead), torch.randn(20, 33)
    made.forward(weight, None, x, keep_tiles=False)
    weight *= 2
    close(made.forward(weight, None, x, keep_tiles=False)[0], x.double() @ weight.double().T)


@pytest.fixture
def one_thread_afterwards() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("one_thread_afterwards")
def test_threads_change_no_bit() -> None:
    weight, dead = masked((400, 390), 0.9)
    x, gradient = torch.randn(700, 390), torch.randn(700, 400)
    expected = three(weight, dead, x, gradient)
    for threads in (2, 3, 2, 1):
        torch.set_num_threads(threads)
        for found, mine in zip(three(weight, dead, x, gradient), expected, strict=True):
            assert torch.equal(found, mine)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.usefixtures("one_thread_afterwards")
def test_a_forked_child_has_threads_of_its_own() -> None:
    weight, dead = masked((400, 390), 0.9)
    made, x = Products(dead), torch.randn(700, 390)
    torch.set_num_threads(2)
    y = made.forward(weight, None, x, keep_tiles=False)[0]
    child = os.fork()
    if child == 0:
        found = made.forward(weight, None, x, keep_tiles=False)[0]
        os._exit(0 if bytes(found.numpy().data) == bytes(y.numpy().data) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(made.forward(weight, None, x, keep_tiles=False)[0], y)


# ---- layers


def layer(
    zeros: float = 0.9, *, inputs: int = 33, outputs: int = 40, skip_dead_gradients: bool = True, bias: bool = True
) -> tuple[nn.Linear, nn.Linear, Masks]:
    """Build a layer that skips its zeros, a dense one with the same weights, and the masks."""
    torch.manual_seed(1)
    plain = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        weight, _ = masked((outputs, inputs), zeros)
        plain.weight.copy_(weight)
    ours = copy.deepcopy(plain)
    masks = Masks.from_zeros({"weight": ours.weight})
    products.use_sparse_products({"weight": ours}, masks, skip_dead_gradients=skip_dead_gradients)
    return ours, plain, masks


def seen(of: nn.Linear, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of a loss that is not linear."""
    of.zero_grad()
    x = x.detach().requires_grad_()
    y = of(x)
    (y * y.sin()).sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(weight.grad for weight in of.parameters())]  # type: ignore[list-item]


def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the compiled functions that are called from now on."""
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


def test_a_layer_has_the_outputs_and_gradients_of_a_dense_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = used(monkeypatch)
    for shape, skip_dead_gradients, bias in itertools.product(INPUTS, (True, False), (True, False)):
        case = f"{shape}, skip_dead_gradients={skip_dead_gradients}, bias={bias}"
        sparse, dense, masks = layer(skip_dead_gradients=skip_dead_gradients, bias=bias)
        x = INPUTS[shape]()
        calls.clear()
        results = seen(sparse, x)
        assert calls == ["forward", "backward"], case
        expected = seen(dense, x)
        if skip_dead_gradients:
            expected[2] = expected[2].masked_fill(masks.dead["weight"], 0)
            assert (results[2][masks.dead["weight"]] == 0).all(), case
        for result, other in zip(results, expected, strict=True):
            assert torch.allclose(result, other, rtol=1e-4, atol=1e-3), case


def test_gradients_are_those_of_finite_differences() -> None:
    ours, _, masks = layer(zeros=0.6, inputs=6, outputs=5)
    x, alive = torch.randn(20, 6), ~masks.dead["weight"]
    of_weight = seen(ours, x)[2]
    for row, column in alive.nonzero().tolist():
        losses = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                ours.weight[row, column] += step
                y = ours(x).double()
                ours.weight[row, column] -= step
            losses.append(float((y * y.sin()).sum()))
        assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(float(of_weight[row, column]), rel=2e-2, abs=2e-2)


def test_a_gradient_with_gaps_and_what_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, plain, _ = layer(skip_dead_gradients=False)
    calls, x = used(monkeypatch), torch.randn(20, 33)
    for each in (ours, plain):
        each.zero_grad()
        each(x).t().contiguous().square().sum().backward()  # x needs none
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-4)
    ours.requires_grad_(False)
    x.requires_grad_()
    ours(x).sum().backward()
    with torch.no_grad():
        ours(x)
    assert calls == ["forward", "backward"] * 2 + ["forward"]
    torch.testing.assert_close(x.grad, plain.weight.sum(0).expand(20, 33), rtol=1e-4, atol=1e-4)


def test_another_mask_is_another_index(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _, masks = layer(zeros=0.6)
    x = torch.randn(20, 33)
    ours(x)
    before = ours.live_weights.products()
    assert ours.live_weights.products() is before
    dead = masks.dead["weight"] | (torch.rand(40, 33) < 0.5)
    masks.set({"weight": dead})
    calls = used(monkeypatch)
    close(ours(x).detach(), (x.double() @ ours.weight.double().T + ours.bias).detach())
    assert ours.live_weights.products() is not before
    masks.load_state_dict({"weight": torch.ones_like(dead)})
    masks.apply()
    assert torch.equal(ours(x), ours.bias.expand(20, 40))
    assert calls == ["forward"] * 2


def test_where_it_cannot_it_is_the_layer_that_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = used(monkeypatch)
    x = torch.randn(50, 33)
    for zeros in (0.0, products.least_zeros() - 0.05):
        ours, plain, _ = layer(zeros)
        for mine, its in zip(seen(ours, x), seen(plain, x), strict=True):
            assert torch.equal(mine, its)
    ours, plain, masks = layer()
    assert torch.equal(ours(x[:15]), plain(x[:15]))
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
        assert torch.equal(ours(x), plain(x))
    assert torch.equal(ours.double()(x.double()), plain.double()(x.double()))
    assert ours.to("meta")(x.to("meta")).shape == (50, 40)
    ours, plain, masks = layer()
    masks.dead["weight"] = torch.ones(3, 3, dtype=torch.bool)
    assert torch.equal(ours(x), plain(x))
    assert calls == []


def test_names_hooks_and_the_class_before_stay(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_an_old_library_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
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
    """`trained("prune.epochs=1", folder="one")`: weights after each phase of a toy student, and the products called."""
    toys.register(toys.dataset(dropout=0.1))

    def train(*sets: str, folder: str = "run", until: str = "finetune") -> tuple[list[dict[str, Tensor]], list[str]]:
        with monkeypatch.context() as patch:
            calls = used(patch)
            run = Run.for_recipe(tmp_path / folder, toys.recipe(*STEADY, *sets, sparsity=0.8))
            made = []
            for stage in ("teacher", "prune", "distill", "finetune"):
                getattr(importlib.import_module(f"spdtool.stages.{stage}"), stage)(run)
                made.append(load_file(run.path / stage / "model.safetensors"))
                if stage == until:
                    break
        return made[1:], calls

    yield train
    plugins.datasets.unregister("toy")


@pytest.mark.slow
def test_a_student_learns_as_with_dense_products_and_twice_the_same(trained: Callable[..., Any]) -> None:
    sparse, calls = trained(folder="sparse")
    again, _ = trained(folder="again")
    dense, none = trained("sparse_products=false", folder="dense")
    assert {"forward", "backward"} == set(calls)
    assert none == []
    for mine, twice, its in zip(sparse, again, dense, strict=True):
        for name, weight in mine.items():
            assert torch.equal(weight, twice[name])
            assert torch.equal(weight == 0, its[name] == 0)
            torch.testing.assert_close(weight, its[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sets", ["gradient_checkpointing=true", "prune.accumulate=2", "prune.clip_over=all"])
def test_other_ways_to_train(trained: Callable[..., Any], sets: str) -> None:
    few = (sets, "prune.max_steps=3", "prune.events=1", "prune.ramp=0.01", "teacher.max_steps=1")
    (mine,), calls = trained(*few, folder="sparse", until="prune")
    (its,), _ = trained(*few, "sparse_products=false", folder="dense", until="prune")
    assert {"forward", "backward"} == set(calls)
    for name, weight in mine.items():
        torch.testing.assert_close(weight, its[name], rtol=1e-4, atol=1e-4)
