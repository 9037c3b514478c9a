"""The kinds of task that are not supported, and how their rows and checkpoints are recognised.

A kind is refused by its name. The message gives no advice on how to turn the rows into something else: a model that
learnt from such rows would answer another question.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

SUPPORTED = (
    "supported are classes and numbers for a text or a pair of texts, a tag for each word of a text, "
    "and answers in a text"
)


@dataclass(frozen=True)
class UnsupportedKind:
    """A kind of task that spdtool does not have.

    Attributes:
        name: for messages.
        columns: groups of column names; rows that have every name of one group are of this kind.
        only_columns: such groups of common names, which must be all the columns.
        architectures: endings of class names that config.json has for a model of this kind.
        hint: what to give instead.
    """

    name: str
    columns: tuple[tuple[str, ...], ...] = ()
    only_columns: tuple[tuple[str, ...], ...] = ()
    architectures: tuple[str, ...] = ()
    hint: str = SUPPORTED


UNSUPPORTED_KINDS = (
    UnsupportedKind(
        "token classification (a label for each word, such as named entities) without lists of words",
        (("tokens", "ner_tags"), ("tokens", "pos_tags"), ("tokens", "tags"), ("tokens", "labels"), ("words", "tags")),
        hint="give a CoNLL file (.conll), or lists of words and of tags in every row (jsonl, parquet)",
    ),
    UnsupportedKind(
        "question answering (a span of the context) without `answers` as SQuAD has them",
        (
            ("context", "question", "answers"),
            ("context", "question", "answer_start"),
            ("context", "question", "answer"),
            ("context", "question", "answer_text"),
        ),
        hint='a column answers with {"text": [...], "answer_start": [...]} in every row, or a JSON file of SQuAD',
    ),
    UnsupportedKind(
        "multiple choice",
        (("ctx", "endings"), ("question", "choices"), ("sent1", "ending0", "ending1")),
        architectures=("ForMultipleChoice",),
    ),
    UnsupportedKind(
        "text generation (summaries, translations, answers in free text)",
        (
            ("translation",),
            ("document", "summary"),
            ("article", "highlights"),
            ("instruction", "output"),
            ("messages",),
        ),
        only_columns=(
            *(("source", "target"), ("input", "output"), ("text", "summary"), ("prompt", "completion")),
            *(("question", "answer"), ("src", "tgt")),
        ),
        architectures=("ForConditionalGeneration", "ForCausalLM", "LMHeadModel"),
    ),
    UnsupportedKind(
        "sentence embeddings (texts that are near to or far from each other) without a sentence encoder as --teacher",
        (("anchor", "positive"), ("query", "positive"), ("query", "pos"), ("query", "positive_passages")),
        hint="for a sentence encoder: --teacher FOLDER of sentence-transformers; for a reranker: --set ranking=true",
    ),
)


def kind_of_columns(columns: Collection[str]) -> UnsupportedKind | None:
    """Return the unsupported kind whose columns these are; None where they are of none."""
    names = {name.strip().lower() for name in columns}
    for kind in UNSUPPORTED_KINDS:
        if any(names.issuperset(group) for group in kind.columns):
            return kind
        if any(names == set(group) for group in kind.only_columns):
            return kind
    return None


def kind_of_architectures(architectures: Collection[str]) -> str | None:
    """Return the name of the unsupported kind of a checkpoint by its classes; None where they are of none."""
    for kind in UNSUPPORTED_KINDS:
        if any(name.endswith(kind.architectures) for name in architectures if kind.architectures):
            return kind.name
    return None
