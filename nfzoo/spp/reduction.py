"""What is told of a model's tensors, and how it becomes records: the same for a probe and for live batches."""

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

from nfzoo import agc
from nfzoo.optimizers import clipping_of
from nfzoo.spp.stats import definitions, edges, resolve, statistics
from nfzoo.spp.taps import all_layers, place, select_taps

KINDS = ("activation", "weight", "effective_weight", "gradient", "weight_gradient", "parameter")
WHAT = ("activations", "weights", "gradients", "parameters")
DEFAULT_WHAT = ("activations", "weights", "gradients")


def check_options(what, definition: str, statistics) -> None:
    """Raise ValueError for options that no model has use for."""
    if definition not in ("channel", "poster"):
        raise ValueError(f'Expected definition "channel" or "poster". Received: {definition!r}')
    if isinstance(what, str) or set(what) - set(WHAT):
        raise ValueError(f"Expected what to be a tuple of some of {', '.join(WHAT)}. Received: {what!r}")
    resolve(statistics)


class Reduction:
    """Tensors of a model in, statistics by kind and layer out.

    Args:
        model: any built model.
        taps, what, statistics, definition: see `SignalPropagation`.

    Raises:
        ValueError: for a model that is not built, or has its channels first.

    Attributes:
        taps: name -> layer whose output is observed.
        weights: path -> layer that holds the weight, axes of its fan-in.
    """

    def __init__(self, model, taps="auto", what=DEFAULT_WHAT, definition="channel", statistics="default"):
        check_options(what, definition, statistics)
        if not model.built or not model.layers:
            raise ValueError(f"Expected a model that is built (call it on a batch). Received: {model.name}")
        self.model, self.what, self.definition = model, set(what), definition
        self.statistics = resolve(statistics)
        layers = dict(all_layers(model))
        self.taps = {name: layers[name] for name in select_taps(model, taps)}
        self.weights = _weights(model, definition)
        _refuse_channels_first(layers.values())
        # A layer may hold others: they come in its place, in the order in which it made them.
        order = {id(part): depth for depth, part in enumerate(_parts(layers.values()))}
        self.depth = {name: depth for depth, name in enumerate(self.taps)}
        self.depth |= {path: order.get(id(layer), -1) for path, (layer, _) in self.weights.items()}
        self.depth |= {a._kernel.path: order.get(id(a), -1) for a, _ in self.weights.values() if _has_lora(a)}
        self.agc, units = clipping_of(model)
        self.units = {path: units.get(path, axes) for path, (_, axes) in self.weights.items()}

    def __call__(self, activations, weights, gradients, weight_gradients, before=None) -> dict:
        """Reduce tensors to statistics: kind -> layer -> name of the statistic -> tensor.

        Args:
            activations, gradients: tap name -> tensor; the gradient is that of the loss with respect to the output.
            weights, weight_gradients: variable path -> tensor.
            before: the weights before the step that made `weights` of them; None where there was none.
        """
        result = {kind: {} for kind in KINDS}
        for kind, tensors in (("activation", activations), ("gradient", gradients)):
            if f"{kind}s" in self.what:
                for name, x in tensors.items():
                    result[kind][name] = self._statistics(x, None, len(x.shape) <= 2)
        for path, (layer, axes) in self.weights.items():
            if "weights" in self.what:
                told = self._statistics(weights[path], axes, True)
                update = {} if before is None else {"update_to_weight": _change(before[path], weights[path])}
                result["weight"][path] = {**told, **update}
                whole = layer._kernel.path if _has_lora(layer) else path  # of its two factors, once
                if hasattr(layer, "effective_kernel") and whole not in result["effective_weight"]:
                    with keras.StatelessScope(_values(layer, weights)):
                        effective = layer.effective_kernel()
                    fan_in = layer.fan_in_axes if _has_lora(layer) and self.definition == "channel" else axes
                    result["effective_weight"][whole] = self._statistics(effective, fan_in, True)
            if path in weight_gradients:
                gradient = weight_gradients[path]
                ratios = self._against_weight(gradient, (before or weights)[path], self.units[path])
                result["weight_gradient"][path] = {**self._statistics(gradient, axes, True), **ratios}
        return {kind: rows for kind, rows in result.items() if rows}

    def _statistics(self, x, axes, flat: bool) -> dict[str, Any]:
        return statistics(x, axes, self.definition, flat, self.statistics)

    def _against_weight(self, gradient, weight, units) -> dict[str, Any]:
        """Norm of the gradient over that of the weight, and the share of units that AGC clips (NFNet paper, eq. 3)."""
        ratio = _norm(gradient) / ops.maximum(_norm(weight), self.agc.eps)
        if units is None:  # excluded
            return {"to_weight": ratio, "agc_clipped": ops.zeros((), "float32")}
        _, clipped = agc.clip(gradient, weight, units, self.agc.clip_factor, self.agc.eps)
        return {"to_weight": ratio, "agc_clipped": ops.mean(ops.cast(clipped, "float32"))}

    def layout(self) -> list[tuple[str, str, str]]:
        """Kind, layer and name of every statistic that a training step yields."""
        gradients = "gradients" in self.what
        kinds = [
            ("activation", self.taps if "activations" in self.what else (), ()),
            ("gradient", self.taps if gradients else (), ()),
            ("weight", self.weights if "weights" in self.what else (), ("update_to_weight",)),
            ("effective_weight", self._standardized() if "weights" in self.what else (), ()),
            ("weight_gradient", self.weights if gradients else (), ("to_weight", "agc_clipped")),
        ]
        return [(k, name, s) for k, names, more in kinds for name in names for s in (*self.statistics, *more)]

    def _standardized(self) -> list[str]:
        return [path for path, (layer, _) in self.weights.items() if hasattr(layer, "effective_kernel")]

    def records(self, result: dict, columns: dict) -> list[dict]:
        """One record per kind and layer, with `columns` (step, epoch) added."""
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
        told = place(first, self.taps[first]) if first in self.taps else "layer"
        return {"place": told, "depth": self.depth[first]}

    def describe(self) -> dict:
        """What a reader of the log needs to know: the model, its layers, what each statistic is."""
        owners = self.taps | {path: layer for path, (layer, _) in self.weights.items()}
        shapes = {v.path: list(v.shape) for v in self.model.weights}
        layers = {name: {"class": type(layer).__name__, "shape": shapes.get(name)} for name, layer in owners.items()}
        told = definitions(self.statistics, self.definition) | _RATIOS
        return {"model": self.model.name, "definitions": told, "edges": edges().tolist(), "layers": layers}


