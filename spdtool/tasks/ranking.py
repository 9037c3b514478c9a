"""Ranking: a number for each pair of query and passage, by which the passages of a query are put in order.

The model is a cross-encoder with one output, or with two (not relevant, relevant). A row's labels are the number of its
query and its relevance. Batches hold whole queries, so that the order of their passages can be distilled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spdtool.data import dataset as datasets
from spdtool.data.dataset import Dataset, Rows
from spdtool.data.kinds.ranking import read_unlabeled_queries, sample_queries
from spdtool.data.tokens import Encoded
from spdtool.errors import DataError, ModelError, RecipeError
from spdtool.plugins import task_kinds
from spdtool.recipe.fields import Recipe
from spdtool.recipe.training import Loss
from spdtool.tasks.decision import LOGITS, NUMBER, Answer, Decision, ExampleCall, Json, Object, Snippets
from spdtool.tasks.scores.probabilities import sigmoid
from spdtool.tasks.scores.ranking_metrics import (
    rank_passages,
    reciprocal_rank,
    score_queries,
    score_rankings,
    split_by_query,
)
from spdtool.tasks.scores.significance import Resampler
from spdtool.tasks.task import Task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

SCORE = "score"
ACTIVATIONS = ("sigmoid", "identity")
SHUFFLES = 20  # random orders of the dev passages that say what chance scores
CROSS_ENCODER_NOTE = """
With sentence-transformers:

