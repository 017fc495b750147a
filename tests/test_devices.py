"""One run on several devices gives the curve of one run on one: replicas on TensorFlow, processes on JAX."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pandas as pd
import pytest

from nfzoo import engine, recipes, spp

SMALL = {"data.name": "fake", "data.limit": 60, "epochs": 2, "batch_size": 16, "agc": 0.05, "ema": 0.9}
# The last batch of 12 divides among two; validation images beyond a multiple of two would be left out.
ARGUMENTS = ["sn_test_ffnn", *(f"--set={path}={value}" for path, value in SMALL.items())]
ENTRY = [sys.executable, "-m", "nfzoo.cli", "train"]


def _curve(folder: pathlib.Path) -> pd.DataFrame:
    return pd.read_csv(folder / "history.csv")[["loss", "accuracy", "agc_clipped"]]


def _assert_one_curve(one, other):
    pd.testing.assert_frame_equal(_curve(one), _curve(other), rtol=1e-5)
    a, b = (engine.load_run(folder).get_weights() for folder in (one, other))
    for x, y in zip(a, b, strict=True):
        assert abs(x - y).max() < 1e-5
    signals = [spp.read(folder)[["step", "kind", "layer", "acv"]] for folder in (one, other)]
    pd.testing.assert_frame_equal(*signals, rtol=1e-3)


@pytest.mark.slow
def test_replicas_of_one_machine(tmp_path, fresh_process):
    code = f"""
import json, sys
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from rich.console import Console
from nfzoo import engine, recipes
recipe = recipes.override(recipes.get("demo"), json.loads('{json.dumps(SMALL)}'))
for name, mirrored in (("one", False), ("two", True)):
    devices = engine.Devices(mirrored=mirrored)
    engine.run("nf_test_resnet", recipe, f"{{sys.argv[1]}}/{{name}}", console=Console(quiet=True), devices=devices)
print(json.dumps(len(tf.config.list_logical_devices("CPU"))))
"""
    assert fresh_process(code, tmp_path) == 2
    _assert_one_curve(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bn_test_ffnn", "rescale_test_resnet"])
def test_replicas_keep_one_state(model, tmp_path, fresh_process):
    """Each sees a part of the batch; what is scored and what is saved has the statistics of all."""
    code = f"""
import json, sys
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from rich.console import Console
from nfzoo import engine, recipes
recipe = recipes.override(recipes.get("demo"), json.loads('{json.dumps({**SMALL, "epochs": 1, "agc": None})}'))
devices = engine.Devices(mirrored=True)
print(json.dumps(engine.run("{model}", recipe, sys.argv[1], console=Console(quiet=True), devices=devices)))
"""
    metrics = fresh_process(code, tmp_path / "run")
    found = engine.evaluate(tmp_path / "run")
    assert found["loss"] == pytest.approx(metrics["test_loss"], rel=1e-4)
    assert found["accuracy"] == pytest.approx(metrics["test_accuracy"])


@pytest.mark.slow
def test_processes_that_share_each_batch(tmp_path):
    """On loopback, as on several machines."""
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def together(*options):
        shared = [*ENTRY, *ARGUMENTS, "--out", str(tmp_path / "two"), f"--coordinator=localhost:{port}", *options]
        started = [
            subprocess.Popen([*shared, "--processes=2", f"--process-id={i}"], env=environment, stderr=subprocess.PIPE)
            for i in range(2)
        ]
        errors = [process.communicate(timeout=500)[1].decode()[-2000:] for process in started]
        assert [process.returncode for process in started] == [0, 0], errors

    subprocess.run([*ENTRY, *ARGUMENTS, "--out", str(tmp_path / "one")], env=environment, check=True)
    together()
    _assert_one_curve(tmp_path / "one", tmp_path / "two")
    assert {p.name for p in (tmp_path / "two").iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}


@pytest.mark.slow
def test_last_batches_that_do_not_divide(tmp_path):
    """Sixty-one training and fifty-one validation images, for two devices of one JAX process."""
    environment = {**os.environ, "KERAS_BACKEND": "jax", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    odd = [*ENTRY, *ARGUMENTS, "--set=data.limit=61", "--strategy=mirrored", "--out", str(tmp_path / "run")]
    subprocess.run(odd, env=environment, check=True)
    assert engine.read_metrics(tmp_path / "run")["status"] == "complete"


def test_devices_that_cannot_be():
    with pytest.raises(ValueError, match="coordinator=HOST:PORT for processes=2"):
        engine.Devices(processes=2)
    with pytest.raises(ValueError, match=r"0 <= process_id < 2.*Received: 2"):
        engine.Devices(coordinator="localhost:1", processes=2, process_id=2)
    with pytest.raises(ValueError, match="KERAS_BACKEND=jax"):
        engine.Devices(coordinator="localhost:1", processes=2)
    recipe = recipes.override(recipes.get("demo"), {"optimizer.accumulate": 2})
    with pytest.raises(ValueError, match="optimizer.accumulate=1 under --strategy mirrored.*Received: 2"):
        engine.run("sn_test_ffnn", recipe, "nowhere", devices=engine.Devices(mirrored=True))
