"""Hooks of MkDocs: what the pages need beyond Markdown.

Links of notebooks lead to pages: a notebook names other pages by their files, as Markdown does, so that its links also
work in a checkout, and MkDocs replaces such links in Markdown only. A picture leads to its file, where it is larger.
Short flags do not break after their dashes, and names of modules break after their dots. Pages of wide tables have no
table of contents beside them.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

_LINK = re.compile(r'href="(?![a-z]+:)([^"#]+\.(?:md|ipynb))(#[^"]*)?"')
_PICTURE = re.compile(r'<img [^>]*?src="([^"]+\.png)"[^>]*>')
_FLAG = re.compile(r"<code>(--?[^<\s]{1,24})</code>")
_MODULE = re.compile(r'(?<=<span class="doc doc-object-name doc-module-name">)[\w.]+(?=</span>)')
_WIDE = ("results/", "guides/scale.md")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Hides the table of contents of a page of wide tables.

    Args:
        markdown: The page's text.
        page: The page of MkDocs.

    Returns:
        The text as it is.
    """
    if page.file.src_uri.startswith(_WIDE):
        page.meta["hide"] = ["toc"]
    return markdown


def on_page_content(html: str, page: Any, files: Any, **_: Any) -> str:
    """Rewrites links of notebooks, pictures, flags and names of modules.

    Args:
        html: The page's content.
        page: The page of MkDocs.
        files: All files of the site.

    Returns:
        The content; a notebook's link to a file that is no page stays.
    """
    html = _FLAG.sub(r'<code class="flag">\1</code>', html)
    html = _MODULE.sub(lambda name: name[0].replace(".", ".<wbr>"), html)
    if not page.file.src_uri.endswith(".ipynb"):
        return _PICTURE.sub(r'<a href="\1">\g<0></a>', html)

    def address(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), match[1]))
        target = files.get_file_from_path(path)
        return match[0] if target is None else f'href="{target.url_relative_to(page.file)}{match[2] or ""}"'

    return _LINK.sub(address, html)
