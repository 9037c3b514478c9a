"""The export target `sparse-cpu`: an ONNX file with operators that skip the zeros, and the library that has them.

    folder/config.json  tokenizer.json  tokenizer_config.json
           onnx/model.onnx                   the graph; pruned matrices packed, embeddings rounded
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

from spdtool.errors import DeviceError, ModelError
from spdtool.export.target import MODEL_FILE, Target
from spdtool_sparse_cpu import library

if TYPE_CHECKING:
    from spdtool.export.graph.weights import StoredWeight
    from spdtool.models.predict import Forward
    from spdtool.recipe.fields import Recipe

NAME = "sparse-cpu"
LIBRARY_FOLDER = "lib"


class SparseCpu(Target):
    """ONNX with operators that skip the zeros, for onnxruntime on a CPU: smaller and faster the sparser the model."""

    name = NAME
    roles = ("student",)
    providers = ("cpu",)
    exported_by_default = True
    rounds_weights = True
    packs = True
    preferred_on = ("cpu",)
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
        from spdtool.export.graph.trace import ATTENTION_OPSET, save_folder, trace_checkpoint
        from spdtool.models.load import load_model
        from spdtool_sparse_cpu import graph

        compiled = library.path()  # first: without it, nothing is written
        values, embeddings = self.storage_formats(recipe)
        opset = min(recipe.export.opset, ATTENTION_OPSET - 1)  # with attention written out, which `graph` recognizes
        model = load_model(checkpoint, eager=True)
        proto = trace_checkpoint(checkpoint, opset, shrinks=False)  # `graph` packs matrices of the full shapes
        graph.sparsify(proto, model, values, embeddings)
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
