"""The export targets `sparse-cpu` and `sparse-cpu-int8`: ONNX with operators that skip the zeros, and a library.

    folder/config.json  tokenizer.json  tokenizer_config.json
           onnx/model.onnx                   the graph; pruned matrices packed, embeddings rounded
                                             (`sparse-cpu-int8`: int8 in blocks, multiplied in 8 bits)
           lib/libspdtool_sparse_cpu.so      for users of plain onnxruntime; spdtool uses the installed one

A user of plain onnxruntime registers the library that manifest.json names, and opens the model:

    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library("FOLDER/lib/libspdtool_sparse_cpu.so")
    session = onnxruntime.InferenceSession("FOLDER/onnx/model.onnx", options)

torch and onnx are imported where they are needed: every command imports this module to find its
plugins.
"""

# ruff: noqa: ARG002  (a target need not use every argument of a method)
from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from spdtool import console
from spdtool.errors import DeviceError, ModelError
from spdtool.export.target import MODEL_FILE, StorageFormats, Target
from spdtool_sparse_cpu import library

if TYPE_CHECKING:
    from spdtool.data.tokens import Batch
    from spdtool.export.graph.weights import StoredWeight
    from spdtool.models.predict import Forward
    from spdtool.recipe.fields import Recipe

NAME = "sparse-cpu"
INT8_NAME = "sparse-cpu-int8"
LISTED = 3  # names in a message
LIBRARY_FOLDER = "lib"


