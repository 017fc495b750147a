"""Fine-tuning runs: a new classifier on frozen weights first, then everything; killed anywhere, resumed rightly."""

import io
import json
import os
import pathlib
import zipfile

import keras
import numpy as np
import pytest
from rich.console import Console

import nfzoo
from nfzoo import callbacks, data, engine, recipes, registry, spp, weights
from nfzoo.convert import published
from nfzoo.engine import learning
from nfzoo.export import source

MODEL = "bn_test_ffnn"  # with moving statistics, which have to rest as well
HEAD = {"head/kernel", "head/bias"}
FROZEN, EPOCHS = 2, 4


@pytest.fixture
def console():
    return Console(record=True, width=200, file=io.StringIO())


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Weights of a classifier of seven classes; the data has four."""
    keras.utils.set_random_seed(7)
    return weights.save(nfzoo.build(MODEL, classes=7), tmp_path_factory.mktemp("pretrained") / "seven.safetensors")


@pytest.fixture(scope="module")
def overrides(pretrained):
    return {"weights": str(pretrained), "dropout_rate": 0.3}


def _recipe(**changes):
    small = {
        "data.name": "fake", "data.image_size": 8, "augment.crop_padding": 0, "epochs": EPOCHS, "batch_size": 64,
        "data.limit": 128, "frozen_epochs": FROZEN, "optimizer.learning_rate": 1e-3, "frozen_learning_rate": 1e-2,
    }  # fmt: skip
    return recipes.override(recipes.get("finetune"), {**small, **changes})


class _Killed(Exception):
    pass


@pytest.fixture
def watched(monkeypatch):
    """Weights after each epoch, by epoch and path; `watched["die"] = n` kills the run after the checkpoint of n."""
    seen = {}
    original = callbacks.Checkpoints.on_epoch_end

    def on_epoch_end(self, epoch, logs=None):
        original(self, epoch, logs)
        seen[epoch + 1] = {v.path: np.array(v) for v in self.model.weights}
        if seen.get("die") == epoch + 1:
            raise _Killed

    monkeypatch.setattr(callbacks.Checkpoints, "on_epoch_end", on_epoch_end)
    return seen


def _moved(before: dict, after: dict) -> set[str]:
    return {path for path in after if path not in before or not np.array_equal(before[path], after[path])}


@pytest.mark.parametrize("model", [MODEL, pytest.param("nf_test_resnet", marks=pytest.mark.slow)])
def test_the_classifier_learns_first_and_then_everything(model, watched, tmp_path, console):
    pretrained = weights.save(nfzoo.build(model, classes=7), tmp_path / "seven.safetensors")
    recipe = _recipe(**{"data.image_size": 8 if model == MODEL else 32})
    metrics = engine.run(model, recipe, tmp_path / "run", overrides={"weights": str(pretrained)}, console=console)
    assert metrics["status"] == "complete" and metrics["epochs"] == EPOCHS
    stored = weights.read_safetensors(pretrained)
    for epoch in range(1, FROZEN + 1):
        assert _moved(stored, watched[epoch]) == HEAD == _moved(watched[EPOCHS - 1], watched[EPOCHS]) & HEAD
    assert _moved(watched[1], watched[2]) == HEAD
    assert len(_moved(watched[FROZEN], watched[EPOCHS])) > 0.9 * len(watched[1])
    net = engine.load_run(tmp_path / "run")
    assert net.output_shape == (None, 4) and all(layer.trainable for layer in net.layers)
    assert "epoch 1/4" in console.export_text()
    assert spp.read(tmp_path / "run").step.unique().tolist() == [0, 2, 4, 6, 8]


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [1, FROZEN, 3])
def test_a_killed_run_ends_as_an_uninterrupted_one(epoch, overrides, watched, tmp_path, console):
    """Killed while frozen, at the switch, and after it; dropout and signals included."""
    run = lambda to: engine.run(MODEL, _recipe(), to, overrides=overrides, console=console)  # noqa: E731
    run(tmp_path / "whole")
    whole = dict(watched)
    watched["die"] = epoch
    with pytest.raises(_Killed):
        run(tmp_path / "run")
    del watched["die"]
    run(tmp_path / "run")
    assert f"after epoch {epoch}" in console.export_text()
    for path, value in whole[EPOCHS].items():
        np.testing.assert_allclose(watched[EPOCHS][path], value, atol=1e-6, rtol=1e-5, err_msg=path)
    a, b = (spp.read(tmp_path / f)[["step", "epoch", "kind", "layer"]] for f in ("run", "whole"))
    assert a.equals(b)


def test_each_part_has_its_learning_rate(overrides, monkeypatch, tmp_path, console):
    rates = []
    original = callbacks.Checkpoints.on_epoch_begin

    def on_epoch_begin(self, epoch, logs=None):
        rates.append(round(float(self.model.optimizer.learning_rate), 6))
        original(self, epoch, logs)

    monkeypatch.setattr(callbacks.Checkpoints, "on_epoch_begin", on_epoch_begin)
    engine.run(MODEL, _recipe(epochs=3), tmp_path / "a", overrides=overrides, taps=None, console=console)
    same = _recipe(epochs=3, frozen_learning_rate=None)
    engine.run(MODEL, same, tmp_path / "b", overrides=overrides, taps=None, console=console)
    assert rates == [0.01, 0.01, 0.001, 0.001, 0.001, 0.001]


def test_a_run_may_stay_frozen(overrides, pretrained, watched, tmp_path, console):
    recipe = _recipe(epochs=FROZEN, agc=0.1)
    engine.run(MODEL, recipe, tmp_path / "run", overrides=overrides, taps=None, console=console)
    assert _moved(weights.read_safetensors(pretrained), watched[FROZEN]) == HEAD


def test_a_loss_that_is_not_finite_ends_the_run_before_the_second_part(overrides, monkeypatch, tmp_path, console):
    class Poison(callbacks.StopOnNaN):
        def on_epoch_begin(self, epoch, logs=None):
            kernel = self.model.get_layer("head").kernel
            kernel.assign(np.full(kernel.shape, np.nan))

    monkeypatch.setattr(callbacks, "StopOnNaN", Poison)
    metrics = engine.run(MODEL, _recipe(), tmp_path / "run", overrides=overrides, taps=None, console=console)
    assert metrics["status"] == "diverged" and metrics["epochs"] == 0


def test_where_a_run_diverges_in_its_second_part_is_found(overrides, tmp_path, console):
    """The checkpoint between the parts is compiled for the first, in which the body rests."""
    recipe = _recipe(**{"optimizer.name": "sgd", "optimizer.learning_rate": 1e30, "batch_size": 32})
    metrics = engine.run(MODEL, recipe, tmp_path / "run", overrides=overrides, taps=None, console=console)
    assert metrics["status"] == "diverged" and metrics["epochs"] == FROZEN
    assert metrics["diverged_in"].split()[:2] in (["output", "of"], ["weights", "of"])


def test_a_classifier_of_as_many_classes_is_new_too(tmp_path, watched, console):
    """Ten classes of one set are not the ten of another."""
    path = weights.save(nfzoo.build(MODEL, classes=4), tmp_path / "four.safetensors")
    recipe = _recipe(epochs=1, frozen_epochs=1, frozen_learning_rate=1e-9)
    engine.run(MODEL, recipe, tmp_path / "run", overrides={"weights": str(path)}, taps=None, console=console)
    stored = weights.read_safetensors(path)["head/kernel"]
    assert np.abs(watched[1]["head/kernel"] - stored).mean() > 0.01


@pytest.mark.parametrize("classes", [pytest.param(4, marks=pytest.mark.slow), 7])
def test_published_weights_decide_the_dialect(classes, tmp_path, monkeypatch, console):
    theirs = nfzoo.build("bn_test_efficientnet", dialect="timm", classes=classes)
    nfzoo.convert.save(theirs, tmp_path / "theirs.safetensors", target="timm")
    entry = ("https://files.example.org/theirs.safetensors", None)
    monkeypatch.setitem(published.TABLE["timm"], "bn_test_efficientnet", entry)
    monkeypatch.setattr(published, "fetch", lambda *args: tmp_path / "theirs.safetensors")
    recipe = _recipe(**{"data.image_size": 32, "epochs": 1, "frozen_epochs": 1, "frozen_learning_rate": 1e-9})
    overrides = {"weights": "timm"}
    engine.run("bn_test_efficientnet", recipe, tmp_path / "run", overrides=overrides, taps=None, console=console)
    ours = engine.load_run(tmp_path / "run")
    x = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype("float32")
    pooled = [keras.Model(m.input, m.get_layer("top_pool").output)(x) for m in (ours, theirs)]
    np.testing.assert_allclose(*pooled, atol=1e-5)
    assert ours.output_shape == (None, 4)
    # The images are those that the weights know, whatever the new ones' own mean.
    expected = {key: list(value) for key, value in registry.PREPROCESSING.items()}
    found = engine.read_options(tmp_path / "run")["images"]
    assert {key: found[key] for key in expected} == expected
    assert source.source_of(tmp_path / "run", 2).card["input"]["mean"] == expected["mean"]
    if classes == 4:
        assert np.abs(ours.get_layer("head").kernel.numpy() - theirs.get_layer("head").kernel.numpy()).mean() > 1e-3


def test_images_that_weights_expect():
    known = weights.entry_of("bn_efficientnet_b0", "cifar100")["input"]
    resolved = {"model": "bn_efficientnet_b0", "build": {"weights": "cifar100"}}
    assert list(learning.load_images(resolved, _recipe()).mean) == known["mean"]
    resolved = {"model": "bn_resnet50", "build": {"weights": "imagenet"}}
    with pytest.raises(ValueError, match="which take BGR less the means.*weights=timm"):
        learning.load_images(resolved, _recipe())


def test_weights_are_asked_for_and_have_to_fit(pretrained, tmp_path, console):
    with pytest.raises(ValueError, match="weights=FILE.safetensors.*frozen_epochs=0"):
        engine.run(MODEL, _recipe(), tmp_path / "run", console=console)
    with pytest.raises(ValueError, match="Expected the weights of none_test_ffnn"):
        engine.run("none_test_ffnn", _recipe(), tmp_path / "run", overrides={"weights": str(pretrained)})
    with pytest.raises(ValueError, match="classes=7.*--recipe finetune"):
        plain = _recipe(frozen_epochs=0)
        engine.run(MODEL, plain, tmp_path / "run", overrides={"weights": str(pretrained)}, console=console)
    assert not (tmp_path / "run").exists()


def test_users_models_need_a_head(tmp_path, console):
    @nfzoo.register_model(override=True)
    def headless(*, classes, **kwargs):
        model = nfzoo.build("bn_test_resnet", include_top=False)
        return nfzoo.NFModel(model.input, keras.layers.Dense(classes, name="logits")(model.output))

    with pytest.raises(ValueError, match='layer "head" for frozen_epochs.*headless'):
        engine.run("headless", _recipe(), tmp_path / "run", console=console)
    assert not (tmp_path / "run").exists()


def test_a_run_recorded_before_a_setting_existed_is_still_that_run(tmp_path, console):
    recipe = recipes.override(_recipe(), {"frozen_epochs": 0, "frozen_learning_rate": None, "epochs": 1})
    done = engine.run(MODEL, recipe, tmp_path / "run", taps=None, console=console)
    path = tmp_path / "run" / "options.json"
    options = json.loads(path.read_text())
    del options["recipe"]["frozen_epochs"], options["recipe"]["frozen_learning_rate"]
    path.write_text(json.dumps(options))
    assert engine.run(MODEL, recipe, tmp_path / "run", taps=None, console=console) == done


@pytest.mark.slow
def test_fine_tuning_on_jax(fresh_process, overrides, tmp_path):
    code = f"""
