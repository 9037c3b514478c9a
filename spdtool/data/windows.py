"""Overlapping windows: texts that are longer than a row may be become several rows, and no word is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from spdtool.data.dataset import Rows
from spdtool.data.tokens import Encoded, empty_split
from spdtool.errors import DataError, ModelError, first_line

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

Grouped = TypeVar("Grouped", "TextWindow", "WindowOutput")

TEXTS_AT_A_TIME = 1_000
SPECIAL_TOKENS = 2  # of half a window, at most


@dataclass(frozen=True)
class TextWindow:
    """One window of a text, as a model reads it.

    Attributes:
        example: number of the row that it was cut from.
        text: that its tokens are of; of a pair the second one.
        spans: begin and end of each token in that text, [tokens, 2].
        sources: for each token, whether it is of the first text (0) or the second (1); -1 for special tokens.
    """

    example: int
    text: str
    spans: np.ndarray
    sources: np.ndarray

    def tokens_of(self, source: int) -> np.ndarray:
        """Return the numbers of the tokens of one text that stand for at least one character."""
        has_characters = self.spans[:, 1] > self.spans[:, 0]
        return np.flatnonzero((self.sources == source) & has_characters)


class WindowOutput(NamedTuple):
    """A window, and a model's outputs for its tokens, [tokens, labels]."""

    window: TextWindow
    values: np.ndarray


class Windows(NamedTuple):
    """The windows of a split in the order of its rows; the labels of `encoded` are zeros, for a kind to replace."""

    encoded: Encoded
    windows: list[TextWindow]


