r"""Corrects one concept of one text by changing a few weights of its mask, and shows the prediction before and after.

sparsecbm correct --model=runs/quickstart/model --text="The waiter was rude." --concept=service \
    --target=Negative
sparsecbm correct --model=runs/quickstart/model --find --log=runs/quickstart/edits.log
sparsecbm correct --model=runs/quickstart/model --find --editor=minimal --html=correction.html
sparsecbm correct --model=runs/quickstart/model --find --editor=fixed_size --drop_fraction=0.001

--find takes the first test review of the model's own data set with a mispredicted concept (of --concept, where that is
given) and corrects it towards its gold class. There are three editors:

  continual   (the default) preserves earlier corrections, and how texts are predicted that the model was trained on;
              takes a minute or two on a CPU. Corrections are stored in --requests, a JSON object with text, concept and
              target on each line, and this one is added; with --log, that is corrections.jsonl next to it unless
              another is named, and corrections that the log says were undone are left out.
  minimal     changes as few weights as repair this one text (--margin); takes seconds
  fixed_size  changes a share of the weights given beforehand (--drop_fraction, --saliency, --num_steps, --label), as in
              the paper, whose saliency is 'magnitude'; takes seconds

--log stores the edit in a file, to be made again, undone, merged or passed on (`sparsecbm edits`); --save writes the
corrected model; --html writes a page with the decision pathway before and after (extra `report`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import sys
import typing
from pathlib import Path

from absl import flags

from sparsecbm_jax.cli import command_line, saved_runs

if typing.TYPE_CHECKING:
    from sparsecbm_jax.correction.report import CorrectionReport
    from sparsecbm_jax.correction.request_file import CorrectionRequest, RequestFile
    from sparsecbm_jax.intervention.editors import Editor
    from sparsecbm_jax.model.sparse_cbm import SparseCBM

FLAGS = flags.FLAGS
command_line.define_model()
command_line.define_former_flags(
    minimal="it is now --editor=minimal",
    lasting="it is now --editor=continual --requests=FILE",
)
flags.adopt_module_key_flags(command_line)
flags.DEFINE_string("text", None, "The text that the model predicts incorrectly.")
flags.DEFINE_string("concept", None, "Concept to correct.")
flags.DEFINE_string("target", None, "Class that the concept should have.")
flags.DEFINE_bool("find", False, "Take a mispredicted test review of the model's own data set and its gold class.")
flags.DEFINE_enum("editor", None, ["continual", "minimal", "fixed_size"], "How the mask is edited; see above.")
flags.DEFINE_string("requests", None, "continual: JSONL file of earlier corrections.")
flags.DEFINE_float("margin", 0.0, "minimal: logits by which the asked class is to lead.")
flags.DEFINE_float("drop_fraction", 0.0001, "fixed_size: share of the weights that each step drops, and grows.")
flags.DEFINE_string("saliency", "signed", "fixed_size: 'signed', or 'magnitude' as the paper prints it.")
flags.DEFINE_integer("num_steps", 1, "fixed_size: times to differentiate and edit.")
flags.DEFINE_string("label", None, "fixed_size: task label to pull towards as well.")
flags.DEFINE_string("log", None, "File of edits: the active ones are made first, and this one is added.")
flags.DEFINE_string("save", None, "Folder to save the corrected model to.")
flags.DEFINE_string("html", None, "Page to write, with the decision pathway before and after.")
flags.DEFINE_bool("json", False, "Print JSON.")

# Flags that one editor reads.
_SETTINGS = {
    "continual": ("requests",),
    "minimal": ("margin",),
    "fixed_size": ("drop_fraction", "saliency", "num_steps", "label"),
}
_FIND_CHUNK = 64


def main() -> None:
    """Runs the command."""
    folder = command_line.model_folder()
    _check_request()
    _check_settings()
    if FLAGS.save and Path(FLAGS.save).resolve() == Path(folder).resolve():
        raise ValueError(f"--save={FLAGS.save} is the model itself, which would be lost; expected another folder")
    if FLAGS.html:
        # Before the work, so that a missing library, or a file that cannot be written, costs none.
        importlib.import_module("sparsecbm_jax.report.page")
        command_line.claim_file(FLAGS.html)

    from sparsecbm_jax.correction.corrections import correct
    from sparsecbm_jax.correction.report import render_correction
    from sparsecbm_jax.intervention.edit_log import EditLog
    from sparsecbm_jax.model.saved_model import save

    loaded, masks = saved_runs.read_sparse()
    model = original = loaded.for_few_texts()
    with contextlib.ExitStack() as stack:
        if FLAGS.log:
            Path(FLAGS.log).parent.mkdir(parents=True, exist_ok=True)
        log = stack.enter_context(EditLog(FLAGS.log, masks, loaded.schema.concepts)) if FLAGS.log else None
        if log is not None:
            model = dataclasses.replace(model, masks=log.replay(masks))
        request = _find(model, FLAGS.concept) if FLAGS.find else _request()
        if request is None:
            print("null" if FLAGS.json else "no test review has a mispredicted concept; nothing to correct")
            return
        editor, requests = _editor(original, stack)
        earlier = [] if requests is None else requests.requests if log is None else requests.standing(log)
        corrected, report = correct(model, request, editor=editor, earlier=earlier)
        print(json.dumps(report.to_dict(), indent=2) if FLAGS.json else render_correction(report))
        aside = sys.stderr if FLAGS.json else sys.stdout
        if requests is not None:
            requests.add(request)
        if log is not None and report.num_dropped:
            print(f"logged: edit {log.append(report.stored())}, one of {len(log)} in {FLAGS.log}", file=aside)
        elif log is not None:
            print(f"logged: nothing, since no weight changed; {len(log)} in {FLAGS.log}", file=aside)
        if FLAGS.html:
            _write_page(model, corrected, report)
            print(f"page: {FLAGS.html}", file=aside)
        if FLAGS.save:
            directory = save(dataclasses.replace(corrected, config=loaded.config), FLAGS.save)
            print(f"saved: {directory}", file=aside)


def _check_request() -> None:
    """Raises ValueError where the flags do not say what to correct, or say it twice."""
    needed = ("concept",) if FLAGS.find else ("text", "concept", "target")
    given = [name for name in ("text", "concept", "target") if FLAGS[name].value is not None]
    if FLAGS.find and (extra := [name for name in given if name not in needed]):
        raise ValueError(f"--find takes text and target from the data set; it goes with --concept, not --{extra[0]}")
    if not FLAGS.find and len(given) < len(needed):
        absent = " and ".join(f"--{name}" for name in needed if name not in given)
        raise ValueError(f"{absent} missing; expected --text, --concept and --target, or --find")


def _check_settings() -> None:
    """Raises ValueError where a flag is given that the editor does not read."""
    editor = FLAGS.editor or "continual"
    for other, names in _SETTINGS.items():
        for name in names:
            if other != editor and FLAGS[name].present:
                raise ValueError(f"--{name} is read with --editor={other} only; the editor is {editor}")


def _request() -> CorrectionRequest:
    from sparsecbm_jax.correction.request_file import CorrectionRequest

    return CorrectionRequest(FLAGS.text, FLAGS.concept, FLAGS.target, FLAGS.label)


def _editor(original: SparseCBM, stack: contextlib.ExitStack) -> tuple[Editor, RequestFile | None]:
    """Returns the editor that the flags ask for, and the file of earlier corrections for a continual one."""
    from sparsecbm_jax.correction.request_file import RequestFile
    from sparsecbm_jax.intervention import editors
    from sparsecbm_jax.runtime.progress import progress

    if FLAGS.editor == "fixed_size":
        return editors.fixed_size(FLAGS.drop_fraction, FLAGS.saliency, FLAGS.num_steps), None
    anchors = None
    if FLAGS.editor != "minimal":
        anchors = saved_runs.anchors(original, FLAGS.model, is_asked=FLAGS.editor == "continual")
    if anchors is None:
        return editors.minimal(margin=FLAGS.margin), None
    bar = stack.enter_context(
        contextlib.closing(progress(description="costs of changes", total=len(anchors), unit="gradient"))
    )
    move = functools.partial(bar.update, 1)
    path = FLAGS.requests or (Path(FLAGS.log).with_name("corrections.jsonl") if FLAGS.log else None)
    editor = editors.continual(anchors, original=original.arrays, on_gradient=move)
    return editor, RequestFile(path) if path else None


def _write_page(model: SparseCBM, corrected: SparseCBM, report: CorrectionReport) -> None:
    """Writes `--html`: both pathways explain the class that was asked for, so that their words compare."""
    from sparsecbm_jax.correction.edit_view import view_edit
    from sparsecbm_jax.explanation.pathways import explain
    from sparsecbm_jax.report import Comparison, predictor_weights, write_page

    request = report.request
    target = {request.concept: request.target}
    before, after = (explain(one, [request.text], target)[0] for one in (model, corrected))
    change = view_edit(report.edit, model.config.backbone, model.schema.concepts)
    comparison = Comparison(report, before, after, change)
    title = "A correction, before and after"
    write_page(FLAGS.html, [], [comparison], predictor=predictor_weights(model), title=title)


def _find(model: SparseCBM, concept: str | None) -> CorrectionRequest | None:
    """Returns the first test review with a mispredicted concept, and what the concept should be; None without one."""
    from sparsecbm_jax.config.names import name_index
    from sparsecbm_jax.correction.request_file import CorrectionRequest
    from sparsecbm_jax.model.predictions import predict

    schema = model.schema
    searched = [name_index("concept", concept, schema.concepts)] if concept else range(schema.num_concepts)
    instead = "--text, --concept and --target in place of --find"
    examples = saved_runs.own_data(model, FLAGS.model, instead).splits["test"]
    for start in range(0, len(examples.texts), _FIND_CHUNK):
        rows = slice(start, start + _FIND_CHUNK)
        predicted, gold = predict(model, examples.texts[rows]).concepts, examples.concepts[rows]
        for n, k in ((n, k) for n in range(len(gold)) for k in searched):
            if gold[n, k] >= 0 and gold[n, k] != predicted[n, k]:
                return CorrectionRequest(examples.texts[start + n], schema.concepts[k], schema.classes[gold[n, k]])
    return None
