"""The embedded task `demo`: sentence pairs made from a seed, and a small untrained BERT to learn them.

It needs no file and no network, and a few thousand optimiser steps teach it on a laptop, so the whole pipeline can be
seen to work. A premise tells who did what to whom; the hypothesis says the same, or the roles, the adjectives or the
nouns are exchanged:

    the red fox chased the old cat    |   the old cat was chased by the red fox     entailment
                                      |   the red cat was chased by the old fox     not_entailment

Every premise comes with both, and the two hypotheses are the same bag of words. A classifier that counts words
therefore scores exactly 50 % on any split; only order, voice and the binding of adjectives tell the labels apart.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from spdtool.errors import DataError
from spdtool.plugins import tasks
from spdtool.tasks import Rows, Task

ADJECTIVES = ("red", "blue", "green", "old", "young", "tall", "small", "quiet")
NOUNS = ("fox", "cat", "dog", "bear", "horse", "farmer", "doctor", "singer", "pilot", "child")
VERBS = ("chased", "helped", "followed", "watched", "pushed", "called", "warned", "praised")
FUNCTION_WORDS = ("the", "was", "by")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LABELS = ("not_entailment", "entailment")
PREMISES = {"train": 6000, "dev": 500}  # each gives two rows
MAX_LENGTH = 24  # tokens that the model has positions for; the longest pair has 21


@dataclass(frozen=True)
class Event:
    """Who did what to whom: `(adjective, noun)` of the doer and of the other one."""

    doer: tuple[str, str]
    verb: str
    other: tuple[str, str]

    def say(self, passive: bool) -> str:
        """The event as a sentence of seven words, or of nine in the passive voice."""
        doer, other = (f"the {adjective} {noun}" for adjective, noun in (self.doer, self.other))
        return f"{other} was {self.verb} by {doer}" if passive else f"{doer} {self.verb} {other}"

    def false_twins(self) -> tuple[Event, Event, Event]:
        """The three other events of the same words: roles, adjectives or nouns exchanged."""
        (adjective, noun), (other_adjective, other_noun) = self.doer, self.other
        return (
            replace(self, doer=self.other, other=self.doer),
            replace(self, doer=(other_adjective, noun), other=(adjective, other_noun)),
            replace(self, doer=(adjective, other_noun), other=(other_adjective, noun)),
        )


def load(data: str | None, seed: int) -> dict[str, Rows]:
    """The splits `train` and `dev`, drawn from `seed`; no premise of one appears in the other, in either voice.

    Raises:
        DataError: `data` was given.
    """
    if data is not None:
        raise DataError(f"the task demo makes its own rows, and was given {data}", "leave out --data, or name a task")
    draw = random.Random(f"spdtool demo {seed}")
    events = _distinct_events(draw, sum(PREMISES.values()))
    count = PREMISES["train"]
    return {"train": _rows(draw, events[:count]), "dev": _rows(draw, events[count:])}


def build(seed: int) -> tuple[Any, Any]:
    """An untrained BERT of four layers for this task, and its tokenizer.

    The weights depend on `seed` alone, and the global random state is left as it was.
    """
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    tokens = tokenizer()
    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=MAX_LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.05,
        pad_token_id=tokens.pad_token_id,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForSequenceClassification(config), tokens


def tokenizer() -> Any:
    """The fast tokenizer of the demo: one WordPiece token per word of the grammar, laid out as BERT's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import BertTokenizerFast

    words = (*SPECIAL, *FUNCTION_WORDS, *ADJECTIVES, *NOUNS, *VERBS)
    vocabulary = {word: index for index, word in enumerate(words)}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return BertTokenizerFast(tokenizer_object=core, model_max_length=MAX_LENGTH)


def _distinct_events(draw: random.Random, count: int) -> list[Event]:
    events: dict[Event, None] = {}  # a dict keeps the order of drawing, a set does not
    while len(events) < count:
        nouns, adjectives = draw.sample(NOUNS, 2), draw.sample(ADJECTIVES, 2)
        events[Event((adjectives[0], nouns[0]), draw.choice(VERBS), (adjectives[1], nouns[1]))] = None
    return list(events)


def _rows(draw: random.Random, events: list[Event]) -> Rows:
    rows: list[tuple[str, str, int]] = []
    for event in events:
        premise = event.say(passive=draw.random() < 0.5)
        passive = draw.random() < 0.5
        rows.append((premise, event.say(passive), LABELS.index("entailment")))
        rows.append((premise, draw.choice(event.false_twins()).say(passive), LABELS.index("not_entailment")))
    draw.shuffle(rows)
    first, second, labels = zip(*rows, strict=True)
    return Rows(list(first), list(second), list(labels))


tasks.register("demo")(
    Task(
        name="demo",
        text=("premise", "hypothesis"),
        labels=LABELS,
        metrics=("accuracy",),
        load=load,
        build=build,
        about="who did what to whom: generated sentence pairs and a small model; no files, no network",
    )
)
