"""Keras callbacks of a run: show progress, stop at a loss that is not finite, keep checkpoints that survive a kill."""

import csv
import json
import math
import pathlib
import time

import keras
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nfzoo.files import atomic, sha256, to_json


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
            rate = min((batch + 1) * self.batch_size, self.examples) / (time.perf_counter() - self.epoch_began)
            self.bar.update(self.task, completed=batch + 1, state=f"{_text(logs)}  {rate:.0f} images/s")

    def on_epoch_end(self, epoch, logs=None) -> None:
        self.seen += 1
        elapsed = time.perf_counter() - self.epoch_began
        line = f"epoch {epoch + 1}/{self.epochs}  {_text(logs)}  {self.examples / elapsed:.0f} images/s"
        if self.bar is not None:
            self.bar.remove_task(self.task)
        left = (time.perf_counter() - self.began) / self.seen * (self.epochs - epoch - 1)
        (self.bar.console if self.bar else self.console).print(
            f"{line}  {int(left // 60)}:{int(left % 60):02d} left", markup=False, highlight=False, soft_wrap=True
        )

    def on_train_end(self, logs=None) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _text(logs: dict | None) -> str:
    return "  ".join(f"{key} {float(value):.4f}" for key, value in (logs or {}).items())


class StopOnNaN(keras.callbacks.Callback):
    """Stop at the first loss or validation loss that is not finite; `step` tells where (1-based, within its epoch)."""

    def __init__(self):
        super().__init__()
        self.step: int | None = None

    @property
    def diverged(self) -> bool:
        return self.step is not None

    def on_train_batch_end(self, batch, logs=None) -> None:
        if self.step is None and not math.isfinite(float((logs or {}).get("loss", 0.0))):
            self._stop(batch + 1)

    def on_epoch_end(self, epoch, logs=None) -> None:
        # The last step of an epoch can ruin the weights; only the validation shows it.
        if self.step is None and not math.isfinite(float((logs or {}).get("val_loss", 0.0))):
            self._stop(self.params["steps"])

    def _stop(self, step: int) -> None:
        self.step = step
        self.model.stop_training = True


class Checkpoints(keras.callbacks.Callback):
    """Keep the last two epochs of a run as pairs: model-N.keras (weights, optimizer, AGC) and model-N.json beside it.

    The description carries the model's sha256, the history up to that epoch and the random states of its layers, which
    a saved Keras model leaves out. It is written last: a pair that is incomplete or does not verify is passed over by
    `latest`.
    """

    def __init__(self, folder: pathlib.Path, history: list[dict], guard: StopOnNaN):
        super().__init__()
        self.folder, self.history, self.guard = folder, history, guard

    def on_epoch_begin(self, epoch, logs=None) -> None:
        self.began = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None) -> None:
        if self.guard.diverged:
            return
        seconds = round(time.perf_counter() - self.began, 3)
        self.history.append({"epoch": epoch + 1, **{k: float(v) for k, v in logs.items()}, "seconds": seconds})
        path = self.folder / f"model-{epoch + 1}.keras"
        with atomic(path) as partial:
            self.model.save(partial)
            digest = sha256(partial)
        random = [keras.ops.convert_to_numpy(v).tolist() for v in random_states(self.model)]
        description = {"epoch": epoch + 1, "sha256": digest, "history": self.history, "random": random}
        with atomic(path.with_suffix(".json")) as partial:
            partial.write_text(to_json(description))
        write_history(self.folder.parent / "history.csv", self.history)
        for old in pairs(self.folder)[2:]:
            old.with_suffix(".json").unlink(missing_ok=True)
            old.unlink(missing_ok=True)


def random_states(model: keras.Model) -> list[keras.Variable]:
    """The states of the random streams (dropout, stochastic depth), in model order."""
    weights = {id(v) for v in model.weights}
    return [v for v in model.non_trainable_variables if id(v) not in weights]


def pairs(folder: pathlib.Path) -> list[pathlib.Path]:
    """Checkpoints of a folder, newest first."""
    found = [p for p in folder.glob("model-*.keras") if p.stem.split("-")[1].isdigit()]
    return sorted(found, key=lambda p: -int(p.stem.split("-")[1]))


def latest(folder: pathlib.Path, warn) -> tuple[pathlib.Path, dict] | None:
    """The newest checkpoint that verifies, with its description; what is passed over is said through `warn`."""
    for path in pairs(folder):
        try:
            description = json.loads(path.with_suffix(".json").read_text())
            if sha256(path) == description["sha256"]:
                return path, description
            reason = "its content is not what was written"
        except (OSError, ValueError, KeyError) as error:
            reason = f"its description cannot be read ({type(error).__name__})"
        warn(f"checkpoint {path.name} is damaged: {reason}; looking for an older one")
    return None


def write_history(path: pathlib.Path, rows: list[dict]) -> None:
    """Write the history of a run as CSV, one row per epoch."""
    with atomic(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
