"""A network as a graph of few kinds of nodes, in which constants can be moved about."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import layers

from nfzoo.layers import Affine, CenteringBias, CompensatePadding, Gate, Merge, ScaledActivation, StochasticDepth, Tap

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
        function: of an activation: a function of Keras, or the name of one.
        call: positional and keyword arguments of a kept layer, with nodes for tensors.
    """

    kind: str
    name: str
    inputs: list["Node"]
    layer: keras.Operation | None = None
    kernel: np.ndarray | None = None
    bias: np.ndarray | None = None
    scale: np.ndarray = field(default_factory=lambda: np.array(1.0))
    shift: np.ndarray = field(default_factory=lambda: np.array(0.0))
    function: Callable | str | None = None
    call: tuple[tuple, dict] = ((), {})

    @property
    def activation(self) -> str:
        """The name of its function; where that is not Keras' or ours, with the module that it is from."""
        if not callable(self.function):
            return str(self.function)
        name, module = getattr(self.function, "__name__", str(self.function)), self.function.__module__
        return name if _is_ours(module) else f"{module}.{name}"


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in ("keras", "nfzoo")


class Graph:
    """Nodes that lead to the outputs, and who uses whom.

    Attributes:
        outputs: nodes.
        users: of every node, as often as they use it; an output of the network has one more, which is None.
    """

    def __init__(self, outputs: list[Node]):
        self.outputs = outputs
        self.users: dict[Node, list[Node | None]] = defaultdict(list)
        for node in self:
            for source in node.inputs:
                self.users[source].append(node)
        for node in outputs:
            self.users[node].append(None)

    def __iter__(self) -> Iterator[Node]:
        """Every node, inputs before their users."""
        seen, order = set(), []
        stack = [(node, False) for node in reversed(self.outputs)]
        while stack:
            node, done = stack.pop()
            if done:
                order.append(node)
            elif node not in seen:
                seen.add(node)
                stack.append((node, True))
                stack += [(source, False) for source in reversed(node.inputs)]
        return iter(order)

    def rewire(self, node: Node, source: Node, at: int = 0) -> None:
        """Let a node use another source."""
        old, node.inputs[at] = node.inputs[at], source
        self.users[source].append(node)
        self._release(old, node)

    def replace(self, old: Node, new: Node) -> None:
        """Let the users of one node use another, which may itself use the first."""
        for user in [user for user in self.users[old] if user is not None and user is not new]:
            self.rewire(user, new, user.inputs.index(old))
        for at, node in enumerate(self.outputs):
            if node is old:
                self.outputs[at] = new
                self.users[new].append(None)
                self._release(old, None)

    def insert(self, node: Node, after: Node) -> None:
        """Put `after`, which uses `node`, between it and its users."""
        self.users[node].append(after)
        self.replace(node, after)

    def _release(self, node: Node, user: Node | None) -> None:
        self.users[node].remove(user)
        if not self.users[node]:
            for source in node.inputs:
                self._release(source, node)


def read(model: keras.Model, given: list[Node] | None = None) -> Any:
    """The output nodes of a functional or sequential model, in the structure of its outputs.

    Args:
        given: nodes that the model is called with, for a model within another one; default: its inputs.

    Raises:
        ValueError: for a model that is no graph of layers.
    """
    if not _is_graph(model):
        raise ValueError(f"Expected a functional model, or a sequential one with weights. Received: {type(model)}")
    starts = given or [Node("input", tensor.name, [], call=((), {"tensor": tensor})) for tensor in model.inputs]
    if isinstance(model, keras.Sequential):
        (made,) = starts
        for layer in model.layers:
            made = _node(layer, (made,), {})
        return made
    config = model.get_config()
    names = [tensor._keras_history.operation.name for tensor in model.inputs]  # in the order of flattened arguments
    operations = {operation.name: operation for operation in model.operations}
    calls = {layer["name"]: layer["inbound_nodes"] for layer in config["layers"]}
    nodes: dict[tuple[str, int], Any] = {(name, 0): start for name, start in zip(names, starts, strict=True)}
    for (name, _), start in nodes.items():
        if start.kind == "input":
            start.name = name

    def at(name: str, number: int, output: int) -> Node:
        if (name, number) not in nodes:
            call = calls[name][number]
            arguments = (_replaced(call[key], at) for key in ("args", "kwargs"))
            nodes[name, number] = _node(operations[name], *arguments)
        made = keras.tree.flatten(nodes[name, number])
        if output >= len(made):
            raise ValueError(f"Expected layers of one output. Received: {name}, of which output {output} is used")
        return made[output]

    def end(name: str, number: int, output: int) -> Node:
        # In this place of a configuration, and here alone, a functional model's first call is its second.
        functional = _is_graph(operations[name]) and not isinstance(operations[name], keras.Sequential)
        return at(name, number - functional, output)

    return _replaced(config["output_layers"], end)


def _is_graph(model) -> bool:
    if isinstance(model, keras.Sequential):
        return model.built
    return isinstance(model, keras.Model) and hasattr(model, "operations")


def _replaced(structure, at: Callable) -> Any:
    """Put nodes where a configuration names a layer, the number of its call, and that of the output."""
    if isinstance(structure, dict):
        if structure.get("class_name") == "__keras_tensor__":
            return at(*structure["config"]["keras_history"])
        return {key: _replaced(value, at) for key, value in structure.items()}
    if isinstance(structure, list | tuple):
        if len(structure) == 3 and isinstance(structure[0], str) and all(isinstance(n, int) for n in structure[1:]):
            return at(*structure)
        return type(structure)(_replaced(value, at) for value in structure)
    return structure


