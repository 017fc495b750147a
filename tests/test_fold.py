"""Folded models compute what they were folded from, of Keras' own layers alone."""

import keras
import numpy as np
import pytest
from conftest import slow_but
from keras import layers

import nfzoo
from nfzoo import fold

NAMES = [name for name in nfzoo.list_models(tests=True) if "_test_" in name]
FULL = ["nf_resnet50", "bn_resnet50", "dm_nfnet_f0", "bn_efficientnet_b0", "sn_efficientnet_b0", "nf_efficientnet_b0"]


def scattered(name, **options):
    """Every weight away from where it starts: zeros and ones hide what is lost."""
    model = nfzoo.build(name, **options)
    _scatter(model)
    return model


def _scatter(model):
    rng = np.random.default_rng(0)
    for v in model.weights:
        if "seed_generator" in v.path:
            continue
        if len(v.shape) < 2:
            added = v.path.endswith(("bias", "beta", "mean"))  # not so much that the image is lost under it
            v.assign(8.0 if "count" in v.path else rng.uniform(0.5, 1.5, v.shape) - added)
        else:
            depthwise = len(v.shape) == 4 and v.shape[-1] == 1  # a channel has its own taps alone
            fan_in = np.prod(v.shape[:2] if depthwise else v.shape[:-1])
            v.assign(rng.normal(0, fan_in**-0.5, v.shape))


def _outputs(model, x):
    return [keras.ops.convert_to_numpy(y) for y in keras.tree.flatten(model(x))]


def _assert_same(model, plain, size=None):
    shape = model.input_shape[1:] if size is None else (size, size, 3)
    x = np.random.default_rng(1).standard_normal((3, *shape)).astype("float32")
    for a, b in zip(_outputs(model, x), _outputs(plain, x), strict=True):
        assert abs(a - b).max() <= 1e-4 * abs(a).max()
        assert abs(a - b).max() < 0.2 * np.ptp(a, axis=0).max()  # of what depends on the image, too
        assert a.std() > 1e-3 * abs(a).max()  # and is no constant


def _assert_folded(model):
    plain = fold(model)
    _assert_same(model, plain)
    assert plain.fold_report.difference < 1e-4
    assert all(type(layer).__module__.startswith("keras.") for layer in plain.layers)
    again = fold(plain)
    assert [layer.name for layer in again.layers] == [layer.name for layer in plain.layers]
    known = {
        name for name, why in plain.fold_report.kept.items() if "comes in" not in why and "each position" not in why
    }  # the rest are functions now
    assert again.fold_report.kept.keys() == known
    for a, b in zip(plain.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    kernels = {v.path for v in plain.weights if v.path.endswith("kernel")}
    assert kernels == {v.path for v in model.weights if v.path.endswith("kernel")}
    return plain


@pytest.mark.parametrize("name", slow_but([n for n in NAMES if "_resnet" in n or "_efficientnet" in n], NAMES))
def test_a_folded_model_computes_the_same(name):
    _assert_folded(scattered(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_full_size(name):
    kept = _assert_folded(scattered(name)).fold_report.kept
    assert not kept  # nothing is left of normalization, standardization or scales


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nf_test_resnet", {"dialect": "timm"}),
        ("nf_test_nfnet", {"dialect": "timm", "activation": "gelu"}),
        ("nf_test_resnet", {"features_only": True}),
        ("nf_test_resnet", {"activation": "leaky_relu"}),
        ("nf_test_efficientnet", {"include_preprocessing": True, "classifier_activation": "softmax"}),
        ("bn_test_resnet", {"include_top": False, "input_shape": (None, None, 3)}),
        ("sn_test_efficientnet", {"magnitude_preserving": False, "drop_path_rate": 0.2}),
        ("sn_test_efficientnet", {"standardize": True, "doubled_gate": True, "padding_compensation": True}),
        ("nf_test_resnet", {"padding_compensation": True, "padding": "symmetric"}),
        ("eun_test_resnet", {"statistics": "channel_l2"}),
        ("eun_test_resnet", {"statistics": "per_channel_batch"}),
        ("gn_test_resnet", {"order": "relu-bn-conv"}),
        ("bn_test_resnet", {"order": "relu-bn-conv"}),
    ],
)
def test_options_fold(name, options):
    model = scattered(name, **options)
    plain = fold(model)
    _assert_same(model, plain, 64 if None in model.input_shape[1:] else None)
    assert type(plain.output) is type(model.output)


def test_a_normalizer_free_residual_network_is_nothing_but_convolutions():
    plain = fold(scattered("nf_test_resnet"))
    kinds = {type(layer).__name__ for layer in plain.layers}
    assert not kinds & {"Rescaling", "BatchNormalization"} and not plain.fold_report.kept
    assert {"stage1_block1_branch", "stage1_block1_drop"} & set(plain.fold_report.gone)


def test_a_stream_that_is_scaled_at_every_sum_is_scaled_by_kernels():
    """a · skip + b · branch has no multiplication left, though the skip has other users."""
    plain = fold(scattered("sn_test_efficientnet"))
    assert not any(isinstance(layer, layers.Rescaling) for layer in plain.layers)


def test_the_compensation_of_small_maps_goes_into_kernels():
    model = scattered("nf_test_efficientnet", padding_compensation=True, input_shape=(8, 8, 3))
    plain = fold(model)
    _assert_same(model, plain)
    assert "stage3_block1_compensate2" in plain.fold_report.gone  # of a map of 1x1: one factor
    assert plain.fold_report.kept["stage1_block1_compensate2"] == "has another factor at each position of the border"
    _assert_same(model, fold(plain))


def test_a_model_that_is_not_ours():
    model = keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=5)
    _scatter(model)
    plain = fold(model)
    _assert_same(model, plain)
    assert not any(isinstance(layer, layers.BatchNormalization) for layer in plain.layers)


