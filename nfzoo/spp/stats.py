"""The statistics of a tensor that a signal propagation plot shows: one function each, in a table that users extend.

For a tensor with channels last, mean and variance are taken over all axes of a channel but its own (population
variance). For a kernel the "channel" is the unit that AGC clips: an output channel, or a channel of a depthwise kernel.
With `definition="poster"` tensors of rank 2 or less, and all weights, are taken as one flat vector: acsm is then
mean(x^2) and acv the variance over everything, as in the poster's figures.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

STATS: dict[str, Callable] = {}
# What a plot of Brock et al. needs; the rest is for the asking, and costs a pass over every tensor each.
DEFAULT = ("acsm", "acv", "second_moment")


def statistic(function: Callable) -> Callable:
    """Register a statistic: a function (x, axes) -> scalar tensor; its name becomes a column of the log.

    Args:
        function: `x` is any tensor, `axes` those within a channel.

    Example:
        >>> @statistic
        ... def largest(x, axes):
        ...     return ops.max(ops.abs(x))
        >>> float(STATS.pop("largest")(ops.array([1.0, -3.0]), (0,)))
        3.0
    """
    STATS[function.__name__] = function
    return function


def _variance(x: Any, axes: Sequence[int], keepdims: bool = False) -> Any:
    return ops.mean(ops.square(x - ops.mean(x, axis=axes, keepdims=True)), axis=axes, keepdims=keepdims)


@statistic
def acsm(x: Any, axes: Sequence[int]) -> Any:
    """Average channel squared mean (NF-ResNet paper, arXiv 2101.08692, section 3)."""
    return ops.mean(ops.square(ops.mean(x, axis=axes)))


@statistic
def acv(x: Any, axes: Sequence[int]) -> Any:
    """Average channel variance (NF-ResNet paper, section 3); of a residual branch: RACV."""
    return ops.mean(_variance(x, axes))


@statistic
def second_moment(x: Any, axes: Sequence[int]) -> Any:
    """Mean of x^2 over everything; with the mean over channels first, it is acsm + acv."""
    return ops.mean(ops.square(x))


@statistic
def mean(x: Any, axes: Sequence[int]) -> Any:
    """Mean over everything."""
    return ops.mean(x)


@statistic
def norm(x: Any, axes: Sequence[int]) -> Any:
    """Euclidean norm of the whole tensor."""
    return ops.sqrt(ops.sum(ops.square(x)))


@statistic
def kurtosis(x: Any, axes: Sequence[int]) -> Any:
    """Fourth standardized moment, averaged over channels: 3 for a normal distribution."""
    centred = x - ops.mean(x, axis=axes, keepdims=True)
    variance = ops.mean(ops.square(centred), axis=axes)
    return ops.mean(ops.mean(centred**4, axis=axes) / ops.maximum(variance**2, 1e-24))


@statistic
def nonzero(x: Any, axes: Sequence[int]) -> Any:
    """Share of entries that are not zero (EUNNet, Figure 5)."""
    return ops.mean(ops.cast(ops.not_equal(x, 0), "float32"))


@statistic
def dead(x: Any, axes: Sequence[int]) -> Any:
    """Share of channels that are zero everywhere."""
    return ops.mean(ops.cast(ops.equal(ops.max(ops.abs(x), axis=axes), 0), "float32"))


@statistic
def saturated(x: Any, axes: Sequence[int]) -> Any:
    """Share of entries within 1 % of the channel's range from its largest or smallest value: a sigmoid at its ends."""
    low, high = ops.min(x, axis=axes, keepdims=True), ops.max(x, axis=axes, keepdims=True)
    margin = 0.01 * (high - low)
    return ops.mean(ops.cast(ops.logical_or(x >= high - margin, x <= low + margin), "float32"))


def resolve(names: str | Sequence[str]) -> tuple[str, ...]:
    """Names of statistics: "default", "all", or some of `STATS`.

    Raises:
        ValueError: for a name that is not in the table.
    """
    if isinstance(names, str):
        names = {"default": DEFAULT, "all": tuple(STATS)}.get(names, (names,))
    if unknown := set(names) - STATS.keys():
        raise ValueError(f'Expected statistics "default", "all", or some of {", ".join(STATS)}. Received: {unknown}')
    return tuple(names)


def statistics(x: Any, axes=None, definition: str = "channel", flat: bool = False, names=DEFAULT) -> dict[str, Any]:
    """The statistics of one tensor.

    Args:
        x: any tensor.
        axes: axes within a channel; default: all but the last.
        definition: "channel", or "poster" (see the module).
        flat: whether the poster's definition takes this tensor as one vector.
        names: which ones, of `STATS`.

    Example:
        >>> import numpy as np
        >>> {k: float(v) for k, v in statistics(np.array([[1.0, 3.0], [1.0, 5.0]])).items()}
        {'acsm': 8.5, 'acv': 0.5, 'second_moment': 9.0}
    """
    x = ops.convert_to_tensor(x)
    if keras.backend.standardize_dtype(x.dtype) in ("float16", "bfloat16"):
        x = ops.cast(x, "float32")
    everything = tuple(range(len(x.shape)))
    poster = definition == "poster" and flat
    axes = everything if poster else everything[:-1] if axes is None else axes
    result = {name: STATS[name](x, axes) for name in names}
    if poster and "acsm" in result:
        result["acsm"] = second_moment(x, axes)
    return result
