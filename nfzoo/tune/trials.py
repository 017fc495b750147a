"""One trial: claimed by a lock of the operating system, trained in a folder of its own, whatever becomes of it."""

import contextlib
import fcntl
import gc
import itertools
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import IO

import keras
from rich.console import Console

from nfzoo import callbacks, engine
from nfzoo.engine.folder import write_json
from nfzoo.tune.plan import result
from nfzoo.tune.space import Spec, Trial

KILLS = 3  # at one place, after which a trial is taken for one that the system kills for its memory


@contextlib.contextmanager
def claim(out: pathlib.Path, name: str) -> Iterator[IO[str] | None]:
    """Hold a trial as long as this process lives; None where another one holds it.

    The lock is on the file that logs what the trial says, beside the folders. The system gives it back when a process
    ends, however it ends.
    """
    path = out / "logs" / f"{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file


def busy(out: pathlib.Path, name: str) -> bool:
    """Whether a process, this one or another, runs the trial now."""
    try:
        with (out / "logs" / f"{name}.log").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


@contextlib.contextmanager
def one_writer(out: pathlib.Path) -> Iterator[None]:
    """Wait until no other process writes the files of the whole scan."""
    (out / "logs").mkdir(parents=True, exist_ok=True)
    with (out / "logs" / "scan.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one behind it, says that memory ran out: on TensorFlow, JAX, or in Python itself.

    Example:
        >>> out_of_memory(MemoryError()), out_of_memory(OSError("No space left on device"))
        (True, False)
    """
    while error is not None:
        text = f"{type(error).__name__} {error}"
        # TensorFlow says the same of a full disk.
        exhausted = "ResourceExhausted" in text or "RESOURCE_EXHAUSTED" in text
        if isinstance(error, MemoryError) or (exhausted and "No space left" not in text):
            return True
        error = error.__cause__ or error.__context__
    return False


_SIGNED: dict[pathlib.Path, list[str]] = {}  # what this process has signed up for -> who had before it


def withdraw() -> None:
    """Take back what this process signed up for: it is about to end on purpose, not killed for its memory."""
    for path, starts in list(_SIGNED.items()):  # another thread may end its trial meanwhile
        path.write_text("\n".join([*starts, ""]))


@contextlib.contextmanager
def _killed_before(out: pathlib.Path, name: str) -> Iterator[int]:
    """How often a trial was killed since its newest checkpoint. Who is killed cannot say so: who starts signs up."""
    place = next((path.name for path in callbacks.pairs(out / name / "checkpoints")), "start")
    path = out / "logs" / f"{name}.starts"
    starts = path.read_text().split() if path.exists() else []
    times = len(list(itertools.takewhile(lambda start: start == place, reversed(starts))))
    path.write_text("\n".join([*starts, place]) + "\n")
    _SIGNED[path] = starts
    try:
        yield times
    finally:
        del _SIGNED[path]
        path.unlink(missing_ok=True)


def run(trial: Trial, spec: Spec, out: pathlib.Path) -> None:
    """Train a trial, unless another process does so or has done so.

    Raises:
        Exception: what kept the trial from running, but for memory that ran out: that is a result.
    """
    folder = out / trial.name
    with claim(out, trial.name) as log:
        if log is None or result(folder) is not None:
            return
        for partial in folder.glob(".partial-*"):  # else a folder without options.json is not known for a run's
            partial.unlink()
        keras.utils.clear_session()  # else the graphs of all trials stay in memory
        model, began = trial.setting.model, time.perf_counter()
        with _killed_before(out, trial.name) as times:
            try:
                if times >= KILLS:
                    raise MemoryError(f"killed {times} times at one place, as by a system whose memory ran out")
                metrics = engine.run(
                    model, trial.recipe(spec.recipe), folder, overrides=spec.overrides, taps=None, keep_model=False,
                    test=False, console=Console(file=log, width=120),
                )  # fmt: skip  # a choice follows: the test split is for the chosen one
            except Exception as error:
                if not out_of_memory(error):
                    raise
                _record(trial, spec, folder, str(error), time.perf_counter() - began)
            else:
                _check_compared(metrics, spec, folder)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # also what a diverged run leaves


def _check_compared(metrics: dict, spec: Spec, folder: pathlib.Path) -> None:
    """Refuse a scan whose trials nothing compares: of few images a small fraction is none."""
    if metrics["status"] == "complete" and "val_accuracy" not in metrics:
        (folder / "metrics.json").unlink()
        raise ValueError(
            "Expected validation images, by which settings are compared. Received: data.validation_fraction="
            f"{spec.recipe.data.validation_fraction:g}, which is no image of these data"
        )


def _record(trial: Trial, spec: Spec, folder: pathlib.Path, error: str, seconds: float) -> None:
    """Write the result of a trial that ran out of memory, and let go of what it held."""
    keras.utils.clear_session()
    gc.collect()
    resolved = engine.options(trial.setting.model, trial.recipe(spec.recipe), spec.overrides)
    metrics = {"status": "out_of_memory", "epochs": 0, "seconds": round(seconds, 1), "error": error[:1000]}
    if not (folder / "options.json").exists():
        write_json(folder / "options.json", {**resolved, **engine.environment()})
    write_json(folder / "metrics.json", metrics)
