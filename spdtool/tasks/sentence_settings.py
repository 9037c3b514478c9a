"""Settings of a sentence-transformers folder: how the vectors of tokens become the vector of a text.

    modules.json                          Transformer, Pooling and perhaps Normalize, in this order
    1_Pooling/config.json                 the mean of the tokens' vectors, the first one, or the last one
    sentence_bert_config.json             longest input in tokens
    config_sentence_transformers.json     prompts to put before a text

The files are copied as they are, so whatever opens the teacher opens its student. Nothing here imports torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spdtool.data.formats.table import is_encodable
from spdtool.data.kinds.embedding import MODULES, find_file, is_sentence_encoder
from spdtool.errors import ModelError

TRANSFORMER_CONFIG = "sentence_bert_config.json"
SENTENCE_CONFIG = "config_sentence_transformers.json"
CARD = "README.md"
POOLING_MODES = ("mean", "cls", "lasttoken")
SUPPORTED_MODULES = (("Transformer", "Pooling"), ("Transformer", "Pooling", "Normalize"))
TRUNCATE_DIM = "truncate_dim"  # how many leading dimensions a vector has for clients, see `dimensions`
SMALLEST_NORM = 1e-12  # as torch's `normalize` has it
MATRYOSHKA = re.compile(r'"?matryoshka_dims"?\s*[:=]\s*\[([\d,\s]+)\]')


@dataclass(frozen=True)
class SentenceSettings:
    """Settings of one folder.

    Attributes:
        pooling: `mean`, `cls` or `lasttoken`.
        normalize: whether vectors have length one.
        max_length: in tokens, special ones included; None: the tokenizer's.
        prompt: is put before every text, unless another one is asked for.
        prompts: further ones, by name.
        dimensions: leading dimensions that are vectors too (Matryoshka), largest first; empty: none that we know of.
        files: path and content of each file that sentence-transformers reads beside those of transformers.
    """

    pooling: str
    normalize: bool
    max_length: int | None = None
    prompt: str = ""
    prompts: tuple[tuple[str, str], ...] = ()
    dimensions: tuple[int, ...] = ()
    files: tuple[tuple[str, str], ...] = ()

    def write(self, folder: Path) -> None:
        """Write the files of sentence-transformers into a folder."""
        for name, content in self.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content, "utf-8")
        if self.normalize:
            module = json.loads(dict(self.files)[MODULES])[2]
            (folder / module["path"]).mkdir(exist_ok=True)  # it has no file; older versions want the folder

    def pool(self, states: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Pool the last layer's vectors, [rows, tokens, width] and mask [rows, tokens], into those of texts."""
        if self.pooling == "cls":
            vectors = states[:, 0]
        elif self.pooling == "lasttoken":
            last = (mask * np.arange(mask.shape[1])).argmax(axis=1)
            vectors = states[np.arange(len(states)), last]
        else:
            weights = mask[..., None].astype(np.float32)
            vectors = (states * weights).sum(axis=1) / weights.sum(axis=1)
        if self.normalize:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), SMALLEST_NORM)
        return np.asarray(vectors)


