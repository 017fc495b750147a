"""One case per cell of the table in nfzoo/ARCHITECTURE.md that is not a dash."""

import keras
import numpy as np
import pytest

import nfzoo
from nfzoo import layers, numerics, weights
from nfzoo.variants import BN, GN, NF, PNF, SN, VARIANTS, Variant

NAMES = ("none", "bn", "gn", "sn", "nf", "pnf")


@pytest.fixture(scope="module")
def nets():
    return {name: nfzoo.build(f"{name}_test_efficientnet") for name in NAMES}


def _of(model, kind):
    return [layer for layer in model.layers if isinstance(layer, kind)]


def _std(model, path):
    return float(np.std(next(v for v in model.weights if v.path == path).numpy()))


def test_variants_are_values():
    assert NF(alpha=0.1) == NF(alpha=0.1) != NF()
    assert {name: VARIANTS[name]() for name in NAMES} == {
        "none": Variant(), "bn": BN(), "gn": GN(), "sn": SN(), "nf": NF(), "pnf": PNF(),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind"), [("bn", keras.layers.BatchNormalization), ("gn", keras.layers.GroupNormalization)]
)
def test_normalization_follows_every_convolution(nets, name, kind):
    convolutions = _of(nets[name], keras.layers.Conv2D | keras.layers.DepthwiseConv2D)
    assert len(_of(nets[name], kind)) == len(convolutions)
    assert not any(c.use_bias for c in convolutions)


@pytest.mark.parametrize("name", ["none", "sn", "nf", "pnf"])
def test_no_normalization_layer(nets, name):
    normalizers = keras.layers.BatchNormalization | keras.layers.GroupNormalization | keras.layers.LayerNormalization
    assert not _of(nets[name], normalizers)


def test_group_normalization_takes_groups_that_divide_the_channels(nets):
    for layer in _of(nets["gn"], keras.layers.GroupNormalization):
        channels = layer.output.shape[-1]
        assert channels % layer.groups == 0 and layer.groups == np.gcd(32, channels)


def test_none_starts_from_he_fan_out_corrected_for_groups():
    model = nfzoo.build("none_efficientnet_b0", input_shape=(32, 32, 3))
    assert _std(model, "stage6_block2_conv2/kernel") == pytest.approx(np.sqrt(2 / 25), rel=0.02)
    assert _std(model, "top_conv/kernel") == pytest.approx(np.sqrt(2 / 1280), rel=0.02)


def test_none_offers_the_initialisation_of_the_poster():
    model = nfzoo.build("none_efficientnet_b0", input_shape=(32, 32, 3), init="poster")
    assert _std(model, "stage6_block2_conv2/kernel") == pytest.approx(np.sqrt(2 / (25 * 1152)), rel=0.02)
    assert _std(model, "head/kernel") == pytest.approx(0.01, rel=0.02)


def test_sn_starts_from_lecun_with_the_fan_in_of_one_channel():
    model = nfzoo.build("sn_efficientnet_b0", input_shape=(32, 32, 3))
    assert _std(model, "stage6_block2_conv2/kernel") == pytest.approx(1 / 5, rel=0.02)
    assert _std(model, "stage6_block2_conv1/kernel") == pytest.approx(np.sqrt(1 / 192), rel=0.02)
    assert _std(model, "stage6_block2_se_expand/kernel") == pytest.approx(np.sqrt(1 / 48), rel=0.02)
    assert _std(model, "head/kernel") == pytest.approx(0.01, rel=0.02)


def test_sn_is_selu_everywhere_squeeze_excite_included(nets):
    activations = _of(nets["sn"], keras.layers.Activation)
    assert any("_se_" in layer.name for layer in activations)
    assert {keras.activations.serialize(layer.activation) for layer in activations} == {"selu"}


def test_sn_merges_and_gates_preserve_magnitude(nets):
    root = numerics.magnitude_preserving_weights()[0]
    assert {(m.skip_scale, m.branch_scale) for m in _of(nets["sn"], layers.Merge)} == {(root, root)}
    assert all(gate.magnitude_preserving for gate in _of(nets["sn"], layers.Gate))


def test_sn_without_magnitude_preservation_is_a_plain_sum_and_gate():
    model = nfzoo.build("sn_test_efficientnet", magnitude_preserving=False)
    assert {(m.skip_scale, m.branch_scale) for m in _of(model, layers.Merge)} == {(1.0, 1.0)}
    assert all(not gate.magnitude_preserving and gate.gain == 1 for gate in _of(model, layers.Gate))


def test_sn_offers_alpha_dropout():
    assert isinstance(nfzoo.build("sn_test_efficientnet").get_layer("top_drop"), keras.layers.Dropout)
    model = nfzoo.build("sn_test_efficientnet", alpha_dropout=True)
    assert isinstance(model.get_layer("top_drop"), keras.layers.AlphaDropout)


