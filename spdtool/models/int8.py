"""The arithmetic of int8 encoders: how weights and tokens are rounded, and what products and attention of them are.

    y = (x_u8 - zero_point) @ w_s8.T * scale of the row * scale of the token + bias

Weights are rounded once, with one scale for each row (output). Activations are rounded as they
come, with a scale and a zero point for each token and chunk of `INPUT_CHUNK` inputs; the chunks'
products are added in float32. Integers are exact, so an engine on any machine has the same sums.

Attention multiplies in 8 bits too. A query has a scale and a zero point, a key has a scale, and so
has each column of the values. Probabilities are 0 to 255, where 255 is the largest of the query.

This is the one definition. Whatever trains for int8, computes it or checks it calls these
functions, or is tested against them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

ATTENTION = "spdtool_int8"  # in transformers' table of attention functions
GROUP = 4  # inputs that are multiplied at once; heads of other sizes attend in float32
WEIGHT_LIMIT = 127  # -128 stays unused, so that the numbers are symmetric
TOKEN_LIMIT = 255
INPUT_CHUNK = 768  # inputs that share a token's scale; a chunk of 64 tokens fits into a second-level cache
LEAST_RANGE = 1e-30  # of a token's activations; below it the reciprocal of the scale would not be finite
LEAST_SCALE = 2.0**-149  # the smallest float32 above zero
# The largest float32 would overflow when it is multiplied by WEIGHT_LIMIT again.
LARGEST_SCALE = torch.nextafter(torch.tensor(torch.finfo(torch.float32).max / WEIGHT_LIMIT), torch.tensor(0.0)).item()


class RoundedRows(NamedTuple):
    """A weight matrix [outputs, inputs] in int8: about `values * scales[:, None]`.

    Attributes:
        values: int8, -127 to 127.
        scales: float32 [outputs].
    """

    values: Tensor
    scales: Tensor


class RoundedTokens(NamedTuple):
    """Activations [..., inputs] in 8 bits: about `(values - zero_point) * scale`.

    Attributes:
        values: uint8.
        scale: float32 [..., 1].
        zero_point: the integer that stands for zero; int32 [..., 1], 0 to 255.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor


def round_weight_rows(weight: Tensor) -> RoundedRows:
    """Round a float32 matrix [outputs, inputs] to int8, symmetrically, with one scale for each row.

    The largest weight of a row becomes 127 or -127; a row of zeros has the scale 1. Halves go to
    the even number. A weight below half a step becomes zero.
    """
    largest = weight.abs().amax(dim=1)
    scales = (largest / torch.full_like(largest, WEIGHT_LIMIT)).clamp(LEAST_SCALE, LARGEST_SCALE)
    scales = torch.where(largest == 0, torch.ones_like(scales), scales)
    values = torch.round(weight / scales[:, None]).clamp(-WEIGHT_LIMIT, WEIGHT_LIMIT)
    return RoundedRows(values.to(torch.int8), scales)


def round_tokens(values: Tensor) -> RoundedTokens:
    """Round float32 activations [..., inputs] to 0 to 255, with one scale and zero point for each token.

    The range holds zero, which is rounded without an error. Values are multiplied by the reciprocal
    of the scale, since a division for each value would cost more than the products that it serves.
    """
    least = values.amin(dim=-1, keepdim=True).clamp(max=0)
    most = values.amax(dim=-1, keepdim=True).clamp(min=0)
    spread = most - least
    scale = spread / torch.full_like(spread, TOKEN_LIMIT)
    scale = torch.where(spread > LEAST_RANGE, scale, torch.ones_like(scale))
    reciprocal = torch.ones_like(scale) / scale
    zero_point = torch.round(-least * reciprocal)
    rounded = (torch.round(values * reciprocal) + zero_point).clamp(0, TOKEN_LIMIT)
    return RoundedTokens(rounded.to(torch.uint8), scale, zero_point.to(torch.int32))


