"""The correctness suite of AGC: one update in every circumstance, against the rule computed in float64.

`KERAS_BACKEND=jax python tests/agc_suite.py [CASE ...]` prints, per case and entrance, the worst deviation relative to
a variable's largest entry, and the share of variables with clipped units. With DEVICES=2, two devices share the batch:
replicas of a MirroredStrategy on TensorFlow, a `keras.distribution.DataParallel` on JAX (which makes devices of a CPU
by XLA_FLAGS=--xla_force_host_platform_device_count=2).
"""

import contextlib
import functools
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import keras
import numpy as np

import nfzoo
from nfzoo.optimizers import AdaptiveGradientClipping

DEVICES = int(os.environ.get("DEVICES", 1))
FACTOR = 0.01
ENTRANCES = ("compile", "optimizer")  # NFModel.compile(agc=...), and the optimizer around any other


def reference(gradient, weight, axes, factor, eps=1e-3):
    """The paper's rule, unit by unit, in float64: an independent computation."""
    gradient, weight = (np.asarray(a, "float64") for a in (gradient, weight))
    kept = [axis for axis in range(gradient.ndim) if axis not in axes]
    result = gradient.copy()
    for index in np.ndindex(*[gradient.shape[axis] for axis in kept]):
        where = [slice(None)] * gradient.ndim
        for axis, i in zip(kept, index, strict=True):
            where[axis] = i
        limit = factor * max(np.linalg.norm(weight[tuple(where)]), eps)
        norm = np.linalg.norm(gradient[tuple(where)])
        if norm > limit:
            result[tuple(where)] *= limit / norm
    return result


def convolutional() -> keras.Model:
    """Weight-standardized convolution, depthwise too, their gains and biases, a residual gain, a classifier."""
    x = keras.Input((32, 32, 3))
    y = keras.layers.Activation("silu", name="act1")(nfzoo.layers.ScaledStdConv2D(8, 3, strides=2, name="conv1")(x))
    branch = nfzoo.layers.ScaledStdDepthwiseConv2D(3, padding="same", name="conv2")(y)
    y = nfzoo.layers.Merge(branch_scale=0.2, gain=0.3, name="merge")([y, branch])
    y = keras.layers.GlobalAveragePooling2D(name="mean")(y)
    return nfzoo.NFModel(x, keras.layers.Dense(10, name="head")(y))


def embedding() -> keras.Model:
    words = keras.Input((5,), dtype="int32")
    x = keras.layers.Embedding(20, 4, name="words")(words)
    x = keras.layers.GlobalAveragePooling1D(name="mean")(x)
    return nfzoo.NFModel(words, keras.layers.Dense(10, name="head")(x))


@keras.saving.register_keras_serializable(package="tests")
class Unused(keras.layers.Layer):
    """Holds a weight that no output depends on."""

    def build(self, shape):
        self.spare = self.add_weight(name="bias", shape=(3,))

    def call(self, x):
        return x


def unused() -> keras.Model:
    x = keras.Input((32, 32, 3))
    y = keras.layers.Conv2D(4, 3, name="conv")(Unused(name="unused")(x))
    y = keras.layers.GlobalAveragePooling2D(name="mean")(y)
    return nfzoo.NFModel(x, keras.layers.Dense(10, name="head")(y))


def several(sgd: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """One optimizer for the head, another for the rest."""
    chosen = keras.optimizers.OptimizerMap(sgd)
    chosen["head"] = keras.optimizers.SGD(1.0)
    return keras.optimizers.MultiOptimizer(chosen)


@dataclass(frozen=True)
class Case:
    """One circumstance: network, precision, optimizer, how `fit` is called."""

    network: Callable[[], keras.Model] = convolutional
    policy: str = "float32"
    sgd: dict = field(default_factory=dict)
    wrap: Callable = lambda optimizer: optimizer
    compile: dict = field(default_factory=dict)
    batch_size: int = 8
    same_as: str = ""  # the raw gradient is that of another case: of all devices together, or of one batch


CASES = {
    "float32": Case(),
    "fixed loss scale": Case(
        policy="mixed_float16", sgd={"loss_scale_factor": 2.0**15}, compile={"auto_scale_loss": False}
    ),
    "dynamic loss scale": Case(
        policy="mixed_float16", wrap=lambda sgd: keras.optimizers.LossScaleOptimizer(sgd, initial_scale=2.0**15)
    ),
    "automatic loss scale": Case(policy="mixed_float16"),
    "bfloat16": Case(policy="mixed_bfloat16"),
    "accumulated gradients": Case(sgd={"gradient_accumulation_steps": 4}, batch_size=2, same_as="float32"),
    "jit_compile": Case(compile={"jit_compile": True}),
    "sparse gradients": Case(network=embedding),
    "absent gradients": Case(network=unused),
    "several optimizers": Case(wrap=several),
}


def examples(case: Case) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 6, (8, 5)) if case.network is embedding else rng.standard_normal((8, 32, 32, 3))
    return x.astype("int32" if case.network is embedding else "float32"), np.arange(8, dtype="int32") % 10


