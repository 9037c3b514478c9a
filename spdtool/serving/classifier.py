"""`spdtool.load`: an exported folder as a function from text to labels, whatever target wrote it.

    import spdtool

    classify = spdtool.load("runs/mrpc-0.9/export/sparse-cpu")
    classify("She sold the car.", "The car was sold.")             # 'equivalent'
    classify(["one text", "another"])                              # a list of labels
    classify.logits(["one text", "another"])                       # float32 [rows, labels]
    classify.logits({"input_ids": [[101, 2009, 102]]})             # token ids instead of text

It needs onnxruntime, tokenizers and numpy; neither torch nor transformers is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from tokenizers import Tokenizer

from spdtool import plugins
from spdtool.errors import DataError, DeviceError, ModelError, PluginError
from spdtool.export import runtime
from spdtool.export.bundle import read as bundle
from spdtool.export.bundle.read import Bundle

Inputs: TypeAlias = str | Sequence[Any] | np.ndarray | Mapping[str, Any]
"""A text, texts, token ids of a row, of rows (lists or an array), or the model's inputs by name."""

BATCH = 32
UNSET = 10**9  # a tokenizer without a limit says something above this
OFFSET = {
    "camembert",
    "data2vec-text",
    "ibert",
    "longformer",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
}


@dataclass(frozen=True)
class Row:
    """The tokens of one row, each int64 [tokens]."""

    ids: np.ndarray
    types: np.ndarray
    mask: np.ndarray


