"""The callback: when to measure, where the records go."""

import math
import pathlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pandas as pd

from nfzoo.alarms import Alarm, alarms
from nfzoo.backend import sync
from nfzoo.optimizers import innermost
from nfzoo.spp.live import LiveSignals, attach, begin, detach, live_signals
from nfzoo.spp.log import SignalLog, write_meta
from nfzoo.spp.probe import Probe, loss_of
from nfzoo.spp.reduction import DEFAULT_WHAT, Reduction, check_options
from nfzoo.spp.stats import HISTOGRAMS, edges, resolve


def log_spaced(total: int, n: int = 20) -> Callable[[int], bool]:
    """Schedule of about n steps between 1 and total, evenly spaced on a logarithmic axis.

    Example:
        >>> [step for step in range(1, 101) if log_spaced(100, 5)(step)]
        [1, 3, 10, 32, 100]
    """
    steps = {round(math.exp(t)) for t in np.linspace(0, math.log(total), n)}
    return steps.__contains__


class SignalPropagation(keras.callbacks.Callback):
    """Record signal propagation during `fit`: at initialisation, then by schedule.

    The weights, the moving statistics, the optimizer and the random streams stay as they were. The statistics are
    computed in one compiled graph; only they leave the device. Where an error or Ctrl-C ends a `fit` with live signals,
    the model keeps its watched step, which costs time alone, until the next callback of this kind.

    The records of a log, and of the callback itself, go on where they ended: in a second `fit` of the same model and
    callback, compiled anew or not; and in another process from the step of the restored optimizer on, or, where an
    optimizer begins anew at a later epoch, behind the last record. A new model that begins with epoch 0 takes the place
    of what the log held.

    Args:
        x, y: the probe batch, as the model takes it. Without y there are no gradients.
        source: "probe" measures on that batch; "live" takes the mean over all training batches since the last record,
            within the training step, and needs no x (with one, initialisation is measured on it).
        every: "epoch", a number of steps, or a function step -> bool (see `log_spaced`). A network is also measured on
            x before its first step here. With "epoch", updates need data whose number of steps is known.
        taps: "auto", "blocks", "layers", a pattern, a layer class, a list of names, or a function; see `select_taps`.
        what: any of "activations", "weights", "gradients", "parameters" (scales, gains, moving statistics).
        statistics: "default", "all", or names of `nfzoo.spp.STATS`.
        log_dir: folder for spp.jsonl; None keeps the records in memory.
        tensorboard: folder for TensorBoard's scalars and histograms.
        report: HTML file to write when `fit` ends, see `nfzoo.report.write`.
        tell: what is called with the sentence of each alarm (see `nfzoo.alarms`) when it is first given; None for none.
        loss: default: the model's.
        definition: "channel" (Brock et al.) or "poster", see `nfzoo.spp.stats`.

    Attributes:
        steps_done: batches that were trained on before this `fit`, if told by who knows better than the optimizer,
            which does not count a step that loss scaling discards.

    Raises:
        ValueError: for options that do not fit, when made; for a model that they do not fit, when `fit` begins.

    Example:
        >>> import nfzoo
        >>> x, y = np.random.default_rng(0).standard_normal((4, 8, 8, 3)).astype("float32"), np.zeros(4, "int32")
        >>> model = nfzoo.build("sn_test_ffnn")
        >>> model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        >>> probe = SignalPropagation(x, y)
        >>> _ = model.fit(x, y, epochs=2, verbose=0, callbacks=[probe])
        >>> probe.table().step.unique().tolist()
        [0, 1, 2]
    """

    def __init__(
        self, x=None, y=None, source: str = "probe", every: str | int | Callable[[int], bool] = "epoch", taps="auto",
        what=DEFAULT_WHAT, log_dir=None, tensorboard=None, report=None, tell: Callable[[str], Any] | None = print,
        loss=None, definition="channel", statistics="default",
    ):  # fmt: skip
        super().__init__()
        if not (every == "epoch" or callable(every) or (isinstance(every, int) and every > 0)):
            raise ValueError(
                f'Expected every to be "epoch", a number of steps or a function. Received: every={every!r}'
            )
        check_options(what, definition, statistics)
        if source not in ("probe", "live"):
            raise ValueError(f'Expected source "probe" or "live". Received: {source!r}')
        if source == "probe" and x is None:
            raise ValueError('Expected a probe batch x. Received: None; source="live" needs none')
        self.x, self.y, self.every, self.source = x, y, every, source
        self.options = {"taps": taps, "what": what, "definition": definition, "statistics": statistics}
        self.loss = loss
        self.log = None if log_dir is None else SignalLog(pathlib.Path(log_dir) / "spp.jsonl")
        self.board = None if tensorboard is None else _board(tensorboard)
        self.report, self.tell = report, tell
        self.records: list[dict] = []  # those that no log keeps
        self.alarms: list[Alarm] = []
        self._compared: list[list[dict]] = []  # the first records and the last ones
        self.probe: Probe | None = None
        self.live: LiveSignals | None = None
        self._measured: int | None = None
        self._before: dict[str, np.ndarray] = {}
        self.epoch = self.step = self.start = self.start_step = 0
        self.steps_done: int | None = None
        self._again = self._begun = False

    def table(self) -> pd.DataFrame:
        """The records of this `fit`, and those that its log held before, as a table."""
        return pd.DataFrame(self.records if self.log is None else self.log.read())

    def measure(self, step: int) -> None:
        """Record the state of the model now, unless this step was recorded already."""
        if self._measured == step:
            return
        self._measured = step
        sync(self.model)
        columns = {"step": step, "epoch": self.epoch}
        records = self.live.read(step, columns) if self.live and step > self.start_step else self._probed(columns)
        if self.log is None:
            self.records += records
        else:
            self.log.append(records)
        if self.board is not None:
            self.board.add(records, edges())
        self._judge(records)

    def _judge(self, records: list[dict]) -> None:
        """Say what is wrong now and was not before. Alarms compare with the start and with the step before."""
        self._compared = [*self._compared[:1], *self._compared[1:][-1:], records]
        known = {alarm.kind for alarm in self.alarms}
        new = [a for a in alarms(pd.DataFrame(sum(self._compared, []))) if a.kind not in known]
        self.alarms += new
        for alarm in new:
            if self.tell is not None:
                self.tell(alarm.sentence)

    def _probed(self, columns: dict) -> list[dict]:
        if self.probe is None:
            return []
        records = self.probe(self.x, self.y, **columns)
        for record in records:
            if record["kind"] == "weight" and record["layer"] in self._before:
                record["update_to_weight"] = self._update(record["layer"])
        self._before = {}
        return records

    def _update(self, path: str) -> float:
        after = self._weights([path])[path]
        return float(np.linalg.norm(after - self._before[path]) / max(np.linalg.norm(after), 1e-12))

    def _weights(self, paths) -> dict[str, np.ndarray]:
        values = {v.path: v for v in self.model.trainable_variables}
        return {path: np.array(keras.ops.convert_to_numpy(values[path]), "float32").ravel() for path in paths}

    def set_model(self, model: keras.Model) -> None:
        self._again = model is self._model
        super().set_model(model)
        if not model.built and self.x is not None:
            model(keras.tree.map_structure(lambda a: a[:1], self.x))  # a Sequential without an Input
        detach(model, begun=self.source == "probe")  # what a `fit` left that was interrupted
        if self.source == "live":
            # Counts of bins are no mean over batches: "all" is here all that is a number.
            numbers = {"statistics": [name for name in resolve("all") if name not in HISTOGRAMS]}
            every = numbers if self.options["statistics"] == "all" else {}
            self.live = live_signals(model, Reduction(model, **self.options | every))
            attach(model, self.live)

    def on_train_begin(self, logs=None) -> None:
        if self.live is not None:
            begin(self.model, self.live)
        if self.x is not None:
            loss = loss_of(self.model, self.loss, self.y, self.options["what"])
            self.probe = Probe(self.model, loss=loss, **self.options)
        self._begun = False

    def _begin(self, epoch: int) -> None:
        """What is done before the first step: not before all callbacks have begun, since one may restore the model."""
        self._begun, self.epoch = True, epoch
        self.step = self.start = self.start_step = self._steps_done(epoch)
        self._measured, self._compared, self.alarms = None, [], []
        if self.log is not None:
            self.log.rewind(self.step or -1)  # a start from nothing measures step 0 anew
            described = self.live or self.probe
            write_meta(self.log.path.parent, described.reduction.describe())
        if not self._again:
            self.records = []  # of another network
        if self.probe is not None and self.table().empty:  # a trained network has a state to start from, too
            self.measure(self.step)

    def _steps_done(self, epoch: int) -> int:
        if self.steps_done is not None:
            return self.steps_done
        done = _steps_taken(self.model.optimizer)
        if self._again:
            return max(done, self.step)
        if epoch and not done and self.log is not None:
            return max((record.get("step", 0) for record in self.log.read()), default=0)
        return done

    def on_train_end(self, logs=None) -> None:
        detach(self.model)
        self.live = None
        if self.board is not None:
            self.board.flush()
        if self.report is not None:
            self._report()

    def _report(self) -> None:
        if self.table().empty:  # a trained network is not lost for want of a report
            if self.tell is not None:
                self.tell(
                    f"There is no {self.report}: nothing was recorded, as no step was due (every={self.every!r})."
                )
            return
        from nfzoo import report  # plotly's half a second

        report.write({self.model.name: self.table() if self.log is None else self.log.path.parent}, self.report)

    def on_epoch_begin(self, epoch, logs=None) -> None:
        if not self._begun:
            self._begin(epoch)
        self.epoch, self.start = epoch, self.step

    def on_train_batch_begin(self, batch, logs=None) -> None:
        """Keep the weights before a step that will be recorded: its update is told beside them."""
        last = self.params.get("steps") or math.inf
        ahead = min(batch + self.model.steps_per_execution, last)
        due = ahead == last if self.every == "epoch" else any(map(self._due, self._steps(batch, ahead)))
        if due and self.probe is not None and self.live is None and "weights" in self.options["what"]:
            sync(self.model)
            self._before = self._weights(self.probe.reduction.weights)

    def on_train_batch_end(self, batch, logs=None) -> None:
        # With steps_per_execution several steps end at once, and Keras counts the last ones full.
        before, last = self.step, self.params.get("steps") or math.inf
        self.step = self.start + min(batch + 1, last)
        if self.every != "epoch" and any(map(self._due, self._steps(before - self.start, self.step - self.start))):
            self.measure(self.step)

    def _steps(self, begin: int, end: int) -> range:
        """The numbers of the steps between two batches of this epoch."""
        return range(self.start + begin + 1, self.start + int(end) + 1)

    def _due(self, step: int) -> bool:
        return self.every(step) if callable(self.every) else step % self.every == 0

    def on_epoch_end(self, epoch, logs=None) -> None:
        self.epoch = epoch + 1
        if self.every == "epoch":
            self.measure(self.step)


def _steps_taken(optimizer: keras.optimizers.Optimizer) -> int:
    """Batches that an optimizer has seen; it counts its updates, which take several where gradients accumulate."""
    optimizer = innermost(optimizer)
    accumulates = getattr(optimizer, "gradient_accumulation_steps", None)
    return int(keras.ops.convert_to_numpy(optimizer._iterations if accumulates else optimizer.iterations))


def _board(folder: str | pathlib.Path):
    from nfzoo.spp.board import Board  # half a second of imports that few need

    return Board(folder)
