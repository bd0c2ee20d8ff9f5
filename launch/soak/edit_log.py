"""Kills writers of an edit log at random points, and checks that no acknowledged edit is ever lost.

bash launch/soak/run.sh                              # 200 kills
python launch/soak/edit_log.py --kills=20 --workdir=soak  # the logs stay

A writer appends and undoes edits, small ones and ones of 20 kilobytes, and reports each once the log has acknowledged
it. It gets SIGKILL at a random moment: while it opens the log, repairs it, writes, or waits for the disk. Then the log
must be readable, and hold the acknowledged entries in order and at most the one that was being written. The next writer
continues it. In the end the edits of every log are applied and undone, to the bit. Prints a line, or the lost entries
and ends with status 2. Takes some minutes; Linux or macOS.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import random
import select
import signal
import tempfile
import time
import traceback
import typing
from pathlib import Path

import numpy as np
from absl import flags

from sparsecbm_jax.cli import command_line

if typing.TYPE_CHECKING:
    from sparsecbm_jax.intervention.stored_edit import StoredEdit

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(command_line)
flags.DEFINE_integer("kills", 200, "Writers to kill.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Seed of the moments and of the edits.")
flags.DEFINE_string("workdir", None, "Folder for the logs; by default they are deleted.")

CONCEPTS = ("food", "service")
KERNEL = "layers/a/kernel"
SHAPE = (4, 384, 512)
NUM_EDITS = 36
SIZES = (3, 3, 40, 3, 3, 1000, 3, 3, 40, 3, 3, 10_000)
KILLS_A_LOG = 10
LONGEST = 0.8


def main() -> None:
    """Runs the command; see the docstring of this file."""
    from sparsecbm_jax.runtime.progress import progress

    with contextlib.ExitStack() as stack:
        folder = Path(FLAGS.workdir or stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        folder.mkdir(parents=True, exist_ok=True)
        bar = stack.enter_context(contextlib.closing(progress(description="soak", total=FLAGS.kills, unit="kill")))
        seen = soak(folder, FLAGS.kills, FLAGS.seed, on_kill=functools.partial(bar.update, 1))
    counts = ", ".join(f"{count} {what}" for what, count in seen.items())
    print(f"{FLAGS.kills} kills: nothing acknowledged was lost, every log was readable and replays ({counts})")


@functools.cache
def masks() -> dict[str, typing.Any]:
    """Makes two concepts' masks of one kernel."""
    return {KERNEL: np.random.default_rng(0).random((len(CONCEPTS), *SHAPE)) < 0.5}


@functools.cache
def edits() -> dict[str, StoredEdit]:
    """Makes edits of several sizes that change no weight twice, by id."""
    from sparsecbm_jax.intervention.stored_edit import Positions, StoredEdit, text_hash

    found = []
    for number in range(NUM_EDITS):
        k, window = number % 2, slice(*np.cumsum([0, *np.resize(SIZES, NUM_EDITS)])[number : number + 2])
        mask = masks()[KERNEL][k]
        positions = {KERNEL: Positions(SHAPE, np.flatnonzero(mask)[window], np.flatnonzero(~mask)[window])}
        found.append(StoredEdit(CONCEPTS[k], "Negative", None, text_hash(f"{number}"), "signed", 1, positions))
    return {edit.id: edit for edit in found}


def write(path: Path, seed: int, say: typing.Callable[[str], object]) -> None:
    """Appends and undoes edits for ever; reports '+id' or '-id' once each is acknowledged."""
    from sparsecbm_jax.intervention.edit_log import EditLog

    draw = random.Random(seed)
    with EditLog(path, masks(), CONCEPTS) as log:
        while True:
            edit = draw.choice(list(edits().values()))
            if edit not in log.edits:
                say(f"+{log.append(edit)}")
            elif draw.random() < 0.5:
                # The entry that `undo` writes; `undo` itself also needs masks, which this process does not have.
                log._write("undo", edit, {"id": edit.id})
                say(f"-{edit.id}")


