"""A run from its log, as sections: learning curves, and pruning events."""

import functools
import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sparsecbm_jax.report import plots
from sparsecbm_jax.report.elements import Figure, Section, Table, kernel_name, percent
from sparsecbm_jax.report.run_log import RunLog, is_number


def training_section(log: RunLog, best_epoch: int | None) -> Section:
    """Shows losses, gradient norm and validation accuracy.

    Args:
        log: The run's log.
        best_epoch: The chosen epoch, from 0; None where the run has not ended.
    """
    losses, figures = _losses(log), []
    each = f"each logged step, and the mean of each epoch.{_cuts(log)}"
    if log.train:
        draw = functools.partial(_draw_series, log, losses, "loss")
        figures.append(Figure("training_loss", f"Loss of training: {each}", draw))
    if log.validation:
        chosen = "" if best_epoch is None else f" The ring marks epoch {best_epoch + 1}, which was chosen."
        caption = f"Accuracy on validation after each epoch.{chosen}{_cuts(log)}"
        figures.append(Figure("validation_accuracy", caption, functools.partial(_draw_validation, log, best_epoch)))
    if any("grad_norm" in record for record in log.train):
        draw = functools.partial(_draw_series, log, ["grad_norm"], "norm of the gradient")
        figures.append(Figure("gradient_norm", f"Norm of the gradient, before it is clipped: {each}", draw))
    state = "" if best_epoch is not None else " The run has not ended, or was stopped."
    last = max(record["step"] for record in itertools.chain(*log))
    words = f"{_num_epochs(log)} epochs, {last:,} steps.{state}"
    return Section("Training", [words], figures, [_training_table(log, losses, best_epoch)])


def _losses(log: RunLog) -> list[str]:
    """Returns the keys of losses: parts before their weighted sum."""
    found = dict.fromkeys(key for record in log.train for key in record if key.endswith("loss"))
    return sorted(found, key=lambda key: (key == "loss", key))


def _num_epochs(log: RunLog) -> int:
    return 1 + max(record["epoch"] for record in itertools.chain(*log))


def _cuts(log: RunLog) -> str:
    return " Dotted: pruning events." if log.prune else ""


def _training_table(log: RunLog, losses: Sequence[str], best_epoch: int | None) -> Table:
    columns = [key for key in [*losses, "grad_norm"] if any(key in record for record in log.train)]
    scores = list(dict.fromkeys(key for record in log.validation for key in record if key.endswith("_accuracy")))
    validation = {record["epoch"]: record for record in log.validation}
    rows = []
    for epoch in range(_num_epochs(log)):
        row = [f"{epoch + 1}{' (chosen)' if epoch == best_epoch else ''}"]
        for key in columns:
            mean = _epoch_mean(log, key, epoch)
            row.append("–" if mean is None else f"{mean:.3f}")
        row += [percent(validation.get(epoch, {}).get(key)) for key in scores]
        cuts = [f"{100 * statistics.mean(record['sparsity']):.1f}" for record in log.prune if record["epoch"] == epoch]
        rows.append([*row, ", ".join(cuts)] if log.prune else row)
    head = ["epoch", *(_spoken(key) for key in columns), *(f"validation {_spoken(key)} %" for key in scores)]
    return Table(
        "Each epoch: means of the training losses, and accuracy on validation",
        head + (["pruned to %"] if log.prune else []),
        rows,
    )


def _epoch_mean(log: RunLog, key: str, epoch: int) -> float | None:
    values = [record[key] for record in log.train if record["epoch"] == epoch and record.get(key) is not None]
    return statistics.mean(values) if values else None


def _spoken(key: str) -> str:
    return {"loss": "weighted sum", "grad_norm": "gradient norm"}.get(key, key.replace("_", " "))


def _mark_cuts(axis: Any, log: RunLog) -> None:
    for record in log.prune:
        axis.axvline(record["step"], color=plots.GREY, linewidth=0.8, linestyle=":")


def _draw_series(log: RunLog, keys: Sequence[str], label: str, pyplot: Any) -> Any:
    figure, axis = pyplot.subplots(figsize=(plots.COLUMN, 2.5), layout="constrained")
    ends: dict[int, int] = {}
    for record in log.train:
        ends[record["epoch"]] = record["step"]
    for number, key in enumerate(keys):
        style = plots.style(number)
        records = [record for record in log.train if record.get(key) is not None]
        steps, values = [record["step"] for record in records], [record[key] for record in records]
        axis.plot(steps, values, color=style["color"], alpha=0.3, linewidth=0.7)
        means = {end: mean for epoch, end in ends.items() if (mean := _epoch_mean(log, key, epoch)) is not None}
        axis.plot(list(means), list(means.values()), label=plots.label(_spoken(key)), **style)
    _mark_cuts(axis, log)
    axis.set(xlabel="step", ylabel=label, yscale="log", xlim=(0, None))
    plots.tidy([axis])
    if len(keys) > 1:
        plots.legend(figure)
    return figure


