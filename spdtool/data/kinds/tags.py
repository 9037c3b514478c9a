"""Tags of words: which schemes of spans there are, and how all of them are brought into one, BIO.

B- begins a span, I- goes on with it, O is outside. BIOES, BILOU and BMES mark ends and single words too, which BIO
does not need: a span ends where the next tag does not go on with it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

OUTSIDE = "O"
# Every prefix of BIO, BIOES, BILOU and BMES, and what it is in BIO.
BIO_PREFIXES = {"B": "B", "I": "I", "S": "B", "E": "I", "L": "I", "U": "B", "M": "I"}
UNTYPED = {*BIO_PREFIXES, OUTSIDE}
# b-PER, B_PER, PER-B: begins of spans, spelt as nobody reads them.
BEGIN_SPELLINGS = re.compile("[bB][-_:].+|.+[-_:][bB]")


@dataclass
class TagReader:
    """Reads the tags of rows as names in one scheme, and counts what it changed.

    Attributes:
        is_span: whether the tags are of spans (B-X, I-X, O); else each word has a class.
        changes: what was changed, to how often.
    """

    is_span: bool
    changes: Counter[str] = field(default_factory=Counter)

    def read(self, tags: Sequence[str]) -> list[str]:
        """Return the tags of a row in BIO; plain tags as they are."""
        if not self.is_span:
            return list(tags)
        bio_tags: list[str] = []
        previous = OUTSIDE
        for tag in tags:
            previous = self._read_tag(tag, previous)
            bio_tags.append(previous)
        return bio_tags

    def _read_tag(self, tag: str, previous: str) -> str:
        """Return one tag in BIO, given the tag before it in BIO."""
        if tag == OUTSIDE:
            return OUTSIDE
        prefix, _, kind = tag.partition("-")
        # A dev tag of no scheme stays as it is: no training row has it, for which it is refused.
        if prefix not in BIO_PREFIXES:
            return tag
        bio_prefix = BIO_PREFIXES[prefix]
        if prefix not in "BI":
            self.changes[f"{prefix}-... was read as {bio_prefix}-..."] += 1
        # IOB1 writes I- at the begin of most spans.
        if bio_prefix == "I" and previous not in (f"B-{kind}", f"I-{kind}"):
            self.changes["I-... that goes on with no span was read as the begin of one, B-..."] += 1
            bio_prefix = "B"
        return f"{bio_prefix}-{kind}"

    def describe(self) -> str:
        """Say what was changed; nothing where nothing was."""
        return "".join(f"; {count:,} times {change}" for change, count in sorted(self.changes.items()))


def split_tag(tag: str) -> tuple[bool, str]:
    """Return whether a tag begins a span, and the type of the span."""
    return tag.startswith("B-"), tag[2:] if tag[:2] in ("B-", "I-") else tag


def is_span_tag(tag: str) -> bool:
    """Tell whether a tag has a prefix of a scheme for spans, and a type."""
    prefix, _, kind = tag.partition("-")
    return prefix in BIO_PREFIXES and bool(kind)


def find_odd_tag(tags: Collection[str]) -> tuple[str, str] | None:
    """Return a tag that spoils a scheme of spans, and what is wrong with it; None where none does.

    Words would be scored one by one instead of spans, and the score would mean something else.

    Args:
        tags: every tag of the training rows but O.
    """
    names = sorted(tags)
    others = [name for name in names if not is_span_tag(name)]
    begins = [name for name in names if name.startswith("B-") and name not in others]
    misspelt = [name for name in others if BEGIN_SPELLINGS.fullmatch(name)]
    if others and UNTYPED.issuperset(names):
        return others[0], f"the tags {', '.join(names)} name no type of span"
    if others and begins:
        return others[0], f"the tag {others[0]!r} is neither O nor of the form of {begins[0]!r}"
    if misspelt:
        return misspelt[0], f"the tag {misspelt[0]!r} looks like the begin of a span, and is not spelt as one"
    return None


def tag_order(tag: str) -> tuple[bool, str, str]:
    """Return a key that sorts O first, then each span's B- before its I-."""
    if tag[1:2] == "-":
        return tag != OUTSIDE, tag[2:], tag[:2]
    return tag != OUTSIDE, tag, ""
