"""Linear layers that skip their zeros in training too: products on a CPU, of which dead weights have no part.

Three products make a training step of a linear layer. All take the time of the weights that live:

    y  = x W^T + b                  over the nonzeros of each row
    dx = dy W                       over the nonzeros of each column
    dW = dy^T x                     only where weights live, where nobody looks at the gradients of the dead

`cpp/training.hpp` has them. An index of the living is made once for each mask, so at each prune event; the weights
themselves are gathered from the dense matrix at every call, which takes a few microseconds: there is no copy of them
that could be stale. The index is made again when the mask is another tensor than it was.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spdtool.errors import DeviceError
from spdtool.models import onednn
from spdtool.pruning.masks import Masks
from spdtool_sparse_cpu import library

LEAST_ZEROS = {"avx512": 0.5, "avx2": 0.6}  # of a matrix, for a gain of a fifth or more; see docs/log.md
LEAST_ZEROS_ELSEWHERE = 0.85
LEAST_ROWS = 16
MOST_INPUTS = 65536  # and outputs: indexes of 16 bits

ADDRESS, SIZE, TEXT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "new": (TEXT, [ADDRESS, ctypes.c_uint32, ctypes.c_uint32, ADDRESS]),
    "free": (None, [ADDRESS]),
    "tile_size": (SIZE, [ADDRESS, SIZE]),
    "forward": (TEXT, [ADDRESS, SIZE, ADDRESS, ADDRESS, ADDRESS, SIZE, ADDRESS, ADDRESS]),
    "backward": (TEXT, [ADDRESS, SIZE, ADDRESS, ADDRESS, SIZE, ADDRESS, ADDRESS, ADDRESS]),
}


def use(layers: Mapping[str, nn.Linear], masks: Masks, *, sampled: bool) -> None:
    """Let `layers` skip the zeros of `masks` wherever that is faster; without a compiled library they stay as they are.

    Names, state dicts and hooks stay too.

    Args:
        layers: by the names of their weights, as `masks` has them.
        sampled: whether gradients of dead weights may be left at zero.
    """
    if not available():
        return
    for name, layer in layers.items():
        if not isinstance(layer, Sparse):
            layer.__class__ = _kind(type(layer))
        layer.living = Living(masks, name, sampled)  # type: ignore[assignment]


def available() -> bool:
    """Whether the library is there and has these products."""
    try:
        _functions()
    except DeviceError:
        return False
    return True


def least_zeros() -> float:
    """The share of zeros from which on a matrix is multiplied here."""
    return LEAST_ZEROS.get(library.isa(), LEAST_ZEROS_ELSEWHERE)


class Products:
    """Keeps which weights of one matrix live, in the form that the compiled products read.

    Args:
        dead: bool tensor on the CPU, shaped like the weight [out, in].

    Raises:
        DeviceError: no library, or no memory.
    """

    def __init__(self, dead: Tensor) -> None:
        assert dead.dtype == torch.bool
        assert dead.dim() == 2
        assert max(dead.shape) <= MOST_INPUTS
        assert dead.numel() < 2**32 - 1
        self.shape, dead = dead.shape, dead.contiguous()
        made = ctypes.c_void_p()
        _check(_functions()["new"](dead.data_ptr(), *self.shape, ctypes.byref(made)))
        self._made = made.value
        weakref.finalize(self, _functions()["free"], made.value)

    def forward(self, weight: Tensor, bias: Tensor | None, x: Tensor, *, keep: bool) -> tuple[Tensor, Tensor | None]:
        """`x @ weight.T + bias`, of x [n, in]; with `keep`, x as the weight's gradient needs it, else None."""
        outputs, inputs = self.shape
        x, n = _plain(x, inputs), len(x)
        given = _plain_vector(bias, outputs) if bias is not None else None
        tiles = torch.empty(_functions()["tile_size"](self._made, n)) if keep else None
        y = torch.empty(n, outputs)
        self._call("forward", self._weight(weight), given, x, n, tiles, y)
        return y, tiles

    def backward(
        self, weight: Tensor, gradient: Tensor, tiles: Tensor | None, *, of_x: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of x, where asked for, and of the weight, where `tiles` were kept, from that of y [n, out]."""
        outputs, inputs = self.shape
        gradient, n = _plain(gradient, outputs), len(gradient)
        assert tiles is None or tiles.numel() == _functions()["tile_size"](self._made, n)
        of_input = torch.empty(n, inputs) if of_x else None
        of_weight = torch.empty(outputs, inputs) if tiles is not None else None
        self._call("backward", self._weight(weight), gradient, n, tiles, of_input, of_weight)
        return of_input, of_weight

    def _weight(self, weight: Tensor) -> Tensor:
        assert weight.shape == self.shape
        assert fits(weight)
        return weight

    def _call(self, name: str, *arguments: Tensor | int | None) -> None:
        """A function of the library, with the addresses of tensors, which the caller's frame keeps alive."""
        plain = [part.data_ptr() if isinstance(part, Tensor) else part for part in arguments]
        _check(_functions()[name](self._made, torch.get_num_threads(), *plain))


class Living:
    """Keeps the products of one matrix for the mask that it has now.

    Args:
        masks, name: where the mask is found, and under which name.
        sampled: whether the weight's gradient is taken only where it lives.
    """

    def __init__(self, masks: Masks, name: str, sampled: bool) -> None:
        self.masks, self.name, self.sampled = masks, name, sampled
        self._seen: tuple[Tensor, int] | None = None
        self._products: Products | None = None

    def products(self) -> Products | None:
        """None where the matrix has too few zeros, or cannot be indexed."""
        dead = self.masks.dead[self.name]
        if self._seen is None or self._seen[0] is not dead or self._seen[1] != dead._version:
            self._seen = dead, dead._version
            self._products = Products(dead) if _pays(dead) else None
        return self._products

    def __deepcopy__(self, _: Any) -> Living:
        return Living(self.masks, self.name, self.sampled)


class Sparse(nn.Linear):
    """A linear layer that multiplies what lives of its weight; where it cannot, it is the layer that it was."""

    living: Living

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear`: [..., in] to [..., out]."""
        products = None if torch.compiler.is_compiling() or not self._can(x) else self.living.products()
        if products is None or products.shape != self.weight.shape:
            return super().forward(x)
        product: Tensor = _Product.apply(x, self.weight, self.bias, products, self.living.sampled)
        return product

    def _can(self, x: Tensor) -> bool:
        alike = type(self.weight) is nn.Parameter and fits(self.weight) and x.dtype == torch.float32
        enough = x.device.type == "cpu" and x.numel() >= LEAST_ROWS * x.shape[-1]
        return alike and enough and not torch.is_autocast_enabled("cpu")


class _Product(torch.autograd.Function):
    """`x @ weight.T + bias` with its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, products: Products, sampled: bool) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        learns = ctx.needs_input_grad[1]
        y, tiles = products.forward(weight, bias, rows, keep=learns and sampled)
        ctx.products, ctx.shape = products, x.shape
        ctx.save_for_backward(weight, tiles, rows if learns and not sampled else None)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, tiles, rows = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1]).contiguous()
        of_x, of_weight = ctx.products.backward(weight, flat, tiles, of_x=ctx.needs_input_grad[0])
        if rows is not None:
            of_weight = onednn.multiply(flat.t(), rows.t())
        of_bias = flat.sum(0) if ctx.needs_input_grad[2] else None
        return of_x if of_x is None else of_x.view(ctx.shape), of_weight, of_bias, None, None


def fits(tensor: Tensor) -> bool:
    """Whether the library can read it where it stands."""
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()


def _plain(rows: Tensor, width: int) -> Tensor:
    assert rows.dim() == 2
    assert rows.shape[1] == width
    rows = rows.contiguous()
    assert fits(rows)
    return rows


def _plain_vector(vector: Tensor, size: int) -> Tensor:
    return _plain(vector[None], size)[0]


def _pays(dead: Tensor) -> bool:
    indexable = dead.device.type == "cpu" and dead.dim() == 2 and max(dead.shape) <= MOST_INPUTS
    if not indexable or dead.numel() >= 2**32 - 1:
        return False
    return int(dead.count_nonzero()) >= least_zeros() * dead.numel()


@functools.cache
def _kind(before: type[nn.Linear]) -> type[Sparse]:
    """A class of sparse layers that are `before` where they cannot skip zeros."""
    return type("Sparse" + before.__name__, (Sparse, before), {})


@functools.cache
def _functions() -> dict[str, Any]:
    """The library's functions.

    Raises:
        DeviceError: it is missing, or an old one.
    """
    opened = library.opened()
    found = {name: getattr(opened, f"spdtool_products_{name}", None) for name in FUNCTIONS}
    if None in found.values():
        raise DeviceError(f"{library.path()} has no products for training: it is an old one", library.AGAIN)
    for name, (result, arguments) in FUNCTIONS.items():
        found[name].restype, found[name].argtypes = result, arguments  # type: ignore[union-attr]
    return found


def _check(error: bytes | None) -> None:
    if error is not None:
        raise DeviceError(f"a sparse product failed: {error.decode()}", "set sparse_products to false")
