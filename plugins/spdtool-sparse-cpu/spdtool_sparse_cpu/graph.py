"""From the ONNX graph that torch.onnx writes to one with the operators of this plug-in, and back to its weights.

An encoder of the BERT family becomes one `SparseEncoder`, which takes the place of everything up to the last layer norm
of its stack; pooler and head stay as they are. In any other graph, each linear layer with zeros enough becomes one
`SparseLinear` (product, bias and activation), and large embedding tables are stored rounded, with standard operators
that undo it. Nothing else is touched.

Every constant that holds a parameter lists it in its metadata, as `spdtool.export.graph.trace` does, whatever its form:

    uint8                     packed (see `packing.py`); the metadata `shape` tells a vector from a matrix of one row
    float16                   a table, rounded
    int8, and NAME.scale      a table, rounded, with the scale of each row
    float32                   as it is; transposed where the name ends with `.T`
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from spdtool.errors import ModelError
from spdtool.export.graph.trace import INPUT_NAMES
from spdtool.export.graph.weights import PARAMETERS, TRANSPOSED
from spdtool_sparse_cpu import families, packing
from spdtool_sparse_cpu.families import Encoder
from spdtool_sparse_cpu.library import DOMAIN

OPERATORS_VERSION = 1
SHAPE = "shape"  # metadata of a packed constant: the parameter's shape
SCALE = ".scale"
DENSE = "dense:"  # before the name of a constant that is packed for one reader, and that another one reads as it was
SHARED = ".shared"
UNREAD = "unread:"
ZEROS = "zeros"  # metadata of the model: shapes of the parameters that are zero and that no node reads
DENSE_ABOVE = 0.4  # density above which a single dense product is the faster one: it changes no layouts
SMALL_TABLE = 4096  # weights; rounding a smaller table saves nothing that shows

GRAPH_OUTPUT = -1  # stands for a node among the readers of a tensor
LONGEST_ACTIVATION = 12  # nodes
ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Pow", "Erf", "Tanh", "Sigmoid", "Relu", "Gelu"}
PROBE = np.linspace(-6, 6, 97, dtype=np.float32)
PROBE_TOLERANCE = 1e-5  # the two forms of GELU differ by 5e-4
_erf = np.vectorize(math.erf, otypes=[np.float64])
ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def sparsify(proto: onnx.ModelProto, model: Any, values: str, embeddings: str) -> None:
    """Put the operators into the graph of `model`, in place.

    Args:
        proto: what `trace`, `clean` and `name_weights` of `spdtool.export.graph.trace` made of the model.
        values: how pruned matrices are stored: `fp32`, `fp16` or `int8`.
        embeddings: how the embeddings are stored.

    Raises:
        PackingError: a weight cannot be stored like that.
    """
    encoder = families.describe(model)
    if encoder is None or not fuse_encoder(proto, model, encoder, values, embeddings):
        pack_linears(proto, values)
        round_tables(proto, embeddings)
    add_unread(proto, model)
    proto.opset_import.add(domain=DOMAIN, version=OPERATORS_VERSION)


def fuse_encoder(proto: onnx.ModelProto, model: Any, encoder: Encoder, values: str, embeddings: str) -> bool:
    """Replace everything before the encoder's last layer norm, and that, by one `SparseEncoder`.

    Returns:
        False, with the graph untouched, where the inputs or the layer norms are not those of such an encoder.
    """
    graph = proto.graph
    inputs = {value.name for value in graph.input}
    norms = [node for node in graph.node if node.op_type == "LayerNormalization"]
    wanted = 2 * encoder.depth + 1
    held = {tensor.name: listed(tensor) for tensor in graph.initializer}
    ends = len(norms) >= wanted and encoder.last_norm in held.get(norms[wanted - 1].input[1], ())
    if not ends or not {"input_ids", "attention_mask"} <= inputs:
        return False
    cut = norms[wanted - 1].output[0]
    first = _takes_of_first(graph, cut)
    replaced = first or {cut}
    node = helper.make_node(
        "SparseEncoder",
        [*(name if name in inputs else "" for name in INPUT_NAMES), *encoder.tables, *encoder.layers],
        [min(replaced)],
        name="encoder",
        domain=DOMAIN,
        heads=encoder.heads,
        layers=encoder.depth,
        epsilon=encoder.epsilon,
        activation=encoder.activation,
        padding_id=encoder.padding_id,
        token_types=int(encoder.token_types),
        projection=int(encoder.projection),
        output="first" if first else "all",
    )
    rest = [node for node in graph.node if not replaced.intersection(node.output)]
    _read_instead(rest, dict.fromkeys(replaced, node.output[0]))
    _keep(graph, rest)
    _free_names(graph, {*encoder.tables, *encoder.layers})
    _set_nodes(graph, [node, *graph.node])
    for name in (*encoder.tables, *encoder.layers):
        table = name in encoder.tables
        array = model.get_parameter(name).detach().numpy()
        _add_packed(graph, name, [name], array, embeddings if table else values, table=table)
    return True


def pack_linears(proto: onnx.ModelProto, values: str) -> None:
    """Replace each linear layer whose matrix is sparse enough by a `SparseLinear`; a denser one stays as it is."""
    view = View(proto)
    found = (_linear(view, index) for index in range(len(view.nodes)))
    sparse = [part for part in found if part and np.count_nonzero(part.matrix) <= DENSE_ABOVE * part.matrix.size]
    aside = {part.constant.name: DENSE + part.constant.name for part in sparse}  # its name is for the packed form
    placed = {part.region[-1]: _sparse_linear(proto.graph, part) for part in sparse}
    gone = {index for part in sparse for index in part.region}
    for tensor in proto.graph.initializer:
        tensor.name = aside.get(tensor.name, tensor.name)
    _read_instead(view.nodes, aside)
    packed = {_packed_name(part): (listed(part.constant), part.matrix) for part in sparse}
    _keep(
        proto.graph,
        [placed.get(index, node) for index, node in enumerate(view.nodes) if index in placed or index not in gone],
    )
    for name, (names, matrix) in packed.items():
        _add_packed(proto.graph, name, names, matrix, values)


def round_tables(proto: onnx.ModelProto, embeddings: str) -> None:
    """Store the large tables that are only looked up as `embeddings` says, and undo it after each look-up."""
    if embeddings == "fp32":
        return
    view = View(proto)
    tables = {
        name: tensor
        for name, tensor in view.constants.items()
        if listed(tensor) and len(tensor.dims) == 2 and math.prod(tensor.dims) >= SMALL_TABLE and _looked_up(view, name)
    }
    for name, tensor in tables.items():
        stored, scales = packing.rounded(name, numpy_helper.to_array(tensor), embeddings)
        names = " ".join(listed(tensor))
        tensor.CopyFrom(numpy_helper.from_array(stored, name))
        tensor.metadata_props.add(key=PARAMETERS, value=names)
        if scales is not None:
            proto.graph.initializer.append(numpy_helper.from_array(scales[:, None], name + SCALE))
    nodes = list[onnx.NodeProto]()
    for node in view.nodes:
        looks_up = node.op_type == "Gather" and node.input[0] in tables
        nodes.extend(_look_up(node, embeddings) if looks_up else [node])
    _set_nodes(proto.graph, nodes)


def add_unread(proto: onnx.ModelProto, model: Any) -> None:
    """Store the parameters that no node reads, so that a checkpoint can be made of the file again.

    The exporter leaves out biases of zeros: the model's metadata has their shapes.
    """
    held = {name for tensor in proto.graph.initializer for name in listed(tensor)}
    zeros = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in held:
            array = parameter.detach().numpy()
            if array.any():
                tensor = numpy_helper.from_array(array, f"{UNREAD}{name}")
                tensor.metadata_props.add(key=PARAMETERS, value=name)
                proto.graph.initializer.append(tensor)
            else:
                zeros[name] = list(array.shape)
    if zeros:
        proto.metadata_props.add(key=ZEROS, value=json.dumps(zeros))


def decode_weights(proto: onnx.ModelProto) -> Iterator[tuple[str, np.ndarray]]:
    """`(parameter, float32 array)` of every parameter that the graph holds, one constant decoded at a time.

    A parameter that the graph holds in two places comes twice.

    Raises:
        ModelError: a constant is damaged.
    """
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    for tensor in proto.graph.initializer:
        names = listed(tensor)
        if names:
            array = _decoded(tensor, constants)
            yield from ((name, array) for name in names)
    for entry in proto.metadata_props:
        if entry.key == ZEROS:
            yield from _left_out(entry.value)


def listed(tensor: onnx.TensorProto) -> list[str]:
    """The parameters that a constant holds."""
    return next((entry.value.split() for entry in tensor.metadata_props if entry.key == PARAMETERS), [])


class View:
    """Keeps the nodes of a graph in order, its constants by name, and which nodes read each tensor."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.nodes = list(proto.graph.node)
        self.constants = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.opsets = list(proto.opset_import)
        self.readers: dict[str, list[int]] = {}
        self.makers: dict[str, int] = {}
        for index, node in enumerate(self.nodes):
            for name in _read_by(node):
                self.readers.setdefault(name, []).append(index)
            self.makers.update(dict.fromkeys(node.output, index))
        for value in proto.graph.output:
            self.readers.setdefault(value.name, []).append(GRAPH_OUTPUT)

    def weight(self, name: str) -> onnx.TensorProto | None:
        """The constant called `name`, if it is a float32 matrix that holds a parameter."""
        tensor = self.constants.get(name)
        fits = tensor is not None and tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2
        return tensor if fits and tensor is not None and listed(tensor) else None

    def is_vector(self, name: str, size: int) -> bool:
        """Whether `name` is a constant float32 vector of that size."""
        tensor = self.constants.get(name)
        return tensor is not None and list(tensor.dims) == [size] and tensor.data_type == onnx.TensorProto.FLOAT

    def is_scalar(self, name: str) -> bool:
        """Whether `name` is a constant with a single element, which leaves the shape of whatever it meets as it is."""
        return name in self.constants and list(self.constants[name].dims) in ([], [1])


