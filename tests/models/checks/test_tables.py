"""Token ids and token types must lie inside the embedding tables of the model."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from spdtool.errors import ModelError
from spdtool.export.bundle.read import OFFSET_POSITIONS
from spdtool.models.checks.tables import POSITIONS_FROM_PADDING
from spdtool.models.load import load_tokenizer, save_model


def test_tokens_without_an_embedding_are_refused_by_name(tmp_path: Path, toys: ModuleType) -> None:
    tokenizer = toys.tokenizer()
    tokenizer.add_tokens(["wow", "meh"])
    save_model(toys.bert(), tokenizer, tmp_path / "added")
    with pytest.raises(ModelError, match="token 'meh' with the number 26, and the model has 25 word") as error:
        load_tokenizer(tmp_path / "added")
    assert "resize_token_embeddings(27)" in str(error.value.hint)
    tokenizer = toys.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    save_model(toys.bert(), tokenizer, tmp_path / "padded")
    with pytest.raises(ModelError, match="padding token '<pad>' with the number 25"):
        load_tokenizer(tmp_path / "padded")


def test_token_types_are_dropped_where_the_model_has_one_or_takes_none(tmp_path: Path, toys: ModuleType) -> None:
    for family, fields in (("bert", {"type_vocab_size": 1}), ("distilbert", {})):
        save_model(toys.classifier(family, **fields), toys.tokenizer(), tmp_path / family)
        tokenizer = load_tokenizer(tmp_path / family)
        assert "token_type_ids" not in tokenizer("a film", "the book"), family
        tokenizer.save_pretrained(tmp_path / family)
        assert "token_type_ids" not in load_tokenizer(tmp_path / family)("a film", "the book"), family
    save_model(toys.bert(), toys.tokenizer(), tmp_path / "two")
    assert max(load_tokenizer(tmp_path / "two")("a film", "the book")["token_type_ids"]) == 1


def test_padding_must_be_the_token_from_which_positions_are_counted(tmp_path: Path, toys: ModuleType) -> None:
    save_model(toys.classifier("roberta", pad_token_id=1), toys.tokenizer(token_types=False), tmp_path)
    with pytest.raises(ModelError, match="pads with token 0, and config.json has pad_token_id 1"):
        load_tokenizer(tmp_path)
    save_model(toys.bert(pad_token_id=1), toys.tokenizer(), tmp_path / "bert")
    load_tokenizer(tmp_path / "bert")  # positions of a BERT do not depend on it


def test_exported_folders_count_positions_as_checkpoints_do() -> None:
    """Two lists, because an exported folder is opened without transformers."""
    assert OFFSET_POSITIONS == POSITIONS_FROM_PADDING
