"""The statistics of a tensor that a signal propagation plot shows: one function each, in a table that users extend.

For a tensor with channels last, mean and variance are taken over all axes of a channel but its own (population
variance). For a kernel the "channel" is the unit that AGC clips: an output channel, or a channel of a depthwise kernel.
With `definition="poster"` tensors of rank 2 or less, and all weights, are taken as one flat vector: acsm is then
mean(x^2) and acv the variance over everything, as in the poster's figures.
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import keras
import numpy as np
from keras import ops

from nfzoo import backend

STATS: dict[str, Callable] = {}
# What a plot of Brock et al. needs; the rest is for the asking.
DEFAULT = ("acsm", "acv", "second_moment")
# Lists, not numbers: a bin each, and a list of bins per channel.
HISTOGRAMS = ("histogram", "channel_histogram")

_DECADES = (-8, 3)
_PER_DECADE = 8
_SAMPLE = 1 << 14


def edges() -> np.ndarray:
    """Edges between the fixed bins of the histograms: symmetric, eight per decade of |x| from 1e-8 to 1e3.

    What is smaller than the least edge, zero included, falls into the middle bin; the first and last bins are open.

    Example:
        >>> edges().shape, float(edges()[-1])
        ((178,), 1000.0)
    """
    positive = 10.0 ** np.linspace(*_DECADES, _PER_DECADE * (_DECADES[1] - _DECADES[0]) + 1)
    return np.concatenate([-positive[::-1], positive])


class Signal:
    """One tensor as the statistics see it: entries by channel, and what several statistics share, computed once.

    Attributes:
        entries: the tensor as a matrix, a column for each channel.
        mean, variance: of each channel (population variance).
        size: number of entries, as a number where it is known.
        standardized: the entries with the mean of their channel taken off, over its standard deviation.
        low, high: least and largest entry of each channel.
    """

    def __init__(self, x: Any, axes: Sequence[int]):
        rank = len(x.shape)
        order = (*axes, *(axis for axis in range(rank) if axis not in axes))
        x = x if order == tuple(range(rank)) else ops.transpose(x, order)
        channels = math.prod(x.shape[len(axes) :])
        self.entries = ops.reshape(x, (-1, channels))

    @cached_property
    def _moments(self) -> tuple[Any, Any, Any]:
        return backend.column_moments(self.entries)

    @property
    def mean(self) -> Any:
        return self._moments[0]

    @property
    def variance(self) -> Any:
        return self._moments[1]

    @property
    def standardized(self) -> Any:
        return self._moments[2]

    @cached_property
    def size(self) -> Any:
        known = None not in self.entries.shape
        return float(math.prod(self.entries.shape)) if known else ops.cast(ops.size(self.entries), self.entries.dtype)

    @cached_property
    def low(self) -> Any:
        return ops.min(self.entries, axis=0)

    @cached_property
    def high(self) -> Any:
        return ops.max(self.entries, axis=0)

    @cached_property
    def sample(self) -> Any:
        """Some 16,000 entries, of rows drawn once for all: enough to count shares to half a percent."""
        rows, channels = self.entries.shape
        # In a training step the number of examples may be unknown; then all entries count.
        if rows is None or rows * channels < 2 * _SAMPLE:
            return self.entries
        # Evenly spaced rows would all lie in a few columns of a map, at its border, where padding is.
        chosen = np.random.default_rng(0).choice(rows, max(1, _SAMPLE // channels), replace=False)
        return ops.take(self.entries, np.sort(chosen), axis=0)


def statistic(function: Callable) -> Callable:
    """Register a statistic: a function of a `Signal` -> scalar tensor; its name becomes a column of the log.

    The first line of its docstring is its definition in the report.

    Example:
        >>> @statistic
        ... def largest(signal):
        ...     'Largest absolute value.'
        ...     return ops.max(ops.abs(signal.entries))
        >>> float(STATS.pop("largest")(Signal(ops.array([1.0, -3.0]), (0,))))
        3.0
    """
    STATS[function.__name__] = function
    return function


@statistic
def acsm(signal: Signal) -> Any:
    """Average channel squared mean (NF-ResNet paper, arXiv 2101.08692, section 3)."""
    return ops.mean(ops.square(signal.mean))


@statistic
def acv(signal: Signal) -> Any:
    """Average channel variance (NF-ResNet paper, section 3); of a residual branch: RACV."""
    return ops.mean(signal.variance)


@statistic
def second_moment(signal: Signal) -> Any:
    """Mean of x² over everything, which is acsm + acv (NF-ResNet paper, section 3)."""
    return acsm(signal) + acv(signal)


@statistic
def mean(signal: Signal) -> Any:
    """Mean over everything."""
    return ops.mean(signal.mean)


@statistic
def norm(signal: Signal) -> Any:
    """Euclidean norm of the whole tensor, (Σ x²)^½."""
    return ops.sqrt(signal.size * second_moment(signal))


@statistic
def kurtosis(signal: Signal) -> Any:
    """Mean of ((x - mean) / std)⁴ by channel, averaged: 3 for a normal distribution, 0 for a constant channel."""
    # Standardized first: the fourth power of a small gradient is less than float32 can say.
    return ops.mean(ops.square(ops.square(signal.standardized)))


@statistic
def nonzero(signal: Signal) -> Any:
    """Share of entries that are not zero (EUNNet, IEEE Access 2023, Figure 5)."""
    return ops.mean(ops.cast(ops.not_equal(signal.entries, 0), "float32"))


@statistic
def dead(signal: Signal) -> Any:
    """Share of channels that are zero everywhere."""
    return ops.mean(ops.cast(ops.logical_and(ops.equal(signal.low, 0), ops.equal(signal.high, 0)), "float32"))


@statistic
def saturated(signal: Signal) -> Any:
    """Share of a sample's entries within 1 % of the channel's range from its ends: a sigmoid or tanh that is stuck."""
    middle, reach = (signal.high + signal.low) / 2, 0.49 * (signal.high - signal.low)
    return ops.mean(ops.cast(ops.abs(signal.sample - middle) >= reach, "float32"))


@statistic
def histogram(signal: Signal) -> Any:
    """Share of entries in each of the fixed bins of `edges`, of a sample of some 16,000 entries."""
    bins = ops.reshape(_bins(signal.sample), (-1,))
    counts = ops.segment_sum(ops.ones_like(bins, dtype="float32"), bins, len(edges()) + 1)
    return counts / ops.sum(counts)


@statistic
def channel_histogram(signal: Signal) -> Any:
    """Share of a channel's entries in each of the fixed bins of `edges`, a list for each channel, of all entries."""
    number, channels = len(edges()) + 1, signal.entries.shape[1]
    bins = ops.reshape(_bins(signal.entries) + number * ops.arange(channels, dtype="int32"), (-1,))
    counts = ops.segment_sum(ops.ones_like(bins, dtype="float32"), bins, number * channels)
    counts = ops.reshape(counts, (channels, number))
    return counts / ops.sum(counts, axis=1, keepdims=True)


