"""Weights on disk: safetensors keyed by variable path, a manifest that names them, and loading with full coverage.

A model without its classifier (include_top=False, features_only=True) leaves the top of a file unused; nothing else may
be missing or left over.

Nothing here unpickles. A tag ("cifar100") is looked up as `<model>.<tag>` in manifest.json of the store: NFZOO_HOME
where it is set, else saved_models of a checkout, else .cache/nfzoo in the user's folder.
"""

import contextlib
import json
import os
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Set

import h5py
import keras
import numpy as np
import safetensors
import safetensors.numpy

from nfzoo.files import atomic, sha256

_LISTED = 6
# What two readings of one architecture differ in, with weights of the same names and shapes.
_READING = (
    "filters", "kernel_size", "strides", "padding", "dilation_rate", "groups", "pool_size", "epsilon", "epsilon_mode",
    "gamma", "activation", "scale", "skip_scale", "branch_scale", "magnitude_preserving", "statistics",
)  # fmt: skip
_INNER = re.compile(r"(stem|stage\d+|hidden)_")
_TOP = ("top_", "head/")  # beginnings of the paths that a model without its classifier may lack


def home() -> pathlib.Path:
    """Folder of manifest.json, the files that it names, and downloads/."""
    checkout = pathlib.Path(__file__).parents[1] / "saved_models"
    default = checkout if checkout.is_dir() else pathlib.Path.home() / ".cache" / "nfzoo"
    return pathlib.Path(os.environ.get("NFZOO_HOME", default))


def save(model: keras.Model, path: str | pathlib.Path) -> pathlib.Path:
    """Write all weights (moving statistics included, random states not) as safetensors.

    Raises:
        ValueError: for another ending than .safetensors, or several weights of one path.

    Example:
        >>> import nfzoo, tempfile
        >>> path = save(nfzoo.build("nf_test_resnet"), pathlib.Path(tempfile.mkdtemp()) / "nf.safetensors")
        >>> path.name, path.stat().st_size > 1000
        ('nf.safetensors', True)
    """
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"Expected a path that ends with .safetensors. Received: {path}")
    _check_paths(model)
    # In C order for safetensors; np.ascontiguousarray would make a vector of a scalar.
    tensors = {v.path: np.asarray(keras.ops.convert_to_numpy(v), order="C") for v in model.weights}
    metadata = {"model": model.name, "format": "nfzoo", "reading": json.dumps(reading(model))}
    with atomic(path) as partial:
        # Its save_file makes files that nobody else may read.
        partial.write_bytes(safetensors.numpy.save(tensors, metadata=metadata))
    return path


def _check_paths(model: keras.Model) -> None:
    """Refuse what a path does not identify: two networks of one architecture within a model, say."""
    count = Counter(v.path for v in model.weights)
    several = [path for path, n in count.items() if n > 1]
    if several:
        raise ValueError(
            f"Expected weights of different paths. Received: {model.name}, which has several of {shorten(several)}. "
            "Keep it as a whole (model.save), or save the networks in it one by one"
        )


def reading(model: keras.Model) -> dict[str, dict]:
    """What the layers of a model compute beside their weights, by name: strides, padding, epsilon, alpha and the like.

    The classifier, dropout and preprocessing may differ between networks that share weights and are left out.

    Example:
        >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3, name="conv")])
        >>> reading(model)["conv"]["strides"]
        [1, 1]
    """
    found, sources = {}, _sources(model)
    for layer in model.layers:
        if layer.name in ("head", "preprocess") or "drop" in layer.name or isinstance(layer, keras.layers.InputLayer):
            continue
        # A gain that is learned only starts there.
        keys, found[layer.name] = _READING if layer.weights else (*_READING, "gain"), {}
        with contextlib.suppress(NotImplementedError):  # somebody's layer that tells nothing
            config = layer.get_config()
            found[layer.name] = {key: config[key] for key in keys if key in config}
        if layer.name in sources:
            found[layer.name]["after"] = sources[layer.name]
    return json.loads(json.dumps(found, default=str))  # as it comes back from a file


def _sources(model: keras.Model) -> dict[str, list[str]]:
    """Layers whose outputs each layer takes; dropout is passed over, and what stands before the network is "input"."""
    found: dict[str, list[str]] = {}
    for node in (node for nodes in getattr(model, "_nodes_by_depth", {}).values() for node in nodes):
        taken = (tensor._keras_history.operation.name for tensor in node.input_tensors)
        found.setdefault(node.operation.name, []).extend(taken)

    def before(name: str) -> str:
        while "drop" in name and found.get(name):
            name = found[name][0]
        return name if _INNER.match(name) or name.startswith("top") else "input"

    return {name: [before(source) for source in taken] for name, taken in found.items()}


