"""Rules of the project: the shipped files, the layers, and consistent statements in all places."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from configparser import ConfigParser
from email import message_from_string
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]

# The tag of the release that the tests build.
VERSION = "v1.2.3"

# Joined here, so that this file passes its own test.
FORBIDDEN_TEXTS = {
    "registry host": re.compile(r"(?:pypi|pythonhosted|test\.pypi|npmjs|jsdelivr)\." + r"(?:org|com|net)\b"),
    "machine path": re.compile(r"(?<![\w.~:/-])/" + r"(?:home|Users|root|work)/\w"),
}


def shipped_files() -> list[Path]:
    """Return the files of the project: the files that git tracks or could track, or all files of an unpacked sdist."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    skipped = {".venv", "__pycache__", ".pytest_cache", ".hypothesis"}
    return [path for path in ROOT.rglob("*") if path.is_file() and skipped.isdisjoint(path.relative_to(ROOT).parts)]


def build(hook: str, source: Path, destination: Path) -> Path:
    """Run a hook of hatchling on a tree, as pip would but without a network, and return the built file."""
    destination.mkdir(exist_ok=True)
    program = f"import sys; from hatchling.build import {hook}; print({hook}(sys.argv[1]))"
    command = [sys.executable, "-c", program, str(destination)]
    done = subprocess.run(command, cwd=source, check=True, capture_output=True, text=True)
    return destination / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project at the tag of a release, with temporary files that must not be shipped."""
    copy = tmp_path_factory.mktemp("tree") / "homeagent"
    for path in shipped_files():
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    for dropping in ("homeagent/__pycache__/cli.cpython-311.pyc", "alembic/versions/__pycache__/x.pyc", "data.db"):
        (copy / dropping).parent.mkdir(exist_ok=True)
        (copy / dropping).write_bytes(b"left over")
    git = ["git", "-C", str(copy), "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "Release"], ["tag", VERSION]):
        subprocess.run([*git, *command], check=True)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("build_wheel", tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("build_sdist", tree, tmp_path_factory.mktemp("sdist"))


def contents(wheel: Path) -> dict[str, bytes]:
    with ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_readme_and_ci_name_the_same_commands() -> None:
    """The README's first commands run the example and then the tests, by the same line as the CI script."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example, tests = re.findall(r"^```sh\n(.*?)^```$", readme, flags=re.MULTILINE | re.DOTALL)[:2]
    program = re.fullmatch(
        r"python3 -m venv \.venv && \.venv/bin/pip install --quiet --editable \. && \.venv/bin/python (\S+)\n", example
    )
    assert program is not None
    assert (ROOT / program[1]).is_file()
    assert tests.endswith("-m pytest\n")
    assert f"test_command='{tests.strip()}'\n" in (ROOT / ".ci/run").read_text(encoding="utf-8")


def test_workflow_runs_the_steps_of_the_ci_script() -> None:
    """Each step of the hosted workflow can be run by hand with the script, which refuses an unknown step."""
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    matrix = re.search(r"^ +step: \[(.+)\]$", workflow, flags=re.MULTILINE)
    known = re.search(r'^known="([a-z0-9 ]+)"$', script, flags=re.MULTILINE)
    assert matrix is not None
    assert known is not None
    assert {"test", *matrix[1].split(", ")} == set(known[1].split())
    refused = subprocess.run([ROOT / ".ci/run", "deploy"], capture_output=True, text=True)
    assert (refused.returncode, "deploy" in refused.stderr) == (2, True)


def test_every_promised_python_is_tested() -> None:
    """The classifiers, the lower bound and the workflow's matrix name the same Python versions."""
    promised = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", text)]
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    matrix = re.search(r"^ +python: \[(.+)\]$", workflow, flags=re.MULTILINE)
    assert matrix is not None
    assert re.findall(r"[\d.]+", matrix[1]) == promised
    assert PROJECT["requires-python"] == f">={promised[0]}"
    assert PYPROJECT["tool"]["mypy"]["python_version"] == promised[0]


