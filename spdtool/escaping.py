"""Text of others, made safe to print: labels, file names, messages of other libraries.

A terminal obeys escape sequences, and a terminal, an editor or a browser reorders what stands after a bidirectional
control: a label could erase a line, or show another name than it has.
"""

from __future__ import annotations

import re

# C0 and C1 controls, invisible and bidirectional controls, line separators, interlinear marks, lone surrogates (which
# no stream can encode), tag characters, and the two that stand for markup below. The joiners U+200C and U+200D are
# left: Persian and emoji need them.
CONTROLS = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    r"\U000e0000-\U000e007f\U000f0001\U000f0002]"
)
BEYOND_ASCII = re.compile(f"(?![\\x00-\\x7f]){CONTROLS.pattern}")
# Private characters that stand for `[` and `\` while markup is read: rich's own escape depends on what follows it.
BRACKET, BACKSLASH = "\U000f0001", "\U000f0002"
PROTECT = str.maketrans({"[": BRACKET, "\\": BACKSLASH})
RESTORE = str.maketrans({BRACKET: "[", BACKSLASH: "\\"})


def make_visible(text: object, *, lines: bool = False) -> str:
    r"""Return text with every control character written as in Python: `\x1b`, `\u202e`.

    Args:
        lines: leave line feeds as they are.
    """

    def spell(match: re.Match[str]) -> str:
        character = match[0]
        return character if lines and character == "\n" else repr(character)[1:-1]

    return CONTROLS.sub(spell, str(text))


def escape_json(text: str) -> str:
    r"""Return JSON in which control characters beyond ASCII are written as `\u202e`: it reads as the same value."""
    return BEYOND_ASCII.sub(_spell_utf16, text)


def _spell_utf16(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[start : start + 4]}" for start in range(0, len(units), 4))
