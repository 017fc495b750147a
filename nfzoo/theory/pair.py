"""The joint distribution of two pixels of a channel, on a grid: for sums that are far from normal.

A post-activation network adds to its stream what an activation has cut off: a rectified value plus a normal one, then
rectified again. Mean, ACSM and ACV do not tell such a distribution; this does. NumPy only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

POINTS, WIDTH = 201, 8.0
_Z = np.linspace(-9, 9, 9001)
_CDF = np.array([math.erfc(-z / math.sqrt(2)) / 2 for z in _Z])


def cdf(z: np.ndarray) -> np.ndarray:
    """Distribution function of the standard normal."""
    return np.interp(z, _Z, _CDF)


def normal_nodes(spread: float, points: int = 41, limit: float = 5.0) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of a normal distribution of mean 0 and standard deviation `spread`."""
    z = np.linspace(-limit, limit, points) if spread else np.zeros(1)
    density = np.exp(-(z**2) / 2)
    return spread * z, density / density.sum()


@dataclass(frozen=True)
class Pair:
    """Two pixels of one channel.

    Attributes:
        values: (n,) equidistant values. weight: (n, n) probability of each pair of values; symmetric.
    """

    values: np.ndarray
    weight: np.ndarray

    @classmethod
    def normal(cls, mean: float, spread: float, std: float) -> "Pair":
        """Normal values of standard deviation `std` around channel means N(mean, spread^2)."""
        return cls(np.array([mean]), np.ones((1, 1))).plus(spread, std)

    def plus(self, spread: float, std: float, factor: float = 1.0) -> "Pair":
        """The pair of factor * x + y, y normal with standard deviation `std` around channel means N(0, spread^2)."""
        values, total = factor * self.values, math.hypot(spread, std)
        if not total:
            return Pair(values, self.weight)
        marginal = self.weight.sum(axis=0)
        mean = marginal @ values
        width = WIDTH * math.sqrt(marginal @ (values - mean) ** 2 + total**2)
        low, high = max(values[0] - WIDTH * total, mean - width), min(values[-1] + WIDTH * total, mean + width)
        grid = np.linspace(low, high, POINTS)
        edges = np.concatenate([[-math.inf], (grid[1:] + grid[:-1]) / 2, [math.inf]])
        weight = np.zeros((POINTS, POINTS))
        for shift, share in zip(*normal_nodes(spread, 21), strict=True):
            move = np.diff(cdf((edges[:, None] - values - shift) / max(std, 1e-12 * total)), axis=0)
            weight += share * move @ self.weight @ move.T
        return Pair(grid, weight)

    def through(self, function: Callable[[np.ndarray], np.ndarray]) -> "Pair":
        """The pair of function(x); a value between two of the grid is shared between them."""
        image = function(self.values)
        grid = np.linspace(image.min(), image.max(), POINTS) if np.ptp(image) else image[:1]
        step = grid[1] - grid[0] if len(grid) > 1 else 1.0
        move = np.maximum(0.0, 1 - np.abs(grid[:, None] - image) / step)
        return Pair(grid, move @ self.weight @ move.T)

    def with_zeros(self, kept: float) -> "Pair":
        """The pair where only a share `kept` of the channels has these values, and the others are zero."""
        grid = np.append(self.values, 0.0)
        weight = np.pad(kept * self.weight, (0, 1))
        weight[-1, -1] = 1 - kept
        order = np.argsort(grid)
        return Pair(grid[order], weight[np.ix_(order, order)])

    def moments(self) -> tuple[float, float, float, float]:
        """Mean, ACSM, ACV, and the share of values that are not zero."""
        marginal, acsm = self.weight.sum(axis=0), self.values @ self.weight @ self.values
        zero = marginal[np.abs(self.values) < 1e-9 * max(np.ptp(self.values), 1e-300)].sum()
        return marginal @ self.values, acsm, marginal @ self.values**2 - acsm, 1 - zero
