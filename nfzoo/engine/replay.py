"""Where a loss that is not finite comes from: the steps since the last checkpoint once more, and a look inside."""

import keras
import numpy as np

from nfzoo import callbacks, data, recipes
from nfzoo.backend.taps import recording, training_mode
from nfzoo.engine import learning
from nfzoo.engine.state import State, train


def first_bad_layer(state: State, batches: dict[str, data.Batches], recipe: recipes.Recipe, step: int) -> str | None:
    """Name the first layer whose output or weights are not finite when a step begins.

    Runs are deterministic, so that the steps before it come out as they did; a device that is not may lead elsewhere.

    Args:
        state: at or before the step, in the same epoch; it moves along.
        step: the step (from 1) whose loss is not finite.

    Returns:
        "output of NAME", "weights of NAME" or "images of the batch"; None if all is finite this time.
    """
    net, stream, epoch = state.net, batches["train"], state.epoch
    # A checkpoint between the two parts of a fine-tuning run is compiled for the first.
    if not net.compiled or (recipe.frozen_epochs and epoch == recipe.frozen_epochs and not state.step):
        learning.prepare(net, recipe, len(stream), frozen=epoch < recipe.frozen_epochs)
    if step - 1 > state.step:
        average = callbacks.AverageWeights()
        clock = data.EpochClock(*batches.values())
        train(state, batches, recipe, epoch + 1, [clock, average], average, until=step - 1, validate=False)
        average.put_back()
    for variable in net.weights:
        if not np.isfinite(keras.ops.convert_to_numpy(variable)).all():
            return f"weights of {variable.path.split('/')[0]}"
    stream.epoch = epoch
    images, _ = stream[step - 1]
    if not np.isfinite(images).all():
        return "images of the batch"
    bad: list[str] = []

    def look(name, output):
        if not np.isfinite(keras.ops.convert_to_numpy(output)).all():
            bad.append(name)
        return output

    with recording(net, {layer.name: layer for layer in net.layers}, look):
        net(images, **training_mode(net))
    return f"output of {bad[0].split('#')[0]}" if bad else None
