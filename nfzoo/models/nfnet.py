"""NFNets: F0 to F7 and their wide (+) forms, and timm's light L0 and ECA-L0 to L3.

Brock et al. 2021b (arXiv 2102.06171), appendix C; two grouped 3x3 convolutions in each bottleneck.
"""

from dataclasses import dataclass

from nfzoo import numerics
from nfzoo.models.blocks import DEEPMIND, Block, Conv, ResidualSpec, chain, norm_act, widen
from nfzoo.models.sites import Site

ADMITS = ("none", "bn", "gn", "sn", "nf")
DIALECTS = ("deepmind", "timm")
PAPER = "https://arxiv.org/abs/2102.06171"


@dataclass(frozen=True, kw_only=True)
class Spec(ResidualSpec):
    """One row; see `ResidualSpec` for the common fields.

    Attributes:
        bottleneck: channels of the inner convolutions over the stage's, rounded down to whole groups.
        group_width: channels per group of the 3x3 convolutions.
        top: channels of the last convolution over those of the last stage.
        stem_widths: of the first three convolutions. stem_channels: of the fourth; None: half of the first stage's.
    """

    widths: tuple[int, ...] = (256, 512, 1536, 1536)
    dialect: str | None = "deepmind"
    activation: str = "gelu"
    attention: str | None = "se"
    se_ratio: float = 0.5
    downsample: str = "avg_pool"
    bottleneck: float = 0.5
    group_width: int = 128
    top: float = 2.0
    stem_widths: tuple[int, ...] = (16, 32, 64)
    stem_channels: int | None = None

    @property
    def stem_out(self) -> int:
        return self.stem_channels or self.widths[0] // 2

    def block(self, stage: int, at: int, inputs: int) -> Block:
        outputs, stride = self.widths[stage], 2 if at == 0 and stage > 0 else 1
        groups = int(outputs * self.bottleneck) // self.group_width
        inner = groups * self.group_width
        convs = (Conv(inner), Conv(inner, 3, stride, groups), Conv(inner, 3, 1, groups), Conv(outputs))
        hidden = numerics.round_channels(outputs * self.se_ratio, limit=0.0)
        return Block(convs, project=stride > 1 or inputs != outputs, hidden=hidden)


def conventions(spec: Spec, variant: str) -> dict:
    """Fields of spec and variant that follow from the dialect and the variant."""
    if spec.dialect == "timm":
        return {}
    tanh = {"activation": "gelu_tanh"} if variant != "sn" and spec.activation == "gelu" else {}
    return {**DEEPMIND, **tanh}


def body(spec: Spec, variant, x):
    """Build everything between the image and the pooling: the last map, and the last map of each stride."""
    strides = (2, 1, 1, 2) if spec.stem == "imagenet" else (1, 1, 1, 1)
    for number, (filters, stride) in enumerate(zip((*spec.stem_widths, spec.stem_out), strides, strict=True), 1):
        site = Site("stem", role="stem", index=number)
        x = variant.conv(x, filters, 3, site, strides=stride, padding=spec.padding)
        if number < len(strides):
            x = norm_act(x, site, spec, variant)
    x, pyramid = chain(spec.stages(), spec, variant, variant.tap(x, "stem_out"))
    return widen(x, int(spec.top * spec.widths[-1]), spec, variant), pyramid


def _rows() -> dict[str, Spec]:
    train = (192, 224, 256, 320, 384, 416, 448, 480)
    test = (256, 320, 352, 416, 512, 544, 576, 608)
    dropout = (0.2, 0.3, 0.4, 0.4, 0.5, 0.5, 0.5, 0.5)
    rows = {}
    for n in range(8):
        common = {
            "depths": tuple((n + 1) * d for d in (1, 2, 6, 3)), "size": train[n], "test_size": test[n],
            "dropout_rate": dropout[n],
        }  # fmt: skip
        rows[f"nfnet_f{n}"] = Spec(**common)
        rows[f"nfnet_f{n}plus"] = Spec(widths=(384, 768, 2048, 2048), **common)
    light = {"dialect": "timm", "activation": "silu", "bottleneck": 0.25, "group_width": 64, "se_ratio": 0.25}
    rows["nfnet_l0"] = Spec(depths=(1, 2, 6, 3), size=224, test_size=288, top=1.5, **light)
    light |= {"attention": "eca"}
    for n, (size, larger) in enumerate(((224, 288), (256, 320), (320, 384), (352, 448))):
        depths = tuple((n + 1) * d for d in (1, 2, 6, 3))
        rows[f"eca_nfnet_l{n}"] = Spec(depths=depths, size=size, test_size=larger, top=2.0 if n else 1.5, **light)
    # timm's own tiny network.
    rows["test_nfnet"] = Spec(
        depths=(1, 1, 1, 1), widths=(32, 64, 96, 128), size=160, dialect="timm", activation="silu", bottleneck=0.25,
        group_width=8, se_ratio=0.25, top=1.5, stem_channels=128,
    )  # fmt: skip
    return rows


SPECS = _rows()
