"""Use a run's result: load its model, evaluate it."""

import pathlib
import warnings

import keras
import numpy as np

from nfzoo import backend, callbacks, data, recipes
from nfzoo.engine import learning
from nfzoo.engine.folder import read_options
from nfzoo.files import finite
from nfzoo.weights import shorten


def load_run(folder: str | pathlib.Path) -> keras.Model:
    """Load the trained model of a run, or, with a warning, its newest checkpoint.

    Of a run with a moving average it is the average, as at the end; in a checkpoint batch normalization has the
    statistics of the weights.

    Raises:
        FileNotFoundError: if the folder holds no run, or neither a model nor a checkpoint that verifies.

    Example:
        >>> import nfzoo, tempfile
        >>> from rich.console import Console
        >>> recipe = nfzoo.recipes.override(nfzoo.recipes.get("demo"), {"data.name": "fake", "epochs": 1})
        >>> out = tempfile.mkdtemp()
        >>> _ = nfzoo.engine.run("sn_test_ffnn", recipe, out, console=Console(quiet=True))
        >>> load_run(out).name
        'sn_test_ffnn'
    """
    recipe = recipes.Recipe.model_validate(read_options(folder)["recipe"])
    folder = pathlib.Path(folder)
    path = folder / "model.keras"
    with learning.precision(recipe.precision):  # else the optimizer comes without what scales its loss
        if path.exists():
            return keras.saving.load_model(path)
        found = next(callbacks.sound(folder / "checkpoints", lambda text: warnings.warn(text, stacklevel=4)), None)
        if found is None:
            raise FileNotFoundError(
                f"Expected a trained model in {folder}. Received: neither model.keras nor a checkpoint"
            )
        path, said = found
        warnings.warn(
            f"{folder} has no trained model: this is its checkpoint after epoch {said['epoch']}", stacklevel=2
        )
        net = keras.saving.load_model(path)
    if recipe.ema:
        average = callbacks.AverageWeights()
        average.end(net)
        average.put_average()
    return net


def evaluate(folder: str | pathlib.Path, source: str | None = None, data_dir: str | None = None) -> dict:
    """Evaluate a run's model on its test split, or on that of another data set of the same classes.

    Args:
        folder: of the run.
        source: name of other data, as in a recipe's `data.name`; default: the run's.
        data_dir: where they lie; default: where they lay for the run.

    Returns:
        "images", how many, and what the model was compiled with, such as "loss" and "accuracy".

    Raises:
        FileNotFoundError: if there is no model, or no data.
        ValueError: if the data have other classes.
    """
    options = read_options(folder)
    recipe = recipes.Recipe.model_validate(options["recipe"])
    changes = {"data.name": source, "data.data_dir": data_dir}
    recipe = recipes.override(recipe, {k: v for k, v in changes.items() if v})
    net = load_run(folder)
    images = data.load(recipe.data, recipe.seed)
    learned = options["images"]["classes"]
    if set(learned) != set(images.classes):
        raise ValueError(
            f"Expected data of the {len(learned)} classes {shorten(learned)}. Received: {images.name} with "
            f"{len(images.classes)} classes, {shorten(images.classes)}"
        )
    number = np.array([learned.index(name) for name in images.classes], np.int32)  # another order, perhaps
    test = data.Split(images.test.images, number[images.test.labels])
    # The model learned on images standardized with its own data's constants; other data must look the same to it.
    mean, std = options["images"]["mean"], options["images"]["std"]
    classes = len(images.classes) if recipe.one_hot else None
    batches = data.Batches(test, recipe.batch_size, mean, std, classes=classes)
    result = net.evaluate(backend.feed(batches), verbose=0, return_dict=True)
    return finite({"images": len(images.test), **{k: float(np.round(v, 6)) for k, v in result.items()}})
