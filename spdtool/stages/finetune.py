"""`spdtool finetune`: phase 3, the sparse student alone, still learning from the teacher.

Reads: `teacher/`, `distill/`. Writes: `finetune/`, the student that is exported.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from spdtool import console
from spdtool.data.tokens import Encoded
from spdtool.errors import ModelError
from spdtool.models.load import label_names
from spdtool.models.vocabulary import choose_tokens, read_extra_texts, trim_embeddings, trim_tokenizer
from spdtool.run.folder import Run
from spdtool.run.records import TrainingResult, TrimmedVocabulary
from spdtool.stages.phase import Phase, load_phase, train_phase
from spdtool.tasks.prepare import prepare_data


def finetune(run: Run) -> TrainingResult:
    """Train the student alone; raises as `load_phase`, `train_phase` and `trim_vocabulary`."""
    phase = load_phase(run, "finetune", start="distill")
    phase.keep_zeros(run.recipe, run.training_result("prune"))
    trims = run.recipe.finetune.vocabulary == "data"
    return train_phase(run, "finetune", phase, trim_vocabulary if trims else None)


def trim_vocabulary(run: Run, phase: Phase) -> TrimmedVocabulary:
    """Leave every token out of the student that no text needs, and encode the rows of `phase` anew.

    Training ends first. Nothing that it computed changes: the embeddings that go were of no training row.

    Args:
        phase: its model, tokenizer, task, splits and scored rows are changed.

    Raises:
        ModelError: the tokenizer or the family cannot be trimmed, or a training row would be read otherwise.
        RecipeError: see `read_extra_texts`.
    """
    recipe, before = run.recipe, phase.splits
    used = set(np.unique(before["train"].columns["input_ids"]).tolist())
    for text in read_extra_texts(recipe):
        used.update(phase.tokenizer(text, add_special_tokens=False)["input_ids"])
    tokens = choose_tokens(phase.tokenizer, used)
    trimmed = trim_tokenizer(phase.tokenizer, tokens)
    phase.task, splits = prepare_data(recipe, trimmed, label_names(phase.model), run.record_data)
    phase.splits = {name: _keep_details(before[name], rows) for name, rows in splits.items()}
    if _count_changed_rows(before["train"], phase.splits["train"], tokens):
        raise ModelError(
            "the trimmed tokenizer cuts training rows otherwise than the whole one", "leave out finetune.vocabulary"
        )
    record = TrimmedVocabulary(
        tokens=len(tokens),
        tokens_before=phase.model.config.vocab_size,
        dev_tokens=int(before["dev"].offsets[-1]),
        dev_unknown_before=_count_token(before["dev"], phase.tokenizer.unk_token_id),
        dev_unknown=_count_token(phase.splits["dev"], trimmed.unk_token_id),
        dev_rows_changed=_count_changed_rows(before["dev"], phase.splits["dev"], tokens),
    )
    trim_embeddings(phase.model, tokens)
    phase.tokenizer = trimmed
    scored_rows = phase.section.scored_train_rows
    phase.scored_rows = phase.task.sample_scored_rows(phase.splits["train"], scored_rows, recipe.seed)
    more_unknown = record.dev_unknown - record.dev_unknown_before
    console.say(
        f"vocabulary: {record.tokens:,} of {record.tokens_before:,} tokens; {record.dev_rows_changed:,} of "
        f"{len(before['dev']):,} dev rows are cut otherwise, and {more_unknown:,} of {record.dev_tokens:,} dev tokens "
        f"became unknown ({more_unknown / max(record.dev_tokens, 1):.2%})"
    )
    return record


def _keep_details(before: Encoded, after: Encoded) -> Encoded:
    """Return the rows encoded anew with what stood beside them, such as the teacher's vectors, where that is lost."""
    return after if after.details is not None else replace(after, details=before.details)


def _count_token(rows: Encoded, token: int | None) -> int:
    """Count a token in all rows; 0 where the tokenizer has none such."""
    return 0 if token is None else int((rows.columns["input_ids"] == token).sum())


def _count_changed_rows(before: Encoded, after: Encoded, tokens: np.ndarray) -> int:
    """Count the rows that the trimmed tokenizer cuts into other pieces.

    Args:
        tokens: old number of each token of the trimmed one.
    """
    changed = 0
    for row in range(len(before)):
        old = before.columns["input_ids"][before.offsets[row] : before.offsets[row + 1]]
        new = after.columns["input_ids"][after.offsets[row] : after.offsets[row + 1]]
        changed += not np.array_equal(old, tokens[new])
    return changed
