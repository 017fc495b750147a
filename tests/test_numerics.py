import math

import numpy as np
import pytest

from nfzoo import numerics

ACTIVATIONS = {
    "relu": lambda z: np.maximum(z, 0),
    "silu": lambda z: z / (1 + np.exp(-z)),
    "tanh": np.tanh,
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "softplus": lambda z: np.logaddexp(z, 0),
    "selu": lambda z: numerics.SELU_LAMBDA * np.where(z > 0, z, numerics.SELU_ALPHA * np.expm1(np.minimum(z, 0))),
    "elu": lambda z: np.where(z > 0, z, np.expm1(np.minimum(z, 0))),
    "leaky_relu": lambda z: np.where(z > 0, z, 0.01 * z),
    "softsign": lambda z: z / (1 + np.abs(z)),
    "relu6": lambda z: np.clip(z, 0, 6),
    "linear": lambda z: z,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_tabulated_gain_is_the_analytic_one(name):
    """The references' digits are Monte-Carlo estimates up to 0.1 % high."""
    assert numerics.gamma(name) == pytest.approx(numerics.gain(ACTIVATIONS[name]), rel=1e-3)


def test_gain_of_relu_in_closed_form():
    assert numerics.gain(ACTIVATIONS["relu"]) == pytest.approx(math.sqrt(2 / (1 - 1 / math.pi)), abs=1e-6)


def test_unknown_activation_names_the_known_ones():
    with pytest.raises(ValueError, match="silu.*Received: activation='mish'"):
        numerics.gamma("mish")


@pytest.mark.parametrize("t", [0.1, 0.3, 0.5, 0.9])
def test_magnitude_preserving_weights_keep_variance(t):
    a, b = numerics.magnitude_preserving_weights(t)
    assert a**2 + b**2 == pytest.approx(1)
    assert b / a == pytest.approx(t / (1 - t))


def test_depthwise_fan_in_counts_one_channel():
    assert numerics.init_std("lecun", 9, 256, 256, groups=256) == pytest.approx(1 / 3)
    # What Keras' own initializer would take: fan_in = 9 * 256.
    assert numerics.init_std("lecun", 9, 256, 256) == pytest.approx(0.0208, abs=1e-4)


def test_poster_scheme_does_not_divide_by_groups():
    poster = numerics.init_std("poster", 9, 32, 32, groups=32)
    corrected = numerics.init_std("he_fan_out", 9, 32, 32, groups=32)
    assert poster == pytest.approx(math.sqrt(2 / (9 * 32)))
    assert corrected == pytest.approx(math.sqrt(2 / 9))


def test_unknown_scheme():
    with pytest.raises(ValueError, match="'glorot'"):
        numerics.init_std("glorot", 9, 1, 1)


def test_rounding_of_the_efficientnet_widths():
    stem = [numerics.round_channels(32 * w) for w in (1.0, 1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0)]
    assert stem == [32, 32, 32, 40, 48, 48, 56, 64]
    last = [numerics.round_channels(320 * w) for w in (1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0)]
    assert last == [320, 352, 384, 448, 512, 576, 640]
    assert numerics.round_repeats((1, 2, 2, 3, 3, 4, 1), 3.1) == (4, 7, 7, 10, 10, 13, 4)
