"""The variant without normalization, of which every other one changes a few operations.

A family writes its block once, in the words of `Variant`; a variant decides from the `Site` alone. Variants are frozen
dataclasses, so that an override of `nfzoo.build(...)` is `dataclasses.replace(...)`.
"""

from dataclasses import dataclass
from typing import Any

import keras
from keras import layers

from nfzoo import numerics
from nfzoo.layers import (
    CompensatePadding,
    Conv2D,
    DepthwiseConv2D,
    Gate,
    MaxPool2D,
    Merge,
    PadChannels,
    StochasticDepth,
    Tap,
    activation_function,
)
from nfzoo.models.sites import Site


def pad(x, kernel: int, strides: int, padding: str, site: Site) -> tuple[Any, str]:
    """Pad explicitly where a framework's "same" would differ; return the tensor and the convolution's own padding.

    `padding` is "same" (TensorFlow: the odd pixel goes right and below) or "symmetric" (PyTorch: (kernel - 1) // 2 on
    each side). The two differ for strided layers only.
    """
    if padding not in ("same", "symmetric"):
        raise ValueError(f'Expected padding to be "same" or "symmetric". Received: padding={padding!r}')
    if padding == "same" or strides == 1 or kernel == 1:
        return x, "same"
    return layers.ZeroPadding2D((kernel - 1) // 2, name=site.name("pad"))(x), "valid"


@dataclass(frozen=True)
class Variant:
    """No normalization: plain convolutions, plain sums. The base class *is* the variant "none".

    Attributes:
        activation: None takes the architecture's own.
        init: scheme of `nfzoo.numerics.init_std`: "he_fan_out" (fan-out divided by the groups) or "poster" (not
            divided, as the poster's baselines ran).
        use_bias: biases in convolutions: everywhere, nowhere, or at the sites of these roles.
        padding_compensation: multiply the output of each convolution by what zero padding takes from its border, see
            `nfzoo.layers.CompensatePadding`.
    """

    activation: str | None = None
    init: str = "he_fan_out"
    use_bias: bool | tuple[str, ...] = False
    padding_compensation: bool = False

    @classmethod
    def conventions(cls, dialect: str) -> dict:
        """Fields that differ between the implementations that a dialect names."""
        return {}

    @property
    def batch_independent(self) -> bool:
        """Whether f(batch)[i] = f(example i), while training too."""
        return True

    # ------------------------------------------------------------ weight layers
    def kernel_init(self, site: Site, receptive: int, inputs: int, outputs: int, groups: int = 1) -> keras.Initializer:
        # The standard deviation is explicit because Keras takes fan_in of a depthwise kernel as H * W * channels.
        return keras.initializers.RandomNormal(stddev=numerics.init_std(self.init, receptive, inputs, outputs, groups))

    def conv(self, x, filters: int, kernel: int, site: Site, strides=1, groups=1, padding="same"):
        source = self.before(x, site)
        x, mode = pad(source, kernel, strides, padding, site)
        options = {"strides": strides, "padding": mode, "groups": groups, "use_bias": self.bias_at(site)}
        init = self.kernel_init(site, kernel**2, x.shape[-1], filters, groups)
        y = self.conv_layer(site, filters, kernel, kernel_initializer=init, name=site.name("conv"), **options)(x)
        return self._compensated(y, source, kernel, strides, padding, site)

    def conv_layer(self, site: Site, filters: int, kernel: int, **options) -> keras.Layer:
        return Conv2D(filters, kernel, **options)

    def depthwise(self, x, kernel: int, site: Site, strides=1, padding="same"):
        source = self.before(x, site)
        x, mode = pad(source, kernel, strides, padding, site)
        channels = x.shape[-1]
        init = self.kernel_init(site, kernel**2, channels, channels, groups=channels)
        options = {"strides": strides, "padding": mode, "use_bias": self.bias_at(site)}
        y = self.depthwise_layer(kernel, depthwise_initializer=init, name=site.name("conv"), **options)(x)
        return self._compensated(y, source, kernel, strides, padding, site)

    def depthwise_layer(self, kernel: int, **options) -> keras.Layer:
        return DepthwiseConv2D(kernel, **options)

    def _compensated(self, y, source, kernel: int, strides: int, padding: str, site: Site):
        if kernel == 1 or not self.padding_compensation:
            return y
        return CompensatePadding(kernel, strides, padding, name=site.name("compensate"))([y, source])

    def bias_at(self, site: Site) -> bool:
        return self.use_bias if isinstance(self.use_bias, bool) else site.role in self.use_bias

    def before(self, x, site: Site):
        """What a convolution's input passes first."""
        return x

    def dense(self, x, units: int, site: Site):
        init = self.kernel_init(site, 1, x.shape[-1], units)
        return layers.Dense(units, kernel_initializer=init, name=site.name("linear"))(x)

    # ------------------------------------------------------------ between them
    def flatten(self, x):
        return layers.Flatten(name="flatten")(x)

    def tap(self, x, name: str):
        return Tap(name=name)(x)

    def max_pool(self, x, size: int, strides: int, padding: str, site: Site, zeros: bool = False):
        """Pool; `zeros` pads with zeros as Keras' ResNets do, else padding never wins over a value."""
        name, side = site.name("pool"), (size - 1) // 2
        if padding == "same":
            return layers.MaxPooling2D(size, strides, padding="same", name=name)(x)
        if zeros:
            x = layers.ZeroPadding2D(side, name=site.name("pool_pad"))(x)
            return layers.MaxPooling2D(size, strides, name=name)(x)
        return MaxPool2D(size, strides, pad=side, name=name)(x)

    def average(self, x, size: int, site: Site):
        """Halve a map by its mean; pixels beyond the border do not count."""
        return layers.AveragePooling2D(size, size, padding="same", name=site.name("pool"))(x)

    def subsample(self, x, strides: int, site: Site):
        return x if strides == 1 else layers.MaxPooling2D(1, strides, name=site.name("subsample"))(x)

    def pad_channels(self, x, channels: int, site: Site):
        return PadChannels(channels, name=site.name("pad"))(x)

    def norm(self, x, site: Site):
        return x

    def act(self, x, site: Site):
        return layers.Activation(activation_function(self.activation), name=site.name("act"))(x)

    # ------------------------------------------------------------ attention
    def squeeze_excite(self, x, hidden: int, kind: str | None, site: Site):
        """Global average, dense, activation (`kind`, or the variant's own), dense, sigmoid gate on the channels."""
        at, channels = Site(f"{site.prefix}_se"), x.shape[-1]

        def dense(units, inputs, name):
            return layers.Dense(units, kernel_initializer=self.kernel_init(at, 1, inputs, units), name=at.name(name))

        gate = layers.GlobalAveragePooling2D(name=at.name("pool"))(x)
        gate = dense(hidden, channels, "reduce")(gate)
        gate = layers.Activation(activation_function(kind or self.activation), name=at.name("act"))(gate)
        gate = dense(channels, hidden, "expand")(gate)
        return self.gate_layer(name=at.prefix)([x, gate])

    def channel_attention(self, x, site: Site):
        """Efficient channel attention: global average, a convolution over neighbouring channels, sigmoid gate."""
        at, channels = Site(f"{site.prefix}_eca"), x.shape[-1]
        kernel = numerics.eca_kernel(channels)
        gate = layers.GlobalAveragePooling2D(name=at.name("pool"))(x)
        gate = layers.Reshape((channels, 1), name=at.name("spread"))(gate)
        init = keras.initializers.RandomNormal(stddev=kernel**-0.5)
        options = {"padding": "same", "use_bias": False, "kernel_initializer": init}
        gate = layers.Conv1D(1, kernel, name=at.name("conv"), **options)(gate)
        gate = layers.Reshape((channels,), name=at.name("gather"))(gate)
        return self.gate_layer(name=at.prefix)([x, gate])

    def gate_layer(self, **kwargs) -> keras.Layer:
        return Gate(**kwargs)

    # ------------------------------------------------------------ residual branch
    def enter(self, x, site: Site):
        """Entrance of a block: of its branch, or of a plain one, which starts a new stream."""
        return x

    def identity(self, x, entered):
        """What an identity shortcut carries: the input, or the input as it entered the branch."""
        return x

    def exit(self, x, site: Site):
        """End of a residual branch."""
        return x

    def merge(self, skip, branch, site: Site, kind: str = "out"):
        return Merge(name=site.name(kind))([skip, branch])

    def drop_path(self, x, rate: float, rescale: bool, site: Site):
        return StochasticDepth(rate, rescale, name=site.name("drop"))(x) if rate else x

    # ------------------------------------------------------------ the end of the network
    def leave(self, x, site: Site):
        """What the last map passes before the pooling."""
        return x

    def drop(self, x, rate: float, site: Site):
        return layers.Dropout(rate, name=site.name("drop"))(x) if rate else x

    def head(self, x, units: int, activation: str | None, scheme: str = "small"):
        """Classifier; `scheme` "hidden" initialises it as a hidden layer, "zeros", or "small" (`head_init`)."""
        schemes = {
            "hidden": lambda: self.kernel_init(Site("head", role="top"), 1, x.shape[-1], units),
            "zeros": keras.initializers.Zeros,
            "small": lambda: self.head_init(x.shape[-1]),
        }
        if scheme not in schemes:
            raise ValueError(f"Expected head_scheme to be one of {sorted(schemes)}. Received: head_scheme={scheme!r}")
        # Logits in float32 under mixed precision: a half-precision softmax loses the tail.
        half = keras.config.dtype_policy().compute_dtype in ("float16", "bfloat16")
        dtype = "float32" if half else None
        init = schemes[scheme]()
        return layers.Dense(units, activation=activation, kernel_initializer=init, name="head", dtype=dtype)(x)

    def head_init(self, inputs: int) -> keras.Initializer:
        if self.init == "poster":
            return keras.initializers.RandomNormal(stddev=0.01)
        return keras.initializers.VarianceScaling(1 / 3, "fan_out", "uniform")