def test_nf_standardizes_every_convolution(nets):
    convolutions = _of(nets["nf"], keras.layers.Conv2D | keras.layers.DepthwiseConv2D)
    assert convolutions and all(
        isinstance(c, layers.ScaledStdConv2D | layers.ScaledStdDepthwiseConv2D) and c.use_bias for c in convolutions
    )


def test_nf_scales_activations_outside_squeeze_excite(nets):
    scaled = _of(nets["nf"], layers.ScaledActivation)
    assert {layer.scale for layer in scaled} == {1.7881293296813965}
    assert all("_se_" in layer.name for layer in _of(nets["nf"], keras.layers.Activation))
    assert all(gate.gain == 2 for gate in _of(nets["nf"], layers.Gate))


def test_nf_entrances_divide_by_the_expected_std():
    model = nfzoo.build("nf_efficientnet_b0", input_shape=(32, 32, 3), alpha=0.5)
    scales = {layer.name: layer.scale for layer in _of(model, keras.layers.Rescaling)}
    within = {(s, b): b - 2 for s, n in enumerate((1, 2, 2, 3, 3, 4, 1), 1) for b in range(3, n + 1)}
    # A stage's first block, which has no skip, takes what the stage before has summed up, and starts anew.
    between = {(s, 1): n - 1 for s, n in enumerate((1, 2, 2, 3, 3, 4), 2) if n > 1}
    assert scales == {
        f"stage{s}_block{b}_enter": pytest.approx((1 + 0.25 * merges) ** -0.5)
        for (s, b), merges in (within | between).items()
    }


def test_nf_merge_is_skip_plus_alpha_gain_branch(nets):
    merges = _of(nets["nf"], layers.Merge)
    assert {(m.skip_scale, m.branch_scale) for m in merges} == {(1.0, 0.2)}
    assert {float(m.gain.numpy()) for m in merges} == {0.0}


def test_nf_efficientnets_start_evenly_in_every_dialect():
    """MBConv's first convolution follows no activation: the gain of one in its kernel would multiply block by block."""
    x = np.random.default_rng(0).standard_normal((4, 32, 32, 3)).astype("float32")
    for dialect in ("keras", "timm"):
        net = nfzoo.build("nf_test_efficientnet", dialect=dialect, skip_gain=1.0)
        table = nfzoo.spp.snapshot(net, x, taps="blocks", what=("activations",))
        assert table[table.place == "block"].second_moment.max() < 3, dialect
    with pytest.raises(ValueError, match='gamma_in="activation" of an EfficientNet'):
        nfzoo.build("nf_test_efficientnet", gamma_in="kernel")


def test_nf_branch_has_unit_variance_at_any_depth():
    """The point of the bookkeeping: whatever came before, a branch starts and ends with variance one."""
    model = nfzoo.build(
        "nf_test_efficientnet", skip_gain=1.0, repeats=(1, 8, 8), channels=(64, 64, 64), stem_channels=64, alpha=0.4
    )
    x = np.random.default_rng(0).standard_normal((16, 64, 64, 3)).astype("float32")
    rows = nfzoo.spp.snapshot(model, x, taps="blocks", what=("activations",)).set_index("layer")
    branches = rows[rows.place == "branch"].acv
    assert branches.between(0.6, 1.3).all(), branches
    for stage in (2, 3):
        stream = rows.acv[[f"stage{stage}_block{b}_out" for b in range(1, 9)]].to_numpy()
        growth = np.diff(stream)
        assert np.all(growth > 0.5 * 0.4**2) and np.all(growth < 1.5 * 0.4**2)


def test_nf_without_weight_standardization_is_plain_but_for_its_entrances_and_merges():
    model = nfzoo.build("nf_resnet50", input_shape=(32, 32, 3), standardize=False, init="he")
    assert not _of(model, layers.ScaledStdConv2D) and not _of(model, layers.ScaledActivation)
    assert _std(model, "stage4_block2_conv2/kernel") == pytest.approx(np.sqrt(2 / (9 * 512)), rel=0.02)
    twin = nfzoo.build("nf_resnet50", input_shape=(32, 32, 3))
    for kind in (keras.layers.Rescaling, layers.Merge):
        assert [x.get_config() for x in _of(model, kind)] == [x.get_config() for x in _of(twin, kind)] != []
    depthwise = _of(nfzoo.build("nf_test_efficientnet", standardize=False), keras.layers.DepthwiseConv2D)
    assert depthwise and not any(isinstance(x, layers.ScaledStdDepthwiseConv2D) for x in depthwise)


