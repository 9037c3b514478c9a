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


def round_symmetric(x, axis):
    """Whole numbers and scales along an axis, as `spdtool.models.int8.round_symmetric`."""
    x = x.astype(np.float32)
    largest = np.abs(x).max(axis=axis, keepdims=True)
    scales = np.where(largest > np.float32(1e-30), largest / np.float32(127), np.float32(1))
    return np.rint(x * (np.float32(1) / scales)), scales


def attend_rounded(q, k, v, visible):
    """Attend in 8 bits, with arguments as `attention`, as `spdtool.models.int8.attend_rounded`."""
    reads = visible | ~visible.any(axis=-1, keepdims=True)
    v = np.where(reads[:, :, 0, :, None], v, 0.0)
    queries, query_scale, zero_point = round_tokens(q.astype(np.float32))
    keys, key_scales = round_symmetric(k, -1)
    values, value_scales = round_symmetric(v, -2)
    sums = (queries.astype(np.float64) - zero_point) @ keys.astype(np.float64).transpose(0, 1, 3, 2)
    scores = np.where(reads, sums * key_scales.transpose(0, 1, 3, 2) * query_scale, -np.inf)
    scores = np.where(visible.any(axis=-1, keepdims=True), scores, 0.0)
    probabilities = np.rint(255 * np.exp(scores - scores.max(axis=-1, keepdims=True)))
    mixed = (probabilities @ values) * value_scales / probabilities.sum(axis=-1, keepdims=True)
    mixed = mixed.transpose(0, 2, 1, 3)
    return mixed.reshape(*mixed.shape[:2], -1)


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


def softmax_over_visible(scores, visible):
    """Softmax of scores [rows, heads, queries, keys] over the visible keys; `visible` is broadcast to them.

    A query without visible keys attends to all keys equally: eager attention adds the lowest float32 to each of its
    scores, which makes them equal.
    """
    visible = np.broadcast_to(visible, scores.shape)
    hidden = np.where(visible, scores, -np.inf)
    hidden = np.where(visible.any(axis=-1, keepdims=True), hidden, 0.0)
    weights = np.exp(hidden - hidden.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def split_heads(y, heads):
    """Split [rows, tokens, hidden] into [rows, heads, tokens, size of a head]."""
    return y.reshape(*y.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def attention(q, k, v, visible, bias=0.0):
    """Attend, with q, k and v [rows, heads, tokens, size] and a bias of the scores; return [rows, tokens, hidden]."""
    scores = q @ k.transpose(0, 1, 3, 2) + bias
    mixed = (softmax_over_visible(scores, visible) @ v).transpose(0, 2, 1, 3)
    return mixed.reshape(*mixed.shape[:2], -1)


def distances(tokens):
    """Return the position of each query minus that of each key, [queries, keys]."""
    return np.arange(tokens)[:, None] - np.arange(tokens)


def bucket_of(buckets, distance):
    """Look up the bucket of each distance; the ends of the table stand for any further one."""
    limit = len(buckets) // 2
    return buckets.astype(np.int64)[np.clip(distance, -limit, limit) + limit]


def rotate(x, frequencies):
    """Rotate [rows, heads, tokens, size] by position: pairs of numbers that are half a head apart."""
    angles = (np.arange(x.shape[2], dtype=np.float32)[:, None] * frequencies.astype(np.float32)).astype(np.float64)
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], axis=-1)


def look_up(table, indices, name):
    """Return rows of an embedding table; an index outside it, even a negative one, is an error."""
    if indices.size and not (indices.min() >= 0 and indices.max() < len(table)):
        raise ValueError(f"a {name} is not in 0..{len(table) - 1}")
    return table[indices]


