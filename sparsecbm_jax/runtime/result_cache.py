"""Results of a long run as lines of JSON, so that it goes on where it was stopped; sweeps and suites use it."""

from __future__ import annotations

import json
import typing
from pathlib import Path


def read_lines(path: Path) -> list[dict[str, typing.Any]]:
    """Reads the earlier results; an incomplete last line is removed from the file."""
    from sparsecbm_jax.runtime.json_files import write_atomically

    if not path.is_file():
        return []
    whole, _, torn = path.read_text(encoding="utf-8").rpartition("\n")
    if torn:
        write_atomically(path, f"{whole}\n" if whole else "")
    return [json.loads(line) for line in whole.split("\n") if line]


def append_line(path: Path, record: typing.Mapping[str, typing.Any]) -> None:
    """Adds a result to the file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


class Results:
    """Values by key, both JSON, in a file; a key's value is computed once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found = {json.dumps(line["key"]): line["value"] for line in read_lines(path)}

    def once(self, key: typing.Sequence[typing.Any], make: typing.Callable[[], typing.Any]) -> typing.Any:
        """Returns the value of a key; computes and stores it where it is absent.

        Args:
            key: All that the value depends on, in a fixed order.
            make: Computes the value, which must be JSON.
        """
        name = json.dumps(list(key))
        if name not in self._found:
            # Through JSON, so that a value is the same whether it was computed now or before.
            self._found[name] = json.loads(json.dumps(make()))
            append_line(self._path, {"key": list(key), "value": self._found[name]})
        return self._found[name]

    def __contains__(self, key: typing.Sequence[typing.Any]) -> bool:
        return json.dumps(list(key)) in self._found

    def __getitem__(self, key: typing.Sequence[typing.Any]) -> typing.Any:
        return self._found[json.dumps(list(key))]
