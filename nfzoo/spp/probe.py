"""One measurement of a model on one batch, its state untouched."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pandas as pd
from keras import ops

from nfzoo import agc
from nfzoo.backend import signals
from nfzoo.spp.stats import resolve, statistics
from nfzoo.spp.taps import all_layers, place, select_taps

KINDS = ("activation", "weight", "effective_weight", "gradient", "weight_gradient", "parameter")
WHAT = ("activations", "weights", "gradients", "parameters")
DEFAULT_WHAT = ("activations", "weights", "gradients")


class Probe:
    """Measure a model on one batch, without touching its state.

    Args:
        model: any built model.
        taps, what, statistics, definition: see `SignalPropagation`.
        loss: a Keras loss, its name, or a function (y, outputs) -> tensor; "compiled" takes `model.compute_loss`, which
            knows several outputs and regularizers; None leaves gradients out.
    """

    def __init__(
        self, model, taps="blocks", what=DEFAULT_WHAT, loss=None, definition="channel", statistics="default"
    ):  # fmt: skip
        if definition not in ("channel", "poster"):
            raise ValueError(f'Expected definition "channel" or "poster". Received: {definition!r}')
        if unknown := set(what) - set(WHAT):
            raise ValueError(f"Expected what to be among {WHAT}. Received: {sorted(unknown)}")
        if not model.built or not model.layers:
            raise ValueError(f"Expected a model that is built (call it on a batch). Received: {model.name}")
        self.model, self.what, self.definition = model, set(what), definition
        self.statistics = resolve(statistics)
        layers = dict(all_layers(model))
        self.names = select_taps(model, taps)
        self.places = {name: place(name, layers[name]) for name in self.names}
        self.weights = _weights(model, definition)
        order = {id(layer): depth for depth, layer in enumerate(layers.values())}
        self.depth = {name: depth for depth, name in enumerate(self.names)}
        self.depth |= {path: order.get(id(layer), -1) for path, (layer, _) in self.weights.items()}
        # What AGC would do: with the model's own settings, or with its defaults.
        self.agc = getattr(model, "agc", None) or agc.AGC()
        taps = {name: layers[name] for name in self.names}
        self.run = signals(model, taps, self._loss(loss) if "gradients" in self.what else None, self._reduce)

    def _loss(self, loss) -> Callable | None:
        if loss is None:
            return None
        if loss == "compiled":
            return lambda x, y, outputs: self.model.compute_loss(x=x, y=y, y_pred=outputs, training=True)
        function = keras.losses.get(loss)
        return lambda x, y, outputs: ops.mean(function(y, outputs))

    def _statistics(self, x, axes, flat: bool) -> dict[str, Any]:
        return statistics(x, axes, self.definition, flat, self.statistics)

    def _reduce(self, activations, weights, gradients, weight_gradients) -> dict:
        result = {kind: {} for kind in KINDS}
        for kind, tensors in (("activation", activations), ("gradient", gradients)):
            if f"{kind}s" in self.what:
                for name, x in tensors.items():
                    result[kind][name] = self._statistics(x, None, len(x.shape) <= 2)
        for path, (layer, axes) in self.weights.items():
            if "weights" in self.what:
                result["weight"][path] = self._statistics(weights[path], axes, True)
                if hasattr(layer, "effective_kernel"):
                    with keras.StatelessScope(_values(layer, weights)):
                        effective = layer.effective_kernel()
                    result["effective_weight"][path] = self._statistics(effective, axes, True)
            if path in weight_gradients:
                gradient = weight_gradients[path]
                ratios = self._against_weight(gradient, weights[path], axes)
                result["weight_gradient"][path] = {**self._statistics(gradient, axes, True), **ratios}
        return {kind: rows for kind, rows in result.items() if rows}

    def _against_weight(self, gradient, weight, axes) -> dict[str, Any]:
        """Norm of the gradient over that of the weight, and the share of units that AGC clips (NFNet paper, eq. 3)."""
        _, clipped = agc.clip(gradient, weight, axes, self.agc.clip_factor, self.agc.eps)
        floor = ops.maximum(agc.unitwise_norm(weight, tuple(range(len(weight.shape)))), self.agc.eps)
        ratio = agc.unitwise_norm(gradient, tuple(range(len(weight.shape)))) / floor
        return {"to_weight": ops.squeeze(ratio), "agc_clipped": ops.mean(ops.cast(clipped, "float32"))}

    def __call__(self, x, y=None, **columns) -> list[dict]:
        """Measure; return one record per kind and layer, with `columns` (step, epoch) added."""
        result = keras.tree.map_structure(float, self.run(x, y))
        # A layer that is called again comes after its first call.
        depth = lambda name: (self.depth[name.split("#")[0]], name)  # noqa: E731
        records = [
            {**columns, "kind": kind, "layer": name, **self._where(name), **values}
            for kind in KINDS
            for name, values in sorted(result.get(kind, {}).items(), key=lambda item: depth(item[0]))
        ]
        return records + (parameters(self.model, columns) if "parameters" in self.what else [])

    def _where(self, name: str) -> dict:
        first = name.split("#")[0]
        return {"place": self.places.get(first, "layer"), "depth": self.depth[first]}


def parameters(model: keras.Model, columns: dict) -> list[dict]:
    """Scales, shifts, moving statistics of normalizations, gains and learnable scalars: mean, spread and extremes.

    One record per vector or scalar; `value` is its mean (the scalar itself), such as a skip gain, Fixup's or Rescale's
    scale by block (EUNNet, Table 7).
    """
    records = []
    for depth, variable in enumerate(model.weights):
        if len(variable.shape) < 2 and not variable.path.endswith("/bias"):
            values = np.asarray(keras.ops.convert_to_numpy(variable), "float64")
            numbers = {"value": values.mean(), "std": values.std(), "min": values.min(), "max": values.max()}
            kind = {**columns, "kind": "parameter", "layer": variable.path, "place": "parameter", "depth": depth}
            records.append({**kind, **{name: float(number) for name, number in numbers.items()}})
    return records


def _weights(model: keras.Model, definition: str) -> dict[str, tuple[keras.Layer, tuple[int, ...]]]:
    """Path of every trainable kernel, and gamma where the poster is followed -> its layer and its fan-in axes."""
    owner = agc.owners(model)
    weights = {}
    for variable in model.trainable_variables:
        if len(variable.shape) >= 2 or (definition == "poster" and variable.name == "gamma"):
            layer = owner[variable.path]
            axes = agc.fan_in_axes(layer, variable) or tuple(range(len(variable.shape) - 1))
            weights[variable.path] = (layer, axes)
    return weights


def _values(layer: keras.Layer, weights: dict) -> list[tuple]:
    return [(v, weights[v.path]) for v in layer.trainable_variables if v.path in weights]


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
    loss = None if y is None else loss_of(model, loss)
    if loss == "compiled":
        # The loss of several outputs makes its counters at its first call, which must not be within a graph.
        one_x, one_y = keras.tree.map_structure(lambda a: a[:1], (x, y))
        model.compute_loss(x=one_x, y=one_y, y_pred=model(one_x))
    return pd.DataFrame(Probe(model, taps, what, loss, definition, statistics)(x, y))


def loss_of(model: keras.Model, loss: Any) -> Any:
    """The loss that gradients are taken of: the given one, else what the model was compiled with, if anything."""
    if loss is not None:
        return loss
    return "compiled" if getattr(model, "compiled", False) and model.loss is not None else None
