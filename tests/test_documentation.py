"""The generated pages, the diagrams and the menu's places are current, and the reference lists every public name."""

import enum
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import homeagent
import homeagent.handshake.client
from homeagent import errors, fastapi, handshake, maintenance, scram, stores, testing, transaction
from homeagent.models import device, idempotency_key
from tests import fork_server

ROOT = Path(__file__).parents[1]


def test_schema_page() -> None:
    """`docs/schema.md` has the tables, columns and indexes of the models."""
    program = "import runpy; runpy.run_path('.ci/schema_page.py', run_name='__main__')"
    done = fork_server.run(program, "--check")
    assert done.returncode == 0, done.stderr


MODULES = [homeagent, errors, fastapi, handshake, handshake.client, maintenance, scram, stores, testing]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_reference_lists_each_name(module: ModuleType) -> None:
    """The reference has each public name of a module, or the whole module."""
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    listed = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", pages, flags=re.MULTILINE)}
    assert module.__name__.rpartition(".")[2] in listed or set(module.__all__) - {"__version__"} <= listed


def test_errors_have_remedies() -> None:
    """The reference says the remedy of each error that is not only the base class of other errors."""
    without = {name for name in errors.__all__ if "Remedy:" not in str(vars(errors)[name].__doc__)}
    assert without == {"AlreadyExistsError", "HomeAgentError", "IdempotencyError", "LimitError", "NotFoundError"}


def diagram(page: str, title: str) -> str:
    """Return the Mermaid source of the diagram whose title begins with the argument `title`."""
    sources: list[str] = re.findall(
        r"^```mermaid\n(.*?)^```$", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.M | re.S
    )
    (found,) = (source for source in sources if f"accTitle: {title}" in source)
    return found


@pytest.mark.parametrize(
    ("page", "title", "states", "described"),
    [
        ("unit-of-work", "States of a unit", transaction.UnitState, transaction),
        ("devices", "States of a device", homeagent.DeviceStatus, device),
        ("idempotent-effects", "States of an idempotency key", homeagent.IdempotencyState, idempotency_key),
    ],
)
def test_state_diagram(page: str, title: str, states: type[enum.Enum], described: object) -> None:
    """A state diagram has all states of the code, and only transitions from the table in the module's docstring."""
    names = {state.name.lower() for state in states}
    arrows = re.findall(r"^  (\S+) --> ([^\s:]+)", diagram(f"concepts/{page}.md", title), flags=re.M)
    assert {name for arrow in arrows for name in arrow} - {"[*]"} == names

    def states_in(cell: str) -> set[str]:
        words = cell.strip().lower().replace(" ", "_").replace("no_row", "[*]")
        return names if words == "any" else {name for name in (*names, "[*]") if name in words}

    rows = [line.strip("|").split("|") for line in str(described.__doc__).splitlines() if line.startswith("|")]
    possible = {
        (before, after)
        for row in rows
        for before in states_in(row[0])
        for after in states_in(row[1] if described is transaction else row[2])
    }
    assert set(arrows) <= possible


def test_layers_diagram() -> None:
    """The architecture diagram names the modules of the import contract in the order of the layers."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = " ".join(next(each["layers"] for each in contracts["contracts"] if each["id"] == "layers"))
    lines = re.sub(r"<b>.*?</b>", "", diagram("design.md", "Layers of the package"))
    labels = " ".join(re.findall(r'\["(.*?)"\]', lines))
    named = [name for name in re.findall(r"\w+", labels.replace("<br>", " ")) if name in re.findall(r"\w+", layers)]
    assert named == re.findall(r"\w+", layers)


def anchor_of(heading: str) -> str:
    """Return the name of a heading after `#`: small letters, no punctuation, hyphens for blanks."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_link_targets_exist() -> None:
    """Each link to a file of this tree leads to an existing file, and each section link leads to a heading."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    texts = {page.resolve(): page.read_text(encoding="utf-8") for page in pages}
    for page, text in texts.items():
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", text):
            path = (page.parent / target).resolve() if target else page
            assert path.exists(), (page, target)
            headings = re.findall(r"^#+ (.+)$", texts[path], flags=re.MULTILINE) if anchor else []
            assert not anchor or anchor in map(anchor_of, headings), (page, target, anchor)


def test_answers_are_in_the_menu() -> None:
    """Each question links to a heading of the page at the named place of the menu."""
    navigation = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]
    menu = {}
    for section, pages in (item for group in navigation for item in group.items()):
        if isinstance(pages, str):
            menu[section] = pages
        else:
            menu.update({f"{section} › {title}": page for entry in pages for title, page in entry.items()})
    text = (ROOT / "docs" / "questions.md").read_text(encoding="utf-8")
    answers = re.findall(r"^\| .+\? \| \[(.+)\]\((.+)#(.+)\) \| (.+) \|$", text, flags=re.MULTILINE)
    assert len(answers) >= 30
    for heading, page, anchor, place in answers:
        assert anchor == anchor_of(heading)
        # `.ci/site.py` copies the pages of the project's root with names in small letters.
        assert menu[place] == page.removeprefix("../").lower()