class SparseCpu(Target):
    """ONNX with operators that skip the zeros, for onnxruntime on a CPU: smaller and faster the sparser the model."""

    name = NAME
    roles = ("student",)
    providers = ("cpu",)
    exported_by_default = True
    rounds_weights = True
    packs = True
    preferred_on: tuple[str, ...] = ("cpu",)
    timing_operator = (library.DOMAIN, "SparseProductTime")

    def export(self, checkpoint: Path, folder: Path, recipe: Recipe) -> list[Path]:
        """Write the checkpoint with packed weights, and the library beside it.

        Returns:
            The model file (and a second one, `model.onnx_data`, only if it is more than 2 GB).

        Raises:
            DeviceError: the compiled library is missing or of another version; nothing is written.
            ModelError: the checkpoint cannot be read, or a weight cannot be stored as the recipe
                says.
            GateError: an axis of the exported graph is not free.
        """
        return self._write(checkpoint, folder, recipe, self.storage_formats(recipe))

    def _write(self, checkpoint: Path, folder: Path, recipe: Recipe, formats: StorageFormats) -> list[Path]:
        """Export with matrices in a format of `packing.pack`, and embeddings in one of the recipe's; see `export`."""
        from spdtool.export.graph.trace import ATTENTION_OPSET, save_folder, trace_checkpoint
        from spdtool.models.load import load_model
        from spdtool_sparse_cpu import graph

        compiled = library.path()  # first: without it, nothing is written
        opset = min(recipe.export.opset, ATTENTION_OPSET - 1)  # with attention written out, which `graph` recognizes
        model = load_model(checkpoint, eager=True)
        proto = trace_checkpoint(checkpoint, opset, shrinks=False)  # `graph` packs matrices of the full shapes
        graph.sparsify(proto, model, formats.matrices, formats.embeddings)
        files = save_folder(proto, checkpoint, folder)
        (folder / LIBRARY_FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(compiled, folder / LIBRARY_FOLDER / compiled.name)
        return files

    def library_record(self, folder: Path) -> dict[str, str]:
        """Name the copy of the library in the folder, and what was installed to build it."""
        return {
            "file": f"{LIBRARY_FOLDER}/{library.path().name}",
            "distribution": library.DISTRIBUTION,
            "version": library.version(),
            "platform": sysconfig.get_platform(),
        }

    def session(self, folder: Path, provider: str = "cpu", threads: int = 0) -> Forward:
        """Open the exported model; its operators run with the session's threads.

        Raises:
            DeviceError: another provider than the CPU is asked for, or onnxruntime or the library
                cannot be used.
            ModelError: the file cannot be opened.
        """
        if provider != "cpu":  # its operators are registered for the CPU alone
            raise DeviceError(
                f"the target {NAME!r} runs on the CPU only, not on {provider!r}",
                "the target 'onnx' exports for other providers",
            )
        return super().session(folder, provider, threads)

    def stored_weights(self, folder: Path) -> Iterator[StoredWeight]:
        """Yield every parameter as the file holds it, rounded as it is.

        Raises:
            ModelError: the file is damaged.
        """
        import onnx

        from spdtool_sparse_cpu import graph

        file = folder / MODEL_FILE
        try:
            proto = onnx.load(file)
        except Exception as error:  # protobuf and onnx raise many kinds
            raise ModelError(f"{file} cannot be read: {error}", "copy the folder again") from None
        yield from graph.decode_weights(proto)

    def libraries(self, folder: Path) -> list[Path]:
        """The installed library. The copy in the folder is never run: it may be a stranger's.

        Raises:
            DeviceError: it is missing or of another version.
        """
        return [library.path()]


class SparseCpuInt8(SparseCpu):
    """As sparse-cpu, for zeros in blocks of 1x4: int8 weights and products, fastest where the CPU has VNNI."""

    name = INT8_NAME
    exported_by_default = False
    rounds_arithmetic = True
    smallest = (StorageFormats("int8", "int6"), StorageFormats("int8", "int8"))
    preferred_on = ()

    def suits(self, recipe: Recipe) -> bool:
        """Tell whether the student was trained for int8 products."""
        return recipe.finetune.quantize == "int8"

    def export(self, checkpoint: Path, folder: Path, recipe: Recipe) -> list[Path]:
        """Write the checkpoint with matrices in int8 blocks, and say which have none; raises as `SparseCpu.export`."""
        from spdtool.models.layers import find_prunable_weights
        from spdtool.models.load import load_model
        from spdtool_sparse_cpu import packing

        formats = self.storage_formats(recipe)
        if formats.matrices == "fp32":
            return self._write(checkpoint, folder, recipe, formats)
        weights = find_prunable_weights(load_model(checkpoint))
        single = [name for name, weight in weights.items() if not packing.in_blocks(weight.detach().numpy())]
        if single:
            listed = console.escape(", ".join(single[:LISTED]) + (", ..." if len(single) > LISTED else ""))
            console.say(
                f"  {len(single)} of {len(weights)} matrices have no zeros in blocks of 1x4 ({listed}): "
                "stored as single weights, multiplied in float32; prune.pattern=1x4 makes blocks"
            )
        return self._write(checkpoint, folder, recipe, formats._replace(matrices=packing.INT8_BLOCKS))

    def storage_formats(self, recipe: Recipe) -> StorageFormats:
        """int8, and embeddings in int6 where the recipe asks for it; biases and layer normalization stay in float32.

        `smallest` tries int6 first where there is a dev set to judge by. Of other values only
        `export.values=fp32` is followed, as by `sparse-cpu`: the bench tells by it what int8 brings.
        """
        if recipe.export.values == "fp32":
            return super().storage_formats(recipe)
        return StorageFormats("int8", "int6" if recipe.export.embeddings == "int6" else "int8")

    def float32_form(self, folder: Path) -> Forward:
        """Open the file with its blocks as single weights, which the operators multiply in float32."""
        import onnx

        from spdtool.export.onnx_session import open_session
        from spdtool.models.predict import onnx_forward
        from spdtool.tasks.head import read_head
        from spdtool_sparse_cpu.int8_form import use_single_weights

        proto = onnx.load(folder / MODEL_FILE)
        use_single_weights(proto)
        session = open_session(proto.SerializeToString(), libraries=self.libraries(folder))
        return onnx_forward(session, read_head(folder))

    def verify(self, folder: Path, checkpoint: Path, batches: list[tuple[str, Batch]], provider: str) -> None:
        """Compare with the definition of int8 products; raises GateError."""
        from spdtool.models.load import fill_weights, load_model
        from spdtool_sparse_cpu.int8_form import check_model, check_products

        check_products(folder / MODEL_FILE, self.libraries(folder))
        model = load_model(checkpoint, eager=True)
        fill_weights(model, ((stored.name, stored.array) for stored in self.stored_weights(folder)))
        check_model(folder / MODEL_FILE, model, self.session(folder, provider), batches)
