"""Links inside the documents lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.sources import shown, text_files

LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.*?) *#*$", re.MULTILINE)
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
ELSEWHERE = ("http://", "https://", "mailto:")


def anchors(text: str) -> set[str]:
    """What a heading is called in a link: lower case, hyphens, no punctuation."""
    names: set[str] = set()
    for heading in HEADING.findall(FENCE.sub("", text)):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = sum(
            1 for name in names if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", name)
        )
        names.add(f"{slug}-{number}" if number else slug)
    return names


def broken(path: Path, text: str) -> list[str]:
    """The links of one document that lead nowhere."""
    found = []
    for match in LINK.finditer(FENCE.sub("", text)):
        link = match[1] or match[2]
        if link.startswith(ELSEWHERE):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name) if name else path
        if not target.exists() or not _has_anchor(target, anchor):
            found.append(link)
    return found


def _has_anchor(target: Path, anchor: str) -> bool:
    if not anchor or target.suffix != ".md":
        return True
    return anchor in anchors(target.read_text())


def test_links_between_documents_resolve() -> None:
    documents = [(path, text) for path, text in text_files() if path.suffix == ".md"]
    assert documents
    found = {shown(path): broken(path, text) for path, text in documents}
    assert {name: links for name, links in found.items() if links} == {}


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One two\n\n[a](#one-two) [b](#two) [c](gone.md)\n")
    assert broken(page, page.read_text()) == ["#two", "gone.md"]
