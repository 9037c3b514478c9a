"""Trimming the vocabulary: which tokens stay; texts made of them keep their tokens and logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from spdtool.errors import ModelError
from spdtool.models.vocabulary import choose_tokens, trim_embeddings, trim_tokenizer

TEXTS = [
    "the cat sat on the mat while the dog was sleeping",
    "unbelievable stories are told by unkind strangers",
    "sleeping dogs and telling cats sat unkindly",
    "a stranger was telling the unbelievable story of the mat",
]
UNSEEN = ["strange mats told kindly", "the sleep of a teller"]
KINDS = ("WordPiece", "BPE", "byte-level BPE", "Unigram")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def train_tokenizer(kind: str) -> Any:
    """Train a fast tokenizer of one kind on TEXTS; its special tokens come last, as in ModernBERT."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    core: Any
    if kind == "WordPiece":
        core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        trainer: Any = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]"])
    elif kind == "Unigram":
        core = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=["[UNK]"], unk_token="[UNK]")
    else:
        core = Tokenizer(models.BPE(unk_token=None if kind == "byte-level BPE" else "[UNK]"))
        alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "byte-level BPE" else []
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["[UNK]"], initial_alphabet=alphabet)
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind == "byte-level BPE":
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    core.train_from_iterator(TEXTS, trainer)
    core.add_special_tokens(SPECIAL)
    numbers = [(token, core.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=numbers
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_used_texts_are_cut_as_before(kind: str) -> None:
    tokenizer = train_tokenizer(kind)
    for count in (1, 2, len(TEXTS)):
        kept_texts = TEXTS[:count]
        used = {index for ids in tokenizer(kept_texts)["input_ids"] for index in ids}
        tokens = choose_tokens(tokenizer, used)
        trimmed = trim_tokenizer(tokenizer, tokens)
        assert len(trimmed) == len(tokens) <= len(tokenizer), (kind, count)
        if count == 1:
            assert len(tokens) < len(tokenizer), kind
        for text in kept_texts:
            before, after = tokenizer(text)["input_ids"], trimmed(text)["input_ids"]
            assert tokens[after].tolist() == before, (kind, text)
            assert trimmed.convert_ids_to_tokens(after) == tokenizer.convert_ids_to_tokens(before), (kind, text)
        for name in ("pad_token_id", "unk_token_id", "cls_token_id", "sep_token_id"):
            assert tokens[getattr(trimmed, name)] == getattr(tokenizer, name), (kind, name)


def test_the_prompts_of_a_sentence_encoder_are_kept() -> None:
    tokenizer = train_tokenizer("WordPiece")
    assert not hasattr(trim_tokenizer(tokenizer, choose_tokens(tokenizer, [])), "sentence_prompt")
    tokenizer.sentence_prompt, tokenizer.sentence_prompts = "query: ", ("query: ", "passage: ")
    trimmed = trim_tokenizer(tokenizer, choose_tokens(tokenizer, []))
    assert (trimmed.sentence_prompt, trimmed.sentence_prompts) == ("query: ", ("query: ", "passage: "))


@pytest.mark.parametrize("kind", KINDS)
def test_unseen_words_of_seen_characters_are_not_unknown(kind: str) -> None:
    tokenizer = train_tokenizer(kind)
    used = {index for ids in tokenizer(TEXTS)["input_ids"] for index in ids}
    trimmed = trim_tokenizer(tokenizer, choose_tokens(tokenizer, used))
    for text in UNSEEN:
        assert trimmed.unk_token_id not in trimmed(text)["input_ids"], (kind, text)


def test_a_trimmed_model_answers_kept_texts_as_before(tiny_bert: Any) -> None:
    tokenizer = train_tokenizer("WordPiece")
    model = tiny_bert(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    inputs = tokenizer(TEXTS[:2], padding=True, return_tensors="pt")
    with torch.no_grad():
        before = model(**inputs).logits
    tokens = choose_tokens(tokenizer, set(inputs["input_ids"].flatten().tolist()))
    trimmed = trim_tokenizer(tokenizer, tokens)
    trim_embeddings(model, tokens)
    assert model.config.vocab_size == len(tokens) < len(tokenizer)
    assert model.config.pad_token_id == trimmed.pad_token_id
    with torch.no_grad():
        after = model(**trimmed(TEXTS[:2], padding=True, return_tensors="pt")).logits
    assert torch.equal(before, after)


def test_a_padding_token_that_positions_count_from_keeps_its_number() -> None:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        pad_token_id=7,
    )
    model = RobertaForSequenceClassification(config)
    with pytest.raises(ModelError, match="counts positions from its padding token 7"):
        trim_embeddings(model, np.array([1, 7, 9]))
    trim_embeddings(model, np.arange(8))
    assert model.config.pad_token_id == 7


def test_another_kind_of_tokenizer_is_refused() -> None:
    from tokenizers import Tokenizer, models

    core = Tokenizer(models.WordLevel({"[UNK]": 0, "cat": 1}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    with pytest.raises(ModelError, match="WordLevel"):
        choose_tokens(tokenizer, [1])
