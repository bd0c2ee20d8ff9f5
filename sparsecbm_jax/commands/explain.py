"""Explains texts with a saved model: concepts, their contributions to the label, and the words behind each of them.

sparsecbm explain --model=runs/quickstart/model --text="The food was great, but the waiter was rude."
sparsecbm explain --model=runs/quickstart/model --file=reviews.txt --format=json --output=pathways.jsonl
sparsecbm explain --model=runs/quickstart/model --file=reviews.txt --format=csv --output=pathways.csv
sparsecbm explain --model=runs/quickstart/model --file=reviews.txt --format=html --output=pathways.html
sparsecbm explain --model=runs/quickstart/model --text="..." --method=gradient_norm
sparsecbm explain --model=runs/quickstart/model --text="..." --target=4 --foil=3
sparsecbm explain --model=runs/quickstart/model --text="..." --target=food=Positive --target=label=2
sparsecbm explain --model=runs/quickstart/model --subnetworks --output=subnetworks.json
sparsecbm explain --schema

--text may be repeated; --file holds one review a line, and may be long: results are written as they come. There are
four formats:

  text  for a terminal (the default)
  json  one JSON object a line, which --schema describes
  csv   one row for each text and concept
  html  one page that shows the pathways (extra `report`), written to --output when all are done; it opens from disk and
        asks nothing of any network. A page has at most 2 MB: texts that do not fit are left out, and it says so.

--target is a label's name, or concept=class and label=name pairs; by default the predicted ones. A concept that is read
as unknown shows no words, unless it is named: --target=noise=predicted. Takes seconds on a CPU
once compiled.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import sys
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path

from absl import flags

from sparsecbm_jax.cli import command_line, saved_runs

if typing.TYPE_CHECKING:
    from sparsecbm_jax.model.sparse_cbm import SparseCBM

FLAGS = flags.FLAGS
command_line.define_model()
command_line.define_former_flags(
    json="it is now --format=json",
    csv="it is now --format=csv",
    html="it is now --format=html --output=FILE",
)
flags.adopt_module_key_flags(command_line)
flags.DEFINE_multi_string("text", [], "A text to explain")
flags.DEFINE_string("file", None, "File with one text a line, in UTF-8; empty lines are skipped.")
flags.DEFINE_multi_string("target", [], "What to explain: a label, or concept=class or label=name")
flags.DEFINE_string(
    "method", "integrated_gradients", "Score of words: integrated_gradients, gradient_x_input, gradient_norm."
)
flags.DEFINE_string("baseline", "zero", "Words' embeddings where integrated gradients begin: zero, or pad.")
flags.DEFINE_integer("num_steps", None, "Steps of integrated gradients, where the usual do not suffice.", lower_bound=1)
flags.DEFINE_string("foil", None, "Label that the explained one is compared with, in place of the runner-up.")
flags.DEFINE_enum("reference", None, ["mean", "zero"], "Where contributions are counted from; zero is the paper's.")
flags.DEFINE_enum("format", "text", ["text", "json", "csv", "html"], "How pathways are written; see above.")
flags.DEFINE_bool("schema", False, "Print the JSON Schema of --format=json, and nothing else.")
flags.DEFINE_bool("subnetworks", False, "Print what each concept's subnetwork keeps, as JSON, and nothing else.")
flags.DEFINE_string("output", None, "File to write to in place of the terminal.")
flags.DEFINE_integer("top", 5, "Words shown for each concept.", lower_bound=0)
flags.DEFINE_integer("batch_size", 16, "Texts in one pass.", lower_bound=1)

# Below this, written-out layers cost more to compile than they save.
_UNROLL_FROM_TEXTS = 500


def main() -> None:
    """Runs the command."""
    is_about_texts = not (FLAGS.schema or FLAGS.subnetworks)
    total = _check_flags(is_about_texts)
    # Before the work, so that a missing library, or a file that cannot be written, costs none.
    is_page = is_about_texts and FLAGS.format == "html"
    if is_page:
        importlib.import_module("sparsecbm_jax.report.page")
    if FLAGS.output:
        command_line.claim_file(FLAGS.output)
    if is_page:
        _write_page(total)
        return
    parts = _schema() if FLAGS.schema else _subnetworks() if FLAGS.subnetworks else _explained(total)
    with contextlib.ExitStack() as stack:
        # The first part before the file is emptied: where nothing comes of the work, what was there stays.
        parts = itertools.chain([next(parts)], parts)
        sink = stack.enter_context(open(FLAGS.output, "w", encoding="utf-8")) if FLAGS.output else sys.stdout
        for part in parts:
            sink.write(part)
            sink.flush()
    if FLAGS.output:
        done = f"{total} explained" if is_about_texts else "written"
        print(f"{done}: {FLAGS.output}")


def _check_flags(is_about_texts: bool) -> int:
    """Returns the number of texts.

    Raises:
        ValueError: Flags contradict each other, or one is missing.
    """
    asked = [f"--{name}" for name in ("schema", "subnetworks") if FLAGS[name].value]
    if FLAGS["format"].present:
        asked.append(f"--format={FLAGS.format}")
    if not is_about_texts and len(asked) > 1:
        raise ValueError(f"{asked[0]} and {asked[1]} are two things to print; expected one")
    if not FLAGS.schema:
        command_line.model_folder()
    if not is_about_texts:
        return 0
    if FLAGS.file and FLAGS.output and Path(FLAGS.file).resolve() == Path(FLAGS.output).resolve():
        raise ValueError(f"--output={FLAGS.output} is the file of the texts, which would be lost; expected another")
    if FLAGS.format == "html" and not FLAGS.output:
        raise ValueError("--output is missing; --format=html writes a page, expected --output=FILE")
    total = len(FLAGS.text) + (_num_lines(Path(FLAGS.file)) if FLAGS.file else 0)
    if not total:
        raise ValueError("nothing to explain; expected --text=... or --file=FILE with one review a line")
    return total


def _schema() -> Iterator[str]:
    from sparsecbm_jax.explanation.pathways import pathway_schema

    yield json.dumps(pathway_schema(), indent=2, ensure_ascii=False) + "\n"


def _subnetworks() -> Iterator[str]:
    from sparsecbm_jax.explanation.subnetworks import view_subnetworks

    model, masks = saved_runs.read_sparse()
    report = view_subnetworks(masks, model.config.backbone, model.schema.concepts)
    yield json.dumps(report.to_dict()) + "\n"


def _write_page(total: int) -> None:
    from sparsecbm_jax.explanation.pathways import explain
    from sparsecbm_jax.report import predictor_weights, write_page

    model = _load(total)
    pathways = explain(model, list(_texts()), **_asked())
    num_shown = write_page(FLAGS.output, pathways, predictor=predictor_weights(model, FLAGS.reference))
    part = "" if num_shown == total else f"the first {num_shown} of "
    print(f"{part}{total} explained: {FLAGS.output}")


def _explained(total: int) -> Iterator[str]:
    """Yields what is printed of each text, as it comes."""
    from sparsecbm_jax.explanation.as_text import csv_header, csv_rows, render_text
    from sparsecbm_jax.explanation.pathways import explain_stream
    from sparsecbm_jax.runtime.progress import progress

    model = _load(total)
    pathways = explain_stream(model, _texts(), **_asked())
    if FLAGS.output or not sys.stdout.isatty():
        pathways = progress(pathways, description="explaining", total=total, unit="text")
    for n, pathway in enumerate(pathways):
        if FLAGS.format == "json":
            yield pathway.to_json() + "\n"
        elif FLAGS.format == "csv":
            yield (csv_header(FLAGS.top) if n == 0 else "") + csv_rows(pathway, n, FLAGS.top)
        else:
            yield ("\n" if n else "") + render_text(pathway, FLAGS.top) + "\n"


def _load(total: int) -> SparseCBM:
    """Returns the model, its layers written out only where there are enough texts for that."""
    from sparsecbm_jax.model.saved_model import load

    model = load(FLAGS.model)
    return model if total >= _UNROLL_FROM_TEXTS else model.for_few_texts()


def _asked() -> dict[str, typing.Any]:
    """Returns the arguments of `explain` that the flags give."""
    asked = {name: FLAGS[name].value for name in ("method", "baseline", "batch_size", "foil", "reference")}
    if FLAGS.num_steps is not None:
        asked["num_steps"] = FLAGS.num_steps
    return {"target": _target(FLAGS.target), **asked}


def _texts() -> Iterator[str]:
    yield from FLAGS.text
    if FLAGS.file:
        yield from _lines(Path(FLAGS.file))


def _num_lines(path: Path) -> int:
    """Returns how many texts a file holds.

    Raises:
        ValueError: There is no such file, it holds no text, or it is not UTF-8.
    """
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
            raise ValueError(f"--target={name}: expected concept=class or label=name with other targets")
    return {name: value for name, _, value in pairs}
