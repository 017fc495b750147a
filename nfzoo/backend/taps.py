"""See what layers put out while a model runs: nested, shared, sequential or subclassed, on any backend."""

import contextlib
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras

TINY = 1e-37  # keeps a variance of zero from dividing zero by zero


@contextlib.contextmanager
def recording(model: keras.Model, taps: dict[str, keras.Layer], see: Callable) -> Iterator[None]:
    """While this lasts, what `see(name, output)` returns takes the place of the output of a model's tapped layers.

    A layer that is called again is seen as "name#2", "name#3". Outputs that are no single tensor of floats pass unseen.
    What is seen is kept: what `keras.RematScope` has computed twice is computed once meanwhile.
    """
    models = [model, *(layer for layer in model._flatten_layers() if isinstance(layer, keras.Model))] if taps else []
    parts = {id(part): part for part in (*models, *taps.values())}.values()
    # Set past Keras' tracking, which locks built layers.
    for part in parts:
        mode, times = _HELD.get(id(part), (part._remat_mode, 0))
        _HELD[id(part)] = mode, times + 1
        object.__setattr__(part, "_remat_mode", None)
    for name, layer in taps.items():
        _watched(layer).eyes[threading.get_ident()] = _eye(name, see)
    try:
        yield
    finally:
        for layer in taps.values():
            del _watched(layer).eyes[threading.get_ident()]
            if not _watched(layer).eyes:
                object.__delattr__(layer, _called(layer))
        for part in parts:
            mode, times = _HELD.pop(id(part))
            if times > 1:
                _HELD[id(part)] = mode, times - 1
            else:
                object.__setattr__(part, "_remat_mode", mode)


_HELD: dict[int, tuple[Any, int]] = {}  # part of a model -> what it was, and how many replicas record it


class _Watched:
    """Shadows a layer's method. The replicas of a strategy are threads that enter one layer in turns."""

    def __init__(self, call: Callable):
        self.call, self.eyes = call, {}

    def __call__(self, *args, **kwargs):
        output, eye = self.call(*args, **kwargs), self.eyes.get(threading.get_ident())
        return output if eye is None else eye(output)


def _called(layer: keras.Layer) -> str:
    """The method that a call of the layer runs: a quantized one has another."""
    return "call" if getattr(layer, "quantization_mode", None) is None else "quantized_call"


def _watched(layer: keras.Layer) -> _Watched:
    method = getattr(layer, _called(layer))
    if not isinstance(method, _Watched):
        method = _Watched(method)
        object.__setattr__(layer, _called(layer), method)
    return method


def _eye(name: str, see: Callable) -> Callable:
    times = itertools.count(1)

    def eye(output):
        if not keras.ops.is_tensor(output) or "float" not in keras.backend.standardize_dtype(output.dtype):
            return output
        time = next(times)
        return see(name if time == 1 else f"{name}#{time}", output)

    return eye


def training_mode(model: keras.Model) -> dict:
    """Arguments that put a call of the model into training mode; a model without such a mode takes none."""
    known = inspect.signature(type(model).call).parameters
    return {"training": True} if "training" in known else {}


def clipping(model: keras.Model) -> contextlib.AbstractContextManager:
    """While this lasts, updates are clipped as the model was compiled; a Keras model's own are not."""
    return model.clipping() if hasattr(model, "clipping") else contextlib.nullcontext()


def loss_scale(model: keras.Model) -> float:
    """A factor for the loss that keeps small gradients above the least number of float16; they are divided by it."""
    half = any(layer.compute_dtype == "float16" for layer in model._flatten_layers(include_self=False))
    return 1024.0 if half else 1.0


def loss_counters(model: keras.Model) -> list:
    """Variables that a loss may write: all of the model's metrics but `compile(metrics=…)`.

    Those are made by the first training step. A probe from before it would have to be traced again.
    """
    named = getattr(model, "_compile_metrics", None)
    return [v for metric in model.metrics if metric is not named for v in metric.variables]


def loss_state(model: keras.Model, trainable, counters) -> list[tuple]:
    """What a loss may read and write, for a stateless scope: weights that it penalises, means that it keeps."""
    pairs = zip([*model.trainable_variables, *loss_counters(model)], [*trainable, *counters], strict=True)
    return list(pairs)


@contextlib.contextmanager
def own_losses(model: keras.Model, losses: list) -> Iterator[None]:
    """While this lasts, the model's losses (regularizers, `add_loss`) are those of one stateless call."""
    object.__setattr__(model, "_losses_override", losses)  # past Keras' tracking
    try:
        yield
    finally:
        object.__setattr__(model, "_losses_override", [])


def unscaled(gradients: dict, scale) -> dict:
    """Gradients without the loss scale, in float32 at least; those of what the loss does not depend on are left out."""
    half = ("float16", "bfloat16")
    wide = lambda g: keras.ops.cast(g, "float32") if keras.backend.standardize_dtype(g.dtype) in half else g  # noqa: E731
    # A gradient of rows alone (of an embedding) becomes a whole one.
    present = {name: wide(keras.ops.convert_to_tensor(g)) for name, g in gradients.items() if g is not None}
    return {name: g / keras.ops.cast(scale, g.dtype) for name, g in present.items()}


def check_step(model: keras.Model, step: type) -> None:
    """Live signals come from a training step of ours, which stands for Keras' and for no other."""
    own = type(model).train_step
    if own not in (keras.Model.train_step, step.train_step):
        raise ValueError(
            f'Expected a model with the training step of Keras or of nfzoo for source="live". Received: '
            f'{type(model).__name__}, which has its own (from {own.__module__}); take source="probe"'
        )
