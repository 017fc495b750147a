"""The learning rate range test of Smith, "Cyclical Learning Rates for Training Neural Networks" (arXiv:1506.01186).

The learning rate grows exponentially from step to step of one short training. After it the model is what it was:
weights, moving statistics, random states, the optimizer's slots, its iterations and its learning rate, bit for bit.
"""

import contextlib
import copy
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import pandas as pd

from nfzoo import data, engine, recipes
from nfzoo.engine import learning


@dataclass(frozen=True)
class RangeTest:
    """What a range test saw.

    Attributes:
        table: columns step, learning_rate, loss, smoothed.
        steepest: the learning rate at which the smoothed loss falls fastest, per decade; NaN if it does not fall.
        tenth: likewise, one tenth of the learning rate at which the smoothed loss is smallest.
        diverged: whether the loss blew up before the last step.
    """

    table: pd.DataFrame
    steepest: float
    tenth: float
    diverged: bool


def prepare(model: str, recipe: recipes.Recipe, overrides: dict | None = None) -> tuple[keras.Model, data.Batches]:
    """A model of the zoo as a run would start with it, and its training batches; the learning rate is constant.

    Args:
        model: a name, as for `nfzoo.build`.
        recipe: its schedule is left out.
        overrides: of the network, as for `nfzoo.build`.

    Returns:
        What `lr_find` takes: the model, compiled, and (x, y) of the training split, augmented.

    Raises:
        ValueError, FileNotFoundError: as `nfzoo.engine.run`, for an unknown model, and for data that are not there.

    Example:
        >>> model, batches = prepare("sn_test_ffnn", recipes.override(recipes.get("demo"), {"data.name": "fake"}))
        >>> round(float(model.optimizer.learning_rate), 4), batches[0][0].shape[0]
        (0.001, 64)
    """
    recipe = recipe.model_copy(update={"schedule": recipes.Schedule()})
    resolved = engine.options(model, recipe, overrides)
    images = learning.load_images(resolved, recipe)
    batches = data.pipeline(images, recipe)["train"]
    with learning.precision(recipe.precision):
        keras.utils.set_random_seed(recipe.seed)
        net = learning.new_model(resolved, images, recipe)
        learning.prepare(net, recipe, len(batches))
    return net, batches


def lr_find(
    model: keras.Model,
    batches: Iterable,
    *,
    start: float = 1e-6,
    end: float = 1.0,
    steps: int = 100,
    smoothing: float = 0.9,
    stop: float = 4.0,
) -> RangeTest:
    """Train with a learning rate that grows from `start` to `end`, watch the loss, and put everything back.

    Args:
        model: any compiled Keras model, whose optimizer has a constant learning rate.
        batches: (x, y) or (x, y, sample weights), as often round as it takes: `nfzoo.data.Batches`, another
            `keras.utils.PyDataset`, a tf.data.Dataset, a list. An iterator ends the test where it ends.
        start, end: learning rates of the first and the last step.
        steps: training steps.
        smoothing: of the loss, an exponential moving average without bias.
        stop: end once the smoothed loss is so many times its smallest value, or the loss is not finite.

    Returns:
        A table of losses and two suggestions: `steepest` and `tenth`.

    Raises:
        ValueError: for a model that is not compiled, a learning rate schedule, impossible numbers, or no batch.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile(keras.optimizers.SGD(0.01), "mse")
        >>> x = np.random.default_rng(0).standard_normal((64, 4))
        >>> found = lr_find(model, [(x, x.sum(1))], start=1e-4, end=10, steps=50)
        >>> found.diverged and 1e-3 < found.tenth < 1, round(float(model.optimizer.learning_rate), 3)
        (True, 0.01)
    """
    _check(model, start, end, steps, smoothing)
    if isinstance(batches, data.Batches):  # a copy: theirs stay in the epoch in which they are
        batches = copy.copy(batches)
    stream = _endless(batches)
    first = next(stream, None)
    if first is None:
        raise ValueError("Expected batches of (x, y). Received: none")
    rows, average, least = [], 0.0, math.inf
    with unchanged(model, first):
        rates = np.geomspace(start, end, steps)
        for step, (rate, batch) in enumerate(zip(rates, itertools.chain([first], stream), strict=False), 1):
            model.optimizer.learning_rate = float(rate)
            loss = float(model.train_on_batch(*batch, return_dict=True)["loss"])
            average = smoothing * average + (1 - smoothing) * loss
            smoothed = average / (1 - smoothing**step)
            rows.append({"step": step, "learning_rate": float(rate), "loss": loss, "smoothed": smoothed})
            least = min(least, smoothed)
            if diverged := not math.isfinite(loss) or smoothed > stop * least > 0:
                break
    table = pd.DataFrame(rows)
    return RangeTest(table, *suggestions(table), diverged)


