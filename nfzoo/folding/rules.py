"""Where constants go: rules that leave what a graph computes as it is, applied until none applies."""

from collections.abc import Callable

import numpy as np
from keras import layers

from nfzoo.folding.graph import LINEAR, Graph, Node, affine

# Layers that commute with a factor and a shift; with a factor; with a positive one.
_MEANS = (layers.GlobalAveragePooling2D, layers.AveragePooling2D)
_COMMUTING = (*_MEANS, layers.ZeroPadding2D, layers.Flatten, layers.Reshape)
_MAXIMA = (layers.MaxPooling2D, layers.GlobalMaxPooling2D)
_HOMOGENEOUS = ("relu", "leaky_relu", "leaky_relu_001", "linear")


def simplify(graph: Graph) -> None:
    """Apply the rules until none applies."""
    while _applied(graph, RULES) or _applied(graph, [_factor_of_a_sum]):
        pass


def _applied(graph: Graph, rules: list[Callable]) -> bool:
    return any([rule(graph, node) for node in list(graph) for rule in rules if graph.users[node]])


def _identity(graph: Graph, node: Node) -> bool:
    """1 · x + 0 is x."""
    if node.kind != "affine" or np.any(node.scale != 1) or np.any(node.shift != 0):
        return False
    graph.replace(node, node.inputs[0])
    return True


def _one_after_another(graph: Graph, node: Node) -> bool:
    """Two affine nodes are one."""
    if node.kind != "affine" or node.inputs[0].kind != "affine":
        return False
    first = node.inputs[0]
    node.scale, node.shift = node.scale * first.scale, node.scale * first.shift + node.shift
    graph.rewire(node, first.inputs[0])
    return True


def _into_kernel_before(graph: Graph, node: Node) -> bool:
    """scale · (K x + b) + shift is a linear layer, where nobody else looks at K x + b."""
    if node.kind != "affine" or node.inputs[0].kind not in LINEAR or len(graph.users[node.inputs[0]]) > 1:
        return False
    linear = node.inputs[0]
    by_unit = node.scale.ndim and linear.kind == "depthwise"
    linear.kernel = linear.kernel * (node.scale.reshape(linear.kernel.shape[2:]) if by_unit else node.scale)
    if linear.bias is not None or np.any(node.shift != 0):
        linear.bias = (0.0 if linear.bias is None else linear.bias) * node.scale + node.shift
    graph.replace(node, linear)
    return True


def _into_kernel_after(graph: Graph, node: Node) -> bool:
    """K (scale · x + shift) + b is a linear layer of x; a shift only where no zeros are padded beside it."""
    if node.kind not in LINEAR or node.inputs[0].kind != "affine" or not _absorbs(node, node.inputs[0]):
        return False
    before = node.inputs[0]
    if np.any(before.shift != 0):
        axes = (0, 1) if node.kind == "depthwise" else tuple(range(node.kernel.ndim - 1))
        shifted = (node.kernel * _by_input(node, before.shift)).sum(axes).reshape(-1)
        node.bias = shifted + (0.0 if node.bias is None else node.bias)
    node.kernel = node.kernel * _by_input(node, before.scale)
    graph.rewire(node, before.inputs[0])
    return True


def _absorbs(linear: Node, before: Node) -> bool:
    padded = linear.kind != "dense" and linear.layer.padding == "same" and max(linear.layer.kernel_size) > 1
    grouped = linear.kind == "conv" and linear.layer.groups > 1
    by_channel = before.scale.ndim > 0 or before.shift.ndim > 0
    return not (padded and np.any(before.shift != 0)) and not (grouped and by_channel)


def _by_input(linear: Node, values: np.ndarray) -> np.ndarray:
    """One number per input channel, to multiply a kernel with: (…, in, out), in depthwise kernels too."""
    return values.reshape(-1, 1) if values.ndim else values


def _past_layers(graph: Graph, node: Node) -> bool:
    """pool(scale · x) is scale · pool(x)."""
    before = node.inputs[0] if node.inputs else node
    return node.kind == "layer" and before.kind == "affine" and _commutes(node, before) and _past(graph, node)


