"""Embeddings: a vector for each text, distilled from those of a sentence encoder without any label.

The teacher is a folder of sentence-transformers, given with `--teacher`; the student has its pooling, normalization and
prompts. Dev rows are the texts of rated pairs, two after each other, and further texts whose nearest neighbours are
compared with the teacher's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spdtool.data import dataset as datasets
from spdtool.data.dataset import Dataset, Rows
from spdtool.data.kinds.embedding import NO_PAIR, is_sentence_encoder
from spdtool.data.tokens import Encoded
from spdtool.errors import ModelError, RecipeError
from spdtool.plugins import task_kinds
from spdtool.recipe.fields import Recipe
from spdtool.recipe.training import Loss
from spdtool.tasks.decision import NUMBER, Answer, Decision, ExampleCall, Json, Object
from spdtool.tasks.head import Head
from spdtool.tasks.scores.metrics import METRICS
from spdtool.tasks.scores.neighbours import NEIGHBOURS, cosines, neighbour_agreement
from spdtool.tasks.sentence_settings import TRUNCATE_DIM, SentenceSettings, read_sentence_settings
from spdtool.tasks.task import Task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

EMBEDDING = "sentence_embedding"
LEAST_COSINE = 0.98  # to the checkpoint's vector; below, rounding has moved a text to another place
WIDTH_FIELDS = ("hidden_size", "dim", "d_model")


@dataclass(frozen=True)
class SentenceHead(Head):
    """No head: an encoder whose folder says how the vectors of tokens become that of a text."""

    def matches(self, name: str) -> bool:
        """Tell whether a class name is that of an encoder alone."""
        return super().matches(name) and not name.endswith(("HeadModel", "HeadsModel"))

    def opens(self, source: str | Path) -> bool:
        """Tell whether the folder says how tokens are pooled."""
        return is_sentence_encoder(source)

    def name_outputs(self, config: Mapping[str, Any]) -> list[str]:
        """Number the dimensions of a vector."""
        width = next((config[name] for name in WIDTH_FIELDS if isinstance(config.get(name), int)), 0)
        return [str(number) for number in range(width)]

    def collect(self, outputs: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the vectors of the texts, [rows, width]."""
        vectors: Tensor = outputs.sentence_embedding
        return vectors

    def collect_arrays(self, outputs: Sequence[np.ndarray], inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the vectors of the texts, [rows, width]; those of the tokens are for clients that pool themselves."""
        return np.asarray(outputs[0])


SENTENCE_HEAD = SentenceHead(
    auto_class="AutoModel",
    ending="Model",
    about="a sentence encoder",
    outputs=(EMBEDDING, "last_hidden_state"),
    reads="pooled mean",
    pipeline="feature-extraction",
    pools=True,
)


class Vector(Decision):
    """Each text has a vector; where the folder says so, its leading dimensions alone (`truncate_dim`)."""

    output_names = (EMBEDDING,)
    route = "embeddings"
    example = ExampleCall("embed")

    @classmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:  # noqa: ARG003
        """Tell that a folder with an encoder alone is answered so."""
        return True

    def __init__(self, names: Sequence[str], settings: Mapping[str, Json] | None = None) -> None:
        super().__init__(names, settings)
        dimension = self.settings.get(TRUNCATE_DIM)
        self.width = min(dimension, len(names)) if isinstance(dimension, int) else len(names)

    def cut(self, outputs: np.ndarray) -> np.ndarray:
        """Return the vectors that are answered, [rows, width], as sentence-transformers cuts them: not scaled again."""
        return outputs[:, : self.width]

    def decide(self, outputs: np.ndarray) -> list[Answer]:
        """Return the vector of each text, float32 [width]."""
        return list(self.cut(outputs))

    def scored_answers(self, outputs: np.ndarray) -> list[Answer]:
        """Return nothing: the vectors themselves are what is scored."""
        return []

    def predictions(self, outputs: np.ndarray) -> list[Object]:
        """Return an object with the `embedding` of each text."""
        return [{"embedding": vector} for vector in self.cut(outputs).tolist()]

    def tensor(self, name: str, outputs: np.ndarray) -> list[Json]:
        """Return the vectors, flat."""
        flat: list[Json] = self.cut(outputs).ravel().tolist()
        return flat

    def tensor_type(self, name: str) -> str:
        """Return the data type of a vector."""
        return "FP32"

    def tensor_shape(self, name: str, rows: int) -> list[int]:
        """Return the shape of the vectors of that many texts."""
        return [rows, self.width]

    def prediction_schema(self) -> Object:
        """Return the schema of an object of `predictions`."""
        vector: Object = {"type": "array", "items": NUMBER}
        return {"type": "object", "properties": {"embedding": vector}, "required": ["embedding"]}

    def describe(self) -> str:
        """Say how long a vector is."""
        return f"a vector of {self.width} numbers"

    def line(self, prediction: Mapping[str, Any]) -> str:
        """Return a vector as a JSON object, as each line of jsonl is."""
        return json.dumps({"embedding": prediction["embedding"]}, separators=(",", ":"))

    @property
    def unanswered(self) -> str:
        """The line of a text without a vector."""
        return '{"embedding":null}'


@dataclass(frozen=True)
class TeacherVectors:
    """The teacher's vectors of the rows of a split, [rows, width]."""

    vectors: np.ndarray

    def select(self, rows: np.ndarray) -> TeacherVectors:
        """Return those of these rows alone, in this order."""
        return TeacherVectors(self.vectors[rows])


@task_kinds.register("embedding")
class Embedding(Task):
    """A vector for each text."""

    columns = "texts alone, with --teacher"
    head = SENTENCE_HEAD
    decision = Vector
    scores_training_rows = False

    def __init__(self, dataset: Dataset) -> None:
        super().__init__(dataset)
        self.settings_of_teacher: SentenceSettings | None = None

    # Rows

    def read_rows(self, recipe: Recipe) -> dict[str, Rows]:
        """Load texts and pairs; `recipe.max_rows` draws texts, and whole pairs."""
        if recipe.given_teacher is None:
            raise RecipeError(
                "embeddings are distilled from a sentence encoder, and none was given",
                "add --teacher FOLDER, with a folder of sentence-transformers",
            )
        self.settings_of_teacher = read_sentence_settings(recipe.given_teacher)
        splits = datasets.load_splits(self.dataset, recipe)
        return {name: sample_texts(rows, recipe.max_rows, recipe.seed) for name, rows in splits.items()}

    def encode(self, tokenizer: PreTrainedTokenizerBase, splits: datasets.Splits, recipe: Recipe) -> dict[str, Encoded]:
        """Tokenize every split: dev texts with the default prompt, training texts with each prompt in turn."""
        default = getattr(tokenizer, "sentence_prompt", "")
        further = [text for text in getattr(tokenizer, "sentence_prompts", ()) if text != default]
        with_prompts = {}
        for name, rows in splits.items():
            prompts = [default, *further] if name == "train" else [default]
            texts = rows.first
            if any(prompts):
                texts = [prompts[number % len(prompts)] + text for number, text in enumerate(rows.first)]
            with_prompts[name] = Rows(texts, None, rows.labels)
        return super().encode(tokenizer, with_prompts, recipe)

    def compare_with(
        self, splits: Mapping[str, Encoded], predict_teacher: Callable[[], Mapping[str, np.ndarray]]
    ) -> dict[str, Encoded]:
        """Put the teacher's vectors of the dev sets beside their rows, where there are none yet."""
        if all(rows.details is not None for name, rows in splits.items() if name != "train"):
            return dict(splits)
        compared = dict(splits)
        for name, vectors in predict_teacher().items():
            compared[name] = replace(splits[name], details=TeacherVectors(vectors))
        return compared

    # Labels of a model

    def label_order(self, names: Sequence[str]) -> list[int]:
        """Return the dimensions in their order."""
        return list(range(len(names)))

    # Losses

    def gold_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Raise RecipeError: the rows have no labels."""
        raise RecipeError("texts without labels teach nothing by themselves", "give the teacher: --teacher FOLDER")

    def logit_loss(self, student: Tensor, teacher: Tensor, labels: Tensor, loss: Loss) -> Tensor:  # type: ignore[override]
        """Return the weighted sum of the losses on vectors, averaged over the Matryoshka dimensions of the teacher.

        Args:
            student, teacher: vectors [rows, width].
            labels: are not read.
            loss: `cosine`, `distance`, `similarity` and `similarity_temperature` are read.
        """
        import torch

        if student.shape != teacher.shape:
            raise ModelError(
                f"the student's vectors have {student.shape[1]} numbers, and the teacher's {teacher.shape[1]}",
                "give a student as wide as the teacher; prune.layers makes it shallower instead",
            )
        settings = self.settings_of_teacher
        dimensions = {student.shape[1], *(settings.dimensions if settings else ())}
        losses = []
        for width in sorted(dimensions):
            if width <= student.shape[1]:
                losses.append(vector_loss(student.float()[:, :width], teacher.float()[:, :width], loss))
        return torch.stack(losses).mean()

    # Predictions and scores

    def score(self, outputs: np.ndarray, rows: Encoded) -> dict[str, float]:
        """Return the rank correlation with the ratings, and the share of the teacher's nearest neighbours.

        Without the teacher's vectors beside the rows, the outputs are taken for the teacher's.
        """
        values = {}
        is_paired = rows.labels[:, 0] != NO_PAIR
        if "spearman" in self.dataset.metrics:
            values["spearman"] = self._correlate(outputs, rows)
            settings = self.settings_of_teacher
            for width in settings.dimensions if settings else ():
                if width < outputs.shape[1]:
                    values[f"spearman@{width}"] = self._correlate(outputs[:, :width], rows)
        reference = rows.details.vectors if isinstance(rows.details, TeacherVectors) else outputs
        texts = ~is_paired if (~is_paired).any() else is_paired
        values["neighbours"] = neighbour_agreement(outputs[texts], reference[texts])
        headline = [values[name] for name in self.dataset.metrics]
        score = float(np.mean(headline)) if self.metric is None else values[self.metric]
        return {"score": score} | values

    def _correlate(self, outputs: np.ndarray, rows: Encoded) -> float:
        paired = np.flatnonzero(rows.labels[:, 0] != NO_PAIR)
        similarity = cosines(outputs[paired[::2]], outputs[paired[1::2]])
        return METRICS["spearman"](rows.labels[paired[::2], 1], similarity)

    def baseline(self, rows: Rows | Encoded) -> dict[str, float]:
        """Return zeros: one vector for all texts ranks nothing."""
        return {"score": 0.0} | dict.fromkeys(self.dataset.metrics, 0.0)

    def compare_predictions(
        self, before: np.ndarray, after: np.ndarray, rows: Encoded, tolerance: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return which vectors turned by more than the tolerance, and which of these have a cosine below 0.98."""
        cosine = cosines(before, after)
        return 1 - cosine > tolerance, cosine < LEAST_COSINE

    def measure_change(self, before: np.ndarray, after: np.ndarray) -> dict[str, float]:
        """Return the mean of one minus the cosine, and the rank correlation of similarities before and after."""
        half = len(before) // 2
        first, second = (cosines(vectors[:half], vectors[half : 2 * half]) for vectors in (before, after))
        correlation = 1.0
        if not np.array_equal(first, second):
            correlation = METRICS["spearman"](first, second)
        return {"mean_change": float(np.abs(1 - cosines(before, after)).mean()), "rank_correlation": correlation}

    def answers(self, outputs: np.ndarray, rows: Encoded, names: Sequence[str]) -> list[Answer]:
        """Return nothing: the vectors themselves are what is scored."""
        return []

    # What the plan prints

    def describe_labels(self, splits: datasets.Splits) -> str:
        """Say what the texts are scored by."""
        labels = np.asarray(splits["dev"].labels)
        pairs, texts = int((labels[:, 0] != NO_PAIR).sum()) // 2, int((labels[:, 0] == NO_PAIR).sum())
        line = f"embeddings, no labels; dev: {pairs:,} rated pairs, nearest neighbours among {texts:,} texts"
        settings = self.settings_of_teacher
        if settings is not None:
            line += f"; pooling: {settings.pooling}, {'normalized' if settings.normalize else 'not normalized'}"
            prompts = [name for name, text in settings.prompts if text]
            line += f"; prompts in turn: {', '.join(prompts)}" if prompts else ""
            if settings.dimensions:
                line += f"; Matryoshka: {', '.join(map(str, settings.dimensions))}"
        return line

    def data_warnings(self, splits: datasets.Splits) -> list[str]:
        """Also say that the neighbours among too few texts are the same for every model."""
        lines = super().data_warnings(splits)
        labels = np.asarray(splits["dev"].labels)
        texts = int((labels[:, 0] == NO_PAIR).sum()) or len(labels)
        if texts <= NEIGHBOURS + 1:
            lines.append(
                f"nearest neighbours among {texts:,} texts: with {NEIGHBOURS + 1} or fewer every model finds all"
            )
        return lines


def sample_texts(rows: Rows, count: int | None, seed: int) -> Rows:
    """Draw `count` texts without a pair, and as many pairs; None: all."""
    labels = np.asarray(rows.labels)
    if count is None or len(rows) <= count:
        return rows
    generator = np.random.default_rng(seed)
    paired, texts = np.flatnonzero(labels[:, 0] != NO_PAIR), np.flatnonzero(labels[:, 0] == NO_PAIR)
    pairs = np.sort(generator.permutation(len(paired) // 2)[:count])
    drawn = np.sort(generator.permutation(len(texts))[:count])
    chosen = [*np.stack([paired[2 * pairs], paired[2 * pairs + 1]], axis=1).ravel(), *texts[drawn]]
    return Rows([rows.first[row] for row in chosen], None, labels[chosen])


def vector_loss(student: Tensor, teacher: Tensor, loss: Loss) -> Tensor:
    """Return the weighted sum of the losses on vectors, both [rows, width], averaged over rows.

    `cosine` is one minus the cosine; `distance` the squared distance, relative to the mean squared length of the
    teacher's vectors; `similarity` the divergence of the softmax over each text's cosines to the others of the batch.
    """
    from torch.nn import functional as F

    total = student.new_zeros(())
    if loss.cosine > 0:
        total = total + loss.cosine * (1 - F.cosine_similarity(student, teacher, dim=1)).mean()
    if loss.distance > 0:
        scale = teacher.square().sum(dim=1).mean().clamp(min=1e-12)
        total = total + loss.distance * (student - teacher).square().sum(dim=1).mean() / scale
    if loss.similarity > 0 and len(student) > 1:
        shares = _log_similarities(student, loss.similarity_temperature)
        target = _log_similarities(teacher, loss.similarity_temperature)
        total = total + loss.similarity * F.kl_div(shares, target, reduction="batchmean", log_target=True)
    return total


def _log_similarities(vectors: Tensor, temperature: float) -> Tensor:
    """Return the log softmax of the cosines to the other texts of a batch, [rows, rows - 1]."""
    from torch.nn import functional as F

    units = F.normalize(vectors, dim=1)
    rows = len(units)
    # A text's cosine to itself is 1 whatever the model; dropping the diagonal: all but the first of each n + 1 numbers.
    scores = (units @ units.T).flatten()[1:].view(rows - 1, rows + 1)[:, :-1].reshape(rows, rows - 1)
    return F.log_softmax(scores / temperature, dim=1)
