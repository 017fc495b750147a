"""What a scan found: one row per trial, means over seeds, the best setting and the command that trains it. No Keras."""

import json
import shlex
from collections.abc import Iterator
from typing import Any

import pandas as pd
from rich.table import Table

from nfzoo import recipes
from nfzoo.tune.space import METRICS, Spec, Trial, text_of

FLAGS = {
    "data.name": "--data", "data.data_dir": "--data-dir", "epochs": "--epochs", "batch_size": "--batch-size",
    "optimizer.learning_rate": "--lr", "seed": "--seed",
}  # fmt: skip
_NAMES = {"val_accuracy": "validation accuracy"}


def rows(spec: Spec, trials: list[Trial], results: dict[str, dict]) -> pd.DataFrame:
    """One row per trial that has a result: model, a column per axis, seed, and what the run says of itself."""
    columns = spec.columns()
    content = [
        {
            "model": trial.setting.model,
            **{columns[path]: value for path, value in trial.setting.values},
            "seed": trial.seed,
            **{key: results[trial.name].get(key) for key in METRICS},
        }
        for trial in trials
        if trial.name in results
    ]
    return pd.DataFrame(content, columns=["model", *columns.values(), "seed", *METRICS])


def axes_of(results: pd.DataFrame) -> list[str]:
    """Columns of the axes: those between model and seed."""
    return list(results.columns)[1 : results.columns.get_loc("seed")]


def summary(results: pd.DataFrame, of: str = "val_accuracy") -> pd.DataFrame:
    """Mean and deviation over seeds per model and setting.

    Args:
        results: rows of `scan`, or of scan.csv.
        of: a column of them. A trial that failed counts as zero, whatever it reached before.

    Returns:
        Columns model, the axes, mean, std, count (seeds), diverged and out_of_memory (how many of them).

    Example:
        >>> table = pd.DataFrame({"model": ["a", "a"], "learning_rate": [0.1, 0.1], "seed": [0, 1],
        ...                       "status": ["complete", "diverged"], "val_accuracy": [0.5, 0.1]})
        >>> summary(table).round(3).to_dict("records")[0]["mean"]
        0.25
    """
    results = results.assign(**{of: results[of].astype(float).where(results.status == "complete", 0.0).fillna(0.0)})
    cells = results.groupby(["model", *axes_of(results)], sort=False, dropna=False)
    table = cells[of].agg(["mean", "std", "count"]).reset_index()
    for status in ("diverged", "out_of_memory"):
        table[status] = cells.status.agg(lambda s, status=status: int((s == status).sum())).to_numpy()
    table.attrs["of"] = _NAMES.get(of, of)
    return table


def best(results: pd.DataFrame) -> pd.Series | None:
    """The setting of the highest validation accuracy in the `summary`.

    Args:
        results: rows of `scan`, or of scan.csv.

    Returns:
        A row of `summary`, None if no trial is complete.

    Example:
        >>> trials = pd.DataFrame({"model": ["a", "a"], "learning_rate": [0.1, 1.0], "seed": [0, 0],
        ...                        "status": ["complete", "diverged"], "val_accuracy": [0.5, 0.9]})
        >>> float(best(trials).learning_rate)
        0.1
    """
    if not (results.status == "complete").any():
        return None
    table = summary(results)
    return table.loc[table["mean"].idxmax()]


def best_trial(spec: Spec, trials: list[Trial], results: dict[str, dict]) -> Trial | None:
    """The trial of the best setting with the first seed; None if no trial is complete."""
    row = best(rows(spec, trials, results))
    if row is None:
        return None
    columns = spec.columns()
    for trial in trials:
        values = {"model": trial.setting.model, **{columns[path]: value for path, value in trial.setting.values}}
        if all(row[key] == value or (pd.isna(row[key]) and value is None) for key, value in values.items()):
            return trial
    raise AssertionError("the best row is that of a trial")


