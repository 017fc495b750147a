"""AGC: golden numbers, the defining inequality, units by layer, and the training step that applies it."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from agc_suite import reference
from conftest import crossentropy, slow_but

import nfzoo
from nfzoo import agc


def _clip(gradient, weight, axes, factor=0.01, eps=1e-3, scale=1.0):
    clipped, mask = agc.clip(gradient, weight, axes, factor, eps, scale)
    return keras.ops.convert_to_numpy(clipped), keras.ops.convert_to_numpy(mask)


def test_golden_numbers():
    weight = np.array([[3.0, 0.0], [4.0, 0.0]], "float32")
    gradient = np.array([[0.6, 1e-6], [0.8, 2e-6]], "float32")
    clipped, mask = _clip(gradient, weight, (0,))
    np.testing.assert_allclose(clipped, [[0.03, 1e-6], [0.04, 2e-6]], rtol=1e-5)
    assert mask.tolist() == [[True, False]]


CASES = {
    "dense": ((5, 7), (0,)),
    "conv": ((3, 3, 4, 6), (0, 1, 2)),
    "depthwise": ((3, 3, 8, 2), (0, 1)),
    "vector": ((9,), (0,)),
    "element": ((9,), ()),
    "scalar": ((), ()),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("factor", [0.001, 0.01, 0.16])
def test_defining_inequality_and_independent_computation(case, factor):
    shape, axes = CASES[case]
    for seed in range(8):
        rng = np.random.default_rng(seed)
        weight = (rng.standard_normal(shape) * 10.0 ** rng.uniform(-4, 1)).astype("float32")
        gradient = (rng.standard_normal(shape) * 10.0 ** rng.uniform(-5, 2)).astype("float32")
        clipped, mask = _clip(gradient, weight, axes, factor)
        np.testing.assert_allclose(clipped, reference(gradient, weight, axes, factor), rtol=2e-5, atol=1e-12)
        norm = np.sqrt((clipped.astype("float64") ** 2).sum(axes, keepdims=True)) if axes else np.abs(clipped)
        size = np.sqrt((weight.astype("float64") ** 2).sum(axes, keepdims=True)) if axes else np.abs(weight)
        assert (norm <= factor * np.maximum(size, 1e-3) * (1 + 1e-5)).all()
        untouched = np.broadcast_to(~mask, shape)
        np.testing.assert_array_equal(clipped[untouched], gradient[untouched])
        np.testing.assert_allclose(_clip(clipped, weight, axes, factor)[0], clipped, rtol=1e-6)  # idempotent


def test_scale_equivariance():
    """A loss scale multiplies the gradient and the threshold alike."""
    rng = np.random.default_rng(0)
    weight, gradient = (rng.standard_normal((3, 3, 4, 6)).astype("float32") for _ in range(2))
    plain, _ = _clip(gradient, weight, (0, 1, 2))
    scaled, _ = _clip(gradient * 2.0**15, weight, (0, 1, 2), scale=2.0**15)
    np.testing.assert_array_equal(scaled, plain * 2.0**15)


def test_tiny_limits_are_kept():
    """A norm above its limit need not be far from zero."""
    clipped, _ = _clip(np.full(1, 5e-7, "float32"), np.zeros(1, "float32"), (0,), factor=0.01, eps=1e-5)
    np.testing.assert_allclose(clipped, [1e-7], rtol=1e-5)


def test_depthwise_units_are_channels():
    """By rank all channels would share one norm; here their weights span four decades."""
    layer = keras.layers.DepthwiseConv2D(3)
    layer.build((None, 8, 8, 4))
    axes = agc.fan_in_axes(layer, layer.kernel)
    weight = np.ones((3, 3, 4, 1), "float32") * np.array([0.01, 0.1, 1, 10], "float32")[:, None]
    clipped, _ = _clip(np.ones_like(weight), weight, axes)
    np.testing.assert_allclose(clipped[0, 0, :, 0], [0.0001, 0.001, 0.01, 0.1], rtol=1e-5)


@pytest.mark.parametrize("name", nfzoo.list_models("*_test_*", tests=True))
def test_units_of_every_model(name):
    model = nfzoo.build(name)
    units = nfzoo.AGC().units(model)
    assert list(units) == [v.path for v in model.trainable_variables]
    assert units["head/kernel"] is None and units["head/bias"] == (0,)
    for path, axes in units.items():
        layer = model.get_layer(path.split("/")[0])
        if path.endswith("/kernel") and axes is not None:
            expected = {"Dense": (0,), "Conv1D": (0, 1), "Conv2D": (0, 1, 2), "DepthwiseConv2D": (0, 1)}
            assert axes == expected[re.sub("ScaledStd|Grouped", "", type(layer).__name__)]


def test_grouped_and_transposed_convolutions_and_foreign_models():
    model = keras.applications.MobileNetV3Small(weights=None, input_shape=(32, 32, 3), classes=5)
    units = agc.unit_axes(model, exclude=[".*logits/kernel"])
    assert sum(axes is None for axes in units.values()) == 1
    transposed = keras.layers.Conv2DTranspose(5, 3)
    transposed.build((None, 8, 8, 4))
    axes = agc.fan_in_axes(transposed, transposed.kernel)
    assert [n for axis, n in enumerate(transposed.kernel.shape) if axis not in axes] == [5]


def test_vector_units():
    model = nfzoo.build("nf_test_efficientnet")
    assert nfzoo.AGC(vector_units="tensor").units(model)["stem_conv1/gain"] == (0,)
    assert nfzoo.AGC(vector_units="element").units(model)["stem_conv1/gain"] == ()


def test_unknown_units_name_the_variable_and_the_table():
    class Odd(keras.layers.Layer):
        def build(self, shape):
            self.table = self.add_weight(name="table", shape=(3, 4))

        def call(self, x):
            return x

    x = keras.Input((4,))
    model = keras.Model(x, Odd(name="odd")(x))
    with pytest.raises(ValueError, match=r"odd/table.*\(3, 4\).*Odd.*UNIT_AXES"):
        agc.unit_axes(model)
    assert agc.unit_axes(model, exclude=["odd/.*"]) == {"odd/table": None}


def test_a_pattern_without_a_match_raises():
    with pytest.raises(ValueError, match=r"classifier/kernel.*exclude=\(\)"):
        nfzoo.AGC(exclude="classifier/kernel").units(nfzoo.build("sn_test_efficientnet"))


@pytest.mark.parametrize(
    "bad", [{"clip_factor": 0}, {"clip_factor": float("nan")}, {"eps": -1}, {"vector_units": "channel"}]
)
def test_bad_configuration(bad):
    with pytest.raises(ValueError, match="Expected"):
        nfzoo.AGC(**bad)


# ---------------------------------------------------------------- the training step
def _step(policy="float32", agc_config=None, optimizer=None, name="nf_test_efficientnet", **compile_options):
    """One SGD step at rate 1: the change of the weights is the (clipped) gradient."""
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(0)
    model = nfzoo.build(name, dropout_rate=0.0, skip_gain=0.3, repeats=(1, 1, 2))
    x = np.random.default_rng(0).standard_normal((8, 32, 32, 3)).astype("float32")
    y = np.arange(8) % 10
    before = {v.path: np.array(v.numpy()) for v in model.trainable_variables}
    model.compile(optimizer or keras.optimizers.SGD(1.0), crossentropy(), agc=agc_config, **compile_options)
    logs = model.fit(x, y, batch_size=8, verbose=0).history
    return model, before, {v.path: before[v.path] - v.numpy() for v in model.trainable_variables}, logs


@pytest.fixture(scope="module")
def raw_step():
    return _step()


@pytest.mark.parametrize("factor", slow_but([0.001], [0.001, 0.05]))
def test_train_step_applies_the_rule(raw_step, factor):
    _, before, gradients, _ = raw_step
    model, _, changes, logs = _step(agc_config=nfzoo.AGC(factor, log_clipped=True))
    clipped = total = 0
    for path, axes in model.agc.units(model).items():
        expected = gradients[path] if axes is None else reference(gradients[path], before[path], axes, factor)
        np.testing.assert_allclose(changes[path], expected, atol=2e-6, rtol=2e-3)
        if axes is not None:
            units = np.prod([n for axis, n in enumerate(before[path].shape) if axis not in axes], initial=1)
            norms = [np.sqrt((g**2).sum(axes)) if axes else np.abs(g) for g in (before[path], gradients[path])]
            clipped += (norms[1] > factor * np.maximum(norms[0], 1e-3)).sum()
            total += units
    assert logs["agc_clipped"][0] == pytest.approx(clipped / total, abs=3 / total)


def test_the_share_that_is_logged_is_the_mean_of_an_epoch():
    """Of every batch, not of the last; and evaluation, which clips nothing, tells nothing of it."""
    rng, shares = np.random.default_rng(0), []
    x, y = rng.standard_normal((20, 16, 16, 3)).astype("float32"), np.arange(20) % 4
    x[16:] *= 1e-4  # a batch of small gradients
    model = nfzoo.build("sn_test_ffnn", input_shape=(16, 16, 3), classes=4)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.0), loss, agc=nfzoo.AGC(0.02, log_clipped=True))
    for start in range(0, 20, 4):
        model.reset_metrics()
        logs = model.train_on_batch(x[start : start + 4], y[start : start + 4], return_dict=True)
        shares.append(logs["agc_clipped"])
    assert max(shares) > 1.05 * min(shares)
    history = model.fit(x, y, batch_size=4, shuffle=False, verbose=0, validation_data=(x, y)).history
    assert history["agc_clipped"] == [pytest.approx(np.mean(shares), rel=1e-5)]
    assert sorted(history) == ["agc_clipped", "loss", "val_loss"]
    assert model.evaluate(x, y, verbose=0, return_dict=True).keys() == {"loss"}


def test_no_agc_no_change_and_no_log(raw_step):
    _, _, gradients, logs = raw_step
    assert "agc_clipped" not in logs
    _, _, changes, _ = _step(agc_config=nfzoo.AGC(1e6))
    for path, gradient in gradients.items():
        np.testing.assert_allclose(changes[path], gradient, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [True, False])
def test_loss_scale_does_not_change_what_is_clipped(wrap):
    """float32 arithmetic with a loss scale of 2^15 equals no loss scale: the trap of clipping scaled gradients."""
    config = nfzoo.AGC(0.01, log_clipped=True)
    _, _, plain, logs = _step(agc_config=config)
    if wrap:
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=2.0**15)
    else:
        optimizer = keras.optimizers.SGD(1.0, loss_scale_factor=2.0**15)
    _, _, scaled, scaled_logs = _step(agc_config=config, optimizer=optimizer)
    assert scaled_logs["agc_clipped"] == logs["agc_clipped"]
    for path in plain:
        np.testing.assert_allclose(scaled[path], plain[path], atol=1e-7, rtol=1e-3)


@pytest.mark.slow  # of a whole fit; the suite has the case
def test_mixed_float16_clips_as_float32():
    config = nfzoo.AGC(0.01, log_clipped=True)
    _, _, plain, logs = _step(agc_config=config)
    model, before, half, half_logs = _step("mixed_float16", config)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert half_logs["agc_clipped"][0] == pytest.approx(logs["agc_clipped"][0], abs=0.05)
    for path, axes in model.agc.units(model).items():
        if axes is None:
            continue
        change, weight = (np.sqrt((a**2).sum(axes)) if axes else np.abs(a) for a in (half[path], before[path]))
        assert (change <= 0.01 * np.maximum(weight, 1e-3) * 1.01 + 1e-7).all(), path


@pytest.mark.slow
def test_two_replicas_equal_one(fresh_process):
    """Clipping each replica's share of the gradient would bound their sum up to twice too loosely."""
    code = """
import json, sys
import numpy as np, tensorflow as tf
import keras, nfzoo
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
x = np.random.default_rng(0).standard_normal((8, 8, 8, 3)).astype("float32")
y = np.arange(8) % 10
def step(strategy):
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = nfzoo.build("sn_test_ffnn")
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(1.0), loss, agc=nfzoo.AGC(0.5, log_clipped=True))
    before = [np.array(w) for w in model.get_weights()]
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    history = model.fit(data.with_options(options), verbose=0).history
    return [a - b for a, b in zip(model.get_weights(), before)], history
one, log1 = step(tf.distribute.get_strategy())
two, log2 = step(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]))
worst = max(float(abs(a - b).max() / (abs(a).max() + 1e-12)) for a, b in zip(one, two))
print(json.dumps([worst, log1, log2]))
"""
    worst, one, two = fresh_process(code)
    assert worst < 1e-4
    assert 0 < one["agc_clipped"][0] < 1
    assert two["agc_clipped"] == pytest.approx(one["agc_clipped"], abs=1e-6)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_agc_must_be_a_configuration():
    with pytest.raises(TypeError, match=r"agc=0\.01"):
        nfzoo.build("sn_test_ffnn").compile("sgd", "mse", agc=0.01)


