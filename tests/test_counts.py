"""Parameters and multiply-adds of every published row, and the manifest that stores them."""

import json
import math

import pytest

import nfzoo
from nfzoo import names, registry


def _numbered(pattern, numbers, counts):
    return {pattern.format(n): c for n, c in zip(numbers, counts, strict=True)}


# Trainable parameters as DeepMind's, timm's, the authors' and Keras' own code count them, in the default dialect.
PUBLISHED = {
    **_numbered(
        "bn_efficientnet_b{}", range(8),
        (5288548, 7794184, 9109994, 12233232, 19341616, 30389784, 43040704, 66347960),
    ),
    "none_ffnn_10x100": 398200, "none_ffnn_10x512": 3725924,
    **_numbered(
        "bn_resnet{}", (18, 34, 50, 101, 152, 200), (11689512, 21797672, 25557032, 44549160, 60192808, 64673832)
    ),
    "bn_resnet288": 146460456, "bn_resnet600": 300646696,
    **_numbered(
        "bn_resnetv2_{}", (50, 101, 152, 200, 288, 600), (25549352, 44541480, 60185128, 64666152, 146452776, 300639016)
    ),
    "bn_resnext50_32x4d": 25028904, "bn_seresnext50_32x4d": 27559896, "gn_resnet50": 25557032,
    "bn_resnet110_cifar": 1727962,
    **_numbered(
        "nf_resnet{}", (50, 101, 152, 200, 288, 600), (25557048, 44549193, 60192858, 64673898, 146460552, 300646896)
    ),
    **_numbered(
        "nf_seresnet{}", (50, 101, 152, 200, 288, 600), (35635704, 63562505, 86565402, 93153834, 213422472, 440150896)
    ),
    "nf_resnet26": 15995176, "nf_seresnet26": 17395976,
    "nf_ecaresnet26": 15995220, "nf_ecaresnet50": 25557118, "nf_ecaresnet101": 44549331,
    **_numbered(
        "nf_regnet_b{}", range(9),
        (8595372, 10019208, 13785904, 18136667, 29315830, 48707138, 70045805, 101743204, 142314441),
    ),
    **_numbered(
        "nf_nfnet_f{}", range(8),
        (71489284, 132634256, 193779228, 254924200, 316069172, 377214144, 438359116, 499504088),
    ),
    "nf_nfnet_f0plus": 118824516, "nf_nfnet_f4plus": 524954484, "nf_nfnet_l0": 35074488, "nf_test_nfnet": 383080,
    **_numbered("nf_eca_nfnet_l{}", range(4), (24143924, 41407728, 56722348, 72036968)),
    **_numbered("skipinit_resnet{}", (50, 101, 152, 200, 288, 600),
                (25530424, 44496457, 60117082, 64585834, 146318344, 300354928)),
    "fixup_resnet50": 25504026, "fixup_resnet101": 44444049,
    **_numbered("fixup_resnet{}_cifar", (20, 32, 44, 56, 110, 1202),
                (268393, 461959, 655525, 849091, 1720138, 19334644)),
    "rescale_resnet50": 25528568, "rescale_resnet101": 44494601, "rescale_resnet200": 64583978,
    "rescale_resnext50_32x4d": 24992888, "rescale_resnext101_32x8d": 88688009,
    "eun_resnet50": 25530488, "eun_resnet101": 44496521, "eun_resnet200": 64585898,
    "eun_resnext50_32x4d": 24994808, "eun_resnext101_32x8d": 88689929, "eun_resnet110_cifar": 1723968,
}  # fmt: skip

# The same where a dialect, a head or a switch differs; these are built to be counted.
VARIED = [
    ("nf_resnet50", {"dialect": "timm"}, 25557032), ("nf_resnet101", {"dialect": "timm"}, 44549160),
    ("nf_seresnet50", {"dialect": "timm"}, 28088024), ("nf_seresnet101", {"dialect": "timm"}, 49326872),
    *((f"nf_regnet_b{n}", {"dialect": "timm"}, c)
      for n, c in enumerate((8764288, 10223984, 14314608, 18593832, 30210816, 49741728))),
    *((f"nfnet_f{n}", {"dialect": "timm"}, c) for n, c in enumerate(
        (71489272, 132634232, 193779192, 254924152, 316069112, 377214072, 438359032, 499503992))),
    ("dm_nfnet_f0", {}, 71489284),
    ("bn_resnet110_cifar", {"classes": 100}, 1733812), ("eunnet110_cifar", {"scale": False}, 1723914),
    ("eunnet110_cifar", {"classes": 100}, 1729818), ("eunnet110_cifar", {"shortcut": "project"}, 1726624),
    *((f"bn_resnet{n}_cifar", {"shortcut": "zero_pad_norm"}, c) for n, c in zip(
        (20, 32, 44, 56, 110, 1202), (269818, 464250, 658682, 853114, 1728058, 19421370), strict=True)),
    ("ResNet50", {}, 25583592), ("ResNet101", {}, 44601832),
]  # fmt: skip
CHEAP = {
    "nf_resnet50",
    "bn_resnet20_cifar",
    "nf_regnet_b0",
    "nf_regnet_b2",
    "ResNet50",
}

