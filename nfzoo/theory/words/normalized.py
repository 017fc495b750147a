"""Batch and group normalization, on moments; see `nfzoo.variants.normalized`."""

import math
from dataclasses import dataclass

from nfzoo.models.sites import Site
from nfzoo.theory.moments import Moments, normalize
from nfzoo.theory.words.base import Words


@dataclass
class _Normalized(Words):
    """What batch and group normalization share."""

    epsilon: float = 1e-5
    scale: bool = True
    center: bool = True
    last_gamma: float = 1.0

    def norm(self, x, site: Site):
        factor = self.last_gamma if site.role == "last" else 1.0
        return self.note(site.name("norm"), self.normalized(x).scaled(factor))


@dataclass
class BN(_Normalized):
    """Batch normalization."""

    momentum: float = 0.99
    epsilon: float = 1e-3
    stem_affine: bool = False

    @classmethod
    def conventions(cls, dialect: str) -> dict:
        return {} if dialect == "keras" else {"epsilon": 1e-5, "momentum": 0.9}

    def normalized(self, x: Moments) -> Moments:
        return normalize(x, "channel")


@dataclass
class GN(_Normalized):
    """Group normalization."""

    groups: int = 32

    def normalized(self, x: Moments) -> Moments:
        return normalize(x, "group", x.shape[-1] // math.gcd(self.groups, x.shape[-1]))
