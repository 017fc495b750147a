"""What the ONNX writer writes, ONNX Runtime computes as Keras does, layer by layer."""

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
from keras import layers

import nfzoo
from nfzoo import numerics
from nfzoo.export import formats, onnx_file
from nfzoo.layers.activation import activation_function


def _run(model, path, fold=True):
    """Outputs of the file by name, and those of the model, on one batch."""
    formats.write("onnx", model, path, fold)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    x = [2 * rng.standard_normal((3, *given.shape[1:])).astype("float32") for given in model.inputs]
    names = [given.name for given in session.get_inputs()]
    got = session.run(None, dict(zip(names, x, strict=True)))
    assert all(given.shape[0] == "batch" for given in session.get_inputs() + session.get_outputs())
    outputs = dict(zip((end.name for end in session.get_outputs()), got, strict=True))
    return outputs, model(x if len(x) > 1 else x[0])


def _assert_same(model, path, fold=True):
    outputs, expected = _run(model, path, fold)
    (got,), expected = outputs.values(), np.asarray(expected)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-5 * abs(expected).max())
    assert expected.std() > 0


def test_every_activation_that_a_variant_can_have_is_known():
    names = {activation_function(name).__name__ for name in (*numerics.GAMMA, *numerics.ALIASES)}
    assert names <= set(onnx_file._ACTIVATIONS) and {"gelu_tanh", "leaky_relu_001"} <= names


@pytest.mark.parametrize("name", onnx_file._ACTIVATIONS)
def test_activations(name, tmp_path):
    own = {"gelu_tanh": activation_function("gelu_tanh"), "leaky_relu_001": activation_function("leaky_relu")}
    image = keras.Input((4, 5, 6))
    y = layers.Activation(own.get(name, name))(image)
    y = keras.layers.Conv2D(3, 1, activation=None if name in own else name)(y)
    _assert_same(keras.Model(image, y), tmp_path / "x.onnx")


def _net(*chain):
    return keras.Sequential([keras.Input((9, 7, 4)), *chain])


_NETS = {
    "conv same, stride 2": (layers.Conv2D(6, 3, 2, "same"),),
    "conv valid, dilated, grouped": (layers.Conv2D(6, 3, dilation_rate=2, groups=2, use_bias=False),),
    "conv same, dilated": (layers.Conv2D(6, 4, padding="same", dilation_rate=(2, 3)),),
    "depthwise same, dilated": (layers.DepthwiseConv2D(3, padding="same", dilation_rate=2),),
    "conv even kernel": (layers.Conv2D(6, 4, 2, "same"),),
    "depthwise multiplied": (layers.DepthwiseConv2D(5, 2, "same", depth_multiplier=2),),
    "max pool": (layers.MaxPooling2D(3, 2, "same"),),
    "average pool": (layers.AveragePooling2D(3, 2, "same"),),
    "global max": (layers.GlobalMaxPooling2D(), layers.Dense(3)),
    "kept dimensions": (layers.GlobalAveragePooling2D(keepdims=True), layers.Conv2D(3, 1)),
    "flatten": (layers.Flatten(), layers.Dense(3)),
    "reshape": (layers.Reshape((7, 9, 4)), layers.Conv2D(3, 3)),
    "vector to map": (layers.Flatten(), layers.Dense(12), layers.Reshape((2, 2, 3)), layers.Conv2D(2, 2)),
    "dense of a map": (layers.Dense(5),),
    "zero padding": (layers.ZeroPadding2D(((1, 2), (0, 3))), layers.Conv2D(3, 3)),
    "group norm": (layers.GroupNormalization(2, gamma_initializer="random_normal"),),
    "batch norm first": (layers.BatchNormalization(beta_initializer="ones"), layers.Conv2D(3, 3, padding="same")),
    "relu6": (layers.Conv2D(4, 1), layers.ReLU(6.0)),
    "given normalization": (layers.Normalization(mean=[1, 2, 3, 4], variance=[1, 4, 9, 2]), layers.Conv2D(3, 3)),
    "position by position": (layers.Rescaling(np.arange(63.0).reshape(9, 7, 1).tolist(), 0.5), layers.Conv2D(3, 3)),
    "padded channels": (nfzoo.layers.PadChannels(6),),
    "padded max pool": (nfzoo.layers.MaxPool2D(3, 2, pad=1),),
    **{f"standardized by {how}": (nfzoo.layers.StandardizeInput(how),)
       for how in ("whole_tensor", "channel_l2", "per_channel_batch")},
}  # fmt: skip


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("name", _NETS)
def test_layers(name, fold, tmp_path):
    layers_of = [type(layer).from_config(layer.get_config()) for layer in _NETS[name]]
    _assert_same(_net(*layers_of), tmp_path / "x.onnx", fold)


def test_several_inputs_and_outputs_keep_their_order_and_names(tmp_path):
    second, first = keras.Input((6, 6, 2), name="second"), keras.Input((6, 6, 3), name="first")
    both = layers.Concatenate(name="both")([first, second])
    product = layers.Multiply(name="product")([both, both])
    model = keras.Model([first, second], {"product": product, "half": layers.AveragePooling2D(2, name="half")(both)})
    got, expected = _run(model, tmp_path / "x.onnx")
    assert list(got) == model.output_names
    for name, y in zip(model.output_names, keras.tree.flatten(expected), strict=True):
        np.testing.assert_allclose(got[name], np.asarray(y), atol=1e-5)


def test_feature_maps_are_as_keras_gives_them(tmp_path):
    backbone = nfzoo.build("nf_test_resnet", features_only=True)
    got, expected = _run(backbone, tmp_path / "x.onnx")
    for y, end in zip(got.values(), keras.tree.flatten(expected), strict=True):
        np.testing.assert_allclose(y, np.asarray(end), atol=1e-5 * abs(np.asarray(end)).max())


@pytest.mark.parametrize("name", ["sn_test_efficientnet", "nf_test_efficientnet"])
def test_compensated_padding(name, tmp_path):
    _assert_same(nfzoo.build(name, padding_compensation=True), tmp_path / "x.onnx")


def test_all_that_is_unknown_is_named(tmp_path):
    model = _net(layers.UpSampling2D(), layers.UnitNormalization(), layers.Conv2D(2, 1, activation="mish"))
    with pytest.raises(ValueError, match="Received: a model with UnitNormalization, UpSampling2D, mish"):
        formats.write("onnx", model, tmp_path / "x.onnx", fold=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["EfficientNetB0", "MobileNetV2", "ResNet50V2", "VGG16"])
def test_networks_of_keras(name, tmp_path):
    _assert_same(
        getattr(keras.applications, name)(weights=None, input_shape=(64, 64, 3), classes=5), tmp_path / "x.onnx"
    )