# Thousand millions of multiply-adds at a size, by DeepMind's own counter.
MULTIPLY_ADDS = [
    *((f"nf_regnet_b{n}", size, giga) for n, size, giga in (
        (0, 192, 0.327), (0, 224, 0.444), (1, 224, 0.563), (1, 256, 0.734), (3, 288, 1.621), (4, 320, 3.107),
        (5, 384, 7.496), (6, 448, 14.183), (7, 512, 27.283))),
    *((f"nf_nfnet_f{n}", size, giga) for n, size, giga in (
        (0, 192, 6.98), (0, 256, 12.38), (1, 224, 17.44), (2, 256, 33.14), (3, 320, 67.94),
        (4, 384, 121.12), (5, 416, 169.50), (6, 448, 228.29), (7, 480, 298.48))),
]  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameters(name):
    assert nfzoo.model_info(name).trainable_parameters == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "overrides", "count"),
    [row if row[0] in CHEAP else pytest.param(*row, marks=pytest.mark.slow) for row in VARIED],
)
def test_published_parameters_of_dialects_and_switches(name, overrides, count):
    assert nfzoo.model_info(name, **overrides).trainable_parameters == count


@pytest.mark.parametrize(("name", "size", "giga"), MULTIPLY_ADDS)
def test_published_multiply_adds(name, size, giga):
    info = nfzoo.model_info(name)
    if size != info.input_size:
        info = nfzoo.model_info(name, input_shape=(size, size, 3))
    assert info.multiply_adds == pytest.approx(1e9 * giga, rel=5e-3)


def test_where_deepminds_counter_takes_fractions_of_pixels():
    """240 px leave RegNet-B2 maps of 15 and 8 pixels; the published 0.858 counts (15 / 2)^2 pixels for the 8^2. So
    with B2 at 272 and B8 at 600 px. (timm's figures count the standardization of kernels too.)"""
    info = nfzoo.model_info("nf_regnet_b2")
    model = nfzoo.build("nf_regnet_b2", input_shape=(240, 240, 3))
    last = sum(
        math.prod(layer.kernel.shape) * 64
        for layer in model.layers
        if hasattr(layer, "kernel_size") and layer.output.shape[1] == 8
    )
    assert info.multiply_adds == pytest.approx(0.898e9, rel=5e-3)
    assert info.multiply_adds - last * (1 - 7.5**2 / 8**2) == pytest.approx(0.858e9, rel=5e-3)


def test_multiply_adds_by_hand():
    """Tiny network, every layer counted independently from its output size."""
    model = nfzoo.build("sn_test_ffnn")
    assert registry.multiply_adds(model) == 8 * 8 * 3 * 16 + 16 * 16 * 2 + 16 * 10
    assert nfzoo.model_info("bn_efficientnet_b0").multiply_adds == pytest.approx(0.39e9, rel=0.02)


# ---------------------------------------------------------------- the manifest
def test_manifest_lists_every_model():
    assert registry._manifest().keys() == names.table().keys()


def test_twins_differ_by_what_the_variant_adds_only():
    """Every variant of a row convolves as much, up to the width of squeeze-excite, on which sources disagree."""
    counts = registry._manifest()
    for name in names.table().values():
        if name.family != "regnet":
            reference = counts[f"bn_{name.row}"]["multiply_adds"]
            assert counts[str(name)]["multiply_adds"] == pytest.approx(reference, rel=0.01), name


def _check(some):
    for name in some:
        again = json.loads(json.dumps(registry.measure(name)))
        assert again == registry._manifest()[name], f"{name}: write it anew with `make manifest`"


def test_manifest_of_small_models():
    _check(n for n in names.table() if "test_" in n or "ffnn" in n or n.endswith("efficientnet_b0"))


def _sample():
    """One variant of every large row, another one for the next row."""
    for family in names.FAMILIES.values():
        for number, row in enumerate(row for row in family.SPECS if "test_" not in row):
            yield f"{family.ADMITS[number % len(family.ADMITS)]}_{row}"


@pytest.mark.slow
@pytest.mark.parametrize("name", list(_sample()))
def test_manifest_of_large_models(name):
    _check([name])
