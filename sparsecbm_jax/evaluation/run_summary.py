"""Scores of several runs compared: mean and standard deviation over seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsecbm_jax.evaluation import metrics
from sparsecbm_jax.evaluation.tables import COLUMNS, percent, sections_of
from sparsecbm_jax.runtime.json_files import read_json_object
from sparsecbm_jax.runtime.run_directory import read_run, run_differences

METRICS_FILE = "metrics.json"


def summarise_runs(workdirs: Sequence[str | Path]) -> dict[str, Any]:
    """Computes mean and sample standard deviation over runs that differ only in their seed.

    Args:
        workdirs: Directories of finished runs, each with its `metrics.json`.

    Returns:
        The result of `metrics.summarise` for the files, and `num_runs`.

    Raises:
        FileNotFoundError: A directory has no `metrics.json`.
        ValueError: A file is not JSON, the files do not have the same keys, or the runs' configurations differ in more
            than the seed.
    """
    reports = [read_metrics(workdir) for workdir in workdirs]
    configs = [read_run(workdir) for workdir in workdirs]
    for workdir, config in zip(workdirs, configs, strict=True):
        if config is None or configs[0] is None:
            continue
        if differences := run_differences(configs[0], config, ignore=("seed",)):
            raise ValueError(
                f"{workdir} is not {workdirs[0]} with another seed; expected runs that differ in `seed` alone, but:\n  "
                + "\n  ".join(differences)
            )
    return {"num_runs": len(reports), **metrics.summarise(reports)}


def read_metrics(workdir: str | Path) -> dict[str, Any]:
    """Reads the scores of a finished run from its `metrics.json`.

    Raises:
        FileNotFoundError: The directory has none.
        ValueError: The file is not a JSON object.
    """
    return read_json_object(Path(workdir) / METRICS_FILE, "the scores that a finished run leaves in its directory")


def render_summary(summary: Mapping[str, Any]) -> str:
    """Renders a summary of runs as Markdown: for each scored split a table of mean ± standard deviation, in percent.

    Args:
        summary: The summary, from `summarise_runs`.

    Raises:
        ValueError: The summary has no scores of a split.
    """
    splits = {name: value for name, value in summary.items() if isinstance(value, Mapping) and "task" in value}
    if "task" in summary:
        splits[""] = summary
    if not splits:
        raise ValueError(f"no scores of a split among {sorted(summary)}; expected a report with 'task' in it")

    def cell(value: Mapping[str, Any]) -> str:
        if value["mean"] is None:
            return "-"
        return percent(value["mean"]) + (f" ± {100 * value['sd']:.1f}" if value["sd"] is not None else "")

    lines: list[str] = []
    for name, report in splits.items():
        title = f"{name} ({summary['num_runs']} runs)".strip()
        lines += ["| " + " | ".join([title, *(column for _, column in COLUMNS)]) + " |"]
        lines += ["| --- |" + " ---: |" * len(COLUMNS)]
        for section, scores in sections_of(report):
            lines += ["| " + " | ".join([section, *(cell(scores[key]) for key, _ in COLUMNS)]) + " |"]
        lines += [""]
    return "\n".join(lines[:-1])
