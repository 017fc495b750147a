"""Commands on signal propagation: spp, report, doctor."""

import json
import pathlib
import sys
from typing import Annotated, Any

import typer
from rich.markup import escape

from nfzoo.cli.common import (
    AsJson,
    Build,
    DataDir,
    DryRun,
    ImageSize,
    RecipeName,
    Settings,
    Source,
    app,
    console,
    overrides_of,
    quiet_start,
    recipe_of,
    say,
)

_FILMS = (".gif", ".webp", ".apng")
WithTheory = Annotated[bool, typer.Option(help="draw what theory expects at initialisation beside it")]


@app.command(rich_help_panel="Signals")
def spp(
    sources: Annotated[
        list[str], typer.Argument(help="folders of runs, or names of models (measured at initialisation)")
    ],
    to: Annotated[
        pathlib.Path, typer.Option(help="picture to write: .png, .svg, .pdf; .gif or .webp for a film over the steps")
    ] = pathlib.Path("spp.png"),
    figure: Annotated[str, typer.Option(help="one of nfzoo.plots.FIGURES, e.g. heatmap, gradients")] = "propagation",
    data: Source = "digits",
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    taps: Annotated[str, typer.Option(help="what to observe of models given by name")] = "blocks",
    seed: Annotated[int, typer.Option(help="of the initialisation")] = 0,
    theory: WithTheory = True,
    build: Build = None,
) -> None:
    """Draw signal propagation of runs or of freshly initialised models, side by side."""
    from nfzoo import names, plots, recipes
    from nfzoo import theory as expectations
    from nfzoo.files import title_of

    if figure not in plots.FIGURES:
        listed = "; ".join(f"{name}: {named.description}" for name, named in plots.FIGURES.items())
        raise ValueError(f"Expected the name of a figure ({listed}). Received: {figure!r}")
    for source in sources:
        if not pathlib.Path(source).is_dir():
            names.parse(source)
    with quiet_start():
        from nfzoo.spp import read, read_meta

    images = recipes.Data(name=data, data_dir=data_dir, image_size=image_size)
    logs, told, edges = {}, {}, None
    for source in sources:
        title = f"{source}, new" if source in logs else source
        if pathlib.Path(source).is_dir():
            title = title_of(pathlib.Path(source), logs)
            logs[title], options = read(source), _options(source)
            edges = read_meta(source).get("edges", edges)
        else:
            logs[title], options = _at_initialisation(source, images, taps, seed, overrides_of(build))
        expected = expectations.of_run(options, logs[title]) if theory else None
        told |= {} if expected is None else {title: expected}
    if to.suffix.lower() in _FILMS:
        if figure != "propagation":
            raise ValueError(f"Expected a picture for --figure {figure}; films show propagation. Received: --to {to}")
        say(f"wrote {plots.animate(logs, to, theory=told)[0]}")
    else:
        say(f"wrote {plots.save(plots.draw(figure, logs, theory=told, edges=edges), to)}")


def _options(folder: str) -> dict:
    path = pathlib.Path(folder) / "options.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _at_initialisation(model: str, source, taps: str, seed: int, overrides: dict) -> tuple[Any, dict]:
    """Signals of a new model, and what a run of it would call its options."""
    from nfzoo import registry

    registry.resolve(model, overrides)
    import keras

    from nfzoo import data as data_module
    from nfzoo.spp import snapshot

    images = data_module.load(source, seed)
    probe = data_module.subset(images.train, 128, seed)
    x, y = data_module.Batches(probe, 128, images.mean, images.std)[0]
    keras.utils.set_random_seed(seed)
    net = registry.build(model, classes=len(images.classes), input_shape=x.shape[1:], **overrides)
    log = snapshot(net, x, y, keras.losses.SparseCategoricalCrossentropy(from_logits=True), taps)
    constants = {"classes": images.classes, "shape": x.shape[1:]}
    return log.assign(step=0, epoch=0), {"model": model, "build": overrides, "images": constants}


