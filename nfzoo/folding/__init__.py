"""Fold what is constant at inference into kernels and biases: a plain Keras model that computes the same."""

import math
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from nfzoo.folding.emit import emit, inputs_of
from nfzoo.folding.graph import LINEAR, Graph, Node, read
from nfzoo.folding.rules import simplify
from nfzoo.layers import CompensatePadding, StandardizeInput

__all__ = ["FoldReport", "fold"]

TOLERANCE = 1e-2  # far above rounding in float32, far below what a layer read wrongly does
HALF_TOLERANCE = 0.3  # the same in half precision, whose rounding adds up over the layers

_UNFOLDED = {
    StandardizeInput: "standardizes by what comes in",
    CompensatePadding: "has another factor at each position of the border",
}


@dataclass(frozen=True)
class FoldReport:
    """What a fold did.

    Attributes:
        gone: names of layers that are no more: folded, or nothing at inference.
        kept: names of factors, shifts and statistics that no kernel could take, with the reason.
        difference: largest difference of the outputs on random inputs, relative to the largest output; NaN where the
            outputs do not depend on the inputs and so show nothing (a classifier that starts at zero).
    """

    gone: tuple[str, ...]
    kept: dict[str, str]
    difference: float


def fold(model: keras.Model, portable: bool = True) -> keras.Model:
    """Fold weight standardization, gains, normalization and residual scales into kernels and biases.

    Dropout, stochastic depth and taps go. Layers keep the names they had. `model.fold_report` of the result, a
    `FoldReport`, tells what was done.

    Args:
        model: a functional or sequential model of nfzoo's and Keras' layers.
        portable: use Keras' own layers alone, so that the result loads where nfzoo is not installed. Else grouped
            convolutions stay nfzoo's, which in inference on a TensorFlow CPU are some three times as fast as Keras'.

    Returns:
        A `keras.Model` in float32 of the same outputs in inference, up to rounding. To fold it again changes nothing.

    Raises:
        ValueError: for a model that is no graph of layers, or that computes something else when folded.

    Example:
        >>> import nfzoo
        >>> plain = nfzoo.fold(nfzoo.build("nf_test_resnet"))
        >>> plain.fold_report.difference < 1e-4, type(plain.get_layer("stem_conv1")).__name__
        (True, 'Conv2D')
    """
    graph, structure = graph_of(model)
    kept = {node.name: _reason(graph, node) for node in graph if node.kind == "affine" or type(node.layer) in _UNFOLDED}
    plain = emit(graph, model, structure, portable)
    left = {layer.name for layer in plain.layers}
    gone = tuple(layer.name for layer in model.layers if layer.name not in left)
    difference = _difference(model, plain)
    single = all(layer.compute_dtype == "float32" for layer in model._flatten_layers(include_self=False))
    if difference is not None and not difference <= (TOLERANCE if single else HALF_TOLERANCE):  # nor NaN
        raise ValueError(
            f"Expected a model that computes the same when folded. Received: {model.name}, whose outputs change by "
            f"{difference:.1g} relative; nfzoo reads one of its layers wrongly: please report it"
        )
    plain.fold_report = FoldReport(gone, kept, math.nan if difference is None else difference)
    return plain


def graph_of(model: keras.Model, fold: bool = True) -> tuple[Graph, Any]:
    """The graph of a model, and its outputs in their structure, e.g. a dict.

    Args:
        fold: move constants into kernels. Without it they stay nodes; standardized kernels are plain ones either way.
    """
    outputs = read(model)
    graph = Graph(keras.tree.flatten(outputs))
    if fold:
        simplify(graph)
    return graph, outputs


def _reason(graph: Graph, node: Node) -> str:
    before = node.inputs[0]
    if type(node.layer) in _UNFOLDED:
        return _UNFOLDED[type(node.layer)]
    if before.kind == "input":
        return "preprocesses"
    if np.any(node.shift != 0) and any(user is not None and user.kind in LINEAR for user in graph.users[node]):
        return f"shifts {before.name} before zeros are padded"
    if len(graph.users[before]) > 1:
        return f"{before.name} has other users"
    return f"stands between {before.name} and what is not linear"


def _difference(model: keras.Model, plain: keras.Model) -> float | None:
    """Relative; None where the outputs do not depend on the inputs."""
    rng = np.random.default_rng(0)

    def drawn(tensor) -> np.ndarray:
        return rng.standard_normal([2, *(side or 64 for side in tensor.shape[1:])]).astype("float32")

    x = keras.tree.map_structure(drawn, inputs_of(model))
    first, second = (
        [np.asarray(keras.ops.convert_to_numpy(y), "float32") for y in keras.tree.flatten(net(x))]
        for net in (model, plain)
    )
    if all(np.isfinite(y).all() and not np.ptp(y, axis=0).any() for y in first):
        return None
    return max(float(abs(a - b).max() / max(abs(a).max(), 1e-30)) for a, b in zip(first, second, strict=True))
