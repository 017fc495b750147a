import itertools

import keras
import numpy as np
import pytest
from conftest import slow_but

import nfzoo
from nfzoo import layers, numerics, variants
from nfzoo.models.sites import Site

KERNEL = np.array([[1, 2], [2, 4], [4, 1]], "float32").reshape(1, 1, 3, 2)
DEEPMIND = np.array([[-0.6172134, -0.1543033], [-0.1543033, 0.7715167], [0.7715167, -0.6172134]])
TIMM = np.array([[-0.6172114, -0.1543029], [-0.1543029, 0.7715143], [0.7715143, -0.6172114]])


def _standardize(kernel, **kwargs):
    return np.asarray(layers.standardize(kernel, (0, 1, 2), **kwargs)).reshape(3, 2)


def test_standardize_golden_numbers():
    np.testing.assert_allclose(_standardize(KERNEL), DEEPMIND, atol=1e-6)
    np.testing.assert_allclose(_standardize(KERNEL, epsilon=1e-5, mode="add"), TIMM, atol=1e-6)
    relu = _standardize(KERNEL, gain=1.7139588594436646, epsilon=1e-5, mode="add")
    np.testing.assert_allclose(relu[:, 0], [-1.0578750, -0.2644687, 1.3223437], atol=1e-6)


def test_standardize_golden_numbers_where_epsilon_matters():
    small = KERNEL * 1e-3
    np.testing.assert_allclose(_standardize(small)[:, 0], [-0.1333333, -0.0333333, 0.1666667], atol=1e-6)
    added = _standardize(small, epsilon=1e-5, mode="add")
    np.testing.assert_allclose(added[:, 0], [-0.2264554, -0.0566139, 0.2830693], atol=1e-6)


def test_standardized_units_have_mean_zero_and_norm_one():
    kernel = np.random.default_rng(0).normal(0.3, 2, (3, 3, 4, 6)).astype("float32")
    effective = np.asarray(layers.standardize(kernel, (0, 1, 2)))
    np.testing.assert_allclose(effective.mean((0, 1, 2)), 0, atol=1e-7)
    np.testing.assert_allclose((effective**2).sum((0, 1, 2)), 1, rtol=1e-5)


def test_standardize_rejects_an_unknown_mode():
    with pytest.raises(ValueError, match="'both'"):
        layers.standardize(KERNEL, (0, 1, 2), mode="both")


def test_depthwise_statistics_are_those_of_each_channel():
    """By rank, (0, 1, 2) would mix the channels, whose scales differ here by a thousand."""
    layer = layers.ScaledStdDepthwiseConv2D(3)
    layer.build((None, 8, 8, 4))
    kernel = np.random.default_rng(0).standard_normal((3, 3, 4, 1)) * np.array([0.01, 0.1, 1, 10])[:, None]
    layer.kernel.assign(kernel)
    layer.epsilon = 1e-12
    effective = np.asarray(layer.effective_kernel())
    np.testing.assert_allclose((effective**2).sum((0, 1)), 1, rtol=1e-4)
    np.testing.assert_allclose(effective.mean((0, 1)), 0, atol=1e-6)


def test_unit_variance_through_activation_and_convolution():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, 16, 16, 64)).astype("float32")
    layer = layers.ScaledStdConv2D(256, 1, kernel_initializer="lecun_normal")
    out = np.asarray(layer(layers.ScaledActivation("silu")(x)))
    assert out.var((0, 1, 2)).mean() == pytest.approx(1, abs=0.03)


