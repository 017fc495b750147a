"""Keras callbacks of a run: show progress, stop at a loss that is not finite, keep checkpoints that survive a kill."""

import contextlib
import csv
import hashlib
import json
import math
import pathlib
import signal
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nfzoo.backend import sync
from nfzoo.files import atomic, sha256, to_json
from nfzoo.optimizers import innermost


class ShowProgress(keras.callbacks.Callback):
    """A bar with loss, accuracy, images per second and time left; one line per epoch where no terminal listens."""

    def __init__(self, batch_size: int, examples: int, epochs: int, console: Console | None = None):
        super().__init__()
        self.batch_size, self.examples, self.epochs = batch_size, examples, epochs  # of the run, not of one `fit`
        self.console = console or Console()
        self.bar = self.task = None

    def on_train_begin(self, logs=None) -> None:
        self.began, self.seen = time.perf_counter(), 0
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, TextColumn("{task.fields[state]}"), console=self.console)
            self.bar.start()

    def on_epoch_begin(self, epoch, logs=None) -> None:
        if self.bar is not None:
            title = f"epoch {epoch + 1}/{self.epochs}"
            self.task = self.bar.add_task(title, total=self.params["steps"], state="compiling")
        self.epoch_began = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None) -> None:
        if self.bar is not None:
            rate = self._images(batch + 1) / (time.perf_counter() - self.epoch_began)
            self.bar.update(self.task, completed=batch + 1, state=f"{_text(logs)}  {rate:.0f} images/s")

    def on_epoch_end(self, epoch, logs=None) -> None:
        images = self._images(self.params["steps"])
        self.seen += images / self.examples  # of an epoch that is resumed within it, the rest
        elapsed = time.perf_counter() - self.epoch_began
        line = f"epoch {epoch + 1}/{self.epochs}  {_text(logs)}  {images / elapsed:.0f} images/s"
        if self.bar is not None:
            self.bar.remove_task(self.task)
        left = (time.perf_counter() - self.began) / self.seen * (self.epochs - epoch - 1)
        (self.bar.console if self.bar else self.console).print(
            f"{line}  {int(left // 60)}:{int(left % 60):02d} left", markup=False, highlight=False, soft_wrap=True
        )

    def on_train_end(self, logs=None) -> None:
        self.close()

    def _images(self, steps: int) -> int:
        return min(steps * self.batch_size, self.examples)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _text(logs: dict | None) -> str:
    return "  ".join(f"{key} {float(value):.4f}" for key, value in (logs or {}).items())


class StopOnNaN(keras.callbacks.Callback):
    """Stop at the first loss or validation loss that is not finite, or after an epoch whose weights are not.

    `step` tells where (1-based, within its epoch). The weights are looked at because a loss can hide them: ReLU makes
    zeros of NaN on a CPU.

    Example:
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        >>> model.compile(keras.optimizers.SGD(1e30), "mse")
        >>> stop = StopOnNaN()
        >>> _ = model.fit(np.ones((40, 1)), np.zeros((40, 1)), batch_size=1, verbose=0, callbacks=[stop])
        >>> stop.step is not None and stop.step < 10
        True
    """

    def __init__(self):
        super().__init__()
        self.step: int | None = None
        self.steps_before = 0  # of the epoch, in a `fit` of its rest alone

    @property
    def diverged(self) -> bool:
        return self.step is not None

    def on_train_batch_end(self, batch, logs=None) -> None:
        if self.step is None and not math.isfinite(float((logs or {}).get("loss", 0.0))):
            self._stop(batch + 1)

    def on_epoch_end(self, epoch, logs=None) -> None:
        if self.step is None and not (math.isfinite(float((logs or {}).get("val_loss", 0.0))) and self._sound()):
            self._stop(self.params["steps"])

    def _sound(self) -> bool:
        return all(np.isfinite(keras.ops.convert_to_numpy(v)).all() for v in self.model.weights)

    def _stop(self, step: int) -> None:
        self.step = self.steps_before + step
        self.model.stop_training = True


STATISTICS_BATCHES = 16  # means and variances over some thousand examples


