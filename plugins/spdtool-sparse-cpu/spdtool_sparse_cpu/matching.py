"""Find the linear layers of an ONNX graph: product, bias and activation, whatever the exporter wrote for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from spdtool.export.graph.protobuf import inputs_of, tensors_by_name
from spdtool.export.graph.weights import parameters_of

GRAPH_OUTPUT = -1  # stands for a node among the readers of a tensor
LONGEST_ACTIVATION = 12  # nodes; every known spelling of GELU is shorter
ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Pow", "Erf", "Tanh", "Sigmoid", "Relu", "Gelu"}
PROBE = np.linspace(-6, 6, 97, dtype=np.float32)
PROBE_TOLERANCE = 1e-5  # the two forms of GELU differ by 5e-4
_erf = np.vectorize(math.erf, otypes=[np.float64])
ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}

Value = TypeVar("Value")


class GraphView:
    """The nodes of a graph in order, its constants by name, and which nodes read and write each tensor."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.nodes = list(proto.graph.node)
        self.constants = tensors_by_name(proto.graph)
        self.opsets = list(proto.opset_import)
        self.readers: dict[str, list[int]] = {}
        self.writers: dict[str, int] = {}
        for index, node in enumerate(self.nodes):
            for name in inputs_of(node):
                self.readers.setdefault(name, []).append(index)
            self.writers.update(dict.fromkeys(node.output, index))
        for value in proto.graph.output:
            self.readers.setdefault(value.name, []).append(GRAPH_OUTPUT)

    def weight(self, name: str) -> onnx.TensorProto | None:
        """Return the constant called `name`, if it is a float32 matrix that stores a parameter."""
        tensor = self.constants.get(name)
        if tensor is None or tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) != 2:
            return None
        return tensor if parameters_of(tensor) else None

    def is_vector(self, name: str, size: int) -> bool:
        """Whether `name` is a constant float32 vector of that size."""
        tensor = self.constants.get(name)
        return tensor is not None and list(tensor.dims) == [size] and tensor.data_type == onnx.TensorProto.FLOAT

    def is_scalar(self, name: str) -> bool:
        """Whether `name` is a constant with a single element, which leaves the shape of whatever it meets as it is."""
        return name in self.constants and list(self.constants[name].dims) in ([], [1])


class Operand(NamedTuple):
    """The constant behind the right operand of a product.

    Attributes:
        as_torch: whether the constant has the matrix as torch does, [out, in]; else transposed.
    """

    constant: onnx.TensorProto
    as_torch: bool