@dataclass(frozen=True)
class Linear:
    """A linear layer as the graph has it.

    Attributes:
        constant: what holds its matrix.
        upright: whether the constant holds it as torch does.
        matrix: [out, in].
        bias: the constant with the bias; empty where there is none.
        region: indices of the nodes that compute it, ascending.
    """

    constant: onnx.TensorProto
    upright: bool
    matrix: np.ndarray
    input: str
    output: str
    bias: str
    activation: str
    region: list[int]


def _linear(view: View, index: int) -> Linear | None:
    """The linear layer whose product is the node at `index`, with its bias and activation."""
    node = view.nodes[index]
    if node.op_type == "MatMul":
        found = _operand(view, node.input[1])
    elif node.op_type == "Gemm":
        found = _gemm_operand(view, node)
    else:
        return None
    if found is None:
        return None
    constant, upright = found
    array = numpy_helper.to_array(constant)
    matrix = array if upright else array.T
    region, output = [index], node.output[0]
    bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
    if bias and not view.is_vector(bias, len(matrix)):
        return None
    if node.op_type == "MatMul":
        bias, output, region = _bias(view, index, len(matrix))
    activation, output, more = _activation(view, output)
    return Linear(constant, upright, matrix, node.input[0], output, bias, activation, sorted(region + more))


