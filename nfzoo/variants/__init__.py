"""What a convolution, a normalization, a merge… *is*, per way of doing without (or with) normalization."""

from nfzoo.variants.base import Variant
from nfzoo.variants.free import NF, SN, SNF
from nfzoo.variants.normalized import BN, GN
from nfzoo.variants.residual import EUN, Fixup, Rescale, SkipInit

VARIANTS: dict[str, type[Variant]] = {
    "none": Variant,
    "bn": BN,
    "gn": GN,
    "sn": SN,
    "nf": NF,
    "snf": SNF,
    "fixup": Fixup,
    "skipinit": SkipInit,
    "rescale": Rescale,
    "eun": EUN,
}

__all__ = ["BN", "EUN", "GN", "NF", "SN", "SNF", "VARIANTS", "Fixup", "Rescale", "SkipInit", "Variant"]
