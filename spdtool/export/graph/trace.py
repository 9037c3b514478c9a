"""Trace a checkpoint to an ONNX graph of standard operators, whose weights have their state-dict names.

torch.onnx records the building machine's paths at each node, and folds the transposes of weights
into constants called `val_49`. Both are cleaned: each weight gets its state-dict name again, or
that name with `.T` where the file stores it transposed. Equal weights that share one constant are
listed in the constant's metadata.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import json
import logging
import math
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path

import numpy as np
import onnx
import torch
from google.protobuf.message import Message
from onnx import TensorProto, numpy_helper
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spdtool.errors import GateError, ModelError, first_line
from spdtool.export.graph.protobuf import keep_constants, rename_inputs, tensors_by_name
from spdtool.export.graph.weights import PARAMETERS, TRANSPOSED, Fingerprint, fingerprint, note_positions, parameters_of
from spdtool.export.target import MODEL_FILE
from spdtool.models.layers import TESTED_FAMILIES
from spdtool.models.load import load_model, load_tokenizer, save_tokenizer
from spdtool.models.sentence import sentence_settings
from spdtool.models.shrink import find_live_positions, shrink
from spdtool.run.fingerprint import hash_json
from spdtool.tasks.head import head_of_model

LARGEST_FILE = 2**31 - 2**20  # bytes; protobuf cannot write more: beyond, the weights go to model.onnx_data
INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids")
AXES = {0: "batch", 1: "sequence"}  # the names that Hugging Face's own exports have
EXAMPLE_SHAPE = (2, 9)  # the exporter would freeze an axis of length 1
ATTENTION_OPSET = 23  # the operator set that has Attention, which torch's own attention becomes
UNTESTED_HINT = f"families that are tested: {', '.join(TESTED_FAMILIES)}"
LONGEST_REASON = 200  # characters of an exporter's error; some first lines are essays
# Fields of a configuration that do not change a graph: names, the loss, and what the file notes about itself.
NO_STRUCTURE = {"id2label", "label2id", "problem_type", "architectures", "dtype", "torch_dtype"}
NO_STRUCTURE |= {"_name_or_path", "transformers_version"}
EXPORTER_LOGGERS = ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")


UNUSABLE = b""  # in place of a template
# Graphs without their weights, by what they depend on; None: nothing is cached.
_templates: MutableMapping[str, bytes] | None = None


@contextlib.contextmanager
def cached_traces(templates: MutableMapping[str, bytes] | None = None) -> Iterator[None]:
    """Trace models of one configuration once until the outermost such block ends, whatever their weights are.

    Args:
        templates: where the graphs are cached; default: where an outer block does, or in memory.
    """
    global _templates
    before = _templates
    if templates is not None:
        _templates = templates
    elif _templates is None:
        _templates = {}
    try:
        yield
    finally:
        _templates = before


def trace_checkpoint(checkpoint: Path, opset: int, *, shrinks: bool = True) -> onnx.ModelProto:
    """Trace a checkpoint to a clean float32 graph of ONNX operators, with weights by name.

    Heads and neurons that are zero as a whole are left out: the graph is smaller, and computes the same.

    Below operator set 23, attention is written out: fewer nodes than torch's own attention gives,
    and every architecture has it. From 23 on it is the operator Attention.

    Args:
        shrinks: False to trace dead heads and neurons like any others, for a target that looks for
            the full shapes.

    Raises:
        ModelError: the checkpoint cannot be read, or its architecture cannot be exported.
        GateError: an axis of the exported graph is not free.
    """
    model = load_model(checkpoint, eager=opset < ATTENTION_OPSET)
    names, positions = input_names(model, load_tokenizer(checkpoint)), {}
    if shrinks:
        positions = find_live_positions(model)
        model = shrink(model)
    proto = trace_named(model, names, opset)
    note_positions(proto, positions)
    return proto


def trace_named(model: PreTrainedModel, names: list[str], opset: int) -> onnx.ModelProto:
    """Trace a model to a graph without the exporter's notes, whose weights have their state-dict names.

    The graph is traced with random weights, and the model's are put into it. So it depends on the
    configuration alone, and a bias of zeros is not folded away.

    Args:
        names: inputs, as in `trace_model`.

    Raises:
        ModelError, GateError: as `trace_model`.
    """
    key = hash_json(repr((opset, *names, *_describe_structure(model))))
    template = None if _templates is None else _templates.get(key)
    if template is None:
        template = _trace_template(model, names, opset)
        if _templates is not None:
            _templates[key] = template
    if template == UNUSABLE:
        return _trace_cleanly(model, names, opset)
    proto = onnx.load_from_string(template)
    weights = dict(model.named_parameters(remove_duplicate=False))
    for tensor in proto.graph.initializer:
        if parameters := parameters_of(tensor):
            array = weights[parameters[0]].detach().numpy()
            stored = array.T if tensor.name.endswith(TRANSPOSED) else array
            tensor.raw_data = np.ascontiguousarray(stored).tobytes()
    merge_equal_weights(proto)
    return proto


def merge_equal_weights(proto: onnx.ModelProto) -> None:
    """Store equal parameters once, with all their names; later passes would drop all names but one."""
    first: dict[tuple[Fingerprint, Fingerprint], TensorProto] = {}
    replaced: dict[str, str] = {}
    for tensor in proto.graph.initializer:
        if names := parameters_of(tensor):
            # A name says its orientation for all: a constant that is one matrix and another's
            # transpose is none.
            stored = numpy_helper.to_array(tensor)
            parameter = stored.T if tensor.name.endswith(TRANSPOSED) else stored
            content = (fingerprint(stored), fingerprint(parameter))
            stored_first = first.setdefault(content, tensor)
            if stored_first is not tensor:
                joined = " ".join([*parameters_of(stored_first), *names])
                del stored_first.metadata_props[:]
                stored_first.metadata_props.add(key=PARAMETERS, value=joined)
                replaced[tensor.name] = stored_first.name
    keep_constants(proto.graph, tensors_by_name(proto.graph).keys() - replaced.keys())
    _rename(proto.graph, replaced)


def _trace_template(model: PreTrainedModel, names: list[str], opset: int) -> bytes:
    """Trace a model to a graph that lacks the values of its parameters, or UNUSABLE."""
    proto = _trace_cleanly(_randomize(model), names, opset)
    buffers = {fingerprint(values.numpy()) for values in model.buffers()}
    for tensor in proto.graph.initializer:
        if parameters_of(tensor):
            tensor.ClearField("raw_data")
            continue
        is_float = tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
        # What is no buffer either was computed from weights, and is right for these alone.
        if is_float and math.prod(tensor.dims) > 1 and fingerprint(numpy_helper.to_array(tensor)) not in buffers:
            return UNUSABLE
    template: bytes = proto.SerializeToString()
    return template


def _trace_cleanly(model: PreTrainedModel, names: list[str], opset: int) -> onnx.ModelProto:
    proto = trace_model(model, names, opset)
    remove_exporter_notes(proto)
    name_weights(proto, model)
    return proto


def _describe_structure(model: PreTrainedModel) -> tuple[object, ...]:
    """List what a graph depends on besides the values of parameters: code, configuration, shapes, shared weights."""
    # By identity: two parameters of equal values may differ in the next checkpoint, shared ones cannot.
    first_names: dict[int, str] = {}
    parameters = []
    for name, weight in model.named_parameters(remove_duplicate=False):
        shared_with = first_names.setdefault(id(weight), name)
        parameters.append((name, tuple(weight.shape), str(weight.dtype), shared_with))
    # Buffers become constants of the graph, and nothing replaces them.
    buffers = [(name, fingerprint(values.numpy())) for name, values in model.named_buffers()]
    config = {name: value for name, value in model.config.to_dict().items() if name not in NO_STRUCTURE}
    settings = json.dumps(config | {"labels": len(model.config.id2label or ())}, sort_keys=True, default=str)
    return (
        type(model),
        str(model),
        sentence_settings(model),
        settings,
        model.config._attn_implementation,
        *parameters,
        *buffers,
    )


def _randomize(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model and draw all its parameters anew, so that no two are alike."""
    random = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in random.parameters():
            weight.normal_(std=0.02, generator=generator)  # small, as encoders are initialised: nothing overflows
    return random