```python
from sentence_transformers import CrossEncoder

model = CrossEncoder("FOLDER", backend="onnx")
print(float(model.predict([("a query", "a passage")])[0]))
```
"""
IRRELEVANT_NAMES = ("0", "label_0", "irrelevant", "not_relevant", "false", "negative")


class Relevance(Decision):
    """Each pair of query and passage has a score, as `CrossEncoder.predict` of sentence-transformers gives it.

    That of one output is its sigmoid, unless config.json says that it is the output itself; that of two outputs is the
    probability of the relevant one.
    """

    output_names = (LOGITS, SCORE)
    route = "rerank"
    example = ExampleCall("score", pair=("a query", "a passage"))

    def __init__(self, names: Sequence[str], settings: Mapping[str, Json] | None = None) -> None:
        super().__init__(names, settings)
        activation = self.settings.get("activation", ACTIVATIONS[0])
        if activation not in ACTIVATIONS:
            raise ModelError(f"the activation is {str(activation)[:40]!r}", f"known: {', '.join(ACTIVATIONS)}")

    @classmethod
    def settings_of(cls, config: Mapping[str, Any]) -> dict[str, Json]:
        """Read from config.json what is applied to the only output.

        Raises:
            ModelError: it is another function.
        """
        stored = config.get("sentence_transformers") or {}
        name = stored.get("activation_fn") if isinstance(stored, Mapping) else None
        name = str(name or config.get("sbert_ce_default_activation_function") or "Sigmoid")
        activation = name.rsplit(".", 1)[-1].lower()
        if activation not in ACTIVATIONS:
            raise ModelError(
                f"config.json says that scores are the {name} of the output", f"supported: {', '.join(ACTIVATIONS)}"
            )
        return {"activation": activation}

    @classmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:
        """Tell whether config.json was saved by a cross-encoder."""
        labels = config.get("id2label") or {"0": "", "1": ""}
        is_marked = "sentence_transformers" in config or "sbert_ce_default_activation_function" in config
        return is_marked and len(labels) == 1

    def margins(self, outputs: np.ndarray) -> np.ndarray:
        """Return the only logit of each row, or how far the relevant one is above the other."""
        if outputs.shape[1] == 1:
            return outputs[:, 0]
        relevant = find_relevant_output(self.names)
        margins: np.ndarray = outputs[:, relevant] - outputs[:, 1 - relevant]
        return margins

    def scores(self, outputs: np.ndarray) -> np.ndarray:
        """Return the score of each row, float32 [rows]."""
        margins = self.margins(outputs)
        if outputs.shape[1] == 1 and self.settings.get("activation") == "identity":
            return margins
        return sigmoid(margins)

    def decide(self, outputs: np.ndarray) -> list[Answer]:
        """Return the score of each row."""
        numbers: list[Answer] = self.scores(outputs).tolist()
        return numbers

    def scored_answers(self, outputs: np.ndarray) -> list[Answer]:
        """Return the scores before the sigmoid, by which passages are ranked."""
        numbers: list[Answer] = self.margins(outputs).tolist()
        return numbers

    def predictions(self, outputs: np.ndarray) -> list[Object]:
        """Return `score` and `logits` of each row."""
        scores = self.decide(outputs)
        return [{"score": score, "logits": logits} for score, logits in zip(scores, outputs.tolist(), strict=True)]

    def tensor(self, name: str, outputs: np.ndarray) -> list[Json]:
        """Return the logits or the scores."""
        flat: list[Json] = (self.scores(outputs) if name == SCORE else outputs.ravel()).tolist()
        return flat

    def tensor_shape(self, name: str, rows: int) -> list[int]:
        """Return the shape of an output."""
        return [rows] if name == SCORE else [rows, len(self.names)]

    def prediction_schema(self) -> Object:
        """Return the schema of an object of `predictions`."""
        properties: Object = {SCORE: NUMBER, LOGITS: {"type": "array", "items": NUMBER}}
        return {"type": "object", "properties": properties, "required": [*properties]}

    def describe(self) -> str:
        """Say that it is a score."""
        return "how relevant a passage is to a query"

    def snippets(self) -> Snippets:
        """Return what a model card shows of a score."""
        answer, reason = "how relevant the passage is to the query", "takes no second text"
        if len(self.names) == 1 and self.settings.get("activation") == "identity":
            return Snippets(answer, "float(logits[0, 0])", "logits.data[0]", reason, note=CROSS_ENCODER_NOTE)
        if len(self.names) == 1:
            python, script = "float(1 / (1 + np.exp(-logits[0, 0])))", "1 / (1 + Math.exp(-logits.data[0]))"
            return Snippets(answer, python, script, reason, note=CROSS_ENCODER_NOTE)
        relevant = find_relevant_output(self.names)
        python = f"float(1 / (1 + np.exp(logits[0, {1 - relevant}] - logits[0, {relevant}])))"
        script = f"1 / (1 + Math.exp(logits.data[{1 - relevant}] - logits.data[{relevant}]))"
        return Snippets(answer, python, script, reason)

    def line(self, prediction: Mapping[str, Any]) -> str:
        """Return the score."""
        return f"{prediction[SCORE]:.6g}"

    @property
    def unanswered(self) -> str:
        """The line of a pair without a score."""
        return "-"


def find_relevant_output(names: Sequence[str]) -> int:
    """Return which of two outputs speaks for a passage: the second, unless the names say otherwise."""
    return 0 if len(names) == 2 and names[1].lower() in IRRELEVANT_NAMES else 1


@task_kinds.register("ranking")
class Ranking(Task):
    """An order of the passages of each query."""

    columns = "query, passage, relevant; or a folder of BEIR or MS MARCO"
    decision = Relevance

    def __init__(self, dataset: Dataset) -> None:
        super().__init__(dataset)
        self.relevant = 1  # which of two outputs speaks for the passage

    @property
    def head_labels(self) -> tuple[str, ...]:
        """Name of the only output."""
        return ("score",)

    # Rows

    def read_rows(self, recipe: Recipe) -> dict[str, Rows]:
        """Load the splits and check them; `recipe.max_rows` draws whole queries.

        Raises:
            DataError: a split is missing or empty, or no passage is relevant.
            RecipeError: batches are cut, and the loss compares the passages of a query.
        """
        for phase, section in recipe.phases.items():
            if section.accumulate > 1 and section.loss.ranking != "pointwise":
                raise RecipeError(
                    f"{phase}.accumulate = {section.accumulate} cuts batches, and {phase}.loss.ranking = "
                    f"{section.loss.ranking!r} compares all passages of a query",
                    f"set {phase}.accumulate=1, or {phase}.loss.ranking=pointwise",
                )
        return super().read_rows(recipe)

    def read_unlabeled(self, file: Path, columns: Sequence[str], train: Rows) -> Rows:
        """Read queries and passages without relevance; rows with the same query, or its id, are compared."""
        return read_unlabeled_queries(file, columns, self.dataset, train)

    def sample_rows(self, rows: Rows, recipe: Recipe) -> Rows:
        """Draw whole queries that have about `recipe.max_rows` rows together."""
        return sample_queries(rows, recipe.max_rows, recipe.seed)

    def check_training_rows(self, rows: Rows) -> None:
        """Raise DataError if no passage is relevant, or every one is."""
        is_relevant = np.asarray(rows.labels)[:, 1] > 0
        if is_relevant.all() or not is_relevant.any():
            amount = "every" if is_relevant.all() else "no"
            raise DataError(
                f"{amount} training passage of {self.name!r} is relevant to its query",
                "0 in the column of relevance: not relevant; 1: relevant",
            )

    def encode(self, tokenizer: PreTrainedTokenizerBase, splits: datasets.Splits, recipe: Recipe) -> dict[str, Encoded]:
        """Tokenize every split; the rows of a query stay together in a batch."""
        encoded = super().encode(tokenizer, splits, recipe)
        return {name: replace(rows, groups=rows.labels[:, 0]) for name, rows in encoded.items()}

    # Labels of a model

    def label_order(self, names: Sequence[str]) -> list[int]:
        """Return the outputs in their order; raises ModelError for a model with more than two."""
        if len(names) > 2:
            raise ModelError(
                f"the model has {len(names)} labels; {self.name!r} ranks passages, which needs one output or two",
                "give a cross-encoder that was trained to tell relevant passages from others",
            )
        return list(range(len(names)))

    def align_labels(self, splits: dict[str, Rows], names: Sequence[str]) -> dict[str, Rows]:
        """Find out which of two outputs speaks for a passage; the rows stay as they are."""
        self.label_order(names)
        self.relevant = find_relevant_output(names)
        return splits

    # Losses

    def gold_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of whether each passage is relevant."""
        from torch.nn import functional as F

        return F.binary_cross_entropy_with_logits(self.margins(logits), (labels[:, 1] > 0).to(logits.dtype))

    def logit_loss(self, student: Tensor, teacher: Tensor, labels: Tensor, loss: Loss) -> Tensor:  # type: ignore[override]
        """Return the squared error of the scores and the loss of their order, mixed with the gold labels.

        Args:
            student, teacher: logits [rows, 1 or 2].
            labels: query number and relevance, [rows, 2].
            loss: `ranking`, `temperature` and `hardness` (1: the teacher alone) are read.
        """
        from torch.nn import functional as F

        score, target = self.margins(student.float()), self.margins(teacher.float())
        soft = F.mse_loss(score, target)
        if loss.ranking == "pairwise":
            soft = soft + margin_loss(score, target, labels[:, 0])
        elif loss.ranking == "listwise":
            soft = soft + listwise_loss(score, target, labels[:, 0], loss.temperature)
        if loss.hardness == 1.0:
            return soft
        return loss.hardness * soft + (1.0 - loss.hardness) * self.gold_loss(student.float(), labels)

    def margins(self, logits: Tensor) -> Tensor:
        """Return one number a row, [rows]: the only logit, or how far the relevant one is above the other."""
        if logits.shape[1] == 1:
            return logits[:, 0]
        return logits[:, self.relevant] - logits[:, 1 - self.relevant]

    # Predictions and scores

    def predictions(self, logits: np.ndarray) -> np.ndarray:
        """Return the score of each passage, float [rows]."""
        if logits.shape[1] == 1:
            return logits[:, 0]
        margins: np.ndarray = logits[:, self.relevant] - logits[:, 1 - self.relevant]
        return margins

    def score_labels(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Return every metric, and `score`, the headline; `labels` [rows, 2] are query number and relevance."""
        return self.summarize(score_rankings(self.predictions(logits), labels))

    def resampler(self, outputs: np.ndarray, rows: Encoded) -> Resampler | None:
        """Return how a bootstrap draws queries, each with all of its passages."""
        return self.resample_means(score_queries(self.predictions(outputs), rows.labels), "queries")

    def baseline(self, rows: Rows | Encoded) -> dict[str, float]:
        """Score random orders of the passages: the mean of some."""
        scores = self._score_shuffles(rows)
        return {name: float(np.mean([each[name] for each in scores])) for name in scores[0]}

    def chance_score(self, rows: Rows | Encoded) -> float:
        """Return the mean score of random orders, and twice its standard deviation on top."""
        scores = [each["score"] for each in self._score_shuffles(rows)]
        return float(np.mean(scores) + 2 * np.std(scores))

    def _score_shuffles(self, rows: Rows | Encoded) -> list[dict[str, float]]:
        generator, labels = np.random.default_rng(0), np.asarray(rows.labels)
        return [self.score_labels(generator.random((len(labels), 1)), labels) for _ in range(SHUFFLES)]

    def compare_predictions(
        self, before: np.ndarray, after: np.ndarray, rows: Encoded, tolerance: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return which passages changed their rank, and which of these in a query whose reciprocal rank fell."""
        labels = rows.labels
        first, second = self.predictions(before), self.predictions(after)
        changed, worsened = np.zeros(len(labels), bool), np.zeros(len(labels), bool)
        for numbers in split_by_query(labels):
            relevance = labels[numbers, 1]
            orders = [rank_passages(scores[numbers], relevance) for scores in (first, second)]
            ranks = [np.argsort(order) for order in orders]
            # Two scores that rounding lets change places are no change of the ranking.
            changed[numbers] = (ranks[0] != ranks[1]) & (np.abs(first[numbers] - second[numbers]) > tolerance)
            rank_before, rank_after = (reciprocal_rank(relevance[order]) for order in orders)
            worsened[numbers] = changed[numbers] & (rank_after < rank_before)
        return changed, worsened

    def answers(self, outputs: np.ndarray, rows: Encoded, names: Sequence[str]) -> list[Answer]:
        """Return the score of each row, as it is compared within a query."""
        numbers: list[Answer] = self.predictions(outputs).tolist()
        return numbers

    # What the plan prints

    def describe_labels(self, splits: datasets.Splits) -> str:
        """Count queries and passages, and say what random orders score."""
        counts = []
        for split, rows in splits.items():
            labels = np.asarray(rows.labels)
            relevant = int((labels[:, 1] > 0).sum())
            counts.append(f"{split}: {len(np.unique(labels[:, 0])):,} queries, {relevant:,} of {len(rows):,} relevant")
        chance = self.baseline(splits["dev"])["score"]
        return f"ranking, {'; '.join(counts)}; random orders: dev score {chance:.4f}"

    def data_warnings(self, splits: datasets.Splits) -> list[str]:
        """Name queries that cannot be scored, and dev queries that were trained on."""
        lines = super().data_warnings(splits)
        for split, rows in splits.items():
            if split != "train":
                lines += leaked_queries(splits["train"], rows, split)
            without, only = count_one_sided(np.asarray(rows.labels))
            if without:
                effect = "teach what the teacher scores them" if split == "train" else "are left out of the metrics"
                lines.append(f"{without:,} queries of {split} have no relevant passage: they {effect}")
            if only and split != "train":
                lines.append(f"{only:,} queries of {split} have relevant passages only: every order of them is perfect")
            repeated = count_repeated(rows)
            if repeated:
                lines.append(f"{repeated:,} rows of {split} have a query with a passage that an earlier row has")
        return lines


def count_one_sided(labels: np.ndarray) -> tuple[int, int]:
    """Count the queries without a relevant passage, and those whose passages are all equally relevant."""
    without = only = 0
    for rows in split_by_query(labels):
        relevance = labels[rows, 1]
        without += not (relevance > 0).any()
        only += bool(relevance[0] > 0 and (relevance == relevance[0]).all())
    return without, only


def count_repeated(rows: Rows) -> int:
    """Count the rows whose query and passage an earlier row has."""
    assert rows.second is not None
    return len(rows) - len(set(zip(rows.first, rows.second, strict=True)))


def leaked_queries(train: Rows, rows: Rows, split: str) -> list[str]:
    """Say how many queries of a split are in train too; nothing where none is."""
    queries = set(rows.first)
    shared = queries & set(train.first)
    if not shared:
        return []
    return [f"{len(shared):,} of {len(queries):,} {split} queries are in train too: their score is flattered"]


def margin_loss(score: Tensor, target: Tensor, queries: Tensor) -> Tensor:
    """Return the squared error of the difference of two passages' scores, averaged over the pairs of each query.

    Hofstätter et al. 2020, arXiv 2010.02666, for the margin of a relevant passage; here it is every pair.

    Args:
        score, target: of student and teacher, [rows].
        queries: query number of each row, [rows].
    """
    same_query = queries[:, None] == queries[None, :]
    pairs = same_query.sum() - len(queries)  # a row is no pair with itself
    error = (score[:, None] - score[None, :]) - (target[:, None] - target[None, :])
    return (error.square() * same_query).sum() / pairs.clamp(min=1)


def listwise_loss(score: Tensor, target: Tensor, queries: Tensor, temperature: float) -> Tensor:
    """Return the divergence of the softened distributions over each query's passages, averaged over queries.

    Args:
        score, target: of student and teacher, [rows].
        queries: query number of each row, [rows].
        temperature: softens both; the loss is multiplied by its square.
    """
    same_query = queries[:, None] == queries[None, :]
    log_shares = []
    for values in (score / temperature, target / temperature):
        totals = values[None, :].masked_fill(~same_query, float("-inf")).logsumexp(dim=1)
        log_shares.append(values - totals)
    divergence = (log_shares[1].exp() * (log_shares[1] - log_shares[0])).sum()
    query_count = (1.0 / same_query.sum(dim=1)).sum()
    return divergence / query_count * temperature**2
