"""What a convolution, a normalization, a merge… *is*, per way of doing without (or with) normalization.

A family writes its block once, in the words of `Variant`; a variant decides from the `Site` alone. Variants are frozen
dataclasses, so that an override of `nfzoo.build(...)` is `dataclasses.replace(...)`.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import keras
from keras import layers

from nfzoo import numerics
from nfzoo.layers import Gate, Merge, ScaledActivation, ScaledStdConv2D, ScaledStdDepthwiseConv2D, StochasticDepth, Tap
from nfzoo.models.sites import Site


def pad(x, kernel: int, strides: int, padding: str, site: Site) -> tuple[Any, str]:
    """Pad explicitly where a framework's "same" would differ; return the tensor and the convolution's own padding.

    `padding` is "same" (TensorFlow: the odd pixel goes right and below) or "symmetric" (PyTorch: (kernel - 1) // 2 on
    each side). The two differ for strided layers only.
    """
    if padding not in ("same", "symmetric"):
        raise ValueError(f'Expected padding to be "same" or "symmetric". Received: padding={padding!r}')
    if padding == "same" or strides == 1:
        return x, "same"
    return layers.ZeroPadding2D((kernel - 1) // 2, name=site.name("pad"))(x), "valid"


@dataclass(frozen=True)
class Variant:
    """No normalization: plain convolutions, plain sums. The base class *is* the variant "none".

    Attributes:
        activation: None takes the family's own.
        init: scheme of `nfzoo.numerics.init_std`: "he_fan_out" (fan-out divided by the groups) or "poster" (not
            divided, as the poster's baselines ran).
        use_bias: biases in convolutions.
    """

    batch_independent: ClassVar[bool] = True

    activation: str | None = None
    init: str = "he_fan_out"
    use_bias: bool = False

    def kernel_init(self, receptive: int, inputs: int, outputs: int, groups: int = 1) -> keras.Initializer:
        # The standard deviation is explicit because Keras takes fan_in of a depthwise kernel as H * W * channels.
        return keras.initializers.RandomNormal(stddev=numerics.init_std(self.init, receptive, inputs, outputs, groups))

    def conv(self, x, filters: int, kernel: int, site: Site, strides=1, groups=1, padding="same"):
        x, mode = pad(x, kernel, strides, padding, site)
        init = self.kernel_init(kernel**2, x.shape[-1], filters, groups)
        return self.conv_layer(
            filters,
            kernel,
            strides=strides,
            padding=mode,
            groups=groups,
            kernel_initializer=init,
            name=site.name("conv"),
        )(x)

    def conv_layer(self, *args, **kwargs) -> keras.Layer:
        return layers.Conv2D(*args, use_bias=self.use_bias, **kwargs)

    def depthwise(self, x, kernel: int, site: Site, strides=1, padding="same"):
        x, mode = pad(x, kernel, strides, padding, site)
        channels = x.shape[-1]
        init = self.kernel_init(kernel**2, channels, channels, groups=channels)
        return self.depthwise_layer(
            kernel, strides=strides, padding=mode, depthwise_initializer=init, name=site.name("conv")
        )(x)

    def depthwise_layer(self, *args, **kwargs) -> keras.Layer:
        return layers.DepthwiseConv2D(*args, use_bias=self.use_bias, **kwargs)

    def dense(self, x, units: int, site: Site):
        init = self.kernel_init(1, x.shape[-1], units)
        return layers.Dense(units, kernel_initializer=init, name=site.name("linear"))(x)

    def flatten(self, x):
        return layers.Flatten(name="flatten")(x)

    def tap(self, x, name: str):
        return Tap(name=name)(x)

    def norm(self, x, site: Site):
        return x

    def act(self, x, kind: str, site: Site):
        return layers.Activation(self.activation or kind, name=site.name("act"))(x)

    def attend(self, x, hidden: int, kind: str, site: Site):
        """Squeeze-excite: global average, dense, activation, dense, sigmoid gate on the channels of x."""
        prefix, channels = f"{site.prefix}_se", x.shape[-1]

        def dense(units, inputs, name):
            init = self.kernel_init(1, inputs, units)
            return layers.Dense(units, kernel_initializer=init, name=f"{prefix}_{name}")

        gate = layers.GlobalAveragePooling2D(name=f"{prefix}_pool")(x)
        gate = dense(hidden, channels, "reduce")(gate)
        gate = layers.Activation(self.activation or kind, name=f"{prefix}_act")(gate)
        gate = dense(channels, hidden, "expand")(gate)
        return self.gate_layer(name=prefix)([x, gate])

    def gate_layer(self, **kwargs) -> keras.Layer:
        return Gate(**kwargs)

    def enter(self, x, site: Site):
        """Entrance of a residual branch."""
        return x

    def merge(self, skip, branch, site: Site):
        return Merge(name=site.name("out"))([skip, branch])

    def drop_path(self, x, rate: float, site: Site):
        return StochasticDepth(rate, name=site.name("drop"))(x) if rate else x

    def drop(self, x, rate: float, site: Site):
        return layers.Dropout(rate, name=site.name("drop"))(x) if rate else x

    def head(self, x, units: int, activation: str | None, scheme: str = "small"):
        """Classifier; `scheme` "hidden" initialises it as a hidden layer, "small" as the variant's `head_init`."""
        init = self.kernel_init(1, x.shape[-1], units) if scheme == "hidden" else self.head_init()
        # Logits in float32 under mixed precision: a half-precision softmax loses the tail.
        half = keras.config.dtype_policy().compute_dtype in ("float16", "bfloat16")
        dtype = "float32" if half else None
        return layers.Dense(units, activation=activation, kernel_initializer=init, name="head", dtype=dtype)(x)

    def head_init(self) -> keras.Initializer:
        if self.init == "poster":
            return keras.initializers.RandomNormal(stddev=0.01)
        return keras.initializers.VarianceScaling(1 / 3, "fan_out", "uniform")


@dataclass(frozen=True)
class BN(Variant):
    """Batch normalization after each convolution.

    Attributes:
        momentum: of the moving statistics (PyTorch's 0.1 is 0.9 here).
        epsilon: added to the variance.
        scale, center: learnable gamma and beta.
        stem_affine: keep gamma and beta in the first normalization even when they are off elsewhere, as the code behind
            the poster's first figure does.

    References: Ioffe & Szegedy 2015 (arXiv 1502.03167).
    """

    batch_independent: ClassVar[bool] = False

    momentum: float = 0.99
    epsilon: float = 1e-3
    scale: bool = True
    center: bool = True
    stem_affine: bool = False

    def norm(self, x, site: Site):
        always = self.stem_affine and site.role == "stem"
        return layers.BatchNormalization(
            momentum=self.momentum,
            epsilon=self.epsilon,
            scale=self.scale or always,
            center=self.center or always,
            name=site.name("norm"),
        )(x)


@dataclass(frozen=True)
class GN(Variant):
    """Group normalization: as batch normalization, but over groups of channels of one example.

    Attributes:
        groups: number of groups; a layer whose channels it does not divide takes their greatest common divisor.

    References: Wu & He 2018 (arXiv 1803.08494).
    """

    groups: int = 32
    epsilon: float = 1e-5
    scale: bool = True
    center: bool = True

    def norm(self, x, site: Site):
        return layers.GroupNormalization(
            math.gcd(self.groups, x.shape[-1]),
            epsilon=self.epsilon,
            scale=self.scale,
            center=self.center,
            name=site.name("norm"),
        )(x)


@dataclass(frozen=True)
class SN(Variant):
    """Self-normalizing: SELU everywhere, LeCun initialisation, magnitude-preserving merge and squeeze-excite.

    Attributes:
        magnitude_preserving: False gives the poster's "No MP" row: plain sum, plain gate.
        alpha_dropout: use alpha dropout instead of dropout before the classifier (the poster did not).

    References: Klambauer et al. 2017 (arXiv 1706.02515); the poster "Designing Normalizer-Free EfficientNets";
    EDM2 (arXiv 2312.02696), equation 88.
    """

    activation: str | None = "selu"
    init: str = "lecun"
    magnitude_preserving: bool = True
    alpha_dropout: bool = False

    def gate_layer(self, **kwargs) -> keras.Layer:
        return Gate(magnitude_preserving=self.magnitude_preserving, **kwargs)

    def merge(self, skip, branch, site: Site):
        if not self.magnitude_preserving:
            return super().merge(skip, branch, site)
        a, b = numerics.magnitude_preserving_weights()
        return Merge(skip_scale=a, branch_scale=b, name=site.name("out"))([skip, branch])

    def drop(self, x, rate: float, site: Site):
        if rate and self.alpha_dropout:
            return layers.AlphaDropout(rate, name=site.name("drop"))(x)
        return super().drop(x, rate, site)

    def head_init(self) -> keras.Initializer:
        return keras.initializers.RandomNormal(stddev=0.01)


@dataclass(frozen=True)
class NF(Variant):
    """Normalizer-free: scaled weight standardization, gamma-scaled activations, branches of known variance.

    Attributes:
        alpha: factor of every residual branch.
        skip_gain: initial value of the learnable scalar on every branch (0: blocks start as the identity).
        epsilon, epsilon_mode: of the weight standardization, see `nfzoo.layers.standardize`.

    References: NF-ResNet paper (arXiv 2101.08692), sections 3 and 4; NFNet paper (arXiv 2102.06171), section 3.
    """

    init: str = "lecun"
    use_bias: bool = True
    alpha: float = 0.2
    skip_gain: float = 0.0
    epsilon: float = 1e-4
    epsilon_mode: str = "clamp"

    def conv_layer(self, *args, **kwargs) -> keras.Layer:
        return ScaledStdConv2D(*args, **self._standardization(), **kwargs)

    def depthwise_layer(self, *args, **kwargs) -> keras.Layer:
        return ScaledStdDepthwiseConv2D(*args, **self._standardization(), **kwargs)

    def _standardization(self) -> dict:
        return {"use_bias": self.use_bias, "epsilon": self.epsilon, "epsilon_mode": self.epsilon_mode}

    def act(self, x, kind: str, site: Site):
        return ScaledActivation(self.activation or kind, name=site.name("act"))(x)

    def gate_layer(self, **kwargs) -> keras.Layer:
        return Gate(gain=2.0, **kwargs)

    def enter(self, x, site: Site):
        std = numerics.residual_std(site.merges, self.alpha)
        return x if std == 1.0 else layers.Rescaling(1 / std, name=site.name("enter"))(x)

    def merge(self, skip, branch, site: Site):
        return Merge(branch_scale=self.alpha, gain=self.skip_gain, name=site.name("out"))([skip, branch])

    def head_init(self) -> keras.Initializer:
        return keras.initializers.RandomNormal(stddev=0.01)


VARIANTS: dict[str, type[Variant]] = {"none": Variant, "bn": BN, "gn": GN, "sn": SN, "nf": NF}
