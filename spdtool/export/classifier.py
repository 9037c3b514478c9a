"""`spdtool.load`: open an exported folder as a function from text to labels, whatever target wrote it.

    import spdtool

    classify = spdtool.load("runs/mrpc-0.9/export/bundle")
    classify("She sold the car.", "The car was sold.")             # 'equivalent'
    classify(["one text", "another"])                              # a list of labels
    classify.logits(["one text", "another"])                       # float32 [rows, labels]
    classify.logits({"input_ids": [[101, 2009, 102]]})             # token ids instead of text

It needs onnxruntime, tokenizers and numpy; neither torch nor transformers is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from tokenizers import Tokenizer

from spdtool import plugins
from spdtool.errors import DataError, DeviceError, ModelError, PluginError, first_line
from spdtool.export import onnx_session
from spdtool.export.bundle.manifest import read_json_object
from spdtool.export.bundle.read import Bundle, list_usable_variants, longest_input
from spdtool.export.model_files import Config, ordered_labels, padding_values, read_count, read_tokenizer
from spdtool.export.token_rows import (
    TokenRow,
    are_texts,
    check_pairs,
    rows_of_integers,
    token_row,
    token_rows_of_columns,
)
from spdtool.tasks.decision import Answer, Json, find_decision
from spdtool.tasks.head import head_of_config
from spdtool.tasks.sentence_settings import read_prompt

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Inputs: TypeAlias = str | Sequence[Any] | np.ndarray | Mapping[str, Any]
"""A text, texts, token ids of one row or of several (lists or an array), or the model's inputs by name."""

