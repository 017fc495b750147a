"""A network as a backbone: feature maps by name, another classifier on the same layers, frozen layers."""

import keras
import numpy as np
import pytest

import nfzoo
from nfzoo import registry

TINY = ("bn_test_efficientnet", "nf_test_resnet", "bn_test_resnet", "nf_test_nfnet", "nf_test_regnet")
CHANNELS = {
    "bn_efficientnet_b0": {"P1": 16, "P2": 24, "P3": 40, "P4": 112, "P5": 320},
    "bn_resnet50": {"P2": 256, "P3": 512, "P4": 1024, "P5": 2048},
    "nf_resnet50": {"P2": 256, "P3": 512, "P4": 1024, "P5": 2048},
    "nf_nfnet_f0": {"P2": 256, "P3": 512, "P4": 1536, "P5": 1536},
    "nf_regnet_b1": {"P2": 36, "P3": 78, "P4": 156, "P5": 330},
    "bn_resnet20_cifar": {"P0": 16, "P1": 32, "P2": 64},
}


def _agrees(model, size: int) -> None:
    """What `feature_info` says is what the maps are."""
    assert model.feature_info.keys() == model.pyramid_outputs.keys() == model.output.keys()
    for key, info in model.feature_info.items():
        height, width, channels = model.pyramid_outputs[key].shape[1:]
        assert (size / height, size / width, channels) == (info["stride"], info["stride"], info["channels"]), key
        assert info["stride"] == 2 ** int(key.removeprefix("P"))


@pytest.mark.parametrize("name", CHANNELS)
def test_maps_of_full_size(name):
    model = registry.undrawn(name, features_only=True, input_shape=(256, 256, 3))
    _agrees(model, 256)
    assert {key: info["channels"] for key, info in model.feature_info.items()} == CHANNELS[name]


@pytest.mark.parametrize("name", TINY)
def test_maps_survive_saving(name, tmp_path):
    model = nfzoo.build(name, features_only=True, input_shape=(64, 64, 3))
    _agrees(model, 64)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.feature_info == model.feature_info and list(again.feature_info) == list(model.feature_info)
    x = np.random.default_rng(0).standard_normal((1, 64, 64, 3)).astype("float32")
    ours, theirs = model(x), again(x)
    for key in model.feature_info:
        np.testing.assert_allclose(theirs[key], ours[key], atol=1e-5)
        assert tuple(ours[key].shape[1:]) == tuple(model.pyramid_outputs[key].shape[1:])


@pytest.mark.parametrize("name", TINY)
def test_the_last_map_is_that_of_the_last_block(name):
    """Before the normalization, activation or convolution that only the classifier needs, as the other maps."""
    model = nfzoo.build(name, features_only=True)
    last = list(model.pyramid_outputs.values())[-1]
    assert last._keras_history.operation.name.endswith("_out")
    assert not any(layer.name.startswith(("top", "head")) for layer in model.layers)


@pytest.mark.parametrize(
    ("chosen", "keys"),
    [((1, 2), ["P2", "P3"]), (("P3", "P2"), ["P2", "P3"]), ([2], ["P3"]), ((np.int64(2), "P3"), ["P3"]), ("P3", ["P3"]),
     (2, ["P3"]), (None, ["P2", "P3"])],
)  # fmt: skip
def test_out_indices(chosen, keys):
    model = nfzoo.build("nf_test_regnet", features_only=True, out_indices=chosen)
    assert list(model.output) == keys == list(model.feature_info)


@pytest.mark.parametrize("chosen", [(), (0,), (1, 5), ("P9",), ("stem",)])
def test_wrong_out_indices(chosen):
    with pytest.raises(ValueError, match=r"among P2, P3 \(or 1, 2\)"):
        nfzoo.build("nf_test_regnet", features_only=True, out_indices=chosen)


def test_maps_have_to_be_asked_for():
    with pytest.raises(ValueError, match="features_only=True"):
        nfzoo.build("nf_test_regnet", out_indices=(1,))
    with pytest.raises(AttributeError, match="features_only=True"):
        nfzoo.build("nf_test_regnet").pyramid_outputs  # noqa: B018


