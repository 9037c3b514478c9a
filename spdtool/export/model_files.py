"""Read the small files of an exported folder: tokenizer.json, and the fields of config.json that a classifier needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from tokenizers import Tokenizer

from spdtool.errors import ModelError

Config: TypeAlias = Mapping[str, Any]
"""The content of config.json or tokenizer_config.json."""


def read_tokenizer(folder: Path) -> Tokenizer:
    """Read tokenizer.json. Raises ModelError."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ModelError(f"{folder} has no tokenizer.json", "only fast tokenizers can be used without transformers")
    try:
        return Tokenizer.from_file(str(file))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises bare Exception, and a panic of its Rust code is none
        raise ModelError(f"{file} cannot be read: {error}", "copy the folder again") from None


def padding_values(tokenizer: Tokenizer, config: Config, tokenizer_config: Config) -> dict[str, int]:
    """Return the number that pads each input, from the tokenizer or else from the model's configuration.

    Raises:
        ModelError: it is no token's number.
    """
    pad_token = tokenizer_config.get("pad_token")
    if isinstance(pad_token, Mapping):  # transformers 4 writes an object with its content
        pad_token = pad_token.get("content")
    pad_id = None
    if isinstance(pad_token, str):
        try:
            pad_id = tokenizer.token_to_id(pad_token)
        except UnicodeEncodeError:
            raise ModelError(f"the padding token {pad_token!r} is not valid Unicode") from None
    if pad_id is None:  # the tokenizer names no padding token, or one that is not in its vocabulary
        pad_id = config.get("pad_token_id") or 0
    values = {"input_ids": pad_id, "token_type_ids": tokenizer_config.get("pad_token_type_id") or 0}
    for name, value in values.items():
        if type(value) is not int or not 0 <= value < 2**31:
            raise ModelError(f"{name} cannot be padded with {value!r}: it is no token's number")
    return values


def read_count(config: Config, name: str) -> int | None:
    """Return a number of a configuration, or None where it has none.

    Raises:
        ModelError: it is no number above or equal to zero.
    """
    value = config.get(name)
    if value is not None and (type(value) is not int or value < 0):
        raise ModelError(f"{name} of config.json is {str(value)[:60]!r}: a number was expected")
    return value


def ordered_labels(config: Config) -> list[str]:
    """Return the labels of a configuration in the order of the logits.

    Raises:
        ModelError: they are not numbered from 0, or two have one name.
    """
    by_index = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # transformers does not write the default
    names: list[str] = []
    if isinstance(by_index, Mapping):
        values = (by_index.get(str(index)) for index in range(len(by_index)))
        names = [name for name in values if isinstance(name, str)]
    if not names or len(names) < len(by_index):
        raise ModelError(f"id2label of config.json does not number the labels from 0: {str(by_index)[:200]}")
    if len(set(names)) < len(names):
        raise ModelError(f"id2label of config.json gives two labels one name: {names}")
    return names
