"""Settings of all tests: a fixed seed, no device noise, and small helpers that several files share."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import gc
import json
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

# A tenth of the tests' time went into looking for garbage among what Keras and TensorFlow keep for good.
gc.freeze()
gc.set_threshold(50_000, 10, 10)

VARIANTS = ("none", "bn", "gn", "sn", "nf")
LONGEST = "test_killed_twenty_times_it_ends_as_if_never"  # five minutes


def pytest_collection_modifyitems(items):
    """The longest test comes first: last, it would keep one worker while the others have nothing to do."""
    items.sort(key=lambda item: item.name != LONGEST)


@pytest.fixture(autouse=True)
def _fresh():
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("float32")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


@pytest.fixture
def images():
    """Eight noise images of 32x32 and labels of ten classes."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((8, 32, 32, 3)).astype("float32"), rng.integers(0, 10, 8).astype("int32")


@pytest.fixture
def fresh_process():
    """Run Python code in a process of its own and return the JSON that it prints last."""

    def run(code: str, *args: str, fails: bool = False, **environment: str):
        process = subprocess.run(
            [sys.executable, "-c", code, *map(str, args)],
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
            cwd=pathlib.Path(__file__).parent,
        )
        assert (process.returncode != 0) == fails, process.stderr[-3000:]
        return process.stderr if fails else json.loads(process.stdout.strip().splitlines()[-1])

    return run


def slow_but(fast, values):
    """Parameters of a test, of which those that are not in `fast` run with the slow tests."""
    several = [value if isinstance(value, tuple) else (value,) for value in values]
    marks = [() if value in fast else pytest.mark.slow for value in values]
    return [pytest.param(*value, marks=mark) for value, mark in zip(several, marks, strict=True)]


def crossentropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def built(name: str, **options):
    """A model of random weights: the initial ones are alike in many places."""
    import nfzoo

    model, rng = nfzoo.build(name, **{"input_shape": (64, 64, 3), **options}), np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    return model


def same(a, b) -> bool:
    """Whether two models have the same weights, by path."""
    ours, theirs = ({v.path: np.asarray(v) for v in model.weights} for model in (a, b))
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture(scope="session")
def tiny_timm():
    """A tiny network of three classes, and its tensors as timm has them."""
    from nfzoo.convert import driver

    model = built("test_nfnet", classes=3)
    return model, driver.as_tensors(model)


def kill_after(monkeypatch, epoch, error):
    """Die right after the checkpoint of an epoch, as a SIGKILL would: nothing later runs."""
    from nfzoo import callbacks

    original = callbacks.Checkpoints.on_epoch_end

    def on_epoch_end(self, number, logs=None):
        original(self, number, logs)
        if number + 1 == epoch:
            raise error

    monkeypatch.setattr(callbacks.Checkpoints, "on_epoch_end", on_epoch_end)
