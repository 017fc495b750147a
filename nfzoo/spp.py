"""Signal propagation: statistics of activations, weights and gradients by depth, at a glance or during `fit`.

Definitions, for a tensor x whose last axis is the channel (facts of De & Smith and of Brock et al., arXiv 2101.08692,
section 3; population variance):

    acsm            average channel squared mean, mean_c (mean x_c)^2
    acv             average channel variance, mean_c Var(x_c)
    second_moment   mean of x^2 over everything; acsm + acv

For a kernel the "channel" is the unit that AGC clips (an output channel, or a channel of a depthwise kernel). With
`definition="poster"` tensors of rank 2 or less, and all weights, are taken as one flat vector: acsm is then mean(x^2)
and acv the variance over everything, as in the poster's figures. Its weights are what PyTorch calls so: the kernels and
the scale (gamma) of a normalization.

Plots and pandas read the log, never the model. In the log null stands for a statistic that is not finite (NaN or
infinity, which JSON cannot write); `read` gives it back as NaN.
"""

import fnmatch
import json
import math
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import pandas as pd
from keras import ops

from nfzoo import agc
from nfzoo.backend import signals, sync
from nfzoo.files import atomic, to_json

KINDS = ("activation", "weight", "effective_weight", "gradient", "weight_gradient")
WHAT = ("activations", "weights", "gradients")


def acsm(x: Any, axes: Sequence[int]) -> Any:
    """Average channel squared mean; `axes` are the axes within a channel."""
    return ops.mean(ops.square(ops.mean(x, axis=axes)))


def acv(x: Any, axes: Sequence[int]) -> Any:
    """Average channel variance (population)."""
    return ops.mean(ops.var(x, axis=axes))


def second_moment(x: Any, axes: Sequence[int]) -> Any:
    """Mean of the squares."""
    return ops.mean(ops.square(x))


STATS: dict[str, Callable[[Any, Sequence[int]], Any]] = {"acsm": acsm, "acv": acv, "second_moment": second_moment}


def statistics(x: Any, axes: Sequence[int] | None = None, definition: str = "channel", flat: bool = False) -> dict:
    """Reduce one tensor to scalars, in float32 at least.

    Args:
        x: any tensor.
        axes: axes within a channel; default: all but the last.
        definition: "channel", or "poster" (see the module).
        flat: whether the poster's definition takes this tensor as one vector.

    Example:
        >>> {k: float(v) for k, v in statistics(np.array([[1.0, 3.0], [1.0, 5.0]])).items()}
        {'acsm': 8.5, 'acv': 0.5, 'second_moment': 9.0}
    """
    if keras.backend.standardize_dtype(x.dtype) in ("float16", "bfloat16"):
        x = ops.cast(x, "float32")
    everything = tuple(range(len(x.shape)))
    if definition == "poster" and flat:
        return {"acsm": second_moment(x, ()), "acv": acv(x, everything), "second_moment": second_moment(x, ())}
    axes = everything[:-1] if axes is None else axes
    return {name: function(x, axes) for name, function in STATS.items()}


def select_taps(model: keras.Model, taps: str | Sequence[str] | Callable = "blocks") -> list[str]:
    """Choose the layers whose outputs are observed, in model order.

    Args:
        model: a functional model.
        taps: "blocks" (every block's output and residual branch), "layers" (every layer with weights, activation or
            merge), a shell pattern on layer names, a list of names, or a function of a layer.

    Raises:
        ValueError: if nothing matches.
    """
    if taps == "blocks":
        wanted = lambda layer: re.search(r"_(out|branch)\d*$", layer.name)  # noqa: E731
    elif taps == "layers":
        skipped = (keras.layers.InputLayer, keras.layers.Dropout, keras.layers.Flatten, keras.layers.ZeroPadding2D)
        wanted = lambda layer: not isinstance(layer, skipped)  # noqa: E731
    elif callable(taps):
        wanted = taps
    elif isinstance(taps, str):
        wanted = lambda layer: fnmatch.fnmatch(layer.name, taps)  # noqa: E731
    else:
        missing = set(taps) - {layer.name for layer in model.layers}
        if missing:
            raise ValueError(f"Expected names of layers of {model.name}. Received: {sorted(missing)}")
        wanted = lambda layer: layer.name in taps  # noqa: E731
    names = [layer.name for layer in model.layers if wanted(layer)]
    if not names:
        raise ValueError(
            f'Expected taps that match a layer of {model.name}. Received: taps={taps!r}. Try taps="layers", or a '
            f"pattern on names such as {[layer.name for layer in model.layers][1:4]}"
        )
    return names


