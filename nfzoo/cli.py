"""The command line: handlers of a few lines, heavy imports inside them, errors in one line."""

import contextlib
import json
import logging
import os
import pathlib
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

app = typer.Typer(
    help="Keras 3 networks that train without batch normalization: build, train, watch, scan, export.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip
console = Console()

Model = Annotated[str, typer.Argument(help="name of a model, see `nfzoo list`")]
Run = Annotated[pathlib.Path, typer.Argument(help="folder of a run")]
Source = Annotated[
    str | None, typer.Option("--data", help="digits, fake, a tfds name, a folder of images by class, or FILE.npz")
]
DataDir = Annotated[str | None, typer.Option(help="folder of tensorflow-datasets; default: TFDS_DATA_DIR")]
ImageSize = Annotated[int | None, typer.Option(min=1, help="resize to squares of this many pixels")]
RecipeName = Annotated[str, typer.Option("--recipe", help="demo, finetune or poster, see nfzoo.recipes.RECIPES")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="PATH=VALUE of the recipe, e.g. agc=0.02, augment.flip=true; repeatable"),
]
Build = Annotated[
    list[str] | None,
    typer.Option("--build", help="KEY=VALUE of nfzoo.build, e.g. magnitude_preserving=false; repeatable"),
]
Epochs = Annotated[int | None, typer.Option(help="number of epochs")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the resolved options and stop")]


def _pairs(items: list[str] | None) -> dict[str, str]:
    for item in items or []:
        if "=" not in item:
            raise ValueError(f"Expected KEY=VALUE. Received: {item!r}")
    return dict(item.split("=", 1) for item in items or [])


def _recipe(name: str, settings: list[str] | None, **given):
    from nfzoo import recipes

    changes = {path.replace("__", "."): value for path, value in given.items() if value is not None}
    return recipes.override(recipes.get(name), changes | _pairs(settings))


def _overrides(items: list[str] | None) -> dict:
    from nfzoo import recipes

    return {key: recipes.parse_value(value) for key, value in _pairs(items).items()}


def _say(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)  # a path may hold [brackets]


@contextlib.contextmanager
def quiet_start():
    """Import Keras and wake its backend without the start-up notes that TensorFlow writes past every setting."""
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        import keras

        keras.ops.zeros(())
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


@app.command("list")
def list_(
    pattern: Annotated[str, typer.Argument(help='shell wildcards, e.g. "sn_*"')] = "*",
    variant: Annotated[str | None, typer.Option(help="keep one variant, e.g. nf")] = None,
    family: Annotated[str | None, typer.Option(help="keep one family, e.g. efficientnet")] = None,
    as_json: AsJson = False,
) -> None:
    """List models with parameters and multiply-adds."""
    from dataclasses import asdict

    from nfzoo import names, registry

    infos = [registry.model_info(name) for name in names.list_models(pattern, variant=variant, family=family)]
    if as_json:
        print(json.dumps([asdict(info) for info in infos]))
        return
    view = Table(Column("model", no_wrap=True), caption="independent: an example's output does not depend on its batch")
    for heading in ("px", "parameters", "multiply-adds"):
        view.add_column(heading, justify="right")
    view.add_column("independent")
    for info in infos:
        counts = (f"{info.parameters:,}", f"{info.multiply_adds / 1e6:,.1f} M")
        view.add_row(info.name, str(info.input_size), *counts, "yes" if info.batch_independent else "no")
    console.print(view if infos else f"No model matches {pattern!r}.", markup=False)


@app.command()
def info(
    model: Model,
    agc: Annotated[bool, typer.Option("--agc", help="print every variable with its unit axes and clip factor")] = False,
    factor: Annotated[float, typer.Option(help="clip factor shown by --agc")] = 0.01,
    build: Build = None,
    as_json: AsJson = False,
) -> None:
    """Tell what a model is."""
    from dataclasses import asdict

    from nfzoo import names, registry

    overrides = _overrides(build)
    if not agc:
        facts = asdict(registry.model_info(model, **overrides))
        if as_json:
            print(json.dumps(facts))
            return
        view = Table(show_header=False)
        for key, value in facts.items():
            view.add_row(key.replace("_", " "), f"{value:,}" if type(value) is int else str(value))
        console.print(view)
        return
    names.parse(model)
    with quiet_start():
        from nfzoo.agc import AGC

    net = registry.build(model, **overrides)
    shapes = {v.path: tuple(v.shape) for v in net.trainable_variables}
    rows = [
        {"variable": path, "shape": shapes[path], "axes": axes, "factor": None if axes is None else factor}
        for path, axes in AGC(factor).units(net).items()
    ]
    if as_json:
        print(json.dumps(rows))
        return
    view = Table(Column("variable", no_wrap=True), "shape", "norm over axes", "factor")
    for row in rows:
        units = "not clipped" if row["axes"] is None else "all" if not row["axes"] else str(row["axes"])
        view.add_row(row["variable"], str(row["shape"]), units, "–" if row["factor"] is None else f"{factor:g}")
    console.print(view)


@app.command()
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
    set_: Settings = None,
    build: Build = None,
    dry_run: DryRun = False,
) -> None:
    """Train a model; the same command again resumes, or shows the result."""
    resolved = _recipe(
        recipe, set_, data__name=data, data__data_dir=data_dir, epochs=epochs, optimizer__learning_rate=lr, seed=seed,
        batch_size=batch_size,
    )  # fmt: skip
    overrides = _overrides(build)
    from nfzoo import names, registry

    names.parse(model)
    with quiet_start():
        from nfzoo import engine

    out = out or pathlib.Path("runs") / f"{model}-{resolved.seed}"
    registry.resolve(model, engine.options(model, resolved, overrides)["build"])
    if dry_run:
        print(json.dumps({**engine.options(model, resolved, overrides), "out": str(out)}, indent=1))
        return
    metrics = engine.run(
        model, resolved, out, overrides=overrides, taps=None if taps == "none" else taps, console=console
    )
    console.print_json(data=metrics)
    if metrics["status"] == "diverged":
        raise RuntimeError(
            f"the loss is not finite from step {metrics['diverged_at_step']} of epoch {metrics['epochs'] + 1} on; the "
            f"run is marked as diverged, checkpoints of earlier epochs, if any, are in {out / 'checkpoints'}. Try a "
            "smaller --lr or --set agc=0.01."
        )


