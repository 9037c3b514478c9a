"""The gate on folders of sentence-transformers: another client pools, normalizes and prompts as the teacher does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from spdtool.data.kinds.embedding import MODULES
from spdtool.errors import GateError, ModelError
from spdtool.export import onnx_session
from spdtool.export.gates.reference import Reference
from spdtool.export.target import MODEL_FILE, Target
from spdtool.models.sentence import sentence_settings
from spdtool.tasks.sentence_settings import SentenceSettings, read_sentence_settings

TOKEN_VECTORS = "last_hidden_state"  # as optimum and transformers.js call it
CHECKED_BATCHES = 6  # real rows on either side of padding, and the first of the random ones
ROUNDED_FACTOR = 100  # times the tolerance: fp16 rounds the pooled numbers once more


def check_sentence_files(folder: Path, reference: Reference) -> None:
    """Refuse files of sentence-transformers that say something else than the checkpoint's.

    Raises:
        GateError: names the file, or the setting that has changed.
    """
    expected = sentence_settings(reference.model)
    if expected is None:
        if (folder / MODULES).is_file():
            raise GateError(f"the exported folder has {MODULES}, and the checkpoint is no sentence encoder")
        return
    try:
        exported = read_sentence_settings(folder)
    except ModelError as error:
        raise GateError(error.message) from None
    for name in ("pooling", "normalize", "max_length", "prompt", "prompts"):
        value, wanted = getattr(exported, name), getattr(expected, name)
        if value != wanted:
            raise GateError(f"the exported folder has {name} {value!r}; the checkpoint has {wanted!r}")
    stored, files = dict(exported.files), dict(expected.files)
    for name in sorted(stored.keys() | files.keys()):
        if name not in stored or name not in files or json.loads(stored[name]) != json.loads(files[name]):
            raise GateError(f"{name} of the exported folder is not the checkpoint's")


def check_token_vectors(target: Target, reference: Reference, folder: Path, provider: str) -> None:
    """Pool the file's vectors of tokens as a client does, and compare with its vectors of texts.

    Raises:
        GateError: they differ, or a traced file has no vectors of tokens.
    """
    settings = sentence_settings(reference.model)
    if settings is None or target.opened_by != "onnxruntime":
        return
    session = onnx_session.open_session(folder / MODEL_FILE, provider, libraries=target.libraries(folder))
    names = [value.name for value in session.get_outputs()]
    if TOKEN_VECTORS not in names:
        if target.traces_model:
            raise GateError(f"the exported file gives {', '.join(names)}: clients look for {TOKEN_VECTORS}")
        return
    tolerance = reference.recipe.export.tolerance * (ROUNDED_FACTOR if target.rounds_arithmetic else 1)
    for _, batch in list(reference.batches)[:CHECKED_BATCHES]:
        outputs = session.run(None, {value.name: batch[value.name] for value in session.get_inputs()})
        by_name = dict(zip(names, outputs, strict=True))
        states = by_name[TOKEN_VECTORS]
        check_pooled_states(outputs[0], states, batch["attention_mask"], settings, tolerance)


def check_pooled_states(
    vectors: np.ndarray, states: np.ndarray, mask: np.ndarray, settings: SentenceSettings, tolerance: float
) -> None:
    """Refuse a file whose vectors of texts are not those that a client pools from its vectors of tokens.

    Args:
        vectors: [rows, width]. states: [rows, tokens, width]. mask: [rows, tokens].
        tolerance: largest difference of a number.

    Raises:
        GateError: a vector is another one.
    """
    difference = float(np.abs(settings.pool(states, mask) - vectors).max())
    if not difference <= tolerance:
        raise GateError(
            f"sentence_embedding differs by {difference:.2g} from what {settings.pooling} pooling makes of "
            "last_hidden_state: clients that pool by themselves would get other vectors"
        )
