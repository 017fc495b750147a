"""Weights on disk: safetensors keyed by variable path, a manifest that names them, and loading with full coverage.

Nothing here unpickles. A tag ("cifar100") is looked up as `<model>.<tag>` in manifest.json of the store: NFZOO_HOME
where it is set, else saved_models of a checkout.
"""

import json
import os
import pathlib

import keras
import numpy as np
import safetensors
import safetensors.numpy

from nfzoo.files import atomic, sha256

_LISTED = 6


def home() -> pathlib.Path:
    """Folder of manifest.json and the files that it names."""
    default = pathlib.Path(__file__).parents[1] / "saved_models"
    return pathlib.Path(os.environ.get("NFZOO_HOME", default))


def save(model: keras.Model, path: str | pathlib.Path) -> pathlib.Path:
    """Write all weights (moving statistics included, random states not) as safetensors.

    Raises:
        ValueError: for another ending than .safetensors.
    """
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"Expected a path that ends with .safetensors. Received: {path}")
    tensors = {v.path: np.ascontiguousarray(keras.ops.convert_to_numpy(v)) for v in model.weights}
    with atomic(path) as partial:
        safetensors.numpy.save_file(tensors, partial, metadata={"model": model.name, "format": "nfzoo"})
    return path


def load(model: keras.Model, weights: str | pathlib.Path, name: str | None = None) -> None:
    """Load weights into a built model.

    Args:
        model: is changed only if every weight has its counterpart.
        weights: path of a .safetensors, .keras or .weights.h5 file, or a tag of the manifest.
        name: model name that the tag belongs to.

    Raises:
        FileNotFoundError: no such file or tag.
        ValueError: a damaged file, an unknown format, or weights of another architecture (names and shapes are listed).
    """
    path = _find(weights, name)
    if path.name.endswith(".weights.h5"):
        # This format has no variable paths; Keras matches layers in order, and writes as it goes.
        before = model.get_weights()
        try:
            model.load_weights(path)
        except Exception as error:
            model.set_weights(before)
            raise ValueError(f"Expected weights of {model.name}. Received: {path}, which fails with: {error}") from None
        return
    source = _read(path)
    targets = {v.path: v for v in model.weights}
    missing, unexpected = sorted(targets.keys() - source.keys()), sorted(source.keys() - targets.keys())
    shapes = [
        f"{key} {source[key].shape} for {tuple(targets[key].shape)}"
        for key in sorted(targets.keys() & source.keys())
        if source[key].shape != tuple(targets[key].shape)
    ]
    if missing or unexpected or shapes:
        parts = {"without": missing, "with unknown": unexpected, "of other shapes": shapes}
        listed = "; ".join(f"{word} {_shorten(keys)}" for word, keys in parts.items() if keys)
        raise ValueError(f"Expected the weights of {model.name}. Received: {path} {listed}.")
    for key, variable in targets.items():
        variable.assign(source[key])


def _shorten(keys: list[str]) -> str:
    rest = len(keys) - _LISTED
    return ", ".join(keys[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _find(weights: str | pathlib.Path, name: str | None) -> pathlib.Path:
    path = pathlib.Path(weights)
    if path.exists():
        return path
    manifest = home() / "manifest.json"
    entries = json.loads(manifest.read_text()) if manifest.exists() else {}
    entry = entries.get(f"{name}.{weights}")
    if entry is None or "weights" not in entry:
        tags = [key.partition(".")[2] for key, e in entries.items() if key.startswith(f"{name}.") and "weights" in e]
        raise FileNotFoundError(
            f"Expected a file or a tag of {manifest}. Received: weights={str(weights)!r}. "
            f"Tags of {name}: {', '.join(tags) or 'none'}."
        )
    path = home() / entry["weights"]
    if sha256(path) != entry["sha256"]:
        raise ValueError(f"Expected {path} as the manifest describes it. Received: a file of another sha256")
    return path


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    if path.suffix == ".safetensors":
        try:
            return safetensors.numpy.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"Expected a safetensors file. Received: {path}, which is damaged: {error}") from None
    if path.suffix == ".keras":
        try:
            stored = keras.saving.load_model(path, compile=False)
        except Exception as error:
            raise ValueError(f"Expected a saved Keras model. Received: {path}, which fails with: {error}") from None
        return {v.path: keras.ops.convert_to_numpy(v) for v in stored.weights}
    raise ValueError(
        f"Expected weights as .safetensors, .keras or .weights.h5. Received: {path}. Pickles (.pkl, .pth, .bin) are "
        "not read."
    )
