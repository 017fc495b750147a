"""Residual blocks that ResNet, NFNet and RegNet share: a chain of convolutions beside a shortcut, written once.

Pure words of `Variant`; which convolutions a block has is the family's table.
"""

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from nfzoo import numerics
from nfzoo.models.sites import Site, block_sites

# How DeepMind's code reads every residual family.
DEEPMIND = {"padding": "same", "drop_path_rule": "deepmind"}


@dataclass(frozen=True, kw_only=True)
class ResidualSpec(abc.ABC):
    """What a row of a residual family tells; families add their own fields.

    Attributes:
        imagenet_stride: of the whole stem, unless it is small.
        depths: blocks per stage. widths: channels of each stage, as the family counts them.
        dialect: whose reading of the architecture, where sources disagree: "deepmind", "timm" or "keras"; None for
            that of the variant's own paper.
        size, test_size: input height and width while training and for evaluation, pixels.
        dropout_rate: before the classifier. drop_path_rate, drop_path_rule: see `numerics.drop_path_rates`.
        padding: "same" (TensorFlow) or "symmetric" (PyTorch).
        stem: "imagenet", or "small" with stride 1 for 32x32 images.
        preactivation: normalization and activation before each convolution, and nothing after the sum.
        order: "bn-relu-conv" or "relu-bn-conv".
        shortcut: "project" (1x1 convolution), "zero_pad" (subsample, append zero channels), or
            "zero_pad_norm" (subsample, normalize, append, as the code beside Fixup's does).
        downsample: how a projection halves the map: "stride" or "avg_pool" (2x2, then stride 1).
        attention: None, "se" or "eca"; se_ratio: hidden units of squeeze-excite over its channels.
    """

    imagenet_stride: ClassVar[int] = 4
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    dialect: str | None = None
    size: int = 224
    test_size: int | None = None
    dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    drop_path_rule: str = "timm"
    activation: str = "relu"
    padding: str = "symmetric"
    stem: str = "imagenet"
    classes: int = 1000
    head_scheme: str = "small"
    preactivation: bool = True
    order: str = "bn-relu-conv"
    shortcut: str = "project"
    downsample: str = "stride"
    attention: str | None = None
    se_ratio: float = 0.25

    def __post_init__(self):
        choices = {
            "stem": ("imagenet", "small"), "order": ("bn-relu-conv", "relu-bn-conv"),
            "shortcut": ("project", "zero_pad", "zero_pad_norm"),
            "downsample": ("stride", "avg_pool"), "attention": (None, "se", "eca"),
        }  # fmt: skip
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"Expected {field} to be one of {allowed}. Received: {field}={getattr(self, field)!r}")

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.size, self.size, 3

    @property
    def stem_stride(self) -> int:
        return self.imagenet_stride if self.stem == "imagenet" else 1

    @property
    def min_size(self) -> int:
        """Smallest height and width whose every stride still has a pixel to halve."""
        return self.stem_stride * math.prod(block.stride for stage in self.stages() for block in stage)

    @property
    @abc.abstractmethod
    def stem_out(self) -> int:
        """Channels that the stem gives to the first block."""

    @abc.abstractmethod
    def block(self, stage: int, at: int, inputs: int) -> "Block":
        """Resolve block `at` of a stage, both counted from 0, for its number of input channels."""

    def stages(self) -> "list[list[Block]]":
        """Resolve the blocks of every stage."""
        result, inputs = [], self.stem_out
        for stage, (_, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            result.append([])
            for at in range(depth):
                result[-1].append(self.block(stage, at, inputs))
                inputs = result[-1][-1].outputs
        return result


@dataclass(frozen=True)
class Conv:
    """One convolution of a branch."""

    filters: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1

    def __post_init__(self):
        if self.filters < 1 or self.groups < 1:
            raise ValueError(
                "Expected convolutions of at least one channel and one group. Received: widths, and a group_width or a "
                f"bottleneck, that give {self.filters} channels in {self.groups} groups"
            )


@dataclass(frozen=True)
class Block:
    """One residual block.

    Attributes:
        convs: of the branch, in order.
        project: whether the shortcut is transformed to the shape of the branch; else it is the input itself.
        hidden: units of squeeze-excite. attend_after: number of the convolution that attention follows; 0 for the last.
    """

    convs: tuple[Conv, ...]
    project: bool
    hidden: int = 0
    attend_after: int = 0

    @property
    def outputs(self) -> int:
        return self.convs[-1].filters

    @property
    def stride(self) -> int:
        return math.prod(conv.stride for conv in self.convs)


def _attend(x, block: Block, site: Site, spec: ResidualSpec, variant):
    if spec.attention == "eca":
        return variant.channel_attention(x, site)
    # The references take an unscaled ReLU inside the unit, whatever the network's activation.
    return variant.squeeze_excite(x, block.hidden, "relu", site)


def norm_act(x, site: Site, spec: ResidualSpec, variant):
    """Normalize and activate, in the order of the spec."""
    if spec.order == "bn-relu-conv":
        if spec.preactivation and getattr(variant, "last_gamma", 1.0) == 0:
            raise ValueError(
                "Expected last_gamma > 0 where an activation follows the normalization: relu(0) has no gradient, and "
                "the branch would never open. Received: last_gamma=0 in a pre-activation network"
            )
        return variant.act(variant.norm(x, site), site)
    return variant.norm(variant.act(x, site), site)


def _shortcut(x, entered, block: Block, site: Site, spec: ResidualSpec, variant):
    """Bring the input to the shape of the branch; projections see it as the branch does."""
    at, stride = Site(f"{site.prefix}_shortcut", role="shortcut", block=site.block, blocks=site.blocks), block.stride
    if not block.project:
        return variant.subsample(variant.identity(x, entered), stride, at)
    if spec.shortcut.startswith("zero_pad"):
        x = variant.subsample(entered, stride, at)
        x = variant.norm(x, at) if spec.shortcut == "zero_pad_norm" else x
        return variant.pad_channels(x, block.outputs, at)
    if stride > 1 and spec.downsample == "avg_pool":
        entered, stride = variant.average(entered, stride, at), 1
    x = variant.conv(entered, block.outputs, 1, at, strides=stride, padding=spec.padding)
    return x if spec.preactivation else variant.norm(x, at)


def residual(x, block: Block, site: Site, spec: ResidualSpec, variant, drop_path_rate: float):
    """One block, pre- or post-activation."""
    y = x if spec.preactivation else variant.enter(x, site)
    entered = y
    for number, conv in enumerate(block.convs, 1):
        last = number == len(block.convs)
        at = site.at(number, role="last" if last else "branch")
        if spec.preactivation:
            y = norm_act(y, at, spec, variant)
            if number == 1:
                y = entered = variant.enter(y, site)
        y = variant.conv(y, conv.filters, conv.kernel, at, conv.stride, conv.groups, spec.padding)
        if not spec.preactivation:
            y = variant.norm(y, at) if last else norm_act(y, at, spec, variant)
        if spec.attention and number == (block.attend_after or len(block.convs)):
            y = _attend(y, block, site, spec, variant)
    skip = _shortcut(x, entered, block, site, spec, variant)
    y = variant.tap(variant.exit(y, site), site.name("branch"))
    y = variant.drop_path(y, drop_path_rate, spec.drop_path_rule != "deepmind", site)
    if spec.preactivation:
        return variant.merge(skip, y, site)
    y = variant.merge(skip, y, site, kind="sum")
    return variant.tap(variant.act(y, site.at(None, role="merge")), site.name("out"))


def chain(stages: Sequence[Sequence[Block]], spec: ResidualSpec, variant, x):
    """All blocks in order; return the last map, and the last map of each stride as {"P2": stride 4, …}."""
    flat = [block for stage in stages for block in stage]
    sites = block_sites(
        [len(stage) for stage in stages],
        ["projection" if block.project else "identity" for block in flat],
        [len(block.convs) for block in flat],
    )
    rates = numerics.drop_path_rates(spec.drop_path_rate, len(flat), spec.drop_path_rule)
    stride, pyramid = spec.stem_stride, {}
    for block, site, rate in zip(flat, sites, rates, strict=True):
        x = residual(x, block, site, spec, variant, rate)
        stride *= block.stride
        pyramid[f"P{int(math.log2(stride))}"] = x
    return x, pyramid


def widen(x, channels: int, spec: ResidualSpec, variant):
    """The 1x1 convolution between the last block and the pooling."""
    top = Site("top", role="top")
    return norm_act(variant.conv(x, channels, 1, top, padding=spec.padding), top, spec, variant)
