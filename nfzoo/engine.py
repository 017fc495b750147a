"""Train and evaluate: one flat function per job, and a folder that tells everything about its run.

A run's folder holds options.json (model, recipe, versions, commit, command), history.csv, spp.jsonl, checkpoints/,
and at the end model.keras and metrics.json. Running the same command again resumes, or returns the result.
"""

import contextlib
import itertools
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import time
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import keras
import numpy as np
from rich.console import Console
from rich.markup import escape

import nfzoo
from nfzoo import callbacks, data, names, recipes, registry, spp
from nfzoo.agc import AGC
from nfzoo.files import atomic, finite, to_json

PROBE_SIZE = 128
# Arguments of `nfzoo.build` that follow from the data, or from training on logits.
DECIDED_BY_THE_RUN = {
    "classes", "input_shape", "input_tensor", "include_top", "features_only", "classifier_activation", "name",
}  # fmt: skip


def options(model: str, recipe: recipes.Recipe, overrides: dict | None = None) -> dict:
    """Resolve what a run would do, without doing it."""
    build = {}
    for pattern, fields in recipe.build.items():
        if fnmatch(model, pattern):
            build |= fields
    build |= overrides or {}
    if decided := sorted(build.keys() & DECIDED_BY_THE_RUN):
        raise ValueError(f"Expected overrides of the network. Received: {', '.join(decided)}, which the run decides")
    if recipe.frozen_epochs and not build.get("weights") and model not in names.USER_MODELS:
        raise ValueError(
            f"Expected weights for a network that is frozen at first. Received: frozen_epochs={recipe.frozen_epochs} "
            "without; pass --build weights=FILE.safetensors, or --set frozen_epochs=0 to train from scratch"
        )
    return {
        "model": model,
        "build": build,
        "recipe": recipe.model_dump(mode="json"),
        "fingerprint": recipes.fingerprint(recipe),
    }


def environment() -> dict:
    """Versions, commit, machine and command, for the record of a run."""
    versions = {}
    for package in ("nfzoo", "keras", keras.config.backend(), "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "versions": {"python": platform.python_version(), **versions},
        "backend": keras.config.backend(),
        "commit": _commit(),
        "machine": _machine(),
        "command": " ".join(pathlib.Path(a).name if i == 0 else a for i, a in enumerate(sys.argv)),
    }


def _commit() -> str | None:
    """Commit of nfzoo's own checkout; None for an installed package, whatever repository its folder lies in."""
    root = pathlib.Path(nfzoo.__file__).parents[1]
    if not ((root / ".git").exists() and (root / "setup.py").exists()):
        return None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return None


def _machine() -> str:
    if keras.config.backend() == "jax":
        import jax

        devices = sorted({d.device_kind for d in jax.devices() if d.platform != "cpu"})
        if devices:
            return f"{', '.join(devices)}; {os.cpu_count()} cores"
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def optimizer(settings: recipes.Optimizer) -> keras.optimizers.Optimizer:
    """Make the Keras optimizer of a recipe."""
    if settings.name == "adam":
        return keras.optimizers.Adam(
            settings.learning_rate, beta_1=settings.beta_1, beta_2=settings.beta_2, epsilon=settings.epsilon
        )
    return keras.optimizers.SGD(settings.learning_rate, momentum=settings.momentum, nesterov=settings.nesterov)


def run(
    model: str,
    recipe: recipes.Recipe,
    out: str | pathlib.Path,
    *,
    overrides: dict[str, Any] | None = None,
    taps: str | None = "blocks",
    signals: dict[str, Any] | None = None,
    keep_model: bool = True,
    console: Console | None = None,
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
        console: where progress goes.

    Returns:
        The content of metrics.json: status ("complete" or "diverged"), accuracies, losses, epochs, seconds.

    Raises:
        ValueError: if the folder holds another run, or every checkpoint of it is damaged.
    """
    console, out = console or Console(), pathlib.Path(out)
    resolved = options(model, recipe, overrides)
    if (done := _result(out, resolved)) is not None:
        console.print(f"{out}: {done['status']} already, nothing to do", markup=False, soft_wrap=True)
        return done

    keras.utils.set_random_seed(recipe.seed)
    with _precision(recipe.precision):
        images = data.load(recipe.data, recipe.seed)
        restored = _restore(out, console)
        net, epoch, history = restored or (_new_model(resolved, images, recipe), 0, [])
        if recipe.frozen_epochs and not any(layer.name == "head" for layer in net.layers):
            raise ValueError(f'Expected a model with a layer "head" for frozen_epochs. Received: {model} without')
        watch = _watch(net, images, out, taps, signals or {}, console) if taps else None
        _record(out, resolved, images)
        batches = data.pipeline(images, recipe)
        guard = callbacks.StopOnNaN()
        progress = callbacks.ShowProgress(recipe.batch_size, len(images.train), recipe.epochs, console)
        steps: list[keras.callbacks.Callback] = [
            data.EpochClock(batches["train"], batches["validation"]),
            guard,
            progress,
        ]
        steps += [watch] if watch else []
        steps.append(callbacks.Checkpoints(out / "checkpoints", history, guard))
        began = time.perf_counter()
        try:
            _fit(net, batches, recipe, epoch, steps)
        finally:
            progress.close()
        metrics = _metrics(net, batches["test"], guard, history, time.perf_counter() - began, len(images.train))
    _finish(out, metrics, keep_model and metrics["status"] == "complete")
    return metrics


def _result(out: pathlib.Path, resolved: dict) -> dict | None:
    """Check that the folder is free or this run's; return the result if it is there already."""
    record = out / "options.json"
    if record.exists():
        try:
            before = json.loads(record.read_text())
        except json.JSONDecodeError:
            raise ValueError(
                f"Expected options.json of a run. Received: {record}, which is damaged; remove it"
            ) from None
        # A recipe that was written before a setting existed had its default.
        before["recipe"] = recipes.Recipe().model_dump(mode="json") | before.get("recipe", {})
        differing = [k for k in ("model", "build", "recipe") if before.get(k) != json.loads(to_json(resolved[k]))]
        if differing:
            raise ValueError(
                f"Expected the folder of this run. Received: {out}, which holds another one: its "
                f"{', '.join(differing)} differ(s) (model {before.get('model')}). Choose another --out, or remove "
                "the folder."
            )
        with contextlib.suppress(OSError, json.JSONDecodeError):
            return json.loads((out / "metrics.json").read_text())
        return None
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"Expected an empty folder or the folder of a run. Received: {out}, which holds other files.")
    return None


