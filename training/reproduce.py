"""Run the rows of a table that are missing, append them to training/results/TABLE.csv, print expected against got.

    python training/reproduce.py first_look --data-dir ~/tensorflow_datasets
    python training/reproduce.py poster_table1 --lr 0.001 --seeds 868
    python training/reproduce.py poster_table1 --draw docs/figures/poster_table1.png

A row is done when its line (same model, build, recipe fingerprint and seed) is in the CSV; a killed run resumes.
"""

import datetime
import functools
import json
import operator
import pathlib
from collections.abc import Callable, Sequence
from typing import Annotated

import pandas as pd
import typer
from experiments import TABLES, Row
from rich.console import Console
from rich.table import Table

from nfzoo.cli import quiet_start

with quiet_start():
    from nfzoo import engine, recipes
    from nfzoo.files import atomic, waited_for

RESULTS = pathlib.Path(__file__).parent / "results"
KEY = ["row", "model", "build", "fingerprint", "seed"]
TEXTS = {"fingerprint": str, "commit": str}


def recipe_of(row: Row, seed: int, data_dir: str | None) -> recipes.Recipe:
    changes = {**row.changes, "seed": seed, "data.data_dir": data_dir}
    return recipes.override(recipes.get(row.recipe), changes)


def line(row: Row, seed: int, recipe: recipes.Recipe, metrics: dict, folder: pathlib.Path) -> dict:
    """One line of the CSV: what was run, on what, and what came out."""
    options = engine.read_options(folder)
    return {
        "row": row.name, "model": row.model, "build": json.dumps(options["build"], sort_keys=True),
        "recipe": row.recipe,
        "fingerprint": options["fingerprint"], "seed": seed, "learning_rate": recipe.optimizer.learning_rate,
        "epochs": metrics["epochs"], "status": metrics["status"],
        **{k: metrics.get(k) for k in ("test_accuracy", "test_loss", "val_accuracy", "val_loss", "accuracy", "loss")},
        "seconds": metrics["seconds"], "images_per_second": metrics["images_per_second"],
        "date": datetime.date.today().isoformat(), "commit": commits(options), "machine": options["machine"],
        "versions": json.dumps(options["versions"]),
    }  # fmt: skip


def commits(options: dict) -> str | None:
    """The commit of a run, or those that it went through, from options.json."""
    found = [part["commit"] for part in (options, *options.get("continued", ())) if part["commit"]]
    return "+".join(dict.fromkeys(found)) or None


def lines_of_row(results: pd.DataFrame, row: Row) -> pd.DataFrame:
    """Lines of a row as it is defined now, of any seed, whatever the code was then."""
    if not len(results):
        return results
    resolved = engine.options(row.model, recipe_of(row, 0, None), row.build)
    key = [row.name, row.model, json.dumps(resolved["build"], sort_keys=True), resolved["fingerprint"]]
    return results[_equal(results, key)]


def lines_of(results: pd.DataFrame, row: Row, seed: int, recipe: recipes.Recipe) -> pd.Series:
    """Which lines of a CSV are those of this run."""
    resolved = engine.options(row.model, recipe, row.build)
    key = [row.name, row.model, json.dumps(resolved["build"], sort_keys=True), resolved["fingerprint"], seed]
    return _equal(results, key)


def _equal(results: pd.DataFrame, values: list, key: list[str] = KEY) -> pd.Series:
    """Which lines have these values in the first columns of the key."""
    alike = (results[name].astype(str) == str(value) for name, value in zip(key, values, strict=False))
    return functools.reduce(operator.and_, alike)


def folder_of(runs: pathlib.Path, row: Row, *parts) -> pathlib.Path:
    slug = "".join(c if c.isalnum() else "_" for c in row.name.lower())
    return runs / "-".join(map(str, (slug, *parts)))


def read(path: pathlib.Path, key: list[str] = KEY) -> pd.DataFrame:
    """The lines of a CSV; none where there is none. Twelve hexadecimal digits may look like a number."""
    return pd.read_csv(path, dtype=TEXTS) if path.exists() else pd.DataFrame(columns=key)


def write(path: pathlib.Path, results: pd.DataFrame) -> None:
    with atomic(path) as partial:
        results.to_csv(partial, index=False)


def add(path: pathlib.Path, new: dict, key: list[str] = KEY) -> pd.DataFrame:
    """Put a line behind those that are there by now, unless it is there: other processes add theirs meanwhile."""
    with waited_for(path.parent):
        results, line = read(path, key), pd.DataFrame([new])
        if not _equal(results, [new[name] for name in key], key).any():
            results = pd.concat([results, line], ignore_index=True) if len(results) else line
            write(path, results)
    return results


