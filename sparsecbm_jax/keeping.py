"""Corrections that stay in force: the file that their texts stand in, and what each new one takes.

An edit log has no texts, and a lasting edit answers for all of them (`lasting`): so they are kept beside it, a JSON
object with text, concept and target a line.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from sparsecbm_jax.artifact import SparseCBM
from sparsecbm_jax.correction import CorrectionReport, correct_lastingly, name_index, remember
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.edit_log import EditLog
from sparsecbm_jax.edits import StoredEdit, text_hash
from sparsecbm_jax.guards import fisher_guard, steep
from sparsecbm_jax.intervention import Guard, check_masks
from sparsecbm_jax.lasting import Replay


class Case(NamedTuple):
    """A correction by name: a text, a concept, and the class that it should have there."""

    text: str
    concept: str
    target: str


class CaseFile:
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
        self.cases: list[Case] = []
        data = self.path.read_bytes() if self.path.exists() else b""
        *lines, last = data.split(b"\n")
        is_whole = _is_json(last)
        for number, line in enumerate([*lines, last] if is_whole else lines, 1):
            case = _case(line)
            if case is None:
                raise ValueError(
                    f"{self.path}, line {number}: expected a JSON object with the strings text, concept and target"
                )
            self.cases.append(case)
        # A last line may lack its end since someone wrote it so, or since it is torn.
        self._end, self._prefix = (len(data), b"\n") if is_whole else (len(data) - len(last), b"")

    def add(self, case: Case) -> None:
        """Writes a correction, which is on disk then.

        Raises:
            OSError: if it cannot be written.
        """
        line = self._prefix + json.dumps(case._asdict()).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "r+b" if self.path.exists() else "xb") as file:
            file.truncate(self._end)
            file.seek(self._end)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._end, self._prefix = self._end + len(line), b""
        self.cases.append(case)

    def of_edits(self, edits: Iterable[StoredEdit]) -> list[Case]:
        """The corrections that edits were made for, in the order of the edits; those of which no text is here lack."""
        known = {_key(case): case for case in self.cases}
        return [known[key] for key in map(_asked, edits) if key in known]

    def standing(self, log: EditLog) -> list[Case]:
        """The corrections but for those that a log has undone."""
        undone = set(map(_asked, log.undone)) - set(map(_asked, log.edits))
        return [case for case in self.cases if _key(case) not in undone]


def _key(case: Case) -> tuple[str, str, str]:
    return text_hash(case.text), case.concept, case.target


def _asked(edit: StoredEdit) -> tuple[str, str, str]:
    return edit.text_sha256, edit.concept, edit.target


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _case(line: bytes) -> Case | None:
    try:
        case = Case(**json.loads(line))
    except (ValueError, TypeError):
        return None
    return case if all(isinstance(value, str) for value in case) else None


class Keeper:
    """Makes one lasting correction after another, each with those before it in view; see `correct_lastingly`.

    What weights cost, and how anchors are read, is found out when a concept is first corrected. The same questions, in
    any order, get the same edits.

    Args:
        original: the model before any correction.
        anchors: training texts with their gold concepts, which are to be read as they are.
        on_gradient: called for each of the anchors' batches, once for each concept that is corrected.

    Raises:
        ValueError: if the model has no masks, or there are no anchors.
    """

    def __init__(
        self, original: SparseCBM, anchors: Sequence[Batch], *, on_gradient: Callable[[], object] = lambda: None
    ) -> None:
        check_masks(original.masks)
        self._original, self._anchors, self._on_gradient = original, list(anchors), on_gradient
        self._replay = Replay(self._anchors)
        self._guards: dict[int, Guard] = {}

    def correct(self, model: SparseCBM, case: Case, earlier: Iterable[Case]) -> tuple[SparseCBM, CorrectionReport]:
        """Makes a correction.

        Args:
            model: the original with the edits so far.
            case: what is asked for.
            earlier: corrections to be kept in force.

        Raises:
            ValueError: as `correct_lastingly`.
        """
        replay = self._replay.emptied()
        for one in earlier:
            remember(model, *one, replay)
        guard = self._guard(name_index("concept", case.concept, model.schema.concepts))
        return correct_lastingly(model, *case, replay, original=self._original, guard=guard)

    def _guard(self, concept: int) -> Guard:
        if concept not in self._guards:
            model = self._original
            assert model.masks is not None
            arrays = (model.config, model.params, model.masks, model.heads)
            self._guards[concept] = steep(fisher_guard(*arrays, self._anchors, concept, on_gradient=self._on_gradient))
        return self._guards[concept]
