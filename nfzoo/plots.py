"""Pictures from logs and tables only: depth profiles, histories, learning-rate scans. No Keras here."""

import pathlib
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nfzoo.files import atomic

# Rows of a depth profile: title, kind of record, place, statistic.
PANELS: dict[str, tuple[str, str, str, str]] = {
    "mean": ("average channel\nsquared mean", "activation", "block", "acsm"),
    "variance": ("average channel\nvariance", "activation", "block", "acv"),
    "branch": ("residual branch\nvariance", "activation", "branch", "acv"),
    "gradient": ("gradient at block\noutput, mean square", "gradient", "block", "second_moment"),
}
_ROUNDING = 1e-8
_COLOURS = matplotlib.colormaps["viridis"]


def save(figure: Figure, path: str | pathlib.Path) -> pathlib.Path:
    """Write a figure as PNG (or what the ending says), whole or not at all."""
    with atomic(path) as partial:
        figure.savefig(partial, dpi=150)
    return pathlib.Path(path)


def _stage_ends(layers: Sequence[str]) -> list[float]:
    """Positions between two blocks of different stages, by the names "stageS_blockB_…"."""
    stages = [match.group(1) if (match := re.match(r"(stage\d+)_", name)) else name for name in layers]
    return [i + 0.5 for i, (a, b) in enumerate(zip(stages, stages[1:], strict=False)) if a != b and "stage" in a + b]


def depth_profile(axes: Axes, log: pd.DataFrame, kind: str, place: str, stat: str, most: int = 6) -> None:
    """Draw one statistic by depth, one line per epoch (at most `most`, first and last included)."""
    rows = log[(log.kind == kind) & (log.place == place)]
    if rows.empty:
        axes.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=axes.transAxes, color="grey")
        axes.set_axis_off()
        return
    layers = rows.sort_values("depth").layer.unique()
    first = 1 if place == "branch" else 0  # block 0 is the stem, which has no branch
    position = {layer: i for i, layer in enumerate(layers, first)}
    steps = sorted(rows.step.unique())
    shown = [steps[i] for i in sorted({round(i) for i in np.linspace(0, len(steps) - 1, min(most, len(steps)))})]
    for step in shown:
        line = rows[rows.step == step].sort_values("depth")
        epoch = int(line.epoch.iloc[0])
        colour = _COLOURS(0.9 * steps.index(step) / max(len(steps) - 1, 1))
        label = "at initialisation" if step == 0 else f"epoch {epoch}"
        # A value that is zero or not finite cannot stand on a logarithmic axis; it leaves a gap.
        values = line[stat].where(np.isfinite(line[stat]) & (line[stat] > 0))
        axes.plot(line.layer.map(position), values, "o-", color=colour, label=label, markersize=3, linewidth=1.2)
    for end in _stage_ends(layers):
        axes.axvline(end + first, color="0.85", linewidth=0.8, zorder=0)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def signal_propagation(logs: Mapping[str, pd.DataFrame], panels: Sequence[str] = tuple(PANELS)) -> Figure:
    """Draw signal propagation of several models side by side: one column per model, one row per quantity.

    Args:
        logs: title -> table of `nfzoo.spp.read` or `nfzoo.spp.snapshot`.
        panels: keys of `PANELS`.

    Returns:
        A figure; the axes of a row share their scale, grey lines mark stage ends.
    """
    logs = {title: log if "step" in log else log.assign(step=0, epoch=0) for title, log in logs.items()}
    size = (1.2 + 3.4 * len(logs), 0.9 + 2.1 * len(panels))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(panels), len(logs), sharey="row", squeeze=False)
    for row, panel in zip(grid, panels, strict=True):
        text, kind, place, stat = PANELS[panel]
        for axes, log in zip(row, logs.values(), strict=True):
            depth_profile(axes, log, kind, place, stat)
            axes.set_xlabel("block (0: stem)", fontsize=8)
            axes.tick_params(labelsize=8)
        row[0].set_ylabel(text, fontsize=9)
        # Right after batch normalization a mean is zero but for rounding; do not stretch the axis to show that.
        row[0].set_ylim(bottom=max(row[0].get_ylim()[0], _ROUNDING if kind == "activation" else 0))
    for axes, title in zip(grid[0], logs, strict=True):
        axes.set_title(title, fontsize=10)
    handles = max((axes.get_legend_handles_labels() for axes in grid.flat), key=lambda pair: len(pair[1]))
    figure.legend(*handles, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    return figure


def histories(runs: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw loss and accuracy of several runs by epoch: training dashed, validation solid."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for i, (title, history) in enumerate(runs.items()):
            axes.plot(history.epoch, history[key], "--", color=f"C{i}", linewidth=1)
            if f"val_{key}" in history:
                axes.plot(history.epoch, history[f"val_{key}"], "o-", color=f"C{i}", label=title, markersize=3)
        axes.set_xlabel("epoch")
        axes.set_ylabel(key)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8, title="validation; training dashed", title_fontsize=8)
    return figure


def scan(summary: pd.DataFrame) -> Figure:
    """Draw test accuracy against learning rate, mean ± std over seeds; a cross marks cells with diverged trials.

    Args:
        summary: table of `nfzoo.tune.summary`.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for i, (model, cells) in enumerate(summary.groupby("model", sort=False)):
        cells = cells.sort_values("learning_rate")
        mean, std = 100 * cells["mean"], 100 * cells["std"].fillna(0)
        axes.errorbar(
            cells.learning_rate, mean, yerr=std, fmt="o-", color=f"C{i}", label=model, capsize=3, markersize=4
        )
        lost = cells.diverged > 0
        axes.plot(cells.learning_rate[lost], mean[lost], "x", color=f"C{i}", markersize=10)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("test accuracy, %")
    axes.legend(fontsize=8)
    return figure