def kill_one(path: Path, seed: int) -> list[str]:
    """Starts a writer and kills it at a random moment; returns its reports."""
    hears, says = os.pipe()
    # A forked child has all imports and starts at once; JAX has no threads yet, which a fork would lose.
    writer = os.fork()
    if not writer:
        try:
            write(path, seed, lambda word: os.write(says, f"{word}\n".encode()))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(says)
    until, heard, is_open = time.monotonic() + random.Random(seed).uniform(0, LONGEST), b"", True
    # The pipe is emptied continuously: a full one would stop the writer, and always at the same point.
    while is_open and (left := until - time.monotonic()) > 0:
        if select.select([hears], [], [], left)[0]:
            heard += (part := os.read(hears, 65536))
            is_open = bool(part)
    os.kill(writer, signal.SIGKILL)
    _, status = os.waitpid(writer, 0)
    if not os.WIFSIGNALED(status):
        raise ValueError(f"{path}: the writer of seed {seed} ended by itself; expected it to go on until it is killed")
    with os.fdopen(hears, "rb") as rest:
        return (heard + rest.read()).decode().split()


def check(path: Path, before: list[str], said: list[str]) -> list[str]:
    """Checks the log of a killed writer; returns the active ids, oldest first.

    Args:
        path: The log.
        before: Ids active when the writer started.
        said: The writer's reports.

    Raises:
        ValueError: The log is damaged, or holds other entries than were acknowledged.
    """
    from sparsecbm_jax.intervention.edit_log import EditLog

    acknowledged = list(before)
    for sign, edit_id in ((word[0], word[1:]) for word in said):
        acknowledged = [one for one in acknowledged if one != edit_id] + ([edit_id] if sign == "+" else [])
    found = [edit.id for edit in EditLog(path, masks(), CONCEPTS, is_read_only=True).edits]
    with EditLog(path, masks(), CONCEPTS) as log:
        mended = [edit.id for edit in log.edits]
    if found != mended or not follows(found, acknowledged):
        raise ValueError(f"{path}: active are {found}, {mended} once mended; acknowledged were {acknowledged}")
    return found


def follows(found: list[str], acknowledged: list[str]) -> bool:
    """Returns True where the log holds the acknowledged entries, or these and one more entry.

    >>> [follows(found, ["a", "b"]) for found in (["a", "b"], ["a", "b", "c"], ["b"], ["b", "a"], [])]
    [True, True, True, False, False]
    """
    without_one = [acknowledged[:i] + acknowledged[i + 1 :] for i in range(len(acknowledged))]
    return found == acknowledged or found[:-1] == acknowledged or found in without_one


def soak(
    folder: Path, kills: int, seed: int = 0, on_kill: typing.Callable[[], object] = lambda: None
) -> collections.Counter[str]:
    """Kills writers one after another; counts the entries and the kills.

    Args:
        folder: Folder of the logs.
        kills: Number of writers to kill.
        seed: Seed of the moments and of the edits.
        on_kill: Called after each kill.

    Raises:
        ValueError: As `check`; or a log does not replay.
    """
    from sparsecbm_jax.intervention.edit_log import EditLog

    edits()  # Made before the first fork, for all writers.
    seen = collections.Counter({"entries acknowledged": 0, "writers killed before any": 0, "entries torn": 0})
    logs = [folder / f"{first}.log" for first in range(0, kills, KILLS_A_LOG)]
    active: dict[Path, list[str]] = {path: [] for path in logs}
    for number in range(kills):
        path = logs[number // KILLS_A_LOG]
        said = kill_one(path, seed + number)
        if path.exists():
            torn = _num_torn(path)
            active[path] = check(path, active[path], said)
            seen["entries torn"] += _num_torn(path) > torn
        elif said:
            raise ValueError(f"{path}: does not exist, though {said} were acknowledged")
        seen["entries acknowledged"] += len(said)
        seen["writers killed before any"] += not said
        on_kill()
    # JAX starts here, after the last fork.
    for path in filter(Path.exists, logs):
        with EditLog(path, masks(), CONCEPTS) as log:
            changed = log.replay(masks())
            num_changed = int((np.asarray(changed[KERNEL]) != masks()[KERNEL]).sum())
            num_logged = sum(sum(edit.num_changed) for edit in log.edits)
            is_undone = bool((np.asarray(log.undo_all(changed)[KERNEL]) == masks()[KERNEL]).all())
        if num_changed != num_logged or not is_undone:
            raise ValueError(f"{path}: replayed, {num_changed} weights changed of {num_logged}; undone: {is_undone}")
    return seen


def _num_torn(path: Path) -> int:
    aside = path.with_name(f"{path.name}.torn")
    return aside.stat().st_size if aside.exists() else 0


if __name__ == "__main__":
    command_line.run(main, keeps_memory=False)
