"""With equal weights, nfzoo computes what the reference implementations compute."""

import keras
import numpy as np
import pytest
import reference

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
    golden = reference.read(stored)
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


def _ours(path: str) -> str:
    """block3b_expand_conv/kernel of keras.applications -> stage3_block2_conv1/kernel."""
    layer, leaf = path.rsplit("/", 1)
    fixed = {"stem_conv": "stem_conv1", "stem_bn": "stem_norm1", "top_conv": "top_conv", "top_bn": "top_norm"}
    if layer in fixed:
        return f"{fixed[layer]}/{leaf}"
    if layer == "predictions":
        return f"head/{leaf}"
    block, _, part = layer.partition("_")
    parts = {
        "expand_conv": "conv1", "expand_bn": "norm1", "dwconv": "conv2", "bn": "norm2", "project_conv": "conv3",
        "project_bn": "norm3", "se_reduce": "se_reduce", "se_expand": "se_expand",
    }  # fmt: skip
    return f"stage{block[5]}_block{ord(block[6]) - ord('a') + 1}_{parts[part]}/{leaf}"


@pytest.mark.parametrize("size", [64, 75])
@pytest.mark.parametrize(("row", "maker"), [("b0", "EfficientNetB0"), ("b3", "EfficientNetB3")])
def test_keras_applications_logits(row, maker, size):
    shape = (size, size, 3)
    theirs = getattr(keras.applications, maker)(weights=None, input_shape=shape, classifier_activation=None)
    ours = nfzoo.build(f"bn_efficientnet_{row}", input_shape=shape)
    rng = np.random.default_rng(0)
    source = {}
    for variable in theirs.weights:
        if variable.path.startswith("normalization"):
            continue
        value = keras.ops.convert_to_numpy(variable)
        if "bn/" in variable.path:  # statistics and affine parameters at their initial values would hide errors
            value = rng.uniform(0.5, 1.5, value.shape).astype("float32")
            variable.assign(value)
        source[_ours(variable.path)] = value
    assert source.keys() == {v.path for v in ours.weights}
    for variable in ours.weights:
        variable.assign(source[variable.path].reshape(variable.shape))
    images = rng.uniform(0, 255, (2, *shape)).astype("float32")
    # Their model divides by 255 itself, and with no weights its normalization is the identity.
    expected = np.asarray(theirs(images))
    assert expected.std() > 1e-3
    assert np.abs(expected - np.asarray(ours(images / 255))).max() < 1e-5
