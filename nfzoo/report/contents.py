"""What the report shows of a run, as plain lists and numbers: read from its folder, or from a table."""

import json
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import pandas as pd

from nfzoo.alarms import alarms
from nfzoo.report.quantities import KINDS

# Columns of a log that are no statistic.
_COLUMNS = {"step", "epoch", "kind", "layer", "place", "depth", "source", "first_bad"}
_USUAL = {"acsm", "acv", "second_moment"}
_HISTOGRAM, _LISTS = "histogram", {"histogram", "channel_histogram"}
# More measurements than this are thinned: a page of two runs stays within some tens of megabytes.
MOST_STEPS, MOST_HISTOGRAMS = 200, 12
# Stages by the names of layers: ours, those of ResNets, EfficientNets and VGGs of keras.applications.
_STAGE = re.compile(r"(?:.*/)?((?:stage|conv|block)\d+)[a-z]?_")

Theory = Callable[[Mapping[str, Any], pd.DataFrame], pd.DataFrame | None]


def run(title: str, source: str | pathlib.Path | pd.DataFrame, theory: Theory | None = None) -> dict:
    """Collect what the page draws of one run.

    Args:
        title: what the page calls it.
        source: folder of a run, or of a plain `fit` with the callback; or a table of `nfzoo.spp`.
        theory: see `nfzoo.report.write`.

    Raises:
        FileNotFoundError, ValueError: if there is no log, or nothing in it; the message names the folder.
    """
    folder = None if isinstance(source, pd.DataFrame) else pathlib.Path(source)
    log = source if folder is None else _read_log(folder)
    missing = {"kind", "layer"} - set(log.columns)
    if log.empty or missing:
        raise ValueError(f"Expected records of signal propagation with kind and layer. Received: {title!r} without")
    log = log.assign(**{key: 0 for key in ("step", "epoch", "depth") if key not in log})
    files = {name: {} if folder is None else _json(folder / f"{name}.json") for name in _FILES}
    options, metrics, meta = (files[name] for name in _FILES)
    expected = theory(options or {"model": meta.get("model", title)}, log) if theory else None
    return {
        "title": title,
        "model": options.get("model") or meta.get("model") or "",
        "status": metrics.get("status") or ("not ended" if options else "log only"),
        "facts": _facts(options, metrics, log),
        "alarms": [asdict(alarm) for alarm in alarms(log)],
        "options": [[path, value] for path, value in _flat(options)],
        "history": _history(folder),
        "definitions": meta.get("definitions") or {},
        "edges": meta.get("edges") or [],
        "signals": _signals(log, expected),
        "thinned": int(log.step.nunique()) if log.step.nunique() > MOST_STEPS else 0,
    }


_FILES = ("options", "metrics", "spp_meta")


def _read_log(folder: pathlib.Path) -> pd.DataFrame:
    from nfzoo.spp.log import read

    if not folder.exists():
        raise FileNotFoundError(f"Expected the folder of a run. Received: {folder}, which does not exist")
    return read(folder)


def _json(path: pathlib.Path) -> dict:
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"Expected a JSON file. Received: {path}, which is damaged: {error}") from None


def _history(folder: pathlib.Path | None) -> dict[str, list]:
    path = folder and folder / "history.csv"
    if not path or not path.exists() or not path.stat().st_size:
        return {}
    return {name: _numbers(column) for name, column in pd.read_csv(path).items()}