class Classifier:
    """Keeps an onnxruntime session, its tokenizer and the names of its labels.

    Attributes:
        names: of the labels, in the order of the logits.
        max_length: tokens of the longest input; longer texts are cut.
        regression: whether the one logit is the answer.
        multi_label: whether a row may have several labels, or none; then its labels are a list.
        bundle: the folder that was opened, and which of its models runs; None where it was made otherwise.
        text: names of the one or two text columns that it was trained on; None: the folder does not say, and a row may
            have a pair or none.
    """

    bundle: Bundle | None = None
    text: tuple[str, ...] | None = None

    def __init__(
        self, session: Any, tokenizer: Tokenizer, config: Mapping[str, Any], tokens: Mapping[str, Any]
    ) -> None:
        self._session, self._tokenizer = session, tokenizer
        self._inputs = [value.name for value in session.get_inputs()]
        self._left = tokens.get("padding_side") == "left"
        self._pad = _padding(tokenizer, config, tokens)
        self._vocabulary = config.get("vocab_size")
        self.max_length = longest(config, tokens)
        self.names = _names(config)
        self.multi_label = config.get("problem_type") == "multi_label_classification"
        self.regression = len(self.names) == 1 and not self.multi_label
        self._types = config.get("type_vocab_size")
        self._opened: tuple[Any, ...] = ()
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.max_length, direction=tokens.get("truncation_side", "right"))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as what was opened: another process opens the folder again."""
        return _again, self._opened

    def __call__(self, inputs: Inputs, pairs: str | Sequence[str] | None = None) -> Any:
        """The label of a text, or the list of the labels of several; for a regression the value.

        Args:
            pairs: the second text of each row, for a task of pairs.

        Raises:
            DataError: the input is none that can be classified.
        """
        found = self.labels(inputs, pairs)
        return found[0] if isinstance(inputs, str) else found

    def labels(self, inputs: Inputs, pairs: str | Sequence[str] | None = None) -> list[Any]:
        """The label of each row (a regression: its value as a float; several labels a row: those above one half);
        raises as a call does."""
        return self.decide(self.logits(inputs, pairs))

    def decide(self, logits: np.ndarray) -> list[Any]:
        """The label of each row of logits, as `labels` gives it."""
        if self.multi_label:
            return [[name for name, logit in zip(self.names, row, strict=True) if logit > 0] for row in logits]
        if self.regression:
            return [float(value) for value in logits[:, 0]]
        return [self.names[index] for index in logits.argmax(axis=1)]

    def probabilities(self, logits: np.ndarray) -> np.ndarray | None:
        """Of each label, float32 [rows, labels]; on its own where a row may have several; none for a regression."""
        if self.regression:
            return None
        if self.multi_label:
            return np.asarray(1 / (1 + np.exp(-np.clip(logits, -80, 80))), np.float32)  # beyond, exp overflows
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True), np.float32)

    def logits(
        self, inputs: Inputs, pairs: str | Sequence[str] | None = None, *, batch_size: int = BATCH
    ) -> np.ndarray:
        """Logits, float32 [rows, labels]; computed in batches of like length, each padded to its own longest row.

        Args:
            inputs: a text or several; token ids of a row or of several; or a mapping with `input_ids` and, where they
                are not all ones and zeros, `attention_mask` and `token_type_ids`.
            pairs: the second text of each row, for a task of pairs.
            batch_size: rows that are computed at once.

        Raises:
            DataError: the input is none that can be classified.
        """
        if not isinstance(batch_size, int | np.integer) or batch_size < 1:
            raise DataError(f"batch_size = {batch_size!r}: at least one row is computed at once")
        rows = self._rows(inputs, pairs)
        logits = np.empty((len(rows), len(self.names)), np.float32)
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row].ids))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            logits[batch] = self.compute([rows[row] for row in batch])
        return logits

    def refuse_kind(self, *, paired: bool) -> None:
        """Raise DataError for a pair where the model takes one text, and for a text alone where it takes two."""
        if self.text is not None and paired != (len(self.text) == 2):
            taken = f"{('one text', 'two texts')[len(self.text) - 1]} ({', '.join(self.text)})"
            found, hint = ("two were given", "leave the pair out") if paired else ("one was given", "give its pair too")
            raise DataError(f"the model takes {taken}, and {found}", hint)

    def _rows(self, inputs: Inputs, pairs: str | Sequence[str] | None) -> list[Row]:
        if isinstance(inputs, Mapping):
            rows = _rows_of_columns(inputs)
        elif _texts(inputs):
            return self.encode([inputs] if isinstance(inputs, str) else list(inputs), pairs)
        else:
            rows = [_row(ids) for ids in _ragged(inputs, "token ids")]
        if pairs is not None and rows:
            raise DataError("pairs were given with token ids", "join each pair into one row of ids, or give texts")
        for number, row in enumerate(rows):
            self._refuse_ids(number, row)
        return rows

    def encode(self, texts: list[str], pairs: str | Sequence[str] | None = None) -> list[Row]:
        """The tokens of each text, or of each text and its pair; raises as `logits` does."""
        self.refuse_kind(paired=pairs is not None)
        seconds = [pairs] if isinstance(pairs, str) else pairs
        if seconds is not None and not (_texts(seconds) and len(seconds) == len(texts)):
            given = f"{len(seconds)}" if _texts(seconds) else "something else than texts"
            raise DataError(
                f"{len(texts)} texts and, as their pairs, {given}: as many texts were expected",
                "one second text for each first one",
            )
        for column in (texts, seconds or ()):
            blank = next((number for number, text in enumerate(column) if not text.strip()), None)
            if blank is not None:
                raise DataError(
                    f"row {blank} has an empty text", "leave it out, as training rows of a file without text have to be"
                )
        pieces: list[Any] = texts if seconds is None else list(zip(texts, seconds, strict=True))
        try:
            encoded = self._tokenizer.encode_batch(pieces)
        except TypeError:  # a str that is not valid Unicode
            raise DataError("a text cannot be encoded as UTF-8: it holds a lone surrogate") from None
        rows = [_row(found.ids, found.type_ids) for found in encoded]
        empty = next((number for number, row in enumerate(rows) if not len(row.ids)), None)
        if empty is not None:
            raise DataError(f"row {empty} has no token")
        return rows

    def _refuse_ids(self, number: int, row: Row) -> None:
        if not row.mask.any():
            raise DataError(f"row {number} has no token")
        if len(row.ids) > self.max_length:
            raise DataError(f"row {number} has {len(row.ids)} tokens; the model takes {self.max_length}")
        largest = int(row.ids.max())
        if row.ids.min() < 0 or (self._vocabulary is not None and largest >= self._vocabulary):
            wrong = int(row.ids.min()) if row.ids.min() < 0 else largest
            raise DataError(f"row {number} has the token {wrong}; the model knows 0 to {(self._vocabulary or 0) - 1}")
        if row.types.min() < 0 or (self._types and "token_type_ids" in self._inputs and row.types.max() >= self._types):
            wrong = int(row.types.min() if row.types.min() < 0 else row.types.max())
            raise DataError(f"row {number} has the token type {wrong}; the model knows 0 to {(self._types or 0) - 1}")

    def compute(self, rows: Sequence[Row]) -> np.ndarray:
        """Logits, float32 [rows, labels], of encoded rows, all at once and padded to the longest."""
        width = max(len(row.ids) for row in rows)
        columns = {
            "input_ids": np.full((len(rows), width), self._pad["input_ids"], np.int64),
            "token_type_ids": np.full((len(rows), width), self._pad["token_type_ids"], np.int64),
            "attention_mask": np.zeros((len(rows), width), np.int64),
        }
        for number, row in enumerate(rows):
            place = slice(width - len(row.ids), width) if self._left else slice(len(row.ids))
            columns["input_ids"][number, place] = row.ids
            columns["token_type_ids"][number, place] = row.types
            columns["attention_mask"][number, place] = row.mask
        return np.asarray(self._session.run(None, {name: columns[name] for name in self._inputs})[0])


def load(
    folder: str | Path,
    *,
    library: str | Path | None = None,
    threads: int = 0,
    provider: str = "cpu",
    variant: str | None = None,
) -> Classifier:
    """Open an exported folder, whatever target wrote it.

    Of a bundle, which holds several variants of one model, the best is opened that runs here: one with operators of its
    own where their library is installed and loads, else the portable one. `classifier.bundle` tells which.

    Args:
        folder: such as `RUN/export/student`; of a folder of roles, such as `RUN/export/sparse-cpu`, its student.
        library: the library of custom operators to use; None: where the folder needs one, that of the installed plugin.
            It is native code and is run, which is why one that lies in the folder is used only if it is named here.
        threads: of one operator; 0: as many as there are cores.
        provider: `cpu` or `cuda`.
        variant: of a bundle, this one and no other.

    Raises:
        ModelError: it is no exported folder, or cannot be read.
        UnknownName: the bundle has no such variant.
        PluginError: it needs a plugin that is not installed.
        DeviceError: onnxruntime, the provider or the compiled library is not there.
    """
    if not isinstance(folder, str | Path):
        raise ModelError(
            f"a folder was expected, found a {type(folder).__name__}", 'for example "runs/x/export/student"'
        )
    if library is not None and not isinstance(library, str | Path):
        raise ModelError(f"library = {library!r}: a path was expected")
    found, session = _first_that_opens(Path(folder).expanduser(), library, provider, threads, variant)
    config = bundle.read_json(found.folder / "config.json")
    file = found.folder / "tokenizer_config.json"
    tokens = bundle.read_json(file) if file.is_file() else {}
    opened = Classifier(session, _tokenizer(found.folder), config, tokens)
    opened.bundle, opened.text = found, found.text
    opened._opened = (str(found.folder.absolute()), library, threads, provider, variant)
    return opened


def _again(
    folder: str, library: str | Path | None, threads: int, provider: str, variant: str | None = None
) -> Classifier:
    return load(folder, library=library, threads=threads, provider=provider, variant=variant)


def _first_that_opens(
    folder: Path, library: str | Path | None, provider: str, threads: int, variant: str | None
) -> tuple[Bundle, Any]:
    """The best variant of a folder that runs here, and its session; a damaged file is never passed over."""
    offered = bundle.candidates(folder, variant, provider)
    found = next(offered)
    while True:
        try:
            return found, _open(found, library, provider, threads)
        except (DeviceError, ModelError, PluginError):
            after = next(offered, None) if found.library and library is None else None
            if after is None:
                raise
            found = after


def _open(found: Bundle, library: str | Path | None, provider: str, threads: int) -> Any:
    if library is not None:
        if not Path(library).is_file():
            raise ModelError(f"there is no library {library}", "leave library= out to use that of the installed plugin")
        return runtime.open_session(found.model, provider, threads, [Path(library).resolve()])
    if not found.library:
        return runtime.open_session(found.model, provider, threads)
    if provider in runtime.PROVIDERS and provider != "cpu":
        raise DeviceError(f"the operators of {found.target!r} run on the CPU only", 'leave out provider="cuda"')
    installed = plugins.library(str(found.target))
    try:
        return runtime.open_session(found.model, provider, threads, [installed.module.path()])
    except ModelError as error:
        wrote = found.library.get("version")
        if wrote in (None, installed.version):
            raise
        raise ModelError(
            f"{error.message} ({found.folder} was written by {installed.distribution} {wrote}; "
            f"{installed.version} is installed)",
            f"pip install {installed.distribution}=={wrote}",
        ) from None


def _tokenizer(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ModelError(f"{folder} has no tokenizer.json", "only fast tokenizers can be used without transformers")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelError(f"{file} cannot be read: {error}", "copy the folder again") from None


def _padding(tokenizer: Tokenizer, config: Mapping[str, Any], tokens: Mapping[str, Any]) -> dict[str, int]:
    """What fills each column of a batch, as the tokenizer says, else as the model's configuration does."""
    token = tokens.get("pad_token")
    name = token.get("content") if isinstance(token, Mapping) else token
    number = tokenizer.token_to_id(name) if isinstance(name, str) else None
    if number is None:
        number = config.get("pad_token_id") or 0
    return {"input_ids": number, "token_type_ids": int(tokens.get("pad_token_type_id") or 0)}


