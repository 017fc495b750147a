"""What the commands share: the application, the options, how errors and notes are said."""

import contextlib
import logging
import os
import pathlib
import sys
from typing import Annotated

import typer
from rich.console import Console

import nfzoo

app = typer.Typer(
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
RecipeName = Annotated[str, typer.Option("--recipe", help="how to train, see `nfzoo recipes`")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="PATH=VALUE of the recipe, e.g. agc=0.02, schedule.name=cosine; repeatable"),
]
Build = Annotated[
    list[str] | None,
    typer.Option("--build", help="KEY=VALUE of nfzoo.build, e.g. magnitude_preserving=false; repeatable"),
]
Epochs = Annotated[int | None, typer.Option(help="number of epochs")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the resolved options and stop")]


def _version(wanted: bool) -> None:
    if wanted:
        print(nfzoo.__version__)
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print it and stop")
    ] = False,
) -> None:
    """Keras 3 networks that train without batch normalization: build, train, watch, scan, export."""


def pairs(items: list[str] | None) -> dict[str, str]:
    for item in items or []:
        if "=" not in item:
            raise ValueError(f"Expected KEY=VALUE. Received: {item!r}")
    return dict(item.split("=", 1) for item in items or [])


def recipe_of(name: str, settings: list[str] | None, **given):
    from nfzoo import recipes

    changes = {path.replace("__", "."): value for path, value in given.items() if value is not None}
    return recipes.override(recipes.get(name), changes | pairs(settings))


def overrides_of(items: list[str] | None) -> dict:
    from nfzoo import recipes

    return {key: recipes.parse_value(value) for key, value in pairs(items).items()}


def say(text: str) -> None:
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

        if keras.config.backend() == "tensorflow":
            keras.ops.zeros(())
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
