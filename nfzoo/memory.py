"""What a training step keeps between the forward and the backward pass, counted from the graph of a model."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import keras
from keras import layers

from nfzoo.layers import (
    Affine,
    CenteringBias,
    CompensatePadding,
    Gate,
    MaxPool2D,
    Merge,
    PadChannels,
    ScaledActivation,
    StandardizeInput,
    StochasticDepth,
    Tap,
)

# What the gradient of a layer reads again: its inputs, its output, both, or nothing (a sum, a mean, a constant factor).
# Activations whose derivative follows from their value keep that; the others keep what they were given.
_NOTHING = (
    layers.Add, layers.AveragePooling2D, layers.GlobalAveragePooling2D, layers.ZeroPadding2D, layers.Flatten,
    layers.Reshape, layers.Rescaling, layers.InputLayer, CenteringBias, CompensatePadding, PadChannels,
)  # fmt: skip
_INPUTS = (
    layers.Conv1D, layers.Conv2D, layers.DepthwiseConv2D, layers.Dense, layers.BatchNormalization,
    layers.GroupNormalization, layers.LayerNormalization, Gate,
)  # fmt: skip
_BOTH = (layers.MaxPooling2D, MaxPool2D)
_SAME = (Tap, layers.Identity)  # give on what they get
_BY_VALUE = ("relu", "selu", "elu", "sigmoid", "tanh", "softmax")


@dataclass(frozen=True)
class Memory:
    """Of one example, in bytes.

    Attributes:
        kept: activations that the backward pass reads again, each counted once.
        outputs: the outputs of all layers that compute something, which tools that sum over layers count; twice that is
            their "forward/backward size".
        weights: parameters; gradients and each slot of the optimizer take as much again.
    """

    kept: int
    outputs: int
    weights: int


def stored(model: keras.Model, bytes_per_number: int = 4) -> Memory:
    """Count the activations that training keeps, from the layers' shapes, those of nested models too.

    It is the least that a framework without rematerialization keeps: kernels' own scratch memory comes on top, and so
    does what an executor has not freed yet. A layer of a kind that is not known counts with inputs and output.

    A layer or network that is called several times is counted once.

    Args:
        model: a functional model of fixed input size.
        bytes_per_number: 4 for float32, 2 for half precision.

    Raises:
        ValueError: for a model whose input size is not fixed.

    Example:
        >>> import nfzoo
        >>> few, many = (stored(nfzoo.build(f"{v}_test_resnet")).kept for v in ("skipinit", "bn"))
        >>> few < many
        True
    """
    if any(None in tensor.shape[1:] for tensor in model.inputs):
        raise ValueError(f"Expected a model of fixed input size. Received: {[t.shape for t in model.inputs]}")
    source: dict[int, int] = {}  # tensor -> the tensor that it is the same as
    kept: dict[int, int] = {}
    outputs = 0
    for layer in _layers(model, source):
        given, made = keras.tree.flatten(layer.input), keras.tree.flatten(layer.output)
        if isinstance(layer, _SAME) or _is_linear(layer) or _drops_nothing(layer):
            source |= {id(made[0]): source.get(id(given[0]), id(given[0]))}
            continue
        if _hides(layer):
            kept[id(layer)] = _numbers(made[0])
        outputs += 0 if isinstance(layer, layers.InputLayer) else sum(map(_numbers, made))
        for tensor in _read_again(layer, given, made):
            kept[source.get(id(tensor), id(tensor))] = _numbers(tensor)
    numbers = sum(math.prod(v.shape) for v in model.weights)
    return Memory(*(bytes_per_number * n for n in (sum(kept.values()), outputs, numbers)))


def _layers(model: keras.Model, source: dict[int, int]) -> Iterator[keras.Layer]:
    """The layers of a model and of those in it, whose inputs and outputs are entered as the tensors that they are."""
    for layer in model.layers:
        if not isinstance(layer, keras.Model):
            yield layer
            continue
        call = layer._inbound_nodes[0]
        inside, outside = map(keras.tree.flatten, (layer.inputs, call.input_tensors))
        source |= {id(a): source.get(id(b), id(b)) for a, b in zip(inside, outside, strict=True)}
        yield from _layers(layer, source)
        inside, outside = map(keras.tree.flatten, (layer.outputs, call.output_tensors))
        source |= {id(b): source.get(id(a), id(a)) for a, b in zip(inside, outside, strict=True)}


def _read_again(layer: keras.Layer, given: list, made: list) -> list:
    """Tensors that the gradient of a layer needs."""
    if isinstance(layer, layers.Activation | ScaledActivation):
        return [] if _hides(layer) else made if _by_value(layer) else given
    if isinstance(layer, StandardizeInput):
        return [] if _hides(layer) else given
    if isinstance(layer, Merge):
        return given[1:] if layer.gain is not None else []  # the gradient of the gain
    if isinstance(layer, Affine):
        return given if layer.gain is not None else []
    if isinstance(layer, layers.Dropout | StochasticDepth):
        return [made[0]] if isinstance(layer, layers.Dropout) else []  # a mask of the size of the map; one of examples
    if isinstance(layer, _BOTH):
        return [*given, *made]
    if isinstance(layer, _INPUTS):
        return [*given, *made] if _activated(layer) and _by_value(layer) else given
    return [] if isinstance(layer, _NOTHING) else [*given, *made]


def _hides(layer: keras.Layer) -> bool:
    """Whether what is kept is a tensor within the layer: before a factor or an activation, or less its mean."""
    if isinstance(layer, StandardizeInput):
        return layer.statistics != "channel_l2"
    if isinstance(layer, _INPUTS):
        return _activated(layer) and not _by_value(layer)
    return isinstance(layer, ScaledActivation) and _by_value(layer)


def _activated(layer: keras.Layer) -> bool:
    """Whether a layer with weights applies an activation as well."""
    return getattr(layer, "activation", None) not in (None, keras.activations.linear)


def _by_value(layer: keras.Layer) -> bool:
    name = layer.activation if isinstance(layer.activation, str) else layer.activation.__name__
    return name in _BY_VALUE


def _is_linear(layer: keras.Layer) -> bool:
    return isinstance(layer, layers.Activation) and layer.activation is keras.activations.linear


def _drops_nothing(layer: keras.Layer) -> bool:
    return isinstance(layer, layers.Dropout | StochasticDepth) and layer.rate == 0


def _numbers(tensor) -> int:
    return math.prod(tensor.shape[1:])
