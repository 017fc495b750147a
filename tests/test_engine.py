"""Runs: the folder tells everything, a second call resumes, bad luck is survived and said."""

import errno
import io
import itertools
import json
import pathlib
import subprocess

import keras
import numpy as np
import pandas as pd
import pytest
from conftest import kill_after, slow_but
from rich.console import Console

import nfzoo
from nfzoo import backend, callbacks, data, engine, names, recipes, spp
from nfzoo.engine import folder, learning

MODEL = "sn_test_ffnn"
BUILD = {"dropout_rate": 0.3}


@pytest.fixture
def console():
    return Console(record=True, width=200, file=io.StringIO())


def _recipe(**changes):
    small = {"data.name": "fake", "epochs": 4, "batch_size": 64, "data.limit": 128, "agc": 0.1}
    return recipes.override(recipes.get("demo"), {**small, **changes})


def _weights(folder):
    return [np.array(w) for w in engine.load_run(folder).get_weights()]


class _Killed(Exception):
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, engine.run(MODEL, _recipe(), folder, overrides=BUILD, console=Console(quiet=True))


def test_a_run_leaves_its_record(whole):
    folder, metrics = whole
    names = {p.name for p in folder.iterdir()}
    assert names == {"options.json", "history.csv", "metrics.json", "spp.jsonl", "spp_meta.json", "model.keras"}
    options = engine.read_options(folder)
    assert options["model"] == MODEL and options["build"] == BUILD
    assert recipes.Recipe.model_validate(options["recipe"]) == _recipe()
    assert {"versions", "commit", "machine", "command", "fingerprint"} <= options.keys()
    history = pd.read_csv(folder / "history.csv")
    assert history.epoch.tolist() == [1, 2, 3, 4]
    assert {"loss", "accuracy", "val_loss", "val_accuracy", "agc_clipped"} <= set(history.columns)
    assert metrics["status"] == "complete" and metrics["val_accuracy"] == history.val_accuracy.iloc[-1]
    assert spp.read(folder).epoch.unique().tolist() == [0, 1, 2, 3, 4]


def test_it_learns(whole):
    history = pd.read_csv(whole[0] / "history.csv")
    assert history.loss.iloc[-1] < history.loss.iloc[0]


def test_the_same_command_again_returns_the_result(whole, console, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *a: pytest.fail("it trained again"))
    again = engine.run(MODEL, _recipe(), whole[0], overrides=BUILD, console=console)
    assert again == whole[1] and "nothing to do" in console.export_text()


def test_a_finished_run_is_what_was_asked_for(whole, tmp_path, console):
    """Not a record of other layers, nor a run without the test that is wanted now."""
    for asked in ({"taps": "layers"}, {"taps": None}, {"signals": {"statistics": "all"}}):
        with pytest.raises(ValueError, match="to go on as it began.*(taps|signals) was"):
            engine.run(MODEL, _recipe(), whole[0], overrides=BUILD, console=console, **asked)
    run = lambda **test: engine.run(MODEL, _recipe(epochs=1), tmp_path / "run", taps=None, console=console, **test)  # noqa: E731
    untested = run(test=False)
    with pytest.raises(ValueError, match="nfzoo eval"):
        run()
    assert run(test=False) == untested


def test_a_run_that_goes_on_by_other_code_tells_both(tmp_path, monkeypatch, console):
    out, commits = tmp_path / "run", iter(["aaaa", "bbbb", "bbbb", "bbbb"])
    monkeypatch.setattr(folder, "_commit", lambda: next(commits))
    for epoch in (1, 2, 3):
        with monkeypatch.context() as patch:
            kill_after(patch, epoch, _Killed)
            with pytest.raises(_Killed):
                engine.run(MODEL, _recipe(epochs=4), out, taps=None, console=console)
    engine.run(MODEL, _recipe(epochs=4), out, taps=None, console=console)
    options = engine.read_options(out)
    assert options["commit"] == "aaaa" and [part["commit"] for part in options["continued"]] == ["bbbb"]
    assert console.export_text().count("commit was aaaa, now bbbb") == 1


