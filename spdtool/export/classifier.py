"""A model of onnxruntime as a function from text to labels: what `spdtool.load` returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from tokenizers import Tokenizer

from spdtool.data.windows import WindowOutput, group_by_text
from spdtool.errors import DataError, ModelError
from spdtool.export.bundle.read import Bundle
from spdtool.export.model_files import Config, ordered_labels, padding_values, read_count
from spdtool.export.row_tokenizer import RowTokenizer
from spdtool.export.target import RIGHT_PADDED
from spdtool.export.token_rows import (
    TokenRow,
    are_texts,
    check_pairs,
    list_column,
    rows_of_integers,
    token_row,
    token_rows_of_columns,
)
from spdtool.tasks.decision import Answer, Json, find_decision
from spdtool.tasks.head import Head, head_of_config

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Inputs: TypeAlias = str | Sequence[Any] | np.ndarray | Mapping[str, Any]
"""A text, texts, token ids of one row or of several (lists or an array), or the model's inputs by name."""

BATCH_SIZE = 32
MIXED_EXPORTS = "the model and config.json come from two exports: export again, or copy the whole folder"

RowLogits: TypeAlias = np.ndarray | list[np.ndarray]
"""Logits [rows, labels]; of a model with outputs for each token, [tokens, labels] for each row."""


@dataclass(frozen=True)
class KindSettings:
    """What a manifest says of the kind of task: its registered name, and settings of its decision.

    Without a name config.json decides.
    """

    name: str | None = None
    settings: Mapping[str, Json] = field(default_factory=dict)


