"""A smaller vocabulary: the tokens that the data needs, in the tokenizer and in the embeddings.

Half of a small encoder's bytes are word embeddings, and one task uses a few thousand of its 30,000
to 250,000 tokens. A text whose tokens are all kept is cut into the same pieces as before, so the
model's answer to it does not change.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from pydantic import JsonValue
from torch import nn
from transformers import AutoTokenizer

from spdtool.errors import ModelError, RecipeError
from spdtool.models.checks.tables import POSITIONS_FROM_PADDING
from spdtool.recipe.fields import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

JsonObject = dict[str, JsonValue]


def read_extra_texts(recipe: Recipe) -> list[str]:
    """Read the lines of `finetune.vocabulary_texts`; none without it.

    Raises:
        RecipeError: the file cannot be read as UTF-8.
    """
    if recipe.finetune.vocabulary_texts is None:
        return []
    file = Path(recipe.finetune.vocabulary_texts)
    try:
        return file.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"finetune.vocabulary_texts: {file} cannot be read: {error}", "give a UTF-8 file with a text a line"
        ) from None


def choose_tokens(tokenizer: PreTrainedTokenizerBase, used: Iterable[int]) -> np.ndarray:
    """Return the tokens to keep: used ones, those that an unseen word may need, and every added token.

    Whatever the kind of tokenizer, a text whose tokens are all used is still cut into the same pieces:

    - WordPiece takes the longest piece that it knows. The single characters of kept pieces are kept too, so that an
      unseen word of these characters is spelt out and not unknown.
    - BPE builds a token by merges, so both halves of every merge that gives a kept token are kept, down to the single
      characters (of a byte-level tokenizer: all 256 bytes).
    - Unigram takes the likeliest pieces. Single characters are kept as for WordPiece, and the pieces of single bytes.

    Args:
        used: ids of tokens.

    Returns:
        Ids, int64 [tokens], in ascending order.

    Raises:
        ModelError: the tokenizer is of another kind, or not one of the fast ones.
    """
    description = _read_tokenizer(tokenizer)
    model = cast("JsonObject", description["model"])
    ids = _read_vocabulary(model)
    pieces = {index: piece for piece, index in ids.items()}
    # Special tokens are among them, which the model needs whatever the texts.
    added = {index for _, index in _added_tokens(description)}
    kept = {piece for index in used if (piece := pieces.get(int(index))) is not None}
    if model["type"] == "BPE":
        kept = _close_under_merges(kept, _read_merges(model))
        kept |= {piece for piece in ids if len(piece) == 1}
    else:
        # WordPiece writes a character inside a word as ##a, and one at its begin as a.
        prefix = str(model.get("continuing_subword_prefix") or "")
        characters = {character for piece in kept for character in piece.removeprefix(prefix)}
        kept |= {piece for piece in ids if piece.removeprefix(prefix) in characters}
        if model.get("byte_fallback"):
            kept |= {f"<0x{byte:02X}>" for byte in range(256)} & ids.keys()
    unknown = model.get("unk_id")
    kept_ids = {ids[piece] for piece in kept} | added | ({int(cast("int", unknown))} if unknown is not None else set())
    return np.array(sorted(kept_ids), np.int64)


def trim_tokenizer(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> PreTrainedTokenizerBase:
    """Return the tokenizer with these tokens alone, numbered in their order.

    Args:
        tokens: from `choose_tokens`.
    """
    new_ids = {int(old): new for new, old in enumerate(tokens)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        file = folder / "tokenizer.json"
        description: JsonObject = json.loads(file.read_text("utf-8"))
        _renumber(description, new_ids)
        file.write_text(json.dumps(description, ensure_ascii=False), "utf-8")
        for other in folder.iterdir():  # vocab.txt and the like name the old numbers
            if other.name not in ("tokenizer.json", "tokenizer_config.json"):
                other.unlink()
        # Before it is opened: transformers takes the numbers of added tokens from this file too.
        _renumber_settings(folder / "tokenizer_config.json", new_ids)
        trimmed: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    trimmed.name_or_path = tokenizer.name_or_path
    for name in ("sentence_prompt", "sentence_prompts"):  # of a sentence encoder; no file of the tokenizer has them
        if hasattr(tokenizer, name):
            setattr(trimmed, name, getattr(tokenizer, name))
    return trimmed


def trim_embeddings(model: PreTrainedModel, tokens: np.ndarray) -> None:
    """Keep the word embeddings of these tokens alone, and renumber the special tokens of the configuration.

    Args:
        tokens: from `choose_tokens`.

    Raises:
        ModelError: the family counts positions from the number of its padding token, which would change.
    """
    new_ids = {int(old): new for new, old in enumerate(tokens)}
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    padding = model.config.pad_token_id
    if model.config.model_type in POSITIONS_FROM_PADDING and new_ids.get(padding, padding) != padding:
        raise ModelError(
            f"the model counts positions from its padding token {padding}, whose number would change",
            "leave out finetune.vocabulary",
        )
    with torch.no_grad():
        weight = embeddings.weight[torch.as_tensor(tokens, device=embeddings.weight.device)].clone()
    old_index = embeddings.padding_idx
    # No gradient reaches the row of the padding token; it has to be the same row as before.
    new_index = None if old_index is None else new_ids.get(old_index)
    trimmed = nn.Embedding(len(tokens), weight.shape[1], padding_idx=new_index, _weight=weight)
    # A new parameter is trained, and embeddings may have been frozen.
    trimmed.weight.requires_grad_(embeddings.weight.requires_grad)
    model.set_input_embeddings(trimmed)
    model.config.vocab_size = len(tokens)
    for name, value in model.config.to_dict().items():
        if name.endswith("_token_id") and isinstance(value, int) and value in new_ids:
            setattr(model.config, name, new_ids[value])


def _read_tokenizer(tokenizer: PreTrainedTokenizerBase) -> JsonObject:
    """Return the contents of tokenizer.json."""
    if not tokenizer.is_fast:
        raise ModelError(
            f"the vocabulary of a {type(tokenizer).__name__} cannot be trimmed: it is not one of the fast tokenizers",
            "leave out finetune.vocabulary",
        )
    description: JsonObject = json.loads(tokenizer.backend_tokenizer.to_str())
    return description


def _read_vocabulary(model: JsonObject) -> dict[str, int]:
    """Return the ids of the pieces, without the added tokens.

    Raises:
        ModelError: the tokenizer is of an unknown kind.
    """
    if model["type"] in ("WordPiece", "BPE"):
        return cast("dict[str, int]", model["vocab"])
    if model["type"] == "Unigram":
        scored = cast("list[tuple[str, float]]", model["vocab"])
        return {piece: index for index, (piece, _) in enumerate(scored)}
    raise ModelError(
        f"the vocabulary of a {model['type']} tokenizer cannot be trimmed: WordPiece, BPE and Unigram can",
        "leave out finetune.vocabulary",
    )


def _read_merges(model: JsonObject) -> list[tuple[str, str]]:
    """Return the merges of a BPE model, which older files hold as one string each."""
    merges = []
    for merge in cast("list[str | list[str]]", model["merges"]):
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        merges.append((first, second))
    return merges


def _close_under_merges(kept: set[str], merges: list[tuple[str, str]]) -> set[str]:
    """Return these pieces with both halves of every merge that gives one of them, and so on."""
    halves: dict[str, list[tuple[str, str]]] = {}
    for first, second in merges:
        halves.setdefault(first + second, []).append((first, second))
    closed, waiting = set(kept), list(kept)
    while waiting:
        for pair in halves.get(waiting.pop(), ()):
            for half in pair:
                if half not in closed:
                    closed.add(half)
                    waiting.append(half)
    return closed


def _added_tokens(description: JsonObject) -> list[tuple[JsonObject, int]]:
    """Return the entries of the added tokens with their ids; special tokens are among them."""
    entries = cast("list[JsonObject]", description["added_tokens"])
    return [(entry, int(cast("int", entry["id"]))) for entry in entries]


def _renumber(description: JsonObject, new_ids: Mapping[int, int]) -> None:
    """Leave the other tokens out of tokenizer.json, and renumber the rest, in place."""
    model = cast("JsonObject", description["model"])
    ids = _read_vocabulary(model)
    kept = {piece: new_ids[index] for piece, index in ids.items() if index in new_ids}
    if model["type"] == "Unigram":
        scored = cast("list[list[JsonValue]]", model["vocab"])
        # Ids of Unigram are positions in the list, so its order is their renumbering.
        remaining = sorted(index for index in ids.values() if index in new_ids)
        model["vocab"] = [scored[index] for index in remaining]
        if model.get("unk_id") is not None:
            model["unk_id"] = new_ids[int(cast("int", model["unk_id"]))]
    else:
        model["vocab"] = cast("JsonObject", kept)
    if model["type"] == "BPE":
        possible = []
        for first, second in _read_merges(model):
            if first in kept and second in kept and first + second in kept:
                possible.append([first, second])
        model["merges"] = cast("JsonValue", possible)
    for entry, index in _added_tokens(description):
        entry["id"] = new_ids[index]
    if description.get("padding"):
        padding = cast("JsonObject", description["padding"])
        padding["pad_id"] = new_ids[int(cast("int", padding["pad_id"]))]
    _renumber_processor(cast("JsonObject | None", description.get("post_processor")), new_ids)


def _renumber_processor(processor: JsonObject | None, new_ids: Mapping[int, int]) -> None:
    """Renumber the special tokens that a post-processor adds, in place."""
    if processor is None:
        return
    for nested in cast("list[JsonObject]", processor.get("processors") or []):
        _renumber_processor(nested, new_ids)
    for name in ("sep", "cls"):  # BertProcessing and RobertaProcessing: [token, id]
        if name in processor:
            token, index = cast("tuple[str, int]", processor[name])
            processor[name] = [token, new_ids[index]]
    for special in cast("dict[str, JsonObject]", processor.get("special_tokens") or {}).values():
        special["ids"] = [new_ids[index] for index in cast("list[int]", special["ids"])]


def _renumber_settings(file: Path, new_ids: Mapping[int, int]) -> None:
    """Renumber the added tokens that tokenizer_config.json of older releases lists by id."""
    settings: JsonObject = json.loads(file.read_text("utf-8"))
    listed = cast("JsonObject | None", settings.get("added_tokens_decoder"))
    if listed is None:
        return
    settings["added_tokens_decoder"] = {str(new_ids[int(old)]): entry for old, entry in listed.items()}
    file.write_text(json.dumps(settings, ensure_ascii=False), "utf-8")
