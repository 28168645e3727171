"""Files and headings that the pages name are there, and each page is found from the index."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING")), *sorted(DOCS.glob("*.md"))]
CODE_ROOTS = (ROOT / "client/interpose", ROOT / "server/interpose_server", ROOT)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S)


def links(page: Path) -> list[tuple[str, str]]:
    """(file, heading) of each link that leads to no other site; "" is the page itself, or no heading."""
    found = re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", re.sub("`[^`]*`", "", prose(page)))
    return [(file, heading) for file, heading in found if file or heading]


@cache
def headings(page: Path) -> set[str]:
    """As GitHub makes them into the names of places."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_what_pages_name_is_there(page: Path) -> None:
    for name in re.findall(r"`([a-z_]+(?:/[a-z_]+)*(?:\.py|/))`", page.read_text("utf-8")):
        assert any((root / name).exists() for root in CODE_ROOTS), name
    for file, heading in links(page):
        there = page.parent / file if file else page
        assert there.exists(), file
        assert not heading or heading in headings(there), f"{file}#{heading}"


def test_every_page_is_found_from_the_index() -> None:
    found = {file for name in ("index", "migration") for file, _ in links(DOCS / f"{name}.md")}
    assert {page.name for page in DOCS.glob("*.md")} == {"index.md", *(file for file in found if "/" not in file)}


def test_the_readme_names_every_way_in() -> None:
    named = {file for file, _ in links(ROOT / "README.md")}
    assert {"docs/index.md", "docs/operating.md", "docs/settings.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= named