def _node(layer, arguments: tuple, options: dict) -> Any:
    inputs = [x for x in keras.tree.flatten((arguments, options)) if isinstance(x, Node)]
    if _is_graph(layer) and layer.weights:  # a backbone: what is constant in it folds too
        return read(layer, inputs)
    kept = Node("layer", layer.name, inputs, layer, call=(tuple(arguments), options))
    if not _is_ours(type(layer).__module__):  # a user's subclass may compute something else
        return kept
    for kinds, make in _READERS:
        if isinstance(layer, kinds):
            return make(layer, inputs) or kept
    return kept


def array(x) -> np.ndarray:
    """A weight in float64: constants are moved without adding to the rounding."""
    return np.asarray(keras.ops.convert_to_numpy(x), "float64")


def affine(name: str, x: Node, scale=1.0, shift=0.0) -> Node:
    """scale · x + shift."""
    scale, shift = (np.asarray(given, "float64") for given in (scale, shift))
    scale, shift = (given.reshape(()) if given.size == 1 else given for given in (scale, shift))
    return Node("affine", name, [x], scale=scale, shift=shift)


def _linear(kind: str) -> Callable:
    def make(layer, inputs) -> Node | None:
        if getattr(layer, "quantization_mode", None):
            raise ValueError(
                f"Expected a network of floats. Received: {layer.name} in {layer.quantization_mode}; fold it first"
            )
        if getattr(layer, "data_format", None) == "channels_first":
            return None  # stays as it is
        kernel = layer.effective_kernel() if hasattr(layer, "effective_kernel") else layer.kernel
        bias = array(layer.bias) if layer.bias is not None else None
        node = Node(kind, layer.name, inputs, layer, kernel=array(kernel), bias=bias)
        if layer.activation is keras.activations.linear or layer.activation is None:
            return node
        return Node("act", f"{layer.name}_act", [node], function=layer.activation)

    return make


def _normalization(layer, inputs) -> Node | None:
    if layer.axis not in (-1, layer.input_spec.ndim - 1):
        return None
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
    """With s = sigmoid(z): s / sqrt(s² + (1 - s)²) = sqrt(sigmoid(2z)); the guard of the layer never acts."""
    x, logits = inputs
    if layer.magnitude_preserving:
        logits = affine(f"{layer.name}_doubled", logits, 2.0)
    factor = Node("factor", f"{layer.name}_factor", [logits], layer)
    return affine(f"{layer.name}_gain", Node("mul", layer.name, [x, factor]), layer.gain)


def _centering(layer, inputs) -> Node:
    learning = float(array(layer.count) < layer.calls)
    return affine(layer.name, inputs[0], 1.0, array(layer.bias) * (1 - 0.99 * learning) - array(layer.moving_mean))


def _rescaling(layer, inputs) -> Node | None:
    if max(np.ndim(layer.scale), np.ndim(layer.offset)) > 1:  # another factor at each position
        return None
    return affine(layer.name, inputs[0], layer.scale, layer.offset)


def _compensation(layer, inputs) -> Node:
    """On the smallest maps all positions have one factor."""
    factors = layer.factors()
    if np.ptp(factors) < 1e-6:
        return affine(layer.name, inputs[0], factors.flat[0])
    return Node("layer", layer.name, inputs[:1], layer, call=((inputs[0],), {}))  # the second input gave but its size


def _scaled_activation(layer, inputs) -> Node:
    activation = Node("act", layer.name, inputs, function=layer._function)
    return affine(f"{layer.name}_scale", activation, layer.scale)


def _relu(layer, inputs) -> Node | None:
    known = {None: keras.activations.relu, 6: keras.activations.relu6}
    if layer.negative_slope or layer.threshold or layer.max_value not in known:
        return None
    return Node("act", layer.name, inputs, function=known[layer.max_value])


def _given_normalization(layer, inputs) -> Node | None:
    if layer.axis not in ((), (-1,), (len(layer.input.shape) - 1,)):
        return None
    mean, deviation = array(layer.mean).ravel(), np.sqrt(array(layer.variance).ravel())
    scale = np.maximum(deviation, keras.config.epsilon())
    return affine(layer.name, inputs[0], scale if layer.invert else 1 / scale, mean if layer.invert else -mean / scale)


# From layers to nodes; None where a layer is kept as it is.
_READERS: list[tuple] = [
    (DROPPED, lambda layer, inputs: inputs[0]),
    (layers.DepthwiseConv2D, _linear("depthwise")),
    (layers.Conv2D, _linear("conv")),
    (layers.Dense, _linear("dense")),
    (layers.BatchNormalization, _normalization),
    (layers.Rescaling, _rescaling),
    (CompensatePadding, _compensation),
    (Affine, lambda layer, inputs: affine(
        layer.name, inputs[0], 1.0 if layer.gain is None else array(layer.gain), array(layer.bias))),
    (CenteringBias, _centering),
    (ScaledActivation, _scaled_activation),
    (layers.Activation, lambda layer, inputs: Node("act", layer.name, inputs, function=layer.activation)),
    (layers.ReLU, _relu),
    (layers.Normalization, _given_normalization),
    (Merge, _merge),
    (layers.Add, lambda layer, inputs: Node("add", layer.name, inputs)),
    (Gate, _gate),
]  # fmt: skip
