"""The normalized baselines: batch and group normalization."""

import math
from dataclasses import dataclass

import keras
from keras import layers

from nfzoo.layers import BatchNormalization
from nfzoo.models.sites import Site
from nfzoo.variants.base import Variant


@dataclass(frozen=True)
class _Normalized(Variant):
    """What both share.

    Attributes:
        epsilon: added to the variance.
        scale, center: learnable gamma and beta.
        last_gamma: initial gamma of the last normalization of a residual branch; 0 starts blocks as the identity, as
            timm and torchvision's `zero_init_residual` do.
    """

    epsilon: float = 1e-5
    scale: bool = True
    center: bool = True
    last_gamma: float = 1.0

    def options(self, site: Site) -> dict:
        gamma = keras.initializers.Constant(self.last_gamma if site.role == "last" else 1.0)
        return {"epsilon": self.epsilon, "scale": self.scale, "center": self.center, "gamma_initializer": gamma}


@dataclass(frozen=True)
class BN(_Normalized):
    """Batch normalization after each convolution (or before it, in pre-activation networks).

    Attributes:
        momentum: of the moving statistics (PyTorch's 0.1 is 0.9 here).
        epsilon, scale, center, last_gamma: see above; epsilon is Keras' 1e-3, PyTorch and DeepMind take 1e-5.
        stem_affine: keep gamma and beta in the first normalization even when they are off elsewhere, as the code behind
            the poster's first figure does.

    References: Ioffe & Szegedy 2015 (arXiv 1502.03167).
    """

    momentum: float = 0.99
    epsilon: float = 1e-3
    stem_affine: bool = False

    @classmethod
    def conventions(cls, dialect: str) -> dict:
        return {} if dialect == "keras" else {"epsilon": 1e-5, "momentum": 0.9}

    @property
    def batch_independent(self) -> bool:
        return False

    def norm(self, x, site: Site):
        options = self.options(site)
        if self.stem_affine and site.role == "stem":
            options |= {"scale": True, "center": True}
        return BatchNormalization(momentum=self.momentum, name=site.name("norm"), **options)(x)


@dataclass(frozen=True)
class GN(_Normalized):
    """Group normalization: as batch normalization, but over groups of channels of one example.

    Attributes:
        groups: number of groups; a layer whose channels it does not divide takes their greatest common divisor.

    References: Wu & He 2018 (arXiv 1803.08494).
    """

    groups: int = 32

    def norm(self, x, site: Site):
        groups = math.gcd(self.groups, x.shape[-1])
        return layers.GroupNormalization(groups, name=site.name("norm"), **self.options(site))(x)
