"""The log on disk: append-only JSON lines, read as a table.

null stands for a statistic that is not finite (NaN or infinity, which JSON cannot write); `read` gives it back as NaN.
"""

import json
import math
import pathlib
from collections.abc import Sequence

import pandas as pd

from nfzoo.files import atomic, to_json

META = "spp_meta.json"


class SignalLog:
    """An append-only file of JSON lines, one record each; a line cut short by a kill is ignored."""

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)

    def append(self, records: Sequence[dict]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(to_json(record) + "\n" for record in records)
        with self.path.open("a+b") as file:
            if file.tell() and (file.seek(-1, 2), file.read(1))[1] != b"\n":
                lines = "\n" + lines  # the last writer was killed: do not add to its broken line
            file.write(lines.encode())

    def read(self) -> list[dict]:
        records = []
        if self.path.exists():
            for line in self.path.read_text(errors="replace").splitlines():
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError:
                    continue
        return [{k: math.nan if v is None else v for k, v in r.items()} for r in records if isinstance(r, dict)]

    def rewind(self, step: int) -> None:
        """Drop the records of steps after `step`, for a run that resumes there."""
        kept = [r for r in self.read() if r.get("step", 0) <= step]
        if self.path.exists():
            with atomic(self.path) as partial:
                partial.write_text("".join(to_json(record) + "\n" for record in kept))


def write_meta(folder: str | pathlib.Path, description: dict) -> None:
    """Write what a reader of the log needs to know beside it: see `Reduction.describe`."""
    with atomic(pathlib.Path(folder) / META) as partial:
        partial.write_text(to_json(description))


def read_meta(path: str | pathlib.Path) -> dict:
    """Read the description of a log (of its file or its folder): model, layers, definitions; {} where there is none.

    Raises:
        ValueError: if it is damaged.

    Example:
        >>> read_meta("/nowhere")
        {}
    """
    path = pathlib.Path(path)
    path = (path if path.is_dir() else path.parent) / META
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except json.JSONDecodeError:
        raise ValueError(f"Expected a description of a log. Received: {path}, which is damaged; remove it") from None


def read(path: str | pathlib.Path) -> pd.DataFrame:
    """Read a log, or the log of a run's folder, as a table; broken lines are left out, what is not finite is NaN.

    Returns:
        A row per step, kind and layer: columns step, epoch, kind, place, layer, depth, and a column per statistic.

    Raises:
        FileNotFoundError: if there is no log.
        ValueError: if no line of it is whole.

    Example:
        >>> import tempfile
        >>> log = SignalLog(pathlib.Path(tempfile.mkdtemp()) / "spp.jsonl")
        >>> log.append([{"step": 0, "epoch": 0, "kind": "activation", "layer": "stem_out", "acv": 1.0}])
        >>> read(log.path.parent).acv.tolist()
        [1.0]
    """
    path = pathlib.Path(path)
    path = path / "spp.jsonl" if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(
            f"Expected a signal propagation log (spp.jsonl). Received: {path}, which does not exist"
        )
    records = SignalLog(path).read()
    if not records:
        raise ValueError(f"Expected records of signal propagation. Received: {path}, where no line is whole")
    return pd.DataFrame(records)
