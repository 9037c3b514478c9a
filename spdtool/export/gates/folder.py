"""The gate on the folder: opened from disk as a stranger would, it answers as the checkpoint does.

transformers    AutoConfig and AutoTokenizer give what they give for the checkpoint
spdtool.load    the same tokens, padding, labels, decisions and probabilities; the dev metric is
                computed from texts through it (`predict_from_texts`)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from pydantic import JsonValue
from transformers import AutoConfig, PreTrainedTokenizerBase

from spdtool.data.dataset import Rows
from spdtool.data.tokens import Encoded
from spdtool.errors import GateError, ModelError, first_line
from spdtool.export.bundle.read import longest_input
from spdtool.export.classifier import Classifier
from spdtool.export.gates.reference import DevLogits, DevSets, Reference
from spdtool.export.gates.sentence import check_sentence_files, check_token_vectors
from spdtool.export.load import load
from spdtool.export.model_files import read_tokenizer
from spdtool.export.target import Target
from spdtool.export.token_rows import TokenRow
from spdtool.models.config import read_config
from spdtool.models.layers import max_positions
from spdtool.models.load import load_tokenizer
from spdtool.models.predict import Forward
from spdtool.tasks.decision import Answer
from spdtool.tasks.task import Task

# Where and by what a model was saved; no client computes anything else because of them.
HARMLESS_FIELDS = {"_name_or_path", "dtype", "torch_dtype", "transformers_version"}
TOKENIZER_STATE = ("padding", "truncation")  # left by the last call
TOKENIZER_FIELDS = (
    "padding_side", "truncation_side", "model_max_length", "model_input_names", "pad_token_id", "pad_token_type_id",
    "all_special_ids", "special_tokens_map",
)  # fmt: skip
GOLDEN_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "a very good film, and then a bad book",
    "SHOUTING, and Some Mixed Case",
    "\u00c0 la carte: na\u00efve caf\u00e9s in Z\u00fcrich, S\u00e3o Paulo and \u0141\u00f3d",
    "It's 3.14 % of $5,000 (or #42)... isn't it?!",
    "\u4f60\u597d\uff0c\u4e16\u754c \u043f\u0440\u0438\u0432\u0435\u0442 \U0001f600",
    "  spaces\tand\nlines  ",
    "good " * 700,
)
PROBABILITY_TOLERANCE = 1e-5


def check_folder(target: Target, reference: Reference, folder: Path, provider: str) -> None:
    """Open the folder as a stranger would, and compare everything but the dev score with the checkpoint.

    Raises:
        GateError: the folder cannot be opened, or what differs.
    """
    tokenizer = reference.tokenizer
    check_configuration(folder, reference.checkpoint, target.changed_fields)
    if tokenizer.is_fast:
        check_raw_tokenizer(folder, tokenizer)
    check_tokenizer(_load_exported_tokenizer(folder), tokenizer)
    if opens_by_load(target, reference):
        classifier = open_classifier(folder, provider)
        check_classifier(classifier, reference, tokenizer)
        check_tokens(classifier, tokenizer)
        _check_same_model(classifier, target.session(folder, provider), reference, tokenizer)
    check_sentence_files(folder, reference)
    check_token_vectors(target, reference, folder, provider)


def opens_by_load(target: Target, reference: Reference) -> bool:
    """Whether `spdtool.load` can open what the target writes for this checkpoint."""
    # Without tokenizer.json no client but transformers reads texts.
    return target.opened_by == "onnxruntime" and reference.tokenizer.is_fast


def open_classifier(folder: Path, provider: str) -> Classifier:
    """Open the folder by `spdtool.load`.

    Raises:
        GateError: it does not open.
    """
    try:
        return load(folder, provider=provider)
    except ModelError as error:  # the checkpoint is sound: the export is at fault
        raise GateError(f"spdtool.load does not open the folder: {error.message}") from None


def check_configuration(folder: Path, checkpoint: Path, changed_fields: Sequence[str] = ()) -> None:
    """Refuse a config.json that says something else than the checkpoint's, but where and by what it was saved.

    Args:
        changed_fields: that the target may change.
    """
    # As the model was loaded: without the switches that a checkpoint may bring, such as output_attentions.
    expected = read_config(checkpoint).to_dict()
    try:
        exported = AutoConfig.from_pretrained(folder).to_dict()
    except Exception as error:  # transformers raises many kinds
        raise GateError(f"transformers does not open the exported config.json: {first_line(error)}") from None
    for name in sorted(expected.keys() | exported.keys()):
        is_free = name in HARMLESS_FIELDS or name in changed_fields
        if not is_free and expected.get(name) != exported.get(name):
            raise GateError(
                f"config.json: {name} is {exported.get(name)!r} in the exported folder; "
                f"the checkpoint has {expected.get(name)!r}"
            )


def check_raw_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare tokenizer.json itself: transformers may build parts of a tokenizer anew and not read them."""
    try:
        exported = json.loads(read_tokenizer(folder).to_str())
    except ModelError as error:
        raise GateError(error.message) from None
    _require_equal_parts("tokenizer.json", exported, json.loads(tokenizer.backend_tokenizer.to_str()))


