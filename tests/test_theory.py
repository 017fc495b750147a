"""The expected profiles: closed forms, random numbers, and real networks at initialisation check them."""

import math
from dataclasses import asdict, fields

import keras
import numpy as np
import pandas as pd
import pytest

import nfzoo
from nfzoo import names, numerics, spp, theory, variants
from nfzoo.layers.activation import activation_function
from nfzoo.theory import moments, words
from nfzoo.theory.moments import FUNCTIONS, Moments
from nfzoo.theory.pair import Pair

RELU = 1 - 1 / math.pi  # twice the variance of relu(z), which He's weights double again


def _rows(table, end, statistic="acv"):
    rows = table[(table.kind == "activation") & table.layer.str.contains(end)]
    return rows[statistic].to_numpy()


def _stages(start, step, depths=(3, 4, 6, 3)):
    return [start + step * block for depth in depths for block in range(depth)]


# ---------------------------------------------------------------- closed forms
@pytest.mark.parametrize(
    ("order", "branch"), [("bn-relu-conv", RELU), ("relu-bn-conv", 2.0)], ids=["bn-relu-conv", "relu-bn-conv"]
)
def test_batch_normalization_grows_linearly_within_a_stage(order, branch):
    table = theory.profile("bn_resnetv2_50", {"init": "he", "order": order})
    np.testing.assert_allclose(_rows(table, "_branch$"), branch, rtol=1e-3)
    np.testing.assert_allclose(_rows(table, "block._out$"), _stages(2 * branch, branch), rtol=1e-3)
    means = _stages(2 / math.pi, 1 / math.pi) if order == "bn-relu-conv" else 0.0
    np.testing.assert_allclose(_rows(table, "block._out$", "acsm"), means, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_normalizer_free_is_one_plus_alpha_squared_per_block(alpha):
    build = {"alpha": alpha, "skip_gain": 1.0, "activation": "linear", "stem": "small"}
    exact = theory.profile("nf_resnet50", build)
    np.testing.assert_allclose(_rows(exact, "block._out$"), _stages(1 + alpha**2, alpha**2), rtol=1e-8)
    # With the tabulated gain of ReLU, which is 0.06 % high.
    table = theory.profile("nf_resnet50", build | {"activation": "relu"})
    np.testing.assert_allclose(_rows(table, "block._out$"), _stages(1 + alpha**2, alpha**2), rtol=0.06)


def test_a_gain_of_zero_leaves_the_skip():
    table = theory.profile("nf_resnet50", {"stem": "small"})
    np.testing.assert_allclose(_rows(table, "stage1_block._out$"), 1, rtol=0.01)
    entered = [1 / (1 + 0.04 * merges) for merges in (1, 2)]
    np.testing.assert_allclose(_rows(table, "stage1_block[23]_branch$"), entered, rtol=0.02)


def test_without_normalization_every_block_doubles_the_second_moment():
    second = _rows(theory.profile("none_resnetv2_50", {"stem": "small"}), "block._out$", "second_moment")
    np.testing.assert_allclose(second[1:] / second[:-1], 2, rtol=1e-3)
    np.testing.assert_allclose(second[0], 4, rtol=1e-3)  # He's stem doubles the image


def test_poster_initialisation_divides_by_the_channels():
    """N(0, 2 / (k^2 C)) on a depthwise kernel has 1 / C of the variance that keeps the signal."""
    table = theory.profile("none_efficientnet_b0", {"init": "poster"}).set_index("layer")
    before, after = table.loc["stem_out"], table.loc["stage1_block1_conv2"]
    assert after.second_moment / before.second_moment == pytest.approx(2 / 32)


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.9])
def test_relu_is_the_arc_cosine_kernel(correlation):
    """Cho & Saul 2009, degree 1: E[relu(u) relu(v)] of two standard normal values of this correlation."""
    after = moments.activate(Moments((None, 1), acsm=correlation, acv=1 - correlation), FUNCTIONS["relu"])
    angle = math.acos(correlation)
    kernel = (math.sin(angle) + (math.pi - angle) * math.cos(angle)) / (2 * math.pi)
    assert after.acsm == pytest.approx(kernel, rel=1e-3)
    assert after.second_moment == pytest.approx(0.5, rel=1e-3) and after.nonzero == pytest.approx(0.5, abs=2e-3)