class AverageWeights(keras.callbacks.Callback):
    """Validate with the moving average of the weights, where the optimizer keeps one, and train on with the weights.

    `keras.callbacks.SwapEMAWeights` exchanges them by adding and subtracting, which rounds both, and leaves batch
    normalization the statistics of the other weights. Here the average gets its own.

    Args:
        batches: of training, by number; on the first of them the average's statistics are measured. None: they stay.
    """

    def __init__(self, batches: Sequence | None = None):
        super().__init__()
        self._batches = batches
        self._weights: list[np.ndarray] | None = None

    def on_train_begin(self, logs=None) -> None:
        self._begin(self.model)

    def _begin(self, model: keras.Model) -> None:
        self._net, self._optimizer = model, innermost(model.optimizer)
        found = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
        self._normalizations = [layer for layer in found if layer.trainable]
        self._statistics = [v for layer in self._normalizations for v in layer.non_trainable_variables]

    def on_test_begin(self, logs=None) -> None:
        if self._optimizer.use_ema:
            self._keep()
            self.put_average()

    def on_test_end(self, logs=None) -> None:
        self.put_back()

    def on_epoch_end(self, epoch, logs=None) -> None:
        if self._optimizer.use_ema:  # when `fit` ends, Keras puts the average in place of the weights
            self._keep()

    def end(self, model: keras.Model) -> None:
        """Do what the end of `fit` does, for a model of the last epoch: its average takes the place of its weights."""
        self._begin(model)
        if self._optimizer.use_ema:
            self._keep()

    def _keep(self) -> None:
        self._weights = _copies([*self._optimizer._trainable_variables, *self._statistics])

    @property
    def kept(self) -> bool:
        """Whether there is an average beside the weights."""
        return self._weights is not None

    def put_back(self) -> None:
        """Give the model the weights that it trains with."""
        if self._weights is not None:
            _assign([*self._optimizer._trainable_variables, *self._statistics], self._weights)

    def put_average(self) -> None:
        """Give the model the average of its weights. What Keras puts there when `fit` ends is, on JAX, no copy."""
        _assign(self._optimizer._trainable_variables, self._optimizer._model_variables_moving_average)
        if self._batches is not None and self._normalizations:
            self._measure()

    def _measure(self) -> None:
        """Let moving statistics be the mean over some training batches; random states stay as they are."""
        learned = {id(v) for v in self._net.trainable_variables} | {id(v) for v in self._statistics}
        others = [v for v in self._net.variables if id(v) not in learned]
        momenta, before = [layer.momentum for layer in self._normalizations], _copies(others)
        try:
            for number in range(min(STATISTICS_BATCHES, len(self._batches))):
                for layer in self._normalizations:
                    layer.momentum = number / (number + 1)
                self._net(self._batches[number][0], training=True)
        finally:
            for layer, momentum in zip(self._normalizations, momenta, strict=True):
                layer.momentum = momentum
            _assign(others, before)


def _copies(variables) -> list[np.ndarray]:
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


def _assign(variables, values) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(np.array(keras.ops.convert_to_numpy(value)))


class Terminated(SystemExit):
    """SIGTERM came: the run is saved and the process ends with the status that a shell expects, 143."""

    def __init__(self, where: str):
        super().__init__(128 + signal.SIGTERM)
        self.where = where