LAYERS = {
    "conv": (lambda: layers.ScaledStdConv2D(6, 3, padding="same", strides=2), [(8, 8, 4)]),
    "grouped": (lambda: layers.ScaledStdConv2D(6, 3, groups=2, epsilon_mode="add", epsilon=1e-5), [(8, 8, 4)]),
    "depthwise": (lambda: layers.ScaledStdDepthwiseConv2D(3, padding="same", depth_multiplier=2), [(8, 8, 4)]),
    "merge": (lambda: layers.Merge(0.9, 0.2, gain=0.5), [(8, 8, 4), (8, 8, 4)]),
    "gate": (lambda: layers.Gate(gain=2.0), [(8, 8, 4), (4,)]),
    "gate_mp": (lambda: layers.Gate(magnitude_preserving=True), [(8, 8, 4), (4,)]),
    "activation": (lambda: layers.ScaledActivation("gelu"), [(8, 8, 4)]),
    "stochastic_depth": (lambda: layers.StochasticDepth(0.5, rescale=False, seed=3), [(8, 8, 4)]),
    "tap": (lambda: layers.Tap(), [(8, 8, 4)]),
    "native_grouped": (lambda: layers.Conv2D(6, 3, groups=2, strides=2), [(8, 8, 4)]),
    "gamma_in_kernel": (lambda: layers.ScaledStdConv2D(6, 3, gamma=1.7, gain=0.0), [(8, 8, 4)]),
    "compensate": (lambda: layers.CompensatePadding(3), [(8, 8, 4), (8, 8, 2)]),
    "affine": (lambda: layers.Affine(gain=1.0), [(8, 8, 4)]),
    "bias": (lambda: layers.Affine(), [(8, 8, 4)]),
    "centering_bias": (lambda: layers.CenteringBias(), [(8, 8, 4)]),
    "standardize_input": (lambda: layers.StandardizeInput("channel_l2"), [(8, 8, 4)]),
    "pad_channels": (lambda: layers.PadChannels(7), [(8, 8, 4)]),
    "max_pool": (lambda: layers.MaxPool2D(3, 2, pad=1), [(8, 8, 4)]),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_contract(name, policy, tmp_path):
    """Every layer: static shape = run-time shape, compute dtype, config and weights survive a saved model."""
    keras.config.set_dtype_policy(policy)
    make, shapes = LAYERS[name]
    inputs = [keras.Input(shape, dtype="float32") for shape in shapes]
    layer = make()
    outputs = layer(inputs[0] if len(inputs) == 1 else inputs)
    model = keras.Model(inputs, outputs)
    rng = np.random.default_rng(0)
    for variable in layer.weights:
        variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    x = [rng.standard_normal((2, *shape)).astype("float32") for shape in shapes]
    got = model(x)
    assert tuple(got.shape[1:]) == tuple(outputs.shape[1:])
    assert keras.backend.standardize_dtype(got.dtype) == layer.compute_dtype == outputs.dtype
    assert all(keras.backend.standardize_dtype(v.dtype) == "float32" for v in layer.weights)

    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.layers[-1].get_config() == layer.get_config()
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(again(x)), keras.ops.convert_to_numpy(got))
    assert type(layer).from_config(layer.get_config()).get_config() == layer.get_config()


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_kernel_statistics_stay_in_float32_under_mixed_policies(policy):
    layer = layers.ScaledStdConv2D(8, 3, dtype=policy)
    layer.build((None, 8, 8, 16))
    exact = np.asarray(layers.standardize(layer.kernel.numpy(), (0, 1, 2)))
    inside = []
    original = layer.effective_kernel
    layer.effective_kernel = lambda: inside.append(original()) or inside[-1]
    layer(np.ones((1, 8, 8, 16), "float32"))
    assert keras.backend.standardize_dtype(inside[0].dtype) == "float32"
    np.testing.assert_allclose(np.asarray(inside[0]), exact, atol=1e-6)


def test_weight_standardized_conv_equals_conv_with_the_effective_kernel():
    x = np.random.default_rng(0).standard_normal((2, 9, 9, 4)).astype("float32")
    for scaled, plain in (
        (layers.ScaledStdConv2D(6, 3, strides=2, padding="same"), keras.layers.Conv2D(6, 3, strides=2, padding="same")),
        (layers.ScaledStdDepthwiseConv2D(5, padding="same"), keras.layers.DepthwiseConv2D(5, padding="same")),
    ):
        got = scaled(x)
        scaled.gain.assign(np.random.default_rng(1).uniform(0.5, 2, scaled.gain.shape))
        scaled.bias.assign(np.random.default_rng(2).uniform(-1, 1, scaled.bias.shape))
        got = scaled(x)
        plain(x)
        plain.set_weights([np.asarray(scaled.effective_kernel()), np.asarray(scaled.bias)])
        np.testing.assert_allclose(np.asarray(got), np.asarray(plain(x)), atol=1e-5)


def test_merge_formula():
    skip, branch = np.full((1, 2), 3.0, "float32"), np.full((1, 2), 5.0, "float32")
    merge = layers.Merge(0.5, 2.0, gain=0.1)
    np.testing.assert_allclose(np.asarray(merge([skip, branch])), 0.5 * 3 + 2 * 0.1 * 5)
    assert {v.path.rsplit("/")[-1] for v in merge.trainable_variables} == {"gain"}
    assert not layers.Merge().weights