def test_set_head_shares_all_other_layers(images):
    x, _ = images
    old = nfzoo.build("bn_test_resnet")
    new = nfzoo.set_head(old, np.int64(3), activation="softmax")
    assert isinstance(new, nfzoo.NFModel) and new.name == old.name and not new.compiled
    assert [layer.name for layer in new.layers] == [layer.name for layer in old.layers]
    assert all(a is b for a, b in zip(new.layers[:-1], old.layers[:-1], strict=True))
    assert new.output_shape == (None, 3) and old.output_shape == (None, 10)
    np.testing.assert_allclose(np.asarray(new(x)).sum(1), 1, atol=1e-5)
    head = old.get_layer("head").get_weights()
    new.compile("sgd", "sparse_categorical_crossentropy", agc=nfzoo.AGC(0.1))
    kernel = old.get_layer("stem_conv1").get_weights()[0]
    new.fit(x, np.arange(8) % 3, verbose=0)
    assert not np.array_equal(kernel, old.get_layer("stem_conv1").get_weights()[0])
    assert all(np.array_equal(a, b) for a, b in zip(head, old.get_layer("head").get_weights(), strict=True))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("nf_resnet50", "RandomNormal"), ("nf_regnet_b0", "Zeros"), ("bn_resnet18", "VarianceScaling"),
     ("fixup_test_resnet", "Zeros")],
)  # fmt: skip
def test_a_new_head_starts_as_the_old_one(name, kind):
    with keras.StatelessScope():
        old = nfzoo.build(name)
        new = nfzoo.set_head(old, 7).get_layer("head")
    initializer = old.get_layer("head").kernel_initializer
    assert (
        type(new.kernel_initializer).__name__ == kind and new.units == 7 and new.activation is keras.activations.linear
    )
    assert new.kernel_initializer.get_config() == initializer.get_config()


def test_a_new_head_on_a_frozen_model_learns(images):
    x, y = images
    model = nfzoo.build("bn_test_resnet", include_preprocessing=True, classes=100)
    model.trainable = False
    model = nfzoo.set_head(model, 10)
    assert [v.path for v in model.trainable_variables] == ["head/kernel", "head/bias"]
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = {v.path: v.numpy() for v in model.weights}
    model.fit((x * 50 + 128).clip(0, 255), y, verbose=0)
    moved = {v.path for v in model.weights if not np.array_equal(v.numpy(), before[v.path])}
    assert moved == {"head/kernel", "head/bias"}


def test_set_head_under_mixed_precision_keeps_logits_in_float32():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = nfzoo.set_head(nfzoo.build("nf_test_regnet"), 3)
    assert model.output.dtype == "float32"


@pytest.mark.parametrize("change", ["lora", "quantized"])
def test_a_new_head_learns_whatever_became_of_the_old_one(change, images):
    old = nfzoo.build("bn_test_resnet")
    old.get_layer("head").enable_lora(2) if change == "lora" else old.get_layer("head").quantize("int8")
    head = nfzoo.set_head(old, 3).get_layer("head")
    kernel, bias = head.trainable_variables
    assert (kernel.shape, bias.shape) == ((old.get_layer("head").input.shape[-1], 3), (3,))
    assert keras.ops.convert_to_numpy(kernel).std() > 0 and kernel.dtype == "float32"


def test_set_head_drops_nothing():
    model = nfzoo.build("nf_test_resnet")
    ended = keras.Model(model.input, keras.layers.Softmax()(model.output), name="ended")
    with pytest.raises(ValueError, match="ended, which goes on behind it"):
        nfzoo.set_head(ended, 3)


def test_set_head_needs_a_head_and_classes():
    with pytest.raises(ValueError, match="which has none"):
        nfzoo.set_head(nfzoo.build("nf_test_regnet", include_top=False), 3)
    model = nfzoo.build("nf_test_regnet")
    with pytest.raises(ValueError, match="classes >= 1.*classes=0"):
        nfzoo.set_head(model, 0)
    with pytest.raises(TypeError):
        nfzoo.set_head(model, 2.5)


@pytest.mark.parametrize("variant", ["none", "bn", "gn", "sn", "nf", "fixup", "skipinit", "rescale", "eun"])
def test_a_frozen_network_keeps_all_its_state(variant, images):
    """Moving statistics of BN and the centring of Rescale included, in `fit` too."""
    x, y = images
    model = nfzoo.build(f"{variant}_test_resnet")
    for layer in model.layers[:-1]:
        layer.trainable = False
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = {v.path: v.numpy() for v in model.weights}
    model.fit(x, y, verbose=0)
    moved = {v.path for v in model.weights if not np.array_equal(v.numpy(), before[v.path])}
    assert moved and moved <= {"head/kernel", "head/bias"}
