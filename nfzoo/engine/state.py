"""Where a run begins: from nothing, or where its newest checkpoint that verifies left off."""

import pathlib
from collections.abc import Callable
from dataclasses import dataclass, field

import keras
import numpy as np

from nfzoo import backend, callbacks, data, recipes, spp
from nfzoo.engine import learning


@dataclass
class State:
    """A network in training.

    Attributes:
        net: with the optimizer's state, if it is compiled.
        epoch, step: epochs that are done, and steps of the next one.
        history: a row per epoch.
        counters, seconds: values of the metrics' variables, and time spent, within that epoch.
    """

    net: keras.Model
    epoch: int = 0
    step: int = 0
    history: list[dict] = field(default_factory=list)
    counters: list[np.ndarray] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def began(self) -> bool:
        """Whether it comes from a checkpoint."""
        return bool(self.epoch or self.step)


def restore(out: pathlib.Path, warn: Callable[[str], None]) -> State | None:
    """Read the newest checkpoint of a run's folder that verifies; None where there is none.

    Raises:
        ValueError: if there are checkpoints, and all of them are damaged.
    """
    folder = out / "checkpoints"
    for path, said in callbacks.sound(folder, warn):
        try:
            net = keras.saving.load_model(path)
        except Exception as error:  # Keras raises what its parts raise
            warn(f"checkpoint {path.name} does not load ({type(error).__name__}: {error}); looking for an older one")
            continue
        for variable, value in zip(callbacks.random_states(net), said["random"], strict=True):
            variable.assign(np.array(value, variable.dtype))
        counters = [np.array(value) for value in said.get("counters", [])]
        return State(net, said["epoch"], said.get("step", 0), said["history"], counters, said.get("seconds", 0.0))
    if callbacks.pairs(folder):
        raise ValueError(
            f"Expected a checkpoint that verifies. Received: {folder}, where none does; remove it to restart"
        )
    return None


def start(out: pathlib.Path, resolved: dict, recipe: recipes.Recipe, images: data.Images, warn: Callable) -> State:
    """The state of a run's folder, or a new network that the recipe's seed decides."""
    keras.utils.set_random_seed(recipe.seed)
    return restore(out, warn) or State(learning.new_model(resolved, images, recipe))


def train(
    state: State, batches: dict[str, data.Batches], recipe: recipes.Recipe, epochs: int, steps: list, average, *,
    until: int | None = None, validate: bool = True,
) -> None:  # fmt: skip
    """Train from a state on to the end of an epoch, or of a step within the next one; the state moves along.

    Args:
        batches: the streams of `data.pipeline`.
        epochs: how many are done in the end.
        steps: callbacks.
        average: the callback that knows the weights which Keras overwrites with their average when `fit` ends.
        until: end after so many steps of the next epoch.
        validate: look at the validation images after each epoch.
    """
    stream = batches["train"]
    validation = backend.feed(batches["validation"]) if validate and len(batches["validation"]) else None
    if state.step:
        state.net.test_on_batch(*stream[0])  # makes the counters, for their values to be put back
    # The rest of an epoch is a `fit` of its own: Keras counts the steps of an epoch once.
    for end in sorted({state.epoch + 1, epochs} if state.step else {epochs}):
        for step in steps:
            if isinstance(step, spp.SignalPropagation):
                step.steps_done = state.epoch * len(stream) + state.step
            if isinstance(step, callbacks.StopOnNaN):
                step.steps_before = state.step
        stream.window = (state.step, until)
        state.net.fit(
            backend.feed(stream), validation_data=validation, epochs=end, initial_epoch=state.epoch, callbacks=steps,
            verbose=0, shuffle=False,  # Keras would shuffle the steps; the batches order themselves
        )  # fmt: skip
        state.epoch, state.step, stream.window = end, 0, (0, None)
        if state.net.stop_training:
            break
        if end < recipe.epochs:
            average.put_back()
