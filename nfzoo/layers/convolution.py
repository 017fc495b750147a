"""Convolutions: scaled weight standardization, plain and depthwise, grouped ones that are fast on a CPU, borders."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from nfzoo import backend
from nfzoo.layers.registration import register

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

    Example:
        >>> import numpy as np
        >>> kernel = np.random.default_rng(0).normal(5, 2, (3, 3, 8, 4)).astype("float32")
        >>> unit = np.asarray(standardize(kernel, axes=(0, 1, 2)))[..., 0]  # what makes one output channel
        >>> abs(float(unit.mean())) < 1e-6, round(float((unit**2).sum()), 4)
        (True, 1.0)

    References: NF-ResNet paper (arXiv 2101.08692), section 4; NFNet paper (arXiv 2102.06171), equation 1.
    """
    fan_in = math.prod(kernel.shape[axis] for axis in axes)
    if mode == "add" and tuple(axes) == tuple(range(len(axes))):  # each unit is a column of a matrix
        units = [1 if axis in axes else size for axis, size in enumerate(kernel.shape)]
        scale = ops.broadcast_to((1.0 if gain is None else gain) * ops.full((), fan_in**-0.5, kernel.dtype), units)
        columns = backend.standardize_columns(ops.reshape(kernel, (fan_in, -1)), ops.reshape(scale, (-1,)), epsilon)
        return ops.reshape(columns, kernel.shape)
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


def _check_order(layer: keras.Layer) -> None:
    if layer.data_format != "channels_last":
        raise ValueError(f'Expected data_format="channels_last" of {layer.name}. Received: {layer.data_format!r}')


