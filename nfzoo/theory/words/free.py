"""Self-normalizing and normalizer-free networks, on moments; see `nfzoo.variants.free`."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from nfzoo import numerics
from nfzoo.models.sites import Site
from nfzoo.theory.moments import FUNCTIONS, Moments, activate, function_of, gate
from nfzoo.theory.words.base import Words


@dataclass
class SN(Words):
    """Self-normalizing."""

    activation: str | None = "selu"
    init: str = "lecun"
    magnitude_preserving: bool = True
    alpha_dropout: bool = False
    doubled_gate: bool = False
    standardize: bool = False

    def conv(self, x, filters: int, kernel: int, site: Site, strides=1, groups=1, padding="same"):
        if not self.standardize:
            return super().conv(x, filters, kernel, site, strides, groups, padding)
        raw = self.std(site, kernel**2, x.shape[-1], filters, groups) ** 2
        return self.standardized(x, filters, kernel, site, raw, strides, groups, padding)

    def squeeze_excite(self, x, hidden: int, kind: str | None, site: Site):
        return super().squeeze_excite(x, hidden, None, site)

    def gated(self, x: Moments, logits: Moments) -> Moments:
        if self.doubled_gate:
            return super().gated(x, logits).scaled(2.0)
        return gate(x, logits, _preserving) if self.magnitude_preserving else super().gated(x, logits)

    def weigh(self, site: Site) -> tuple[float, float]:
        return numerics.magnitude_preserving_weights() if self.magnitude_preserving else (1.0, 1.0)

    def head_std(self, inputs: int, units: int) -> float:
        return 0.01


def _preserving(z: np.ndarray) -> np.ndarray:
    open_ = FUNCTIONS["sigmoid"](z)
    return open_ / np.sqrt((1 - open_) ** 2 + open_**2)


@dataclass
class NF(Words):
    """Normalizer-free: scaled weight standardization and branches of known variance."""

    gate_gain: ClassVar[float] = 2.0

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

    @classmethod
    def conventions(cls, dialect: str) -> dict:
        if dialect != "timm":
            return {}
        return {"epsilon": 1e-5, "epsilon_mode": "add", "gamma_in": "kernel", "skip_gain": None, "last_gain": 0.0}

    def conv(self, x, filters: int, kernel: int, site: Site, strides=1, groups=1, padding="same"):
        return self._conv(self.standardize, x, filters, kernel, site, strides, groups, padding)

    def depthwise(self, x, kernel: int, site: Site, strides=1, padding="same"):
        wanted, channels = self.standardize_depthwise, x.shape[-1]
        wanted = self.standardize if wanted is None else wanted
        return self._conv(wanted, x, channels, kernel, site, strides, channels, padding)

    def _conv(self, standardize: bool, x, filters, kernel, site: Site, strides, groups, padding):
        if not standardize:
            return super().conv(x, filters, kernel, site, strides, groups, padding)
        raw = self.std(site, kernel**2, x.shape[-1], filters, groups) ** 2
        gamma = numerics.gamma(self.activation) if self.gamma_in == "kernel" else 1.0
        gain = gamma * (self.last_gain if site.role == "last" else 1.0)
        mode = {"epsilon": self.epsilon, "epsilon_mode": self.epsilon_mode}
        return self.standardized(x, filters, kernel, site, raw, strides, groups, padding, gain, **mode)

    def act(self, x, site: Site):
        scaled = self.gamma_in == "activation" and self.standardize
        gamma = numerics.gamma(self.activation) if scaled else 1.0
        return self.note(site.name("act"), activate(x, function_of(self.activation)).scaled(gamma))

    def enter(self, x, site: Site):
        return x.scaled(1 / numerics.residual_std(site.merges, self.alpha))

    def weigh(self, site: Site) -> tuple[float, float]:
        return 1.0, self.alpha * (1.0 if self.skip_gain is None else self.skip_gain)

    def head_std(self, inputs: int, units: int) -> float:
        return 0.01


@dataclass
class PNF(NF):
    """The branches of NF, open, with plain depthwise kernels."""

    skip_gain: float | None = 1.0
    standardize_depthwise: bool | None = False

    @classmethod
    def conventions(cls, dialect: str) -> dict:
        return {}
