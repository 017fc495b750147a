"""A graph as a plain Keras model, which loads where nfzoo is not installed."""

import keras
import numpy as np
from keras import layers, ops

from nfzoo.fold.graph import Node, walk
from nfzoo.layers import MaxPool2D, PadChannels, StandardizeInput


def emit(nodes: list[Node], structure, name: str) -> keras.Model:
    """Build the model; layers have the names of those they came from.

    Args:
        nodes: the outputs.
        structure: in which the outputs come, e.g. a dict.
    """
    tensors = {}
    for node in walk(nodes):
        tensors[node] = _EMIT[node.kind](node, [tensors[source] for source in node.inputs])
    inputs = [tensors[node] for node in walk(nodes) if node.kind == "input"]
    outputs = keras.tree.pack_sequence_as(structure, [tensors[node] for node in nodes])
    return keras.Model(inputs[0] if len(inputs) == 1 else inputs, outputs, name=name)


def _input(node: Node, _) -> keras.KerasTensor:
    tensor = node.layer.output
    return keras.Input(tensor.shape[1:], dtype=tensor.dtype, name=node.name)


def _filled(layer: keras.Layer, node: Node, x):
    y = layer(x)
    layer.set_weights([node.kernel.astype("float32"), *([] if node.bias is None else [_bias(node, layer)])])
    return y


def _bias(node: Node, layer) -> np.ndarray:
    return np.broadcast_to(node.bias, layer.bias.shape).astype("float32")


def _conv(node: Node, inputs):
    old = node.layer
    layer = layers.Conv2D(
        node.kernel.shape[-1], old.kernel_size, old.strides, old.padding, dilation_rate=old.dilation_rate,
        groups=old.groups, use_bias=node.bias is not None, name=node.name,
    )  # fmt: skip
    return _filled(layer, node, inputs[0])


def _depthwise(node: Node, inputs):
    old = node.layer
    layer = layers.DepthwiseConv2D(
        old.kernel_size, old.strides, old.padding, old.depth_multiplier, dilation_rate=old.dilation_rate,
        use_bias=node.bias is not None, name=node.name,
    )  # fmt: skip
    return _filled(layer, node, inputs[0])


def _dense(node: Node, inputs):
    return _filled(layers.Dense(node.kernel.shape[-1], use_bias=node.bias is not None, name=node.name), node, inputs[0])


def _affine(node: Node, inputs):
    return layers.Rescaling(node.scale.tolist(), node.shift.tolist(), name=node.name)(inputs[0])


def _act(node: Node, inputs):
    if getattr(node.function, "__name__", "") == "gelu_tanh":
        return ops.gelu(inputs[0], approximate=True)
    return layers.Activation(node.function, name=node.name)(inputs[0])


def _factor(node: Node, inputs):
    s = layers.Activation("sigmoid", name=f"{node.name}_sigmoid")(inputs[0])
    if node.layer.magnitude_preserving:
        rest = layers.Rescaling(-1.0, 1.0, name=f"{node.name}_rest")(s)
        squares = [layers.Multiply(name=f"{node.name}_{n}")([x, x]) for n, x in (("s2", s), ("rest2", rest))]
        # At least one half: the guard of the layer, at 1e-5, never acts.
        norm = layers.Add(name=f"{node.name}_norm2")(squares)
        s = layers.Multiply(name=f"{node.name}_ratio")([s, ops.rsqrt(norm)])
    return layers.Reshape((1, 1, inputs[0].shape[-1]), name=node.name)(s)


def _kept(node: Node, inputs):
    layer = node.layer
    for kind, make in _CUSTOM.items():
        if isinstance(layer, kind):
            return make(layer, inputs[0])
    twin = type(layer).from_config(layer.get_config())
    y = twin(inputs[0] if len(inputs) == 1 else inputs)
    twin.set_weights(layer.get_weights())
    return y


def _max_pool(layer, x):
    sides = [(0, 0), (layer.pad, layer.pad), (layer.pad, layer.pad), (0, 0)]
    x = ops.pad(x, sides, constant_values=float("-inf"))
    return layers.MaxPooling2D(layer.pool_size, layer.strides, name=layer.name)(x)


def _pad_channels(layer, x):
    return ops.pad(x, [(0, 0), (0, 0), (0, 0), (0, layer.channels - x.shape[-1])])


def _standardize(layer, x):
    """The input of EUN's convolutions is standardized by what comes in: nothing of it is constant."""
    if layer.statistics == "channel_l2":
        squares = ops.sum(ops.square(x), axis=-1, keepdims=True)
        return ops.multiply(x, ops.rsqrt(ops.maximum(squares, 1e-24)))
    axes = None if layer.statistics == "whole_tensor" else (0, 1, 2)
    centred = ops.subtract(x, ops.mean(x, axis=axes, keepdims=True))
    variance = ops.mean(ops.square(centred), axis=axes, keepdims=True)
    return ops.multiply(centred, ops.rsqrt(ops.add(variance, layer.epsilon)))


_CUSTOM = {MaxPool2D: _max_pool, PadChannels: _pad_channels, StandardizeInput: _standardize}
_EMIT = {
    "input": _input, "conv": _conv, "depthwise": _depthwise, "dense": _dense, "affine": _affine, "act": _act,
    "add": lambda node, inputs: layers.Add(name=node.name)(inputs),
    "mul": lambda node, inputs: layers.Multiply(name=node.name)(inputs),
    "factor": _factor, "layer": _kept,
}  # fmt: skip
