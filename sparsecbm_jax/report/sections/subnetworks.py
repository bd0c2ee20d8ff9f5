"""The kept weights of the concepts' subnetworks, and the changes by edits, as sections.

Reference: Tan et al. 2024, 'Holistic and Intelligible Decision-making Pathways', Figure 6.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from sparsecbm_jax.correction.edit_view import EditChange
from sparsecbm_jax.explanation.subnetworks import QUANTILES, SubnetworkReport
from sparsecbm_jax.report import plots
from sparsecbm_jax.report.elements import Figure, Section, Table, kernel_name, percent

# Beyond this many layers the numbers of a drawn grid would overlap; beyond this many cells a drawing of paths is large.
_MAX_NUMBERED, _MAX_VECTOR_CELLS = 12, 1000
_LOW, _MIDDLE, _HIGH = (QUANTILES.index(share) for share in (0.1, 0.5, 0.9))


# --- Kept weights -----------------------------------------------------------------------------------------------------


def subnetworks_section(report: SubnetworkReport) -> Section:
    """Shows the share that each concept keeps of layers, kernels, heads and rows, and the overlap of pairs."""
    concepts = report.concepts
    notes = dict.fromkeys(concept.note for concept in concepts)
    words = [note for note in notes if note]
    figures = []
    # Where selection fixed the densities, they are all one number.
    if "" in notes:
        if report.num_layers > 1:
            caption = "Share of each transformer layer's maskable weights that a concept keeps."
            figures.append(Figure("density_by_layer", caption, functools.partial(_draw_layers, report)))
        caption = "Share of each kernel's weights that a concept keeps, layer by layer, in percent."
        figures.append(Figure("density_by_kernel", caption, functools.partial(_draw_kernels, report)))
    if any(concept.heads for concept in concepts):
        caption = "Share of each attention head's weights that a concept keeps, layer by layer, in percent."
        figures.append(Figure("density_by_head", caption, functools.partial(_draw_heads, report)))
    if report.overlaps:
        caption = (
            "Weights that both of two concepts keep over those that either keeps, and the same for independent choices "
            "of all weights, and for independent choices within each kernel of each layer."
        )
        figures.append(Figure("overlap", caption, functools.partial(_draw_overlaps, report)))
    caption = (
        "Share of their weights that single rows of a kernel keep: the median row, and a line from the 10 % of rows "
        "that keep least to the 10 % that keep most; means over layers. A row holds the weights of one input."
    )
    figures.append(Figure("density_of_rows", caption, functools.partial(_draw_rows, report)))
    words.insert(0, f"Shares are of the backbone's {report.num_weights:,} maskable weights.")
    tables = [_concept_table(report), _kernel_table(report), _row_table(report)]
    if report.overlaps:
        tables.append(_overlap_table(report))
    if any(concept.heads for concept in concepts):
        tables.append(_head_table(report))
    return Section("Subnetworks", words, figures, tables)


def _concept_table(report: SubnetworkReport) -> Table:
    rows = []
    for concept in report.concepts:
        one = concept.summary
        row = [concept.name, percent(one.density), *(percent(share) for share in one.density_per_layer)]
        row += [f"{percent(one.exclusive)} ({percent(concept.exclusive_by_chance)})"]
        rows.append([*row, f"{percent(one.shared)} ({percent(concept.shared_by_chance)})"])
    layers = [f"layer {n + 1}" for n in range(len(report.concepts[0].summary.density_per_layer))]
    head = ["concept", "all", *layers, "kept by it alone (by chance)", "kept by all (by chance)"]
    return Table(
        "Share of weights that each concept keeps, and share of these that others keep, in percent", head, rows
    )


def _kernel_table(report: SubnetworkReport) -> Table:
    rows = []
    for number, kernel in enumerate(report.concepts[0].kernels):
        shares = [percent(concept.kernels[number].density) for concept in report.concepts]
        rows.append([kernel_name(kernel.path), f"{kernel.num_rows} × {kernel.num_columns}", *shares])
    head = ["kernel", "rows × columns", *(concept.name for concept in report.concepts)]
    return Table("Share of each kernel's weights that a concept keeps, all layers, in percent", head, rows)


def _row_table(report: SubnetworkReport) -> Table:
    rows = []
    for number, kernel in enumerate(report.concepts[0].kernels):
        row = [kernel_name(kernel.path)]
        for concept in report.concepts:
            spread = concept.kernels[number].rows
            low, middle, high = np.mean(spread.quantiles, axis=0)[[_LOW, _MIDDLE, _HIGH]]
            row.append(f"{percent(middle)} ({percent(low)} to {percent(high)}), {sum(spread.num_empty)} empty")
        rows.append(row)
    caption = "Share that single rows keep: median (10 to 90 % of rows) in percent, and rows that keep nothing"
    return Table(caption, ["kernel", *(concept.name for concept in report.concepts)], rows)


def _overlap_table(report: SubnetworkReport) -> Table:
    rows = [
        [" and ".join(pair.concepts), f"{pair.jaccard:.3f}", f"{pair.chance:.3f}", f"{pair.chance_within_kernels:.3f}"]
        for pair in report.overlaps
    ]
    head = ["concepts", "Jaccard index", "by chance", "by chance within kernels"]
    return Table("Overlap of subnetworks", head, rows)


def _head_table(report: SubnetworkReport) -> Table:
    rows = [
        [f"{concept.name}, layer {n + 1}", *(percent(share) for share in shares)]
        for concept in report.concepts
        for n, shares in enumerate(concept.heads or ())
    ]
    head = ["concept and layer", *(f"head {n + 1}" for n in range(report.num_heads))]
    return Table("Share of each attention head's weights that a concept keeps, in percent", head, rows)


def _draw_layers(report: SubnetworkReport, pyplot: Any) -> Any:
    figure, axis = pyplot.subplots(figsize=(plots.COLUMN, 2.6), layout="constrained")
    for k, concept in enumerate(report.concepts):
        shares = [100 * share for share in concept.summary.density_per_layer]
        axis.plot(range(1, len(shares) + 1), shares, label=plots.label(concept.name), **plots.style(k))
    most = max(share for concept in report.concepts for share in concept.summary.density_per_layer)
    axis.set(xlabel="layer", ylabel="weights kept (%)", ylim=(0, 108 * most or 1))
    axis.xaxis.get_major_locator().set_params(integer=True)
    plots.tidy([axis])
    plots.legend(figure)
    return figure


def _draw_kernels(report: SubnetworkReport, pyplot: Any) -> Any:
    layered = [n for n, kernel in enumerate(report.concepts[0].kernels) if kernel.path.startswith("layers/")]
    names = [kernel_name(report.concepts[0].kernels[n].path) for n in layered]
    grids = {
        concept.name: np.array([concept.kernels[n].density_per_layer for n in layered]) for concept in report.concepts
    }
    return _draw_grids(pyplot, grids, names, "layer")


def _draw_heads(report: SubnetworkReport, pyplot: Any) -> Any:
    names = [f"layer {n + 1}" for n in range(report.num_layers)]
    return _draw_grids(pyplot, {one.name: np.array(one.heads) for one in report.concepts if one.heads}, names, "head")


def _draw_grids(pyplot: Any, grids: dict[str, Float[np.ndarray, "r c"]], names: Sequence[str], across: str) -> Any:
    """Draws shares as a grid for each concept, on one scale."""
    num_rows, num_columns = next(iter(grids.values())).shape
    per_line = min(len(grids), 4 if num_columns <= _MAX_NUMBERED // 2 else 2)
    num_lines = -(-len(grids) // per_line)
    size = (plots.BOTH, (0.5 + 0.24 * num_rows) * num_lines + 0.3)
    figure, axes = pyplot.subplots(num_lines, per_line, figsize=size, layout="constrained", squeeze=False, sharey=True)
    low, high = (
        100 * extreme(grid.min() if extreme is min else grid.max() for grid in grids.values()) for extreme in (min, max)
    )
    drawn = None
    for axis, (name, grid) in zip(axes.flat, grids.items(), strict=False):
        drawn = _grid(axis, 100 * grid, (low, high), "{:.0f}" if high - low > 5 else "{:.1f}")
        axis.set_title(plots.label(name))
        axis.set_yticks(range(num_rows), names)
    for axis in axes.flat[len(grids) :]:
        axis.set_axis_off()
    for axis in axes[-1]:
        axis.set_xlabel(across)
    # Numbers in the cells make a colour bar unnecessary.
    if num_columns > _MAX_NUMBERED:
        figure.colorbar(drawn, ax=axes, label="kept (%)", shrink=0.9, pad=0.01)
    return figure


def _grid(axis: Any, values: Float[np.ndarray, "r c"], scale: tuple[float, float], form: str) -> Any:
    """Draws cells shaded by value, with the value in each where it fits."""
    low, high = scale
    shown = {"cmap": plots.SEQUENTIAL, "vmin": low, "vmax": max(high, low + 1e-9)}
    num_rows, num_columns = values.shape
    edges = np.arange(num_columns + 1) - 0.5, np.arange(num_rows + 1) - 0.5
    drawn = axis.pcolormesh(
        *edges, values, rasterized=values.size > _MAX_VECTOR_CELLS, edgecolor="white", linewidth=0.5, **shown
    )
    axis.set_ylim(num_rows - 0.5, -0.5)
    every = -(-num_columns // _MAX_NUMBERED)
    axis.set_xticks(range(0, num_columns, every), range(1, num_columns + 1, every))
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    if num_columns <= _MAX_NUMBERED:
        for (row, column), value in np.ndenumerate(values):
            light = (value - low) / (drawn.norm.vmax - low)
            text = {"ha": "center", "va": "center", "fontsize": 6.5, "color": "black" if light > 0.55 else "white"}
            axis.text(column, row, form.format(value), **text)
    return drawn


def _draw_rows(report: SubnetworkReport, pyplot: Any) -> Any:
    kernels, num_concepts = report.concepts[0].kernels, len(report.concepts)
    height = 0.9 + len(kernels) * (0.16 + 0.1 * num_concepts)
    figure, axis = pyplot.subplots(figsize=(plots.COLUMN, height), layout="constrained")
    step = 0.8 / num_concepts
    for k, concept in enumerate(report.concepts):
        style = plots.style(k)
        for place, kernel in enumerate(concept.kernels):
            low, middle, high = 100 * np.mean(kernel.rows.quantiles, axis=0)[[_LOW, _MIDDLE, _HIGH]]
            y = place + step * (k - (num_concepts - 1) / 2)
            axis.plot([low, high], [y, y], color=style["color"], linewidth=1.2)
            axis.plot(middle, y, linestyle="none", label=None if place else plots.label(concept.name), **style)
    axis.set_yticks(range(len(kernels)), [kernel_name(kernel.path) for kernel in kernels])
    axis.invert_yaxis()
    axis.set_xlabel("kept of a row (%)")
    plots.tidy([axis])
    axis.grid(axis="y", visible=False)
    plots.legend(figure)
    return figure


def _draw_overlaps(report: SubnetworkReport, pyplot: Any) -> Any:
    pairs = report.overlaps
    figure, axis = pyplot.subplots(figsize=(plots.COLUMN, 1.2 + 0.24 * len(pairs)), layout="constrained")
    places = range(len(pairs))
    series = (
        ("chance", [pair.chance for pair in pairs], {"color": plots.GREY, "marker": "|", "markersize": 10}),
        ("chance within kernels", [pair.chance_within_kernels for pair in pairs], {**plots.style(1), "marker": "d"}),
        ("overlap", [pair.jaccard for pair in pairs], plots.style(0)),
    )
    for label, values, style in series:
        axis.plot(values, places, linestyle="none", label=label, **style)
    axis.set_yticks(places, [", ".join(plots.label(name, 14) for name in pair.concepts) for pair in pairs])
    axis.invert_yaxis()
    axis.set_xlabel("Jaccard index")
    plots.tidy([axis])
    plots.legend(figure)
    return figure


# --- Changes by edits -------------------------------------------------------------------------------------------------


def edits_section(changes: Sequence[EditChange], about: Sequence[Sequence[str]]) -> Section:
    """Shows the changes of the subnetworks by active edits.

    Args:
        changes: Changes by each edit, oldest first.
        about: Id of each edit, and its request.
    """
    by_concept: dict[str, list[EditChange]] = {}
    for change in changes:
        by_concept.setdefault(change.concept, []).append(change)
    rows = [
        [*names, change.concept, f"{change.num_dropped:,}", f"{change.num_grown:,}"]
        for names, change in zip(about, changes, strict=True)
    ]
    tables = [Table("Active edits, oldest first", ["edit", "asked", "concept", "dropped", "grown"], rows)]
    tables += [_change_table(concept, of_concept) for concept, of_concept in by_concept.items()]
    caption = (
        "Weights that the active edits dropped from each concept's mask (left) and grew in it (right), by kernel and "
        "layer; shaded within each concept."
    )
    dropped, grown = (sum(getattr(change, name) for change in changes) for name in ("num_dropped", "num_grown"))
    count = "One edit is" if len(changes) == 1 else f"{len(changes)} edits are"
    words = f"{count} active: {dropped:,} weights dropped and {grown:,} grown. No parameter changed."
    figure = Figure("change_after_edits", caption, functools.partial(_draw_changes, by_concept))
    return Section("Change after edits", [words], [figure], tables)


def _change_table(concept: str, changes: Sequence[EditChange]) -> Table:
    kernels = dict.fromkeys(kernel.path for change in changes for kernel in change.kernels)
    found = {path: [one for change in changes for one in change.kernels if one.path == path] for path in kernels}
    num_layers = max((len(ones[0].dropped) for ones in found.values()), default=1)
    rows = []
    for path, ones in found.items():
        dropped, grown, touched = (
            np.sum([getattr(one, name) for one in ones], axis=0) for name in ("dropped", "grown", "rows")
        )
        cells = [f"−{d} +{g}, {r}" if d or g else "–" for d, g, r in zip(dropped, grown, touched, strict=True)]
        rows.append([kernel_name(path), *cells, *("" for _ in range(num_layers - len(cells)))])
    head = ["kernel", *(f"layer {n + 1}" for n in range(num_layers))]
    return Table(f"Changes of {concept}: weights dropped (−) and grown (+), and rows touched, edit by edit", head, rows)


def _draw_changes(by_concept: dict[str, list[EditChange]], pyplot: Any) -> Any:
    changes = [change for of_concept in by_concept.values() for change in of_concept]
    kernels = list(dict.fromkeys(kernel.path for change in changes for kernel in change.kernels))
    num_layers = max((len(kernel.dropped) for change in changes for kernel in change.kernels), default=1)
    grids = np.zeros((len(by_concept), 2, max(len(kernels), 1), num_layers))
    for line, of_concept in zip(grids, by_concept.values(), strict=True):
        for kernel in (kernel for change in of_concept for kernel in change.kernels):
            for grid, counts in zip(line, (kernel.dropped, kernel.grown), strict=True):
                grid[kernels.index(kernel.path), : len(counts)] += counts
    size = (plots.BOTH, (0.55 + 0.24 * grids.shape[2]) * len(by_concept) + 0.3)
    figure, axes = pyplot.subplots(
        len(by_concept), 2, figsize=size, layout="constrained", squeeze=False, sharex=True, sharey=True
    )
    for line, of_line, concept in zip(axes, grids, by_concept, strict=True):
        drawn = None
        for axis, grid, what in zip(line, of_line, ("dropped", "grown"), strict=True):
            drawn = _grid(axis, grid, (0, of_line.max()), "{:.0f}")
            axis.set_title(f"{plots.label(concept)}: {what}")
        line[0].set_yticks(range(len(kernels)), list(map(kernel_name, kernels)))
        if num_layers > _MAX_NUMBERED:
            figure.colorbar(drawn, ax=line, label="weights", pad=0.01)
    for axis in axes[-1]:
        axis.set_xlabel("layer")
    return figure
