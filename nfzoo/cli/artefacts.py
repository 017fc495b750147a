"""Commands on what is deployed: export, serve-check."""

import pathlib
from typing import Annotated

import typer

from nfzoo.cli.common import app, console, quiet_start, say


@app.command(rich_help_panel="Deployment")
def export(
    model: Annotated[str, typer.Argument(help="folder of a run, or a model of the zoo: NAME, NAME.TAG")],
    to: Annotated[
        pathlib.Path,
        typer.Option(help="what to make: FOLDER, FILE.tflite, FILE.onnx, FILE.keras, MODEL.TAG.safetensors"),
    ],
    format: Annotated[
        str | None, typer.Option(help="saved_model, litert, onnx, keras or weights; default: by the ending of --to")
    ] = None,
    fold: Annotated[
        bool, typer.Option(help="put normalization, weight standardization and scales into kernels")
    ] = True,
    preprocess: Annotated[bool, typer.Option("--preprocess", help="take pixels in 0…255 and standardize them")] = False,
    quantize: Annotated[str | None, typer.Option(help="int8: quantize a LiteRT model by real images")] = None,
    images: Annotated[
        pathlib.Path | None, typer.Option(help="folder of image files to compare on and to quantize by")
    ] = None,
) -> None:
    """Export a model; the artefact is reloaded by its own runtime and compared on real images first."""
    with quiet_start():
        from nfzoo.export import export

    with console.status(f"writing {to}, then reloading it in a process of its own"), quiet_start():
        entry = export(model, to, format, fold=fold, preprocess=preprocess, quantize=quantize, images=images)
    difference = entry["largest_relative_difference"]
    say(f"wrote {to}, reloaded and compared on real images: largest relative difference {difference:.1e}")
    if entry.get("constant_outputs"):
        say("the outputs are the same for every image, as of a classifier that starts at zero: this shows nothing yet")
    if entry.get("quantized"):
        say(f"of these images {entry['same_class']:.1%} keep their class; evaluate an 8-bit model on your own data")
    if "bytes" in entry:
        say(
            f"{entry['bytes'] / 1e6:.1f} MB, {entry['latency_ms']:.1f} ms for one image, "
            f"{entry['images_per_second']:.0f} images/s in a batch, on this machine"
        )


@app.command("serve-check", rich_help_panel="Deployment")
def serve_check(
    path: Annotated[pathlib.Path, typer.Argument(help="a SavedModel's folder, a .tflite, .onnx or .keras file")],
    image: Annotated[list[pathlib.Path] | None, typer.Option(help="an image file; may be repeated")] = None,
    top: Annotated[int, typer.Option(min=1, help="how many classes to show")] = 5,
) -> None:
    """Load an artefact with its own runtime; show its signature, what it says of itself, the classes of images."""
    from rich.table import Table

    with quiet_start():
        from nfzoo.export import serve_check

        served = serve_check(path, image or [], top)
    for kind, found in served.signature.items():
        for name, one in found.items():
            say(f"{kind[:-1]} {name}: {one['dtype']} {['any' if n is None else n for n in one['shape']]}")
    about = {key: served.card.get(key) for key in ("model", "data", "metrics", "input", "folded", "quantized")}
    say("; ".join(f"{key}: {value}" for key, value in about.items() if value is not None) or "nfzoo did not write it")
    for file, best in zip(image or [], served.top, strict=True):
        table = Table("class", "probability", title=str(file))
        for name, probability in best:
            table.add_row(name, f"{probability:.1%}")
        console.print(table)
    if served.note:
        say(served.note)
    if served.milliseconds is not None:
        say(f"{served.milliseconds:.1f} ms for one image")
