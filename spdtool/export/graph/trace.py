"""The export target `onnx`: one float32 ONNX file for onnxruntime, in the layout that Hugging Face clients expect.

    folder/config.json tokenizer.json tokenizer_config.json onnx/model.onnx

A target is anything registered with `spdtool.plugins.targets` that has three functions; most easily a class of static
methods, which may inherit from `Onnx` where it only changes the file:

    @targets.register("sparse-cpu")
    class SparseCpu:
        "First line: what it is for."

        @staticmethod
        def export(checkpoint: Path, folder: Path, recipe: Recipe) -> list[Path]: ...
        @staticmethod
        def session(folder: Path, provider: str = "cpu", threads: int = 0) -> Forward: ...
        @staticmethod
        def audit(folder: Path) -> dict[str, tuple[int, int]]: ...

`export` writes everything that a deployment needs and returns the files that hold the model, whose bytes are reported.
`session` opens them again as an `evaluation.Forward`. `audit` counts, in the files, `(zeros, size)` of each parameter
of the checkpoint that they hold. The export stage puts every target through the same gates: see `parity.py`.

It may also have, with these defaults where it does not (`targets.py` asks for them):

    roles = ("teacher", "student")      which of the two it exports
    providers = ("cpu", "cuda")         the providers of onnxruntime on which they run
    weights = None                      a function (folder) -> iterator of (parameter name, float32 array)
    libraries = lambda folder: []       libraries of custom operators that a session needs, as absolute paths
    domains = None                      the domains that operators may be of, which is then checked ("": ONNX itself)
    calibrates = False                  whether `export` takes a fourth argument: encoded training rows of the task
    storage = None                      a function (recipe) -> (fp32, fp16 or int8 of the weights, of the embeddings)
    exact = None                        a function (folder) -> Forward: the file with nothing rounded but its weights
    verify = None                       a function (folder, model, batches, provider) that raises GateError: see below
    parts = None                        a function (checkpoint, recipe) -> names; `export` then takes `keep`: see below
    facts = None                        a function (folder) -> what else stage.json should hold of the files

A target that stores the weights rounded has `weights`: what its files really hold, one parameter at a time, every one
of the model. Its logits are then held against the checkpoint with those weights in it, which proves the arithmetic, and
its dev metric against the checkpoint itself, which says what the rounding costs. `spdtool unpack` is made of it too.
Where the arithmetic is coarse as well (fp16, int8), its logits say little: then `exact` gives the twin that is held
tightly, and the files' own logits have `export.rounded_tolerance`. `verify` looks for faults that only this target can
have. `parts` names the pieces of a model that may be left unrounded, `keep`, where rounding all breaks the budget. A
target may raise DeviceError or PluginError where something that it needs is missing; an optional one is then left out.

What torch.onnx writes is cleaned: it records the building machine's paths at each node, and folds the transposes of
weights into constants called `val_49`. Each weight has its state-dict name again, or that name with `.T` where the file
holds it transposed; equal weights that share one constant are listed in the constant's metadata.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from transformers import PreTrainedModel

from spdtool.errors import GateError, ModelError, first_line
from spdtool.export import runtime
from spdtool.export.graph.weights import PARAMETERS, TRANSPOSED, Fingerprint, audit, fingerprint, thin
from spdtool.models.layers import TESTED_FAMILIES
from spdtool.models.load import load_model, load_tokenizer, save_tokenizer
from spdtool.models.predict import Forward, onnx_forward
from spdtool.plugins import targets
from spdtool.recipe.fields import Recipe
from spdtool.run.fingerprint import sha256
from spdtool.run.folder import RECORD

FILE = "onnx/model.onnx"
ONE_FILE_BYTES = 2**31 - 2**20  # protobuf cannot write more; beyond, the weights go to model.onnx_data
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
AXES = {0: "batch", 1: "sequence"}
EXAMPLE = (2, 9)  # the exporter would freeze an axis of length 1
ATTENTION = 23  # the operator set that has Attention, which torch's own attention becomes
UNTESTED = f"families that are tested: {', '.join(TESTED_FAMILIES)}"
WHY = 200  # letters of an exporter's error; some first lines are essays
EXPORTER_LOGGERS = ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")


@targets.register("onnx")
class Onnx:
    """One portable float32 ONNX file; zeros are stored like any other number, unless export.sparse_initializers."""

    roles: tuple[str, ...] = ("teacher", "student")
    providers: tuple[str, ...] = ("cpu", "cuda")
    domains: tuple[str, ...] | None = ("",)
    weights: Callable[[Path], Iterator[tuple[str, np.ndarray]]] | None = None  # stored exactly

    @staticmethod
    def export(checkpoint: Path, folder: Path, recipe: Recipe) -> list[Path]:
        """Write the checkpoint as `onnx/model.onnx`, with configuration and tokenizer beside it.

        Returns:
            the model file; and a second one, `model.onnx_data`, only if the weights are more than 2 GB.

        Raises:
            ModelError: the checkpoint cannot be read.
            GateError: an axis of the exported graph is not free.
        """
        proto = graph(checkpoint, recipe.export.opset)
        if recipe.export.sparse_initializers:
            thin(proto)
        return save(proto, checkpoint, folder)

    @staticmethod
    def session(folder: Path, provider: str = "cpu", threads: int = 0) -> Forward:
        """The exported model as a function of a batch; raises as `runtime.open_session` does."""
        return onnx_forward(runtime.open_session(folder / FILE, provider, threads))

    @staticmethod
    def libraries(folder: Path) -> list[str]:  # noqa: ARG004
        """None: the standard operators are enough."""
        return []

    @staticmethod
    def audit(folder: Path) -> dict[str, tuple[int, int]]:
        """`(zeros, size)` of every parameter that the file holds."""
        return audit(folder / FILE)

    @staticmethod
    def facts(folder: Path) -> dict[str, Any]:
        """Nodes of the graph, and its operator set."""
        return facts(onnx.load(folder / FILE, load_external_data=False))


def facts(proto: onnx.ModelProto) -> dict[str, Any]:
    """What a reader wants to know of a graph: its nodes, its operator set, and the constants that are sparse."""
    opset = max(entry.version for entry in proto.opset_import if not entry.domain)
    found = {"nodes": len(proto.graph.node), "opset": opset}
    return found | ({"sparse": len(proto.graph.sparse_initializer)} if proto.graph.sparse_initializer else {})


_traced: dict[tuple[Any, ...], bytes] | None = None


@contextlib.contextmanager
def remembering() -> Iterator[None]:
    """Trace each checkpoint once until the end of the outermost such context, however many targets are made of it."""
    global _traced
    before, _traced = _traced, {} if _traced is None else _traced
    try:
        yield
    finally:
        _traced = before


def graph(checkpoint: Path, opset: int) -> onnx.ModelProto:
    """The portable graph of a checkpoint: ONNX operators only, float32, no notes of the exporter, weights by name.

    Below operator set 23, attention is written out: fewer nodes than torch's own attention gives, and every
    architecture has it. From 23 on it is the operator Attention.

    Raises:
        ModelError: the checkpoint cannot be read, or its architecture cannot be exported.
        GateError: an axis of the exported graph is not free.
    """
    key = (opset, *_content(checkpoint)) if _traced is not None else ()
    if _traced is not None and key in _traced:
        return onnx.load_from_string(_traced[key])
    model = load_model(checkpoint, eager=opset < ATTENTION)
    proto = trace(model, input_names(model, load_tokenizer(checkpoint)), opset)
    clean(proto)
    name_weights(proto, model)
    if _traced is not None and _size(proto.graph.initializer) < ONE_FILE_BYTES:
        _traced[key] = proto.SerializeToString()
    return proto


def save(proto: onnx.ModelProto, checkpoint: Path, folder: Path) -> list[Path]:
    """Write the graph with configuration and tokenizer of its checkpoint beside it; returns as `write` does."""
    folder.mkdir(parents=True, exist_ok=True)
    load_model(checkpoint).config.save_pretrained(folder)
    save_tokenizer(load_tokenizer(checkpoint), folder)
    return write(proto, folder / FILE)


def input_names(model: PreTrainedModel, tokenizer: Any) -> list[str]:
    """The model's inputs, in order: those that the tokenizer gives and the model takes."""
    taken = inspect.signature(model.forward).parameters
    return [name for name in INPUTS if name in tokenizer.model_input_names and name in taken]


