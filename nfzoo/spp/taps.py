"""Which layers are observed, and what each shows."""

import fnmatch
import re
from collections.abc import Callable, Iterator, Sequence

import keras
from keras import layers

SKIPPED = (layers.InputLayer, layers.Dropout, layers.Flatten, layers.ZeroPadding2D)
ACTIVATIONS = (layers.Activation, layers.ReLU, layers.LeakyReLU, layers.PReLU, layers.ELU, layers.Softmax)
WEIGHTED = (
    layers.Dense, layers.EinsumDense, layers.Conv1D, layers.Conv2D, layers.Conv3D, layers.Conv1DTranspose,
    layers.Conv2DTranspose, layers.Conv3DTranspose, layers.DepthwiseConv1D, layers.DepthwiseConv2D,
    layers.SeparableConv1D, layers.SeparableConv2D,
)  # fmt: skip
MERGES = (layers.Add, layers.Average, layers.Maximum, layers.Multiply, layers.Subtract)


def all_layers(model: keras.Model, prefix: str = "") -> Iterator[tuple[str, keras.Layer]]:
    """Every layer by name, in model order; a layer of a nested model is "outer/inner", one within a layer is none."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from all_layers(layer, f"{prefix}{layer.name}/")
        else:
            yield prefix + layer.name, layer


def select_taps(model: keras.Model, taps: str | type | Sequence | Callable = "auto") -> list[str]:
    """Choose the layers whose outputs are observed, in model order.

    Args:
        model: any built model.
        taps: "auto" ("blocks" in networks of this zoo; elsewhere residual merges, activations, convolutions and dense
            layers, and layers that hold some), "blocks" (every block's output and residual branch; where none has such
            a name, the residual sums), "layers" (every layer with weights, activation or merge), a shell pattern on
            layer names, a layer class, a list of names or classes, or a function of a layer. A layer of a nested model
            is called "outer/inner".

    Raises:
        ValueError: if nothing matches.

    Example:
        >>> import nfzoo
        >>> select_taps(nfzoo.build("nf_test_resnet"))[:3]
        ['stem_out', 'stage1_block1_branch', 'stage1_block1_out']
    """
    known = dict(all_layers(model))
    if taps == "auto":
        own = any(type(layer).__name__ == "Tap" for layer in known.values())
        taps = "blocks" if own else lambda layer: isinstance(layer, (*MERGES, *ACTIVATIONS)) or _weighted(layer)
    if taps == "blocks":
        names = [name for name, layer in known.items() if place(name, layer) in ("block", "branch")]
        names = names or [name for name, layer in known.items() if isinstance(layer, MERGES)]
        names = names or [name for name, layer in known.items() if isinstance(layer, WEIGHTED)]
    elif taps == "layers":
        names = [name for name, layer in known.items() if not isinstance(layer, SKIPPED)]
    elif isinstance(taps, str):
        names = [name for name in known if fnmatch.fnmatch(name, taps)]
    elif isinstance(taps, type):
        names = [name for name, layer in known.items() if isinstance(layer, taps)]
    elif callable(taps):
        names = [name for name, layer in known.items() if taps(layer)]
    else:
        kinds = tuple(tap for tap in taps if isinstance(tap, type))
        missing = {tap for tap in taps if not isinstance(tap, type)} - known.keys()
        if missing:
            raise ValueError(f"Expected names of layers of {model.name}. Received: {sorted(missing)}")
        names = [name for name, layer in known.items() if name in taps or isinstance(layer, kinds)]
    if not names:
        raise ValueError(
            f'Expected taps that match a layer of {model.name}. Received: taps={taps!r}. Try taps="layers", or a '
            f"pattern on names such as {list(known)[1:4]}"
        )
    return names


def _weighted(layer: keras.Layer) -> bool:
    """Whether a layer is a convolution or dense, or one of its own making that holds such."""
    return any(isinstance(part, WEIGHTED) for part in layer._flatten_layers())


def place(name: str, layer: keras.Layer | None = None) -> str:
    """What a tap shows: "block" (the stream after a block), "branch" (before its merge), "activation",
    "preactivation" (a convolution, a dense layer, a normalization), "merge", or "layer".

    Example:
        >>> place("stage2_block1_out"), place("stage2_block1_branch"), place("head")
        ('block', 'branch', 'layer')
    """
    match = re.search(r"_(out|branch)\d*(#\d+)?$", name)
    # A layer of somebody's network may be called "class_out" and be no block's.
    if match and (layer is None or type(layer).__name__ in ("Tap", "Merge") or re.search("block|stage", name)):
        return {"out": "block", "branch": "branch"}[match.group(1)]
    if isinstance(layer, MERGES) or type(layer).__name__ == "Merge":
        return "merge"
    if isinstance(layer, ACTIVATIONS) or type(layer).__name__ == "ScaledActivation":
        return "activation"
    if isinstance(layer, WEIGHTED) or "Normalization" in type(layer).__name__:
        linear = getattr(layer, "activation", None) in (None, keras.activations.linear)
        return "preactivation" if linear else "activation"
    return "layer"
