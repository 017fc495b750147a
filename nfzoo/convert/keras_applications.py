"""keras.applications' names: EfficientNet B0-B7, ResNet V1 and V2."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

from nfzoo.weights import load, read_keras

DIALECTS = ("keras",)
# The normalization of the input: ask nfzoo for `include_preprocessing=True` instead.
# (x / 255 - mean) / std of ImageNet, which the published files store as mean and as std or its square.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IGNORED = r"^(normalization|rescaling)"


def rule(name, spec) -> Callable[[str], str]:
    """Return the function from our variable paths to those of keras.applications."""
    if name.variant != "bn" or name.family not in ("efficientnet", "resnet"):
        raise ValueError(f"Expected an architecture of keras.applications. Received: {name}")
    if name.family == "efficientnet":
        outside, block = _EFFICIENTNET, _efficientnet_block
    elif spec.preactivation:
        outside = {"stem_conv1": "conv1_conv", "top_norm": "post_bn", "head": "predictions"}
        block = _resnet_v2_block
    else:
        outside = {"stem_conv1": "conv1_conv", "stem_norm1": "conv1_bn", "head": "predictions"}
        block = _resnet_block

    def rename(path: str) -> str:
        layer, leaf = path.rsplit("/", 1)
        match = re.fullmatch(r"stage(\d+)_block(\d+)_(\w+)", layer)
        try:
            theirs = outside[layer] if match is None else block(int(match[1]), int(match[2]), match[3])
        except (KeyError, ValueError):
            raise ValueError(f"Expected a variable that keras.applications knows. Received: {path}") from None
        return f"{theirs}/{leaf}"

    return rename


_EFFICIENTNET = {
    "stem_conv1": "stem_conv", "stem_norm1": "stem_bn", "top_conv": "top_conv", "top_norm": "top_bn",
    "head": "predictions",
}  # fmt: skip


def _efficientnet_block(stage: int, block: int, part: str) -> str:
    parts = {
        "conv1": "expand_conv", "norm1": "expand_bn", "conv2": "dwconv", "norm2": "bn", "conv3": "project_conv",
        "norm3": "project_bn",
    }  # fmt: skip
    return f"block{stage}{chr(ord('a') + block - 1)}_{parts.get(part, part)}"


def _resnet_block(stage: int, block: int, part: str) -> str:
    kind = "bn" if "norm" in part else "conv"
    number = 0 if part.startswith("shortcut") else int(part[-1])
    return f"conv{stage + 1}_block{block}_{number}_{kind}"


def _resnet_v2_block(stage: int, block: int, part: str) -> str:
    if part == "norm1":
        return f"conv{stage + 1}_block{block}_preact_bn"
    if part.startswith("norm"):
        return f"conv{stage + 1}_block{block}_{int(part[-1]) - 1}_bn"
    return _resnet_block(stage, block, part)


def to_keras(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The layouts are ours, but for squeeze-excite, which keras.applications writes as 1x1 convolutions."""
    return value[0, 0] if len(shape) == 2 and value.shape[:-2] == (1, 1) else value


def read(weights: Any, name) -> dict[str, np.ndarray]:
    """Read a mapping, a live model, or a file; the only dense layer is the classifier, whatever its name.

    Raises:
        ValueError: for a damaged file, or a normalization of the input that `include_preprocessing=True` is not.
    """
    tensors = _read(weights, name)
    dense = {key.rsplit("/", 1)[0] for key, value in tensors.items() if key.endswith("/kernel") and value.ndim == 2}
    if len(dense) == 1:
        layer = dense.pop()
        tensors = {key.replace(f"{layer}/", "predictions/"): value for key, value in tensors.items()}
    mean, variance = (tensors.get(f"normalization/{kind}") for kind in ("mean", "variance"))
    known = [((0, 0, 0), (1, 1, 1)), (_MEAN, _STD), (_MEAN, np.square(_STD))]
    if mean is not None and not any(np.allclose(mean, m) and np.allclose(variance, v) for m, v in known):
        raise ValueError(
            f"Expected an input normalized by ImageNet's constants, or not. Received: mean {mean.ravel()}, variance "
            f"{variance.ravel()}. Leave these tensors out, and put that layer before the converted model yourself."
        )
    return tensors


def _read(weights: Any, name) -> dict[str, np.ndarray]:
    # Files: legacy .h5, Keras 3 .weights.h5 or .keras.
    if isinstance(weights, Mapping):
        return {key: np.asarray(value) for key, value in weights.items()}
    if isinstance(weights, keras.Model):
        return {v.path: keras.ops.convert_to_numpy(v) for v in weights.weights}
    path = Path(weights)
    if not path.exists():
        raise FileNotFoundError(f"Expected weights of keras.applications. Received: {path}, which does not exist")
    if path.suffix == ".keras":
        return read_keras(path)
    try:
        with h5py.File(path, "r") as file:
            root = file["model_weights"] if "model_weights" in file else file
            if "layer_names" in root.attrs:
                return _by_layer_name(root)
            head = file.get("layers/dense/vars/0")
            classes = None if head is None else head.shape[-1]
    except (OSError, KeyError) as error:
        raise ValueError(f"Expected an HDF5 file of weights. Received: {path}, which is damaged: {error}") from None
    return _by_order(path, name, classes)


def _by_layer_name(root) -> dict[str, np.ndarray]:
    """A legacy file: one group per layer, whose attribute lists the names of its arrays."""
    text = lambda value: value.decode() if isinstance(value, bytes) else value  # noqa: E731
    tensors = {}
    for layer in map(text, root.attrs["layer_names"]):
        for array in map(text, root[layer].attrs["weight_names"]):
            leaf = array.rsplit("/", 1)[-1].removesuffix(":0").replace("depthwise_kernel", "kernel")
            tensors[f"{layer}/{leaf}"] = np.asarray(root[layer][array])
    return tensors


def _by_order(path: Path, name, classes: int | None) -> dict[str, np.ndarray]:
    """A Keras 3 file numbers its layers: only the model that it was saved from can tell their names."""
    maker = _maker(name.row)
    options = {"include_top": False} if classes is None else {"classes": classes}
    model = maker(weights=None, classifier_activation=None, **options)
    load(model, path)
    return _read(model, name)


def _maker(row: str):
    kind, _, size = row.partition("_")
    known = {"efficientnet": f"EfficientNet{size.upper()}", "resnetv2": f"ResNet{size}V2"}
    maker = getattr(keras.applications, known.get(kind, kind.replace("resnet", "ResNet")), None)
    if maker is None:
        raise ValueError(f"Expected an architecture of keras.applications. Received: {row}")
    return maker
