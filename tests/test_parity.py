"""With equal weights, nfzoo computes what the reference implementations compute."""

import keras
import numpy as np
import pytest
import reference
from conftest import slow_but

import nfzoo

SYMMETRIC = {"padding": "symmetric"}
POSTER = {
    "bn_efficientnet_b0": ("bn_efficientnet_b0", {**SYMMETRIC, "epsilon": 1e-5}),
    "none_efficientnet_b0": ("none_efficientnet_b0", SYMMETRIC),
    "sn_efficientnet_b0_mp": ("sn_efficientnet_b0", SYMMETRIC),
    "sn_efficientnet_b0_no_mp": ("sn_efficientnet_b0", {**SYMMETRIC, "magnitude_preserving": False}),
    "ffnn_none": ("none_ffnn_10x100", {}),
    "ffnn_bn": ("bn_ffnn_10x100", {"scale": False, "center": False, "stem_affine": True, "epsilon": 1e-5}),
}


@pytest.mark.parametrize("stored", POSTER)
def test_poster_logits(stored):
    golden = reference.read(f"poster/{stored}")
    name, overrides = POSTER[stored]
    rename = reference.poster_ffnn if "ffnn" in name else reference.poster_efficientnet
    sizes = {(case["height"], case["width"]) for case in golden["cases"]}
    shape = (*sizes.pop(), 3) if len(sizes) == 1 else (None, None, 3)
    model = nfzoo.build(name, classes=100, input_shape=shape, **overrides)
    assert sum(int(np.prod(v.shape)) for v in model.trainable_variables) == golden["params"]

    source = {rename(key): value for key, value in reference.weights(golden).items()}
    assert source.keys() == {v.path for v in model.weights}
    for variable in model.weights:
        value = source[variable.path]
        if variable.path == "hidden_linear1/kernel":  # PyTorch flattens channels first
            value = value.reshape(-1, 3, *shape[:2]).transpose(0, 2, 3, 1).reshape(len(value), -1)
        variable.assign(reference.transpose(value, tuple(variable.shape)))
    for case in golden["cases"]:
        got = keras.ops.convert_to_numpy(model(reference.image(case["height"], case["width"])))[0]
        expected = np.array(case["logits"])
        assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()


# ---------------------------------------------------------------- through the converters
# The rest of the stored references takes a minute more: they run with the slow tests.
FAST = ("timm/nf_resnet50", "timm/nf_regnet_b1", "timm/efficientnet_b0")
STORED = sorted(
    f"{path.parent.name}/{path.stem}" for s in ("timm", "deepmind") for path in (reference.FOLDER / s).glob("*")
)


def _converted(stored):
    golden = reference.read(stored)
    source, name = stored.split("/")
    return golden, nfzoo.convert.load(name, source, reference.weights(golden), input_shape=(None, None, 3))


@pytest.mark.parametrize("stored", slow_but(FAST, STORED))
def test_converted_logits_and_signal_propagation(stored):
    """At an even and an odd size; the statistics are those that DeepMind's own code returned."""
    golden, model = _converted(stored)
    assert sum(int(np.prod(v.shape)) for v in model.trainable_variables) == golden["params"]
    for case in golden["cases"]:
        x = reference.image(case["height"], case["width"])
        got, expected = keras.ops.convert_to_numpy(model(x))[0], np.array(case["logits"])
        assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()
        if "metrics" in case:
            rows = nfzoo.spp.snapshot(model, x, what=("activations",))
            assert _deepmind_metrics(rows) == pytest.approx(case["metrics"], rel=1e-4)


def _deepmind_metrics(rows) -> dict[str, float]:
    places = {place: rows[rows.place == place].reset_index() for place in ("block", "branch")}
    return {
        **{f"avg_sq_mean_{i}": value for i, value in enumerate(places["block"].acsm)},
        **{f"avg_var_{i}": value for i, value in enumerate(places["block"].acv)},
        **{f"res_avg_var_{i}": value for i, value in enumerate(places["branch"].acv)},
    }


@pytest.fixture
def float64():
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("EfficientNetB0", (64, 64, 3), 1000),
        pytest.param("EfficientNetB0", (75, 75, 3), 1000, marks=pytest.mark.slow),
        pytest.param("EfficientNetB3", (64, 64, 3), 1000, marks=pytest.mark.slow),
        pytest.param("EfficientNetB3", (75, 75, 3), 1000, marks=pytest.mark.slow),
        ("ResNet50", (64, 64, 3), 11), pytest.param("ResNet50V2", (75, 90, 3), 11, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_keras_applications_logits(name, shape, classes, float64):
    """In float64, since in float32 the order of summation alone changes the logits of B3 by 6e-5."""
    options = {"weights": None, "classes": classes, "classifier_activation": None}
    theirs, rng = getattr(keras.applications, name)(input_shape=shape, **options), np.random.default_rng(0)
    for variable in theirs.weights:
        # Statistics and affine parameters at their initial values would hide errors.
        if "bn/" in variable.path:
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    ours = nfzoo.convert.load(name, "keras", theirs, input_shape=shape)
    assert ours.output_shape == (None, classes)
    assert len(ours.weights) == sum(not v.path.startswith("normalization") for v in theirs.weights)
    images, efficient = rng.uniform(0, 255, (2, *shape)), name.startswith("Efficient")
    # EfficientNets divide by 255 themselves, by Keras in float32; with no weights their normalization is the identity.
    expected = np.asarray(theirs(images))
    got = np.asarray(ours(images * np.float64(np.float32(1 / 255)) if efficient else images))
    assert expected.std() > 1e-3
    assert np.abs(expected - got).max() < 1e-12 * np.abs(expected).max()