class Encoder:
    """The whole encoder, float64.

    Args:
        weights: arrays in the order of the operator's inputs.
        settings: the operator's attributes.
    """

    def __init__(self, weights, settings):
        self.remaining, self.settings = iter(weights), settings
        self.heads, self.kind = settings["heads"], settings.get("kind", "bert")

    def pair(self):
        return next(self.remaining), next(self.remaining)[0]  # a bias is stored as one row

    def norm(self, y):
        weight, bias = next(self.remaining)[0], next(self.remaining)[0]
        return layer_norm(y, weight, bias, self.settings["epsilon"])

    def encode(self, ids, mask, token_types):
        """Run the encoder on int64 [rows, tokens] inputs; return [rows, tokens, hidden]."""
        x = look_up(next(self.remaining), ids, "token id")
        if self.kind in ("bert", "mpnet"):
            x = x + look_up(next(self.remaining), positions(ids, self.settings["padding_id"]), "position")
        if self.settings["token_types"]:
            x = x + look_up(
                next(self.remaining), np.zeros_like(ids) if token_types is None else token_types, "token type"
            )
        x = self.norm(x)
        if self.settings["projection"]:
            x = linear(x, *self.pair())
        visible = (mask != 0)[:, None, None, :]
        if self.kind == "modernbert":
            x = self.modern_layers(x, visible)
        else:
            if self.kind == "deberta-v2":
                x = x * (mask != 0)[..., None]
                visible = visible & (mask != 0)[:, None, :, None]
            x = self.layers(x, visible)
        assert next(self.remaining, None) is None, "weights are left over"
        return x

    def layers(self, x, visible):
        """Layers with a layer norm after each sum."""
        if self.kind == "mpnet":
            table, buckets = next(self.remaining), next(self.remaining)[0]
        if self.kind == "deberta-v2":
            table = self.norm(next(self.remaining))[None]
            buckets = next(self.remaining)[0]
        activation, terms = self.settings["activation"], 3 if self.kind == "deberta-v2" else 1
        for _ in range(self.settings["layers"]):
            query, key, value, output = (self.pair() for _ in range(4))
            q, k, v = (split_heads(linear(x, *layer), self.heads) for layer in (query, key, value))
            q, bias = q / np.sqrt(q.shape[-1] * terms), 0.0
            if self.kind == "mpnet":
                bias = table[bucket_of(buckets, distances(x.shape[1]))].transpose(2, 0, 1)
            if self.kind == "deberta-v2":
                bucket_keys = split_heads(linear(table, *key), self.heads)
                bucket_queries = split_heads(linear(table, *query), self.heads) / np.sqrt(q.shape[-1] * terms)
                bucket = bucket_of(buckets, distances(x.shape[1]))
                at = np.broadcast_to(bucket, (*q.shape[:2], *bucket.shape))
                by_query = np.take_along_axis(q @ bucket_keys.transpose(0, 1, 3, 2), at, -1)
                # the key's content with the query of the bucket between them: [key, query] is turned round
                by_key = np.take_along_axis(k @ bucket_queries.transpose(0, 1, 3, 2), at.transpose(0, 1, 3, 2), -1)
                bias = by_query + by_key.transpose(0, 1, 3, 2)
            rounds = all(isinstance(weight, Int8Blocks) for weight, _ in (query, key, value))
            if rounds and self.kind == "bert" and q.shape[-1] % 4 == 0:
                mixed = attend_rounded(q, k, v, visible)
            else:
                mixed = attention(q, k, v, visible, bias)
            x = self.norm(linear(mixed, *output) + x)
            inner = linear(x, *self.pair(), activation)
            x = self.norm(linear(inner, *self.pair()) + x)
        return x

    def modern_layers(self, x, visible):
        """Layers of ModernBERT, with a layer norm before attention and feed-forward."""
        frequencies = {"g": next(self.remaining)[0], "l": next(self.remaining)[0]}
        near = np.abs(distances(x.shape[1])) <= self.settings["window"]
        for index, letter in enumerate(self.settings["attention"]):
            normed = self.norm(x) if index else x
            q, k, v = (split_heads(y, self.heads) for y in np.split(linear(normed, *self.pair()), 3, axis=-1))
            q, k = (rotate(y, frequencies[letter]) for y in (q, k))
            near_keys = visible & near if letter == "l" else visible
            x = x + linear(attention(q / np.sqrt(q.shape[-1]), k, v, near_keys), *self.pair())
            inner, gate = np.split(linear(self.norm(x), *self.pair()), 2, axis=-1)
            x = x + linear(ACTIVATIONS[self.settings["activation"]](inner) * gate, *self.pair())
        return self.norm(x)


def read_states(states, mask, output):
    """Return what the operator computes of the hidden states [rows, tokens, hidden]."""
    assert output in ("first", "mean", "real", "all")
    real = (mask != 0)[..., None]
    if output == "first":
        return states[:, 0]
    if output == "mean":
        return (states * real).sum(axis=1) / np.maximum(real.sum(axis=1), 1)
    if output == "all":
        return states
    computed = real | ~real.any(axis=1, keepdims=True)
    computed[:, 0] = True  # whatever its mask
    return states * computed


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
        encoder = Encoder([read_weight(blob) for blob in packed], self.settings)
        states = encoder.encode(ids, mask, token_types)
        return (read_states(states, mask, self.settings["output"]).astype(np.float32),)


OPERATORS = [SparseLinear, SparseEncoder]