BATCH_SIZE = 32


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
        max_length: longest input in tokens; longer texts are cut.
        pads_left: whether shorter rows of a batch are padded on the left. padding: with what, by input.
        decision: turns outputs into answers, as the kind of task has it.
        bundle: the opened folder and the model in it that runs; None for a classifier that was not opened from one.
        prompt: is put before every text; empty for all but sentence encoders that have one.
        text: names of the one or two text columns of the training data; None if the folder does not name them, and a
            row may then be a single text or a pair.
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
        self._session, self._tokenizer = session, tokenizer
        self._inputs = [value.name for value in session.get_inputs()]
        self.pads_left = tokenizer_config.get("padding_side") == "left"
        self.padding = padding_values(tokenizer, config, tokenizer_config)
        self._vocabulary_size = read_count(config, "vocab_size")
        self._token_types = read_count(config, "type_vocab_size")
        self._load_arguments: tuple[Any, ...] = ()
        self._truncation_side = tokenizer_config.get("truncation_side", "right")
        self.max_length = longest_input(config, tokenizer_config)
        self.names = head_of_config(config).name_outputs(config) or ordered_labels(config)
        check_output_count(session, self.names)
        kind = kind or KindSettings()
        decision = find_decision(config, kind.name)
        self.decision = decision(self.names, decision.settings_of(config) | dict(kind.settings))
        tokenizer.no_padding()
        self.limit_length(self.max_length)

    def limit_length(self, max_length: int) -> None:
        """Cut texts to this many tokens, or to as many as the model takes where that is less.

        Raises:
            ModelError: the folder's tokenizer cannot be used so.
        """
        self.max_length = min(self.max_length, max_length)
        try:
            self._tokenizer.enable_truncation(self.max_length, direction=self._truncation_side)
        except Exception as error:  # tokenizers raises several kinds
            raise ModelError(f"the tokenizer cannot cut texts to {self.max_length} tokens: {error}") from None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments of `load`: another process opens the folder again."""
        return _load_again, self._load_arguments

    def __call__(self, inputs: Inputs, pairs: str | Sequence[str] | None = None) -> Answer | list[Answer]:
        """Classify one text, or a list of texts.

        Args:
            pairs: second text of each row, for a task on pairs.

        Returns:
            the label of a single text; a list of labels otherwise; values instead of labels for a regression.

        Raises:
            DataError: the input cannot be classified.
        """
        answers = self.labels(inputs, pairs)
        return answers[0] if isinstance(inputs, str) else answers

    def labels(self, inputs: Inputs, pairs: str | Sequence[str] | None = None) -> list[Answer]:
        """Classify every row; see `decide` for what an answer is. Raises as a call does."""
        return self.decide(self.logits(inputs, pairs))

    def decide(self, logits: np.ndarray) -> list[Answer]:
        """Turn logits [rows, labels] into answers.

        Returns:
            what the kind of task answers: for each row the label with the largest logit; for a regression the value;
            with several labels a row, their list.
        """
        return self.decision.decide(logits)

    def probabilities(self, logits: np.ndarray) -> np.ndarray | None:
        """Probabilities, float32 [rows, labels], as the kind of task has them; None where it has none."""
        return self.decision.probabilities(logits)

    def logits(
        self, inputs: Inputs, pairs: str | Sequence[str] | None = None, *, batch_size: int = BATCH_SIZE
    ) -> np.ndarray:
        """Compute logits, float32 [rows, labels], in batches of similar length, each padded to its longest row.

        Args:
            inputs: a text or several; token ids of one row or of several; or a mapping with `input_ids` and, where
                they are not all ones and zeros, `attention_mask` and `token_type_ids`.
            pairs: second text of each row, for a task on pairs.
            batch_size: rows that are computed at once.

        Raises:
            DataError: the input cannot be classified.
        """
        if not isinstance(batch_size, int | np.integer) or batch_size < 1:
            raise DataError(f"batch_size = {batch_size!r}: at least one row is computed at once")
        return self.logits_of_tokens(self._token_rows(inputs, pairs), batch_size=batch_size)

    def logits_of_tokens(self, rows: Sequence[TokenRow], *, batch_size: int = BATCH_SIZE) -> np.ndarray:
        """Compute logits, float32 [rows, labels], of tokenized rows, as `logits` does."""
        logits = np.empty((len(rows), len(self.names)), np.float32)
        # Rows of similar length meet in one batch, and the batch that needs most memory comes first.
        longest_first = sorted(range(len(rows)), key=lambda row: -len(rows[row].ids))
        for start in range(0, len(rows), batch_size):
            batch = longest_first[start : start + batch_size]
            logits[batch] = self.compute([rows[row] for row in batch])
        return logits

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
        """Tokenize each text, or each text with its second one, whatever they are; empty ones too.

        Raises:
            DataError: a text is not valid Unicode.
            ModelError: the tokenizer is damaged.
        """
        inputs: list[Any] = list(texts) if seconds is None else list(zip(texts, seconds, strict=True))
        try:
            encodings = self._tokenizer.encode_batch(inputs)
        except TypeError:  # a str that is not valid Unicode
            raise DataError("a text cannot be encoded as UTF-8: it holds a lone surrogate") from None
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a panic of its Rust code is no Exception
            raise ModelError(
                f"the tokenizer fails on a text: {first_line(error)}", "tokenizer.json is damaged"
            ) from None
        return [token_row(encoding.ids, encoding.type_ids) for encoding in encodings]

    def compute(self, rows: Sequence[TokenRow]) -> np.ndarray:
        """Compute logits, float32 [rows, labels], of tokenized rows in one batch, padded to the longest."""
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
        logits = np.asarray(self._session.run(None, {name: columns[name] for name in self._inputs})[0])
        if logits.shape != (len(rows), len(self.names)):
            raise ModelError(
                f"the model gives an output of shape {logits.shape} for {len(rows)} rows; "
                f"config.json names {len(self.names)} labels",
                "the model and config.json are not of one export",
            )
        return logits

    def _token_rows(self, inputs: Inputs, pairs: str | Sequence[str] | None) -> list[TokenRow]:
        """Bring any kind of input into tokenized rows."""
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


def load(
    folder: str | Path,
    *,
    library: str | Path | None = None,
    threads: int = 0,
    provider: str = "cpu",
    variant: str | None = None,
    unverified: bool = False,
    raw: bool = False,
) -> Classifier:
    """Open an exported folder, whatever target wrote it, after its files were held against their sha256.

    A bundle holds several variants of one model. The best one that runs here is opened: one with operators of its own
    if their library is installed and loads, otherwise the portable one. `classifier.bundle` names it.

    Args:
        folder: a run, or a folder such as `RUN/export/bundle` or `RUN/export/student`; of a folder with both roles, the
            student is opened.
        library: library of custom operators to use; None: that of the installed plugin, where the folder needs one.
            It is native code, so a library that lies in the folder is used only if it is named here.
        threads: threads of one operator; 0: as many as there are cores.
        provider: `cpu` or `cuda`.
        variant: open this variant of a bundle and no other.
        unverified: open a folder without manifest.json too, such as one that others exported. Nothing then tells
            whether its files belong together.
        raw: give probabilities without the temperature that the export fitted; labels are the same.

    Raises:
        ModelError: it is no exported folder, cannot be read, or a file is not the one that was exported.
        UnknownName: the bundle has no such variant.
        PluginError: it needs a plugin that is not installed.
        DeviceError: onnxruntime, the provider or the compiled library is not there.
    """
    if not isinstance(folder, str | Path):
        raise ModelError(
            f"a folder was expected, found a {type(folder).__name__}", 'for example "runs/x/export/bundle"'
        )
    if library is not None and not isinstance(library, str | Path):
        raise ModelError(f"library = {library!r}: a path was expected")
    candidates = list_usable_variants(Path(folder).expanduser(), variant, provider, unverified=unverified)
    bundle, session = open_first_usable(candidates, library, provider, threads)
    config = read_json_object(bundle.folder / "config.json")
    tokenizer_file = bundle.folder / "tokenizer_config.json"
    tokenizer_config = read_json_object(tokenizer_file) if tokenizer_file.is_file() else {}
    kind = KindSettings(bundle.kind, bundle.settings)
    classifier = Classifier(session, read_tokenizer(bundle.folder), config, tokenizer_config, kind)
    classifier.bundle, classifier.text = bundle, bundle.text
    classifier.prompt = read_prompt(bundle.folder)
    if raw:
        classifier.decision.temperature = 1.0
    arguments = (str(bundle.folder.absolute()), library, threads, provider, variant, unverified, raw)
    classifier._load_arguments = arguments
    return classifier


def _load_again(
    folder: str,
    library: str | Path | None,
    threads: int,
    provider: str,
    variant: str | None,
    unverified: bool,
    raw: bool,
) -> Classifier:
    """Call `load` with positional arguments, as pickle does."""
    return load(
        folder, library=library, threads=threads, provider=provider, variant=variant, unverified=unverified, raw=raw
    )


def open_first_usable(
    candidates: Iterator[Bundle], library: str | Path | None, provider: str, threads: int
) -> tuple[Bundle, InferenceSession]:
    """Open the first variant that runs here.

    Only a variant with operators of its own is passed over when it does not open; a damaged file is always an error.
    """
    bundle = next(candidates)
    while True:
        try:
            return bundle, open_bundle_session(bundle, library, provider, threads)
        except (DeviceError, ModelError, PluginError):
            following = next(candidates, None)
            if following is None or not bundle.library or library is not None:
                raise
            bundle = following


def open_bundle_session(bundle: Bundle, library: str | Path | None, provider: str, threads: int) -> InferenceSession:
    """Open the model of a bundle with the library of operators that it needs."""
    if library is not None:
        if not Path(library).is_file():
            raise ModelError(f"there is no library {library}", "leave library= out to use that of the installed plugin")
        return onnx_session.open_session(bundle.model, provider, threads, [Path(library).resolve()])
    if not bundle.library:
        return onnx_session.open_session(bundle.model, provider, threads)
    if provider in onnx_session.PROVIDERS and provider != "cpu":
        raise DeviceError(f"the operators of {bundle.target!r} run on the CPU only", 'leave out provider="cuda"')
    installed = plugins.find_library(str(bundle.target))
    try:
        return onnx_session.open_session(bundle.model, provider, threads, [installed.module.path()])
    except ModelError as error:
        written_by = bundle.library.version
        if written_by in (None, installed.version):
            raise
        raise ModelError(
            f"{error.message} ({bundle.folder} was written by {installed.distribution} {written_by}; "
            f"{installed.version} is installed)",
            f"pip install {installed.distribution}=={written_by}",
        ) from None


def check_output_count(session: InferenceSession, names: list[str]) -> None:
    """Raise ModelError if the model does not give one logit for each label, as far as its graph says."""
    shape = session.get_outputs()[0].shape
    count = shape[-1] if shape else 0
    if len(shape) != 2 or (isinstance(count, int) and count != len(names)):
        raise ModelError(
            f"the model gives an output of shape {shape}; config.json names {len(names)} labels: {', '.join(names)}",
            "the model and config.json are not of one export",
        )