def longest(config: Mapping[str, Any], tokens: Mapping[str, Any]) -> int:
    """Tokens of the longest input: the least of what the tokenizer and the position embeddings allow."""
    positions = config.get("max_position_embeddings")
    if positions and config.get("model_type") in OFFSET:  # their positions start after that of the padding
        positions -= (config.get("pad_token_id") or 0) + 1
    limits = [limit for limit in (positions, tokens.get("model_max_length")) if limit and 0 < limit < UNSET]
    return int(min(limits, default=512))


def _names(config: Mapping[str, Any]) -> list[str]:
    names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # transformers leaves the default out
    try:
        return [str(names[str(index)]) for index in range(len(names))]
    except (KeyError, TypeError):
        raise ModelError(f"id2label of config.json does not number the labels from 0: {names}") from None


def _texts(values: Any) -> bool:
    if isinstance(values, str):
        return True
    several = isinstance(values, Sequence | np.ndarray) and getattr(values, "shape", None) != ()
    return several and len(values) > 0 and all(isinstance(value, str) for value in values)


def _row(ids: Any, types: Any = None, mask: Any = None) -> Row:
    """A row without its padding on the right; what is masked elsewhere stays where it is, or positions would move."""
    tokens = np.asarray(ids, np.int64)
    kinds = np.zeros_like(tokens) if types is None else np.asarray(types, np.int64)
    real = np.ones_like(tokens) if mask is None else np.asarray(mask, np.int64)
    if not len(tokens) == len(kinds) == len(real):
        raise DataError("input_ids, attention_mask and token_type_ids differ in length")
    end = int(np.flatnonzero(real).max(initial=-1)) + 1
    return Row(tokens[:end], kinds[:end], real[:end])