def _watch(net, images: data.Images, out: pathlib.Path, taps: str, signals: dict, console: Console):
    """The callback that records signal propagation, on a fixed part of the training images."""
    options = {"taps": taps, **signals}
    spp.select_taps(net, options["taps"])
    x, y = data.Batches(data.subset(images.train, PROBE_SIZE), PROBE_SIZE, images.mean, images.std)[0]
    tell = lambda text: console.print(f"[yellow]{escape(text)}[/]", soft_wrap=True)  # noqa: E731
    return spp.SignalPropagation(x, y, **{"tell": tell, **options, "log_dir": out})


def _record(out: pathlib.Path, resolved: dict, images: data.Images) -> None:
    """Write what this run is, once data and model are there: a mistake in their names leaves no folder behind."""
    if not (out / "options.json").exists():
        constants = {key: getattr(images, key) for key in ("name", "mean", "std", "classes")}
        constants["shape"] = images.train.images.shape[1:]
        _write_json(out / "options.json", {**resolved, "images": constants, **environment()})


@contextlib.contextmanager
def _precision(policy: str):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _restore(out: pathlib.Path, console: Console) -> tuple[keras.Model, int, list[dict]] | None:
    folder = out / "checkpoints"
    warn = lambda text: console.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)  # noqa: E731
    found = callbacks.latest(folder, warn)
    if found is None:
        if callbacks.pairs(folder):
            raise ValueError(
                f"Expected a checkpoint that verifies. Received: {folder}, where none does; remove it to restart"
            )
        return None
    path, description = found
    console.print(f"resuming {out} after epoch {description['epoch']}", markup=False, soft_wrap=True)
    net = keras.saving.load_model(path)
    for variable, value in zip(callbacks.random_states(net), description["random"], strict=True):
        variable.assign(np.array(value, variable.dtype))
    return net, description["epoch"], description["history"]


def _new_model(resolved: dict, images: data.Images, recipe: recipes.Recipe) -> keras.Model:
    model, classes = resolved["model"], len(images.classes)
    build = {**resolved["build"], "input_shape": images.train.images.shape[1:]}
    if not recipe.frozen_epochs or model in names.USER_MODELS:
        return registry.build(model, classes=classes, **build)
    # The classifier is a new one, whatever the number of classes that the weights know.
    if build["weights"] in registry.PUBLISHERS:  # they decide the dialect as well
        return registry.set_head(registry.build(model, **build), classes)
    body = registry.build(model, include_top=False, **build)
    net = registry.build(model, classes=classes, **{**build, "weights": None})
    values = {v.path: v for v in body.weights}
    for variable in net.weights:
        if not variable.path.startswith("head/"):
            variable.assign(values[variable.path])
    return net


def _fit(net: keras.Model, batches: dict, recipe: recipes.Recipe, epoch: int, steps: list) -> None:
    """Train from an epoch to the end: at first the classifier alone, if the recipe says so, then all layers."""
    for start, end in itertools.pairwise(sorted({0, recipe.frozen_epochs, recipe.epochs})):
        if epoch == start:  # else the checkpoint came compiled
            _compile(net, recipe, frozen=end <= recipe.frozen_epochs)
        for step in steps:
            if isinstance(step, spp.SignalPropagation):
                step.steps_before = start * len(batches["train"])
        if epoch < end:
            net.fit(
                batches["train"], validation_data=batches["validation"] if len(batches["validation"]) else None,
                epochs=end, initial_epoch=epoch, callbacks=steps, verbose=0,
                shuffle=False,  # Keras would shuffle the steps; the batches order themselves
            )  # fmt: skip
            epoch = end
        if net.stop_training:
            break


