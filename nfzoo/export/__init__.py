"""Export models; every artefact is reloaded by its own runtime in a process of its own, and compared, first."""

import hashlib
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace

import keras
import numpy as np

from nfzoo import names, registry, weights
from nfzoo.export import card as cards
from nfzoo.export import formats, runtimes
from nfzoo.export.serve import serve_check
from nfzoo.export.source import source_of, with_preprocessing
from nfzoo.files import atomic, sha256, waited_for

__all__ = ["export", "folder_sha256", "serve_check"]

TOLERANCE = 1e-4
CALIBRATION = 256  # images that the ranges of an 8-bit model are taken from


def export(
    source: keras.Model | str | pathlib.Path,
    to: str | pathlib.Path,
    format: str | None = None,
    *,
    fold: bool = True,
    preprocess: bool = False,
    quantize: str | None = None,
    images: np.ndarray | str | pathlib.Path | None = None,
    examples: int = 16,
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> dict:
    """Export a model and enter it into the manifest beside it.

    Args:
        source: folder of a run, a name of the zoo ("sn_efficientnet_b0.cifar100"), or a Keras model.
        to: what to make; it must not exist. The manifest is manifest.json in its parent folder. Weights are called
            MODEL.TAG.safetensors, which `nfzoo.build(MODEL, weights=TAG)` loads.
        format: "saved_model" (a folder), "litert" (.tflite), "onnx", "keras", "weights" (.safetensors); default: by the
            ending of `to`. All but weights take batches of any size.
        fold: see `nfzoo.fold`; weights are never folded.
        preprocess: let the artefact take pixels in [0, 255] and standardize them itself.
        quantize: "int8" quantizes weights and activations of a LiteRT model after training, by real images.
        images: to compare the artefact on, and to quantize by: an array as the model takes them, or a folder of image
            files; default: test images of a run to compare and training images to quantize, else parts of two
            photographs.
        examples: number of images that are compared.
        classes: names of the classes, where the model's are not known.
        mean, std: by channel, of x / 255, of a Keras model of your own; (0,) and (1 / 255,) if it takes pixels.

    Returns:
        The manifest entry: sha256, model, input, classes, metrics, largest difference, bytes, latency of one image,
        throughput of a batch of those images. For an int8 model, the difference is what quantization costs, and
        "same_class" the share of up to 256 images that keep their class. "constant_outputs" where the outputs are the
        same for every image, so that the comparison shows nothing.

    Raises:
        ValueError: an unknown format, operators that it lacks, or an artefact whose outputs differ by more than 1e-4
            relative.
        FileExistsError: if `to` exists.
        ImportError: if what a format needs is not installed.
        RuntimeError: if the artefact does not load on its own.

    Example:
        >>> import nfzoo, tempfile
        >>> entry = export("nf_test_resnet", pathlib.Path(tempfile.mkdtemp()) / "nf.onnx", classes=list("0123456789"))
        >>> entry["input"]["shape"], entry["largest_relative_difference"] < 1e-4
        ([None, 32, 32, 3], True)
    """
    to = pathlib.Path(to)
    name = formats.format_of(to, format)
    if quantize not in (None, "int8") or (quantize and name != "litert"):
        raise ValueError(f'Expected quantize="int8" with litert, or None. Received: {quantize!r} with {name}')
    if to.exists():
        raise FileExistsError(f"Expected a path that does not exist yet. Received: {to}; remove it or choose another.")
    if isinstance(images, np.ndarray) and not len(images):
        raise ValueError("Expected images to compare the artefact on. Received: none")
    found = source_of(source, CALIBRATION if quantize else examples, images, classes, mean, std)
    if name == "keras" and not fold and (foreign := _foreign(found.model)):
        raise ValueError(
            "Expected fold=True for a .keras file, which has to load without nfzoo. Received: fold=False and a "
            f"{foreign}; model.save(path) writes the network as it is"
        )
    if len(found.model.outputs) > 1:
        raise ValueError(
            f"Expected a model of one output. Received: {found.model.name} with {len(found.model.outputs)}"
        )
    if name == "weights":
        found = _loadable(found, to, preprocess)
    manifest = to.parent / "manifest.json"
    _entries(manifest)  # a damaged one is said before the work
    if preprocess:
        found = with_preprocessing(found)
    made = _weights(found, to) if name == "weights" else _artefact(found, to, name, fold, quantize)
    entry = {"format": name, **made, **found.card}
    with waited_for(to.parent), atomic(manifest) as partial:
        entries = {**_entries(manifest), to.name.removesuffix(".safetensors"): entry}
        partial.write_text(json.dumps(entries, indent=1) + "\n")
    return entry


def _foreign(model: keras.Model) -> str | None:
    """The first class of a model that is not Keras' own."""
    kinds = (type(part) for part in (model, *model._flatten_layers(include_self=False)))
    return next((kind.__name__ for kind in kinds if not kind.__module__.startswith("keras.")), None)


def _loadable(found, to: pathlib.Path, preprocess: bool):
    """What `nfzoo.build(MODEL, weights=TAG)` needs: a name that it finds, and what an alias stands for."""
    if preprocess:
        raise ValueError("Expected preprocess=False with weights, which have no layers. Received: preprocess=True")
    given = found.card["model"].partition(".")[0]
    model, implied = names.canonical(given), dict(names.aliases()[given].overrides) if given in names.aliases() else {}
    tag = re.fullmatch(rf"{re.escape(model)}\.(\w+)\.safetensors", to.name)
    if tag is None or tag[1] in registry.PUBLISHERS:
        taken = f", TAG none of {', '.join(registry.PUBLISHERS)}"
        raise ValueError(f"Expected weights to be called {model}.TAG.safetensors{taken}. Received: {to.name}")
    build = implied | found.card.get("build", {})
    return replace(found, card={**found.card, "model": model, **({"build": build} if build else {})})


def _weights(found, to: pathlib.Path) -> dict:
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=".export-") as folder:
        partial = pathlib.Path(folder) / to.name
        formats.write("weights", found.model, partial, fold=False)
        again = keras.models.clone_model(found.model)
        weights.load(again, partial)
        difference = _difference(*(_computed(net, found.images) for net in (again, found.model)))
        partial.rename(to)
    outputs = found.model.output_shape[-1]
    return {"weights": to.name, "sha256": sha256(to), "outputs": outputs, "largest_relative_difference": difference}