@functools.cache
def _devices():
    """One strategy for all: TensorFlow's collective operations confuse those of a second one with the first's."""
    if keras.config.backend() == "jax":
        return keras.distribution.DataParallel(devices=keras.distribution.list_devices()[:DEVICES])
    import tensorflow as tf

    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(DEVICES)])


def scope():
    """Where a model is made and trained for several devices to share its batches."""
    return contextlib.nullcontext() if DEVICES == 1 else _devices().scope()


def _split_cpu() -> None:
    if DEVICES > 1 and keras.config.backend() == "tensorflow":
        import tensorflow as tf

        logical = [tf.config.LogicalDeviceConfiguration()] * DEVICES
        tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], logical)


def update(case: Case, entrance: str | None) -> tuple[dict, dict, dict]:
    """One update by SGD at rate 1: weights before, what was taken from them, the units of AGC."""
    # The whole batch on one device is the truth, up to the digits of half precision.
    with contextlib.nullcontext() if entrance is None and case.policy == "float32" else scope():
        return _update(case, entrance)


def _update(case: Case, entrance: str | None) -> tuple[dict, dict, dict]:
    keras.config.set_dtype_policy(case.policy)
    keras.utils.set_random_seed(0)
    model, agc = case.network(), nfzoo.AGC(FACTOR)
    units = agc.units(model)
    before = {v.path: keras.ops.convert_to_numpy(v).copy() for v in model.trainable_variables}
    optimizer = keras.optimizers.SGD(1.0, **case.sgd)
    if entrance == "optimizer":
        optimizer = AdaptiveGradientClipping(optimizer, model, agc)
        model = keras.Model(model.inputs, model.outputs)
    options = {"agc": agc} if entrance == "compile" else {}
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(case.wrap(optimizer), loss, **case.compile, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Gradients do not exist")
        model.fit(*examples(case), batch_size=case.batch_size, shuffle=False, verbose=0)
    taken = {v.path: before[v.path] - keras.ops.convert_to_numpy(v) for v in model.trainable_variables}
    return before, taken, units


def deviation(case: Case, raw: dict, entrance: str) -> tuple[float, float]:
    """Worst deviation from the rule, relative to a variable's largest expected entry; share of variables clipped."""
    before, taken, units = update(case, entrance)
    worst, clipped = 0.0, []
    for path, axes in units.items():
        expected = raw[path] if axes is None else reference(raw[path], before[path], axes, FACTOR)
        clipped.append(not np.array_equal(expected, raw[path]))
        # What is taken from a weight is known to the digits of the weight.
        floor = 1e-3 * FACTOR + 4e-7 * abs(before[path]).max(initial=0) / 1e-4
        worst = max(worst, abs(taken[path] - expected).max(initial=0) / max(abs(expected).max(initial=0), floor))
    return float(worst), float(np.mean(clipped))


def run(names: list[str]) -> dict[str, dict[str, tuple[float, float]]]:
    result, raws = {}, {}
    for name in names:
        source = CASES[name].same_as or name
        if source not in raws:
            raws[source] = update(CASES[source], None)[1]
        with contextlib.ExitStack() as stack:
            stack.callback(keras.config.set_dtype_policy, "float32")
            result[name] = {entrance: deviation(CASES[name], raws[source], entrance) for entrance in ENTRANCES}
    return result


if __name__ == "__main__":
    _split_cpu()
    print(json.dumps(run(sys.argv[1:] or list(CASES))))