def _sparse_linear(graph: onnx.GraphProto, linear: Linear) -> onnx.NodeProto:
    return helper.make_node(
        "SparseLinear",
        [linear.input, _packed_name(linear), linear.bias or _zeros(graph, len(linear.matrix))],
        [linear.output],
        name=linear.output,
        domain=DOMAIN,
        activation=linear.activation,
    )


def _packed_name(linear: Linear) -> str:
    """The parameter after which the constant is called; if it is called after none, the first one that it holds."""
    own, names = linear.constant.name.removeprefix(DENSE).removesuffix(TRANSPOSED), listed(linear.constant)
    return own if own in names else names[0]


def _operand(view: View, name: str) -> tuple[onnx.TensorProto, bool] | None:
    """The constant behind the right operand of a product, and whether it holds the matrix as torch does."""
    constant = view.weight(name)
    if constant is not None:
        return constant, False
    maker = view.nodes[view.makers[name]] if name in view.makers else None
    if maker is None or maker.op_type != "Transpose" or _attribute(maker, "perm", [1, 0]) != [1, 0]:
        return None
    constant = view.weight(maker.input[0])
    return None if constant is None else (constant, True)


def _gemm_operand(view: View, node: onnx.NodeProto) -> tuple[onnx.TensorProto, bool] | None:
    plain = _attribute(node, "alpha", 1.0) == 1 and _attribute(node, "beta", 1.0) == 1
    if not plain or _attribute(node, "transA", 0):
        return None
    constant = view.weight(node.input[1])
    return None if constant is None else (constant, bool(_attribute(node, "transB", 0)))


