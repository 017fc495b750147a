"""Optimizers against recurrences in NumPy: momentum, weight decay and learning rates by groups, moving averages."""

import keras
import numpy as np
import pytest

from nfzoo import AGC
from nfzoo.optimizers import Adam, AdaptiveGradientClipping, Group, MomentumSGD, RMSprop

STEPS, WARMUP, PEAK = 50, 10, 0.4


def schedule(step):
    """Warm-up and cosine, in NumPy."""
    if step < WARMUP:
        return PEAK * step / WARMUP
    return 0.5 * PEAK * (1 + np.cos(np.pi * (step - WARMUP) / (STEPS - WARMUP)))


def rate_of(optimizer_class, **options):
    cosine = keras.optimizers.schedules.CosineDecay(
        0.0, STEPS - WARMUP, warmup_target=PEAK, warmup_steps=WARMUP, alpha=0.0
    )
    return optimizer_class(cosine, **options)


def variables():
    rng = np.random.default_rng(1)
    shapes = {"kernel": (3, 4), "bias": (4,), "gain": ()}
    return [keras.Variable(rng.normal(size=s).astype("float32"), name=n) for n, s in shapes.items()]


def gradients(step):
    rng = np.random.default_rng([2, step])
    return [rng.normal(size=s).astype("float32") for s in ((3, 4), (4,), ())]


def trained(optimizer, steps=STEPS):
    found = variables()
    optimizer.build(found)
    for step in range(steps):
        optimizer.apply([keras.ops.convert_to_tensor(g) for g in gradients(step)], found)
    return found


@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_is_the_recurrence_of_the_references(nesterov):
    decay, momentum = 0.01, 0.9
    groups = [Group("bias|gain", weight_decay=0), Group("kernel", learning_rate=0.5)]
    optimizer = rate_of(MomentumSGD, momentum=momentum, nesterov=nesterov, weight_decay=decay, groups=groups)
    got = trained(optimizer)
    weights = [np.asarray(v, "float64") for v in variables()]
    kept = [np.zeros_like(w) for w in weights]
    for step in range(STEPS):
        for i, (gradient, wd, factor) in enumerate(zip(gradients(step), (decay, 0, 0), (0.5, 1, 1), strict=True)):
            g = gradient + wd * weights[i]
            kept[i] = momentum * kept[i] + g
            weights[i] = weights[i] - factor * schedule(step) * (g + momentum * kept[i] if nesterov else kept[i])
    for a, b in zip(got, weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_keras_own_differs_while_the_rate_changes():
    ours = trained(rate_of(MomentumSGD))
    theirs = trained(rate_of(keras.optimizers.SGD, momentum=0.9, nesterov=True))
    assert max(abs(np.asarray(a) - np.asarray(b)).max() for a, b in zip(ours, theirs, strict=True)) > 0.01
    ours, theirs = (trained(kind(0.1, momentum=0.9, nesterov=True)) for kind in (MomentumSGD, keras.optimizers.SGD))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("ours", "theirs"), [(Adam, keras.optimizers.Adam), (RMSprop, keras.optimizers.RMSprop)])
def test_without_groups_they_are_keras_own(ours, theirs):
    for a, b in zip(trained(ours(0.01, weight_decay=0.1)), trained(theirs(0.01, weight_decay=0.1)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("ours", "theirs"), [(Adam, keras.optimizers.Adam), (RMSprop, keras.optimizers.RMSprop)])
def test_groups_are_optimizers_of_their_own(ours, theirs):
    groups = [Group("gain", learning_rate=0.1, weight_decay=0), Group("bias|gain", weight_decay=0)]
    got = trained(ours(0.01, weight_decay=0.1, groups=groups))
    alone = [theirs(0.01, weight_decay=0.1), theirs(0.01), theirs(0.001)]
    for i, optimizer in enumerate(alone):
        np.testing.assert_allclose(got[i], trained(optimizer)[i], rtol=1e-5, atol=1e-7)


def test_a_moving_average_that_warms_up():
    optimizer = MomentumSGD(0.1, use_ema=True, ema_momentum=0.7, ema_warmup=True)
    found, expected = variables(), None
    optimizer.build(found)
    expected = [np.asarray(v, "float64") for v in found]
    for step in range(30):
        optimizer.apply([keras.ops.convert_to_tensor(g) for g in gradients(step)], found)
        decay = min(0.7, (1 + step) / (10 + step))
        expected = [decay * e + (1 - decay) * np.asarray(v) for e, v in zip(expected, found, strict=True)]
    for a, b in zip(optimizer._model_variables_moving_average, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("warmup", [True, False])
def test_accumulated_gradients_average_once(warmup):
    """Keras moves the average at every micro-batch, as if the weights had been there that often."""
    options = {"use_ema": True, "ema_momentum": 0.9, "ema_warmup": warmup}
    whole, parts = MomentumSGD(0.1, **options), MomentumSGD(0.1, gradient_accumulation_steps=3, **options)
    one, other = variables(), variables()
    for optimizer, found in ((whole, one), (parts, other)):
        optimizer.build(found)
    for step in range(5):
        gs = [keras.ops.convert_to_tensor(g) for g in gradients(step)]
        whole.apply(gs, one)
        for _ in range(3):
            parts.apply(gs, other)
    for a, b in zip(whole._model_variables_moving_average, parts._model_variables_moving_average, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [MomentumSGD, Adam, RMSprop])
def test_groups_are_saved_with_the_model(tmp_path, kind):
    def network():
        keras.utils.set_random_seed(0)
        parts = [keras.Input((6,)), keras.layers.Dense(4, name="hidden"), keras.layers.Dense(2)]
        return keras.Sequential(parts, name="own")

    # Keras loads a sequential model under another name: its variables are no longer those of "own".
    groups = [{"pattern": ".*/bias", "weight_decay": 0.0}, {"pattern": "own/hidden/.*", "learning_rate": 0.1}]
    model = network()
    model.compile(kind(0.05, weight_decay=0.5, groups=groups, use_ema=True, ema_warmup=True), "mse")
    x, y = np.random.default_rng(0).normal(size=(2, 12, 6)), np.ones((12, 2))
    model.fit(x[0], y, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    for one in (model, again):
        one.fit(x[1], y, shuffle=False, verbose=0)
    states = ([*m.get_weights(), *m.optimizer.variables] for m in (model, again))
    for a, b in zip(*states, strict=True):
        np.testing.assert_array_equal(a, b)


def test_bad_settings():
    with pytest.raises(ValueError, match=r"spare.*match none.*gain"):
        trained(MomentumSGD(0.1, groups=[Group("spare")]))
    with pytest.raises(ValueError, match="0 <= momentum < 1"):
        MomentumSGD(0.1, momentum=1.0)


def test_units_go_by_paths_in_whatever_order():
    """Towers of the same layers: ends of paths are alike."""
    towers = [keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="d")], name=n) for n in ("left", "right")]
    x = keras.Input((3,))
    model = keras.Model(x, keras.layers.add([tower(x) for tower in towers]))
    for order in (towers, towers[::-1]):
        variables = [v for tower in order for v in tower.trainable_variables]
        optimizer = AdaptiveGradientClipping(keras.optimizers.SGD(), model, AGC(exclude=("left/d/kernel",)))
        optimizer.build(variables)
        units = {path: axes for path, axes in optimizer.units.items() if path.endswith("kernel")}
        assert units == {"left/d/kernel": None, "right/d/kernel": (0,)}
