"""What can be exported: the model of a run, a model of the zoo by name, any Keras model; each with real images."""

import pathlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import keras
import numpy as np
from keras import layers

from nfzoo import data, engine, names, recipes, registry, weights
from nfzoo.convert import published
from nfzoo.export.serve import read_image, standardized
from nfzoo.sources import SUFFIXES

LICENCE = "Apache-2.0"  # of what is trained with nfzoo


@dataclass(frozen=True)
class Source:
    """A model, real images as it takes them, and what is known of it.

    Attributes:
        images: (n, height, width, channels), which an artefact is compared on.
        calibration: others, which the ranges of an 8-bit model are taken from.
        card: what an artefact says of itself; "input" has the shape, mean and std of x / 255, if they are known.
    """

    model: keras.Model
    images: np.ndarray
    calibration: np.ndarray
    card: dict = field(default_factory=dict)


def source_of(
    given: keras.Model | str | pathlib.Path,
    examples: int,
    images: np.ndarray | str | pathlib.Path | None = None,
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Source:
    """Find a model.

    Args:
        given: the folder of a run, a name of the zoo ("sn_efficientnet_b0.cifar100"), or a model.
        examples: number of images of each kind at most: test and training images of a run, else parts of two
            photographs.
        images: these instead, as the model takes them, or a folder of image files.
        classes, mean, std: what is not known of the model: names of classes; by channel, of x / 255.

    Raises:
        FileNotFoundError, ValueError: for anything else.
    """
    source = _found(given, examples, _stated(mean, std), photographs=images is None)
    if classes is not None:
        source = replace(source, card=_with_classes(source, list(classes)))
    source = replace(source, model=_in_float32(source.model))
    if images is None:
        return source
    given = isinstance(images, np.ndarray)
    x = _array(images[:examples], source) if given else _files(pathlib.Path(images), source, examples)
    return replace(source, images=x, calibration=x)


def _array(x: np.ndarray, source: Source) -> np.ndarray:
    shape = source.model.input_shape[1:]
    if x.ndim != len(shape) + 1 or any(side not in (None, n) for side, n in zip(shape, x.shape[1:], strict=True)):
        raise ValueError(f"Expected images of shape {shape}. Received: an array of shape {x.shape}")
    return x.astype("float32")


def _stated(mean: Sequence[float] | None, std: Sequence[float] | None) -> dict:
    if mean is None and std is None:
        return {}
    mean, std = (np.ravel(value).tolist() if value is not None else [] for value in (mean, std))
    if len(mean) != len(std) or not np.all(np.isfinite(mean + std)) or min(std) <= 0:
        raise ValueError(f"Expected mean and std > 0 of every channel. Received: mean={mean}, std={std}")
    return {"input": {"mean": mean, "std": std}}


def _with_classes(source: Source, classes: list[str]) -> dict:
    n = source.model.output_shape[-1]
    if "classes" in source.card:
        raise ValueError(f"Expected classes only where they are not known. Received: {source.card['model']} has them")
    if len(classes) != n or len(set(classes)) != n:
        raise ValueError(f"Expected {n} different names of classes. Received: {len(set(classes))}")
    return {**source.card, "classes": classes}


def _files(folder: pathlib.Path, source: Source, n: int) -> np.ndarray:
    """Image files of a folder and the folders in it, as the model takes them; `n` of them, evenly chosen."""
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f"Expected a folder of images ({', '.join(sorted(SUFFIXES))}). Received: {folder}")
    if "input" not in source.card:
        raise ValueError(f"Expected mean and std of {source.model.name} beside a folder of images. Received: neither")
    chosen = [found[i] for i in np.linspace(0, len(found) - 1, min(n, len(found))).astype(int)]
    x = np.stack([read_image(path, source.model.input_shape[1:]) for path in chosen])
    return standardized(x, source.card["input"]).astype("float32")


def _in_float32(model: keras.Model) -> keras.Model:
    """Artefacts compute in float32; so does what they are compared with, whatever precision the network learned in."""
    if all(layer.compute_dtype == "float32" for layer in model._flatten_layers(include_self=False)):
        return model

    def widened(layer: keras.Layer) -> keras.Layer:
        return type(layer).from_config({**layer.get_config(), "dtype": "float32"})

    twin = keras.models.clone_model(model, clone_function=widened, recursive=True)
    twin.set_weights(model.get_weights())
    return twin


def _found(given: keras.Model | str | pathlib.Path, examples: int, stated: dict, photographs: bool) -> Source:
    if isinstance(given, keras.Model):
        return _of_model(given, {"model": given.name, **stated}, examples, photographs)
    if stated:
        raise ValueError(f"Expected mean and std of a Keras model alone. Received: {given}, whose own are known")
    if pathlib.Path(given).is_dir() or _is_path(str(given)):
        return _of_run(pathlib.Path(given), examples)
    name, _, tag = str(given).partition(".")
    entry = weights.entry_of(names.canonical(name), tag) if tag else None
    keys = ("model", "build", "input", "classes", "data", "metrics", "seed", "commit", "licence")
    card = {"model": str(given), **{key: entry[key] for key in keys if key in (entry or {})}}
    source = published.source_of(str(given))
    constants = published.preprocessing(source, name) if source else registry.PREPROCESSING
    return _of_model(registry.build(str(given)), {"input": constants, **card}, examples, photographs)


