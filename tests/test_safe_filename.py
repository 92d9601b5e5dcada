"""File names of ids: different, portable and short."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homeagent import errors, safe_filename

# Pairs that a file system may take for one name: case, Unicode normalisation, separators, long common beginnings.
ALIKE = [
    "A", "a", "é", "e\u0301", "a/b", "a_b", "a\\b", "a.", "..", ".", "x" * 512, "x" * 511, "K", "k", "\u212a", "~",
    "a~",
]  # fmt: skip


@given(st.lists(st.one_of(st.sampled_from(ALIKE), st.text(min_size=1)), min_size=2, max_size=6, unique=True))
def test_different_ids_have_different_names(ids: list[str]) -> None:
    """Different ids have different names, also if the file system ignores case and normalises Unicode."""
    names = {unicodedata.normalize("NFKC", safe_filename(each)).casefold() for each in ids}
    assert len(names) == len(ids)


@given(st.text(min_size=1, max_size=2000))
def test_a_name_is_portable(identifier: str) -> None:
    """A name is ASCII, at most 200 bytes long, and neither a path nor a hidden file."""
    name = safe_filename(identifier)
    assert name.isascii()
    assert name.isprintable()
    assert 1 <= len(name) <= 200
    assert not set(name) & set('/\\:*?"<>| ')
    assert not name.startswith(".")
    assert not name.endswith(".")


def test_a_plain_id_is_its_own_name() -> None:
    """A short id of lower-case letters, digits, dots and dashes is not changed, and every other name is stable."""
    assert safe_filename("hall-lamp_2.local") == "hall-lamp_2.local"
    digest = "9f5a3a5f5dd012bbfd02c7a87a76ca29588c17be2b19dac58876584a00cee796"
    assert safe_filename("Hall/Lamp") == f"hall_lamp~{digest}"


@pytest.mark.parametrize("identifier", ["", None, b"a"])
def test_a_wrong_argument(identifier: object) -> None:
    """An empty id, and a value that is not a str, raise InvalidArgumentError."""
    with pytest.raises(errors.InvalidArgumentError):
        safe_filename(identifier)  # type: ignore[arg-type]
