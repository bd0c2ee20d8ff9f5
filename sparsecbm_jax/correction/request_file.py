"""Requests for corrections in a file: a JSON object with text, concept and target a line."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from sparsecbm_jax.intervention.edit_log import EditLog
from sparsecbm_jax.intervention.stored_edit import StoredEdit, text_hash
from sparsecbm_jax.runtime.json_files import append_json_line, read_json_lines

_EXPECTED = "a JSON object with the strings text, concept and target"


class CorrectionRequest(NamedTuple):
    """A correction by name.

    Attributes:
        text: The text.
        concept: Name of the concept.
        target: Name of the class that the concept should have there.
        label: Name of the task label that the text should have, too, for editors that read it; None for none.
    """

    text: str
    concept: str
    target: str
    label: str | None = None


class RequestFile:
    """Requests for corrections in a file, oldest first; one that was made twice is in the file twice.

    Attributes:
        path: Path of the file, which need not exist yet.
        requests: Requests in the file.
    """

    def __init__(self, path: str | Path) -> None:
        """Reads the file; a last line that a crash cut short is left out.

        Args:
            path: Path of the file, which need not exist yet.

        Raises:
            ValueError: Another line is not an object with the three fields, all strings.
        """
        self.path = Path(path)
        self.requests: list[CorrectionRequest] = []
        for where, value in read_json_lines(self.path, _EXPECTED) if self.path.exists() else ():
            request = _request(value)
            if request is None:
                raise ValueError(f"{where}: expected {_EXPECTED}")
            self.requests.append(request)

    def add(self, request: CorrectionRequest) -> None:
        """Appends a request and returns once it is on disk.

        Raises:
            OSError: It cannot be written.
        """
        written = {key: value for key, value in request._asdict().items() if value is not None}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_json_line(self.path, written, is_synced=True)
        self.requests.append(request)

    def of_edits(self, edits: Iterable[StoredEdit]) -> list[CorrectionRequest]:
        """Returns the requests that edits were made for, in their order, where the file has the text."""
        known = {_key(request): request for request in self.requests}
        return [known[key] for key in map(_asked, edits) if key in known]

    def standing(self, log: EditLog) -> list[CorrectionRequest]:
        """Returns the requests without those whose edits a log has undone."""
        undone = set(map(_asked, log.undone)) - set(map(_asked, log.edits))
        return [request for request in self.requests if _key(request) not in undone]


def _key(request: CorrectionRequest) -> tuple[str, str, str]:
    return text_hash(request.text), request.concept, request.target


def _asked(edit: StoredEdit) -> tuple[str, str, str]:
    return edit.text_sha256, edit.concept, edit.target


def _request(value: Any) -> CorrectionRequest | None:
    try:
        request = CorrectionRequest(**value)
    except TypeError:
        return None
    is_text = all(isinstance(value, str) for value in request[:3])
    return request if is_text and isinstance(request.label, str | None) else None
