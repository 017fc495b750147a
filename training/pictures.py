"""Pictures of the tables of training/results; a function each, of a CSV's lines."""

import math
import textwrap

import pandas as pd
from experiments import TABLES, Row
from matplotlib.colors import LogNorm

from nfzoo.plots.style import COLOURS, SEQUENCE, new_figure, styled


@styled
def points(rows: list[Row], results: pd.DataFrame):
    """Test accuracies, a point per seed, over what was expected."""
    rows = [row for row in rows if (results.row == row.name).any()]
    made = new_figure(6, 0.9 + 0.27 * len(rows))
    ax = made.subplots()
    for at, row in enumerate(rows):
        accuracies = 100 * results[results.row == row.name].test_accuracy
        if row.expected is not None:
            ax.barh(at, 2 * row.tolerance, left=row.expected - row.tolerance, height=0.6, color="#dddddd")
            ax.plot([row.expected] * 2, [at - 0.3, at + 0.3], color="#888888")
        ax.plot(accuracies, [at] * len(accuracies), "o", color=COLOURS[0], markersize=5)
    ax.set_yticks(range(len(rows)), [row.name for row in rows])
    ax.invert_yaxis()
    ax.set_xlim(0, None)
    ax.set_xlabel("test accuracy, % (a point: a seed; a bar: expected)")
    return made


@styled
def by_batch(rows: list[Row], results: pd.DataFrame):
    """Test accuracy against the batch size, a line per variant: mean over seeds, and their standard deviation."""
    named = results.assign(
        variant=results.row.str.split(", ").str[0], batch=results.row.str.split().str[-1].astype(int)
    )
    made = new_figure(5.6, 3.2)
    ax = made.subplots()
    variants = [name for name in dict.fromkeys(row.name.split(", ")[0] for row in rows) if name in set(named.variant)]
    for colour, variant in zip(COLOURS, variants, strict=False):
        accuracy = 100 * named[named.variant == variant].groupby("batch").test_accuracy.agg(["mean", "std"])
        ax.errorbar(
            accuracy.index, accuracy["mean"], accuracy["std"], color=colour, marker="o", markersize=4, capsize=3,
            label=variant,
        )  # fmt: skip
    ax.set_xscale("log", base=2)
    batches = sorted(named.batch.unique())
    ax.set_xticks(batches, batches)
    ax.minorticks_off()
    ax.set_xlabel("batch size, the same examples seen in all")
    ax.set_ylabel("test accuracy, %")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return made


@styled
def branches(shares: pd.DataFrame):
    """How much a block's output owes to its branch, by block and epoch, a panel per network: dark is dead."""
    rows, blocks = list(dict.fromkeys(shares.row)), sorted(shares.block.unique())
    across = min(len(rows), 6)  # more would be too small to read on a page
    down = math.ceil(len(rows) / across)
    made = new_figure(1.8 + 1.45 * across, down * (0.9 + 0.22 * len(blocks)))
    axes = made.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
    for ax in axes[len(rows) :]:
        ax.set_axis_off()
    for ax, row in zip(axes, rows, strict=False):
        grid = shares[shares.row == row].pivot(index="block", columns="epoch", values="share").reindex(blocks)
        mesh = ax.pcolormesh(
            grid.columns, range(len(blocks)), grid, cmap=SEQUENCE, norm=LogNorm(1e-4, 1, clip=True), shading="nearest"
        )
        ax.set_title(textwrap.fill(row, 14))
        ax.set_xlabel("epoch")
    axes[0].set_yticks(range(len(blocks)), [block.replace("_", " ") for block in blocks])
    axes[0].invert_yaxis()
    made.colorbar(mesh, ax=axes, extend="min", label="mean square, branch / block output")
    return made


@styled
def contest(trials: pd.DataFrame, finals: pd.DataFrame, to_beat: str, claimed: str | None = None):
    """Candidates: validation accuracy of their trials by learning rate; test accuracy of finals by seed.

    The best on validation comes first, of finals before trials; what the contest claims is in bold.
    """
    trials, finals = (  # what diverged has none right
        runs.assign(val_accuracy=runs.val_accuracy.where(runs.status == "complete", 0.0)) for runs in (trials, finals)
    )
    best = trials.groupby("row").val_accuracy.max()
    rank = finals.groupby("row").val_accuracy.mean().reindex(best.index).fillna(-1.0)
    finals = finals.dropna(subset="test_accuracy")
    names = sorted(best.index, key=lambda name: (rank[name], best[name]), reverse=True)
    panels = [(trials, "val_accuracy", f"validation accuracy after {trials.epochs.iloc[0]} epochs, %")]
    if len(finals):
        panels.append((finals, "test_accuracy", f"test accuracy, % (a point: a seed; grey: {to_beat})"))
    made = new_figure(4 + 3 * len(panels), 1.2 + 0.3 * len(names))
    colours = dict(zip(sorted(trials.learning_rate.unique()), COLOURS, strict=False))
    axes = made.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (runs, column, label) in zip(axes, panels, strict=True):
        for rate, part in runs.groupby("learning_rate"):
            places = [names.index(name) for name in part.row]
            ax.plot(100 * part[column], places, "o", color=colours[rate], label=f"{rate:g}")
        ax.set_xlabel(label)
    if to_beat in set(finals.row):
        line = 100 * finals[finals.row == to_beat].test_accuracy
        axes[-1].axvspan(line.min(), line.max(), color="#dddddd", zorder=0)
    for label in axes[0].set_yticks(range(len(names)), names):
        label.label1.set_fontweight("bold" if label.label1.get_text() == claimed else "normal")
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    made.legend(*axes[0].get_legend_handles_labels(), title="learning rate", loc="outside right center")
    return made


@styled
def generalization(groups: dict[str, pd.DataFrame]):
    """Accuracy on the images that were trained on against that on validation, at the end; a point per run."""
    made = new_figure(8.4, 5.6)
    ax = made.subplots()
    for colour, (group, runs) in zip(COLOURS, groups.items(), strict=False):
        at = 100 * runs[["accuracy", "val_accuracy"]]
        ax.plot(at.accuracy, at.val_accuracy, "o", color=colour, label=group)
        for name, (x, y) in zip(runs.row, at.values, strict=True):
            ax.annotate(name, (x, y), (4, -3), textcoords="offset points", fontsize=6, color="#555555")
    ends = ax.get_xlim()
    ax.plot(ends, ends, ":", color="#888888", zorder=0)
    ax.set_ylim(top=100 * max(runs.val_accuracy.max() for runs in groups.values()) + 1)
    ax.set_xlim(ends[0], ends[1] + 1)
    ax.set_xlabel("training accuracy in the last epoch, %")
    ax.set_ylabel("validation accuracy, %")
    ax.legend(loc="upper left")
    return made


def draw(table: str, results: pd.DataFrame):
    """The picture of a table of training/experiments.py."""
    return {"small_batches": by_batch}.get(table, points)(TABLES[table], results)
