"""Commands that look for settings: scan, lr-find."""

import json
import pathlib
from typing import Annotated

import typer

from nfzoo.cli.common import (
    Build,
    DataDir,
    DryRun,
    Epochs,
    Model,
    RecipeName,
    Settings,
    Source,
    app,
    console,
    overrides_of,
    pairs,
    quiet_start,
    recipe_of,
    say,
)

_VALUES = "separated by commas, or a range LOW..HIGH"


@app.command(rich_help_panel="Training")
def scan(
    models: Annotated[list[str], typer.Argument(help="names of models")],
    lr: Annotated[
        str | None,
        typer.Option(help=f"learning rates {_VALUES}; default: 0.1,0.01,0.001, beside other axes the recipe's own"),
    ] = None,
    clip_factor: Annotated[str | None, typer.Option(help=f"clip factors of AGC {_VALUES}")] = None,
    weight_decay: Annotated[str | None, typer.Option(help=f"weight decays {_VALUES}")] = None,
    axis: Annotated[
        list[str] | None,
        typer.Option(help=f"PATH=VALUES of the recipe, {_VALUES}, e.g. batch_size=64,128; repeatable"),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="seeds, separated by commas; default: the recipe's")] = None,
    search: Annotated[str, typer.Option(help="grid, random, bayesian or hyperband, for each model")] = "grid",
    trials: Annotated[
        int | None, typer.Option(min=1, help="settings per model of random and bayesian; default: 10")
    ] = None,
    points: Annotated[int, typer.Option(min=2, help="of a range in a grid")] = 5,
    workers: Annotated[int, typer.Option(min=1, help="processes that train at once, each with a GPU of its own")] = 1,
    parallel: Annotated[
        int | None,
        typer.Option(min=1, help="settings that bayesian and hyperband propose at once; default: --workers"),
    ] = None,
    data: Source = None,
    recipe: RecipeName = "demo",
    epochs: Epochs = None,
    out: Annotated[pathlib.Path, typer.Option(help="folder of the scan")] = pathlib.Path("runs/scan"),
    data_dir: DataDir = None,
    set_: Settings = None,
    build: Build = None,
    dry_run: DryRun = False,
) -> None:
    """Scan learning rates and other settings; the same command again, here or elsewhere, does the missing trials."""
    resolved = recipe_of(recipe, set_, data__name=data, data__data_dir=data_dir, epochs=epochs)
    overrides = overrides_of(build)
    _known(models, resolved, overrides)
    from nfzoo import tune

    others = (clip_factor, weight_decay, *(axis or ()))
    lr = lr if lr or any(others) else "0.1,0.01,0.001"
    axes = {path: _axis(text, option) for path, option, text in (
        ("optimizer.learning_rate", "--lr", lr),
        ("agc.clip_factor", "--clip-factor", clip_factor),
        ("optimizer.weight_decay", "--weight-decay", weight_decay),
    ) if text is not None}  # fmt: skip
    axes |= {path: _axis(text, f"--axis {path}", any_value=True) for path, text in pairs(axis).items()}
    description = {
        "seeds": _values(seeds, int, "--seeds") if seeds else None, "overrides": overrides, "search": search,
        "trials": trials, "points": points,
    }  # fmt: skip
    if dry_run:
        _print(tune.spec(models, axes, resolved, parallel=parallel or workers, **description), out)
        return
    results, command = tune.scanned(
        models, axes, resolved, out, workers=workers, parallel=parallel, console=console, **description
    )
    _show(results, command, out)


def _axis(text: str, option: str, any_value: bool = False):
    """Values of an axis, or a range."""
    from nfzoo import recipes, tune

    if ".." in text:
        return tune.Range.parse(text)
    return _values(text, recipes.parse_value if any_value else float, option)


def _values(text: str, kind, option: str) -> list:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"Expected numbers separated by commas for {option}. Received: {text!r}") from None


def _known(models: list[str], recipe, overrides: dict) -> None:
    """Import Keras quietly; refuse a model or an override that no trial could be built with."""
    from nfzoo import names, registry

    for model in models:
        names.parse(model)
    with quiet_start():
        from nfzoo import engine, tune  # noqa: F401 (keras-tuner imports TensorFlow on any backend)
    for model in models:
        registry.resolve(model, engine.options(model, recipe, overrides)["build"])


