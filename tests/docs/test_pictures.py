"""The pictures of the pages can be made again: docs/images/make.sh."""

from __future__ import annotations

import importlib.util
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sparsecbm_jax.model.saved_model import load

from tests.support.paths import REPOSITORY

pytest.importorskip("playwright", reason="playwright not here: pip install playwright")
pytest.importorskip("uvicorn", reason="uvicorn not here: pip install 'sparsecbm-jax[app]'")

pytestmark = pytest.mark.long

FOLDER = REPOSITORY / "docs" / "images"


def size_of(picture: Path) -> tuple[int, int]:
    """Width and height of a PNG."""
    return struct.unpack(">II", picture.read_bytes()[16:24])


def test_the_pictures_are_made(small_run: Path, browser: Any, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_pictures", FOLDER / "make_pictures.py")
    assert spec is not None and spec.loader is not None
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    made, pages = tmp_path / "made", tmp_path / "pages"
    made.mkdir()
    pages.mkdir()
    pictures.take_all(load(small_run / "model"), small_run, pictures.Camera(browser, made), pages)
    sizes = {path.stem: size_of(path) for path in made.glob("*.png")}
    assert set(sizes) == {"pathway", "correction", "live_page", "report"}
    for name, (width, height) in sizes.items():
        assert (width == pictures.WIDTH or name == "report") and 300 < height < 1600, f"{name}: {width} × {height}"


def test_the_script_says_what_it_needs() -> None:
    script = FOLDER / "make.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 2 and "MODEL is not set" in done.stderr
