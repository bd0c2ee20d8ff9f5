"""Results of a long run as lines of JSON, so that it goes on where it was stopped; sweeps and suites use it."""

from __future__ import annotations

import json
import typing
from pathlib import Path

from sparsecbm_jax.runtime.json_files import append_json_line, read_json_lines


def read_results(path: Path) -> list[dict[str, typing.Any]]:
    """What was found before: the lines of a file that `append_json_line` wrote; none where there is no file."""
    return [value for _, value in read_json_lines(path, "a result of an earlier start")] if path.exists() else []


class Results:
    """Values by key, both JSON, in a file; a key's value is computed once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found = {json.dumps(line["key"]): line["value"] for line in read_results(path)}

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
            append_json_line(self._path, {"key": list(key), "value": self._found[name]})
        return self._found[name]

    def __contains__(self, key: typing.Sequence[typing.Any]) -> bool:
        return json.dumps(list(key)) in self._found

    def __getitem__(self, key: typing.Sequence[typing.Any]) -> typing.Any:
        return self._found[json.dumps(list(key))]