class Activation(NamedTuple):
    """An activation in a graph: its name, its output, and the indices of its nodes."""

    name: str
    output: str
    nodes: list[int]


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer in a graph.

    Attributes:
        constant: stores its matrix.
        as_torch: whether the constant has the matrix as torch does; else transposed.
        matrix: [out, in].
        bias: the constant with the bias; empty where there is none.
        nodes: indices of the nodes that compute it, ascending.
    """

    constant: onnx.TensorProto
    as_torch: bool
    matrix: np.ndarray
    input: str
    output: str
    bias: str
    activation: str
    nodes: list[int]


def attribute_of(node: onnx.NodeProto, name: str, default: Value) -> Value:
    """Return an attribute of a node, of the type of its default."""
    for attribute in node.attribute:
        if attribute.name == name:
            value: Value = helper.get_attribute_value(attribute)
            return value
    return default


def match_linear(view: GraphView, index: int) -> LinearLayer | None:
    """Match the linear layer whose product is the node at `index`, with its bias and activation."""
    node = view.nodes[index]
    operand = None
    if node.op_type == "MatMul":
        operand = _matmul_operand(view, node.input[1])
    elif node.op_type == "Gemm":
        operand = _gemm_operand(view, node)
    if operand is None:
        return None
    matrix = numpy_helper.to_array(operand.constant)
    if not operand.as_torch:
        matrix = matrix.T
    bias, output, nodes = "", node.output[0], [index]
    if node.op_type == "MatMul":
        bias, output, nodes = _match_bias(view, index, len(matrix))
    elif len(node.input) > 2 and node.input[2]:
        bias = node.input[2]
        if not view.is_vector(bias, len(matrix)):
            return None
    activation = _match_activation(view, output)
    return LinearLayer(
        constant=operand.constant,
        as_torch=operand.as_torch,
        matrix=matrix,
        input=node.input[0],
        output=activation.output,
        bias=bias,
        activation=activation.name,
        nodes=sorted(nodes + activation.nodes),
    )


def _matmul_operand(view: GraphView, name: str) -> Operand | None:
    constant = view.weight(name)
    if constant is not None:
        return Operand(constant, False)
    if name not in view.writers:
        return None
    writer = view.nodes[view.writers[name]]
    # torch's exporter folds this transpose into the constant, others leave it in the graph.
    if writer.op_type != "Transpose" or attribute_of(writer, "perm", [1, 0]) != [1, 0]:
        return None
    constant = view.weight(writer.input[0])
    return None if constant is None else Operand(constant, True)


def _gemm_operand(view: GraphView, node: onnx.NodeProto) -> Operand | None:
    is_plain = attribute_of(node, "alpha", 1.0) == 1 and attribute_of(node, "beta", 1.0) == 1
    if not is_plain or attribute_of(node, "transA", 0):  # no linear layer is exported like that
        return None
    constant = view.weight(node.input[1])
    return None if constant is None else Operand(constant, bool(attribute_of(node, "transB", 0)))


def _match_bias(view: GraphView, index: int, size: int) -> tuple[str, str, list[int]]:
    """Bias, output and nodes of the product at `index`, together with an Add that alone reads it and adds a bias."""
    product = view.nodes[index].output[0]
    readers = view.readers.get(product, [])
    if len(readers) == 1 and readers[0] != GRAPH_OUTPUT and view.nodes[readers[0]].op_type == "Add":
        add = view.nodes[readers[0]]
        others = [name for name in add.input if name != product]
        if len(others) == 1 and view.is_vector(others[0], size):
            return others[0], add.output[0], [index, readers[0]]
    return "", product, [index]


def _match_activation(view: GraphView, start: str) -> Activation:
    """Match the activation that alone reads `start`; `none` if there is none.

    Exporters spell GELU in many ways. So the elementwise nodes that follow are collected until no
    other node reads `start` or anything between, and then what they compute is compared with each
    activation on some numbers.
    """
    inside = {start}
    nodes: list[int] = []
    while len(nodes) < LONGEST_ACTIVATION:
        index = _next_elementwise(view, inside, nodes)
        if index is None:
            break
        nodes.append(index)
        output = view.nodes[index].output[0]
        is_closed = all(set(view.readers.get(name, ())) <= set(nodes) for name in inside)
        inside.add(output)
        if is_closed:
            name = _recognize_activation(view, start, output, sorted(nodes))
            if name is not None:
                return Activation(name, output, sorted(nodes))
    return Activation("none", start, [])


def _next_elementwise(view: GraphView, inside: set[str], nodes: list[int]) -> int | None:
    """Find the first further node that computes elementwise from tensors of `inside` and scalars alone."""
    readers = set[int]()
    for name in inside:
        readers.update(view.readers.get(name, ()))
    for index in sorted(readers.difference(nodes, [GRAPH_OUTPUT])):
        node = view.nodes[index]
        if node.op_type in ELEMENTWISE and all(name in inside or view.is_scalar(name) for name in node.input):
            return index
    return None


def _recognize_activation(view: GraphView, start: str, output: str, indices: list[int]) -> str | None:
    """Name the activation that the nodes compute from `start` to `output`; None: none that is known."""
    nodes = [view.nodes[index] for index in indices]
    constants = {name for node in nodes for name in node.input if name in view.constants}
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n"]) for name in (start, output)]
    graph = helper.make_graph(nodes, "activation", ends[:1], ends[1:], [view.constants[name] for name in constants])
    evaluator = ReferenceEvaluator(helper.make_model(graph, opset_imports=view.opsets))
    with np.errstate(all="ignore"):  # a node may divide by zero before the rest is collected
        (values,) = evaluator.run(None, {start: PROBE})
    for name, function in ACTIVATIONS.items():
        if np.allclose(values, function(PROBE.astype(np.float64)), rtol=0, atol=PROBE_TOLERANCE):
            return name
    return None
