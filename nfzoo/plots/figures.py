"""Figures of signal propagation: each composes the drawings of `drawing.py`. From tables only.

All take `logs`, {title: table of nfzoo.spp.read or nfzoo.spp.snapshot}, and where theory has something to say `theory`,
{title: table of nfzoo.theory.profile}, drawn dashed.
"""

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from nfzoo.plots import drawing
from nfzoo.plots.select import Grid, Quantity, check, evenly, expected, select_all
from nfzoo.plots.style import (
    THEORY,
    colours,
    curve,
    depth_axis,
    legend,
    mark_stages,
    new_figure,
    nothing,
    scale,
    stage,
    styled,
    titles,
)  # fmt: skip

Logs = Mapping[str, pd.DataFrame]
Panels = Sequence[str | Quantity]
PROPAGATION = ("mean", "variance", "branch", "gradient")
POSTER = ("layer_mean", "layer_variance", "weight", "layer_gradient")
PAPER = ("mean", "variance", "branch")


@styled
def signal_propagation(
    logs: Logs, panels: Panels = PROPAGATION, *, theory: Logs | None = None, most: int = 6
) -> Figure:
    """Draw signal propagation of several models side by side: one column per model, one row per quantity.

    Args:
        logs: title -> table of `nfzoo.spp.read` or `nfzoo.spp.snapshot`.
        panels: keys of `PANELS`.
        theory: title -> table of `nfzoo.theory.profile`.
        most: lines, one per epoch; the first and the last are among them.

    Returns:
        A figure; the axes of a row share their scale, grey lines mark stage ends.

    Raises:
        ValueError: for an unknown panel, an empty log, or logs that recorded none of this.

    Example:
        >>> log = pd.DataFrame({"kind": "activation", "place": "block", "layer": ["stem_out", "stage1_block1_out"],
        ...                     "depth": [0, 1], "step": 0, "epoch": 0, "acsm": [0.0, 0.2], "acv": [1.0, 0.8]})
        >>> figure = signal_propagation({"SN": log, "NF": log}, ["mean", "variance"])
        >>> len(figure.axes), figure.axes[1].get_title()
        (4, 'NF')
    """
    logs = check(logs)
    rows = select_all(logs, panels)
    figure = new_figure(1.2 + 3.2 * len(logs), 0.8 + 1.9 * len(rows))
    grid = figure.subplots(len(rows), len(logs), sharey="row", squeeze=False)
    for row, (what, grids) in zip(grid, rows, strict=True):
        told = _told(what, grids, theory)
        logarithmic = drawing.spans(grids.values(), told.values())
        for axes, (title, found) in zip(row, grids.items(), strict=True):
            drawing.by_depth(axes, found, found.chosen(most), theory=told[title], logarithmic=logarithmic)
            _blocks_axis(axes, found, what)
        row[0].set_ylabel(what.title)
    for axes, title in zip(grid[0], logs, strict=True):
        axes.set_title(title)
    legend(figure)
    return figure


@styled
def epochs(
    logs: Logs, panels: Panels = ("variance", "gradient"), *, theory: Logs | None = None, most: int = 5
) -> Figure:
    """Draw depth profiles as small multiples: one column per epoch, one row per quantity, one line per model.

    Args:
        logs, panels, theory: see `signal_propagation`.
        most: columns, evenly over the steps; the first and the last are among them.

    Example:
        >>> log = pd.DataFrame({"kind": "activation", "place": "block", "layer": "stem_out", "depth": 0,
        ...                     "step": [0, 79], "epoch": [0, 1], "acsm": [0.0, 0.2], "acv": [1.0, 0.8]})
        >>> [axes.get_title() for axes in epochs({"SN": log}, ["variance"]).axes]
        ['at initialisation', 'epoch 1']
    """
    logs = check(logs)
    rows = select_all(logs, panels)
    steps = sorted({step for _, grids in rows for found in grids.values() for step in found.steps})
    steps = [steps[i] for i in evenly(len(steps), most)]
    figure = new_figure(1.0 + 2.2 * len(steps), 0.8 + 1.9 * len(rows))
    grid = figure.subplots(len(rows), len(steps), sharex="row", sharey="row", squeeze=False)
    for row, (what, grids) in zip(grid, rows, strict=True):
        logarithmic = drawing.spans(grids.values(), _told(what, grids, theory).values())
        for axes, step in zip(row, steps, strict=True):
            _models(axes, what, grids, theory, lambda found, at=step: _latest(found, at), logarithmic)
        row[0].set_ylabel(what.title)
    named = next(found for _, grids in rows for found in grids.values() if not found.empty)
    for axes, step in zip(grid[0], steps, strict=True):
        axes.set_title(named.label(step) if step in named.steps else f"step {step}")
    legend(figure)
    return figure