def _rows_of_columns(inputs: Mapping[str, Any]) -> list[Row]:
    unknown = sorted(map(str, inputs.keys() - {"input_ids", "attention_mask", "token_type_ids", "labels"}))
    if unknown or "input_ids" not in inputs:
        raise DataError(
            f"the inputs hold {', '.join(map(str, inputs)) or 'nothing'}",
            "input_ids, and attention_mask and token_type_ids where they are not all ones and zeros",
        )
    ids = _ragged(inputs["input_ids"], "input_ids")
    rest = [
        _ragged(inputs[name], name) if inputs.get(name) is not None else [None] * len(ids)
        for name in ("token_type_ids", "attention_mask")
    ]
    if any(len(column) != len(ids) for column in rest):
        raise DataError("input_ids, attention_mask and token_type_ids have different numbers of rows")
    return [_row(*cells) for cells in zip(ids, *rest, strict=True)]


def _ragged(values: Any, what: str) -> list[np.ndarray]:
    """Rows of whole numbers; one row alone is taken as such."""
    expected = f"{what}: texts (second texts in pairs=) or rows of whole numbers were expected"
    if hasattr(values, "__array__"):  # of numpy or torch
        values = np.asarray(values)
    if (
        isinstance(values, str | bytes)
        or not isinstance(values, Sequence | np.ndarray)
        or getattr(values, "shape", None) == ()
    ):
        raise DataError(f"{expected}, found {type(values).__name__}")
    outer = list(values)
    if outer and all(isinstance(value, int | np.integer) for value in outer):
        outer = [outer]
    rows = []
    for number, value in enumerate(outer):
        try:
            row = np.asarray(value)
        except ValueError:  # lists of unlike depth
            row = np.empty((0, 0))
        if row.ndim != 1 or (row.size and row.dtype.kind not in "iub"):
            raise DataError(f"{expected}; row {number} is {_shown(value)}")
        rows.append(row)
    return rows


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