def table(results: pd.DataFrame, of: str = "val_accuracy", most: int = 10) -> Table:
    """The summary for the terminal: a column per learning rate where these are few, else the best settings.

    Args:
        results: rows of `scan`, or of scan.csv.
        of: a column of them, a fraction; shown in percent.
        most: how many settings, where they are no grid of at most eight learning rates.

    Example:
        >>> trials = pd.DataFrame({"model": ["a", "a"], "learning_rate": [0.1, 1.0], "seed": [0, 0],
        ...                        "status": ["complete", "diverged"], "val_accuracy": [0.5, 0.9]})
        >>> [list(column.cells) for column in table(trials).columns]
        [['a'], ['0.0 (1 diverged)'], ['50.0']]
    """
    cells, others = summary(results, of), [axis for axis in axes_of(results) if axis != "learning_rate"]
    title = f"{_NAMES.get(of, of)} %, mean ± std over seeds"
    rates = cells.learning_rate.nunique() if "learning_rate" in cells else 0
    grid = len(cells) == rates * len(cells[["model", *others]].drop_duplicates())
    if not grid or rates > 8:
        cells = cells.sort_values("mean", ascending=False, kind="stable")
        view = Table("model", *axes_of(results), "", title=f"{title}; the best {min(most, len(cells))} settings")
        for _, cell in cells.head(most).iterrows():
            view.add_row(cell.model, *[text_of(cell[axis]) for axis in axes_of(results)], _cell(cell))
        return view
    rates = sorted(cells.learning_rate.unique(), reverse=True)
    view = Table("model", *others, *[f"lr {rate:g}" for rate in rates], title=title)
    for key, part in cells.groupby(["model", *others], sort=False, dropna=False):
        of_rate = {cell.learning_rate: _cell(cell) for _, cell in part.iterrows()}
        view.add_row(key[0], *map(text_of, key[1:]), *[of_rate.get(rate, "") for rate in rates])
    return view


def _cell(cell: pd.Series) -> str:
    spread = f" ± {100 * cell['std']:.1f}" if cell["count"] > 1 else ""
    failed = [
        f"{cell[status]:.0f} {status.replace('_', ' ')}" for status in ("diverged", "out_of_memory") if cell[status]
    ]
    return f"{100 * cell['mean']:.1f}{spread}" + (f" ({', '.join(failed)})" if failed else "")


def command(model: str, recipe: recipes.Recipe, overrides: dict | None = None) -> str:
    """The command line that trains a model by this very recipe: the nearest row of `RECIPES`, and what differs.

    Example:
        >>> command("sn_efficientnet_b0", recipes.override(recipes.get("poster"), {"optimizer.learning_rate": 0.003}))
        'nfzoo train sn_efficientnet_b0 --recipe poster --lr 0.003 --seed 868'
    """
    wanted, short = (recipe.model_dump(mode="json", exclude_defaults=shorter) for shorter in (False, True))
    differing = {
        name: dict(_differing(wanted, row.model_dump(mode="json"), short)) for name, row in recipes.RECIPES.items()
    }
    name = min(differing, key=lambda name: len(differing[name]))
    changes = {"seed": recipe.seed} | differing[name]
    words = ["nfzoo", "train", model, "--recipe", name]
    words += [
        word for path in FLAGS if changes.get(path) is not None for word in (FLAGS[path], _word(changes.pop(path)))
    ]
    words += [word for path, value in changes.items() for word in ("--set", f"{path}={_word(value)}")]
    words += [word for key, value in (overrides or {}).items() for word in ("--build", f"{key}={_word(value)}")]
    return shlex.join(words)


def _differing(wanted: dict, row: dict, short: dict, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path -> value of what a row has not, tables that it lacks without their defaults (`short`)."""
    for key, value in wanted.items():
        if isinstance(value, dict) and isinstance(row.get(key), dict) and key != "build":  # its patterns are no path
            yield from _differing(value, row[key], short.get(key, {}), f"{path}{key}.")
        elif value != row.get(key):
            yield f"{path}{key}", short.get(key, {}) if isinstance(value, dict) else value


def _word(value) -> str:
    """A value as `recipes.parse_value` reads it back."""
    if isinstance(value, str):
        return value if recipes.parse_value(value) == value else json.dumps(value)
    return json.dumps(value) if isinstance(value, bool | list | tuple | dict) else text_of(value)