@styled
def compare(
    logs: Logs, panels: Panels = ("variance",), *, theory: Logs | None = None, at: Sequence[str] = ("first", "last")
) -> Figure:
    """Draw models against each other: one line per model, one panel per quantity and time.

    Args:
        logs, panels, theory: see `signal_propagation`.
        at: "first" (what was recorded first, as a rule at initialisation), "last", or both: rows of the figure.

    Example:
        >>> log = pd.DataFrame({"kind": "activation", "place": "block", "layer": ["stem_out", "stage1_block1_out"],
        ...                     "depth": [0, 1], "step": 0, "epoch": 0, "acsm": [0.0, 0.2], "acv": [1.0, 0.8]})
        >>> figure = compare({"SN": log, "NF": log}, ["variance"])
        >>> [line.get_label() for line in figure.axes[0].lines if not line.get_label().startswith("_")]
        ['SN', 'NF']
    """
    logs = check(logs)
    if unknown := set(at) - {"first", "last"}:
        raise ValueError(f'Expected at to hold "first" or "last". Received: {sorted(unknown)}')
    columns = select_all(logs, panels)
    times = [when for when in at if when == "first" or len(at) == 1 or _trained(columns)]
    figure = new_figure(1.0 + 3.6 * len(columns), 0.8 + 2.3 * len(times))
    grid = figure.subplots(len(times), len(columns), squeeze=False)
    for row, when in zip(grid, times, strict=True):
        for axes, (what, grids) in zip(row, columns, strict=True):
            position = 0 if when == "first" else -1
            _models(axes, what, grids, theory, lambda found, at=position: found.steps[at])
            axes.set_ylabel(what.title)
            if len(times) > 1:
                begins = {found.label(found.steps[0]) for found in grids.values()}
                first = begins.pop() if len(begins) == 1 else "at first"
                axes.set_title(first if when == "first" else "at the end")
    legend(figure)
    return figure


@styled
def history(logs: Logs, panels: Panels = PROPAGATION, *, layers: Sequence[str] | None = None, most: int = 6) -> Figure:
    """Draw layers over time: one line per layer, one row per quantity, one column per model.

    Args:
        logs, panels: see `signal_propagation`.
        layers: names; default: at most `most`, evenly over depth. A row shows those that have its quantity.

    Example:
        >>> log = pd.DataFrame({"kind": "activation", "place": "block", "layer": "stem_out", "depth": 0,
        ...                     "step": [0, 79], "epoch": [0, 1], "acsm": [0.0, 0.2], "acv": [1.0, 0.8]})
        >>> history({"SN": log}, ["variance"]).axes[0].get_xlabel()
        'epoch'
    """
    logs = check(logs)
    rows = select_all(logs, panels)
    figure = new_figure(1.2 + 3.2 * len(logs), 0.8 + 1.9 * len(rows))
    grid = figure.subplots(len(rows), len(logs), sharey="row", sharex="col", squeeze=False)
    known = {layer for _, grids in rows for found in grids.values() for layer in found.layers}
    if layers is not None and (unknown := [layer for layer in layers if layer not in known]):
        raise ValueError(
            f"Expected layers of the log, such as {', '.join(sorted(known)[:4])}. Received: {', '.join(unknown)}"
        )
    chosen = [{title: _chosen(found, title, rows, layers, most) for title, found in grids.items()} for _, grids in rows]
    shown = [
        (found, some[title]) for some, (_, grids) in zip(chosen, rows, strict=True) for title, found in grids.items()
    ]
    hues = colours(titles(found.layers)[layer] for found, some in shown for layer in some)
    for row, (what, grids), some in zip(grid, rows, chosen, strict=True):
        logarithmic = drawing.spans(grids.values())
        for axes, (title, found) in zip(row, grids.items(), strict=True):
            if some[title]:
                drawing.over_time(axes, found, some[title], logarithmic=logarithmic, hues=hues)
            else:
                nothing(axes)
        row[0].set_ylabel(what.title)
    for column, title in zip(grid.T, logs, strict=True):
        column[0].set_title(title)
        *above, lowest = [axes for axes in column if axes.axison] or [column[-1]]
        lowest.tick_params(labelbottom=True)
        for axes in above:
            axes.set_xlabel("")
    legend(figure)
    return figure


