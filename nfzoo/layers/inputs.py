"""What EUN and Rescale put before a convolution: standardization of its input, a bias that centres itself."""

from typing import Literal

import keras
from keras import ops

from nfzoo.layers.registration import register

Statistics = Literal["whole_tensor", "channel_l2", "per_channel_batch"]


@register
class StandardizeInput(keras.layers.Layer):
    """Standardize a map by its own statistics; no parameters, no running averages.

    Args:
        statistics: what EUNNet's sources disagree on.
            "whole_tensor": one mean and one variance over the whole batch (the published code);
            "channel_l2": divide by the Euclidean norm over the channels at every pixel (the paper's appendix), the
            only one in which an example does not depend on its batch;
            "per_channel_batch": mean and variance of every channel over the batch (a literal reading of equation 8).
        epsilon: added to the variance; "channel_l2" divides by at least 1e-12.

    Input shape: (batch, height, width, channels). Output shape: the same.

    Example:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).normal(3, 5, (4, 8, 8, 16))
        >>> y = np.asarray(StandardizeInput()(x))
        >>> round(abs(float(y.mean())), 4), round(float(y.std()), 4)
        (0.0, 1.0)

    References: EUNNet (IEEE Access 2023), equation 8, appendix, and the authors' code.
    """

    def __init__(self, statistics: Statistics = "whole_tensor", epsilon: float = 1e-5, **kwargs):
        super().__init__(**kwargs)
        if statistics not in ("whole_tensor", "channel_l2", "per_channel_batch"):
            raise ValueError(
                'Expected statistics to be "whole_tensor", "channel_l2" or "per_channel_batch". '
                f"Received: statistics={statistics!r}"
            )
        self.statistics, self.epsilon = statistics, epsilon

    def call(self, inputs):
        x = ops.cast(inputs, "float32") if keras.backend.standardize_dtype(inputs.dtype) != "float64" else inputs
        if self.statistics == "channel_l2":
            # The root of zero has no gradient: guard the square.
            x = x * ops.rsqrt(ops.maximum(ops.sum(ops.square(x), axis=-1, keepdims=True), 1e-24))
        else:
            axes = None if self.statistics == "whole_tensor" else (0, 1, 2)
            centred = x - ops.mean(x, axis=axes, keepdims=True)
            x = centred * ops.rsqrt(ops.mean(ops.square(centred), axis=axes, keepdims=True) + self.epsilon)
        return ops.cast(x, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self) -> dict:
        return {**super().get_config(), "statistics": self.statistics, "epsilon": self.epsilon}


@register
class CenteringBias(keras.layers.Layer):
    """Add a learnable bias per channel, less the mean that the first training batches showed (Rescale's prebias).

    While training, the first `calls` batches average their channel means into m, and the output is x + 0.01 bias - m;
    then m is frozen and the output is x + bias - m. So an example depends on its batch for that long, and no longer.

    Args:
        calls: batches to average.

    Input shape: (batch, ..., channels). Output shape: the same.

    Example:
        >>> import numpy as np
        >>> layer, x = CenteringBias(calls=1), np.full((2, 3), 5.0, "float32")
        >>> float(layer(x, training=True)[0, 0]), float(layer(x)[0, 0]), float(layer(2 * x)[0, 0])
        (0.0, 0.0, 5.0)

    References: RescaleNet (Shao et al., NeurIPS 2020) and its code.
    """

    def __init__(self, calls: int = 8, **kwargs):
        super().__init__(**kwargs)
        self.calls = calls

    def build(self, input_shape) -> None:
        channels = input_shape[-1:]
        self.bias = self.add_weight(name="bias", shape=channels, initializer="zeros")
        same = {"initializer": "zeros", "trainable": False, "autocast": False, "aggregation": "mean"}  # over replicas
        self.moving_mean = self.add_weight(name="moving_mean", shape=channels, **same)
        self.count = self.add_weight(name="count", shape=(), **same)

    def call(self, inputs, training=False):
        mean, count = ops.convert_to_tensor(self.moving_mean), ops.convert_to_tensor(self.count)
        learning = ops.cast(count < self.calls, mean.dtype)
        if training and self.trainable:  # frozen, it centres by what it has, as a frozen BN normalizes
            batch = ops.mean(ops.cast(inputs, mean.dtype), axis=tuple(range(len(inputs.shape) - 1)))
            mean = mean + learning * (ops.stop_gradient(batch) - mean) / (count + 1)
            self.moving_mean.assign(mean)
            self.count.assign(count + learning)
        bias = self.bias * ops.cast(1 - 0.99 * learning, self.compute_dtype)
        return inputs + bias - ops.cast(mean, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self) -> dict:
        return {**super().get_config(), "calls": self.calls}
