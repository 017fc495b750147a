"""Figures of the parameters: the distribution of weights, and learned scalars. From tables only."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nfzoo.plots import drawing
from nfzoo.plots.select import Quantity, check, expected
from nfzoo.plots.style import (
    THEORY,
    colours,
    curve,
    depth_axis,
    legend,
    mark_stages,
    new_figure,
    nothing,
    styled,
    wide,
)  # fmt: skip

Logs = Mapping[str, pd.DataFrame]
# Scalars that a network learns, the most telling first: of branches, of units, of normalizations.
SCALARS = (r"_(out|sum|exit)/gain$", r"/(gain|scale)$", r"/gamma$")


@styled
def weights(
    logs: Logs, edges: Sequence[float] | None = None, *, theory: Logs | None = None, kind: str = "weight"
) -> Figure:
    """Draw the distribution of every layer's weights, at initialisation and at the end, one row per model.

    The statistic `histogram` must have been recorded. Theory gives the band of 95 % of the initial (normal) weights.

    Args:
        logs, theory: see `signal_propagation`.
        edges: between the bins of the histograms: `nfzoo.spp.read_meta(run)["edges"]`.
        kind: "weight", "effective_weight", "weight_gradient", or "activation".

    Raises:
        ValueError: without edges, or for logs without the statistic.

    Example:
        >>> log = pd.DataFrame({"kind": "weight", "place": "parameter", "layer": "stem_conv1/kernel", "depth": 0,
        ...                     "step": [0, 79], "epoch": [0, 1], "histogram": [[1, 2, 1], [0, 4, 0]]})
        >>> len(weights({"SN": log}, edges=[-0.1, 0.1]).axes) >= 1
        True

    References: EUNNet (IEEE Access 2023), Figure 4.
    """
    logs = check(logs)
    if edges is None:
        raise ValueError('Expected the edges of the histograms, nfzoo.spp.read_meta(run)["edges"]. Received: none')
    logs = {title: log[log.kind == kind] for title, log in logs.items()}
    if any("histogram" not in log or log.histogram.isna().all() for log in logs.values()):
        raise ValueError(
            f'Expected records of kind {kind!r} with the statistic "histogram". Received: a log without; record them '
            'with nfzoo.SignalPropagation(what=("weights",), statistics=("histogram", …))'
        )
    longest = max(log.step.nunique() for log in logs.values())
    figure = new_figure(1.2 + 4.2 * min(longest, 2), 0.8 + 2.3 * len(logs))
    grid = figure.subplots(len(logs), min(longest, 2), sharey="row", squeeze=False)
    for row, (title, log) in zip(grid, logs.items(), strict=True):
        layers = log.sort_values("depth", kind="stable").layer.unique()
        deviation = expected((theory or {}).get(title), Quantity("", kind, None, "second_moment"), layers) ** 0.5
        steps = sorted(log.step.unique())
        for axes, step in zip(row, [steps[0], steps[-1]], strict=False):
            now = log[log.step == step].drop_duplicates("layer").set_index("layer").histogram.reindex(layers)
            drawing.bands(axes, layers, list(now), edges)
            for sign in (-1, 1):
                if deviation.notna().any():
                    band = 1.96 * sign * deviation.to_numpy()
                    axes.plot(band, drawstyle="steps-mid", label="theory", gid="theory", **THEORY)
            depth_axis(axes, layers)
            epoch = int(log[log.step == step].epoch.iloc[0])
            axes.set_title(f"{title}, {'at initialisation' if step == 0 else f'epoch {epoch}'}")
        _symmetric(row)
        row[0].set_ylabel(f"{kind.replace('_', ' ')}s")
    legend(figure)
    return figure


@styled
def scalars(logs: Logs, pattern: str | None = None) -> Figure:
    """Draw learned scalars by block, at the end and (thin) at initialisation, one panel per model.

    Of a vector, such as a gamma, the mean is drawn and the range from least to largest is shaded.

    Args:
        logs: see `signal_propagation`, with records of kind "parameter".
        pattern: regular expression on variable paths; default: the scalars of residual branches if there are, else
            gains of units, else the gammas of normalizations.

    Raises:
        ValueError: for logs without such parameters.

    Example:
        >>> log = pd.DataFrame({"kind": "parameter", "place": "parameter", "layer": "stage1_block1_out/gain",
        ...                     "depth": 1, "step": [0, 79], "epoch": [0, 1], "value": [0.0, 0.3], "least": [0.0, 0.3],
        ...                     "largest": [0.0, 0.3]})
        >>> len(scalars({"SkipInit": log}).axes)
        1

    References: EUNNet (IEEE Access 2023), Table 7.
    """
    logs = check(logs)
    figure = new_figure(1.2 + 3.8 * len(logs), 3.4)
    row = figure.subplots(1, len(logs), sharey=True, squeeze=False)[0]
    found = {title: _parameters(log, pattern) for title, log in logs.items()}
    if all(rows.empty for rows in found.values()):
        raise ValueError(
            f"Expected records of kind 'parameter'{f' that match {pattern!r}' if pattern else ''}. Received: logs "
            'without; record them with nfzoo.SignalPropagation(what=(…, "parameters"))'
        )
    logarithmic = wide(*(rows.value for rows in found.values() if not rows.empty))
    hues = colours(_role(path) for rows in found.values() for path in rows.layer)
    for axes, (title, rows) in zip(row, found.items(), strict=True):
        axes.set_title(title)
        axes.set_xlabel("block (0: stem)" if rows.layer.map(_BLOCK.match).any() else "layers in order of depth")
        if rows.empty:
            nothing(axes)
            continue
        blocks = _blocks(logs[title])
        for role, group in rows.groupby(rows.layer.map(_role), sort=False):
            _scalar(axes, group, blocks, str(role), hues[role], logarithmic)
        mark_stages(axes, list(blocks), min(blocks.values()))
        axes.set_yscale("log" if logarithmic else "linear")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    row[0].set_ylabel("value")
    legend(figure)
    return figure


def _symmetric(row) -> None:
    """Limits of a row of distributions, about zero; logarithmic on both sides where layers differ by decades."""
    most = max(abs(limit) for axes in row for limit in axes.dataLim.intervaly)
    widths = np.concatenate(
        [np.ravel(path.vertices[:, 1]) for axes in row for c in axes.collections for path in c.get_paths()]
    )
    widths = np.abs(widths[np.isfinite(widths) & (widths != 0)])
    for axes in row:
        if wide(widths, decades=2.5):
            axes.set_yscale("symlog", linthresh=float(np.quantile(widths, 0.05)))
        axes.set_ylim(-1.05 * most, 1.05 * most)
        axes.margins(x=0.02)


def _parameters(log: pd.DataFrame, pattern: str | None) -> pd.DataFrame:
    """The scalars to show, in the order of the network."""
    rows = log[log.kind == "parameter"]
    for candidate in (pattern,) if pattern else SCALARS:
        chosen = rows[[re.search(candidate, path) is not None for path in rows.layer]]
        if not chosen.empty:
            return chosen.sort_values("depth", kind="stable")
    return rows.iloc[:0]


_BLOCK = re.compile(r"^(stage\d+_block\d+|stem|top)_")


def _role(path: str) -> str:
    """Its name within a block: "stage2_block3_conv1/gain" is "conv1 gain"; without blocks, its last name."""
    return _BLOCK.sub("", path).replace("/", " ") if _BLOCK.match(path) else path.rpartition("/")[2]


def _block(path: str) -> str:
    match = _BLOCK.match(path)
    return match.group(1) if match else path.rpartition("/")[0]


def _blocks(log: pd.DataFrame) -> dict[str, int]:
    """Name of a block -> its position on the axis; the stem is 0."""
    rows = log[log.kind == "parameter"].sort_values("depth", kind="stable")
    names = dict.fromkeys(map(_block, rows.layer))
    return {name: i for i, name in enumerate(names, 0 if "stem" in names else 1)}


def _scalar(axes, rows: pd.DataFrame, blocks: dict[str, int], role: str, hue: str, logarithmic: bool) -> None:
    """One scalar of each block: its last values, and its first ones thin."""
    steps = sorted(rows.step.unique())
    for step in steps[-1:] + steps[:1] * (len(steps) > 1):
        now, last = rows[rows.step == step], step == steps[-1]
        x = [blocks[_block(path)] for path in now.layer]
        style = {"label": role} if last else {"alpha": 0.5, "marker": "", "linestyle": ":"}
        curve(axes, x, now.value, logarithmic=logarithmic, color=hue, **style)
        if last and {"min", "max"} <= set(now) and (now["max"] > now["min"]).any():
            axes.fill_between(x, now["min"], now["max"], color=hue, alpha=0.12, linewidth=0)