@styled
def heatmap(logs: Logs, panel: str | Quantity = "variance") -> Figure:
    """Draw one quantity as a map of layers by epochs, one panel per model, all in one colour scale.

    Args:
        logs: see `signal_propagation`.
        panel: a key of `PANELS`.

    Example:
        >>> log = pd.DataFrame({"kind": "activation", "place": "block", "layer": "stem_out", "depth": 0,
        ...                     "step": [0, 79], "epoch": [0, 1], "acsm": [0.0, 0.2], "acv": [1.0, 0.8]})
        >>> heatmap({"SN": log}, "variance").axes[0].get_title()
        'SN'
    """
    logs = check(logs)
    ((what, grids),) = select_all(logs, [panel])
    tallest = max(len(found.layers) for found in grids.values())
    figure = new_figure(1.6 + 3.0 * len(logs), min(1.2 + 0.12 * tallest, 8.0) if tallest > 12 else 2.8)
    row = figure.subplots(1, len(logs), squeeze=False)[0]
    norm = drawing.common_norm(list(grids.values()))
    meshes = [drawing.heat(axes, found, norm) for axes, found in zip(row, grids.values(), strict=True)]
    for axes, title in zip(row, logs, strict=True):
        axes.set_title(title)
    mesh = next((mesh for mesh in meshes if mesh is not None), None)
    if mesh is not None and norm is not None:
        figure.colorbar(mesh, ax=list(row), label=what.title.replace("\n", " "), fraction=0.05, pad=0.02)
    legend(figure)
    return figure


# ------------------------------------------------------------------ what the figures share
def _told(what: Quantity, grids: Mapping[str, Grid], theory: Logs | None) -> dict[str, pd.Series]:
    return {title: expected((theory or {}).get(title), what, found.layers) for title, found in grids.items()}


def _blocks_axis(axes, found: Grid, what: Quantity) -> None:
    if found.empty:
        return
    if what.place in ("block", "branch") and all(stage(layer) or "stem" in layer for layer in found.layers):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("block (0: stem)")
    else:
        depth_axis(axes, found.layers, found.first)


def _models(axes, what, grids: Mapping[str, Grid], theory, step_of, logarithmic: bool | None = None) -> None:
    """One line per model, each with its theory in its own colour."""
    shown = {title: found for title, found in grids.items() if not found.empty}
    if not shown:
        return nothing(axes)
    steps = {title: step for title, found in shown.items() if (step := step_of(found)) is not None}
    told = _told(what, shown, theory)
    if logarithmic is None:
        logarithmic = drawing.spans([shown[title].at(step) for title, step in steps.items()], told.values())
    hues = colours(grids)
    for title, step in steps.items():
        found = shown[title]
        curve(
            axes, found.positions, found.values[step], logarithmic=logarithmic, label=title, color=hues[title],
            measured=found.measured[step].to_numpy(), rounding=found.rounding[step].to_numpy(),
        )  # fmt: skip
        if told[title].notna().any():
            drawing.draw_theory(axes, found, told[title], logarithmic, color=hues[title], alpha=0.7, label="_theory")
    if any(series.notna().any() for series in told.values()):
        axes.add_line(Line2D([], [], label="theory", **THEORY))
    longest = max(shown.values(), key=lambda found: len(found.layers))
    mark_stages(axes, longest.layers, longest.first)
    scale(axes, logarithmic)
    axes.margins(x=0.03)
    _blocks_axis(axes, longest, what)


def _chosen(found: Grid, title: str, rows, layers: Sequence[str] | None, most: int) -> list[str]:
    """The layers of one panel; by default, of the same blocks in all panels of a model."""
    if layers is not None:
        return [layer for layer in layers if layer in found.layers]
    names = max((list(titles(grids[title].layers).values()) for _, grids in rows), key=len)
    kept = {names[i] for i in evenly(len(names), most)}
    mine = [layer for layer, name in titles(found.layers).items() if name in kept]
    return mine or [found.layers[i] for i in evenly(len(found.layers), most)]


def _latest(found: Grid, step: int) -> int | None:
    """The last step that was measured by then."""
    return max((s for s in found.steps if s <= step), default=None)


def _trained(columns) -> bool:
    return any(len(found.steps) > 1 for _, grids in columns for found in grids.values())
