"""Token classification: each word has a tag, such as the begin of a name; tags of spans are scored span by span."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from spdtool.data.dataset import Rows, Splits
from spdtool.data.overview import list_names
from spdtool.data.tokens import IGNORED, Encoded
from spdtool.data.windows import TextWindow, WindowOutput, group_by_text, locate_words, sample_windows, tokenize_windows
from spdtool.plugins import task_kinds
from spdtool.recipe.fields import Loss, Recipe
from spdtool.run.records import ClassScores
from spdtool.tasks.classification import Classification
from spdtool.tasks.decision import Answer, Json
from spdtool.tasks.entities import OUTSIDE, Entities
from spdtool.tasks.head import Head
from spdtool.tasks.scores.metrics import METRICS
from spdtool.tasks.task import Task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

TAGGER = Head(
    "AutoModelForTokenClassification",
    "ForTokenClassification",
    "a model that labels each token",
    reads="every token",
    per_token=True,
    pipeline="token-classification",
)
Tags = list[list[str]]
"""For each text the tags of its words."""


@dataclass(frozen=True)
class WordDetails:
    """The words of the windows of a split.

    Attributes:
        windows: of the texts.
        words: for each window and token, the number of the word that is read there, else -1.
        unread: tags of words without a token, such as control characters, by text and number of the word.
    """

    windows: Sequence[TextWindow]
    words: Sequence[np.ndarray]
    unread: dict[int, dict[int, int]]

    def select(self, rows: np.ndarray) -> WordDetails:
        """Return these windows alone."""
        chosen = [int(row) for row in rows]
        return WordDetails([self.windows[row] for row in chosen], [self.words[row] for row in chosen], self.unread)


@task_kinds.register("tokens")
class Tokens(Classification):
    """A tag for each word of a text: named entities, parts of speech."""

    head = TAGGER
    decision = Entities
    problem_type = None
    takes_unlabeled = False
    stride = 0

    @property
    def is_span(self) -> bool:
        """Whether tags are B-, I- and O of spans; else each word has a class."""
        return "span_f1" in self.dataset.metrics

    @property
    def tags(self) -> Sequence[str]:
        """The data set's tags in the order of the logits."""
        return self._tags or self.dataset.labels

    _tags: Sequence[str] | None = None

    def check_training_rows(self, rows: Rows) -> None:
        """The reader of the rows has seen more than one tag."""

    def align_labels(self, splits: dict[str, Rows], names: Sequence[str]) -> dict[str, Rows]:
        """Return the rows with the tags' numbers in the order of a model's label names."""
        order = self.label_order(names)
        self._tags = [self.dataset.labels[order.index(index)] for index in range(len(order))]
        aligned = {}
        for split, rows in splits.items():
            labels = [[(start, end, order[tag]) for start, end, tag in words] for words in rows.labels]
            aligned[split] = replace(rows, labels=labels)
        return aligned

    def encode(self, tokenizer: PreTrainedTokenizerBase, splits: Splits, recipe: Recipe) -> dict[str, Encoded]:
        """Tokenize in windows; the first piece of each word has its tag, and each word is read in one window."""
        self.stride = recipe.window_stride
        encoded = {}
        for split, rows in splits.items():
            encoded[split] = self._encode_split(tokenizer, rows, recipe.max_length)
        return encoded

    def _encode_split(self, tokenizer: PreTrainedTokenizerBase, rows: Rows, max_length: int) -> Encoded:
        split = tokenize_windows(tokenizer, rows, max_length, self.stride)
        labels, all_words = [], list[np.ndarray]()
        unread: dict[int, dict[int, int]] = {}
        for windows in group_by_text(split.windows):
            text = windows[0].example
            spans = np.array([word[:2] for word in rows.labels[text]], np.int64).reshape(-1, 2)
            tags = np.array([word[2] for word in rows.labels[text]], np.int64)
            located = locate_words(windows, spans)
            missing = set(range(len(tags))).difference(*(words.tolist() for words in located))
            if missing:
                unread[text] = {word: int(tags[word]) for word in sorted(missing)}
            all_words += located
            labels += [np.where(words >= 0, tags[words], IGNORED) for words in located]
        details = WordDetails(split.windows, all_words, unread)
        return replace(split.encoded, labels=np.concatenate(labels), labels_per_token=True, details=details)

    def sample_scored_rows(self, rows: Encoded, count: int, seed: int) -> Encoded:
        """Draw whole texts."""
        assert isinstance(rows.details, WordDetails)
        return sample_windows(rows, rows.details.windows, count, seed)

    def gold_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy, averaged over words."""
        from torch.nn import functional as F

        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return total / (labels != IGNORED).sum().clamp(min=1)  # a window may have no word of its own

    @staticmethod
    def logit_loss(student: Tensor, teacher: Tensor, labels: Tensor, loss: Loss) -> Tensor:
        """Return the loss of `Classification`, averaged over the first pieces of words."""
        from torch.nn import functional as F

        # Masked, not selected: a shape that depends on the labels would make a GPU wait.
        counted = labels != IGNORED
        count = counted.sum().clamp(min=1)
        softened = F.log_softmax(student.float() / loss.temperature, dim=-1)
        target = F.softmax(teacher.float() / loss.temperature, dim=-1)
        if loss.per_label:
            by_token = -(target * softened).mean(-1)
        else:
            by_token = F.kl_div(softened, target, reduction="none").sum(-1) * loss.temperature**2
        soft = (by_token * counted).sum() / count
        if loss.hardness == 1.0:
            return soft
        logits = student.float().flatten(0, 1)
        gold = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum") / count
        return loss.hardness * soft + (1.0 - loss.hardness) * gold

    def read_tags(self, predicted: np.ndarray, rows: Encoded) -> tuple[Tags, Tags]:
        """Return gold and predicted tags of every text, from numbers of tags [all tokens]."""
        details = rows.details
        assert isinstance(details, WordDetails)
        gold: dict[int, dict[int, str]] = {}
        predicted_tags: dict[int, dict[int, str]] = {}
        for row, (window, words) in enumerate(zip(details.windows, details.words, strict=True)):
            if window.example not in gold:
                unread = details.unread.get(window.example, {})
                gold[window.example] = {word: self.tags[tag] for word, tag in unread.items()}
                predicted_tags[window.example] = dict.fromkeys(
                    unread, OUTSIDE if OUTSIDE in self.tags else self.tags[0]
                )
            for token in np.flatnonzero(words >= 0).tolist():
                position = int(rows.offsets[row]) + token
                gold[window.example][int(words[token])] = self.tags[rows.labels[position]]
                predicted_tags[window.example][int(words[token])] = self.tags[predicted[position]]
        in_order = [
            [[tags[word] for word in sorted(tags)] for tags in side.values()] for side in (gold, predicted_tags)
        ]
        return in_order[0], in_order[1]

    def score(self, outputs: np.ndarray, rows: Encoded) -> dict[str, float]:
        """Return span F1 by the definition of seqeval (conlleval's); of plain tags the metrics over all words."""
        return self.score_tags(*self.read_tags(self.predictions(outputs), rows))

    def score_tags(self, gold: Tags, predicted: Tags) -> dict[str, float]:
        """Score tags by text."""
        if not self.is_span:
            words = [np.array([tag for tags in side for tag in tags]) for side in (gold, predicted)]
            return self.summarize({name: METRICS[name](*words) for name in self.dataset.metrics})
        from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

        scores: Any = precision_recall_fscore_support(gold, predicted, average="micro", zero_division=0)
        return self.summarize({"span_f1": float(scores[2])})

    def score_classes(
        self,
        outputs: np.ndarray,
        rows: Encoded,
        names: Sequence[str],  # noqa: ARG002
    ) -> dict[str, ClassScores]:
        """Score the spans of each type by themselves; of plain tags the words."""
        gold, predicted = self.read_tags(self.predictions(outputs), rows)
        if not self.is_span:
            return {}
        kinds = sorted({tag[2:] for tags in gold for tag in tags if tag != OUTSIDE})
        from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

        scores = {}
        for kind in kinds:
            right, answered = _keep_kind(gold, kind), _keep_kind(predicted, kind)
            figures: Any = precision_recall_fscore_support(right, answered, average="micro", zero_division=0)
            spans = sum(tag.startswith("B-") for tags in right for tag in tags)
            scores[kind] = ClassScores(precision=figures[0], recall=figures[1], f1=figures[2], rows=spans)
        return scores

    def baseline(self, rows: Rows | Encoded) -> dict[str, float]:
        """Score the commonest tag for every word: no span at all."""
        if isinstance(rows, Encoded):
            gold, _ = self.read_tags(np.zeros(int(rows.offsets[-1]), np.int64), rows)
        else:
            gold = [[self.tags[tag] for _, _, tag in words] for words in rows.labels]
        counts = Counter(tag for tags in gold for tag in tags)
        commonest = OUTSIDE if self.is_span else counts.most_common(1)[0][0]
        return self.score_tags(gold, [[commonest] * len(tags) for tags in gold])

    def compare_predictions(
        self,
        before: np.ndarray,
        after: np.ndarray,
        rows: Encoded,
        tolerance: float,  # noqa: ARG002
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return which words have another tag, and which of these had the right one."""
        is_word = rows.labels != IGNORED
        was, now = (self.predictions(outputs)[is_word] for outputs in (before, after))
        changed = was != now
        return changed, changed & (was == rows.labels[is_word])

    def answers(self, outputs: np.ndarray, rows: Encoded, names: Sequence[str]) -> list[Answer]:
        """Return the entities of every text."""
        details = rows.details
        assert isinstance(details, WordDetails)
        values = np.split(outputs, rows.offsets[1:-1])
        pairs = [WindowOutput(*pair) for pair in zip(details.windows, values, strict=True)]
        return self.decision(names).decide(group_by_text(pairs))

    # What a classifier of whole texts has for each row: a text has many answers, which bring their probabilities.

    def probabilities(self, outputs: np.ndarray) -> None:
        """Return nothing."""

    def right_rows(self, outputs: np.ndarray, rows: Encoded) -> None:
        """Return nothing."""

    def confidences(self, outputs: np.ndarray, rows: Encoded, temperature: float) -> None:
        """Return nothing."""

    def confusion(self, outputs: np.ndarray, rows: Encoded, names: Sequence[str]) -> list[tuple[str, str, int]]:  # noqa: ARG002
        """Return nothing."""
        return []

    def gold_answers(self, rows: Encoded, names: Sequence[str]) -> list[Answer]:  # noqa: ARG002
        """Return nothing."""
        return []

    def adopt_settings(self, settings: Mapping[str, Json]) -> None:
        """Nothing of what is stored changes an answer."""

    def settings(self, outputs: np.ndarray, rows: Encoded) -> dict[str, Json]:  # noqa: ARG002
        """Return how far windows overlap."""
        return {"stride": self.stride}

    def count_classes(self, splits: Splits) -> dict[str, dict[str, int]]:
        """Count the words of each tag by split."""
        counts = {}
        for split, rows in splits.items():
            tags = Counter(tag for words in rows.labels for _, _, tag in words)
            counts[split] = {name: tags[index] for index, name in enumerate(self.tags)}
        return counts

    def describe_labels(self, splits: Splits) -> str:
        """Count the words of each tag."""
        lists = []
        for split, counts in self.count_classes(splits).items():
            lists.append(f"{split}: {list_names([f'{name} {count:,}' for name, count in counts.items()])}")
        return f"words by tag; {'; '.join(lists)}"

    def data_warnings(self, splits: Splits) -> list[str]:
        """Name dev texts that were trained on, and tags that no training word has."""
        absent = [repr(name) for name, count in self.count_classes(splits)["train"].items() if not count]
        lines = Task.data_warnings(self, splits)
        return [*lines, f"no word of train has the tag {list_names(absent)}"] if absent else lines


def _keep_kind(tags_by_text: Tags, kind: str) -> Tags:
    """Return the tags with those of spans of another type outside."""
    return [[tag if tag[2:] == kind else OUTSIDE for tag in tags] for tags in tags_by_text]


def _in_order(tags_by_text: dict[int, dict[int, str]]) -> Tags:
    """Return the tags of each text in the order of its words."""
    return [[tags[word] for word in sorted(tags)] for tags in tags_by_text.values()]
