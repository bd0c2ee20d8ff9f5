"""What the pages of the documentation hold: code blocks, commands, links, headings."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support.paths import REPOSITORY

README = REPOSITORY / "README.md"
DOCS = REPOSITORY / "docs"
SHELLS = ("bash", "sh")
EXECUTED = ("python", "pycon", *SHELLS)
# A block has one of these languages, so that none is left out of the tests by the spelling of its language.
LANGUAGES = (*EXECUTED, "text", "json", "csv", "toml", "yaml", "html", "css", "mermaid", "bibtex")

_FENCE = re.compile(r"^(?P<indent>[ \t]*)(?P<fence>`{3,}|~{3,})[ \t]*(?P<language>[^\s`{]*)(?P<rest>[^`]*)$")
_MARKER = re.compile(r"^\s*<!--\s*not run:(?P<reason>.*?)-->\s*$")
_HEADING = re.compile(r"^#{1,6}\s+(?P<title>.*?)\s*#*$")
_LINK = re.compile(r"!?\[[^\[\]]*(?:\[[^\[\]]*\][^\[\]]*)*\]\(<?(?P<target>[^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")
_HTML_LINK = re.compile(r"<(?:a|img)\b[^>]*?\b(?:href|src)=\"(?P<target>[^\"]+)\"")
_ID = re.compile(r"\b(?:id|name)=\"(?P<id>[^\"]+)\"|\{\s*#(?P<attribute>[\w-]+)")


class Block(NamedTuple):
    """One fenced block of a page.

    Attributes:
        page: its file.
        line: number of the first line of code, from 1.
        language: what follows the opening fence.
        code: the code, without the indentation of the fence.
        num_lines: lines of code.
        not_run: the reason of '<!-- not run: REASON -->' on the line before the fence; None where there is none.
    """

    page: Path
    line: int
    language: str
    code: str
    num_lines: int
    not_run: str | None

    @property
    def place(self) -> str:
        """Page and line, as editors open them."""
        return f"{name_of(self.page)}:{self.line}"


class Link(NamedTuple):
    """A link of a page, with the number of its line."""

    target: str
    line: int


def name_of(page: Path) -> str:
    """The page's path in the checkout."""
    return page.relative_to(REPOSITORY).as_posix() if page.is_relative_to(REPOSITORY) else page.name


def pages() -> list[Path]:
    """README.md and the pages of docs/; those with results of past runs are left out."""
    found = sorted(path for path in DOCS.rglob("*.md") if "results" not in path.relative_to(DOCS).parts)
    return [README, *found]


def in_group(group: str) -> list[Path]:
    """The pages with blocks of 'corrections', of the other 'guides', or of 'others': parts that take about as long."""
    corrections = {DOCS / "guides" / f"{name}.md" for name in ("correct", "live_page", "evaluate")}

    def is_member(page: Path) -> bool:
        is_guide = page.parent == DOCS / "guides"
        return group == ("corrections" if page in corrections else "guides" if is_guide else "others")

    return [page for page in pages() if is_member(page) and blocks(page)]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order.

    Raises:
        ValueError: if a fence is not closed.
    """
    lines = page.read_text(encoding="utf-8").splitlines()
    found, reason, number = [], None, 0
    while number < len(lines):
        line = lines[number]
        number += 1
        opening = _FENCE.match(line)
        if not opening:
            marker = _MARKER.match(line)
            reason = marker["reason"].strip() if marker else None if line.strip() else reason
            continue
        start, closing = number, re.compile(rf"^[ \t]*{opening['fence'][0]}{{{len(opening['fence'])},}}[ \t]*$")
        while number < len(lines) and not closing.match(lines[number]):
            number += 1
        if number == len(lines):
            raise ValueError(f"{name_of(page)}:{start}: the block is not closed")
        code = textwrap.dedent("\n".join(lines[start:number])) + "\n"
        found.append(Block(page, start + 1, opening["language"], code, number - start, reason))
        reason, number = None, number + 1
    return found


def prose(page: Path) -> list[str]:
    """The lines of a page, those of blocks made empty."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for block in blocks(page):
        first, last = block.line - 2, block.line - 1 + block.num_lines  # the fences
        lines[first : last + 1] = [""] * (last + 1 - first)
    return lines


def links(page: Path) -> Iterator[Link]:
    """The links and images of a page, in Markdown and in HTML; a link's text may go over several lines."""
    text = "\n".join(re.sub(r"(`+).+?\1", "``", line) for line in prose(page))
    for pattern in (_LINK, _HTML_LINK):
        for match in pattern.finditer(text):
            yield Link(match["target"], text.count("\n", 0, match.end()) + 1)


def anchors(page: Path) -> set[str]:
    """What may follow '#' in a link to a page, as GitHub makes it from headings."""
    found: dict[str, int] = {}
    lines = prose(page)
    for heading in filter(None, map(_HEADING.match, lines)):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)|\{.*\}$", r"\1", heading["title"])
        slug = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    named = {match["id"] or match["attribute"] for match in _ID.finditer("\n".join(lines))}
    return named | {slug if n == 0 else f"{slug}-{n}" for slug, count in found.items() for n in range(count + 1)}


def commands(code: str) -> list[list[str]]:
    """The commands of a block of shell, each as its words, without redirections.

    >>> commands('A=1 python x.py --text="a b" | head  # c')
    [['python', 'x.py', '--text=a b'], ['head']]

    Raises:
        ValueError: if a quote is not closed.
    """
    found: list[list[str]] = [[]]
    pending = ""
    for line in code.replace("\\\n", " ").splitlines():
        pending += line
        lexer = shlex.shlex(pending, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:
            pending += "\n"
            continue
        pending, is_name = "", False
        for word in words:
            if set(word) <= set("();|&"):
                found.append([])
            elif set(word) <= set("<>"):
                is_name = True  # of a file
            elif is_name:
                is_name = False
            else:
                found[-1].append(word)
        found.append([])
    if pending:
        raise ValueError(f"a quote is not closed: {pending.strip()}")
    return [plain for words in found if (plain := _without_assignments(words))]


def _without_assignments(words: list[str]) -> list[str]:
    first = next((n for n, word in enumerate(words) if not re.match(r"[A-Za-z_]\w*=", word)), len(words))
    return words[first:]
