"""README.md and the pages of docs/: their examples run, their commands could be given, their links lead somewhere.

The guides' examples have files of their own, so that several workers share them.
A block that runs too long for a test, or needs a network, stands below a line '<!-- not run: REASON -->'.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.support import pages
from tests.support.command_check import CommandCheck
from tests.support.page_run import PageRun
from tests.support.pages import README, Block
from tests.support.paths import REPOSITORY
from tests.support.shell import Shell

pytestmark = pytest.mark.long

PAGES = pages.pages()
BLOCKS = [block for page in PAGES for block in pages.blocks(page)]
MAX_README_LINES = 150
FIRST_PYTHON_BEFORE = 60
_FILE = re.compile(r"\b(?:launch|configs)/[\w./-]*\w\.(?:py|sh)\b")


@pytest.mark.parametrize("page", pages.in_group("others"), ids=pages.name_of)
def test_blocks_run(page: Path, page_run: Callable[[Path], PageRun]) -> None:
    page_run(page).run()


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_blocks_say_what_they_are(block: Block) -> None:
    assert block.language in pages.LANGUAGES, f"{block.place}: the block has the language {block.language!r}"
    assert block.not_run != "", f"{block.place}: it does not say why the block is not run"
    assert block.not_run is None or block.language in pages.EXECUTED, f"{block.place}: such a block is never run"
    if block.language == "python":
        compile(block.code, block.place, "exec", dont_inherit=True)


@pytest.fixture(scope="module")
def check(shell: Shell) -> CommandCheck:
    return CommandCheck(shell)


@pytest.mark.parametrize("page", PAGES, ids=pages.name_of)
def test_commands_that_are_not_run_could_be(page: Path, check: CommandCheck) -> None:
    not_run = [one for one in pages.blocks(page) if one.language in pages.SHELLS and one.not_run is not None]
    assert [
        f"{block.place}: {problem}"
        for block in not_run
        for command in pages.commands(block.code)
        for problem in check.problems(command)
    ] == []


def test_commands_are_checked(check: CommandCheck) -> None:
    """A check that found nothing wrong with anything would be none."""

    def problems(command: str) -> list[str]:
        (words,) = pages.commands(command)
        return list(check.problems(words))

    assert problems("python launch/explain.py --model=M --format=json") == []
    assert problems("python launch/nothing.py --model=M") == ["there is no launch/nothing.py"]
    assert problems("bash launch/nothing.sh") == ["there is no launch/nothing.sh"]
    assert problems("python launch/train.py --workdr=W") == ["python launch/train.py has no --workdr"]
    assert problems("A=1 python launch/train.py --config=configs/cebab.py:bert --config.data.path=D") == []
    (problem,) = problems("python launch/train.py --config.data.pth=D")
    assert problem == "there is no setting config.data.pth"
    (problem,) = problems("python launch/train.py --config=configs/cebab.py:brt")
    assert "brt" in problem
    assert problems("python launch/train.py --config=configs/nothing.py") == ["there is no configs/nothing.py"]


@pytest.mark.parametrize(
    "page",
    [README, *(page for page in sorted(pages.DOCS.rglob("*.md")) if page.name != "changelog.md")],
    ids=pages.name_of,
)
def test_files_that_pages_name_exist(page: Path) -> None:
    """In prose and in blocks, of results of past runs, too; the changelog names what was renamed."""
    named = {name for name in _FILE.findall(page.read_text(encoding="utf-8")) if not Path(name).stem.isupper()}
    assert sorted(name for name in named if not (REPOSITORY / name).is_file()) == []


def test_pages_that_code_names_exist() -> None:
    named = [
        (path.relative_to(REPOSITORY), page)
        for folder in ("configs", "launch", "sparsecbm_jax")
        for path in sorted((REPOSITORY / folder).rglob("*"))
        if path.suffix in (".py", ".sh")
        for page in re.findall(r"\bdocs/[\w/]+\.\w+|\b[A-Z]+\.md\b", path.read_text(encoding="utf-8"))
    ]
    assert [(path, page) for path, page in named if not (REPOSITORY / page).is_file()] == []
    assert len(named) > 5


def test_links_of_the_readme_lead_somewhere() -> None:
    """Those of the other pages are checked by MkDocs."""
    dead, found = [], list(pages.links(README))
    for link in found:
        if re.match(r"[a-z]+:", link.target):
            continue
        path, _, anchor = unquote(link.target).partition("#")
        target = REPOSITORY / path if path else README
        if not target.exists():
            dead.append(f"README.md:{link.line}: there is no {path}")
        elif anchor and (target.suffix != ".md" or anchor not in pages.anchors(target)):
            dead.append(f"README.md:{link.line}: {pages.name_of(target)} has no {anchor}")
    assert dead == []
    assert len(found) > 3


def test_the_readme_is_short_and_begins_with_python() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES
    first = next(block for block in pages.blocks(README) if block.language == "python")
    assert first.line - 1 < FIRST_PYTHON_BEFORE