def test_compile_state_survives_saving(tmp_path, images):
    """A functional subclass that overrides `compile` carelessly loses its arguments on load."""
    config = nfzoo.AGC(0.02, exclude=("head/.*",), vector_units="element")
    model = nfzoo.build("sn_test_ffnn", size=32, dropout_rate=0.0)
    model.compile(keras.optimizers.Adam(1e-2), crossentropy(), metrics=["accuracy"], agc=config)
    model.fit(*images, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.agc == config and int(again.optimizer.iterations) == 1
    model.fit(*images, verbose=0, shuffle=False)
    again.fit(*images, verbose=0, shuffle=False)
    for a, b in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_frozen_head_is_no_mistake_and_unfreezing_asks_for_a_compile(images):
    model = nfzoo.build("sn_test_ffnn", size=32)
    model.get_layer("head").trainable = False
    model.compile("sgd", crossentropy(), agc=nfzoo.AGC())
    model.get_layer("head").trainable = True
    with pytest.raises(ValueError, match="head/kernel.*compile again"):
        model.agc_axes()


def test_frozen_layers_leave_the_rest_to_train(images):
    model = nfzoo.build("nf_test_efficientnet")
    model.get_layer("stem_conv1").trainable = False
    model.compile("sgd", crossentropy(), agc=nfzoo.AGC())
    assert np.isfinite(model.fit(*images, verbose=0).history["loss"][0])


class OwnStep(nfzoo.NFModel):
    """As a tutorial writes it."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss}


class Through(nfzoo.NFModel):
    def train_step(self, data):
        return super().train_step(data)


@pytest.mark.parametrize("kind", [OwnStep, Through])
def test_a_training_step_of_ones_own_clips_once(kind, images):
    moved = []
    for cls in (nfzoo.NFModel, kind):
        keras.utils.set_random_seed(0)
        plain = nfzoo.build("sn_test_ffnn", size=32, dropout_rate=0.0)
        model = cls(plain.inputs, plain.outputs)
        model.compile(keras.optimizers.SGD(1.0), crossentropy(), agc=nfzoo.AGC(1e-3))
        before = [np.array(w) for w in model.get_weights()]
        model.fit(*images, batch_size=8, verbose=0)
        moved.append([after - first for after, first in zip(model.get_weights(), before, strict=True)])
    for ours, own in zip(*moved, strict=True):
        np.testing.assert_allclose(own, ours, rtol=1e-4, atol=1e-7)


def test_a_legacy_file_without_agc_is_said(tmp_path):
    model = nfzoo.build("sn_test_ffnn")
    model.compile("sgd", crossentropy(), agc=nfzoo.AGC(0.02))
    with pytest.warns(UserWarning, match="without agc"):
        model.save(tmp_path / "model.h5")


class Bare(nfzoo.NFModel):
    """A loss without the argument `training`, which Keras passes only to those that have it."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return keras.ops.mean((y_pred - keras.ops.one_hot(y, 10)) ** 2)


@pytest.mark.parametrize("trainable", [True, False])
def test_losses_of_ones_own_and_frozen_networks_train(images, trainable):
    plain = nfzoo.build("sn_test_ffnn", size=32)
    model = Bare(plain.inputs, plain.outputs)
    model.trainable = trainable
    model.compile("sgd", crossentropy(), agc=nfzoo.AGC(0.01))
    before = [np.array(w) for w in model.get_weights()]
    callbacks = [nfzoo.SignalPropagation(*images, taps="layers"), nfzoo.SignalPropagation(source="live")]
    model.fit(*images, batch_size=8, verbose=0, callbacks=callbacks)
    assert all(map(np.array_equal, before, model.get_weights())) != trainable
    assert {"activation", "gradient"} <= set(callbacks[1].table().kind)


def test_an_input_may_be_left_out():
    first, second = keras.Input((4,), name="a", optional=True), keras.Input((4,), name="b")

    class Whichever(keras.layers.Layer):
        def call(self, a, b):
            return b if a is None else a + b

    outputs = keras.layers.Dense(2, name="head")(Whichever()(first, second))
    model = nfzoo.NFModel({"a": first, "b": second}, outputs)
    model.compile("sgd", "mse", agc=nfzoo.AGC(0.01))
    assert np.isfinite(model.train_on_batch({"a": None, "b": np.ones((3, 4))}, np.ones((3, 2))))