def suggestions(table: pd.DataFrame) -> tuple[float, float]:
    """The two learning rates of a range test's table: of the steepest descent, and a tenth of that of the minimum.

    NaN where the loss did not fall by a hundredth: the minimum of a flat curve is noise.

    Example:
        >>> table = pd.DataFrame({"learning_rate": [0.01, 0.1, 1.0, 10.0], "smoothed": [4.0, 3.9, 1.0, 9.0]})
        >>> suggestions(table)
        (0.1, 0.1)
    """
    table = table[np.isfinite(table.smoothed)]
    if len(table) < 3 or not table.smoothed.min() < 0.99 * table.smoothed.iloc[0]:
        return math.nan, math.nan
    lowest = int(np.argmin(table.smoothed))
    rates = table.learning_rate.to_numpy()
    falling = np.diff(table.smoothed[: lowest + 1]) / np.diff(np.log(rates[: lowest + 1]))
    return float(rates[int(np.argmin(falling))]), float(rates[lowest] / 10)


@contextlib.contextmanager
def unchanged(model: keras.Model, batch: Any) -> Iterator[None]:
    """Let a model train within the block; afterwards, or after an error, every variable is what it was.

    Args:
        model: compiled.
        batch: (x, …), with which a model and an optimizer that are not built yet are built.
    """
    if not model.built:
        model(batch[0])
    optimizer = model.optimizer
    if not optimizer.built:
        optimizer.build(model.trainable_variables)
    before = [(v, _value(v)) for v in (*model.variables, *optimizer.variables, *model.metrics_variables)]
    counted = {id(v) for v, _ in before}
    try:
        yield
    finally:
        for variable, value in before:
            variable.assign(value)
        model._jax_state_synced = True  # a JAX step that failed left Keras with the state of the step before it
        for metric in model.metrics:  # those that the first step made
            if not counted & {id(v) for v in metric.variables}:
                metric.reset_state()


def _value(variable: keras.Variable) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(variable.value))  # a copy: TensorFlow's array may be the variable's own


def _endless(batches: Iterable) -> Iterator[tuple]:
    """Batches round and round; an iterator once."""
    indexed = isinstance(batches, keras.utils.PyDataset)  # which Python would iterate over without an end
    while True:
        one_round = (batches[i] for i in range(len(batches))) if indexed else iter(batches)
        first = next(one_round, None)
        if first is None:
            return
        yield first
        yield from one_round
        if one_round is batches:
            return
        if indexed:
            batches.on_epoch_end()  # as `fit` tells them: another order, other augmentation


def _check(model: keras.Model, start: float, end: float, steps: int, smoothing: float) -> None:
    if not getattr(model, "compiled", False):
        raise ValueError(f"Expected a compiled model. Received: {model.name}, which is not; call model.compile first")
    try:
        model.optimizer.learning_rate = float(model.optimizer.learning_rate)
    except (TypeError, AttributeError):  # of a schedule, of a function
        raise ValueError(
            f"Expected an optimizer with a constant learning rate. Received: {type(model.optimizer).__name__} with a "
            "schedule; compile the model with a number, and make the schedule from what the test finds"
        ) from None
    if not (0 < start < end and math.isfinite(end) and steps >= 3 and 0 <= smoothing < 1):
        raise ValueError(
            f"Expected 0 < start < end, at least 3 steps, smoothing in [0, 1). Received: start={start}, end={end}, "
            f"steps={steps}, smoothing={smoothing}"
        )
    if model.steps_per_execution > 1:
        raise ValueError(
            "Expected a learning rate for every step. Received: a model that takes "
            f"steps_per_execution={model.steps_per_execution} at once; compile it with 1"
        )
