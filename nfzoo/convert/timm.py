"""timm's (PyTorch's) names and layouts: NF nets, ResNet, ResNetV2, EfficientNet."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from nfzoo.convert import torch_file
from nfzoo.weights import read_safetensors

DIALECTS = ("timm", "keras")  # its tf_efficientnets keep TensorFlow's padding and epsilon
IGNORED = r"(^|\.)num_batches_tracked$"
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # where training scripts keep the weights
Rule = Callable[[str], str]

_LEAVES = {
    "kernel": "weight", "bias": "bias", "gain": "gain", "gamma": "weight", "beta": "bias",
    "moving_mean": "running_mean", "moving_variance": "running_var",
}  # fmt: skip


def rule(name, spec) -> Rule:
    """Return the function from our variable paths to timm's names."""
    if name.row.endswith("_cifar"):
        raise ValueError(f"Expected an architecture that timm has. Received: {name}")
    if name.family == "efficientnet" and name.variant == "bn":
        return _by_layer(_efficientnet(spec))
    if name.family in ("resnet", "nfnet", "regnet") and name.variant == "nf":
        return _by_layer(_normalizer_free(name.family, spec), scalars={"out/gain": "skipinit_gain"})
    if name.family == "resnet" and name.variant in ("bn", "gn"):
        return _by_layer(_preactivation(spec) if spec.preactivation else _resnet(spec))
    raise ValueError(f"Expected an architecture that timm has. Received: {name}")


def _by_layer(layer_name: Callable, scalars: Mapping[str, str] = {}) -> Rule:
    """Split our path into block, part and leaf; `layer_name(stage, block, part)` names the layer, 0-based."""

    def rename(path: str) -> str:
        layer, leaf = path.rsplit("/", 1)
        match = re.fullmatch(r"stage(\d+)_block(\d+)_(\w+)", layer)
        stage, block, part = (int(match[1]) - 1, int(match[2]) - 1, match[3]) if match else (None, None, layer)
        if f"{part}/{leaf}" in scalars:
            return f"stages.{stage}.{block}.{scalars[f'{part}/{leaf}']}"
        try:
            return f"{layer_name(stage, block, part)}.{_LEAVES[leaf]}"
        except KeyError:
            raise ValueError(f"Expected a variable that timm knows. Received: {path}") from None

    return rename


def _normalizer_free(family: str, spec) -> Callable:
    attention = "attn" if family == "regnet" else "attn_last"
    convs = ("conv1", "conv2", "conv2b", "conv3") if family == "nfnet" else ("conv1", "conv2", "conv3")
    parts = {f"conv{number}": conv for number, conv in enumerate(convs, 1)} | {
        "shortcut_conv": "downsample.conv", "se_reduce": f"{attention}.fc1", "se_expand": f"{attention}.fc2",
        "eca_conv": f"{attention}.conv",
    }  # fmt: skip
    outside = {"top_conv": "final_conv", "head": "head.fc"}
    outside |= {f"stem_conv{n}": f"stem.conv{n}" if family == "nfnet" else "stem.conv" for n in range(1, 5)}

    def layer_name(stage, block, part):
        return outside[part] if stage is None else f"stages.{stage}.{block}.{parts[part]}"

    return layer_name


def _resnet(spec) -> Callable:
    pooled = spec.downsample == "avg_pool"  # timm's pool is the first entry of the sequence then
    parts = {f"conv{n}": f"conv{n}" for n in (1, 2, 3)} | {f"norm{n}": f"bn{n}" for n in (1, 2, 3)}
    parts |= {
        "shortcut_conv": f"downsample.{int(pooled)}", "shortcut_norm": f"downsample.{1 + pooled}",
        "se_reduce": "se.fc1", "se_expand": "se.fc2", "eca_conv": "se.conv",
    }  # fmt: skip
    if spec.deep_stem:
        stem = {"stem_conv1": "conv1.0", "stem_norm1": "conv1.1", "stem_conv2": "conv1.3", "stem_norm2": "conv1.4"}
        stem |= {"stem_conv3": "conv1.6", "stem_norm3": "bn1"}
    else:
        stem = {"stem_conv1": "conv1", "stem_norm1": "bn1"}
    outside = {**stem, "head": "fc"}

    def layer_name(stage, block, part):
        return outside[part] if stage is None else f"layer{stage + 1}.{block}.{parts[part]}"

    return layer_name


def _preactivation(spec) -> Callable:
    parts = {f"{kind}{n}": f"{kind}{n}" for kind in ("conv", "norm") for n in (1, 2, 3)}
    parts["shortcut_conv"] = "downsample.conv"
    outside = {"stem_conv1": "stem.conv", "top_norm": "norm", "head": "head.fc"}

    def layer_name(stage, block, part):
        return outside[part] if stage is None else f"stages.{stage}.blocks.{block}.{parts[part]}"

    return layer_name