class Probe:
    """Measure a model on one batch, without touching its state.

    Args:
        model: a built functional model.
        taps, what, definition: see `SignalPropagation`.
        loss: a Keras loss, or its name; None leaves gradients out.
    """

    def __init__(self, model, taps="blocks", what=WHAT, loss=None, definition="channel"):
        if definition not in ("channel", "poster"):
            raise ValueError(f'Expected definition "channel" or "poster". Received: {definition!r}')
        if unknown := set(what) - set(WHAT):
            raise ValueError(f"Expected what to be among {WHAT}. Received: {sorted(unknown)}")
        if not hasattr(model, "operations"):
            raise ValueError(f"Expected a functional Keras model. Received: {type(model).__name__}")
        self.what, self.definition = set(what), definition
        self.names = select_taps(model, taps)
        self.weights = _weights(model, definition)
        order = {layer.name: depth for depth, layer in enumerate(model.layers)}
        self.depth = {name: depth for depth, name in enumerate(self.names)}
        self.depth |= {path: order.get(layer.name, -1) for path, (layer, _) in self.weights.items()}
        compute_loss = None
        if "gradients" in self.what and loss is not None:
            function = keras.losses.get(loss)
            compute_loss = lambda y, outputs: ops.mean(function(y, outputs))  # noqa: E731
        self.run = signals(model, self.names, compute_loss, self._reduce)

    def _reduce(self, activations, weights, gradients, weight_gradients) -> dict:
        result = {kind: {} for kind in KINDS}
        for kind, tensors in (("activation", activations), ("gradient", gradients)):
            if f"{kind}s" in self.what:
                for name, x in tensors.items():
                    result[kind][name] = statistics(x, None, self.definition, flat=len(x.shape) <= 2)
        for path, (layer, axes) in self.weights.items():
            if "weights" in self.what:
                result["weight"][path] = statistics(weights[path], axes, self.definition, flat=True)
                if hasattr(layer, "effective_kernel"):
                    with keras.StatelessScope(_values(layer, weights)):
                        effective = layer.effective_kernel()
                    result["effective_weight"][path] = statistics(effective, axes, self.definition, flat=True)
            if path in weight_gradients:
                result["weight_gradient"][path] = statistics(weight_gradients[path], axes, self.definition, flat=True)
        return {kind: rows for kind, rows in result.items() if rows}

    def __call__(self, x, y=None, **columns) -> list[dict]:
        """Measure; return one record per kind and layer, with `columns` (step, epoch) added."""
        result = keras.tree.map_structure(float, self.run(x, y))
        return [
            {**columns, "kind": kind, "layer": name, "place": place(name), "depth": self.depth[name], **values}
            for kind in KINDS
            for name, values in sorted(result.get(kind, {}).items(), key=lambda item: self.depth[item[0]])
        ]


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


def place(name: str) -> str:
    """What a tap shows: "block" (the stream after a block), "branch" (before its merge) or "layer".

    Example:
        >>> place("stage2_block1_out"), place("stage2_block1_branch"), place("head")
        ('block', 'branch', 'layer')
    """
    match = re.search(r"_(out|branch)\d*$", name)
    return {"out": "block", "branch": "branch"}[match.group(1)] if match else "layer"


def snapshot(model, x, y=None, loss=None, taps="layers", what=WHAT, definition="channel") -> pd.DataFrame:
    """Measure a model once.

    Args:
        model: a built functional Keras model.
        x, y: one batch; without y and loss there are no gradients.
        loss: a Keras loss or its name; default: the one the model was compiled with.
        taps, what, definition: see `SignalPropagation`.

    Returns:
        One row per kind and layer: kind, layer, place, depth, acsm, acv, second_moment.

    Example:
        >>> import nfzoo
        >>> model = nfzoo.build("nf_test_efficientnet")
        >>> rows = snapshot(model, np.random.default_rng(0).standard_normal((8, 32, 32, 3)).astype("float32"))
        >>> sorted(rows.kind.unique())
        ['activation', 'effective_weight', 'weight']
    """
    loss = loss if loss is not None else getattr(model, "loss", None)
    return pd.DataFrame(Probe(model, taps, what, loss if y is not None else None, definition)(x, y))


