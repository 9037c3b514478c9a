"""What a stage trains: a model with its tokenizer, its task and the rows on which it is scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spdtool import ranks
from spdtool.data.tokens import Encoded
from spdtool.models.layers import count_zeros
from spdtool.models.load import label_names, save_on_rank_zero
from spdtool.models.predict import Forward, evaluate_split, predict_dev_sets, torch_forward
from spdtool.models.student import drop_unread_columns
from spdtool.pruning.pruner import Pruner
from spdtool.run.records import ClassScores, IntermediateStudent, Scores
from spdtool.tasks.task import Task
from spdtool.training.quantize import RoundedProducts


@dataclass(kw_only=True)
class Learner:
    """A model that is trained.

    Attributes:
        splits: encoded rows: `train`, `dev`, and further dev sets.
        scored_rows: sample of training rows that is scored beside the dev set; empty: none.
        accelerator: device and precision of its training.
        pruner: prunes at its events and keeps the zeros; None for a dense model.
        rounding: layers that learn to be rounded; None: nothing is.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    splits: Mapping[str, Encoded]
    scored_rows: Encoded
    accelerator: Accelerator
    pruner: Pruner | None = None
    rounding: RoundedProducts | None = None

    @property
    def forward(self) -> Forward:
        """The model's logits for a batch, which may have columns that this model does not read."""
        return drop_unread_columns(torch_forward(self.model, self.accelerator.device), self.tokenizer)

    @property
    def chance_score(self) -> float:
        """Highest dev score of a model that may have learned nothing."""
        return self.task.chance_score(self.splits["dev"])

    def score(self) -> tuple[Scores, Scores | None]:
        """Score the dev sets and the sample of training rows. Collective: call on every rank."""
        dev, train, _ = self.score_classes()
        return dev, train

    def score_classes(self) -> tuple[Scores, Scores | None, dict[str, ClassScores]]:
        """As `score`, and each class of `dev` by itself. Collective: call on every rank."""
        logits = predict_dev_sets(self.forward, self.splits, across_ranks=True)
        dev = self.task.score_splits(logits, self.splits)
        classes = self.task.score_classes(logits["dev"], self.splits["dev"], label_names(self.model))
        if not len(self.scored_rows):
            return dev, None, classes
        return dev, evaluate_split(self.task, self.forward, self.scored_rows, across_ranks=True), classes

    def save(self, folder: Path) -> None:
        """Save model and tokenizer as a Hugging Face checkpoint, from rank 0. Collective: call on every rank."""
        save_on_rank_zero(self.model, self.tokenizer, folder)

    def count_saved_zeros(self, folder: Path, sparsity: float) -> dict[str, tuple[int, int]]:
        """Count `(zeros, size)` of each pruned weight in a saved checkpoint.

        Raises:
            GateError: the zeros are not those that `sparsity` asks for.
        """
        assert self.pruner is not None
        counts = count_zeros(folder, list(self.pruner.masks.parameters))
        self.pruner.check_counts(counts, sparsity)
        return counts

    def save_intermediate(self, folder: Path, sparsity: float, step: int) -> IntermediateStudent:
        """Save and score a student below the target sparsity. Collective: call on every rank.

        Args:
            folder: `students/<sparsity>` in the folder of the stage.
        """
        self.save(folder)
        if ranks.is_main():
            self.count_saved_zeros(folder, sparsity)
        dev, train = self.score()
        name = f"{folder.parent.name}/{folder.name}"  # the folder of the stage will be renamed
        return IntermediateStudent(sparsity=sparsity, step=step, folder=name, dev=dev, train=train)
