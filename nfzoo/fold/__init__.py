"""Fold what is constant at inference into kernels and biases: a plain Keras model that computes the same."""

from dataclasses import dataclass

import keras
import numpy as np

from nfzoo.fold.emit import emit
from nfzoo.fold.graph import LINEAR, read, walk
from nfzoo.fold.rules import simplify


@dataclass(frozen=True)
class Report:
    """What a fold did.

    Attributes:
        gone: names of layers that are no more: folded, or nothing at inference.
        kept: names of factors that no kernel could take, with the reason.
        difference: largest difference of the outputs on random inputs, relative to the largest output.
    """

    gone: tuple[str, ...]
    kept: dict[str, str]
    difference: float


def fold(model: keras.Model) -> keras.Model:
    """Fold weight standardization, gains, normalization and residual scales into kernels and biases.

    Dropout, stochastic depth and taps go. Layers keep the names they had; the result consists of Keras' own layers and
    loads where nfzoo is not installed. `model.fold_report` of the result tells what was done.

    Args:
        model: a functional or sequential model of nfzoo's and Keras' layers.

    Returns:
        A `keras.Model` of the same outputs in inference, up to rounding. To fold it again changes nothing.

    Raises:
        ValueError: for a model that is no graph of layers.

    Example:
        >>> import nfzoo
        >>> model = nfzoo.build("nf_test_resnet")
        >>> plain = fold(model)
        >>> plain.fold_report.difference < 1e-4, type(plain.get_layer("stem_conv1")).__name__
        (True, 'Conv2D')
    """
    outputs = read(model)
    nodes = simplify(keras.tree.flatten(outputs))
    plain = emit(nodes, outputs, model.name)
    left = {layer.name for layer in plain.layers}
    kept = {node.name: _reason(node) for node in walk(nodes) if node.kind == "affine"}
    gone = tuple(layer.name for layer in model.layers if layer.name not in left)
    plain.fold_report = Report(gone, kept, _difference(model, plain))
    return plain


def _reason(node) -> str:
    before = node.inputs[0]
    if before.kind in LINEAR:
        return f"{before.name} has other users"
    if before.kind == "add":
        return "scales the stream, which has other users"
    return f"stands between {before.name} and what is no convolution" if before.kind != "input" else "preprocesses"


def _difference(model: keras.Model, plain: keras.Model) -> float:
    shapes = [[2, *(side or 64 for side in tensor.shape[1:])] for tensor in model.inputs]
    x = [np.random.default_rng(0).standard_normal(shape).astype("float32") for shape in shapes]
    results = ([np.asarray(keras.ops.convert_to_numpy(y)) for y in keras.tree.flatten(net(x[0] if len(x) == 1 else x))]
               for net in (model, plain))  # fmt: skip
    return max(float(abs(a - b).max() / max(abs(a).max(), 1e-30)) for a, b in zip(*results, strict=True))
