"""Lists, undoes, merges and passes on the edits that `sparsecbm correct --log` keeps.

sparsecbm edits --model=runs/quickstart/model --log=runs/quickstart/edits.log
sparsecbm edits --model=runs/quickstart/model --log=runs/quickstart/edits.log --undo=0a1b2c3d4e5f
sparsecbm edits --model=runs/quickstart/model --log=runs/quickstart/edits.log --merge=colleague/edits.log
sparsecbm edits --model=runs/quickstart/model --log=runs/quickstart/edits.log --save=runs/quickstart/corrected

Without another flag the active edits are listed. --export writes one edit to a file, --add takes one from there.
--save writes the model with all active edits made; --model itself stays as it is. Takes seconds on a CPU.
"""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

from absl import flags

from sparsecbm_jax.cli import command_line, saved_runs
from sparsecbm_jax.data.words import printable

if typing.TYPE_CHECKING:
    from sparsecbm_jax.intervention.stored_edit import StoredEdit

FLAGS = flags.FLAGS
command_line.define_model()
flags.adopt_module_key_flags(command_line)
flags.DEFINE_string("log", None, "File of edits.")
flags.DEFINE_string("undo", None, "Id of an edit to undo, whichever its place, or 'all'.")
flags.DEFINE_string("merge", None, "Another log of the same model, whose edits and undoings are taken over.")
flags.DEFINE_string("add", None, "File of one edit to make and add.")
flags.DEFINE_string("export", None, "Id of an edit to write to the file of --to.")
flags.DEFINE_string("to", None, "File that --export writes.")
flags.DEFINE_string("save", None, "Folder to save the model to, with all active edits made.")

_SHOWN_CHARACTERS = 80


def main() -> None:
    """Runs the command."""
    folder = command_line.model_folder()
    if not FLAGS.log:
        raise ValueError("--log is missing; expected a file of the model's edits, such as runs/quickstart/edits.log")
    if len(given := [name for name in ("undo", "merge", "add", "export") if FLAGS[name].value]) > 1:
        raise ValueError(f"--{given[0]} and --{given[1]} are two things to do; expected one at a time")
    for name in ("undo", "merge", "add", "export", "to", "save"):
        if FLAGS[name].present and not FLAGS[name].value:
            raise ValueError(f"--{name} is empty; expected {FLAGS[name].help}")
    if FLAGS.to and Path(FLAGS.to).resolve() == Path(FLAGS.log).resolve():
        raise ValueError(f"--to={FLAGS.to} is the log itself, which would be lost; expected another file")
    if bool(FLAGS.export) != bool(FLAGS.to):
        raise ValueError("--export=ID and --to=FILE go together")
    if not Path(FLAGS.log).exists() and not (FLAGS.merge or FLAGS.add):
        raise FileNotFoundError(f"{FLAGS.log} does not exist; expected what `sparsecbm correct --log` writes")
    if FLAGS.save and Path(FLAGS.save).resolve() == Path(folder).resolve():
        raise ValueError(f"--save={FLAGS.save} is the model itself, which the log would no longer fit")

    from sparsecbm_jax.intervention.edit_log import EditLog
    from sparsecbm_jax.intervention.stored_edit import StoredEdit, apply_stored
    from sparsecbm_jax.model import saved_model

    model, original = saved_runs.read_sparse()
    concepts = model.schema.concepts
    with EditLog(FLAGS.log, original, concepts) as log:
        masks = log.replay(original)
        if FLAGS.undo:
            masks = log.undo_all(masks) if FLAGS.undo == "all" else log.undo(masks, FLAGS.undo)
        if FLAGS.add:
            edit = StoredEdit.load(FLAGS.add)
            masks = apply_stored(masks, edit, concepts)
            log.append(edit)
        if FLAGS.merge:
            for conflict in log.merge(EditLog(FLAGS.merge, original, concepts, is_read_only=True)):
                print(f"left out: {conflict}")
            masks = log.replay(original)
        if FLAGS.export:
            print(f"written: {log.get(FLAGS.export).save(FLAGS.to)}")
        for edit in log.edits:
            print(_line(edit))
        print(f"{len(log)} active {'edit' if len(log) == 1 else 'edits'} in {FLAGS.log}")
    if FLAGS.save:
        metadata = {key: value for key, value in model.metadata.items() if key != "metrics"}
        print(f"saved: {saved_model.save(dataclasses.replace(model, masks=masks, metadata=metadata), FLAGS.save)}")


def _line(edit: StoredEdit) -> str:
    dropped, grown = edit.num_changed
    # An edit of a file that somebody passed on may hold anything.
    was = edit.before.get("concepts", {}).get(edit.concept, "?")
    names = (printable(str(name), _SHOWN_CHARACTERS) for name in (edit.concept, was, edit.target, edit.saliency))
    concept, was, target, saliency = names
    return f"{edit.id}  {concept}: {was} -> {target}, {dropped} dropped, {grown} grown, {saliency}"
