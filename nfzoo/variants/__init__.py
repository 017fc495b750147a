"""What a convolution, a normalization, a merge… *is*, per way of doing without (or with) normalization."""

from nfzoo.variants.base import Variant
from nfzoo.variants.free import NF, PNF, SN
from nfzoo.variants.normalized import BN, GN
from nfzoo.variants.residual import EUN, Fixup, Rescale, SkipInit

VARIANTS: dict[str, type[Variant]] = {
    "none": Variant,
    "bn": BN,
    "gn": GN,
    "sn": SN,
    "nf": NF,
    "pnf": PNF,
    "fixup": Fixup,
    "skipinit": SkipInit,
    "rescale": Rescale,
    "eun": EUN,
}

__all__ = ["BN", "EUN", "GN", "NF", "PNF", "SN", "VARIANTS", "Fixup", "Rescale", "SkipInit", "Variant"]
