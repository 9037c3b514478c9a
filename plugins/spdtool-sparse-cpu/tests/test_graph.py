"""The graph with the operators computes the same as torch, and stores the weights of the checkpoint.

The operators of `reference.py`, in plain numpy, are evaluated with the rest of the graph by `onnx.reference`.
"""

import copy
import itertools

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from spdtool_sparse_cpu import graph as sparse_graph
from spdtool_sparse_cpu import packing
from spdtool_sparse_cpu.graph import SMALL_TABLE, decode_weights, describe_encoder, round_dense, sparsify
from toys import TRACED
from transformers.activations import ACT2FN

from spdtool.errors import ModelError
from spdtool.export.graph.trace import INPUT_NAMES, name_weights, quiet_exporter, remove_exporter_notes, trace_named
from spdtool.export.graph.weights import PARAMETERS, parameters_of
from spdtool.models.layers import find_prunable_weights

FUSED = ["bert", "roberta", "distilbert", "mpnet", "deberta-v2", "modernbert"]
FUSED += [pytest.param("xlm-roberta", marks=pytest.mark.long)]  # the code of RoBERTa
FUSED += [pytest.param("electra", marks=pytest.mark.long)]  # BERT's, behind a projection that has a test of its own
UNFUSED = {"hidden_act": "silu", "layers": 1}  # an activation that the operator does not have
KINDS = {name: name for name in ("mpnet", "deberta-v2", "modernbert")}  # of layer; the others have BERT's
TOLERANCE = 2e-5


def build(toys, architecture, *, zeros=0.8, noise=0.1, **config):
    """Build a tiny random classifier with a share of zeros in each prunable matrix and no two equal parameters.

    Its word embeddings are large enough to be rounded.
    """
    model = toys.classifier(architecture, **toys.TRACED | config)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=random))
        for weight in find_prunable_weights(model).values():
            weight.mul_(torch.rand(weight.shape, generator=random) >= zeros)
    return model


def inputs_of(toys, architecture):
    return [name for name in INPUT_NAMES if name != "token_type_ids" or toys.ARCHITECTURES[architecture][1]]


def standard(model, names, opset=18):
    """Export the graph in standard operators."""
    return trace_named(model, names, opset)


def export(toys, model, architecture, values="fp32", embeddings="fp32", opset=18, inputs=None):
    """Export the graph with the sparse operators."""
    proto = standard(model, inputs or inputs_of(toys, architecture), opset)
    sparsify(proto, model, values, embeddings)
    onnx.checker.check_model(proto)
    return proto


@pytest.fixture(scope="module")
def exported(toys):
    """Return `exported(architecture, values, embeddings)`: a model and its sparse graph, traced once a session."""
    traced = {}

    def make(architecture, values="fp32", embeddings="fp32"):
        if architecture not in traced:
            model = build(toys, architecture)
            traced[architecture] = model, standard(model, inputs_of(toys, architecture)).SerializeToString()
        model, proto = copy.deepcopy(traced[architecture][0]), onnx.ModelProto.FromString(traced[architecture][1])
        sparsify(proto, model, values, embeddings)
        onnx.checker.check_model(proto)
        return model, proto

    return make


