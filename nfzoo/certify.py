"""Certify that an example's output and gradient do not depend on the others of its batch: measured, not assumed.

`python -m nfzoo.certify` is the process of two devices that the check of replicas starts.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import keras
import numpy as np

from nfzoo import backend, layers, names, registry

# Relative, in float32: sums in another order differ by some 1e-6; another batch by 0.08 to 1.4.
TOLERANCE = 1e-3
CHECKS = {
    "inference": "f(batch)[i] = f(example i) in inference",
    "training": "f(batch)[i] = f(example i) in training",
    "batch size": "f(batch of 64)[0] = f(batch of 1)[0] in training",
    "gradients": "the gradients of the examples sum to that of the batch",
    "replicas": "a training step on two replicas = the step on one",
}


@dataclass(frozen=True)
class Certificate:
    """What was measured.

    Attributes:
        model: name in the zoo.
        overrides: of `nfzoo.build`.
        differences: check → largest difference, relative to the largest value; a check that this backend cannot make is
            not there.
    """

    model: str
    overrides: dict
    differences: dict[str, float]

    @property
    def independent(self) -> bool:
        """Whether every difference is rounding."""
        return all(difference <= TOLERANCE for difference in self.differences.values())


def certify(name: str, *, replicas: bool = True, seed: int = 0, **overrides) -> Certificate:
    """Measure whether a network treats each example on its own.

    The network is built without dropout and stochastic depth, with random weights in place of zeros: a branch or a
    classifier that starts at zero would hide what happens in it.

    Args:
        name: of the zoo.
        replicas: also take a training step on two devices, in a process of its own (TensorFlow: on JAX, replicas
            compute the statistics of the whole batch).
        seed: of weights and images.
        **overrides: of `nfzoo.build`.

    Raises:
        ValueError, TypeError: as `nfzoo.build`.

    Example:
        >>> certify("sn_test_ffnn", replicas=False).independent
        True
    """
    model = _network(name, seed, overrides)
    x, labels = _images(model, 64, seed)
    infer = _grouped(lambda batch: keras.ops.convert_to_numpy(model(batch, training=False)))
    probe = _probe(model)
    whole = {n: probe(x[:n], labels[:n]) for n in (8, 64)}
    outputs, gradients = zip(*(probe(x[i : i + 1], labels[i : i + 1]) for i in range(8)), strict=True)
    differences = {
        "inference": _difference(infer(x[:8], 8), infer(x[:8], 1)),
        "training": _difference(whole[8][0], np.concatenate(outputs)),
        "batch size": _difference(whole[64][0][:1], outputs[0]),
        "gradients": _difference(whole[8][1], sum(gradients)),
    }
    # Another process does not know what this one has registered.
    if replicas and name not in names.USER_MODELS and keras.backend.backend() == "tensorflow":
        differences["replicas"] = _replicas(name, seed, overrides)
    return Certificate(name, overrides, differences)


def _network(name: str, seed: int, overrides: dict) -> keras.Model:
    keras.utils.set_random_seed(seed)
    still = {
        key: 0.0 for key in ("dropout_rate", "drop_path_rate") if name not in names.USER_MODELS and _has(name, key)
    }
    model = registry.build(name, **{**still, "input_shape": _shape(name), **overrides})
    for layer in model._flatten_layers():  # of a registered network
        if isinstance(layer, keras.layers.Dropout | layers.StochasticDepth):
            layer.rate = 0.0
    rng = np.random.default_rng(seed)
    for v in model.trainable_variables:
        value = keras.ops.convert_to_numpy(v)
        scale = 0.1 if value.ndim < 2 else np.prod(value.shape[:-1]) ** -0.5
        if value.ndim < 2 or not value.any():
            v.assign(value + scale * rng.standard_normal(value.shape))
    return model


def _has(name: str, field: str) -> bool:
    return hasattr(names.parse(name).spec, field)


def _shape(name: str) -> tuple | None:
    """A small image that every stride still halves: how much is computed does not matter here."""
    if name in names.USER_MODELS:
        return None
    spec = names.parse(name).spec
    smallest = getattr(spec, "min_size", 1)
    return *(max(min(side, 64), smallest) for side in spec.input_shape[:2]), spec.input_shape[2]


def _images(model: keras.Model, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise whose mean and deviation differ from one image to the next, so that statistics of a batch show."""
    rng = np.random.default_rng([seed, 1])
    shape = [side or 64 for side in model.input_shape[1:]]
    x = rng.standard_normal((n, *shape)) * rng.uniform(0.5, 2, (n, 1, 1, 1)) + rng.uniform(-1, 1, (n, 1, 1, 1))
    return x.astype("float32"), rng.integers(0, model.output_shape[-1], n).astype("int32")


def _grouped(function: Callable) -> Callable:
    return lambda x, size: np.concatenate([function(x[at : at + size]) for at in range(0, len(x), size)])


def _probe(model: keras.Model) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Outputs in training mode, and the gradient of the loss summed over the batch; the model stays as it is."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
    run = backend.signals(
        model,
        {"output": model.layers[-1]},
        lambda x, y, outputs: loss(y, outputs),
        lambda seen, weights, at_taps, gradients: (seen["output"], gradients),
    )

    def measured(x, y):
        output, gradients = keras.tree.map_structure(keras.ops.convert_to_numpy, run(x, y))
        return output, _flat(gradients.values())

    return measured


def _flat(arrays: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([array.ravel() for array in arrays])


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    largest = max(float(np.abs(a).max()), float(np.abs(b).max()))
    return float(np.abs(a - b).max()) / largest if largest else 0.0


def _replicas(name: str, seed: int, overrides: dict) -> float:
    request = json.dumps({"name": name, "seed": seed, "overrides": overrides})
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-m", "nfzoo.certify"]
    process = subprocess.run(command, input=request, capture_output=True, text=True, env=environment)
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"Expected a training step on two devices. Received: {last}")
    return json.loads(process.stdout.strip().splitlines()[-1])


def _step(name: str, seed: int, overrides: dict) -> np.ndarray:
    """How one step of SGD on 16 images changes the weights."""
    model = _network(name, seed, overrides)
    before = [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]
    model.compile(keras.optimizers.SGD(1.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(*_images(model, 16, seed), batch_size=16, shuffle=False, verbose=0)
    return _flat(keras.ops.convert_to_numpy(v) - b for v, b in zip(model.trainable_variables, before, strict=True))


def _main(request: dict) -> None:
    backend.split_cpu(2)
    one = _step(**request)
    with backend.data_parallel():
        two = _step(**request)
    print(json.dumps(_difference(one, two)))


if __name__ == "__main__":
    _main(json.load(sys.stdin))
