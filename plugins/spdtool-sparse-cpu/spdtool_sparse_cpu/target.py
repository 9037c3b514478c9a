"""The export target `sparse-cpu`: an ONNX file with operators that skip the zeros, and the library that has them.

    folder/config.json  tokenizer.json  tokenizer_config.json
           onnx/model.onnx                   the graph; pruned matrices packed, embeddings rounded
           lib/libspdtool_sparse_cpu.so      for users of plain onnxruntime; spdtool uses the installed one
           manifest.json                     what is here: sizes, sha256, library, how the weights are stored

A user of plain onnxruntime registers the library that the manifest names, and opens the model:

    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library("FOLDER/lib/libspdtool_sparse_cpu.so")
    session = onnxruntime.InferenceSession("FOLDER/onnx/model.onnx", options)

torch and onnx are imported where they are needed: a process that only runs a model has neither.
"""

from __future__ import annotations

import json
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spdtool.errors import DeviceError, ModelError
from spdtool.run.fingerprint import sha256
from spdtool_sparse_cpu import library

if TYPE_CHECKING:
    from spdtool.recipe.fields import Recipe

NAME = "sparse-cpu"
FILE = "onnx/model.onnx"
LIBRARY = "lib"
MANIFEST = "manifest.json"
FORMAT = 1


class SparseCpu:
    """ONNX with operators that skip the zeros, for onnxruntime on a CPU: smaller and faster the sparser the model."""

    roles: tuple[str, ...] = ("student",)
    providers: tuple[str, ...] = ("cpu",)

    @staticmethod
    def export(checkpoint: Path, folder: Path, recipe: Recipe) -> list[Path]:
        """Write the checkpoint with packed weights; the library and a manifest beside it.

        Returns:
            the model file (and a second one, `model.onnx_data`, only if it is more than 2 GB).

        Raises:
            DeviceError: the compiled library is missing or of another version; nothing is written.
            ModelError: the checkpoint cannot be read, or a weight cannot be stored as the recipe says.
            GateError: an axis of the exported graph is not free.
        """
        from spdtool.export.graph import trace as onnx
        from spdtool.models.load import label_names, load_model, load_tokenizer, save_tokenizer
        from spdtool_sparse_cpu import graph

        compiled, section = library.path(), recipe.export
        model = load_model(checkpoint, eager=True)
        tokenizer = load_tokenizer(checkpoint)
        proto = onnx.graph(checkpoint, min(section.opset, onnx.ATTENTION - 1))  # with attention written out
        graph.sparsify(proto, model, section.values, section.embeddings)
        folder.mkdir(parents=True, exist_ok=True)
        model.config.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
        files = onnx.write(proto, folder / FILE)
        (folder / LIBRARY).mkdir(exist_ok=True)
        shutil.copyfile(compiled, folder / LIBRARY / compiled.name)
        facts = {"values": section.values, "embeddings": section.embeddings, "labels": label_names(model)}
        _write_manifest(folder, folder / LIBRARY / compiled.name, facts)
        return files

    @staticmethod
    def session(folder: Path, provider: str = "cpu", threads: int = 0) -> Callable[[Any], np.ndarray]:
        """The exported model as an `evaluation.Forward`; its operators run with the session's threads.

        Raises:
            DeviceError: another provider than the CPU is asked for, or onnxruntime or the library cannot be used.
            ModelError: the file cannot be opened.
        """
        from spdtool.export import runtime
        from spdtool.models.predict import onnx_forward

        if provider != "cpu":
            raise DeviceError(
                f"the target {NAME!r} runs on the CPU only, not on {provider!r}",
                "the target 'onnx' exports for other providers",
            )
        return onnx_forward(
            runtime.open_session(folder / FILE, provider, threads, libraries=SparseCpu.libraries(folder))
        )

    @staticmethod
    def audit(folder: Path) -> dict[str, tuple[int, int]]:
        """`(zeros, size)` of every parameter that the file holds; of one that it holds twice, the fewest zeros.

        Raises:
            ModelError: the file is damaged.
        """
        counts: dict[str, tuple[int, int]] = {}
        for name, array in _stored(folder):
            found = (int(array.size - np.count_nonzero(array)), int(array.size))
            counts[name] = min(counts.get(name, found), found)
        return counts

    @staticmethod
    def weights(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
        """`(parameter, float32 array)` as the file holds them, rounded as they are; each once, one at a time.

        Raises:
            ModelError: the file is damaged.
        """
        seen = set[str]()
        for name, array in _stored(folder):
            if name not in seen:
                seen.add(name)
                yield name, array

    @staticmethod
    def libraries(folder: Path) -> list[str]:  # noqa: ARG004
        """The installed library. The copy in the folder is never run: it may be a stranger's.

        Raises:
            DeviceError: it is missing or of another version.
        """
        return [str(library.path())]


def _stored(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    import onnx

    from spdtool_sparse_cpu import graph

    try:
        proto = onnx.load(folder / FILE)
    except Exception as error:  # protobuf and onnx raise many kinds
        raise ModelError(f"{folder / FILE} cannot be read: {error}", "copy the folder again") from None
    yield from graph.stored_weights(proto)


def _write_manifest(folder: Path, compiled: Path, facts: dict[str, Any]) -> None:
    files = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file != folder / MANIFEST
    }
    name = compiled.relative_to(folder).as_posix()
    manifest = {
        "format": FORMAT,
        "target": NAME,
        "model": FILE,
        "library": {
            "file": name,
            "distribution": library.DISTRIBUTION,
            "version": library.version(),
            "sha256": files[name]["sha256"],
            "platform": sysconfig.get_platform(),
        },
        "files": files,
        **facts,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", "utf-8")
