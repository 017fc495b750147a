"""Where a layer sits. A `Site` is the only thing that a variant may base a decision on.

Pure Python: the bookkeeping that normalizer-free networks need (depth, merges since the last reset) is tested against
the papers' tables without building anything.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Role = Literal["stem", "plain", "branch", "last", "shortcut", "merge", "top"]
Skip = Literal["identity", "projection", "none"]


@dataclass(frozen=True)
class Site:
    """The place of one layer.

    Attributes:
        prefix: name of what it belongs to, e.g. "stage2_block3"; layer names start with it.
        role: "stem", "plain" (nothing bypasses it), "branch", "last" (last layer of a branch), "shortcut", "merge"
            (what follows the sum of skip and branch) or "top" (after the last block).
        index: 1-based number within the prefix; None for an only layer, whose name is then without a number.
        block: number of residual blocks before this one, over the whole network.
        blocks: number L of residual blocks of the network.
        convs: number m of weight layers in this branch.
        merges: residual sums on this stream since its last reset (NFNet paper, section 3).
    """

    prefix: str
    role: Role = "plain"
    index: int | None = None
    block: int = 0
    blocks: int = 0
    convs: int = 1
    merges: int = 0

    def at(self, index: int | None, role: Role | None = None) -> "Site":
        """The same place, at another layer of the block."""
        return replace(self, index=index, role=role or self.role)

    def name(self, kind: str) -> str:
        """Layer name for an operation of this place.

        Example:
            >>> Site("stage2_block3", index=1).name("conv")
            'stage2_block3_conv1'
        """
        return f"{self.prefix}_{kind}{self.index or ''}"


def block_sites(depths: Sequence[int], skips: Sequence[Skip], convs: Sequence[int]) -> Iterator[Site]:
    """Yield the site of every block, in order.

    Args:
        depths: blocks per stage.
        skips: per block, how the input reaches its end: "identity", "projection" (projected and added: the stream
            starts anew and has seen one merge), or "none" (no bypass: the block is plain and the stream starts anew).
        convs: weight layers per block.

    Example:
        >>> [(s.prefix, s.role, s.merges) for s in block_sites([1, 2], ["none", "none", "identity"], [2, 3, 3])]
        [('stage1_block1', 'plain', 0), ('stage2_block1', 'plain', 0), ('stage2_block2', 'branch', 0)]
    """
    if not len(skips) == len(convs) == sum(depths):
        raise ValueError(
            f"Expected one skip and one number of convs for each of the {sum(depths)} blocks. "
            f"Received: {len(skips)} skips, {len(convs)} convs"
        )
    residual = sum(skip != "none" for skip in skips)
    merges = block = 0
    each = zip(skips, convs, strict=True)
    for stage, depth in enumerate(depths, 1):
        for number in range(1, depth + 1):
            skip, layers = next(each)
            yield Site(
                prefix=f"stage{stage}_block{number}",
                role="plain" if skip == "none" else "branch",
                block=block,
                blocks=residual,
                convs=layers,
                merges=merges,
            )
            merges = {"identity": merges + 1, "projection": 1, "none": 0}[skip]
            block += skip != "none"
