"""What was trained and kept: it loads by its tag and is as good on real images as the manifest says."""

import json
import pathlib

import keras
import numpy as np
import pytest
from conftest import slow_but

import nfzoo
from nfzoo import engine, export, recipes, weights
from nfzoo.files import sha256

STORE = pathlib.Path(nfzoo.__file__).parents[1] / "saved_models"
ENTRIES = {k: e for k, e in json.loads((STORE / "manifest.json").read_text()).items() if "weights" in e}


@pytest.fixture(autouse=True)
def _store(monkeypatch):
    monkeypatch.setenv("NFZOO_HOME", str(STORE))


@pytest.mark.parametrize("key", slow_but(list(ENTRIES)[:1], ENTRIES))
def test_the_stated_accuracy_is_that_of_real_test_images(key):
    """On the first 256 of the 10,000 test images of CIFAR-100, within three standard deviations of such a sample."""
    entry = ENTRIES[key]
    with np.load(pathlib.Path(__file__).parent / "data" / "cifar100_test.npz") as file:
        images, labels = file["images"], file["labels"]
    model = nfzoo.build(entry["model"], weights=key.partition(".")[2])
    assert model.output_shape == (None, 100) and model.input_shape == (None, 32, 32, 3)
    x = (images / 255 - entry["input"]["mean"]) / entry["input"]["std"]
    accuracy = (model.predict(x.astype("float32"), batch_size=64, verbose=0).argmax(-1) == labels).mean()
    stated = entry["metrics"]["test_accuracy"]
    assert abs(accuracy - stated) < 3 * np.sqrt(stated * (1 - stated) / len(labels))
    assert stated > 0.25


@pytest.mark.parametrize("key", slow_but(list(ENTRIES)[:1], ENTRIES))
def test_an_entry_tells_everything(key):
    entry = ENTRIES[key]
    assert sha256(STORE / entry["weights"]) == entry["sha256"]
    assert (STORE / entry["weights"]).stat().st_size < 20e6
    assert {"model", "build", "classes", "data", "seed", "versions", "commit", "licence", "fingerprint"} <= entry.keys()
    assert entry["fingerprint"] and len(entry["classes"]) == 100


def test_there_is_one_of_each_kind():
    assert {f"{kind}_efficientnet_b0.cifar100" for kind in ("bn", "sn", "nf")} <= ENTRIES.keys()


@pytest.mark.slow
def test_a_tag_is_a_default_and_no_more():
    body = nfzoo.build("nf_efficientnet_b0.cifar100", include_top=False, input_shape=(64, 64, 3))
    assert body.input_shape == (None, 64, 64, 3) and body.output_shape == (None, 1280)
    with pytest.raises(ValueError, match="classes=100, as they have"):
        nfzoo.build("nf_efficientnet_b0", weights="cifar100", classes=10)


@pytest.mark.slow
def test_weights_of_a_run_become_a_tag(tmp_path, monkeypatch):
    small = {"data.name": "fake", "epochs": 1, "batch_size": 64, "data.limit": 64}
    recipe = recipes.override(recipes.get("demo"), small)
    engine.run("sn_test_efficientnet", recipe, tmp_path / "run", overrides={"magnitude_preserving": False}, taps=None)
    monkeypatch.setenv("NFZOO_HOME", str(tmp_path / "store"))
    with pytest.raises(ValueError, match=r"called sn_test_efficientnet\.TAG\.safetensors"):
        export.export(tmp_path / "run", tmp_path / "store" / "sn.safetensors", "weights")
    path = tmp_path / "store" / "sn_test_efficientnet.mine.safetensors"
    entry = export.export(tmp_path / "run", path, "weights")
    assert entry["largest_relative_difference"] == 0 and path.stat().st_mode & 0o044
    again, run = nfzoo.build("sn_test_efficientnet.mine"), engine.load_run(tmp_path / "run")
    x = keras.random.normal((2, 32, 32, 3), seed=0)
    np.testing.assert_array_equal(again(x), run(x))
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match="another sha256"):
        nfzoo.build("sn_test_efficientnet.mine")
    with pytest.raises(FileNotFoundError, match="Tags of sn_test_efficientnet: mine"):
        weights.load(again, "yours", "sn_test_efficientnet")


def test_preprocessing_is_that_of_the_weights():
    with np.load(pathlib.Path(__file__).parent / "data" / "cifar100_test.npz") as file:
        images = file["images"][:8].astype("float32")
    entry = ENTRIES["nf_efficientnet_b0.cifar100"]
    x = (images / 255 - entry["input"]["mean"]) / entry["input"]["std"]
    raw = nfzoo.build("nf_efficientnet_b0.cifar100", include_preprocessing=True)
    plain = nfzoo.build("nf_efficientnet_b0.cifar100")
    np.testing.assert_allclose(raw(images), plain(x.astype("float32")), atol=1e-3)
