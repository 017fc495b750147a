"""Export a trained model; every artefact is reloaded and compared first, a SavedModel by TensorFlow alone."""

import hashlib
import importlib.util
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import keras
import numpy as np

from nfzoo import data, engine, recipes, weights
from nfzoo.files import atomic, sha256

TOLERANCE = 1e-4
LICENCE = "Apache-2.0"  # of what is trained with nfzoo

# Runs in a process of its own, with TensorFlow alone: nfzoo must not be needed to serve.
_RELOAD = """
import sys
import numpy as np
import tensorflow as tf
path, inputs, outputs = sys.argv[1:]
model = tf.saved_model.load(path)
assert "nfzoo" not in sys.modules
np.save(outputs, model.serve(np.load(inputs)).numpy())
"""


def export(run: str | pathlib.Path, to: str | pathlib.Path, format: str = "saved_model", examples: int = 16) -> dict:
    """Export the model of a run and enter it into the manifest beside it.

    Args:
        run: folder of a run.
        to: what to make; it must not exist. The manifest is manifest.json in its parent folder. Weights are called
            MODEL.TAG.safetensors, which `nfzoo.build(MODEL, weights=TAG)` loads.
        format: "saved_model" (a folder) or "weights" (a .safetensors file).
        examples: number of real test images that the artefact is compared on.

    Returns:
        The manifest entry: sha256, model, input, preprocessing, classes, metrics, largest difference, versions.

    Raises:
        ValueError: an unknown format, or an artefact whose outputs differ by more than 1e-4 relative.
        FileExistsError: if `to` exists.
        RuntimeError: if the artefact does not load on its own.
    """
    if format not in FORMATS:
        raise ValueError(f"Expected a format among {', '.join(FORMATS)}. Received: {format!r}")
    if format == "saved_model" and importlib.util.find_spec("tensorflow") is None:
        raise ImportError("Expected TensorFlow, which writes and reloads a SavedModel. Received: no such package")
    to = pathlib.Path(to)
    if to.exists():
        raise FileExistsError(f"Expected a path that does not exist yet. Received: {to}; remove it or choose another.")
    options, metrics = engine.read_options(run), engine.read_metrics(run)
    model = options["model"]
    if format == "weights" and not re.fullmatch(rf"{re.escape(model)}\.\w+\.safetensors", to.name):
        raise ValueError(f"Expected weights to be called {model}.TAG.safetensors. Received: {to.name}")
    entries = _entries(to.parent / "manifest.json")
    recipe = recipes.Recipe.model_validate(options["recipe"])
    images = data.load(recipe.data, recipe.seed)
    x = data.Batches(images.test, examples, images.mean, images.std)[0][0]
    made = FORMATS[format](engine.load_run(run), to, x)
    entry = {
        "format": format,
        **made,
        "model": model,
        "build": options["build"],
        "input": {"shape": [None, *x.shape[1:]], "mean": list(images.mean), "std": list(images.std), "of": "x / 255"},
        "classes": list(images.classes),
        "data": images.name,
        "metrics": {k: metrics.get(k) for k in ("test_accuracy", "epochs")},
        "fingerprint": options["fingerprint"],
        "seed": recipe.seed,
        "versions": options["versions"],
        "commit": options["commit"],
        "licence": LICENCE,
    }
    with atomic(to.parent / "manifest.json") as partial:
        partial.write_text(json.dumps({**entries, to.name.removesuffix(".safetensors"): entry}, indent=1) + "\n")
    return entry


def _weights(model, to: pathlib.Path, x: np.ndarray) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        partial = weights.save(model, pathlib.Path(folder) / to.name)
        again = keras.models.clone_model(model)
        weights.load(again, partial)
        difference = _difference(again.predict(x, verbose=0), model.predict(x, verbose=0))
        with atomic(to) as beside:
            shutil.copyfile(partial, beside)
    return {"weights": to.name, "sha256": sha256(to), "largest_relative_difference": difference}


def _saved_model(model, to: pathlib.Path, x: np.ndarray) -> dict:
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=".export-") as folder:
        partial = pathlib.Path(folder) / "artefact"
        model.export(partial, format="tf_saved_model", verbose=False)
        difference = _verify(partial, x, model.predict(x, verbose=0), pathlib.Path(folder))
        digest = folder_sha256(partial)
        partial.rename(to)
    return {"path": to.name, "sha256": digest, "largest_relative_difference": difference}


FORMATS = {"saved_model": _saved_model, "weights": _weights}


def _verify(artefact: pathlib.Path, x: np.ndarray, expected: np.ndarray, folder: pathlib.Path) -> float:
    inputs, outputs = folder / "inputs.npy", folder / "outputs.npy"
    np.save(inputs, x)
    command = [sys.executable, "-c", _RELOAD, str(artefact), str(inputs), str(outputs)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"Expected the artefact to load with TensorFlow alone. Received: {last}")
    return _difference(np.load(outputs), expected)


def _difference(outputs: np.ndarray, expected: np.ndarray) -> float:
    difference = float(np.abs(outputs - expected).max() / np.abs(expected).max())
    if not difference <= TOLERANCE:
        raise ValueError(
            f"Expected the outputs of the model within {TOLERANCE}. Received: a difference of {difference:.2g}"
        )
    return difference


def folder_sha256(folder: pathlib.Path) -> str:
    """Digest of a folder: of the sorted relative paths and the digests of their files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256(path)}\n".encode())
    return digest.hexdigest()


def _entries(manifest: pathlib.Path) -> dict:
    try:
        return json.loads(manifest.read_text()) if manifest.exists() else {}
    except ValueError as error:
        raise ValueError(f"Expected a manifest. Received: {manifest}, which is damaged: {error}") from None
