"""JSON files that people and runs write: read with errors that name the place, written whole or not at all."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a file so that a reader finds the old content or the new, never a part.

    Args:
        path: the file; its directory must exist.
        content: text (written as UTF-8) or bytes.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_json(path: Path, written_by: str) -> Any:
    """The content of a file.

    Args:
        path: the file.
        written_by: what would be there, for errors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON in UTF-8; names the line.
    """
    try:
        return json.loads(_text(path, written_by))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}; expected {written_by}") from error


def read_json_lines(path: Path, written_by: str) -> Iterator[tuple[str, Any]]:
    """The lines of a file, each with its place for errors; a last one that is still being written is passed over.

    Args:
        path: the file.
        written_by: what would be there, for errors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no JSON in UTF-8; names it.
    """
    for number, line in enumerate(_text(path, written_by).split("\n")[:-1], 1):
        where = f"{path}: line {number}"
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error}; expected {written_by}") from error


def _text(path: Path, written_by: str) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected {written_by}")
    content = path.read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}: line {line} is not UTF-8 (byte {error.start}); expected {written_by}") from error
