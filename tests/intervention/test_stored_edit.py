"""Edits at rest and their log: to the bit and back, small, and whole after a power cut at any byte."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from sparsecbm_jax.core.masks import Masks
from sparsecbm_jax.intervention.edit_log import EditLog, EditLogError, _line
from sparsecbm_jax.intervention.stored_edit import (
    Positions,
    StoredEdit,
    _encode,
    apply_stored,
    overlapping,
    text_hash,
    undo_stored,
)

from tests.support.paths import REPOSITORY

CONCEPTS = ("food", "service")
SHAPE = (2, 8, 8)
SEVEN = _encode(np.array([7]))


def random_masks(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Masks:
    rng = np.random.default_rng(seed)
    return {f"layers/{name}/kernel": jnp.asarray(rng.random((2, *shape)) < 0.4) for name in "ab"}


def some_edit(masks: Masks, first: int = 0, count: int = 3, concept: str = "food", **fields: Any) -> StoredEdit:
    """Drops and grows the `count` kept and pruned weights of one kernel from the `first` on."""
    mask = np.asarray(masks["layers/a/kernel"][CONCEPTS.index(concept)])
    window = slice(first, first + count)
    found = Positions(mask.shape, np.flatnonzero(mask)[window], np.flatnonzero(~mask)[window])
    given = {"target": "Negative", "label": None, "text_sha256": text_hash("Rude."), "saliency": "signed"}
    return StoredEdit(concept=concept, num_steps=1, positions={"layers/a/kernel": found}, **{**given, **fields})


def opened(path: Path, masks: Masks, **kwargs: Any) -> EditLog:
    return EditLog(path, masks, CONCEPTS, **kwargs)


@pytest.mark.parametrize("count", [0, 1, 20])
def test_a_stored_edit_goes_there_and_back(tmp_path: Path, count: int) -> None:
    masks = random_masks()
    edit = some_edit(masks, count=count, before={"label": "fine"})
    loaded = StoredEdit.load(edit.save(tmp_path / "edit.json"))
    assert loaded == edit
    assert loaded.to_dict() == edit.to_dict()
    assert loaded.num_changed == (count, count)
    changed = apply_stored(masks, loaded, CONCEPTS)
    assert sum(int(jnp.sum(changed[path] != masks[path])) for path in masks) == 2 * count
    chex.assert_trees_all_equal({p: m[1] for p, m in changed.items()}, {p: m[1] for p, m in masks.items()})
    chex.assert_trees_all_equal(undo_stored(changed, loaded, CONCEPTS), masks)


def test_one_percent_of_minilms_weights_is_a_small_file(tmp_path: Path) -> None:
    rng, shape = np.random.default_rng(0), (6, 384, 1536)
    size = int(np.prod(shape))
    # 10.6 million weights, as if all stood in one kernel and its like.
    chosen = np.sort(rng.permutation(size)[: round(0.01 * 10_616_832)])
    found = Positions(shape, chosen[::2], chosen[1::2])
    path = some_edit(random_masks()).save(tmp_path / "one.json")
    big = StoredEdit(**{**vars(StoredEdit.load(path)), "positions": {"layers/a/kernel": found}})
    assert big.save(path).stat().st_size < 500_000
    np.testing.assert_array_equal(StoredEdit.load(path).positions["layers/a/kernel"].grown, found.grown)


def test_an_edit_of_other_masks_is_refused() -> None:
    masks = random_masks()
    edit = some_edit(masks)
    changed = apply_stored(masks, edit, CONCEPTS)
    with pytest.raises(ValueError, match=rf"apply edit {edit.id} of food: 6 of its positions are in another state"):
        apply_stored(changed, edit, CONCEPTS)
    with pytest.raises(ValueError, match=rf"undo edit {edit.id} of food: 6 of its positions"):
        undo_stored(masks, edit, CONCEPTS)
    with pytest.raises(ValueError, match=r"layers/a/kernel has mask shape \(2, 4, 4\) but edit shape \(2, 8, 8\)"):
        apply_stored(random_masks(shape=(2, 4, 4)), edit, CONCEPTS)
    with pytest.raises(ValueError, match=r"no concept 'food' \(did you mean 'foods'\?\)"):
        apply_stored(masks, edit, ("foods", "service"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, r"edit\.json: format is 'other'"),
        ({"target": 3}, r"'target' is a int; expected str"),
        ({"label": 3}, r"'label' is a int; expected str or NoneType"),
        ({"positions": {"a": {"shape": [2]}}}, r"edit\.json: a lacks one of"),
        ({"positions": {"a": {"shape": [0], "dropped": "", "grown": ""}}}, r"a has shape \[0\]"),
        ({"positions": {"a": {"shape": [10**12, 10**12], "dropped": "", "grown": ""}}}, "expected at most"),
        ({"before": {"concepts": 5}}, r"'before' has no classes by concept"),
        ({"positions": {"a": {"shape": [2], "dropped": "%", "grown": ""}}}, r"the dropped positions do not decode"),
        ({"positions": {"a": {"shape": [2], "dropped": SEVEN, "grown": ""}}}, r"lie outside"),
        (
            {"positions": {"a": {"shape": [9]} | dict.fromkeys(("dropped", "grown"), _encode(np.array([7])))}},
            "1 pos",
        ),
        ({"positions": {"a": {"shape": [9], "dropped": _encode(np.arange(20)), "grown": ""}}}, "do not decode"),
        ({"positions": {"a": {"shape": [9], "dropped": _encode(np.array([3, 3])), "grown": ""}}}, "do not rise"),
    ],
)
def test_a_wrong_file_is_refused_by_what_is_wrong(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = some_edit(random_masks()).save(tmp_path / "edit.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        StoredEdit.load(path)
    path.write_bytes(b"\xff{")
    with pytest.raises(ValueError, match=r"edit\.json: line 1 is not UTF-8"):
        StoredEdit.load(path)


def test_a_log_replays_undoes_and_remembers(tmp_path: Path) -> None:
    masks = random_masks()
    first, second, third = some_edit(masks), some_edit(masks, 3), some_edit(masks, concept="service")
    with opened(tmp_path / "log", masks) as log:
        for edit in (first, second, third):
            assert log.append(edit) == edit.id
        all_three = log.replay(masks)
        with pytest.raises(ValueError, match=rf"edit {first.id} is active already"):
            log.append(first)
        with pytest.raises(EditLogError, match="another process is writing"):
            opened(tmp_path / "log", masks)
        without = log.undo(all_three, first.id)
    with opened(tmp_path / "log", masks) as log:
        assert log.edits == (second, third)
        chex.assert_trees_all_equal(log.replay(masks), without)
        with pytest.raises(
            ValueError, match=rf"there is no active edit '{first.id}'; there are: {second.id}, {third.id}"
        ):
            log.undo(without, first.id)
        chex.assert_trees_all_equal(log.undo_all(without), masks)
    reader = opened(tmp_path / "log", masks, is_read_only=True)
    assert not reader.edits
    with pytest.raises(EditLogError, match="the log is read only"):
        reader.append(first)
    with pytest.raises(EditLogError, match="the log is of masks of fingerprint"):
        opened(tmp_path / "log", random_masks(1))
    with pytest.raises(EditLogError, match=r"the log is of concepts \['food', 'service'\]"):
        EditLog(tmp_path / "log", masks, ("food", "noise"))
    with pytest.raises(FileNotFoundError):
        opened(tmp_path / "none", masks, is_read_only=True)


def test_an_edit_that_another_builds_on_is_not_undone_by_itself(tmp_path: Path) -> None:
    masks = random_masks()
    first = some_edit(masks)
    changed = apply_stored(masks, first, CONCEPTS)
    second = some_edit(changed, count=4)
    with opened(tmp_path / "log", masks) as log:
        log.append(first)
        log.append(second)
        both = log.replay(masks)
        shared = sum(overlapping(first, [second]).values())
        assert shared
        with pytest.raises(ValueError, match=rf"{second.id} changed {shared} of its weights since; undo those first"):
            log.undo(both, first.id)
        chex.assert_trees_all_equal(log.undo_all(both), masks)


def test_merging_takes_what_does_not_meet_and_names_what_does(tmp_path: Path) -> None:
    masks = random_masks()
    common, dropped_by_them = some_edit(masks), some_edit(masks, 3)
    ours, theirs = some_edit(masks, 6), some_edit(masks, concept="service")
    meeting = some_edit(masks, 7, target="Positive")
    building = some_edit(masks, 9, target="Positive", saliency="magnitude")
    with opened(tmp_path / "ours", masks) as log, opened(tmp_path / "theirs", masks) as other:
        for one, added in ((log, (common, dropped_by_them, ours)), (other, (common, dropped_by_them, theirs, meeting))):
            for edit in added:
                one.append(edit)
        other.undo(other.replay(masks), dropped_by_them.id)
        # It drops what `meeting` dropped and so could never stand beside it; here it only has to be told from it.
        other._note("edit", building)
        conflicts = log.merge(other)
        assert log.edits == (common, ours, theirs)
        assert [(c.id, c.kind, c.with_ids) for c in conflicts] == [
            (meeting.id, "edit", (ours.id,)),
            (building.id, "edit", (meeting.id,)),
        ]
        assert "at 4 weights" in str(conflicts[0])
        assert log.merge(other) == conflicts
        merged = log.replay(masks)
    chex.assert_trees_all_equal(opened(tmp_path / "ours", masks, is_read_only=True).replay(masks), merged)


def test_a_log_is_whole_after_a_cut_at_any_byte(tmp_path: Path) -> None:
    masks, path = random_masks(), tmp_path / "log"
    with opened(path, masks) as log:
        header = path.stat().st_size
        log.append(some_edit(masks))
        acknowledged = path.stat().st_size
        log.append(some_edit(masks, 3))
    whole = path.read_bytes()
    for size in (*range(0, header, 37), header - 1, *range(header, len(whole), 41), acknowledged, len(whole) - 1):
        path.write_bytes(whole[:size])
        (tmp_path / "log.torn").unlink(missing_ok=True)
        with opened(path, masks) as log:
            assert len(log) == (size >= acknowledged)
            log.append(some_edit(masks, 6))
        assert len(opened(path, masks, is_read_only=True)) == 1 + (size >= acknowledged)
        kept = size in (header, acknowledged) or size < header
        assert (tmp_path / "log.torn").exists() == (not kept)


def test_damage_before_the_end_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    masks, path = random_masks(), tmp_path / "log"
    with opened(path, masks) as log:
        log.append(some_edit(masks))
        log.append(some_edit(masks, 3))
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = b"".join([lines[0], lines[1].replace(b"food", b"foot"), lines[2]])
    path.write_bytes(damaged)
    with pytest.raises(EditLogError, match=rf"line 2 \(byte {len(lines[0])}\) is damaged, with entries after it"):
        opened(path, masks)
    assert path.read_bytes() == damaged
    for wrong in ({"kind": "undo", "undo": 5}, {"kind": "undo", "undo": {"id": [1]}}, {"kind": "edit"}, [1]):
        path.write_bytes(b"".join([lines[0], _line(wrong), lines[2]]))
        with pytest.raises(EditLogError, match="line 2 is no entry of a log of edits"):
            opened(path, masks)
    path.write_bytes(b"something else")
    with pytest.raises(EditLogError, match="the first line is not whole"):
        opened(path, masks)
    assert path.read_bytes() == b"something else"


def test_killed_writers_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """A few of the kills of `launch/soak/run.sh`, which would say what was lost."""
    command = [sys.executable, "launch/soak/edit_log.py", "--kills=6", f"--workdir={tmp_path}"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("6 kills: nothing acknowledged was lost")
    (acknowledged,) = re.findall(r"\((\d+) entries acknowledged", result.stdout)
    assert int(acknowledged) > 0 and (tmp_path / "0.log").is_file()


# A log that acknowledges before the entry is on disk, as it would be with its writes left to a buffer.
_FORGETFUL = """
import sys
sys.argv = ["edit_log.py", "--kills=4", "--workdir=" + sys.argv[1]]
from sparsecbm_jax.cli import command_line
from sparsecbm_jax.intervention.edit_log import EditLog
from launch.soak import edit_log
EditLog._write = lambda self, kind, edit, body: self._note(kind, edit)
command_line.run(edit_log.main, keeps_memory=False)
"""


def test_a_log_that_forgets_is_found_out(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _FORGETFUL, str(tmp_path)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 2, result.stdout
    assert re.match(r"error: .*0\.log: active are \[\], \[\] once mended; acknowledged were \['", result.stderr)
