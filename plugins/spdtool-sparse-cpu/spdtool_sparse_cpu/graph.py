"""Put the operators of this plugin into an ONNX graph, and decode the weights of such a graph.

An encoder of a family that `families.py` or `modernbert.py` describes becomes one `SparseEncoder`, which
replaces everything up to the last layer norm of its stack; pooler and head stay as they are. In any
other graph, each linear layer with zeros enough becomes one `SparseLinear` (product, bias and
activation), and large embedding tables are stored rounded, with standard operators that undo it.
Nothing else is changed.

Every constant that stores a parameter lists it in its metadata, as `spdtool.export.graph.trace`
does, in any form:

    uint8                     packed (see `packing.py`); the metadata `shape` tells a vector from a matrix of one row
    float16                   a table, rounded
    int8, and NAME.scale      a table or a dense matrix, rounded, with the scale of each row
    float32                   as it is; transposed where the name ends with `.T`

A packed constant `encoder.*` stores no parameter: buckets of distances or rotary frequencies, which follow from the
configuration, or zeros for a bias that the model does not have.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterable, Iterator, Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper
from transformers import PreTrainedModel

from spdtool.errors import ModelError
from spdtool.export.graph.protobuf import inputs_of, metadata_of, rename_inputs, replace_items, tensors_by_name
from spdtool.export.graph.trace import INPUT_NAMES
from spdtool.export.graph.weights import PARAMETERS, TRANSPOSED, StoredWeight, parameters_of
from spdtool_sparse_cpu import packing
from spdtool_sparse_cpu.families import Encoder, describe_post_norm
from spdtool_sparse_cpu.library import DOMAIN
from spdtool_sparse_cpu.matching import (
    GRAPH_OUTPUT,
    GraphView,
    LinearLayer,
    attribute_of,
    match_linear,
)
from spdtool_sparse_cpu.modernbert import describe_modernbert
from spdtool_sparse_cpu.reading import find_reads

OPERATORS_VERSION = 1
SHAPE = "shape"  # metadata of a packed constant: the parameter's shape
SCALE = ".scale"
DENSE = "dense:"  # before the name of a constant that is packed for one reader, while another reads it as it was
SHARED = ".shared"
ROUNDED = "rounded:"  # before the name of a dense matrix in int8, whose name its float32 form has
UNREAD = "unread:"
ZEROS = "zeros"  # metadata of the model: shapes of the parameters that are zero and that no node reads
DENSE_ABOVE = 0.4  # density above which a single dense product is the faster one: it changes no layouts
SMALL_TABLE = 4096  # weights; rounding a smaller table saves nothing that shows


def sparsify(proto: onnx.ModelProto, model: PreTrainedModel, values: str, embeddings: str) -> None:
    """Put the operators into the graph of `model`, in place.

    Args:
        proto: as `spdtool.export.graph.trace` traces and names it.
        values: how pruned matrices are stored: `fp32`, `fp16`, `int8` or `int8-blocks`; see `packing.pack`.
        embeddings: how the embeddings are stored; int6 in a `SparseEncoder` alone, elsewhere as int8.

    Raises:
        PackingError: a weight cannot be stored like that.
    """
    encoder = describe_encoder(model)
    if encoder is None or not fuse_encoder(proto, model, encoder, values, embeddings):
        pack_linears(proto, values)
        round_tables(proto, embeddings)
    if values in ("int8", packing.INT8_BLOCKS):
        round_dense(proto)
    add_unread(proto, model)
    proto.opset_import.add(domain=DOMAIN, version=OPERATORS_VERSION)


def describe_encoder(model: PreTrainedModel) -> Encoder | None:
    """Describe the encoder of a model; None where no operator computes it as a whole."""
    return describe_post_norm(model) or describe_modernbert(model)


def fuse_encoder(
    proto: onnx.ModelProto, model: PreTrainedModel, encoder: Encoder, values: str, embeddings: str
) -> bool:
    """Replace everything up to and with the encoder's last layer norm by one `SparseEncoder`.

    Returns:
        False, with the graph unchanged, where the inputs or the layer norms are not those of such
        an encoder.
    """
    graph = proto.graph
    hidden = _encoder_output(graph, encoder)
    if hidden is None:
        return False
    # The less a head reads, the less is computed: padding not at all, or the last layer for token 0 alone.
    reads = find_reads(proto, hidden, model.config.hidden_size)
    inputs = {value.name for value in graph.input}
    constants = [constant.name for constant in encoder.inputs]
    node = helper.make_node(
        "SparseEncoder",
        [*(name if name in inputs else "" for name in INPUT_NAMES), *constants],
        [min(reads.tensors)],
        name="encoder",
        domain=DOMAIN,
        heads=encoder.heads,
        layers=encoder.depth,
        epsilon=encoder.epsilon,
        activation=encoder.activation,
        padding_id=encoder.padding_id,
        token_types=int(encoder.token_types),
        projection=int(encoder.projection),
        output=reads.output,
    )
    if encoder.kind != "bert":
        for name, value in {"kind": encoder.kind, **encoder.further}.items():
            node.attribute.append(helper.make_attribute(name, value))
    later_nodes = [node for node in graph.node if not reads.tensors.intersection(node.output)]
    rename_inputs(later_nodes, dict.fromkeys(reads.tensors, node.output[0]))
    _keep_needed(graph, later_nodes)
    # The packed constants get the names of their parameters, which dense ones may still have.
    _release_names(graph, set(encoder.parameters))
    _set_nodes(graph, [node, *graph.node])
    for constant in dict.fromkeys(constants):
        name, numbers, is_table = encoder.inputs[constants.index(constant)]
        if numbers is not None:
            graph.initializer.append(numpy_helper.from_array(packing.pack(name, numbers, "fp32"), name))
            continue
        array = model.get_parameter(name).detach().numpy()
        _add_packed(graph, name, [name], array, embeddings if is_table else values, table=is_table)
    return True


def _encoder_output(graph: onnx.GraphProto, encoder: Encoder) -> str | None:
    """Name the output of the encoder's last layer norm; None where the graph is not that of such an encoder."""
    inputs = {value.name for value in graph.input}
    constants = tensors_by_name(graph)
    norms = []
    for node in graph.node:
        if node.op_type == "LayerNormalization" and node.input[0] not in constants:  # nor one of relative positions
            norms.append(node)
    norm_count = 2 * encoder.depth + 1  # one behind the embeddings, two in each layer
    if len(norms) < norm_count or not {"input_ids", "attention_mask"} <= inputs:
        return None
    last_norm = norms[norm_count - 1]
    gain = constants.get(last_norm.input[1])
    return str(last_norm.output[0]) if gain is not None and encoder.last_norm in parameters_of(gain) else None