@app.command(rich_help_panel="Signals")
def report(
    runs: Annotated[list[pathlib.Path], typer.Argument(help="folders of runs, or of a log (spp.jsonl)")],
    out: Annotated[pathlib.Path, typer.Option(help="file to write")] = pathlib.Path("report.html"),
    theory: WithTheory = True,
) -> None:
    """Write an HTML report of runs: one file that works offline."""
    with quiet_start():  # logs are read by nfzoo.spp
        from nfzoo import report as writer
        from nfzoo import spp  # noqa: F401
        from nfzoo import theory as expectations

    path = writer.write(runs, out, theory=expectations.of_run if theory else None)
    say(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


_MARKS = {"alarm": "[bold red]✗[/]", "warning": "[yellow]![/]", "note": "[blue]i[/]", "good": "[green]✓[/]"}


@app.command(rich_help_panel="Signals")
def doctor(
    model: Annotated[str, typer.Argument(help="name of a model, keras.applications:NAME, or FILE.keras")],
    data: Source = None,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    steps: Annotated[int, typer.Option(min=2, help="training steps to watch")] = 20,
    batch_size: Annotated[int | None, typer.Option(min=1, help="examples per step; default: the recipe's")] = None,
    lr: Annotated[float | None, typer.Option(help="learning rate")] = None,
    recipe: RecipeName = "demo",
    report: Annotated[pathlib.Path | None, typer.Option(help="HTML report to write")] = None,
    set_: Settings = None,
    build: Build = None,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Watch a few training steps of a network and say in words what it suffers from."""
    resolved = recipe_of(
        recipe, set_, data__name=data, data__data_dir=data_dir, data__image_size=image_size,
        optimizer__learning_rate=lr, batch_size=batch_size,
    )  # fmt: skip
    overrides = overrides_of(build)
    if dry_run:
        told = {"model": model, "build": overrides, "steps": steps, "recipe": resolved.model_dump(mode="json")}
        print(json.dumps(told, indent=1))
        return
    with quiet_start():
        from nfzoo import doctor as practice
    net, x, y = _patient(model, resolved, overrides, steps)
    with console.status(f"watching {steps} training steps of {net.name}; compiling takes a while"):
        diagnosis = practice.examine(net, x, y, steps=steps, batch_size=resolved.batch_size)
    if as_json:
        print(json.dumps(practice.as_records(diagnosis)))
    else:
        for finding in diagnosis.findings:
            console.print(f"{_MARKS[finding.severity]} {escape(finding.sentence)}", highlight=False)
            if finding.remedy:
                console.print(f"  [dim]{escape(finding.remedy)}[/]", highlight=False)
    if report:
        from nfzoo import report as writer

        say(f"wrote {writer.write({net.name: diagnosis.log}, report)}")


def _patient(name: str, recipe, overrides: dict, steps: int) -> tuple:
    """A compiled model and as many images as the steps take, prepared as the model expects them."""
    import keras
    import numpy as np

    from nfzoo import data, engine, names
    from nfzoo.engine import learning

    library, _, function = name.partition(":")
    if library == "keras.applications" and not callable(getattr(keras.applications, function, None)):
        raise ValueError(f"Expected the name of a network of keras.applications. Received: {function!r}")
    stored = name.endswith(".keras")
    ours = not stored and library != "keras.applications"
    if ours:
        names.parse(name)
    resolved = engine.options(name, recipe, overrides) if ours else {}
    images = learning.load_images(resolved, recipe) if ours else data.load(recipe.data, recipe.seed)
    keras.utils.set_random_seed(recipe.seed)
    batches = data.pipeline(images, recipe)["train"]
    if ours:  # as `nfzoo train` makes it
        with learning.precision(recipe.precision):
            net = learning.new_model(resolved, images, recipe)
            learning.prepare(net, recipe, len(batches))
        x, y = map(np.concatenate, zip(*(batches[i] for i in range(min(steps, len(batches)))), strict=True))
        return net, x, y
    split, shape = data.subset(images.train, steps * recipe.batch_size, recipe.seed), images.train.images.shape[1:]
    net = keras.saving.load_model(name) if stored else None
    one_hot = net is not None and net.compiled and _takes_vectors(net.loss)
    classes = len(images.classes) if one_hot else None
    x, y = data.Batches(split, len(split), images.mean, images.std, classes=classes)[0]
    if net is None:
        build = getattr(keras.applications, function)
        net = build(weights=None, classes=len(images.classes), input_shape=shape, **overrides)
        x = sys.modules[build.__module__].preprocess_input(split.images.astype("float32"))
    if not net.compiled:
        logits = getattr(net.layers[-1], "activation", None) is not keras.activations.softmax
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=logits)
        net.compile(engine.optimizer(recipe, len(batches)), loss)
    return net, x, y


def _takes_vectors(loss) -> bool:
    """Whether labels are one-hot for a loss, an object of Keras' or its name."""
    import keras

    return isinstance(loss, keras.losses.CategoricalCrossentropy) or loss == "categorical_crossentropy"
