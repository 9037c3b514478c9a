"""Padding removed between two nodes: the same answers, by a reference of the operators that a CPU lacks."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from spdtool.bench.gpu.packing import pack_rows
from spdtool.errors import ModelError
from spdtool.export import onnx_session
from spdtool.export.graph.row_lengths import use_row_lengths

HIDDEN, HEADS, LAYERS = 16, 2, 2
MICROSOFT = "com.microsoft"


def fused_graph() -> onnx.ModelProto:
    """An encoder of two layers of attention as `fuse_operators` leaves it: its bias hides padding."""
    generator = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "words": generator.standard_normal((50, HIDDEN)).astype(np.float32),
        "scale": np.ones(HIDDEN, np.float32),
        "shift": np.zeros(HIDDEN, np.float32),
        "axes": np.array([1, 2]),
        "penalty": np.float32(-1e9),
        "zero": np.float32(0),
        "first": np.array(0),
        "ones": np.array([1, 1]),
        "one": np.array([1]),
    }
    one = numpy_helper.from_array(np.ones(1, np.float32))
    nodes = [
        helper.make_node("Cast", ["attention_mask"], ["real"], to=TensorProto.BOOL),
        helper.make_node("Where", ["real", "zero", "penalty"], ["row_bias"]),
        helper.make_node("Unsqueeze", ["row_bias", "axes"], ["narrow"]),
        # [1, 1, tokens, 1], so that the bias is one of all pairs of tokens
        helper.make_node("Shape", ["attention_mask"], ["tokens"], start=1),
        helper.make_node("Concat", ["ones", "tokens", "one"], ["wide"], axis=0),
        helper.make_node("ConstantOfShape", ["wide"], ["square"], value=one),
        helper.make_node("Mul", ["narrow", "square"], ["bias"]),
        helper.make_node("Gather", ["words", "input_ids"], ["embedded"]),
        helper.make_node("LayerNormalization", ["embedded", "scale", "shift"], ["hidden_0"]),
    ]
    for layer in range(LAYERS):
        arrays[f"weight_{layer}"] = generator.standard_normal((HIDDEN, 3 * HIDDEN)).astype(np.float32)
        arrays[f"bias_{layer}"] = arrays[f"weight_{layer}"][0]
        inputs = [f"hidden_{layer}", f"weight_{layer}", f"bias_{layer}", "", "", "bias"]
        nodes.append(helper.make_node("Attention", inputs, [f"context_{layer}"], domain=MICROSOFT, num_heads=HEADS))
        inputs = [f"context_{layer}", f"hidden_{layer}", "scale", "shift"]
        outputs = [f"hidden_{layer + 1}", "", "", f"sum_{layer}"]
        nodes.append(helper.make_node("SkipLayerNormalization", inputs, outputs, domain=MICROSOFT, epsilon=1e-5))
    nodes.append(helper.make_node("Gather", [f"hidden_{LAYERS}", "first"], ["logits"], axis=1))
    names = ("input_ids", "attention_mask")
    ends = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]) for name in names]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", HIDDEN])
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "encoder", ends, [logits], tensors)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


class RemovePadding(OpRun):
    """Rows of real tokens one after the other, where each stands in the batch, and the starts of the rows."""

    op_domain = MICROSOFT

    def _run(self, hidden: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, ...]:
        real = np.arange(hidden.shape[1]) < lengths[:, None]
        order = np.concatenate([np.flatnonzero(real), np.flatnonzero(~real)]).astype(np.int32)
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return hidden[real], order.reshape(real.shape), starts, lengths.max(keepdims=True)


class RestorePadding(OpRun):
    """The inverse: zeros where there was padding."""

    op_domain = MICROSOFT

    def _run(self, tokens: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, ...]:
        flat = np.zeros((order.size, tokens.shape[1]), tokens.dtype)
        flat[order.reshape(-1)[: len(tokens)]] = tokens
        return (flat.reshape(*order.shape, -1),)


class PackedAttention(OpRun):
    """Attention within each row of tokens that stand one after the other."""

    op_domain = MICROSOFT

    def _run(self, tokens: np.ndarray, weight: Any, bias: Any, order: Any, starts: Any, num_heads: int = 0) -> Any:
        rows = []
        for start, end in zip(starts[:-1], starts[1:], strict=True):
            joined = (tokens[start:end] @ weight + bias).reshape(end - start, 3, num_heads, -1)
            query, key, value = joined.transpose(1, 2, 0, 3)
            scores = query @ key.transpose(0, 2, 1) / np.sqrt(query.shape[-1])
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            context = shares / shares.sum(-1, keepdims=True) @ value
            rows.append(context.transpose(1, 0, 2).reshape(end - start, -1))
        return (np.concatenate(rows).astype(np.float32),)


class SkipLayerNormalization(OpRun):
    """The normalized sum of two tensors."""

    op_domain = MICROSOFT

    def _run(self, x: np.ndarray, skip: np.ndarray, scale: Any, shift: Any, epsilon: float = 0.0) -> Any:
        total = x + skip
        deviation = total - total.mean(-1, keepdims=True)
        normal = deviation / np.sqrt((deviation**2).mean(-1, keepdims=True) + epsilon)
        return ((normal * scale + shift).astype(np.float32),)


def test_packed_rows_give_the_answers_of_padded_ones() -> None:
    proto = fused_graph()
    lengths = np.array([6, 2, 5])
    mask = (np.arange(6) < lengths[:, None]).astype(np.int64)
    feeds = {"input_ids": np.random.default_rng(1).integers(0, 50, mask.shape), "attention_mask": mask}
    expected = onnx_session.open_session(proto.SerializeToString(), threads=1).run(None, feeds)[0]
    assert use_row_lengths(proto)
    indexed = onnx_session.open_session(proto.SerializeToString(), threads=1).run(None, feeds)[0]
    assert np.allclose(indexed, expected, atol=1e-5)
    pack_rows(proto)
    operators = [node.op_type for node in proto.graph.node]
    assert operators.count("PackedAttention") == LAYERS
    assert "Attention" not in operators
    new_ops: list[type[OpRun]] = [RemovePadding, RestorePadding, PackedAttention, SkipLayerNormalization]
    packed = ReferenceEvaluator(proto, new_ops=new_ops).run(None, feeds)
    assert np.allclose(np.asarray(packed[0]), expected, atol=1e-5)


def test_attention_with_a_mask_of_its_own_cannot_be_packed() -> None:
    with pytest.raises(ModelError, match="does not take the length of each row"):
        pack_rows(fused_graph())


def test_heads_that_no_flash_kernel_has_keep_their_mask() -> None:
    """onnxruntime's plain CUDA kernel would read the starts of rows as something else."""
    proto = fused_graph()
    for node in proto.graph.node:
        if node.op_type == "Attention":
            node.attribute[0].i = 4  # heads of four columns
    assert not use_row_lengths(proto)