def _is_path(given: str) -> bool:
    return bool(re.search(r"[/\\]", given)) or given in (".", "..")


def _of_run(folder: pathlib.Path, examples: int) -> Source:
    options, metrics = engine.read_options(folder), engine.read_metrics(folder)
    recipe = recipes.Recipe.model_validate(options["recipe"])
    images, constants = data.load(recipe.data, recipe.seed), options["images"]
    x, calibration = (
        data.Batches(data.subset(split, min(examples, len(split))), examples, constants["mean"], constants["std"])[0][0]
        for split in (images.test, images.train)
    )
    card = {
        "model": options["model"],
        "build": options["build"],
        "input": {"shape": [None, *x.shape[1:]], "mean": constants["mean"], "std": constants["std"], "of": "x / 255"},
        "classes": list(images.classes),
        "data": images.name,
        "metrics": {k: metrics.get(k) for k in ("test_accuracy", "epochs")},
        "fingerprint": options["fingerprint"],
        "seed": recipe.seed,
        "versions": options["versions"],
        "commit": options["commit"],
        "licence": LICENCE,
    }
    return Source(engine.load_run(folder), x, calibration, card)


def _of_model(model: keras.Model, card: dict, examples: int, photographs: bool) -> Source:
    """A model with photographs, or with no images at all where others are given."""
    shape = model.input_shape[1:]
    if isinstance(model.input_shape, list) or len(shape) != 3:
        raise ValueError(f"Expected a model of one batch of images. Received: inputs of shape {model.input_shape}")
    size, photographed = tuple(side or 224 for side in shape[:2]), shape[-1] in (1, 3)
    if photographs and not photographed:
        raise ValueError(f"Expected images= beside a model of {shape[-1]} channels: photographs have 1 or 3")
    x = _photographs(size, shape[-1], min(examples, 64)) if photographs else np.zeros((0, *size, shape[-1]))
    constants = card.get("input", registry.PREPROCESSING if photographed else {"mean": [0.0], "std": [1.0]})
    mean, std = (np.asarray(constants[key]) for key in ("mean", "std"))
    if shape[-1] == 1:  # grey images, and perhaps the constants of colours
        mean, std = mean.mean(keepdims=True), std.mean(keepdims=True)
    if len(mean) not in (1, shape[-1]):
        raise ValueError(f"Expected mean and std of {shape[-1]} channels. Received: {len(mean)}")
    x = (x - mean) / std
    if "input" in card:
        known = {"mean": mean.tolist(), "std": std.tolist(), "shape": [None, *shape], "of": "x / 255"}
        card = {**card, "input": {**card["input"], **known}}
    x = x.astype("float32")
    return Source(model, x, x, card)


def _photographs(size: tuple[int, int], channels: int, n: int) -> np.ndarray:
    """Parts of scikit-learn's two photographs, in [0, 1]."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photos, rng, found = load_sample_images().images, np.random.default_rng(0), []
    for number in range(n):
        photo = photos[number % len(photos)]
        side = int(rng.integers(100, min(photo.shape[:2])))
        top, left = (int(rng.integers(0, total - side)) for total in photo.shape[:2])
        part = Image.fromarray(photo[top : top + side, left : left + side])
        found.append(np.asarray(part.resize(size[::-1], Image.Resampling.BILINEAR)) / 255)
    x = np.stack(found)
    return x if channels == 3 else x.mean(axis=-1, keepdims=True)


def with_preprocessing(source: Source) -> Source:
    """Let the model take what a decoder gives: pixels in [0, 255].

    Raises:
        ValueError: if the constants are not known.
    """
    known = source.card.get("input")
    if known is None:
        raise ValueError(
            "Expected a run or a model of the zoo for preprocess=True, whose mean and deviation are known. Received: "
            f"the model {source.model.name}; give its mean= and std= (of x / 255)"
        )
    mean, std = np.asarray(known["mean"]), np.asarray(known["std"])
    raw = keras.Input(source.model.input_shape[1:], name="pixels")
    x = layers.Rescaling((1 / (255 * std)).tolist(), (-mean / std).tolist(), name="preprocess")(raw)
    model = keras.Model(raw, source.model(x), name=source.model.name)
    card = {**source.card, "input": {**known, "of": "x", "range": [0, 255], "preprocess": "part of the model"}}
    images, calibration = ((x * std + mean).astype("float32") * 255 for x in (source.images, source.calibration))
    return replace(source, model=model, images=images, calibration=calibration, card=card)
