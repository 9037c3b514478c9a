"""The two operators in plain numpy and float64: slow, readable references for the compiled code.

    ReferenceEvaluator(proto, new_ops=[SparseLinear, SparseEncoder]).run(None, inputs)

Both read everything from the ONNX node: attributes and packed weights, in the order that `graph.py` writes them.
"""

from __future__ import annotations

import math

import numpy as np
from onnx import helper
from onnx.reference.op_run import OpRun
from spdtool_sparse_cpu.packing import HEADER, read_header, unpack

_erf = np.vectorize(math.erf, otypes=[np.float64])

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


INPUT_CHUNK = 768


def round_rows(weight):
    """float32 [out, in] -> int8 and float32 scales [out], as `spdtool.models.int8.round_weight_rows`."""
    largest = np.abs(weight).max(axis=1)
    scales = np.where(largest == 0, np.float32(1), largest / np.float32(127))
    return np.clip(np.rint(weight / scales[:, None]), -127, 127).astype(np.int8), scales


def round_tokens(x):
    """float32 [..., in] -> uint8, scale and zero point [..., 1], as `spdtool.models.int8.round_tokens`."""
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    spread = high - low
    scale = np.where(spread > np.float32(1e-30), spread / np.float32(255), np.float32(1))
    reciprocal = np.float32(1) / scale
    zero_point = np.rint(-low * reciprocal).astype(np.int32)
    values = np.rint(x * reciprocal).astype(np.int32) + zero_point
    return np.clip(values, 0, 255).astype(np.uint8), scale, zero_point


def multiply_rounded(x, values, scales, bias):
    """float32 [..., in] times int8 [out, in] -> float32 [..., out], as `spdtool.models.int8.multiply_rounded`."""
    y = np.broadcast_to(bias.astype(np.float32), (*x.shape[:-1], len(scales)))
    for start in range(0, x.shape[-1], INPUT_CHUNK):
        chunk = slice(start, start + INPUT_CHUNK)
        tokens, scale, zero_point = round_tokens(x[..., chunk])
        shifted = tokens.astype(np.int64) - zero_point
        sums = (shifted @ values[:, chunk].T.astype(np.int64)).astype(np.float32)
        y = y + sums * scales * scale
    return y


class Int8Blocks:
    """A matrix packed in int8 blocks, whose products are computed in integers."""

    def __init__(self, blob):
        header, weight = read_header(blob), unpack(blob)
        self.scales = np.frombuffer(blob.tobytes()[HEADER.size : HEADER.size + header.scale_bytes], "<f4")
        self.values = np.rint(weight / self.scales[:, None]).astype(np.int8)


def read_weight(blob):
    """Unpack a matrix to float64, or to int8 if it is stored in blocks."""
    return Int8Blocks(blob) if read_header(blob).block_bits else unpack(blob).astype(np.float64)


def linear(x, weight, bias, activation="none"):
    """x [..., in], weight [out, in], bias [out] -> [..., out]."""
    if isinstance(weight, Int8Blocks):
        product = multiply_rounded(x.astype(np.float32), weight.values, weight.scales, bias).astype(np.float64)
    else:
        product = x @ weight.T + bias
    return ACTIVATIONS[activation](product)


def layer_norm(x, weight, bias, epsilon):
    """x [..., hidden], each token normalised over its hidden values."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon) * weight + bias


def positions(ids, padding_id):
    """Return the position of each token, [rows, tokens]: its index, or its count without padding, as in RoBERTa."""
    if padding_id < 0:
        return np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    is_token = ids != padding_id
    return padding_id + np.cumsum(is_token, axis=1) * is_token


def softmax_over_real(scores, mask):
    """Softmax of scores [rows, heads, queries, keys] under mask [rows, keys]; padding gets weight 0.

    A row without real keys attends to all keys equally: eager attention adds the lowest float32 to each of its scores,
    which makes them equal.
    """
    is_token = mask[:, None, None, :] != 0
    hidden = np.where(is_token, scores, -np.inf)
    hidden = np.where(is_token.any(axis=-1, keepdims=True), hidden, 0.0)
    weights = np.exp(hidden - hidden.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def attention(x, mask, heads, query, key, value, output):
    """x [rows, tokens, hidden] -> the same; each of the four is (weight, bias)."""
    rows, tokens, hidden = x.shape

    def split(y):  # [rows, tokens, hidden] -> [rows, heads, tokens, size of a head]
        return y.reshape(rows, tokens, heads, hidden // heads).transpose(0, 2, 1, 3)

    q, k, v = (split(linear(x, *layer)) for layer in (query, key, value))
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(hidden // heads)
    mixed = softmax_over_real(scores, mask) @ v
    return linear(mixed.transpose(0, 2, 1, 3).reshape(rows, tokens, hidden), *output)


def look_up(table, indices, name):
    """Return rows of an embedding table; an index outside it, even a negative one, is an error."""
    if indices.size and not (indices.min() >= 0 and indices.max() < len(table)):
        raise ValueError(f"a {name} is not in 0..{len(table) - 1}")
    return table[indices]


def encode(ids, mask, token_types, weights, *, heads, layers, epsilon, activation, padding_id, has_types, projection):
    """Run the encoder on int64 [rows, tokens] inputs; return float64 [rows, tokens, hidden].

    Args:
        weights: float64 arrays, in the order of the operator's inputs.
    """
    remaining = iter(weights)

    def pair():
        return next(remaining), next(remaining)[0]  # a bias is stored as one row

    def norm(y):
        weight, bias = next(remaining)[0], next(remaining)[0]
        return layer_norm(y, weight, bias, epsilon)

    x = look_up(next(remaining), ids, "token id") + look_up(next(remaining), positions(ids, padding_id), "position")
    if has_types:
        x = x + look_up(next(remaining), np.zeros_like(ids) if token_types is None else token_types, "token type")
    x = norm(x)
    if projection:
        x = linear(x, *pair())
    for _ in range(layers):
        attended = attention(x, mask, heads, pair(), pair(), pair(), pair())
        x = norm(attended + x)
        inner = linear(x, *pair(), activation)
        x = norm(linear(inner, *pair()) + x)
    assert next(remaining, None) is None, "weights are left over"
    return x


class SparseLinear(OpRun):
    """`spdtool.SparseLinear`: x float [..., in], weight packed [out, in], bias float [out] -> [..., out]."""

    op_domain = "spdtool"

    def _run(self, x, weight, bias, activation=None):
        activation = activation or self.activation
        result = linear(x.astype(np.float64), read_weight(weight), bias.astype(np.float64), activation)
        return (result.astype(np.float32),)


class SparseEncoder(OpRun):
    """`spdtool.SparseEncoder`: ids, mask, token types or nothing, packed weights -> [rows, (tokens,) hidden]."""

    op_domain = "spdtool"

    def _load_attributes(self):
        """Keep the attributes in a dict: `output` as an attribute of this object means something else to OpRun."""
        values = {item.name: helper.get_attribute_value(item) for item in self.onnx_node.attribute}
        self.settings = {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}
        self.attributes_names_, self.has_linked_attribute = set(), False

    def _run(self, ids, mask, token_types, *packed):
        settings = dict(self.settings)
        has_types, output = bool(settings.pop("token_types")), settings.pop("output")
        weights = [read_weight(blob) for blob in packed]
        hidden = encode(ids, mask, token_types, weights, has_types=has_types, **settings)
        assert output in ("first", "all")
        return ((hidden[:, 0] if output == "first" else hidden).astype(np.float32),)


OPERATORS = [SparseLinear, SparseEncoder]
