"""Entities: the spans of characters that a tagger finds in a text, as the pipeline of transformers groups them.

Neighbouring tokens of one type are one span, unless the later one has B-. This is `aggregation_strategy="simple"`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spdtool.data.kinds.tags import OUTSIDE, split_tag
from spdtool.data.windows import WindowOutput
from spdtool.escaping import make_visible
from spdtool.tasks.decision import LABEL, Answer, Decision, ExampleCall, Json, Object, Snippets
from spdtool.tasks.scores.probabilities import softmax

ENTITIES = "entities"


def list_entities(output: WindowOutput, names: Sequence[str]) -> list[Answer]:
    """Return the spans of one window: `entity_group`, `score`, `word`, and `start` and `end` in characters.

    Args:
        output: a window with logits [tokens, labels].
        names: tags in the order of the logits.
    """
    window, probabilities = output.window, softmax(output.values)
    tags = [names[index] for index in probabilities.argmax(axis=1)]
    highest = probabilities.max(axis=1)
    entities: list[Answer] = []
    for tokens in group_tokens(np.flatnonzero(window.sources >= 0).tolist(), tags):
        if tags[tokens[0]] == OUTSIDE:
            continue
        start, end = int(window.spans[tokens[0], 0]), int(window.spans[tokens[-1], 1])
        entities.append(
            {
                "entity_group": tags[tokens[0]].split("-", 1)[-1],
                "score": float(np.mean([highest[token] for token in tokens])),
                "word": window.text[start:end],
                "start": start,
                "end": end,
            }
        )
    return entities


def group_tokens(tokens: Sequence[int], tags: Sequence[str]) -> list[list[int]]:
    """Group neighbouring tokens of one type; B- begins a new group.

    Args:
        tokens: numbers of the tokens of the text, in order.
        tags: of all tokens of the window, special ones included.
    """
    groups: list[list[int]] = []
    previous_kind = None
    for token in tokens:
        begins, kind = split_tag(tags[token])
        if begins or kind != previous_kind:
            groups.append([])
        groups[-1].append(token)
        previous_kind = kind
    return groups


def select_longest(entities: Sequence[Answer]) -> list[Answer]:
    """Return the entities in order; of those that overlap, as windows may find them, the longest or likeliest."""
    chosen: list[Answer] = []
    for entity in sorted(entities, key=lambda entity: entity["start"]):
        if not chosen or entity["start"] >= chosen[-1]["end"]:
            chosen.append(entity)
        elif _length_and_score(entity) > _length_and_score(chosen[-1]):
            chosen[-1] = entity
    return chosen


def _length_and_score(entity: Answer) -> tuple[int, float]:
    """Return the characters of an entity and its score: what is longer wins, then what is likelier."""
    return entity["end"] - entity["start"], entity["score"]


class Entities(Decision):
    """A text is answered with the list of its entities, whatever its length."""

    output_names = (LABEL,)
    windows = 0
    reads_words = True
    example = ExampleCall("find")

    @classmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:  # noqa: ARG003
        """Tell that every tagger is answered so."""
        return True

    def decide(self, outputs: Any) -> list[Answer]:
        """Return the entities of each text; of two that overlap at the seam of windows the longer one."""
        answers: list[Answer] = []
        for text in outputs:
            entities = [entity for output in text for entity in list_entities(output, self.names)]
            answers.append(select_longest(entities) if len(text) > 1 else entities)
        return answers

    def predictions(self, outputs: Any) -> list[Object]:
        """Return an object with `entities` for each text."""
        return [{ENTITIES: answer} for answer in self.decide(outputs)]

    def tensor(self, name: str, outputs: Any) -> list[Json]:
        """Return the entities of each text as JSON."""
        return [json.dumps(answer, ensure_ascii=False) for answer in self.decide(outputs)]

    def prediction_schema(self) -> Object:
        """Return the schema of an object with a list of entities."""
        string: Object = {"type": "string"}
        integer: Object = {"type": "integer", "minimum": 0}
        kinds: list[Json] = [*dict.fromkeys(split_tag(name)[1] for name in self.names if name != OUTSIDE)]
        properties: Object = {
            "entity_group": {"type": "string", "enum": kinds},
            "score": {"type": "number"},
            "word": string,
            "start": integer,
            "end": integer,
        }
        entity: Object = {"type": "object", "properties": properties, "required": [*properties]}
        entities: Object = {"type": "array", "items": entity}
        return {"type": "object", "properties": {ENTITIES: entities}, "required": [ENTITIES]}

    def snippets(self) -> Snippets:
        """Return what a model card shows of entities."""
        names = json.dumps(self.names, ensure_ascii=False)
        return Snippets("a list of entities", f"[{names}[tag] for tag in logits[0].argmax(-1)]")

    def describe(self) -> str:
        """Name the types of entities."""
        kinds = dict.fromkeys(split_tag(name)[1] for name in self.names if name != OUTSIDE)
        return f"spans of {', '.join(map(make_visible, kinds))}"

    def line(self, prediction: Mapping[str, Any]) -> str:
        """Return the entities of a text, separated by tabs: type, begin, end and words."""
        entities = prediction[ENTITIES]
        words = [
            f"{make_visible(entity['entity_group'])} {entity['start']}-{entity['end']} {make_visible(entity['word'])}"
            for entity in entities
        ]
        return "\t".join(words) or self.unanswered

    @property
    def unanswered(self) -> str:
        """The line for a text without entities, and for one that could not be read."""
        return "-"
