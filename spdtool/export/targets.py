"""Export targets made of the portable graph: fused, in fp16, in int8.

    onnx-ort            fused operators of the domain com.microsoft, float32
    onnx-fp16           fp16 weights and arithmetic, ONNX operators only
    onnx-int8           int8 weights, activations rounded as they come, ONNX operators only
    onnx-int8-static    int8 weights, activations rounded by ranges seen on training rows, ONNX operators only

Each exports the teacher too: what such a treatment buys, it buys a dense model as well, and the bench shows both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx as protobuf
from transformers import PreTrainedModel

from spdtool.data.batches import evaluation_batches
from spdtool.data.tokens import Batch, Encoded
from spdtool.export import runtime
from spdtool.export.gates.weights import check_stored_weights
from spdtool.export.graph import float32 as twin
from spdtool.export.graph import fp16 as half
from spdtool.export.graph import fuse as fusion
from spdtool.export.graph import int8
from spdtool.export.graph import trace as onnx
from spdtool.export.graph import weights as stored
from spdtool.export.graph.trace import FILE, Onnx
from spdtool.models.predict import Forward, onnx_forward
from spdtool.plugins import targets
from spdtool.recipe.fields import Recipe

KEPT = "kept_fp32"  # metadata of a model: the parts that int8 left alone
SEVEN = "reduce_range"


@targets.register("onnx-ort")
class OnnxOrt(Onnx):
    """ONNX with onnxruntime's fused attention, layer norm and GELU, float32; a CPU session gains nothing by it."""

    domains: tuple[str, ...] | None = ("", fusion.DOMAIN)

    @staticmethod
    def export(checkpoint: Path, folder: Path, recipe: Recipe) -> list[Path]:
        """Write the fused graph; raises as `Onnx.export`, and ModelError where onnxscript cannot rewrite it."""
        opset = min(recipe.export.opset, onnx.ATTENTION - 1)  # the rules know attention that is written out
        return onnx.save(fusion.fuse(onnx.graph(checkpoint, opset)), checkpoint, folder)

    @staticmethod
    def facts(folder: Path) -> dict[str, Any]:
        """Nodes, and how many of each fused operator there are; none where onnxscript knew nothing of the graph."""
        proto = protobuf.load(folder / FILE, load_external_data=False)
        return onnx.facts(proto) | {"fused": fusion.operators(proto)}


class Rounded(Onnx):
    """What fp16 and int8 share: the files hold other weights than the checkpoint, and compute coarsely."""

    @staticmethod
    def weights(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
        """`(parameter, float32 array)` as the file holds them, each once."""
        seen = set[str]()
        for name, array, _ in stored.held(protobuf.load(folder / FILE), known=True):
            if name not in seen:
                seen.add(name)
                yield name, array

    @staticmethod
    def exact(folder: Path) -> Forward:
        """The float32 twin of the file, on the CPU; see `twin.py`."""
        return onnx_forward(runtime.open_session(twin.twin(protobuf.load(folder / FILE)).SerializeToString()))

    @staticmethod
    def verify(
        folder: Path,
        model: PreTrainedModel,
        batches: list[tuple[str, Batch]],  # noqa: ARG004
        provider: str,  # noqa: ARG004
    ) -> None:
        """Refuse a stored weight that is not its checkpoint's, rounded; raises GateError."""
        check_stored_weights(stored.held(protobuf.load(folder / FILE), known=True), model)


@targets.register("onnx-fp16")
class OnnxFp16(Rounded):
    """ONNX in fp16 for GPUs: half the bytes; ONNX operators only, float32 logits."""

    @staticmethod
    def export(checkpoint: Path, folder: Path, recipe: Recipe) -> list[Path]:
        """Write the graph in fp16; raises as `Onnx.export`, and ModelError where it cannot be converted."""
        return onnx.save(half.halve(onnx.graph(checkpoint, recipe.export.opset)), checkpoint, folder)

    @staticmethod
    def storage(recipe: Recipe) -> tuple[str, str]:  # noqa: ARG004
        """fp16 throughout."""
        return "fp16", "fp16"

    @staticmethod
    def verify(folder: Path, model: PreTrainedModel, batches: list[tuple[str, Batch]], provider: str) -> None:
        """As for any rounded file; and no node may give a number that fp16 cannot hold."""
        Rounded.verify(folder, model, batches, provider)
        half.scan(folder / FILE, batches, provider)


@targets.register("onnx-int8")
class OnnxInt8(Rounded):
    """ONNX with int8 weights and activations for CPUs and browsers: a quarter of the bytes; ONNX operators only."""

    providers: tuple[str, ...] = ("cpu",)

    @staticmethod
    def export(checkpoint: Path, folder: Path, recipe: Recipe, keep: Sequence[str] = ()) -> list[Path]:
        """Write the graph in int8, but for the parts in `keep`; raises as `Onnx.export`, and ModelError."""
        seven = _seven_bits(recipe)
        proto = int8.quantise(onnx.graph(checkpoint, recipe.export.opset), keep, reduce_range=seven)
        return _save(proto, checkpoint, folder, keep, seven=seven)

    @staticmethod
    def storage(recipe: Recipe) -> tuple[str, str]:  # noqa: ARG004
        """int8 throughout; biases and layer normalisation stay in float32."""
        return "int8", "int8"

    @staticmethod
    def parts(checkpoint: Path, recipe: Recipe) -> list[str]:
        """What may be left in float32."""
        return int8.parts(onnx.graph(checkpoint, recipe.export.opset))

    @staticmethod
    def facts(folder: Path) -> dict[str, Any]:
        """Nodes, the parts left in float32, and whether weights have 7 bits."""
        proto = protobuf.load(folder / FILE, load_external_data=False)
        said = {entry.key: entry.value for entry in proto.metadata_props}
        return onnx.facts(proto) | {KEPT: said[KEPT].split(), SEVEN: said[SEVEN] == "true"}


@targets.register("onnx-int8-static")
class OnnxInt8Static(OnnxInt8):
    """As onnx-int8, with ranges of activations seen on training rows: quicker where roundings on the fly are slow."""

    calibrates = True

    @staticmethod
    def export(  # type: ignore[override]
        checkpoint: Path, folder: Path, recipe: Recipe, rows: Encoded, keep: Sequence[str] = ()
    ) -> list[Path]:
        """Write the graph in int8, calibrated on `rows`; raises as `OnnxInt8.export`."""
        seven = _seven_bits(recipe)
        batches = (rows.collate(batch) for batch in evaluation_batches(rows, 8))
        proto = int8.calibrate(onnx.graph(checkpoint, recipe.export.opset), batches, keep, reduce_range=seven)
        return _save(proto, checkpoint, folder, keep, seven=seven)


def _seven_bits(recipe: Recipe) -> bool:
    given = recipe.export.reduce_range
    return int8.saturates() if given is None else given


def _save(
    proto: protobuf.ModelProto, checkpoint: Path, folder: Path, keep: Sequence[str], *, seven: bool
) -> list[Path]:
    protobuf.helper.set_model_props(proto, {KEPT: " ".join(keep), SEVEN: str(seven).lower()})
    return onnx.save(proto, checkpoint, folder)
