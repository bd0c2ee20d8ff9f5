"""The files of a run on disk, gathered into the sections of its report."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparsecbm_jax.correction.edit_view import view_edit
from sparsecbm_jax.data.schema import Examples
from sparsecbm_jax.evaluation.run_summary import METRICS_FILE, read_metrics
from sparsecbm_jax.explanation.subnetworks import view_subnetworks
from sparsecbm_jax.intervention.edit_log import EditLog
from sparsecbm_jax.model import card
from sparsecbm_jax.model.saved_model import CONFIG_FILE, load
from sparsecbm_jax.model.sparse_cbm import SparseCBM
from sparsecbm_jax.model.strategies import STRATEGIES
from sparsecbm_jax.report.elements import Figure, Section, Table, percent
from sparsecbm_jax.report.page import Predictor, predictor_weights
from sparsecbm_jax.report.run_log import RunLog, read_log
from sparsecbm_jax.report.sections import intervention, scores, subnetworks, sweep, training
from sparsecbm_jax.report.sections.decisions import gallery_section
from sparsecbm_jax.runtime.json_files import read_json_object
from sparsecbm_jax.training.metrics_log import LOG_FILE

EDIT_LOG = "edits.log"
MODEL = "model"

HeldOut = Callable[[SparseCBM], Examples]
# Sections, or in a few words the reason why there are none.
_Part = list[Section] | str


class KeyNumber(NamedTuple):
    """One of the few most important numbers, as it is shown, and a note to compare it with."""

    name: str
    value: str
    note: str


class RunReport(NamedTuple):
    """The report of a run.

    Attributes:
        title: The run's name.
        lead: Description of the model, in a sentence or two.
        key_numbers: The most important numbers.
        sections: Sections, in reading order.
        predictor: `predictor_weights` of the model, where pathways are shown.
        left_out: Absent sections and the reason of each, a line each.
    """

    title: str
    lead: str
    key_numbers: Sequence[KeyNumber]
    sections: Sequence[Section]
    predictor: Predictor | None
    left_out: Sequence[str]

    @property
    def figures(self) -> list[Figure]:
        """All figures, in order."""
        return [figure for section in self.sections for figure in section.figures]


class _Run(NamedTuple):
    """The files of a run, those that exist."""

    workdir: Path
    log: RunLog | None
    model: SparseCBM | None
    metrics: Mapping[str, Any] | None


def read_report(
    workdir: str | Path,
    *,
    suite: str | Path | None = None,
    sweep_folder: str | Path | None = None,
    edit_log: str | Path | None = None,
    held_out: HeldOut | None = None,
) -> RunReport:
    """Gathers the files of a run, finished or not.

    Args:
        workdir: The run's folder: `metrics.jsonl`, `metrics.json`, `model/` and `edits.log`, those that exist.
        suite: Workdir of `launch/evaluate_interventions.py`.
        sweep_folder: Workdir of `launch/sweep.py`.
        edit_log: Log of edits of the run's model; None takes `edits.log` of the run.
        held_out: Returns texts that the model was not trained on, for the gallery; it raises ValueError with the reason
            where there are none.

    Raises:
        FileNotFoundError: The run, or a named folder, does not exist.
        ValueError: A file has other contents than its writer gives it; file, line and the expected contents are named.
    """
    found = _read_run(Path(workdir))
    parts = {
        "Evaluation": _evaluation(found),
        "Decisions": _gallery(found, held_out),
        "Training": _training(found),
        "Pruning": _pruning(found),
        "Subnetworks": _subnetworks(found),
        "Change after edits": _edits(found, None if edit_log is None else Path(edit_log)),
        "Corrections": "no folder of the intervention suite was named" if suite is None else _suite(Path(suite)),
        "Sparsity": "no folder of a sweep was named" if sweep_folder is None else _sweep(Path(sweep_folder)),
        "Model card": _model_card(found),
    }
    sections = [section for part in parts.values() if not isinstance(part, str) for section in part]
    has_pathways = any(section.pathways for section in sections)
    return RunReport(
        title=_title(found.workdir.resolve()),
        lead=_lead(found),
        key_numbers=_key_numbers(found),
        sections=sections,
        predictor=predictor_weights(found.model) if found.model is not None and has_pathways else None,
        left_out=[f"{name}: {part}." for name, part in parts.items() if isinstance(part, str)],
    )


def _read_run(workdir: Path) -> _Run:
    if not workdir.is_dir():
        raise FileNotFoundError(f"{workdir} does not exist; expected the folder of a run, as launch/train.py writes it")
    log = read_log(workdir) if (workdir / LOG_FILE).is_file() else None
    model = load(workdir / MODEL) if (workdir / MODEL).is_dir() else None
    metrics: dict[str, Any] | None
    if (workdir / METRICS_FILE).is_file():
        metrics = read_metrics(workdir)
    else:
        metrics = None if model is None else model.metadata.get("metrics")
    if log is None and model is None and metrics is None:
        raise ValueError(f"{workdir} holds nothing of a run; expected {LOG_FILE}, {METRICS_FILE} or {MODEL}/")
    return _Run(workdir, log, model, metrics)


def _evaluation(found: _Run) -> _Part:
    if found.metrics is None:
        return f"the run has no {METRICS_FILE} yet"
    return [scores.evaluation_section(found.metrics, str(found.workdir / METRICS_FILE))]


def _gallery(found: _Run, held_out: HeldOut | None) -> _Part:
    if found.model is None:
        return f"the run has no {MODEL}/"
    if held_out is None or "projector" not in found.model.heads:
        return "no held-out texts were given" if held_out is None else "the model has no concepts"
    try:
        examples = held_out(found.model)
    except ValueError as error:
        return str(error).rstrip(".")
    section = gallery_section(found.model, examples)
    return "no held-out review is of a kind that is shown" if section is None else [section]


def _training(found: _Run) -> _Part:
    if found.log is None:
        return f"the run has no {LOG_FILE}"
    return [training.training_section(found.log, (found.metrics or {}).get("best_epoch"))]


def _pruning(found: _Run) -> _Part:
    if found.log is None or not found.log.prune:
        return f"the run has no {LOG_FILE}" if found.log is None else "there was no pruning event"
    return [training.pruning_section(found.log, _concepts(found))]


def _subnetworks(found: _Run) -> _Part:
    model = found.model
    if model is None or model.masks is None:
        return f"the run has no {MODEL}/" if model is None else "a dense model has none"
    report = view_subnetworks(model.masks, model.config.backbone, model.schema.concepts, bins=0)
    return [subnetworks.subnetworks_section(report)]


def _edits(found: _Run, path: Path | None) -> _Part:
    model, own = found.model, found.workdir / EDIT_LOG
    if path is None and not own.is_file():
        return f"the run has no {EDIT_LOG}"
    if model is None or model.masks is None:
        raise ValueError(f"{path or own} cannot be read without the model it edits; expected {found.workdir / MODEL}/")
    log = EditLog(path or own, model.masks, model.schema.concepts, is_read_only=True)
    if not log.edits:
        return f"there is no active edit in {log.path.name}"
    changes = [view_edit(edit, model.config.backbone, model.schema.concepts) for edit in log.edits]
    asked = [
        (edit.id, f"{edit.before.get('concepts', {}).get(edit.concept, '?')} → {edit.target}") for edit in log.edits
    ]
    return [subnetworks.edits_section(changes, asked)]


def _suite(folder: Path) -> _Part:
    found = intervention.read(folder)
    return [
        section._replace(title=f"Corrections, {found['split']} split: {section.title[0].lower()}{section.title[1:]}")
        for section in intervention.sections(found)
    ]


def _sweep(folder: Path) -> _Part:
    return sweep.sections(sweep.read(folder))


def _model_card(found: _Run) -> _Part:
    if found.model is None:
        return f"the run has no {MODEL}/"
    config = read_json_object(found.workdir / MODEL / CONFIG_FILE, "a saved model")
    schema = config["schema"]
    rows = [[name, value] for name, value in card.facts(config).items()]
    if STRATEGIES[config["strategy"]].has_bottleneck:
        rows += [["concepts", ", ".join(schema["concepts"])], ["classes of each", ", ".join(schema["classes"])]]
    rows.append(["labels", ", ".join(schema["labels"])])
    if config["sparsity"] is not None:
        rows.append(["fingerprint of the masks", config["sparsity"]["fingerprint"]])
    tables = [Table("What the model is made of", ["", "value"], rows, is_words=True)]
    if settings := config["metadata"].get("run_config"):
        flat = [[name, str(value)] for name, value in _flattened(settings)]
        tables.append(Table("Settings of the run", ["setting", "value"], flat, is_words=True))
    return [Section("Model card", [card.describe(config), " ".join(card.limits(config))], [], tables)]


def _flattened(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in settings.items():
        name = f"{prefix}{key}"
        found += _flattened(value, f"{name}.") if isinstance(value, Mapping) else [(name, value)]
    return found


def _concepts(found: _Run) -> Sequence[str]:
    if found.model is not None:
        return found.model.schema.concepts
    reports = card.split_reports(found.metrics or {})
    return list(next(iter(reports.values()), {}).get("concepts", {}))


def _title(workdir: Path) -> str:
    """Returns the run's name; for a seed, with the name of its folder."""
    is_seed = re.fullmatch(r"seed\d+", workdir.name)
    return f"Report of {workdir.parent.name}/{workdir.name}" if is_seed else f"Report of {workdir.name}"