def _print(spec, out: pathlib.Path) -> None:
    """What a scan would do. How many trials hyperband makes follows from its epochs, and all follow from their plan."""
    from nfzoo.tune import plan

    content = spec.model_dump(mode="json")
    axes = content.pop("axes")
    made = plan.Plan(spec, pathlib.Path("/dev/null"))
    first = [trial.name for trial in made.trials]
    count = {"trials": len(first)} if made.complete else {"trials": spec.trials and spec.trials * len(spec.seeds)}
    named = {"learning_rates": axes.get("optimizer.learning_rate"), "axes": axes}
    print(json.dumps({**content, **named, **count, "first_trials": first[:10], "out": str(out)}, indent=1))


def _show(results, command: str | None, out: pathlib.Path) -> None:
    from nfzoo import plots, tune
    from nfzoo.tune.trials import one_writer

    written, summary = [out / "scan.csv"], tune.summary(results)
    axes = summary.iloc[:, 1 : summary.columns.get_loc("mean")].select_dtypes("number")
    drawn = sorted((name for name in axes if axes[name].nunique() > 1), key="learning_rate".__ne__)
    if drawn:
        with one_writer(out):
            written.append(plots.save(plots.scan(summary, drawn[0]), out / "scan.png"))
    console.print(tune.table(results))
    say("wrote " + " and ".join(map(str, written)))
    advice = "no trial is complete: try smaller learning rates, or a smaller batch_size where memory ran out"
    say(f"best by validation accuracy:\n{command}" if command else advice)


@app.command("lr-find", rich_help_panel="Training")
def lr_find(
    model: Model,
    data: Source = None,
    recipe: RecipeName = "demo",
    start: Annotated[float, typer.Option("--from", help="learning rate of the first step")] = 1e-6,
    end: Annotated[float, typer.Option("--to", help="learning rate of the last step")] = 1.0,
    steps: Annotated[int, typer.Option(min=3, help="training steps")] = 100,
    batch_size: Annotated[int | None, typer.Option(help="examples per step")] = None,
    seed: Annotated[int | None, typer.Option(help="decides initialisation, splits, order, augmentation")] = None,
    out: Annotated[pathlib.Path | None, typer.Option(help="folder to write to; default: runs/lr-find-MODEL")] = None,
    data_dir: DataDir = None,
    set_: Settings = None,
    build: Build = None,
    dry_run: DryRun = False,
) -> None:
    """Find where learning rates begin to help and where they ruin: one short training with a growing learning rate."""
    resolved = recipe_of(recipe, set_, data__name=data, data__data_dir=data_dir, seed=seed, batch_size=batch_size)
    overrides = overrides_of(build)
    _known([model], resolved, overrides)
    from nfzoo import engine, plots, tune
    from nfzoo.files import atomic

    out = out or pathlib.Path("runs") / f"lr-find-{model}"
    if dry_run:
        sweep = {"from": start, "to": end, "steps": steps, "out": str(out)}
        print(json.dumps({**engine.options(model, resolved, overrides), **sweep}, indent=1))
        return
    net, batches = tune.prepare(model, resolved, overrides)
    found = tune.lr_find(net, batches, start=start, end=end, steps=steps)
    with atomic(out / "lr_find.csv") as partial:
        found.table.to_csv(partial, index=False)
    suggestions = {"steepest descent": found.steepest, "a tenth of the minimum's": found.tenth}
    picture = plots.save(plots.range_test(found.table, suggestions), out / "lr_find.png")
    last = found.table.iloc[-1]
    ended = (
        f"diverged at {last.learning_rate:.2g}" if found.diverged else f"did not diverge up to {last.learning_rate:.2g}"
    )
    say(f"{len(found.table)} steps; the loss {ended}")
    scale = resolved.peak_learning_rate / resolved.optimizer.learning_rate  # of recipes that state rates per 256 images
    for name, rate in suggestions.items():
        say(
            f"{name}: --lr {rate / scale:.2g}" if rate > 0 else f"{name}: none, the loss did not fall; try more --steps"
        )
    say(f"wrote {out / 'lr_find.csv'} and {picture}")
