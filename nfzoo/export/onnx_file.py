"""A network as an ONNX file, written from the graph that folding works on.

Keras' own way leads through a frozen TensorFlow graph, whose converter takes more memory than a machine has for a large
NFNet and does not know TensorFlow's GELU. The graph of `nfzoo.folding` has ten kinds of nodes, and needs no TensorFlow.

Within the file maps are (batch, channels, height, width), as convolutions want them; its inputs and outputs are Keras'.
"""

import itertools
import pathlib
from collections.abc import Callable

import keras
import numpy as np
from keras import layers

from nfzoo.folding.graph import Graph, Node
from nfzoo.layers import CompensatePadding, MaxPool2D, PadChannels, StandardizeInput

OPSET, IR = 21, 10  # the first with GroupNormalization of a scale per channel; Gelu came in 20
_LARGEST = 2**31  # bytes of a protocol buffer
_CHANNELS_FIRST, _CHANNELS_LAST = (0, 3, 1, 2), (0, 2, 3, 1)


def unknown(graph: Graph) -> list[str]:
    """Layers and activations of a graph that `write` does not know."""
    return sorted({_called(node) for node in graph if _writer(node) is None})


def write(graph: Graph, model: keras.Model, path: pathlib.Path) -> None:
    """Write a graph to a file, of which nothing is `unknown`.

    Args:
        model: what the graph was read from: the order and the names of inputs and outputs are its own.

    Raises:
        ValueError: more weights than a file can hold.
    """
    import onnx

    names = getattr(model, "output_names", None) or [model.layers[-1].name]  # of a sequential model
    file, values = _File(names), {}
    for node in graph:
        values[node] = _writer(node)(file, node, *(values[source] for source in node.inputs))
    for node, name in zip(graph.outputs, names, strict=True):
        file.nodes.append(onnx.helper.make_node("Identity", [file.channels_last(values[node])], [name]))
    if (size := sum(tensor.ByteSize() for tensor in file.constants)) >= _LARGEST:
        raise ValueError(f"Expected at most 2 GB of weights in an ONNX file. Received: {size / 1e9:.1f} GB")
    given = {id(node.call[1]["tensor"]): node.name for node in graph if node.kind == "input"}
    ends = (
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", *x.shape[1:]]) for name, x in pairs]
        for pairs in (
            [(given[id(tensor)], tensor) for tensor in model.inputs], zip(names, model.outputs, strict=True),
        )
    )  # fmt: skip
    made = onnx.helper.make_graph(file.nodes, model.name, *ends, file.constants)
    opset = onnx.helper.make_opsetid("", OPSET)
    onnx.save(onnx.helper.make_model(made, opset_imports=[opset], ir_version=IR, producer_name="nfzoo"), path)


class _File:
    """Nodes and constants so far; a value is a name, whose rank is known. The outputs' names are not for others."""

    def __init__(self, outputs: list[str]):
        self.nodes, self.constants = [], []
        self.ranks = dict.fromkeys(outputs, 0)

    def _free(self, name: str) -> str:
        numbered = (f"{name}_{number}" for number in itertools.count(2))
        return next(free for free in itertools.chain([name], numbered) if free not in self.ranks)

    def add(self, kind: str, inputs: list[str], name: str, rank: int | None = None, **attributes) -> str:
        """A node and its one output, called after the layer; of the rank of its first input, unless told."""
        from onnx import helper

        name = self._free(name)
        self.ranks[name] = self.ranks[inputs[0]] if rank is None else rank
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, value, dtype: str = "float32") -> str:
        from onnx import numpy_helper

        name = self._free(name)
        value = np.ascontiguousarray(np.asarray(value, dtype))
        self.ranks[name] = value.ndim
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def by_channel(self, name: str, value: np.ndarray, x: str) -> str:
        """A constant per channel (or one for all) that meets a value of the file."""
        maps = self.ranks[x] == 4 and np.ndim(value)
        return self.constant(name, np.reshape(value, (-1, 1, 1)) if maps else value)

    def transposed(self, x: str, order: tuple[int, ...]) -> str:
        return self.add("Transpose", [x], f"{x}_transposed", perm=order)

    def channels_last(self, x: str) -> str:
        return self.transposed(x, _CHANNELS_LAST) if self.ranks[x] == 4 else x

    def channels_first(self, x: str) -> str:
        return self.transposed(x, _CHANNELS_FIRST) if self.ranks[x] == 4 else x


