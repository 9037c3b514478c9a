"""A checkpoint as the reference of its exported files; what it computes is shared by all targets."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spdtool.data import tokens as data
from spdtool.data.dataset import Rows
from spdtool.data.tokens import Batch, Encoded
from spdtool.export.gates.batches import longest_supported_input, make_dev_batches, make_random_batches
from spdtool.export.target import StorageFormats
from spdtool.models.config import check_kind
from spdtool.models.layers import find_prunable_weights, max_positions
from spdtool.models.load import label_names, load_model, load_tokenizer, save_tokenizer
from spdtool.models.predict import Forward, predict, torch_forward
from spdtool.recipe.fields import Recipe
from spdtool.run.records import ZeroCount
from spdtool.tasks.decision import Json
from spdtool.tasks.prepare import CheckRows, find_task, prepare_rows
from spdtool.tasks.task import Task

DevLogits = dict[str, np.ndarray]
"""Name of a dev set to its logits, as `predict` returns them."""


@dataclass(frozen=True)
class DevSets:
    """The rows on which an export is judged.

    Attributes:
        task: None where no task was given.
        splits: dev sets by name; without a task, one called `dev` that has no rows.
        calibration_rows: some training rows; None without a task.
        texts: the rows of `splits` before they were tokenized.
        test: the test rows, which no gate reads; None where there are none.
        logits: the checkpoint's on a CPU, where they had to be computed already: the teacher's, for kinds whose score
            compares with it.
    """

    task: Task | None
    splits: dict[str, Encoded]
    calibration_rows: Encoded | None = None
    texts: dict[str, Rows] = field(default_factory=dict)
    test: Encoded | None = None
    logits: DevLogits = field(default_factory=dict)

    def predict(self, forward: Forward) -> DevLogits:
        """Compute the logits of every dev set."""
        return {name: predict(forward, rows) for name, rows in self.splits.items()}


def prepare_dev_sets(
    checkpoint: Path, recipe: Recipe, check_rows: CheckRows | None = None, teacher: DevSets | None = None
) -> DevSets:
    """Encode the dev sets of the recipe's task, and some training rows, for a checkpoint.

    Args:
        check_rows: as in `tasks.prepare_rows`.
        teacher: dev sets of the teacher, for kinds whose score compares with it; None: `checkpoint` is the teacher.

    Raises:
        DataError, ModelError: data, tokenizer and model do not fit together.
    """
    model, labeled_recipe = load_model(checkpoint), recipe.without_unlabeled()
    task = find_task(labeled_recipe)
    # First: where the head is of another kind, its labels are not to blame.
    check_kind(checkpoint, model.config, task)
    task, rows = prepare_rows(labeled_recipe, label_names(model), check_rows, task)
    texts = {name: split for name, split in rows.items() if name.startswith("dev")}
    splits = task.encode(load_tokenizer(checkpoint), rows, recipe)
    dev_splits = {name: splits[name] for name in texts}
    # Here, because the exported graph checks nothing: a token beyond the table reads other memory.
    checked = {name: encoded for name, encoded in splits.items() if name in texts or name == "test"}
    data.check_lengths(checked, max_positions(model))
    data.check_vocabulary(checked, model.config.vocab_size)
    logits: DevLogits = {}

    def predict_teacher() -> DevLogits:
        if teacher is not None:  # in its own tokens: a student may have a trimmed vocabulary
            return teacher.logits
        forward = torch_forward(model)
        logits.update({name: predict(forward, split) for name, split in dev_splits.items()})
        return logits

    compared = task.compare_with(dev_splits, predict_teacher)
    calibration_rows = splits["train"].sample(recipe.export.calibration, recipe.seed)
    return DevSets(task, compared, calibration_rows, texts, splits.get("test"), logits)


class Reference:
    """A checkpoint whose zeros and logits are computed when they are first needed.

    Attributes:
        dev: encoded for this checkpoint.
    """

    def __init__(self, checkpoint: Path, dev: DevSets, recipe: Recipe) -> None:
        self.checkpoint = checkpoint
        self.dev = dev
        self.recipe = recipe
        self._batch_logits: dict[str, dict[int, np.ndarray]] = {}
        self._dev_logits: dict[str, DevLogits] = {}
        self._kind_settings: dict[str, dict[str, Json]] = {}

    def with_storage(self, formats: StorageFormats) -> Reference:
        """Return the same reference, whose recipe stores weights in these formats; what was computed is shared."""
        section = self.recipe.export
        if formats == (section.values, section.embeddings):
            return self
        # Before it is copied: the model is large, and logits are stored by the identity of a batch.
        _ = self.model, self.batches
        export = section.model_copy(update={"values": formats.matrices, "embeddings": formats.embeddings})
        other = copy.copy(self)
        other.recipe = self.recipe.model_copy(update={"export": export})
        return other

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, loaded once for everything that only looks at it; `load_model` gives one that may be changed."""
        return load_model(self.checkpoint, eager=True)

    def load_model(self, provider: str = "cpu", *, eager: bool = False) -> PreTrainedModel:
        """Load the model anew; the caller may change it."""
        model = load_model(self.checkpoint, eager=eager)
        model.to(provider)  # type: ignore[arg-type]
        return model

    @cached_property
    def label_names(self) -> list[str]:
        """Labels in the order of the logits."""
        return label_names(self.model)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer."""
        return load_tokenizer(self.checkpoint)

    @cached_property
    def metadata(self) -> dict[str, bytes]:
        """Content of the files that an export writes beside a model: configuration and tokenizer, by name."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            self.model.config.save_pretrained(folder)
            # Loaded anew: the other one has cut and padded texts since, and saves how it was left.
            save_tokenizer(load_tokenizer(self.checkpoint), folder)
            return {
                file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()
            }

    @cached_property
    def longest_input(self) -> int:
        """Longest input, in tokens, that is worth trying."""
        return longest_supported_input(self.model)

    @cached_property
    def zero_counts(self) -> dict[str, ZeroCount]:
        """Zeros and size of each prunable matrix, by parameter."""
        weights = find_prunable_weights(self.model)
        counts = {}
        for name, weight in weights.items():
            counts[name] = ZeroCount(int((weight == 0).sum()), weight.numel())
        return counts

    @cached_property
    def dev_batches(self) -> dict[bool, tuple[str, Batch]]:
        """Those of `batches` that are real rows, by whether they are padded on the left; empty without a task."""
        return make_dev_batches(self.dev.splits["dev"], self.recipe.export.sentences)

    @cached_property
    def batches(self) -> list[tuple[str, Batch]]:
        """The batches on which logits are compared, each with a description: real rows, then random tokens."""
        return [*self.dev_batches.values(), *make_random_batches(self.model, self.dev.splits["dev"])]

    def forward(self, provider: str) -> Forward:
        """Return a forward that knows the checkpoint's logits of `batches`, and of no other batch.

        They are computed with eager attention, which is what is exported: where all tokens in a
        row's window are padding (ModernBERT, padded on the left), torch's two attentions differ.
        The dev sets use the attention with which a client loads the checkpoint.
        """
        if provider not in self._batch_logits:
            model = self.model if provider == "cpu" else self.load_model(provider, eager=True)
            forward = torch_forward(model, provider)
            # By identity: the batches live as long as this object, and hashing arrays takes time.
            self._batch_logits[provider] = {id(batch): forward(batch) for _, batch in self.batches}
        logits = self._batch_logits[provider]
        return lambda batch: logits[id(batch)]

    def kind_settings(self, provider: str) -> dict[str, Json]:
        """Return what the kind of task stores for those who answer from the exported files; see `Task.settings`."""
        task, section = self.dev.task, self.recipe.export
        if task is None or type(task).settings is Task.settings:  # most kinds need no logits for it
            return {}
        if provider not in self._kind_settings:
            settings = task.settings(self.dev_logits(provider)["dev"], self.dev.splits["dev"])
            if not section.calibrate:
                settings.pop("temperature", None)
            self._kind_settings[provider] = settings
        # The checkpoint is scored as the files answer. At each call, since targets differ in their providers.
        task.adopt_settings(self._kind_settings[provider])
        return self._kind_settings[provider]

    def dev_logits(self, provider: str) -> DevLogits:
        """Compute the checkpoint's logits on the dev sets."""
        if provider not in self._dev_logits:
            logits = self.dev.logits if provider == "cpu" else {}
            self._dev_logits[provider] = logits or self.dev.predict(torch_forward(self.load_model(provider), provider))
        return self._dev_logits[provider]
