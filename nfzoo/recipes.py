"""Recipes: everything that decides a training run, as validated data. No Keras here.

A recipe is a frozen tree of numbers and short strings; `override` changes leaves by dotted paths, `fingerprint` names
what was run. `RECIPES` holds the rows.
"""

import difflib
import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Data(_Frozen):
    """Where images come from: `name` is "digits", "fake", a tfds name, a folder of images by class, or an .npz file."""

    name: str = "digits"
    data_dir: str | None = None
    validation_fraction: float = Field(0.2, ge=0, lt=1)
    image_size: int | None = Field(None, gt=0)
    limit: int | None = Field(None, gt=0)


class Augment(_Frozen):
    """Random crop of a zero-padded image, random horizontal flip; `on_validation` augments the validation split too."""

    crop_padding: int = Field(0, ge=0)
    flip: bool = False
    on_validation: bool = False


class Optimizer(_Frozen):
    """Constant learning rate; the fields of another optimizer than `name` are not used."""

    name: Literal["adam", "sgd"] = "adam"
    learning_rate: float = Field(1e-3, gt=0)
    beta_1: float = Field(0.9, ge=0, lt=1)
    beta_2: float = Field(0.999, ge=0, lt=1)
    epsilon: float = Field(1e-7, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = True


class Clip(_Frozen):
    """Adaptive gradient clipping; the fields of `nfzoo.AGC`."""

    clip_factor: float = Field(0.01, gt=0)
    eps: float = Field(1e-3, gt=0)
    exclude: tuple[str, ...] = ("head/kernel",)
    vector_units: Literal["tensor", "element"] = "tensor"


class Recipe(_Frozen):
    """One way to train.

    Attributes:
        build: overrides of `nfzoo.build` by pattern of the model's name; all that match apply, in order.
        seed: decides initialisation, splits, order, augmentation and dropout.
        seeds: the seeds that a scan repeats each setting with.
        frozen_epochs: epochs at the start that train a new classifier alone, on the weights of `build`; then all layers
            learn, with a fresh optimizer. frozen_learning_rate: of the first part; None for the optimizer's.
    """

    data: Data = Data()
    augment: Augment = Augment()
    optimizer: Optimizer = Optimizer()
    agc: Clip | None = None
    batch_size: int = Field(128, gt=0)
    epochs: int = Field(10, gt=0)
    precision: Literal["float32", "mixed_float16", "mixed_bfloat16"] = "float32"
    build: dict[str, dict[str, Any]] = {}
    seed: int = Field(0, ge=0)
    seeds: tuple[int, ...] = (0,)
    frozen_epochs: int = Field(0, ge=0)
    frozen_learning_rate: float | None = Field(None, gt=0)

    @field_validator("frozen_epochs")
    @classmethod
    def _within_the_run(cls, value: int, info: ValidationInfo) -> int:
        if value > (epochs := info.data.get("epochs", value)):
            raise ValueError(f"Expected at most epochs={epochs}")
        return value

    @model_validator(mode="before")
    @classmethod
    def _agc_by_factor(cls, values: Any) -> Any:
        # `agc=0.02` and `agc=none` read better on a command line than a table.
        if isinstance(values, dict) and isinstance(values.get("agc"), int | float):
            values = {**values, "agc": {"clip_factor": values["agc"]}}
        return values


# The poster's networks pad and normalise as PyTorch does, and its baselines start from a fan-out that is not divided by
# the groups (nfzoo.numerics.init_std).
_POSTER_BUILD = {
    "*efficientnet*": {"padding": "symmetric", "dropout_rate": 0.2},
    "bn_*": {"epsilon": 1e-5, "momentum": 0.9, "init": "poster"},
    "none_*": {"init": "poster"},
}

RECIPES: dict[str, Recipe] = {
    # Poster "Designing Normalizer-Free EfficientNets", Table 1: constant learning rate, no weight decay, the validation
    # split augmented as the training split, accuracy of the last epoch's weights on the test set.
    "poster": Recipe(
        data=Data(name="cifar100", validation_fraction=0.2),
        augment=Augment(crop_padding=4, flip=True, on_validation=True),
        optimizer=Optimizer(name="adam", learning_rate=1e-3, epsilon=1e-8),
        batch_size=512,
        epochs=20,
        build=_POSTER_BUILD,
        seed=868,
        seeds=(868, 67, 472, 362, 970),
    ),
    # A minute a model on two cores, on the real digits that come with scikit-learn. So few steps (144) would leave the
    # moving statistics of BN behind at its usual momentum of 0.99.
    "demo": Recipe(
        data=Data(name="digits"),
        augment=Augment(crop_padding=2),
        optimizer=Optimizer(name="adam", learning_rate=1e-3),
        agc=Clip(clip_factor=0.1),
        batch_size=64,
        epochs=8,
        build={"bn_*": {"momentum": 0.9}},
        seeds=(0, 1, 2),
    ),
    # Another data set for a trained network: its classifier first, then all layers in small steps.
    "finetune": Recipe(
        data=Data(image_size=224),
        augment=Augment(crop_padding=16, flip=True),
        optimizer=Optimizer(name="adam", learning_rate=1e-4),
        batch_size=32,
        epochs=10,
        frozen_epochs=2,
        frozen_learning_rate=1e-3,
    ),
}


def get(name: str) -> Recipe:
    """Look up a recipe by name.

    Example:
        >>> get("poster").batch_size
        512
    """
    if name not in RECIPES:
        raise ValueError(f"Expected a recipe, one of {', '.join(RECIPES)}. Received: {name!r}")
    return RECIPES[name]


def override(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """Replace leaves by dotted paths; strings are read as JSON where they are JSON, and "none" as None.

    Raises:
        ValueError: for a path that does not exist (its neighbours are listed) or a value that does not fit.

    Example:
        >>> override(get("poster"), {"optimizer.learning_rate": "0.01", "agc": "none"}).optimizer.learning_rate
        0.01
    """
    tree = recipe.model_dump()
    for path, value in changes.items():
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            _known(path, parent, node)
            node[parent] = dict(node[parent]) if node[parent] is not None else {}
            node = node[parent]
        if parents[:1] not in (["build"], ["agc"]):
            _known(path, leaf, node)
        node[leaf] = parse_value(value)
    try:
        return type(recipe).model_validate(tree)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}. Received: {e['input']!r}" for e in error.errors()]
        raise ValueError("Expected valid settings. " + "; ".join(lines)) from None


def _known(path: str, key: str, node: Any) -> None:
    if not isinstance(node, dict) or key not in node:
        there = sorted(node) if isinstance(node, dict) else []
        close = difflib.get_close_matches(key, there, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"Expected a setting. Received: {path!r}; {key!r} is not one of {', '.join(there)}.{hint}")


def parse_value(value: Any) -> Any:
    """Read a value from a command line: JSON where it is JSON, "none" as None, else the text itself.

    Example:
        >>> parse_value("3e-4"), parse_value("none"), parse_value("true"), parse_value("selu")
        (0.0003, None, True, 'selu')
    """
    if not isinstance(value, str):
        return value
    if value.lower() == "none":
        return None
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return {"true": True, "false": False}.get(value.lower(), value)


def fingerprint(recipe: Recipe) -> str:
    """Twelve hexadecimal digits that name a recipe, whatever its seeds and the folder of its data.

    Fields at their defaults are left out, so that a new field does not rename every old result.

    Example:
        >>> fingerprint(get("poster")) == fingerprint(override(get("poster"), {"seed": 67}))
        True
    """
    anywhere = recipe.data.model_copy(update={"data_dir": None})
    plain = recipe.model_copy(update={"seed": 0, "seeds": (0,), "data": anywhere})
    tree = plain.model_dump(exclude_defaults=True)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]