def save_folder(proto: onnx.ModelProto, checkpoint: Path, folder: Path) -> list[Path]:
    """Write the graph, with configuration and tokenizer of its checkpoint beside it; return what `write_model` does."""
    folder.mkdir(parents=True, exist_ok=True)
    model = load_model(checkpoint)
    model.config.save_pretrained(folder)
    settings = sentence_settings(model)
    if settings is not None:
        settings.write(folder)
    save_tokenizer(load_tokenizer(checkpoint), folder)
    return write_model(proto, folder / MODEL_FILE)


def graph_properties(proto: onnx.ModelProto) -> dict[str, object]:
    """Count the nodes and sparse constants of a graph, and tell its operator set."""
    opset = max(entry.version for entry in proto.opset_import if not entry.domain)
    properties: dict[str, object] = {"nodes": len(proto.graph.node), "opset": opset}
    if proto.graph.sparse_initializer:
        properties["sparse"] = len(proto.graph.sparse_initializer)
    return properties


def input_names(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """List the model's inputs, in order: those that the tokenizer gives and the model takes."""
    accepted = inspect.signature(model.forward).parameters
    return [name for name in INPUT_NAMES if name in tokenizer.model_input_names and name in accepted]


def trace_model(model: PreTrainedModel, names: list[str], opset: int) -> onnx.ModelProto:
    """Export a model with torch.onnx (dynamo), with free axes `batch` and `sequence`.

    Args:
        names: inputs, each int64 [batch, sequence]; the outputs are those of the model's head.

    Raises:
        ModelError: the exporter cannot do it.
        GateError: an input's axis is frozen in the graph.
    """
    example = {name: torch.ones(EXAMPLE_SHAPE, dtype=torch.long) for name in names}
    example["input_ids"] *= 2
    try:
        with quiet_exporter(), torch.no_grad():
            program = torch.onnx.export(
                model,
                (),
                kwargs=example,
                dynamo=True,
                opset_version=opset,
                input_names=names,
                output_names=list(head_of_model(model).outputs),
                dynamic_shapes={name: dict(AXES) for name in names},
                verbose=False,
            )
            assert program is not None
            proto: onnx.ModelProto = program.model_proto
    except Exception as error:  # torch.export raises whatever the model's own code runs into
        cause: BaseException = error
        while cause.__cause__ is not None:  # the outer errors say pages about the exporter
            cause = cause.__cause__
        reason = textwrap.shorten(first_line(cause), LONGEST_REASON, placeholder=" ...")
        raise ModelError(f"torch.onnx cannot export {model.config.model_type!r}: {reason}", UNTESTED_HINT) from None
    for value in proto.graph.input:
        axes = [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        if axes != list(AXES.values()):
            raise GateError(f"the exporter froze the axes of {value.name} as {axes}", "report the architecture")
    opsets = {entry.version for entry in proto.opset_import if not entry.domain}
    if opsets != {opset}:
        raise GateError(f"the exporter wrote opset {opsets} instead of {opset}", "choose another export.opset")
    return proto


def remove_exporter_notes(proto: Message) -> None:
    """Remove what the exporter noted in the graph: stack traces with paths of this machine, node histories.

    Two exports of one checkpoint are byte-identical afterwards.
    """
    for field, value in proto.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            proto.ClearField(field.name)
        elif field.message_type is not None:
            # A repeated field holds messages; a single one is the message itself.
            messages = [value] if isinstance(value, Message) else value
            for message in messages:
                if field.message_type.name == "TensorProto":
                    message.ClearField("doc_string")
                    message.ClearField("metadata_props")
                else:
                    remove_exporter_notes(message)


def name_weights(proto: onnx.ModelProto, model: PreTrainedModel) -> None:
    """Name the constants that store a parameter, transposed or not, after it; they are recognised by their content.

    A second constant with the same content, which the exporter makes of a weight that is used
    twice, is removed.
    """
    origins = _parameters_by_constant(proto, model)
    used_names = set(tensors_by_name(proto.graph))
    renamed: dict[str, str] = {}
    duplicates: dict[str, str] = {}
    for tensor in proto.graph.initializer:
        candidates = origins.get(tensor.name, {})
        if not candidates:
            continue
        if tensor.name not in candidates:  # the exporter has named some weights rightly
            # A matrix of zeros has several candidates. The transposed first: it is the operand of a product.
            by_likelihood = sorted(candidates, key=lambda name: not name.endswith(TRANSPOSED))
            name = next((name for name in by_likelihood if name not in used_names), None)
            if name is None:
                duplicates[tensor.name] = next(iter(candidates))
                continue
            renamed[tensor.name] = name
            used_names.add(name)
        is_transposed = renamed.get(tensor.name, tensor.name).endswith(TRANSPOSED)
        parameters = []
        for name, parameter in candidates.items():
            # of two matrices of zeros, one may equal the transpose of the other: a constant has one orientation
            if name.endswith(TRANSPOSED) == is_transposed:
                parameters.append(parameter)
        tensor.metadata_props.add(key=PARAMETERS, value=" ".join(dict.fromkeys(parameters)))
    keep_constants(proto.graph, tensors_by_name(proto.graph).keys() - duplicates.keys())
    _rename(proto.graph, renamed | duplicates)


def _parameters_by_constant(proto: onnx.ModelProto, model: PreTrainedModel) -> dict[str, dict[str, str]]:
    """Map the name of a constant to the names that it may have, and each of these to its parameter."""
    tensors: dict[Fingerprint, list[onnx.TensorProto]] = {}
    for tensor in proto.graph.initializer:
        tensors.setdefault(fingerprint(numpy_helper.to_array(tensor)), []).append(tensor)
    origins: dict[str, dict[str, str]] = {}
    for parameter, weight in model.named_parameters(remove_duplicate=False):
        array = weight.detach().numpy()
        views = {parameter: array}
        if array.ndim == 2:  # the exporter folds the transpose of a Linear into its constant
            views[parameter + TRANSPOSED] = array.T
        for name, view in views.items():
            for tensor in tensors.get(fingerprint(view), ()):
                origins.setdefault(tensor.name, {}).setdefault(name, parameter)
    return origins


def write_model(proto: onnx.ModelProto, file: Path) -> list[Path]:
    """Write the model, to one file unless it is larger than a protobuf can be; return the files."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if _byte_count(proto.graph.initializer) < LARGEST_FILE:
        # Deterministic: maps have no order of their own, and two exports must be the same bytes.
        file.write_bytes(proto.SerializeToString(deterministic=True))
        return [file]
    data = file.with_name(file.name + "_data")
    data.unlink(missing_ok=True)  # onnx would append to it
    onnx.save_model(proto, file, save_as_external_data=True, all_tensors_to_one_file=True, location=data.name)
    return [file, data]


def _byte_count(tensors: Iterable[onnx.TensorProto]) -> int:
    return sum(len(tensor.raw_data) for tensor in tensors)


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for values in (graph.initializer, graph.value_info):
        for value in values:
            value.name = names.get(value.name, value.name)
    rename_inputs(graph.node, names)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g, names)


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Keep the exporter's notes about missing torchvision, folding and axis names from the user's terminal."""
    loggers = [logging.getLogger(name) for name in EXPORTER_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.redirect_stdout(io.StringIO()):  # older exporters print
                yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
