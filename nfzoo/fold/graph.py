"""A network as a graph of few kinds of nodes, in which constants can be moved about."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import keras
import numpy as np
from keras import layers

from nfzoo.layers import Affine, CenteringBias, Gate, Merge, ScaledActivation, StochasticDepth, Tap

LINEAR = ("conv", "depthwise", "dense")
DROPPED = (
    Tap, StochasticDepth, layers.Dropout, layers.SpatialDropout2D, layers.AlphaDropout, layers.GaussianDropout,
    layers.GaussianNoise, layers.Identity,
)  # fmt: skip


@dataclass(eq=False)
class Node:
    """One operation.

    Attributes:
        kind: "input", "conv", "depthwise", "dense", "affine" (scale · x + shift), "act", "add", "mul" (a map times the
            factors of its channels), "factor" (the squashed logits of a gate), "layer" (kept as it is).
        name: of the layer that it came from.
        inputs: nodes.
        layer: that layer; options and functions are taken from it.
        kernel, bias: of a linear node, in float64.
        scale, shift: of an affine node: scalars or one number per channel.
        function: of an activation, by name.
    """

    kind: str
    name: str
    inputs: list["Node"]
    layer: keras.Layer | None = None
    kernel: np.ndarray | None = None
    bias: np.ndarray | None = None
    scale: np.ndarray = field(default_factory=lambda: np.array(1.0))
    shift: np.ndarray = field(default_factory=lambda: np.array(0.0))
    function: Callable | str | None = None


def read(model: keras.Model) -> list[Node]:
    """The output nodes of a functional model.

    Raises:
        ValueError: for a model that is no graph of layers.
    """
    if not isinstance(model, keras.src.models.functional.Functional):
        raise ValueError(f"Expected a functional or sequential model. Received: a {type(model).__name__}")
    inputs = [Node("input", tensor._keras_history.operation.name, [], tensor._keras_history.operation)
              for tensor in model.inputs]  # fmt: skip
    outputs = model._run_through_graph(
        keras.tree.pack_sequence_as(model._inputs_struct, inputs), operation_fn=lambda layer: _Reader(layer)
    )
    return outputs


class _Reader:
    """Called with nodes in place of tensors."""

    def __init__(self, layer: keras.Layer):
        self.layer = layer

    def __call__(self, *arguments, **_) -> Node:
        inputs = list(keras.tree.flatten(arguments))
        for kinds, make in _READERS:
            if isinstance(self.layer, kinds):
                return make(self.layer, inputs)
        return Node("layer", self.layer.name, inputs, self.layer)


def array(x) -> np.ndarray:
    """A weight in float64: constants are moved without adding to the rounding."""
    return np.asarray(keras.ops.convert_to_numpy(x), "float64")


def affine(name: str, x: Node, scale=1.0, shift=0.0) -> Node:
    """scale · x + shift."""
    return Node("affine", name, [x], scale=np.asarray(scale, "float64"), shift=np.asarray(shift, "float64"))


def _linear(kind: str) -> Callable:
    def make(layer, inputs) -> Node:
        kernel = layer.effective_kernel() if hasattr(layer, "effective_kernel") else layer.kernel
        bias = array(layer.bias) if layer.bias is not None else None
        node = Node(kind, layer.name, inputs, layer, kernel=array(kernel), bias=bias)
        if layer.activation is keras.activations.linear or layer.activation is None:
            return node
        return Node("act", f"{layer.name}_act", [node], function=layer.activation)

    return make


def _normalization(layer, inputs) -> Node:
    scale = 1 / np.sqrt(array(layer.moving_variance) + layer.epsilon)
    scale = scale * array(layer.gamma) if layer.scale else scale
    shift = -array(layer.moving_mean) * scale
    return affine(layer.name, inputs[0], scale, shift + array(layer.beta) if layer.center else shift)


def _merge(layer, inputs) -> Node:
    gain = 1.0 if layer.gain is None else array(layer.gain)
    scales = (layer.skip_scale, layer.branch_scale * gain)
    names = (f"{layer.name}_skip", f"{layer.name}_branch")
    return Node("add", layer.name, [affine(*given) for given in zip(names, inputs, scales, strict=True)])


def _gate(layer, inputs) -> Node:
    x, logits = inputs
    factor = Node("factor", f"{layer.name}_factor", [logits], layer)
    return affine(f"{layer.name}_gain", Node("mul", layer.name, [x, factor]), layer.gain)


def _centering(layer, inputs) -> Node:
    learning = float(array(layer.count) < layer.calls)
    return affine(layer.name, inputs[0], 1.0, array(layer.bias) * (1 - 0.99 * learning) - array(layer.moving_mean))


def _scaled_activation(layer, inputs) -> Node:
    activation = Node("act", layer.name, inputs, function=layer._function)
    return affine(f"{layer.name}_scale", activation, layer.scale)


_READERS: list[tuple] = [
    (DROPPED, lambda layer, inputs: inputs[0]),
    (layers.DepthwiseConv2D, _linear("depthwise")),
    (layers.Conv2D, _linear("conv")),
    (layers.Dense, _linear("dense")),
    (layers.BatchNormalization, _normalization),
    (layers.Rescaling, lambda layer, inputs: affine(layer.name, inputs[0], layer.scale, layer.offset)),
    (Affine, lambda layer, inputs: affine(
        layer.name, inputs[0], 1.0 if layer.gain is None else array(layer.gain), array(layer.bias))),
    (CenteringBias, _centering),
    (ScaledActivation, _scaled_activation),
    (layers.Activation, lambda layer, inputs: Node("act", layer.name, inputs, function=layer.activation)),
    (Merge, _merge),
    (layers.Add, lambda layer, inputs: Node("add", layer.name, inputs)),
    (Gate, _gate),
]  # fmt: skip


def walk(outputs: list[Node]) -> Iterator[Node]:
    """Every node that the outputs depend on, inputs before their users."""
    seen, order = set(), []
    stack = [(node, False) for node in reversed(outputs)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(source, False) for source in reversed(node.inputs)]
    return iter(order)
