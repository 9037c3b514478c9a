"""Token classification: each word has a tag, such as the begin of a name; tags of spans are scored span by span."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from spdtool.data.dataset import Rows, Splits
from spdtool.data.kinds.tags import OUTSIDE
from spdtool.data.kinds.words import read_unlabeled_words
from spdtool.data.overview import list_names
from spdtool.data.tokens import IGNORED, Encoded
from spdtool.data.windows import group_by_text, locate_words, tokenize_windows
from spdtool.plugins import task_kinds
from spdtool.recipe.training import Loss
from spdtool.run.records import ClassScores
from spdtool.tasks.entities import Entities
from spdtool.tasks.head import Head
from spdtool.tasks.named_labels import NamedLabels, soften
from spdtool.tasks.scores.metrics import METRICS
from spdtool.tasks.scores.significance import Resampler
from spdtool.tasks.scores.tags import Tags, count_spans, score_span_types, score_spans, score_words
from spdtool.tasks.windowed import WindowDetails, WindowedTask

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


@dataclass(frozen=True)
class WordDetails(WindowDetails):
    """The words of the windows of a split.

    Attributes:
        words: for each window and token, the number of the word that is read there, else -1.
        unread: tags of words without a token, such as control characters, by text and number of the word.
    """

    words: Sequence[np.ndarray]
    unread: dict[int, dict[int, int]]

    def select(self, rows: np.ndarray) -> Self:
        """Return these windows and their words alone."""
        return replace(super().select(rows), words=[self.words[int(row)] for row in rows])


@task_kinds.register("tokens")
class Tokens(NamedLabels, WindowedTask):
    """A tag for each word of a text: named entities, parts of speech."""

    columns = "tokens, tags; or a .conll file"
    head = TAGGER
    decision = Entities
    _tags: Sequence[str] | None = None

    @property
    def is_span(self) -> bool:
        """Whether tags are B-, I- and O of spans; else each word has a class."""
        return "span_f1" in self.dataset.metrics

    @property
    def tags(self) -> Sequence[str]:
        """The data set's tags in the order of the logits."""
        return self._tags or self.dataset.labels

    def read_unlabeled(self, file: Path, columns: Sequence[str], train: Rows) -> Rows:
        """Read sentences, all of whose words have the first tag."""
        return read_unlabeled_words(file, columns, self.dataset)

    def align_labels(self, splits: dict[str, Rows], names: Sequence[str]) -> dict[str, Rows]:
        """Return the rows with the tags' numbers in the order of a model's label names."""
        order = self.label_order(names)
        self._tags = [self.dataset.labels[order.index(index)] for index in range(len(order))]
        aligned = {}
        for split, rows in splits.items():
            labels = [[(start, end, order[tag]) for start, end, tag in words] for words in rows.labels]
            aligned[split] = replace(rows, labels=labels)
        return aligned

    def encode_split(self, tokenizer: PreTrainedTokenizerBase, rows: Rows, max_length: int) -> Encoded:
        """Tokenize in windows; the first piece of each word has its tag, and each word is read in one window."""
        split = tokenize_windows(tokenizer, rows, max_length, self.stride)
        labels, words_of_tokens = list[np.ndarray](), list[np.ndarray]()
        unread: dict[int, dict[int, int]] = {}
        for windows in group_by_text(split.windows):
            text = windows[0].example
            spans = np.array([word[:2] for word in rows.labels[text]], np.int64).reshape(-1, 2)
            tags = np.array([word[2] for word in rows.labels[text]], np.int64)
            located = locate_words(windows, spans)
            missing = set(range(len(tags))).difference(*(words.tolist() for words in located))
            if missing:
                unread[text] = {word: int(tags[word]) for word in sorted(missing)}
            words_of_tokens += located
            labels += [np.where(words >= 0, tags[words], IGNORED) for words in located]
        details = WordDetails(split.windows, words_of_tokens, unread)
        return replace(split.encoded, labels=np.concatenate(labels), labels_per_token=True, details=details)

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
        softened, target = soften(student, teacher, loss.temperature)
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
        """Return gold and predicted tags of every text.

        Args:
            predicted: number of a tag for each token, [all tokens].
        """
        details = rows.details
        assert isinstance(details, WordDetails)
        # A model cannot tag a word that it has no token of: O, or where there is none the first tag.
        tag_of_unread = OUTSIDE if OUTSIDE in self.tags else self.tags[0]
        gold_by_text: dict[int, dict[int, str]] = {}
        predicted_by_text: dict[int, dict[int, str]] = {}
        for row, (window, words) in enumerate(zip(details.windows, details.words, strict=True)):
            if window.example not in gold_by_text:
                unread = details.unread.get(window.example, {})
                gold_by_text[window.example] = {word: self.tags[tag] for word, tag in unread.items()}
                predicted_by_text[window.example] = dict.fromkeys(unread, tag_of_unread)
            for token in np.flatnonzero(words >= 0).tolist():
                position, word = int(rows.offsets[row]) + token, int(words[token])
                gold_by_text[window.example][word] = self.tags[rows.labels[position]]
                predicted_by_text[window.example][word] = self.tags[predicted[position]]
        return _in_order(gold_by_text), _in_order(predicted_by_text)

    def score(self, outputs: np.ndarray, rows: Encoded) -> dict[str, float]:
        """Return span F1; of plain tags the metrics over all words."""
        return self.score_tags(*self.read_tags(self.predictions(outputs), rows))

    def score_tags(self, gold: Tags, predicted: Tags) -> dict[str, float]:
        """Score the tags of texts."""
        if self.is_span:
            return self.summarize({"span_f1": score_spans(gold, predicted).f1})
        return self.summarize(score_words(self.dataset.metrics, gold, predicted))

    def resampler(self, outputs: np.ndarray, rows: Encoded) -> Resampler | None:
        """Return how a bootstrap draws whole texts."""
        gold, predicted = self.read_tags(self.predictions(outputs), rows)
        if self.is_span:
            counts = count_spans(gold, predicted)

            def span_f1(drawn: np.ndarray) -> float:
                right, both = counts[drawn].sum(axis=0)
                return float(2 * right / max(both, 1))

            return Resampler(len(gold), "texts", span_f1)

        numbers = {tag: number for number, tag in enumerate(self.tags)}  # thousands of draws: strings are slow
        sides = [[np.array([numbers[tag] for tag in tags]) for tags in side] for side in (gold, predicted)]

        def score_texts(drawn: np.ndarray) -> float:
            words = [np.concatenate([side[text] for text in drawn]) for side in sides]
            return self.summarize({name: METRICS[name](*words) for name in self.dataset.metrics})["score"]

        return Resampler(len(gold), "texts", score_texts)

    def score_classes(self, outputs: np.ndarray, rows: Encoded, names: Sequence[str]) -> dict[str, ClassScores]:
        """Score the spans of each type by themselves; plain tags have none."""
        if not self.is_span:
            return {}
        return score_span_types(*self.read_tags(self.predictions(outputs), rows))

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
        self, before: np.ndarray, after: np.ndarray, rows: Encoded, tolerance: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return which words have another tag, and which of these had the right one."""
        is_word = rows.labels != IGNORED
        tags_before, tags_after = self.predictions(before)[is_word], self.predictions(after)[is_word]
        changed = tags_before != tags_after
        return changed, changed & (tags_before == rows.labels[is_word])

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
        lines = super().data_warnings(splits)
        absent = [repr(name) for name, count in self.count_classes(splits)["train"].items() if not count]
        if absent:
            lines.append(f"no word of train has the tag {list_names(absent)}")
        return lines


def _in_order(tags_by_text: dict[int, dict[int, str]]) -> Tags:
    """Return the tags of each text in the order of its words."""
    return [[tags[word] for word in sorted(tags)] for tags in tags_by_text.values()]
