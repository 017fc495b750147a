"""Names to models: parse a name, list names, build the network, tell what it is.

Names are generated, `<variant>_<row>`, from the rows of every family and the variants it admits. Keras is imported by
`build` only, so that listing is quick.
"""

import difflib
import fnmatch
import importlib.resources
import inspect
import json
import math
import numbers
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from types import ModuleType
from typing import Any

from nfzoo.models import efficientnet, ffnn

FAMILIES: dict[str, ModuleType] = {"efficientnet": efficientnet, "ffnn": ffnn}
PREPROCESSING = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # ImageNet, of x / 255
_USER_MODELS: dict[str, Callable] = {}


@dataclass(frozen=True)
class Name:
    """A parsed model name."""

    variant: str
    row: str
    family: str

    def __str__(self) -> str:
        return f"{self.variant}_{self.row}"

    @property
    def spec(self) -> Any:
        return FAMILIES[self.family].SPECS[self.row]


@dataclass(frozen=True)
class ModelInfo:
    """What `model_info` tells of a model; multiply-adds at the given input size."""

    name: str
    family: str
    variant: str
    input_size: int
    classes: int
    parameters: int
    trainable_parameters: int
    multiply_adds: int
    batch_independent: bool
    paper: str


@cache
def names() -> dict[str, Name]:
    """All generated names, tiny test rows included."""
    table = {}
    for family, module in FAMILIES.items():
        for row in module.SPECS:
            for variant in module.ADMITS:
                name = Name(variant, row, family)
                table[str(name)] = name
    return table


def aliases() -> dict[str, str]:
    """Names that other libraries use, e.g. "efficientnet_b0", to ours."""
    return {row: f"bn_{row}" for row in efficientnet.SPECS if not row.startswith("test_")}


def parse(name: str) -> Name:
    """Resolve a model name.

    Raises:
        ValueError: for an unknown name (close matches are given) or a variant that the family does not admit.

    Example:
        >>> parse("sn_efficientnet_b0")
        Name(variant='sn', row='efficientnet_b0', family='efficientnet')
    """
    name = aliases().get(name, name)
    if name in names():
        return names()[name]
    for module in FAMILIES.values():
        for row in module.SPECS:
            if name.endswith(f"_{row}") and re.fullmatch(r"[a-z]+", name.removesuffix(f"_{row}")):
                raise ValueError(
                    f"Expected a variant that {row} admits: {', '.join(module.ADMITS)}. "
                    f"Received: {name.removesuffix(f'_{row}')!r} in {name!r}"
                )
    close = difflib.get_close_matches(name, [*names(), *aliases(), *_USER_MODELS], n=4, cutoff=0.5)
    hint = f" Did you mean {', '.join(close)}?" if close else ""
    raise ValueError(f"Expected the name of a model. Received: {name!r}.{hint} nfzoo.list_models() lists them.")


def list_models(
    pattern: str = "*", *, variant: str | None = None, family: str | None = None, tests: bool = False
) -> list[str]:
    """List model names, naturally sorted.

    Args:
        pattern: shell wildcards, e.g. "sn_*".
        variant, family: keep one variant ("bn") or family ("efficientnet").
        tests: include the tiny rows that tests use.

    Raises:
        ValueError: for a variant or a family that nothing has.

    Example:
        >>> list_models("*_efficientnet_b0")
        ['bn_efficientnet_b0', 'gn_efficientnet_b0', 'nf_efficientnet_b0', 'none_efficientnet_b0', 'sn_efficientnet_b0']
    """
    for word, value in (("variant", variant), ("family", family)):
        known = dict.fromkeys(getattr(name, word) for name in names().values())
        if value is not None and value not in known:
            raise ValueError(f"Expected {word} to be one of {', '.join(known)}. Received: {word}={value!r}")
    found = [
        text
        for text, name in names().items()
        if (variant in (None, name.variant) and family in (None, name.family))
        and (tests or not name.row.startswith("test_"))
    ]
    if variant is None and family is None:
        found += _USER_MODELS
    key = lambda text: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]  # noqa: E731
    return sorted(fnmatch.filter(found, pattern), key=key)


def register_model(function: Callable | None = None, *, name: str | None = None, override: bool = False):
    """Register a function that builds a model, so that `build`, `list_models` and the engine know it by name.

    Args:
        function: takes the keyword arguments of `build` that it understands, returns a `keras.Model`.
        name: default: the function's.
        override: replace an existing registration.

    Raises:
        ValueError: if the name is taken.

    Example:
        >>> @register_model(override=True)
        ... def my_net(*, classes=10, **kwargs):
        ...     return build("nf_test_efficientnet", classes=classes, **kwargs)
        >>> "my_net" in list_models("my_*")
        True
    """

    def decorate(function):
        key = name or function.__name__
        if key in names() or key in aliases() or (key in _USER_MODELS and not override):
            raise ValueError(
                f"Expected a name that is free. Received: {key!r}; pass override=True to replace your own."
            )
        _USER_MODELS[key] = function
        return function

    return decorate if function is None else decorate(function)