def _bins(x: Any) -> Any:
    """Index of the bin of each entry: 0 the most negative, the middle one for what is about zero."""
    most = len(edges()) // 2
    # What is below the least edge is floored to -1, and so to the middle.
    magnitude = ops.maximum(ops.abs(x), 0.5 * 10.0 ** _DECADES[0])
    index = ops.floor(ops.log(magnitude) * (_PER_DECADE / math.log(10)) + (1 - _PER_DECADE * _DECADES[0]))
    return ops.cast(ops.minimum(ops.maximum(index, 0), most) * ops.sign(x), "int32") + most


def resolve(names: str | Sequence[str]) -> tuple[str, ...]:
    """Names of statistics: "default", "all" (but for the histograms of every channel), or some of `STATS`.

    Raises:
        ValueError: for a name that is not in the table.
    """
    if isinstance(names, str):
        every = tuple(name for name in STATS if name != "channel_histogram")
        names = {"default": DEFAULT, "all": every}.get(names, (names,))
    if unknown := set(names) - STATS.keys():
        raise ValueError(f'Expected statistics "default", "all", or some of {", ".join(STATS)}. Received: {unknown}')
    return tuple(names)


def definitions(names: Sequence[str], definition: str = "channel") -> dict[str, str]:
    """What each statistic is, in a sentence.

    Example:
        >>> definitions(["mean"])
        {'mean': 'Mean over everything.'}
    """
    told = {name: ((STATS[name].__doc__ or "").strip().splitlines() or [""])[0] for name in names}
    if definition == "poster" and "acsm" in told:
        told["acsm"] += " Of weights and of tensors of rank 2 or less, as in the poster: the mean of x²."
    return told


def statistics(x: Any, axes=None, definition: str = "channel", flat: bool = False, names=DEFAULT) -> dict[str, Any]:
    """The statistics of one tensor.

    Args:
        x: any tensor.
        axes: axes within a channel; default: all but the last.
        definition: "channel", or "poster" (see the module).
        flat: whether the poster's definition takes this tensor as one vector.
        names: which ones, of `STATS`.

    Example:
        >>> {k: float(v) for k, v in statistics(np.array([[1.0, 3.0], [1.0, 5.0]])).items()}
        {'acsm': 8.5, 'acv': 0.5, 'second_moment': 9.0}
    """
    x = ops.convert_to_tensor(x)
    if keras.backend.standardize_dtype(x.dtype) in ("float16", "bfloat16"):
        x = ops.cast(x, "float32")
    everything = tuple(range(len(x.shape)))
    poster = definition == "poster" and flat
    signal = Signal(x, everything if poster else everything[:-1] if axes is None else axes)
    result = {name: STATS[name](signal) for name in names}
    if poster and "acsm" in result:
        result["acsm"] = second_moment(signal)
    return result