def test_magnitude_preserving_gate_values():
    def f(gate):
        logit = np.log(gate / (1 - gate))
        out = layers.Gate(magnitude_preserving=True)(
            [np.ones((1, 1, 1, 1), "float32"), np.full((1, 1), logit, "float32")]
        )
        return float(np.asarray(out).item())

    assert [round(f(g), 4) for g in (0.1, 0.5, 0.9)] == [0.1104, 0.7071, 0.9939]


def test_doubled_gate_near_one_half_keeps_the_map():
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype("float32")
    np.testing.assert_allclose(np.asarray(layers.Gate(gain=2.0)([x, np.zeros((2, 3), "float32")])), x, rtol=1e-6)


@pytest.mark.parametrize("rescale", [True, False])
def test_stochastic_depth_drops_whole_examples(rescale):
    x = np.ones((4000, 2, 2, 1), "float32")
    layer = layers.StochasticDepth(0.25, rescale=rescale, seed=0)
    out = np.asarray(layer(x, training=True)).reshape(4000, -1)
    assert (out == out[:, :1]).all()
    kept = out[:, 0] != 0
    assert kept.mean() == pytest.approx(0.75, abs=0.03)
    assert out[kept][0, 0] == pytest.approx(1 / 0.75 if rescale else 1)
    np.testing.assert_array_equal(np.asarray(layer(x, training=False)), x)


def test_stochastic_depth_rejects_a_rate_of_one():
    with pytest.raises(ValueError, match="rate=1"):
        layers.StochasticDepth(1)


def test_grouped_convolution_is_one_convolution_per_group():
    x = np.random.default_rng(0).standard_normal((2, 9, 8, 6)).astype("float32")
    for strides, padding in ((1, "same"), (2, "same"), (2, "valid")):
        layer = layers.Conv2D(9, 3, strides=strides, padding=padding, groups=3)
        got, kernel = np.asarray(layer(x)), np.asarray(layer.kernel)
        options = {"strides": strides, "padding": padding}
        groups = [(x[..., 2 * g : 2 * g + 2], kernel[..., 3 * g : 3 * g + 3]) for g in range(3)]
        expected = np.concatenate([np.asarray(keras.ops.conv(a, k, **options)) for a, k in groups], -1)
        np.testing.assert_allclose(got, expected, atol=1e-5)


def _with_gradients(layer, x, jit: bool = False):
    """Output, and what the sum of its squares gives back to x and to the kernel."""
    import tensorflow as tf

    @tf.function(jit_compile=jit)
    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
            loss = tf.reduce_sum(tf.square(y))
        return [y, *tape.gradient(loss, [x, layer.kernel.value])]

    return [np.array(z, "float32") for z in run(tf.cast(x, layer.compute_dtype))]


def _assert_like_keras(ours, keras_layer, x, rtol=1e-4, jit=False):
    ours.build(x.shape)
    keras_layer.build(x.shape)
    keras_layer.set_weights(ours.get_weights())
    for got, expected in zip(_with_gradients(ours, x, jit), _with_gradients(keras_layer, x), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=rtol * max(np.abs(expected).max(), 1e-3))


@pytest.mark.parametrize("kernel", slow_but([3], [1, 3, 5]))
def test_depthwise_convolution_leaves_out_only_taps_that_meet_no_image(kernel):
    """Maps of every size down to one pixel, also with sides that differ; kernels of even sizes; several per channel."""
    rng = np.random.default_rng(0)
    for shape, stride in itertools.product([(1, 1), (2, 2), (3, 3), (4, 4), (6, 6), (1, 4), (5, 2)], (1, 2, 3)):
        x = rng.standard_normal((2, *shape, 3)).astype("float32")
        for size in ((kernel, kernel), (kernel + 1, kernel)):
            options = {"strides": stride, "padding": "same", "depth_multiplier": 2}
            _assert_like_keras(
                layers.DepthwiseConv2D(size, **options), keras.layers.DepthwiseConv2D(size, **options), x
            )


