"""The examples of guides that correct a model run: by themselves, since they take as long as all others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import pages
from tests.support.page_run import PageRun

pytestmark = pytest.mark.long


@pytest.mark.parametrize("page", pages.in_group("corrections"), ids=pages.name_of)
def test_blocks_run(page: Path, page_run: Callable[[Path], PageRun]) -> None:
    page_run(page).run()
