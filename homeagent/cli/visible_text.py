"""Escape untrusted text, so that two different ids do not look alike."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

from homeagent.models.types import INVISIBLE

_EMPTY_BRAILLE = "\u2800"
# Count East Asian scripts as one script, because a name can mix scripts.
_EAST_ASIAN = frozenset({"BOPOMOFO", "CJK", "HANGUL", "HIRAGANA", "IDEOGRAPHIC", "KATAKANA"})


def _script(character: str) -> str | None:
    """Return the writing system of a letter, mark or digit."""
    if not unicodedata.category(character).startswith(("L", "M", "N")) or character in "0123456789":
        return None
    script = re.split("[ -]", unicodedata.name(character, "UNKNOWN"), maxsplit=1)[0]
    if script in _EAST_ASIAN:
        return "CJK"
    return None if script == "COMBINING" else script


def _main_script(text: str) -> str | None:
    """Return the most frequent writing system, but prefer Latin."""
    scripts = Counter(script for character in text if (script := _script(character)) is not None)
    return "LATIN" if "LATIN" in scripts else scripts.most_common(1)[0][0] if scripts else None


def _is_mistakable(character: str, main: str | None) -> bool:
    """Return True if the character can look like a different character."""
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
        return True  # punctuation such as a dash that looks like a hyphen
    script = _script(character)
    if script == "LATIN" and character >= "\u0180":
        return not unicodedata.normalize("NFD", character)[0].isascii()  # for example, U+0261 looks like `g`
    return script is not None and script != main


def _escape(text: str) -> str:
    """Escape each character that can look like a different character."""
    if text.isascii() and text.isprintable():
        return text
    main = _main_script(text)
    shown = "".join(ascii(char)[1:-1] if _is_mistakable(char, main) else char for char in text)
    # Escape a combining mark at the beginning. A terminal would draw the mark over the preceding character.
    return ascii(shown[0])[1:-1] + shown[1:] if unicodedata.category(shown[0]).startswith("M") else shown


def quoted(text: str) -> str:
    """Return an id in quotes. Append the name of a main writing system other than Latin."""
    # Double the id's backslashes first, because a backslash begins an escape.
    shown = _escape(text.replace("\\", "\\\\").replace("'", "\\'"))
    main = _main_script(text)
    return f"'{shown}'" if main in {None, "LATIN"} else f"'{shown}' ({main})"


def identity(text: str) -> str:
    """Return a short text for printing. Add quotes if the text could be mistaken for another text."""
    shown = quoted(text)
    is_plain = shown == f"'{text}'" and text == text.strip() and unicodedata.is_normalized("NFC", text)
    return text if is_plain and not text.startswith('"') else shown


def escape_words(text: str) -> str:
    """Escape each word separately, so that a Greek id stays readable."""
    # Do not escape the ellipsis, which homeagent's messages contain.
    return re.sub(r"[^\s…]+", lambda word: _escape(word[0]), text)