def pack_linears(proto: onnx.ModelProto, values: str) -> None:
    """Replace each linear layer whose matrix is sparse enough by a `SparseLinear`; a denser one stays as it is."""
    graph, view = proto.graph, GraphView(proto)
    layers = []
    for index in range(len(view.nodes)):
        layer = match_linear(view, index)
        if layer is not None and np.count_nonzero(layer.matrix) <= DENSE_ABOVE * layer.matrix.size:
            layers.append(layer)
    replacements: dict[int, onnx.NodeProto] = {}
    replaced = set[int]()
    dense_names: dict[str, str] = {}  # the name of a constant is for its packed form
    for layer in layers:
        dense_names[layer.constant.name] = DENSE + layer.constant.name
    for layer in layers:
        # At the last of its nodes all its inputs are computed.
        replacements[layer.nodes[-1]] = _sparse_linear(graph, layer)
        replaced.update(layer.nodes)
    for tensor in graph.initializer:
        tensor.name = dense_names.get(tensor.name, tensor.name)
    rename_inputs(view.nodes, dense_names)
    packed: dict[str, tuple[list[str], np.ndarray]] = {}
    for layer in layers:
        packed[_packed_name(layer)] = parameters_of(layer.constant), layer.matrix
    nodes = []
    for index, node in enumerate(view.nodes):
        if index in replacements:
            nodes.append(replacements[index])
        elif index not in replaced:
            nodes.append(node)
    _keep_needed(graph, nodes)
    for name, (parameters, matrix) in packed.items():
        _add_packed(graph, name, parameters, matrix, values)


