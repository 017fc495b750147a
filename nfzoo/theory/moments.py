"""Moments of a map, and what a randomly initialised layer does to them.

In expectation over zero-mean weights a linear layer multiplies the average channel squared mean and the average channel
variance of its input, exactly; an activation acts on values that are taken as normal around channel means that are
normal themselves. This is the mean-field theory of Poole et al. 2016 (arXiv 1606.05340) and Schoenholz et al. 2017
(arXiv 1611.01232), with two inputs that share a channel mean in place of two inputs of a network: ACSM is their
covariance, ACSM + ACV their second moment. Pixels are taken as independent, as in an image of white noise. NumPy only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from nfzoo import numerics
from nfzoo.theory.pair import Pair, cdf, normal_nodes

# A squared mean that is this much smaller than the mean square is zero but for the error of quadrature.
QUADRATURE = 1e-9

FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "linear": lambda z: z,
    "relu": lambda z: np.maximum(z, 0),
    "relu6": lambda z: np.clip(z, 0, 6),
    "leaky_relu": lambda z: np.where(z > 0, z, 0.01 * z),
    "elu": lambda z: np.where(z > 0, z, np.expm1(np.minimum(z, 0))),
    "celu": lambda z: np.where(z > 0, z, np.expm1(np.minimum(z, 0))),
    "selu": lambda z: numerics.SELU_LAMBDA * np.where(z > 0, z, numerics.SELU_ALPHA * np.expm1(np.minimum(z, 0))),
    "gelu": lambda z: z * cdf(z),
    "gelu_tanh": lambda z: z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2,
    "sigmoid": lambda z: (1 + np.tanh(z / 2)) / 2,
    "silu": lambda z: z * (1 + np.tanh(z / 2)) / 2,
    "hard_sigmoid": lambda z: np.clip(z / 6 + 0.5, 0, 1),
    "hard_silu": lambda z: z * np.clip(z / 6 + 0.5, 0, 1),
    "mish": lambda z: z * np.tanh(np.logaddexp(z, 0)),
    "log_sigmoid": lambda z: -np.logaddexp(-z, 0),
    "softplus": lambda z: np.logaddexp(z, 0),
    "softsign": lambda z: z / (1 + np.abs(z)),
    "tanh": np.tanh,
}


class UnknownFunction(ValueError):
    """An activation of which the theory knows no more than its name."""


def function_of(activation: str) -> Callable[[np.ndarray], np.ndarray]:
    """The function of a name.

    Example:
        >>> function_of("swish") is function_of("silu")
        True
    """
    if activation not in FUNCTIONS:
        activation = numerics.ALIASES.get(activation, activation)
    if activation not in FUNCTIONS:
        raise UnknownFunction(
            f"Expected an activation that the theory knows: {', '.join(sorted(FUNCTIONS))}. Received: {activation!r}"
        )
    return FUNCTIONS[activation]


@dataclass(frozen=True)
class Moments:
    """What the theory knows of a map.

    Attributes:
        shape: (batch, height, width, channels) or (batch, units), as of a tensor; a side that is None is so large that
            its borders do not count.
        mean: over everything. acsm, acv: average channel squared mean and variance; their sum is the mean of x^2.
        nonzero: share of values that are not zero.
        sides: for height and for width, the mean of x^2 by position over that of the map: zero padding takes from
            the borders.
        source: the map and the activation that made this one, as long as no other layer came after.
        pair: distribution of two pixels of a channel, where it is not taken as normal.
        scatter: share of acv that the mean over a batch of n pixels scatters by, over n: 0 after batch normalization,
            which subtracts that very mean.

    Example:
        >>> noise = Moments((1, None, None, 8))
        >>> noise.second_moment, noise.scaled(2.0).acv
        (1.0, 4.0)
    """

    shape: tuple
    mean: float = 0.0
    acsm: float = 0.0
    acv: float = 1.0
    nonzero: float = 1.0
    sides: tuple[np.ndarray, ...] = field(default=(), compare=False, repr=False)
    source: "tuple[Moments, Callable] | None" = field(default=None, compare=False, repr=False)
    pair: Pair | None = field(default=None, compare=False, repr=False)
    scatter: float = field(default=1.0, repr=False)

    def __post_init__(self):
        if not self.sides:
            object.__setattr__(self, "sides", tuple(np.ones(side or 1) for side in self.shape[1:-1]))
        if self.acsm < QUADRATURE * self.second_moment:
            object.__setattr__(self, "acsm", 0.0)

    @property
    def second_moment(self) -> float:
        return self.acsm + self.acv

    @property
    def spread(self) -> float:
        """Standard deviation of the channel means."""
        return math.sqrt(max(self.acsm - self.mean**2, 0.0))

    def like(self, mean: float, acsm: float, acv: float, nonzero: float = 1.0, **other) -> "Moments":
        """A map of the same shape."""
        return Moments(self.shape, mean, acsm, acv, nonzero, self.sides, **other)

    def scaled(self, factor: float) -> "Moments":
        """The moments of factor * x, for a factor that is not negative."""
        square, source, pair = factor**2, None, None
        if factor and self.source:
            before, function = self.source
            source = before, lambda z: factor * function(z)
        if factor and self.pair:
            pair = Pair(factor * self.pair.values, self.pair.weight)
        return self.like(
            factor * self.mean, square * self.acsm, square * self.acv, self.nonzero if factor else 0.0,
            source=source, pair=pair, scatter=self.scatter,
        )  # fmt: skip

    def plus(self, other: "Moments", own: float = 1.0, others: float = 1.0) -> "Moments":
        """The moments of own * x + others * y, where y is an independent map of random weights."""
        mean, pair = own * self.mean + others * other.mean, self.joint()
        acsm = own**2 * self.acsm + others**2 * other.acsm + 2 * own * others * self.mean * other.mean
        acv = own**2 * self.acv + others**2 * other.acv
        zero = (1 - self.nonzero if own else 1) * (1 - other.nonzero if others and other.acv else 1)
        mine, theirs = own**2 * self.second_moment, others**2 * other.second_moment
        share = mine / (mine + theirs) if mine + theirs else 1.0
        sides = tuple(share * a + (1 - share) * b for a, b in zip(self.sides, other.sides, strict=True))
        if pair:
            pair = pair.plus(abs(others) * other.spread, abs(others) * math.sqrt(other.acv), own)
        found = own**2 * self.acv * self.scatter + others**2 * other.acv * other.scatter
        scatter = found / acv if acv else 1.0
        return Moments(self.shape, mean, acsm, acv, 1 - zero, sides, pair=pair, scatter=scatter)

    def joint(self) -> Pair | None:
        """The pair of an activated map; None for one that is taken as normal."""
        if self.pair or not self.source:
            return self.pair
        before, function = self.source
        pair = before.joint() or Pair.normal(before.mean, before.spread, math.sqrt(before.acv))
        return pair.through(function)

    def padded(self, channels: int) -> "Moments":
        """The moments with channels of zeros appended, up to `channels`."""
        kept, pair = self.shape[-1] / channels, self.joint()
        moments = [getattr(self, key) * kept for key in ("mean", "acsm", "acv", "nonzero")]
        return Moments((*self.shape[:-1], channels), *moments, self.sides, pair=pair.with_zeros(kept) if pair else None)

    def strided(self, stride: int, **moments) -> "Moments":
        """The map at every `stride`-th pixel; `moments` replace those that change."""
        sides = [side if side is None else -(-side // stride) for side in self.shape[1:-1]]
        shape = (self.shape[0], *sides, self.shape[-1])
        moments = {"scatter": _sampled(self.scatter, stride)} | moments
        return replace(self, shape=shape, sides=tuple(a[::stride] / a[::stride].mean() for a in self.sides), **moments)

    def pooled(self) -> "Moments":
        """The moments of the mean over height and width, one value per example and channel."""
        sides = self.shape[1:-1]
        acv = 0.0 if None in sides else self.acv / math.prod(sides)
        return Moments((self.shape[0], self.shape[-1]), self.mean, self.acsm, acv, scatter=self.scatter)


def _sampled(scatter: float, stride: int) -> float:
    """The scatter of every `stride`-th pixel, whose mean is no longer that of all."""
    return 1 - (1 - scatter) / stride**2


def windows(side: int | None, kernel: int, stride: int, padding: str) -> tuple[int | None, np.ndarray, np.ndarray]:
    """What a kernel meets along one side of a map.

    Args:
        side: pixels; None for a map without borders.
        padding: "same" (TensorFlow: the odd pixel goes to the end) or "symmetric" ((kernel - 1) // 2 at each end).

    Returns:
        Length of the output; for each output position and tap of the kernel the pixel, and whether it is on the map.

    Example:
        >>> length, pixels, inside = windows(4, 3, 2, "same")
        >>> length, pixels.tolist(), inside.tolist()
        (2, [[0, 1, 2], [2, 3, 3]], [[True, True, True], [True, True, False]])
    """
    if side is None:
        return None, np.zeros((1, kernel), int), np.ones((1, kernel), bool)
    length = -(-side // stride)
    symmetric = padding == "symmetric" and stride > 1
    before = (kernel - 1) // 2 if symmetric else max((length - 1) * stride + kernel - side, 0) // 2
    at = np.arange(length)[:, None] * stride + np.arange(kernel) - before
    return length, at.clip(0, side - 1), (at >= 0) & (at < side)


def convolve(
    x: Moments, outputs: int, variance: float, kernel: int = 1, stride: int = 1, padding: str = "same",
    groups: int = 1, standardized: bool = False, compensated: bool = False,
) -> Moments:  # fmt: skip
    """The moments after a convolution (or, for a map of rank 2, a dense layer) with random weights.

    Args:
        outputs: channels. groups: as of `keras.layers.Conv2D`; the input's channels for a depthwise convolution.
        variance: of the weights.
        standardized: the weights of a unit sum to zero (weight standardization), so that a mean which all inputs share
            does not pass.
        compensated: each position is multiplied by sqrt(taps / taps within the map).

    Example:
        >>> after = convolve(Moments((None, None, None, 64), mean=0.4, acsm=0.16, acv=0.34), 128, 2 / 64)
        >>> after.mean, round(after.acsm, 3), round(after.acv, 3)  # He's weights double both
        (0.0, 0.32, 0.68)
    """
    lengths, sides, second, acsm, means, squares = [], [], x.second_moment, x.acsm, 1.0, 1.0
    for side, profile in zip(x.shape[1:-1], x.sides, strict=True):
        length, pixels, inside = windows(side, kernel, stride, padding)
        taken = inside.mean(axis=1) if compensated else np.ones(len(inside))
        energy = (profile[pixels] * inside).mean(axis=1) / taken
        level = np.sqrt(profile)[pixels] * inside / np.sqrt(profile).mean()  # of the mean, by position and tap
        level = level / np.sqrt(taken)[:, None]
        second *= energy.mean()
        acsm *= (level.mean(axis=0) ** 2).mean()
        means, squares = means * level.mean(), squares * (level.mean(axis=1) ** 2).mean()
        lengths.append(length)
        sides.append(energy / energy.mean())
    if standardized:
        # The weights' covariance is -1/N of their variance: what the N inputs of a unit share is subtracted.
        shared = x.acsm if groups == x.shape[-1] else x.mean**2
        acsm, second = acsm - means**2 * shared, second - squares * shared
    gain = variance * x.shape[-1] / groups * kernel ** len(sides)
    acsm, second = gain * max(float(acsm), 0.0), gain * max(float(second), 0.0)
    return Moments(
        (x.shape[0], *lengths, outputs), 0.0, acsm, max(second - acsm, 0.0), sides=tuple(sides),
        scatter=_sampled(x.scatter, stride),
    )  # fmt: skip


def activate(x: Moments, function: Callable[[np.ndarray], np.ndarray]) -> Moments:
    """The moments after an activation, the input taken as normal around normal channel means.

    Example:
        >>> after = activate(Moments((None, 100)), FUNCTIONS["relu"])
        >>> round(after.acsm, 4), round(after.acv, 4)  # 1 / 2 pi, (1 - 1 / pi) / 2
        (0.1592, 0.3408)
    """
    known = x.joint()
    if known:
        pair = known.through(function)
        return x.like(*pair.moments(), source=(x, function), pair=pair)
    moments = _activated(function, x.mean, x.spread, math.sqrt(x.acv), _levels(x.sides))
    return x.like(*moments, source=(x, function))


def _levels(sides: tuple[np.ndarray, ...], count: int = 5) -> tuple[tuple[float, float], ...]:
    """The mean of x^2 by position, over that of the map, as a few values and their shares of the map."""
    energy = np.ones(1)
    for side in sides:
        energy = np.outer(energy, side).ravel()
    if np.ptp(energy) < 1e-3:
        return ((1.0, 1.0),)
    parts = np.array_split(np.sort(energy), min(count, len(energy)))
    return tuple((float(part.mean()), len(part) / len(energy)) for part in parts)


@lru_cache(maxsize=4096)
def _activated(function: Callable, mean: float, spread: float, std: float, levels: tuple) -> tuple[float, ...]:
    """Mean, ACSM, ACV and the share that is not zero, by quadrature over values and channel means."""
    (z, share), (outer, outside) = normal_nodes(1.0, 560, 7.0), normal_nodes(spread)
    inner = std * np.concatenate([math.sqrt(level) * z for level, _ in levels])
    inside = np.concatenate([part * share for _, part in levels])
    values = function(mean + outer[:, None] + inner)
    means, squares = values @ inside, values**2 @ inside
    acsm = means**2 @ outside
    return float(means @ outside), float(acsm), float(squares @ outside - acsm), float((values != 0) @ inside @ outside)


def gate(x: Moments, logits: Moments, function: Callable[[np.ndarray], np.ndarray]) -> Moments:
    """The moments of x * function(logits), the logits one per example and channel."""
    factor = activate(logits, function)
    acsm = x.acsm * factor.acsm
    return x.like(x.mean * factor.mean, acsm, x.second_moment * factor.second_moment - acsm)


def max_pool(x: Moments, size: int, stride: int) -> Moments:
    """The moments after max-pooling: the largest of size^2 independent normal values around the channel's mean."""
    if x.source:  # an activation that grows with its input may as well come after the pooling
        return activate(max_pool(x.source[0], size, stride), x.source[1])
    z, count = np.linspace(-8, 8, 3201), size**2
    density = np.diff(cdf(z) ** count)
    z = (z[1:] + z[:-1]) / 2
    largest, variance = density @ z, density @ z**2 - (density @ z) ** 2
    level = math.prod(np.sqrt(side).mean() for side in x.sides)  # where the map is weaker, its maxima are too
    shift, flat = math.sqrt(x.acv) * largest * level, largest**2 * (1 - level**2)
    moments = {"mean": x.mean + shift, "acsm": x.acsm + 2 * shift * x.mean + shift**2, "acv": x.acv * (variance + flat)}
    return x.strided(stride, **moments, source=None, pair=None, scatter=1.0)


def average_pool(x: Moments, size: int) -> Moments:
    """The moments after the mean over size x size pixels, independent around the channel's mean."""
    return x.strided(size, acv=x.acv / size**2, source=None, pair=None, scatter=x.scatter)


def normalize(x: Moments, kind: str, channels: int = 0) -> Moments:
    """The moments after normalization to unit variance.

    Args:
        kind: "channel" (mean and variance of each channel: batch normalization), "group" (over `channels` channels
            together: group normalization), "tensor" (one mean and one variance), "centre" (subtract the mean of each
            channel only), or "l2" (divide by the norm over the channels).
    """
    if kind == "channel":
        return x.like(0.0, 0.0, 1.0, scatter=0.0)
    if kind == "centre":
        return x.like(0.0, 0.0, x.acv, scatter=0.0)
    if kind == "l2":
        return x.scaled((x.second_moment * x.shape[-1]) ** -0.5)
    if kind == "tensor":
        total = x.spread**2 + x.acv
        return x.like(0.0, x.spread**2 / total, x.acv / total)
    # The variance of a group is that of its pixels and that of its channel means, which is chi-squared.
    t = np.linspace(0, math.sqrt(channels) + 6, 1001)[1:]
    density = t ** (channels - 2) * np.exp(-(t**2) / 2) if channels > 1 else np.ones_like(t)
    of_means = (x.spread * t) ** 2 / channels if channels > 1 else np.zeros_like(t)
    acv = float(density @ (x.acv / (x.acv + of_means)) / density.sum())
    return x.like(0.0, 1 - acv, acv)
