"""The operator computes only the states that a head reads: token 0, a mean, every real token, or padding too."""

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from spdtool_sparse_cpu.graph import sparsify
from spdtool_sparse_cpu.reading import find_reads
from transformers import AutoModel, AutoModelForQuestionAnswering, AutoModelForTokenClassification

from spdtool.export.graph.trace import trace_named

NAMES = ["input_ids", "attention_mask"]
TOLERANCE = 2e-5


def build(toys, architecture, auto, **options):
    """Build a tiny encoder with another head than a classifier's."""
    config = toys.classifier(architecture, layers=1, **options).config
    torch.manual_seed(0)
    return auto.from_config(config, attn_implementation="eager").eval()


def batch(mask):
    random = np.random.default_rng(0)
    return {"input_ids": random.integers(5, 20, mask.shape) * mask, "attention_mask": mask.astype(np.int64)}


RIGHT = (np.arange(9) < np.array([[9], [4], [1]])).astype(np.int64)


def outputs_of(model, inputs):
    with torch.no_grad():
        results = model(**{name: torch.from_numpy(column) for name, column in inputs.items()})
    return [result.numpy() for result in results.to_tuple()]


def check_real_tokens(reference, model):
    """Export; every output is the model's, at real tokens. Returns what the operator computes."""
    proto = trace_named(model, NAMES, 18)
    sparsify(proto, model, "fp32", "fp32")
    onnx.checker.check_model(proto)
    evaluator = ReferenceEvaluator(proto, new_ops=reference.OPERATORS)
    for mask in (RIGHT, RIGHT[:, ::-1], RIGHT[:1]):
        inputs = batch(mask)
        for computed, expected in zip(evaluator.run(None, inputs), outputs_of(model, inputs), strict=True):
            assert computed.shape == expected.shape
            if expected.shape[:2] == mask.shape:  # a token's
                computed, expected = computed[mask != 0], expected[mask != 0]
            assert np.abs(computed - expected).max() <= TOLERANCE
    (node,) = (node for node in proto.graph.node if node.domain == "spdtool")
    return next(helper.get_attribute_value(entry).decode() for entry in node.attribute if entry.name == "output")


@pytest.mark.parametrize(
    ("architecture", "auto"),
    [
        ("bert", AutoModelForTokenClassification),
        pytest.param("bert", AutoModelForQuestionAnswering, marks=pytest.mark.long),
        pytest.param("mpnet", AutoModel, marks=pytest.mark.long),
        pytest.param("deberta-v2", AutoModelForTokenClassification, marks=pytest.mark.long),
        pytest.param("modernbert", AutoModelForTokenClassification, marks=pytest.mark.long),
    ],
)
def test_heads_of_tokens_get_every_real_token(toys, reference, architecture, auto):
    assert check_real_tokens(reference, build(toys, architecture, auto)) == "real"


def test_a_mean_over_real_tokens_is_the_operator_s(toys, reference):
    model = toys.classifier("modernbert", layers=1, classifier_pooling="mean")
    if not hasattr(model.config, "layer_types"):
        pytest.skip("before transformers 5, its configuration has other words")
    assert check_real_tokens(reference, model) == "mean"


def head(nodes, outputs):
    """A graph whose hidden states are a product of a table's rows, and what stands behind them."""
    rng = np.random.default_rng(0)
    constants = {
        "table": rng.normal(size=(9, 6)).astype(np.float32),
        "matrix": rng.normal(size=(6, 6)).astype(np.float32),
        "axis": np.array([1]),
        "last": np.array([-1]),
        "least": np.array(1e-9, np.float32),
        "first": np.array(0),
        "second": np.array(1),
    }
    encoder = [
        helper.make_node("Gather", ["table", "input_ids"], ["embedded"]),
        helper.make_node("MatMul", ["embedded", "matrix"], ["hidden"]),
        helper.make_node("Unsqueeze", ["attention_mask", "last"], ["mask_column"]),
        helper.make_node("Cast", ["mask_column"], ["mask"], to=onnx.TensorProto.FLOAT),
    ]
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.INT64, ["batch", "sequence"]) for name in NAMES]
    results = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph([*encoder, *nodes], "toy", values, results, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


def node(operator, inputs, output, **attributes):
    return helper.make_node(operator, inputs.split(), [output], **attributes)


HEADS = {
    "first: token 0": ([node("Gather", "hidden first", "y", axis=1), node("Relu", "y", "z")], "first"),
    "another token": ([node("Gather", "hidden second", "y", axis=1), node("Relu", "y", "z")], "all"),
    "token 0 and every token": (
        [node("Gather", "hidden first", "y", axis=1), node("Unsqueeze", "y axis", "w"), node("Add", "hidden w", "z")],
        "real",
    ),
    "the mean of a sum": (
        [
            node("Mul", "hidden mask", "a"),
            node("ReduceSum", "a axis", "sum", keepdims=0),
            node("ReduceSum", "mask axis", "count", keepdims=0),
            node("Clip", "count least", "clipped"),
            node("Div", "sum clipped", "y"),
            node("Relu", "y", "z"),
        ],
        "mean",
    ),
    "a mean over padding too": ([node("ReduceMean", "hidden axis", "y", keepdims=0), node("Relu", "y", "z")], "all"),
    "a sum over real tokens": (
        [node("Mul", "hidden mask", "a"), node("ReduceSum", "a axis", "y", keepdims=0), node("Relu", "y", "z")],
        "real",
    ),
    "sums from the left": ([node("CumSum", "hidden second", "y"), node("Relu", "y", "z")], "all"),
    "sums from the right": ([node("CumSum", "hidden second", "y", reverse=1), node("Relu", "y", "z")], "all"),
}


def test_heads_are_told_apart_by_what_they_compute():
    for name, (nodes, expected) in HEADS.items():
        reads = find_reads(head(nodes, ["z"]), "hidden", 6)
        assert reads.output == expected, name
        assert reads.tensors == ({"y"} if expected in ("first", "mean") else {"hidden"}), name


def test_hidden_states_that_are_an_output_are_computed_for_real_tokens():
    nodes = [node("Gather", "hidden first", "y", axis=1), node("Relu", "y", "z")]
    assert find_reads(head(nodes, ["hidden", "z"]), "hidden", 6) == ("real", {"hidden"})
