"""JSON files that people and runs write: read with errors that name the place, written whole or not at all.

A file of JSON lines grows while a process runs. A *torn* last line lacks its line break and is not JSON: the process
was killed, or the disk was full, while it appended the line. Nobody was told that it was written, so readers leave it
out and the next append replaces it. A last line that is JSON counts without its line break: somebody wrote it by hand,
since no part of a JSON object is JSON. Any other line that is not JSON is damage, and an error.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Writes a file so that a reader finds the old content or the new, never a part.

    Args:
        path: The file; its directory must exist. Where it is a link, what it leads to is written.
        content: Text (written as UTF-8) or bytes.

    Raises:
        OSError: It cannot be written, or is no file but a device or a folder.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no file; expected one to write to, or a new name")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any, *, indent: int = 2) -> None:
    """Write a value to a file as indented JSON, whole or not at all.

    Args:
        path: the file; its directory is made where it is not there.
        value: of JSON types.
        indent: spaces of each level.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(value, indent=indent) + "\n")


def append_line(path: Path, line: bytes, *, is_synced: bool = False, must_exist: bool = False) -> None:
    """Append a line to a file, in place of a torn last line; where that fails, the file is left without it.

    Args:
        path: the file; its directory must exist.
        line: with its line break.
        is_synced: return once the line has reached the disk.
        must_exist: never make the file.

    Raises:
        OSError: the line cannot be written.
    """
    file = os.open(path, os.O_WRONLY | os.O_APPEND | (0 if must_exist else os.O_CREAT), 0o666)
    try:
        size = os.fstat(file).st_size
        last = _without_line_break(path, size)
        if last and _is_json(last):
            line = b"\n" + line
        elif last:
            size -= len(last)
            os.ftruncate(file, size)
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(file, rest) :]
            if is_synced:
                os.fsync(file)
        except OSError:
            # The caller is told that it is not there, so no reader may find it once the disk has space again.
            with contextlib.suppress(OSError):
                os.ftruncate(file, size)
            raise
    finally:
        os.close(file)


def append_json_line(path: Path, value: Any, *, is_synced: bool = False) -> None:
    """Append a value to a file of JSON lines; see `append_line`."""
    append_line(path, json.dumps(value).encode() + b"\n", is_synced=is_synced)


def read_json(path: Path, written_by: str, *, error: type[Exception] | None = None) -> Any:
    """Read the content of a file.

    Args:
        path: the file.
        written_by: what should be there, for errors.
        error: raised in place of those below.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON in UTF-8; names the line.
    """
    text = read_text(path, written_by, error=error)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise (error or ValueError)(f"{path} is not JSON: {cause}; expected {written_by}") from cause


def read_json_object(path: Path, written_by: str, *, error: type[Exception] | None = None) -> dict[str, Any]:
    """Read a file that holds one JSON object; arguments and errors as for `read_json`."""
    content = read_json(path, written_by, error=error)
    if not isinstance(content, dict):
        raise (error or ValueError)(f"{path} holds a {type(content).__name__}, expected an object, {written_by}")
    return content


def read_json_lines(
    path: Path, written_by: str, *, is_by_hand: bool = False, error: type[Exception] | None = None
) -> Iterator[tuple[str, Any]]:
    """Read the lines of a file, each with its place for errors; a torn last line is left out.

    Args:
        path: the file.
        written_by: what should be there, for errors.
        is_by_hand: a person wrote the file: blank lines are passed over, and a last line that is not JSON is an error.
        error: raised in place of those below.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not JSON in UTF-8; names it.
    """
    # Not splitlines(): a JSON string may hold other line breaks, such as U+2028, as they are.
    *lines, last = _read_bytes(path, written_by, error).split(b"\n")
    if last and (is_by_hand or _is_json(last)):
        lines.append(last)
    for number, line in enumerate(lines, 1):
        if is_by_hand and not line.strip():
            continue
        where, text = f"{path}: line {number}", _decode(path, line, written_by, error, first_line=number)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as cause:
            # A line of its own has no other line to name.
            why = f"{cause.msg} (column {cause.colno})" if isinstance(cause, json.JSONDecodeError) else cause
            raise (error or ValueError)(f"{where} is not JSON: {why}; expected {written_by}") from cause
        yield where, value


def read_text(path: Path, written_by: str, *, error: type[Exception] | None = None) -> str:
    """Read a text in UTF-8, without a byte-order mark; arguments and errors as for `read_json`."""
    return _decode(path, _read_bytes(path, written_by, error), written_by, error)


def _read_bytes(path: Path, written_by: str, error: type[Exception] | None) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as cause:
        raise (error or FileNotFoundError)(f"{path} does not exist; expected {written_by}") from cause
    except OSError as cause:
        if error is None:
            raise
        raise error(f"{path} cannot be read: {cause}; expected {written_by}") from cause


def _decode(path: Path, content: bytes, written_by: str, error: type[Exception] | None, first_line: int = 1) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        before = content[: cause.start]
        line, column = first_line + before.count(b"\n"), cause.start - before.rfind(b"\n")
        raise (error or ValueError)(
            f"{path}: line {line} is not UTF-8 (byte 0x{content[cause.start]:02x} at column {column}); convert it, for "
            f"example: iconv -f latin1 -t utf-8 {path.name}; expected {written_by}"
        ) from cause


def _without_line_break(path: Path, size: int) -> bytes:
    """Return what follows the last line break of a file; mostly nothing, which its last byte tells."""
    with path.open("rb") as file:
        file.seek(max(size - 1, 0))
        if file.read(1) == b"\n":
            return b""
        file.seek(0)
        return file.read().rpartition(b"\n")[2]


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line.decode("utf-8-sig"))
    except ValueError:
        return False
    return True