@app.command("eval")
def eval_(run: Run, data: Source = None, data_dir: DataDir = None) -> None:
    """Evaluate the model of a run on its test images, or on other data of the same classes."""
    with quiet_start():
        from nfzoo import engine

    console.print_json(data=engine.evaluate(run, data, data_dir))


@app.command()
def spp(
    sources: Annotated[
        list[str], typer.Argument(help="folders of runs, or names of models (measured at initialisation)")
    ],
    to: Annotated[pathlib.Path, typer.Option(help="picture to write")] = pathlib.Path("spp.png"),
    data: Source = "digits",
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    taps: Annotated[str, typer.Option(help="what to observe of models given by name")] = "blocks",
    seed: Annotated[int, typer.Option(help="of the initialisation")] = 0,
    build: Build = None,
) -> None:
    """Draw signal propagation of runs or of freshly initialised models, side by side."""
    from nfzoo import names, plots, recipes

    for source in sources:
        if not pathlib.Path(source).is_dir():
            names.parse(source)
    with quiet_start():
        from nfzoo.spp import read

    images = recipes.Data(name=data, data_dir=data_dir, image_size=image_size)
    logs = {}
    for source in sources:
        if pathlib.Path(source).is_dir():
            name = pathlib.Path(source).name
            logs[source if name in logs else name] = read(source)
        else:
            logs[source] = _at_initialisation(source, images, taps, seed, _overrides(build))
    _say(f"wrote {plots.save(plots.signal_propagation(logs), to)}")


def _at_initialisation(model: str, source, taps: str, seed: int, overrides: dict):
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
    return snapshot(net, x, y, keras.losses.SparseCategoricalCrossentropy(from_logits=True), taps)


@app.command()
def scan(
    models: Annotated[list[str], typer.Argument(help="names of models")],
    lr: Annotated[str, typer.Option(help="learning rates, separated by commas")] = "0.1,0.01,0.001",
    seeds: Annotated[str | None, typer.Option(help="seeds, separated by commas; default: the recipe's")] = None,
    data: Source = None,
    recipe: RecipeName = "demo",
    epochs: Epochs = None,
    out: Annotated[pathlib.Path, typer.Option(help="folder of the scan")] = pathlib.Path("runs/scan"),
    data_dir: DataDir = None,
    set_: Settings = None,
    build: Build = None,
    dry_run: DryRun = False,
) -> None:
    """Scan learning rates with keras-tuner; the same command again does the missing trials."""
    resolved = _recipe(recipe, set_, data__name=data, data__data_dir=data_dir, epochs=epochs)
    rates = _numbers(lr, float, "--lr")
    chosen = _numbers(seeds, int, "--seeds") if seeds else list(resolved.seeds)
    overrides = _overrides(build)
    from nfzoo import names, registry

    for model in models:
        names.parse(model)
    with quiet_start():
        from nfzoo import engine
    for model in models:
        registry.resolve(model, engine.options(model, resolved, overrides)["build"])
    if dry_run:
        grid = {"models": models, "learning_rates": rates, "seeds": chosen}
        grid["trials"] = len(models) * len(rates) * len(chosen)
        print(json.dumps({**grid, "recipe": resolved.model_dump(mode="json"), "out": str(out)}, indent=1))
        return
    from nfzoo import plots, tune

    results = tune.scan(models, rates, resolved, out, seeds=chosen, overrides=overrides, console=console)
    picture = plots.save(plots.scan(tune.summary(results)), out / "scan.png")
    console.print(tune.table(results))
    _say(f"wrote {out / 'scan.csv'} and {picture}")


