"""The embedded task `demo`: sentence pairs made from a seed, and a small untrained BERT to learn them.

It needs no file and no network, and two CPU cores learn it in half a minute, so the whole pipeline can be seen to work.
A premise tells who did what to whom. The hypothesis, active or passive, says the same, or has the roles, the adjectives
or the nouns exchanged:

    old foxes chased red cats   |   red cats were chased by old foxes     entailment
                                |   red foxes were chased by old cats     not_entailment

Every premise comes with both, and the two hypotheses are the same bag of words. A classifier that counts words
therefore scores exactly 50 % on any split; only order, voice and the binding of adjectives tell the labels apart.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from spdtool.data.dataset import Dataset, Rows
from spdtool.errors import DataError
from spdtool.plugins import datasets

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADJECTIVES = ("old", "red", "small", "quiet")
NOUNS = ("foxes", "cats", "dogs", "bears", "horses", "wolves")
VERBS = ("chased", "helped", "followed", "watched", "pushed", "called", "warned", "praised")
FUNCTION_WORDS = ("were", "by")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LABELS = ("not_entailment", "entailment")

DEV_PREMISES = 480  # of 2,880; each premise gives two rows
PASSIVE = 0.35  # share of passive hypotheses; at one half, no single cue correlates with the label and training stalls
POSITIONS = 128  # the longest pair has 15 tokens; the rest is for timing at the usual lengths
INITIALIZER = 0.2  # the usual 0.02 is made for 768 dimensions; with it, 64 do not leave 50 % in thousands of steps


@dataclass(frozen=True)
class Event:
    """Who did what to whom: `(adjective, noun)` of the doer and of the other one."""

    doer: tuple[str, str]
    verb: str
    other: tuple[str, str]

    def sentence(self, passive: bool) -> str:
        """Return the event as a sentence of five words, or of seven in the passive voice."""
        doer, other = " ".join(self.doer), " ".join(self.other)
        if passive:
            return f"{other} were {self.verb} by {doer}"
        return f"{doer} {self.verb} {other}"

    def false_events(self) -> tuple[Event, Event, Event]:
        """Return the three other events of the same words: roles, adjectives or nouns exchanged."""
        (adjective, noun), (other_adjective, other_noun) = self.doer, self.other
        return (
            replace(self, doer=self.other, other=self.doer),
            replace(self, doer=(other_adjective, noun), other=(adjective, other_noun)),
            replace(self, doer=(adjective, other_noun), other=(other_adjective, noun)),
        )


def load_demo(data: str | None, seed: int) -> dict[str, Rows]:
    """Draw the splits `train` (4,800 rows) and `dev` (960) from `seed`; no premise is in both.

    Raises:
        DataError: `data` was given.
    """
    if data is not None:
        raise DataError(f"the task demo makes its own rows, and was given {data}", "leave out --data, or name a task")
    generator = random.Random(seed)
    events = _all_events()
    generator.shuffle(events)
    # Train first: the generator's state is part of what the rows are.
    return {
        "train": _draw_rows(generator, events[DEV_PREMISES:]),
        "dev": _draw_rows(generator, events[:DEV_PREMISES]),
    }


def build_demo_model(seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Build an untrained BERT of four layers for this data set, and its tokenizer.

    The weights depend on `seed` alone, and the global random state is not changed.
    """
    import torch  # here: whoever lists the tasks does not wait for it
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = demo_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=POSITIONS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=INITIALIZER,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForSequenceClassification(config), tokenizer


def demo_tokenizer() -> PreTrainedTokenizerBase:
    """Return the fast tokenizer of the demo: one WordPiece token per word of the grammar, laid out as BERT's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import BertTokenizerFast  # type: ignore[attr-defined]  # a name that transformers 5 adds late

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
    tokenizer: PreTrainedTokenizerBase = BertTokenizerFast(tokenizer_object=core, model_max_length=POSITIONS)
    return tokenizer


def _all_events() -> list[Event]:
    """Return every event of two different adjectives, two different nouns and a verb: 2,880."""
    adjectives, nouns = itertools.permutations(ADJECTIVES, 2), itertools.permutations(NOUNS, 2)
    events = []
    for (adjective, other_adjective), (noun, other_noun), verb in itertools.product(adjectives, nouns, VERBS):
        events.append(Event((adjective, noun), verb, (other_adjective, other_noun)))
    return events


def _draw_rows(generator: random.Random, events: list[Event]) -> Rows:
    """Draw one true and one false row for each event, in random order."""
    rows: list[tuple[str, str, int]] = []
    for event in events:
        premise = event.sentence(passive=False)
        # One voice for both hypotheses: were it drawn for each, they would be two bags of words.
        passive = generator.random() < PASSIVE
        rows.append((premise, event.sentence(passive), LABELS.index("entailment")))
        false_event = generator.choice(event.false_events())
        rows.append((premise, false_event.sentence(passive), LABELS.index("not_entailment")))
    generator.shuffle(rows)
    first, second, labels = zip(*rows, strict=True)
    return Rows(list(first), list(second), list(labels))


datasets.register("demo")(
    Dataset(
        name="demo",
        kind="classification",
        text=("premise", "hypothesis"),
        labels=LABELS,
        metrics=("accuracy",),
        load=load_demo,
        build=build_demo_model,
        about="who did what to whom: generated pairs, with a small model of its own; no files, no network",
    )
)