def batches(names, *, pad=0, empty_row=True):
    """Make inputs by name, with the shapes and paddings that most often go wrong."""
    random = np.random.default_rng(0)

    def batch(mask, pair=False):
        mask = np.asarray(mask, np.int64)
        columns = {
            "input_ids": np.where(mask, random.integers(5, TRACED["vocab_size"], mask.shape), pad),
            "attention_mask": mask,
            "token_type_ids": mask * (np.arange(mask.shape[1]) >= mask.shape[1] // 2) * pair,
        }
        return {name: columns[name].astype(np.int64) for name in names}

    right_padded = np.arange(9)[None, :] < np.array([9, 4, 1, 6])[:, None]
    cases = {
        "one row": batch(np.ones((1, 7))),
        "one token": batch(np.ones((1, 1))),
        "one token each": batch(np.ones((3, 1))),
        "padding on the right": batch(right_padded),
        "padding on the left": batch(right_padded[:, ::-1]),
        "pairs": batch(right_padded, pair=True),
        "pairs, padding on the left": batch(right_padded[:, ::-1], pair=True),
        "holes": batch(right_padded & (np.arange(9) % 3 != 1)),
        "long": batch(np.ones((2, 40))),
    }
    cases["hidden tokens"] = batch(np.ones((2, 6)))
    if "attention_mask" in names:  # masked, but not padding: they count in the positions
        cases["hidden tokens"]["attention_mask"][0, 2:5] = 0
    if empty_row:
        cases["a row without any real token"] = batch(right_padded * np.array([[1], [0], [1], [1]]))
    return cases


def logits(model, inputs):
    with torch.no_grad():
        return model(**{name: torch.from_numpy(column) for name, column in inputs.items()}).logits.numpy()


class GatherElements(OpRun):
    """The standard operator; onnx.reference requires as many indices as data along the other axes."""

    def _run(self, data, indices, axis=0):
        data = data[
            tuple(
                slice(None) if axis_index == axis % data.ndim else slice(length)
                for axis_index, length in enumerate(indices.shape)
            )
        ]
        return (np.take_along_axis(data, indices, axis),)


def assert_same(reference, model, proto, inputs, tolerance=TOLERANCE):
    evaluator = ReferenceEvaluator(proto, new_ops=[*reference.OPERATORS, GatherElements])
    for case, batch in inputs.items():
        with np.errstate(divide="ignore", invalid="ignore"):  # buckets of relative positions: the logarithm of 0
            (actual,) = evaluator.run(None, batch)
        assert actual.dtype == np.float32
        assert np.abs(actual - logits(model, batch)).max() <= tolerance, case


def with_weights(model, proto):
    """Fill the model with the weights of the file; return the names that the file lacks."""
    stored_arrays = {stored.name: stored.array for stored in decode_weights(proto)}
    missing = []
    with torch.no_grad():
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in stored_arrays:
                assert stored_arrays[name].shape == tuple(parameter.shape)
                assert stored_arrays[name].dtype == np.float32
                parameter.copy_(torch.from_numpy(np.array(stored_arrays[name])))
            else:
                missing.append(name)
    return missing


def operators(proto):
    return [node.op_type for node in proto.graph.node if node.domain == "spdtool"]


def plain_parameters(proto):
    """Return the names of the float32 constants that store a parameter unpacked."""
    return {
        tensor.name
        for tensor in proto.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and parameters_of(tensor)
    }


@pytest.mark.parametrize("architecture", FUSED)
def test_families_become_one_operator(exported, reference, architecture):
    model, proto = exported(architecture)
    if architecture == "modernbert" and not hasattr(model.config, "layer_types"):
        pytest.skip("before transformers 5, its configuration has other words")
    assert operators(proto) == ["SparseEncoder"]
    assert {node.op_type for node in proto.graph.node} <= {
        "SparseEncoder",
        "Gemm",
        "Tanh",
        "Relu",
        "Div",
        "Erf",
        "Add",
        "Mul",
        "LayerNormalization",
    }
    attributes = {entry.name: helper.get_attribute_value(entry) for entry in proto.graph.node[0].attribute}
    assert attributes["output"] == b"first"
    assert attributes.get("kind", b"bert").decode() == KINDS.get(architecture, "bert")
    assert not any(".layer" in name or "embeddings" in name for name in plain_parameters(proto))
    assert len(proto.graph.value_info) < 18
    assert_same(reference, model, proto, batches([value.name for value in proto.graph.input]))


def test_an_unusual_deberta_gets_sparse_linear_layers(toys, reference):
    """Its buckets have matrices of their own."""
    model = build(toys, "deberta-v2", layers=1, share_att_key=False)
    assert describe_encoder(model) is None
    proto = export(toys, model, "deberta-v2")
    assert operators(proto) == ["SparseLinear"] * len(find_prunable_weights(model))
    names = find_prunable_weights(model)
    assert not plain_parameters(proto).intersection({*names, *(f"{name}.T" for name in names)})
    some = batches([value.name for value in proto.graph.input])
    assert_same(reference, model, proto, {name: some[name] for name in ("one token", "padding on the left")})


@pytest.mark.parametrize("architecture", FUSED)
def test_every_parameter_is_in_the_file_to_the_last_bit(exported, architecture):
    model, proto = exported(architecture)
    before = {name: value.detach().numpy() for name, value in model.named_parameters(remove_duplicate=False)}
    stored_arrays = {stored.name: stored.array for stored in decode_weights(proto)}
    assert set(stored_arrays) == set(before)
    for name, value in before.items():
        assert np.array_equal(stored_arrays[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("architecture", FUSED)
def test_rounded_weights_are_those_of_the_file(exported, reference, architecture):
    """With the file's own weights in it, torch's model gives the same logits: the arithmetic is right."""
    for values, embeddings in itertools.product(("fp16", "int8"), ("fp16", "int8", "int6")):
        check_rounded(*exported(architecture, values, embeddings), reference, values, embeddings)


def check_rounded(model, proto, reference, values, embeddings):
    """Fill the model with the weights of the file; check which changed, by how much, and the logits."""
    zeros = {name: int((weight == 0).sum()) for name, weight in find_prunable_weights(model).items()}
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    assert with_weights(model, proto) == []
    assert zeros == {name: int((weight == 0).sum()) for name, weight in find_prunable_weights(model).items()}
    changed = {name for name, value in model.named_parameters() if not torch.equal(before[name], value)}
    assert set(find_prunable_weights(model)) <= changed
    assert any("embeddings" in name for name in changed)
    assert not any("bias" in name.split(".") or "norm" in name.lower() or "classifier" in name for name in changed)
    tables = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)}
    for name in changed:
        storage = embeddings if name.removesuffix(".weight") in tables else values
        # int8 and int6: from below half a step to one
        bound = {"fp16": 0.0005, "int8": 0.008, "int6": 0.033}[storage]
        assert (model.get_parameter(name) - before[name]).abs().max() <= bound * before[name].abs().max(), name
    inputs = batches([value.name for value in proto.graph.input])
    assert_same(reference, model, proto, {name: inputs[name] for name in ("one token", "padding on the left")})


def test_a_large_pooler_is_int8_where_matrices_are(exported, reference, monkeypatch):
    monkeypatch.setattr(sparse_graph, "SMALL_TABLE", 500)
    formats = {"fp16": TensorProto.FLOAT, "int8": TensorProto.INT8, "int8-blocks": TensorProto.INT8}
    for values, storage in formats.items():
        model, proto = exported("bert", values, "fp32")
        (stored,) = [
            tensor for tensor in proto.graph.initializer if "bert.pooler.dense.weight" in parameters_of(tensor)
        ]
        assert stored.data_type == storage, values
        before = model.bert.pooler.dense.weight.detach().clone()
        assert with_weights(model, proto) == []
        error = (model.bert.pooler.dense.weight - before).abs()
        step = before.abs().amax(dim=1, keepdim=True) / 127
        raised = model.bert.pooler.dense.weight.abs() <= 1.001 * step
        assert ((error <= 0.501 * step) | raised).all()
        assert bool(error.any()) == (storage == TensorProto.INT8)
        assert_same(reference, model, proto, {"one token": batches(proto_inputs(proto))["one token"]})


def proto_inputs(proto):
    return [value.name for value in proto.graph.input]


def test_only_second_factors_become_int8_and_a_transposed_one_keeps_the_scales_of_its_rows():
    random = np.random.default_rng(0)
    weight = random.normal(size=(70, 64)).astype(np.float32) * np.linspace(1, 9, 70, dtype=np.float32)[:, None]
    constants = []
    for name, array in (("layer.weight.T", weight.T), ("first", weight[:64].T @ weight[:64])):
        tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
        tensor.metadata_props.add(key=PARAMETERS, value=name.removesuffix(".T"))
        constants.append(tensor)
    nodes = [
        helper.make_node("MatMul", ["first", "x"], ["y"]),
        helper.make_node("MatMul", ["y", "layer.weight.T"], ["z"]),
    ]
    x = random.normal(size=(64, 64)).astype(np.float32)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "z")]
    graph = helper.make_graph(nodes, "dense", [values[0]], [values[1]], constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    round_dense(proto)
    assert [tensor.data_type for tensor in proto.graph.initializer] == [
        TensorProto.INT8,
        TensorProto.FLOAT,
        TensorProto.FLOAT,
    ]
    stored = {stored.name: stored for stored in decode_weights(proto)}
    assert (stored["layer.weight"].storage, stored["first"].storage) == ("int8", "fp32")
    rounded, scales = packing.round_weights("w", weight, "int8")
    assert np.array_equal(stored["layer.weight"].array, rounded * scales[:, None])
    result = ReferenceEvaluator(proto).run(None, {"x": x})[0]
    assert np.allclose(result, stored["first"].array @ x @ stored["layer.weight"].array.T, rtol=1e-4, atol=1e-2)


SPELLINGS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "none",
    "quick_gelu": "none",
    "tanh": "none",
    "linear": "none",
}