def test_sequential_models_and_bare_operations():
    chain = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(4, 3), layers.BatchNormalization(), layers.ReLU()])
    _scatter(chain)
    _assert_same(chain, fold(chain))
    assert [type(layer).__name__ for layer in fold(chain).layers] == ["InputLayer", "Conv2D", "Activation"]

    x = keras.Input((8, 8, 3))
    shared = layers.Conv2D(3, 3, padding="same", name="shared")
    y = shared(keras.ops.pad(shared(x), [(0, 0), (1, 1), (0, 0), (0, 0)]) * 2.0)
    model = keras.Model(x, {"sum": keras.ops.concatenate([y, y], axis=1), "y": y})
    _scatter(model)
    plain = fold(model)
    _assert_same(model, plain)
    assert plain.output.keys() == {"sum", "y"}


def test_a_backbone_within_a_model_folds_too():
    backbone = nfzoo.build("sn_test_efficientnet", include_top=False)
    x = keras.Input((32, 32, 3))
    y = layers.Dense(4, name="new_head")(backbone(layers.Rescaling(1 / 127.5, -1, name="scale")(x)))
    model = keras.Model(x, y)
    _scatter(model)
    plain = fold(model)
    _assert_same(model, plain)
    assert {"stem_conv1", "new_head"} <= {layer.name for layer in plain.layers}
    assert plain.fold_report.kept == {"scale": "preprocesses"}
    twice = keras.Model(x, [backbone(layers.Rescaling(2.0)(x)), backbone(x)])  # as the end of a model, and two of them
    _assert_same(twice, fold(twice))


def test_inputs_keep_their_structure():
    given = {name: keras.Input((8, 8, 3), name=name) for name in ("left", "right")}
    x = layers.BatchNormalization()(layers.Conv2D(4, 3)(layers.Subtract()([given["left"], given["right"]])))
    model = keras.Model(given, layers.GlobalAveragePooling2D()(x))
    model.set_weights([w + np.linspace(0.5, 1.5, w.size).reshape(w.shape) for w in model.get_weights()])
    rng = np.random.default_rng(0)
    x = {name: rng.standard_normal((2, 8, 8, 3)).astype("float32") for name in reversed(given)}
    plain = nfzoo.fold(model)
    assert len(plain.layers) == len(model.layers) - 1
    np.testing.assert_allclose(np.asarray(plain(x)), np.asarray(model(x)), rtol=1e-4, atol=1e-5)


def test_functions_of_a_user_stay():
    """Of a lambda too, which Keras would not read from a file."""
    factor = 3.0
    own = layers.Lambda(lambda x, power: factor * x**power, arguments={"power": 2}, name="own")
    model = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(4, 3), layers.BatchNormalization(), own])
    plain = nfzoo.fold(model)
    assert [layer.name for layer in plain.layers[2:]] == ["own"]
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype("float32")
    np.testing.assert_allclose(np.asarray(plain(x)), np.asarray(model(x)), rtol=1e-4, atol=1e-5)


def test_half_precision_folds_to_float32():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        plain = fold(scattered("nf_test_resnet"))
        assert keras.config.dtype_policy().name == "mixed_bfloat16"
    finally:
        keras.config.set_dtype_policy("float32")
    assert {layer.compute_dtype for layer in plain.layers} == {"float32"}
    assert plain.fold_report.difference < 0.05  # of bfloat16


class Doubled(layers.Conv2D):
    """A convolution of somebody else's."""

    def convolution_op(self, inputs, kernel):
        return 2 * super().convolution_op(inputs, kernel)


def test_what_only_looks_known_is_kept_as_it_is():
    def relu(x):  # clipped, by the name of another
        return keras.ops.minimum(keras.ops.relu(x), 1.0)

    for middle in (
        [layers.BatchNormalization(axis=1)],
        [layers.Rescaling(5.0), layers.Activation(relu)],
        [Doubled(4, 3, padding="same")],
        [layers.DepthwiseConv2D(3), layers.Rescaling([2.0], [1.0])],
    ):
        model = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(4, 3, padding="same"), *middle])
        _scatter(model)
        _assert_same(model, fold(model))


