"""Fixup, SkipInit, Rescale and EUN, one case per cell of the table; and how all nine variants start."""

import math

import keras
import numpy as np
import pytest
from conftest import slow_but

import nfzoo
from nfzoo import layers, numerics

CIFAR = {"input_shape": (32, 32, 3), "classes": 10}
NOISE = np.random.default_rng(0).standard_normal((8, 64, 64, 3)).astype("float32")


def _of(model, kind):
    return [layer for layer in model.layers if isinstance(layer, kind)]


def _std(model, path):
    return float(np.std(next(v for v in model.weights if v.path == path)))


# ---------------------------------------------------------------- Fixup
@pytest.fixture(scope="module")
def fixup():
    return nfzoo.build("fixup_resnet20_cifar", **CIFAR)


def test_fixup_starts_as_the_identity_with_logits_zero(fixup):
    x = np.abs(NOISE[:2, :32, :32])
    maps = keras.Model(fixup.input, {n: fixup.get_layer(n).output for n in ("stem_out", "stage1_block3_out")})(x)
    np.testing.assert_array_equal(np.asarray(maps["stage1_block3_out"]), np.asarray(maps["stem_out"]))
    logits = fixup(x)
    assert not np.asarray(logits).any()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(np.array([1, 2]), logits)
    assert float(loss) == pytest.approx(math.log(10))


def test_fixup_shrinks_the_first_layer_of_a_branch_and_empties_the_last():
    model = nfzoo.build("fixup_resnet50", input_shape=(64, 64, 3))
    he = np.sqrt(2 / 256)
    assert _std(model, "stage1_block2_conv1/kernel") == pytest.approx(0.5 * he, rel=0.02)  # 16^(-1/4)
    assert _std(model, "stage1_block2_conv3/kernel") == 0 and _std(model, "head/kernel") == 0
    assert _std(model, "stage2_block1_shortcut_conv/kernel") == pytest.approx(he, rel=0.02)
    authors = nfzoo.build("fixup_resnet50", input_shape=(64, 64, 3), init="he_fan_out")
    assert _std(authors, "stage2_block1_shortcut_conv/kernel") == pytest.approx(np.sqrt(2 / 512), rel=0.02)


def test_fixup_has_the_scalars_of_the_authors_code_and_no_other_bias(fixup):
    """bias1a, bias1b, bias2a, scale, bias2b in a block of two convolutions; bias1 and bias2 of the network."""
    scalars = [v.path for v in fixup.trainable_variables if v.shape == ()]
    block = [path.removeprefix("stage2_block2_") for path in scalars if path.startswith("stage2_block2_")]
    assert sorted(block) == ["enter/bias", "exit/bias", "exit/gain", "preact1/bias", "preconv2/bias"]
    assert [path for path in scalars if not path.startswith("stage")] == ["stem_preact1/bias", "top_leave/bias"]
    assert not any(conv.use_bias for conv in _of(fixup, keras.layers.Conv2D))


def test_fixup_enters_branches_only():
    """The first layer of a plain block has a bias of its own before it; two in a row would be one."""
    model = nfzoo.build("fixup_test_efficientnet")
    names = [layer.name for layer in model.layers if layer.name.endswith("_enter")]
    assert names == [layer.name.replace("_out", "_enter") for layer in model.layers if isinstance(layer, layers.Merge)]
    assert len(names) == 4  # of six blocks


def test_fixup_keeps_the_initialisation_of_what_nothing_bypasses():
    """Shrinking plain blocks of an EfficientNet took the variance to 1e-16."""
    model = nfzoo.build("fixup_efficientnet_b0", input_shape=(32, 32, 3))
    assert _std(model, "stage2_block1_conv1/kernel") == pytest.approx(np.sqrt(2 / 16), rel=0.05)
    assert _std(model, "stage2_block2_conv1/kernel") == pytest.approx(np.sqrt(2 / 24) * 9**-0.25, rel=0.05)


