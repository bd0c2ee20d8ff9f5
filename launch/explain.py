"""Explains texts with a saved model: concepts, their contributions to the label, and the words behind each of them.

python launch/explain.py --model=runs/quickstart/model --text="The food was great, but the waiter was rude."
python launch/explain.py --model=runs/quickstart/model --file=reviews.txt --json --output=pathways.jsonl
python launch/explain.py --model=runs/quickstart/model --file=reviews.txt --csv --output=pathways.csv
python launch/explain.py --model=runs/quickstart/model --text="..." --method=integrated_gradients
python launch/explain.py --model=runs/quickstart/model --file=reviews.txt --html=pathways.html
python launch/explain.py --model=runs/quickstart/model --text="..." --target=4
python launch/explain.py --model=runs/quickstart/model --text="..." --target=food=Positive --target=label=2
python launch/explain.py --model=runs/quickstart/model --subnetworks --output=subnetworks.json
python launch/explain.py --schema

--text may be repeated; --file holds one review a line, and may be long: results are written as they come. With --json,
one JSON object a line, which --schema describes; with --csv, one row for each text and concept. --html writes one page
that shows the pathways (extra `report`) when all are done; it opens from disk and asks nothing of any network. --target
is a label's name, or concept=class and label=name pairs; by default the predicted ones. Takes seconds on a CPU once
compiled.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import json
import sys
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path

from absl import flags

from sparsecbm_jax.cli import command_line

if typing.TYPE_CHECKING:
    from sparsecbm_jax.model.sparse_cbm import SparseCBM

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(command_line)
flags.DEFINE_string("model", None, "Folder of the saved model, such as runs/quickstart/model.")
flags.DEFINE_multi_string("text", [], "A text to explain; may be repeated.")
flags.DEFINE_string("file", None, "File with one text a line, in UTF-8; empty lines are skipped.")
flags.DEFINE_multi_string("target", [], "What to explain: a label, or concept=class or label=name (may be repeated).")
flags.DEFINE_string("method", "gradient_norm", "Score of words: gradient_norm, gradient_x_input, integrated_gradients.")
flags.DEFINE_string("baseline", "zero", "Words' embeddings where integrated gradients begin: zero, or pad.")
flags.DEFINE_integer("num_steps", None, "Steps of integrated gradients, where the usual do not do.", lower_bound=1)
flags.DEFINE_bool("json", False, "Print one JSON object a line.")
flags.DEFINE_bool("csv", False, "Print a table with one row for each text and concept.")
flags.DEFINE_bool("schema", False, "Print the JSON Schema of --json, and nothing else.")
flags.DEFINE_bool("subnetworks", False, "Print what each concept's subnetwork keeps, as JSON, and nothing else.")
flags.DEFINE_string("html", None, "Page to write, of at most 2 MB; texts that do not fit are left out, and it says so.")
flags.DEFINE_string("output", None, "File to write to in place of the terminal.")
flags.DEFINE_integer("top", 5, "Words shown for each concept.", lower_bound=0)
flags.DEFINE_integer("batch_size", 16, "Texts in one pass.", lower_bound=1)

# Below this, written-out layers cost more to compile than they save.
_UNROLL_FROM_TEXTS = 500


def main() -> None:
    # A review may hold characters that this terminal cannot show.
    typing.cast(io.TextIOWrapper, sys.stdout).reconfigure(errors="backslashreplace")
    forms = [name for name in ("json", "csv", "schema", "subnetworks", "html") if FLAGS[name].value]
    if len(forms) > 1:
        raise ValueError(f"--{forms[0]} and --{forms[1]} are two things to print; expected one")
    if FLAGS.html and FLAGS.output:
        raise ValueError(f"--output={FLAGS.output} does not go with --html, which names its own file")
    if not FLAGS.model and not FLAGS.schema:
        raise ValueError("--model is missing; expected the folder of a saved model, such as runs/quickstart/model")
    total = len(FLAGS.text) + (_num_lines(Path(FLAGS.file)) if FLAGS.file else 0)
    if not total and not (FLAGS.schema or FLAGS.subnetworks):
        raise ValueError("nothing to explain; expected --text=... or --file=FILE with one review a line")

    # Before the work, so that a missing library, or a folder that cannot be written to, costs none.
    if FLAGS.html:
        importlib.import_module("sparsecbm_jax.report.page")
    if file := FLAGS.html or FLAGS.output:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
    if FLAGS.html:
        _write_page(total)
        return
    parts = _schema() if FLAGS.schema else _subnetworks() if FLAGS.subnetworks else _explained(total, *forms)
    with contextlib.ExitStack() as stack:
        # The first part before the file is emptied: where nothing comes of the work, what was there stays.
        parts = itertools.chain([next(parts)], parts)
        sink = stack.enter_context(open(FLAGS.output, "w", encoding="utf-8")) if FLAGS.output else sys.stdout
        for part in parts:
            sink.write(part)
            sink.flush()
    if FLAGS.output:
        done = "written" if FLAGS.schema or FLAGS.subnetworks else f"{total} explained"
        print(f"{done}: {FLAGS.output}")


def _schema() -> Iterator[str]:
    from sparsecbm_jax.explanation.pathways import pathway_schema

    yield json.dumps(pathway_schema(), indent=2, ensure_ascii=False) + "\n"


def _subnetworks() -> Iterator[str]:
    from sparsecbm_jax.explanation.subnetworks import view_subnetworks

    model = _load()
    if model.masks is None:
        raise ValueError(f"{FLAGS.model}: a dense model has no subnetworks")
    report = view_subnetworks(model.masks, model.config.backbone, model.schema.concepts)
    yield json.dumps(report.to_dict()) + "\n"


def _write_page(total: int) -> None:
    from sparsecbm_jax.explanation.pathways import explain
    from sparsecbm_jax.report import predictor_weights, write_page

    model = _load_for(total)
    pathways = explain(model, list(_texts()), _target(FLAGS.target), batch_size=FLAGS.batch_size, **_attribution())
    num_shown = write_page(FLAGS.html, pathways, predictor=predictor_weights(model))
    part = "" if num_shown == total else f"the first {num_shown} of "
    print(f"{part}{total} explained: {FLAGS.html}")


def _explained(total: int, form: str = "text") -> Iterator[str]:
    """What is printed of each text, as it comes."""
    from sparsecbm_jax.explanation.as_text import csv_header, csv_rows, render_text
    from sparsecbm_jax.explanation.pathways import explain_stream
    from sparsecbm_jax.runtime.progress import progress

    model = _load_for(total)
    pathways = explain_stream(model, _texts(), _target(FLAGS.target), batch_size=FLAGS.batch_size, **_attribution())
    if FLAGS.output or not sys.stdout.isatty():
        pathways = progress(pathways, description="explaining", total=total, unit="text")
    for n, pathway in enumerate(pathways):
        if form == "json":
            yield pathway.to_json() + "\n"
        elif form == "csv":
            yield (csv_header(FLAGS.top) if n == 0 else "") + csv_rows(pathway, n, FLAGS.top)
        else:
            yield ("\n" if n else "") + render_text(pathway, FLAGS.top) + "\n"


def _load() -> SparseCBM:
    from sparsecbm_jax.model.saved_model import load

    return load(FLAGS.model)


def _load_for(total: int) -> SparseCBM:
    """The model, its layers written out only where there are enough texts for that."""
    model = _load()
    return model if total >= _UNROLL_FROM_TEXTS else model.for_few_texts()


def _attribution() -> dict[str, typing.Any]:
    asked = {} if FLAGS.num_steps is None else {"num_steps": FLAGS.num_steps}
    return {"method": FLAGS.method, "baseline": FLAGS.baseline, **asked}


def _texts() -> Iterator[str]:
    yield from FLAGS.text
    if FLAGS.file:
        yield from _lines(Path(FLAGS.file))


def _num_lines(path: Path) -> int:
    """How many texts a file holds; it is read once to say so, and whether it can be read at all."""
    if not path.is_file():
        raise ValueError(f"--file={path}: there is no such file; expected one with a review a line")
    count = sum(1 for _ in _lines(path))
    if not count:
        raise ValueError(f"{path} holds no text; expected one review a line")
    return count


def _lines(path: Path) -> Iterator[str]:
    # Bytes, which end lines at line feeds only: a review may hold another of the characters that text is split at.
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                byte = f"byte {error.start} is {error.object[error.start]:#04x}"
                raise ValueError(f"{path}: line {number} is not UTF-8: {byte}") from error
            if text.strip():
                yield text


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
