"""Layers around a residual branch: merge, biases before an operation, stochastic depth, shapes of a shortcut, taps."""

import keras
from keras import ops

from nfzoo.layers.registration import register


@register
class Merge(keras.layers.Layer):
    """Merge a residual branch into its stream: a * skip + b * g * branch.

    Args:
        skip_scale: the constant a.
        branch_scale: the constant b.
        gain: initial value of the learnable scalar g; None for none (g = 1).

    Input shape: two tensors of one shape, (skip, branch). Output shape: the same.

    Example:
        >>> import numpy as np
        >>> float(Merge(skip_scale=1.0, branch_scale=0.2, gain=0.0)([np.ones((1, 1)), np.ones((1, 1))])[0, 0])
        1.0

    References: SkipInit (arXiv 2002.10444), section 3; NFNet paper, section 3; EDM2 (arXiv 2312.02696), equation 88.
    """

    def __init__(self, skip_scale=1.0, branch_scale=1.0, gain: float | None = None, **kwargs):
        super().__init__(**kwargs)
        self.skip_scale, self.branch_scale, self.gain_init = skip_scale, branch_scale, gain

    def build(self, input_shape) -> None:
        self.gain = None
        if self.gain_init is not None:
            initial = keras.initializers.Constant(self.gain_init)
            self.gain = self.add_weight(name="gain", shape=(), initializer=initial)

    def call(self, inputs):
        skip, branch = inputs
        # Scalars first: each product with a map is a pass over memory, forward and backward.
        scale = self.branch_scale if self.gain is None else self.gain * self.branch_scale
        if self.skip_scale != 1.0:
            skip = skip * self.skip_scale
        return skip + branch if isinstance(scale, float) and scale == 1.0 else skip + branch * scale

    def compute_output_shape(self, input_shape):
        return input_shape[0]

    def get_config(self) -> dict:
        scales = {"skip_scale": self.skip_scale, "branch_scale": self.branch_scale}
        return {**super().get_config(), **scales, "gain": self.gain_init}


@register
class StochasticDepth(keras.layers.Layer):
    """Drop the whole branch of an example with probability `rate` while training.

    Args:
        rate: in [0, 1).
        rescale: divide survivors by 1 - rate (timm, Keras); DeepMind's networks do not.
        seed: of the random stream.

    Input shape: any, batch first. Output shape: the same.

    Example:
        >>> import numpy as np
        >>> y = StochasticDepth(0.5, seed=0)(np.ones((1000, 2)), training=True)
        >>> set(np.unique(y).tolist()), bool((np.asarray(y)[:, 0] == np.asarray(y)[:, 1]).all())
        ({0.0, 2.0}, True)

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
class Affine(keras.layers.Layer):
    """gain * x + bias with one learnable scalar each, as Fixup has before and after every convolution.

    Args:
        gain: initial value of the gain; None for none. The bias starts at 0.

    Input shape: any. Output shape: the same.

    Example:
        >>> import numpy as np
        >>> layer = Affine(gain=2.0)
        >>> float(layer(np.ones((1, 1)))[0, 0]), [variable.name for variable in layer.weights]
        (2.0, ['gain', 'bias'])

    References: Fixup (arXiv 1901.09321), section 3, rule 3.
    """

    def __init__(self, gain: float | None = None, **kwargs):
        super().__init__(**kwargs)
        self.gain_init = gain

    def build(self, input_shape) -> None:
        self.gain = None
        if self.gain_init is not None:
            initial = keras.initializers.Constant(self.gain_init)
            self.gain = self.add_weight(name="gain", shape=(), initializer=initial)
        self.bias = self.add_weight(name="bias", shape=(), initializer="zeros")

    def call(self, inputs):
        return inputs + self.bias if self.gain is None else inputs * self.gain + self.bias

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self) -> dict:
        return {**super().get_config(), "gain": self.gain_init}


@register
class PadChannels(keras.layers.Layer):
    """Append channels of zeros: the parameter-free shortcut of CIFAR ResNets (option A).

    Args:
        channels: number of channels of the output.

    Input shape: (batch, height, width, c <= channels). Output shape: (batch, height, width, channels).

    Example:
        >>> import numpy as np
        >>> np.asarray(PadChannels(4)(np.ones((1, 1, 1, 2))))[0, 0, 0].tolist()
        [1.0, 1.0, 0.0, 0.0]

    References: He et al. 2015 (arXiv 1512.03385), section 3.3.
    """

    def __init__(self, channels: int, **kwargs):
        super().__init__(**kwargs)
        self.channels = channels

    def call(self, inputs):
        return ops.pad(inputs, [(0, 0), (0, 0), (0, 0), (0, self.channels - inputs.shape[-1])])

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.channels)

    def get_config(self) -> dict:
        return {**super().get_config(), "channels": self.channels}


@register
class MaxPool2D(keras.layers.MaxPooling2D):
    """Max-pooling with PyTorch's padding: `pad` pixels of minus infinity on every side.

    Padding with zeros would win over negative values, which the stem of a pre-activation network has.

    Args:
        pad: pixels on each side.
        **kwargs: of `keras.layers.MaxPooling2D`; its own padding stays "valid".

    Example:
        >>> import numpy as np
        >>> y = MaxPool2D(3, strides=2, pad=1)(-np.ones((1, 4, 4, 1)))
        >>> tuple(y.shape), float(np.max(y))
        ((1, 2, 2, 1), -1.0)
    """

    def __init__(self, *args, pad: int = 0, **kwargs):
        super().__init__(*args, **kwargs)
        if self.data_format != "channels_last":
            raise ValueError(f'Expected data_format="channels_last" of {self.name}. Received: {self.data_format!r}')
        self.pad = pad

    def call(self, inputs):
        sides = [(0, 0), (self.pad, self.pad), (self.pad, self.pad), (0, 0)]
        return super().call(ops.pad(inputs, sides, constant_values=float("-inf")))

    def compute_output_shape(self, input_shape):
        batch, height, width, channels = input_shape
        grown = [side if side is None else side + 2 * self.pad for side in (height, width)]
        return super().compute_output_shape((batch, *grown, channels))

    def get_config(self) -> dict:
        return {**super().get_config(), "pad": self.pad}


@register
class Tap(keras.layers.Layer):
    """The identity, to give a tensor a name where the science needs one (signal propagation plots)."""

    def call(self, inputs):
        return inputs

    def compute_output_shape(self, input_shape):
        return input_shape
