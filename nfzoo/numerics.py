"""Pure numbers behind the zoo: activation gains, residual variances, initialisation scales, channel rounding.

NumPy only, so that every constant can be checked without building a network. References: De & Smith 2020
(arXiv 2002.10444), Brock et al. 2021a (NF-ResNet, arXiv 2101.08692), Brock et al. 2021b (NFNet, arXiv 2102.06171),
Klambauer et al. 2017 (SELU, arXiv 1706.02515), Tan & Le 2019 (EfficientNet, arXiv 1905.11946).
"""

import math
from collections.abc import Callable, Iterable

import numpy as np

SELU_LAMBDA = 1.0507009873554805
SELU_ALPHA = 1.6732632423543772

# Multipliers that bring Var[g(z)], z ~ N(0, 1), to 1. The digits are the references' Monte-Carlo estimates (DeepMind's
# nfnets and timm print the same ones): converted checkpoints need exactly these, `gain` gives the analytic value.
GAMMA: dict[str, float] = {
    "linear": 1.0,
    "celu": 1.270926833152771,
    "elu": 1.2716004848480225,
    "gelu": 1.7015043497085571,
    "leaky_relu": 1.70590341091156,
    "log_sigmoid": 1.9193484783172607,
    "relu": 1.7139588594436646,
    "relu6": 1.7131484746932983,
    "selu": 1.0008515119552612,
    "sigmoid": 4.803835391998291,
    "silu": 1.7881293296813965,
    "softsign": 2.338853120803833,
    "softplus": 1.9203323125839233,
    "tanh": 1.5939117670059204,
}
ALIASES = {"swish": "silu", "gelu_tanh": "gelu", "identity": "linear", "soft_sign": "softsign"}


def gamma(activation: str) -> float:
    """Look up the references' gain of an activation, gamma = Var[g(z)]^(-1/2).

    Args:
        activation: a key of `GAMMA`, or one of the aliases "swish", "identity", "soft_sign".

    Raises:
        ValueError: for an activation without a tabulated gain.

    Example:
        >>> round(gamma("relu"), 4)
        1.714

    References: NFNet paper, section 3.
    """
    key = ALIASES.get(activation, activation)
    if key not in GAMMA:
        raise ValueError(
            f"Expected an activation with a known gain, one of {sorted(GAMMA)}. Received: activation={activation!r}. "
            "Compute another one with nfzoo.numerics.gain(function)."
        )
    return GAMMA[key]


def gain(function: Callable[[np.ndarray], np.ndarray], points: int = 200_001, limit: float = 12.0) -> float:
    """Compute Var[g(z)]^(-1/2) for z ~ N(0, 1) by the trapezoidal rule on [-limit, limit].

    Example:
        >>> round(gain(lambda z: np.maximum(z, 0)), 5)  # sqrt(2 / (1 - 1/pi))
        1.71286
    """
    z = np.linspace(-limit, limit, points)
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    value = function(z)
    mean = np.trapezoid(value * density, z)
    return float(np.trapezoid((value - mean) ** 2 * density, z) ** -0.5)


def residual_std(merges: int, alpha: float) -> float:
    """Expected standard deviation of a stream after `merges` additions of alpha times a unit-variance branch.

    sqrt(1 + merges * alpha^2); the branch entrance divides by it (NFNet paper, section 3).

    Example:
        >>> [round(residual_std(k, 0.2), 6) for k in range(3)]
        [1.0, 1.019804, 1.03923]
    """
    return math.sqrt(1.0 + merges * alpha**2)


def magnitude_preserving_weights(t: float = 0.5) -> tuple[float, float]:
    """Weights of a magnitude-preserving sum: (1 - t, t) / sqrt((1 - t)^2 + t^2), for (skip, branch).

    Two independent inputs of variance v give a sum of variance v (EDM2, arXiv 2312.02696, equation 88).

    Example:
        >>> [round(w, 4) for w in magnitude_preserving_weights()]
        [0.7071, 0.7071]
    """
    norm = math.hypot(1 - t, t)
    return (1 - t) / norm, t / norm


