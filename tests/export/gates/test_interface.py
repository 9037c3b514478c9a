"""The gate on interfaces: names, order, types and axes of inputs and outputs, and versions that runtimes read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from spdtool.errors import GateError
from spdtool.export.gates import interface
from spdtool.tasks.embedding import SENTENCE_HEAD
from spdtool.tasks.head import SEQUENCE_CLASSIFIER, Head
from spdtool.tasks.spans import SPAN_FINDER
from spdtool.tasks.tokens import TAGGER

NAMES = ("input_ids", "attention_mask")
AXES = ("batch", "sequence")


def tensor(name: str, *axes: str | int, kind: int = TensorProto.INT64) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, axes)


def result(name: str, *axes: str | int, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, axes)


def refusals(check: Callable[[Any], None], faults: dict[str, tuple[Any, str]]) -> None:
    for title, (values, message) in faults.items():
        with pytest.raises(GateError, match=message):
            check(values)
        assert title


def test_inputs_have_the_names_order_type_and_free_axes_that_clients_expect() -> None:
    ids, mask = (tensor(name, *AXES) for name in NAMES)
    interface.check_inputs([ids, mask], NAMES)
    faults: dict[str, tuple[list[onnx.ValueInfoProto], str]] = {
        "another order": ([mask, ids], "takes attention_mask, input_ids; the checkpoint takes input_ids"),
        "another name": ([tensor("ids", *AXES), mask], "takes ids, attention_mask"),
        "one too many": ([ids, mask, tensor("position_ids", *AXES)], "takes input_ids, attention_mask, position_ids"),
        "one lost": ([ids], "takes input_ids; the checkpoint"),
        "another type": ([ids, tensor("attention_mask", *AXES, kind=TensorProto.INT32)], "is of type INT32"),
        "one row only": ([tensor("input_ids", 1, "sequence"), mask], r"shape \[1, 'sequence'\]"),
        "one length only": ([ids, tensor("attention_mask", "batch", 16)], r"attention_mask of shape \['batch', 16\]"),
        "one axis twice": ([tensor("input_ids", "n", "n"), tensor("attention_mask", "n", "n")], "two free axes"),
        "axes of another name": ([ids, tensor("attention_mask", "sequence", "batch")], "attention_mask of shape"),
    }
    refusals(lambda values: interface.check_inputs(values, NAMES), faults)


def test_outputs_have_the_names_type_and_shape_that_clients_expect() -> None:
    states = result("last_hidden_state", *AXES, 8)
    right: list[tuple[Head, list[onnx.ValueInfoProto], bool]] = [
        (SEQUENCE_CLASSIFIER, [result("logits", "batch", 3)], True),
        (SEQUENCE_CLASSIFIER, [result("logits", "rows", "labels")], True),
        (TAGGER, [result("logits", *AXES, 3)], True),
        (SPAN_FINDER, [result("start_logits", *AXES), result("end_logits", *AXES)], True),
        (SENTENCE_HEAD, [result("sentence_embedding", "batch", 3), states], True),
        (SENTENCE_HEAD, [result("sentence_embedding", "batch", 3)], False),
    ]
    for head, values, needs_all in right[:4] + right[5:]:
        interface.check_outputs(values, head, 3, needs_all=needs_all)
    faults: dict[str, tuple[tuple[Head, list[onnx.ValueInfoProto]], str]] = {
        "another name": (
            (SEQUENCE_CLASSIFIER, [result("output_0", "batch", 3)]),
            "gives output_0; clients look for logits",
        ),
        "one too many": ((SEQUENCE_CLASSIFIER, [result("logits", "batch", 3), states]), "gives logits, last_hidden"),
        "fp16": ((SEQUENCE_CLASSIFIER, [result("logits", "batch", 3, kind=TensorProto.FLOAT16)]), "type FLOAT16"),
        "one row only": ((SEQUENCE_CLASSIFIER, [result("logits", 1, 3)]), r"logits of shape \[1, 3\]"),
        "other labels": ((SEQUENCE_CLASSIFIER, [result("logits", "batch", 2)]), "3 numbers a row"),
        "tokens": ((SEQUENCE_CLASSIFIER, [result("logits", *AXES, 3)]), "logits of shape"),
        "no tokens": ((TAGGER, [result("logits", "batch", 3)]), "logits of shape"),
        "ends first": ((SPAN_FINDER, [result("end_logits", *AXES), result("start_logits", *AXES)]), "gives end_logits"),
        "no vectors of tokens": ((SENTENCE_HEAD, [result("sentence_embedding", "batch", 3)]), "clients look for sent"),
    }
    refusals(lambda case: interface.check_outputs(case[1], case[0], 3, needs_all=True), faults)


def model_of(*nodes: onnx.NodeProto, opset: int = 18, ir: int = 10) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "graph", [tensor("input_ids", *AXES)], [result("logits", "batch", 2)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)


def test_versions_are_those_of_the_recipe_and_of_older_runtimes() -> None:
    interface.check_versions(model_of(), 18)
    interface.check_versions(model_of(opset=23, ir=helper.find_min_ir_version_for([helper.make_opsetid("", 23)])), 23)
    faults = {
        "a newer set": (model_of(opset=22), "needs operator set 22; export.opset is 18"),
        "a newer form": (model_of(ir=12), "IR version 12; runtimes read 10"),
    }
    refusals(lambda proto: interface.check_versions(proto, 18), faults)


def test_an_epsilon_is_one_of_the_checkpoint() -> None:
    model = torch.nn.Sequential(torch.nn.LayerNorm(4, eps=1e-12))
    model.config = SimpleNamespace(to_dict=lambda: {"layer_norm_eps": 1e-6, "hidden_size": 4})
    reference: Any = SimpleNamespace(model=model)
    node = helper.make_node("LayerNormalization", ["x", "w"], ["y"], epsilon=1e-12)
    for epsilon in (1e-12, 1e-6):
        node.attribute[0].f = epsilon
        interface.check_epsilons(model_of(node), reference)
    node.attribute[0].f = 1e-5
    with pytest.raises(GateError, match="has the epsilon 1e-05; the checkpoint has 1e-12, 1e-06"):
        interface.check_epsilons(model_of(node), reference)


def test_each_token_is_looked_up_under_its_own_number() -> None:
    """Token 7 becomes token 3: of a large vocabulary, no random batch holds it."""

    class Table(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = torch.nn.Embedding(9, 4)

        def get_input_embeddings(self) -> torch.nn.Embedding:
            return self.words

    reference: Any = SimpleNamespace(model=Table())
    table = numpy_helper.from_array(reference.model.words.weight.detach().numpy(), "words.weight")
    table.metadata_props.add(key="parameters", value="words.weight")
    seven, three = (numpy_helper.from_array(np.array(number), f"number {number}") for number in (7, 3))
    look_up = helper.make_node("Gather", ["widened", "input_ids"], ["logits"])
    nodes = [
        helper.make_node("Identity", ["words.weight"], ["widened"]),
        helper.make_node("Equal", ["input_ids", "number 7"], ["is seven"]),
        helper.make_node("Where", ["is seven", "number 3", "input_ids"], ["others"]),
        helper.make_node("Identity", ["input_ids"], ["the same"]),
        look_up,
    ]
    proto = model_of(*nodes)
    proto.graph.initializer.extend([table, seven, three])
    for name in ("input_ids", "the same"):
        proto.graph.node[-1].input[1] = name
        interface.check_lookups(proto, reference)
    proto.graph.node[-1].input[1] = "others"
    with pytest.raises(GateError, match="looks 1 of 9 tokens up under other numbers, among them token 7"):
        interface.check_lookups(proto, reference)


def test_weights_beside_the_model_are_in_files_that_the_target_names() -> None:
    proto = model_of()
    weight = numpy_helper.from_array(np.zeros(4, np.float32), "weight")
    weight.external_data.add(key="location", value="model.onnx_data")
    proto.graph.initializer.append(weight)
    interface.check_external_files(proto, [Path("onnx/model.onnx"), Path("onnx/model.onnx_data")])
    with pytest.raises(GateError, match=r"has weight in model.onnx_data; the target names model\.onnx"):
        interface.check_external_files(proto, [Path("onnx/model.onnx")])


def graph_of(*nodes: onnx.NodeProto, **constants: np.ndarray) -> onnx.GraphProto:
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    return helper.make_graph(nodes, "toy", [tensor("x", 2)], [result("y", 2)], tensors)


def test_a_file_that_draws_random_numbers_is_refused() -> None:
    add = helper.make_node("Add", ["x", "noise"], ["y"])
    interface.check_determinism(graph_of(helper.make_node("Dropout", ["x"], ["y"])))
    for node in (
        helper.make_node("RandomNormalLike", ["x"], ["noise"], scale=1e-6),
        helper.make_node("Dropout", ["x", "ratio", "training"], ["noise"]),
        helper.make_node("If", ["c"], ["noise"], then_branch=graph_of(helper.make_node("RandomUniform", [], ["y"]))),
    ):
        with pytest.raises(GateError, match="draws random numbers"):
            interface.check_determinism(graph_of(node, add))


def test_constants_that_nothing_reads_are_refused() -> None:
    add = helper.make_node("Add", ["x", "weight"], ["y"])
    weight = np.ones(1000, np.float32)
    interface.check_unread_constants(graph_of(add, weight=weight, shape=np.ones(1, np.int64)))
    with pytest.raises(GateError, match="4,000 bytes of constants that nothing reads, 'copy' among them"):
        interface.check_unread_constants(graph_of(add, weight=weight, copy=weight))
