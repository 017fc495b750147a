"""EfficientNet B0-B7: mobile inverted bottlenecks with squeeze-excite, in any variant.

Tan & Le 2019 (arXiv 1905.11946). With the weights of keras.applications' EfficientNets the variant `bn` computes their
logits; with `padding="symmetric"` and the poster's constants, `bn`, `none` and `sn` compute the poster's networks.
"""

import math
from dataclasses import dataclass, replace

from nfzoo import numerics
from nfzoo.models.sites import Site, block_sites

ADMITS = ("none", "bn", "gn", "sn", "nf", "pnf", "fixup", "skipinit", "rescale", "eun")
DIALECTS = ("keras", "timm")
PAPER = "https://arxiv.org/abs/1905.11946"


@dataclass(frozen=True)
class Spec:
    """One row of the family.

    Attributes:
        width, depth: multipliers of channels and of blocks per stage.
        size: default input height and width, pixels; test_size: for evaluation, None for the same.
        dialect: "keras" (TensorFlow's padding, epsilon 1e-3) or "timm" (symmetric padding, epsilon 1e-5).
        dropout_rate: before the classifier. drop_path_rate: of stochastic depth, growing linearly from 0; the last
            block stays one step below it.
        padding: "same" (TensorFlow, Keras) or "symmetric" (PyTorch).
        stem: "imagenet" has stride 2, "small" stride 1 for 32x32 images.
        channels, repeats, kernels, strides, expansions: per stage, before scaling.
        se_ratio: hidden units of squeeze-excite over the block's input channels.
        stem_channels, top_channels: of the first and the last convolution, before scaling.
        head_scheme: see `Variant.head`.
    """

    width: float = 1.0
    depth: float = 1.0
    size: int = 224
    dropout_rate: float = 0.2
    dialect: str | None = "keras"
    test_size: int | None = None
    drop_path_rate: float = 0.0
    activation: str = "silu"
    padding: str = "same"
    stem: str = "imagenet"
    classes: int = 1000
    channels: tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    repeats: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    kernels: tuple[int, ...] = (3, 3, 5, 3, 5, 5, 3)
    strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
    expansions: tuple[int, ...] = (1, 6, 6, 6, 6, 6, 6)
    se_ratio: float = 0.25
    stem_channels: int = 32
    top_channels: int = 1280
    head_scheme: str = "small"

    def __post_init__(self):
        if self.stem not in ("imagenet", "small"):
            raise ValueError(f'Expected stem to be "imagenet" or "small". Received: stem={self.stem!r}')

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.size, self.size, 3

    @property
    def stem_stride(self) -> int:
        return 2 if self.stem == "imagenet" else 1

    @property
    def min_size(self) -> int:
        """Smallest height and width whose every stride still has a pixel to halve."""
        return self.stem_stride * math.prod(self.strides)


def conventions(spec: Spec, variant: str) -> dict:
    """Fields of spec and variant that follow from the dialect and the variant."""
    return {"padding": "symmetric", "gamma_in": "activation"} if spec.dialect == "timm" else {}


@dataclass(frozen=True)
class Block:
    """What one MBConv needs, resolved from the spec."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    expansion: int

    @property
    def skip(self) -> bool:
        return self.stride == 1 and self.inputs == self.outputs


def blocks(spec: Spec) -> list[list[Block]]:
    """Resolve the scaled blocks of every stage."""
    inputs = numerics.round_channels(spec.stem_channels * spec.width)
    stages = []
    repeats = numerics.round_repeats(spec.repeats, spec.depth)
    for channels, repeat, kernel, stride, expansion in zip(
        spec.channels, repeats, spec.kernels, spec.strides, spec.expansions, strict=True
    ):
        outputs = numerics.round_channels(channels * spec.width)
        first = Block(inputs, outputs, kernel, stride, expansion)
        stages.append([first] + [replace(first, inputs=outputs, stride=1)] * (repeat - 1))
        inputs = outputs
    return stages


def mbconv(x, block: Block, site: Site, spec: Spec, variant, drop_path_rate: float):
    """Expand, filter each channel, attend, project; add the input where the shapes allow."""
    skip, x = x, variant.enter(x, site)
    if block.expansion > 1:
        x = variant.conv(x, block.inputs * block.expansion, 1, site.at(1), padding=spec.padding)
        x = variant.act(variant.norm(x, site.at(1)), site.at(1))
    x = variant.depthwise(x, block.kernel, site.at(2), strides=block.stride, padding=spec.padding)
    x = variant.act(variant.norm(x, site.at(2)), site.at(2))
    x = variant.squeeze_excite(x, max(1, int(block.inputs * spec.se_ratio)), None, site)
    last = site.at(3, role="last" if block.skip else "plain")
    x = variant.norm(variant.conv(x, block.outputs, 1, last, padding=spec.padding), last)
    x = variant.tap(variant.exit(x, site) if block.skip else x, site.name("branch"))
    if not block.skip:
        return variant.tap(x, site.name("out"))
    return variant.merge(skip, variant.drop_path(x, drop_path_rate, True, site), site)


def body(spec: Spec, variant, x):
    """Build everything between the image and the pooling.

    Returns:
        The last feature map, and the last map of each stride as {"P1": stride 2, …, "P5": stride 32}.
    """
    if getattr(variant, "gamma_in", None) == "kernel":
        raise ValueError(
            'Expected gamma_in="activation" of an EfficientNet: the first convolution of its blocks follows no '
            'activation, whose gain it would make up for. Received: "kernel"'
        )
    stages = blocks(spec)
    flat = [block for stage in stages for block in stage]
    sites = block_sites(
        [len(stage) for stage in stages],
        ["identity" if b.skip else "none" for b in flat],
        [3 if b.expansion > 1 else 2 for b in flat],
    )
    stem, stride = Site("stem", role="stem", index=1), spec.stem_stride
    x = variant.conv(x, flat[0].inputs, 3, stem, strides=stride, padding=spec.padding)
    x = variant.tap(variant.act(variant.norm(x, stem), stem), "stem_out")
    pyramid = {}
    rates = numerics.drop_path_rates(spec.drop_path_rate, len(flat), "keras")  # timm's EfficientNets do the same
    for block, site, rate in zip(flat, sites, rates, strict=True):
        x = mbconv(x, block, site, spec, variant, rate)
        stride *= block.stride
        pyramid[f"P{int(math.log2(stride))}"] = x
    top = Site("top", role="top")
    x = variant.conv(x, numerics.round_channels(spec.top_channels * spec.width), 1, top, padding=spec.padding)
    return variant.act(variant.norm(x, top), top), pyramid


SPECS = {
    "efficientnet_b0": Spec(1.0, 1.0, 224, 0.2),
    "efficientnet_b1": Spec(1.0, 1.1, 240, 0.2),
    "efficientnet_b2": Spec(1.1, 1.2, 260, 0.3),
    "efficientnet_b3": Spec(1.2, 1.4, 300, 0.3),
    "efficientnet_b4": Spec(1.4, 1.8, 380, 0.4),
    "efficientnet_b5": Spec(1.6, 2.2, 456, 0.4),
    "efficientnet_b6": Spec(1.8, 2.6, 528, 0.5),
    "efficientnet_b7": Spec(2.0, 3.1, 600, 0.5),
    # A real but tiny network for tests: residual and plain blocks, both kernel sizes, every stride.
    "test_efficientnet": Spec(
        size=32, classes=10, channels=(8, 16, 24), repeats=(1, 2, 3), kernels=(3, 5, 3), strides=(1, 2, 2),
        expansions=(1, 4, 4), stem_channels=8, top_channels=64,
    ),
}  # fmt: skip
