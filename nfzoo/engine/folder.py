"""The folder of a run: what is written there when, and what says that it is taken."""

import contextlib
import fcntl
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import keras

import nfzoo
from nfzoo import data, names, recipes
from nfzoo.files import atomic, to_json

# Arguments of `nfzoo.build` that follow from the data, which a run standardizes, or from training on logits.
DECIDED_BY_THE_RUN = {
    "classes", "input_shape", "input_tensor", "include_top", "features_only", "classifier_activation", "name",
    "include_preprocessing",
}  # fmt: skip


def options(model: str, recipe: recipes.Recipe, overrides: dict | None = None) -> dict:
    """Resolve what a run would do, without doing it."""
    build, known = {}, names.canonical(model)
    for pattern, fields in recipe.build.items():
        if fnmatch(known, pattern):
            build |= fields
    build |= {key: str(v) if isinstance(v, os.PathLike) else v for key, v in (overrides or {}).items()}
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
    """Commit of nfzoo's own checkout, "-dirty" where its code has changed since; results and documents do not count.

    None for an installed package, whatever repository its folder lies in.
    """
    root = pathlib.Path(nfzoo.__file__).parents[1]
    if not ((root / ".git").exists() and (root / "setup.py").exists()):
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True).stdout.strip()

    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "nfzoo")
        return git("describe", "--always", "--abbrev=12", "--exclude=*") + ("-dirty" if changed else "")
    return None


def _machine() -> str:
    if keras.config.backend() == "jax":
        import jax

        devices = sorted({d.device_kind for d in jax.devices() if d.platform != "cpu"})
        if devices:
            return f"{', '.join(devices)}; {os.cpu_count()} cores"
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


class Taken(ValueError):
    """Another process trains in the folder."""


@contextlib.contextmanager
def locked(out: pathlib.Path) -> Iterator[None]:
    """Hold a folder for this process; make it, and take it away again if nothing came into it.

    The lock is the operating system's: it ends with the process, however that ends.

    Raises:
        Taken: if another process holds it.
        OSError: if the folder cannot be made or written.
    """
    path, made = out / ".lock", [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise BlockingIOError  # another process held it and took the file away, between our two calls
        except BlockingIOError:
            raise Taken(
                f"Expected a folder that no other process trains in. Received: {out}, which one does now; wait for it, "
                "or choose another --out"
            ) from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty
                for folder in made:
                    folder.rmdir()


def result(out: pathlib.Path, resolved: dict, watched: dict, tested: bool) -> dict | None:
    """Check that the folder is free or this run's; return the result if it is there already.

    Args:
        watched: "taps" and "signals" as they are asked for.
        tested: whether the test split is to be read.
    """
    record = out / "options.json"
    if record.exists():
        try:
            before = json.loads(record.read_text())
        except ValueError:  # no JSON, or no text
            raise ValueError(
                f"Expected options.json of a run. Received: {record}, which is damaged; remove it"
            ) from None
        # A recipe that was written before a setting existed had its default.
        with contextlib.suppress(ValueError):
            before["recipe"] = _deciding(before.get("recipe", {}))
        now = {**resolved, "recipe": _deciding(resolved["recipe"])}
        differing = [k for k in ("model", "build", "recipe") if before.get(k) != json.loads(to_json(now[k]))]
        if differing:
            raise ValueError(
                f"Expected the folder of this run. Received: {out}, which holds another one: its "
                f"{', '.join(differing)} differ(s) (model {before.get('model')}). Choose another --out, or remove "
                "the folder."
            )
        try:
            done = json.loads((out / "metrics.json").read_text())
        except (OSError, ValueError):
            return None
        _check_going_on(out, before, watched)
        if tested and done["status"] == "complete" and "test_loss" not in done:
            raise ValueError(
                f"Expected a run that was tested. Received: {out}, which was trained without a look at the test split; "
                f"nfzoo eval {out} reads it"
            )
        return done
    # A kill before the first file was whole leaves these.
    unfinished = {".lock", ".partial-options.json"}
    if out.exists() and any(path.name not in unfinished for path in out.iterdir()):
        raise ValueError(f"Expected an empty folder or the folder of a run. Received: {out}, which holds other files.")
    return None


def _deciding(recipe: dict) -> dict:
    return recipes.anywhere(recipes.Recipe.model_validate(recipe)).model_dump(mode="json")


def record(
    out: pathlib.Path, resolved: dict, images: data.Images, told: dict, began: bool, warn: Callable[[str], None]
) -> None:
    """Write what this run is, once data and model are there: a mistake in their names leaves no folder behind.

    Args:
        told: what else decides it: "taps", "signals", "devices".
        began: whether it goes on from a checkpoint; then it must be as it was.

    Raises:
        ValueError: if its images, the backend or what is watched are others than when it began.
    """
    constants = {key: getattr(images, key) for key in ("name", "mean", "std", "classes")}
    constants["shape"] = images.train.images.shape[1:]
    now = json.loads(to_json({**resolved, "images": constants, **told, **environment()}))
    if not (began and (out / "options.json").exists()):
        write_json(out / "options.json", now)
        return
    before = read_options(out)
    _check_going_on(out, before, {key: now[key] for key in ("images", "backend", *told) if key != "devices"})
    if before.get("devices", now.get("devices")) != now.get("devices"):
        warn(
            f"the run goes on otherwise than it began: devices was {before['devices']!r}, now {now['devices']!r}; "
            "batch statistics are a device's"
        )
    _note_another_code(out, before, now, warn)


def _check_going_on(out: pathlib.Path, before: dict, now: dict) -> None:
    differing = [f"{k} was {before[k]!r}, now {v!r}" for k, v in now.items() if k in before and before[k] != v]
    if differing:
        raise ValueError(
            f"Expected {out} to go on as it began. Received: {'; '.join(differing)}. Choose another --out, or remove "
            "the folder."
        )


def _note_another_code(out: pathlib.Path, before: dict, now: dict, warn: Callable[[str], None]) -> None:
    """Add to options.json by what a run goes on, where that is not what it began with."""
    continued = before.get("continued", [])
    latest = {**before, **(continued[-1] if continued else {})}
    changed = [key for key in ("commit", "versions", "machine") if latest.get(key) != now[key]]
    if changed:
        said = "; ".join(f"{key} was {latest.get(key)}, now {now[key]}" for key in changed)
        warn(f"the run goes on with other code or elsewhere: {said}; options.json tells both")
        continued = [*continued, {key: now[key] for key in ("commit", "versions", "machine")}]
        write_json(out / "options.json", {**before, "continued": continued})


def plain(settings: dict) -> dict:
    """Settings as JSON can hold them: what it cannot, by its name."""

    def one(value: Any) -> Any:
        try:
            return json.loads(json.dumps(value))
        except (TypeError, ValueError):
            return getattr(value, "__qualname__", type(value).__qualname__)

    return {key: one(value) for key, value in settings.items()}


def write_json(path: pathlib.Path, content: dict) -> None:
    """Write strict JSON, whole or not at all."""
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


def read_metrics(folder: str | pathlib.Path) -> dict:
    """Read metrics.json of a finished run.

    Raises:
        FileNotFoundError: if the run has not ended.
    """
    path = pathlib.Path(folder) / "metrics.json"
    if not path.exists():
        raise FileNotFoundError(f"Expected a finished run (with metrics.json). Received: {folder}")
    return _read_json(path)


def _read_json(path: pathlib.Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"Expected a JSON file. Received: {path}, which is damaged: {error}") from None
