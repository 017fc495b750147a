"""NF-RegNets B0 to B8: RegNet blocks whose width follows from their input, with squeeze-excite in the middle.

Brock et al. 2021a (arXiv 2101.08692), section 5 and appendix; sizes from DeepMind's `nf_regnet_params` and timm.
"""

from dataclasses import dataclass
from typing import ClassVar

from nfzoo import numerics
from nfzoo.models.blocks import DEEPMIND, Block, Conv, ResidualSpec, chain, widen
from nfzoo.models.sites import Site

ADMITS = ("none", "bn", "gn", "sn", "nf")
DIALECTS = ("deepmind", "timm")
PAPER = "https://arxiv.org/abs/2101.08692"


@dataclass(frozen=True, kw_only=True)
class Spec(ResidualSpec):
    """One row; see `ResidualSpec` for the common fields.

    Attributes:
        widths: channels of each stage before `width`, a factor; DeepMind rounds down, timm to multiples of 8.
        expansion: inner channels over the block's input; 1 for the first block of the network.
        group_width: channels per group of the 3x3 convolution.
    """

    imagenet_stride: ClassVar[int] = 2
    widths: tuple[int, ...] = (48, 104, 208, 440)
    width: float = 0.75
    dialect: str | None = "deepmind"
    activation: str = "silu"
    attention: str | None = "se"
    se_ratio: float = 0.5
    downsample: str = "avg_pool"
    expansion: float = 2.25
    group_width: int = 8

    def round(self, channels: float, limit: float = 0.9) -> int:
        """Round a width as the dialect does."""
        return numerics.round_channels(channels, limit=limit) if self.dialect == "timm" else max(1, int(channels))

    @property
    def top_channels(self) -> int:
        if self.dialect == "timm":
            return self.round(self.width * (1280 * self.widths[-1] // 440))
        return 1280 * self.round(self.width * self.widths[-1]) // 440

    @property
    def stem_out(self) -> int:
        return self.round(self.width * self.widths[0])

    def block(self, stage: int, at: int, inputs: int) -> Block:
        outputs, stride = self.round(self.width * self.widths[stage]), 2 if at == 0 else 1
        expansion = 1.0 if stage == at == 0 else self.expansion
        groups = self.round(inputs * expansion) // self.group_width
        inner = groups * self.group_width
        convs = (Conv(inner), Conv(inner, 3, stride, groups), Conv(outputs))
        hidden = self.round(inner * self.se_ratio, limit=0.0)
        return Block(convs, project=stride > 1 or inputs != outputs, hidden=hidden, attend_after=2)


def conventions(spec: Spec, variant: str) -> dict:
    """Fields of spec and variant that follow from the dialect and the variant."""
    if spec.dialect == "timm":
        return {}
    return {**DEEPMIND, "head_scheme": "zeros"}


def body(spec: Spec, variant, x):
    """Build everything between the image and the pooling: the last map, and the last map of each stride."""
    stem = Site("stem", role="stem", index=1)
    x = variant.conv(x, spec.stem_out, 3, stem, spec.stem_stride, padding=spec.padding)
    x, pyramid = chain(spec.stages(), spec, variant, variant.tap(x, "stem_out"))
    return widen(x, spec.top_channels, spec, variant), pyramid


def _row(widths, depths, size, test_size, dropout_rate, **other) -> Spec:
    return Spec(widths=widths, depths=depths, size=size, test_size=test_size, dropout_rate=dropout_rate, **other)


SPECS = {
    "regnet_b0": _row((48, 104, 208, 440), (1, 3, 6, 6), 192, 224, 0.2),
    "regnet_b1": _row((48, 104, 208, 440), (2, 4, 7, 7), 224, 256, 0.2),
    "regnet_b2": _row((56, 112, 232, 488), (2, 4, 8, 8), 240, 272, 0.3),
    "regnet_b3": _row((56, 128, 248, 528), (2, 5, 9, 9), 288, 320, 0.3),
    "regnet_b4": _row((64, 144, 288, 616), (2, 6, 11, 11), 320, 384, 0.4),
    "regnet_b5": _row((80, 168, 336, 704), (3, 7, 14, 14), 384, 456, 0.4),
    "regnet_b6": _row((88, 184, 376, 792), (3, 8, 16, 16), 448, 528, 0.5),
    "regnet_b7": _row((96, 208, 416, 880), (4, 10, 19, 19), 512, 600, 0.5),
    "regnet_b8": _row((104, 232, 456, 968), (4, 11, 22, 22), 600, 672, 0.5),
    "test_regnet": _row((24, 48), (1, 2), 32, None, 0.2, classes=10),
}