def _artefact(found, to: pathlib.Path, name: str, fold: bool, quantize: str | None) -> dict:
    x = found.images
    expected = _computed(found.model, x)  # before it is written: Keras exports no model that was never called
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=".export-") as folder:
        partial = pathlib.Path(folder) / to.name
        formats.write(name, found.model, partial, fold, found.calibration if quantize else None)
        cards.write(partial, {**found.card, "folded": fold, "quantized": quantize})
        outputs, speed = _reload(partial, x, name)
        difference = _difference(outputs, expected, np.inf if quantize else TOLERANCE)
        digest = folder_sha256(partial) if partial.is_dir() else sha256(partial)
        size = sum(p.stat().st_size for p in ([partial] if partial.is_file() else partial.rglob("*")) if p.is_file())
        partial.rename(to)
    same = {"same_class": float((outputs.argmax(-1) == expected.argmax(-1)).mean())} if quantize else {}
    made = {"path": to.name, "sha256": digest, "bytes": size, "largest_relative_difference": difference, **same}
    if not np.ptp(expected, axis=0).any():  # a classifier that starts at zero
        made["constant_outputs"] = True
    return {**made, **speed, "folded": fold, "quantized": quantize}


def _computed(model: keras.Model, x: np.ndarray, batch: int = 32) -> np.ndarray:
    """Outputs in inference. `predict` wants TensorFlow on any backend."""
    parts = [model(x[start : start + batch], training=False) for start in range(0, len(x), batch)]
    return np.concatenate([keras.ops.convert_to_numpy(part) for part in parts])


def _reload(artefact: pathlib.Path, x: np.ndarray, name: str) -> tuple[np.ndarray, dict]:
    """Outputs and speed of an artefact in a process that does not know nfzoo."""
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = (pathlib.Path(folder) / f"{kind}.npy" for kind in ("inputs", "outputs"))
        np.save(inputs, x)
        command = [sys.executable, runtimes.__file__, str(artefact), str(inputs), str(outputs)]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            if found := formats.operators(process.stderr):
                raise ValueError(formats.lacking(name, found))
            last = (process.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"Expected the artefact to load with its runtime alone. Received: {last}")
        return np.load(outputs), json.loads(process.stdout.strip().splitlines()[-1])


def _difference(outputs: np.ndarray, expected: np.ndarray, tolerance: float | None = None) -> float:
    largest = float(np.abs(expected).max()) or 1.0  # a classifier that starts at zero
    difference = float(np.abs(outputs - expected).max()) / largest
    tolerance = TOLERANCE if tolerance is None else tolerance
    if not difference <= tolerance or not np.isfinite(difference):
        raise ValueError(
            f"Expected the outputs of the model within {tolerance}. Received: a difference of {difference:.2g}"
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
