"""Print ids of devices and other untrusted text, so that two different ids do not look the same by accident.

An administrator approves a device by its id. Each of the following characters is replaced by an escape with the number
of the character:

- a character that is not printable, or a space other than U+0020;
- an invisible character, which is U+2800 or has Unicode's property Default_Ignorable_Code_Point;
- a character that NFKC changes, such as a fullwidth letter;
- punctuation or a mathematical sign outside of ASCII, such as a dash that looks like a hyphen;
- a combining mark at the beginning;
- a Latin letter from U+0180 onwards that has no ASCII base letter, such as U+0261, which looks like `g`;
- a character whose writing system is not the main writing system of the text.

The writing system (script) of a letter, mark or digit is the first word of the Unicode name. Han, kana, bopomofo and
hangul count as one writing system, because names mix these four writing systems. The main writing system of a text is
Latin if the text has Latin letters, and otherwise the most frequent writing system of the text. If the main writing
system is not Latin, the name of the writing system follows the text. Quotes surround a text that contains an escape,
begins or ends with a space, or is not in NFC.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

from homeagent.models.types import INVISIBLE

_EMPTY_BRAILLE = "\u2800"
_EAST_ASIAN = frozenset({"BOPOMOFO", "CJK", "HANGUL", "HIRAGANA", "IDEOGRAPHIC", "KATAKANA"})


def _script(character: str) -> str | None:
    if not unicodedata.category(character).startswith(("L", "M", "N")) or character in "0123456789":
        return None
    script = re.split("[ -]", unicodedata.name(character, "UNKNOWN"), maxsplit=1)[0]
    if script in _EAST_ASIAN:
        return "CJK"
    return None if script == "COMBINING" else script


def _main_script(text: str) -> str | None:
    scripts = Counter(script for character in text if (script := _script(character)) is not None)
    return "LATIN" if "LATIN" in scripts else scripts.most_common(1)[0][0] if scripts else None


def _is_mistakable(character: str, main: str | None) -> bool:
    if character.isascii():
        return not character.isprintable()
    if (
        not character.isprintable()
        or character == _EMPTY_BRAILLE
        or INVISIBLE.match(character)
        or unicodedata.normalize("NFKC", character) != character
    ):
        return True
    if unicodedata.category(character).startswith(("P", "Sk", "Sm")):
        return True
    script = _script(character)
    if script == "LATIN" and character >= "\u0180":
        return not unicodedata.normalize("NFD", character)[0].isascii()
    return script is not None and script != main


def _escape(text: str) -> str:
    """Return the text with an escape for each character that looks like another character. The text can be empty."""
    if text.isascii() and text.isprintable():
        return text
    main = _main_script(text)
    shown = "".join(ascii(char)[1:-1] if _is_mistakable(char, main) else char for char in text)
    # Escape a combining mark at the beginning, because a terminal draws the mark over the character before the text.
    return ascii(shown[0])[1:-1] + shown[1:] if unicodedata.category(shown[0]).startswith("M") else shown


def quoted(text: str) -> str:
    """Return an id in quotes. If the main writing system of the id is not Latin, append its name."""
    # Double the backslashes first, because a backslash in the id must not look like an escape.
    shown = _escape(text.replace("\\", "\\\\").replace("'", "\\'"))
    main = _main_script(text)
    return f"'{shown}'" if main in {None, "LATIN"} else f"'{shown}' ({main})"


def identity(text: str) -> str:
    """Return an id or another short text for printing. A text that could be mistaken for another text is returned in
    quotes.
    """
    shown = quoted(text)
    is_plain = shown == f"'{text}'" and text == text.strip() and unicodedata.is_normalized("NFC", text)
    return text if is_plain and not text.startswith('"') else shown


def escape_words(text: str) -> str:
    """Escape each word of a message separately, because the words can have different writing systems."""
    # Do not escape the ellipsis, which homeagent's messages contain.
    return re.sub(r"[^\s…]+", lambda word: _escape(word[0]), text)
