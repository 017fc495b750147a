"""What a recipe makes of a network: a model, compiled with its optimizer and its loss."""

import contextlib
import dataclasses

import keras

from nfzoo import data, names, optimizers, recipes, registry, schedules, weights
from nfzoo.agc import AGC, matches
from nfzoo.settings import OPTIMIZER_FIELDS
from nfzoo.trainer import NFModel


def optimizer(recipe: recipes.Recipe, steps_per_epoch: int = 1) -> keras.optimizers.Optimizer:
    """Make the optimizer of a recipe.

    Args:
        recipe: its optimizer, schedule and average.
        steps_per_epoch: batches of an epoch, by which schedules count.

    Example:
        >>> type(optimizer(recipes.get("nfnet"), steps_per_epoch=100)).__name__
        'MomentumSGD'
    """
    settings, ema = recipe.optimizer, recipe.ema
    kinds = {
        "adam": optimizers.Adam, "sgd": optimizers.SGD, "momentum_sgd": optimizers.MomentumSGD,
        "rmsprop": optimizers.RMSprop,
    }  # fmt: skip
    return kinds[settings.name](
        schedules.learning_rate(recipe, steps_per_epoch),
        weight_decay=settings.weight_decay or None,
        groups=[group.model_dump() for group in settings.groups],
        gradient_accumulation_steps=settings.accumulate if settings.accumulate > 1 else None,
        **({"use_ema": True, "ema_momentum": ema.momentum, "ema_warmup": ema.warmup} if ema else {}),
        **{field: getattr(settings, field) for field in OPTIMIZER_FIELDS[settings.name]},
    )


def loss(recipe: recipes.Recipe, net: keras.Model | None = None) -> keras.losses.Loss:
    """Cross-entropy against classes or, where the recipe mixes or smooths them, against vectors.

    Networks of the zoo give logits; a user's may end with a softmax.
    """
    logits = net is None or not gives_probabilities(net)
    if recipe.one_hot:
        return keras.losses.CategoricalCrossentropy(from_logits=logits, label_smoothing=recipe.label_smoothing)
    return keras.losses.SparseCategoricalCrossentropy(from_logits=logits)


def gives_probabilities(net: keras.Model) -> bool:
    """Whether a network of one output ends with a softmax, of its last layer or as it, as far as its graph tells."""
    if len(getattr(net, "outputs", None) or ()) != 1:
        return False
    last = net.outputs[0]._keras_history.operation
    if isinstance(last, keras.Model):
        return gives_probabilities(last)
    return isinstance(last, keras.layers.Softmax) or getattr(last, "activation", None) is keras.activations.softmax


def load_images(resolved: dict, recipe: recipes.Recipe) -> data.Images:
    """The images of a run, to be standardized as those were that its weights come from, if that is known.

    Raises:
        ValueError: for published weights that expect something else than images less a mean over a deviation.
    """
    images = data.load(recipe.data, recipe.seed)
    model, given = names.canonical(resolved["model"]), resolved["build"].get("weights")
    if model in names.USER_MODELS or not given:
        return images
    if given in registry.PUBLISHERS:
        from nfzoo.convert import published

        constants = published.preprocessing(given, published.find(model, given, resolved["build"].get("dialect"))[0])
        if constants is None:
            raise ValueError(
                f"Expected weights of images less a mean, over a deviation. Received: weights={given!r} for {model}, "
                "which take BGR less the means of its channels; weights=timm has others"
            )
    else:
        constants = (weights.entry_of(model, str(given)) or {}).get("input")
    if not constants:
        return images
    return dataclasses.replace(images, **{key: tuple(constants[key]) for key in ("mean", "std")})


def new_model(resolved: dict, images: data.Images, recipe: recipes.Recipe) -> keras.Model:
    """Build the network of a run for its images; with `frozen_epochs`, its body has weights and its head is new."""
    model, classes = resolved["model"], len(images.classes)
    build = {**resolved["build"], "input_shape": images.train.images.shape[1:]}
    if not recipe.frozen_epochs or model in names.USER_MODELS:
        return registry.build(model, classes=classes, **build)
    # The classifier is a new one, whatever the number of classes that the weights know.
    if build["weights"] in registry.PUBLISHERS or weights.entry_of(names.canonical(model), str(build["weights"])):
        # They decide the dialect, or overrides, as well.
        return registry.set_head(registry.build(model, **build), classes)
    body = registry.build(model, include_top=False, **build)
    net = registry.build(model, classes=classes, **{**build, "weights": None})
    values = {v.path: v for v in body.weights}
    for variable in net.weights:
        if not variable.path.startswith("head/"):
            variable.assign(values[variable.path])
    return net


def prepare(net: keras.Model, recipe: recipes.Recipe, steps_per_epoch: int, frozen: bool = False) -> None:
    """Decide what learns and how, and compile. Frozen layers keep their moving statistics too.

    Each part of a run has an optimizer of its own, of the variables that learn: JAX takes no others, and Adam's steps
    would be too large for moments that join late.
    """
    if recipe.frozen_epochs:
        for layer in net.layers:
            layer.trainable = layer.name == "head" or not frozen
    agc = None if recipe.agc is None else AGC(**recipe.agc.model_dump(), log_clipped=True)
    chosen = optimizer(_of_the_head(recipe) if frozen else recipe, steps_per_epoch)
    if isinstance(net, NFModel):
        net.compile(chosen, loss(recipe, net), metrics=["accuracy"], agc=agc)
    else:  # a user's: Keras' own training step
        chosen = optimizers.AdaptiveGradientClipping(chosen, net, agc) if agc else chosen
        net.compile(chosen, loss(recipe, net), metrics=["accuracy"])
    net.optimizer.build(net.trainable_variables)


def _of_the_head(recipe: recipes.Recipe) -> recipes.Recipe:
    """The recipe while the classifier learns alone: constant rate, the groups that it is in, no average."""
    rate = recipe.frozen_learning_rate or recipe.peak_learning_rate
    own = [g for g in recipe.optimizer.groups if any(matches(g.pattern, f"head/{v}") for v in ("kernel", "bias"))]
    settings = {"groups": tuple(own), "learning_rate": rate, "per_256": False}
    chosen = recipe.optimizer.model_copy(update=settings)
    return recipe.model_copy(update={"optimizer": chosen, "schedule": recipes.Schedule(), "ema": None})


@contextlib.contextmanager
def precision(policy: str):
    """Keras' policy for a while."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