def test_every_dependency_has_a_lower_bound() -> None:
    """Each dependency has a lower bound, as otherwise only its newest release would be tested."""
    extras = PROJECT["optional-dependencies"]
    requirements = [
        *PROJECT["dependencies"],
        *(text for name in extras if name not in ("docs", "lint") for text in extras[name]),
    ]
    foreign = [text.partition(";")[0] for text in requirements if not text.startswith("homeagent[")]
    assert [text for text in foreign if ">=" not in text] == []


def test_changelog_has_a_section_for_each_version() -> None:
    """The changelog has one dated section for each release, and can begin with a section for the next version."""
    sections = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = [re.fullmatch(r"(\d+\.\d+\.\d+) \((?:(unreleased)|\d{4}-\d\d-\d\d)\)", section) for section in sections]
    assert all(named)
    assert not any(match[2] for match in named[1:] if match)
    assert len(sections) == len({match[1] for match in named if match})


@pytest.mark.parametrize(("heading", "status"), [("0.1.0 (2030-01-31)", 0), ("0.1.0 (unreleased)", 1), ("0.1.01", 1)])
def test_publish_needs_a_dated_section(heading: str, status: int, tmp_path: Path) -> None:
    """The workflow for releases refuses a tag if the changelog has no section with the version and a date."""
    workflow = (ROOT / ".github/workflows/publish.yml").read_text(encoding="utf-8")
    script = re.search(r"section in CHANGELOG.md\n +run: \|\n((?: {10}.*\n)+)", workflow)
    assert script is not None
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## {heading}\n")
    environment = {**os.environ, "GITHUB_REF_NAME": "v0.1.0"}
    done = subprocess.run(["bash", "-e", "-c", script[1]], cwd=tmp_path, env=environment, check=False)
    assert done.returncode == status


@pytest.mark.parametrize("kind", FORBIDDEN_TEXTS)
def test_no_file_names_a_registry_or_a_personal_folder(kind: str) -> None:
    """No file names a package registry or a folder of a single person's machine."""
    found = []
    for path in shipped_files():
        if path.suffix in {".db", ".gz", ".png", ".svg"}:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if FORBIDDEN_TEXTS[kind].search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []


def test_every_test_has_a_docstring() -> None:
    """Each test has a docstring, which explains a failed run to its reader."""
    signature = re.compile(r"^ *(?:async )?def (test_\w+)\((?:[^)]|\)(?! -> None:))*\) -> None:.*\n(.*)", re.MULTILINE)
    tests = [
        (path.name, *match.groups())
        for path in (ROOT / "tests").rglob("test_*.py")
        for match in signature.finditer(path.read_text(encoding="utf-8"))
    ]
    assert len(tests) > 1000
    assert [test[:2] for test in tests if not test[2].lstrip().startswith('"""')] == []


def test_alembic_finds_the_revisions() -> None:
    """The `alembic` command needs only pyproject.toml, and the revisions are a numbered chain that hides no library."""
    assert list((ROOT / "alembic").rglob("__init__.py")) == []
    script = ScriptDirectory.from_config(Config(toml_file=ROOT / "pyproject.toml"))
    revisions = [revision.revision for revision in script.walk_revisions()]
    assert revisions[::-1] == [f"{number:04}" for number in range(1, len(revisions) + 1)]
    assert all(Path(revision.path).name.startswith(f"{revision.revision}_") for revision in script.walk_revisions())


def test_wheel_holds_the_package_and_its_revisions(wheel: Path) -> None:
    """The wheel holds the package and its revisions, and no test, cache or second folder."""
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "homeagent").rglob("*.py")}
    expected.add("homeagent/py.typed")
    for path in (ROOT / "alembic").rglob("*"):
        if path.suffix in {".py", ".mako"}:
            expected.add(f"homeagent/_migrations/{path.relative_to(ROOT / 'alembic').as_posix()}")
    assert {"homeagent/_migrations/env.py", "homeagent/_migrations/versions/0001_v1_tables.py"} <= expected
    held = {name for name in contents(wheel) if ".dist-info/" not in name}
    assert held == expected


