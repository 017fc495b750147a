"""The one function that scans."""

import json
import pathlib
from collections.abc import Mapping, Sequence

import pandas as pd
from rich.console import Console

from nfzoo import recipes
from nfzoo.files import atomic, to_json
from nfzoo.tune import results
from nfzoo.tune.plan import Plan
from nfzoo.tune.progress import shown
from nfzoo.tune.space import LEARNING_RATE, Range, Spec, Value, spec
from nfzoo.tune.trials import one_writer
from nfzoo.tune.workers import role, run_workers, serve, work


def scan(
    models: Sequence[str],
    learning_rates: Sequence[float] | Range,
    recipe: recipes.Recipe,
    out: str | pathlib.Path,
    *,
    axes: Mapping[str, Sequence[Value] | Range] | None = None,
    seeds: Sequence[int] | None = None,
    overrides: dict | None = None,
    search: str = "grid",
    trials: int | None = None,
    points: int = 5,
    workers: int = 1,
    parallel: int | None = None,
    console: Console | None = None,
) -> pd.DataFrame:
    """Train models in many settings, each with every seed; return and write one row per trial.

    A trial is the folder of an ordinary run. What finished is never trained again: the same call goes on where a killed
    one ended, and may run in several processes or on several machines at once that share the folder.

    Args:
        models: names in the zoo.
        learning_rates: of the recipe's optimizer; a list, or a range.
        recipe: everything else.
        out: folder; it gets one run per trial, scan.json, scan.csv, and logs.
        axes: further settings: path in the recipe -> values or range, e.g. {"agc.clip_factor": [0.01, 0.04]}.
        seeds: default: the recipe's.
        overrides: keyword arguments of `nfzoo.build`.
        search: "grid" (all combinations), or keras-tuner's "random", "bayesian" and "hyperband", one search per model.
            Hyperband trains every rung anew, for as many epochs as the rung has: a run that was stopped and went on
            would have another learning rate schedule than the run of its name.
        trials: settings per model of "random" and "bayesian"; default: 10.
        points: of a range in a grid.
        workers: processes that train at once; each takes a GPU of its own, if there are.
        parallel: settings that "bayesian" and "hyperband" propose at once; default: as many as workers. The same number
            gives the same trials, on however many workers.
        console: where progress goes.

    Returns:
        Columns model, one per axis (learning_rate, clip_factor, …; max_epochs of hyperband), seed, status ("complete",
        "diverged", "out_of_memory"), val_accuracy, epochs, seconds. The test split is not read: a choice follows.

    Raises:
        ValueError: for settings that fit no recipe, before anything is made.
        Exception: that of a trial that could not run; finished trials are kept and a second call does the missing ones.

    Example:
        >>> import nfzoo, tempfile
        >>> recipe = nfzoo.recipes.override(nfzoo.recipes.get("demo"), {"data.name": "fake", "epochs": 1})
        >>> quiet = Console(quiet=True)
        >>> table = scan(["sn_test_ffnn"], [1e-3], recipe, tempfile.mkdtemp(), seeds=[0], console=quiet)
        >>> table[["learning_rate", "status"]].values.tolist()
        [[0.001, 'complete']]
    """
    return scanned(
        models, {LEARNING_RATE: learning_rates, **(axes or {})}, recipe, out, seeds=seeds, overrides=overrides,
        search=search, trials=trials, points=points, workers=workers, parallel=parallel, console=console,
    )[0]  # fmt: skip


def scanned(
    models, axes, recipe, out, *, workers: int = 1, parallel=None, console=None, **description
) -> tuple[pd.DataFrame, str | None]:
    """`scan`, and the command that trains the best setting; None where no trial is complete."""
    _check_workers(workers)
    made = spec(models, axes, recipe, parallel=parallel or workers, **description)
    out = pathlib.Path(out)
    _check_folder(out, made)
    out.mkdir(parents=True, exist_ok=True)
    with one_writer(out), atomic(out / "scan.json") as partial:
        partial.write_text(to_json(made.model_dump(mode="json"), indent=1))
    plan = Plan(made, out)
    with shown(plan, console or Console()):
        _run(plan, workers)
        plan.update()
    table = results.rows(made, plan.trials, plan.results)
    with one_writer(out), atomic(out / "scan.csv") as partial:
        table.to_csv(partial, index=False)
    trial = results.best_trial(made, plan.trials, plan.results)
    return table, trial and results.command(trial.setting.model, trial.recipe(recipe), made.overrides)


def _check_folder(out: pathlib.Path, made: Spec) -> None:
    """A folder's trials are of one recipe, but for the axes and the seeds: more of these may come to it."""
    path = out / "scan.json"
    if not path.exists():
        return
    before, now = (_common(json.loads(text)) for text in (path.read_text(), to_json(made.model_dump(mode="json"))))
    if before != now:
        raise ValueError(
            f"Expected the folder of this scan. Received: {out}, whose trials have another recipe or other overrides "
            "of the network; choose another --out, or remove the folder"
        )


def _common(description: dict) -> dict:
    """What all trials of a scan share."""
    tree = {"recipe": json.loads(json.dumps(description["recipe"])), "overrides": description.get("overrides")}
    for path in [*description["axes"], "data.data_dir", "seed", "seeds"]:
        *parents, leaf = path.split(".")
        node = tree["recipe"]
        for parent in parents:
            node = (node or {}).get(parent)
        if node:
            node.pop(leaf, None)
    return tree


def _check_workers(count: int) -> None:
    if count < 1:
        raise ValueError(f"Expected at least one worker. Received: workers={count}")
    if count > 1 and role():
        raise ValueError(f"Expected one worker per process around a chief (KERASTUNER_*). Received: workers={count}")


def _run(plan: Plan, count: int) -> None:
    if plan.finished:
        return
    if role() == "chief":
        serve(plan)
    elif count > 1:
        run_workers(plan, count)
    else:
        work(plan)
