"""Tokenize texts for an exported model: cut to its length, or into windows, as the kind of task has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tokenizers import Tokenizer

from spdtool.data.tokens import shorten_pairs
from spdtool.data.windows import describe_no_room, fit_stride, least_room, make_window
from spdtool.errors import DataError, ModelError, first_line
from spdtool.export.bundle.read import longest_input
from spdtool.export.model_files import Config
from spdtool.export.token_rows import TokenRow, token_row
from spdtool.tasks.decision import Decision, read_stride

DEFAULT_STRIDE = 32  # tokens that windows of a text share, where the folder does not say


class RowTokenizer:
    """The tokenizer of an exported folder, which cuts texts.

    Args:
        tokenizer: is changed; threads may share it afterwards.
        config, tokenizer_config: of the folder.
        decision: of the kind of task, which reads whole texts or windows of them.

    Attributes:
        max_length: longest input in tokens; longer texts are cut.
    """

    def __init__(self, tokenizer: Tokenizer, config: Config, tokenizer_config: Config, decision: Decision) -> None:
        self._tokenizer, self._decision = tokenizer, decision
        self._truncation_side = tokenizer_config.get("truncation_side", "right")
        self.max_length = longest_input(config, tokenizer_config)
        self._counter: Tokenizer | None = None  # of another state: threads share the tokenizer that cuts
        if decision.windows == 1:
            self._counter = self._copy_without_cuts()
        tokenizer.no_padding()
        self.limit_length(self.max_length)

    def limit_length(self, max_length: int) -> None:
        """Cut texts to this many tokens, or to as many as the model takes where that is less.

        Raises:
            ModelError: the folder's tokenizer cannot be used so.
        """
        # Never longer than the model's positions, whatever the caller wants.
        self.max_length = min(self.max_length, max_length)
        options: dict[str, Any] = {"direction": self._truncation_side}
        if self._decision.windows is not None:
            stride = read_stride(self._decision.settings, DEFAULT_STRIDE)
            options["stride"] = fit_stride(stride, self.max_length, paired=self._decision.windows == 1)
            options["strategy"] = self._decision.truncation()
        try:
            self._tokenizer.enable_truncation(self.max_length, **options)
        except Exception as error:  # tokenizers raises several kinds
            raise ModelError(f"the tokenizer cannot cut texts to {self.max_length} tokens: {error}") from None

    def tokenize(self, texts: Sequence[str], seconds: Sequence[str] | None = None) -> list[TokenRow]:
        """Tokenize each text, or each text with its second one, whatever they are; empty ones too.

        Raises:
            DataError: a text is not valid Unicode.
            ModelError: the tokenizer is damaged.
        """
        if self._decision.windows is not None:
            self._check_room(texts, seconds)
        try:
            if seconds is not None and self._decision.windows is None:
                from_left = self._truncation_side == "left"
                texts, seconds = shorten_pairs(
                    texts, seconds, self.max_length, self._locate_tokens, from_left=from_left
                )
            inputs: list[Any] = list(texts) if seconds is None else list(zip(texts, seconds, strict=True))
            encodings = self._tokenizer.encode_batch(inputs)
        except TypeError:  # a str that is not valid Unicode
            raise DataError("a text cannot be encoded as UTF-8: it holds a lone surrogate") from None
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a panic of its Rust code is no Exception
            raise ModelError(
                f"the tokenizer fails on a text: {first_line(error)}", "tokenizer.json is damaged"
            ) from None
        if self._decision.windows is None:
            return [token_row(encoding.ids, encoding.type_ids) for encoding in encodings]
        rows = []
        for number, encoding in enumerate(encodings):
            text = texts[number] if seconds is None else seconds[number]
            for part in (encoding, *encoding.overflowing):
                rows.append(replace(token_row(part.ids, part.type_ids), window=make_window(number, text, part)))
        return rows

    def _locate_tokens(self, text: str) -> Sequence[tuple[int, int]]:
        """Return begin and end of every token of a text, in characters."""
        if self._counter is None:
            self._counter = self._copy_without_cuts()
        spans: Sequence[tuple[int, int]] = self._counter.encode(text, add_special_tokens=False).offsets
        return spans

    def _check_room(self, texts: Sequence[str], seconds: Sequence[str] | None) -> None:
        """Raise DataError for single texts or pairs that are not read, and for first texts that leave no room."""
        paired = self._decision.windows == 1
        if texts and paired != (seconds is not None):
            if paired:
                raise DataError("this model reads pairs: a question and a text", "give the second text too")
            raise DataError("this model reads single texts, and pairs were given", "leave the second text out")
        if self._counter is None:
            return
        room = self.max_length - self._tokenizer.num_special_tokens_to_add(is_pair=True)
        for number, row in enumerate(self._counter.encode_batch(list(texts), add_special_tokens=False)):
            if room - len(row.ids) < least_room(self.max_length):
                problem = describe_no_room(texts[number], len(row.ids), self.max_length)
                raise DataError(f"row {number}: {problem}", "shorten it")

    def _copy_without_cuts(self) -> Tokenizer:
        copy = Tokenizer.from_str(self._tokenizer.to_str())
        copy.no_truncation()
        copy.no_padding()
        return copy