def _sparse_linear(graph: onnx.GraphProto, layer: LinearLayer) -> onnx.NodeProto:
    return helper.make_node(
        "SparseLinear",
        [layer.input, _packed_name(layer), layer.bias or _zero_bias(graph, len(layer.matrix))],
        [layer.output],
        name=layer.output,
        domain=DOMAIN,
        activation=layer.activation,
    )


def _packed_name(layer: LinearLayer) -> str:
    """Name the packed constant after the parameter that the dense one is called after, else after its first one."""
    name = layer.constant.name.removeprefix(DENSE).removesuffix(TRANSPOSED)
    parameters = parameters_of(layer.constant)
    return name if name in parameters else parameters[0]


def _zero_bias(graph: onnx.GraphProto, size: int) -> str:
    """Name the constant that stands for the bias of a layer without one."""
    name = f"no_bias_{size}"
    if name not in tensors_by_name(graph):
        graph.initializer.append(numpy_helper.from_array(np.zeros(size, np.float32), name))
    return name


def round_tables(proto: onnx.ModelProto, embeddings: str) -> None:
    """Store the large tables that are only looked up in `embeddings`, and widen the rows after each look-up."""
    if embeddings == "fp32":
        return
    embeddings = "int8" if embeddings == "int6" else embeddings  # ONNX has no operator that widens 6 bits
    view = GraphView(proto)
    table_names = set[str]()
    for name, tensor in view.constants.items():
        is_large = len(tensor.dims) == 2 and math.prod(tensor.dims) >= SMALL_TABLE
        if is_large and parameters_of(tensor) and _is_only_looked_up(view, name):
            table_names.add(name)
            _round_table(proto.graph, tensor, embeddings)
    nodes: list[onnx.NodeProto] = []
    for node in view.nodes:
        if node.op_type == "Gather" and node.input[0] in table_names:
            nodes += _look_up_nodes(node, embeddings)
        else:
            nodes.append(node)
    _set_nodes(proto.graph, nodes)


def _round_table(graph: onnx.GraphProto, tensor: onnx.TensorProto, embeddings: str) -> None:
    name, parameters = tensor.name, " ".join(parameters_of(tensor))
    rounded, scales = packing.round_weights(name, numpy_helper.to_array(tensor), embeddings)
    tensor.CopyFrom(numpy_helper.from_array(rounded, name))
    tensor.metadata_props.add(key=PARAMETERS, value=parameters)
    if scales is not None:
        graph.initializer.append(numpy_helper.from_array(scales[:, None], name + SCALE))


def _is_only_looked_up(view: GraphView, name: str) -> bool:
    """Whether every reader of the constant is a look-up of its rows."""
    readers = view.readers.get(name, [])
    if not readers or GRAPH_OUTPUT in readers:
        return False
    for index in readers:
        node = view.nodes[index]
        if node.op_type != "Gather" or node.input[0] != name or attribute_of(node, "axis", 0) != 0:
            return False
    return True


def _look_up_nodes(node: onnx.NodeProto, storage: str) -> list[onnx.NodeProto]:
    """Build the look-up of a rounded table, as nodes that end in the output of the plain one."""
    (table, indices), output = node.input, node.output[0]
    stored, widened = f"{output}_stored", f"{output}_widened"
    if storage == "fp16":
        widened = output
    nodes = [
        helper.make_node("Gather", [table, indices], [stored], name=f"{node.name}_stored", axis=0),
        helper.make_node("Cast", [stored], [widened], name=f"{node.name}_widened", to=onnx.TensorProto.FLOAT),
    ]
    if storage == "int8":
        scales = f"{output}_scale"
        nodes.append(helper.make_node("Gather", [table + SCALE, indices], [scales], name=f"{node.name}_scale", axis=0))
        nodes.append(helper.make_node("Mul", [widened, scales], [output], name=node.name))
    return nodes