class Classifier:
    """An onnxruntime session with its tokenizer and the names of its labels.

    Attributes:
        names: labels in the order of the logits.
        pads_left: whether shorter rows of a batch are padded on the left.
        padding: name of each input to the value that pads it.
        decision: turns outputs into answers, as the kind of task has it.
        bundle: the opened folder and the model in it that runs; None for a classifier that was not
            opened from one.
        prompt: is put before every text; empty for all but sentence encoders that have one.
        text: names of the one or two text columns of the training data; None if the folder does not
            name them, and a row may then be a single text or a pair.
    """

    bundle: Bundle | None = None
    prompt: str = ""
    text: tuple[str, ...] | None = None

    def __init__(
        self,
        session: InferenceSession,
        tokenizer: Tokenizer,
        config: Config,
        tokenizer_config: Config,
        kind: KindSettings | None = None,
    ) -> None:
        self._session = session
        self._inputs = [value.name for value in session.get_inputs()]
        self._is_right_padded = session.get_modelmeta().custom_metadata_map.get(RIGHT_PADDED) == "true"
        self.pads_left = tokenizer_config.get("padding_side") == "left"
        self.padding = padding_values(tokenizer, config, tokenizer_config)
        self._vocabulary_size = read_count(config, "vocab_size")
        self._token_types = read_count(config, "type_vocab_size")
        self._reopen: tuple[Callable[..., Classifier], tuple[Any, ...]] | None = None
        self._head = head_of_config(config)
        self.names = self._head.name_outputs(config) or ordered_labels(config)
        check_output_count(session, self.names, self._head)
        kind = kind or KindSettings()
        decision = find_decision(config, kind.name)
        self.decision = decision(self.names, decision.settings_of(config) | dict(kind.settings))
        self._tokenizer = RowTokenizer(tokenizer, config, tokenizer_config, self.decision)

    @property
    def max_length(self) -> int:
        """Longest input in tokens; longer texts are cut."""
        return self._tokenizer.max_length

    def limit_length(self, max_length: int) -> None:
        """Cut texts to this many tokens; see `RowTokenizer.limit_length`."""
        self._tokenizer.limit_length(max_length)

    def pickle_as(self, reopen: Callable[..., Classifier], arguments: tuple[Any, ...]) -> None:
        """Let another process, which cannot have this session, get what `reopen(*arguments)` returns there."""
        self._reopen = reopen, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle how it is opened again."""
        if self._reopen is None:
            raise TypeError("a classifier that was not opened by spdtool.load cannot be pickled")
        return self._reopen

    def __call__(self, inputs: Inputs, pairs: str | Sequence[str] | None = None) -> Answer | list[Answer]:
        """Classify one text, or a list of texts.

        Args:
            inputs: a list, an array, an iterator or a Series of pandas; for what else, see `logits`.
            pairs: second text of each row, for a task on pairs.

        Returns:
            The answer to a single text, or a list of answers: a label, a number for a regression,
            or what else the kind of task has, see `decide`.

        Raises:
            DataError: the input cannot be classified.
        """
        answers = self.labels(inputs, pairs)
        return answers[0] if isinstance(inputs, str) else answers

    def labels(self, inputs: Inputs, pairs: str | Sequence[str] | None = None) -> list[Answer]:
        """Classify every row; see `decide` for what an answer is. Raises as a call does."""
        return self.decide(self.outputs(inputs, pairs))

    def outputs(self, inputs: Inputs, pairs: str | Sequence[str] | None = None, *, batch_size: int = BATCH_SIZE) -> Any:
        """Compute the outputs of every text, as `group` returns them. Raises as `logits` does."""
        rows = self._token_rows(inputs, pairs)
        return self.group(rows, self.logits_of_tokens(rows, batch_size=batch_size))

    def decide(self, outputs: Any) -> list[Answer]:
        """Turn outputs, as `group` returns them, into answers.

        Returns:
            For each row the label with the largest logit; for a regression the value; where a row
            may have several labels, their list; for a tagger the entities of a text.
        """
        return self.decision.decide(outputs)

    def group(self, rows: Sequence[TokenRow], logits: RowLogits) -> Any:
        """Return the outputs with one entry for each text: logits as they are, or lists of `WindowOutput`.

        Raises:
            DataError: the kind of task answers with places in a text, and the rows are of mere token ids.
        """
        if self.decision.windows is None:
            return logits
        outputs = []
        for row, values in zip(rows, logits, strict=True):
            if row.window is None:
                raise DataError("token ids were given, and this model answers with places in a text", "give texts")
            outputs.append(WindowOutput(row.window, values))
        return group_by_text(outputs)

    def probabilities(self, logits: np.ndarray) -> np.ndarray | None:
        """Probabilities, float32 [rows, labels], as the kind of task has them; None where it has none."""
        return self.decision.probabilities(logits)

    def logits(
        self, inputs: Inputs, pairs: str | Sequence[str] | None = None, *, batch_size: int = BATCH_SIZE
    ) -> RowLogits:
        """Compute logits, float32 [rows, labels], in batches of similar length, each padded to its longest row.

        A model with outputs for each token gives a list instead: an array [tokens, labels] for each
        row, or window.

        Args:
            inputs: a text or several; token ids of one row or of several; or a mapping with
                `input_ids` and, where they are not all ones and zeros, `attention_mask` and
                `token_type_ids`.
            pairs: second text of each row, for a task on pairs.
            batch_size: rows that are computed at once.

        Raises:
            DataError: the input cannot be classified.
        """
        if not isinstance(batch_size, int | np.integer) or batch_size < 1:
            raise DataError(f"batch_size = {batch_size!r}: at least one row is computed at once")
        return self.logits_of_tokens(self._token_rows(inputs, pairs), batch_size=batch_size)

    def logits_of_tokens(self, rows: Sequence[TokenRow], *, batch_size: int = BATCH_SIZE) -> RowLogits:
        """Compute the logits of tokenized rows, as `logits` does."""
        logits: list[np.ndarray] = [np.empty(0)] * len(rows)
        # Rows of similar length meet in one batch, and the batch that needs most memory comes first.
        longest_first = sorted(range(len(rows)), key=lambda row: -len(rows[row].ids))
        for start in range(0, len(rows), batch_size):
            batch = longest_first[start : start + batch_size]
            computed = self.compute([rows[row] for row in batch])
            for row, values in zip(batch, computed, strict=True):
                logits[row] = values
        if self._head.per_token:
            return logits
        return np.stack(logits) if logits else np.empty((0, len(self.names)), np.float32)

    def check_text_count(self, *, paired: bool) -> None:
        """Raise DataError for a pair if the model takes one text, and for a single text if it takes two."""
        if self.text is None or paired == (len(self.text) == 2):
            return
        expected = ("one text", "two texts")[len(self.text) - 1]
        if paired:
            problem, hint = "two were given", "leave the pair out"
        else:
            problem, hint = "one was given", "give its pair too"
        raise DataError(f"the model takes {expected} ({', '.join(self.text)}), and {problem}", hint)

    def encode(self, texts: list[str], pairs: str | Sequence[str] | None = None) -> list[TokenRow]:
        """Tokenize each text, or each text with its pair. Raises as `logits` does."""
        self.check_text_count(paired=pairs is not None)
        seconds = [pairs] if isinstance(pairs, str) else pairs
        if seconds is not None:
            check_pairs(texts, seconds)
        for column in (texts, seconds or ()):
            for number, text in enumerate(column):
                # Training rows without a text are refused too: no model has learned an answer.
                if not text.strip():
                    raise DataError(
                        f"row {number} has an empty text",
                        "leave it out, as training rows of a file without text have to be",
                    )
        rows = self.tokenize([self.prompt + text for text in texts], seconds)
        for number, row in enumerate(rows):
            if len(row.ids) == 0:
                raise DataError(f"row {number} has no token")
            # a tokenizer may have tokens that were added after the model was made
            self._check_token_row(number, row)
        return rows

    def tokenize(self, texts: Sequence[str], seconds: Sequence[str] | None = None) -> list[TokenRow]:
        """Tokenize texts, or pairs, whatever they are; see `RowTokenizer.tokenize`."""
        return self._tokenizer.tokenize(texts, seconds)

    def compute(self, rows: Sequence[TokenRow]) -> RowLogits:
        """Compute the logits of tokenized rows in one batch, padded to the longest; see `logits`."""
        width = max(len(row.ids) for row in rows)
        shape = (len(rows), width)
        columns = {
            "input_ids": np.full(shape, self.padding["input_ids"], np.int64),
            "token_type_ids": np.full(shape, self.padding["token_type_ids"], np.int64),
            "attention_mask": np.zeros(shape, np.int64),
        }
        for number, row in enumerate(rows):
            length = len(row.ids)
            tokens = slice(width - length, width) if self.pads_left else slice(length)
            columns["input_ids"][number, tokens] = row.ids
            columns["token_type_ids"][number, tokens] = row.types
            columns["attention_mask"][number, tokens] = row.mask
        outputs = self._session.run(None, {name: columns[name] for name in self._inputs})
        logits = self._head.collect_arrays(outputs, columns)
        # A file of another export would give answers, and wrong ones.
        expected = (len(rows), width, len(self.names)) if self._head.per_token else (len(rows), len(self.names))
        if logits.shape != expected:
            raise ModelError(
                f"the model gives an output of shape {logits.shape} for {len(rows)} rows; "
                f"config.json names {len(self.names)} labels",
                MIXED_EXPORTS,
            )
        if not self._head.per_token:
            return logits
        by_row = []
        for row, values in zip(rows, logits, strict=True):
            by_row.append(values[width - len(row.ids) :] if self.pads_left else values[: len(row.ids)])
        return by_row

    def _token_rows(self, inputs: Inputs, pairs: str | Sequence[str] | None) -> list[TokenRow]:
        """Bring any kind of input into tokenized rows."""
        inputs, pairs = list_column(inputs), list_column(pairs)
        if are_texts(inputs):
            return self.encode([inputs] if isinstance(inputs, str) else list(inputs), pairs)
        if isinstance(inputs, Mapping):
            rows = token_rows_of_columns(inputs)
        else:
            rows = [token_row(ids) for ids in rows_of_integers(inputs, "token ids")]
        if pairs is not None and rows:
            raise DataError("pairs were given with token ids", "join each pair into one row of ids, or give texts")
        for number, row in enumerate(rows):
            self._check_token_row(number, row)
        return rows

    def _check_token_row(self, number: int, row: TokenRow) -> None:
        """Raise DataError for ids that the model has no embedding for: the session would read beyond its tables."""
        if not row.mask.any():
            raise DataError(f"row {number} has no token")
        if self._is_right_padded and not row.mask.all():
            raise DataError(
                f"row {number} masks tokens before others, and this file computes padding on the right only",
                "leave masked tokens out, or open another variant",
            )
        if len(row.ids) > self.max_length:
            raise DataError(f"row {number} has {len(row.ids)} tokens; the model takes {self.max_length}")
        limits = [("token", row.ids, self._vocabulary_size)]
        type_limit = self._token_types if "token_type_ids" in self._inputs else None
        limits.append(("token type", row.types, type_limit))
        for name, ids, size in limits:
            smallest, largest = int(ids.min()), int(ids.max())
            if smallest < 0 or (size and largest >= size):
                wrong = min(smallest, 0) or largest
                raise DataError(f"row {number} has the {name} {wrong}; the model knows 0 to {(size or 0) - 1}")


def check_output_count(session: InferenceSession, names: list[str], head: Head) -> None:
    """Raise ModelError if the model does not give one logit for each label, as far as its graph says."""
    outputs = session.get_outputs()
    if len(outputs) < len(head.outputs):
        raise ModelError(
            f"the model gives {len(outputs)} outputs; {head.about} has {', '.join(head.outputs)}",
            MIXED_EXPORTS,
        )
    shape = outputs[0].shape
    if head.per_token and len(head.outputs) > 1:  # each is one label
        shape = [*shape, len(head.outputs)]
    count = shape[-1] if shape else 0
    if len(shape) != 2 + head.per_token or (isinstance(count, int) and count != len(names)):
        raise ModelError(
            f"the model gives an output of shape {shape}; config.json names {len(names)} labels: {', '.join(names)}",
            MIXED_EXPORTS,
        )
