"""The learning rate of a recipe, step by step: Keras' schedules, and a warm-up that any of them can have.

Steps are batches, counted since all layers learn; a step that only accumulates a gradient counts too, as in Keras.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
from keras import ops
from keras.optimizers.schedules import CosineDecay, LearningRateSchedule, PiecewiseConstantDecay

if TYPE_CHECKING:  # whoever only loads a model with a schedule need not wait for pydantic
    from nfzoo.recipes import Recipe


def learning_rate(recipe: Recipe, steps_per_epoch: int) -> float | LearningRateSchedule:
    """Make the learning rate of a recipe, for a Keras optimizer.

    With w steps of warm-up, n steps in all and a largest rate of max: max·t/w for steps t <= w, then

        constant    max
        step        max · factor^(milestones passed)
        halving     max · 0.5^floor((t - start) / every) after start
        cosine      final + 0.5 (max - final) (1 + cos(π (t - w) / (n - w)))

    where milestones, start and every, given in epochs, fall on the nearest step and are counted from step 0.

    Args:
        recipe: its schedule, learning rate, batch size and epochs.
        steps_per_epoch: batches of an epoch.

    Returns:
        A number for a constant rate without warm-up, so that callbacks can set it; else a schedule.

    Raises:
        ValueError: for a cosine that would rise.

    Example:
        >>> from nfzoo import recipes
        >>> rate = learning_rate(recipes.get("eunnet_cifar"), steps_per_epoch=10)
        >>> [round(float(rate(step)), 6) for step in (0, 999, 1000, 1500)]
        [0.1, 0.1, 0.01, 0.001]

    References: NFNet paper (arXiv 2102.06171), appendix A, for warm-up and cosine.
    """
    schedule, peak = recipe.schedule, recipe.peak_learning_rate
    epochs = recipe.epochs - recipe.frozen_epochs
    warmup = schedule.warmup_epochs * steps_per_epoch
    if schedule.name == "cosine":
        if schedule.final > peak:
            raise ValueError(
                f"Expected schedule.final of at most the learning rate {peak:g}. Received: {schedule.final:g}"
            )
        steps, alpha = max(epochs * steps_per_epoch, 1) - warmup, schedule.final / peak
        if not warmup:
            return CosineDecay(peak, steps, alpha)
        return CosineDecay(0.0, steps, alpha, warmup_target=peak, warmup_steps=warmup)
    drops = {"constant": (), "step": schedule.milestones, "halving": _halvings(schedule, epochs)}[schedule.name]
    factor = 0.5 if schedule.name == "halving" else schedule.factor
    rate = _piecewise(peak, [round(epoch * steps_per_epoch) for epoch in drops], factor) if drops else peak
    return WarmUp(rate, warmup) if warmup else rate


def _halvings(schedule, epochs: int) -> list[float]:
    count = int(max(epochs - schedule.start, 0) / schedule.every)
    return [schedule.start + (n + 1) * schedule.every for n in range(count)]


def _piecewise(peak: float, steps: list[int], factor: float) -> PiecewiseConstantDecay:
    # Keras' boundary is the last step of the old value; ours the first of the new one.
    return PiecewiseConstantDecay([step - 1 for step in steps], [peak * factor**n for n in range(len(steps) + 1)])


@keras.saving.register_keras_serializable(package="nfzoo")
class WarmUp(LearningRateSchedule):
    """Multiply a learning rate with step / steps until that is 1.

    Args:
        rate: a number or a schedule, which goes on below: step 0 of the warm-up is its step 0.
        steps: how long, above 0; need not be whole.

    Example:
        >>> rate = WarmUp(0.4, steps=4)
        >>> [round(float(rate(step)), 3) for step in range(6)]
        [0.0, 0.1, 0.2, 0.3, 0.4, 0.4]
    """

    def __init__(self, rate: float | LearningRateSchedule, steps: float):
        if steps <= 0:
            raise ValueError(f"Expected steps > 0. Received: {steps}")
        self.rate, self.steps = rate, steps

    def __call__(self, step: Any) -> Any:
        rate = self.rate(step) if callable(self.rate) else self.rate
        return rate * ops.minimum(ops.cast(step, "float32") / self.steps, 1.0)

    def get_config(self) -> dict:
        return {"rate": keras.saving.serialize_keras_object(self.rate), "steps": self.steps}

    @classmethod
    def from_config(cls, config: dict) -> WarmUp:
        return cls(keras.saving.deserialize_keras_object(config["rate"]), config["steps"])
