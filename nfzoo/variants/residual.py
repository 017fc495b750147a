"""Without normalization, by what a residual branch starts with: Fixup, SkipInit, Rescale, EUN.

All four share two switches, those of EUNNet's Table 4: `scale`, a learnable scalar on every branch, and `alpha_beta`,
RescaleNet's constant weights of skip and branch.
"""

from dataclasses import dataclass
from typing import ClassVar

import keras

from nfzoo import numerics
from nfzoo.layers import Affine, CenteringBias, Merge, StandardizeInput
from nfzoo.models.sites import Site
from nfzoo.variants.base import Variant


@dataclass(frozen=True)
class _Residual(Variant):
    """A branch of its own scale.

    Attributes:
        scale: a learnable scalar on every branch.
        alpha_beta: weigh skip and branch with `nfzoo.numerics.rescale_weights`.
    """

    initial_scale: ClassVar[float] = 1.0

    scale: bool = True
    alpha_beta: bool = False

    def merge(self, skip, branch, site: Site, kind: str = "out"):
        a, b = numerics.rescale_weights(site.block, site.blocks) if self.alpha_beta else (1.0, 1.0)
        return Merge(a, b, gain=self.initial_scale if self.scale else None, name=site.name(kind))([skip, branch])


@dataclass(frozen=True)
class Fixup(_Residual):
    """Fixup: branches start at zero through their last layer, their other layers are shrunk, scalar biases everywhere.

    Layers that nothing bypasses keep their usual initialisation: shrinking them would only shrink the signal.

    Attributes:
        scale, alpha_beta: see the module.
        init: "he"; the authors' code takes the fan-out, "he_fan_out".
        biased_identity: an identity shortcut carries the bias of the branch's entrance too (DeepMind's code; the
            authors' does so for projections only).

    References: Zhang et al. 2019 (arXiv 1901.09321), section 3, and its code.
    """

    init: str = "he"
    biased_identity: bool = False

    @classmethod
    def conventions(cls, dialect: str) -> dict:
        return {"biased_identity": True} if dialect == "deepmind" else {}

    def kernel_init(self, site: Site, receptive: int, inputs: int, outputs: int, groups: int = 1) -> keras.Initializer:
        if site.role == "last":
            return keras.initializers.Zeros()
        std = numerics.init_std(self.init, receptive, inputs, outputs, groups)
        if site.role == "branch":
            std *= numerics.fixup_factor(site.blocks, site.convs)
        return keras.initializers.RandomNormal(stddev=std)

    def enter(self, x, site: Site):
        # The first layer of a plain block has its own bias, see `before`.
        return x if site.role == "plain" else Affine(name=site.name("enter"))(x)

    def identity(self, x, entered):
        return entered if self.biased_identity else x

    def exit(self, x, site: Site):
        return Affine(gain=1.0 if self.scale else None, name=site.name("exit"))(x)

    def merge(self, skip, branch, site: Site, kind: str = "out"):
        a, b = numerics.rescale_weights(site.block, site.blocks) if self.alpha_beta else (1.0, 1.0)
        return Merge(a, b, name=site.name(kind))([skip, branch])

    def before(self, x, site: Site):
        # The first convolution of a branch has the bias of its entrance, which the shortcut shares.
        inner = site.role in ("branch", "last") and site.index != 1
        return Affine(name=site.name("preconv"))(x) if inner or site.role in ("plain", "top") else x

    def act(self, x, site: Site):
        if site.role != "merge":
            x = Affine(name=site.name("preact"))(x)
        return super().act(x, site)

    def leave(self, x, site: Site):
        return Affine(name=site.name("leave"))(x)

    def head_init(self, inputs: int) -> keras.Initializer:
        return keras.initializers.Zeros()


@dataclass(frozen=True)
class SkipInit(_Residual):
    """SkipInit: a learnable scalar, zero at the start, on every residual branch.

    References: De & Smith 2020 (arXiv 2002.10444), section 3.
    """

    initial_scale: ClassVar[float] = 0.0

    init: str = "he"
    use_bias: bool | tuple[str, ...] = ("plain", "branch", "last", "shortcut", "top")

    def head_init(self, inputs: int) -> keras.Initializer:
        return keras.initializers.Zeros()


@dataclass(frozen=True)
class Rescale(_Residual):
    """RescaleNet: skip and branch weighted so that their squares sum to 1, biases that centre themselves.

    Attributes:
        scale, alpha_beta: see the module; alpha_beta includes the shrunk initial weights.
        prebias: a `CenteringBias` before every convolution (after the stem's) and before the pooling.

    References: Shao et al. 2020, "Is normalization indispensable for training deep neural networks?", and its code.
    """

    init: str = "he"
    alpha_beta: bool = True
    prebias: bool = True

    @property
    def batch_independent(self) -> bool:
        # In the first training steps the prebias centres each batch on itself.
        return not self.prebias

    def kernel_init(self, site: Site, receptive: int, inputs: int, outputs: int, groups: int = 1) -> keras.Initializer:
        scheme = "lecun" if site.role == "shortcut" else self.init
        std = numerics.init_std(scheme, receptive, inputs, outputs, groups)
        if self.alpha_beta and site.role in ("branch", "last"):
            std *= numerics.rescale_factor(site.block, site.blocks, site.convs)
        return keras.initializers.RandomNormal(stddev=std)

    def _centred(self, x, name: str):
        return CenteringBias(name=name)(x) if self.prebias else x

    def before(self, x, site: Site):
        return x if site.role == "stem" else self._centred(x, site.name("prebias"))

    def conv(self, x, filters: int, kernel: int, site: Site, strides=1, groups=1, padding="same"):
        x = super().conv(x, filters, kernel, site, strides, groups, padding)
        return self._centred(x, site.name("prebias")) if site.role == "stem" else x

    def leave(self, x, site: Site):
        return self._centred(x, site.name("leave"))

    def head_init(self, inputs: int) -> keras.Initializer:
        return keras.initializers.RandomNormal(stddev=inputs**-0.5)


@dataclass(frozen=True)
class EUN(_Residual):
    """EUN: the input of every convolution is standardized by its own statistics; skip and branch weighted as Rescale's.

    Attributes:
        scale, alpha_beta: see the module.
        statistics: "whole_tensor" (the authors' code), "channel_l2" (their appendix; independent of the batch) or
            "per_channel_batch" (equation 8, literally), see `nfzoo.layers.StandardizeInput`.

    References: Nguyen, Choi & Yang 2023, "EUNNet" (IEEE Access), equations 4 to 9, and their code.
    """

    init: str = "he"
    use_bias: bool | tuple[str, ...] = True
    alpha_beta: bool = True
    statistics: str = "whole_tensor"

    @property
    def batch_independent(self) -> bool:
        return self.statistics == "channel_l2"

    def before(self, x, site: Site):
        return StandardizeInput(self.statistics, name=site.name("standardize"))(x)

    def head_init(self, inputs: int) -> keras.Initializer:
        return keras.initializers.RandomNormal(stddev=inputs**-0.5)
