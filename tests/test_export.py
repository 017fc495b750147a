import json

import numpy as np
import pytest
from conftest import VARIANTS
from rich.console import Console

import nfzoo
from nfzoo import engine, export, recipes

RECIPE = recipes.override(recipes.get("demo"), {"data.name": "fake", "epochs": 1, "batch_size": 64, "data.limit": 64})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    engine.run("nf_test_efficientnet", RECIPE, folder, taps=None, console=Console(quiet=True))
    return folder


def test_saved_model_is_reloaded_by_tensorflow_alone_and_entered_into_the_manifest(run, tmp_path):
    to = tmp_path / "saved_models" / "nf"
    entry = export.export(run, to)
    assert entry == json.loads((to.parent / "manifest.json").read_text())["nf"]
    assert entry["sha256"] == export.folder_sha256(to) and entry["largest_relative_difference"] < 1e-4
    assert entry["classes"] == ["dark", "dim", "light", "bright"] and entry["input"]["shape"] == [None, 32, 32, 3]
    assert {p.name for p in to.parent.iterdir()} == {"nf", "manifest.json"}

    import tensorflow as tf

    x = np.random.default_rng(0).standard_normal((3, 32, 32, 3)).astype("float32")  # another batch size
    served = tf.saved_model.load(to)
    np.testing.assert_allclose(served.serve(x).numpy(), np.asarray(engine.load_run(run)(x)), atol=1e-5)
    with pytest.raises(FileExistsError, match="exist"):
        export.export(run, to)


def test_an_artefact_that_differs_is_not_kept(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="difference"):
        export.export(run, tmp_path / "saved_models" / "nf")
    assert not list((tmp_path / "saved_models").iterdir())


def test_an_artefact_that_does_not_load_is_said(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_RELOAD", "raise SystemExit('cannot load')")
    with pytest.raises(RuntimeError, match="cannot load"):
        export.export(run, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_what_cannot_be_entered_is_not_exported(run, tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json, which is damaged"):
        export.export(run, tmp_path / "nf")
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def test_unknown_format_and_missing_run(run, tmp_path):
    with pytest.raises(ValueError, match="saved_model.*'onnx'"):
        export.export(run, tmp_path / "x", "onnx")
    with pytest.raises(FileNotFoundError, match="folder of a run"):
        export.export(tmp_path, tmp_path / "x")


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "nf"])
def test_model_export_of_every_variant(variant, tmp_path):
    import tensorflow as tf

    model = nfzoo.build(f"{variant}_test_efficientnet")
    model.export(tmp_path / "model", format="tf_saved_model", verbose=False)
    x = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype("float32")
    served = tf.saved_model.load(tmp_path / "model")
    np.testing.assert_allclose(served.serve(x).numpy(), np.asarray(model(x)), atol=1e-5)