def _input(file: _File, node: Node) -> str:
    file.ranks[node.name] = len(node.call[1]["tensor"].shape)
    return file.channels_first(node.name)


def _window(layer, size: tuple[int, ...]) -> dict:
    """Window, strides and padding as attributes."""
    window = {"kernel_shape": size, "strides": layer.strides}
    dilation = getattr(layer, "dilation_rate", (1, 1))
    if max(dilation) > 1 and max(layer.strides) > 1:
        raise ValueError(f"Expected strides or dilation. Received: {layer.name}, which has both; write a SavedModel")
    if layer.padding == "same" and max(dilation) > 1:  # ONNX Runtime has no automatic padding here; strides are 1
        total = [rate * (side - 1) for rate, side in zip(dilation, size, strict=True)]
        return {**window, "pads": [*(n // 2 for n in total), *(n - n // 2 for n in total)]}
    return {**window, "auto_pad": {"valid": "VALID", "same": "SAME_UPPER"}[layer.padding]}


def _conv(file: _File, node: Node, x: str) -> str:
    layer, kernel = node.layer, node.kernel
    groups = kernel.shape[2] if node.kind == "depthwise" else layer.groups
    if node.kind == "depthwise":  # (height, width, channels, multiplier)
        kernel = kernel.reshape(*kernel.shape[:2], 1, -1)
    inputs = [x, file.constant(f"{node.name}/kernel", kernel.transpose(3, 2, 0, 1))]
    if node.bias is not None:
        inputs.append(file.constant(f"{node.name}/bias", np.broadcast_to(node.bias.ravel(), kernel.shape[-1:])))
    window = _window(layer, layer.kernel_size)
    return file.add("Conv", inputs, node.name, group=groups, dilations=layer.dilation_rate, **window)


def _dense(file: _File, node: Node, x: str) -> str:
    y = file.add("MatMul", [file.channels_last(x), file.constant(f"{node.name}/kernel", node.kernel)], node.name)
    if node.bias is not None:
        bias = np.broadcast_to(node.bias, node.kernel.shape[-1:])
        y = file.add("Add", [y, file.constant(f"{node.name}/bias", bias)], f"{node.name}_biased")
    return file.channels_first(y)


def _affine(file: _File, node: Node, x: str) -> str:
    if np.any(node.scale != 1):
        x = file.add("Mul", [x, file.by_channel(f"{node.name}/scale", node.scale, x)], node.name)
    if np.any(node.shift != 0):
        x = file.add("Add", [x, file.by_channel(f"{node.name}/shift", node.shift, x)], f"{node.name}_shifted")
    return x


def _act(file: _File, node: Node, x: str) -> str:
    return _ACTIVATIONS[node.activation](file, node.name, x)


def _factor(file: _File, node: Node, x: str) -> str:
    s = file.add("Sigmoid", [x], f"{node.name}_sigmoid")
    if node.layer.magnitude_preserving:
        s = file.add("Sqrt", [s], f"{node.name}_root")
    return file.add("Unsqueeze", [s, file.constant(f"{node.name}/axes", [2, 3], "int64")], node.name, rank=4)


def _folded(kind: str) -> Callable:
    """Of several inputs, two at a time."""

    def emit(file: _File, node: Node, x: str, *others: str) -> str:
        for other in others:
            x = file.add(kind, [x, other], node.name)
        return x

    return emit


def _layer(file: _File, node: Node, *inputs: str) -> str:
    return _layer_writer(node)(file, node.name, node.layer, *inputs)


def _global_pool(kind: str) -> Callable:
    def emit(file: _File, name: str, layer, x: str) -> str:
        pooled = file.add(kind, [x], name)
        if layer.keepdims:
            return pooled
        return file.add("Squeeze", [pooled, file.constant(f"{name}/axes", [2, 3], "int64")], f"{name}_vector", rank=2)

    return emit


def _pool(kind: str) -> Callable:
    return lambda file, name, layer, x: file.add(kind, [x], name, **_window(layer, layer.pool_size))


def _padded_max_pool(file: _File, name: str, layer: MaxPool2D, x: str) -> str:
    window = {"kernel_shape": layer.pool_size, "strides": layer.strides, "pads": [layer.pad] * 4}
    return file.add("MaxPool", [x], name, **window)


def _pad(before: Callable, after: Callable) -> Callable:
    """Zeros before and after, by axis of (batch, channels, height, width), as functions of the layer."""

    def emit(file: _File, name: str, layer, x: str) -> str:
        sides = file.constant(f"{name}/sides", [*before(layer), *after(layer)], "int64")
        return file.add("Pad", [x, sides], name)

    return emit


def _group_norm(file: _File, name: str, layer: layers.GroupNormalization, x: str) -> str:
    channels = layer.input_spec.axes[-1]
    scale = layer.gamma if layer.scale else np.ones(channels)
    shift = layer.beta if layer.center else np.zeros(channels)
    constants = [file.constant(f"{name}/{key}", value) for key, value in (("scale", scale), ("shift", shift))]
    return file.add("GroupNormalization", [x, *constants], name, num_groups=layer.groups, epsilon=layer.epsilon)


def _standardize(file: _File, name: str, layer: StandardizeInput, x: str) -> str:
    """The layer's own formulas; means over the batch make an artefact depend on it, as the network does."""
    if layer.statistics == "channel_l2":
        norm = file.add("ReduceL2", [x, file.constant(f"{name}/axes", [1], "int64")], f"{name}_norm")
        safe = file.add("Max", [norm, file.constant(f"{name}/least", 1e-12)], f"{name}_safe")
        return file.add("Div", [x, safe], name)
    over = [0, 1, 2, 3] if layer.statistics == "whole_tensor" else [0, 2, 3]
    axes = file.constant(f"{name}/axes", over, "int64")
    centred = file.add("Sub", [x, file.add("ReduceMean", [x, axes], f"{name}_mean")], f"{name}_centred")
    square = file.add("Mul", [centred, centred], f"{name}_square")
    variance = file.add("ReduceMean", [square, axes], f"{name}_variance")
    safe = file.add("Add", [variance, file.constant(f"{name}/epsilon", layer.epsilon)], f"{name}_safe")
    return file.add("Div", [centred, file.add("Sqrt", [safe], f"{name}_deviation")], name)


def _positions(factors: Callable) -> Callable:
    """A map times constants (height, width, channels or 1), plus others."""

    def emit(file: _File, name: str, layer, x: str) -> str:
        for kind, values in factors(layer).items():
            x = file.add(
                kind,
                [x, file.constant(f"{name}/{kind}", np.moveaxis(np.array(values, ndmin=3), -1, 0))],
                f"{name}_{kind}",
            )
        return x

    return emit


def _reshape(file: _File, name: str, layer, x: str) -> str:
    target = layer.target_shape if isinstance(layer, layers.Reshape) else (-1,)
    shape = file.constant(f"{name}/shape", [0, *target], "int64")
    return file.channels_first(file.add("Reshape", [file.channels_last(x), shape], name, rank=1 + len(target)))


def _conv1d(file: _File, name: str, layer: layers.Conv1D, x: str) -> str:
    kernel = keras.ops.convert_to_numpy(layer.kernel).transpose(2, 1, 0)
    inputs = [file.transposed(x, (0, 2, 1)), file.constant(f"{name}/kernel", kernel)]
    if layer.bias is not None:
        inputs.append(file.constant(f"{name}/bias", layer.bias))
    window = _window(layer, layer.kernel_size)
    y = file.add("Conv", inputs, name, group=layer.groups, dilations=layer.dilation_rate, **window)
    return file.transposed(y, (0, 2, 1))


def _concatenate(file: _File, name: str, layer: layers.Concatenate, *inputs: str) -> str:
    axis = layer.axis % file.ranks[inputs[0]]
    return file.add("Concat", list(inputs), name, axis=(0, 2, 3, 1)[axis] if file.ranks[inputs[0]] == 4 else axis)


# The first of its classes that a layer is an instance of.
_LAYERS: list[tuple[type, Callable]] = [
    (layers.GlobalAveragePooling2D, _global_pool("GlobalAveragePool")),
    (layers.GlobalMaxPooling2D, _global_pool("GlobalMaxPool")),
    (MaxPool2D, _padded_max_pool),
    (layers.MaxPooling2D, _pool("MaxPool")),
    (layers.AveragePooling2D, _pool("AveragePool")),
    (layers.ZeroPadding2D, _pad(
        lambda layer: (0, 0, *(side[0] for side in layer.padding)),
        lambda layer: (0, 0, *(side[1] for side in layer.padding)))),
    (PadChannels, _pad(lambda _: (0,) * 4, lambda layer: (0, layer.channels - layer.input.shape[-1], 0, 0))),
    (layers.GroupNormalization, _group_norm),
    (StandardizeInput, _standardize),
    (CompensatePadding, _positions(lambda layer: {"Mul": layer.factors()})),
    (layers.Rescaling, _positions(lambda layer: {"Mul": layer.scale, "Add": layer.offset})),
    (layers.Flatten, _reshape),
    (layers.Reshape, _reshape),
    (layers.Conv1D, _conv1d),
    (layers.Concatenate, _concatenate),
    (layers.Multiply, lambda file, name, layer, *inputs: _folded("Mul")(file, Node("mul", name, []), *inputs)),
]  # fmt: skip


def _simple(kind: str, **attributes) -> Callable:
    return lambda file, name, x: file.add(kind, [x], name, **attributes)


def _silu(file: _File, name: str, x: str) -> str:
    return file.add("Mul", [x, file.add("Sigmoid", [x], f"{name}_sigmoid")], name)


def _log_sigmoid(file: _File, name: str, x: str) -> str:
    return file.add("Neg", [file.add("Softplus", [file.add("Neg", [x], f"{name}_minus")], f"{name}_softplus")], name)


def _relu6(file: _File, name: str, x: str) -> str:
    return file.add("Clip", [x, file.constant(f"{name}/least", 0.0), file.constant(f"{name}/most", 6.0)], name)


def _softmax(file: _File, name: str, x: str) -> str:
    return file.add("Softmax", [x], name, axis=1 if file.ranks[x] == 4 else -1)


_ACTIVATIONS: dict[str, Callable] = {
    "celu": _simple("Celu", alpha=1.0),
    "elu": _simple("Elu", alpha=1.0),
    "gelu": _simple("Gelu"),
    "gelu_tanh": _simple("Gelu", approximate="tanh"),
    "hard_sigmoid": _simple("HardSigmoid", alpha=1 / 6, beta=0.5),
    "hard_silu": _simple("HardSwish"),
    "leaky_relu": _simple("LeakyRelu", alpha=0.2),
    "leaky_relu_001": _simple("LeakyRelu", alpha=0.01),
    "linear": _simple("Identity"),
    "log_sigmoid": _log_sigmoid,
    "relu": _simple("Relu"),
    "relu6": _relu6,
    "selu": _simple("Selu"),
    "sigmoid": _simple("Sigmoid"),
    "silu": _silu,
    "softmax": _softmax,
    "softplus": _simple("Softplus"),
    "softsign": _simple("Softsign"),
    "tanh": _simple("Tanh"),
}

_WRITERS: dict[str, Callable] = {
    "input": _input, "conv": _conv, "depthwise": _conv, "dense": _dense, "affine": _affine, "act": _act,
    "add": _folded("Add"), "mul": _folded("Mul"), "factor": _factor, "layer": _layer,
}  # fmt: skip


def _called(node: Node) -> str:
    return node.activation if node.kind == "act" else type(node.layer).__name__.lstrip("_")


def _layer_writer(node: Node) -> Callable | None:
    return next((writer for kind, writer in _LAYERS if isinstance(node.layer, kind)), None)


def _writer(node: Node) -> Callable | None:
    """What writes a node, or None."""
    known = {"act": node.activation in _ACTIVATIONS, "layer": _layer_writer(node) is not None}
    return _WRITERS[node.kind] if known.get(node.kind, True) else None
