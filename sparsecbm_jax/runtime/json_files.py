"""JSON files that people and runs write: errors name the place; a file is written whole or not at all."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Writes a file so that a reader finds the old content or the new, never a part.

    Args:
        path: The file; its directory must exist.
        content: Text (written as UTF-8) or bytes.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Path, written_by: str) -> Any:
    """Reads a JSON file.

    Args:
        path: The file.
        written_by: Description of the expected file, for errors.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not JSON in UTF-8; the line is named.
    """
    try:
        return json.loads(_text(path, written_by))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}; expected {written_by}") from error


def read_json_lines(path: Path, written_by: str) -> Iterator[tuple[str, Any]]:
    """Reads a file of JSON lines; a last line that is still being written is skipped.

    Args:
        path: The file.
        written_by: Description of the expected file, for errors.

    Yields:
        Each line's place, for errors, and its value.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is not JSON in UTF-8; the line is named.
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
