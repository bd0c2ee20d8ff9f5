"""The site that MkDocs builds: no warning, no dead link, no request to another server."""

from __future__ import annotations

import functools
import html.parser
import http.server
import importlib.util
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

from tests.support.paths import REPOSITORY

pytest.importorskip("mkdocs", reason="mkdocs not here: pip install 'sparsecbm-jax[docs]'")
pytest.importorskip("material", reason="mkdocs-material not here: pip install 'sparsecbm-jax[docs]'")
pytest.importorskip("mkdocstrings", reason="mkdocstrings not here: pip install 'sparsecbm-jax[docs]'")
pytest.importorskip("mkdocs_jupyter", reason="mkdocs-jupyter not here: pip install 'sparsecbm-jax[docs]'")

pytestmark = pytest.mark.long

# Attributes whose address a browser fetches by itself, and tags of which it fetches nothing until somebody follows it.
_FETCHED = ("src", "href", "poster", "data", "srcset")
_FOLLOWED = ("a", "area", "base", "form")
_URL = re.compile(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)")


def test_docstrings_are_made_readable() -> None:
    spec = importlib.util.spec_from_file_location("readable", REPOSITORY / "docs" / "readable_docstrings.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    shared = "Sums.\n\nArgs:\n    a, b: numbers,\n        both whole\n    c: another: one\n\nReference: Gauss."
    both = ": numbers,\n        both whole\n"
    apart = f"Sums.\n\nArgs:\n    a{both}    b{both}    c: another: one\n"
    assert made.readable(shared) == f"{apart}\n\n**Reference:** Gauss."
    called = "Runs.\n\nA=1 sparsecbm run\nsparsecbm run --x=1\n\nWith --x=1, or `sparsecbm run --y`."
    code = "```text\nA=1 sparsecbm run\nsparsecbm run --x=1\n```"
    assert made.command_help(called) == f"Runs.\n\n{code}\n\nWith `--x=1`, or `sparsecbm run --y`."


class Reference(NamedTuple):
    """An address in a page, and whether a browser fetches it by itself."""

    address: str
    is_fetched: bool


class Page(html.parser.HTMLParser):
    """What a page refers to, and what may be referred to in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[Reference] = []
        self.anchors = {"", "top"}
        self._relation = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        is_fetched = tag not in _FOLLOWED and values.get("rel") not in ("canonical", "prev", "next", "alternate")
        self.references += [Reference(values[name], is_fetched) for name in _FETCHED if name in values]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of the site, and what MkDocs said."""
    site = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=REPOSITORY,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return site, done.stdout + done.stderr


@pytest.fixture(scope="module")
def site(built: tuple[Path, str]) -> dict[Path, Page]:
    """The pages by their files."""
    return {path: Page(path.read_text(encoding="utf-8")) for path in sorted(built[0].rglob("*.html"))}


def test_it_is_built_without_a_warning(built: tuple[Path, str]) -> None:
    assert [line for line in built[1].splitlines() if re.match(r"\s*(WARNING|ERROR)", line)] == []


def test_every_page_of_docs_is_there(built: tuple[Path, str], site: dict[Path, Page]) -> None:
    for source in [*REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("docs/**/*.ipynb")]:
        name = source.relative_to(REPOSITORY / "docs").with_suffix("")
        page = name.with_suffix(".html") if name.name == "index" else name / "index.html"
        assert built[0] / page in site, f"{source} is in no page"


def test_every_module_has_its_place_in_the_reference() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in (REPOSITORY / "docs" / "api").glob("*.md"))
    shown = re.findall(r"^::: ([\w.]+)$", text, flags=re.MULTILINE)
    package = REPOSITORY / "sparsecbm_jax"
    modules = {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        for path in package.rglob("*.py")
        if path.parent != package and path.name != "__init__.py"
    }
    assert sorted(modules - set(shown)) == [], "not in docs/api/"
    assert sorted(set(shown) - modules) == [], "in docs/api/, but gone"
    assert len(shown) == len(set(shown))


def test_no_link_within_the_site_is_dead(built: tuple[Path, str], site: dict[Path, Page]) -> None:
    folder, dead, checked = built[0], [], 0
    for path, page in site.items():
        for address, _ in page.references:
            parts = urlsplit(address)
            # The page of errors names pages from the root, wherever it is served.
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            target = path.parent / unquote(parts.path) if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            target = Path(os.path.normpath(target))
            checked += 1
            is_there = target.is_file() and target.is_relative_to(folder)
            if is_there and target in site and parts.fragment and not parts.fragment.startswith("__"):
                is_there = unquote(parts.fragment) in site[target].anchors
            if not is_there:
                dead.append(f"{path.relative_to(folder)}: {address}")
    assert dead == []
    assert checked > 1000


def test_no_page_names_anything_to_fetch_elsewhere(built: tuple[Path, str], site: dict[Path, Page]) -> None:
    fetched = [(path, one.address) for path, page in site.items() for one in page.references if one.is_fetched]
    for path in built[0].rglob("*.css"):
        found = _URL.findall(path.read_text(encoding="utf-8"))
        fetched += [(path, one or other) for one, other in found]
    elsewhere = {address for _, address in fetched if urlsplit(address).scheme in ("http", "https")}
    assert sorted(elsewhere) == [] and len(fetched) > 100


@pytest.fixture(scope="module")
def address(built: tuple[Path, str]) -> Iterator[str]:
    """Of a server of the site."""
    handler = functools.partial(_QuietHandler, directory=str(built[0]))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.mark.parametrize("kind", ["api/pruning/", "glossary/", "tutorials/explain_a_decision/"])
def test_a_browser_asks_no_other_server(visit: Callable[[str], Any], address: str, kind: str) -> None:
    page = visit(address + kind)
    page.wait_for_load_state("networkidle")
    assert page.title() and [one for one in page.requests if not one.startswith((address, "data:", "about:"))] == []
    assert page.problems == []