# ---------------------------------------------------------------- random numbers
def _sample(x, channels, pixels, rng):
    means = rng.standard_normal((channels, 1))
    means = x.mean + x.spread * (means - means.mean()) / means.std()
    return means + math.sqrt(x.acv) * rng.standard_normal((channels, pixels))


def _measured(values):
    return [values.mean(), (values.mean(axis=1) ** 2).mean(), values.var(axis=1).mean()]


def _expected(x):
    return [x.mean, x.acsm, x.acv]


@pytest.mark.parametrize("name", ["relu", "selu", "silu", "gelu"])
def test_activations_and_sums_of_activated_maps(name):
    rng = np.random.default_rng(0)
    x, y = Moments((None, 1), 0.2, 0.5, 1.3), Moments((None, 1), 0.0, 0.4, 0.7)
    function = FUNCTIONS[name]
    values = function(_sample(x, 2000, 300, rng))
    activated = moments.activate(x, function)
    np.testing.assert_allclose(_expected(activated), _measured(values), rtol=0.05)
    # A post-activation block, twice: rectified plus normal, rectified again.
    for _ in range(2):
        values = function(0.9 * values + 0.5 * _sample(y, 2000, 300, rng))
        activated = moments.activate(activated.plus(y, 0.9, 0.5), function)
        np.testing.assert_allclose(_expected(activated), _measured(values), rtol=0.06)
        assert activated.nonzero == pytest.approx((values != 0).mean(), abs=0.02)


def test_pairs_keep_their_moments():
    pair = Pair.normal(0.5, 0.8, 1.2)
    np.testing.assert_allclose(pair.moments()[:3], [0.5, 0.25 + 0.64, 1.44], rtol=5e-3)
    np.testing.assert_allclose(pair.plus(0.0, 1.0, 2.0).moments()[:3], [1.0, 4 * 0.89, 4 * 1.44 + 1], rtol=5e-3)
    mean, acsm, acv, nonzero = pair.with_zeros(0.25).moments()
    np.testing.assert_allclose([mean, acsm, acv, nonzero], [0.125, 0.89 / 4, 1.44 / 4, 0.25], rtol=1e-2)
    assert pair.through(FUNCTIONS["linear"]).moments()[1] == pytest.approx(pair.moments()[1])