def _check_reading(model: keras.Model, stored: dict[str, dict] | None, path: pathlib.Path) -> None:
    if stored is None:
        return
    ours = reading(model)
    # Layers that only one has count within the network: before it may stand a user's own, behind it pooling.
    inner = lambda names: {name for name in names if _INNER.match(name)}  # noqa: E731
    lacking = inner(ours.keys() - stored.keys())
    left = inner(stored.keys() - ours.keys()) if any(layer.name == "head" for layer in model.layers) else ()
    differing = [
        *(f"a network without {layer}" for layer in ours if layer in lacking),
        *(f"a network with {layer}" for layer in stored if layer in left),
        *(
            f"{layer} {key} {stored[layer][key]} for {here[key]}"
            for layer, here in ours.items()
            for key in here.keys() & stored.get(layer, {}).keys()
            if stored[layer][key] != here[key]
        ),
    ]
    if differing:
        raise ValueError(
            f"Expected weights of {model.name} as it was built. Received: {path}, of a network that computes otherwise "
            f"with the same names and shapes: {shorten(differing)}. Build with the overrides that it had (dialect=, "
            "stem=, padding=, epsilon=, …: options.json of a run tells them), or take the weights as they are by "
            "nfzoo.weights.load(model, path, strict=False)"
        )


def load(model: keras.Model, weights: str | pathlib.Path, name: str | None = None, strict: bool = True) -> None:
    """Load weights into a built model.

    Args:
        model: is changed only if every weight has its counterpart. Without a layer "head" it may lack the top.
        weights: path of a .safetensors, .keras or .weights.h5 file, or a tag of the manifest.
        name: model name that the tag belongs to.
        strict: refuse weights of a network that computes otherwise with them (other strides, padding, epsilon). Files
            of nfzoo and .keras files tell; .weights.h5 and .safetensors of others do not.

    Raises:
        FileNotFoundError: no such file or tag.
        ValueError: a damaged file, an unknown format, or weights of another architecture (names and shapes are listed).

    Example:
        >>> import nfzoo, tempfile
        >>> path = save(nfzoo.build("sn_test_efficientnet"), pathlib.Path(tempfile.mkdtemp()) / "sn.safetensors")
        >>> nfzoo.build("sn_test_efficientnet", weights=path, include_top=False).output_shape
        (None, 64)
    """
    path = _find(weights, name)
    if path.name.endswith(".weights.h5"):
        _load_h5(model, path)
        return
    source, computed = _read(path)
    paths = {v.path for v in model.weights}
    if not source.keys() & paths:
        raise ValueError(
            f"Expected the weights of {model.name}. Received: {path}, which has none of their names but "
            f"{shorten(sorted(source))}. Weights of timm, DeepMind's nfnets or keras.applications are read by "
            "nfzoo.convert.load."
        )
    spare = frozenset()
    if not any(layer.name == "head" for layer in model.layers):
        last = max(map(_stage, paths))
        spare = frozenset(key for key in source if key.startswith(_TOP) or _stage(key) > last)
    if strict and source.keys() >= paths >= source.keys() - spare:  # else `fill` says what is missing or left
        _check_reading(model, computed, path)
    fill(model, source, path, spare=spare)


def _stage(path: str) -> int:
    """Which stage a variable belongs to; 0 for none. Maps of an early stage do without the later ones."""
    match = re.match(r"stage(\d+)_", path)
    return int(match[1]) if match else 0


def fill(
    model: keras.Model,
    tensors: Mapping[str, np.ndarray],
    origin: str | pathlib.Path,
    rename: Callable[[str], str] = lambda path: path,
    to_keras: Callable[[np.ndarray, tuple[int, ...]], np.ndarray] = lambda value, shape: value,
    spare: Set[str] = frozenset(),
) -> None:
    """Assign every weight of a model from `tensors`, after all names and shapes have been found to fit.

    Args:
        origin: where the tensors are from, for the message.
        rename: our variable path → the name among the tensors. to_keras: (value, our shape) → value in our layout.
        spare: names of tensors that may be left.

    Raises:
        ValueError: what is left on either side, or has another shape, is listed; nothing is written then.
    """
    _check_paths(model)
    values, used, missing, differing = [], set(), [], {}
    for variable in model.weights:
        key, path, shape = rename(variable.path), variable.path, tuple(variable.shape)
        used.add(key)
        if key not in tensors:
            missing.append(key if key == path else f"{key} (for {path})")
            continue
        values.append(to_keras(tensors[key], shape))
        if np.asarray(values[-1]).dtype.kind in "OSUM":
            differing[path] = f"{key} of {values[-1].dtype}, which is no number"
        elif values[-1].shape != shape:
            differing[path] = f"{key} {tensors[key].shape} for {shape if key == path else f'{path} {shape}'}"
    unused = sorted(tensors.keys() - used - spare)
    if missing or unused or differing:
        parts = {"without": missing, "with unknown": unused, "of other shapes": list(differing.values())}
        listed = "; ".join(f"{word} {shorten(keys)}" for word, keys in parts.items() if keys)
        remedy = ""
        if "head/bias" in differing and not missing and not unused and all(p.startswith("head/") for p in differing):
            remedy = (
                f" Build with classes={tensors[rename('head/bias')].size}, as they have, or with include_top=False for "
                "all but the classifier; nfzoo.set_head and nfzoo train --recipe finetune train a new one."
            )
        raise ValueError(f"Expected the weights of {model.name}. Received: {origin} {listed}.{remedy}")
    for variable, value in zip(model.weights, values, strict=True):
        variable.assign(value)