class Activated(torch.nn.Module):
    """Linear layers side by side, each with another activation of transformers."""

    def __init__(self):
        super().__init__()
        self.parts = torch.nn.ModuleDict({name: torch.nn.Linear(4, 6) for name in SPELLINGS})

    def forward(self, x):
        return torch.stack([ACT2FN[name](layer(x)) for name, layer in self.parts.items()])


@pytest.mark.parametrize("opset", [18, 20])
def test_activations_are_recognised_by_their_function(reference, opset):
    model, x = Activated().eval(), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in model.parts.values():
            layer.weight.mul_((torch.arange(24) % 3 == 1).reshape(6, 4))
    with quiet_exporter():
        proto = torch.onnx.export(model, (x,), dynamo=True, opset_version=opset, verbose=False).model_proto
    remove_exporter_notes(proto)
    name_weights(proto, model)
    sparse_graph.pack_linears(proto, "fp32")
    proto.opset_import.add(domain="spdtool", version=1)
    activations = {
        node.input[1].split(".")[1]: helper.get_attribute_value(node.attribute[0]).decode()
        for node in proto.graph.node
        if node.op_type == "SparseLinear"
    }
    assert activations == SPELLINGS
    assert not {"Erf", "Gelu", "Relu", "Pow"}.intersection(node.op_type for node in proto.graph.node)
    (after,) = ReferenceEvaluator(proto, new_ops=reference.OPERATORS).run(None, {proto.graph.input[0].name: x.numpy()})
    assert np.allclose(after, model(x).detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("spelling", [pytest.param("gelu_new", marks=pytest.mark.long), "relu"])
def test_activations_of_the_encoder(toys, reference, spelling):
    model = build(toys, "bert", layers=1, hidden_act=spelling)
    proto = export(toys, model, "bert")
    assert operators(proto) == ["SparseEncoder"]
    assert_same(reference, model, proto, {"pairs": batches(INPUT_NAMES)["pairs"]})


UNUSUAL = {"another activation": UNFUSED, "a decoder": {"is_decoder": True, "layers": 1}}


def test_an_unusual_bert_is_not_taken_for_the_operator_s(toys):
    for case, config in UNUSUAL.items():
        assert describe_encoder(build(toys, "bert", **config)) is None, case


@pytest.mark.long  # `make test` exports other encoders whose graph stays
@pytest.mark.parametrize("config", UNUSUAL.values(), ids=UNUSUAL)
def test_an_unusual_bert_keeps_its_graph(toys, reference, config):
    model = build(toys, "bert", **config)
    proto = export(toys, model, "bert")
    assert set(operators(proto)) == {"SparseLinear"}
    assert_same(reference, model, proto, {"pairs": batches(INPUT_NAMES)["pairs"]})


def test_layer_norms_that_differ_keep_the_graph(toys):
    model = build(toys, "bert")
    model.bert.encoder.layer[0].output.LayerNorm.eps = 1e-3
    assert describe_encoder(model) is None


def test_inputs_that_the_tokenizer_does_not_give(toys, reference):
    model = build(toys, "bert", layers=1)
    proto = export(toys, model, "bert", inputs=["input_ids", "attention_mask"])
    assert operators(proto) == ["SparseEncoder"]
    assert proto.graph.node[0].input[2] == ""
    assert_same(reference, model, proto, batches(["input_ids", "attention_mask"]))


@pytest.mark.long
def test_without_a_mask_the_encoder_is_not_recognised(toys, reference):
    model = build(toys, "bert", layers=1)
    proto = export(toys, model, "bert", inputs=["input_ids"])
    assert set(operators(proto)) == {"SparseLinear"}
    assert_same(reference, model, proto, {"one row": batches(["input_ids"])["one row"]})


def test_roberta_with_token_types_and_another_padding_token(toys, reference):
    model = build(toys, "roberta", layers=1, type_vocab_size=2, pad_token_id=4)
    proto = export(toys, model, "roberta", inputs=list(INPUT_NAMES))
    assert_same(reference, model, proto, batches(list(INPUT_NAMES), pad=4))


def test_embedding_tables_are_stored_whole_however_many_zeros_they_have(toys):
    model = build(toys, "bert")
    with torch.no_grad():
        model.bert.embeddings.token_type_embeddings.weight.zero_()
        model.bert.embeddings.word_embeddings.weight[20:] = 0
    proto = export(toys, model, "bert", "fp16", "fp16")
    tables = [
        packing.read_header(numpy_helper.to_array(tensor))
        for tensor in proto.graph.initializer
        if "_embeddings" in tensor.name
    ]
    assert [header.gap_bits for header in tables] == [0] * 3


@pytest.mark.parametrize(
    "electra",
    [
        pytest.param({}, id="projected"),
        # without a projection the graph is BERT's
        pytest.param({"embedding_size": 32, "layers": 1}, id="not projected", marks=pytest.mark.long),
    ],
)
def test_electra_of_both_sizes(toys, reference, electra):
    model = build(toys, "electra", **electra)
    proto = export(toys, model, "electra")
    attributes = {item.name: helper.get_attribute_value(item) for item in proto.graph.node[0].attribute}
    assert attributes["projection"] == (not electra)
    assert len(proto.graph.node[0].input) == 3 + 5 + 2 * attributes["projection"] + 16 * model.config.num_hidden_layers
    assert_same(reference, model, proto, {"pairs": batches(list(INPUT_NAMES))["pairs"]})


class Mean(torch.nn.Module):
    """A head that averages over the tokens, in place of one that takes the first."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, features, **_):
        return self.head(features.mean(dim=1, keepdim=True).expand(features.shape))


def test_a_head_that_reads_every_token(toys, reference):
    model = build(toys, "electra", layers=1)
    model.classifier = Mean(model.classifier)
    proto = export(toys, model, "electra")
    attributes = {item.name: helper.get_attribute_value(item) for item in proto.graph.node[0].attribute}
    assert (operators(proto), attributes["output"]) == (["SparseEncoder"], b"all")
    assert_same(reference, model, proto, batches(list(INPUT_NAMES)))


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_parameters_that_share_a_constant(toys, reference, architecture):
    """A fresh model has equal biases and norms, which the exporter stores once under one name."""
    model = build(toys, architecture, noise=0)
    proto = export(toys, model, architecture, "fp16", "fp16")
    stored_arrays = {stored.name: stored.array for stored in decode_weights(proto)}
    assert set(stored_arrays) == {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert len({tensor.name for tensor in proto.graph.initializer}) == len(proto.graph.initializer)
    assert with_weights(model, proto) == []
    assert_same(reference, model, proto, {"one row": batches([value.name for value in proto.graph.input])["one row"]})


@pytest.mark.parametrize("architecture", ["electra", "mpnet"])
def test_an_all_zero_and_a_symmetric_matrix(toys, reference, architecture):
    model = build(toys, architecture)
    weights = [weight for weight in find_prunable_weights(model).values() if weight.shape[0] == weight.shape[1]]
    with torch.no_grad():
        weights[0].zero_()
        weights[1].zero_()
        weights[2].copy_(weights[2].triu() + weights[2].triu(1).T)
    proto = export(toys, model, architecture, "fp32", "int8")
    assert with_weights(model, proto) == []
    assert_same(reference, model, proto, {"one row": batches([value.name for value in proto.graph.input])["one row"]})


def test_a_dense_matrix_stays_a_dense_product(toys, reference):
    model = build(toys, "mpnet", **UNFUSED)
    name, weight = next(iter(find_prunable_weights(model).items()))
    with torch.no_grad():
        weight.add_(1.0)
    proto = export(toys, model, "mpnet")
    assert operators(proto) == ["SparseLinear"] * 5
    assert f"{name}.T" in plain_parameters(proto)
    assert_same(reference, model, proto, {"one row": batches(INPUT_NAMES[:2])["one row"]})


def test_a_model_without_zeros_has_no_operator_in_another_family(toys):
    model = build(toys, "mpnet", zeros=0.0, **UNFUSED)
    names = inputs_of(toys, "mpnet")
    assert operators(export(toys, model, "mpnet")) == []
    assert [node.op_type for node in export(toys, model, "mpnet").graph.node] == [
        node.op_type for node in standard(model, names).graph.node
    ]


def test_tables_that_are_small_or_read_otherwise_stay(toys):
    model = build(toys, "deberta-v2", **UNFUSED)
    proto = export(toys, model, "deberta-v2", "fp16", "int8")
    kinds = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    assert kinds["deberta.embeddings.word_embeddings.weight"] == onnx.TensorProto.INT8
    assert kinds["deberta.embeddings.word_embeddings.weight.scale"] == onnx.TensorProto.FLOAT
    assert kinds["deberta.encoder.rel_embeddings.weight"] == onnx.TensorProto.FLOAT  # a layer norm reads it
    model = build(toys, "mpnet", **UNFUSED)
    proto = export(toys, model, "mpnet", "fp16", "fp16")
    kinds = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    assert kinds["mpnet.embeddings.word_embeddings.weight"] == onnx.TensorProto.FLOAT16
    assert model.mpnet.encoder.relative_attention_bias.weight.numel() < SMALL_TABLE
    assert kinds["mpnet.encoder.relative_attention_bias.weight"] == onnx.TensorProto.FLOAT


def linear_graph(nodes, weight, **constants):
    """Make a graph from `x` [n, in] to `y` whose constant `w` stores the parameter `layer.weight`."""
    tensor = numpy_helper.from_array(weight, "w")
    tensor.metadata_props.add(key=PARAMETERS, value="layer.weight")
    initializers = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in constants.items()]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", None]) for name in ("x", "y")]
    graph = helper.make_graph(
        [helper.make_node(*node[:3], **node[3]) for node in nodes], "g", ends[:1], ends[1:], [tensor, *initializers]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


WEIGHT = np.where(np.arange(24) % 3 == 1, np.arange(24) - 9.5, 0).astype(np.float32).reshape(6, 4)
BIAS = np.arange(6)
FORMS = {  # nodes, weight as stored in the graph, expected operators and activation
    "product": ([("MatMul", ["x", "w"], ["y"], {})], WEIGHT.T, ["SparseLinear"], "none"),
    "transposed": (
        [("Transpose", ["w"], ["t"], {"perm": [1, 0]}), ("MatMul", ["x", "t"], ["y"], {})],
        *(WEIGHT, ["SparseLinear"], "none"),
    ),
    "bias first": (
        [("MatMul", ["x", "w"], ["p"], {}), ("Add", ["b", "p"], ["y"], {})],
        *(WEIGHT.T, ["SparseLinear"], "none"),
    ),
    "gemm": ([("Gemm", ["x", "w", "b"], ["y"], {"transB": 1})], WEIGHT, ["SparseLinear"], "none"),
    "gemm, upright": ([("Gemm", ["x", "w", "b"], ["y"], {})], WEIGHT.T, ["SparseLinear"], "none"),
    "gemm without bias": ([("Gemm", ["x", "w"], ["y"], {"transB": 1})], WEIGHT, ["SparseLinear"], "none"),
    "gemm, relu": (
        [("Gemm", ["x", "w", "b"], ["p"], {"transB": 1}), ("Relu", ["p"], ["y"], {})],
        *(WEIGHT, ["SparseLinear"], "relu"),
    ),
    "gemm, scaled": ([("Gemm", ["x", "w", "b"], ["y"], {"transB": 1, "alpha": 2.0})], WEIGHT, [], ""),
    "gemm, broadcast bias": ([("Gemm", ["x", "w", "one"], ["y"], {"transB": 1})], WEIGHT, [], ""),
    "read twice": (
        [("MatMul", ["x", "w"], ["p"], {}), ("Relu", ["p"], ["r"], {}), ("Add", ["p", "r"], ["y"], {})],
        *(WEIGHT.T, ["SparseLinear"], "none"),
    ),
    "read twice, and still an activation": (
        [("MatMul", ["x", "w"], ["p"], {}), ("Relu", ["p"], ["r"], {}), ("Mul", ["r", "one"], ["y"], {})],
        *(WEIGHT.T, ["SparseLinear"], "relu"),
    ),
    "scaled": (
        [("MatMul", ["x", "w"], ["p"], {}), ("Mul", ["p", "half"], ["q"], {}), ("Relu", ["q"], ["y"], {})],
        *(WEIGHT.T, ["SparseLinear"], "none"),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_linear_layer(reference, form):
    nodes, weight, expected, activation = FORMS[form]
    proto = linear_graph(nodes, np.ascontiguousarray(weight), b=BIAS, one=np.ones(1), half=np.array(0.5))
    x = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    (before,) = ReferenceEvaluator(proto).run(None, {"x": x})
    sparse_graph.pack_linears(proto, "fp32")
    proto.opset_import.add(domain="spdtool", version=1)
    assert operators(proto) == expected
    activations = [helper.get_attribute_value(node.attribute[0]).decode() for node in proto.graph.node if node.domain]
    assert activations == [activation] * len(expected)
    (after,) = ReferenceEvaluator(proto, new_ops=reference.OPERATORS).run(None, {"x": x})
    assert np.allclose(before, after, atol=1e-5)
    if expected:
        assert np.array_equal(next(decode_weights(proto)).array, WEIGHT)
        assert all(tensor.name != "w" for tensor in proto.graph.initializer)


def test_a_matrix_with_another_consumer_is_stored_twice(reference):
    nodes = [
        *[("MatMul", ["x", "w"], ["p"], {}), ("ReduceSum", ["w"], ["s"], {"keepdims": 0})],
        ("Add", ["p", "s"], ["y"], {}),
    ]
    proto = linear_graph(nodes, np.ascontiguousarray(WEIGHT.T))
    x = np.ones((2, 4), np.float32)
    (before,) = ReferenceEvaluator(proto).run(None, {"x": x})
    sparse_graph.pack_linears(proto, "fp32")
    proto.opset_import.add(domain="spdtool", version=1)
    (after,) = ReferenceEvaluator(proto, new_ops=reference.OPERATORS).run(None, {"x": x})
    assert np.allclose(before, after)
    assert sorted(tensor.name for tensor in proto.graph.initializer) == ["dense:w", "layer.weight", "no_bias_6"]


def test_two_exports_are_the_same_to_the_last_byte(toys):
    for architecture in ("electra", "modernbert"):
        first, second = (export(toys, build(toys, architecture), architecture, "int8", "int8") for _ in range(2))
        assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)


def test_a_damaged_constant_is_refused_by_name(toys):
    proto = export(toys, build(toys, "bert"), "bert", "fp16", "fp16")
    tensor = next(tensor for tensor in proto.graph.initializer if "query.weight" in tensor.name)
    intact = tensor.raw_data
    for damaged in (intact[:-1], intact[:-1] + bytes([intact[-1] ^ 1]), b"", bytes(len(intact))):
        tensor.raw_data = damaged
        with pytest.raises(ModelError, match=tensor.name):
            list(decode_weights(proto))
    tensor.raw_data = intact
    shape = next(entry for entry in tensor.metadata_props if entry.key == "shape")
    for bad_shape in ("32", "32 33", "x", "-1 32 0"):
        shape.value = bad_shape
        with pytest.raises(ModelError, match=tensor.name):
            list(decode_weights(proto))
    tensor.metadata_props.remove(shape)
    with pytest.raises(ModelError, match=tensor.name):
        list(decode_weights(proto))


def test_a_weight_that_is_not_finite_is_refused_by_name(toys):
    model = build(toys, "bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(packing.PackingError, match=r"bert\.encoder\.layer\.1\.output\.dense\.weight: .*not finite"):
        export(toys, model, "bert")
