"""The built-in export targets, all made of the portable graph that torch.onnx traces.

    onnx                ONNX operators only, float32
    onnx-ort            fused operators of the domain com.microsoft, float32
    onnx-fp16           fp16 weights and arithmetic, ONNX operators only
    onnx-ort-fp16       fused operators in fp16, for onnxruntime on a GPU
    onnx-int8           int8 weights, activations rounded as they come, ONNX operators only
    onnx-int8-static    int8 weights, activations rounded by ranges seen on training rows, ONNX operators only

Each exports the teacher too: a dense model gains from such a treatment as well, and the bench shows
both.
"""

# ruff: noqa: ARG002  (a target need not use every argument of a method)
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx

from spdtool.data.batches import evaluation_batches
from spdtool.data.tokens import Batch
from spdtool.export import onnx_session
from spdtool.export.graph.float32 import float32_copy
from spdtool.export.graph.fp16 import check_overflow, convert_to_fp16
from spdtool.export.graph.fuse import FUSED_DOMAIN, count_operators, fuse_operators
from spdtool.export.graph.int8 import quantizable_modules, quantize_dynamically, quantize_statically, saturates
from spdtool.export.graph.protobuf import metadata_of
from spdtool.export.graph.row_lengths import remove_dead_nodes, use_row_lengths
from spdtool.export.graph.trace import ATTENTION_OPSET, graph_properties, save_folder, trace_checkpoint
from spdtool.export.graph.weights import INT8_LEVELS, StoredWeight, use_sparse_constants
from spdtool.export.target import MODEL_FILE, RIGHT_PADDED, Rounding, StorageFormats, Target
from spdtool.models.predict import Forward, onnx_forward
from spdtool.plugins import targets
from spdtool.recipe.fields import Recipe
from spdtool.tasks.head import read_head

FLOAT32_MODULES = "kept_fp32"  # metadata of the model: the modules that int8 left alone
REDUCE_RANGE = "reduce_range"  # metadata of the model: whether weights have 7 bits
CALIBRATION_BATCH = 8  # rows; the quantizer keeps every activation of a batch in memory


@targets.register("onnx")
class Onnx(Target):
    """One portable float32 ONNX file; zeros are stored like any other number, unless export.sparse_initializers."""

    operator_domains: tuple[str, ...] | None = ("",)
    traces_model = True
    bundle_stem = "model"

    def export(self, checkpoint: Path, folder: Path, recipe: Recipe) -> list[Path]:
        """Write the checkpoint as `onnx/model.onnx`, with configuration and tokenizer beside it.

        Returns:
            The model file; and a second one, `model.onnx_data`, only if the weights are more than 2
            GB.

        Raises:
            ModelError: the checkpoint cannot be read.
            GateError: an axis of the exported graph is not free.
        """
        proto = trace_checkpoint(checkpoint, recipe.export.opset)
        if recipe.export.sparse_initializers:
            use_sparse_constants(proto)
        return save_folder(proto, checkpoint, folder)

    def properties(self, folder: Path) -> dict[str, object]:
        """Count the nodes and sparse constants, and tell the operator set."""
        return graph_properties(onnx.load(folder / MODEL_FILE, load_external_data=False))


@targets.register("onnx-ort")
class OnnxOrt(Onnx):
    """ONNX with onnxruntime's fused attention, layer norm and GELU, float32; a CPU session gains nothing by it."""

    exported_by_default = True
    operator_domains = ("", FUSED_DOMAIN)
    bundle_stem = "model_ort"

    def export(self, checkpoint: Path, folder: Path, recipe: Recipe) -> list[Path]:
        """Write the fused graph.

        Raises:
            ModelError: as `Onnx.export`; or onnxscript cannot rewrite the graph.
            GateError: as `Onnx.export`.
        """
        opset = min(recipe.export.opset, ATTENTION_OPSET - 1)  # the rules know attention that is written out
        return save_folder(fuse_operators(trace_checkpoint(checkpoint, opset)), checkpoint, folder)

    def properties(self, folder: Path) -> dict[str, object]:
        """Count each fused operator too; there are none where onnxscript knew nothing of the graph."""
        proto = onnx.load(folder / MODEL_FILE, load_external_data=False)
        return graph_properties(proto) | {"fused": count_operators(proto)}