def markdown(table: str, results: pd.DataFrame) -> str:
    """The table as README shows it: test accuracy in percent, mean ± std over seeds."""
    lines = ["| model | test accuracy % | seeds | expected % (± tolerance) |", "| --- | --- | --- | --- |"]
    for row in TABLES[table]:
        got = lines_of_row(results, row)
        if len(got):
            accuracy = 100 * got.test_accuracy
            spread = (f" ± {accuracy.std():.1f}" if len(got) > 1 else "") + lost(got)
            expected = "" if row.expected is None else f"{row.expected} ± {row.tolerance}"
            seeds = ", ".join(map(str, got.seed))
            lines.append(f"| {row.name} | {accuracy.mean():.1f}{spread} | {seeds} | {expected} |")
    return "\n".join(lines)


def lost(runs: pd.DataFrame) -> str:
    """How many of some runs diverged, as a table says it behind their accuracy."""
    number = (runs.status != "complete").sum()
    return f", {number} diverged" if number else ""


def report(table: str, results: pd.DataFrame, console: Console) -> None:
    """Print mean and deviation of each row against its expectation."""
    view = Table("row", "seeds", "test accuracy %", "expected %", "", title=table)
    for row in TABLES[table]:
        got = lines_of_row(results, row)
        if not len(got):
            view.add_row(row.name, "0", "missing")
            continue
        ended, got = lost(got), 100 * got.test_accuracy
        text = f"{got.mean():.2f}" + (f" ± {got.std():.2f}" if len(got) > 1 else "") + ended
        if row.expected is None:
            view.add_row(row.name, str(len(got)), text)
            continue
        agrees = abs(got.mean() - row.expected) <= row.tolerance
        expected = f"{row.expected} ± {row.tolerance} ({row.source})"
        view.add_row(row.name, str(len(got)), text, expected, "[green]agrees" if agrees else "[red]DIFFERS")
    console.print(view)


def run_missing(
    table: str, data_dir: str | None, runs: pathlib.Path, console: Console, seeds: Sequence[int] = (),
    dry_run: bool = False, collect: Callable[[Row, int, pathlib.Path], None] = lambda row, seed, folder: None,
    wanted: Callable[[Row], bool] = lambda row: True,
) -> pd.DataFrame:  # fmt: skip
    """Train what a table lacks, line by line of its CSV; return the CSV.

    `collect` sees the folder of each run before its line is written: a run with a line has been collected. Rows that
    are not `wanted` are left out.
    """
    path = RESULTS / f"{table}.csv"
    results = read(path)
    for row in filter(wanted, TABLES[table]):
        for seed in seeds or row.seeds:
            recipe = recipe_of(row, seed, data_dir)
            if lines_of(results, row, seed, recipe).any():
                continue
            console.print(f"[bold]{row.name}[/], seed {seed}" + (" (missing)" if dry_run else ""))
            if dry_run:
                continue
            folder = folder_of(runs / table, row, seed)
            try:
                metrics = engine.run(row.model, recipe, folder, overrides=row.build, console=console, **row.signals)
            except engine.Taken:
                console.print("another process trains it; going on with the next")
                continue
            collect(row, seed, folder)
            results = add(path, line(row, seed, recipe, metrics, folder))
    return results


def main(
    table: str,
    data_dir: Annotated[str | None, typer.Option(help="of tensorflow-datasets; default: TFDS_DATA_DIR")] = None,
    runs: Annotated[pathlib.Path, typer.Option(help="where the runs go")] = pathlib.Path("runs/experiments"),
    seeds: Annotated[str | None, typer.Option(help="only these, separated by commas; default: the row's")] = None,
    lr: Annotated[float | None, typer.Option(help="only rows of this learning rate")] = None,
    rows: Annotated[str | None, typer.Option(help="only these, separated by semicolons")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what is missing and stop")] = False,
    to: Annotated[pathlib.Path | None, typer.Option("--draw", help="draw the CSV to this picture and stop")] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="print the table of the CSV and stop")] = False,
) -> None:
    """Reproduce one table of training/experiments.py."""
    console = Console()
    if table not in TABLES:
        raise typer.BadParameter(f"Expected one of {', '.join(TABLES)}. Received: {table!r}")
    if as_markdown:
        print(markdown(table, read(RESULTS / f"{table}.csv")))
        return
    if to is not None:
        from pictures import draw

        from nfzoo import plots

        print(plots.save(draw(table, read(RESULTS / f"{table}.csv")), to))
        return
    chosen = () if seeds is None else [int(seed) for seed in seeds.split(",")]
    named = None if rows is None else {name.strip() for name in rows.split(";")}
    if unknown := (named or set()) - {row.name for row in TABLES[table]}:
        raise typer.BadParameter(
            f"Expected rows of {table}: {'; '.join(r.name for r in TABLES[table])}. Got: {unknown}"
        )

    def wanted(row: Row) -> bool:
        rate = recipe_of(row, 0, None).optimizer.learning_rate
        return (lr is None or rate == lr) and (named is None or row.name in named)

    results = run_missing(table, data_dir, runs, console, chosen, dry_run, wanted=wanted)
    report(table, results, console)


if __name__ == "__main__":
    typer.run(main)