def multiply_rounded(x: Tensor, rows: RoundedRows, bias: Tensor | None = None) -> Tensor:
    """Compute a linear layer as an int8 engine does.

    Args:
        x: float32 [..., inputs]; its tokens are rounded chunk by chunk.
        bias: float32 [outputs].

    Returns:
        float32 [..., outputs].
    """
    y = torch.zeros(*x.shape[:-1], len(rows.scales), device=x.device)
    if bias is not None:
        y = y + bias
    for start in range(0, x.shape[-1], INPUT_CHUNK):
        chunk = slice(start, start + INPUT_CHUNK)
        tokens = round_tokens(x[..., chunk])
        # float64 holds these integers exactly, and is multiplied faster than integers are.
        shifted = tokens.values.double() - tokens.zero_point
        sums = (shifted @ rows.values[:, chunk].double().T).float()
        y = y + sums * rows.scales * tokens.scale
    return y


def round_symmetric(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Round float32 values to -127 to 127, with one scale for all numbers along a dimension.

    Returns:
        The whole numbers, as float32, and the scales, where the dimension has the size 1.
    """
    largest = values.abs().amax(dim=dim, keepdim=True)
    scales = torch.where(largest > LEAST_RANGE, largest / torch.full_like(largest, WEIGHT_LIMIT), 1.0)
    return torch.round(values * (torch.ones_like(scales) / scales)), scales


def attend_rounded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute attention as an int8 engine does.

    Args:
        query: float32 [rows, heads, queries, size of a head]; divided by the root of that size already.
        key: float32 [rows, heads, keys, size of a head]; the value has the same shape.
        mask: what is added to the scores, [rows, 1, 1 or queries, keys]: 0, or a very low number for keys that are
            not seen. None: all are.

    Returns:
        float32 [rows, heads, queries, size of a head].
    """
    if mask is not None:
        seen = (mask > torch.finfo(mask.dtype).min / 2).any(dim=-2)[..., None]
        # A row without a token that is seen attends to all of them alike.
        value = value.where(seen | ~seen.any(dim=-2, keepdim=True), 0.0)
    queries = round_tokens(query)
    keys, key_scales = round_symmetric(key, -1)
    values, value_scales = round_symmetric(value, -2)
    sums = ((queries.values.double() - queries.zero_point) @ keys.double().mT).float()
    scores = sums * key_scales.mT * queries.scale
    if mask is not None:
        scores = scores + mask
    probabilities = torch.round(TOKEN_LIMIT * torch.exp(scores - scores.amax(dim=-1, keepdim=True))).double()
    totals = probabilities.sum(dim=-1, keepdim=True)
    return ((probabilities @ values.double()) * value_scales / totals).float()


class Int8Linear(nn.Module):
    """A linear layer that computes in int8 as an engine does. It only predicts: rounding has no gradient."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.rows = round_weight_rows(linear.weight.detach())
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear`: [..., inputs] to [..., outputs]."""
        return multiply_rounded(x, self.rows, self.bias)


def use_int8_products(model: nn.Module, weights: Iterable[str]) -> None:
    """Let linear layers of a model compute in int8, in place.

    Args:
        weights: names of their weight parameters.
    """
    for name in weights:
        module = name.removesuffix(".weight")
        linear = model.get_submodule(module)
        assert isinstance(linear, nn.Linear), f"{name} is not the weight of a linear layer"
        model.set_submodule(module, Int8Linear(linear))


def use_int8_attention(model: PreTrainedModel) -> bool:
    """Let the attention of each layer compute in int8, in place, where `use_int8_products` covers its inputs.

    Returns:
        Whether the model looks its attention up in transformers' table; if not, it keeps its own. Before
        transformers 5, BERT did not.
    """
    if not getattr(model, "_supports_attention_backend", False):
        return False
    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, eager_mask)
    model.set_attn_implementation(ATTENTION)
    return True


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_options: object,
) -> tuple[Tensor, None]:
    """Attend with the signature that transformers asks for; returns [rows, queries, heads, size of a head]."""
    # query, key, value; q_lin, k_lin, v_lin: the output stands in another module, or has another letter
    inputs = [layer for name, layer in module.named_children() if name[0] in "qkv"]
    if inputs and all(isinstance(layer, Int8Linear) for layer in inputs) and query.shape[-1] % GROUP == 0:
        context = attend_rounded(query * scaling, key, value, attention_mask)
    else:
        context = nn.functional.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling)
    return context.transpose(1, 2).contiguous(), None
