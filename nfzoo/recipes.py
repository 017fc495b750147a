"""Recipes: everything that decides a training run, as rows of validated data. No Keras here.

A recipe is a tree of `nfzoo.settings`; `override` changes leaves by dotted paths, `fingerprint` names what was run.
`RECIPES` holds the rows; docs/recipes.md shows them side by side.
"""

import difflib
import hashlib
import json
import re
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from nfzoo.settings import (
    NO_DECAY,
    Augment,
    Clip,
    Data,
    Ema,
    Group,
    Optimizer,
    RandAugment,
    Recipe,
    Schedule,
    suggest,
)

# The poster's networks pad and normalise as PyTorch does, and its baselines start from a fan-out that is not divided by
# the groups (nfzoo.numerics.init_std).
_POSTER_BUILD = {
    "*efficientnet*": {"padding": "symmetric", "dropout_rate": 0.2},
    "bn_*": {"epsilon": 1e-5, "momentum": 0.9, "init": "poster"},
    "none_*": {"init": "poster"},
}


def _sgd(**settings) -> Optimizer:
    """Momentum 0.9, as all the papers here."""
    return Optimizer(name="momentum_sgd", **settings)


def _with(recipe: Recipe, **optimizer) -> Recipe:
    return recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update=optimizer)})


# EUNNet's paper, section V-A1, CIFAR-10: 200 epochs, a tenth of the learning rate from 100 and from 150 on, all 50,000
# images, weight decay for all variables, 5 runs. Its "vertical flipping" is read as the usual horizontal one.
_EUNNET = Recipe(
    data=Data(name="cifar10", validation_fraction=0),
    augment=Augment(crop_padding=4, flip=True),
    optimizer=_sgd(learning_rate=0.1, nesterov=False, weight_decay=5e-4),
    schedule=Schedule(name="step", milestones=(100, 150), factor=0.1),
    batch_size=128,
    epochs=200,
    seeds=(0, 1, 2, 3, 4),
)

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
    # NFNet (arXiv 2102.06171), appendix A, for F0; dropout comes with the model. Of the larger ones, F1 and F2 have
    # RandAugment's magnitude 10, the others 15, and sizes of their own. Here crops are of zero-padded images, not boxes
    # of 8 to 100 % of the area: images are in memory at one size; which is also why all of ImageNet does not fit.
    "nfnet": Recipe(
        data=Data(name="imagenet2012", image_size=192, validation_fraction=0),
        augment=Augment(
            crop_padding=24, flip=True, mixup=0.2, cutmix=1.0, rand_augment=RandAugment(layers=4, magnitude=5)
        ),
        optimizer=_sgd(learning_rate=0.1, per_256=True, weight_decay=2e-5, groups=(NO_DECAY,)),
        schedule=Schedule(name="cosine", warmup_epochs=5),
        agc=Clip(clip_factor=0.01),
        ema=Ema(momentum=0.99999),
        label_smoothing=0.1,
        batch_size=4096,
        epochs=360,
        precision="mixed_bfloat16",
        build={"*": {"drop_path_rate": 0.25}},
    ),
    # NF-ResNet (arXiv 2101.08692), from DeepMind's base configuration of ResNets; none of the paper's own is public.
    # The crops as above.
    "nf_resnet": Recipe(
        data=Data(name="imagenet2012", image_size=224, validation_fraction=0),
        augment=Augment(crop_padding=28, flip=True),
        optimizer=_sgd(learning_rate=0.1, per_256=True, weight_decay=1e-4, groups=(NO_DECAY,)),
        schedule=Schedule(name="cosine", warmup_epochs=5),
        label_smoothing=0.1,
        batch_size=1024,
        epochs=90,
    ),
    # NF-RegNet, DeepMind's experiment_nf_regnets.py, for B0: B1 to B5 have weight decay 6e-5, 7e-5, 8e-5, 9e-5, 1e-4,
    # and sizes of their own. The crops as above.
    "nf_regnet": Recipe(
        data=Data(name="imagenet2012", image_size=192, validation_fraction=0),
        augment=Augment(crop_padding=24, flip=True, mixup=0.2, cutmix=1.0),
        optimizer=_sgd(learning_rate=0.4, weight_decay=5e-5, groups=(NO_DECAY,)),
        schedule=Schedule(name="cosine", warmup_epochs=5, final=1e-3),
        ema=Ema(momentum=0.99999),
        label_smoothing=0.1,
        batch_size=1024,
        epochs=360,
        build={"*": {"drop_path_rate": 0.1}},
    ),
    "eunnet_cifar": _EUNNET,
    # The same protocol, with a tenth of the learning rate for Fixup's scalars and, as in its authors' script, the
    # classifier's bias; weight decay is for all.
    "fixup_cifar": _with(_EUNNET, groups=(Group(pattern="gain|bias", learning_rate=0.1),)),
    # The same protocol, without weight decay of biases and scales.
    "rescale": _with(_EUNNET, groups=(NO_DECAY,)),
    # The same protocol, but the learning rate is halved every 5 epochs from mid-training on: from epoch 100, we read.
    "skipinit": _EUNNET.model_copy(update={"schedule": Schedule(name="halving", start=100, every=5)}),
    # Ours, from no paper: what is usual today for images of 32 pixels. An EfficientNet's stem has no stride there: its
    # last stage sees 2x2 maps. Adam's decay is decoupled. The rate is the best of 0.002, 0.004 and 0.008 for BN and two
    # networks without it, in trials of 3 epochs (docs/closing-the-gap.md); nobody ran all 100.
    "cifar": Recipe(
        data=Data(name="cifar100"),
        augment=Augment(crop_padding=4, flip=True, mixup=0.2),
        optimizer=Optimizer(name="adam", learning_rate=4e-3, weight_decay=0.05, groups=(NO_DECAY,)),
        schedule=Schedule(name="cosine", warmup_epochs=1),
        ema=Ema(momentum=0.999),
        label_smoothing=0.1,
        batch_size=256,
        epochs=100,
        build={"*net*": {"drop_path_rate": 0.1}, "*efficientnet*": {"stem": "small"}},
        seeds=(868, 67, 472, 362, 970),
    ),
    # Ours, from no paper: batches of 4 to 16 images, which BN suffers from. The learning rate shrinks with the batch,
    # AGC's factor is the largest of its grid.
    "small_batch": Recipe(
        data=Data(name="cifar100"),
        augment=Augment(crop_padding=4, flip=True),
        optimizer=_sgd(learning_rate=0.1, per_256=True, weight_decay=5e-4, groups=(NO_DECAY,)),
        schedule=Schedule(name="cosine", warmup_epochs=1),
        agc=Clip(clip_factor=suggest(8)),
        batch_size=8,
        epochs=20,
    ),
}


