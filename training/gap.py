"""Beat batch normalization: candidates under one budget, chosen on the validation split, tested once.

    python training/gap.py A --data-dir ~/tensorflow_datasets
    python training/gap.py A --markdown
    python training/gap.py A --draw

The protocol and the candidates are `CONTESTS` in training/experiments.py. Every run is a line of
training/results/gap.csv; a killed run resumes, a line that is there is not run again.
"""

import json
import math
import pathlib
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated

import pandas as pd
import pictures
import signals
import typer
from experiments import CONTESTS, Contest, Row
from reproduce import RESULTS, add, folder_of, line, lines_of, lost, read, recipe_of, write
from rich.console import Console
from rich.markdown import Markdown

from nfzoo.cli import quiet_start

with quiet_start():
    from nfzoo import engine, plots
    from nfzoo.files import waited_for

RATE = "optimizer.learning_rate"
WAIT = 30  # seconds between looks at what other processes train


def trials(contest: Contest, row: Row) -> list[Row]:
    """The runs that choose a candidate's learning rate."""
    changes = {**row.changes, "epochs": contest.trial_epochs}
    return [replace(row, changes={**changes, RATE: rate}) for rate in contest.rates]


def lines(results: pd.DataFrame, row: Row, seed: int) -> pd.DataFrame:
    return results[lines_of(results, row, seed, recipe_of(row, seed, None))] if len(results) else results


