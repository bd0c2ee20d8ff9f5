"""`sparsecbm edits`: what would lose a file, or say something else than it means, is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mains import run_main
from tests.support.paths import REPOSITORY

LISTED = """
from sparsecbm_jax.commands.edits import _line
from sparsecbm_jax.intervention.stored_edit import StoredEdit
before = {"concepts": {"food": "\\x1b[2Ja"}}
edit = StoredEdit("food", "\\x1b[31mb\\n000000000000  food: a -> b", None, "", "signed", 1, {}, before=before)
print(_line(edit))
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--undo="], "--undo is empty; expected Id of an edit to undo"),
        (["--save="], "--save is empty; expected Folder"),
        (["--export=0a", "--to=./edits.log"], "--to=./edits.log is the log itself, which would be lost"),
        (["--export=0a"], "--export=ID and --to=FILE go together"),
    ],
)
def test_flags_that_would_lose_something_are_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "edits.log").write_text("a log")
    done = run_main("edits.py", "--model=model", "--log=edits.log", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}"), done.stderr
    assert (tmp_path / "edits.log").read_text() == "a log"


def test_a_listed_edit_is_one_line_without_control_characters() -> None:
    done = subprocess.run([sys.executable, "-c", LISTED], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and "\x1b" not in done.stdout and "food:" in done.stdout


def test_explanations_do_not_replace_their_texts(tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("The soup was cold.\n")
    given = ["--model=model", "--file=texts.txt", "--format=json", f"--output={texts}"]
    done = run_main("explain.py", *given, cwd=tmp_path)
    assert done.returncode == 2 and "is the file of the texts, which would be lost" in done.stderr, done.stderr
    assert texts.read_text() == "The soup was cold.\n"