def _bias(view: View, index: int, size: int) -> tuple[str, str, list[int]]:
    """Bias, output and nodes of the product at `index`, with the Add that is its only reader if that adds a bias."""
    product = view.nodes[index].output[0]
    readers = view.readers.get(product, [])
    if len(readers) == 1 and readers[0] != GRAPH_OUTPUT and view.nodes[readers[0]].op_type == "Add":
        add = view.nodes[readers[0]]
        others = [name for name in add.input if name != product]
        if len(others) == 1 and view.is_vector(others[0], size):
            return others[0], add.output[0], [index, readers[0]]
    return "", product, [index]


def _activation(view: View, start: str) -> tuple[str, str, list[int]]:
    """The activation that alone reads `start`: its name, its output, its nodes; `("none", start, [])` if there is none.

    Exporters spell GELU in many ways. So the elementwise nodes that follow are gathered until nothing outside of them
    reads `start` or anything between, and then what they compute is compared with each activation on some numbers.
    """
    inside, region = {start}, list[int]()
    while len(region) < LONGEST_ACTIVATION:
        reading = {index for name in inside for index in view.readers.get(name, ())}
        fitting = (index for index in sorted(reading.difference(region)) if _elementwise(view, index, inside))
        index = next(fitting, None)
        if index is None:
            break
        region.append(index)
        output = view.nodes[index].output[0]
        closed = all(set(view.readers.get(name, ())) <= set(region) for name in inside)
        inside.add(output)
        name = _recognised(view, start, output, sorted(region)) if closed else None
        if name is not None:
            return name, output, sorted(region)
    return "none", start, []


def _elementwise(view: View, index: int, inside: set[str]) -> bool:
    if index == GRAPH_OUTPUT:
        return False
    node = view.nodes[index]
    return node.op_type in ELEMENTWISE and all(name in inside or view.is_scalar(name) for name in node.input)


def _recognised(view: View, start: str, output: str, region: list[int]) -> str | None:
    """The activation that the nodes of `region` compute from `start` to `output`."""
    nodes = [view.nodes[index] for index in region]
    constants = {name for node in nodes for name in node.input if name in view.constants}
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n"]) for name in (start, output)]
    graph = helper.make_graph(nodes, "activation", ends[:1], ends[1:], [view.constants[name] for name in constants])
    evaluator = ReferenceEvaluator(helper.make_model(graph, opset_imports=view.opsets))
    with np.errstate(all="ignore"):
        (found,) = evaluator.run(None, {start: PROBE})
    fits = (
        name
        for name, function in ACTIVATIONS.items()
        if np.allclose(found, function(PROBE.astype(np.float64)), rtol=0, atol=PROBE_TOLERANCE)
    )
    return next(fits, None)


def _takes_of_first(graph: onnx.GraphProto, cut: str) -> set[str]:
    """The outputs of the nodes that read `cut`, if each of them takes token 0 of each row; else none."""
    scalars = {tensor.name: tensor for tensor in graph.initializer if not tensor.dims}
    found = set()
    for node in graph.node:
        if cut not in _read_by(node):
            continue
        index = scalars.get(node.input[1]) if node.op_type == "Gather" else None
        if index is None or _attribute(node, "axis", 0) != 1 or numpy_helper.to_array(index) != 0:
            return set()
        found.add(node.output[0])
    outputs = {value.name for value in graph.output}
    return set() if outputs.intersection({cut, *found}) else found


def _looked_up(view: View, name: str) -> bool:
    """Whether every reader of the constant is a look-up of its rows."""
    nodes = [view.nodes[index] if index != GRAPH_OUTPUT else None for index in view.readers.get(name, [])]
    return bool(nodes) and all(
        node is not None and node.op_type == "Gather" and node.input[0] == name and _attribute(node, "axis", 0) == 0
        for node in nodes
    )


def _look_up(node: onnx.NodeProto, kind: str) -> list[onnx.NodeProto]:
    """The look-up of a rounded table, as nodes that end in the output of the plain one."""
    (table, indices), output = node.input, node.output[0]
    stored, widened = f"{output}_stored", output if kind == "fp16" else f"{output}_widened"
    nodes = [
        helper.make_node("Gather", [table, indices], [stored], name=f"{node.name}_stored", axis=0),
        helper.make_node("Cast", [stored], [widened], name=f"{node.name}_widened", to=onnx.TensorProto.FLOAT),
    ]
    if kind == "int8":
        scales = f"{output}_scale"
        nodes.append(helper.make_node("Gather", [table + SCALE, indices], [scales], name=f"{node.name}_scale", axis=0))
        nodes.append(helper.make_node("Mul", [widened, scales], [output], name=node.name))
    return nodes


