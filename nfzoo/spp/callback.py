"""The callback: when to measure, where the records go."""

import math
import pathlib
from collections.abc import Callable

import keras
import numpy as np
import pandas as pd

from nfzoo.backend import sync
from nfzoo.spp.log import SignalLog
from nfzoo.spp.probe import DEFAULT_WHAT, Probe, loss_of


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
        taps: "blocks", "layers", a pattern, a layer class, a list of names, or a function; see `select_taps`.
        what: any of "activations", "weights", "gradients", "parameters" (scales, gains, moving statistics).
        statistics: "default", "all", or names of `nfzoo.spp.STATS`.
        log_dir: folder for spp.jsonl; None keeps the records in memory (`records`).
        loss: default: the model's.
        definition: "channel" (Brock et al.) or "poster", see `nfzoo.spp.stats`.

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
        self, x, y=None, every: str | int | Callable[[int], bool] = "epoch", taps="blocks", what=DEFAULT_WHAT,
        log_dir=None, loss=None, definition="channel", statistics="default",
    ):  # fmt: skip
        super().__init__()
        if not (every == "epoch" or callable(every) or (isinstance(every, int) and every > 0)):
            raise ValueError(
                f'Expected every to be "epoch", a number of steps or a function. Received: every={every!r}'
            )
        self.x, self.y, self.every = x, y, every
        self.options = {"taps": taps, "what": what, "definition": definition, "statistics": statistics}
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
        loss = None if self.y is None else loss_of(self.model, self.loss)
        self.probe = Probe(self.model, loss=loss, **self.options)
        self.step = self.start = self.steps_before + int(self.model.optimizer.iterations)
        if self.log is not None:
            self.log.rewind(self.step or -1)  # a start from nothing measures step 0 anew
        if self.step == 0:
            self.measure(0)

    def on_epoch_begin(self, epoch, logs=None) -> None:
        self.epoch, self.start = epoch, self.step

    def on_train_batch_end(self, batch, logs=None) -> None:
        # With steps_per_execution several steps end at once, and Keras counts the last ones full.
        before, last = self.step, self.params.get("steps") or math.inf
        self.step = self.start + min(batch + 1, last)
        if self.every != "epoch" and any(map(self._due, range(before + 1, self.step + 1))):
            self.measure(self.step)

    def _due(self, step: int) -> bool:
        return self.every(step) if callable(self.every) else step % self.every == 0

    def on_epoch_end(self, epoch, logs=None) -> None:
        self.epoch = epoch + 1
        if self.every == "epoch":
            self.measure(self.step)
