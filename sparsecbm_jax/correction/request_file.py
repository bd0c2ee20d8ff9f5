"""Corrections that people asked for, in a file: a JSON object with text, concept and target a line."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from sparsecbm_jax.intervention.edit_log import EditLog
from sparsecbm_jax.intervention.stored_edit import StoredEdit, text_hash
from sparsecbm_jax.runtime.json_files import append_json_line, read_json_lines

_EXPECTED = "a JSON object with the strings text, concept and target"


class CorrectionRequest(NamedTuple):
    """A correction by name: a text, a concept, and the class that it should have there."""

    text: str
    concept: str
    target: str


class RequestFile:
    """Corrections in a file, oldest first; one that was asked for twice stands there twice.

    Attributes:
        path: of the file, which need not be there yet.
        cases: what stands in it.
    """

    def __init__(self, path: str | Path) -> None:
        """Reads the file; a last line that a crash cut short is left out.

        Raises:
            ValueError: if another line is not an object with the three fields, all strings.
        """
        self.path = Path(path)
        self.cases: list[CorrectionRequest] = []
        for where, value in read_json_lines(self.path, _EXPECTED) if self.path.exists() else ():
            case = _case(value)
            if case is None:
                raise ValueError(f"{where}: expected {_EXPECTED}")
            self.cases.append(case)

    def add(self, case: CorrectionRequest) -> None:
        """Writes a correction, which is on disk then.

        Raises:
            OSError: if it cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_json_line(self.path, case._asdict(), is_synced=True)
        self.cases.append(case)

    def of_edits(self, edits: Iterable[StoredEdit]) -> list[CorrectionRequest]:
        """The corrections that edits were made for, in the order of the edits; those of which no text is here lack."""
        known = {_key(case): case for case in self.cases}
        return [known[key] for key in map(_asked, edits) if key in known]

    def standing(self, log: EditLog) -> list[CorrectionRequest]:
        """The corrections but for those that a log has undone."""
        undone = set(map(_asked, log.undone)) - set(map(_asked, log.edits))
        return [case for case in self.cases if _key(case) not in undone]


def _key(case: CorrectionRequest) -> tuple[str, str, str]:
    return text_hash(case.text), case.concept, case.target


def _asked(edit: StoredEdit) -> tuple[str, str, str]:
    return edit.text_sha256, edit.concept, edit.target


def _case(value: Any) -> CorrectionRequest | None:
    try:
        case = CorrectionRequest(**value)
    except TypeError:
        return None
    return case if all(isinstance(value, str) for value in case) else None
