"""Train linear layers that skip their zeros: products on a CPU that do not multiply dead weights.

A training step of a linear layer computes three products. Each takes time in proportion to the live
weights:

    y  = x W^T + b                  over the nonzeros of each row
    dx = dy W                       over the nonzeros of each column
    dW = dy^T x                     only where weights live, if nothing reads the gradients of dead weights

`cpp/training.hpp` has them. The indices of the live weights are computed once for each mask, so at
each prune event. The weights themselves are gathered from the dense matrix at every call, which
takes a few microseconds: there is no copy of them that could be stale. The indices are computed
again when the mask is another tensor, or was changed.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from spdtool.errors import DeviceError
from spdtool.models import onednn
from spdtool.pruning.masks import Masks
from spdtool_sparse_cpu import library

LEAST_ZEROS = {"avx512": 0.5, "avx2": 0.6}  # share of a matrix, for a gain of a fifth or more; see docs/log.md
LEAST_ZEROS_ELSEWHERE = 0.85
LEAST_ROWS = 16  # fewer rows do not make up for reading the indices
MOST_INPUTS = 65536  # and outputs: indices have 16 bits
MOST_WEIGHTS = 2**32 - 1  # offsets have 32 bits

CFunction: TypeAlias = Callable[..., bytes | int | None]
ADDRESS, SIZE, TEXT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
# Name of each function of the library, after `spdtool_products_`: what it returns (a text is an
# error), and takes.
SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "new": (TEXT, [ADDRESS, ctypes.c_uint32, ctypes.c_uint32, ADDRESS]),
    "free": (None, [ADDRESS]),
    "tile_size": (SIZE, [ADDRESS, SIZE]),
    "forward": (TEXT, [ADDRESS, SIZE, ADDRESS, ADDRESS, ADDRESS, SIZE, ADDRESS, ADDRESS]),
    "backward": (TEXT, [ADDRESS, SIZE, ADDRESS, ADDRESS, SIZE, ADDRESS, ADDRESS, ADDRESS]),
}


def use_sparse_products(layers: Mapping[str, nn.Linear], masks: Masks, *, skip_dead_gradients: bool) -> None:
    """Let `layers` skip the zeros of `masks` wherever that is faster.

    Names, state dicts and hooks stay as they are. Without a compiled library, so do the layers.

    Args:
        layers: by the names of their weights, as `masks` has them.
        skip_dead_gradients: whether gradients of dead weights may be left at zero.
    """
    if not is_available():
        return
    for name, layer in layers.items():
        if not isinstance(layer, SparseLinear):
            layer.__class__ = _sparse_class(type(layer))  # type: ignore[arg-type]  # a class is hashable
        assert isinstance(layer, SparseLinear)
        layer.live_weights = LiveWeights(masks, name, skip_dead_gradients)


def is_available() -> bool:
    """Whether the library is installed and has these products."""
    try:
        load_functions()
    except DeviceError:
        return False
    return True


@functools.cache  # asking the library reads the metadata of its distribution
def least_zeros() -> float:
    """Share of zeros from which on a sparse product is faster on this machine."""
    return LEAST_ZEROS.get(library.isa(), LEAST_ZEROS_ELSEWHERE)


class Products:
    """The live weights of one matrix, indexed as the compiled products read them.

    Args:
        dead: bool tensor on the CPU, shaped like the weight [out, in].

    Raises:
        DeviceError: no library, or no memory.
    """

    def __init__(self, dead: Tensor) -> None:
        assert dead.dtype == torch.bool
        assert dead.dim() == 2
        assert max(dead.shape) <= MOST_INPUTS
        assert dead.numel() < MOST_WEIGHTS
        self.shape, dead = dead.shape, dead.contiguous()
        handle = ctypes.c_void_p()
        _raise_error(load_functions()["new"](dead.data_ptr(), *self.shape, ctypes.byref(handle)))
        self._handle = handle.value
        # `__del__` might run when the interpreter has already dropped the library's functions.
        weakref.finalize(self, load_functions()["free"], handle.value)

    def forward(
        self, weight: Tensor, bias: Tensor | None, x: Tensor, *, keep_tiles: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Compute `x @ weight.T + bias` for x [n, in].

        Args:
            keep_tiles: return x in the order in which the weight's gradient reads it, too; else
                None.
        """
        outputs, inputs = self.shape
        x, n = _readable_rows(x, inputs), len(x)
        if bias is not None:
            bias = _readable_rows(bias[None], outputs)[0]
        tiles = None
        if keep_tiles:
            tiles = torch.empty(self._tile_size(n))
        y = torch.empty(n, outputs)
        self._call("forward", self._checked(weight), bias, x, n, tiles, y)
        return y, tiles

    def backward(
        self, weight: Tensor, y_gradient: Tensor, tiles: Tensor | None, *, needs_x: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Compute the gradients of x, if it needs one, and of the weight, if `tiles` were kept.

        Args:
            y_gradient: gradient of the output, [n, out].
        """
        outputs, inputs = self.shape
        y_gradient, n = _readable_rows(y_gradient, outputs), len(y_gradient)
        assert tiles is None or tiles.numel() == self._tile_size(n)
        x_gradient = torch.empty(n, inputs) if needs_x else None
        weight_gradient = torch.empty(outputs, inputs) if tiles is not None else None
        self._call("backward", self._checked(weight), y_gradient, n, tiles, x_gradient, weight_gradient)
        return x_gradient, weight_gradient

    def _tile_size(self, n: int) -> int:
        size = load_functions()["tile_size"](self._handle, n)
        assert isinstance(size, int)
        return size

    def _checked(self, weight: Tensor) -> Tensor:
        assert weight.shape == self.shape
        assert is_readable(weight)
        return weight

    def _call(self, name: str, *arguments: Tensor | int | None) -> None:
        """Call a function of the library with the addresses of tensors, which the caller's frame keeps alive."""
        addresses: list[int | None] = []
        for item in arguments:
            addresses.append(item.data_ptr() if isinstance(item, Tensor) else item)
        _raise_error(load_functions()[name](self._handle, torch.get_num_threads(), *addresses))


class LiveWeights:
    """The products of one matrix under its present mask.

    Args:
        masks, name: the mask is `masks.dead[name]`.
        skip_dead_gradients: whether the weight's gradient is computed only where it lives.
    """

    def __init__(self, masks: Masks, name: str, skip_dead_gradients: bool) -> None:
        self.masks, self.name, self.skip_dead_gradients = masks, name, skip_dead_gradients
        self._indexed: tuple[Tensor, int] | None = None
        self._products: Products | None = None

    def products(self) -> Products | None:
        """Return the products, indexed anew if the mask has changed; None where the matrix has too few zeros."""
        dead = self.masks.dead[self.name]
        # `_version` counts changes in place, which a prune event makes.
        if self._indexed is None or self._indexed[0] is not dead or self._indexed[1] != dead._version:
            self._indexed = dead, dead._version
            self._products = Products(dead) if _is_worthwhile(dead) else None
        return self._products

    def __deepcopy__(self, memo: dict[int, object]) -> LiveWeights:
        # The copy shares the masks, and indexes them itself: the handle of `Products` cannot be
        # copied.
        return LiveWeights(self.masks, self.name, self.skip_dead_gradients)


class SparseLinear(nn.Linear):
    """A linear layer that multiplies live weights only; where it cannot, it computes as the layer that it was."""

    live_weights: LiveWeights

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear`: [..., in] to [..., out]."""
        if torch.compiler.is_compiling() or not self._can_skip(x):
            return super().forward(x)
        products = self.live_weights.products()
        if products is None or products.shape != self.weight.shape:
            return super().forward(x)
        y = _SparseProduct.apply(x, self.weight, self.bias, products, self.live_weights.skip_dead_gradients)  # type: ignore[no-untyped-call]
        assert isinstance(y, Tensor)
        return y

    def _can_skip(self, x: Tensor) -> bool:
        # A sharded or parametrized weight is of another type, and lies elsewhere.
        is_plain = type(self.weight) is nn.Parameter and is_readable(self.weight) and x.dtype == torch.float32
        is_large = x.device.type == "cpu" and x.numel() >= LEAST_ROWS * x.shape[-1]
        return is_plain and is_large and not torch.is_autocast_enabled("cpu")


class _Context(FunctionCtx):
    """What `_SparseProduct` saves between forward and backward."""

    products: Products
    shape: torch.Size
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, Tensor | None, Tensor | None]


class _SparseProduct(torch.autograd.Function):
    """`x @ weight.T + bias` with its gradients."""

    @staticmethod
    def forward(
        ctx: _Context, x: Tensor, weight: Tensor, bias: Tensor | None, products: Products, skip_dead_gradients: bool
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weight_learns = ctx.needs_input_grad[1]
        y, tiles = products.forward(weight, bias, rows, keep_tiles=weight_learns and skip_dead_gradients)
        ctx.products, ctx.shape = products, x.shape
        dense_rows = rows if weight_learns and not skip_dead_gradients else None
        ctx.save_for_backward(weight, tiles, dense_rows)  # type: ignore[arg-type]
        # not a view, which autograd would not let a model change in place
        return y.resize_(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, y_gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, tiles, dense_rows = ctx.saved_tensors
        # An expanded gradient, such as that of a sum, is not contiguous.
        flat = y_gradient.reshape(-1, y_gradient.shape[-1]).contiguous()
        x_gradient, weight_gradient = ctx.products.backward(weight, flat, tiles, needs_x=ctx.needs_input_grad[0])
        if x_gradient is not None:
            x_gradient = x_gradient.view(ctx.shape)
        if dense_rows is not None:
            weight_gradient = onednn.multiply(flat.t(), dense_rows.t())
        bias_gradient = flat.sum(0) if ctx.needs_input_grad[2] else None
        return x_gradient, weight_gradient, bias_gradient, None, None


def is_readable(tensor: Tensor) -> bool:
    """Whether the library can read the tensor where it lies."""
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()


def _readable_rows(rows: Tensor, width: int) -> Tensor:
    """Return rows [n, width] contiguously."""
    assert rows.dim() == 2
    assert rows.shape[1] == width
    rows = rows.contiguous()
    assert is_readable(rows)
    return rows


def _is_worthwhile(dead: Tensor) -> bool:
    """Whether the matrix can be indexed, and has zeros enough for a gain."""
    if dead.device.type != "cpu" or dead.dim() != 2 or max(dead.shape) > MOST_INPUTS or dead.numel() >= MOST_WEIGHTS:
        return False
    return int(dead.count_nonzero()) >= least_zeros() * dead.numel()


@functools.cache
def _sparse_class(base: type[nn.Linear]) -> type[SparseLinear]:
    """Build a class of sparse layers that compute as `base` where they cannot skip zeros."""
    return type("Sparse" + base.__name__, (SparseLinear, base), {})


@functools.cache
def load_functions() -> dict[str, CFunction]:
    """Load the library's functions.

    Raises:
        DeviceError: the library is missing, or an old one.
    """
    compiled = library.load_library()
    functions: dict[str, CFunction] = {}
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(compiled, f"spdtool_products_{name}", None)
        if function is None:
            raise DeviceError(f"{library.path()} has no products for training: it is an old one", library.REINSTALL)
        function.restype, function.argtypes = result, arguments
        functions[name] = function
    return functions


def _raise_error(error: bytes | int | None) -> None:
    """Raise DeviceError if a function of the library returned an error."""
    if error is not None:
        assert isinstance(error, bytes)
        raise DeviceError(f"a sparse product failed: {error.decode()}", "set sparse_products to false")