def init_std(scheme: str, receptive: int, inputs: int, outputs: int, groups: int = 1) -> float:
    """Standard deviation of the zero-mean normal that a kernel starts from.

    Schemes (k = receptive field, the number of kernel positions):

    - "lecun": 1 / fan_in, with fan_in = k * inputs / groups (a depthwise kernel has fan_in k);
    - "he": 2 / fan_in;
    - "he_fan_out": 2 / fan_out, with fan_out = k * outputs / groups;
    - "poster": 2 / (k * outputs), not divided by the groups. This is what the poster's baselines ran with: each
      depthwise layer multiplies the variance by about 2 / channels, so a network without normalisation fades.

    Example:
        >>> init_std("lecun", receptive=9, inputs=32, outputs=32, groups=32)  # depthwise 3x3
        0.3333333333333333
    """
    fan_in = receptive * inputs / groups
    variances = {
        "lecun": 1 / fan_in,
        "he": 2 / fan_in,
        "he_fan_out": 2 * groups / (receptive * outputs),
        "poster": 2 / (receptive * outputs),
    }
    if scheme not in variances:
        raise ValueError(f"Expected init to be one of {sorted(variances)}. Received: init={scheme!r}")
    return math.sqrt(variances[scheme])


def fixup_factor(blocks: int, convs: int) -> float:
    """Factor L^(-1 / (2 m - 2)) of the initial weights in a branch of m layers, for L residual blocks.

    Example:
        >>> round(fixup_factor(54, 2), 6), fixup_factor(16, 3)  # ResNet-110 for CIFAR, ResNet-50
        (0.136083, 0.5)

    References: Fixup (arXiv 1901.09321), section 3, rule 2.
    """
    return blocks ** (-1 / (2 * convs - 2))


def rescale_weights(block: int, blocks: int) -> tuple[float, float]:
    """RescaleNet's weights of skip and branch for the 0-based block j of L: sqrt((L - 1 + j) / (L + j)), L^(-1/2).

    The branch's own weights are shrunk by `rescale_factor` per convolution, so that the squares of both effective
    weights sum to 1. (The published code; the paper counts j from 1.)

    Example:
        >>> [round(w, 6) for w in rescale_weights(15, 16)]
        [0.983739, 0.25]
    """
    return math.sqrt((blocks - 1 + block) / (blocks + block)), blocks**-0.5


def rescale_factor(block: int, blocks: int, convs: int) -> float:
    """Factor (L / (L + j))^(1 / (2 m)) of the initial weights of each of the m convolutions in block j of L.

    Example:
        >>> round(rescale_factor(15, 16, 3), 6)
        0.895625
    """
    return (blocks / (blocks + block)) ** (1 / (2 * convs))


def drop_path_rates(rate: float, blocks: int, rule: str) -> list[float]:
    """Rates of stochastic depth per block, growing linearly with depth from 0.

    "timm" reaches `rate` at the last block; "keras" and "deepmind" divide by the number of blocks and stay below.

    Example:
        >>> drop_path_rates(0.2, 2, "timm"), drop_path_rates(0.2, 2, "deepmind")
        ([0.0, 0.2], [0.0, 0.1])
    """
    if rule not in ("timm", "keras", "deepmind"):
        raise ValueError(f'Expected drop_path_rule to be "timm", "keras" or "deepmind". Received: {rule!r}')
    last = max(1, blocks - 1) if rule == "timm" else blocks
    return [rate * number / last for number in range(blocks)]


def eca_kernel(channels: int) -> int:
    """Kernel size of efficient channel attention: the odd number at or above |log2(C) + 1| / 2, at least 3.

    Example:
        >>> [eca_kernel(c) for c in (256, 1536, 2048)]
        [5, 5, 7]

    References: Wang et al. 2020 (arXiv 1910.03151), equation 12.
    """
    size = int(abs(math.log2(channels) + 1) / 2)
    return max(size if size % 2 else size + 1, 3)


def round_channels(channels: float, divisor: int = 8, limit: float = 0.9) -> int:
    """Round a width to a multiple of `divisor`, never below `limit` of it (EfficientNet, MobileNet rule).

    Example:
        >>> [round_channels(c * 1.2) for c in (16, 24, 40)]
        [24, 32, 48]
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= limit * channels else rounded + divisor


def round_repeats(repeats: Iterable[int], depth: float) -> tuple[int, ...]:
    """Scale the number of blocks of each stage, rounding up (EfficientNet)."""
    return tuple(math.ceil(depth * r) for r in repeats)