class SignalLog:
    """An append-only file of JSON lines, one record each; a line cut short by a kill is ignored."""

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)

    def append(self, records: Sequence[dict]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(to_json(record) + "\n" for record in records)
        with self.path.open("a+b") as file:
            if file.tell() and (file.seek(-1, 2), file.read(1))[1] != b"\n":
                lines = "\n" + lines  # the last writer was killed: do not add to its broken line
            file.write(lines.encode())

    def read(self) -> list[dict]:
        records = []
        if self.path.exists():
            for line in self.path.read_text(errors="replace").splitlines():
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError:
                    continue
        return [{k: math.nan if v is None else v for k, v in r.items()} for r in records if isinstance(r, dict)]

    def rewind(self, step: int) -> None:
        """Drop the records of steps after `step`, for a run that resumes there."""
        kept = [r for r in self.read() if r.get("step", 0) <= step]
        if self.path.exists():
            with atomic(self.path) as partial:
                partial.write_text("".join(to_json(record) + "\n" for record in kept))


def read(path: str | pathlib.Path) -> pd.DataFrame:
    """Read a log, or the log of a run's folder, as a table; broken lines are left out, what is not finite is NaN.

    Raises:
        FileNotFoundError: if there is no log.
    """
    path = pathlib.Path(path)
    path = path / "spp.jsonl" if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(
            f"Expected a signal propagation log (spp.jsonl). Received: {path}, which does not exist"
        )
    records = SignalLog(path).read()
    if not records:
        raise ValueError(f"Expected records of signal propagation. Received: {path}, where no line is whole")
    return pd.DataFrame(records)


def log_spaced(total: int, n: int = 20) -> Callable[[int], bool]:
    """Schedule of about n steps between 1 and total, evenly spaced on a logarithmic axis.

    Example:
        >>> [step for step in range(1, 101) if log_spaced(100, 5)(step)]
        [1, 3, 10, 32, 100]
    """
    steps = {round(math.exp(t)) for t in np.linspace(0, math.log(total), n)}
    return steps.__contains__


class SignalPropagation(keras.callbacks.Callback):
    """Record signal propagation on a fixed probe batch during `fit`: at initialisation, then by schedule.

    The weights, the moving statistics, the optimizer and the random streams stay as they were. The statistics are
    computed in one compiled graph; only scalars leave the device.

    Args:
        x, y: the probe batch, as the model takes it. Without y there are no gradients.
        every: "epoch", a number of steps, or a function step -> bool (see `log_spaced`).
        taps: "blocks", "layers", a pattern on layer names, a list of names, or a function of a layer.
        what: any of "activations", "weights", "gradients".
        log_dir: folder for spp.jsonl; None keeps the records in memory (`records`).
        loss: default: the model's.
        definition: "channel" (Brock et al.) or "poster", see the module.

    Example:
        >>> import nfzoo
        >>> x, y = np.zeros((4, 32, 32, 3), "float32"), np.zeros(4, "int32")
        >>> model = nfzoo.build("bn_test_efficientnet")
        >>> model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        >>> probe = SignalPropagation(x, y)
        >>> _ = model.fit(x, y, epochs=2, verbose=0, callbacks=[probe])
        >>> probe.table().step.unique().tolist()
        [0, 1, 2]
    """

    def __init__(
        self, x, y=None, every: str | int | Callable[[int], bool] = "epoch", taps="blocks", what=WHAT,
        log_dir=None, loss=None, definition="channel",
    ):  # fmt: skip
        super().__init__()
        if not (every == "epoch" or callable(every) or (isinstance(every, int) and every > 0)):
            raise ValueError(
                f'Expected every to be "epoch", a number of steps or a function. Received: every={every!r}'
            )
        self.x, self.y, self.every = x, y, every
        self.options = {"taps": taps, "what": what, "definition": definition}
        self.loss = loss
        self.log = None if log_dir is None else SignalLog(pathlib.Path(log_dir) / "spp.jsonl")
        self.records: list[dict] = []
        self.probe: Probe | None = None
        self.epoch = self.step = self.start = 0
        self.steps_before = 0  # steps that the optimizer has not counted, because another one took them

    def table(self) -> pd.DataFrame:
        """The records of this `fit` as a table."""
        return pd.DataFrame(self.records)

    def measure(self, step: int) -> None:
        """Probe the model now, unless this step was probed already."""
        if self.records and self.records[-1]["step"] == step:
            return
        sync(self.model)
        records = self.probe(self.x, self.y, step=step, epoch=self.epoch)
        self.records += records
        if self.log is not None:
            self.log.append(records)

    def on_train_begin(self, logs=None) -> None:
        loss = self.loss if self.loss is not None else self.model.loss
        self.probe = Probe(self.model, loss=None if self.y is None else loss, **self.options)
        self.step = self.start = self.steps_before + int(self.model.optimizer.iterations)
        if self.log is not None:
            self.log.rewind(self.step or -1)  # a start from nothing measures step 0 anew
        if self.step == 0:
            self.measure(0)

    def on_epoch_begin(self, epoch, logs=None) -> None:
        self.epoch, self.start = epoch, self.step

    def on_train_batch_end(self, batch, logs=None) -> None:
        self.step = self.start + batch + 1
        if self.every == "epoch":
            return
        if self.every(self.step) if callable(self.every) else self.step % self.every == 0:
            self.measure(self.step)

    def on_epoch_end(self, epoch, logs=None) -> None:
        self.epoch = epoch + 1
        if self.every == "epoch":
            self.measure(self.step)