def _compile(net: keras.Model, recipe: recipes.Recipe, frozen: bool) -> None:
    """Decide what learns and how. Frozen layers keep their moving statistics too.

    Each part of a run has an optimizer of its own, of the variables that learn: JAX takes no others, and Adam's steps
    would be too large for moments that join late.
    """
    settings = recipe.optimizer
    if recipe.frozen_epochs:
        for layer in net.layers:
            layer.trainable = layer.name == "head" or not frozen
    if frozen and recipe.frozen_learning_rate:
        settings = settings.model_copy(update={"learning_rate": recipe.frozen_learning_rate})
    agc = None if recipe.agc is None else AGC(**recipe.agc.model_dump(), log_clipped=True)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    net.compile(optimizer(settings), loss, metrics=["accuracy"], agc=agc)
    net.optimizer.build(net.trainable_variables)


def _metrics(net, test, guard: callbacks.StopOnNaN, history: list[dict], seconds: float, examples: int) -> dict:
    result = net.evaluate(test, verbose=0, return_dict=True)
    last = history[-1] if history else {}
    diverged = guard.diverged or not math.isfinite(result["loss"])
    metrics = {
        "status": "diverged" if diverged else "complete",
        "diverged_at_step": guard.step,
        "epochs": len(history),
        "seconds": round(sum(row["seconds"] for row in history) or seconds, 1),
        "images_per_second": round(examples * len(history) / max(sum(r["seconds"] for r in history), 1e-9), 1),
        **{f"test_{k}": float(v) for k, v in result.items()},
        **{k: v for k, v in last.items() if k not in ("epoch", "seconds")},
    }
    return finite(metrics)  # as metrics.json will have it


def _finish(out: pathlib.Path, metrics: dict, keep_model: bool) -> None:
    """Write the result last: where metrics.json is, the run is over."""
    checkpoints = callbacks.pairs(out / "checkpoints")
    if keep_model and checkpoints:
        checkpoints[0].replace(out / "model.keras")
    _write_json(out / "metrics.json", metrics)
    if metrics["status"] == "complete":
        for path in (out / "checkpoints").glob("model-*"):
            path.unlink()
        with contextlib.suppress(OSError):
            (out / "checkpoints").rmdir()


def _write_json(path: pathlib.Path, content: dict) -> None:
    with atomic(path) as partial:
        partial.write_text(to_json(content, indent=1))


def read_options(folder: str | pathlib.Path) -> dict:
    """Read options.json of a run's folder.

    Raises:
        FileNotFoundError: if the folder is none of a run.
    """
    path = pathlib.Path(folder) / "options.json"
    if not path.exists():
        raise FileNotFoundError(f"Expected the folder of a run (with options.json). Received: {folder}")
    return _read_json(path)


def _read_json(path: pathlib.Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"Expected a JSON file. Received: {path}, which is damaged: {error}") from None


def read_metrics(folder: str | pathlib.Path) -> dict:
    """Read metrics.json of a finished run.

    Raises:
        FileNotFoundError: if the run has not ended.
    """
    path = pathlib.Path(folder) / "metrics.json"
    if not path.exists():
        raise FileNotFoundError(f"Expected a finished run (with metrics.json). Received: {folder}")
    return _read_json(path)


def load_run(folder: str | pathlib.Path) -> keras.Model:
    """Load the trained model of a run, or its newest checkpoint."""
    read_options(folder)
    folder = pathlib.Path(folder)
    path = folder / "model.keras"
    if not path.exists():
        found = callbacks.latest(folder / "checkpoints", lambda text: None)
        if found is None:
            raise FileNotFoundError(
                f"Expected a trained model in {folder}. Received: neither model.keras nor a checkpoint"
            )
        path = found[0]
    return keras.saving.load_model(path)


def evaluate(folder: str | pathlib.Path, source: str | None = None, data_dir: str | None = None) -> dict:
    """Evaluate a run's model on its test split, or on that of another data set of the same classes."""
    options = read_options(folder)
    recipe = recipes.Recipe.model_validate(options["recipe"])
    changes = {"data.name": source, "data.data_dir": data_dir}
    recipe = recipes.override(recipe, {k: v for k, v in changes.items() if v})
    net = load_run(folder)
    images = data.load(recipe.data, recipe.seed)
    if net.output_shape[-1] != len(images.classes):
        raise ValueError(f"Expected data of {net.output_shape[-1]} classes. Received: {len(images.classes)} classes")
    # The model learned on images standardized with its own data's constants; other data must look the same to it.
    mean, std = options["images"]["mean"], options["images"]["std"]
    batches = data.Batches(images.test, recipe.batch_size, mean, std)
    result = net.evaluate(batches, verbose=0, return_dict=True)
    return finite({"images": len(images.test), **{k: float(np.round(v, 6)) for k, v in result.items()}})
