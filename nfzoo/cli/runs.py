"""Commands on runs: train, eval, data."""

import dataclasses
import json
import pathlib
from typing import Annotated

import typer

from nfzoo.cli.common import (
    Build,
    DataDir,
    DryRun,
    Epochs,
    ImageSize,
    Model,
    RecipeName,
    Run,
    Settings,
    Source,
    app,
    console,
    overrides_of,
    quiet_start,
    recipe_of,
    say,
)


@app.command(rich_help_panel="Training")
def train(
    model: Model,
    data: Source = None,
    recipe: RecipeName = "demo",
    epochs: Epochs = None,
    lr: Annotated[float | None, typer.Option(help="learning rate")] = None,
    seed: Annotated[
        int | None, typer.Option(help="decides initialisation, splits, order, augmentation, dropout")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="examples per step")] = None,
    out: Annotated[pathlib.Path | None, typer.Option(help="folder of the run; default: runs/MODEL-SEED")] = None,
    data_dir: DataDir = None,
    taps: Annotated[str, typer.Option(help='signal propagation: "blocks", "layers", a pattern, or "none"')] = "blocks",
    signals: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE of nfzoo.SignalPropagation, e.g. source=live, statistics=all; repeatable"),
    ] = None,
    strategy: Annotated[str, typer.Option(help='"mirrored": all devices of this machine share each batch')] = "none",
    coordinator: Annotated[str | None, typer.Option(help="HOST:PORT of process 0 of several (JAX)")] = None,
    processes: Annotated[int, typer.Option(min=1, help="how many processes share each batch")] = 1,
    process_id: Annotated[int, typer.Option(min=0, help="which of them this is; 0 writes the run's folder")] = 0,
    set_: Settings = None,
    build: Build = None,
    dry_run: DryRun = False,
) -> None:
    """Train a model; the same command again resumes, or shows the result."""
    resolved = recipe_of(
        recipe, set_, data__name=data, data__data_dir=data_dir, epochs=epochs, optimizer__learning_rate=lr, seed=seed,
        batch_size=batch_size,
    )  # fmt: skip
    overrides, watched = overrides_of(build), overrides_of(signals)
    from nfzoo import names, registry

    names.parse(model)
    with quiet_start():
        import nfzoo
        from nfzoo import engine

    if strategy not in ("none", "mirrored"):
        raise ValueError(f"Expected --strategy none or mirrored. Received: {strategy!r}")
    devices = engine.Devices(strategy == "mirrored", coordinator, processes, process_id)
    out = out or pathlib.Path("runs") / f"{model}-{resolved.seed}"
    registry.resolve(model, engine.options(model, resolved, overrides)["build"])
    if not {"x", "y", "log_dir"}.isdisjoint(watched):
        raise ValueError("Expected --signals other than x, y and log_dir. Received: one that the run decides")
    nfzoo.SignalPropagation([0.0], **watched)  # says what is wrong with them
    if dry_run:
        shown = {"out": str(out), "taps": taps, "signals": watched, "devices": dataclasses.asdict(devices)}
        print(json.dumps({**engine.options(model, resolved, overrides), **shown}, indent=1))
        return
    metrics = engine.run(
        model, resolved, out, overrides=overrides, taps=None if taps == "none" else taps, signals=watched,
        console=console, devices=devices,
    )  # fmt: skip
    if devices.leads:
        console.print_json(data=metrics)
    if metrics["status"] == "diverged":
        named = f", first in the {metrics['diverged_in']}" if metrics.get("diverged_in") else ""
        raise RuntimeError(
            f"the loss is not finite from step {metrics['diverged_at_step']} of epoch {metrics['epochs'] + 1} on"
            f"{named}. "
            f"The run is marked as diverged; checkpoints of earlier epochs, if any, are in {out / 'checkpoints'}. Try "
            "a smaller --lr or --set agc=0.01."
        )


@app.command("eval", rich_help_panel="Training")
def eval_(run: Run, data: Source = None, data_dir: DataDir = None) -> None:
    """Evaluate the model of a run on its test images, or on other data of the same classes."""
    with quiet_start():
        from nfzoo import engine

    console.print_json(data=engine.evaluate(run, data, data_dir))


@app.command(rich_help_panel="Training")
def data(
    name: Annotated[str, typer.Argument(help="digits, fake, a tfds name, or a folder of images by class")],
    to: Annotated[pathlib.Path, typer.Option(help="FILE.npz to write")],
    data_dir: DataDir = None,
    image_size: ImageSize = None,
) -> None:
    """Write a data set as plain arrays, for machines without TensorFlow."""
    with quiet_start():
        from nfzoo import data as data_module
    from nfzoo import recipes

    path = data_module.save(recipes.Data(name=name, data_dir=data_dir, image_size=image_size), to)
    say(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB); read it with --data {path}")
