"""One writer per format; what a format cannot express is named."""

import importlib.util
import pathlib
import re
from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np

from nfzoo import weights
from nfzoo.export import onnx_file
from nfzoo.folding import fold as folded
from nfzoo.folding import graph_of


@dataclass(frozen=True)
class Format:
    """A kind of artefact.

    Attributes:
        write: (model, path, whether to fold it, calibration images or None) → None.
        suffix: of its path; "" is a folder.
        packages: that writing and reloading need.
    """

    write: Callable[[keras.Model, pathlib.Path, bool, np.ndarray | None], None]
    suffix: str
    packages: tuple[str, ...] = ()


def _saved_model(model: keras.Model, path: pathlib.Path, fold: bool, calibration: None) -> None:
    model = folded(model, portable=False) if fold else model
    model.export(path, format="tf_saved_model", verbose=False)


def _litert(model: keras.Model, path: pathlib.Path, fold: bool, calibration: np.ndarray | None) -> None:
    import tensorflow as tf

    model = folded(model, portable=False) if fold else model
    options = {"target_spec": {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]}}  # all that its runtime has
    if calibration is not None:
        model = _with_bounded_selu(model)
        options["optimizations"] = [tf.lite.Optimize.DEFAULT]
        options["representative_dataset"] = lambda: ([x[None]] for x in calibration)
    model.export(path, format="litert", verbose=False, **options)


def _with_bounded_selu(model: keras.Model) -> keras.Model:
    """Write SELU as scale · relu(x) + scale · alpha · (exp(-relu(-x)) - 1).

    LiteRT takes the exponential of every x, positive ones too, and throws most of it away; eight bits for a range up to
    exp(max x) leave none for the rest: EfficientNet-B0 on CIFAR-100 falls to chance.
    """

    def bounded(layer: keras.Layer) -> keras.Layer:
        if not isinstance(layer, keras.layers.Activation) or layer.activation is not keras.activations.selu:
            return layer.__class__.from_config(layer.get_config())
        x = keras.Input(layer.output.shape[1:], name=f"{layer.name}_input")
        negative = keras.ops.exp(-keras.ops.relu(-x)) - 1.0
        y = _SELU_SCALE * keras.ops.relu(x) + _SELU_SCALE * _SELU_ALPHA * negative
        return keras.Model(x, y, name=layer.name)

    twin = keras.models.clone_model(model, clone_function=bounded)
    twin.set_weights(model.get_weights())
    return twin


_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805  # Klambauer et al. 2017, equation 14


def _onnx(model: keras.Model, path: pathlib.Path, fold: bool, calibration: None) -> None:
    graph, _ = graph_of(model, fold)
    if unknown := onnx_file.unknown(graph):
        raise ValueError(lacking("onnx", unknown))
    onnx_file.write(graph, model, path)


def _keras(model: keras.Model, path: pathlib.Path, fold: bool, calibration: None) -> None:
    (folded(model) if fold else model).save(path)


def _weights(model: keras.Model, path: pathlib.Path, fold: bool, calibration: None) -> None:
    weights.save(model, path)


FORMATS = {
    "saved_model": Format(_saved_model, "", ("tensorflow",)),
    "litert": Format(_litert, ".tflite", ("tensorflow", "ai_edge_litert")),
    "onnx": Format(_onnx, ".onnx", ("onnx", "onnxruntime")),
    "keras": Format(_keras, ".keras"),
    "weights": Format(_weights, ".safetensors"),
}


# Endings of files that we do not write. Any other is part of a folder's name ("sn_b0.v2").
OTHERS = (".pt", ".pth", ".h5", ".hdf5", ".pb", ".bin", ".npz", ".zip", ".mlmodel", ".engine", ".pkl", ".ckpt", ".lite")


def format_of(path: pathlib.Path, name: str | None) -> str:
    """The format of a name, or of the ending of a path.

    Raises:
        ValueError: an unknown one, or an ending of another one.
        ImportError: packages that it needs are absent.
    """
    by_suffix = {one.suffix: key for key, one in FORMATS.items()}
    if name is None and path.suffix.lower() in OTHERS:
        raise ValueError(f"Expected {', '.join(filter(None, by_suffix))}, or a folder. Received: {path.name}")
    name = by_suffix.get(path.suffix, "saved_model") if name is None else name
    if name not in FORMATS:
        raise ValueError(f"Expected a format among {', '.join(FORMATS)}. Received: {name!r}")
    if (suffix := FORMATS[name].suffix) and path.suffix != suffix:
        raise ValueError(f"Expected a path that ends with {suffix} for {name}. Received: {path.name}")
    absent = [package for package in FORMATS[name].packages if importlib.util.find_spec(package) is None]
    if absent:
        raise ImportError(
            f"Expected what {name} is written and reloaded with. Received: no {', '.join(absent)}; "
            "pip install '.[export]' in a checkout"
        )
    if name == "litert" and keras.backend.backend() != "tensorflow":
        raise ValueError(f"Expected KERAS_BACKEND=tensorflow to write litert. Received: {keras.backend.backend()}")
    return name


def write(name: str, model: keras.Model, path: pathlib.Path, fold: bool, calibration: np.ndarray | None = None) -> None:
    """Write a model in a format.

    Raises:
        ValueError: operators that the format lacks, by name.
    """
    try:
        FORMATS[name].write(model, path, fold, calibration)
    except Exception as error:
        if found := operators(str(error)):
            raise ValueError(lacking(name, found)) from error
        raise


def lacking(name: str, found: list[str]) -> str:
    return f"Expected operators that {name} has. Received: a model with {', '.join(found)}"


def operators(message: str) -> list[str]:
    """Operators that a converter or a runtime says it does not know."""
    return sorted({*re.findall(r"'tf\.(\w+)' op is neither", message), *re.findall(r"\"tf\.(\w+)\"", message)})
