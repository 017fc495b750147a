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
from nfzoo.weights import fill, reading, shorten

SOURCES: dict[str, ModuleType] = {"timm": timm, "deepmind": deepmind, "keras": keras_applications}


def load(name: str, source: str, weights: Any, model_name: str | None = None, **build_options) -> keras.Model:
    """Build a model and fill it with the weights of another implementation.

    Args:
        name: of an architecture, ours or the source's, e.g. "nf_resnet50", "dm_nfnet_f0", "EfficientNetB0".
        source: "timm", "deepmind" or "keras". It decides the dialect, unless the name or an option does.
        weights: timm: a mapping, .safetensors, .pth or .bin; deepmind: a mapping ("module/name" or nested), a pickle as
            released, or .npz; keras: a live model, a mapping, legacy .h5, .weights.h5 or .keras. Pickles are read
            without running code.
        model_name: of the Keras model; default: the architecture's.
        **build_options: of `nfzoo.build`. The number of classes is the file's unless given; a file without a
            classifier gives a model without one.

    Returns:
        The model. With equal weights it computes the source's logits.

    Raises:
        FileNotFoundError: if `weights` names no file.
        ValueError: what is left on either side, or has another shape, is listed; nothing is written then.

    Example:
        >>> import numpy as np
        >>> model = registry.build("nf_test_nfnet", dialect="timm", classes=3)
        >>> tensors = as_tensors(model, "timm")
        >>> load("test_nfnet", "timm", tensors, input_shape=(64, 64, 3)).output_shape
        (None, 3)
    """
    module, parsed = source_module(source), names.parse(name)
    options = with_dialect(parsed, module, build_options)
    rename = _rule(module, parsed, options)
    stored = isinstance(weights, str | pathlib.Path)
    if stored and not pathlib.Path(weights).exists():
        raise FileNotFoundError(f"Expected weights of {source}. Received: {weights}, which does not exist")
    tensors = _wanted(module.read(weights, parsed), module)
    # The classifier's bias tells the number of classes; without one the file is a backbone.
    head = tensors.get(rename("head/bias"))
    partial = options.get("features_only") or not options.get("include_top", True)
    if head is None and not partial and rename("head/kernel") in tensors:
        raise ValueError(
            f"Expected a classifier with its bias, or none. Received: {weights if stored else 'tensors'} with "
            f"{rename('head/kernel')} but without {rename('head/bias')}; include_top=False leaves the classifier out"
        )
    if head is None:
        options.setdefault("include_top", False)
    elif not partial and options.get("classes") is None:
        options["classes"] = len(head)
    model = registry.build(name, name=model_name, **options)
    spare = _whole(name, options, rename) if partial else frozenset()
    fill(model, tensors, weights if stored else "tensors", rename, module.to_keras, spare)
    return model


def _whole(name: str, options: dict, rename: Callable) -> frozenset[str]:
    """Names of all the source's tensors of a network, of which a model without its top leaves some."""
    return frozenset(rename(v.path) for v in registry.undrawn(name, **registry.overrides_of(options)).weights)


def as_tensors(
    model: keras.Model, target: str = "timm", name: str | None = None, **build_options
) -> dict[str, np.ndarray]:
    """The weights of a model under another implementation's names and in its layout; arguments as for `save`."""
    module = source_module(target)
    if not hasattr(module, "from_keras"):
        raise ValueError(f"Expected a target that nfzoo writes: timm. Received: target={target!r}")
    parsed = names.parse(name or model.name)
    options = with_dialect(parsed, module, build_options)
    rename = _rule(module, parsed, options)
    _check_reading(model, name or model.name, target, options)
    tensors = {}
    for variable in model.weights:
        key = rename(variable.path)
        value = keras.ops.convert_to_numpy(variable)
        tensors |= {key: np.asarray(module.from_keras(value, key, parsed), order="C"), **module.companions(key)}
    return tensors


def _check_reading(model: keras.Model, name: str, target: str, options: dict) -> None:
    """Refuse a model that computes something else than the target with the same numbers."""
    settings = {**registry.overrides_of(options), "input_shape": model.input_shape[1:], "dropout_rate": 0.0}
    ours, theirs = reading(model), reading(registry.undrawn(name, **settings))
    layers = [layer for layer in ours if ours[layer] != theirs.get(layer)]
    if layers:
        raise ValueError(
            f"Expected a model that {target} computes alike. Received: {model.name}, which differs in "
            f'{shorten(layers)}. Build it with dialect="{options["dialect"]}", or give the name it has there, e.g. '
            'name="dm_nfnet_f0", and the overrides that it was built with.'
        )


def save(
    model: keras.Model, path: str | pathlib.Path, target: str = "timm", name: str | None = None, **build_options
) -> pathlib.Path:
    """Write a model's weights in timm's names and layout, as safetensors.

    Args:
        model: of a timm architecture, built with `dialect="timm"`; another reading is refused.
        path: ends with .safetensors.
        target: "timm".
        name: name of the architecture; default: the model's name.
        **build_options: what the model was built with that changes its layers, e.g. `deep_stem=True`.

    Raises:
        ValueError: for an architecture that timm does not have or computes otherwise, another target or ending.

    Example:
        >>> import tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "resnet.safetensors"
        >>> _ = save(registry.build("bn_test_resnet"), path)
        >>> load("bn_test_resnet", "timm", path).count_params() == registry.build("bn_test_resnet").count_params()
        True
    """
    import safetensors.numpy

    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"Expected a path that ends with .safetensors. Received: {path}")
    tensors = as_tensors(model, target, name, **build_options)
    with atomic(path) as partial:
        # Its save_file makes files that nobody else may read.
        partial.write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    return path


def source_module(source: str) -> ModuleType:
    if source not in SOURCES:
        raise ValueError(f"Expected source to be one of {', '.join(SOURCES)}. Received: {source!r}")
    return SOURCES[source]


def with_dialect(name: names.Name, module: ModuleType, options: dict) -> dict:
    """The source's dialect, unless the caller's or the name's is one that the source has too."""
    known, source = names.FAMILIES[name.family].DIALECTS, module.__name__.rpartition(".")[-1]
    spoken = [dialect for dialect in module.DIALECTS if dialect in known]
    if not spoken:
        raise ValueError(f"Expected an architecture of {source}. Received: {name}")
    if options.get("dialect") not in (None, *spoken):
        raise ValueError(f"Expected a dialect of {source}: {', '.join(spoken)}. Received: {options['dialect']!r}")
    stated = options.get("dialect") or dict(name.overrides).get("dialect")
    return {**options, "dialect": stated if stated in spoken else spoken[0]}


def _rule(module: ModuleType, name: names.Name, options: dict) -> Callable[[str], str]:
    _, spec = names.resolve_fields(name, registry.overrides_of(options))
    return module.rule(name, spec)


def _wanted(tensors: Mapping[str, np.ndarray], module: ModuleType) -> dict[str, np.ndarray]:
    return {key: value for key, value in tensors.items() if not re.search(module.IGNORED, key)}