def test_wheel_metadata(wheel: Path) -> None:
    """The metadata names the version of the tag, the licence with its text, the types and the command."""
    files = contents(wheel)
    information = "homeagent-1.2.3.dist-info"
    metadata = message_from_string(files[f"{information}/METADATA"].decode())
    assert metadata["Version"] == "1.2.3"
    assert metadata["License-Expression"] == "MIT"
    assert files[f"{information}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    entry_points = ConfigParser()
    entry_points.read_string(files[f"{information}/entry_points.txt"].decode())
    assert dict(entry_points["console_scripts"]) == {"homeagent": "homeagent.cli:main"}


def test_package_runs_from_a_zip_file(wheel: Path, tmp_path: Path) -> None:
    """If the package runs from a zip file such as the wheel, homeagent finds the revisions."""
    database = tmp_path / "private" / "h.db"
    command = [sys.executable, "-m", "homeagent", "init", "--database", database]
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert database.stat().st_size > 0


def test_wheel_from_the_sdist_is_the_same(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    """A wheel built from the sdist equals the wheel built from the tree, byte for byte."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    assert contents(build("build_wheel", unpacked, tmp_path / "out")) == contents(wheel)


def test_sdist_holds_every_file(tree: Path, sdist: Path) -> None:
    """The sdist holds every file of the project, so that the tests run without a checkout."""
    with tarfile.open(sdist) as archive:
        held = {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in archive.getnames()}
    assert {path.relative_to(ROOT).as_posix() for path in shipped_files()} <= held
    assert not any("__pycache__" in name or name == "data.db" for name in held)


def test_editable_install_copies_nothing(tree: Path, tmp_path: Path) -> None:
    """An editable install is a path to the checkout, as copied revisions would become outdated."""
    names = contents(build("build_editable", tree, tmp_path))
    assert [name for name in names if ".dist-info/" not in name] == ["_homeagent.pth"]


FORBIDDEN_IMPORTS = (
    ("clock", "homeagent.errors", "layers"),
    ("models.base", "homeagent.engine", "layers"),
    ("errors", "homeagent.unit_of_work", "layers"),
    ("stores.nonces", "homeagent.stores.devices", "stores"),
    ("models.nonce", "homeagent.models.device", "models"),
    ("engine.sqlite.engine", "homeagent", "public"),
    ("engine.sqlite.engine", "homeagent.engine.postgresql.connection", "engine"),
    ("engine.files.database_file", "homeagent.engine.driver_errors", "engine"),
    ("unit_of_work", "homeagent.group_commit", "layers"),
    ("stores.nonces", "sqlite3", "drivers"),
    ("unit_of_work", "fastapi", "extras"),
)


def test_contracts_report_forbidden_imports(tmp_path: Path) -> None:
    """If forbidden imports and a module without a layer are added to the tree, each contract reports its imports."""
    package = tmp_path / "homeagent"
    shutil.copytree(ROOT / "homeagent", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (package / "helpers.py").touch()
    for module, imported, _ in FORBIDDEN_IMPORTS:
        with (package / f"{module.replace('.', '/')}.py").open("a", encoding="utf-8") as file:
            file.write(f"\nimport {imported}\n")
    # Use a separate process, because this process has imported the real package.
    program = "from importlinter.cli import lint_imports_command as lint; lint()"
    command = [sys.executable, "-c", program, "--config", "pyproject.toml", "--no-logo", "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    report = " ".join(done.stdout.split())
    # The last occurrence of a contract's name begins the list of its forbidden imports.
    names = {each["id"]: each["name"] for each in PYPROJECT["tool"]["importlinter"]["contracts"]}
    starts = sorted((report.rindex(name), contract) for contract, name in names.items())
    ends = [start for start, _ in starts[1:]] + [len(report)]
    lists = {contract: report[start:end] for (start, contract), end in zip(starts, ends, strict=True)}
    for module, imported, contract in FORBIDDEN_IMPORTS:
        assert f"- homeagent.{module} -> {imported} (l." in lists[contract]
    assert "not listed as layers: - homeagent.helpers" in lists["layers"]