def fit_stride(stride: int, limit: int, *, paired: bool) -> int:
    """Return the overlap of windows of `limit` tokens: at most half of the text that one has room for."""
    room = least_room(limit) if paired else limit
    return max(0, min(stride, room // 2 - SPECIAL_TOKENS))


def least_room(limit: int) -> int:
    """Return how many tokens a first text has to leave to the second one: a quarter of a window."""
    return limit // 4


def tokenize_windows(tokenizer: PreTrainedTokenizerBase, rows: Rows, max_length: int, stride: int) -> Windows:
    """Tokenize a split; of pairs the second text is cut into windows, each with the whole first one.

    Args:
        max_length: of a window, in tokens.
        stride: tokens of the text that neighbouring windows share.

    Raises:
        ModelError: the tokenizer has no offsets, or cannot pad.
        DataError: a first text leaves no room for the second.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            "this kind of task needs a fast tokenizer: a slow one does not say where in a text a token is",
            "convert it: AutoTokenizer.from_pretrained(FOLDER, use_fast=True).save_pretrained(FOLDER)",
        )
    template = empty_split(tokenizer)
    limit = min(max_length, tokenizer.model_max_length)
    columns: dict[str, list[int]] = {name: [] for name in template.columns}
    lengths, windows = list[int](), list[TextWindow]()
    texts = rows.first if rows.second is None else rows.second
    for start in range(0, len(rows), TEXTS_AT_A_TIME):
        chunk = rows.select(range(start, min(start + TEXTS_AT_A_TIME, len(rows))))
        for number, encoding in _encode(tokenizer, chunk, start, limit, stride):
            lengths.append(len(encoding.ids))
            columns["input_ids"] += encoding.ids
            if "token_type_ids" in columns:
                columns["token_type_ids"] += encoding.type_ids
            windows.append(make_window(number, texts[number], encoding))
    encoded = Encoded(
        columns={name: np.array(values, np.int32) for name, values in columns.items()},
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        labels=np.zeros(len(lengths), np.int64),
        pad_values=template.pad_values,
        pad_left=template.pad_left,
    )
    return Windows(encoded, windows)


def describe_no_room(text: str, count: int, limit: int) -> str:
    """Say that a first text of so many tokens leaves too little of a window to the second one."""
    return f"{text[:60]!r} has {count} tokens: the text beside it has no room in windows of {limit}"


def make_window(example: int, text: str, encoding: Encoding) -> TextWindow:
    """Describe one encoding of the library tokenizers, of a row of which `text` is the text to read."""
    spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    sources = np.array([-1 if source is None else source for source in encoding.sequence_ids], np.int64)
    return TextWindow(example, text, spans, sources)


def group_by_text(windows: Sequence[Grouped]) -> list[list[Grouped]]:
    """Group windows, or their outputs, that are of one row and follow each other."""
    groups: list[list[Grouped]] = []
    last = None
    for each in windows:
        window = each.window if isinstance(each, WindowOutput) else each
        if last is None or window.example != last:
            groups.append([])
        groups[-1].append(each)
        last = window.example
    return groups


def sample_windows(rows: Encoded, windows: Sequence[TextWindow], count: int, seed: int) -> Encoded:
    """Draw all windows of `count` texts, and keep their order; all of them where there are no more texts."""
    examples = np.array([window.example for window in windows], np.int64)
    texts = np.unique(examples)
    if count >= len(texts):
        return rows
    drawn = np.random.default_rng(seed).choice(texts, count, replace=False)
    return rows.select(np.flatnonzero(np.isin(examples, drawn)))


def locate_words(windows: Sequence[TextWindow], words: np.ndarray) -> list[np.ndarray]:
    """Find the token at which each word of a text is read: its first piece, in the window that sees most around it.

    Args:
        windows: all of the text.
        words: begin and end of each word, [words, 2].

    Returns:
        for each window and token, the number of the word that is read there, else -1. A word that no token is of is
        nowhere.
    """
    first_start: dict[int, int] = {}
    candidates: list[tuple[int, int, int, int, int]] = []
    for number, window in enumerate(windows):
        tokens = np.flatnonzero((window.sources >= 0) & (window.spans[:, 1] > window.spans[:, 0]))
        starts, ends = window.spans[tokens, 0], window.spans[tokens, 1]
        # The first word that ends behind the token's begin: a token may begin with the space before its word.
        word = np.searchsorted(words[:, 1], starts, side="right")
        inside = word < len(words)
        inside[inside] = ends[inside] > words[word[inside], 0]
        before = -1
        for token, start, index in np.stack([tokens, starts, word], axis=1)[inside].tolist():
            if index != before:
                first_start[index] = min(start, first_start.get(index, start))
                context = min(token - int(tokens[0]), int(tokens[-1]) - token)
                candidates.append((index, start, -context, number, token))
            before = index
    located = [np.full(len(window.sources), -1, np.int64) for window in windows]
    read: set[int] = set()
    for index, start, _, number, token in sorted(candidates):
        # a window that begins inside a word has no first piece of it
        if index not in read and start == first_start[index]:
            located[number][token] = index
            read.add(index)
    return located


def locate_span(window: TextWindow, start: int, end: int) -> tuple[int, int] | None:
    """Return the first and last token of a span of the second text; None where the window lacks part of it.

    Args:
        start, end: characters of the text.
    """
    tokens = window.tokens_of(source=1)
    if not len(tokens):
        return None
    first = int(np.searchsorted(window.spans[tokens, 1], start, side="right"))
    last = int(np.searchsorted(window.spans[tokens, 0], end, side="left")) - 1
    is_cut = window.spans[tokens[0], 0] > start or window.spans[tokens[-1], 1] < end
    if is_cut or first > last:
        return None
    return int(tokens[first]), int(tokens[last])


def _encode(
    tokenizer: PreTrainedTokenizerBase, rows: Rows, first_row: int, limit: int, stride: int
) -> list[tuple[int, Encoding]]:
    """Return the number of the row and the encoding of every window."""
    paired = rows.second is not None
    firsts = list(rows.first)
    if paired:
        room = limit - tokenizer.num_special_tokens_to_add(pair=True)
        counts = [len(ids) for ids in tokenizer(firsts, add_special_tokens=False)["input_ids"]]
        for number, count in enumerate(counts):
            if room - count < least_room(limit):
                problem = describe_no_room(firsts[number], count, limit)
                raise DataError(f"row {first_row + number}: {problem}", "raise max_length, or leave such rows out")
    try:
        encoding = tokenizer(
            firsts,
            list(rows.second) if rows.second is not None else None,
            truncation="only_second" if paired else True,
            max_length=limit,
            stride=fit_stride(stride, limit, paired=paired),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
    except Exception as error:  # a panic or a bare Exception of its Rust code
        raise DataError(f"the texts cannot be cut into windows of {limit} tokens: {first_line(error)}") from None
    samples = encoding["overflow_to_sample_mapping"]
    return [(first_row + sample, window) for sample, window in zip(samples, encoding.encodings, strict=True)]
