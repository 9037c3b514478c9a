"""Metrics of answers to questions, by the official script of SQuAD: case, punctuation and articles do not count."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Return an answer without case, punctuation, articles and further spaces, as SQuAD compares it."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(predicted: str, gold: Sequence[str]) -> float:
    """Return 1 where the answer is one of the right ones, else 0; no right ones: where it is empty."""
    return float(any(normalize_answer(predicted) == normalize_answer(answer) for answer in gold or ("",)))


def word_f1(predicted: str, gold: Sequence[str]) -> float:
    """Return the F1 of words with the nearest of the right answers."""
    return max(_word_f1(predicted, answer) for answer in gold or ("",))


def _word_f1(predicted: str, gold: str) -> float:
    words, gold_words = normalize_answer(predicted).split(), normalize_answer(gold).split()
    if not words or not gold_words:
        return float(words == gold_words)
    shared = sum((Counter(words) & Counter(gold_words)).values())
    return 2 * shared / (len(words) + len(gold_words))