@pytest.mark.parametrize(("standardized", "compensated"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("side", "kernel", "stride"), [(4, 3, 1), (8, 3, 2), (5, 5, 1), (7, 1, 2)])
@pytest.mark.parametrize("padding", ["same", "symmetric"])
def test_convolution_counts_what_borders_take(side, kernel, stride, padding, standardized, compensated):
    """Against all weights at once: kernels are drawn, the map has a mean that all channels share."""
    rng, channels, units, batch = np.random.default_rng(1), 16, 3000, 40
    x = rng.standard_normal((batch, side, side, channels)) + 0.8
    weights = rng.standard_normal((kernel, kernel, channels, units)) / math.sqrt(kernel**2 * channels)
    if standardized:
        weights -= weights.mean(axis=(0, 1, 2))
        weights /= np.sqrt((weights**2).sum(axis=(0, 1, 2)))
    length, _, inside = moments.windows(side, kernel, stride, padding)
    before = (kernel - 1) // 2 if padding == "symmetric" and stride > 1 else None
    if before is None:
        before = max((length - 1) * stride + kernel - side, 0) // 2
    padded = np.pad(x, [(0, 0), (before, kernel), (before, kernel), (0, 0)])
    out = np.stack(
        [
            np.stack(
                [
                    np.einsum("bhwc,hwcu->bu", padded[:, r : r + kernel, s : s + kernel], weights)
                    for s in range(0, length * stride, stride)
                ]
            )
            for r in range(0, length * stride, stride)
        ]
    )
    if compensated:
        factors = inside.mean(axis=1) ** -0.5
        out = out * factors[:, None, None, None] * factors[None, :, None, None]
    values = out.transpose(3, 0, 1, 2).reshape(units, -1)
    given = Moments((batch, side, side, channels), 0.8, 0.64, 1.0)
    after = moments.convolve(
        given, units, 1 / (kernel**2 * channels), kernel, stride, padding, standardized=standardized,
        compensated=compensated,
    )  # fmt: skip
    assert after.shape == (batch, length, length, units) and inside.any(axis=0).all()
    scatter = after.acv / values.shape[1]  # of the mean over so many values
    np.testing.assert_allclose(after.acv - scatter, values.var(axis=1).mean(), rtol=0.08)
    np.testing.assert_allclose(after.acsm + scatter, (values.mean(axis=1) ** 2).mean(), rtol=0.1, atol=0.01)


def test_pooling_and_group_normalization():
    rng = np.random.default_rng(2)
    x = Moments((None, 8, 8, 6), 0.3, 0.9, 2.0)
    values = _sample(x, 3000, 900, rng)
    np.testing.assert_allclose(
        _expected(moments.max_pool(x, 3, 2)), _measured(values.reshape(3000, 100, 9).max(axis=2)), rtol=0.06
    )
    np.testing.assert_allclose(
        _expected(moments.average_pool(x, 3)), _measured(values.reshape(3000, 100, 9).mean(axis=2)), rtol=0.06
    )
    groups = values.reshape(1000, 3, 900)
    normal = (groups - groups.mean(axis=(1, 2), keepdims=True)) / groups.std(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(
        _expected(moments.normalize(x, "group", 3))[1:], _measured(normal.reshape(3000, 900))[1:], rtol=0.05
    )
    one = moments.normalize(x, "l2")
    assert one.second_moment == pytest.approx(1 / 6)


# ---------------------------------------------------------------- real networks
def _real(model, build, size):
    keras.utils.set_random_seed(0)
    net = nfzoo.build(model, input_shape=(size, size, 3), **build)
    x = np.random.default_rng(0).standard_normal((8, size, size, 3)).astype("float32")
    return spp.snapshot(net, x, taps="blocks", what=("activations",))


@pytest.mark.parametrize(
    ("model", "build", "tolerance"),
    [
        ("bn_resnetv2_26", {"init": "he"}, 0.08),
        pytest.param("bn_resnetv2_26", {"init": "he", "order": "relu-bn-conv"}, 0.08, marks=pytest.mark.slow),
        ("bn_resnet20_cifar", {}, 0.1),
        ("gn_resnet20_cifar", {}, 0.2),
        ("nf_resnet26", {"alpha": 1.0, "skip_gain": 1.0, "last_gain": 1.0}, 0.12),
        pytest.param("eun_resnet26", {}, 0.16, marks=pytest.mark.slow),
        pytest.param(
            "nf_resnet26",
            {"alpha": 1.0, "skip_gain": 1.0, "last_gain": 1.0, "padding_compensation": True},
            0.12,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_networks_start_where_the_theory_says(model, build, tolerance):
    size = 32 if "cifar" in model else 64
    expected = theory.profile(model, build, input_shape=(size, size, 3), batch=8)
    both = _real(model, build, size).merge(expected, on=["kind", "layer"], suffixes=("", "_theory"))
    rows = both[both.layer != "stem_out"]
    assert len(rows) == 2 * sum(names.parse(model).spec.depths)
    np.testing.assert_allclose(rows.acv, rows.acv_theory, rtol=tolerance)


def test_a_collapse_over_many_decades_is_foreseen():
    log = _real("none_efficientnet_b0", {}, 64).set_index("layer")
    table = theory.profile("none_efficientnet_b0", input_shape=(64, 64, 3)).set_index("layer")
    assert log.acv["stage7_block1_out"] < 1e-8
    np.testing.assert_allclose(np.log10(table.acv["stage7_block1_out"] / log.acv["stage7_block1_out"]), 0, atol=0.3)


def test_the_profile_of_600_layers():
    """Measured with DeepMind's code at 128 pixels and alpha 1 (one draw of the weights)."""
    table = theory.profile("nf_resnetv2_600", {"alpha": 1.0, "skip_gain": 1.0}, input_shape=(128, 128, 3))
    acv = _rows(table, r"stage\d_block\d+_out$")
    expected = {1: 2.05, 10: 11.2, 25: 26.3, 50: 51.3, 51: 1.98, 75: 24.2, 100: 46.6}
    np.testing.assert_allclose([acv[block - 1] for block in expected], list(expected.values()), rtol=0.12)


@pytest.mark.parametrize("model", [name for name in names.table() if "_test_" in name])
def test_kernels_have_the_variance_they_are_drawn_with(model):
    keras.utils.set_random_seed(0)
    net = nfzoo.build(model)
    table = theory.profile(model).set_index(["kind", "layer"])
    seen = set()
    for layer in net.layers:
        for variable in [v for v in layer.trainable_variables if len(v.shape) > 1]:
            axes = (0, 1) if "Depthwise" in type(layer).__name__ else tuple(range(len(variable.shape) - 1))
            real = {"weight": np.array(variable)}
            if hasattr(layer, "effective_kernel"):
                real["effective_weight"] = np.array(layer.effective_kernel())
            for kind, kernel in real.items():
                expected = table.loc[(kind, variable.path)]
                # Drawn numbers scatter; standardized ones only by the guard against constant kernels.
                rtol = 6 * math.sqrt(2 / kernel.size) if kind == "weight" else 0.02
                assert np.mean(kernel**2) == pytest.approx(expected.second_moment, rel=rtol)
                assert kernel.var(axis=axes).mean() == pytest.approx(expected.acv, rel=rtol)
                seen.add((kind, variable.path))
    assert seen == {key for key in table.index if key[0] != "activation"}


# ---------------------------------------------------------------- names and options
def _fields(thing):
    return {field.name: field.default for field in fields(thing) if field.init}


def test_words_have_the_fields_and_defaults_of_the_variants():
    assert words.WORDS.keys() == variants.VARIANTS.keys()
    for name, kind in words.WORDS.items():
        assert _fields(kind) == _fields(variants.VARIANTS[name])


def test_every_model_resolves_as_build_does():
    for model in names.list_models(tests=True):
        if model in names.USER_MODELS:
            continue
        name = names.parse(model)
        for dialect in {None, *names.FAMILIES[name.family].DIALECTS}:
            build = {"dialect": dialect} if dialect else {}
            real, spec = names.resolve_fields(name, build)
            mine, my_spec = names.resolve_fields(name, build, words.WORDS)
            assert my_spec == spec
            assert {key: getattr(mine, key) for key in _fields(mine)} == asdict(real)


def test_what_is_no_field_is_refused():
    for build in ({"alpah": 5.0}, {"input_shape": (32, 32, 3)}, {"maps": {}}):
        with pytest.raises(TypeError, match=next(iter(build))):
            theory.profile("nf_test_resnet", build)
    table = theory.profile("bn_test_efficientnet", {"kernels": (5, 5, 5)})  # a field of the architecture
    assert table[table.kind == "weight"].layer.str.contains("stage1_block1_conv2").any()


def test_activations_of_the_theory_are_those_of_keras():
    z = np.linspace(-6, 6, 101).astype("float32")
    for name in (*FUNCTIONS, *numerics.ALIASES):
        expected = keras.ops.convert_to_numpy(activation_function(name)(keras.ops.convert_to_tensor(z)))
        np.testing.assert_allclose(moments.function_of(name)(z.astype(float)), expected, atol=2e-6)
    with pytest.raises(ValueError, match="exponential"):
        theory.profile("none_test_resnet", {"activation": "exponential"})
    assert theory.of_run({"model": "none_test_resnet", "build": {"activation": "exponential"}}) is None


def test_what_was_measured_at_the_stem_is_taken_from_there():
    build = {"stem": "small"}
    table = theory.profile("none_resnetv2_50", build, stem=(0.0, 50.0)).set_index("layer")
    assert table.acv["stem_out"] == 50
    usual = theory.profile("none_resnetv2_50", build).set_index("layer")
    np.testing.assert_allclose(
        table.acv["stage4_block3_out"] / 50, usual.acv["stage4_block3_out"] / usual.acv["stem_out"], rtol=1e-6
    )


def test_theory_of_a_run():
    options = {"model": "nf_test_resnet", "build": {"alpha": 1.0}, "images": {"classes": ["a", "b", "c"]}}
    options["images"]["shape"] = [32, 32, 3]
    table = theory.of_run(options)
    assert set(table.columns) >= {"step", "epoch", "kind", "layer", "acsm", "acv", "second_moment"}
    size = {"classes": 3, "input_shape": (32, 32, 3)}
    assert table.equals(theory.profile("nf_test_resnet", {"alpha": 1.0}, **size))
    stem = {"kind": "activation", "layer": "stem_out", "step": [0, 9], "acsm": [3.0, 1.0], "acv": [5.0, 1.0]}
    onwards = theory.of_run(options, pd.DataFrame(stem))
    flat = theory.of_run(options | {"signals": {"definition": "poster"}})
    assert flat.equals(theory.profile("nf_test_resnet", {"alpha": 1.0}, definition="poster", **size))
    assert not flat.equals(table)
    assert onwards.equals(theory.profile("nf_test_resnet", {"alpha": 1.0}, stem=(3.0, 5.0), **size))
    assert onwards.set_index("layer").acv["stem_out"] == 5 and not onwards.equals(table)
    assert theory.of_run(options, pd.DataFrame({"kind": ["weight"], "layer": ["a"], "acsm": [1.0]})).equals(table)
    assert theory.of_run({"model": "my_net", "build": {}}) is None


def test_the_posters_definition_takes_dense_layers_as_flat():
    table, poster = (theory.profile("none_ffnn_10x512", definition=d).set_index("layer") for d in ("channel", "poster"))
    assert poster.acsm["hidden_out3"] == table.second_moment["hidden_out3"]
    assert poster.acsm["hidden_linear2/kernel"] == poster.acv["hidden_linear2/kernel"] == pytest.approx(2 / 512)
    with pytest.raises(ValueError, match="definition='both'"):
        theory.profile("none_ffnn_10x512", definition="both")


def test_a_skip_of_an_nf_network_keeps_the_zeros_of_padded_channels():
    """CIFAR ResNets double the channels with zeros; with skip gains of 0 nothing is added to them."""
    table = theory.profile("nf_resnet20_cifar").set_index("layer").nonzero
    found = [table[f"stage{stage}_block3_out"] for stage in (1, 2, 3)]
    np.testing.assert_allclose(found, [1, 1 / 4, 1 / 8], atol=0.005)  # half the channels, half of them positive


def test_batch_normalization_leaves_no_mean_to_scatter():
    """The mean of n pixels scatters by their variance over n, but not after the mean of the batch was subtracted."""
    options = {"input_shape": (128, 128, 3), "batch": 8}
    table = theory.profile("bn_resnetv2_50", {"order": "relu-bn-conv", "init": "he"}, **options).set_index("layer")
    assert table.acsm["stage1_block2_out"] == table.acsm["stage1_block3_branch"] == 0
    # The first block of a stage takes every second pixel of its normalized input, which have a mean of their own.
    shortcut = table.acsm["stage3_block1_out"]
    assert shortcut == pytest.approx(0.75 * 2 / (8 * 8 * 8), rel=0.05)
    assert table.acsm["stage3_block4_out"] == pytest.approx(shortcut)
