"""Every tiny row in every variant: it computes, trains, saves; and the profiles that the theory expects."""

import math

import keras
import numpy as np
import pytest
from conftest import VARIANTS, crossentropy, slow_but

import nfzoo
from nfzoo import names, weights

TINY = nfzoo.list_models("*_test_*", tests=True)


def _random_weights(model, seed=0):
    """Gains, kernels and classifiers that start at zero would hide their branch."""
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        if len(variable.shape) < 2:
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
        elif not np.any(variable):
            variable.assign(rng.normal(0, np.prod(variable.shape[:-1]) ** -0.5, variable.shape))


def _build(name, **options):
    size = 8 if "ffnn" in name else 64 if "nfnet" in name else 32
    return nfzoo.build(name, classes=10, input_shape=(size, size, 3), **options)


@pytest.fixture
def tiny(request):
    model = _build(request.param)
    _random_weights(model)
    return model


tiny_models = pytest.mark.parametrize("tiny", TINY, indirect=True)


def _noise(model, n=8, seed=0):
    return np.random.default_rng(seed).standard_normal((n, *model.input_shape[1:])).astype("float32")


def test_tiny_rows_cover_every_family_and_variant():
    assert {(n.family, n.variant) for n in map(names.parse, TINY)} == {
        (family, variant) for family, module in names.FAMILIES.items() for variant in module.ADMITS
    }


@tiny_models
def test_output_is_finite_and_every_variable_has_a_gradient(tiny):
    import tensorflow as tf

    x, y = _noise(tiny), np.arange(8) % 10
    with tf.GradientTape() as tape:
        logits = tiny(x, training=True)
        loss = crossentropy()(y, logits)
    assert logits.shape == (8, 10) and np.isfinite(logits).all()
    for variable, gradient in zip(tiny.trainable_variables, tape.gradient(loss, tiny.trainable_variables), strict=True):
        assert gradient is not None and np.abs(gradient).max() > 0, variable.path


# The others with the slow tests.
SAVED = ("gn_test_nfnet", "sn_test_efficientnet", "rescale_test_efficientnet", "eun_test_resnet", "nf_test_regnet")
SOME = ("nf_test_resnet",)


