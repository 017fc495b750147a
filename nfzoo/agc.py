"""Adaptive gradient clipping (AGC): the gradient of each unit is bounded relative to the norm of its weights.

With the norms taken over the fan-in of unit i, |.| Frobenius:

    |G_i| > clip_factor * max(|W_i|, eps)   =>   G_i <- G_i * clip_factor * max(|W_i|, eps) / |G_i|

Pure functions first, then the table that says what a unit is, then the configuration that a model compiles with.
References: Brock et al. 2021 (NFNet, arXiv 2102.06171), section 4, equation 3.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import keras
from keras import layers, ops

Axes = tuple[int, ...]


def unitwise_norm(x: Any, axes: Sequence[int]) -> Any:
    """Norm of every unit: sqrt of the sum of squares over `axes`, kept as axes of length 1; () means per element.

    Example:
        >>> import numpy as np
        >>> np.asarray(unitwise_norm(np.array([[3.0, 0.0], [4.0, 0.0]]), (0,))).tolist()
        [[5.0, 0.0]]
    """
    return ops.sqrt(ops.sum(ops.square(x), axis=tuple(axes), keepdims=True)) if axes else ops.abs(x)


def clip(gradient: Any, weight: Any, axes: Sequence[int], clip_factor: float, eps: float, scale: Any = 1.0):
    """Clip one gradient unit by unit.

    Args:
        gradient, weight: tensors of one shape.
        axes: the axes a unit's norm is taken over, see `unitwise_norm`.
        clip_factor: largest allowed ratio of gradient norm to weight norm.
        eps: floor of the weight norm, so that weights at zero can leave it.
        scale: what the gradient is multiplied with (the loss scale of mixed precision); the clipped gradient keeps it.

    Returns:
        The clipped gradient, and a boolean tensor telling which units were clipped. A gradient beyond 1e19, whose norm
        float32 cannot hold, becomes zero; one that is not finite becomes NaN.

    Example:
        >>> import numpy as np
        >>> weight = np.array([[3.0, 0.0], [4.0, 0.0]])
        >>> gradient = np.array([[0.6, 1e-6], [0.8, 2e-6]])
        >>> np.asarray(clip(gradient, weight, (0,), 0.01, 1e-3)[0])[:, 0].round(6).tolist()
        [0.03, 0.04]
    """
    if hasattr(gradient, "indices"):  # rows of an embedding, some of them twice: only their sums have a norm
        gradient = ops.add(gradient, ops.zeros(weight.shape, gradient.dtype))
    given = gradient.dtype
    # A norm of squares needs more than the range and the digits of half precision.
    kind = keras.backend.result_type(keras.backend.standardize_dtype(weight.dtype), "float32")
    weight, gradient, scale = (ops.cast(x, kind) for x in (ops.convert_to_tensor(weight), gradient, scale))
    limit = clip_factor * ops.maximum(unitwise_norm(weight, axes), eps) * scale
    norm = unitwise_norm(gradient, axes)
    clipped = norm > limit
    # One factor per unit, so that the gradient is passed over once; 1 leaves its bits as they are.
    factor = ops.where(clipped, limit, 1.0) / ops.where(clipped, norm, 1.0)
    return ops.cast(gradient * factor, given), clipped


# Which axes make up a unit's fan-in, per layer type and variable. A rank does not tell: a depthwise kernel
# (H, W, channels, multiplier) and a convolution kernel (H, W, in, out) are both of rank 4. Add your own layers here.
UNIT_AXES: dict[type[keras.Layer], dict[str, Axes]] = {
    layers.Dense: {"kernel": (0,)},
    layers.Embedding: {"embeddings": (0,)},  # the kernel of a Dense layer on one-hot words
    layers.Conv1D: {"kernel": (0, 1)},
    layers.Conv2D: {"kernel": (0, 1, 2)},
    layers.Conv3D: {"kernel": (0, 1, 2, 3)},
    layers.DepthwiseConv1D: {"kernel": (0,)},
    layers.DepthwiseConv2D: {"kernel": (0, 1)},
    layers.SeparableConv1D: {"depthwise_kernel": (0,), "pointwise_kernel": (0, 1)},
    layers.SeparableConv2D: {"depthwise_kernel": (0, 1), "pointwise_kernel": (0, 1, 2)},
    layers.Conv1DTranspose: {"kernel": (0, 2)},
    layers.Conv2DTranspose: {"kernel": (0, 1, 3)},
    layers.Conv3DTranspose: {"kernel": (0, 1, 2, 4)},
}


def fan_in_axes(layer: keras.Layer, variable: keras.Variable) -> Axes | None:
    """Look up the fan-in axes of a layer's variable; None where the table does not know it."""
    for kind in type(layer).__mro__:
        if kind in UNIT_AXES and variable.name in UNIT_AXES[kind]:
            return UNIT_AXES[kind][variable.name]
    return None


def owners(model: keras.Model) -> dict[str, keras.Layer]:
    """Map each variable path of a model to the innermost layer that holds it.

    Raises:
        ValueError: several variables of one path, as of two networks of one architecture within a model.
    """
    paths = Counter(v.path for v in model.weights)
    if several := [path for path, n in paths.items() if n > 1]:
        raise ValueError(
            f"Expected variables of different paths. Received: {model.name}, which has several of {several[0]} and of "
            f"{len(several) - 1} other paths. Look at the networks in it one by one"
        )
    return {v.path: layer for layer in model._flatten_layers() for v in layer.variables}


