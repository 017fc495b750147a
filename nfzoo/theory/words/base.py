"""The words without normalization, which the others change a few of; see `nfzoo.variants.base`."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

from nfzoo import numerics
from nfzoo.models.sites import Site
from nfzoo.theory.moments import (
    FUNCTIONS,
    Moments,
    activate,
    average_pool,
    convolve,
    function_of,
    gate,
    max_pool,
)


@dataclass
class Words:
    """No normalization; see `nfzoo.variants.Variant` for the fields.

    Attributes:
        maps: layer name -> moments of its output, in the order of the network.
        kernels: variable path -> (variance of the weights, that of the effective weights or None, fan-in).
        stem: what is known of the stem's output, (acsm, acv), to go on from that instead.
    """

    activation: str | None = None
    init: str = "he_fan_out"
    use_bias: bool | tuple[str, ...] = False
    padding_compensation: bool = False
    maps: dict[str, Moments] = field(default_factory=dict, init=False, repr=False)
    kernels: dict[str, tuple] = field(default_factory=dict, init=False, repr=False)
    stem: tuple[float, float] | None = field(default=None, init=False)

    @classmethod
    def conventions(cls, dialect: str) -> dict:
        """Fields that differ between the implementations that a dialect names."""
        return {}

    def note(self, name: str, x: Moments) -> Moments:
        """Keep the moments of a layer's output."""
        self.maps[name] = x
        return x

    # ------------------------------------------------------------ weight layers
    def std(self, site: Site, receptive: int, inputs: int, outputs: int, groups: int = 1) -> float:
        return numerics.init_std(self.init, receptive, inputs, outputs, groups)

    def before(self, x: Moments, site: Site) -> Moments:
        return x

    def linear(self, x: Moments, outputs: int, name: str, std: float, kernel=1, groups=1, **options) -> Moments:
        """A convolution or a dense layer."""
        fan_in = kernel ** (len(x.shape) - 2) * x.shape[-1] // groups
        self.kernels[f"{name}/kernel"] = (std**2, None, fan_in)
        return self.note(name, convolve(x, outputs, std**2, kernel, groups=groups, **options))

    def conv(self, x, filters: int, kernel: int, site: Site, strides=1, groups=1, padding="same"):
        x, std = self.before(x, site), self.std(site, kernel**2, x.shape[-1], filters, groups)
        options = {"stride": strides, "padding": padding, "compensated": self.padding_compensation}
        return self.linear(x, filters, site.name("conv"), std, kernel, groups, **options)

    def standardized(
        self, x, filters, kernel, site, raw, strides, groups, padding, gain=1.0, epsilon=1e-4, epsilon_mode="clamp"
    ):
        """A convolution with standardized kernels; `raw` is the variance that they are drawn with."""
        fan_in = kernel**2 * x.shape[-1] // groups
        shrunk = raw / (raw + epsilon) if epsilon_mode == "add" else min(1.0, raw * fan_in / epsilon)
        effective = gain**2 * shrunk / fan_in
        self.kernels[f"{site.name('conv')}/kernel"] = (raw, effective, fan_in)
        options = {"stride": strides, "padding": padding, "groups": groups, "standardized": True}
        made = convolve(x, filters, effective, kernel, compensated=self.padding_compensation, **options)
        return self.note(site.name("conv"), made)

    def depthwise(self, x, kernel: int, site: Site, strides=1, padding="same"):
        return self.conv(x, x.shape[-1], kernel, site, strides, x.shape[-1], padding)

    def dense(self, x, units: int, site: Site):
        return self.linear(x, units, site.name("linear"), self.std(site, 1, x.shape[-1], units))

    # ------------------------------------------------------------ between them
    def flatten(self, x):
        return Moments((x.shape[0], math.prod(x.shape[1:])), x.mean, x.acsm, x.acv, x.nonzero)

    def tap(self, x, name: str):
        if name == "stem_out" and self.stem:
            acsm, acv = self.stem
            mean = x.mean * math.sqrt(acsm / x.acsm) if x.acsm else 0.0
            x = x.like(mean, acsm, acv, x.nonzero)
        return self.note(name, x)

    def max_pool(self, x, size: int, strides: int, padding: str, site: Site, zeros: bool = False):
        return self.note(site.name("pool"), max_pool(x, size, strides))

    def average(self, x, size: int, site: Site):
        return self.note(site.name("pool"), average_pool(x, size))

    def subsample(self, x, strides: int, site: Site):
        return x.strided(strides)

    def pad_channels(self, x, channels: int, site: Site):
        return self.note(site.name("pad"), x.padded(channels))

    def norm(self, x, site: Site):
        return x

    def act(self, x, site: Site):
        return self.note(site.name("act"), activate(x, function_of(self.activation)))

    # ------------------------------------------------------------ attention
    gate_gain: ClassVar[float] = 1.0

    def squeeze_excite(self, x, hidden: int, kind: str | None, site: Site):
        at, channels = Site(f"{site.prefix}_se"), x.shape[-1]
        inner = self.linear(x.pooled(), hidden, at.name("reduce"), self.std(at, 1, channels, hidden))
        inner = activate(inner, function_of(kind or self.activation))
        logits = self.linear(inner, channels, at.name("expand"), self.std(at, 1, hidden, channels))
        return self.note(at.prefix, self.gated(x, logits))

    def channel_attention(self, x, site: Site):
        at, kernel = Site(f"{site.prefix}_eca"), numerics.eca_kernel(x.shape[-1])
        self.kernels[f"{at.name('conv')}/kernel"] = (1 / kernel, None, kernel)
        return self.note(at.prefix, self.gated(x, replace(x.pooled(), mean=0.0)))

    def gated(self, x: Moments, logits: Moments) -> Moments:
        return gate(x, logits, FUNCTIONS["sigmoid"]).scaled(self.gate_gain)

    # ------------------------------------------------------------ residual branch
    def enter(self, x, site: Site):
        return x

    def identity(self, x, entered):
        return x

    def exit(self, x, site: Site):
        return x

    def weigh(self, site: Site) -> tuple[float, float]:
        """Weights of skip and branch."""
        return 1.0, 1.0

    def merge(self, skip, branch, site: Site, kind: str = "out"):
        a, b = self.weigh(site)
        return self.note(site.name(kind), skip.plus(branch, a, b))

    def drop_path(self, x, rate: float, rescale: bool, site: Site):
        if not rate:
            return x
        keep = 1 - rate
        second, factor = (x.second_moment / keep, 1.0) if rescale else (x.second_moment * keep, keep)
        acsm = factor**2 * x.acsm
        return x.like(factor * x.mean, acsm, second - acsm)

    # ------------------------------------------------------------ the end of the network
    def leave(self, x, site: Site):
        return x

    def head(self, x, units: int, scheme: str = "small") -> None:
        """Note the classifier's weights."""
        stds: dict[str, Callable[[], float]] = {
            "hidden": lambda: self.std(Site("head", role="top"), 1, x.shape[-1], units),
            "zeros": lambda: 0.0,
            "small": lambda: self.head_std(x.shape[-1], units),
        }
        self.kernels["head/kernel"] = (stds[scheme]() ** 2, None, x.shape[-1])

    def head_std(self, inputs: int, units: int) -> float:
        return 0.01 if self.init == "poster" else math.sqrt(1 / (3 * units))