def test_bn_affine_parameters_are_optional():
    model = nfzoo.build("bn_ffnn_10x100", scale=False, center=False)
    assert not [v for v in model.trainable_variables if "norm" in v.path]
    kept = nfzoo.build("bn_ffnn_10x100", scale=False, center=False, stem_affine=True)
    assert [v.path for v in kept.trainable_variables if "norm" in v.path] == ["hidden_norm1/gamma", "hidden_norm1/beta"]


def test_overrides_of_bn_constants():
    norm = nfzoo.build("bn_test_efficientnet", epsilon=1e-5, momentum=0.9).get_layer("stem_norm1")
    assert (norm.epsilon, norm.momentum) == (1e-5, 0.9)


def test_override_of_the_activation():
    model = nfzoo.build("nf_test_efficientnet", activation="relu")
    assert {layer.activation for layer in _of(model, layers.ScaledActivation)} == {"relu"}


def test_unknown_padding():
    with pytest.raises(ValueError, match="padding='valid'"):
        nfzoo.build("sn_test_efficientnet", padding="valid")


def test_gates_and_kernels_of_self_normalizing_networks_can_be_chosen():
    net = nfzoo.build("sn_test_efficientnet", doubled_gate=True, standardize=True)
    assert all(gate.gain == 2 and not gate.magnitude_preserving for gate in _of(net, layers.Gate))
    kinds = (layers.ScaledStdConv2D, layers.ScaledStdDepthwiseConv2D)
    convolutions = _of(net, keras.layers.Conv2D) + _of(net, keras.layers.DepthwiseConv2D)
    assert convolutions and all(isinstance(layer, kinds) for layer in convolutions)


def test_branches_that_would_never_open_are_refused():
    with pytest.raises(ValueError, match="never open"):
        nfzoo.build("nf_test_resnet", dialect="timm", skip_gain=0.0)
    small = {"classes": 4, "input_shape": (32, 32, 3), "last_gamma": 0.0}
    with pytest.raises(ValueError, match="never open"):
        nfzoo.build("bn_resnetv2_18", **small)
    nfzoo.build("bn_resnet18", **small)
    nfzoo.build("bn_resnetv2_18", order="relu-bn-conv", **small)


def test_pnf_starts_with_an_even_signal():
    """As NF does. What its depthwise kernels let through of the means adds up, without any standardization to more."""
    expected = {
        name: nfzoo.theory.profile(f"{variant}_efficientnet_b0", build, input_shape=(224, 224, 3))
        for name, variant, build in (
            ("pnf", "pnf", {}), ("plain", "nf", {"skip_gain": 1.0, "standardize": False, "init": "he"}),
        )
    }  # fmt: skip
    squares = {name: table.second_moment[table.layer.str.endswith("_out")] for name, table in expected.items()}
    assert squares["pnf"].max() / squares["pnf"].min() < 40 and squares["plain"].iloc[-1] > 100
    noise = np.random.default_rng(0).standard_normal((32, 32, 32, 3)).astype("float32")
    net = nfzoo.build("pnf_efficientnet_b0", input_shape=(32, 32, 3), stem="small")
    assert (
        nfzoo.spp.snapshot(net, noise, taps="stage*_out", what=("activations",)).second_moment.between(0.05, 50).all()
    )


def test_pnf_is_nf_with_other_defaults():
    nets = []
    for name, build in (("pnf", {}), ("nf", {"skip_gain": 1.0, "standardize_depthwise": False})):
        keras.utils.set_random_seed(0)
        nets.append(nfzoo.build(f"{name}_test_efficientnet", **build))
    assert weights.reading(nets[0]) == weights.reading(nets[1])
    for one, other in zip(*(net.weights for net in nets), strict=True):
        assert one.path == other.path
        np.testing.assert_array_equal(one, other)
    assert PNF.conventions("timm") == {}


@pytest.mark.parametrize(
    ("build", "dense", "depthwise"),
    [({}, True, True), ({"standardize": False}, False, False), ({"standardize_depthwise": False}, True, False),
     ({"standardize": False, "standardize_depthwise": True}, False, True)],
)  # fmt: skip
def test_which_kernels_nf_standardizes(build, dense, depthwise):
    net = nfzoo.build("nf_test_efficientnet", **build)
    found = {layer.name: hasattr(layer, "effective_kernel") for layer in net.layers if "_conv" in layer.name}
    kinds = {name: isinstance(net.get_layer(name), keras.layers.DepthwiseConv2D) for name in found}
    assert any(kinds.values()) and not all(kinds.values())
    assert all(found[name] == (depthwise if kind else dense) for name, kind in kinds.items())
    expected = nfzoo.theory.profile("nf_test_efficientnet", build)
    effective = set(expected.layer[expected.kind == "effective_weight"])
    assert effective == {f"{name}/kernel" for name, standardized in found.items() if standardized}
