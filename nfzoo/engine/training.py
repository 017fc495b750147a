"""Train: one flat function, in a folder that tells everything about its run."""

import contextlib
import copy
import itertools
import math
import pathlib
import shutil
import time
from typing import Any

import keras
import numpy as np
from rich.console import Console
from rich.markup import escape

from nfzoo import backend, callbacks, data, recipes, spp
from nfzoo.engine import folder, learning
from nfzoo.engine.devices import Devices
from nfzoo.engine.replay import first_bad_layer
from nfzoo.engine.state import State, start, train
from nfzoo.files import atomic, finite

PROBE_SIZE = 128


def run(
    model: str,
    recipe: recipes.Recipe,
    out: str | pathlib.Path,
    *,
    overrides: dict[str, Any] | None = None,
    taps: str | None = "blocks",
    signals: dict[str, Any] | None = None,
    keep_model: bool = True,
    test: bool = True,
    console: Console | None = None,
    devices: Devices | None = None,
) -> dict:
    """Train one model by a recipe, in a folder; resume what the folder holds.

    Args:
        model: name in the zoo.
        recipe: see `nfzoo.recipes`.
        out: folder of the run.
        overrides: keyword arguments of `nfzoo.build`, on top of the recipe's.
        taps: signal propagation at initialisation and after every epoch: "blocks", "layers", a pattern; None for none.
        signals: other options of `nfzoo.SignalPropagation`, e.g. {"source": "live", "statistics": "all"}.
        keep_model: keep the trained model as model.keras; scans do not.
        test: read the test split at the end. Where a choice follows from the run, it must not be read; `evaluate` reads
            it later.
        console: where progress goes.
        devices: several of them share the batches; see `Devices`.

    Returns:
        The content of metrics.json: status ("complete" or "diverged"), accuracies, losses, epochs, seconds. With a
        moving average of the weights, the figures are the average's, and test_..._without_average those of the weights.

    Raises:
        ValueError: if the folder holds another run, or one that was watched otherwise or not tested; if every
            checkpoint of it is damaged; nfzoo.engine.Taken, which is one, if another process trains in it.
        nfzoo.callbacks.Terminated: on SIGTERM, once the state is saved.

    Example:
        >>> import nfzoo, tempfile
        >>> recipe = nfzoo.recipes.override(nfzoo.recipes.get("demo"), {"data.name": "fake", "epochs": 1})
        >>> metrics = run("sn_test_ffnn", recipe, tempfile.mkdtemp(), console=Console(quiet=True))
        >>> metrics["status"], metrics["epochs"]
        ('complete', 1)
    """
    out, devices = pathlib.Path(out), devices or Devices()
    console = (console or Console()) if devices.leads else Console(quiet=True)
    devices.check(recipe)
    resolved = folder.options(model, recipe, overrides)
    watched = {"taps": taps, "signals": folder.plain(signals or {})}
    if (done := folder.result(out, resolved, watched, test)) is not None:
        console.print(f"{out}: {done['status']} already, nothing to do", markup=False, soft_wrap=True)
        return done
    with (
        folder.locked(out) if devices.leads else contextlib.nullcontext(),
        learning.precision(recipe.precision),
        devices.scope(),
        backend.deterministic(recipe.deterministic),
    ):
        return _train(resolved, recipe, out, watched, signals or {}, keep_model, test, console, devices)


def _train(resolved, recipe, out, watched, signals, keep_model, test, console, devices) -> dict:
    warn = lambda text: console.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)  # noqa: E731
    images = learning.load_images(resolved, recipe)
    state = start(out, resolved, recipe, images, warn)
    if state.began:
        console.print(f"resuming {out} after {_position(state)}", markup=False, soft_wrap=True)
    if recipe.frozen_epochs and not any(layer.name == "head" for layer in state.net.layers):
        raise ValueError(
            f'Expected a model with a layer "head" for frozen_epochs. Received: {resolved["model"]} without'
        )
    _warn_of_an_idle_schedule(recipe, warn)
    present = np.bincount(images.train.labels, minlength=len(images.classes))
    if missing := [name for name, count in zip(images.classes, present, strict=True) if not count]:
        warn(f"of {len(images.classes)} classes {len(missing)} have no training image: {', '.join(missing[:5])}")
    watch = None
    if watched["taps"]:
        signals = {**signals, "log_dir": out if devices.leads else None}  # others measure too: it takes all devices
        watch = _watch(state.net, images, recipe.one_hot, watched["taps"], signals, console)
    batches = data.pipeline(images, recipe, devices.shard, devices.multiple)
    _check_updates(recipe, len(batches["train"]))
    if not state.began:
        learning.prepare(state.net, recipe, len(batches["train"]), frozen=bool(recipe.frozen_epochs))
    if devices.leads:  # all that can be wrong with the settings has been said
        folder.record(out, resolved, images, {**watched, "devices": devices.multiple}, state.began, warn)
    guard = callbacks.StopOnNaN()
    # Several devices each see a part of a batch, of which one process has no whole.
    average = callbacks.AverageWeights(copy.copy(batches["train"]) if devices.multiple == 1 else None)  # epoch 0's
    progress = callbacks.ShowProgress(recipe.batch_size, len(images.train), recipe.epochs, console)
    keeper = callbacks.Checkpoints(out / "checkpoints" if devices.leads else None, state, guard, devices.processes == 1)
    steps = [data.EpochClock(batches["train"], batches["validation"]), guard, average, progress, watch, keeper]
    began = time.perf_counter()
    try:
        with keeper.listening():
            _fit(state, batches, recipe, [step for step in steps if step], average)
    except callbacks.Terminated as end:
        console.print(f"stopped by SIGTERM after {end.where}; the same command goes on there", markup=False)
        raise
    finally:
        progress.close()
    read = batches["test"] if test else None
    metrics = _metrics(state, read, guard, average, time.perf_counter() - began, len(images.train))
    if guard.diverged and devices.processes == 1:  # of several, each sees a part of an output
        state = start(out, resolved, recipe, images, warn)
        metrics["diverged_in"] = first_bad_layer(state, batches, recipe, guard.step)
    keep_model &= metrics["status"] == "complete"
    if devices.leads:
        _finish(out, state.net, metrics, keep_model, averaged=bool(recipe.ema))
    elif keep_model and recipe.ema:
        callbacks.save_for_nobody(state.net)
    return metrics