def test_depthwise_convolutions_end_with_their_activation():
    x = np.random.default_rng(0).standard_normal((2, 6, 6, 4)).astype("float32")
    for kind in (layers.DepthwiseConv2D, layers.ScaledStdDepthwiseConv2D):
        plain, rectified = kind(3), kind(3, activation="relu")
        expected = np.maximum(np.asarray(plain(x)), 0)
        rectified.build(x.shape)
        rectified.set_weights(plain.get_weights())
        np.testing.assert_allclose(np.asarray(rectified(x)), expected, atol=1e-6)
        assert expected.min() == 0 < expected.max()


@pytest.mark.parametrize("name", [*numerics.GAMMA, *numerics.ALIASES])
def test_scaled_activations_have_unit_variance(name):
    z = np.random.default_rng(0).standard_normal((400_000, 1)).astype("float32")
    assert float(np.var(layers.ScaledActivation(name)(z))) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("dtype", "jit", "rtol"),
    [("float16", False, 3e-2), ("bfloat16", False, 3e-2), ("float64", False, 1e-5), ("float32", True, 1e-4)],
)
def test_fast_convolutions_are_keras_ones_in_every_precision_and_compiled(dtype, jit, rtol):
    x = np.random.default_rng(0).standard_normal((2, 2, 2, 4)).astype("float32")
    options = {"padding": "same", "dtype": dtype}
    for ours, theirs in (
        (layers.DepthwiseConv2D(5, **options), keras.layers.DepthwiseConv2D(5, **options)),
        (layers.Conv2D(6, 1, **options), keras.layers.Conv2D(6, 1, **options)),
    ):
        _assert_like_keras(ours, theirs, x, rtol, jit)


def _trained_once(layer, x, jit=False):
    """Output, gradients of a loss that every entry counts in by another weight, moving statistics after the step."""
    import tensorflow as tf

    weights = np.random.default_rng(1).standard_normal(x.shape)

    @tf.function(jit_compile=jit)
    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            loss = tf.reduce_sum(tf.square(y) * tf.cast(weights, y.dtype))
        return [y, *tape.gradient(loss, [x, *(v.value for v in layer.trainable_variables)])]

    computed = run(tf.cast(x, layer.compute_dtype))
    return [np.array(z, "float32") for z in (*computed, *layer.non_trainable_variables)]


@pytest.mark.parametrize("shape", [(8, 5, 4, 6), (1, 1, 1, 6), (8, 6), (4, 3, 6), (8, 5, 4, 1)])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_normalization_is_keras_one(shape, affine):
    x = 3 * np.random.default_rng(0).standard_normal(shape).astype("float32") + 2
    ours, theirs = (
        kind(momentum=0.8, epsilon=1e-5, scale=affine, center=affine)
        for kind in (layers.BatchNormalization, keras.layers.BatchNormalization)
    )
    for layer in (ours, theirs):
        layer.build(shape)
        layer.set_weights([w + np.linspace(0.5, 2, w.size) for w in layer.get_weights()])
    for got, expected in zip(_trained_once(ours, x), _trained_once(theirs, x), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-4 * max(1e-2, np.abs(expected).max()))
    np.testing.assert_allclose(np.asarray(ours(x)), np.asarray(theirs(x)), atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "jit", "rtol"),
    [
        ("float64", False, 1e-6),
        ("mixed_float16", False, 2e-2),
        ("mixed_bfloat16", False, 5e-2),
        ("float32", True, 2e-4),
    ],
)
def test_batch_normalization_in_every_precision_and_compiled(dtype, jit, rtol):
    x = np.random.default_rng(0).standard_normal((8, 3, 3, 4)).astype("float32")
    ours, theirs = (kind(dtype=dtype) for kind in (layers.BatchNormalization, keras.layers.BatchNormalization))
    for layer in (ours, theirs):
        layer.build(x.shape)
    for got, expected in zip(_trained_once(ours, x, jit), _trained_once(theirs, x), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=rtol * max(np.abs(expected).max(), 1e-3))


def test_batch_normalization_where_it_is_left_to_keras():
    """A mask, another axis, frozen, renormalization: the layer has Keras' own way."""
    x = np.random.default_rng(0).standard_normal((4, 5, 6)).astype("float32")
    mask = np.arange(5)[None] < np.arange(2, 6)[:, None]
    for options, given in (({}, {"mask": mask}), ({"axis": 1}, {}), ({"renorm": True}, {}), ({"trainable": False}, {})):
        ours, theirs = (kind(**options) for kind in (layers.BatchNormalization, keras.layers.BatchNormalization))
        np.testing.assert_array_equal(ours(x, training=True, **given), theirs(x, training=True, **given))


