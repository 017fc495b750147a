"""One HTML file that explains what a network did to its signal; it needs no network connection and no server.

The numbers of all runs are embedded as JSON, plotly.js beside them; the scripts draw.
"""

import base64
import hashlib
import html
import pathlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import pandas as pd

from nfzoo.alarms import THRESHOLDS
from nfzoo.files import atomic, title_of, to_json
from nfzoo.report import contents
from nfzoo.report.quantities import KINDS, OVERVIEW, PLACES, QUANTITIES

__all__ = ["write"]

_HERE = pathlib.Path(__file__).parent
_SCRIPTS = ("signals.js", "plots.js", "page.js")
Source = str | pathlib.Path | pd.DataFrame


def write(
    runs: Sequence[str | pathlib.Path] | Mapping[str, Source],
    out: str | pathlib.Path,
    *,
    theory: contents.Theory | None = None,
) -> pathlib.Path:
    """Write a report of one or more runs as one self-contained HTML file.

    Args:
        runs: folders with spp.jsonl (options.json, metrics.json and history.csv are shown where they are), or a mapping
            from titles to folders or to tables of `nfzoo.spp`.
        out: the file to write; it is whole or not there.
        theory: what to draw beside the measurements, such as `nfzoo.theory.of_run`: a function from the content of a
            run's options.json (of a table: {"model": title}) and its log to a table like a log's (kind, layer, and a
            column per statistic), or None for a model that it does not know.

    Returns:
        The path of the file.

    Raises:
        FileNotFoundError, ValueError: if a folder has no log or an empty one; the message names it.

    Example:
        >>> import tempfile
        >>> row = {"kind": "activation", "place": "block"}
        >>> rows = [{**row, "layer": f"stage1_block{i}_out", "depth": i, "acv": 1.0 + i} for i in range(3)]
        >>> path = write({"by hand": pd.DataFrame(rows)}, pathlib.Path(tempfile.mkdtemp()) / "report.html")
        >>> path.stat().st_size > 1e6
        True
    """
    named = runs if isinstance(runs, Mapping) else _titles(runs)
    if not named:
        raise ValueError("Expected at least one run to report on. Received: none")
    page = {
        "runs": [contents.run(title, source, theory) for title, source in named.items()],
        "kinds": KINDS,
        "places": PLACES,
        "quantities": {name: asdict(quantity) for name, quantity in QUANTITIES.items()},
        "overview": OVERVIEW,
        "most_steps": contents.MOST_STEPS,
        "thresholds": {kind: asdict(threshold) for kind, threshold in THRESHOLDS.items()},
    }
    text = _page("Signal propagation: " + ", ".join(named), to_json(page))
    with atomic(out) as partial:
        partial.write_text(text, encoding="utf-8")
    return pathlib.Path(out)


def _titles(folders: Sequence[str | pathlib.Path]) -> dict[str, pathlib.Path]:
    """Name folders by their last part, or, where that is taken, by their path."""
    if isinstance(folders, str | pathlib.Path):
        folders = [folders]
    named: dict[str, pathlib.Path] = {}
    for folder in map(pathlib.Path, folders):
        named[title_of(folder, named)] = folder
    return named


def _page(title: str, data: str) -> str:
    """Fill the template. Only the page's own two scripts may run, and nothing may be loaded from anywhere."""
    from plotly.offline import get_plotlyjs

    plotly, script = get_plotlyjs(), "\n".join((_HERE / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    hashes = " ".join(f"'sha256-{_digest(part)}'" for part in (plotly, script))
    parts = {
        "title": html.escape(title),
        "policy": f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:",
        "style": (_HERE / "page.css").read_text(encoding="utf-8"),
        # Within a script element only "<" could end it; escaped, it is the same JSON.
        "data": data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"),
        "plotly": plotly,
        "script": script,
    }
    template = (_HERE / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match.group(1)], template)


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
