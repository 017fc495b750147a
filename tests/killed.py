"""A run that kills itself: `python tests/killed.py OUT POINT`.

POINT is a step (from 1, of this process), "write" (halfway through a checkpoint), "rename" (before a checkpoint has its
name), "describe" (before its description has one), "term STEP" (a SIGTERM at a step), or "never".
"""

import os
import pathlib
import signal
import sys
import warnings

import keras
from rich.console import Console

from nfzoo import callbacks, engine, recipes

EPOCHS, STEPS = 5, 4
RECIPE = recipes.override(
    recipes.get("demo"),
    {
        "data.name": "fake", "data.limit": 60, "batch_size": 16, "epochs": EPOCHS, "seed": 3, "agc": 0.05,
        "ema": 0.9, "optimizer.weight_decay": 0.01, "schedule.name": "cosine", "schedule.warmup_epochs": 1,
        "augment.flip": True, "augment.mixup": 0.2,
    },
)  # fmt: skip


def die(by: signal.Signals = signal.SIGKILL) -> None:
    os.kill(os.getpid(), by)


def die_at(step: int, by: signal.Signals = signal.SIGKILL) -> None:
    """Die at the end of a step, when nothing was told of it yet."""
    told, left = callbacks.StopOnNaN.on_train_batch_end, iter(range(step - 1, -1, -1))

    def on_train_batch_end(self, batch, logs=None):
        told(self, batch, logs)
        if next(left, None) == 0:
            die(by)

    callbacks.StopOnNaN.on_train_batch_end = on_train_batch_end


def half_written(model, path, **_):
    pathlib.Path(path).write_bytes(b"PK half of a checkpoint")
    die()


def main(out: str, point: str) -> None:
    warnings.simplefilter("ignore")
    if point.isdigit():
        die_at(int(point))
    elif point.startswith("term"):
        die_at(int(point.split()[1]), signal.SIGTERM)
    elif point == "write":
        keras.Model.save = half_written
    elif point in ("rename", "describe"):
        replace, ending = pathlib.Path.replace, {"rename": ".keras", "describe": ".json"}[point]
        pathlib.Path.replace = lambda self, to: (
            die() if to.suffix == ending and "model-" in to.name else replace(self, to)
        )
    build = {"dropout_rate": 0.3, "drop_path_rate": 0.2}
    engine.run("nf_test_resnet", RECIPE, out, overrides=build, console=Console(quiet=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