def _lead(found: _Run) -> str:
    model = found.model
    if model is None:
        return "The run’s model is not available: the numbers below are from its log."
    backbone, dataset = (model.metadata.get(key) for key in ("backbone", "dataset"))
    size = f"{model.config.backbone.num_layers} layers of width {model.config.backbone.hidden_size}"
    words = f"{backbone or model.config.backbone.family} ({size}), strategy {model.strategy}"
    words += f", trained on {dataset}" if dataset else ""
    seed = model.metadata.get("seed")
    return f"{words}{'' if seed is None else f', seed {seed}'}."


def _key_numbers(found: _Run) -> list[KeyNumber]:
    reports = card.split_reports(found.metrics or {})
    split = "test" if "test" in reports else next(iter(reports), None)
    numbers = []
    for name, section in (("task accuracy", "task"), ("concept accuracy", "concept")):
        one = reports[split].get(section) if split else None
        if one and one.get("accuracy") is not None:
            note = f"on {split}; majority {percent(one['majority_accuracy'])} %"
            numbers.append(KeyNumber(name, f"{percent(one['accuracy'])} %", note))
    density = (found.metrics or {}).get("density") or {}
    if density:
        low, high = min(density.values()), max(density.values())
        kept = percent(low) if high - low < 5e-4 else f"{percent(low)} to {percent(high)}"
        numbers.append(KeyNumber("weights kept", f"{kept} %", "by each concept’s subnetwork"))
    if found.log is not None:
        last = max(record["step"] for records in found.log for record in records)
        numbers.append(KeyNumber("steps", f"{last:,}", "of training"))
    return numbers
