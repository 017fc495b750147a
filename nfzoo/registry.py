"""From a name to a model: build the network, tell what it is. Keras is imported by what builds only."""

import importlib.resources
import inspect
import json
import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from nfzoo.names import FAMILIES, USER_MODELS, parse, resolve_fields

PUBLISHERS = ("timm", "deepmind", "imagenet")  # of weights, see nfzoo.convert.published
PREPROCESSING = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # ImageNet, of x / 255


@dataclass(frozen=True)
class ModelInfo:
    """What `model_info` tells of a model; multiply-adds at the input size; `test_size` is for evaluation."""

    name: str
    family: str
    variant: str
    input_size: int
    test_size: int
    classes: int | None
    parameters: int
    trainable_parameters: int
    multiply_adds: int
    batch_independent: bool
    paper: str


def resolve(name: str, overrides: dict) -> None:
    """Check a name and the overrides of `build` without building; raise as `build` would."""
    if name not in USER_MODELS:
        resolve_fields(parse(name), overrides_of(overrides))


def _count(classes: Any) -> int:
    """A number of classes, NumPy's integers too."""
    try:
        count = operator.index(classes)
    except TypeError:
        raise TypeError(f"Expected classes as a whole number. Received: classes={classes!r}") from None
    if count < 1:
        raise ValueError(f"Expected classes >= 1 (include_top=False leaves the head out). Received: classes={classes}")
    return count


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
    include_preprocessing: bool | Mapping[str, Sequence[float]] = False,
    dropout_rate: float | None = None,
    drop_path_rate: float | None = None,
    stem: str | None = None,
    features_only: bool = False,
    out_indices: Sequence[int | str] | None = None,
    name: str | None = None,
    **overrides,
):
    """Build a network by name.

    Args:
        architecture: name in the zoo, e.g. "sn_efficientnet_b0"; see `list_models`. With a tag, as
            "nf_resnet50.ra2_in1k", it comes with those weights: published by timm, or an entry of
            the manifest.
        weights: None for a fresh initialisation, a path (.safetensors, .keras, .weights.h5), the tag of an entry in
            the manifest of saved_models ("cifar100"; its overrides, classes and input shape are then the defaults), or
            "timm", "deepmind", "imagenet" (keras.applications) for what they have published: it is downloaded to
            NFZOO_HOME/downloads once, and the dialect is theirs. `include_preprocessing=True` gives them the images
            they expect; keras.applications' ResNets (not V2) need their `preprocess_input`.
        classes: units of the classifier; default: the row's. Upon published weights of another number it is new.
        include_top: end with the classifier; else with the last feature map, pooled if `pooling` says so.
        pooling: "avg", "max" or None; how the last map becomes a vector. None only without the top.
        input_shape: (height, width, channels); height and width may be None.
        input_tensor: a Keras tensor to build upon.
        classifier_activation: None gives logits (train with `from_logits=True`), "softmax" probabilities.
        include_preprocessing: take raw images in [0, 255] and standardize them: True with the constants that the
            weights were trained with, else ImageNet's; or {"mean": (…), "std": (…)}, of x / 255.
        dropout_rate: before the classifier. drop_path_rate: of stochastic depth, growing linearly over the blocks to
            this or, by the family's rule, to just below it (`nfzoo.numerics.drop_path_rates`).
        stem: "imagenet" (stride 2) or "small" (stride 1, for 32x32 images).
        features_only: return the last map of each stride as {"P2": …, "P5": …}, strides 4 to 32; EfficientNets have P1
            too, and a small stem shifts all. `model.feature_info` tells strides and channels.
        out_indices: with features_only, which maps: names ("P3"), or timm's numbers, of which i is the map of stride
            2^(i + 1), so that (1, 2, 3, 4) are P2 to P5.
        name: of the Keras model; default: the architecture's.
        **overrides: fields of the variant (`magnitude_preserving`, `alpha`, `activation`, `epsilon`, `init`, …) or of
            the architecture (`padding`, `width`, `depth`, …); `dialect="deepmind"`, "timm" or "keras" takes that
            implementation's reading where they disagree.

    Returns:
        An `NFModel`, a functional `keras.Model`. Input (batch, height, width, channels), output (batch, classes).

    Raises:
        ValueError: unknown name, inadmissible variant, impossible shape or class count, weights that do not fit or
            are not published.
        ConnectionError: published weights that cannot be downloaded; it says where to put them by hand.
        TypeError: unknown keyword; the accepted ones are named.

    Example:
        >>> build("sn_efficientnet_b0", classes=100, input_shape=(32, 32, 3)).count_params()
        4093632
    """
    registered = architecture in USER_MODELS  # whose names may have a dot
    architecture, _, tag = (architecture, "", "") if registered else architecture.partition(".")
    if tag:
        if weights is not None:
            raise ValueError(f"Expected a tag in the name, or weights. Received: .{tag} and weights={weights!r}")
        from nfzoo.convert import published

        weights = published.source_of(f"{architecture}.{tag}") or tag
    common = {"dropout_rate": dropout_rate, "drop_path_rate": drop_path_rate, "stem": stem}
    overrides |= {k: v for k, v in common.items() if v is not None}
    if registered:
        given = {
            "classes": classes, "include_top": include_top, "pooling": pooling, "input_shape": input_shape,
            "input_tensor": input_tensor, "classifier_activation": classifier_activation, "weights": weights,
            "include_preprocessing": include_preprocessing, "features_only": features_only, "out_indices": out_indices,
            "name": name,
        }  # fmt: skip
        usual = {key: parameter.default for key, parameter in inspect.signature(build).parameters.items()}
        asked = {k: v for k, v in given.items() if v is not usual[k] and not (isinstance(v, str) and v == usual[k])}
        return USER_MODELS[architecture](**asked, **overrides)
    if weights in PUBLISHERS:
        from nfzoo.convert import published

        return published.load(
            architecture, weights, classes=classes, include_top=include_top, pooling=pooling, input_shape=input_shape,
            input_tensor=input_tensor, classifier_activation=classifier_activation, features_only=features_only,
            include_preprocessing=include_preprocessing, out_indices=out_indices, name=name, **overrides,
        )  # fmt: skip
    parsed, preprocessing = parse(architecture), PREPROCESSING
    if isinstance(weights, str):
        from nfzoo.weights import entry_of

        if stored := entry_of(str(parsed), weights):  # they are of a network with overrides, classes and a size
            overrides = stored.get("build", {}) | overrides
            known = len(stored["classes"]) if "classes" in stored else stored.get("outputs")
            classes = known if classes is None else classes
            preprocessing = stored.get("input", preprocessing)
            if input_shape is None and input_tensor is None and "input" in stored:
                input_shape = tuple(stored["input"]["shape"][1:])
    variant, spec = resolve_fields(parsed, overrides)
    classes = spec.classes if classes is None else classes
    classes = _count(classes)
    if pooling not in ("avg", "max", None) or (include_top and pooling is None):
        raise ValueError(f'Expected pooling "avg" or "max", or None with include_top=False. Received: {pooling!r}')
    if out_indices is not None and not features_only:
        raise ValueError(f"Expected out_indices with features_only=True. Received: out_indices={out_indices} without")

    model = _assemble(
        FAMILIES[parsed.family], spec, variant,
        classes=classes, include_top=include_top, pooling=pooling, input_shape=input_shape, input_tensor=input_tensor,
        classifier_activation=classifier_activation, include_preprocessing=include_preprocessing,
        features_only=features_only, out_indices=out_indices, name=name or str(parsed), preprocessing=preprocessing,
    )  # fmt: skip
    if weights is not None:
        from nfzoo.weights import load

        load(model, weights, str(parsed))
    return model