def _warn_of_an_idle_schedule(recipe: recipes.Recipe, warn) -> None:
    first, epochs = recipe.first_drop, recipe.epochs - recipe.frozen_epochs
    if first is not None and first >= epochs:
        late = f"first lowers it after epoch {first:g}, of {epochs}" if math.isfinite(first) else "has no milestones"
        warn(
            f'the learning rate never falls: schedule "{recipe.schedule.name}" {late}; --set schedule.milestones=[…] '
            "(halving: start, every), or --set schedule.name=cosine"
        )


def _check_updates(recipe: recipes.Recipe, steps: int) -> None:
    """Refuse a part of the training that ends before its first update."""
    for epochs in filter(None, (recipe.frozen_epochs, recipe.epochs - recipe.frozen_epochs)):
        if steps * epochs < recipe.optimizer.accumulate:
            raise ValueError(
                f"Expected at least optimizer.accumulate={recipe.optimizer.accumulate} batches, after which weights "
                f"are updated. Received: {steps * epochs} in {epochs} epoch(s); take more epochs, smaller batches, or "
                "accumulate fewer"
            )


def _position(state: State) -> str:
    return f"step {state.step} of epoch {state.epoch + 1}" if state.step else f"epoch {state.epoch}"


def _watch(net, images: data.Images, one_hot: bool, taps: str, signals: dict, console: Console):
    """The callback that records signal propagation, on a fixed part of the training images."""
    options = {"taps": taps, **signals}
    spp.select_taps(net, options["taps"])
    constants = {"mean": images.mean, "std": images.std, "classes": len(images.classes) if one_hot else None}
    x, y = data.Batches(data.subset(images.train, PROBE_SIZE), PROBE_SIZE, **constants)[0]
    tell = lambda text: console.print(f"[yellow]{escape(text)}[/]", soft_wrap=True)  # noqa: E731
    return spp.SignalPropagation(x, y, **{"tell": tell, **options})


def _fit(state: State, batches: dict, recipe: recipes.Recipe, steps: list, average) -> None:
    """Train from a state to the end: at first the classifier alone, if the recipe says so, then all layers."""
    if state.epoch == recipe.epochs:
        average.end(state.net)
    for begin, end in itertools.pairwise(sorted({0, recipe.frozen_epochs, recipe.epochs})):
        if begin and state.epoch == begin and not state.step:  # else it was compiled, or the checkpoint came so
            learning.prepare(state.net, recipe, len(batches["train"]))
        if state.epoch < end:
            train(state, batches, recipe, end, steps, average)
        if state.net.stop_training:
            break
    if average.kept:  # Keras put the weights there, without their statistics
        average.put_average()


def _metrics(state: State, test, guard, average, seconds: float, examples: int) -> dict:
    raw, result, history = {}, {}, state.history
    if test is not None and average.kept:
        average.put_back()
        raw = state.net.evaluate(backend.feed(test), verbose=0, return_dict=True)
        average.put_average()
    if test is not None:
        result = state.net.evaluate(backend.feed(test), verbose=0, return_dict=True)
    last, spent = history[-1] if history else {}, sum(row["seconds"] for row in history)
    diverged = guard.diverged or not math.isfinite(result.get("loss", last.get("val_loss", 0.0)))
    metrics = {
        "status": "diverged" if diverged else "complete",
        "diverged_at_step": guard.step,
        "epochs": len(history),
        "seconds": round(spent or seconds, 1),
        "images_per_second": round(examples * len(history) / max(spent, 1e-9), 1),
        **{f"test_{k}": float(v) for k, v in result.items()},
        **{f"test_{k}_without_average": float(v) for k, v in raw.items()},
        **{k: v for k, v in last.items() if k not in ("epoch", "seconds")},
    }
    return finite(metrics)  # as metrics.json will have it


def _finish(out: pathlib.Path, net: keras.Model, metrics: dict, keep_model: bool, averaged: bool) -> None:
    """Write the result last: where metrics.json is, the run is over."""
    checkpoints = callbacks.pairs(out / "checkpoints")
    if keep_model and averaged:
        with atomic(out / "model.keras") as partial:
            net.save(partial)
    elif keep_model and checkpoints:
        checkpoints[0].replace(out / "model.keras")
    folder.write_json(out / "metrics.json", metrics)
    if metrics["status"] == "complete":
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
