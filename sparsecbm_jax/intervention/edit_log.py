"""A log of edits on disk: acknowledged edits are never lost, and an incomplete line is never taken for an entry.

The file is lines of a CRC-32 in eight hexadecimal digits, a space, and JSON. It only grows, and an entry counts once it
has reached the disk. The first line names the masks that the log belongs to. A last line that is not whole was never
acknowledged: it is moved to another file when the log is next opened for writing. A damaged line before the last is an
error, and the file is not changed.
"""

import json
import logging
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core.masks import Masks
from sparsecbm_jax.intervention.stored_edit import StoredEdit, apply_stored, overlapping, undo_stored
from sparsecbm_jax.runtime.json_files import append_line, write_atomically

FORMAT = "sparsecbm_jax edit log 1"

logger = logging.getLogger(__name__)


class EditLogError(ValueError):
    """A log that is damaged, or belongs to other masks."""


class Conflict(NamedTuple):
    """An entry of another log that was left out of a merge.

    Attributes:
        id: Id of the edit.
        kind: 'edit', or 'undo' of an edit that both logs had.
        with_ids: Edits of this log, or edits of the other that were left out before, that change the same weights.
        num_positions: Number of these weights.
    """

    id: str
    kind: str
    with_ids: tuple[str, ...]
    num_positions: int

    def __str__(self) -> str:
        return f"{self.kind} {self.id} meets {', '.join(self.with_ids)} at {self.num_positions} weights"