class Checkpoints(keras.callbacks.Callback):
    """Keep the last two checkpoints of a run as pairs: model-N.keras (weights, optimizer, AGC) and model-N.json.

    There is one after each epoch N; on SIGTERM there is one within an epoch, model-N-STEP. The description carries the
    model's sha256, the history up to there and what a saved Keras model leaves out: the random states of its layers,
    the metrics' counters; and a digest of all that. It is written last: a pair that is incomplete or does not verify is
    passed over by `sound`.

    Args:
        folder: of the checkpoints; None for a process that leaves them to another one.
        state: history of the epochs that are done, which grows; step, counters and seconds of the one that goes on.
        guard: tells that the loss is not finite any more; then nothing is written.
        alone: False where other processes share the batches. They do not hear of a SIGTERM at the same step, and saving
            takes all of them: the run ends there, and goes on after the last whole epoch.
    """

    def __init__(self, folder: pathlib.Path | None, state: Any, guard: StopOnNaN, alone: bool = True):
        super().__init__()
        self.alone = alone
        self.folder, self.history, self.guard = folder, state.history, guard
        self.step, self.counters, self.seconds = state.step, state.counters, state.seconds
        self.terminated = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """While this lasts, SIGTERM ends the run after the step at hand. Only a main thread can listen."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "terminated", True))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def on_epoch_begin(self, epoch, logs=None) -> None:
        self.epoch, self.began = epoch, time.perf_counter() - self.seconds
        if self.step:  # Keras has set the counters to zero for the rest of an epoch
            for variable, value in zip(self.model.metrics_variables, self.counters, strict=True):
                variable.assign(value.astype(variable.dtype))

    def on_train_batch_end(self, batch, logs=None) -> None:
        step = self.step + batch + 1
        if not self.terminated or self.guard.diverged or batch + 1 == self.params["steps"]:
            return
        if not self.alone:
            raise Terminated(f"epoch {self.epoch}")
        sync(self.model)
        counters = [keras.ops.convert_to_numpy(v).tolist() for v in self.model.metrics_variables]
        self._save(f"{self.epoch}-{step}", self.epoch, step=step, counters=counters, seconds=self._seconds())
        raise Terminated(f"step {step} of epoch {self.epoch + 1}")

    def on_epoch_end(self, epoch, logs=None) -> None:
        if self.guard.diverged:
            return
        self.history.append({"epoch": epoch + 1, **{k: float(v) for k, v in logs.items()}, "seconds": self._seconds()})
        self.step, self.seconds = 0, 0.0
        self._save(str(epoch + 1), epoch + 1)
        if self.terminated:
            raise Terminated(f"epoch {epoch + 1}")

    def _seconds(self) -> float:
        return round(time.perf_counter() - self.began, 3)

    def _save(self, name: str, epoch: int, **rest) -> None:
        if self.folder is None:
            save_for_nobody(self.model)
            return
        path = self.folder / f"model-{name}.keras"
        with atomic(path) as partial:
            self.model.save(partial)
            with zipfile.ZipFile(partial) as content:
                if bad := content.testzip():
                    raise OSError(f"Expected a whole checkpoint. Received: {partial}, in which {bad} is damaged")
            digest = sha256(partial)
        random = [keras.ops.convert_to_numpy(v).tolist() for v in random_states(self.model)]
        description = {"epoch": epoch, "sha256": digest, "history": self.history, "random": random, **rest}
        with atomic(path.with_suffix(".json")) as partial:
            partial.write_text(to_json({**description, "digest": _digest(description)}))
        if self.history:
            write_history(self.folder.parent / "history.csv", self.history)
        for old in pairs(self.folder)[2:]:
            old.with_suffix(".json").unlink(missing_ok=True)
            old.unlink(missing_ok=True)


def _digest(description: dict) -> str:
    return hashlib.sha256(to_json(description).encode()).hexdigest()


def save_for_nobody(model: keras.Model) -> None:
    """Take part in a saving: where several processes hold a model, whatever touches its variables takes all of them."""
    with tempfile.TemporaryDirectory() as folder:
        model.save(pathlib.Path(folder) / "model.keras")


def random_states(model: keras.Model) -> list[keras.Variable]:
    """The states of the random streams (dropout, stochastic depth), in model order."""
    weights = {id(v) for v in model.weights}
    return [v for v in model.non_trainable_variables if id(v) not in weights]


def pairs(folder: pathlib.Path) -> list[pathlib.Path]:
    """Checkpoints of a folder, newest first, by their names: a clock may go backwards."""
    found = {p: p.stem.split("-")[1:] for p in folder.glob("model-*.keras")}
    numbered = {p: tuple(map(int, parts)) for p, parts in found.items() if all(part.isdigit() for part in parts)}
    return sorted(numbered, key=numbered.get, reverse=True)


def sound(folder: pathlib.Path, warn) -> Iterator[tuple[pathlib.Path, dict]]:
    """Checkpoints that verify, with their descriptions, newest first; what is passed over is said through `warn`."""
    for path in pairs(folder):
        try:
            description = json.loads(path.with_suffix(".json").read_text())
            written = description.pop("digest", None) in (None, _digest(description))  # older ones have none
            if written and sha256(path) == description["sha256"]:
                yield path, description
                continue
            reason = "its content is not what was written"
        except (OSError, ValueError, KeyError) as error:
            reason = f"its description cannot be read ({type(error).__name__})"
        warn(f"checkpoint {path.name} is damaged: {reason}; looking for an older one")


def write_history(path: pathlib.Path, rows: list[dict]) -> None:
    """Write the history of a run as CSV, one row per epoch."""
    with atomic(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