def resolve_fields(name: Name, overrides: dict) -> tuple[Any, Any]:
    """Split overrides into those of the variant and those of the spec; return both, replaced."""
    from nfzoo.variants import VARIANTS

    variant, spec = VARIANTS[name.variant](), name.spec
    of_variant, of_spec = ({f.name for f in fields(x)} for x in (variant, spec))
    unknown = sorted(overrides.keys() - of_variant - of_spec)
    if unknown:
        raise TypeError(
            f"build({str(name)!r}) got unexpected keyword(s) {', '.join(unknown)}. Overrides of the variant: "
            f"{', '.join(sorted(of_variant))}; of the architecture: {', '.join(sorted(of_spec))}."
        )
    for rate in ("dropout_rate", "drop_path_rate"):
        value = overrides.get(rate, 0)
        if not isinstance(value, numbers.Real) or not 0 <= value < 1:
            raise ValueError(f"Expected {rate} in [0, 1), a probability. Received: {rate}={value!r}")
    variant = replace(variant, **{k: v for k, v in overrides.items() if k in of_variant})
    # A field of both (activation) is the variant's to decide.
    return variant, replace(spec, **{k: v for k, v in overrides.items() if k in of_spec - of_variant})


def resolve(name: str, overrides: dict) -> None:
    """Check a name and the overrides of `build` without building; raise as `build` would."""
    if name not in _USER_MODELS:
        # Some arguments are fields that have been given a name of their own; None leaves them as they are.
        fields_too = {"dropout_rate", "drop_path_rate", "stem"}
        accepted = set(inspect.signature(build).parameters) - {"architecture", "overrides"}
        left = {k: v for k, v in overrides.items() if k not in accepted or (k in fields_too and v is not None)}
        resolve_fields(parse(name), left)


def _check_shape(shape, minimum: int) -> None:
    if len(shape) != 3:
        raise ValueError(f"Expected input_shape (height, width, channels). Received: input_shape={shape}")
    for side in shape[:2]:
        if side is not None and side < minimum:
            raise ValueError(
                f"Expected an input of at least {minimum}x{minimum} pixels, the product of the strides. "
                f'Received: input_shape={shape}. For small images build with stem="small" or resize them.'
            )


def build(
    architecture: str,
    /,
    *,
    weights: str | None = None,
    classes: int | None = None,
    include_top: bool = True,
    pooling: str | None = "avg",
    input_shape: tuple | None = None,
    input_tensor: Any = None,
    classifier_activation: str | None = None,
    include_preprocessing: bool = False,
    dropout_rate: float | None = None,
    drop_path_rate: float | None = None,
    stem: str | None = None,
    features_only: bool = False,
    name: str | None = None,
    **overrides,
):
    """Build a network by name.

    Args:
        architecture: name in the zoo, e.g. "sn_efficientnet_b0"; see `list_models`.
        weights: None for a fresh initialisation, a path (.safetensors, .keras, .weights.h5), or the tag of an entry in
            the manifest of saved_models.
        classes: units of the classifier; default: the row's.
        include_top: end with the classifier; else with the last feature map, pooled if `pooling` says so.
        pooling: "avg", "max" or None; how the last map becomes a vector. None only without the top.
        input_shape: (height, width, channels); height and width may be None.
        input_tensor: a Keras tensor to build upon.
        classifier_activation: None gives logits (train with `from_logits=True`), "softmax" probabilities.
        include_preprocessing: take raw images in [0, 255] and standardize them with ImageNet's constants.
        dropout_rate, drop_path_rate: before the classifier; stochastic depth of the last block.
        stem: "imagenet" (stride 2) or "small" (stride 1, for 32x32 images).
        features_only: return the last map of each stride as {"P1": …, "P5": …}, strides 2 to 32.
        name: of the Keras model; default: the architecture's.
        **overrides: fields of the variant (`magnitude_preserving`, `alpha`, `activation`, `epsilon`, `init`, …) or of
            the architecture (`padding`, `width`, `depth`, …).

    Returns:
        An `NFModel`, a functional `keras.Model`. Input (batch, height, width, channels), output (batch, classes).

    Raises:
        ValueError: unknown name, inadmissible variant, impossible shape or class count, weights that do not fit.
        TypeError: unknown keyword; the accepted ones are named.

    Example:
        >>> build("sn_efficientnet_b0", classes=100, input_shape=(32, 32, 3)).count_params()
        4093632
    """
    common = {"dropout_rate": dropout_rate, "drop_path_rate": drop_path_rate, "stem": stem}
    overrides |= {k: v for k, v in common.items() if v is not None}
    if architecture in _USER_MODELS:
        given = {"classes": classes, "input_shape": input_shape, "weights": weights, "name": name}
        return _USER_MODELS[architecture](**{k: v for k, v in given.items() if v is not None}, **overrides)
    parsed = parse(architecture)
    variant, spec = resolve_fields(parsed, overrides)
    classes = spec.classes if classes is None else classes
    classes = operator.index(classes)  # NumPy's integers too
    if classes < 1:
        raise ValueError(f"Expected classes >= 1 (include_top=False leaves the head out). Received: classes={classes}")
    if pooling not in ("avg", "max", None) or (include_top and pooling is None):
        raise ValueError(f'Expected pooling "avg" or "max", or None with include_top=False. Received: {pooling!r}')

    model = _assemble(
        FAMILIES[parsed.family], spec, variant,
        classes=classes, include_top=include_top, pooling=pooling, input_shape=input_shape, input_tensor=input_tensor,
        classifier_activation=classifier_activation, include_preprocessing=include_preprocessing,
        features_only=features_only, name=name or str(parsed),
    )  # fmt: skip
    if weights is not None:
        from nfzoo.weights import load

        load(model, weights, str(parsed))
    return model


