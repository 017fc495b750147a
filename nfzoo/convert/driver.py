"""The one driver of all converters: every source tensor is consumed and every weight written, or nothing is."""

import pathlib
import re
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import keras
import numpy as np

from nfzoo import names, registry
from nfzoo.convert import deepmind, keras_applications, timm
from nfzoo.files import atomic

SOURCES: dict[str, ModuleType] = {"timm": timm, "deepmind": deepmind, "keras": keras_applications}
_LISTED = 6


def load(name: str, source: str, weights: Any, **build_options) -> keras.Model:
    """Build a model and fill it with the weights of another implementation.

    Args:
        name: model name, ours or the source's, e.g. "nf_resnet50", "dm_nfnet_f0", "EfficientNetB0".
        source: "timm", "deepmind" or "keras". It decides the dialect, unless the name or an option does.
        weights: timm: a mapping, .safetensors, .pth or .bin; deepmind: a mapping ("module/name" or nested), a pickle as
            released, or .npz; keras: a live model, legacy .h5 or .weights.h5. Pickles are read without running code.
        **build_options: of `nfzoo.build`. The number of classes is the file's unless given; a file without a
            classifier gives a model without one.

    Returns:
        The model. With equal weights it computes the source's logits.

    Raises:
        ValueError: what is left on either side, or has another shape, is listed; nothing is written then.

    Example:
        >>> import numpy as np
        >>> model = registry.build("nf_test_nfnet", dialect="timm", classes=3)
        >>> tensors = as_tensors(model, "timm")
        >>> load("test_nfnet", "timm", tensors, input_shape=(64, 64, 3)).output_shape
        (None, 3)
    """
    module = _source(source)
    options = _with_dialect(names.parse(name), module, build_options)
    rename = _rule(module, name, options)
    tensors = _wanted(module.read(weights, names.parse(name)), module)
    # The classifier's bias tells the number of classes; without one the file is a backbone.
    head = tensors.get(rename("head/bias"))
    partial = options.get("features_only") or not options.get("include_top", True)
    if head is None:
        options.setdefault("include_top", False)
    elif not partial:
        options.setdefault("classes", len(head))
    model = registry.build(name, **options)
    fill(model, tensors, rename, module.to_keras, leftovers=partial)
    return model


def fill(model: keras.Model, tensors: Mapping, rename: Callable, to_keras: Callable, leftovers: bool = False) -> None:
    """Assign every weight of a model from `tensors`, after all names and shapes have been found to fit.

    Args:
        rename: our variable path → the source's name. to_keras: (value, our shape) → value in our layout.
        leftovers: allow tensors that the model has no place for (a model without its top).
    """
    values, missing, shapes, used = {}, [], [], set()
    for variable in model.weights:
        key = rename(variable.path)
        used.add(key)
        if key not in tensors:
            missing.append(f"{key} (for {variable.path})")
            continue
        value, shape = to_keras(tensors[key], tuple(variable.shape)), tuple(variable.shape)
        if value.shape != shape:
            shapes.append(f"{key} {tuple(tensors[key].shape)} for {variable.path} {shape}")
        values[variable.path] = value
    unused = [] if leftovers else sorted(tensors.keys() - used)
    if missing or unused or shapes:
        parts = {"without": missing, "with unknown": unused, "of other shapes": shapes}
        listed = "; ".join(f"{word} {shorten(keys)}" for word, keys in parts.items() if keys)
        raise ValueError(f"Expected the weights of {model.name}. Received: tensors {listed}.")
    for variable in model.weights:
        variable.assign(values[variable.path])


def as_tensors(model: keras.Model, target: str = "timm", name: str | None = None) -> dict[str, np.ndarray]:
    """The weights of a model under another implementation's names and in its layout."""
    module = _source(target)
    if not hasattr(module, "from_keras"):
        raise ValueError(f"Expected a target that nfzoo writes: timm. Received: target={target!r}")
    rename = _rule(module, name or model.name, {"dialect": target})
    tensors = {}
    for variable in model.weights:
        key = rename(variable.path)
        value = keras.ops.convert_to_numpy(variable)
        tensors |= {key: np.ascontiguousarray(module.from_keras(value, key)), **module.companions(key)}
    return tensors


def save(model: keras.Model, path: str | pathlib.Path, target: str = "timm", name: str | None = None) -> pathlib.Path:
    """Write a model's weights in timm's names and layout, as safetensors.

    Args:
        model: of a timm architecture; the numbers mean the same to timm only if it was built with `dialect="timm"`.
        path: ends with .safetensors.
        target: "timm".
        name: name of the architecture; default: the model's name.

    Raises:
        ValueError: for an architecture that timm does not have, another target or another ending.
    """
    import safetensors.numpy

    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"Expected a path that ends with .safetensors. Received: {path}")
    tensors = as_tensors(model, target, name)
    with atomic(path) as partial:
        safetensors.numpy.save_file(tensors, partial, metadata={"format": "pt"})
    return path


def shorten(keys: list[str]) -> str:
    """List the first few of many."""
    rest = len(keys) - _LISTED
    return ", ".join(keys[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _source(source: str) -> ModuleType:
    if source not in SOURCES:
        raise ValueError(f"Expected source to be one of {', '.join(SOURCES)}. Received: {source!r}")
    return SOURCES[source]


def _with_dialect(name: names.Name, module: ModuleType, options: dict) -> dict:
    """The source's dialect, unless the caller's or the name's is one that the source has too."""
    stated = options.get("dialect") or dict(name.overrides).get("dialect")
    known = names.FAMILIES[name.family].DIALECTS
    spoken = [dialect for dialect in module.DIALECTS if dialect in known]
    if not spoken:
        raise ValueError(f"Expected an architecture of {module.__name__.split('.')[-1]}. Received: {name}")
    return {**options, "dialect": stated if stated in spoken else spoken[0]}


def _rule(module: ModuleType, name: str, options: dict) -> Callable[[str], str]:
    parsed = names.parse(name)
    _, spec = names.resolve_fields(parsed, registry.overrides_of(options))
    return module.rule(parsed, spec)


def _wanted(tensors: Mapping[str, np.ndarray], module: ModuleType) -> dict[str, np.ndarray]:
    return {key: value for key, value in tensors.items() if not re.search(module.IGNORED, key)}
