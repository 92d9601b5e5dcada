"""Text of other people as the command line prints it, so that two different ids never look the same by accident.

An administrator approves a device by its id. A character of an id is printed as an escape, which has its number, if

- it is not printable, is a space other than U+0020, or is one of the characters that show nothing: the property
  Default_Ignorable_Code_Point of Unicode, and U+2800;
- it is a compatibility form of other characters (NFKC changes it), such as a fullwidth letter;
- it is punctuation or a mathematical sign outside of ASCII, such as a dash that looks like a hyphen;
- it is a combining mark at the beginning;
- it is a Latin letter from U+0180 on that has no ASCII letter as its base, such as U+0261, which looks like `g`;
- it belongs to another script than the rest of the text. The script of a letter, mark or digit is the first word of
  its Unicode name. Han, kana, bopomofo and hangul count as one script, since names mix them. If a text has Latin
  letters, Latin is the script of the rest; otherwise it is the most frequent script.

A text without Latin letters keeps its letters, and its script is named after it. A text that has an escape, begins or
ends with a space, or is not in NFC is in quotes.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

__all__ = ["escape_words", "identity", "quoted"]

# https://www.unicode.org/Public/UCD/latest/ucd/DerivedCoreProperties.txt, Default_Ignorable_Code_Point; and the empty
# pattern of Braille.
_SHOWS_NOTHING = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_EAST_ASIAN = frozenset({"BOPOMOFO", "CJK", "HANGUL", "HIRAGANA", "IDEOGRAPHIC", "KATAKANA"})


def _script(character: str) -> str | None:
    """Return the script of a letter, mark or digit; None for other characters, ASCII digits and shared marks."""
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
        or _SHOWS_NOTHING.match(character)
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
    if text.isascii() and text.isprintable():
        return text  # also an empty text
    main = _main_script(text)
    shown = "".join(ascii(one)[1:-1] if _is_mistakable(one, main) else one for one in text)
    # A mark would be drawn over the character that is printed before the text.
    return ascii(shown[0])[1:-1] + shown[1:] if unicodedata.category(shown[0]).startswith("M") else shown


def quoted(text: str) -> str:
    """Return an id in quotes, with the name of its script if that is not Latin."""
    # First, so that an id can't pretend to hold an escape.
    shown = _escape(text.replace("\\", "\\\\").replace("'", "\\'"))
    main = _main_script(text)
    return f"'{shown}'" if main in {None, "LATIN"} else f"'{shown}' ({main})"


def identity(text: str) -> str:
    """Return an id, or another short text of a caller, as it is printed: in quotes if it could be mistaken."""
    shown = quoted(text)
    is_plain = shown == f"'{text}'" and text == text.strip() and unicodedata.is_normalized("NFC", text)
    return text if is_plain and not text.startswith('"') else shown


def escape_words(text: str) -> str:
    """Return a message, of which each word is escaped as an id is: the rest of a message is in another script."""
    # Homeagent's messages themselves have an ellipsis.
    return re.sub(r"[^\s…]+", lambda word: _escape(word[0]), text)
