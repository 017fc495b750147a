import math

import pytest

from nfzoo import numerics
from nfzoo.models import efficientnet
from nfzoo.models.sites import Site, block_sites


def test_expected_std_of_nf_resnet50():
    """The list that DeepMind's code gives for depths 3, 4, 6, 3 and alpha 0.2: each block divides by it."""
    depths = [3, 4, 6, 3]
    skips = [skip for d in depths for skip in ["projection"] + ["identity"] * (d - 1)]
    got = [round(numerics.residual_std(s.merges, 0.2), 6) for s in block_sites(depths, skips, [3] * 16)]
    assert got == [
        1, 1.019804, 1.03923, 1.058301, 1.019804, 1.03923, 1.058301, 1.077033, 1.019804, 1.03923, 1.058301, 1.077033,
        1.095445, 1.113553, 1.019804, 1.03923,
    ]  # fmt: skip


def test_expected_std_starts_anew_after_a_block_without_skip():
    sites = list(block_sites([3, 2], ["none", "identity", "identity", "none", "identity"], [3] * 5))
    assert [s.merges for s in sites] == [0, 0, 1, 2, 0]
    assert [s.role for s in sites] == ["plain", "branch", "branch", "plain", "branch"]


def test_residual_blocks_are_counted_without_the_plain_ones():
    stages = efficientnet.blocks(efficientnet.SPECS["efficientnet_b0"])
    flat = [b for stage in stages for b in stage]
    sites = list(block_sites([len(s) for s in stages], ["identity" if b.skip else "none" for b in flat], [3] * 16))
    assert len(sites) == 16 and {s.blocks for s in sites} == {9}
    assert [s.prefix for s in sites][:4] == ["stage1_block1", "stage2_block1", "stage2_block2", "stage3_block1"]


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="each of the 3 blocks"):
        list(block_sites([1, 2], ["none"], [3]))


def test_names():
    assert Site("stem", index=1).name("conv") == "stem_conv1"
    assert Site("top").name("pool") == "top_pool"
    assert Site("stage1_block1").at(3, "last") == Site("stage1_block1", "last", 3)


@pytest.mark.parametrize(
    ("row", "number", "last"), [("b0", 16, 320), ("b1", 23, 320), ("b4", 32, 448), ("b5", 39, 512), ("b7", 55, 640)]
)
def test_blocks_of_the_published_rows(row, number, last):
    stages = efficientnet.blocks(efficientnet.SPECS[f"efficientnet_{row}"])
    assert sum(map(len, stages)) == number and stages[-1][-1].outputs == last
    assert math.prod(b.stride for stage in stages for b in stage) == 16