def _efficientnet(spec) -> Callable:
    common = {"se_reduce": "se.conv_reduce", "se_expand": "se.conv_expand"}
    expanded = {
        "conv1": "conv_pw", "norm1": "bn1", "conv2": "conv_dw", "norm2": "bn2", "conv3": "conv_pwl", "norm3": "bn3",
    } | common  # fmt: skip
    # Without an expansion conv_pw is the projection, and bn1 belongs to the depthwise convolution.
    plain = {"conv2": "conv_dw", "norm2": "bn1", "conv3": "conv_pw", "norm3": "bn2"} | common
    outside = {
        "stem_conv1": "conv_stem", "stem_norm1": "bn1", "top_conv": "conv_head", "top_norm": "bn2",
        "head": "classifier",
    }  # fmt: skip

    def layer_name(stage, block, part):
        if stage is None:
            return outside[part]
        return f"blocks.{stage}.{block}.{(plain if spec.expansions[stage] == 1 else expanded)[part]}"

    return layer_name


# ---------------------------------------------------------------- layouts
def to_keras(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Bring a PyTorch tensor to the Keras layout of `shape`; what cannot fit comes back as it is."""
    rank, size = len(shape), value.shape
    if rank == 4 and value.ndim == 4:
        depthwise = size[1] == 1 and shape[-1] == 1
        return value.transpose((2, 3, 0, 1) if depthwise else (2, 3, 1, 0))
    if rank == 3 and value.ndim == 3:
        return value.T
    if rank == 2 and size[2:] in ((), (1, 1)):  # a matrix, or a 1x1 convolution
        return value.reshape(size[:2]).T
    if rank == 1 and size[1:] in ((), (1, 1, 1)):  # a vector, or the gain of a convolution
        return value.reshape(-1)
    return value.reshape(()) if rank == 0 and value.size == 1 else value


def from_keras(value: np.ndarray, key: str, name) -> np.ndarray:
    """Bring a Keras array to timm's layout of the tensor `key` of the architecture `name`."""
    if key.endswith(".gain"):
        return value.reshape(-1, 1, 1, 1)
    if value.ndim == 4:
        return value.transpose(2, 3, 0, 1) if key.endswith("conv_dw.weight") else value.transpose(3, 2, 0, 1)
    if value.ndim == 3:
        return value.transpose(2, 1, 0)
    if value.ndim == 2:
        # timm's ResNetV2 classifies by a convolution, its NF nets by a matrix.
        dense = key in ("fc.weight", "classifier.weight") or (key == "head.fc.weight" and name.variant == "nf")
        return value.T if dense else value.T[:, :, None, None]
    return value


def companions(key: str) -> dict[str, np.ndarray]:
    """Tensors that PyTorch stores beside `key`."""
    if key.endswith("running_var"):
        return {key.replace("running_var", "num_batches_tracked"): np.zeros((), np.int64)}
    return {}


# ---------------------------------------------------------------- files
def read(weights: Any, name=None) -> dict[str, np.ndarray]:
    """Read a mapping of tensors, .safetensors, or a PyTorch file (.pth, .pt, .bin) without running its code."""
    if not isinstance(weights, Mapping):
        weights = _read_file(Path(weights))
    if not isinstance(weights, Mapping):
        raise ValueError(f"Expected a mapping of names to tensors. Received: a {type(weights).__name__}")
    inner = next((key for key in _WRAPPERS if isinstance(weights.get(key), Mapping)), None)
    weights = weights if inner is None else weights[inner]
    # Prefixes of DataParallel, torch.compile and Lightning.
    tensors = {re.sub(r"^((module|_orig_mod|model)\.)+", "", str(key)): _array(v) for key, v in weights.items()}
    if len(tensors) < len(weights):
        raise ValueError("Expected every tensor once. Received: some twice, with and without a prefix such as module.")
    unknown = sorted(key for key, value in tensors.items() if value is None)
    if unknown:
        raise ValueError(f"Expected tensors only. Received other values under {unknown[:4]}")
    return tensors


def _read_file(path: Path) -> Mapping:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix in (".pth", ".pt", ".bin", ".tar", ".ckpt"):
        return torch_file.read(path)
    raise ValueError(f"Expected timm's weights as .safetensors, .pth, .pt or .bin. Received: {path}")


def _array(value: Any) -> np.ndarray | None:
    if hasattr(value, "detach"):  # a torch tensor
        value = value.detach().cpu()
        value = value.float().numpy() if str(value.dtype) == "torch.bfloat16" else value.numpy()
    if not isinstance(value, np.ndarray | np.generic):
        return None
    return value.astype(np.float32) if value.dtype == ml_dtypes.bfloat16 else value