def test_a_run_that_has_not_ended_is_judged_by_its_average(tmp_path, monkeypatch, console):
    out, recipe = tmp_path / "run", _recipe(ema=0.9, epochs=3)
    with monkeypatch.context() as patch:
        kill_after(patch, 2, _Killed)
        with pytest.raises(_Killed):
            engine.run(MODEL, recipe, out, taps=None, console=console)
    with pytest.warns(UserWarning, match="checkpoint after epoch 2"):
        net = engine.load_run(out)
    raw = keras.saving.load_model(out / "checkpoints" / "model-2.keras")
    averages = raw.optimizer._model_variables_moving_average
    for weight, average in zip(net.trainable_variables, averages, strict=True):
        np.testing.assert_array_equal(weight, average)
    assert not all(map(np.array_equal, net.get_weights(), raw.get_weights()))


def test_a_run_without_an_update_is_refused(tmp_path, console):
    """Two batches an epoch."""
    with pytest.raises(ValueError, match=r"optimizer\.accumulate=3.*Received: 2 in 1 epoch"):
        engine.run(MODEL, _recipe(epochs=1, **{"optimizer.accumulate": 3}), tmp_path / "run", console=console)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "epoch"),
    slow_but([(MODEL, 3)], [(MODEL, 1), (MODEL, 3), ("nf_test_efficientnet", 2)]),
)
def test_a_killed_run_ends_as_an_uninterrupted_one(whole, model, epoch, tmp_path, monkeypatch, console):
    """Same weights, history and signals, dropout and stochastic depth included."""
    folder, build = tmp_path / "run", BUILD
    run = lambda to: engine.run(model, _recipe(), to, overrides=build, console=console)  # noqa: E731
    if model != MODEL:
        build = {**BUILD, "drop_path_rate": 0.2}
        whole = (tmp_path / "whole", run(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        kill_after(patch, epoch, _Killed)
        with pytest.raises(_Killed):
            run(folder)
    assert not (folder / "metrics.json").exists()
    run(folder)
    assert f"after epoch {epoch}" in console.export_text()
    for a, b in zip(_weights(folder), _weights(whole[0]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5)
    drop = ["seconds"]
    pd.testing.assert_frame_equal(
        pd.read_csv(folder / "history.csv").drop(columns=drop), pd.read_csv(whole[0] / "history.csv").drop(columns=drop)
    )
    signals, expected = (spp.read(f)[["step", "epoch", "kind", "layer"]] for f in (folder, whole[0]))
    pd.testing.assert_frame_equal(signals, expected)


def test_ctrl_c_resumes(tmp_path, monkeypatch, console):
    folder = tmp_path / "[red]run"
    with monkeypatch.context() as patch:
        kill_after(patch, 1, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.run(MODEL, _recipe(epochs=2), folder, taps=None, console=console)
    assert engine.run(MODEL, _recipe(epochs=2), folder, taps=None, console=console)["epochs"] == 2
    assert "[red]run after epoch 1" in console.export_text()


@pytest.mark.parametrize(
    "damage",
    slow_but(["truncate", "figure"], ["truncate", "flip", "no description", "half a description", "figure", "no text"]),
)
def test_a_damaged_checkpoint_is_passed_over_aloud(damage, tmp_path, monkeypatch, console):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_after(patch, 2, _Killed)
        with pytest.raises(_Killed):
            engine.run(MODEL, _recipe(epochs=3), folder, taps=None, console=console)
    newest = folder / "checkpoints" / "model-2.keras"
    content = newest.read_bytes()
    if damage == "truncate":
        newest.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        newest.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    elif damage == "no description":
        newest.with_suffix(".json").unlink()
    elif damage == "half a description":
        newest.with_suffix(".json").write_text('{"epoch": 2, "sha')
    elif damage == "no text":
        newest.with_suffix(".json").write_bytes(b"\xa0" + newest.with_suffix(".json").read_bytes())
    else:  # still JSON, of another past
        said = json.loads(newest.with_suffix(".json").read_text())
        said["history"][0]["loss"] += 1.0
        newest.with_suffix(".json").write_text(json.dumps(said))
    metrics = engine.run(MODEL, _recipe(epochs=3), folder, taps=None, console=console)
    said = console.export_text()
    assert "model-2.keras is damaged" in said and "after epoch 1" in said
    assert metrics["epochs"] == 3


def test_when_every_checkpoint_is_damaged_nothing_is_overwritten(tmp_path, monkeypatch, console):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_after(patch, 1, _Killed)
        with pytest.raises(_Killed):
            engine.run(MODEL, _recipe(), folder, taps=None, console=console)
    (folder / "checkpoints" / "model-1.keras").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="none does"):
        engine.run(MODEL, _recipe(), folder, taps=None, console=console)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, console):
    class Poison(callbacks.StopOnNaN):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                kernel = self.model.get_layer("head").kernel
                kernel.assign(np.full(kernel.shape, np.nan))

    monkeypatch.setattr(callbacks, "StopOnNaN", Poison)
    metrics = engine.run(MODEL, _recipe(), tmp_path / "run", taps=None, console=console)
    assert metrics["status"] == "diverged" and metrics["diverged_at_step"] == 1 and metrics["epochs"] == 2
    assert metrics["test_loss"] is None and 0 <= metrics["test_accuracy"] <= 1
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("*.keras"))
    assert kept == ["model-1.keras", "model-2.keras"]
    with pytest.warns(UserWarning, match="no trained model"):
        assert all(np.isfinite(w).all() for w in _weights(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics


def test_a_high_learning_rate_diverges_for_real(tmp_path, console):
    recipe = _recipe(**{"optimizer.name": "sgd", "optimizer.learning_rate": 1e6, "agc": "none"})
    metrics = engine.run("none_test_ffnn", recipe, tmp_path / "run", taps=None, console=console)
    assert metrics["status"] == "diverged" and metrics["epochs"] < 4


def test_a_full_disk_leaves_no_half_checkpoint(tmp_path, monkeypatch, console):
    folder = tmp_path / "run"
    save = keras.Model.save

    def full(self, path, **kwargs):
        if "partial-model-2" in str(path):
            pathlib.Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(self, path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(keras.Model, "save", full)
        with pytest.raises(OSError, match="No space left"):
            engine.run(MODEL, _recipe(), folder, taps=None, console=console)
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"model-1.keras", "model-1.json"}
    assert engine.run(MODEL, _recipe(), folder, taps=None, console=console)["epochs"] == 4


def test_a_folder_holds_one_run(whole, tmp_path, console):
    with pytest.raises(ValueError, match="holds another one: its recipe"):
        engine.run(MODEL, _recipe(epochs=5), whole[0], overrides=BUILD, console=console)
    with pytest.raises(ValueError, match="its model"):
        engine.run("bn_test_ffnn", _recipe(), whole[0], overrides=BUILD, console=console)
    elsewhere = _recipe(**{"data.data_dir": "/moved", "seeds": [1, 2]})  # neither decides this run
    assert engine.run(MODEL, elsewhere, whole[0], overrides=BUILD, console=console) == whole[1]
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="other files"):
        engine.run(MODEL, _recipe(), tmp_path, console=console)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_an_output_folder_that_cannot_be_made(console):
    with pytest.raises(OSError):
        engine.run(MODEL, _recipe(), "/proc/no/such/place", console=console)


@pytest.mark.parametrize("content", [b'{"model": "nf_te', b'{"model": "\xa0"}'])
def test_damaged_options_are_said(tmp_path, console, content):
    (tmp_path / "options.json").write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        engine.run(MODEL, _recipe(), tmp_path, console=console)


def test_evaluate_gives_the_accuracy_of_the_run(whole):
    folder, metrics = whole
    assert engine.evaluate(folder)["accuracy"] == pytest.approx(metrics["test_accuracy"], abs=1e-6)
    with pytest.raises(ValueError, match="4 classes.*10 classes"):
        engine.evaluate(folder, "digits")
    with pytest.raises(FileNotFoundError, match="folder of a run"):
        engine.evaluate(folder.parent)


def test_evaluate_goes_by_the_names_of_classes(whole, tmp_path):
    folder, metrics = whole
    learned = engine.read_options(folder)["images"]["classes"]
    images = data.load(recipes.Data(name="fake"))
    arrays = {f"{name}_images": split.images for name, split in (("train", images.train), ("test", images.test))}
    for name, order in (("same", learned[::-1]), ("other", ["w", "x", "y", "z"])):
        labels = {f"{s}_labels": len(learned) - 1 - getattr(images, s).labels for s in ("train", "test")}
        np.savez(tmp_path / f"{name}.npz", **arrays, **labels, classes=np.array(order))
    got = engine.evaluate(folder, str(tmp_path / "same.npz"))
    assert got["accuracy"] == pytest.approx(engine.evaluate(folder, "fake")["accuracy"], abs=1e-6)
    with pytest.raises(ValueError, match="4 classes, w, x, y, z"):
        engine.evaluate(folder, str(tmp_path / "other.npz"))


def test_an_alias_gets_what_the_recipe_says_of_its_network():
    recipe = recipes.get("poster")
    for alias in ("efficientnet_b0", "EfficientNetB0", "tf_efficientnet_b0"):
        assert engine.options(alias, recipe)["build"] == engine.options("bn_efficientnet_b0", recipe)["build"]


def test_the_test_split_is_not_read_where_a_choice_follows(tmp_path):
    recipe = recipes.override(recipes.get("demo"), {"data.name": "fake", "epochs": 1})
    metrics = engine.run("sn_test_ffnn", recipe, tmp_path / "run", test=False, taps=None)
    assert metrics["status"] == "complete" and "val_accuracy" in metrics
    assert not [key for key in metrics if key.startswith("test_")]
    assert engine.evaluate(tmp_path / "run")["accuracy"] >= 0


def test_other_data_is_standardized_as_the_training_data(whole, tmp_path):
    images = data.load(recipes.Data(name="fake"))
    bright = images.train.take(images.train.labels == 3)
    arrays = {"train_images": bright.images, "train_labels": bright.labels, "classes": np.array(images.classes)}
    np.savez(tmp_path / "x.npz", **arrays, test_images=images.test.images, test_labels=images.test.labels)
    again = engine.evaluate(whole[0], str(tmp_path / "x.npz"))
    assert again["accuracy"] == pytest.approx(whole[1]["test_accuracy"], abs=1e-6)


def test_every_json_file_of_a_run_is_strict(tmp_path, monkeypatch, console):
    """A metric that is NaN, beside a loss that is not, comes into the checkpoints' history."""

    def check():
        for path in (tmp_path / "run").rglob("*.json*"):
            text = path.read_text()
            for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
                json.loads(part, parse_constant=pytest.fail)

    original = callbacks.Checkpoints.on_epoch_end
    with monkeypatch.context() as patch:
        patch.setattr(
            callbacks.Checkpoints, "on_epoch_end", lambda self, n, logs: original(self, n, {**logs, "extra": np.nan})
        )
        kill_after(patch, 2, _Killed)
        with pytest.raises(_Killed):
            engine.run(MODEL, _recipe(), tmp_path / "run", console=console)
    check()
    assert engine.run(MODEL, _recipe(), tmp_path / "run", console=console)["epochs"] == 4
    check()
    assert pd.read_csv(tmp_path / "run" / "history.csv").extra.isna().all()


def test_divergence_without_validation_images(tmp_path, console):
    recipe = _recipe(**{
        "optimizer.name": "sgd", "optimizer.learning_rate": 1e30, "agc": "none", "epochs": 1, "batch_size": 512,
        "data.validation_fraction": 0,
    })  # fmt: skip
    metrics = engine.run("none_test_ffnn", recipe, tmp_path / "run", taps=None, console=console)
    assert metrics["status"] == "diverged" and not (tmp_path / "run" / "model.keras").exists()


def test_mistakes_leave_no_folder(tmp_path, console):
    with pytest.raises(ValueError, match="nothing_"):
        engine.run(MODEL, _recipe(), tmp_path / "run", taps="nothing_*", console=console)
    with pytest.raises(ValueError, match="classes.*the run decides"):
        engine.run(MODEL, _recipe(), tmp_path / "run", overrides={"classes": 5}, console=console)
    assert not (tmp_path / "run").exists()


def test_mixed_precision_policy_is_the_runs_alone(tmp_path, console):
    recipe = _recipe(epochs=1, precision="mixed_bfloat16")
    engine.run(MODEL, recipe, tmp_path / "run", taps=None, console=console)
    assert keras.config.dtype_policy().name == "float32"
    assert engine.load_run(tmp_path / "run").get_layer("hidden_linear1").compute_dtype == "bfloat16"


def test_the_commit_recorded_is_that_of_nfzoos_own_checkout(tmp_path, monkeypatch):
    """Not of a project around an installed package, nor of one that has a folder nfzoo at its top."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "a project"], check=True)
    for site in (tmp_path / "lib" / "site-packages", tmp_path):
        monkeypatch.setattr(nfzoo, "__file__", str(site / "nfzoo" / "__init__.py"))
        (site / "nfzoo").mkdir(parents=True)
        assert folder._commit() is None
    for name in ("setup.py", "results.csv", "nfzoo/__init__.py"):
        (tmp_path / name).touch()
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "nfzoo"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    (tmp_path / "results.csv").write_text("a measurement")
    assert head.startswith(folder._commit())
    (tmp_path / "nfzoo" / "__init__.py").write_text("changed")
    assert folder._commit() == f"{head[:12]}-dirty"


def test_progress_is_plain_lines_without_a_terminal(tmp_path, console):
    engine.run(MODEL, _recipe(epochs=2), tmp_path / "run", taps=None, console=console)
    lines = console.export_text().strip().splitlines()
    assert len(lines) == 2 and "epoch 2/2" in lines[1] and "images/s" in lines[1] and "0:00 left" in lines[1]


def test_a_registered_model_that_is_a_plain_keras_model_trains_and_is_clipped(tmp_path, console, monkeypatch):
    """`register_model` takes any Keras model; one that is no NFModel has no `compile(agc=…)`."""
    monkeypatch.setitem(names.USER_MODELS, "plain", _plain)
    recipe = _recipe(epochs=2, agc=1e-9)
    recipe = recipes.override(recipe, {"agc.exclude": []})
    assert engine.run("plain", recipe, tmp_path / "run", console=console)["status"] == "complete"
    net = engine.load_run(tmp_path / "run")
    keras.utils.set_random_seed(recipe.seed)
    before = _plain(classes=4, input_shape=(32, 32, 3)).get_weights()
    assert not isinstance(net, nfzoo.NFModel)
    # Clipped to next to nothing, Adam moves weights by its epsilon's share of a step, and no further.
    assert max(np.abs(a - b).max() for a, b in zip(before, net.get_weights(), strict=True)) < 1e-3
    assert engine.run("plain", _recipe(epochs=1, agc=None), tmp_path / "free", console=console)["epochs"] == 1


def _plain(*, classes, input_shape):
    image = keras.Input(input_shape)
    return keras.Model(image, keras.layers.Dense(classes)(keras.layers.Flatten()(image)), name="plain")


def test_a_registered_model_that_ends_with_a_softmax_learns_by_its_own_loss(tmp_path, console, monkeypatch):
    def ended(**options):
        plain = _plain(**options)
        return keras.Model(plain.input, keras.layers.Softmax()(plain.output))

    ends = {}
    for name, build in (("plain", _plain), ("ended", ended)):
        monkeypatch.setitem(names.USER_MODELS, name, build)
        ends[name] = engine.run(name, _recipe(epochs=2, agc=None), tmp_path / name, taps=None, console=console)
    assert ends["ended"]["test_loss"] == pytest.approx(ends["plain"]["test_loss"], rel=1e-4)
    fused = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="softmax")])
    assert [engine.learning.gives_probabilities(net) for net in (fused, _plain(classes=2, input_shape=(4, 4, 3)))] == [
        True,
        False,
    ]


def test_a_class_without_training_images_is_said(tmp_path, console):
    rng = np.random.default_rng(0)
    arrays = {f"{s}_images": rng.integers(0, 255, (8, 8, 8, 3)).astype(np.uint8) for s in ("train", "test")}
    arrays |= {"train_labels": np.arange(8) % 2, "test_labels": np.arange(8) % 3, "classes": np.array(["a", "b", "c"])}
    np.savez(tmp_path / "rare.npz", **arrays)
    recipe = _recipe(epochs=1, batch_size=4, **{"data.name": str(tmp_path / "rare.npz"), "data.limit": None})
    engine.run("sn_test_ffnn", recipe, tmp_path / "run", taps=None, console=console)
    assert "of 3 classes 1 have no training image: c" in console.export_text()


def test_images_are_standardized_once(tmp_path):
    with pytest.raises(ValueError, match="include_preprocessing, which the run decides"):
        engine.run("sn_test_ffnn", _recipe(), tmp_path / "run", overrides={"include_preprocessing": True})


@pytest.mark.parametrize(
    "schedule, told",
    [
        ({"schedule.name": "step", "schedule.milestones": [1]}, "after epoch 1, of 1"),
        ({"schedule.name": "halving", "schedule.start": 1, "schedule.every": 1}, "after epoch 2, of 1"),
        ({"schedule.name": "step"}, 'schedule "step" has no milestones'),
        ({"schedule.name": "step", "schedule.milestones": [0.5]}, None),
        ({"schedule.name": "cosine"}, None),
    ],
)
def test_a_schedule_that_never_falls_is_said(schedule, told, tmp_path, console):
    engine.run(MODEL, _recipe(epochs=1, **schedule), tmp_path / "run", taps=None, console=console)
    text = console.export_text()
    assert ("never falls" in text) == bool(told) and (told or "") in text


def test_the_rest_of_an_epoch_is_told_as_what_it_is(monkeypatch, console):
    """Resumed at step 9 of 10, an epoch has one step left, of 8 images in one second."""
    now = iter(range(100))
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: float(next(now)))
    progress = callbacks.ShowProgress(8, 80, 2, console)
    progress.set_params({"steps": 1})
    progress.on_train_begin()
    progress.on_epoch_begin(0)
    progress.on_epoch_end(0)  # 0.1 epochs in 3 s: 30 s an epoch
    assert "8 images/s" in console.export_text(clear=False) and "0:30 left" in console.export_text()


def test_paths_are_overrides_too(tmp_path):
    given = {"weights": tmp_path / "a.safetensors"}
    assert engine.options(MODEL, _recipe(), given)["build"]["weights"] == str(tmp_path / "a.safetensors")


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="of TensorFlow's input pipeline")
def test_an_epoch_does_not_wait_for_its_input_to_tune_itself():
    """Keras' own data set starts a thread that wakes at longer and longer intervals; an epoch's end waits for it."""
    batches = data.Batches(data.load(_recipe().data).train, 8, (0.5,) * 3, (0.25,) * 3)
    batches.window = (3, 7)
    fed = backend.feed(batches)
    assert not fed.options().autotune.enabled and int(fed.cardinality()) == len(batches) == 4
    for (x, y), (one, two) in zip(fed, (batches[step] for step in range(4)), strict=True):
        np.testing.assert_array_equal(x, one)
        np.testing.assert_array_equal(y, two)


def test_validation_images_are_augmented_anew_every_epoch():
    """As of the epoch that follows, whatever a backend's adapter counts by itself."""
    images = data.load(_recipe().data)
    seen = []

    class Noted(data.Batches):
        def _made(self, epoch, step):
            seen.append(epoch)
            return super()._made(epoch, step)

    train = data.Batches(images.train, 64, images.mean, images.std)
    validation = Noted(images.validation, 64, images.mean, images.std)
    net = learning.new_model(engine.options(MODEL, _recipe()), images, _recipe())
    learning.prepare(net, _recipe(), len(train))
    net.fit(
        backend.feed(train), validation_data=backend.feed(validation), epochs=3, verbose=0, shuffle=False,
        callbacks=[data.EpochClock(train, validation)],
    )  # fmt: skip
    assert [epoch for epoch, _ in itertools.groupby(seen)][-3:] == [1, 2, 3]
