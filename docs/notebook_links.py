"""A hook of MkDocs: links of notebooks lead to pages.

A notebook names other pages by their files, as Markdown does, so that its links also work in a checkout. MkDocs
replaces such links in Markdown only.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

_LINK = re.compile(r'href="(?![a-z]+:)([^"#]+\.(?:md|ipynb))(#[^"]*)?"')


def on_page_content(html: str, page: Any, files: Any, **_: Any) -> str:
    """Replaces the files that a notebook's links name by the addresses of their pages.

    Args:
        html: The page's content.
        page: The page of MkDocs.
        files: All files of the site.

    Returns:
        The content with these links replaced; a link to a file that is no page stays.
    """
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def address(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), match[1]))
        target = files.get_file_from_path(path)
        return match[0] if target is None else f'href="{target.url_relative_to(page.file)}{match[2] or ""}"'

    return _LINK.sub(address, html)
