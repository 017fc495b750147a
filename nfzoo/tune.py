"""Learning-rate scans: keras-tuner walks the grid, every trial is the folder of an ordinary run.

The tuner's own state is not trusted with anything: a scan that was killed finds its finished trials by their folders,
and a trial that diverged is a result.
"""

import pathlib
from collections.abc import Sequence

import keras
import keras_tuner
import pandas as pd
from keras_tuner import errors
from rich.console import Console
from rich.table import Table

from nfzoo import engine, recipes
from nfzoo.files import atomic


class Scan(keras_tuner.GridSearch):
    """Grid search over model, learning rate and seed; a trial trains by `engine.run` in a folder of its own."""

    def __init__(self, models, learning_rates, recipe, seeds, out, overrides, console):
        self.recipe, self.out, self.overrides, self.console = recipe, pathlib.Path(out), overrides, console
        space = keras_tuner.HyperParameters()
        space.Choice("model", list(models))
        space.Choice("learning_rate", list(learning_rates))
        space.Choice("seed", list(seeds))
        super().__init__(
            objective=keras_tuner.Objective("val_accuracy", "max"), hyperparameters=space, tune_new_entries=False,
            directory=self.out, project_name="tuner", overwrite=True,
        )  # fmt: skip

    def run_trial(self, trial, **kwargs):
        values = trial.hyperparameters.values
        changes = {"optimizer.learning_rate": values["learning_rate"], "seed": values["seed"]}
        recipe = recipes.override(self.recipe, changes)
        folder = self.out / trial_name(values["model"], values["learning_rate"], values["seed"])
        self.console.print(folder.name, style="bold", markup=False)
        keras.utils.clear_session()  # else the graphs of all trials stay in memory
        try:
            metrics = engine.run(
                values["model"], recipe, folder, overrides=self.overrides, taps=None, keep_model=False,
                console=self.console,
            )  # fmt: skip
        except Exception as error:
            # keras-tuner would print a trace and go on; a full disk or a wrong keyword must stop the scan.
            raise errors.FatalError(str(error)) from error
        return {"val_accuracy": metrics.get("val_accuracy") or 0.0}


def trial_name(model: str, learning_rate: float, seed: int) -> str:
    """Folder of a trial.

    Example:
        >>> trial_name("bn_efficientnet_b0", 0.001, 868)
        'bn_efficientnet_b0-lr0.001-seed868'
    """
    return f"{model}-lr{learning_rate:g}-seed{seed}"


def scan(
    models: Sequence[str],
    learning_rates: Sequence[float],
    recipe: recipes.Recipe,
    out: str | pathlib.Path,
    *,
    seeds: Sequence[int] | None = None,
    overrides: dict | None = None,
    console: Console | None = None,
) -> pd.DataFrame:
    """Train every model at every learning rate with every seed; return and write one row per trial.

    Args:
        models: names in the zoo.
        learning_rates: of the recipe's optimizer.
        recipe: everything else.
        out: folder; it gets one run per trial, scan.csv, and scan.png.
        seeds: default: the recipe's.
        overrides: keyword arguments of `nfzoo.build`.
        console: where progress goes.

    Returns:
        Columns model, learning_rate, seed, status, test_accuracy, val_accuracy, epochs, seconds.

    Raises:
        Exception: that of a trial that could not run; finished trials are kept and a second call does the missing ones.
    """
    console, out = console or Console(), pathlib.Path(out)
    models, learning_rates = list(dict.fromkeys(models)), list(dict.fromkeys(learning_rates))
    seeds = list(dict.fromkeys(seeds or recipe.seeds))
    for rate in learning_rates:
        for seed in seeds:
            recipes.override(recipe, {"optimizer.learning_rate": rate, "seed": seed})
    out.mkdir(parents=True, exist_ok=True)
    try:
        Scan(models, learning_rates, recipe, seeds, out, overrides, console).search(verbose=0)
    except errors.FatalError as error:
        raise error.__cause__ from None
    rows = []
    for model in models:
        for rate in learning_rates:
            for seed in seeds:
                metrics = engine.read_metrics(out / trial_name(model, rate, seed))
                kept = ("status", "test_accuracy", "val_accuracy", "epochs", "seconds")
                rows.append({"model": model, "learning_rate": rate, "seed": seed, **{k: metrics.get(k) for k in kept}})
    results = pd.DataFrame(rows)
    with atomic(out / "scan.csv") as partial:
        results.to_csv(partial, index=False)
    return results


def summary(results: pd.DataFrame) -> pd.DataFrame:
    """Mean and deviation of the test accuracy per model and learning rate; diverged trials count what they reached."""
    cells = results.groupby(["model", "learning_rate"])
    table = cells.test_accuracy.agg(["mean", "std", "count"]).reset_index()
    diverged = cells.status.agg(lambda s: int((s == "diverged").sum())).reset_index(name="diverged")
    return table.merge(diverged)


def table(results: pd.DataFrame) -> Table:
    """The summary as a table for the terminal: one row per model, one column per learning rate."""
    cells = summary(results)
    rates = sorted(cells.learning_rate.unique(), reverse=True)
    view = Table("model", *[f"lr {rate:g}" for rate in rates], title="test accuracy %, mean ± std over seeds")
    for model in results.model.unique():
        texts = []
        for rate in rates:
            cell = cells[(cells.model == model) & (cells.learning_rate == rate)].iloc[0]
            spread = f" ± {100 * cell['std']:.1f}" if cell["count"] > 1 else ""
            note = f" ({cell.diverged:.0f} diverged)" if cell.diverged else ""
            texts.append(f"{100 * cell['mean']:.1f}{spread}{note}")
        view.add_row(model, *texts)
    return view
