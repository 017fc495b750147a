"""Figures of training: histories, learning-rate scans."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nfzoo.plots.style import colour, styled


@styled
def histories(runs: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw loss and accuracy of several runs by epoch: training dashed, validation solid.

    Args:
        runs: title -> table of a run's history.csv.
    """
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for i, (title, history) in enumerate(runs.items()):
            axes.plot(history.epoch, history[key], "--", color=colour(i), linewidth=1)
            if f"val_{key}" in history:
                axes.plot(history.epoch, history[f"val_{key}"], "o-", color=colour(i), label=title, markersize=3)
        axes.set_xlabel("epoch")
        axes.set_ylabel(key)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(title="validation; training dashed")
    return figure


@styled
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
            cells.learning_rate, mean, yerr=std, fmt="o-", color=colour(i), label=model, capsize=3, markersize=4
        )
        lost = cells.diverged > 0
        axes.plot(cells.learning_rate[lost], mean[lost], "x", color=colour(i), markersize=10)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("test accuracy, %")
    axes.legend()
    return figure
