"""Where constants go: rules that leave what a graph computes as it is, applied until none applies."""

from collections import defaultdict
from collections.abc import Callable

import numpy as np
from keras import layers

from nfzoo.fold.graph import LINEAR, Node, affine, walk

# Layers that commute with a factor, and of them those that want it positive.
_COMMUTING = (
    layers.GlobalAveragePooling2D, layers.AveragePooling2D, layers.ZeroPadding2D, layers.Flatten, layers.Reshape,
)  # fmt: skip
_MAXIMA = (layers.MaxPooling2D, layers.GlobalMaxPooling2D)
_HOMOGENEOUS = ("relu", "leaky_relu", "linear")


class Graph:
    """Nodes that lead to the outputs, and who uses whom."""

    def __init__(self, outputs: list[Node]):
        self.outputs = outputs

    def users(self) -> dict[Node, list[Node]]:
        """Users of every node; an output of the network has one more, which is nobody's."""
        found = defaultdict(list)
        for node in walk(self.outputs):
            for source in node.inputs:
                found[source].append(node)
        for node in self.outputs:
            found[node].append(None)
        return found

    def replace(self, old: Node, new: Node) -> None:
        """Let the users of one node use another."""
        for node in list(walk(self.outputs)):
            if node is not new:
                node.inputs = [new if source is old else source for source in node.inputs]
        self.outputs = [new if node is old else node for node in self.outputs]


def simplify(outputs: list[Node]) -> list[Node]:
    """Apply the rules until none applies."""
    graph = Graph(outputs)
    while any(rule(graph, node, graph.users()) for node in list(walk(graph.outputs)) for rule in RULES):
        pass
    return graph.outputs


def _is(node: Node, kind: str) -> bool:
    return node.kind == kind


def _identity(graph: Graph, node: Node, users) -> bool:
    """1 · x + 0 is x."""
    if not _is(node, "affine") or np.any(node.scale != 1) or np.any(node.shift != 0):
        return False
    graph.replace(node, node.inputs[0])
    return True


def _into_kernel_before(graph: Graph, node: Node, users) -> bool:
    """scale · (K x + b) + shift is a linear layer, where nobody else looks at K x + b."""
    if not _is(node, "affine") or node.inputs[0].kind not in LINEAR or len(users[node.inputs[0]]) > 1:
        return False
    linear = node.inputs[0]
    scale = node.scale.reshape(linear.kernel.shape[2:]) if _per_channel(node) and linear.kind == "depthwise" else node.scale
    linear.kernel = linear.kernel * scale
    if linear.bias is not None or np.any(node.shift != 0):
        linear.bias = (0.0 if linear.bias is None else linear.bias) * node.scale + node.shift
    graph.replace(node, linear)
    return True


def _per_channel(node: Node) -> bool:
    return node.scale.ndim > 0


def _one_after_another(graph: Graph, node: Node, users) -> bool:
    """Two affine nodes are one."""
    if not _is(node, "affine") or not _is(node.inputs[0], "affine"):
        return False
    first = node.inputs[0]
    graph.replace(node, affine(node.name, first.inputs[0], node.scale * first.scale,
                               node.scale * first.shift + node.shift))  # fmt: skip
    return True


def _into_kernel_after(graph: Graph, node: Node, users) -> bool:
    """K (scale · x + shift) + b is a linear layer of x; a shift only where no zeros are padded beside it."""
    if node.kind not in LINEAR or not _is(node.inputs[0], "affine"):
        return False
    before = node.inputs[0]
    padded = node.kind != "dense" and node.layer.padding == "same" and max(node.layer.kernel_size) > 1
    grouped = node.kind == "conv" and node.layer.groups > 1
    if np.any(before.shift != 0) and (padded or grouped or node.kind == "depthwise"):
        return False
    if grouped and _per_channel(before):
        return False
    if np.any(before.shift != 0):
        axes = tuple(range(node.kernel.ndim - 1))
        shift = before.shift.reshape(-1, 1) if before.shift.ndim else before.shift
        node.bias = (0.0 if node.bias is None else node.bias) + (node.kernel * shift).sum(axes)
    node.kernel = node.kernel * (before.scale.reshape(-1, 1) if _per_channel(before) else before.scale)
    node.inputs = [before.inputs[0]]
    return True


def _past_layers(graph: Graph, node: Node, users) -> bool:
    """pool(scale · x) is scale · pool(x)."""
    if not _is(node, "layer") or len(node.inputs) != 1 or not _is(node.inputs[0], "affine"):
        return False
    before = node.inputs[0]
    positive = isinstance(node.layer, _MAXIMA) and np.all(before.scale > 0)
    if np.any(before.shift != 0) or not (isinstance(node.layer, _COMMUTING) or positive):
        return False
    if _per_channel(before) and isinstance(node.layer, layers.Flatten | layers.Reshape):
        return False
    return _past(graph, node, before)


def _past_activations(graph: Graph, node: Node, users) -> bool:
    """relu(scale · x) is scale · relu(x) for a positive scale."""
    name = getattr(node.function, "__name__", node.function)
    if not _is(node, "act") or name not in _HOMOGENEOUS or not _is(node.inputs[0], "affine"):
        return False
    before = node.inputs[0]
    if np.any(before.shift != 0) or np.any(before.scale <= 0):
        return False
    return _past(graph, node, before)


def _past_gates(graph: Graph, node: Node, users) -> bool:
    """(scale · x) · s is scale · (x · s)."""
    if not _is(node, "mul") or not _is(node.inputs[0], "affine") or np.any(node.inputs[0].shift != 0):
        return False
    before = node.inputs[0]
    node.inputs = [before.inputs[0], node.inputs[1]]
    after = affine(before.name, node, before.scale)
    _insert(graph, node, after)
    return True


def _past(graph: Graph, node: Node, before: Node) -> bool:
    node.inputs = [before.inputs[0]]
    _insert(graph, node, affine(before.name, node, before.scale))
    return True


def _insert(graph: Graph, node: Node, after: Node) -> None:
    """Put `after`, which uses `node`, between it and its users."""
    graph.replace(node, after)
    after.inputs = [node]


def _through_squeeze(graph: Graph, node: Node, users) -> bool:
    """scale · (K x) · s(W pool(K x)) is K' x · s(W' pool(K' x)), with K' = scale · K and W' = W / scale."""
    if not _is(node, "affine") or not _is(node.inputs[0], "mul") or _per_channel(node) or node.scale == 0:
        return False
    gate = node.inputs[0]
    linear = gate.inputs[0]
    if np.any(node.shift != 0) or linear.kind not in LINEAR or len(users[gate]) > 1:
        return False
    pools = [user for user in users[linear] if user is not gate]
    squeezes = [squeeze for pool in pools if pool for squeeze in users[pool]]
    fits = len(pools) == 1 and pools[0] is not None and isinstance(pools[0].layer, layers.GlobalAveragePooling2D)
    if not fits or not all(squeeze is not None and squeeze.kind in LINEAR for squeeze in squeezes):
        return False
    linear.kernel = linear.kernel * node.scale
    linear.bias = None if linear.bias is None else linear.bias * node.scale
    for squeeze in squeezes:
        squeeze.kernel = squeeze.kernel / node.scale
    graph.replace(node, gate)
    return True


RULES: list[Callable] = [
    _identity, _one_after_another, _into_kernel_before, _into_kernel_after, _past_layers, _past_activations,
    _past_gates, _through_squeeze,
]  # fmt: skip