# ---------------------------------------------------------------- SkipInit
def test_skipinit_blocks_are_the_identity_until_their_scalar_moves():
    model = nfzoo.build("skipinit_resnet20_cifar", **CIFAR)
    assert {float(m.gain.numpy()) for m in _of(model, layers.Merge)} == {0.0}
    maps = {n: model.get_layer(n).output for n in ("stem_out", "stage1_block3_out", "stage1_block3_branch")}
    values = keras.Model(model.input, maps)(NOISE[:2, :32, :32])
    np.testing.assert_array_equal(np.asarray(values["stage1_block3_out"]), np.asarray(values["stem_out"]))
    assert np.asarray(values["stage1_block3_branch"]).std() > 0.1
    assert all(c.use_bias != c.name.startswith("stem") for c in _of(model, keras.layers.Conv2D))


# ---------------------------------------------------------------- Rescale
@pytest.mark.parametrize(("blocks", "convs"), [(16, 3), (54, 2)])
def test_rescale_squares_of_the_effective_weights_sum_to_one(blocks, convs):
    for j in range(blocks):
        a, b = numerics.rescale_weights(j, blocks)
        effective = b * numerics.rescale_factor(j, blocks, convs) ** convs
        assert a**2 + effective**2 == pytest.approx(1)


def test_rescale_weighs_and_shrinks_as_the_authors_code():
    model = nfzoo.build("rescale_resnet50", input_shape=(64, 64, 3))
    last = model.get_layer("stage4_block3_sum")
    assert (last.skip_scale, last.branch_scale) == (pytest.approx(0.983739, abs=1e-6), 0.25)
    assert float(last.gain.numpy()) == 1
    assert _std(model, "stage4_block3_conv1/kernel") == pytest.approx(np.sqrt(2 / 2048) * 0.895625, rel=0.02)
    assert _std(model, "stage2_block1_shortcut_conv/kernel") == pytest.approx(np.sqrt(1 / 256), rel=0.02)
    assert len(_of(model, layers.CenteringBias)) == 1 + 16 * 3 + 4 + 1  # stem, branches, shortcuts, before the pooling
    assert not _of(nfzoo.build("rescale_resnet20_cifar", prebias=False, **CIFAR), layers.CenteringBias)


# ---------------------------------------------------------------- EUN
EUN_SKIPS = [0.968246, 0.970143, 0.971825]


def test_eun_standardizes_the_input_of_every_convolution_and_weighs_as_rescale():
    model = nfzoo.build("eunnet50", input_shape=(64, 64, 3))
    convolutions, before = _of(model, keras.layers.Conv2D), _of(model, layers.StandardizeInput)
    assert len(convolutions) == len(before) == 1 + 16 * 3 + 4 and all(conv.use_bias for conv in convolutions)
    assert {layer.statistics for layer in before} == {"whole_tensor"}
    sums = [model.get_layer(f"stage1_block{b}_sum") for b in (1, 2, 3)]
    assert [s.skip_scale for s in sums] == [pytest.approx(a, abs=1e-6) for a in EUN_SKIPS]
    assert {(s.branch_scale, float(s.gain.numpy())) for s in sums} == {(0.25, 1.0)}


@pytest.mark.parametrize(
    ("statistics", "independent"), [("whole_tensor", False), ("channel_l2", True), ("per_channel_batch", False)]
)
def test_eun_tells_whether_it_depends_on_the_batch(statistics, independent):
    assert nfzoo.model_info("eun_test_resnet", statistics=statistics).batch_independent == independent


@pytest.mark.parametrize("variant", ["fixup", "skipinit", "rescale", "eun"])
def test_the_switches_of_the_ablation(variant):
    """EUNNet's Table 4: with and without the learnable scalar, with and without RescaleNet's constants."""

    def gains(model):
        return [v for v in model.trainable_variables if v.path.endswith(("_sum/gain", "out/gain", "exit/gain"))]

    assert not gains(nfzoo.build(f"{variant}_test_resnet", scale=False))
    assert len(gains(nfzoo.build(f"{variant}_test_resnet"))) == 3
    with_constants = _of(nfzoo.build(f"{variant}_test_resnet", alpha_beta=True), layers.Merge)
    without = _of(nfzoo.build(f"{variant}_test_resnet", alpha_beta=False), layers.Merge)
    assert [m.branch_scale for m in with_constants] == [pytest.approx(3**-0.5)] * 3
    assert {(m.skip_scale, m.branch_scale) for m in without} == {(1.0, 1.0)}