def test_both_backends_normalize_alike():
    """The fused operation of TensorFlow against the formula on JAX, with the gradient of a loss."""
    import jax
    import tensorflow as tf

    from nfzoo.backend import jax as on_jax
    from nfzoo.backend import tensorflow as on_tensorflow

    rng = np.random.default_rng(0)
    x, weights = (rng.standard_normal((6, 3, 3, 4)).astype("float32") for _ in range(2))
    scale, offset = np.linspace(0.5, 2, 4, dtype="float32"), np.linspace(-1, 1, 4, dtype="float32")
    given = [tf.constant(value) for value in (x, scale, offset)]
    with tf.GradientTape() as tape:
        tape.watch(given)
        computed = on_tensorflow.batch_normalize(*given, 1e-4)
        loss = tf.reduce_sum(computed[0] ** 2 * weights)
    gradients = tape.gradient(loss, given)
    expected = on_jax.batch_normalize(x, scale, offset, 1e-4)
    by_jax = jax.grad(lambda *args: (on_jax.batch_normalize(*args, 1e-4)[0] ** 2 * weights).sum(), argnums=(0, 1, 2))
    for got, value in zip((*computed, *gradients), (*expected, *by_jax(x, scale, offset)), strict=True):
        np.testing.assert_allclose(np.asarray(got), np.asarray(value), rtol=1e-4, atol=1e-4)


def test_channels_first_is_refused():
    for kind in (layers.Conv2D, layers.ScaledStdConv2D):
        with pytest.raises(ValueError, match="channels_last.*'channels_first'"):
            kind(4, 3, data_format="channels_first")
    for kind in (layers.DepthwiseConv2D, layers.ScaledStdDepthwiseConv2D):
        with pytest.raises(ValueError, match="channels_last.*'channels_first'"):
            kind(3, data_format="channels_first")


def test_pointwise_convolution_is_keras_one_also_with_strides_and_without_a_fixed_size():
    x = np.random.default_rng(0).standard_normal((3, 5, 4, 6)).astype("float32")
    for strides in (1, 2):
        _assert_like_keras(layers.Conv2D(7, 1, strides=strides), keras.layers.Conv2D(7, 1, strides=strides), x)
    image = keras.Input((None, None, 6))
    for layer in (layers.Conv2D(7, 1), layers.DepthwiseConv2D(5, padding="same")):
        net = keras.Model(image, layer(image))
        assert net.output_shape == (None, None, None, 7 if isinstance(layer, layers.Conv2D) else 6)
        for size in (1, 6):
            small = np.asarray(net(x[:, :size, :size]))
            np.testing.assert_allclose(small, np.asarray(layer(x[:, :size, :size])), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_grouped_convolution_has_gradients_in_every_precision(dtype):
    """On a CPU TensorFlow's own operation has them in float32 and bfloat16 only."""
    import tensorflow as tf

    layer = layers.Conv2D(8, 3, groups=2, dtype=dtype)
    x = tf.cast(np.random.default_rng(0).standard_normal((2, 6, 6, 4)), dtype)
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(tf.square(layer(x)))
    assert all(np.isfinite(np.array(g, "float32")).all() for g in tape.gradient(loss, [x, layer.kernel.value]))


def test_gamma_in_the_kernel_equals_gamma_on_the_activation_before_it():
    x = np.random.default_rng(0).standard_normal((2, 6, 6, 8)).astype("float32")
    scaled, plain = layers.ScaledStdConv2D(4, 3, gamma=numerics.gamma("relu")), layers.ScaledStdConv2D(4, 3)
    got = scaled(np.maximum(x, 0))
    plain(x)
    plain.set_weights(scaled.get_weights())
    np.testing.assert_allclose(np.asarray(got), np.asarray(plain(layers.ScaledActivation("relu")(x))), atol=1e-5)


def test_max_pool_lets_no_padding_win_over_negative_values():
    """Padding with zeros, as ZeroPadding2D would, gives 0 at the border of a negative map."""
    x = -np.random.default_rng(0).uniform(1, 2, (1, 7, 8, 3)).astype("float32")
    got = np.asarray(layers.MaxPool2D(3, 2, pad=1)(x))
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=-np.inf)
    expected = [[padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2)) for j in range(4)] for i in range(4)]
    np.testing.assert_array_equal(got, np.moveaxis(np.array(expected), 2, 0))
    assert got.max() < 0


