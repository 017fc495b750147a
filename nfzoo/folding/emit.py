"""A graph as a plain Keras model, which loads where nfzoo is not installed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import keras
import numpy as np
from keras import layers, ops

from nfzoo.folding.graph import Graph, Node
from nfzoo.layers import CompensatePadding, Conv2D, MaxPool2D, PadChannels, StandardizeInput


def emit(graph: Graph, model: keras.Model, structure, portable: bool) -> keras.Model:
    """Build the model in float32; layers have the names of those they came from.

    Args:
        model: what the graph was read from; the result has its name and the structure of its inputs.
        structure: in which the outputs come, e.g. a dict.
        portable: whether nothing but Keras' own layers may be used.
    """
    tensors, taken = {}, set()
    with _float32():
        for node in graph:
            own, number = node.name, 2
            while node.name in taken:
                node.name, number = f"{own}_{number}", number + 1
            taken.add(node.name)
            sources = [tensors[source] for source in node.inputs]
            if node.kind == "layer":
                tensors[node] = _kept(node, tensors)
            elif node.kind == "conv" and node.layer.groups > 1 and not portable:
                tensors[node] = _conv(node, sources, Conv2D)
            else:
                tensors[node] = _EMIT[node.kind](node, sources)
        twins = {id(node.call[1]["tensor"]): tensor for node, tensor in tensors.items() if node.kind == "input"}
        inputs = keras.tree.map_structure(lambda tensor: twins[id(tensor)], inputs_of(model))
        outputs = keras.tree.pack_sequence_as(structure, [tensors[node] for node in graph.outputs])
        return keras.Model(inputs, outputs, name=model.name)


def inputs_of(model: keras.Model):
    """The symbolic inputs in their structure, e.g. a dict."""
    return model.inputs[0] if isinstance(model, keras.Sequential) else model.input


@contextmanager
def _float32() -> Iterator[None]:
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float32")
    try:
        yield
    finally:
        keras.config.set_dtype_policy(policy)


def _input(node: Node, _) -> keras.KerasTensor:
    tensor = node.call[1]["tensor"]
    dtype = "float32" if keras.backend.is_float_dtype(tensor.dtype) else tensor.dtype
    return keras.Input(tensor.shape[1:], dtype=dtype, name=node.name)


def _filled(layer: keras.Layer, node: Node, x):
    y = layer(x)
    bias = [] if node.bias is None else [np.broadcast_to(node.bias, layer.bias.shape)]
    layer.set_weights([weight.astype("float32") for weight in (node.kernel, *bias)])
    return y


def _conv(node: Node, inputs, kind=layers.Conv2D):
    old = node.layer
    layer = kind(
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
    if node.activation == "gelu_tanh":
        return _named(node.name, lambda x: ops.gelu(x, approximate=True), inputs[0])
    if node.activation == "leaky_relu_001":
        return layers.LeakyReLU(0.01, name=node.name)(inputs[0])
    return layers.Activation(node.function, name=node.name)(inputs[0])


def _factor(node: Node, inputs):
    s = layers.Activation("sigmoid", name=f"{node.name}_sigmoid")(inputs[0])
    if node.layer.magnitude_preserving:
        s = _named(f"{node.name}_root", ops.sqrt, s)
    return layers.Reshape((1, 1, s.shape[-1]), name=node.name)(s)


def _named(name: str, function: Callable, x):
    """A function of Keras' operations under a name of ours: operations number themselves."""
    inner = keras.Input(x.shape[1:], dtype=x.dtype, name=f"{name}_input")
    return keras.Model(inner, function(inner), name=name)(x)


def _kept(node: Node, tensors: dict):
    layer, (arguments, options) = node.layer, node.call
    if isinstance(layer, CompensatePadding):
        return layers.Rescaling(layer.factors().tolist(), name=node.name)(tensors[node.inputs[0]])
    for kind, function in _CUSTOM.items():
        if isinstance(layer, kind):
            return _named(
                node.name, lambda x, layer=layer, function=function: function(layer, x), tensors[node.inputs[0]]
            )
    # The sources may be others by now, in the same order.
    given = iter(tensors[source] for source in node.inputs)
    arguments, options = keras.tree.map_structure(
        lambda x: next(given) if isinstance(x, Node) else x, (arguments, options)
    )
    policy = {"dtype": "float32"} if isinstance(layer, keras.Layer) else {}
    if isinstance(layer, layers.Lambda):  # whose function is here: it need not go through a configuration
        twin = layers.Lambda(layer.function, arguments=layer.arguments, **policy)
    else:
        twin = type(layer).from_config({**layer.get_config(), **policy})
    twin.name = node.name  # that of a layer which is called twice is taken
    y = twin(*arguments, **options)
    if isinstance(layer, keras.Layer):
        twin.set_weights(layer.get_weights())
    return y


def _max_pool(layer, x):
    sides = [(0, 0), (layer.pad, layer.pad), (layer.pad, layer.pad), (0, 0)]
    # A mirrored pixel never wins over its original, which lies in the same window; eight bits know no infinity.
    mirrors = 2 * layer.pad < min(layer.pool_size)
    x = ops.pad(x, sides, "symmetric") if mirrors else ops.pad(x, sides, constant_values=float("-inf"))
    return layers.MaxPooling2D(layer.pool_size, layer.strides)(x)


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
    "factor": _factor,
}  # fmt: skip
