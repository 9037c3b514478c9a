"""Tags of words in BIO, the scheme that models learn: B- begins a span, I- goes on with it, O is outside."""

from __future__ import annotations

OUTSIDE = "O"


def split_tag(tag: str) -> tuple[bool, str]:
    """Return whether a tag begins a span, and the type of the span; a plain tag is its own type."""
    return tag.startswith("B-"), tag[2:] if tag[:2] in ("B-", "I-") else tag
