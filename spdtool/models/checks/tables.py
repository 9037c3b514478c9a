"""Whether the numbers that a tokenizer gives lie in the tables of its model: tokens, padding, token types."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from spdtool.errors import ModelError
from spdtool.models.config import announce_once
from spdtool.tasks.head import head_of_config

TYPES = "token_type_ids"
# Families that count positions from the padding token on: another number shifts every position.
POSITIONS_FROM_PADDING = frozenset(
    {
        *("camembert", "data2vec-text", "esm", "ibert", "longformer", "mpnet", "roberta", "roberta-prelayernorm"),
        *("xlm-roberta", "xlm-roberta-xl", "xmod"),
    }
)


def fit_tokenizer(source: str | Path, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Check a tokenizer against the tables of its model, and let it give only the inputs that the model takes.

    Args:
        source: of both, for messages.
        tokenizer: is changed: it gives no token types where the model takes none, or has only one.
        config: the model's.

    Raises:
        ModelError: names the token and its number, and the size of the table.
    """
    _refuse_foreign_tokens(source, tokenizer, config)
    _refuse_other_padding(source, tokenizer, config)
    if TYPES not in tokenizer.model_input_names:
        return
    table: int = getattr(config, "type_vocab_size", None) or 0
    largest = max(tokenizer("a", "b")[TYPES], default=0)
    if not _takes(config, TYPES):
        _drop_types(tokenizer)
    elif table == 1 and largest > 0:
        # all that such a model was ever trained on
        announce_once(f"{source}: the tokenizer numbers the second text {largest}, and the model has one token type")
        _drop_types(tokenizer)
    elif 0 < table <= largest:
        raise ModelError(
            f"the tokenizer of {str(source)!r} gives the token type {largest}; the model has {table}",
            "tokenizer and model must come from the same place",
        )


def _refuse_foreign_tokens(source: str | Path, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    size = getattr(config, "vocab_size", None)
    if not size:  # a model of characters hashes them
        return
    foreign = {}
    for token, number in tokenizer.get_vocab().items():
        if number >= size:
            foreign[number] = token
    if not foreign:
        return
    pad = tokenizer.pad_token_id
    number = pad if pad in foreign else max(foreign)
    name = "padding token" if number == pad else "token"
    raise ModelError(
        f"the tokenizer of {str(source)!r} has the {name} {foreign[number]!r} with the number {number}, and the model "
        f"has {size} word embeddings: {len(foreign)} tokens have none",
        f"give the tokenizer of this model; if tokens were added to it, the model lacks "
        f"resize_token_embeddings({max(foreign) + 1}), and some training with them",
    )


def _refuse_other_padding(source: str | Path, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    of_tokenizer, of_model = tokenizer.pad_token_id, getattr(config, "pad_token_id", None)
    if config.model_type not in POSITIONS_FROM_PADDING or of_tokenizer is None or of_tokenizer == of_model:
        return
    raise ModelError(
        f"the tokenizer of {str(source)!r} pads with token {of_tokenizer}, and config.json has pad_token_id {of_model}",
        f"a {config.model_type!r} counts positions from it: give the tokenizer of this model",
    )


def _takes(config: PretrainedConfig, name: str) -> bool:
    """Tell whether the model of this configuration takes an input; of an unknown family: yes."""
    auto_class: Any = getattr(transformers, head_of_config(config).auto_class)
    model_class: Any = auto_class._model_mapping.get(type(config), None)
    return model_class is None or name in inspect.signature(model_class.forward).parameters


def _drop_types(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != TYPES]
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names  # of transformers 4, which saves these