def _draw_validation(log: RunLog, best_epoch: int | None, pyplot: Any) -> Any:
    figure, axis = pyplot.subplots(figsize=(plots.COLUMN, 2.5), layout="constrained")
    keys = dict.fromkeys(key for record in log.validation for key in record if key.endswith("_accuracy"))
    for number, key in enumerate(keys):
        records = [record for record in log.validation if record.get(key) is not None]
        style = plots.style(number)
        axis.plot([r["step"] for r in records], [100 * r[key] for r in records], label=_spoken(key), **style)
        for record in records:
            if record["epoch"] == best_epoch:
                ring = {"markersize": 10, "markerfacecolor": "none", "linestyle": "none", "marker": "o"}
                axis.plot(record["step"], 100 * record[key], color="black", **ring)
    _mark_cuts(axis, log)
    axis.set(xlabel="step", ylabel="accuracy on validation (%)", xlim=(0, None))
    plots.tidy([axis])
    plots.legend(figure)
    return figure


# --- Pruning ----------------------------------------------------------------------------------------------------------


def pruning_section(log: RunLog, concepts: Sequence[str]) -> Section:
    """Shows the pruning events: steps, sparsities, densities and scores.

    Args:
        log: Log of a run with pruning events.
        concepts: Names of the concepts; as many as each event has densities, or they are numbered.
    """
    num_concepts = len(log.prune[0]["density"])
    names = list(concepts) if len(concepts) == num_concepts else [f"concept {k + 1}" for k in range(num_concepts)]
    caption = "Share of the maskable weights that each concept's subnetwork keeps, over the steps of the run."
    figure = Figure("pruning_schedule", caption, functools.partial(_draw_schedule, log, names))
    words = "Scores are computed at every event, each concept's from gradients through its own subnetwork."
    return Section("Pruning", [words], [figure], [_event_table(log, names), *_score_tables(log, names)])


def _event_table(log: RunLog, names: Sequence[str]) -> Table:
    rows = []
    for number, record in enumerate(log.prune, 1):
        row = [str(number), f"{record['epoch'] + 1}", f"{record['step']:,}"]
        row += [_one_or_each(record["sparsity"]), _one_or_each(record["density"])]
        did = [report for report in record.get("concepts", []) if isinstance(report, Mapping)]
        row.append(", ".join(dict.fromkeys(str(one["form"]) for one in did if "form" in one)) or "–")
        row.append(", ".join(dict.fromkeys(str(one["num_grads"]) for one in did if "num_grads" in one)) or "–")
        row.append(_fallbacks(did))
        row.append(f"{record['seconds']:.1f}" if is_number(record.get("seconds")) else "–")
        row.append(f"{record['peak_bytes'] / 1e9:.2f}" if is_number(record.get("peak_bytes")) else "–")
        rows.append(row)
    head = ["event", "epoch", "before step", "asked sparsity %", "density %", "form", "gradients", "blocks by QR"]
    each = (
        "" if all(_is_one(r[key]) for r in log.prune for key in ("sparsity", "density")) else f" ({', '.join(names)})"
    )
    return Table(f"Pruning events{each}", [*head, "seconds", "peak memory, GB"], rows)


def _fallbacks(reports: Sequence[Mapping[str, Any]]) -> str:
    found = [one["qr_blocks"] for one in reports if isinstance(one.get("qr_blocks"), Mapping)]
    return f"{sum(sum(blocks.values()) for blocks in found):,}" if found else "–"


def _is_one(shares: Sequence[float]) -> bool:
    return max(shares) - min(shares) < 5e-4


def _one_or_each(shares: Sequence[float]) -> str:
    return percent(shares[0]) if _is_one(shares) else " / ".join(map(percent, shares))


def _score_tables(log: RunLog, names: Sequence[str]) -> list[Table]:
    """Tabulates mean g² over ζ of each kernel at the last event that has it: by how much gradients exceed damping."""
    for number, record in reversed(list(enumerate(log.prune, 1))):
        reports = [one for one in record.get("concepts", []) if isinstance(one, Mapping)]
        reports = reports[-len(names) :]  # of the last cut, where an event has several
        found = [one["mean_square_over_damping"] for one in reports if "mean_square_over_damping" in one]
        if len(found) == len(names) and all(isinstance(one, Mapping) for one in found):
            kernels = dict.fromkeys(path for one in found for path in one)
            rows = [
                [kernel_name(path), *(f"{one[path]:.3g}" if path in one else "–" for one in found)] for path in kernels
            ]
            caption = (
                f"Mean square of the gradients over the damping ζ, event {number}; relative damping makes it one number"
            )
            return [Table(caption, ["kernel", *names], rows)]
    return []


def _draw_schedule(log: RunLog, names: Sequence[str], pyplot: Any) -> Any:
    figure, axis = pyplot.subplots(figsize=(plots.COLUMN, 2.5), layout="constrained")
    last = max(record["step"] for record in itertools.chain(*log))
    where = [0, *(record["step"] for record in log.prune), last]
    series = [[1.0, *(record["density"][k] for record in log.prune)] for k in range(len(names))]
    is_one = all(_is_one(record["density"]) for record in log.prune)
    for k, name in enumerate(["every concept"] if is_one else names):
        kept = [100 * share for share in (*series[k], series[k][-1])]
        axis.step(where, kept, where="post", label=plots.label(name), markevery=slice(1, -1), **plots.style(k))
    axis.set(xlabel="step", ylabel="weights kept (%)", ylim=(0, 103), xlim=(0, None))
    plots.tidy([axis])
    plots.legend(figure)
    return figure