import json, sys, io
from rich.console import Console
from nfzoo import engine, recipes
recipe = recipes.Recipe.model_validate_json({_recipe().model_dump_json()!r})
quiet = Console(file=io.StringIO())
print(json.dumps(engine.run({MODEL!r}, recipe, sys.argv[1], overrides={overrides!r}, console=quiet)))
"""
    metrics = fresh_process(code, tmp_path / "run", KERAS_BACKEND="jax")
    assert metrics["status"] == "complete" and metrics["epochs"] == EPOCHS


@pytest.mark.slow
def test_on_real_photos_by_class(tmp_path, console):
    """The recipe on Imagenette, 60 + 20 photos a class: better than chance, and the body rests, then moves."""
    shared = pathlib.Path(os.environ.get("NFZOO_SHARED", pathlib.Path(__file__).parents[2] / "shared"))
    path = shared / "data" / "imagenette128.zip"
    if not path.exists():
        pytest.skip(f"no photos: {path} is not there (NFZOO_SHARED names another folder)")
    with zipfile.ZipFile(path) as file:
        by_class = {}
        for name in sorted(n for n in file.namelist() if n.endswith(".jpg")):
            by_class.setdefault(name.rsplit("/", 1)[0], []).append(name)
        for folder, names in by_class.items():
            file.extractall(tmp_path / "photos", names[: 60 if folder.startswith("train") else 20])
    body = weights.save(nfzoo.build("nf_test_resnet", classes=3), tmp_path / "body.safetensors")
    changes = {
        "data.name": str(tmp_path / "photos"), "data.image_size": 32, "augment.crop_padding": 4, "epochs": 8,
        "frozen_epochs": 1, "optimizer.learning_rate": 3e-3, "frozen_learning_rate": 1e-2,
    }  # fmt: skip
    recipe = recipes.override(recipes.get("finetune"), changes)
    metrics = engine.run("nf_test_resnet", recipe, tmp_path / "run", overrides={"weights": str(body)}, console=console)
    assert metrics["status"] == "complete" and metrics["test_accuracy"] > 0.15  # chance: 0.1


def test_a_tag_brings_its_overrides_to_fine_tuning(monkeypatch):
    import pathlib

    monkeypatch.setenv("NFZOO_HOME", str(pathlib.Path(nfzoo.__file__).parents[1] / "saved_models"))
    recipe = recipes.override(recipes.get("finetune"), {"data.name": "digits", "data.image_size": 32})
    images = data.load(recipe.data)
    resolved = engine.options("bn_efficientnet_b0", recipe, {"weights": "cifar100"})
    net = learning.new_model(resolved, images, recipe)
    trained = nfzoo.build("bn_efficientnet_b0", weights="cifar100")
    norms = [model.get_layer("stem_norm1") for model in (net, trained)]
    assert norms[0].epsilon == norms[1].epsilon == 1e-5 and net.output_shape == (None, 10)
    np.testing.assert_array_equal(net.get_layer("top_conv").kernel, trained.get_layer("top_conv").kernel)