def _decoded(tensor: onnx.TensorProto, constants: dict[str, onnx.TensorProto]) -> np.ndarray:
    """The parameter that a constant holds, float32, in torch's shape."""
    try:
        array = numpy_helper.to_array(tensor)
        if tensor.data_type == onnx.TensorProto.UINT8:
            shape = next(entry.value for entry in tensor.metadata_props if entry.key == SHAPE)
            return packing.unpack(array, tensor.name).reshape([int(size) for size in shape.split()])
        if tensor.data_type == onnx.TensorProto.INT8:
            return array.astype(np.float32) * numpy_helper.to_array(constants[tensor.name + SCALE])
    except packing.PackingError:
        raise
    except (ValueError, KeyError, StopIteration, TypeError) as error:
        raise ModelError(f"{tensor.name}: the constant is damaged: {error}", "copy the file again") from None
    widened = array.astype(np.float32, copy=False)
    return widened.T if tensor.name.endswith(TRANSPOSED) else widened


def _left_out(text: str) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters of zeros that the model's metadata lists."""
    try:
        shapes = json.loads(text)
        if any(math.prod(shape) > packing.MOST_WEIGHTS for shape in shapes.values()):
            raise ValueError("a shape is too large")
        found = [(name, np.zeros(shape, np.float32)) for name, shape in shapes.items()]
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"the model's metadata is damaged: {error}", "copy the file again") from None
    yield from found


def _add_packed(
    graph: onnx.GraphProto, name: str, names: list[str], array: np.ndarray, kind: str, *, table: bool = False
) -> None:
    tensor = numpy_helper.from_array(packing.pack(name, array, kind, table=table), name)
    tensor.metadata_props.add(key=PARAMETERS, value=" ".join(names))
    tensor.metadata_props.add(key=SHAPE, value=" ".join(map(str, array.shape)))
    graph.initializer.append(tensor)


def _zeros(graph: onnx.GraphProto, size: int) -> str:
    """The constant that stands for the bias of a layer without one."""
    name = f"no_bias_{size}"
    if all(tensor.name != name for tensor in graph.initializer):
        graph.initializer.append(numpy_helper.from_array(np.zeros(size, np.float32), name))
    return name


def _free_names(graph: onnx.GraphProto, taken: set[str]) -> None:
    """Rename the constants that have a name in `taken`, and let none list a parameter in it.

    Parameters that are equal, such as biases of zeros, share one constant, which the rest of the graph may still read.
    """
    renamed, used = dict[str, str](), {tensor.name for tensor in graph.initializer}
    for tensor in graph.initializer:
        names = [name for name in listed(tensor) if name not in taken]
        if tensor.name in taken:
            fresh = names[0] if names and names[0] not in used else f"{tensor.name}{SHARED}"
            renamed[tensor.name] = fresh
            tensor.name = fresh
            used.add(fresh)
        for entry in [entry for entry in tensor.metadata_props if entry.key == PARAMETERS]:
            entry.value = " ".join(names)
    _read_instead(graph.node, renamed)


def _keep(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Keep those of `nodes` that an output depends on, and of everything else what they read."""
    needed, alive = {value.name for value in graph.output}, list[onnx.NodeProto]()
    for node in reversed(nodes):
        if needed.intersection(node.output):
            alive.append(node)
            needed.update(_read_by(node))
    made = needed.union(*(node.output for node in alive))
    _set_nodes(graph, alive[::-1])
    for part, names in ((graph.initializer, needed), (graph.value_info, made)):
        for index in reversed(range(len(part))):
            if part[index].name not in names:
                del part[index]


def _set_nodes(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]  # `del` would empty them
    del graph.node[:]
    graph.node.extend(copies)


def _read_by(node: onnx.NodeProto) -> set[str]:
    """The tensors that a node reads; those that graphs inside it take from outside as well."""
    inner = (part for attribute in node.attribute if attribute.HasField("g") for part in attribute.g.node)
    return {name for name in node.input if name}.union(*map(_read_by, inner))


def _read_instead(nodes: Any, names: dict[str, str]) -> None:
    for node in nodes:
        node.input[:] = [names.get(name, name) for name in node.input]


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    found = [helper.get_attribute_value(attribute) for attribute in node.attribute if attribute.name == name]
    return found[0] if found else default