_RATIOS = {
    "update_to_weight": "Norm of a training step's change of a weight over the weight's norm; of a probe, that of all "
    "steps that end together (steps_per_execution).",
    "to_weight": "Norm of a weight's gradient over the weight's norm.",
    "agc_clipped": "Share of a weight's units that adaptive gradient clipping clips (arXiv 2102.06171, equation 3), by "
    "the model's own settings or the default ones.",
    "value": "Mean of a vector of parameters (scales, shifts, gains, moving statistics); of a scalar, the scalar.",
}


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


def _norm(x: Any) -> Any:
    return ops.squeeze(agc.unitwise_norm(x, tuple(range(len(x.shape)))))


def _change(before: Any, after: Any) -> Any:
    return _norm(after - before) / ops.maximum(_norm(after), 1e-12)


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


def _parts(layers: Iterable[keras.Layer]) -> list[keras.Layer]:
    return list({id(part): part for layer in layers for part in layer._flatten_layers()}.values())


def _refuse_channels_first(layers: Iterable[keras.Layer]) -> None:
    for layer in layers:
        if getattr(layer, "data_format", None) == "channels_first":
            raise ValueError(
                f"Expected a model whose channels come last: statistics are of channels. Received: {layer.name}, with "
                'data_format="channels_first"'
            )


def _has_lora(layer: keras.Layer) -> bool:
    return getattr(layer, "lora_enabled", False)


def _values(layer: keras.Layer, weights: dict) -> list[tuple]:
    return [(v, weights[v.path]) for v in layer.trainable_variables if v.path in weights]