def trace(model: PreTrainedModel, names: list[str], opset: int) -> onnx.ModelProto:
    """The model as torch.onnx (dynamo) exports it, with free axes `batch` and `sequence`.

    Args:
        names: inputs, each int64 [batch, sequence]; the output is `logits`, float32 [batch, labels].

    Raises:
        ModelError: the exporter cannot do it.
        GateError: an input's axis is frozen in the graph.
    """
    example = {name: torch.ones(EXAMPLE, dtype=torch.long) for name in names}
    example["input_ids"] *= 2
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                model,
                (),
                kwargs=example,
                dynamo=True,
                opset_version=opset,
                input_names=names,
                output_names=["logits"],
                dynamic_shapes={name: dict(AXES) for name in names},
                verbose=False,
            )
            assert program is not None
            proto: onnx.ModelProto = program.model_proto
    except Exception as error:  # torch.export raises whatever the model's own code runs into
        why = textwrap.shorten(first_line(_cause(error)), WHY, placeholder=" ...")
        raise ModelError(f"torch.onnx cannot export {model.config.model_type!r}: {why}", UNTESTED) from None
    for value in proto.graph.input:
        axes = [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        if axes != list(AXES.values()):
            raise GateError(f"the exporter froze the axes of {value.name} as {axes}", "report the architecture")
    found = {entry.version for entry in proto.opset_import if not entry.domain}
    if found != {opset}:
        raise GateError(f"the exporter wrote opset {found} instead of {opset}", "choose another export.opset")
    return proto


def clean(proto: Any) -> None:
    """Remove every note that the exporter left in the graph: stack traces with paths of this machine, node histories.

    Two exports of one checkpoint are byte-identical afterwards.
    """
    for field, value in proto.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            proto.ClearField(field.name)
        elif field.message_type is not None and field.message_type.name != "TensorProto":
            for part in [value] if hasattr(value, "ListFields") else value:
                clean(part)
        elif field.message_type is not None:
            for tensor in [value] if hasattr(value, "ListFields") else value:
                tensor.ClearField("doc_string")
                tensor.ClearField("metadata_props")


def name_weights(proto: onnx.ModelProto, model: PreTrainedModel) -> None:
    """Give the constants that hold a parameter, transposed or not, its name; recognised by their content.

    A second constant with the same content, which the exporter makes of a weight that is used twice, is left out.
    """
    held: dict[Fingerprint, list[onnx.TensorProto]] = {}
    for tensor in proto.graph.initializer:
        held.setdefault(fingerprint(numpy_helper.to_array(tensor)), []).append(tensor)
    origins: dict[str, dict[str, str]] = {}  # constant -> the name it would have -> the parameter
    for name, weight in model.named_parameters(remove_duplicate=False):
        array = weight.detach().numpy()
        for suffix, view in (("", array), (TRANSPOSED, array.T))[: 2 if array.ndim == 2 else 1]:
            for tensor in held.get(fingerprint(view), ()):
                origins.setdefault(tensor.name, {}).setdefault(name + suffix, name)
    taken = {tensor.name for tensor in proto.graph.initializer}
    renamed, again = dict[str, str](), dict[str, str]()
    for tensor in proto.graph.initializer:
        names = origins.get(tensor.name, {})
        free = [name for name in names if name not in taken]
        if names and tensor.name not in names and free:
            renamed[tensor.name] = free[0]
            taken.add(free[0])
        elif names and tensor.name not in names:
            again[tensor.name] = next(iter(names))
        if tensor.name in names or tensor.name in renamed:
            tensor.metadata_props.add(key=PARAMETERS, value=" ".join(dict.fromkeys(names.values())))
    kept = [tensor for tensor in proto.graph.initializer if tensor.name not in again]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    _rename(proto.graph, renamed | again)


def write(proto: onnx.ModelProto, file: Path) -> list[Path]:
    """Write the model; to one file, unless it is larger than a protobuf can be. Returns the files."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if _size(proto.graph.initializer) < ONE_FILE_BYTES:
        file.write_bytes(proto.SerializeToString(deterministic=True))
        return [file]
    data = file.with_name(file.name + "_data")
    data.unlink(missing_ok=True)  # onnx would append to it
    onnx.save_model(proto, file, save_as_external_data=True, all_tensors_to_one_file=True, location=data.name)
    return [file, data]


def _cause(error: BaseException) -> BaseException:
    """The error that an exporter's own errors go back to; they say pages about the exporter."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _content(checkpoint: Path) -> list[str]:
    """What a graph is made of: weights, configuration and tokenizer, by their content."""
    files = sorted(file for file in checkpoint.glob("*") if file.suffix in (".json", ".safetensors"))
    return [f"{file.name} {sha256(file)}" for file in files if file.name != RECORD]


def _size(tensors: Iterable[onnx.TensorProto]) -> int:
    return sum(len(tensor.raw_data) for tensor in tensors)


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for part in (graph.initializer, graph.value_info):
        for value in part:
            value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g, names)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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