class RoundedOnnx(Onnx):
    """Base of fp16 and int8: the files hold other weights than the checkpoint, and round activations."""

    rounds_weights = True
    rounds_arithmetic = True

    def float32_form(self, folder: Path) -> Forward:
        """Open the file's float32 copy on the CPU."""
        proto = float32_copy(onnx.load(folder / MODEL_FILE))
        return onnx_forward(onnx_session.open_session(proto.SerializeToString()), read_head(folder))


@targets.register("onnx-fp16")
class OnnxFp16(RoundedOnnx):
    """ONNX in fp16 for GPUs: half the bytes; ONNX operators only, float32 logits."""

    exported_by_default = True
    bundle_stem = "model_fp16"
    preferred_on = ("cuda",)

    def export(self, checkpoint: Path, folder: Path, recipe: Recipe) -> list[Path]:
        """Write the graph in fp16.

        Raises:
            ModelError: as `Onnx.export`; or the graph cannot be converted.
            GateError: as `Onnx.export`.
        """
        proto = convert_to_fp16(trace_checkpoint(checkpoint, recipe.export.opset))
        return save_folder(proto, checkpoint, folder)

    def storage_formats(self, recipe: Recipe) -> StorageFormats:
        """fp16 throughout."""
        return StorageFormats("fp16", "fp16")

    def verify(self, folder: Path, checkpoint: Path, batches: list[tuple[str, Batch]], provider: str) -> None:
        """Refuse nodes whose result fp16 cannot hold; raises GateError."""
        check_overflow(folder / MODEL_FILE, batches, provider)


@targets.register("onnx-ort-fp16")
class OnnxOrtFp16(OnnxFp16):
    """Fused operators in fp16, for onnxruntime on a GPU: the fewest kernels; for input padded on the right."""

    operator_domains = ("", FUSED_DOMAIN)
    bundle_stem = "model_ort_fp16"
    preference = 1

    def export(self, checkpoint: Path, folder: Path, recipe: Recipe) -> list[Path]:
        """Write the fused graph in fp16; its attention takes row lengths where the mask hides padding and nothing else.

        Raises:
            ModelError: as `OnnxOrt.export` and `OnnxFp16.export`.
            GateError: as `Onnx.export`.
        """
        opset = min(recipe.export.opset, ATTENTION_OPSET - 1)  # the rules know attention that is written out
        fused = fuse_operators(trace_checkpoint(checkpoint, opset))
        right_padded = use_row_lengths(fused)
        remove_dead_nodes(fused.graph)
        proto = convert_to_fp16(fused)
        onnx.helper.set_model_props(proto, {RIGHT_PADDED: str(right_padded).lower()})
        return save_folder(proto, checkpoint, folder)

    def takes_left_padding(self, folder: Path) -> bool:
        """Whether attention still has a mask of its own in this file."""
        return not self._is_right_padded(onnx.load(folder / MODEL_FILE, load_external_data=False))

    def properties(self, folder: Path) -> dict[str, object]:
        """Count each fused operator too, and tell whether only right padding is computed rightly."""
        proto = onnx.load(folder / MODEL_FILE, load_external_data=False)
        fused = {"fused": count_operators(proto), RIGHT_PADDED: self._is_right_padded(proto)}
        return graph_properties(proto) | fused

    @staticmethod
    def _is_right_padded(proto: onnx.ModelProto) -> bool:
        return metadata_of(proto).get(RIGHT_PADDED) == "true"


