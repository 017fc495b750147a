"""Weights and inputs of the stored reference outputs, drawn anew from their names (see goldens/README.md)."""

import json
import pathlib
import zlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "goldens"


def read(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The reference value of a tensor of PyTorch ("a.weight") or Haiku ("a/w"), seeded with the CRC of its name."""
    rng, haiku = np.random.default_rng(zlib.crc32(name.encode())), "/" in name
    leaf = name.rsplit("/" if haiku else ".", 1)[-1]
    near_one = ("gain", "skip_gain", "scale") if haiku else ("running_var", "gain", "skipinit_gain")
    if leaf in near_one or (leaf == "weight" and len(shape) == 1):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if len(shape) < 2:
        return (0.1 * rng.standard_normal(shape)).astype(np.float32)
    fan_in = np.prod(shape[:-1] if haiku else shape[1:])
    return (rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)


def weights(golden: dict) -> dict[str, np.ndarray]:
    return {name: draw(name, tuple(shape)) for name, shape in golden["tensors"] if "num_batches" not in name}


def image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).standard_normal((1, height, width, 3)).astype(np.float32)


# ---------------------------------------------------------------- names of the poster's code -> ours
_LEAVES = {"running_mean": "moving_mean", "running_var": "moving_variance"}
_STAGES = [(s, b) for s, n in enumerate((1, 2, 2, 3, 3, 4, 1), 1) for b in range(1, n + 1)]


def poster_efficientnet(name: str) -> str:
    """blocks.3.conv.1.0.weight -> stage3_block1_conv2/kernel."""
    module, leaf = name.rsplit(".", 1)
    parts = module.split(".")
    if parts[0] == "stem":
        return f"stem_conv1/{_leaf(leaf)}" if parts[1] == "0" else f"stem_norm1/{_leaf(leaf, norm=True)}"
    if parts[0] == "head":
        return f"top_conv/{_leaf(leaf)}" if parts[1] == "0" else f"top_norm/{_leaf(leaf, norm=True)}"
    if parts[0] == "classifier":
        return f"head/{_leaf(leaf)}"
    stage, block = _STAGES[int(parts[1])]
    prefix, unit = f"stage{stage}_block{block}", int(parts[3])
    # The first block has no expansion: its units are depthwise, squeeze-excite, project.
    unit += 1 if parts[1] == "0" else 0
    if parts[4].startswith("se_"):
        return f"{prefix}_{parts[4]}/{_leaf(leaf)}"
    number = {0: 1, 1: 2, 3: 3}[unit]
    return (
        f"{prefix}_conv{number}/{_leaf(leaf)}" if parts[4] == "0" else f"{prefix}_norm{number}/{_leaf(leaf, norm=True)}"
    )


def poster_ffnn(name: str) -> str:
    """blocks.0.linear.1.running_mean -> hidden_norm2/moving_mean."""
    module, leaf = name.rsplit(".", 1)
    parts = module.split(".")
    if parts[0] == "tail":
        return f"head/{_leaf(leaf)}"
    number, unit = (1, parts[1]) if parts[0] == "head" else (int(parts[1]) + 2, parts[3])
    return f"hidden_linear{number}/{_leaf(leaf)}" if unit == "0" else f"hidden_norm{number}/{_leaf(leaf, norm=True)}"


def _leaf(leaf: str, norm: bool = False) -> str:
    return _LEAVES.get(leaf) or {"weight": "gamma" if norm else "kernel", "bias": "beta" if norm else "bias"}[leaf]


def transpose(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """PyTorch layout -> Keras layout of the given shape."""
    if value.ndim == 4 and len(shape) == 2:
        value = value[:, :, 0, 0]
    if value.ndim == 4:
        depthwise = value.shape[1] == 1 and shape[2] == value.shape[0]
        return value.transpose(2, 3, 0, 1) if depthwise else value.transpose(2, 3, 1, 0)
    return value.T if value.ndim == 2 else value