def _assemble(
    module, spec, variant, *, classes, include_top, pooling, input_shape, input_tensor, classifier_activation,
    include_preprocessing, features_only, name,
):  # fmt: skip
    """Put image, preprocessing, the family's body, pooling and head together."""
    import keras
    from keras import layers

    from nfzoo.models.sites import Site
    from nfzoo.trainer import NFModel

    shape = tuple(input_tensor.shape[1:]) if input_tensor is not None else tuple(input_shape or spec.input_shape)
    _check_shape(shape, spec.min_size)
    x = keras.Input(shape, name="image") if input_tensor is None else input_tensor
    sources = [x] if input_tensor is None else keras.utils.get_source_inputs(input_tensor)
    inputs = sources[0] if len(sources) == 1 else sources
    if include_preprocessing:
        if shape[-1] != 3:
            raise ValueError(f"Expected three channels for include_preprocessing=True. Received: input_shape={shape}")
        mean, std = PREPROCESSING["mean"], PREPROCESSING["std"]
        scale, offset = [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]
        x = layers.Rescaling(scale, offset, name="preprocess")(x)
    x, pyramid = module.body(spec, variant, x)
    if features_only:
        if not pyramid:
            raise ValueError("Expected a family with feature maps for features_only=True. Received: a plain network.")
        return NFModel(inputs, pyramid, name=name)
    if pooling and len(x.shape) == 4:
        pool = layers.GlobalAveragePooling2D if pooling == "avg" else layers.GlobalMaxPooling2D
        x = pool(name="top_pool")(x)
    if include_top:
        x = variant.drop(x, spec.dropout_rate, Site("top"))
        x = variant.head(x, classes, classifier_activation, spec.head_scheme)
    return NFModel(inputs, x, name=name)


def multiply_adds(model: Any) -> int:
    """Count the multiply-adds of one example through the convolutions and dense layers of a built model."""
    from keras import layers

    total = 0
    for layer in model._flatten_layers():
        if isinstance(layer, layers.Dense):
            total += math.prod(layer.kernel.shape)
        elif isinstance(layer, layers.DepthwiseConv2D | layers.Conv2D):
            # Each kernel entry meets each output position once; a grouped kernel holds in / groups already.
            total += math.prod(layer.kernel.shape) * math.prod(layer.output.shape[1:3])
    return total


def measure(name: str, **overrides) -> dict:
    """Build a model and count it: the part of `ModelInfo` that a spec does not tell."""
    model = build(name, **overrides)
    from nfzoo.variants import VARIANTS

    independent = VARIANTS[parse(name).variant].batch_independent if name not in _USER_MODELS else None
    trainable = sum(math.prod(v.shape) for v in model.trainable_variables)
    return {
        "parameters": model.count_params(),
        "trainable_parameters": trainable,
        "multiply_adds": multiply_adds(model),
        "batch_independent": independent,
    }


@cache
def _manifest() -> dict:
    """Counts of every name, written by `python -m nfzoo.models.manifest`; tests rebuild and compare them."""
    return json.loads((importlib.resources.files("nfzoo.models") / "manifest.json").read_text())


def model_info(name: str, **overrides) -> ModelInfo:
    """Tell what a model is: family, variant, size, cost, whether an example's output depends on its batch.

    Args:
        name: as for `build`. **overrides: as for `build`; with any, the model is built and counted anew.

    Example:
        >>> info = model_info("bn_efficientnet_b0")
        >>> info.trainable_parameters, info.batch_independent
        (5288548, False)
    """
    if name in _USER_MODELS:
        model = build(name, **overrides)
        counts = {**measure(name, **overrides)}
        return ModelInfo(name, "user", "user", model.input_shape[1], model.output_shape[-1], **counts, paper="")
    parsed = parse(name)
    counts = measure(str(parsed), **overrides) if overrides else _manifest()[str(parsed)]
    spec = parsed.spec
    size = overrides.get("input_shape", spec.input_shape)[0]
    classes = overrides.get("classes", spec.classes)
    paper = FAMILIES[parsed.family].PAPER
    return ModelInfo(str(parsed), parsed.family, parsed.variant, size, classes, **counts, paper=paper)