def get(name: str) -> Recipe:
    """Look up a recipe by name.

    Raises:
        ValueError: for an unknown name; the known ones are listed.

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
    # Details of what a number may stand for come last: behind that number, and behind what it follows from.
    for path, value in sorted(changes.items(), key=lambda item: item[0].startswith(("agc.", "ema."))):
        *parents, leaf = path.split(".")
        if parents and isinstance(tree.get(parents[0]), str | int | float):
            tree = _validated(recipe, tree).model_dump()
        node, kind = tree, type(recipe)
        for parent in parents:
            _known(path, parent, node)
            kind = _settings(kind, parent)
            # A part that is off comes on as it is by default.
            node[parent] = kind().model_dump() if node[parent] is None else dict(node[parent])
            node = node[parent]
        if parents[:1] != ["build"]:
            _known(path, leaf, node)
        node[leaf] = value if _is_text(kind, leaf, value) else parse_value(value)  # a name may look like a number
    return _validated(recipe, tree)


def _validated(recipe: Recipe, tree: dict) -> Recipe:
    try:
        return type(recipe).model_validate(tree)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}. Received: {e['input']!r}" for e in error.errors()]
        raise ValueError("Expected valid settings. " + "; ".join(lines)) from None


def _settings(kind: type[BaseModel] | None, name: str) -> type[BaseModel] | None:
    """The class of a part of settings, whether it may be None or not."""
    found = kind.model_fields[name].annotation if kind else None
    parts = [part for part in (found, *get_args(found)) if isinstance(part, type) and issubclass(part, BaseModel)]
    return parts[0] if parts else None


def _is_text(kind: type[BaseModel] | None, leaf: str, value: Any) -> bool:
    """Whether a value is meant as it is written: of a setting that takes texts, and perhaps none, but no number."""
    field = kind.model_fields.get(leaf) if kind else None
    declared = field.annotation if field else None
    taken = set(get_args(declared)) if get_origin(declared) is UnionType else {declared}
    none = NoneType in taken and str(value).lower() == "none"
    return str in taken and not taken & {int, float} and not none


def _known(path: str, key: str, node: Any) -> None:
    if not isinstance(node, dict) or key not in node:
        there = sorted(node) if isinstance(node, dict) else []
        close = difflib.get_close_matches(key, there, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"Expected a setting. Received: {path!r}; {key!r} is not one of {', '.join(there)}.{hint}")


def describe(recipe: Recipe) -> dict[str, str]:
    """Say in short texts what a recipe does, for tables: data, optimizer, schedule, augmentation, AGC, average.

    Example:
        >>> describe(get("skipinit"))["schedule"]
        'halved every 5 epochs after 100'
    """
    optimizer, schedule, a = recipe.optimizer, recipe.schedule, recipe.augment
    schedules = {
        "constant": "constant",
        "step": f"×{schedule.factor:g} at {', '.join(f'{epoch:g}' for epoch in schedule.milestones)}",
        "halving": f"halved every {schedule.every:g} epochs after {schedule.start:g}",
        "cosine": f"cosine to {schedule.final:g}",
    }
    rand = a.rand_augment
    return {
        "data": f"{recipe.data.name}, {recipe.epochs} epochs of {recipe.batch_size}",
        "optimizer": _listed(
            f"{optimizer.name} {optimizer.learning_rate:g}" + " per 256" * optimizer.per_256,
            _said("decay", optimizer.weight_decay),
            *map(_group, optimizer.groups),
        ),
        "schedule": _listed(schedules[schedule.name], _said("warm-up", schedule.warmup_epochs)),
        "augmentation": _listed(
            _said("crop", a.crop_padding),
            a.flip and "flip",
            _said("mixup", a.mixup),
            _said("cutmix", a.cutmix),
            rand and f"RandAugment {rand.layers} of {rand.magnitude:g}",
            _said("erasing", a.random_erasing),
            _said("smoothing", recipe.label_smoothing),
        ),
        "AGC": f"{recipe.agc.clip_factor:g}" if recipe.agc else "–",
        "average": f"{recipe.ema.momentum:g}" if recipe.ema else "–",
    }


def _listed(*parts: Any) -> str:
    return ", ".join(part for part in parts if part) or "–"


def _said(name: str, amount: float) -> str:
    return f"{name} {amount:g}" if amount else ""


def _group(group: Group) -> str:
    factors = {"rate": group.learning_rate, "decay": group.weight_decay}
    changes = " and ".join(f"{name} ×{factor:g}" for name, factor in factors.items() if factor != 1)
    return f"{changes} for {group.pattern.replace('|', '/')}"


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
        # JSON has no ".01".
        return json.loads(f"0{value}" if re.fullmatch(r"\.\d+(e[+-]?\d+)?", value) else value)
    except json.JSONDecodeError:
        return {"true": True, "false": False}.get(value.lower(), value)


def anywhere(recipe: Recipe) -> Recipe:
    """The recipe of one run, without what does not decide it: the folder of its data, the seeds of others."""
    return recipe.model_copy(update={"seeds": (0,), "data": recipe.data.model_copy(update={"data_dir": None})})


def fingerprint(recipe: Recipe) -> str:
    """Twelve hexadecimal digits that name a recipe, whatever its seeds and the folder of its data.

    Fields at their defaults are left out, so that a new field does not rename every old result.

    Example:
        >>> fingerprint(get("poster")) == fingerprint(override(get("poster"), {"seed": 67}))
        True
    """
    plain = anywhere(recipe).model_copy(update={"seed": 0})
    tree = plain.model_dump(exclude_defaults=True)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]