def _commutes(node: Node, before: Node) -> bool:
    if isinstance(node.layer, _MEANS):
        return True
    if np.any(before.shift != 0) or (before.scale.ndim and isinstance(node.layer, layers.Flatten | layers.Reshape)):
        return False
    return isinstance(node.layer, _COMMUTING) or (isinstance(node.layer, _MAXIMA) and bool(np.all(before.scale > 0)))


def _past_activations(graph: Graph, node: Node) -> bool:
    """relu(scale · x) is scale · relu(x) for a positive scale."""
    if node.kind != "act" or not _homogeneous(node) or node.inputs[0].kind != "affine":
        return False
    before = node.inputs[0]
    return not np.any(before.shift != 0) and bool(np.all(before.scale > 0)) and _past(graph, node)


def _homogeneous(node: Node) -> bool:
    return node.activation in _HOMOGENEOUS


def _past_gates(graph: Graph, node: Node) -> bool:
    """(scale · x) · s is scale · (x · s)."""
    if node.kind != "mul" or node.inputs[0].kind != "affine" or np.any(node.inputs[0].shift != 0):
        return False
    return _past(graph, node)


def _past(graph: Graph, node: Node) -> bool:
    """Move the affine node before a node behind it."""
    before = node.inputs[0]
    graph.rewire(node, before.inputs[0])
    graph.insert(node, affine(before.name, node, before.scale, before.shift))
    return True


def _through_squeeze(graph: Graph, node: Node) -> bool:
    """scale · (K x) · s(W pool(K x)) is K' x · s(W' pool(K' x)), with K' = scale · K and W' = W / scale."""
    if node.kind != "affine" or node.inputs[0].kind != "mul" or node.scale.ndim or node.scale == 0:
        return False
    gate = node.inputs[0]
    linear = gate.inputs[0]
    if np.any(node.shift != 0) or linear.kind not in LINEAR or len(graph.users[gate]) > 1:
        return False
    pools = [user for user in graph.users[linear] if user is not gate]
    if len(pools) != 1 or pools[0] is None or not isinstance(pools[0].layer, layers.GlobalAveragePooling2D):
        return False
    squeezes = graph.users[pools[0]]
    if not all(squeeze is not None and squeeze.kind in LINEAR for squeeze in squeezes):
        return False
    linear.kernel = linear.kernel * node.scale
    linear.bias = None if linear.bias is None else linear.bias * node.scale
    for squeeze in squeezes:
        squeeze.kernel = squeeze.kernel / node.scale
    graph.replace(node, gate)
    return True


def _factor_of_a_sum(graph: Graph, node: Node) -> bool:
    """a · x + b · y is a · (x + b/a · y), where all that follows takes the factor: b/a goes into a kernel before."""
    if not _adds_kernels(graph, node) or node.inputs[0].kind != "affine":
        return False
    stream = node.inputs[0]
    if np.any(stream.shift != 0) or stream.scale.ndim or stream.scale <= 0:
        return False
    if not all(_takes_a_factor(graph, user, node) for user in graph.users[node]):
        return False
    for source in node.inputs[1:]:
        source.kernel = source.kernel / stream.scale
        source.bias = None if source.bias is None else source.bias / stream.scale
    graph.rewire(node, stream.inputs[0])
    graph.insert(node, affine(stream.name, node, stream.scale))
    return True


def _adds_kernels(graph: Graph, node: Node) -> bool:
    """Whether what is added to the first input comes from kernels that nobody else uses."""
    return node.kind == "add" and all(
        source.kind in LINEAR and len(graph.users[source]) == 1 for source in node.inputs[1:]
    )


def _takes_a_factor(graph: Graph, user: Node | None, source: Node) -> bool:
    """Whether a positive factor of `source` ends in kernels after it."""
    if user is None or user.inputs[0] is not source:
        return False
    if user.kind in LINEAR or user.kind == "affine":
        return True
    passes = user.kind == "mul" or _adds_kernels(graph, user) or (user.kind == "act" and _homogeneous(user))
    passes = passes or (user.kind == "layer" and isinstance(user.layer, _COMMUTING + _MAXIMA))
    return passes and all(_takes_a_factor(graph, after, user) for after in graph.users[user])


RULES: list[Callable] = [
    _identity, _one_after_another, _into_kernel_before, _into_kernel_after, _past_layers, _past_activations,
    _past_gates, _through_squeeze,
]  # fmt: skip
