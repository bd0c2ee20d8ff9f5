"""JSON files: what is read of them, what is left out, and what is said of those that are damaged."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from sparsecbm_jax.runtime.json_files import (
    append_json_line,
    append_line,
    read_json_lines,
    read_json_object,
    write_atomically,
    write_json,
)

RECORDS: list[dict[str, Any]] = [{"name": "soufflé", "step": 1}, {"name": "line\u2028separator", "step": 2}]


def values_of(path: Path, **settings: Any) -> list[Any]:
    return [value for _, value in read_json_lines(path, "records", **settings)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS), encoding="utf-8")
    return path


def test_a_line_that_was_cut_anywhere_is_left_out_and_replaced(path: Path) -> None:
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(len(whole) - first - 1):
        path.write_bytes(whole[: first + length])
        assert values_of(path) == RECORDS[:1], length
        append_json_line(path, RECORDS[1])
        assert values_of(path) == RECORDS, length
        assert path.read_bytes().count(b"\n") == 2


def test_a_last_line_without_its_line_break_counts(path: Path) -> None:
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    assert values_of(path) == RECORDS
    append_json_line(path, {"step": 3}, is_synced=True)
    assert values_of(path) == [*RECORDS, {"step": 3}]


def test_a_file_is_made_where_it_may_be(tmp_path: Path) -> None:
    append_json_line(tmp_path / "new.jsonl", {})
    assert values_of(tmp_path / "new.jsonl") == [{}]
    with pytest.raises(FileNotFoundError):
        append_line(tmp_path / "other.jsonl", b"{}\n", must_exist=True)
    assert [path.name for path in tmp_path.iterdir()] == ["new.jsonl"]


def test_a_line_that_cannot_be_written_leaves_nothing_behind(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, write = path.read_bytes(), os.write

    def full(file: int, data: bytes) -> int:
        write(file, bytes(data[:5]))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        append_json_line(path, {"step": 3})
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"step": ', r"records\.jsonl: line 1 is not JSON: Expecting value \(column 10\); expected records"),
        (b"", "line 1 is not JSON"),
        ("é".encode("latin1"), r"line 1 is not UTF-8 \(byte 0xe9 at column 1\); convert it.*; expected records"),
    ],
)
def test_a_damaged_line_before_the_last_is_named(path: Path, line: bytes, message: str) -> None:
    path.write_bytes(line + b"\n" + path.read_bytes())
    with pytest.raises(ValueError, match=message):
        values_of(path)


def test_a_file_of_a_persons_own_may_have_blank_lines_but_no_torn_one(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\n  \n")
    assert values_of(path, is_by_hand=True) == RECORDS
    path.write_bytes(path.read_bytes() + b'{"step": ')
    with pytest.raises(KeyError, match="line 5 is not JSON"):
        values_of(path, is_by_hand=True, error=KeyError)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "a.json does not exist; expected scores"),
        (b"[1]", "a.json holds a list, expected an object, scores"),
        (b'{\n"a": ', "a.json is not JSON: Expecting value: line 2"),
        (b'{\n"\xff": 1}', "a.json: line 2 is not UTF-8"),
    ],
)
def test_a_file_that_is_no_object_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        read_json_object(path, "scores")
    with pytest.raises(KeyError, match=message):
        read_json_object(path, "scores", error=KeyError)


def test_a_value_is_written_with_its_directory(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "a.json", {"a": [1.5, None]}, indent=1)
    assert (tmp_path / "new" / "a.json").read_text() == '{\n "a": [\n  1.5,\n  null\n ]\n}\n'
    assert read_json_object(tmp_path / "new" / "a.json", "scores") == {"a": [1.5, None]}


def test_only_files_are_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe is no file; expected one to write to"):
        write_atomically(tmp_path / "pipe", "a")
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "there").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there").read_text() == "new"


def test_json_that_is_too_deep_is_named(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"deep\.json is not JSON"):
        read_json_object(tmp_path / "deep.json", "scores")
