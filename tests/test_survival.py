"""Runs that are killed, stopped, poisoned, locked out or starved end as if nothing had happened, or say what did."""

import dataclasses
import io
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pandas as pd
import pytest
from conftest import kill_after, slow_but
from killed import STEPS
from rich.console import Console

from nfzoo import callbacks, data, engine, recipes
from nfzoo.engine import folder as folders
from nfzoo.engine import training

SCRIPT = pathlib.Path(__file__).with_name("killed.py")
MODEL, BUILD = "sn_test_ffnn", {"dropout_rate": 0.3}


@pytest.fixture
def console():
    return Console(record=True, width=200, file=io.StringIO())


def _process(out, point):
    return subprocess.run([sys.executable, SCRIPT, out, point], capture_output=True, text=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    process = _process(out, "never")
    assert process.returncode == 0, process.stderr[-3000:]
    return out


def _assert_same(out, whole):
    """Weights, optimizer, averages and random states; history, metrics, signals: to the last bit, but for times."""
    one, other = (engine.load_run(f) for f in (out, whole))
    for model in (one, other):
        assert model.optimizer.use_ema
    pairs = zip([*one.weights, *one.optimizer.variables], [*other.weights, *other.optimizer.variables], strict=True)
    for a, b in pairs:
        np.testing.assert_array_equal(a, b)
    histories = [pd.read_csv(f / "history.csv").drop(columns="seconds") for f in (out, whole)]
    pd.testing.assert_frame_equal(*histories, check_exact=True)
    times = ("seconds", "images_per_second")
    metrics = [{k: v for k, v in engine.read_metrics(f).items() if k not in times} for f in (out, whole)]
    assert metrics[0] == metrics[1]
    for name in ("spp.jsonl", "spp_meta.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}


@pytest.mark.slow
def test_a_seed_decides_everything(whole, tmp_path):
    assert _process(tmp_path / "run", "never").returncode == 0
    _assert_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_killed_twenty_times_it_ends_as_if_never(whole, tmp_path):
    """At random steps, in any epoch, and inside the writing of checkpoints."""
    out, draw = tmp_path / "run", random.Random(0)
    inside = ["write", "rename", "describe"]
    points = [str(draw.randint(1, 2 * STEPS)) for _ in range(20 - 2 * len(inside))] + 2 * inside
    draw.shuffle(points)
    kills, began = 0, 0
    for point in points:
        process = _process(out, point)
        assert process.returncode in (-signal.SIGKILL, 0), process.stderr[-3000:]
        kills += process.returncode == -signal.SIGKILL
        if process.returncode == 0:  # it came to its end before the point: once more from the start
            _assert_same(out, whole)
            shutil.rmtree(out)
            began += 1
    assert kills >= 15 and began <= 4
    assert _process(out, "never").returncode == 0
    _assert_same(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("step", [STEPS + 2, 2 * STEPS, 5 * STEPS])
def test_sigterm_saves_and_ends(whole, tmp_path, step):
    out = tmp_path / "run"
    process = _process(out, f"term {step}")
    assert process.returncode == 128 + signal.SIGTERM, process.stderr[-3000:]
    kept = {p.name for p in (out / "checkpoints").iterdir()}
    newest = "model-1-2" if step % STEPS else f"model-{step // STEPS}"
    assert {f"{newest}.keras", f"{newest}.json"} <= kept and not (out / ".lock").exists()
    assert _process(out, "never").returncode == 0
    _assert_same(out, whole)


# ---------------------------------------------------------------- in this process
def _recipe(**changes):
    small = {"data.name": "fake", "epochs": 3, "batch_size": 64, "data.limit": 256, "agc": "none"}
    return recipes.override(recipes.get("demo"), {**small, **changes})


def _run(out, console, recipe=None, model=MODEL):
    return engine.run(model, recipe or _recipe(), out, overrides=BUILD, taps=None, console=console)


@pytest.mark.parametrize("model", slow_but(["bn_test_ffnn"], [MODEL, "bn_test_ffnn"]))
def test_a_run_that_stops_behind_its_last_checkpoint_ends_as_an_undisturbed_one(model, tmp_path, monkeypatch, console):
    """The checkpoint holds the weights; the network of the run is their average, and the figures are its own."""
    recipe = _recipe(ema=0.9, epochs=2)
    expected = _run(tmp_path / "whole", console, recipe, model)
    with monkeypatch.context() as patch:
        patch.setattr(training, "_metrics", lambda *_: pytest.fail("stopped"))
        with pytest.raises(pytest.fail.Exception):
            _run(tmp_path / "stopped", console, recipe, model)
    got = _run(tmp_path / "stopped", console, recipe, model)
    different = ("seconds", "images_per_second")
    assert {k: v for k, v in got.items() if k not in different} == {
        k: v for k, v in expected.items() if k not in different
    }
    assert got["test_loss"] != got["test_loss_without_average"]
    nets = [engine.load_run(tmp_path / name) for name in ("whole", "stopped")]
    for a, b in zip(*(net.get_weights() for net in nets), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_average_is_judged_and_kept_with_statistics_of_its_own(tmp_path, console):
    """Those of the other weights would normalize it wrongly; the training goes on as if nobody had measured."""
    recipe = _recipe(**{"ema": 0.9, "optimizer.learning_rate": 0.02})
    metrics = _run(tmp_path / "run", console, recipe, "bn_test_ffnn")
    net = engine.load_run(tmp_path / "run")
    batches = data.pipeline(data.load(recipe.data, recipe.seed), recipe)
    first = net.get_layer("hidden_norm1")
    seen = keras.Model(net.input, first.input)
    assert first.momentum == 0.9  # the recipe's
    taken = [np.asarray(seen(batches["train"][n][0])) for n in range(min(16, len(batches["train"])))]
    for moving, expected in (
        (first.moving_mean, np.mean([x.mean(0) for x in taken], axis=0)),
        (first.moving_variance, np.mean([x.var(0) for x in taken], axis=0)),
    ):
        np.testing.assert_allclose(np.asarray(moving), expected, rtol=1e-4, atol=1e-5)
    last = pd.read_csv(tmp_path / "run" / "history.csv").iloc[-1]
    judged = net.evaluate(batches["validation"], verbose=0, return_dict=True)
    assert judged["loss"] == pytest.approx(last.val_loss, rel=1e-5) and last.val_loss == metrics["val_loss"]
    plain = _run(tmp_path / "plain", console, _recipe(**{"optimizer.learning_rate": 0.02}), "bn_test_ffnn")
    assert plain["test_loss"] == pytest.approx(metrics["test_loss_without_average"], rel=1e-6)
    assert plain["loss"] == pytest.approx(metrics["loss"], rel=1e-6)


@pytest.mark.slow
def test_an_average_has_statistics_of_its_own_on_jax_too(tmp_path, fresh_process):
    code = """
import io, json, sys
import keras, numpy as np
from rich.console import Console
from nfzoo import data, engine, recipes
small = {"data.name": "fake", "epochs": 2, "batch_size": 64, "data.limit": 256, "agc": "none"}
found = {}
for name, ema in (("average", 0.9), ("plain", None)):
    recipe = recipes.override(recipes.get("demo"), {**small, "optimizer.learning_rate": 0.02, "ema": ema})
    options = {"overrides": {"dropout_rate": 0.3}, "taps": None, "console": Console(file=io.StringIO())}
    found[name] = engine.run("bn_test_ffnn", recipe, f"{sys.argv[1]}/{name}", **options)
net = engine.load_run(f"{sys.argv[1]}/average")
batches = data.pipeline(data.load(recipe.data, recipe.seed), recipe)["train"]
norm = net.get_layer("hidden_norm1")
seen = keras.Model(net.input, norm.input)
mean = np.mean([np.asarray(seen(batches[n][0])).mean(0) for n in range(len(batches))], axis=0)
found["off"] = float(np.abs(np.asarray(norm.moving_mean) - mean).max() / np.abs(mean).max())
print(json.dumps(found))
"""
    found = fresh_process(code, str(tmp_path), KERAS_BACKEND="jax")
    assert found["off"] < 1e-4
    assert found["plain"]["test_loss"] == pytest.approx(found["average"]["test_loss_without_average"], rel=1e-5)


def test_a_lock_on_a_file_that_was_taken_away_is_none(tmp_path, monkeypatch):
    """Its holder ended between our opening and our locking it: the next process would lock another file."""
    lock = folders.fcntl.flock

    def late(file, how):
        lock(file, how)
        (tmp_path / "run" / ".lock").unlink()

    monkeypatch.setattr(folders.fcntl, "flock", late)
    with pytest.raises(ValueError, match="no other process"), folders.locked(tmp_path / "run"):
        pass


def test_a_run_goes_on_as_it_began_or_not_at_all(tmp_path, monkeypatch, console):
    """Other images, another backend, other layers watched: each would be half of another run."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(training, "_metrics", lambda *_: pytest.fail("stopped"))
        with pytest.raises(pytest.fail.Exception):
            engine.run(MODEL, _recipe(epochs=1), out, overrides=BUILD, taps="blocks", console=console)

    def goes_on(taps="blocks", **options):
        return engine.run(MODEL, _recipe(epochs=1), out, overrides=BUILD, taps=taps, console=console, **options)

    before = (out / "options.json").read_text()
    with pytest.raises(ValueError, match="go on as it began.*taps was 'blocks', now 'layers'"):
        goes_on("layers")
    with pytest.raises(ValueError, match="signals was {}, now {'every': 2}"):
        goes_on(signals={"every": 2})
    load = data.load
    with monkeypatch.context() as patch:
        patch.setattr(data, "load", lambda *args: dataclasses.replace(load(*args), mean=(0.1, 0.2, 0.3)))
        with pytest.raises(ValueError, match=r"images was .*0\.1, 0\.2, 0\.3"):
            goes_on()
    (out / "options.json").write_text(before.replace('"backend": "tensorflow"', '"backend": "jax"'))
    with pytest.raises(ValueError, match="backend was 'jax', now 'tensorflow'"):
        goes_on()
    (out / "options.json").write_text(before.replace('"devices": 1', '"devices": 2'))
    assert goes_on()["status"] == "complete" and "devices was 2, now 1" in console.export_text()


class _StopsAtSix(callbacks.StopOnNaN):
    """SIGTERM comes at the sixth step of a run, the second of its second epoch."""

    def on_train_batch_end(self, batch, logs=None):
        if (self.model.optimizer.iterations == 6).numpy():
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_within_an_epoch(tmp_path, monkeypatch, console):
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(callbacks, "StopOnNaN", _StopsAtSix)
        with pytest.raises(SystemExit) as end:
            _run(tmp_path / "a", console)
    assert end.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    assert "after step 2 of epoch 2; the same command goes on there" in console.export_text(clear=False)
    stopped = _run(tmp_path / "a", console)
    assert "resuming" in console.export_text() and stopped["epochs"] == 3
    _run(tmp_path / "b", console)
    one, other = (engine.load_run(tmp_path / name) for name in ("a", "b"))
    states = ([*net.weights, *net.optimizer.variables] for net in (one, other))
    for a, b in zip(*states, strict=True):
        np.testing.assert_array_equal(a, b)
    columns = ["loss", "accuracy", "val_loss"]
    histories = [pd.read_csv(tmp_path / n / "history.csv")[columns] for n in ("a", "b")]
    pd.testing.assert_frame_equal(*histories, check_exact=True)


def test_a_second_process_is_refused(tmp_path, console):
    out = tmp_path / "run"
    code = (
        "import fcntl, pathlib, sys, time\n"
        "file = pathlib.Path(sys.argv[1], '.lock').open('a'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True); time.sleep(60)"
    )
    out.mkdir()
    with subprocess.Popen([sys.executable, "-c", code, out], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="no other process trains in"):
            _run(out, console)
        other.kill()
    assert _run(out, console)["status"] == "complete"  # the lock ended with its holder


def test_a_folder_that_cannot_be_written(console):
    with pytest.raises(OSError, match="Read-only|Permission|not permitted|No such file"):
        _run("/proc/run", console)


@pytest.mark.slow
def test_a_disk_without_room_leaves_what_was_whole(whole, tmp_path):
    """A limit on the size of files ends the writing of a checkpoint as a full disk does: in the middle."""
    out = tmp_path / "run"
    assert _process(out, str(2 * STEPS)).returncode == -signal.SIGKILL
    (kept,) = callbacks.pairs(out / "checkpoints")
    limited = f"ulimit -f {kept.stat().st_size // 2 // 1024}; exec {sys.executable} {SCRIPT} {out} never"
    process = subprocess.run(["bash", "-c", limited], capture_output=True, text=True)
    assert process.returncode not in (0, None) and "Error" in process.stderr
    assert callbacks.pairs(out / "checkpoints") == [kept]
    assert _process(out, "never").returncode == 0
    _assert_same(out, whole)


def test_a_clock_that_goes_backwards(tmp_path, monkeypatch, console):
    start, calls = time.time(), iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: start - 3600 * next(calls))
    original = callbacks.Checkpoints.on_epoch_end

    def on_epoch_end(self, epoch, logs=None):
        original(self, epoch, logs)
        for path in self.folder.iterdir():
            os.utime(path, (0, 10**9 - 10**6 * epoch))
        if epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Checkpoints, "on_epoch_end", on_epoch_end)
        with pytest.raises(KeyboardInterrupt):
            _run(tmp_path / "run", console)
    assert _run(tmp_path / "run", console)["seconds"] > 0
    assert "after epoch 2" in console.export_text()


@pytest.mark.parametrize(
    ("poison", "rate", "step", "named"),
    [
        (np.nan, 0.01, 3, "images of the batch"),
        (3e38, 0.01, 3, "output of hidden_linear1"),
        (1e30, 1e30, 4, "weights of hidden_linear1"),
    ],
)
def test_the_first_bad_layer_is_named(tmp_path, monkeypatch, console, poison, rate, step, named):
    """An input, or an update, that overflows at the third step of the second epoch, after a checkpoint of the first."""
    original = data.Batches.__getitem__

    def getitem(self, at):
        x, y = original(self, at)
        return (np.full_like(x, poison) if self.shuffle and self.epoch == 1 and at + self.window[0] == 2 else x), y

    monkeypatch.setattr(data.Batches, "__getitem__", getitem)
    recipe = _recipe(**{"optimizer.name": "sgd", "optimizer.learning_rate": 1e-30, "schedule.name": "step"})
    recipe = recipes.override(recipe, {"schedule.milestones": [1.5], "schedule.factor": rate / 1e-30})
    metrics = _run(tmp_path / "run", console, recipe)
    assert (metrics["status"], metrics["epochs"], metrics["diverged_at_step"]) == ("diverged", 1, step)
    assert metrics["diverged_in"] == named
    with pytest.warns(UserWarning, match="checkpoint after epoch 1"):
        assert np.isfinite(engine.load_run(tmp_path / "run").get_weights()[0]).all()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics


def test_the_step_of_a_divergence_counts_from_the_start_of_its_epoch(tmp_path, monkeypatch, console):
    """Also in the rest of an epoch that SIGTERM had cut in two, which is a `fit` of its own."""
    original = data.Batches.__getitem__

    def getitem(self, at):
        x, y = original(self, at)
        return (np.full_like(x, np.nan) if self.shuffle and self.epoch == 1 and at + self.window[0] == 3 else x), y

    monkeypatch.setattr(data.Batches, "__getitem__", getitem)
    with monkeypatch.context() as patch:
        patch.setattr(callbacks, "StopOnNaN", _StopsAtSix)
        with pytest.raises(SystemExit):
            _run(tmp_path / "run", console)
    metrics = _run(tmp_path / "run", console)
    assert (metrics["status"], metrics["diverged_at_step"]) == ("diverged", 4)
    assert metrics["diverged_in"] == "images of the batch"


def test_weights_that_the_loss_hides(tmp_path, monkeypatch, console):
    """ReLU makes zeros of NaN: the network is dead, and its loss is that of a constant."""
    original = data.Batches.__getitem__

    def getitem(self, at):
        x, y = original(self, at)
        return (np.full_like(x, np.inf) if self.shuffle and self.epoch == 1 and at == 2 else x), y

    monkeypatch.setattr(data.Batches, "__getitem__", getitem)
    metrics = _run(tmp_path / "run", console, model="none_test_ffnn")
    assert (metrics["status"], metrics["epochs"]) == ("diverged", 1) and np.isfinite(metrics["test_loss"])
    assert metrics["diverged_in"] == "weights of hidden_linear1"
    with pytest.warns(UserWarning, match="checkpoint after epoch 1"):
        assert all(np.isfinite(w).all() for w in engine.load_run(tmp_path / "run").get_weights())


@pytest.mark.slow
def test_moving_averages_are_judged_and_kept(tmp_path, console):
    recipe = _recipe(ema=0.9)
    metrics = _run(tmp_path / "run", console, recipe)
    net = engine.load_run(tmp_path / "run")
    averages = net.optimizer._model_variables_moving_average
    for weight, average in zip(net.trainable_variables, averages, strict=True):
        np.testing.assert_array_equal(weight, average)
    assert engine.evaluate(tmp_path / "run")["loss"] == pytest.approx(metrics["test_loss"], abs=1e-6)
    assert metrics["test_loss"] != metrics["test_loss_without_average"]
    plain = _run(tmp_path / "plain", console)
    assert plain["test_loss"] == pytest.approx(metrics["test_loss_without_average"], rel=1e-6)


def test_an_empty_folder_is_not_left_behind(tmp_path, console):
    with pytest.raises(ValueError):
        engine.run(MODEL, _recipe(), tmp_path / "run", taps="nothing_*", console=console)
    assert not (tmp_path / "run").exists()
    with folders.locked(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").exists()
    assert not (tmp_path / "run").exists()


def test_settings_that_fail_when_the_network_compiles_leave_no_folder(tmp_path, console):
    with pytest.raises(ValueError, match="nothere"):
        _run(tmp_path / "run", console, _recipe(**{"optimizer.groups": [{"pattern": "nothere"}]}))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_was_written_badly(tmp_path, monkeypatch, console):
    """Half a zip is noticed before it takes a checkpoint's name; one that does not load is passed over."""
    out, save = tmp_path / "run", callbacks.keras.Model.save

    def half(self, path, **options):
        save(self, path, **options)
        if "model-2" in str(path):
            content = pathlib.Path(path).read_bytes()
            pathlib.Path(path).write_bytes(content[: len(content) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.keras.Model, "save", half)
        with pytest.raises(Exception, match="zip|whole checkpoint"):
            _run(out, console)
    assert [p.name for p in callbacks.pairs(out / "checkpoints")] == ["model-1.keras"]
    load = callbacks.keras.saving.load_model
    (out / "checkpoints" / "model-2.keras").write_bytes(b"no model")
    said = json.loads((out / "checkpoints" / "model-1.json").read_text())
    del said["digest"]  # as an older nfzoo wrote it
    said |= {"epoch": 2, "sha256": callbacks.sha256(out / "checkpoints" / "model-2.keras")}
    (out / "checkpoints" / "model-2.json").write_text(json.dumps(said))
    assert _run(out, console)["status"] == "complete" and load is callbacks.keras.saving.load_model
    text = console.export_text()
    assert "model-2.keras does not load" in text and "after epoch 1" in text


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
def test_signals_of_half_precision_resume(tmp_path, monkeypatch, console, accumulate):
    """A loss scale leaves out steps whose gradient overflows: the optimizer counts fewer than the run."""
    changes = {"precision": "mixed_float16", "optimizer.accumulate": accumulate}
    made, logs = keras.optimizers.LossScaleOptimizer.__init__, []

    def overflowing(self, inner, **options):
        made(self, inner, **{**options, "initial_scale": 2.0**30})

    monkeypatch.setattr(keras.optimizers.LossScaleOptimizer, "__init__", overflowing)
    for stop in (False, True):
        out = tmp_path / str(stop)
        if stop:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                kill_after(patch, 2, KeyboardInterrupt)
                engine.run(MODEL, _recipe(**changes), out, overrides=BUILD, console=console)
        engine.run(MODEL, _recipe(**changes), out, overrides=BUILD, console=console)
        logs.append((out / "spp.jsonl").read_text())
    steps = [sorted({json.loads(line)["step"] for line in log.splitlines()}) for log in logs]
    assert steps[0] == steps[1] == [0, 4, 8, 12]