def verdicts(contest: Contest, results: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Candidate -> best learning rate, validation accuracy with it; of those whose trials are all there."""
    found = {}
    for row in contest.rows:
        tried = [lines(results, trial, contest.seeds[0]) for trial in trials(contest, row)]
        if all(map(len, tried)):
            table = pd.concat(tried)
            accuracy = table.val_accuracy.where(table.status == "complete", -math.inf)
            found[row.name] = (float(table.learning_rate[accuracy.idxmax()]), float(accuracy.max()))
    return found


def ranked(contest: Contest, rows: list[Row], judged: dict[str, float], places: int) -> list[Row]:
    """Those to beat, and the best of the others on validation."""
    asked = {row.name for row in contest.rows[: contest.to_beat]}
    best = sorted((row for row in rows if row.name not in asked), key=lambda row: judged[row.name], reverse=True)
    return [row for row in rows if row.name in asked] + best[:places]


def semifinals(contest: Contest, results: pd.DataFrame) -> list[Row]:
    """Who is trained for the whole budget, at which learning rate."""
    judged = verdicts(contest, results)
    rows = [
        replace(row, changes={**row.changes, RATE: judged[row.name][0]}) for row in contest.rows if row.name in judged
    ]
    return ranked(contest, rows, {name: accuracy for name, (_, accuracy) in judged.items()}, contest.semifinalists)


def finals(contest: Contest, results: pd.DataFrame) -> list[Row]:
    """Who is trained with every seed; where a semifinal chooses them, nobody before the last of it is run."""
    rows = semifinals(contest, results)
    runs = {row.name: lines(results, row, contest.seeds[0]) for row in rows}
    if contest.finalists < contest.semifinalists and not all(map(len, runs.values())):
        return []
    return ranked(contest, rows, {name: validation(run) for name, run in runs.items()}, contest.finalists)


def validation(runs: pd.DataFrame) -> float:
    """Mean validation accuracy; a run that diverged has none right."""
    return float(runs.val_accuracy.where(runs.status == "complete", 0.0).mean())


def due(contest: Contest, results: pd.DataFrame) -> Iterator[tuple[str, Row, int]]:
    """What is still to be run: every trial; once all are there the semifinals; then the finals."""
    first = contest.seeds[0]
    missing = [("trial", t, first) for row in contest.rows for t in trials(contest, row)]
    missing = [job for job in missing if not len(lines(results, *job[1:]))]
    if not missing:
        missing = [("final", row, first) for row in semifinals(contest, results)]
        missing += [("final", row, seed) for row in finals(contest, results) for seed in contest.seeds[1:]]
        missing = [job for job in missing if not len(lines(results, *job[1:]))]
    yield from missing


def unread(contest: Contest, results: pd.DataFrame) -> list[tuple[Row, int]]:
    """Finals that are trained, all of them, and not tested; what diverged left nothing to test."""
    if any(due(contest, results)):
        return []
    runs = [(row, seed, lines(results, row, seed)) for row in finals(contest, results) for seed in contest.seeds]
    return [(row, seed) for row, seed, at in runs if at.test_accuracy.isna().all() and (at.status == "complete").all()]


def ahead(contest: Contest, results: pd.DataFrame) -> str:
    """What follows the runs that are missing now."""
    missing = next(due(contest, results), None)
    if missing is None:
        return "nothing else is missing"
    others = len(contest.rows) - contest.to_beat
    stages, trial = ["the test split of the finalists"], missing[0] == "trial"
    if trial or not finals(contest, results):
        runs = (contest.to_beat + min(contest.finalists, others)) * (len(contest.seeds) - 1)
        stages.insert(0, f"{runs} finals with the other seeds")
    if trial:
        stages.insert(0, f"{contest.to_beat + min(contest.semifinalists, others)} semifinals")
    return "then " + ", then ".join(stages)


def tested_in(budget: str, runs: pathlib.Path, row: Row, seed: int, trained: pd.Series) -> pathlib.Path:
    """The folder of a final that is to be tested; it must hold the network that its line tells of."""
    folder = folder_of(runs / budget, row, "final", f"{row.changes[RATE]:g}", seed)
    found = engine.read_options(folder) if folder.is_dir() else {}
    if (found.get("fingerprint"), found.get("build")) != (trained.fingerprint, json.loads(trained.build)):
        raise typer.BadParameter(
            f"Expected in {folder} the run that trained {row.name}, seed {seed}. Received: "
            f"{'another' if found else 'none'}; say with --runs where it is, or take its line out of gap.csv to train "
            "it again"
        )
    return folder


def known(budget: str, stage: str, row: Row, seed: int) -> dict | None:
    """The line of the same run in another table; its test accuracy was read there."""
    for table in CONTESTS[budget].known if stage == "final" else ():
        there = lines(read(RESULTS / f"{table}.csv"), row, seed)
        if len(there):
            return {"budget": budget, "stage": stage, **there.iloc[0].to_dict()}
    return None


def train(budget: str, stage: str, row: Row, seed: int, data_dir: str | None, runs: pathlib.Path, console) -> dict:
    """One run without a look at the test split; its line."""
    recipe = recipe_of(row, seed, data_dir)
    rate = recipe.optimizer.learning_rate
    console.print(f"[bold]{row.name}[/], {stage}, lr {rate:g}, seed {seed}")
    folder = folder_of(runs / budget, row, stage, f"{rate:g}", seed)
    # Signals of the finals over training are the evidence of docs/closing-the-gap.md.
    taps = CONTESTS[budget].taps if stage == "final" and seed == CONTESTS[budget].seeds[0] else None
    options = {"overrides": row.build, "taps": taps, "keep_model": stage == "final", "test": False}
    metrics = engine.run(row.model, recipe, folder, console=console, **options)
    if taps:
        signals.add_signals("gap", row.name, seed, signals.keep_blocks(row, seed, folder))
    return {"budget": budget, "stage": stage, **line(row, seed, recipe, metrics, folder)}


def standings(contest: Contest, results: pd.DataFrame) -> dict[str, float]:
    """Finalist -> validation accuracy over its finals; nobody before all are run and tested."""
    if any(due(contest, results)) or unread(contest, results):
        return {}
    runs = {row.name: [lines(results, row, seed) for seed in contest.seeds] for row in finals(contest, results)}
    return {name: validation(pd.concat(found)) for name, found in runs.items()}


def to_beat(contest: Contest, final: dict[str, float]) -> str:
    """Of those to beat the best on validation, the first as long as nobody knows."""
    return max((row.name for row in contest.rows[: contest.to_beat]), key=lambda name: final.get(name, 0.0))


def claimed(contest: Contest, final: dict[str, float]) -> str | None:
    """Of the candidates the best on validation: what a contest claims."""
    return max(final.keys() - {row.name for row in contest.rows[: contest.to_beat]}, key=final.get, default=None)


def markdown(budget: str, results: pd.DataFrame, finalists: bool = False) -> str:
    """Every candidate, or only `finalists`: best learning rate, validation after its trial and at the end, test.

    What the contest claims is the row in bold: best on validation over its finals, not on the test split.
    """
    contest = CONTESTS[budget]
    final = standings(contest, results)
    ended = {
        row.name: pd.concat([lines(results, row, seed) for seed in contest.seeds]).set_index("seed")
        for row in semifinals(contest, results)
    }
    rival, best = to_beat(contest, final), claimed(contest, final)
    whole_budget = recipe_of(contest.rows[0], contest.seeds[0], None).epochs
    text = [
        f"| candidate | best rate | validation % after {contest.trial_epochs} epochs | after {whole_budget} | "
        f"test accuracy % | test less that of {rival}, seeds {', '.join(map(str, contest.seeds))} |",
        "| --- |" + " --- |" * 5,
    ]
    shown = {name: at for name, at in verdicts(contest, results).items() if name in final or not finalists}
    for name, (rate, early) in shown.items():
        runs = ended.get(name, results.head(0))
        whole = runs[runs.status == "complete"]
        cells = [spread(whole.val_accuracy) + lost(runs), "", ""]
        if name in final:
            cells[1] = spread(whole.test_accuracy) + lost(runs)
            paired = 100 * (runs.test_accuracy - ended[rival].test_accuracy).reindex(contest.seeds)
            cells[2] = ", ".join("–" if math.isnan(x) else f"{x:+.1f}" for x in paired) if name != rival else ""
        title = f"**{name}**" if name == best else name
        text.append(f"| {title} | {rate:g} | {100 * early:.1f} | {' | '.join(cells)} |")
    return "\n".join(text)


def spread(accuracies: pd.Series) -> str:
    """Mean and, of several, standard deviation, in percent."""
    percent = 100 * accuracies.dropna()
    return f"{percent.mean():.1f}" + (f" ± {percent.std():.1f}" if len(percent) > 1 else "") if len(percent) else ""


def picture(budget: str, results: pd.DataFrame) -> pathlib.Path:
    """Trials and finals beside each other, as a file in docs/figures."""
    contest = CONTESTS[budget]
    final = standings(contest, results)  # nobody, as long as one is not tested
    tried = [lines(results, t, contest.seeds[0]) for row in contest.rows for t in trials(contest, row)]
    tested = [lines(results, row, seed) for row in finals(contest, results) if final for seed in contest.seeds]
    both = [pd.concat([results.head(0), *found]) for found in (tried, tested)]
    drawn = pictures.contest(*both, to_beat(contest, final), claimed(contest, final))
    return plots.save(drawn, signals.FIGURES / f"gap_{budget.lower()}.png")


def generalization(budget: str, results: pd.DataFrame) -> pathlib.Path:
    """Who fits the training images, and who the others: runs of the whole budget with the first seed."""
    contest = CONTESTS[budget]
    recipe = recipe_of(contest.rows[0], contest.seeds[0], None)
    others = [read(RESULTS / f"{name}.csv") for name in contest.known]
    runs = pd.concat([results[results.budget == budget], *others], ignore_index=True)
    build = runs.build.map(json.loads)
    # What learned nothing has nothing to generalize; a small stem is another budget.
    runs = runs[
        (runs.recipe == contest.rows[0].recipe) & (runs.epochs == recipe.epochs) & (runs.seed == recipe.seed)
        & (runs.val_accuracy > 0.1) & ~build.map(lambda options: "stem" in options)
    ].drop_duplicates(["model", "build", "fingerprint"])  # fmt: skip
    twice = runs.duplicated("row", keep=False)  # at two learning rates
    runs = runs.assign(row=runs.row.where(~twice, runs.row + ", lr " + runs.learning_rate.map("{:g}".format)))
    groups = runs.groupby([group(*at) for at in zip(runs.model, build[runs.index], strict=True)])
    return plots.save(pictures.generalization(dict(list(groups))), signals.FIGURES / f"gap_{budget.lower()}_fit.png")


def group(model: str, build: dict) -> str:
    if model.startswith("bn_"):
        return "BN, SiLU"
    return "SELU" if build.get("activation", "selu" if model.startswith("sn") else "silu") == "selu" else "SiLU"


def main(
    budget: str,
    data_dir: Annotated[str | None, typer.Option(help="of tensorflow-datasets; default: TFDS_DATA_DIR")] = None,
    runs: Annotated[pathlib.Path, typer.Option(help="where the runs go")] = pathlib.Path("runs/gap"),
    rows: Annotated[str | None, typer.Option(help="only runs of these, separated by semicolons")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what is missing and stop")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="print the table of the CSV and stop")] = False,
    draw: Annotated[bool, typer.Option("--draw", help="draw the CSV into docs/figures and stop")] = False,
) -> None:
    """Run what a contest of training/experiments.py lacks: trials, finals, and then the test."""
    console, path = Console(), RESULTS / "gap.csv"
    if budget not in CONTESTS:
        raise typer.BadParameter(f"Expected one of {', '.join(CONTESTS)}. Received: {budget!r}")
    contest, results = CONTESTS[budget], read(path)
    named = {row.name for row in contest.rows} if rows is None else {name.strip() for name in rows.split(";")}
    if unknown := named - {row.name for row in contest.rows}:
        raise typer.BadParameter(f"Expected candidates: {'; '.join(r.name for r in contest.rows)}. Received: {unknown}")
    if as_markdown:
        print(markdown(budget, results))
        return
    if draw:
        if not (results.get("budget") == budget).any():
            raise typer.BadParameter(f"Expected runs of budget {budget}. Received: none, nothing is measured yet")
        mixed = recipe_of(contest.rows[0], 0, None).augment.mixup  # mixed images have no accuracy to compare with
        for drawn in (picture,) if mixed else (picture, generalization):
            print(drawn(budget, results))
        return

    taken = []  # by other processes

    def jobs() -> Iterator[tuple[str, Row, int]]:
        return (job for job in due(contest, results) if job[1].name in named and job not in taken)

    if dry_run:
        for stage, row, seed in jobs():
            console.print(f"{row.name}, {stage}, lr {row.changes[RATE]:g}, seed {seed} (missing)")
        for row, seed in unread(contest, results):
            console.print(f"{row.name}, final, lr {row.changes[RATE]:g}, seed {seed} (its test is to be read)")
        console.print(ahead(contest, results), soft_wrap=True)
        return
    while (job := next(jobs(), None)) is not None or taken:
        if job is None:  # what comes next depends on what the others train; one that died leaves its run to us
            time.sleep(WAIT)
            taken, results = [], read(path)
            continue
        try:
            results = add(path, known(budget, *job) or train(budget, *job, data_dir, runs, console))
        except engine.Taken:
            console.print("another process trains it")
            taken.append(job)
            results = read(path)
    to_read = [(row, seed, lines(results, row, seed).iloc[0]) for row, seed in unread(contest, results)]
    folders = [tested_in(budget, runs, *final) for final in to_read]  # all of them, before any is read
    for (row, seed, _), folder in zip(to_read, folders, strict=True):
        tested = engine.evaluate(folder, data_dir=data_dir)
        with waited_for(RESULTS):
            results = read(path)
            at = lines_of(results, row, seed, recipe_of(row, seed, None))
            results.loc[at, ["test_accuracy", "test_loss"]] = [tested["accuracy"], tested["loss"]]
            write(path, results)
    console.print(Markdown(markdown(budget, results)))


if __name__ == "__main__":
    typer.run(main)
