"""Pictures of the tables of training/results; a function each, of a CSV's lines."""

import pandas as pd
from experiments import TABLES, Row

from nfzoo.plots.style import COLOURS, new_figure, styled


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
    made = new_figure(5.2, 3.4)
    ax = made.subplots()
    for colour, variant in zip(COLOURS, dict.fromkeys(row.name.split(", ")[0] for row in rows), strict=False):
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
    ax.legend()
    return made


def draw(table: str, results: pd.DataFrame):
    """The picture of a table of training/experiments.py."""
    return {"small_batches": by_batch}.get(table, points)(TABLES[table], results)
