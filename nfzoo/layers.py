"""Keras layers that normalizer-free networks need and Keras lacks.

Every layer is registered under the package name "nfzoo": a saved model loads after `import nfzoo` alone.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import keras
from keras import ops

from nfzoo import numerics

register = keras.saving.register_keras_serializable(package="nfzoo")
EpsilonMode = Literal["clamp", "add"]


def standardize(kernel: Any, axes: Sequence[int], gain: Any = None, epsilon: float = 1e-4, mode: str = "clamp") -> Any:
    """Scaled weight standardization: zero mean and unit norm over the fan-in of each unit.

    W_hat = gain * (W - mean) / sqrt(N * var), mean and population variance over `axes`, N = number of entries there.

    Args:
        kernel: any shape.
        axes: the fan-in axes: (0, 1, 2) for a Conv2D kernel (H, W, in / groups, out), (0, 1) for a depthwise kernel
            (H, W, channels, multiplier).
        gain: None, or a tensor that broadcasts against the kernel.
        epsilon: guard against a constant kernel.
        mode: "clamp" divides by sqrt(max(N * var, epsilon)) as DeepMind's code, "add" by sqrt(N * (var + epsilon)) as
            timm's. They differ by several percent at usual fan-ins.

    Returns:
        The effective kernel, shape of `kernel`.

    References: NF-ResNet paper (arXiv 2101.08692), section 4; NFNet paper (arXiv 2102.06171), equation 1.
    """
    fan_in = math.prod(kernel.shape[axis] for axis in axes)
    mean = ops.mean(kernel, axis=axes, keepdims=True)
    centred = kernel - mean
    variance = ops.mean(ops.square(centred), axis=axes, keepdims=True)
    if mode == "clamp":
        scale = ops.rsqrt(ops.maximum(variance * fan_in, epsilon))
    elif mode == "add":
        scale = ops.rsqrt((variance + epsilon) * fan_in)
    else:
        raise ValueError(f'Expected mode to be "clamp" or "add". Received: mode={mode!r}')
    return centred * (scale if gain is None else scale * gain)


class _ScaledStd:
    """What the two weight-standardized convolutions share: the gain, its storage and the arithmetic in float32."""

    fan_in_axes: tuple[int, ...]

    def _init_standardization(self, epsilon: float, epsilon_mode: str) -> None:
        if epsilon_mode not in ("clamp", "add"):
            raise ValueError(f'Expected epsilon_mode to be "clamp" or "add". Received: epsilon_mode={epsilon_mode!r}')
        self.epsilon, self.epsilon_mode = epsilon, epsilon_mode

    def add_weight(self, *args, name=None, **kwargs):
        # Kernel statistics in half precision would be noise: keep these variables in float32 under mixed policies.
        if name in ("kernel", "gain"):
            kwargs["autocast"] = False
        return super().add_weight(*args, name=name, **kwargs)

    def build(self, input_shape) -> None:
        super().build(input_shape)
        units = math.prod(n for axis, n in enumerate(self.kernel.shape) if axis not in self.fan_in_axes)
        self.gain = self.add_weight(name="gain", shape=(units,), initializer="ones")

    def effective_kernel(self) -> Any:
        """The standardized kernel that the convolution uses, float32, shape of the kernel."""
        shape = [1 if axis in self.fan_in_axes else n for axis, n in enumerate(self.kernel.shape)]
        gain = ops.reshape(self.gain, shape)
        return standardize(self.kernel, self.fan_in_axes, gain, self.epsilon, self.epsilon_mode)

    # Keras' convolutions list the variables to store by hand and would lose the gain.
    def save_own_variables(self, store) -> None:
        keras.layers.Layer.save_own_variables(self, store)

    def load_own_variables(self, store) -> None:
        keras.layers.Layer.load_own_variables(self, store)

    def get_config(self) -> dict:
        return {**super().get_config(), "epsilon": self.epsilon, "epsilon_mode": self.epsilon_mode}


@register
class ScaledStdConv2D(_ScaledStd, keras.layers.Conv2D):
    """2D convolution with scaled weight standardization and a learnable gain per output channel (init 1).

    Args:
        epsilon, epsilon_mode: see `standardize`.
        **kwargs: of `keras.layers.Conv2D`. Grouped convolutions standardize over their own fan-in.

    Input shape: (batch, height, width, in). Output shape: as `keras.layers.Conv2D`.

    References: NFNet paper (arXiv 2102.06171), equation 1 and section 3.
    """

    fan_in_axes = (0, 1, 2)

    def __init__(self, *args, epsilon: float = 1e-4, epsilon_mode: EpsilonMode = "clamp", **kwargs):
        super().__init__(*args, **kwargs)
        self._init_standardization(epsilon, epsilon_mode)

    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, ops.cast(self.effective_kernel(), self.compute_dtype))


@register
class ScaledStdDepthwiseConv2D(_ScaledStd, keras.layers.DepthwiseConv2D):
    """Depthwise convolution with scaled weight standardization; each channel has its own statistics over (H, W).

    Args:
        epsilon, epsilon_mode: see `standardize`.
        **kwargs: of `keras.layers.DepthwiseConv2D`.

    Input shape: (batch, height, width, channels). Output shape: as `keras.layers.DepthwiseConv2D`.
    """

    fan_in_axes = (0, 1)

    def __init__(self, *args, epsilon: float = 1e-4, epsilon_mode: EpsilonMode = "clamp", **kwargs):
        super().__init__(*args, **kwargs)
        self._init_standardization(epsilon, epsilon_mode)

    def call(self, inputs):
        kernel = ops.cast(self.effective_kernel(), self.compute_dtype)
        outputs = ops.depthwise_conv(inputs, kernel, self.strides, self.padding, dilation_rate=self.dilation_rate)
        return outputs + self.bias if self.use_bias else outputs


@register
class Merge(keras.layers.Layer):
    """Merge a residual branch into its stream: a * skip + b * (g * branch + beta).

    Args:
        skip_scale: the constant a.
        branch_scale: the constant b.
        gain: initial value of the learnable scalar g; None for none (g = 1).
        bias: initial value of the learnable scalar beta; None for none.

    Input shape: two tensors of one shape, (skip, branch). Output shape: the same.

    Example:
        >>> import numpy as np
        >>> float(Merge(skip_scale=1.0, branch_scale=0.2, gain=0.0)([np.ones((1, 1)), np.ones((1, 1))])[0, 0])
        1.0

    References: SkipInit (arXiv 2002.10444), section 3; NFNet paper, section 3; EDM2 (arXiv 2312.02696), equation 88.
    """

    def __init__(
        self, skip_scale=1.0, branch_scale=1.0, gain: float | None = None, bias: float | None = None, **kwargs
    ):
        super().__init__(**kwargs)
        self.skip_scale, self.branch_scale = skip_scale, branch_scale
        self.gain_init, self.bias_init = gain, bias

    def build(self, input_shape) -> None:
        def scalar(name, value):
            return self.add_weight(name=name, shape=(), initializer=keras.initializers.Constant(value))

        self.gain = None if self.gain_init is None else scalar("gain", self.gain_init)
        self.bias = None if self.bias_init is None else scalar("bias", self.bias_init)

    def call(self, inputs):
        skip, branch = inputs
        if self.gain is not None:
            branch = branch * self.gain
        if self.bias is not None:
            branch = branch + self.bias
        if self.skip_scale != 1.0:
            skip = skip * self.skip_scale
        if self.branch_scale != 1.0:
            branch = branch * self.branch_scale
        return skip + branch

    def compute_output_shape(self, input_shape):
        return input_shape[0]

    def get_config(self) -> dict:
        scales = {"skip_scale": self.skip_scale, "branch_scale": self.branch_scale}
        return {**super().get_config(), **scales, "gain": self.gain_init, "bias": self.bias_init}


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


@register
class ScaledActivation(keras.layers.Layer):
    """gamma * g(x): an activation that keeps unit variance for a standard normal input.

    Args:
        activation: name of a Keras activation with a tabulated gain, see `nfzoo.numerics.gamma`.

    References: NFNet paper (arXiv 2102.06171), section 3, equation 2.
    """

    def __init__(self, activation: str, **kwargs):
        super().__init__(**kwargs)
        self.activation, self.scale = activation, numerics.gamma(activation)
        self._function = keras.activations.get(activation)

    def call(self, inputs):
        return self._function(inputs) * self.scale

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self) -> dict:
        return {**super().get_config(), "activation": self.activation}


@register
class StochasticDepth(keras.layers.Layer):
    """Drop the whole branch of an example with probability `rate` while training.

    Args:
        rate: in [0, 1).
        rescale: divide survivors by 1 - rate (timm, Keras); DeepMind's networks do not.
        seed: of the random stream.

    Input shape: any, batch first. Output shape: the same.

    References: Huang et al. 2016 (arXiv 1603.09382).
    """

    def __init__(self, rate: float, rescale: bool = True, seed: int | None = None, **kwargs):
        super().__init__(**kwargs)
        if not 0 <= rate < 1:
            raise ValueError(f"Expected rate in [0, 1). Received: rate={rate}")
        self.rate, self.rescale, self.seed = rate, rescale, seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, inputs, training=False):
        if not training or self.rate == 0:
            return inputs
        shape = (ops.shape(inputs)[0],) + (1,) * (len(inputs.shape) - 1)
        keep = keras.random.uniform(shape, seed=self.seed_generator) >= self.rate
        return inputs * ops.cast(keep, inputs.dtype) / (1 - self.rate if self.rescale else 1)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self) -> dict:
        return {**super().get_config(), "rate": self.rate, "rescale": self.rescale, "seed": self.seed}


@register
class Tap(keras.layers.Layer):
    """The identity, to give a tensor a name where the science needs one (signal propagation plots)."""

    def call(self, inputs):
        return inputs

    def compute_output_shape(self, input_shape):
        return input_shape
