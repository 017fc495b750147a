"""Commands on networks: list, info, certify, convert."""

import dataclasses
import json
import pathlib
from typing import Annotated

import typer
from rich.table import Column, Table

from nfzoo.cli.common import AsJson, Build, Model, app, console, overrides_of, quiet_start, say


@app.command("list", rich_help_panel="Models")
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


@app.command(rich_help_panel="Models")
def info(
    model: Model,
    agc: Annotated[bool, typer.Option("--agc", help="print every variable with its unit axes and clip factor")] = False,
    factor: Annotated[float, typer.Option(help="clip factor shown by --agc")] = 0.01,
    memory: Annotated[
        bool, typer.Option("--memory", help="print what a training step keeps for its backward pass")
    ] = False,
    build: Build = None,
    as_json: AsJson = False,
) -> None:
    """Tell what a model is."""
    from dataclasses import asdict

    from nfzoo import names, registry

    overrides = overrides_of(build)
    if memory:
        _memory(registry.build(model, **overrides), as_json)
        return
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


def _memory(net, as_json: bool) -> None:
    from nfzoo.memory import stored

    found = dataclasses.asdict(stored(net))
    if as_json:
        print(json.dumps(found))
        return
    told = {
        "kept": "activations that the backward pass reads again, per example",
        "outputs": "outputs of all layers, per example",
        "weights": "parameters; their gradients, and each slot of the optimizer, as much again",
    }
    view = Table("MB", "of float32", title=net.name)
    for key, text in told.items():
        view.add_row(f"{found[key] / 1e6:,.1f}", text)
    console.print(view)


DEPENDENT = 3  # exit status; 1 is an error, 2 a wrong use


@app.command(rich_help_panel="Models")
def certify(model: Model, build: Build = None, as_json: AsJson = False) -> None:
    """Measure whether an example's output and gradient depend on its batch; exit status 3 if they do."""
    with quiet_start():
        from nfzoo import certify as certificates

    with console.status(f"measuring {model}"), quiet_start():
        found = certificates.certify(model, **overrides_of(build))
    if as_json:
        print(json.dumps({**dataclasses.asdict(found), "independent": found.independent}))
    else:
        view = Table("what holds if examples are independent", "largest relative difference", "")
        for check, difference in found.differences.items():
            verdict = "[green]holds" if difference <= certificates.TOLERANCE else "[red]DOES NOT HOLD"
            view.add_row(certificates.CHECKS[check], f"{difference:.1e}", verdict)
        console.print(view)
        does = "does not depend" if found.independent else "depends"
        say(f"{model}: what it makes of an example {does} on the batch")
    if not found.independent:
        raise typer.Exit(DEPENDENT)


@app.command(rich_help_panel="Models")
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
    overrides = overrides_of(build)
    with quiet_start():
        from nfzoo import convert, files, weights

    net = convert.load(model, source, file, **overrides)
    say(f"read {len(net.weights)} weights, {net.count_params():,} parameters, of {net.name} from {file}")
    if target == "timm":
        convert.save(net, to, name=model, **overrides)
    elif to.suffix == ".safetensors":
        weights.save(net, to)
    else:
        with files.atomic(to) as partial:
            net.save(partial)
    say(f"wrote {to} ({to.stat().st_size / 1e6:.1f} MB)")