def _facts(options: dict, metrics: dict, log: pd.DataFrame) -> list[list[str]]:
    """What the card of a run says, as pairs of a name and a text."""
    facts = []
    if (accuracy := metrics.get("test_accuracy")) is not None:
        facts.append(["test accuracy", f"{100 * accuracy:.1f} %"])
    if (loss := metrics.get("test_loss")) is not None:
        facts.append(["test loss", f"{loss:.3g}"])
    facts.append(["epochs", str(metrics.get("epochs", int(log.epoch.max())))])
    if metrics.get("diverged_at_step") is not None:
        facts.append(["diverged", f"step {metrics['diverged_at_step']} of epoch {metrics.get('epochs', 0) + 1}"])
    if (seconds := metrics.get("seconds")) is not None:
        facts.append(["training", f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"])
    if data := (options.get("images") or {}).get("name"):
        facts.append(["data", str(data)])
    facts.append(["layers observed", str(log[log.kind == "activation"].layer.nunique() or log.layer.nunique())])
    facts.append(["measurements", str(log.step.nunique())])
    return facts


def _flat(content: Any, path: str = "") -> list[tuple[str, str]]:
    """Nested options as pairs of a dotted path and a text.

    Example:
        >>> _flat({"recipe": {"seed": 0, "augment": {"flip": False}}, "classes": ["a", "b"]})
        [('recipe.seed', '0'), ('recipe.augment.flip', 'false'), ('classes', '["a", "b"]')]
    """
    if isinstance(content, dict) and (content or not path):
        return [pair for key, value in content.items() for pair in _flat(value, f"{path}.{key}" if path else str(key))]
    return [(path, content if isinstance(content, str) else json.dumps(content))]


def _signals(log: pd.DataFrame, expected: pd.DataFrame | None) -> list[dict]:
    """One entry per kind and source: its layers in order, its measurements, a matrix (step x layer) per statistic."""
    log = log.assign(source=log["source"].fillna("probe") if "source" in log else "probe")
    kinds = [kind for kind in KINDS if kind in set(log.kind)]
    kinds += sorted(set(log.kind) - set(kinds))
    groups = {key: rows for key, rows in log.groupby(["kind", "source"], sort=False)}
    keys = sorted(groups, key=lambda key: (kinds.index(key[0]), key[1]))
    return [_signal(kind, source, groups[kind, source], expected) for kind, source in keys]


def _signal(kind: str, source: str, rows: pd.DataFrame, expected: pd.DataFrame | None) -> dict:
    layers = rows.sort_values("depth", kind="stable").drop_duplicates("layer")
    names = layers.layer.tolist()
    steps = _thinned(sorted(rows.step.unique()), MOST_STEPS)
    last = rows[rows.step.isin(steps)].drop_duplicates(["step", "layer"], keep="last")
    epochs = last.groupby("step").epoch.max()
    values = {}
    for name in _statistics(rows):
        table = last.pivot(index="step", columns="layer", values=name).reindex(index=steps, columns=names)
        values[name] = [_numbers(row) for row in table.to_numpy()]
    return {
        "kind": kind,
        "source": source,
        "layers": names,
        "groups": _groups(kind, layers),
        "stages": [match.group(1) if (match := _STAGE.match(name)) else "" for name in names],
        "steps": [int(step) for step in steps],
        "epochs": [int(epochs[step]) for step in steps],
        "values": values,
        "theory": _expected(expected, kind, names),
        "histograms": _histograms(last),
    }


def _statistics(rows: pd.DataFrame) -> list[str]:
    """Columns of numbers that these rows have; where nothing is finite, those that every log has."""
    columns = [name for name in rows if name not in _COLUMNS | _LISTS and pd.api.types.is_numeric_dtype(rows[name])]
    return [name for name in columns if rows[name].notna().any()] or [name for name in columns if name in _USUAL]


def _groups(kind: str, layers: pd.DataFrame) -> list[str]:
    """What layers are chosen by: their place in the network, or, for variables, the last part of their path."""
    if kind in ("activation", "gradient"):
        return layers.place.fillna("layer").tolist() if "place" in layers else ["layer"] * len(layers)
    return [name.rpartition("/")[2] for name in layers.layer]


def _expected(table: pd.DataFrame | None, kind: str, names: list[str]) -> dict[str, list]:
    """The theory's values, a list per statistic with one number for each layer."""
    if table is None or table.empty:
        return {}
    rows = table[table.kind == kind].drop_duplicates("layer").set_index("layer").reindex(names)
    numeric = [name for name in rows.columns if name not in _COLUMNS and rows[name].notna().any()]
    return {name: _numbers(rows[name]) for name in numeric if pd.api.types.is_numeric_dtype(rows[name])}


def _histograms(rows: pd.DataFrame) -> dict:
    """Shares per bin: {"steps": [...], "layers": {layer: [shares at each step]}}; empty without histograms."""
    if _HISTOGRAM not in rows:
        return {}
    rows = rows[rows[_HISTOGRAM].map(lambda value: isinstance(value, list))]
    if rows.empty:
        return {}
    steps = _thinned(sorted(rows.step.unique()), MOST_HISTOGRAMS)
    found: dict[str, dict] = {}
    for row in rows[rows.step.isin(steps)].itertuples():
        found.setdefault(row.layer, {})[row.step] = _numbers(getattr(row, _HISTOGRAM))
    layers = {name: [by_step.get(step) for step in steps] for name, by_step in found.items()}
    return {"steps": [int(step) for step in steps], "layers": layers}


def _thinned(steps: list, most: int) -> list:
    """At most so many of the steps, evenly taken, the first and the last among them.

    Example:
        >>> _thinned(list(range(9)), 3)
        [0, 4, 8]
    """
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _numbers(values: Any) -> list:
    """Floats rounded to six significant digits; None for what is not finite."""
    return [float(f"{value:.6g}") if value is not None and math.isfinite(value) else None for value in values]