def unit_axes(model: keras.Model, exclude: Iterable[str] = (), vector_units: str = "tensor") -> dict[str, Axes | None]:
    """Decide for every trainable variable of a model what its units are.

    Args:
        model: a built model.
        exclude: regular expressions on variable paths, e.g. "head/kernel"; what one matches is not clipped.
        vector_units: "tensor" takes one norm over a vector or scalar (DeepMind), "element" one per entry (as timm does
            for gains, not for biases).

    Returns:
        Path -> the axes of the norm, in model order; None for an excluded variable.

    Raises:
        ValueError: for a pattern that matches nothing, or a variable whose units the table does not tell.

    Example:
        >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.DepthwiseConv2D(3, name="conv")], name="net")
        >>> unit_axes(model)  # a filter per channel; the bias as one
        {'net/conv/kernel': (0, 1), 'net/conv/bias': (0,)}
    """
    owner = {id(v): layer for layer in model._flatten_layers() for v in layer.variables}
    result: dict[str, Axes | None] = {}
    # A frozen variable is not clipped, but a pattern may name it.
    unused = {p for p in exclude if not any(matches(p, v.path) for v in model.weights)}
    for variable in model.trainable_variables:
        hits = any(matches(p, variable.path) for p in exclude)
        axes = None if hits else _axes(owner[id(variable)], variable, vector_units)
        if result.get(variable.path, axes) != axes:  # Keras keeps paths apart in one model, not in nested ones
            raise ValueError(
                f"Expected variables of one path to have one kind of units. Received: two called {variable.path} with "
                f"{result[variable.path]} and {axes}; give their layers, or the models around them, other names"
            )
        result[variable.path] = axes
    if unused:
        raise ValueError(
            f"Expected each exclude pattern of AGC to match a variable. Received: {sorted(unused)}, which "
            f"match none. The paths end with {[v.path for v in model.weights][-3:]}; pass exclude=() to "
            "clip everything."
        )
    return result


def matches(pattern: str, path: str) -> bool:
    """Whether a regular expression matches the end of a variable's path, from a name's start on.

    Example:
        >>> matches("gain", "stem_conv1/gain"), matches("gain", "again"), matches("stem.*/gain", "stem_conv1/gain")
        (True, False, True)
    """
    return re.search(rf"(?:^|/)(?:{pattern})$", path) is not None


def _axes(layer: keras.Layer, variable: keras.Variable, vector_units: str) -> Axes:
    rank = len(variable.shape)
    if rank <= 1:
        return tuple(range(rank)) if vector_units == "tensor" else ()
    axes = fan_in_axes(layer, variable)
    if axes is None:
        raise ValueError(
            f"Expected a variable whose units AGC knows. Received: {variable.path} of shape {tuple(variable.shape)}, "
            f"held by a {type(layer).__name__}. Add it: nfzoo.agc.UNIT_AXES[{type(layer).__name__}] = "
            f'{{"{variable.name}": (fan-in axes)}}, or exclude it by its path.'
        )
    return axes


@keras.saving.register_keras_serializable(package="nfzoo")
@dataclass(frozen=True)
class AGC:
    """Configuration of adaptive gradient clipping, for `NFModel.compile(agc=AGC(0.01))`.

    Attributes:
        clip_factor: largest ratio of gradient norm to weight norm, per unit. The paper takes 0.01 at batch 1024 and
            above; smaller batches bear larger values.
        eps: floor of the weight norm.
        exclude: regular expressions on variable paths left unclipped; default: the classifier's weight (not its bias).
        vector_units: unit of biases, gains and scalars: "tensor" (DeepMind) or "element" (as timm's gains).
        log_clipped: report `agc_clipped`, the fraction of units clipped, in the logs of `fit`.

    Example:
        >>> AGC(clip_factor=0.02)
        AGC(clip_factor=0.02, eps=0.001, exclude=('head/kernel',), vector_units='tensor', log_clipped=False)

    References: NFNet paper (arXiv 2102.06171), section 4 and appendix A.
    """

    clip_factor: float = 0.01
    eps: float = 1e-3
    exclude: tuple[str, ...] = ("head/kernel",)
    vector_units: Literal["tensor", "element"] = "tensor"
    log_clipped: bool = False

    def __post_init__(self):
        object.__setattr__(self, "exclude", (self.exclude,) if isinstance(self.exclude, str) else tuple(self.exclude))
        if not (0 < self.clip_factor < math.inf and 0 < self.eps < math.inf):
            raise ValueError(f"Expected finite clip_factor > 0 and eps > 0. Received: {self.clip_factor}, {self.eps}")
        if self.vector_units not in ("tensor", "element"):
            raise ValueError(f'Expected vector_units "tensor" or "element". Received: {self.vector_units!r}')

    def units(self, model: keras.Model) -> dict[str, Axes | None]:
        """`unit_axes` of a model under this configuration."""
        return unit_axes(model, self.exclude, self.vector_units)

    def clip(self, gradients: Sequence, weights: Sequence, axes: Sequence[Axes | None], scale: Any = 1.0):
        """Clip a list of gradients; None gradients and None axes pass through.

        Returns:
            The gradients, and the fraction of the units considered that were clipped (a float32 scalar).
        """
        result, clipped, total = [], ops.zeros((), "float32"), 0
        for gradient, weight, unit in zip(gradients, weights, axes, strict=True):
            if gradient is not None and unit is not None:
                gradient, mask = clip(gradient, weight, unit, self.clip_factor, self.eps, scale)
                clipped += ops.sum(ops.cast(mask, "float32"))
                total += ops.size(mask)
            result.append(gradient)
        return result, clipped / ops.cast(ops.maximum(total, 1), "float32")

    def get_config(self) -> dict:
        return asdict(self)

    @classmethod
    def from_config(cls, config: dict) -> "AGC":
        return cls(**config)