@register
class Conv2D(keras.layers.Conv2D):
    """`keras.layers.Conv2D` as fast as the backend can.

    In training on a TensorFlow CPU grouped ones are 29 times as fast as Keras', 1 x 1 on small maps up to 4 times.

    Args: of `keras.layers.Conv2D`; channels last.

    Example:
        >>> import numpy as np
        >>> tuple(Conv2D(8, 3, groups=4)(np.ones((1, 5, 5, 4), "float32")).shape)
        (1, 3, 3, 8)
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _check_order(self)

    def convolution_op(self, inputs, kernel):
        return backend.conv(inputs, kernel, self.strides, self.padding, self.dilation_rate)


@register
class DepthwiseConv2D(keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D`, fast on maps smaller than its kernel too.

    Args: of `keras.layers.DepthwiseConv2D`; channels last.

    Example:
        >>> import numpy as np
        >>> tuple(DepthwiseConv2D(5, padding="same")(np.ones((1, 2, 2, 4), "float32")).shape)
        (1, 2, 2, 4)
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _check_order(self)

    def convolution_op(self, inputs, kernel):
        return backend.depthwise_conv(inputs, kernel, self.strides, self.padding, self.dilation_rate)

    def call(self, inputs):
        outputs = self.convolution_op(inputs, self.kernel)
        if self.use_bias:
            outputs = outputs + self.bias
        return outputs if self.activation is None else self.activation(outputs)


class _ScaledStd:
    """What the two weight-standardized convolutions share: the gain, its storage and the arithmetic in float32."""

    fan_in_axes: tuple[int, ...]

    def _init_standardization(self, epsilon: float, epsilon_mode: str, gamma: float, gain: float) -> None:
        if epsilon_mode not in ("clamp", "add"):
            raise ValueError(f'Expected epsilon_mode to be "clamp" or "add". Received: epsilon_mode={epsilon_mode!r}')
        self.epsilon, self.epsilon_mode, self.gamma, self.gain_init = epsilon, epsilon_mode, gamma, gain

    def add_weight(self, *args, name=None, **kwargs):
        # Kernel statistics in half precision would be noise: keep these variables in float32 under mixed policies.
        if name in ("kernel", "gain"):
            kwargs["autocast"] = False
        return super().add_weight(*args, name=name, **kwargs)

    def build(self, input_shape) -> None:
        # Keras' build ends with LoRA, after which a layer takes no more variables.
        rank, self.lora_rank = getattr(self, "lora_rank", None), None
        super().build(input_shape)
        units = math.prod(n for axis, n in enumerate(self.kernel.shape) if axis not in self.fan_in_axes)
        initial = keras.initializers.Constant(self.gain_init)
        self.gain = self.add_weight(name="gain", shape=(units,), initializer=initial)
        if rank:
            self.enable_lora(rank, lora_alpha=self.lora_alpha)

    def effective_kernel(self) -> Any:
        """The standardized kernel that the convolution uses, float32, shape of the kernel."""
        kernel = self._whole_kernel()
        shape = [1 if axis in self.fan_in_axes else n for axis, n in enumerate(kernel.shape)]
        gain = ops.reshape(self.gain, shape)
        if self.gamma != 1.0:
            gain = gain * self.gamma
        return standardize(kernel, self.fan_in_axes, gain, self.epsilon, self.epsilon_mode)

    def _whole_kernel(self) -> Any:
        """The kernel with what LoRA has learned, float32: Keras' own would be rounded under mixed policies."""
        if not getattr(self, "lora_enabled", False):
            return self.kernel
        factors = (ops.cast(part, self._kernel.dtype) for part in (self.lora_kernel_a, self.lora_kernel_b))
        return self._kernel + (self.lora_alpha / self.lora_rank) * ops.matmul(*factors)

    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, ops.cast(self.effective_kernel(), self.compute_dtype))

    # Keras' convolutions list the variables to store by hand and would lose the gain. Like theirs, the kernel is stored
    # with what LoRA has learned.
    def save_own_variables(self, store) -> None:
        if not self.built:
            return
        for number, value in enumerate((self._whole_kernel(), *self._beside_the_kernel())):
            store[str(number)] = value

    def load_own_variables(self, store) -> None:
        if not getattr(self, "lora_enabled", False):
            keras.layers.Layer.load_own_variables(self, store)
            return
        for number, variable in enumerate((self._kernel, *self._beside_the_kernel())):
            variable.assign(store[str(number)])
        for variable in (self.lora_kernel_a, self.lora_kernel_b):
            variable.assign(ops.zeros(variable.shape))

    def _beside_the_kernel(self) -> list:
        return [*([self.bias] if self.use_bias else ()), self.gain]

    def get_config(self) -> dict:
        own = {"epsilon": self.epsilon, "epsilon_mode": self.epsilon_mode, "gamma": self.gamma, "gain": self.gain_init}
        return {**super().get_config(), **own}


