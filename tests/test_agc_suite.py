"""AGC in every circumstance equals the rule in float64: through `compile(agc=...)` and through the optimizer."""

import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from agc_suite import CASES, ENTRANCES, FACTOR, convolutional, deviation, examples, update
from conftest import crossentropy

import nfzoo
from nfzoo.optimizers import AdaptiveGradientClipping, innermost

# Of a variable's largest entry. The rest is rounding: what a step takes from a weight has the weight's last digit.
TOLERANCE = 1e-4
TWO = "--xla_force_host_platform_device_count=2"
SHARED = [name for name in CASES if name not in ("accumulated gradients", "jit_compile")]


@pytest.fixture(scope="module")
def raw():
    """Gradients as they are, by case."""
    found = {}

    def get(name):
        source = CASES[name].same_as or name
        if source not in found:
            found[source] = update(CASES[source], None)[1]
        return found[source]

    return get


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_rule(raw, name, entrance):
    worst, clipped = deviation(CASES[name], raw(name), entrance)
    assert worst < TOLERANCE
    assert 0.3 < clipped < 1  # some units are clipped, some are not


def _elsewhere(names, **environment):
    script = pathlib.Path(__file__).with_name("agc_suite.py")
    process = subprocess.run(
        [sys.executable, script, *names], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize(
    ("names", "environment"),
    [
        pytest.param(SHARED, {"KERAS_BACKEND": "tensorflow", "DEVICES": "2"}, marks=pytest.mark.slow),
        pytest.param(list(CASES), {"KERAS_BACKEND": "jax"}, marks=pytest.mark.slow),
        pytest.param(list(CASES), {"KERAS_BACKEND": "jax", "DEVICES": "2", "XLA_FLAGS": TWO}, marks=pytest.mark.slow),
    ],
    ids=["two replicas", "JAX", "JAX, two devices"],
)
def test_equals_the_rule_elsewhere(names, environment):
    for name, entrances in _elsewhere(names, **environment).items():
        for entrance, (worst, clipped) in entrances.items():
            assert worst < TOLERANCE and 0.3 < clipped < 1, (name, entrance)


def test_the_suite_sees_what_others_get_wrong(raw):
    """Micro-batches clipped one by one are far from the rule: the suite would tell."""
    case, limit = CASES["float32"], 10 * TOLERANCE
    before, _, units = update(case, None)
    parts = []
    for start in range(0, 8, 2):
        keras.utils.set_random_seed(0)
        model = convolutional()
        model.compile(keras.optimizers.SGD(1.0), crossentropy(), agc=nfzoo.AGC(FACTOR))
        x, y = examples(case)
        model.fit(x[start : start + 2], y[start : start + 2], verbose=0)
        parts.append({v.path: before[v.path] - np.asarray(v) for v in model.trainable_variables})
    right = update(case, "compile")[1]
    each = {path: np.mean([part[path] for part in parts], axis=0) for path in units}
    assert max(abs(each[p] - right[p]).max() / abs(right[p]).max() for p in units if units[p]) > limit


def test_the_optimizer_survives_saving(tmp_path):
    x = keras.Input((6,))
    model = keras.Model(x, keras.layers.Dense(2, name="head")(keras.layers.Dense(4, name="first")(x)))
    inner = keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.5)
    optimizer = AdaptiveGradientClipping(inner, model, nfzoo.AGC(0.02, eps=1e-2))
    model.compile(optimizer, "mean_squared_error")
    x, y = np.random.default_rng(0).normal(size=(2, 12, 6)), np.ones((12, 2))
    model.fit(x[0], y, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.optimizer.units == {"first/kernel": (0,), "first/bias": (0,), "head/kernel": None, "head/bias": (0,)}
    assert again.optimizer.agc == optimizer.agc and int(again.optimizer.iterations) == 1
    for one in (model, again):
        one.fit(x[1], y, shuffle=False, verbose=0)
    for a, b in zip(model.optimizer.variables, again.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_learning_rate_is_the_inner_one():
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(2, name="head")])
    optimizer = AdaptiveGradientClipping(keras.optimizers.SGD(0.1), model, nfzoo.AGC())
    optimizer.learning_rate = 0.5
    assert float(innermost(optimizer).learning_rate) == 0.5 and float(optimizer.learning_rate) == 0.5


def test_what_decays_is_the_inner_ones_word():
    x = keras.Input((4,))
    model = keras.Model(x, keras.layers.Dense(3, name="head")(x))
    optimizer = AdaptiveGradientClipping(keras.optimizers.SGD(0.1, weight_decay=0.1), model, nfzoo.AGC())
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    kernel, bias = model.trainable_variables
    inner = optimizer.inner_optimizer
    assert inner._use_weight_decay(kernel) and not inner._use_weight_decay(bias)


def test_a_variable_from_elsewhere_is_told():
    one, other = (keras.Sequential([keras.Input((6,)), keras.layers.Dense(2, name=n)]) for n in ("head", "top"))
    other.compile(AdaptiveGradientClipping("sgd", one, nfzoo.AGC()), "mse")
    with pytest.raises(ValueError, match="top/kernel; make it anew"):
        other.fit(np.ones((2, 6)), np.ones((2, 2)), verbose=0)
    with pytest.raises(ValueError, match="a model or units"):
        AdaptiveGradientClipping("sgd")


def test_a_sequential_model_goes_on_after_loading(tmp_path):
    """Keras names its variables otherwise after loading."""
    x = np.random.default_rng(0).normal(size=(12, 6))
    layers = [keras.layers.Dense(4, name="hidden"), keras.layers.Dense(2, name="head")]
    model = keras.Sequential([keras.Input((6,)), *layers])
    model.compile(AdaptiveGradientClipping("sgd", model, nfzoo.AGC(0.02)), "mse")
    model.fit(x, np.ones((12, 2)), verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    for one in (model, again):
        one.fit(x, np.ones((12, 2)), shuffle=False, verbose=0)
    for a, b in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_would_clip_wrongly_is_refused():
    model = convolutional()
    clipping = AdaptiveGradientClipping("sgd", model, nfzoo.AGC())
    with pytest.raises(ValueError, match="both; clip once"):
        model.compile(clipping, "mse", agc=nfzoo.AGC())
    for inner in (clipping, keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())):
        with pytest.raises(ValueError, match="an optimizer that updates"):
            AdaptiveGradientClipping(inner, model)
    with pytest.raises(ValueError, match="a built model"):
        AdaptiveGradientClipping("sgd", keras.Sequential([keras.layers.Dense(2)]))


def test_one_path_of_two_kinds_is_refused():
    """Nested models may hold two variables of one path."""
    parts = []
    for layer in (keras.layers.DepthwiseConv2D(3, name="conv"), keras.layers.Conv2D(3, 3, name="conv")):
        x = keras.Input((8, 8, 3))
        parts.append(keras.Model(x, layer(x)))
    x = keras.Input((8, 8, 3))
    model = keras.Model(x, parts[1](keras.layers.ZeroPadding2D(name="pad")(parts[0](x))))
    assert len({v.path for v in model.trainable_variables}) < len(model.trainable_variables)
    with pytest.raises(ValueError, match="two called .*conv/"):
        nfzoo.AGC(exclude=()).units(model)