def check_tokenizer(exported: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare the exported tokenizer, as transformers opens it, with the checkpoint's.

    Raises:
        GateError: names what differs.
    """
    if exported.get_vocab() != tokenizer.get_vocab():
        raise GateError("the exported tokenizer has another vocabulary than the checkpoint's")
    if exported.is_fast != tokenizer.is_fast:
        raise GateError("the exported tokenizer and the checkpoint's are not of one kind")
    if tokenizer.is_fast:
        backends = [json.loads(each.backend_tokenizer.to_str()) for each in (exported, tokenizer)]
        _require_equal_parts("the exported tokenizer", *backends)
    for name in TOKENIZER_FIELDS:
        value, expected = getattr(exported, name), getattr(tokenizer, name)
        if value != expected:
            raise GateError(f"the exported tokenizer has the {name} {value!r}; the checkpoint has {expected!r}")
    for first, second in golden_texts():
        if dict(exported(first, second)) != dict(tokenizer(first, second)):
            raise GateError(f"the exported tokenizer gives other tokens than the checkpoint's for {first[:60]!r}")


def golden_texts() -> list[tuple[str, str | None]]:
    """Texts on which tokenizers are compared, alone, in pairs, and empty."""
    pairs = pairwise(GOLDEN_TEXTS)
    return [("", None), ("", "a book"), *((text, None) for text in GOLDEN_TEXTS), *pairs]


def check_classifier(classifier: Classifier, reference: Reference, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare labels, padding, length and kind of decision with the checkpoint's.

    Raises:
        GateError: names what differs.
    """
    config, names = AutoConfig.from_pretrained(reference.checkpoint), reference.label_names
    limit = longest_input(config.to_dict(), {"model_max_length": tokenizer.model_max_length})
    padding = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    comparisons = {
        "labels": (classifier.names, names),
        "longest input": (classifier.max_length, limit),
        "side of padding": (classifier.pads_left, tokenizer.padding_side == "left"),
        "padding": (classifier.padding, padding),
    }
    for name, (value, expected) in comparisons.items():
        if value != expected:
            raise GateError(f"spdtool.load gives the {name} {value!r}; the checkpoint has {expected!r}")
    positions = max_positions(reference.model)
    if positions is not None and classifier.max_length > positions:
        raise GateError(
            f"spdtool.load takes {classifier.max_length} tokens, and the model has {positions} positions",
            "look at model_max_length in the checkpoint's tokenizer_config.json",
        )
    task = reference.dev.task
    if task is not None and type(classifier.decision) is not task.decision:
        raise GateError(
            f"spdtool.load takes the folder for another kind of task than {task.name!r}, which was scored: "
            f"{type(classifier.decision).__name__} instead of {task.decision.__name__}",
            "look at architectures and problem_type in the checkpoint's config.json",
        )


def check_tokens(classifier: Classifier, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare the tokens of golden texts, of a long text those of its first window; raises GateError."""
    options = {"truncation": classifier.decision.truncation(), "max_length": classifier.max_length}
    for first, second in texts_to_read(classifier):
        expected = tokenizer(first, second, **options)
        row = classifier.tokenize([first], None if second is None else [second])[0]
        types = expected.get("token_type_ids", row.types.tolist())
        if row.ids.tolist() != expected["input_ids"] or row.types.tolist() != types:
            raise GateError(f"spdtool.load gives other tokens than the checkpoint's tokenizer for {first[:60]!r}")


def texts_to_read(classifier: Classifier) -> list[tuple[str, str | None]]:
    """List the golden texts that the kind of task reads: a kind that cuts windows reads only texts, or only pairs."""
    windows = classifier.decision.windows
    return [pair for pair in golden_texts() if windows is None or (pair[1] is not None) == (windows == 1)]


def is_paired(classifier: Classifier) -> bool:
    """Whether the kind of task reads nothing but pairs."""
    return classifier.decision.windows == 1


def predict_from_texts(classifier: Classifier, dev: DevSets, max_length: int, names: Sequence[str]) -> DevLogits:
    """Compute the logits of every dev set from its texts, and hold the answers against what is scored.

    Args:
        max_length: to which the dev sets were cut.
        names: the checkpoint's labels.

    Raises:
        GateError: tokens, answers or probabilities are others than those of the checkpoint.
    """
    assert dev.task is not None
    classifier.limit_length(max_length)
    logits = {}
    for split, rows in dev.texts.items():
        tokens = classifier.tokenize([classifier.prompt + text for text in rows.first], rows.second)
        _require_same_tokens(tokens, dev.splits[split], rows)
        values = classifier.logits_of_tokens(tokens)
        logits[split] = values if isinstance(values, np.ndarray) else np.concatenate(values)
        answers = classifier.decision.scored_answers(classifier.group(tokens, values))
        check_answers(answers, dev.task.answers(logits[split], dev.splits[split], names))
        check_probabilities(classifier, logits[split], dev.task)
    return logits


def check_answers(answers: Sequence[Answer], expected: Sequence[Answer]) -> None:
    """Refuse answers that are not those which the task scores; raises GateError."""
    if len(answers) != len(expected):
        raise GateError(f"spdtool.load gives {len(answers)} answers for the {len(expected)} dev rows that are scored")
    for number, (answer, name) in enumerate(zip(answers, expected, strict=True)):
        if answer != name:
            raise GateError(
                f"spdtool.load answers {answer!r} on dev row {number}; what is scored there is {name!r}",
                "look at id2label and problem_type in the checkpoint's config.json",
            )


def check_probabilities(classifier: Classifier, logits: np.ndarray, task: Task) -> None:
    """Refuse probabilities that do not belong to the logits; raises GateError."""
    expected = task.probabilities(logits)
    probabilities = None if expected is None else classifier.probabilities(logits)
    if probabilities is None or expected is None:
        return
    if not np.abs(probabilities - expected).max(initial=0) <= PROBABILITY_TOLERANCE:
        raise GateError("spdtool.load gives other probabilities than those that belong to the logits")


def _load_exported_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer(folder)
    except ModelError as error:
        raise GateError(error.message) from None


def _require_equal_parts(source: str, exported: Mapping[str, JsonValue], expected: Mapping[str, JsonValue]) -> None:
    """Compare two tokenizers as JSON: vocabulary, normalizer, pre-tokenizer, post-processor, added tokens."""
    for name in sorted(exported.keys() | expected.keys()):
        if name not in TOKENIZER_STATE and exported.get(name) != expected.get(name):
            raise GateError(f"{source} has another {name} than the checkpoint's tokenizer")


def _require_same_tokens(tokens: Sequence[TokenRow], encoded: Encoded, rows: Rows) -> None:
    """Refuse texts whose tokens are not those that the checkpoint was scored on; raises GateError."""
    ids, types = encoded.columns["input_ids"], encoded.columns.get("token_type_ids")
    for number, row in enumerate(tokens):
        span = slice(encoded.offsets[number], encoded.offsets[number + 1])
        is_same = np.array_equal(row.ids, ids[span])
        if types is not None:
            is_same = is_same and np.array_equal(row.types, types[span])
        if not is_same:
            text = rows.first[number]
            raise GateError(f"spdtool.load gives other tokens than the checkpoint's tokenizer for {text[:60]!r}")


def _check_same_model(
    classifier: Classifier, session: Forward, reference: Reference, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse a folder of which `spdtool.load` opens another model, or pads otherwise, than the gates checked."""
    pairs = [pair for pair in texts_to_read(classifier) if pair[0] and (pair[1] is not None) == is_paired(classifier)]
    firsts, seconds = [first for first, _ in pairs], [second for _, second in pairs if second is not None] or None
    options = {"truncation": classifier.decision.truncation(), "max_length": classifier.max_length}
    encoding = tokenizer(firsts, seconds, padding=True, return_tensors="np", **options)
    expected = session({name: np.asarray(encoding[name], np.int64) for name in encoding})
    rows = []
    for number, first in enumerate(firsts):
        rows.append(classifier.tokenize([first], None if seconds is None else [seconds[number]])[0])
    for logits, row_expected, mask in zip(
        classifier.compute(rows), expected, encoding["attention_mask"].astype(bool), strict=True
    ):
        wanted = row_expected if row_expected.ndim == 1 else row_expected[mask]
        difference = float(np.abs(logits - wanted).max())
        if not difference <= reference.recipe.export.tolerance:
            raise GateError(f"spdtool.load gives logits that differ by {difference:.2g} from those that were checked")
