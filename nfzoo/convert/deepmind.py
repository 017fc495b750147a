"""DeepMind's (Haiku's) names: NFNet, NF-ResNet, NF-RegNet, SkipInit and Fixup ResNets of deepmind-research/nfnets."""

import io
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nfzoo.convert import pickles

DIALECTS = ("deepmind",)
IGNORED = r"^$"

_NETWORKS = {  # (family, variant) -> module of the network and of its blocks
    ("nfnet", "nf"): ("NFNet", "nf_block"),
    ("regnet", "nf"): ("NF_RegNet", "nf_block"),
    ("resnet", "nf"): ("NF_ResNet", "nf_res_block"),
    ("resnet", "skipinit"): ("SkipInit_ResNet", "nf_res_block"),
    ("resnet", "fixup"): ("FixUp_ResNet", "res_block"),
}
_SCALARS = {  # of a block, by our part and leaf
    "enter/bias": "bias1a", "preact1/bias": "bias1b", "preconv2/bias": "bias2a", "preact2/bias": "bias2b",
    "preconv3/bias": "bias3a", "exit/bias": "bias3b", "exit/gain": "scale", "out/gain": "skip_gain",
}  # fmt: skip


def rule(name, spec) -> Callable[[str], str]:
    """Return the function from our variable paths to Haiku's "module/parameter"."""
    if (name.family, name.variant) not in _NETWORKS:
        known = ", ".join(f"{variant} {family}" for family, variant in _NETWORKS)
        raise ValueError(f"Expected an architecture of DeepMind's nfnets: {known}. Received: {name}")
    network, block_name = _NETWORKS[name.family, name.variant]
    standardized = name.variant == "nf"
    convs = ("conv0", "conv1", "conv1b", "conv2") if name.family == "nfnet" else ("conv0", "conv1", "conv2")
    parts = {f"conv{number}": f"~/{conv}" for number, conv in enumerate(convs, 1)}
    parts["shortcut_conv"] = "~/conv_shortcut"
    dense = {"se_reduce": "~/squeeze_excite/~/linear", "se_expand": "~/squeeze_excite/~/linear_1"}
    starts = [sum(spec.depths[:stage]) for stage in range(len(spec.depths))]

    def rename(path: str) -> str:
        layer, leaf = path.rsplit("/", 1)
        match = re.fullmatch(r"stage(\d+)_block(\d+)_(\w+)", layer)
        if match is None:
            return f"{network}/{_outside(layer, leaf, name.family, standardized)}"
        index = starts[int(match[1]) - 1] + int(match[2]) - 1
        block, part = f"{network}/~/{block_name}" + (f"_{index}" if index else ""), match[3]
        if part in parts:
            return f"{block}/{parts[part]}/{_leaf(leaf, standardized)}"
        if part in dense:
            return f"{block}/{dense[part]}/{_leaf(leaf, False)}"
        if f"{part}/{leaf}" in _SCALARS:
            return f"{block}/{_SCALARS[f'{part}/{leaf}']}"
        raise ValueError(f"Expected a variable that DeepMind's networks have. Received: {path}")

    return rename


def _outside(layer: str, leaf: str, family: str, standardized: bool) -> str:
    if layer == "head":
        return f"~/linear/{_leaf(leaf, False)}"
    if layer in ("stem_preact1", "top_leave"):
        return {"stem_preact1": "bias1", "top_leave": "bias2"}[layer]
    if layer == "top_conv":
        return f"~/final_conv/{_leaf(leaf, standardized)}"
    number = int(layer.removeprefix("stem_conv"))
    return f"~/{f'stem_conv{number - 1}' if family == 'nfnet' else 'initial_conv'}/{_leaf(leaf, standardized)}"


def _leaf(leaf: str, standardized: bool) -> str:
    return {"kernel": "w", "bias": "bias" if standardized else "b", "gain": "gain"}[leaf]


def to_keras(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Haiku's layouts are Keras'."""
    return value.reshape(shape) if value.size == 1 and shape == () else value


def read(weights: Any, name=None) -> dict[str, np.ndarray]:
    """Read a mapping, a released pickle (they end with .npz but are pickles), or a true .npz."""
    if not isinstance(weights, Mapping):
        path = Path(weights)
        content = path.read_bytes()
        read_content = _read_npz if zipfile.is_zipfile(io.BytesIO(content)) else pickles.load
        weights = read_content(content, path)
    if not isinstance(weights, Mapping):
        raise ValueError(f"Expected a mapping of names to arrays. Received: a {type(weights).__name__}")
    return dict(_flat(weights))


def _read_npz(content: bytes, path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            return dict(archive)
    except (ValueError, zipfile.BadZipFile) as error:  # pickled objects inside, or damaged
        raise ValueError(f"Expected an .npz file of arrays. Received: {path}, which fails with: {error}") from None


def _flat(tree: Mapping, prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", np.asarray(value)