@pytest.mark.parametrize("name", slow_but(SOME, TINY))
def test_loss_falls_on_one_batch(name):
    model = _build(name, dropout_rate=0.0)
    # Eagerly: building the graph of a step takes longer than its 25 runs.
    model.compile(keras.optimizers.Adam(3e-3), crossentropy(), run_eagerly=True)
    x, y = _noise(model), np.arange(8) % 10
    losses = model.fit(x, y, epochs=25, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("tiny", slow_but(SAVED, TINY), indirect=True)
def test_save_and_load(tiny, tmp_path):
    x = _noise(tiny)
    tiny.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert type(again) is nfzoo.NFModel
    np.testing.assert_array_equal(np.asarray(again(x)), np.asarray(tiny(x)))
    clone = keras.models.clone_model(tiny)
    clone.set_weights(tiny.get_weights())
    assert type(clone) is nfzoo.NFModel
    np.testing.assert_array_equal(np.asarray(clone(x)), np.asarray(tiny(x)))


@pytest.mark.slow
def test_a_saved_model_loads_in_a_fresh_process_after_import_nfzoo_alone(tmp_path, fresh_process):
    model = nfzoo.build("nf_test_efficientnet")
    model.compile("adam", crossentropy(), agc=nfzoo.AGC(0.02))
    model.save(tmp_path / "model.keras")
    x = np.ones((1, 32, 32, 3), "float32")
    code = """
import nfzoo, sys, json
import keras, numpy as np
model = keras.saving.load_model(sys.argv[1])
logits = model(np.ones((1, 32, 32, 3), "float32")).numpy().tolist()
print(json.dumps([type(model).__name__, model.agc.clip_factor, logits]))
"""
    kind, factor, logits = fresh_process(code, tmp_path / "model.keras")
    assert (kind, factor) == ("NFModel", 0.02)
    np.testing.assert_allclose(logits, np.asarray(model(x)), atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_names_do_not_depend_on_what_was_built_before(variant):
    """Auto-numbered names would differ between the first and the second build of one process."""
    first, second = (nfzoo.build(f"{variant}_test_efficientnet") for _ in range(2))
    assert [layer.name for layer in first.layers] == [layer.name for layer in second.layers]
    assert [v.path for v in first.weights] == [v.path for v in second.weights]
    assert first.layers[0].name == "image" and first.layers[-1].name == "head"


MIXED = [*(f"{v}_test_efficientnet" for v in VARIANTS), "nf_test_resnet", "bn_test_resnet"]
FAST = ("nf_test_resnet",)


@pytest.mark.parametrize("policy", ["mixed_float16", pytest.param("mixed_bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", slow_but(FAST, MIXED))
def test_mixed_precision(name, policy, images):
    keras.config.set_dtype_policy(policy)
    model = nfzoo.build(name)
    model.compile("sgd", crossentropy())
    assert np.isfinite(model.fit(*images, verbose=0).history["loss"][0])
    convs = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    assert model.output.dtype == "float32" and {c.compute_dtype for c in convs} == {policy.removeprefix("mixed_")}


def test_frozen_models_have_nothing_to_train(images):
    model = nfzoo.build("bn_test_efficientnet")
    model.trainable = False
    assert not model.trainable_variables
    before = [np.array(v) for v in model.weights]
    model(images[0], training=True)
    assert all((np.array(v) == b).all() for v, b in zip(model.weights, before, strict=True))


# ---------------------------------------------------------------- arguments of build
def test_include_preprocessing_takes_raw_images():
    raw = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype("float32")
    inside = nfzoo.build("sn_test_efficientnet", include_preprocessing=True)
    outside = nfzoo.build("sn_test_efficientnet")
    outside.set_weights(inside.get_weights())
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(
        np.asarray(inside(raw)), np.asarray(outside(((raw / 255 - mean) / std).astype("float32"))), atol=1e-5
    )


def test_without_the_top():
    assert nfzoo.build("sn_test_efficientnet", include_top=False).output_shape == (None, 64)
    assert nfzoo.build("sn_test_efficientnet", include_top=False, pooling=None).output_shape == (None, 4, 4, 64)
    x = np.random.default_rng(0).standard_normal((1, 32, 32, 3)).astype("float32")
    flat = nfzoo.build("sn_test_efficientnet", include_top=False, pooling=None)
    pooled = nfzoo.build("sn_test_efficientnet", include_top=False, pooling="max")
    pooled.set_weights(flat.get_weights())
    np.testing.assert_allclose(np.asarray(pooled(x)), np.asarray(flat(x)).max((1, 2)), atol=1e-6)


def test_features_only_gives_the_last_map_of_each_stride():
    model = nfzoo.build("bn_efficientnet_b0", features_only=True)
    shapes = {key: value.shape[1:] for key, value in model.output.items()}
    assert shapes == {
        "P1": (112, 112, 16), "P2": (56, 56, 24), "P3": (28, 28, 40), "P4": (14, 14, 112), "P5": (7, 7, 320),
    }  # fmt: skip
    with pytest.raises(ValueError, match="plain network"):
        nfzoo.build("bn_test_ffnn", features_only=True)


def test_small_stem_doubles_every_map():
    small = nfzoo.build("bn_efficientnet_b0", input_shape=(32, 32, 3), stem="small")
    assert small.get_layer("stem_conv1").output.shape[1:] == (32, 32, 32)
    assert small.get_layer("top_conv").output.shape[1:] == (2, 2, 1280)


def test_classifier_activation_and_classes():
    x = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype("float32")
    model = nfzoo.build("sn_test_efficientnet", classes=7, classifier_activation="softmax")
    np.testing.assert_allclose(np.asarray(model(x)).sum(1), 1, atol=1e-5)
    assert model.output_shape == (None, 7)


def test_input_tensor_and_name():
    image = keras.Input((48, 48, 3), name="photo")
    model = nfzoo.build("sn_test_efficientnet", input_tensor=image * 2.0, include_top=False, name="backbone")
    assert model.name == "backbone" and model.output_shape == (None, 64)
    x = np.random.default_rng(0).standard_normal((1, 48, 48, 3)).astype("float32")
    plain = nfzoo.build("sn_test_efficientnet", include_top=False, input_shape=(48, 48, 3))
    plain.set_weights(model.get_weights())
    # The model begins at the image, not at the tensor it was built upon.
    np.testing.assert_allclose(np.asarray(model(x)), np.asarray(plain(2 * x)), atol=1e-5)


def test_drop_rates():
    model = nfzoo.build("sn_test_efficientnet", dropout_rate=0.4, drop_path_rate=0.3)
    assert model.get_layer("top_drop").rate == 0.4
    # Six blocks: the third, fifth and sixth have a skip.
    rates = [layer.rate for layer in model.layers if layer.name.endswith("_drop") and "stage" in layer.name]
    assert rates == pytest.approx([0.3 * i / 6 for i in (0, 2, 4, 5) if i])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"classes": 0}, "classes=0"),
        ({"include_preprocessing": True, "input_shape": (32, 32, 4)}, "mean and std of every channel"),
        ({"input_shape": (4, 4, 3)}, r"at least 8x8.*\(4, 4, 3\)"),
        ({"input_shape": (32, 32)}, r"\(height, width, channels\)"),
        ({"pooling": "median"}, "'median'"),
        ({"pooling": None}, "include_top=False"),
        ({"stem": "large"}, "stem='large'"),
        ({"classes": "10"}, "whole number.*'10'"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises((ValueError, TypeError), match=match):
        nfzoo.build("sn_test_efficientnet", **arguments)


@pytest.mark.parametrize(
    ("name", "fields", "match"),
    [
        ("nf_test_nfnet", {"group_width": 512}, "one group.*group_width.*0 channels"),
        ("nf_test_regnet", {"group_width": 4096}, "one group.*group_width.*0 channels"),
        ("bn_resnet18", {"groups": 32}, "groups=32"),
        ("bn_resnet20_cifar", {"group_width": 4}, "group_width=4"),
    ],
)
def test_groups_that_cannot_be(name, fields, match):
    with pytest.raises(ValueError, match=match):
        nfzoo.build(name, **fields)


def test_an_array_is_a_shape_and_no_dialect_the_usual_one():
    model = nfzoo.build("nf_test_resnet", input_shape=np.array([32, 48, 3]), dialect=None)
    assert model.input_shape == (None, 32, 48, 3)
    assert weights.reading(model) == weights.reading(nfzoo.build("nf_test_resnet", input_shape=(32, 48, 3)))


def test_preprocessing_by_constants_of_ones_own():
    x = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype("float32")
    own = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    model, plain = (nfzoo.build("bn_test_resnet", include_preprocessing=p) for p in (own, False))
    model.set_weights(plain.get_weights())
    np.testing.assert_allclose(np.asarray(model(x)), np.asarray(plain(x / 127.5 - 1)), atol=1e-5)


def test_unknown_keyword_names_the_accepted_ones():
    with pytest.raises(TypeError, match="momentun.*alpha.*padding"):
        nfzoo.build("nf_test_efficientnet", momentun=0.9)


# ---------------------------------------------------------------- signal propagation at initialisation
# Published by the poster's code: N(0, 1) input, 32 px, after the stem, 16 blocks, the top convolution.
SN_MP = [
    0.988, 0.471, 0.297, 0.245, 0.156, 0.120, 0.0845, 0.0643, 0.052, 0.0122, 0.0078, 0.0050, 1.2e-3, 6.7e-4, 3.6e-4,
    1.9e-4, 4.1e-5,
]  # fmt: skip
SN_NO_MP = [
    0.988, 0.236, 0.0951, 0.139, 0.053, 0.0714, 0.0289, 0.0382, 0.0514, 0.0061, 0.0070, 0.0080, 9.6e-4, 1.0e-3, 1.0e-3,
    1.1e-3, 1.1e-4,
]  # fmt: skip
BN = [1.0, 1.0, 2.02, 1.0, 2.01, 1.0, 2.0, 2.99, 1.0, 2.0, 3.0, 1.0, 2.0, 3.05, 3.97, 1.0]


def _profile(name, **overrides):
    model = nfzoo.build(name, classes=100, input_shape=(32, 32, 3), padding="symmetric", **overrides)
    x = np.random.default_rng(1).standard_normal((128, 32, 32, 3)).astype("float32")
    rows = nfzoo.spp.snapshot(model, x, taps="*_out", what=("activations",))
    return rows.acv.to_numpy()


@pytest.mark.parametrize(
    ("overrides", "expected"), slow_but([({}, SN_MP)], [({}, SN_MP), ({"magnitude_preserving": False}, SN_NO_MP)])
)
def test_variance_profile_of_sn(overrides, expected):
    profiles = []
    for seed in range(3):
        keras.utils.set_random_seed(seed)
        profiles.append(_profile("sn_efficientnet_b0", **overrides))
    np.testing.assert_allclose(np.mean(profiles, 0), expected, rtol=0.25)


@pytest.mark.slow
def test_variance_profile_of_bn():
    np.testing.assert_allclose(_profile("bn_efficientnet_b0", epsilon=1e-5)[1:], BN, rtol=0.05)


def test_the_poster_initialisation_fades_without_normalization():
    """Each depthwise layer multiplies the variance by about 2 / channels, unless the fan-out is that of a group."""
    faded, corrected = (_profile("none_efficientnet_b0", init=init)[-1] for init in ("poster", "he_fan_out"))
    assert faded < 1e-20 and corrected > 1e10 * faded


# ---------------------------------------------------------------- counts
STATISTICS = {
    "b0": 42_016, "b1": 62_048, "b2": 67_568, "b3": 87_296, "b4": 125_200, "b5": 172_736, "b6": 224_432, "b7": 310_720,
}  # fmt: skip


@pytest.mark.parametrize("row", STATISTICS)
def test_moving_statistics_are_counted_apart(row):
    info = nfzoo.model_info(f"bn_efficientnet_{row}")
    assert info.parameters - info.trainable_parameters == STATISTICS[row]


def test_poster_parameter_counts():
    small = {"classes": 100, "input_shape": (32, 32, 3)}
    assert nfzoo.model_info("sn_efficientnet_b0", **small).parameters == 4_093_632
    assert nfzoo.model_info("bn_efficientnet_b0", **small).trainable_parameters == 4_135_648


def test_every_kernel_size_is_counted_once():
    counted = sum(math.prod(v.shape) for v in nfzoo.build("gn_test_efficientnet").weights)
    assert counted == nfzoo.model_info("gn_test_efficientnet").parameters


def test_a_whole_model_in_a_legacy_file_loads(tmp_path):
    nfzoo.build("sn_test_ffnn").save(tmp_path / "a.h5")
    assert isinstance(keras.saving.load_model(tmp_path / "a.h5"), nfzoo.NFModel)
