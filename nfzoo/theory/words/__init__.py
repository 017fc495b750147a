"""The words of `nfzoo.variants`, read as statements on moments instead of tensors; no Keras.

A family writes its body in the words of a variant (`conv`, `norm`, `act`, `merge`, …). Given the words of this package
it computes, with the same code that builds the network, what every layer is expected to show at initialisation. The
files are those of `nfzoo.variants`, and a class has the fields of its variant, those too that do not matter for that;
tests hold them equal.
"""

from nfzoo.theory.words.base import Words
from nfzoo.theory.words.free import NF, PNF, SN
from nfzoo.theory.words.normalized import BN, GN
from nfzoo.theory.words.residual import EUN, Fixup, Rescale, SkipInit

__all__ = ["WORDS", "Words"]

WORDS: dict[str, type[Words]] = {
    "none": Words, "bn": BN, "gn": GN, "sn": SN, "nf": NF, "pnf": PNF,
    "fixup": Fixup, "skipinit": SkipInit, "rescale": Rescale, "eun": EUN,
}  # fmt: skip
