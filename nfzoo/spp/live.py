"""Signal propagation of the training batches themselves: statistics accumulated on the device, within the step."""

from typing import Any

import keras
import numpy as np
from keras import ops

from nfzoo.backend import observe, scope
from nfzoo.spp.reduction import Reduction
from nfzoo.spp.stats import HISTOGRAMS


class LiveSignals(keras.metrics.Metric):
    """Means over training steps of the statistics of a model's tensors, and the step at which one was not finite.

    A metric, because its variables travel with a training step on every backend and are summed over replicas. Nothing
    shows it in the logs of `fit`, and Keras does not reset it: whoever reads it does.

    Args:
        reduction: what is told of which tensors.
        discards: whether the optimizer discards steps whose gradients are not finite (loss scaling); they do not count
            in the means of gradients.
    """

    def __init__(self, reduction: Reduction, discards: bool = False):
        super().__init__(name="signals")
        if vectors := set(reduction.statistics) & set(HISTOGRAMS):
            raise ValueError(
                f'Expected numbers as statistics of source="live". Received: {sorted(vectors)}, which are histograms; '
                'take source="probe" for them'
            )
        self.reduction, self.discards, self.begun = reduction, discards, False
        self.cells = reduction.layout()
        self.place = {cell: i for i, cell in enumerate(self.cells)}
        size = (len(self.cells),)
        self.total = self.add_variable(size, "zeros", "float32", name="total")
        self.count = self.add_variable(size, "zeros", "float32", name="count")
        # A replica's own would be no sum: the first one's stand for all.
        own = "only_first_replica"
        self.first_bad = self.add_variable(size, keras.initializers.Constant(-1), "float32", own, name="first_bad")
        self.steps = self.add_variable((), "zeros", "float32", own, name="steps")

    def update_state(self, activations, weights, gradients, weight_gradients, before) -> None:
        """Take the tensors of one step: see `Reduction`; layers called again ("name#2") share their layer's cell."""
        result = self.reduction(activations, weights, gradients, weight_gradients, before)
        found: dict[tuple, list] = {}
        for kind, layers in result.items():
            for name, values in layers.items():
                for statistic, value in values.items():
                    found.setdefault((kind, name.split("#")[0], statistic), []).append(ops.cast(value, "float32"))
        values = [sum(found[cell]) / len(found[cell]) if cell in found else 0.0 for cell in self.cells]
        values = ops.stack([ops.reshape(ops.convert_to_tensor(value, "float32"), ()) for value in values])
        present = np.array([cell in found for cell in self.cells], "float32")
        finite = ops.isfinite(values)
        counts = self._taken(present, finite)
        self.steps.assign_add(1.0)
        first = ops.convert_to_tensor(self.first_bad)
        bad = ops.logical_and(ops.logical_and(ops.logical_not(finite), counts > 0), first < 0)
        self.first_bad.assign(ops.where(bad, ops.convert_to_tensor(self.steps), first))
        self.total.assign_add(ops.where(counts > 0, values, 0.0))
        self.count.assign_add(counts)

    def _taken(self, present: np.ndarray, finite: Any) -> Any:
        gradients = np.array(["gradient" in cell[0] for cell in self.cells])
        if not (self.discards and gradients.any()):
            return ops.convert_to_tensor(present)
        overflown = ops.logical_not(ops.all(ops.logical_or(finite, ~gradients)))
        return ops.where(ops.logical_and(gradients, overflown), 0.0, present)

    def result(self) -> dict:
        return {}

    def reset_state(self) -> None:
        """Keras resets metrics at its own times, validation among them."""

    def read(self, step: int, columns: dict) -> list[dict]:
        """The records since the last reading, which starts the next one.

        Args:
            step: the optimizer's step now.
            columns: added to every record.
        """
        variables = (self.total, self.count, self.first_bad, self.steps)
        total, count, bad, steps = (ops.convert_to_numpy(variable) for variable in variables)
        result: dict = {}
        for (kind, name, statistic), i in self.place.items():
            row = result.setdefault(kind, {}).setdefault(name, {"first_bad": -1})
            if count[i]:  # else the tensor was not there: no gradient came by, or the output was no single tensor
                row[statistic] = float(total[i] / count[i])
            if bad[i] >= 0:
                when = step - int(steps) + int(bad[i])
                row["first_bad"] = when if row["first_bad"] < 0 else min(when, row["first_bad"])
        for variable in (self.total, self.count):
            variable.assign(np.zeros(variable.shape, "float32"))
        seen = {kind: {name: row for name, row in rows.items() if len(row) > 1} for kind, rows in result.items()}
        return self.reduction.records(seen, {**columns, "source": "live"})


def live_signals(model: keras.Model, reduction: Reduction) -> LiveSignals:
    """Make the accumulators for a model that is compiled, where its strategy wants them."""
    discards = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    with scope(model):
        return LiveSignals(reduction, discards)


def attach(model: keras.Model, live: LiveSignals) -> None:
    """Let the training step of a model fill `live`, until `detach`.

    Raises:
        ValueError: if the model's class has a training step of its own, which cannot be seen into.
    """
    step = observe(model, live, live.reduction.taps)
    # Past Keras' tracking, which locks built models, and out of sight of `save`.
    object.__setattr__(model, "train_step", step)
    list.append(model._metrics, live)
    model.train_function = None  # it is compiled anew


def begin(model: keras.Model, live: LiveSignals) -> None:
    """Say that the `fit` begins which fills `live`.

    Raises:
        ValueError: if another one has taken its place.
    """
    if not any(metric is live for metric in model._metrics):
        raise ValueError('Expected one SignalPropagation(source="live") in a `fit`. Received: several')
    live.begun = True


def detach(model: keras.Model, begun: bool = False) -> None:
    """Give a model its own training step back; nothing happens if it has it.

    Args:
        begun: only if its `fit` has begun: one that is about to begin has attached it for itself.
    """
    found = [metric for metric in model._metrics if isinstance(metric, LiveSignals)]
    if "train_step" in vars(model) and not (begun and any(not live.begun for live in found)):
        object.__delattr__(model, "train_step")
        for live in found:
            list.remove(model._metrics, live)
        model.train_function = None
