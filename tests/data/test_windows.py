"""Windows: every word of a long text is read once, at its first piece, where most is seen around it."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from spdtool.data.dataset import Rows
from spdtool.data.windows import fit_stride, group_by_text, locate_words, tokenize_windows
from spdtool.errors import DataError


def spans_of(text: str) -> np.ndarray:
    ends = np.cumsum([len(word) + 1 for word in text.split(" ")]) - 1
    return np.stack([ends - [len(word) for word in text.split(" ")], ends], axis=1)


def test_no_word_of_a_long_text_is_lost_and_none_is_read_twice(toys: ModuleType) -> None:
    texts = list(toys.rows(40, shortest=1, longest=60).first)
    for stride in (0, 3, 5, 100):
        cut = tokenize_windows(toys.tokenizer(), Rows(texts, None, [0] * len(texts)), 12, stride)
        assert int(cut.encoded.lengths.max()) == 12
        groups = group_by_text(cut.windows)
        assert [group[0].example for group in groups] == list(range(len(texts)))
        for text, group in zip(texts, groups, strict=True):
            read = np.concatenate(locate_words(group, spans_of(text)))
            assert sorted(read[read >= 0].tolist()) == list(range(len(text.split(" ")))), (stride, text)


def test_a_word_in_two_windows_is_read_where_more_is_around_it(toys: ModuleType) -> None:
    text = " ".join(["good"] * 14)
    cut = tokenize_windows(toys.tokenizer(), Rows([text], None, [0]), 12, 4)
    first, second = locate_words(cut.windows, spans_of(text))
    assert first[first >= 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]  # of the four that are shared, two each
    assert second[second >= 0].tolist() == [8, 9, 10, 11, 12, 13]


def test_pieces_of_a_word_and_words_without_a_token() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = ("[UNK]", "[PAD]", "[CLS]", "[SEP]", "un", "##able", "##s", "he", "##llo")
    core = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")
    text = "unables hello"
    cut = tokenize_windows(tokenizer, Rows([text], None, [0]), 4, 1)  # windows of two pieces: words are cut
    assert len(cut.windows) == 3
    read = [words.tolist() for words in locate_words(cut.windows, spans_of(text))]
    word_tokens = [
        (window, token) for window, words in enumerate(read) for token in range(len(words)) if words[token] >= 0
    ]
    assert len(word_tokens) == 2
    assert word_tokens[0] == (0, 1)
    words = np.array([[0, 7], [7, 8], [8, 13]])  # the second is a space: no token is of it
    read = [words.tolist() for words in locate_words(cut.windows, words)]
    assert sorted(number for words in read for number in words if number >= 0) == [0, 2]


def test_a_first_text_that_leaves_no_room_is_refused(toys: ModuleType) -> None:
    rows = Rows(["good", "good " * 30], ["bad " * 30, "bad"], [0, 0])
    with pytest.raises(DataError, match="row 1: .* has 30 tokens: the text beside it has no room"):
        tokenize_windows(toys.tokenizer(), rows, 32, 4)
    assert [fit_stride(stride, 20, paired=False) for stride in (0, 3, 9, 100)] == [0, 3, 8, 8]
    assert [fit_stride(5, limit, paired=True) for limit in (4, 24, 64)] == [0, 1, 5]


def test_a_text_of_100_000_characters_is_cut_into_windows(toys: ModuleType) -> None:
    text = "good bad " * 12_000
    cut = tokenize_windows(toys.tokenizer(), Rows([text.strip()], None, [0]), 64, 16)
    read = np.concatenate(locate_words(cut.windows, spans_of(text.strip())))
    assert (read >= 0).sum() == 24_000
