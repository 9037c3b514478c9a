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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from tokenizers import Tokenizer

from spdtool import plugins
from spdtool.data.tokens import shorten_pairs
from spdtool.data.windows import (
    WindowOutput,
    describe_no_room,
    fit_stride,
    group_by_text,
    least_room,
    make_window,
)
from spdtool.errors import DataError, DeviceError, ModelError, PluginError, first_line
from spdtool.export import onnx_session
from spdtool.export.bundle.manifest import read_json_object
from spdtool.export.bundle.read import Bundle, list_usable_variants, longest_input
from spdtool.export.model_files import Config, ordered_labels, padding_values, read_count, read_tokenizer
from spdtool.export.target import RIGHT_PADDED
from spdtool.export.token_rows import (
    TokenRow,
    are_texts,
    check_pairs,
    rows_of_integers,
    token_row,
    token_rows_of_columns,
)
from spdtool.tasks.decision import Answer, Json, find_decision, read_stride
from spdtool.tasks.head import Head, head_of_config
from spdtool.tasks.sentence_settings import read_prompt

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Inputs: TypeAlias = str | Sequence[Any] | np.ndarray | Mapping[str, Any]
"""A text, texts, token ids of one row or of several (lists or an array), or the model's inputs by name."""

BATCH_SIZE = 32
DEFAULT_STRIDE = 32  # tokens that windows of a text share, where the folder does not say

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
        max_length: longest input in tokens; longer texts are cut.
        pads_left: whether shorter rows of a batch are padded on the left. padding: with what, by input.
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
        self._session, self._tokenizer = session, tokenizer
        self._inputs = [value.name for value in session.get_inputs()]
        self._is_right_padded = session.get_modelmeta().custom_metadata_map.get(RIGHT_PADDED) == "true"
        self.pads_left = tokenizer_config.get("padding_side") == "left"
        self.padding = padding_values(tokenizer, config, tokenizer_config)
        self._vocabulary_size = read_count(config, "vocab_size")
        self._token_types = read_count(config, "type_vocab_size")
        # A session cannot be pickled; `load` can be called again in the other process.
        self._load_arguments: tuple[Any, ...] = ()
        self._truncation_side = tokenizer_config.get("truncation_side", "right")
        self.max_length = longest_input(config, tokenizer_config)
        self._head = head_of_config(config)
        self.names = self._head.name_outputs(config) or ordered_labels(config)
        check_output_count(session, self.names, self._head)
        kind = kind or KindSettings()
        decision = find_decision(config, kind.name)
        self.decision = decision(self.names, decision.settings_of(config) | dict(kind.settings))
        self._counter: Tokenizer | None = None  # of another state: threads share the tokenizer that cuts
        if self.decision.windows == 1:
            self._counter = Tokenizer.from_str(tokenizer.to_str())
            self._counter.no_truncation()
            self._counter.no_padding()
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
        if self.decision.windows is not None:
            stride = read_stride(self.decision.settings, DEFAULT_STRIDE)
            options["stride"] = fit_stride(stride, self.max_length, paired=self.decision.windows == 1)
            options["strategy"] = self.decision.truncation()
        try:
            self._tokenizer.enable_truncation(self.max_length, **options)
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
        """Tokenize each text, or each text with its second one, whatever they are; empty ones too.

        Raises:
            DataError: a text is not valid Unicode.
            ModelError: the tokenizer is damaged.
        """
        if self.decision.windows is not None:
            self._check_room(texts, seconds)
        try:
            if seconds is not None and self.decision.windows is None:
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
        if self.decision.windows is None:
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
            counter = Tokenizer.from_str(self._tokenizer.to_str())
            counter.no_truncation()
            counter.no_padding()
            self._counter = counter
        spans: Sequence[tuple[int, int]] = self._counter.encode(text, add_special_tokens=False).offsets
        return spans

    def _check_room(self, texts: Sequence[str], seconds: Sequence[str] | None) -> None:
        """Raise DataError for single texts or pairs that are not read, and for first texts that leave no room."""
        paired = self.decision.windows == 1
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
                "the model and config.json are not of one export",
            )
        if not self._head.per_token:
            return logits
        by_row = []
        for row, values in zip(rows, logits, strict=True):
            by_row.append(values[width - len(row.ids) :] if self.pads_left else values[: len(row.ids)])
        return by_row

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

    A bundle holds several variants of one model. The best one that runs here is opened: one with
    operators of its own if their library is installed and loads, otherwise the portable one.
    `classifier.bundle` names it.

    Args:
        folder: a run, or a folder such as `RUN/export/bundle` or `RUN/export/student`; of a folder
            with both roles, the student is opened.
        library: library of custom operators to use; None: that of the installed plugin, where the
            folder needs one. It is native code, so a library that lies in the folder is used only
            if it is named here.
        threads: threads of one operator; 0: as many as there are cores.
        provider: `cpu` or `cuda`.
        variant: open this variant of a bundle and no other.
        unverified: open a folder without manifest.json too, such as one that others exported.
            Nothing then tells whether its files belong together.
        raw: give probabilities without the temperature that the export fitted; labels are the same.

    Returns:
        A function from text to labels, which also has `logits` and `probabilities`.

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

    Only a variant with operators of its own is passed over when it does not open; a damaged file is
    always an error.
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


def check_output_count(session: InferenceSession, names: list[str], head: Head) -> None:
    """Raise ModelError if the model does not give one logit for each label, as far as its graph says."""
    outputs = session.get_outputs()
    if len(outputs) < len(head.outputs):
        raise ModelError(
            f"the model gives {len(outputs)} outputs; {head.about} has {', '.join(head.outputs)}",
            "the model and config.json are not of one export",
        )
    shape = outputs[0].shape
    if head.per_token and len(head.outputs) > 1:  # each is one label
        shape = [*shape, len(head.outputs)]
    count = shape[-1] if shape else 0
    if len(shape) != 2 + head.per_token or (isinstance(count, int) and count != len(names)):
        raise ModelError(
            f"the model gives an output of shape {shape}; config.json names {len(names)} labels: {', '.join(names)}",
            "the model and config.json are not of one export",
        )
