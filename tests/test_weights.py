import json

import keras
import numpy as np
import pytest
from conftest import slow_but

import nfzoo
from nfzoo import weights
from nfzoo.files import sha256


@pytest.fixture
def model():
    model = nfzoo.build("bn_test_efficientnet")
    rng = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    return model


def _same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a.get_weights(), b.get_weights(), strict=True))


@pytest.mark.parametrize("suffix", [".safetensors", ".keras", ".weights.h5"])
def test_round_trip(model, tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        weights.save(model, path)
    elif suffix == ".keras":
        model.save(path)
    else:
        model.save_weights(path)
    assert _same(nfzoo.build("bn_test_efficientnet", weights=path), model)
    assert list(tmp_path.iterdir()) == [path]


def test_scalars_and_bfloat16_come_back(tmp_path):
    """The gain of a normalizer-free residual branch has no axes; safetensors' own reader does not know bfloat16."""
    scalars = nfzoo.build("nf_test_efficientnet")
    path = weights.save(scalars, tmp_path / "nf.safetensors")
    assert _same(nfzoo.build("nf_test_efficientnet", weights=path), scalars)
    keras.config.set_floatx("bfloat16")
    keras.config.set_dtype_policy("bfloat16")
    half = nfzoo.build("nf_test_efficientnet")
    weights.save(half, path)
    assert _same(nfzoo.build("nf_test_efficientnet", weights=path), half)


def test_two_networks_of_one_architecture_are_no_file_of_paths(tmp_path):
    image = keras.Input((32, 32, 3))
    pair = keras.Model(image, keras.layers.Average()([nfzoo.build("nf_test_resnet", name=n)(image) for n in "ab"]))
    for store in (lambda: weights.save(pair, tmp_path / "p.safetensors"), lambda: weights.fill(pair, {}, "a mapping")):
        with pytest.raises(ValueError, match=r"several of stem_conv1/kernel"):
            store()
    with pytest.raises(ValueError, match=r"several of stem_conv1/kernel"):
        nfzoo.spp.snapshot(pair, np.zeros((2, 32, 32, 3), "float32"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variant", ["none", "bn", "gn", "sn", "nf", "fixup", "skipinit", "rescale", "eun"])
def test_round_trip_of_every_variant(variant, tmp_path):
    """Scalars (gains) too."""
    net = nfzoo.build(f"{variant}_test_resnet")
    path = weights.save(net, tmp_path / "net.safetensors")
    assert _same(nfzoo.build(f"{variant}_test_resnet", weights=path), net)


def test_weights_of_another_architecture_are_listed_and_nothing_is_written(model, tmp_path):
    path = weights.save(model, tmp_path / "bn.safetensors")
    target = nfzoo.build("nf_test_efficientnet")
    before = target.get_weights()
    with pytest.raises(ValueError, match=r"without .*gain.*with unknown .*norm2/gamma") as error:
        weights.load(target, path)
    assert "more" in str(error.value)
    assert all(np.array_equal(a, b) for a, b in zip(before, target.get_weights(), strict=True))


OTHERWISE = [{"stem": "small"}, {"dialect": "timm"}, {"epsilon": 1e-5}]


@pytest.mark.parametrize("suffix", [".safetensors", ".keras"])
@pytest.mark.parametrize("overrides", slow_but(OTHERWISE[:1], OTHERWISE))
def test_weights_of_a_network_that_computes_otherwise_are_refused(overrides, suffix, tmp_path):
    """Strides, padding and epsilon are no weights: names and shapes fit, and the outputs would be others."""
    path = tmp_path / f"other{suffix}"
    other = nfzoo.build("bn_test_efficientnet", **overrides)
    other.save(path) if suffix == ".keras" else weights.save(other, path)
    assert _same(nfzoo.build("bn_test_efficientnet", weights=path, **overrides), other)
    net = nfzoo.build("bn_test_efficientnet")
    before = net.get_weights()
    with pytest.raises(ValueError, match=r"computes otherwise.*stem_(conv1 strides|conv1 padding|norm1 epsilon)"):
        weights.load(net, path)
    assert all(map(np.array_equal, before, net.get_weights()))
    weights.load(net, path, strict=False)
    assert _same(net, other)
    nfzoo.build("bn_test_efficientnet", weights=path, include_top=False, include_preprocessing=True, **overrides)


@pytest.mark.parametrize(
    "overrides, told",
    [
        ({"magnitude_preserving": False, "padding_compensation": True}, "a network with stage1_block1_"),
        ({"magnitude_preserving": False, "doubled_gate": True}, "se gain 2.0 for 1.0"),
        ({"magnitude_preserving": False, "activation": "relu"}, "stem_act1 activation relu for selu"),
    ],
)
def test_layers_without_weights_are_compared_too(overrides, told, tmp_path):
    path = weights.save(nfzoo.build("sn_test_efficientnet", **overrides), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=f"computes otherwise.*{told}"):
        nfzoo.build("sn_test_efficientnet", magnitude_preserving=False, weights=path)
    nfzoo.build("sn_test_efficientnet", weights=path, features_only=True, dropout_rate=0.5, **overrides)
    plain = nfzoo.build("sn_test_efficientnet", magnitude_preserving=False)
    weights.save(plain, path)
    with pytest.raises(ValueError, match="computes otherwise"):
        nfzoo.build("sn_test_efficientnet", weights=path, include_top=False, **overrides)


def test_a_users_layers_before_and_pooling_behind_are_no_other_network(tmp_path):
    plain = nfzoo.build("nf_test_resnet", include_top=False, pooling=None)
    path = weights.save(plain, tmp_path / "body.safetensors")
    image = keras.Input((32, 32, 3))
    flipped = keras.layers.RandomFlip(name="flip")(image)
    net = nfzoo.build("nf_test_resnet", include_top=False, input_tensor=flipped, weights=path)
    assert _same(net, plain)
    nfzoo.build("nf_test_resnet", include_top=False, weights=weights.save(net, tmp_path / "whole.safetensors"))


def test_keras_weights_that_do_not_fit_leave_the_model_as_it_was(model, tmp_path):
    """None's lack the norms; Keras would load GN's into NONE and pass over the norms without a word."""
    plain = nfzoo.build("none_test_efficientnet")
    plain.save_weights(tmp_path / "none.weights.h5")
    nfzoo.build("gn_test_efficientnet").save_weights(tmp_path / "gn.weights.h5")
    for target, name in ((model, "none"), (plain, "gn")):
        before = target.get_weights()
        with pytest.raises(ValueError, match=rf"{name}\.weights\.h5.*has no paths"):
            weights.load(target, tmp_path / f"{name}.weights.h5")
        assert all(np.array_equal(a, b) for a, b in zip(before, target.get_weights(), strict=True))


@pytest.mark.parametrize(
    "options", slow_but([{"include_top": False}], [{"include_top": False}, {"features_only": True}])
)
def test_a_model_without_its_top_leaves_the_top_of_the_file(model, options, tmp_path):
    weights.save(model, tmp_path / "bn.safetensors")
    model.save(tmp_path / "bn.keras")
    model.save_weights(tmp_path / "bn.weights.h5")
    stored = {v.path: v for v in model.weights}
    for name in ("bn.safetensors", "bn.keras"):
        backbone = nfzoo.build("bn_test_efficientnet", weights=tmp_path / name, **options)
        assert not any(layer.name == "head" for layer in backbone.layers)
        assert all(np.array_equal(v, stored[v.path]) for v in backbone.weights)
    with pytest.raises(ValueError, match=r"has no paths.*\.safetensors"):
        nfzoo.build("bn_test_efficientnet", weights=tmp_path / "bn.weights.h5", **options)
    path = weights.save(nfzoo.build("none_test_efficientnet", include_top=False), tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"without .*norm"):
        nfzoo.build("bn_test_efficientnet", weights=path, **options)
    with pytest.raises(ValueError, match=r"with unknown .*norm"):
        nfzoo.build("none_test_efficientnet", weights=tmp_path / "bn.safetensors", **options)


def test_a_whole_model_needs_the_whole_file(model, tmp_path):
    backbone = nfzoo.build("bn_test_efficientnet", include_top=False)
    path = weights.save(backbone, tmp_path / "backbone.safetensors")
    with pytest.raises(ValueError, match="without head/kernel, head/bias"):
        weights.load(model, path)


def test_shapes_are_listed(model, tmp_path):
    path = weights.save(model, tmp_path / "bn.safetensors")
    with pytest.raises(ValueError, match=r"head/kernel \(64, 10\) for \(64, 7\).*classes=10.*include_top=False"):
        nfzoo.build("bn_test_efficientnet", classes=7, weights=path)


@pytest.mark.parametrize("suffix", [".safetensors", ".keras", ".weights.h5"])
def test_truncated_files(model, tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    {".safetensors": weights.save, ".keras": lambda m, p: m.save(p), ".weights.h5": lambda m, p: m.save_weights(p)}[
        suffix
    ](model, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="Received: .*model"):
        nfzoo.build("bn_test_efficientnet", weights=path)


def test_pickles_are_not_read(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was executed",))

    for name in ("model.pkl", "model.pth", "model.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil()))
        with pytest.raises(ValueError, match="Pickles|damaged"):
            nfzoo.build("bn_test_efficientnet", weights=tmp_path / name)


def test_tags_are_looked_up_and_verified(model, tmp_path, monkeypatch):
    monkeypatch.setenv("NFZOO_HOME", str(tmp_path))
    path = weights.save(model, tmp_path / "bn.safetensors")
    entry = {"weights": "bn.safetensors", "sha256": sha256(path)}
    (tmp_path / "manifest.json").write_text(json.dumps({"bn_test_efficientnet.noise": entry}))
    assert _same(nfzoo.build("bn_test_efficientnet", weights="noise"), model)
    with pytest.raises(FileNotFoundError, match="'cifar'.*Tags of bn_test_efficientnet: noise"):
        nfzoo.build("bn_test_efficientnet", weights="cifar")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="sha256"):
        nfzoo.build("bn_test_efficientnet", weights="noise")


def test_only_safetensors_are_written(model, tmp_path):
    with pytest.raises(ValueError, match=r"\.safetensors"):
        weights.save(model, tmp_path / "x.h5")


def test_a_plain_keras_model_can_be_saved_too(tmp_path):
    image = keras.Input((4,))
    plain = keras.Model(image, keras.layers.Dense(2, name="dense")(image))
    path = weights.save(plain, tmp_path / "plain.safetensors")
    before = plain.get_weights()
    plain.set_weights([w * 0 for w in before])
    weights.load(plain, path)
    assert np.array_equal(plain.get_weights()[0], before[0])


@pytest.mark.parametrize(
    "name, overrides", [("bn_resnetv2_18", {"order": "relu-bn-conv"}), ("fixup_test_resnet", {"biased_identity": True})]
)
def test_weights_of_other_wiring_are_refused(name, overrides, tmp_path):
    """The same layers with the same weights in another order compute something else."""
    small = {"classes": 4, "input_shape": (32, 32, 3)}
    path = weights.save(nfzoo.build(name, **small, **overrides), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="computes otherwise.* after "):
        nfzoo.build(name, weights=path, **small)
    x = keras.Input((32, 32, 3))  # what a user puts before the network is not the network's
    before = keras.layers.Rescaling(2.0)(x)
    nfzoo.build(name, weights=path, classes=4, input_tensor=before, dropout_rate=0.5, **overrides)


def test_maps_of_early_stages_take_what_they_need(model, tmp_path):
    net = nfzoo.build("nf_test_resnet")
    path = weights.save(net, tmp_path / "n.safetensors")
    early = nfzoo.build("nf_test_resnet", weights=path, features_only=True, out_indices=["P2"])
    values = {v.path: v for v in net.weights}
    assert early.weights and not any(v.path.startswith("stage2") for v in early.weights)
    assert all(np.array_equal(v, values[v.path]) for v in early.weights)
    cut = weights.read_safetensors(path)
    del cut["stage1_block1_conv1/kernel"]
    with pytest.raises(ValueError, match="without stage1_block1_conv1/kernel"):
        weights.fill(early, cut, "cut", spare=frozenset(cut))


def test_a_folder_may_have_the_name_of_a_tag(tmp_path, monkeypatch):
    (tmp_path / "cifar100").mkdir()
    monkeypatch.chdir(tmp_path)
    assert nfzoo.build("sn_efficientnet_b0.cifar100").output_shape == (None, 100)
    with pytest.raises(FileNotFoundError, match="a file or a tag"):
        nfzoo.build("sn_test_ffnn", weights="cifar100")


def test_what_is_no_number_is_said_before_anything_is_written(model):
    net = nfzoo.build("sn_test_ffnn")
    before = net.get_weights()
    tensors = {v.path: np.ones(v.shape) for v in net.weights}
    tensors["head/bias"] = np.full(net.weights[-1].shape, "one")
    with pytest.raises(ValueError, match="head/bias of <U3, which is no number"):
        weights.fill(net, tensors, "text")
    assert all(map(np.array_equal, before, net.get_weights()))
