"""`Task`: the base class of every kind of task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from spdtool.data import dataset as datasets
from spdtool.data import overview
from spdtool.data.dataset import Dataset, Rows
from spdtool.data.tokens import Encoded, encode_splits
from spdtool.errors import RecipeError
from spdtool.recipe.fields import Recipe
from spdtool.recipe.training import Loss
from spdtool.run.records import ClassScores
from spdtool.tasks.decision import Answer, Decision, Json, OneLabel
from spdtool.tasks.head import SEQUENCE_CLASSIFIER, Head
from spdtool.tasks.scores.calibration import Confidences
from spdtool.tasks.scores.metrics import METRICS, describe_headline
from spdtool.tasks.scores.significance import Resampler

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]
"""Values of `problem_type` in config.json."""


class Task:
    """One kind of task on one data set. A subclass overrides what differs from a classifier of whole texts.

    The outputs of a split are one array: logits [rows, labels], or [all tokens, labels] for a head with an output for
    each token, laid out as `Encoded.columns` are.

    Attributes:
        head: which class of Hugging Face it needs, what that reads, and the form of its outputs.
        decision: class that answers for an exported model of this kind.
        problem_type: value of that field in a checkpoint's config.json.
        metric: the one that is the headline score; None: the mean of all.
        positive: index of the class that metrics of two classes call positive, in the order of the labels.
        scores_training_rows: whether training rows can be scored, as those with labels can.
        columns: of a file of this kind, for listings; empty: it is not listed.
    """

    head: Head = SEQUENCE_CLASSIFIER
    decision: type[Decision] = OneLabel
    problem_type: ProblemType | None = None
    metric: str | None = None
    positive: int = 1
    scores_training_rows: bool = True
    columns: str = ""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    @property
    def name(self) -> str:
        """Name of the data set, as in `--task NAME`."""
        return self.dataset.name

    @property
    def head_labels(self) -> tuple[str, ...]:
        """Names of a new head's outputs, one for each logit."""
        return self.dataset.labels

    # Rows and tokens

    def read_rows(self, recipe: Recipe) -> dict[str, Rows]:
        """Load the splits, check them and reduce them to `recipe.max_rows`; texts without labels are one more split.

        Raises:
            DataError: a split is missing or empty, or nothing can be learnt from the training rows.
            RecipeError: the recipe has texts without labels, and this kind learns from none.
        """
        splits = datasets.load_splits(self.dataset, recipe)
        # Before rows are drawn: a small sample may miss a class by chance.
        self.check_training_rows(splits["train"])
        if recipe.unlabeled is not None:
            file, columns = Path(recipe.unlabeled), recipe.unlabeled_text
            splits[datasets.UNLABELED] = self.read_unlabeled(file, columns, splits["train"])
        return {name: self.sample_rows(rows, recipe) for name, rows in splits.items()}

    def read_unlabeled(self, file: Path, columns: Sequence[str], train: Rows) -> Rows:
        """Read rows without labels, with labels of the form that `encode` takes; a batch marks them, see `mix_rows`.

        Args:
            columns: of the texts; empty: those of the training rows.
            train: the training rows.

        Raises:
            DataError: the file cannot be read.
            RecipeError: this kind learns from no rows without labels, which is the default.
        """
        raise RecipeError(
            f"a task of the kind {self.dataset.kind!r} learns from no texts without labels", "leave --unlabeled out"
        )

    def sample_rows(self, rows: Rows, recipe: Recipe) -> Rows:
        """Draw at most `recipe.max_rows` rows of a split."""
        return rows.sample(recipe.max_rows, recipe.seed)

    def check_training_rows(self, rows: Rows) -> None:
        """Raise DataError where nothing can be learnt from these rows."""

    def encode(self, tokenizer: PreTrainedTokenizerBase, splits: datasets.Splits, recipe: Recipe) -> dict[str, Encoded]:
        """Tokenize every split, with the labels that a batch holds.

        Raises:
            ModelError: the tokenizer cannot pad.
        """
        return encode_splits(tokenizer, splits, recipe.max_length)

    def compare_with(
        self, splits: Mapping[str, Encoded], predict_teacher: Callable[[], Mapping[str, np.ndarray]]
    ) -> dict[str, Encoded]:
        """Return the splits with what scores need of the teacher beside their rows; most kinds need nothing.

        Args:
            predict_teacher: computes the teacher's outputs of every dev set.
        """
        return dict(splits)

    def sample_scored_rows(self, rows: Encoded, count: int, seed: int) -> Encoded:
        """Draw the training rows that are scored beside the dev set; none where they have nothing to be scored by."""
        return rows.sample(count if self.scores_training_rows else 0, seed)

    # Labels of a model

    def widen(self, names: Sequence[str]) -> Task:
        """Return the task with the classes that only a model has, by its label names; itself where there are none."""
        return self

    def label_order(self, names: Sequence[str]) -> list[int]:
        """Return, for each label of the data set, its index among a model's label names: always a permutation.

        Raises:
            ModelError: the model has another number of labels, or calls them otherwise.
        """
        raise NotImplementedError

    def matches_by_position(self, names: Sequence[str]) -> bool:
        """Tell whether only their order says which of a model's labels is which."""
        return False

    def align_labels(self, splits: dict[str, Rows], names: Sequence[str]) -> dict[str, Rows]:
        """Return the rows with labels in the order of a model's label names; raises as `label_order` does."""
        self.label_order(names)
        return splits

    # Losses

    def gold_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss against the gold labels, averaged over what `Encoded.label_counts` counts: rows, or tokens.

        Args:
            logits: float32 [rows, labels], or [rows, tokens, labels].
            labels: of a batch.
        """
        raise NotImplementedError

    @staticmethod
    def logit_loss(student: Tensor, teacher: Tensor, labels: Tensor, loss: Loss) -> Tensor:
        """Return the loss against the teacher's logits, mixed with that against the gold labels.

        Args:
            student, teacher: logits [rows, labels], or [rows, tokens, labels].
            labels: of a batch; where a kind has outputs without a gold label, they are the mask.
            loss: the recipe's section, which has the share of the gold labels.
        """
        raise NotImplementedError

    # Predictions and scores

    def predictions(self, logits: np.ndarray) -> np.ndarray:
        """Turn logits [rows, labels] into predictions [rows], as the metrics take them."""
        raise NotImplementedError

    def score(self, outputs: np.ndarray, rows: Encoded) -> dict[str, float]:
        """Return every metric of the data set, and `score`, the headline: one of them, or their mean as in GLUE.

        Args:
            outputs: of the split, see the class.
            rows: the split, with its labels and whatever `encode` put into `details`.
        """
        return self.score_labels(outputs, rows.labels)

    def score_labels(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Score logits [rows, labels] by labels that each belong to one row."""
        predicted = self.predictions(logits)
        return self.summarize({name: self.measure(name, labels, predicted) for name in self.dataset.metrics})

    def resampler(self, outputs: np.ndarray, rows: Encoded) -> Resampler | None:
        """Return how a bootstrap resamples the score of a split; None where rows cannot be drawn one by one.

        Args:
            outputs, rows: as in `score`.
        """
        if rows.labels_per_token or rows.groups is not None or rows.details is not None:
            return None
        return Resampler(
            len(rows), "rows", lambda drawn: self.score_labels(outputs[drawn], rows.labels[drawn])["score"]
        )

    def resample_means(self, values: Mapping[str, np.ndarray], units: str) -> Resampler | None:
        """Return how a bootstrap resamples a score that is a mean over units; None without any.

        Args:
            values: each metric, [units]. units: see `Resampler`.
        """
        count = len(next(iter(values.values())))
        if not count:
            return None

        def score(drawn: np.ndarray) -> float:
            return self.summarize({name: float(each[drawn].mean()) for name, each in values.items()})["score"]

        return Resampler(count, units, score)

    def summarize(self, values: dict[str, float]) -> dict[str, float]:
        """Put `score`, the headline, in front of the values of the metrics."""
        headline = float(np.mean(list(values.values()))) if self.metric is None else values[self.metric]
        return {"score": headline} | values

    def measure(self, metric: str, gold: np.ndarray, predicted: np.ndarray) -> float:
        """Return one metric of gold labels and predictions, both [rows]."""
        return METRICS[metric](gold, predicted)

    def score_splits(self, logits: Mapping[str, np.ndarray], splits: Mapping[str, Encoded]) -> dict[str, float]:
        """Score `dev`; metrics of a further dev set carry its suffix (`accuracy_mm`) and do not enter `score`.

        Args:
            logits: by name of the dev set, [rows, labels].
        """
        scores = self.score(logits["dev"], splits["dev"])
        # One headline: the number by which epochs and students are chosen.
        for name in logits:
            if name == "dev":
                continue
            further = self.score(logits[name], splits[name])
            for metric in self.dataset.metrics:
                scores[metric + name.removeprefix("dev")] = further[metric]
        return scores

    def score_classes(self, outputs: np.ndarray, rows: Encoded, names: Sequence[str]) -> dict[str, ClassScores]:
        """Score each class by itself; empty where there are no classes.

        Args:
            outputs, rows: as in `score`.
            names: of the model's labels, in the order of its logits.
        """
        return {}

    def baseline(self, rows: Rows | Encoded) -> dict[str, float]:
        """Score the best answer that is given without reading the text: the majority class, or the mean."""
        raise NotImplementedError

    def chance_score(self, rows: Rows | Encoded) -> float:
        """Return the highest dev score of a model that may have learned nothing."""
        return self.baseline(rows)["score"]

    def right_rows(self, outputs: np.ndarray, rows: Encoded) -> np.ndarray | None:
        """Tell which rows have the right answer, bool [rows]; None where answers are more or less right."""
        return None

    def confusion(self, outputs: np.ndarray, rows: Encoded, names: Sequence[str]) -> list[tuple[str, str, int]]:
        """Count rows by gold and predicted class; empty where a row has not exactly one class."""
        return []

    def confidences(self, outputs: np.ndarray, rows: Encoded, temperature: float) -> Confidences | None:
        """Return the probabilities of a split, logits divided by a temperature; None for a kind without any."""
        return None

    def compare_predictions(
        self, before: np.ndarray, after: np.ndarray, rows: Encoded, tolerance: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Compare the predictions of two models on the same rows.

        Args:
            before, after: outputs of the split.
            rows: the split.
            tolerance: by how much a number may move and count as the same.

        Returns:
            Which predictions changed, bool, and which of these changed for the worse, bool: an entry for each
            prediction that counts as one, such as a row or a word.
        """
        raise NotImplementedError

    def measure_change(self, before: np.ndarray, after: np.ndarray) -> dict[str, float]:
        """Return figures on how numbers changed, from the outputs of a split: `mean_change` and `rank_correlation`.

        Empty where predictions are classes: those that flipped are counted instead.
        """
        return {}

    # What an exported folder has to answer: the gates compare it with what `decision` answers

    def answers(self, outputs: np.ndarray, rows: Encoded, names: Sequence[str]) -> list[Answer]:
        """Return what `spdtool.load` has to answer: the name of a label, or a number.

        Args:
            outputs, rows: as in `score`.
            names: labels in the order of the logits.
        """
        predicted = self.predictions(outputs)
        if np.issubdtype(predicted.dtype, np.integer):
            return [names[index] for index in predicted.tolist()]
        numbers: list[Answer] = predicted.tolist()
        return numbers

    def probabilities(self, outputs: np.ndarray) -> np.ndarray | None:
        """Return the probabilities that belong to these outputs, float64; None where there are none."""
        return None

    def gold_answers(self, rows: Encoded, names: Sequence[str]) -> list[Answer]:
        """Return the gold labels of the rows as `answers` spells them; empty where they are no labels."""
        return []

    def adopt_settings(self, settings: Mapping[str, Json]) -> None:
        """Answer from now on as `decision` does with these settings."""

    def settings(self, outputs: np.ndarray, rows: Encoded) -> dict[str, Json]:
        """Return what `decision` has to know beside the labels, such as a threshold; it is stored in manifest.json.

        Args:
            outputs, rows: of the checkpoint on the dev rows.
        """
        return {}

    # What the plan prints

    def describe_score(self) -> str:
        """Say what the headline score is."""
        return self.metric or describe_headline(self.dataset.metrics)

    def describe_labels(self, splits: datasets.Splits) -> str:
        """Describe the labels of the rows that have one, in one line."""
        raise NotImplementedError

    def count_classes(self, splits: datasets.Splits) -> dict[str, dict[str, int]]:
        """Count the rows of each class by split; empty where there are no classes."""
        return {}

    def data_warnings(self, splits: datasets.Splits) -> list[str]:
        """Name what may be a mistake in the data, one line each."""
        lines = overview.leaked_rows(splits["train"], splits["dev"], "dev")
        if "test" in splits:
            lines += overview.leaked_rows(splits["train"], splits["test"], "test")
            lines += overview.leaked_rows(splits["dev"], splits["test"], "test", "dev")
        return lines