def shorten(keys: list[str]) -> str:
    """List the first few of many."""
    rest = len(keys) - _LISTED
    return ", ".join(keys[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _load_h5(model: keras.Model, path: pathlib.Path) -> None:
    # This format has no variable paths: Keras matches layers by kind and order, writes as it goes, and passes over what
    # is left in the file, so that another architecture's weights may seem to fit. Their number tells.
    before, stored = model.get_weights(), []
    try:
        with h5py.File(path) as file:
            file.visititems(lambda name, item: stored.append(name) if isinstance(item, h5py.Dataset) else None)
        count = sum(name.startswith("layers/") for name in stored)
        if count != len(before):
            raise ValueError(f"{count} arrays for {len(before)} weights")
        model.load_weights(path)
    except Exception as error:
        model.set_weights(before)
        raise ValueError(
            f"Expected weights of {model.name}. Received: {path}, which fails with: {error}. A .weights.h5 file has no "
            "paths of variables and fits the whole model only, with its classes; .safetensors and .keras load without "
            "the top too."
        ) from None


def entry_of(name: str, tag: str) -> dict | None:
    """What the manifest says of the weights of a model: file, sha256, overrides of `build`, classes, input; or None."""
    return _entries(name).get(tag)


def _entries(name: str | None) -> dict[str, dict]:
    """Entries of a model's weights, by tag."""
    manifest = home() / "manifest.json"
    entries = json.loads(manifest.read_text()) if manifest.exists() else {}
    split = {key: key.partition(".") for key, entry in entries.items() if "weights" in entry}
    return {tag: entries[key] for key, (model, _, tag) in split.items() if model == name}


def _find(weights: str | pathlib.Path, name: str | None) -> pathlib.Path:
    path, entries = pathlib.Path(weights), _entries(name)
    if path.is_file():  # a folder may have the name of a tag
        return path
    if str(weights) not in entries:
        raise FileNotFoundError(
            f"Expected a file or a tag of {home() / 'manifest.json'}. Received: weights={str(weights)!r}. "
            f"Tags of {name}: {', '.join(entries) or 'none'}."
        )
    entry = entries[str(weights)]
    path = home() / entry["weights"]
    if sha256(path) != entry["sha256"]:
        raise ValueError(f"Expected {path} as the manifest describes it. Received: a file of another sha256")
    return path


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Read every tensor of a file, bfloat16 too.

    Raises:
        ValueError: for a damaged file.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"Expected a safetensors file. Received: {path}, which is damaged: {error}") from None


def read_keras(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Read every weight of a saved Keras model.

    Raises:
        ValueError: for a file that Keras does not load.
    """
    return _tensors(_stored(path))


def _stored(path: pathlib.Path) -> keras.Model:
    try:
        return keras.saving.load_model(path, compile=False)
    except Exception as error:
        raise ValueError(f"Expected a saved Keras model. Received: {path}, which fails with: {error}") from None


def _tensors(model: keras.Model) -> dict[str, np.ndarray]:
    return {v.path: keras.ops.convert_to_numpy(v) for v in model.weights}


def _read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict | None]:
    """The weights of a file, and what their network computes with them; None where the file does not say."""
    if path.suffix == ".safetensors":
        tensors = read_safetensors(path)
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        told = metadata.get("reading") if metadata.get("format") == "nfzoo" else None
        return tensors, told and json.loads(told)
    if path.suffix == ".keras":
        return _tensors(stored := _stored(path)), reading(stored)
    raise ValueError(
        f"Expected weights as .safetensors, .keras or .weights.h5. Received: {path}. Pickles (.pkl, .pth, .bin) are "
        "not read."
    )