class EditLog:
    """The edits made to one model's masks, in order.

    `append` and `undo` return once the entry is on disk. One process writes at a time; `close`, or the end of a `with`,
    lets the next one write.
    """

    def __init__(self, path: str | Path, masks: Masks, concepts: Sequence[str], *, is_read_only: bool = False) -> None:
        """Opens a log, or makes it.

        Args:
            path: The file.
            masks: The model's masks without any of the log's edits.
            concepts: The model's concepts, in order.
            is_read_only: True to only read the file: it is not made, repaired or locked.

        Raises:
            EditLogError: The log is damaged before its last line, belongs to other masks, or another process writes it.
            FileNotFoundError: The file is to be read only and does not exist.
        """
        self.path, self._concepts = Path(path), tuple(concepts)
        self._entries: list[tuple[str, StoredEdit]] = []
        self._active: dict[str, StoredEdit] = {}
        self._lock: int | None = None
        self._is_read_only = is_read_only
        header = {"format": FORMAT, "masks": masks_lib.fingerprint(masks), "concepts": list(concepts)}
        if not is_read_only:
            self._lock = _locked(self.path)
        try:
            if self.path.exists() and not self.path.is_file():
                raise EditLogError(f"{self.path} is no file; expected a log of edits, or a new name")
            # After a power cut, a log without its first line holds no entry.
            if not is_read_only and (not self.path.exists() or _is_torn_header(self.path, header)):
                write_atomically(self.path, _line(header))
                _sync(self.path)
                _sync(self.path.parent)
            self._read(header)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "EditLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases the file, so that another process can write."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __len__(self) -> int:
        return len(self.edits)

    @property
    def edits(self) -> tuple[StoredEdit, ...]:
        """The active edits, oldest first."""
        return tuple(self._active.values())

    @property
    def undone(self) -> tuple[StoredEdit, ...]:
        """The edits that were made and are no longer active, in the order in which they were first made."""
        made = {edit.id: edit for _, edit in self._entries}
        return tuple(edit for name, edit in made.items() if name not in self._active)

    def get(self, edit_id: str) -> StoredEdit:
        """Returns an active edit.

        Raises:
            ValueError: There is none of that id; the active ones are listed.
        """
        if edit_id not in self._active:
            known = ", ".join(self._active) or "none"
            raise ValueError(f"{self.path}: there is no active edit {edit_id!r}; there are: {known}")
        return self._active[edit_id]

    def replay(self, masks: Masks) -> Masks:
        """Applies all active edits in order: the same bits on any mesh.

        Args:
            masks: The masks without any edit, as given when the log was opened.
        """
        for edit in self.edits:
            masks = apply_stored(masks, edit, self._concepts)
        return masks

    def append(self, edit: StoredEdit) -> str:
        """Writes an edit to disk and returns its id.

        Raises:
            ValueError: The edit is active already, or the model has no such concept.
        """
        if edit.concept not in self._concepts:
            raise ValueError(f"{self.path}: there is no concept {edit.concept!r}; expected one of {self._concepts}")
        if edit.id in self._active:
            raise ValueError(f"{self.path}: edit {edit.id} is active already")
        self._write("edit", edit, edit.to_dict())
        return edit.id

    def undo(self, masks: Masks, edit_id: str) -> Masks:
        """Undoes one edit at any place of the log, and writes an entry for it.

        Args:
            masks: The masks with all active edits applied.
            edit_id: Id of the edit.

        Returns:
            The masks without the edit.

        Raises:
            ValueError: No such edit is active, or later edits changed the same weights; they are named, and must be
                undone first.
        """
        edit = self.get(edit_id)
        later = self.edits[self.edits.index(edit) + 1 :]
        if met := overlapping(edit, later):
            raise ValueError(
                f"{self.path}: edit {edit_id} cannot be undone by itself: {', '.join(met)} changed {sum(met.values())} "
                "of its weights since; undo those first"
            )
        without = undo_stored(masks, edit, self._concepts)
        self._write("undo", edit, {"id": edit_id})
        return without

    def undo_all(self, masks: Masks) -> Masks:
        """Undoes all edits, the latest first, and writes an entry for each; returns the masks without them."""
        for edit in reversed(self.edits):
            masks = self.undo(masks, edit.id)
        return masks

    def merge(self, other: "EditLog") -> list[Conflict]:
        """Adds the entries that another log of the same masks has since the two were equal: its edits and its undos.

        An entry is left out if it changes weights that this log's own edits change, or those of an edit that was left
        out before.

        Args:
            other: The other log; it is only read.

        Returns:
            The entries that were left out, in order.
        """
        conflicts: list[Conflict] = []
        theirs = {edit.id for edit in other.edits}
        seen = {edit.id for kind, edit in other._entries if kind == "edit"}
        had = {edit.id for kind, edit in self._entries if kind == "edit"}
        own = [edit for edit in self.edits if edit.id not in seen]
        blocked = list(own)

        def meets(kind: str, edit: StoredEdit) -> bool:
            if met := overlapping(edit, blocked):
                conflicts.append(Conflict(edit.id, kind, tuple(met), sum(met.values())))
                blocked.append(edit)
            return bool(met)

        for edit in reversed(self.edits):
            if edit.id in seen - theirs and not meets("undo", edit):
                self._write("undo", edit, {"id": edit.id})
        for edit in other.edits:
            # An edit that this log undid is not added again.
            if edit.id not in had and not meets("edit", edit):
                self.append(edit)
        return conflicts

    def _write(self, kind: str, edit: StoredEdit, body: Mapping[str, Any]) -> None:
        if self._lock is None:
            raise EditLogError(f"{self.path}: the log is {'read only' if self._is_read_only else 'closed'}")
        append_line(self.path, _line({"kind": kind, kind: body}), is_synced=True, must_exist=True)
        self._note(kind, edit)

    def _note(self, kind: str, edit: StoredEdit) -> None:
        self._entries.append((kind, edit))
        if kind == "edit":
            self._active[edit.id] = edit
        else:
            del self._active[edit.id]

    def _read(self, header: Mapping[str, Any]) -> None:
        content = self.path.read_bytes()
        good = 0
        for number, (start, line) in enumerate(_lines(content), 1):
            body = _parse(line)
            if body is None:
                if start + len(line) < len(content):
                    raise EditLogError(
                        f"{self.path}: line {number} (byte {start}) is damaged, with entries after it; expected its "
                        "checksum to match. The file was left as it is; a copy or a backup may have that line whole"
                    )
                break
            where = f"{self.path}: line {number}"
            try:
                if number == 1:
                    self._check_header(body, header)
                else:
                    self._take(body, where)
            except (AttributeError, KeyError, TypeError) as error:
                raise EditLogError(f"{where} is no entry of a log of edits ({error!r})") from error
            good = start + len(line)
        if not good:
            raise EditLogError(f"{self.path}: the first line is not whole; expected a log of edits")
        if good < len(content):
            self._put_aside(content[good:], good)

    def _check_header(self, found: Mapping[str, Any], header: Mapping[str, Any]) -> None:
        for name, what in (("format", "format"), ("concepts", "concepts"), ("masks", "masks of fingerprint")):
            if found.get(name) != header[name]:
                raise EditLogError(f"{self.path}: the log is of {what} {found.get(name)!r}; expected {header[name]!r}")

    def _take(self, body: Mapping[str, Any], source: str) -> None:
        kind = body.get("kind")
        if kind == "edit":
            edit = StoredEdit.from_dict(body["edit"], source)
            if edit.id in self._active:
                raise EditLogError(f"{source}: edit {edit.id} is active already")
        elif kind == "undo":
            if body["undo"]["id"] not in self._active:
                raise EditLogError(f"{source}: undoes {body['undo']['id']!r}, which is not active")
            edit = self._active[body["undo"]["id"]]
        else:
            raise EditLogError(f"{source}: an entry of kind {kind!r}; expected 'edit' or 'undo'")
        self._note(kind, edit)

    def _put_aside(self, torn: bytes, good: int) -> None:
        aside = self.path.with_name(self.path.name + ".torn")
        if self._is_read_only:
            logger.warning("%s: the last %d bytes are no whole entry and are skipped", self.path, len(torn))
            return
        with aside.open("ab") as file:
            file.write(torn + b"\n")
            file.flush()
            os.fsync(file.fileno())
        with self.path.open("r+b") as log:
            log.truncate(good)
            os.fsync(log.fileno())
        logger.warning(
            "%s: the last %d bytes were no whole entry, never acknowledged; they are in %s now",
            self.path,
            len(torn),
            aside,
        )


def _line(body: Mapping[str, Any]) -> bytes:
    text = json.dumps(body, separators=(",", ":")).encode("ascii")
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    start = 0
    while start < len(content):
        end = content.find(b"\n", start) + 1 or len(content)
        yield start, content[start:end]
        start = end


def _parse(line: bytes) -> dict[str, Any] | None:
    """Returns the entry of a line, or None where the line is not whole."""
    digits, _, text = line.removesuffix(b"\n").partition(b" ")
    if not line.endswith(b"\n") or digits != b"%08x" % zlib.crc32(text):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_torn_header(path: Path, header: Mapping[str, Any]) -> bool:
    content, whole = path.read_bytes(), _line(header)
    return len(content) < len(whole) and whole.startswith(content)


def _locked(path: Path) -> int:
    """Locks a file next to the log, until the file is closed or the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows, where the user must allow one writer only.
        return os.open(os.devnull, os.O_RDONLY)
    lock = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise EditLogError(f"{path}: another process is writing to this log") from None
    return lock


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