def _numbers(text: str, kind: type, option: str) -> list:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"Expected numbers separated by commas for {option}. Received: {text!r}") from None


@app.command()
def export(
    run: Run,
    to: Annotated[pathlib.Path, typer.Option(help="folder to make, e.g. saved_models/NAME")],
    format: Annotated[str, typer.Option(help="saved_model")] = "saved_model",
) -> None:
    """Export the model of a run; the artefact is reloaded in a fresh process and compared first."""
    with quiet_start():
        from nfzoo.export import export

    entry = export(run, to, format)
    difference = entry["largest_relative_difference"]
    _say(f"wrote {to}, reloaded and compared on real images: largest relative difference {difference:.1e}")


@app.command()
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
    _say(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB); read it with --data {path}")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="whose layout FILE has: timm, deepmind or keras (applications)")],
    file: Annotated[pathlib.Path, typer.Argument(help=".safetensors, .pth, .bin; a pickle, .npz; .h5, .keras")],
    model: Annotated[str, typer.Option(help="name of the model, ours or the source's")],
    to: Annotated[pathlib.Path, typer.Option(help="OUT.keras or OUT.safetensors")],
    target: Annotated[str, typer.Option(help="layout of OUT.safetensors: nfzoo or timm")] = "nfzoo",
    build: Build = None,
) -> None:
    """Convert weights of another implementation; the number of classes is the file's, pickles run no code."""
    if (target, to.suffix) not in (("nfzoo", ".keras"), ("nfzoo", ".safetensors"), ("timm", ".safetensors")):
        raise ValueError(f"Expected OUT.safetensors, or OUT.keras of target nfzoo. Received: {to} of target {target}")
    overrides = _overrides(build)
    with quiet_start():
        from nfzoo import convert, files, weights

    net = convert.load(model, source, file, **overrides)
    _say(f"read {len(net.weights)} weights, {net.count_params():,} parameters, of {net.name} from {file}")
    if target == "timm":
        convert.save(net, to, name=model, **overrides)
    elif to.suffix == ".safetensors":
        weights.save(net, to)
    else:
        with files.atomic(to) as partial:
            net.save(partial)
    _say(f"wrote {to} ({to.stat().st_size / 1e6:.1f} MB)")


def _told(error: Exception) -> str:
    """Say an error in one line, without the trace that TensorFlow puts into its messages."""
    if isinstance(error, MemoryError) or "ResourceExhausted" in type(error).__name__ or "RESOURCE_EXH" in str(error):
        return "error: Out of memory. Try smaller images, or a smaller batch: train and scan take --set batch_size=…"
    trace = ("File ", "[[", "Graph execution error", "Detected at node")
    lines = [line.strip() for line in str(error).splitlines()]
    message = " ".join(line for line in lines if line and not line.startswith(trace))
    if isinstance(error, ValueError | TypeError | OSError | ImportError | RuntimeError):
        return f"error: {message}"
    return f"Unexpected error: {type(error).__name__}: {message}; set NFZOO_TRACEBACK=1 to see where"


def main() -> None:
    """Entry point: an error is one line on stderr and exit status 1; NFZOO_TRACEBACK=1 shows its origin."""
    # TensorFlow's start-up notes are not about the user's run.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        app()
    except SystemExit as stop:
        if stop.code == 130:  # Ctrl-C
            Console(stderr=True).print("interrupted; the same command resumes")
        raise
    except Exception as error:
        if os.environ.get("NFZOO_TRACEBACK"):
            raise
        kind, _, text = _told(error).partition(":")
        Console(stderr=True).print(f"[red]{kind}:[/]{escape(text)}", highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
