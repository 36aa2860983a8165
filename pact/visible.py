"""Text from anywhere made safe to print. Draws nothing."""

from __future__ import annotations

import re
import unicodedata

# Categories whose characters show nothing, reorder what is around them or steer a terminal: controls, formats (bidi,
# zero width, tags), surrogates, private use, unassigned, line and paragraph separators.
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
# Invisible although they are marks or letters: joiner, fillers, variation selectors.
_FILLERS = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")


class _Visible(dict):
    """Character -> what is shown for it; filled as characters turn up."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if character != "\n" and (unicodedata.category(character) in _UNSEEN or _FILLERS.match(character)):
            character = f"⟨U+{code:04X}⟩"
        self[code] = character
        return character


_VISIBLE = _Visible()


def visible(text: str) -> str:
    """``text`` with every character that would not show, or would change how others show, spelled out.

    An escape becomes ``⟨U+001B⟩``; so do controls, bidirectional and zero-width characters, separators, tags, lone
    surrogates and the like. Line feeds stay. What comes out is safe to print.
    """
    return text.translate(_VISIBLE)