def overrides_of(options: dict) -> dict:
    """Of options for `build`, those that replace fields of variant or spec."""
    # Some arguments are fields that have been given a name of their own; None leaves them as they are.
    fields_too = {"dropout_rate", "drop_path_rate", "stem"}
    arguments = set(inspect.signature(build).parameters) - fields_too
    return {k: v for k, v in options.items() if k not in arguments and not (k in fields_too and v is None)}


def _assemble(
    module, spec, variant, *, classes, include_top, pooling, input_shape, input_tensor, classifier_activation,
    include_preprocessing, features_only, out_indices, name, preprocessing,
):  # fmt: skip
    """Put image, preprocessing, the family's body, pooling and head together."""
    import keras
    import numpy as np
    from keras import layers

    from nfzoo.models.sites import Site
    from nfzoo.trainer import NFModel

    if (order := keras.config.image_data_format()) != "channels_last":
        raise ValueError(f'Expected keras.config.image_data_format() "channels_last". Received: {order!r}')
    given = input_shape if input_tensor is None else input_tensor.shape[1:]
    shape = tuple(spec.input_shape if given is None else given)
    _check_shape(shape, spec.min_size)
    x = keras.Input(shape, name="image") if input_tensor is None else input_tensor
    sources = [x] if input_tensor is None else keras.utils.get_source_inputs(input_tensor)
    inputs = sources[0] if len(sources) == 1 else sources
    if include_preprocessing:
        constants = preprocessing if include_preprocessing is True else include_preprocessing
        mean, std = (np.ravel(constants.get(key, ())).tolist() for key in ("mean", "std"))
        if not len(mean) == len(std) == shape[-1]:
            raise ValueError(
                f"Expected mean and std of every channel for include_preprocessing. Received: mean={mean}, std={std} "
                f"and input_shape={shape}"
            )
        scale, offset = [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]
        x = layers.Rescaling(scale, offset, name="preprocess")(x)
    x, pyramid = module.body(spec, variant, x)
    if features_only:
        if not pyramid:
            raise ValueError("Expected a family with feature maps for features_only=True. Received: a plain network.")
        return NFModel(inputs, _select(pyramid, out_indices), name=name)
    x = variant.leave(x, Site("top", role="top"))
    if pooling and len(x.shape) == 4:
        pool = layers.GlobalAveragePooling2D if pooling == "avg" else layers.GlobalMaxPooling2D
        x = pool(name="top_pool")(x)
    if include_top:
        x = variant.drop(x, spec.dropout_rate, Site("top", role="top"))
        x = variant.head(x, classes, classifier_activation, spec.head_scheme)
    return NFModel(inputs, x, name=name)


