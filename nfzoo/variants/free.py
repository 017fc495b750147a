"""Without normalization, with the variance of every layer kept in hand: self-normalizing and normalizer-free."""

from dataclasses import dataclass

import keras
from keras import layers

from nfzoo import numerics
from nfzoo.layers import Gate, Merge, ScaledActivation, ScaledStdConv2D, ScaledStdDepthwiseConv2D
from nfzoo.models.sites import Site
from nfzoo.variants.base import Variant


@dataclass(frozen=True)
class SN(Variant):
    """Self-normalizing: SELU everywhere, LeCun initialisation, magnitude-preserving merge and squeeze-excite.

    Attributes:
        magnitude_preserving: False gives the poster's "No MP" row: plain sum, plain gate.
        alpha_dropout: use alpha dropout instead of dropout before the classifier (the poster did not).
        doubled_gate: close squeeze-excite by twice the sigmoid, which leaves the variance at the start as it is; the
            magnitude-preserving gate halves it, the plain one quarters it.
        standardize: weight-standardized kernels.

    References: Klambauer et al. 2017 (arXiv 1706.02515); the poster "Designing Normalizer-Free EfficientNets";
    EDM2 (arXiv 2312.02696), equation 88.
    """

    activation: str | None = "selu"
    init: str = "lecun"
    magnitude_preserving: bool = True
    alpha_dropout: bool = False
    doubled_gate: bool = False
    standardize: bool = False

    def conv_layer(self, site: Site, filters: int, kernel: int, **options) -> keras.Layer:
        if not self.standardize:
            return super().conv_layer(site, filters, kernel, **options)
        return ScaledStdConv2D(filters, kernel, **options)

    def depthwise_layer(self, kernel: int, **options) -> keras.Layer:
        if not self.standardize:
            return super().depthwise_layer(kernel, **options)
        return ScaledStdDepthwiseConv2D(kernel, **options)

    def squeeze_excite(self, x, hidden: int, kind: str | None, site: Site):
        return super().squeeze_excite(x, hidden, None, site)

    def gate_layer(self, **kwargs) -> keras.Layer:
        if self.doubled_gate:
            return Gate(gain=2.0, **kwargs)
        return Gate(magnitude_preserving=self.magnitude_preserving, **kwargs)

    def merge(self, skip, branch, site: Site, kind: str = "out"):
        if not self.magnitude_preserving:
            return super().merge(skip, branch, site, kind)
        a, b = numerics.magnitude_preserving_weights()
        return Merge(skip_scale=a, branch_scale=b, name=site.name(kind))([skip, branch])

    def drop(self, x, rate: float, site: Site):
        if rate and self.alpha_dropout:
            return layers.AlphaDropout(rate, name=site.name("drop"))(x)
        return super().drop(x, rate, site)

    def head_init(self, inputs: int) -> keras.Initializer:
        return keras.initializers.RandomNormal(stddev=0.01)


@dataclass(frozen=True)
class NF(Variant):
    """Normalizer-free: scaled weight standardization, gamma-scaled activations, branches of known variance.

    Attributes:
        alpha: factor of every residual branch.
        skip_gain: initial value of the learnable scalar on every branch (0: blocks start as the identity); None for
            none.
        last_gain: initial value of the gain vector of a branch's last convolution; timm closes its branches with 0 here
            where it has no skip gain.
        gamma_in: where the gain of the activation sits: "activation" (DeepMind) or "kernel" (timm: in every
            standardized kernel, the first included).
        epsilon, epsilon_mode: of the weight standardization, see `nfzoo.layers.standardize`.
        standardize: False takes plain kernels and unscaled activations: with init="he", the network of the NF-ResNet
            paper's Figure 2 whose mean drifts away.
        standardize_depthwise: whether depthwise kernels are standardized; None: as the others. A kernel without a mean
            takes away that of its map, of which a depthwise convolution has no other.

    References: NF-ResNet paper (arXiv 2101.08692), sections 3 and 4; NFNet paper (arXiv 2102.06171), section 3.
    """

    init: str = "lecun"
    use_bias: bool | tuple[str, ...] = True
    alpha: float = 0.2
    skip_gain: float | None = 0.0
    last_gain: float = 1.0
    gamma_in: str = "activation"
    epsilon: float = 1e-4
    epsilon_mode: str = "clamp"
    standardize: bool = True
    standardize_depthwise: bool | None = None

    def __post_init__(self):
        if self.gamma_in not in ("activation", "kernel"):
            raise ValueError(f'Expected gamma_in to be "activation" or "kernel". Received: gamma_in={self.gamma_in!r}')
        if self.skip_gain == self.last_gain == 0:
            raise ValueError(
                "Expected skip_gain or last_gain to start at another value than 0: the gradient of each is a multiple "
                "of the other, and the branch would never open. Received: both at 0"
            )

    @classmethod
    def conventions(cls, dialect: str) -> dict:
        if dialect != "timm":
            return {}
        return {"epsilon": 1e-5, "epsilon_mode": "add", "gamma_in": "kernel", "skip_gain": None, "last_gain": 0.0}

    def conv_layer(self, site: Site, filters: int, kernel: int, **options) -> keras.Layer:
        if not self.standardize:
            return super().conv_layer(site, filters, kernel, **options)
        gain = self.last_gain if site.role == "last" else 1.0
        return ScaledStdConv2D(filters, kernel, gain=gain, **self._standardization(), **options)

    def depthwise_layer(self, kernel: int, **options) -> keras.Layer:
        wanted = self.standardize if self.standardize_depthwise is None else self.standardize_depthwise
        if not wanted:
            return super().depthwise_layer(kernel, **options)
        return ScaledStdDepthwiseConv2D(kernel, **self._standardization(), **options)

    def _standardization(self) -> dict:
        gamma = numerics.gamma(self.activation) if self.gamma_in == "kernel" else 1.0
        return {"epsilon": self.epsilon, "epsilon_mode": self.epsilon_mode, "gamma": gamma}

    def act(self, x, site: Site):
        if self.gamma_in == "kernel" or not self.standardize:
            return super().act(x, site)
        return ScaledActivation(self.activation, name=site.name("act"))(x)

    def gate_layer(self, **kwargs) -> keras.Layer:
        return Gate(gain=2.0, **kwargs)

    def enter(self, x, site: Site):
        std = numerics.residual_std(site.merges, self.alpha)
        return x if std == 1.0 else layers.Rescaling(1 / std, name=site.name("enter"))(x)

    def merge(self, skip, branch, site: Site, kind: str = "out"):
        return Merge(branch_scale=self.alpha, gain=self.skip_gain, name=site.name(kind))([skip, branch])

    def head_init(self, inputs: int) -> keras.Initializer:
        return keras.initializers.RandomNormal(stddev=0.01)


@dataclass(frozen=True)
class PNF(NF):
    """NF with plain depthwise kernels, and branches that are open from the start.

    A standardized kernel sums to zero. A depthwise kernel sees one map only, so that standardized it removes that map's
    mean, and networks of such kernels learn slowly at first. Plain ones start at the same variance by LeCun's
    initialisation; the means that they let through add up, so that the variance over depth is less even than NF's.

    Attributes:
        skip_gain, standardize_depthwise: as of `NF`, with other defaults.

    References: ours (docs/closing-the-gap.md), from NF-ResNet (arXiv 2101.08692).
    """

    skip_gain: float | None = 1.0
    standardize_depthwise: bool | None = False

    @classmethod
    def conventions(cls, dialect: str) -> dict:
        return {}  # nobody else has it