# ---------------------------------------------------------------- what EUN and Rescale put before a convolution
def test_second_moments_of_the_three_standardizations():
    x = np.random.default_rng(0).normal(3, 5, (4, 6, 6, 64)).astype("float32")
    whole, per_channel = (np.asarray(layers.StandardizeInput(s)(x)) for s in ("whole_tensor", "per_channel_batch"))
    np.testing.assert_allclose([whole.mean(), whole.var()], [0, 1], atol=1e-4)
    np.testing.assert_allclose(per_channel.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(per_channel.var((0, 1, 2)), 1, atol=1e-4)
    unit = np.asarray(layers.StandardizeInput("channel_l2")(x))
    np.testing.assert_allclose((unit**2).mean(-1), 1 / 64, rtol=1e-5)


def test_channel_l2_keeps_zeros_and_their_gradient_finite():
    import tensorflow as tf

    x = tf.Variable(np.zeros((1, 2, 2, 3), "float32"))
    with tf.GradientTape() as tape:
        out = layers.StandardizeInput("channel_l2")(x)
    assert not np.asarray(out).any() and np.isfinite(tape.gradient(out, x)).all()


def test_only_channel_l2_is_independent_of_the_batch():
    x = np.random.default_rng(0).standard_normal((4, 5, 5, 8)).astype("float32")
    for statistics, independent in (("whole_tensor", False), ("per_channel_batch", False), ("channel_l2", True)):
        layer = layers.StandardizeInput(statistics)
        difference = np.abs(np.asarray(layer(x))[:1] - np.asarray(layer(x[:1]))).max()
        assert (difference < 1e-6) == independent
    with pytest.raises(ValueError, match="'batch'"):
        layers.StandardizeInput("batch")


def test_centering_bias_centres_its_first_eight_batches_and_then_stands_still():
    rng = np.random.default_rng(0)
    batches = rng.normal(2, 1, (8, 16, 4, 4, 3)).astype("float32")
    layer = layers.CenteringBias()
    layer.build(batches[0].shape)
    layer.bias.assign([1.0, 2.0, 3.0])
    first = np.asarray(layer(batches[0], training=True))
    np.testing.assert_allclose(first.mean((0, 1, 2)), [0.01, 0.02, 0.03], atol=1e-5)  # the bias counts little yet
    for batch in batches[1:]:
        layer(batch, training=True)
    after = np.asarray(layer(batches.reshape(-1, 4, 4, 3), training=True))
    np.testing.assert_allclose(after.mean((0, 1, 2)), [1, 2, 3], atol=1e-5)
    frozen = np.asarray(layer.moving_mean)
    layer(batches[0] + 100, training=True)
    np.testing.assert_array_equal(np.asarray(layer.moving_mean), frozen)
    assert float(layer.count.numpy()) == 8 and len(layer.trainable_variables) == 1


@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize(
    ("side", "kernel", "strides"), [(1, 5, 1), (2, 5, 1), (2, 3, 2), (5, 3, 2), (6, 5, 2), (9, 3, 1)]
)
def test_white_noise_keeps_its_variance_at_every_position_of_a_map_of_any_size(padding, side, kernel, strides):
    """The variance that a depthwise convolution gives white noise is a sum over the taps that lie within the map."""
    site = Site("a", index=1)
    variant = variants.SN(padding_compensation=True)
    x = keras.Input((side, side, 3))
    net = keras.Model(x, variant.depthwise(x, kernel, site, strides, padding))
    net.get_layer("a_conv1").set_weights([np.full((kernel, kernel, 3, 1), 1 / kernel, "float32")])
    # The variance at a position is the sum of the squares of what each single pixel of value 1 gives there.
    pixels = np.zeros((side * side, side, side, 3), "float32")
    pixels.reshape(side * side, side * side, 3)[np.arange(side**2), np.arange(side**2)] = 1
    variance = (np.asarray(net(pixels)) ** 2).sum(0)
    np.testing.assert_allclose(variance, 1, rtol=1e-5)


def test_compensation_of_maps_whose_size_is_not_known():
    x = keras.Input((None, None, 3))
    net = keras.Model(x, variants.SN(padding_compensation=True).depthwise(x, 5, Site("a", index=1), 2, "same"))
    for side in (2, 7):
        fixed = layers.CompensatePadding(5, 2)
        noise = np.random.default_rng(0).standard_normal((2, side, side, 3)).astype("float32")
        plain = np.asarray(net.get_layer("a_conv1")(noise))
        np.testing.assert_allclose(np.asarray(net(noise)), np.asarray(fixed([plain, noise])), rtol=1e-5)
    with pytest.raises(ValueError, match="Expected a fixed input size"):
        net.get_layer("a_compensate1").factors()


def test_a_self_normalizing_efficientnet_keeps_its_variance_on_small_maps():
    """At 32 pixels the last stages see maps of 2x2 and 1x1: five decades are lost there without compensation."""
    x = np.random.default_rng(0).standard_normal((16, 32, 32, 3)).astype("float32")
    last = {}
    for compensated in (False, True):
        keras.utils.set_random_seed(0)
        net = nfzoo.build(
            "sn_efficientnet_b0", input_shape=(32, 32, 3), classes=10, doubled_gate=True,
            padding_compensation=compensated,
        )  # fmt: skip
        table = nfzoo.spp.snapshot(net, x, taps="blocks", what=("activations",))
        outs = table[table.layer.str.fullmatch(r"stage\d_block\d_out")]
        last[compensated] = (outs.acv + outs.acsm).to_numpy()
    assert last[False][-1] < 0.02 and 0.5 < last[True].min() and last[True].max() < 2


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="Keras saves alike on all")
def test_what_lora_learned_is_saved(tmp_path):
    image = keras.Input((8, 8, 3))
    net = keras.Model(image, layers.ScaledStdConv2D(4, 3)(image))
    net.layers[1].enable_lora(2)
    for variable in net.layers[1].trainable_variables:
        variable.assign(keras.random.normal(variable.shape))
    net.save(tmp_path / "lora.keras")
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype("float32")
    np.testing.assert_allclose(keras.saving.load_model(tmp_path / "lora.keras")(x), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_lora_under_mixed_precision_is_standardized_in_float32(policy):
    image = keras.Input((8, 8, 3))
    layer = layers.ScaledStdConv2D(3, 3, dtype=policy)
    net = keras.Model(image, layer(image))
    layer.enable_lora(2)
    for variable in layer.trainable_variables:
        variable.assign(keras.random.normal(variable.shape))
    factors = (keras.ops.convert_to_numpy(v).astype("float32") for v in (layer.lora_kernel_a, layer.lora_kernel_b))
    whole = keras.ops.convert_to_numpy(layer._kernel) + layer.lora_alpha / 2 * np.matmul(*factors)
    gain = keras.ops.convert_to_numpy(layer.gain)
    expected = layers.standardize(whole, layer.fan_in_axes, gain, layer.epsilon, layer.epsilon_mode)
    np.testing.assert_allclose(layer.effective_kernel(), expected, rtol=1e-5, atol=1e-6)
    assert np.isfinite(keras.ops.convert_to_numpy(net(np.ones((1, 8, 8, 3), "float32")))).all()


def test_pooling_that_would_pad_other_axes_is_refused():
    with pytest.raises(ValueError, match="channels_last"):
        layers.MaxPool2D(3, 2, pad=1, data_format="channels_first")


def test_depthwise_convolutions_with_strides_and_dilation():
    x = np.random.default_rng(0).standard_normal((2, 11, 11, 3)).astype("float32")
    for padding in ("same", "valid"):
        options = {"strides": 2, "dilation_rate": 2, "padding": padding}
        _assert_like_keras(layers.DepthwiseConv2D(3, **options), keras.layers.DepthwiseConv2D(3, **options), x)


def test_a_spare_standardized_layer_is_no_obstacle(tmp_path):
    class Spare(keras.Model):
        def __init__(self):
            super().__init__()
            self.used, self.spare = layers.ScaledStdConv2D(4, 3), layers.ScaledStdConv2D(4, 3)

        def build(self, shape):
            self.used.build(shape)

        def call(self, x):
            return self.used(x)

    model, x = Spare(), np.ones((1, 8, 8, 3), "float32")
    model(x)
    model.save_weights(tmp_path / "spare.weights.h5")
    assert (tmp_path / "spare.weights.h5").stat().st_size > 500