def _select(pyramid: dict, out_indices) -> dict:
    """The maps that the user asks for, in the order of their strides."""
    if out_indices is None:
        return pyramid
    out_indices = (out_indices,) if isinstance(out_indices, numbers.Integral | str) else tuple(out_indices)
    wanted = {f"P{index + 1}" if isinstance(index, numbers.Integral) else index for index in out_indices}
    if not wanted or wanted - pyramid.keys():
        raise ValueError(
            f"Expected out_indices among {', '.join(pyramid)} (or {', '.join(str(int(k[1:]) - 1) for k in pyramid)}). "
            f"Received: out_indices={out_indices}"
        )
    return {key: x for key, x in pyramid.items() if key in wanted}


def set_head(model: Any, classes: int, activation: str | None = None) -> Any:
    """Give a model a new classifier of another number of classes; all other layers, and their weights, are shared.

    Args:
        model: of the zoo, with its classifier ("head").
        classes: units of the new one.
        activation: None for logits.

    Returns:
        A new `NFModel`, uncompiled. Its classifier starts as the old one did and is trainable; training it trains the
        shared layers too, unless they are frozen.

    Raises:
        ValueError: for a model without a classifier, or classes < 1.

    Example:
        >>> model = set_head(build("nf_test_resnet", classes=10), 3)
        >>> model.output_shape
        (None, 3)
    """
    from keras import layers

    from nfzoo.trainer import NFModel

    classes = _count(classes)
    head = next((layer for layer in model.layers if layer.name == "head"), None)
    if head is None or head.output is not model.output:
        raise ValueError(
            f'Expected a model that ends with a layer "head". Received: {model.name}, which '
            + ("has none" if head is None else "goes on behind it")
        )
    # What LoRA and quantization did to the old classifier, they did to its weights.
    policy = head.dtype_policy.get_config().get("source_name") or head.dtype_policy.name
    config = {key: value for key, value in head.get_config().items() if not key.startswith("lora_")}
    changes = {"units": classes, "activation": activation, "trainable": True, "dtype": policy}
    new = layers.Dense.from_config({**config, **changes})
    return NFModel(model.input, new(head.input), name=model.name)


def multiply_adds(model: Any) -> int:
    """Count the multiply-adds of one example through the 2D convolutions and dense layers of a built model."""
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
    return _counts(undrawn(name, **overrides), name, overrides)


def undrawn(name: str, **build_options) -> Any:
    """Build a model of which only shapes, names and settings are wanted: its variables hold no values."""
    import keras
    from keras.src.backend.common import global_state

    # A stateless scope registers its variables and draws them when it ends, or, told not to, when the next one does:
    # gigabytes and half a minute for the largest networks. Keras has no public way to forget them.
    registered = "uninitialized_variables"
    before = list(global_state.get_global_attribute(registered) or ())
    try:
        with keras.StatelessScope(initialize_variables=False):
            return build(name, **build_options)
    finally:
        global_state.set_global_attribute(registered, before)


def _counts(model: Any, name: str, overrides: dict) -> dict:
    independent = None
    if name not in USER_MODELS:
        independent = resolve_fields(parse(name), overrides_of(overrides))[0].batch_independent
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

    Raises:
        ValueError: for what `build` refuses, and for an input of unknown sides, whose cost is unknown.

    Example:
        >>> info = model_info("bn_efficientnet_b0")
        >>> info.trainable_parameters, info.batch_independent
        (5288548, False)
    """
    if name in USER_MODELS:
        model = build(name, **overrides)
        counts = {**measure(name, **overrides)}
        return ModelInfo(name, "user", "user", *model.input_shape[1:2] * 2, model.output_shape[-1], **counts, paper="")
    if None in (overrides.get("input_shape") or ()):
        raise ValueError(
            f"Expected an input_shape of known sides: cost depends on it. Received: {overrides['input_shape']}"
        )
    parsed = parse(name)
    spec, paper = parsed.spec, FAMILIES[parsed.family].PAPER
    size, classes = spec.input_shape[0], spec.classes
    if overrides or parsed.overrides:  # the variants import Keras
        spec, model = resolve_fields(parsed, overrides_of(overrides))[1], undrawn(name, **overrides)
        counts, size = _counts(model, name, overrides), model.input_shape[1]
        classes = next((layer.units for layer in model.layers if layer.name == "head"), None)
    else:
        counts = _manifest()[str(parsed)]
    test_size = spec.test_size or spec.size
    return ModelInfo(str(parsed), parsed.family, parsed.variant, size, test_size, classes, **counts, paper=paper)
