"""What a network suffers from, in words: some watched training steps, judged by the checks of `checks.py`."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import keras
import numpy as np
import pandas as pd

from nfzoo.backend.taps import training_mode
from nfzoo.doctor.checks import CHECKS, PROBE, Case, Finding, check
from nfzoo.optimizers import updating
from nfzoo.spp import WHAT, SignalPropagation
from nfzoo.spp.stats import DEFAULT

__all__ = ["CHECKS", "SEVERITIES", "Case", "Diagnosis", "Finding", "as_records", "check", "examine"]

SEVERITIES = ("alarm", "warning", "note", "good")


@dataclass(frozen=True)
class Diagnosis:
    """What `examine` returns: the findings, worst first, and the log they are drawn from."""

    model: str
    findings: list[Finding]
    log: pd.DataFrame


def examine(
    model: keras.Model, x: np.ndarray, y: np.ndarray, *, steps: int = 20, batch_size: int = 32,
    callbacks: tuple[keras.callbacks.Callback, ...] = (),
) -> Diagnosis:  # fmt: skip
    """Train a compiled model for a few steps, watch every layer, and say what is seen. The model is left as it was.

    Args:
        model: any built and compiled Keras model.
        x, y: examples as the model takes them; they are repeated where the steps need more. The first 128 are the
            probe batch.
        steps: training steps to take.
        batch_size: examples per step.
        callbacks: of `fit`, for progress.

    Returns:
        Findings, worst first, and the log.

    Raises:
        ValueError: for a model that is not compiled, or without examples.

    Example:
        >>> import nfzoo
        >>> model = nfzoo.build("sn_test_ffnn")
        >>> model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        >>> x = np.random.default_rng(0).standard_normal((8, 8, 8, 3)).astype("float32")
        >>> {finding.severity for finding in examine(model, x, np.zeros(8), steps=2).findings} <= set(SEVERITIES)
        True
    """
    if not getattr(model, "compiled", False):
        raise ValueError(f"Expected a compiled model (with optimizer and loss). Received: {model.name}, not compiled")
    if not isinstance(x, np.ndarray) or not isinstance(y, np.ndarray):
        kinds = f"{type(x).__name__} and {type(y).__name__}"
        raise ValueError(f"Expected one array of examples and one of labels. Received: {kinds}")
    if not len(x) or len(x) != len(y):
        raise ValueError(f"Expected as many labels as examples, at least one. Received: {len(x)} examples, {len(y)}")
    if model.steps_per_execution > 1:
        raise ValueError(
            "Expected a loss for every step. Received: a model that takes "
            f"steps_per_execution={model.steps_per_execution} at once; compile it with 1"
        )
    if not np.isfinite(x).all():
        broken = np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(axis=1))
        raise ValueError(f"Expected finite examples. Received: {len(broken)} with NaN or infinity, first: {broken[0]}")
    order = np.arange(steps * batch_size) % len(x)
    watch = SignalPropagation(x[:PROBE], y[:PROBE], taps="layers", what=WHAT, tell=None, statistics=(*DEFAULT, "dead"))
    losses = _Losses()
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)
    kept = [(v, np.array(keras.ops.convert_to_numpy(v))) for v in (*model.variables, *optimizer.variables)]
    averaging = [(part, part.use_ema) for part in updating(optimizer)]
    for part, _ in averaging:
        part.use_ema = False  # `fit` would end with the average: not what has been trained
    try:
        model.fit(
            x[order], y[order], batch_size=batch_size, shuffle=False, verbose=0, callbacks=[watch, losses, *callbacks]
        )
        end = _loss(model, x[:PROBE], y[:PROBE], training=True)
        inference = _loss(model, x[:PROBE], y[:PROBE], training=False)
    finally:
        for part, wanted in averaging:
            part.use_ema = wanted
        for variable, value in kept:
            variable.assign(value)
    start = _loss(model, x[:PROBE], y[:PROBE], training=True)
    case = Case(model, watch.table(), losses.each, start, end, inference, batch_size, _classes(model), len(x[:PROBE]))
    findings = [finding for function in CHECKS.values() for finding in function(case)]
    return Diagnosis(model.name, sorted(findings, key=lambda f: SEVERITIES.index(f.severity)), case.log)


class _Losses(keras.callbacks.Callback):
    """The loss of every step; Keras tells the mean since the epoch began."""

    def __init__(self):
        super().__init__()
        self.each: list[float] = []

    def on_train_batch_end(self, batch, logs=None):
        done, mean = len(self.each), float(logs["loss"])
        self.each.append(mean * (done + 1) - sum(self.each) if math.isfinite(mean) else mean)


def _loss(model: keras.Model, x, y, training: bool) -> float:
    """Loss of one batch, without the model's own (regularizers); no variable is changed."""
    values = [v.value for v in model.trainable_variables], [v.value for v in model.non_trainable_variables]
    mode = dict.fromkeys(training_mode(model), training)
    outputs, _ = model.stateless_call(*values, keras.ops.convert_to_tensor(x), **mode)
    # What regularizers add is no part of what guessing costs.
    with keras.StatelessScope([(variable, variable.value) for variable in model.variables]):
        loss = model._compute_loss(x=x, y=keras.ops.convert_to_tensor(y), y_pred=outputs, training=training)
        return float(loss - sum(model.losses))


def _classes(model: keras.Model) -> int | None:
    kinds = (keras.losses.SparseCategoricalCrossentropy, keras.losses.CategoricalCrossentropy)
    known = isinstance(model.loss, kinds) or "categorical_crossentropy" in str(model.loss)
    shape = getattr(model, "output_shape", None)  # a subclass has none
    return shape[-1] if known and isinstance(shape, tuple) else None


def as_records(diagnosis: Diagnosis) -> list[dict[str, Any]]:
    """The findings as plain dictionaries, for JSON."""
    return [asdict(finding) for finding in diagnosis.findings]