# ---------------------------------------------------------------- all nine at the start
# Variance of the stream after each block of a ResNet-50, N(0, 1) input of 64x64: least and largest. Post-activation
# networks are taken at the sum, before the ReLU. Rescale falls at each transition, where its 2x2 average meets noise.
PROFILES = {
    "none": (1.5, 2e5), "bn": (1.4, 4.0), "gn": (0.4, 1.8), "sn": (0.28, 0.62), "nf": (0.85, 1.2),
    "skipinit": (0.8, 1.7), "fixup": (0.35, 1.7), "rescale": (8e-5, 0.9), "eun": (0.6, 2.1),
}  # fmt: skip


@pytest.mark.parametrize("variant", slow_but(("fixup", "sn", "nf"), PROFILES))
def test_variance_profile_of_every_variant(variant):
    options = {"skip_gain": 1.0} if variant == "nf" else {}
    model = nfzoo.build(f"{variant}_resnet50", input_shape=(64, 64, 3), **options)
    taps = "stage*_sum" if any(layer.name.endswith("_sum") for layer in model.layers) else "stage*_out"
    acv = nfzoo.spp.snapshot(model, NOISE, taps=taps, what=("activations",)).acv
    low, high = PROFILES[variant]
    assert len(acv) == 16 and acv.between(low, high).all(), acv.tolist()
    if variant == "none":
        assert acv.iloc[-1] > 1000 * acv.iloc[0]  # exponential
    if variant == "rescale":  # within a stage nothing is lost: the squares of the weights sum to one
        assert all(0.85 < acv.iloc[i + 1] / acv.iloc[i] < 1.1 for i in range(8, 12))
        assert acv.iloc[0] == pytest.approx(0.72, rel=0.3)
    if variant == "skipinit":
        assert acv.iloc[0] == pytest.approx(1.5, abs=0.3) and acv.iloc[-1] == pytest.approx(0.97, abs=0.2)


def test_nf_resnet50_follows_the_theory_at_128_px():
    """1 + (j + 1) alpha^2 within each stage, channel means near zero (facts of the reference at batch 8)."""
    model = nfzoo.build("nf_resnet50", input_shape=(128, 128, 3), skip_gain=1.0)
    x = np.random.default_rng(0).standard_normal((8, 128, 128, 3)).astype("float32")
    rows = nfzoo.spp.snapshot(model, x, taps="stage*_out", what=("activations",))
    merges = [number for depth in (3, 4, 6, 3) for number in range(1, depth + 1)]
    theory = np.array([1 + 0.04 * m for m in merges])
    assert np.abs(rows.acv.to_numpy() / theory - 1).max() < 0.2
    assert rows.acsm.max() < 0.05


@pytest.mark.slow
def test_bn_relu_conv_and_relu_bn_conv_order():
    """ReLU-BN-Conv with He weights: every branch has variance 2, and the mean stays at zero."""
    options = {"input_shape": (128, 128, 3), "init": "he", "dialect": "deepmind"}
    x = np.random.default_rng(0).standard_normal((8, 128, 128, 3)).astype("float32")
    rows = {
        order: nfzoo.spp.snapshot(nfzoo.build("bn_resnetv2_50", order=order, **options), x, what=("activations",))
        for order in ("bn-relu-conv", "relu-bn-conv")
    }
    branch = {order: table[table.place == "branch"].acv.to_numpy() for order, table in rows.items()}
    out = {order: table[table.place == "block"][1:] for order, table in rows.items()}
    np.testing.assert_allclose(branch["bn-relu-conv"], 0.68, atol=0.06)
    np.testing.assert_allclose(branch["relu-bn-conv"], 2.0, atol=0.15)
    first = [0, 3, 7, 13]
    np.testing.assert_allclose(out["relu-bn-conv"].acv.to_numpy()[first], 4.0, atol=0.4)
    np.testing.assert_allclose(np.diff(out["relu-bn-conv"].acv.to_numpy()[7:13]), 2.0, atol=0.25)
    assert out["relu-bn-conv"].acsm.max() < 0.05 and out["bn-relu-conv"].acsm.min() > 0.4
