"""A sweep over criteria and sparsities as a section: accuracy against sparsity, and differences paired by model.

Reference: Tan et al. 2024, Figure 5.
"""

import functools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparsecbm_jax.report import plots
from sparsecbm_jax.report.elements import Figure, Section, Table, markdown_table
from sparsecbm_jax.runtime.json_files import read_json_lines

FILE = "results.jsonl"
_SCORES = ("concept", "task")
_WRITTEN_BY = "what launch/sweep.py writes"


class Result(NamedTuple):
    """Accuracies on the test split of one model, pruned in one way; the dense model has sparsity 0."""

    model: str
    criterion: str
    sparsity: float
    epochs: int
    concept: float
    task: float


Groups = Mapping[tuple[str, float], Sequence[Result]]


def read(folder: Path) -> list[Result]:
    """Reads the results of `launch/sweep.py` from its workdir.

    Raises:
        FileNotFoundError: There are no results.
        ValueError: A line is not a result of a sweep; the line is named.
    """
    path, results = folder / FILE, []
    for where, line in read_json_lines(path, _WRITTEN_BY):
        try:
            result = Result(**line)
            numbers = (result.sparsity, result.epochs, result.concept, result.task)
            if not all(isinstance(value, int | float) for value in numbers):
                raise TypeError(f"{numbers} are not all numbers")
        except TypeError as error:
            raise ValueError(f"{where}: {error}; expected {_WRITTEN_BY}") from error
        results.append(result)
    if not any(result.sparsity for result in results):
        raise ValueError(f"{path} holds no result of pruning; expected {_WRITTEN_BY}")
    return results


def sections(results: Sequence[Result]) -> list[Section]:
    """Makes a section for each number of epochs of training after pruning."""
    criteria = list(dict.fromkeys(result.criterion for result in results if result.sparsity))
    counts = sorted({result.epochs for result in results if result.sparsity})
    found = []
    for epochs in counts:
        one = section([result for result in results if not result.sparsity or result.epochs == epochs], criteria)
        name = f"sweep_{epochs}_epochs" if len(counts) > 1 else "sweep"
        found.append(one._replace(figures=[each._replace(name=name) for each in one.figures]))
    return found


def section(results: Sequence[Result], criteria: Sequence[str]) -> Section:
    """Shows the results of one number of epochs.

    Args:
        results: The results, with those of the dense models.
        criteria: Criteria in the order of the tables; differences are from the first.
    """
    epochs = next((result.epochs for result in results if result.sparsity), 0)
    after = f"{epochs} epochs of training under the masks" if epochs else "pruning alone"
    groups = _grouped(results, criteria)
    num_models = max(map(len, groups.values()))
    over = f"mean and range over {num_models} models" if num_models > 1 else "one model"
    caption = f"Accuracy on test against the sparsity of every concept's subnetwork, after {after}: {over}."
    figure = Figure("sweep", caption, functools.partial(_draw, groups))
    words = "Tables give the mean ± sample standard deviation over models."
    return Section(f"Sparsity, {after}", [words], [figure], [_means(groups), *_differences(groups, criteria)])


def render(shown: Section) -> str:
    """Renders the tables of means and of differences as Markdown."""
    return "\n\n".join(map(markdown_table, shown.tables))


def _grouped(results: Iterable[Result], criteria: Sequence[str]) -> Groups:
    """Groups the models' results by criterion and sparsity, in order."""
    groups: dict[tuple[str, float], dict[str, Result]] = {}
    for result in sorted(results, key=lambda r: (r.sparsity, criteria.index(r.criterion) if r.sparsity else -1)):
        groups.setdefault((result.criterion, result.sparsity), {})[result.model] = result
    return {key: list(of_models.values()) for key, of_models in groups.items()}


def _means(groups: Groups) -> Table:
    rows = []
    for (criterion, sparsity), of_models in groups.items():
        cells = [_mean_and_deviation([100 * getattr(result, name) for result in of_models]) for name in _SCORES]
        rows.append([criterion, f"{sparsity:g}", *cells, str(len(of_models))])
    return Table("Accuracy on test, in percent", ("criterion", "sparsity", "concepts", "task", "models"), rows)


def _differences(groups: Groups, criteria: Sequence[str]) -> list[Table]:
    """Tabulates each criterion less the first one, model by model; makes no table of a single criterion."""
    first, rows = criteria[0], []
    for (criterion, sparsity), of_models in groups.items():
        paired = {result.model: result for result in groups.get((first, sparsity), [])}
        pairs = [(result, paired[result.model]) for result in of_models if result.model in paired]
        if criterion == first or not pairs:
            continue
        cells = [
            _mean_and_deviation([100 * (getattr(one, name) - getattr(other, name)) for one, other in pairs])
            for name in _SCORES
        ]
        rows.append([criterion, f"{sparsity:g}", *cells, str(len(pairs))])
    head = (f"less {first}", "sparsity", "concepts", "task", "pairs")
    return [Table(f"Differences from {first}, paired by model, in points", head, rows)] if rows else []


def _mean_and_deviation(values: Sequence[float]) -> str:
    """Formats mean ± sample standard deviation, or the one value."""
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _draw(groups: Groups, pyplot: Any) -> Any:
    figure, axes = pyplot.subplots(1, 2, figsize=(plots.BOTH, 2.8), layout="constrained")
    criteria = list(dict.fromkeys(criterion for criterion, sparsity in groups if sparsity))
    for axis, name, title in zip(axes, _SCORES, ("concepts", "task"), strict=True):
        for i, criterion in enumerate(criteria):
            points = [(s, [100 * getattr(r, name) for r in rs]) for (c, s), rs in groups.items() if c == criterion]
            where, values = [s for s, _ in points], [of_models for _, of_models in points]
            style = plots.style(i)
            axis.plot(where, [statistics.mean(v) for v in values], label=plots.label(criterion), **style)
            low, high = [min(v) for v in values], [max(v) for v in values]
            axis.fill_between(where, low, high, color=style["color"], alpha=0.15, linewidth=0)
        for (criterion, _), of_models in groups.items():
            if criterion == "dense":
                level = statistics.mean(100 * getattr(result, name) for result in of_models)
                axis.axhline(level, color=plots.GREY, linestyle="--", linewidth=1, label="dense")
        axis.set(xlabel="sparsity of each subnetwork", ylabel="accuracy on test (%)", title=title)
        axis.set_xticks(sorted({s for (_, s) in groups if s}))
    plots.tidy(axes)
    axes[0].legend(frameon=False)
    return figure
