"""`spdtool.load`: open an exported folder as a function from text to labels, whatever target wrote it.

    import spdtool

    classify = spdtool.load("runs/mrpc-0.9/export/bundle")
    classify("She sold the car.", "The car was sold.")             # 'equivalent'
    classify(["one text", "another"])                              # a list of labels
    classify.logits(["one text", "another"])                       # float32 [rows, labels]
    classify.logits({"input_ids": [[101, 2009, 102]]})             # token ids instead of text

It needs onnxruntime, tokenizers and numpy; neither torch nor transformers is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from spdtool import plugins
from spdtool.errors import DeviceError, ModelError, PluginError
from spdtool.export import onnx_session
from spdtool.export.bundle.manifest import read_json_object
from spdtool.export.bundle.read import Bundle, list_usable_variants
from spdtool.export.classifier import Classifier, KindSettings
from spdtool.export.model_files import read_tokenizer
from spdtool.tasks.sentence_settings import read_prompt, read_truncation

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


def load(
    folder: str | Path,
    *,
    library: str | Path | None = None,
    threads: int = 0,
    provider: str = "cpu",
    variant: str | None = None,
    unverified: bool = False,
    raw: bool = False,
) -> Classifier:
    """Open an exported folder, whatever target wrote it, after its files were held against their sha256.

    A bundle holds several variants of one model. The best one that runs here is opened: one with
    operators of its own if their library is installed and loads, otherwise the portable one.
    `classifier.bundle` names it.

    Args:
        folder: a run, or a folder such as `RUN/export/bundle` or `RUN/export/student`; of a folder
            with both roles, the student is opened.
        library: library of custom operators to use; None: that of the installed plugin, where the
            folder needs one. It is native code, so a library that lies in the folder is used only
            if it is named here.
        threads: threads of one operator; 0: as many as there are cores.
        provider: `cpu` or `cuda`.
        variant: open this variant of a bundle and no other.
        unverified: open a folder without manifest.json too, such as one that others exported.
            Nothing then tells whether its files belong together.
        raw: give probabilities without the temperature that the export fitted; labels are the same.

    Returns:
        A function from text to labels, which also has `logits` and `probabilities`.

    Raises:
        ModelError: it is no exported folder, cannot be read, or a file is not the one that was exported.
        UnknownName: the bundle has no such variant.
        PluginError: it needs a plugin that is not installed.
        DeviceError: onnxruntime, the provider or the compiled library is not there.
    """
    if not isinstance(folder, str | Path):
        raise ModelError(
            f"a folder was expected, found a {type(folder).__name__}", 'for example "runs/x/export/bundle"'
        )
    if library is not None and not isinstance(library, str | Path):
        raise ModelError(f"library = {library!r}: a path was expected")
    candidates = list_usable_variants(Path(folder).expanduser(), variant, provider, unverified=unverified)
    bundle, session = open_first_usable(candidates, library, provider, threads)
    config = read_json_object(bundle.folder / "config.json")
    tokenizer_file = bundle.folder / "tokenizer_config.json"
    tokenizer_config = read_json_object(tokenizer_file) if tokenizer_file.is_file() else {}
    kind = KindSettings(bundle.kind, dict(bundle.settings) | read_truncation(bundle.folder))
    classifier = Classifier(session, read_tokenizer(bundle.folder), config, tokenizer_config, kind)
    classifier.bundle, classifier.text = bundle, bundle.text
    classifier.prompt = read_prompt(bundle.folder)
    if raw:
        classifier.decision.temperature = 1.0
    arguments = (str(bundle.folder.absolute()), library, threads, provider, variant, unverified, raw)
    classifier.pickle_as(load_again, arguments)
    return classifier


def load_again(
    folder: str,
    library: str | Path | None,
    threads: int,
    provider: str,
    variant: str | None,
    unverified: bool,
    raw: bool,
) -> Classifier:
    """Call `load` with positional arguments, as pickle does."""
    return load(
        folder, library=library, threads=threads, provider=provider, variant=variant, unverified=unverified, raw=raw
    )


def open_first_usable(
    candidates: Iterator[Bundle], library: str | Path | None, provider: str, threads: int
) -> tuple[Bundle, InferenceSession]:
    """Open the first variant that runs here.

    Only a variant with operators of its own is passed over when it does not open; a damaged file is
    always an error.
    """
    bundle = next(candidates)
    while True:
        try:
            return bundle, open_bundle_session(bundle, library, provider, threads)
        except (DeviceError, ModelError, PluginError):
            following = next(candidates, None)
            if following is None or not bundle.library or library is not None:
                raise
            bundle = following


def open_bundle_session(bundle: Bundle, library: str | Path | None, provider: str, threads: int) -> InferenceSession:
    """Open the model of a bundle with the library of operators that it needs."""
    if library is not None:
        if not Path(library).is_file():
            raise ModelError(f"there is no library {library}", "leave library= out to use that of the installed plugin")
        return onnx_session.open_session(bundle.model, provider, threads, [Path(library).resolve()])
    if not bundle.library:
        return onnx_session.open_session(bundle.model, provider, threads)
    if provider in onnx_session.PROVIDERS and provider != "cpu":
        raise DeviceError(f"the operators of {bundle.target!r} run on the CPU only", 'leave out provider="cuda"')
    installed = plugins.find_library(str(bundle.target))
    try:
        return onnx_session.open_session(bundle.model, provider, threads, [installed.module.path()])
    except ModelError as error:
        written_by = bundle.library.version
        if written_by in (None, installed.version):
            raise
        raise ModelError(
            f"{error.message} ({bundle.folder} was written by {installed.distribution} {written_by}; "
            f"{installed.version} is installed)",
            f"pip install {installed.distribution}=={written_by}",
        ) from None
