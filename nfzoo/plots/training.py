"""Figures of training: histories, learning-rate scans, range tests."""

import math
from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nfzoo.plots.style import COLOURS, colour, legend, styled


@styled
def histories(runs: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw loss and accuracy of several runs by epoch: training dashed, validation solid.

    Args:
        runs: title -> table of a run's history.csv.

    Example:
        >>> table = pd.DataFrame({"epoch": [1, 2], "loss": [2.0, 1.5], "accuracy": [0.3, 0.4], "val_loss": [2.1, 1.7],
        ...                       "val_accuracy": [0.2, 0.3]})
        >>> [axes.get_ylabel() for axes in histories({"SN": table}).axes]
        ['loss', 'accuracy']
    """
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for i, (title, history) in enumerate(runs.items()):
            judged = f"val_{key}" in history
            axes.plot(history.epoch, history[key], "--", color=colour(i), linewidth=1, label=None if judged else title)
            if judged:
                axes.plot(history.epoch, history[f"val_{key}"], "o-", color=colour(i), label=title, markersize=3)
        axes.set_xlabel("epoch")
        axes.set_ylabel(key)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(title="validation; training dashed")
    return figure


@styled
def scan(summary: pd.DataFrame, x: str = "learning_rate") -> Figure:
    """Draw accuracy against learning rate: mean, and a band of ± std over seeds, for every model.

    Settings of several axes have a line for each combination of the others where these are few, else points without
    lines. A cross marks settings with diverged trials, a square those that ran out of memory.

    Args:
        summary: table of `nfzoo.tune.summary`.
        x: its column along which to draw.

    Example:
        >>> summary = pd.DataFrame({"model": "sn_efficientnet_b0", "learning_rate": [1e-3, 1e-2], "mean": [0.3, 0.01],
        ...                         "std": [0.01, 0.0], "diverged": [0, 2], "out_of_memory": 0})
        >>> axes = scan(summary).axes[0]
        >>> axes.get_xlabel(), axes.get_xscale()
        ('learning rate', 'log')
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    others = list(summary.columns)[1 : summary.columns.get_loc("mean")]
    others = [name for name in others if name != x and summary[name].nunique(dropna=False) > 1]
    lines = len(summary[["model", *others]].drop_duplicates()) <= 2 * len(COLOURS)
    for i, (key, cells) in enumerate(
        summary.groupby(["model", *others] if lines else ["model"], sort=False, dropna=False)
    ):
        label = ", ".join([key[0], *[f"{name} {value}" for name, value in zip(others, key[1:], strict=False)]])
        _scan_line(axes, cells.sort_values(x), x, "o-" if lines else "o", label, colour(i))
    for status, marker in (("diverged", "x"), ("out_of_memory", "s")):
        failed = summary[summary[status] > 0]
        style = {"color": "#B00020", "markersize": 8, "linestyle": "none", "fillstyle": "none", "zorder": 4}
        if len(failed):
            axes.plot(failed[x], 100 * failed["mean"], marker, label=f"{status.replace('_', ' ')} trials", **style)
    if summary[x].min() > 0:
        axes.set_xscale("log")
    axes.set_xlabel(x.replace("_", " "))
    axes.set_ylabel(f"{summary.attrs.get('of', 'accuracy')}, %")
    legend(figure)
    return figure


def _scan_line(axes: Axes, cells: pd.DataFrame, x: str, marker: str, label: str, colour: str) -> None:
    mean, std = 100 * cells["mean"], 100 * cells["std"].fillna(0)
    axes.plot(cells[x], mean, marker, color=colour, label=label, markersize=4)
    if "-" in marker:
        axes.fill_between(
            cells[x], (mean - std).clip(lower=0), (mean + std).clip(upper=100), color=colour, alpha=0.18, linewidth=0
        )
    else:
        axes.errorbar(cells[x], mean, yerr=std, fmt="none", color=colour, linewidth=0.8)


@styled
def range_test(table: pd.DataFrame, suggestions: Mapping[str, float]) -> Figure:
    """Draw the loss of a learning rate range test, and the learning rates that it suggests.

    Args:
        table: `nfzoo.tune.RangeTest.table`.
        suggestions: name -> learning rate.

    Example:
        >>> table = pd.DataFrame({"learning_rate": [1e-3, 1e-2, 1e-1], "loss": [2, 1, 9], "smoothed": [2.0, 1.4, 3.0]})
        >>> range_test(table, {"tenth": 1e-3}).axes[0].get_xscale()
        'log'
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(table.learning_rate, table.loss, color="0.7", linewidth=0.8, label="loss of the step")
    axes.plot(table.learning_rate, table.smoothed, color=colour(0), label="smoothed")
    for i, (name, rate) in enumerate(suggestions.items(), 1):
        if math.isfinite(rate):
            axes.axvline(rate, color=colour(i), linestyle="--", label=f"{name}: {rate:.2g}")
    axes.set_xscale("log")
    # One step of a diverged loss would press the rest to the foot.
    seen = table.smoothed[table.smoothed.map(math.isfinite)]
    if len(seen):
        low, high = min(seen.min(), table.loss.min()), seen.iloc[: max(3, seen.argmin() + 1)].max()
        margin = 0.25 * (high - low) or 1.0
        axes.set_ylim(low - margin, high + margin)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    legend(figure)
    return figure
