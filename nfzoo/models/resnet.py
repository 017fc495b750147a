"""ResNets: post- and pre-activation, 18 to 600 layers, ResNeXt, with squeeze-excite or ECA, for ImageNet and CIFAR.

He et al. 2015 (arXiv 1512.03385), He et al. 2016 (pre-activation, arXiv 1603.05027), Xie et al. 2016 (ResNeXt, arXiv
1611.05431), Hu et al. 2017 (squeeze-excite, arXiv 1709.01507), Brock et al. 2021 (NF-ResNet, arXiv 2101.08692).
`nf` and `skipinit` are pre-activation networks whatever the row says, as their papers define them.
"""

from dataclasses import dataclass

from nfzoo import numerics
from nfzoo.models.blocks import DEEPMIND, Block, Conv, ResidualSpec, chain, norm_act
from nfzoo.models.sites import Site

ADMITS = ("none", "bn", "gn", "sn", "nf", "fixup", "skipinit", "rescale", "eun")
DIALECTS = ("timm", "deepmind", "keras")
PAPER = "https://arxiv.org/abs/1512.03385"


@dataclass(frozen=True, kw_only=True)
class Spec(ResidualSpec):
    """One row; see `ResidualSpec` for the common fields.

    Attributes:
        widths: channels of each stage, before the expansion of a bottleneck; the first is also the stem's.
        bottleneck: 1x1, 3x3, 1x1 with four times the channels at the end; else two 3x3.
        groups, group_width: of the 3x3 convolution; group_width counts for the first stage and grows with the width.
        deep_stem: three 3x3 convolutions instead of one 7x7 (ResNet-D).
        stride_at: number of the convolution in a bottleneck that strides: 2 (V1.5) or 1 (V1).
        downsample_at: the block of a stage that strides: "first", or "last" (Keras' V2).
        pool_zeros: pad the pooling of the stem with zeros (Keras' V2) and not with minus infinity.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512)
    preactivation: bool = False
    bottleneck: bool = True
    groups: int = 1
    group_width: int = 64
    deep_stem: bool = False
    stride_at: int = 2
    downsample_at: str = "first"
    pool_zeros: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.stride_at not in (1, 2) or self.downsample_at not in ("first", "last"):
            raise ValueError(
                'Expected stride_at 1 or 2, and downsample_at "first" or "last". '
                f"Received: stride_at={self.stride_at!r}, downsample_at={self.downsample_at!r}"
            )
        if not self.bottleneck and (self.groups, self.group_width) != (1, 64):
            raise ValueError(
                "Expected groups=1 and group_width=64 in a network of basic blocks: only bottlenecks have groups. "
                f"Received: groups={self.groups}, group_width={self.group_width}"
            )

    @property
    def stem_out(self) -> int:
        return self.widths[0]

    def block(self, stage: int, at: int, inputs: int) -> Block:
        width, first = self.widths[stage], self.downsample_at == "first"
        outputs = width * (4 if self.bottleneck else 1)
        last_block, last_stage = at == self.depths[stage] - 1, stage == len(self.depths) - 1
        stride = 2 if (at == 0 and stage > 0 if first else last_block and not last_stage) else 1
        project = inputs != outputs or (stride > 1 and first)
        return Block(self._convs(width, outputs, stride), project, self._hidden(outputs))

    def _convs(self, width: int, outputs: int, stride: int) -> tuple[Conv, ...]:
        if not self.bottleneck:
            return Conv(width, 3, stride), Conv(outputs, 3)
        inner = width * self.group_width // 64 * self.groups
        early, late = (stride, 1) if self.stride_at == 1 else (1, stride)
        return Conv(inner, 1, early), Conv(inner, 3, late, self.groups), Conv(outputs)

    def _hidden(self, channels: int) -> int:
        if self.dialect == "deepmind":
            return max(1, int(channels * self.se_ratio))
        return numerics.round_channels(channels * self.se_ratio, limit=0.0)


def conventions(spec: Spec, variant: str) -> dict:
    """Fields of spec and variant that follow from the dialect and the variant."""
    dialect = spec.dialect or ("deepmind" if variant in ("nf", "skipinit") else "timm")
    fields = {"dialect": dialect, "se_ratio": 0.25 if dialect == "deepmind" else 1 / 16}
    if variant in ("nf", "skipinit"):
        fields["preactivation"] = True
    if variant == "none":
        # By fan-out the stem (3 channels in, 64 out) would take nearly all of the signal, and nothing brings it back.
        fields["init"] = "he"
    if variant in ("rescale", "eun") or (variant == "nf" and dialect == "timm"):
        fields["downsample"] = "avg_pool"
    if dialect == "deepmind":
        fields |= DEEPMIND
    if dialect == "keras":
        fields |= {"drop_path_rule": "keras"}
        if variant == "bn":
            biases = ("stem", "shortcut", "last") if spec.preactivation else True
            fields |= {"epsilon": 1.001e-5, "momentum": 0.99, "use_bias": biases}
        if spec.preactivation:
            fields |= {"downsample_at": "last", "pool_zeros": True}
        else:
            fields["stride_at"] = 1
    return fields


def _stem(spec: Spec, variant, x):
    strides = 2 if spec.stem == "imagenet" else 1
    if spec.deep_stem:
        convs = [(spec.widths[0] // 2, 3, strides), (spec.widths[0] // 2, 3, 1), (spec.widths[0], 3, 1)]
    else:
        convs = [(spec.widths[0], 7 if spec.stem == "imagenet" else 3, strides)]
    for number, (filters, kernel, stride) in enumerate(convs, 1):
        site = Site("stem", role="stem", index=number)
        x = variant.conv(x, filters, kernel, site, strides=stride, padding=spec.padding)
        if number < len(convs) or not spec.preactivation:
            x = norm_act(x, site, spec, variant)
    if spec.stem == "imagenet":
        x = variant.max_pool(x, 3, 2, spec.padding, Site("stem"), zeros=spec.pool_zeros)
    return variant.tap(x, "stem_out")


def body(spec: Spec, variant, x):
    """Build everything between the image and the pooling: the last map, and the last map of each stride."""
    x, pyramid = chain(spec.stages(), spec, variant, _stem(spec, variant, x))
    return norm_act(x, Site("top", role="top"), spec, variant) if spec.preactivation else x, pyramid


def _rows() -> dict[str, Spec]:
    """Rows by name: depth x (post-, pre-activation, attention), ResNeXt, CIFAR."""
    deep = {
        26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3),
        288: (24, 24, 24, 24), 600: (50, 50, 50, 50),
    }  # fmt: skip
    shallow = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
    rows = {}
    for depth, depths in {**shallow, **deep}.items():
        common = {"depths": depths, "bottleneck": depth in deep}
        # Only timm has an NF-ResNet of 26 layers, and one with ECA.
        rows[f"resnet{depth}"] = Spec(dialect="timm" if depth == 26 else None, **common)
        rows[f"resnetv2_{depth}"] = Spec(preactivation=True, **common)
        if depth in deep:
            rows[f"seresnet{depth}"] = Spec(attention="se", dialect="timm" if depth == 26 else None, **common)
        if depth in (26, 50, 101):
            rows[f"ecaresnet{depth}"] = Spec(attention="eca", dialect="timm", **common)
    for name, depth, width in (("50_32x4d", 50, 4), ("101_32x8d", 101, 8)):
        common = {"depths": deep[depth], "groups": 32, "group_width": width}
        rows[f"resnext{name}"] = Spec(**common)
        rows[f"seresnext{name}"] = Spec(attention="se", **common)
    # The batch-normalized twin of NFNet: SE-ResNeXt with the deep stem and the pooled shortcuts of ResNet-D.
    for depth in (26, 50, 101):
        rows[f"seresnext{depth}d_32x4d"] = Spec(
            depths=deep[depth], groups=32, group_width=4, attention="se", deep_stem=True, downsample="avg_pool",
        )  # fmt: skip
    for depth in (20, 32, 44, 56, 110, 1202):
        rows[f"resnet{depth}_cifar"] = Spec(
            depths=((depth - 2) // 6,) * 3, widths=(16, 32, 64), bottleneck=False, stem="small", shortcut="zero_pad",
            size=32, classes=10,
        )  # fmt: skip
    # A real but tiny network for tests: bottlenecks, groups, attention, an identity and a projected shortcut.
    rows["test_resnet"] = Spec(
        depths=(1, 2), widths=(16, 32), groups=2, group_width=32, attention="se", size=32, classes=10,
    )  # fmt: skip
    return rows


SPECS = _rows()