@register
class ScaledStdConv2D(_ScaledStd, Conv2D):
    """2D convolution with scaled weight standardization and a learnable gain per output channel.

    Args:
        epsilon, epsilon_mode: see `standardize`.
        gamma: constant factor of the effective kernel: the gain of the activation before it, where a network keeps it
            in the kernel (timm) and not in the activation (DeepMind).
        gain: initial value of the learnable gain; 0 closes a residual branch at the start.
        **kwargs: of `keras.layers.Conv2D`. Grouped convolutions standardize over their own fan-in.

    Input shape: (batch, height, width, in). Output shape: as `keras.layers.Conv2D`.

    Example:
        >>> import numpy as np
        >>> layer = ScaledStdConv2D(64, 3, gamma=1.7881)  # SiLU's gain
        >>> y = layer(np.random.default_rng(0).standard_normal((1, 16, 16, 32)).astype("float32"))
        >>> tuple(y.shape), tuple(layer.gain.shape)
        ((1, 14, 14, 64), (64,))

    References: NFNet paper (arXiv 2102.06171), equation 1 and section 3.
    """

    fan_in_axes = (0, 1, 2)

    def __init__(
        self, *args, epsilon: float = 1e-4, epsilon_mode: EpsilonMode = "clamp", gamma=1.0, gain=1.0, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self._init_standardization(epsilon, epsilon_mode, gamma, gain)


@register
class ScaledStdDepthwiseConv2D(_ScaledStd, DepthwiseConv2D):
    """Depthwise convolution with scaled weight standardization; each channel has its own statistics over (H, W).

    Args:
        epsilon, epsilon_mode, gamma, gain: as of `ScaledStdConv2D`.
        **kwargs: of `keras.layers.DepthwiseConv2D`.

    Input shape: (batch, height, width, channels). Output shape: as `keras.layers.DepthwiseConv2D`.

    Example:
        >>> import numpy as np
        >>> layer = ScaledStdDepthwiseConv2D(3, padding="same")
        >>> y = layer(np.ones((1, 5, 5, 4), "float32"))
        >>> tuple(y.shape), abs(float(y[0, 2, 2, 0])) < 1e-6  # a constant away from the border: the kernel's mean is 0
        ((1, 5, 5, 4), True)
    """

    fan_in_axes = (0, 1)

    def __init__(
        self, *args, epsilon: float = 1e-4, epsilon_mode: EpsilonMode = "clamp", gamma=1.0, gain=1.0, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self._init_standardization(epsilon, epsilon_mode, gamma, gain)


@register
class CompensatePadding(keras.layers.Layer):
    """Give the border what zero padding took: multiply each position by sqrt(taps / taps within the map).

    A kernel of k x k pixels meets zeros beyond the border. On small maps that is most of it: of 5 x 5 taps, 4 lie
    within a map of 2 x 2, and the variance falls by 6. With this, white noise keeps its variance at every position.

    Args:
        kernel: height and width of the convolution's kernel. strides: its strides.
        padding: "same" (TensorFlow's) or "symmetric" ((kernel - 1) // 2 on each side).

    Input shape: two maps, the convolution's output and its input before padding. Output shape: the first's.

    Example:
        >>> import numpy as np
        >>> y = CompensatePadding(3)([np.ones((1, 3, 3, 1), "float32"), np.ones((1, 3, 3, 1), "float32")])
        >>> np.asarray(y, "float64")[0, :, :, 0].round(2).tolist()
        [[1.5, 1.22, 1.5], [1.22, 1.0, 1.22], [1.5, 1.22, 1.5]]
    """

    def __init__(self, kernel: int, strides: int = 1, padding: str = "same", **kwargs):
        super().__init__(**kwargs)
        self.kernel, self.strides, self.padding = kernel, strides, padding

    def build(self, input_shape) -> None:
        self.sides = input_shape[1][1:3]

    def call(self, inputs):
        output, source = inputs
        rows, columns = (
            self._factors(source.shape[axis] or ops.shape(source)[axis], output.shape[axis] or ops.shape(output)[axis])
            for axis in (1, 2)
        )
        return output * ops.cast(rows[None, :, None, None] * columns[None, None, :, None], output.dtype)

    def factors(self) -> np.ndarray:
        """By position, (height, width, 1).

        Raises:
            ValueError: if the input's size is not fixed.
        """
        if None in self.sides:
            raise ValueError(f"Expected a fixed input size. Received: maps of {self.sides} at {self.name}")
        rows, columns = (ops.convert_to_numpy(self._factors(side, -(-side // self.strides))) for side in self.sides)
        return rows[:, None, None] * columns[None, :, None]

    def _factors(self, side, length):
        first = (self.kernel - 1) // 2
        if self.padding == "same" or self.strides == 1:
            first = ops.maximum((length - 1) * self.strides + self.kernel - side, 0) // 2
        start = ops.arange(length, dtype="int32") * self.strides - ops.cast(first, "int32")
        inside = ops.minimum(start + self.kernel, side) - ops.maximum(start, 0)
        return ops.sqrt(self.kernel / ops.cast(inside, "float32"))

    def compute_output_shape(self, input_shape):
        return input_shape[0]

    def get_config(self) -> dict:
        own = {"kernel": self.kernel, "strides": self.strides, "padding": self.padding}
        return {**super().get_config(), **own}
