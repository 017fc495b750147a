"""Activations of known gain, and the gate that closes an attention unit."""

from collections.abc import Callable

import keras
from keras import ops

from nfzoo import numerics
from nfzoo.layers.registration import register


@register
def gelu_tanh(x):
    """GELU in its tanh approximation, which jax.nn.gelu takes by default and DeepMind's networks use."""
    return ops.gelu(x, approximate=True)


@register
def leaky_relu_001(x):
    """Leaky ReLU with a slope of 0.01, JAX's, PyTorch's and that of the tabulated gain; Keras' own has 0.2."""
    return ops.leaky_relu(x, negative_slope=0.01)


_OWN = {"gelu_tanh": gelu_tanh, "leaky_relu": leaky_relu_001}


def activation_function(name: str) -> Callable:
    """The activation function of a name: Keras' own names, and those of `nfzoo.numerics.gamma`.

    Example:
        >>> activation_function("gelu_tanh") is gelu_tanh
        True
    """
    return _OWN.get(name) or keras.activations.get(numerics.ALIASES.get(name, name))


@register
class ScaledActivation(keras.layers.Layer):
    """gamma * g(x): an activation that keeps unit variance for a standard normal input.

    Args:
        activation: name of an activation with a tabulated gain, see `nfzoo.numerics.gamma`.

    Example:
        >>> import numpy as np
        >>> z = np.random.default_rng(0).standard_normal((100_000, 1)).astype("float32")
        >>> round(float(np.var(ScaledActivation("relu")(z))), 1)
        1.0

    References: NFNet paper (arXiv 2102.06171), section 3.
    """

    def __init__(self, activation: str, **kwargs):
        super().__init__(**kwargs)
        self.activation, self.scale = activation, numerics.gamma(activation)
        self._function = activation_function(activation)

    def call(self, inputs):
        return self._function(inputs) * self.scale

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self) -> dict:
        return {**super().get_config(), "activation": self.activation}


@register
class Gate(keras.layers.Layer):
    """Close a squeeze-excite unit: scale the channels of a map by the sigmoid of its gate.

    With s = sigmoid(gate): gain * s * x, or, magnitude preserving, x * s / sqrt((1 - s)^2 + s^2).

    Args:
        gain: 2 keeps the magnitude of a gate near one half (NFNet paper, appendix C); 1 is the usual unit.
        magnitude_preserving: use the second form (the poster's MP squeeze-excite); its denominator is at least 1e-5.

    Input shape: map (batch, height, width, channels) and gate logits (batch, channels). Output shape: the map's.

    Example:
        >>> import numpy as np
        >>> x, logits = np.ones((1, 1, 1, 1), "float32"), np.zeros((1, 1), "float32")
        >>> round(float(Gate(magnitude_preserving=True)([x, logits])[0, 0, 0, 0]), 6)
        0.707107
    """

    def __init__(self, gain: float = 1.0, magnitude_preserving: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.gain, self.magnitude_preserving = gain, magnitude_preserving

    def call(self, inputs):
        x, logits = inputs
        scale = ops.sigmoid(logits)
        if self.magnitude_preserving:
            norm = ops.sqrt(ops.square(1.0 - scale) + ops.square(scale))
            scale = scale / ops.maximum(norm, 1e-5)
        if self.gain != 1.0:
            scale = scale * self.gain
        return x * scale[:, None, None, :]

    def compute_output_shape(self, input_shape):
        return input_shape[0]

    def get_config(self) -> dict:
        return {**super().get_config(), "gain": self.gain, "magnitude_preserving": self.magnitude_preserving}