def test_a_model_that_changes_when_folded_is_refused(monkeypatch):
    from nfzoo.folding import graph

    wrong = lambda layer, inputs: graph.affine(layer.name, inputs[0], 1.5)  # noqa: E731
    monkeypatch.setattr(graph, "_READERS", [(layers.BatchNormalization, wrong), *graph._READERS])
    with pytest.raises(ValueError, match="change by .* relative.*please report"):
        fold(scattered("bn_test_resnet"))


def test_constant_outputs_show_nothing():
    assert np.isnan(fold(nfzoo.build("fixup_test_resnet")).fold_report.difference)


def test_scales_and_shifts_one_after_another():
    image = keras.Input((6, 6, 3))
    x = layers.Rescaling(2.0, offset=0.3)(image)
    x = layers.BatchNormalization()(x)
    x = layers.Activation("tanh")(layers.Rescaling(-0.5, offset=1.0)(x))
    x = layers.Rescaling(3.0, offset=-0.7)(layers.BatchNormalization()(layers.Conv2D(4, 3)(x)))
    model = keras.Model(image, layers.Activation("silu")(x))
    _scatter(model)
    plain = fold(model)
    _assert_same(model, plain)
    assert not [layer for layer in plain.layers if isinstance(layer, layers.BatchNormalization)]


def test_grouped_convolutions_stay_fast_where_nfzoo_is():
    model = scattered("nf_test_nfnet")
    plain = fold(model, portable=False)
    _assert_same(model, plain)
    kinds = {type(layer) for layer in plain.layers if getattr(layer, "groups", 1) > 1}
    assert kinds == {nfzoo.layers.Conv2D}


@pytest.mark.slow
def test_it_loads_where_nfzoo_is_not(tmp_path, fresh_process):
    model = scattered("sn_test_efficientnet")
    plain = fold(model)
    plain.save(tmp_path / "plain.keras")
    x = np.random.default_rng(1).standard_normal((2, *model.input_shape[1:])).astype("float32")
    np.save(tmp_path / "x.npy", x)
    code = """
import json, sys
import numpy as np
sys.modules["nfzoo"] = None  # an import of it fails
import keras
model = keras.saving.load_model(sys.argv[1] + "/plain.keras")
print(json.dumps(np.asarray(model(np.load(sys.argv[1] + "/x.npy"))).tolist()))
"""
    np.testing.assert_allclose(fresh_process(code, tmp_path), _outputs(model, x)[0], atol=1e-4)


def test_what_cannot_be_folded_is_told():
    kept = fold(scattered("eun_test_resnet")).fold_report.kept
    assert kept["stem_standardize1"] == "standardizes by what comes in"
    kept = fold(scattered("fixup_test_resnet")).fold_report.kept
    assert kept["stage1_block1_preconv2"] == "shifts stage1_block1_act1 before zeros are padded"

    class Own(keras.Model):
        def call(self, x):
            return x

    for model in (Own(), keras.Sequential([layers.Dense(3)])):
        with pytest.raises(ValueError, match="Expected a functional model, or a sequential one with weights"):
            fold(model)


def test_quantized_layers_are_no_floats():
    net = nfzoo.build("sn_test_ffnn")
    for layer in net.layers:
        if isinstance(layer, keras.layers.Dense):
            layer.quantize("int8")
    with pytest.raises(ValueError, match="network of floats.*int8; fold it first"):
        fold(net)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("nested", [False, True])
def test_named_inputs_in_any_order(policy, nested):
    keras.config.set_dtype_policy(policy)
    inputs = {name: keras.Input((8, 8, 3), name=name) for name in ("image", "age")}
    made = layers.BatchNormalization(name="norm")(layers.Conv2D(4, 3, name="conv")(inputs["image"]))
    made = layers.Concatenate()([layers.GlobalAveragePooling2D()(made), layers.Flatten()(inputs["age"])])
    model = keras.Model(inputs, layers.Dense(2, dtype="float32")(made))
    if nested:
        outer = {name: keras.Input((8, 8, 3), name=name) for name in ("image", "age")}
        model = keras.Model(outer, layers.Activation("tanh", dtype="float32")(model(outer)))
    plain = nfzoo.fold(model)
    x = np.random.default_rng(0).standard_normal((2, 2, 8, 8, 3)).astype("float32")
    given = {"image": x[0], "age": x[1]}
    np.testing.assert_allclose(plain(given), model(given), atol=1e-5 if policy == "float32" else 0.05)


def test_a_padded_pool_has_no_infinity_in_it():
    """Eight bits know none; and the mirrored pixels change nothing."""
    net = scattered("bn_test_resnet")
    assert any(type(layer).__name__ == "MaxPool2D" and layer.pad for layer in net.layers)
    plain = nfzoo.fold(net)
    assert plain.fold_report.difference < 1e-4 and "Infinity" not in plain.to_json()


def test_outputs_that_overflow_are_not_taken_for_equal():
    """NaN compares with nothing: what cannot be verified is refused."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.layers[0].kernel.assign(np.full((4, 3), np.inf))
    with pytest.raises(ValueError, match="computes the same when folded"):
        fold(model)
