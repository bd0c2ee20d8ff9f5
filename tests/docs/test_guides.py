"""The guides' examples run; tests/docs/test_pages.py has everything else about them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import pages
from tests.support.page_run import PageRun

pytestmark = pytest.mark.long


@pytest.mark.parametrize("page", pages.in_group("guides"), ids=pages.name_of)
def test_blocks_run(page: Path, page_run: Callable[[Path], PageRun]) -> None:
    page_run(page).run()