@targets.register("onnx-int8")
class OnnxInt8(RoundedOnnx):
    """ONNX with int8 weights and activations for CPUs and browsers: a quarter of the bytes; ONNX operators only."""

    exported_by_default = True
    providers = ("cpu",)
    bundle_stem = "model_quantized"
    preferred_on: tuple[str, ...] = ("web",)

    def export(self, checkpoint: Path, folder: Path, recipe: Recipe) -> list[Path]:
        """Write the graph in int8; raises as `export_rounded`."""
        return self.export_rounded(checkpoint, folder, recipe, Rounding())

    def export_rounded(self, checkpoint: Path, folder: Path, recipe: Recipe, rounding: Rounding) -> list[Path]:
        """Write the graph in int8, but for the modules that stay in float32.

        Raises:
            ModelError: as `Onnx.export`; or onnxruntime cannot quantize the graph.
            GateError: as `Onnx.export`.
        """
        reduce_range = self.reduces_range(recipe)
        proto = self.quantize(trace_checkpoint(checkpoint, recipe.export.opset), rounding, reduce_range=reduce_range)
        metadata = {
            FLOAT32_MODULES: " ".join(rounding.float32_modules),
            REDUCE_RANGE: str(reduce_range).lower(),
        }
        onnx.helper.set_model_props(proto, metadata)
        return save_folder(proto, checkpoint, folder)

    def quantize(self, proto: onnx.ModelProto, rounding: Rounding, *, reduce_range: bool) -> onnx.ModelProto:
        """Quantize the traced graph."""
        return quantize_dynamically(proto, rounding.float32_modules, reduce_range=reduce_range)

    def reduces_range(self, recipe: Recipe) -> bool:
        """Decide whether weights have 7 bits: as the recipe says, else where this CPU's products saturate."""
        if recipe.export.reduce_range is None:
            return saturates()
        return recipe.export.reduce_range

    def storage_formats(self, recipe: Recipe) -> StorageFormats:
        """int8 throughout; biases and layer normalization stay in float32."""
        return StorageFormats("int8", "int8")

    def stored_weights(self, folder: Path) -> Iterator[StoredWeight]:
        """Yield every parameter; with 7 bits there are fewer int8 numbers."""
        metadata = metadata_of(onnx.load(folder / MODEL_FILE, load_external_data=False))
        reduced = metadata[REDUCE_RANGE] == "true"
        for stored in super().stored_weights(folder):
            yield stored if reduced else stored._replace(levels=INT8_LEVELS)

    def float32_candidates(self, checkpoint: Path, recipe: Recipe) -> list[str]:
        """List each layer, and each module outside the layers that has a matrix."""
        return quantizable_modules(trace_checkpoint(checkpoint, recipe.export.opset))

    def properties(self, folder: Path) -> dict[str, object]:
        """Tell also the modules that are in float32, and whether weights have 7 bits."""
        proto = onnx.load(folder / MODEL_FILE, load_external_data=False)
        metadata = metadata_of(proto)
        return graph_properties(proto) | {
            FLOAT32_MODULES: metadata[FLOAT32_MODULES].split(),
            REDUCE_RANGE: metadata[REDUCE_RANGE] == "true",
        }


@targets.register("onnx-int8-static")
class OnnxInt8Static(OnnxInt8):
    """As onnx-int8, with ranges of activations seen on training rows: quicker where roundings on the fly are slow."""

    exported_by_default = False
    calibrates = True
    bundle_stem = "model_int8_static"
    preferred_on = ()

    def quantize(self, proto: onnx.ModelProto, rounding: Rounding, *, reduce_range: bool) -> onnx.ModelProto:
        """Quantize the traced graph, with ranges from the calibration rows."""
        rows = rounding.calibration_rows
        assert rows is not None, "the gates give a target that calibrates its rows"
        batches = (rows.collate(indices) for indices in evaluation_batches(rows, CALIBRATION_BATCH))
        return quantize_statically(proto, batches, rounding.float32_modules, reduce_range=reduce_range)