def read_sentence_settings(source: str | Path) -> SentenceSettings:
    """Read the settings of a folder or a name of the hub.

    Raises:
        ModelError: it has other modules than an encoder, a pooling and a normalization, or a pooling that is not
            supported.
    """
    file = find_file(source, MODULES)
    if file is None:
        raise ModelError(
            f"{str(source)!r} is an encoder alone: it has no {MODULES}, which says how a text gets its vector",
            "for embeddings, save it once with sentence_transformers: SentenceTransformer(FOLDER).save_pretrained(NEW)",
        )
    modules = _read_json(file, list)
    for module in modules:
        if not isinstance(module, dict) or not all(isinstance(module.get(key), str) for key in ("type", "path")):
            raise ModelError(f"{file}: a module without a type and a path: {str(module)[:60]}", "copy the folder again")
    kinds = tuple(str(module["type"]).rsplit(".", 1)[-1] for module in modules)
    if kinds not in SUPPORTED_MODULES:
        raise ModelError(
            f"{str(source)!r} has the modules {', '.join(kinds)}",
            "supported are Transformer, Pooling and perhaps Normalize, in this order",
        )
    if modules[0]["path"]:
        raise ModelError(
            f"{str(source)!r} keeps its encoder in the folder {modules[0]['path']}",
            "save it again with sentence_transformers: SentenceTransformer(FOLDER).save_pretrained(NEW)",
        )
    files = {MODULES: file.read_text("utf-8")}
    pooling_name = f"{modules[1]['path']}/config.json"
    contents: dict[str, dict[str, Any]] = {}
    for name in (pooling_name, TRANSFORMER_CONFIG, SENTENCE_CONFIG):
        path = find_file(source, name)
        contents[name] = {}
        if path is not None:
            files[name] = path.read_text("utf-8")
            contents[name] = _read_json(path, dict)
    if pooling_name not in files:
        raise ModelError(f"{str(source)!r} lacks {pooling_name}, which says how tokens are pooled", "copy it again")
    prompts, default = _read_prompts(contents[SENTENCE_CONFIG])
    if default not in (None, *dict(prompts)):
        raise ModelError(f"{str(source)!r} has no prompt {default!r}, its default one", f"look at {SENTENCE_CONFIG}")
    pooling = contents[pooling_name]
    if pooling.get("include_prompt") is False and any(text for _, text in prompts):
        raise ModelError(
            f"{str(source)!r} pools without the tokens of its prompts", "supported is a pooling over all tokens"
        )
    max_length = contents[TRANSFORMER_CONFIG].get("max_seq_length")
    if max_length is not None and (type(max_length) is not int or max_length < 1):
        raise ModelError(
            f"{str(source)!r} has the max_seq_length {max_length!r}",
            f"{TRANSFORMER_CONFIG}: a number of tokens, or null",
        )
    return SentenceSettings(
        pooling=read_pooling_mode(pooling, source),
        normalize=len(kinds) > 2,
        max_length=max_length,
        prompt=dict(prompts).get(default, "") if default else "",
        prompts=prompts,
        dimensions=read_dimensions(source, contents[SENTENCE_CONFIG]),
        files=tuple(sorted(files.items())),
    )


def read_prompt(folder: Path) -> str:
    """Return the prompt that an exported folder puts before every text; empty where it has none."""
    return read_sentence_settings(folder).prompt if is_sentence_encoder(folder) else ""


def read_pooling_mode(config: Mapping[str, Any], source: str | Path) -> str:
    """Return the mode of a pooling's config.json, whose fields have changed with the versions.

    Raises:
        ModelError: it is none of `POOLING_MODES`, or several together.
    """
    mode = config.get("pooling_mode")
    if mode is None:
        modes = []
        for name, value in config.items():
            if name.startswith("pooling_mode_") and value is True:
                modes.append(name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token"))
        mode = " and ".join(modes)
    if mode not in POOLING_MODES:
        raise ModelError(f"{str(source)!r} pools by {mode!r}", f"supported: {', '.join(POOLING_MODES)}")
    return str(mode)


def read_dimensions(source: str | Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the Matryoshka dimensions that the card of a model names; `truncate_dim` is one too."""
    dimensions = set()
    truncated = _read_truncate_dim(config, source)
    if truncated is not None:
        dimensions.add(truncated)
    card = find_file(source, CARD)
    match = MATRYOSHKA.search(card.read_text("utf-8", "replace")) if card is not None else None
    if match is not None:
        dimensions |= {int(word) for word in match[1].split(",") if word.strip()}
    return tuple(sorted(dimensions, reverse=True))


def read_truncation(folder: Path) -> dict[str, int]:
    """Return `truncate_dim` of an exported folder as a setting of its vectors; nothing where it has none."""
    file = folder / SENTENCE_CONFIG
    if not file.is_file() or not is_sentence_encoder(folder):
        return {}
    dimension = _read_truncate_dim(_read_json(file, dict), folder)
    return {} if dimension is None else {TRUNCATE_DIM: dimension}


def _read_truncate_dim(config: Mapping[str, Any], source: str | Path) -> int | None:
    dimension = config.get(TRUNCATE_DIM)
    if dimension is not None and (type(dimension) is not int or dimension < 1):
        raise ModelError(f"{str(source)!r} has the truncate_dim {dimension!r}", f"{SENTENCE_CONFIG}: a number or null")
    return dimension


def _read_prompts(config: Mapping[str, Any]) -> tuple[tuple[tuple[str, str], ...], str | None]:
    """Return the prompts by name, and the name of the default one."""
    prompts = config.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(
        isinstance(text, str) and is_encodable(text) for text in prompts.values()
    ):
        raise ModelError(
            f"{SENTENCE_CONFIG} has the prompts {str(prompts)[:60]!r}", "a text for each name was expected"
        )
    default = config.get("default_prompt_name")
    return tuple((str(name), str(text)) for name, text in prompts.items()), default


def _read_json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}", "copy the folder again") from None
    if not isinstance(content, kind):
        raise ModelError(f"{path} is no JSON {kind.__name__}", "copy the folder again")
    return content