def round_dense(proto: onnx.ModelProto) -> None:
    """Store the large matrices that dense products read, such as a pooler's, in int8, with nodes that widen them.

    They are widened once, when a session opens: onnxruntime folds what depends on constants alone.
    """
    view = GraphView(proto)
    widening: list[onnx.NodeProto] = []
    for name, tensor in view.constants.items():
        is_large = len(tensor.dims) == 2 and math.prod(tensor.dims) >= SMALL_TABLE
        is_float = tensor.data_type == onnx.TensorProto.FLOAT
        if is_large and is_float and parameters_of(tensor) and _is_only_multiplied(view, name):
            widening += _round_dense(proto.graph, tensor)
    if widening:
        _set_nodes(proto.graph, [*widening, *view.nodes])


def _is_only_multiplied(view: GraphView, name: str) -> bool:
    """Whether every reader of the constant is a product with it as the second factor."""
    readers = view.readers.get(name, [])
    if not readers or GRAPH_OUTPUT in readers:
        return False
    for index in readers:
        node = view.nodes[index]
        if node.op_type not in ("MatMul", "Gemm") or list(node.input).index(name) != 1:
            return False
    return True


def _round_dense(graph: onnx.GraphProto, tensor: onnx.TensorProto) -> list[onnx.NodeProto]:
    """Round a constant to int8, under a name of its own, and build the nodes that widen it to the old name."""
    name, parameters = tensor.name, " ".join(parameters_of(tensor))
    transposed = name.endswith(TRANSPOSED)
    matrix = numpy_helper.to_array(tensor)
    rounded, scales = packing.round_weights(name, matrix.T if transposed else matrix, "int8")
    assert scales is not None, "int8 has scales"
    stored = f"{ROUNDED}{name}"  # what stands behind the name tells that it is transposed
    scales = scales[:, None]
    if transposed:
        rounded, scales = np.ascontiguousarray(rounded.T), scales.T
    tensor.CopyFrom(numpy_helper.from_array(rounded, stored))
    tensor.metadata_props.add(key=PARAMETERS, value=parameters)
    graph.initializer.append(numpy_helper.from_array(scales, stored + SCALE))
    return [
        helper.make_node("Cast", [stored], [f"{stored}_widened"], name=f"{stored}_widened", to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", [f"{stored}_widened", stored + SCALE], [name], name=stored),
    ]


def add_unread(proto: onnx.ModelProto, model: PreTrainedModel) -> None:
    """Store the parameters that no node reads, so that a checkpoint can be made of the file again.

    The exporter leaves out biases of zeros: the model's metadata lists their shapes.
    """
    stored = set[str]()
    for tensor in proto.graph.initializer:
        stored.update(parameters_of(tensor))
    zero_shapes = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in stored:
            continue
        array = parameter.detach().numpy()
        if array.any():
            tensor = numpy_helper.from_array(array, f"{UNREAD}{name}")
            tensor.metadata_props.add(key=PARAMETERS, value=name)
            proto.graph.initializer.append(tensor)
        else:
            zero_shapes[name] = list(array.shape)
    if zero_shapes:
        proto.metadata_props.add(key=ZEROS, value=json.dumps(zero_shapes))


def decode_weights(proto: onnx.ModelProto) -> Iterator[StoredWeight]:
    """Yield every parameter in the graph, one constant decoded at a time; one that is stored twice comes twice.

    Raises:
        ModelError: a constant is damaged.
    """
    constants = tensors_by_name(proto.graph)
    for tensor in proto.graph.initializer:
        parameters = parameters_of(tensor)
        if parameters:
            array, storage = _decode(tensor, constants)
            for name in parameters:
                levels = packing.INT6_LIMIT if storage == "int6" else packing.INT8_LIMIT
                yield StoredWeight(name, array, storage, scale_axis=0, levels=levels)  # one scale a row
    metadata = metadata_of(proto)
    if ZEROS in metadata:
        for name, zeros in _decode_zeros(metadata[ZEROS]):
            yield StoredWeight(name, zeros)


def _decode(tensor: onnx.TensorProto, constants: Mapping[str, onnx.TensorProto]) -> tuple[np.ndarray, str]:
    """Decode the parameter that a constant stores to float32, in torch's shape, and name its storage."""
    try:
        array = numpy_helper.to_array(tensor)
        if tensor.data_type == onnx.TensorProto.UINT8:
            shape = [int(size) for size in metadata_of(tensor)[SHAPE].split()]
            storage = packing.read_header(array, tensor.name).values
            return packing.unpack(array, tensor.name).reshape(shape), storage
        if tensor.data_type == onnx.TensorProto.INT8:
            scales = numpy_helper.to_array(constants[tensor.name + SCALE])
            widened: np.ndarray = array.astype(np.float32) * scales
            return widened.T if tensor.name.endswith(TRANSPOSED) else widened, "int8"
    except packing.PackingError:  # says more than the general error below
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{tensor.name}: the constant is damaged: {error}", "copy the file again") from None
    storage = "fp16" if array.dtype == np.float16 else "fp32"
    widened = array.astype(np.float32, copy=False)
    if tensor.name.endswith(TRANSPOSED):
        widened = widened.T
    return widened, storage


def _decode_zeros(text: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the parameters of zeros that the model's metadata lists."""
    arrays: dict[str, np.ndarray] = {}
    try:
        shapes = json.loads(text)
        # A damaged file must not make the reader ask for terabytes.
        if any(math.prod(shape) > packing.MOST_WEIGHTS for shape in shapes.values()):
            raise ValueError("a shape is too large")
        for name, shape in shapes.items():
            arrays[name] = np.zeros(shape, np.float32)
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"the model's metadata is damaged: {error}", "copy the file again") from None
    yield from arrays.items()


def _add_packed(
    graph: onnx.GraphProto, name: str, parameters: list[str], array: np.ndarray, storage: str, *, table: bool = False
) -> None:
    """Add the packed form of an array as a constant that stores `parameters`."""
    tensor = numpy_helper.from_array(packing.pack(name, array, storage, table=table), name)
    tensor.metadata_props.add(key=PARAMETERS, value=" ".join(parameters))
    tensor.metadata_props.add(key=SHAPE, value=" ".join(map(str, array.shape)))
    graph.initializer.append(tensor)


def _release_names(graph: onnx.GraphProto, names: Container[str]) -> None:
    """Rename the constants that have one of `names`, and let none list a parameter of `names`.

    Parameters that are equal, such as biases of zeros, share one constant, which other nodes may
    still read.
    """
    renamed: dict[str, str] = {}
    used = set(tensors_by_name(graph))
    for tensor in graph.initializer:
        parameters = [name for name in parameters_of(tensor) if name not in names]
        if tensor.name in names:
            fresh_name = f"{tensor.name}{SHARED}"
            if parameters and parameters[0] not in used:
                fresh_name = parameters[0]
            renamed[tensor.name] = fresh_name
            tensor.name = fresh_name
            used.add(fresh_name)
        for entry in tensor.metadata_props:
            if entry.key == PARAMETERS:
                entry.value = " ".join(parameters)
    rename_inputs(graph.node, renamed)


def _keep_needed(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Set the nodes to those of `nodes` that an output depends on, and drop every constant that none of them reads."""
    needed = {value.name for value in graph.output}
    needed_nodes: list[onnx.NodeProto] = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed_nodes.append(node)
            needed.update(inputs_of(node))
    computed = needed.union(*(node.output for node in needed_nodes))
    _set_nodes(graph, needed_nodes[::-1])
    # Deleted one by one: to copy what remains would copy all weights.
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name not in needed:
            del graph.initializer[index]
    for index in reversed(range(len(graph.value_info))):
        if graph.value_info[index].name not in computed:
            del graph.value_info[index]


def _set_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]  # `del` would empty them
    replace_items(graph.node, copies)
