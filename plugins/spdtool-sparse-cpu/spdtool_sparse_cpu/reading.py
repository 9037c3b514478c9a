"""Find out what the head of a traced model reads of the encoder's last hidden states.

Heads are spelt in many ways. So the nodes behind the hidden states are computed on random numbers, and what they give
is compared: with a mean over real tokens, and with what they give when the hidden states of padding are others.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from spdtool.export.graph.protobuf import inputs_of, tensors_by_name
from spdtool_sparse_cpu.matching import attribute_of

MASK = "attention_mask"
PROBE_SHAPE = (3, 13)  # rows and tokens; unlikely numbers of labels
PROBE_REAL = ((0, 13), (0, 4), (5, 13))  # of each row: from, to
LONGEST_MEAN = 4  # nodes on the way from the hidden states to their mean
TOLERANCE = 1e-5
ENCODER_OPERATORS = {"MatMul", "Gemm", "LayerNormalization"}  # a head that needs one of the encoder reads more


class HeadReads(NamedTuple):
    """What a head reads of the hidden states.

    Attributes:
        output: `first` (token 0), `mean` (over real tokens), `real` (every real token) or `all` (padding too).
        tensors: those of the graph that the operator computes.
    """

    output: str
    tensors: set[str]


def find_reads(proto: onnx.ModelProto, hidden: str, width: int) -> HeadReads:
    """Find out what is read of the tensor `hidden`, float32 [rows, tokens, width]."""
    first_tokens = _first_token_outputs(proto.graph, hidden)
    if first_tokens:
        return HeadReads("first", first_tokens)
    probe = _Probe(proto, hidden, width)
    if MASK in {value.name for value in proto.graph.input}:
        mean = _find_mean(proto.graph, hidden, probe)
        if mean is not None:
            return HeadReads("mean", {mean})
        if _ignores_padding(proto.graph, hidden, probe):
            return HeadReads("real", {hidden})
    return HeadReads("all", {hidden})


def _first_token_outputs(graph: onnx.GraphProto, hidden: str) -> set[str]:
    """Collect the outputs of the nodes that read `hidden`, if each of them takes token 0 of each row; else none."""
    scalars = {tensor.name: tensor for tensor in graph.initializer if not tensor.dims}
    outputs = {value.name for value in graph.output}
    first_tokens = set[str]()
    for node in graph.node:
        if hidden not in inputs_of(node):
            continue
        if node.op_type != "Gather" or attribute_of(node, "axis", 0) != 1:
            return set()
        index = scalars.get(node.input[1])
        if index is None or numpy_helper.to_array(index) != 0:
            return set()
        first_tokens.add(node.output[0])
    if outputs.intersection({hidden, *first_tokens}):
        return set()
    return first_tokens


class _Probe:
    """Random hidden states, and what the nodes behind them compute."""

    def __init__(self, proto: onnx.ModelProto, hidden: str, width: int) -> None:
        random = np.random.default_rng(0)
        rows, tokens = PROBE_SHAPE
        self.proto, self.hidden = proto, hidden
        self.states = random.normal(size=(rows, tokens, width)).astype(np.float32)
        self.changed_states = random.normal(size=(rows, tokens, width)).astype(np.float32)
        self.mask = np.array([[begin <= token < end for token in range(tokens)] for begin, end in PROBE_REAL])
        self.encoder = {node.output[0] for node in _ancestors(proto.graph, [hidden], "")}

    def compute(self, outputs: list[str], states: np.ndarray) -> list[np.ndarray] | None:
        """Compute some tensors; None where they depend on more than hidden states and inputs, or it cannot be done."""
        nodes = _ancestors(self.proto.graph, outputs, self.hidden)
        if any(node.op_type in ENCODER_OPERATORS and node.output[0] in self.encoder for node in nodes):
            return None
        constants = tensors_by_name(self.proto.graph)
        needed = {name for node in nodes for name in node.input if name in constants}
        arrays = {value.name: np.ones(PROBE_SHAPE, np.int64) for value in self.proto.graph.input}
        arrays[MASK] = self.mask.astype(np.int64)
        values = [helper.make_tensor_value_info(name, onnx.TensorProto.INT64, PROBE_SHAPE) for name in arrays]
        values.append(helper.make_tensor_value_info(self.hidden, onnx.TensorProto.FLOAT, states.shape))
        results = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs]
        head = helper.make_graph(nodes, "head", values, results, [constants[name] for name in sorted(needed)])
        model = helper.make_model(head, opset_imports=list(self.proto.opset_import))
        try:
            with np.errstate(all="ignore"):
                return list(ReferenceEvaluator(model).run(None, arrays | {self.hidden: states}))
        except Exception:  # whatever numpy raises for an operator or a shape that the evaluator cannot compute
            return None


def _ancestors(graph: onnx.GraphProto, outputs: list[str], start: str) -> list[onnx.NodeProto]:
    """List the nodes that `outputs` depend on, in order, without those that `start` depends on alone."""
    needed = set(outputs) - {start}
    nodes: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            nodes.append(node)
            needed.update(name for name in inputs_of(node) if name != start)
    return nodes[::-1]


def _find_mean(graph: onnx.GraphProto, hidden: str, probe: _Probe) -> str | None:
    """Find the tensor that is the mean of the real tokens' hidden states, through which alone they are read."""
    mask = probe.mask[..., None]
    expected = (probe.states * mask).sum(axis=1) / mask.sum(axis=1)
    outputs = {value.name for value in graph.output}
    name = hidden
    for _ in range(LONGEST_MEAN):
        readers = [node for node in graph.node if name in inputs_of(node)]
        if len(readers) != 1 or name in outputs:
            return None
        name = readers[0].output[0]
        computed = probe.compute([name], probe.states)
        if computed is None:
            return None
        if computed[0].shape == expected.shape and np.allclose(computed[0], expected, rtol=0, atol=TOLERANCE):
            return None if name in outputs else name
    return None


def _ignores_padding(graph: onnx.GraphProto, hidden: str, probe: _Probe) -> bool:
    """Whether the hidden states of padding reach nothing but the outputs of padding tokens."""
    names = [value.name for value in graph.output if value.name != hidden]
    if not names:
        return True
    # Token 0 is always computed: a head may read it whatever its mask.
    mask = probe.mask.copy()
    mask[:, 0] = True
    results = probe.compute(names, probe.states)
    changed = probe.compute(names, np.where(mask[..., None], probe.states, probe.changed_states))
    if results is None or changed is None:
        return False
    for result, changed_result in zip(results, changed, strict=True):
        if result.shape[:2] == PROBE_SHAPE:  # a token's
            result, changed_result = result[mask], changed_result[mask]
        if not np.array_equal(result, changed_result):
            return False
    return True
