"""Explains texts with a saved model: concepts, their contributions to the label, and the words behind each of them.

python launch/explain.py --model=runs/quickstart/model --text="The food was great, but the waiter was rude."
python launch/explain.py --model=runs/quickstart/model --file=reviews.txt --json --output=pathways.jsonl
python launch/explain.py --model=runs/quickstart/model --file=reviews.txt --html=pathways.html
python launch/explain.py --model=runs/quickstart/model --text="..." --target=4
python launch/explain.py --model=runs/quickstart/model --text="..." --target=food=Positive --target=label=2

--text may be repeated; --file holds one review a line. With --json, one JSON object a line. --html writes one page that
shows them all (extra `report`); it opens from disk and asks nothing of any network. --target is a label's name, or
concept=class and label=name pairs; by default the predicted ones. Takes seconds on a CPU once compiled.
"""

from __future__ import annotations

import dataclasses
import io
import sys
import typing
from collections.abc import Mapping
from pathlib import Path

import command_line
from absl import flags

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(command_line)
flags.DEFINE_string("model", None, "Folder of the saved model, such as runs/quickstart/model.")
flags.DEFINE_multi_string("text", [], "A text to explain; may be repeated.")
flags.DEFINE_string("file", None, "File with one text a line, in UTF-8; empty lines are skipped.")
flags.DEFINE_multi_string("target", [], "What to explain: a label, or concept=class or label=name (may be repeated).")
flags.DEFINE_bool("json", False, "Print one JSON object a line.")
flags.DEFINE_string("output", None, "File to write to in place of the terminal.")
flags.DEFINE_string("html", None, "Page to write, of at most 2 MB, in place of the text for the terminal.")
flags.DEFINE_integer("top", 5, "Words shown for each concept.", lower_bound=0)
flags.DEFINE_integer("batch_size", 16, "Texts in one pass.", lower_bound=1)

# Below this, written-out layers cost more to compile than they save.
_UNROLL_FROM_TEXTS = 500


def main() -> None:
    # A review may hold characters that this terminal cannot show.
    typing.cast(io.TextIOWrapper, sys.stdout).reconfigure(errors="backslashreplace")
    if not FLAGS.model:
        raise ValueError("--model is missing; expected the folder of a saved model, such as runs/quickstart/model")
    texts = [*FLAGS.text, *(_lines(Path(FLAGS.file)) if FLAGS.file else ())]
    if not texts:
        raise ValueError("nothing to explain; expected --text=... or --file=FILE with one review a line")

    for path in (Path(name) for name in (FLAGS.output, FLAGS.html) if name):
        # Before the work, so that a folder that cannot be written to costs none.
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    if FLAGS.html:
        # Here, so that a missing library costs no work, either.
        from sparsecbm_jax.report import predictor_weights, write_page

    from sparsecbm_jax.artifact import load
    from sparsecbm_jax.explanation import explain, render_text

    model = load(FLAGS.model)
    if len(texts) < _UNROLL_FROM_TEXTS:
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, unroll_layers=False))
    pathways = explain(model, texts, _target(FLAGS.target), batch_size=FLAGS.batch_size)
    if FLAGS.html:
        num_shown = write_page(FLAGS.html, pathways, predictor=predictor_weights(model))
        part = "" if num_shown == len(pathways) else f"the first {num_shown} of "
        print(f"{part}{len(pathways)} explained: {FLAGS.html}", file=sys.stderr if FLAGS.json else sys.stdout)
        if not (FLAGS.json or FLAGS.output):
            return
    if FLAGS.json:
        result = "\n".join(pathway.to_json() for pathway in pathways)
    else:
        result = "\n\n".join(render_text(pathway, FLAGS.top) for pathway in pathways)
    if FLAGS.output:
        Path(FLAGS.output).write_text(result + "\n", encoding="utf-8")
        print(f"{len(pathways)} explained: {FLAGS.output}")
    else:
        print(result)


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"--file={path}: there is no such file; expected one with a review a line")
    try:
        # Not splitlines(): a review may hold a form feed or another of the characters that it splits at.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from error
    texts = [line.rstrip("\r") for line in lines if line.strip()]
    if not texts:
        raise ValueError(f"{path} holds no text; expected one review a line")
    return texts


def _target(entries: list[str]) -> str | Mapping[str, str]:
    if not entries:
        return "predicted"
    if len(entries) == 1 and "=" not in entries[0]:
        return entries[0]
    pairs = [entry.partition("=") for entry in entries]
    for name, equals, _ in pairs:
        if not equals:
            raise ValueError(f"--target={name}: expected concept=class or label=name beside other targets")
    return {name: value for name, _, value in pairs}


if __name__ == "__main__":
    command_line.run(main)
