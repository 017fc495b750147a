"""One measurement of a model on one batch, its state untouched."""

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pandas as pd
from keras import ops

from nfzoo.backend import signals
from nfzoo.spp.reduction import DEFAULT_WHAT, Reduction


class Probe:
    """Measure a model on one batch, without touching its state.

    Args:
        model: any built model.
        taps, what, statistics, definition: see `SignalPropagation`.
        loss: a Keras loss, its name, or a function (y, outputs) -> tensor; "compiled" takes `model.compute_loss`, which
            knows several outputs and regularizers; None leaves gradients out.
    """

    def __init__(
        self, model, taps="auto", what=DEFAULT_WHAT, loss=None, definition="channel", statistics="default"
    ):  # fmt: skip
        self.model = model
        self.reduction = Reduction(model, taps, what, definition, statistics)
        self._cold = loss == "compiled" and "gradients" in what
        loss = self._loss(loss) if "gradients" in what else None
        self.run = signals(model, self.reduction.taps, loss, self._packed)
        self._places: list[tuple[str, str, list[str], tuple[int, ...] | None]] = []

    def _loss(self, loss) -> Callable | None:
        if loss is None:
            return None
        if loss == "compiled":
            return lambda x, y, outputs: self.model._compute_loss(x=x, y=y, y_pred=outputs, training=True)
        function = keras.losses.get(loss)
        return lambda x, y, outputs: ops.mean(function(y, outputs))

    def __call__(self, x, y=None, **columns) -> list[dict]:
        """Measure; return one record per kind and layer, with `columns` (step, epoch) added."""
        if self._cold:
            self._build_loss(x, y)
            self._cold = False
        return self.reduction.records(self._unpacked(np.asarray(self.run(x, y))), columns)

    def _build_loss(self, x, y) -> None:
        """The loss of several outputs makes its counters at its first call, which must not be within a graph."""
        loss = getattr(self.model, "_compile_loss", None)
        if loss is None or loss.built:
            return
        groups = (self.model.trainable_variables, self.model.non_trainable_variables)
        x, y = keras.tree.map_structure(ops.convert_to_tensor, (x, y))
        outputs, _ = self.model.stateless_call(*([v.value for v in group] for group in groups), x)
        self.model.compute_loss(x=x, y=y, y_pred=outputs)
        self.model.reset_metrics()

    def _packed(self, *tensors) -> Any:
        """The statistics as one vector: thousands of scalars would each take their time to leave the graph."""
        parts, self._places = [], []
        for kind, layers in self.reduction(*tensors).items():
            for layer, values in layers.items():
                numbers = [name for name, value in values.items() if not len(value.shape)]
                self._places.append((kind, layer, numbers, None))
                parts.append(ops.stack([values[name] for name in numbers]))
                for name in values.keys() - numbers:
                    self._places.append((kind, layer, [name], tuple(values[name].shape)))
                    parts.append(ops.reshape(values[name], (-1,)))
        return ops.concatenate(parts) if parts else ops.zeros((0,))

    def _unpacked(self, vector: np.ndarray) -> dict:
        result: dict[str, dict[str, dict]] = {}
        start = 0
        for kind, layer, names, shape in self._places:
            size = len(names) if shape is None else math.prod(shape)
            part, start = vector[start : start + size], start + size
            told = (
                zip(names, part.tolist(), strict=True) if shape is None else [(names[0], part.reshape(shape).tolist())]
            )
            result.setdefault(kind, {}).setdefault(layer, {}).update(told)
        return result


def snapshot(
    model, x, y=None, loss=None, taps="layers", what=DEFAULT_WHAT, definition="channel", statistics="default"
) -> pd.DataFrame:  # fmt: skip
    """Measure a model once.

    Args:
        model: any built Keras model.
        x, y: one batch; without y there are no gradients.
        loss: a Keras loss or its name; default: the one the model was compiled with.
        taps, what, statistics, definition: see `SignalPropagation`.

    Returns:
        One row per kind and layer: kind, layer, place, depth, and a column per statistic.

    Example:
        >>> import nfzoo
        >>> model = nfzoo.build("nf_test_efficientnet")
        >>> rows = snapshot(model, np.random.default_rng(0).standard_normal((8, 32, 32, 3)).astype("float32"))
        >>> sorted(rows.kind.unique())
        ['activation', 'effective_weight', 'weight']
    """
    loss = loss_of(model, loss, y, what)
    return pd.DataFrame(Probe(model, taps, what, loss, definition, statistics)(x, y))


def loss_of(model: keras.Model, loss: Any, y: Any, what) -> Any:
    """The loss that gradients are taken of, the given one or what the model was compiled with; None if of none.

    Raises:
        ValueError: if there are labels, and gradients are wanted, but no loss.
    """
    if y is None or "gradients" not in what:
        return None
    if loss is not None:
        return loss
    if not getattr(model, "compiled", False) or model.loss is None:
        raise ValueError(
            f"Expected a loss for the gradients, or a compiled model. Received: labels for {model.name} and neither; "
            "pass loss=, or leave y out for activations and weights alone"
        )
    return "compiled"
