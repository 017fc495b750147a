"""Fixup, SkipInit, Rescale and EUN, on moments; see `nfzoo.variants.residual`."""

from dataclasses import dataclass
from typing import ClassVar

from nfzoo import numerics
from nfzoo.models.sites import Site
from nfzoo.theory.moments import Moments, normalize
from nfzoo.theory.words.base import Words


@dataclass
class _Residual(Words):
    """What Fixup, SkipInit, Rescale and EUN share: the weights of skip and branch."""

    initial_scale: ClassVar[float] = 1.0

    init: str = "he"
    scale: bool = True
    alpha_beta: bool = False

    def weigh(self, site: Site) -> tuple[float, float]:
        a, b = numerics.rescale_weights(site.block, site.blocks) if self.alpha_beta else (1.0, 1.0)
        return a, b * (self.initial_scale if self.scale else 1.0)

    def head_std(self, inputs: int, units: int) -> float:
        return 0.0


@dataclass
class Fixup(_Residual):
    """Fixup: branches start at zero through their last layer."""

    biased_identity: bool = False

    @classmethod
    def conventions(cls, dialect: str) -> dict:
        return {"biased_identity": True} if dialect == "deepmind" else {}

    def std(self, site: Site, receptive: int, inputs: int, outputs: int, groups: int = 1) -> float:
        factor = {"last": 0.0, "branch": numerics.fixup_factor(site.blocks, site.convs) if site.role == "branch" else 1}
        return factor.get(site.role, 1.0) * super().std(site, receptive, inputs, outputs, groups)


@dataclass
class SkipInit(_Residual):
    """SkipInit: a scalar, zero at the start, on every branch."""

    initial_scale: ClassVar[float] = 0.0

    use_bias: bool | tuple[str, ...] = ("plain", "branch", "last", "shortcut", "top")


@dataclass
class Rescale(_Residual):
    """RescaleNet: weights of skip and branch whose squares sum to 1, and channels centred on their first batches."""

    alpha_beta: bool = True
    prebias: bool = True

    def std(self, site: Site, receptive: int, inputs: int, outputs: int, groups: int = 1) -> float:
        scheme = "lecun" if site.role == "shortcut" else self.init
        std = numerics.init_std(scheme, receptive, inputs, outputs, groups)
        shrunk = self.alpha_beta and site.role in ("branch", "last")
        return std * numerics.rescale_factor(site.block, site.blocks, site.convs) if shrunk else std

    def _centred(self, x: Moments) -> Moments:
        return normalize(x, "centre") if self.prebias else x

    def before(self, x, site: Site):
        return x if site.role == "stem" else self._centred(x)

    def conv(self, x, filters: int, kernel: int, site: Site, strides=1, groups=1, padding="same"):
        x = super().conv(x, filters, kernel, site, strides, groups, padding)
        return self._centred(x) if site.role == "stem" else x

    def head_std(self, inputs: int, units: int) -> float:
        return inputs**-0.5


@dataclass
class EUN(_Residual):
    """EUN: every convolution standardizes its input."""

    use_bias: bool | tuple[str, ...] = True
    alpha_beta: bool = True
    statistics: str = "whole_tensor"

    def before(self, x, site: Site):
        kinds = {"whole_tensor": "tensor", "channel_l2": "l2", "per_channel_batch": "channel"}
        return normalize(x, kinds[self.statistics])

    def head_std(self, inputs: int, units: int) -> float:
        return inputs**-0.5
