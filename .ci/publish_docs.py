"""Add the built documentation of a release to the folder of all releases.

Usage: `python .ci/publish_docs.py SITE FOLDER VERSION`. The site goes to FOLDER/VERSION. The file versions.json lists
the releases, newest first, and the site's menu of versions reads that list. The page index.html leads to the newest
release.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

INDEX = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>homeagent</title>
<meta http-equiv="refresh" content="0; url={version}/">
<p><a href="{version}/">The documentation of homeagent {version}</a>
"""


def order(version: str) -> tuple[list[int], bool, str]:
    """Return the sort key of a version: a pre-release such as 1.0rc1 comes before 1.0."""
    number = re.match(r"[0-9.]+", version)
    if number is None:
        raise SystemExit(f"{version} is not a version: it must begin with a digit")
    rest = version[number.end() :]
    return [int(part) for part in number[0].split(".") if part], not rest, rest


def publish(site: Path, folder: Path, version: str) -> None:
    """Replace the release's folder, then write the list of releases and the first page."""
    order(version)
    shutil.rmtree(folder / version, ignore_errors=True)
    shutil.copytree(site, folder / version)
    found = sorted((path.parent.name for path in folder.glob("*/objects.inv")), key=order, reverse=True)
    newest = next((each for each in found if order(each)[1]), found[0])
    versions = [{"version": each, "title": each, "aliases": ["latest"] * (each == newest)} for each in found]
    (folder / "versions.json").write_text(json.dumps(versions, indent=1) + "\n", encoding="utf-8")
    (folder / "index.html").write_text(INDEX.format(version=newest), encoding="utf-8")
    (folder / ".nojekyll").touch()


if __name__ == "__main__":
    publish(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
