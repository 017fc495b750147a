"""From a selection to axes: by depth, over time, as a map, as a distribution. The figures compose these."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import MaxNLocator

from nfzoo.plots.select import Grid, evenly
from nfzoo.plots.style import (
    COLOURS,
    THEORY,
    colours,
    curve,
    foot,
    in_time,
    mark_stages,
    name_layers,
    nothing,
    scale,
    titles,
    wide,
)  # fmt: skip

BANDS = ((0.025, 0.975), (0.16, 0.84))


def by_depth(
    axes: Axes, grid: Grid, steps: Sequence[int] | None = None, *, theory: pd.Series | None = None,
    logarithmic: bool | None = None,
) -> None:  # fmt: skip
    """Draw a quantity by depth, a line per step.

    Args:
        grid: see `nfzoo.plots.select`.
        steps: which; default: at most 6, the first and the last included.
        theory: expected values by layer, drawn dashed.
        logarithmic: the scale; default: where the values span more than two decades.
    """
    if grid.empty:
        return nothing(axes)
    steps = grid.chosen(6) if steps is None else [step for step in steps if step in grid.steps]
    if logarithmic is None:
        logarithmic = spans([grid])
    for step in steps:
        curve(
            axes, grid.positions, grid.values[step], logarithmic=logarithmic, measured=grid.measured[step].to_numpy(),
            rounding=grid.rounding[step].to_numpy(), label=grid.label(step),
            color=in_time(grid.steps.index(step), len(grid.steps)),
        )  # fmt: skip
    if theory is not None and theory.notna().any():
        draw_theory(axes, grid, theory, logarithmic)
    mark_stages(axes, grid.layers, grid.first)
    scale(axes, logarithmic)
    axes.margins(x=0.03)


def draw_theory(axes: Axes, grid: Grid, theory: pd.Series, logarithmic: bool, **style) -> None:
    """Draw what is expected at initialisation, dashed, at the layers that the theory has a word on."""
    values = theory.to_numpy(float)
    known = np.isfinite(values)
    shown = np.where((values > 0) | (not logarithmic), values, np.nan)[known]  # zero leaves a gap, silence does not
    there = np.pad(np.isfinite(shown), 1)
    lone = np.flatnonzero(there[1:-1] & ~there[:-2] & ~there[2:]).tolist()  # no line goes to them
    style = THEORY | {"label": "theory", "marker": "_", "markersize": 4, "markevery": lone} | style
    axes.plot(grid.positions[known], shown, gid="theory", **style)


def spans(grids: Iterable[Grid], told: Iterable = ()) -> bool:
    """Whether grids want a logarithmic axis, and what is told of them; what is zero but for rounding does not count."""
    measured = [_cleared(grid.values, grid.rounding) for grid in grids if not grid.empty]
    return bool(measured) and wide(*measured, *told)


def _cleared(values: pd.DataFrame, rounding: pd.DataFrame) -> pd.DataFrame:
    return values.where(values > rounding, values.clip(upper=0))


def over_time(
    axes: Axes, grid: Grid, layers: Sequence[str] | None = None, *, most: int = 6, logarithmic: bool | None = None,
    hues: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Draw layers over epochs (over steps, where several were measured in an epoch).

    Args:
        layers: their names; default: at most `most`, evenly over depth.
        logarithmic: scale of the values; default: where they span more than two decades.
        hues: colours by the name that `style.titles` gives a layer.

    Raises:
        ValueError: for a layer that the log has not.
    """
    if grid.empty:
        return nothing(axes)
    if layers is None:
        layers = [grid.layers[i] for i in evenly(len(grid.layers), most)]
    if unknown := [layer for layer in layers if layer not in grid.layers]:
        raise ValueError(
            f"Expected layers with this quantity, such as {', '.join(grid.layers[:4])}. Received: {', '.join(unknown)}"
        )
    part = grid.values.loc[list(layers)]
    if logarithmic is None:
        logarithmic = wide(_cleared(part, grid.rounding.loc[list(layers)]))
    x, name = timeline(grid)
    names = titles(grid.layers)
    hues = hues or colours(names[layer] for layer in layers)
    for layer in layers:
        curve(
            axes, x, part.loc[layer], logarithmic=logarithmic, measured=grid.measured.loc[layer].to_numpy(),
            rounding=grid.rounding.loc[layer].to_numpy(), label=names[layer], color=hues[names[layer]],
        )  # fmt: skip
    scale(axes, logarithmic)
    axes.set_xlabel(name)
    if name == "step" and wide(x[x > 0]) and len(set(np.diff(x))) > 2:  # logarithmically spaced
        axes.set_xscale("symlog", linthresh=1, linscale=0.3)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def timeline(grid: Grid) -> tuple[np.ndarray, str]:
    """Positions of the steps on an axis of time, and its name: epochs where each was measured once."""
    epochs = [grid.epochs[step] for step in grid.steps]
    alone = len(set(epochs)) == len(epochs)
    return np.array(epochs if alone else grid.steps, float), "epoch" if alone else "step"


def heat(axes: Axes, grid: Grid, norm: Normalize) -> QuadMesh | None:
    """Draw a quantity as a map, steps to the right and depth upwards; a cross is not finite, white is zero."""
    if grid.empty:
        nothing(axes)
        return None
    values = grid.values.to_numpy(float)
    shown = np.ma.masked_invalid(values)
    if isinstance(norm, LogNorm):
        shown = np.ma.masked_where(values <= grid.rounding.to_numpy(), shown)
    edges = np.arange(len(grid.steps) + 1) - 0.5
    mesh = axes.pcolormesh(edges, np.arange(len(grid.layers) + 1) - 0.5, shown, norm=norm, cmap="viridis")
    rows, columns = np.nonzero(np.isnan(values) & grid.measured.to_numpy())
    if len(rows):
        axes.plot(columns, rows, "x", color="#B00020", markersize=3, linestyle="none", label="not finite")
    x, name = timeline(grid)
    shown_steps = evenly(len(x), 8)
    axes.set_xticks(shown_steps, [f"{x[i]:g}" for i in shown_steps])
    axes.set_xlabel(name)
    name_layers(axes, grid.layers, vertical=True)
    mark_stages(axes, grid.layers, vertical=False, color="white", zorder=2)
    return mesh


def common_norm(grids: Sequence[Grid]) -> Normalize | None:
    """One colour scale for several maps: logarithmic where the values span more than two decades; None for no value."""
    parts = [_cleared(grid.values, grid.rounding) for grid in grids]
    every = np.concatenate([part.to_numpy(float).ravel() for part in parts if not part.empty] or [np.zeros(0)])
    every = every[np.isfinite(every)]
    if not len(every):
        return None
    if wide(every):
        return LogNorm(every[every > 0].min(), every.max())
    return Normalize(every.min(), every.max())


def quantiles(shares: np.ndarray, edges: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    """Quantiles of a histogram; a level in an open bin gives that bin's inner edge.

    Args:
        shares: (n + 1,) share of values per bin: below the first edge, between edges, above the last.
        edges: (n,) increasing.
        levels: in [0, 1].

    Example:
        >>> quantiles(np.array([0.0, 0.5, 0.5, 0.0]), np.array([-1.0, 0.0, 1.0]), [0.25, 0.5, 1.0]).tolist()
        [-0.5, 0.0, 1.0]
    """
    return np.interp(levels, np.cumsum(shares)[:-1], edges)


def bands(axes: Axes, layers: Sequence[str], histograms: Sequence, edges: Sequence[float]) -> None:
    """Draw the distribution of every layer as its median and the bands of 68 and of 95 % of the values.

    Args:
        histograms: a list of shares per layer, as the statistic `histogram` gives; None where not finite.
    """
    levels = sorted({0.5, *(level for band in BANDS for level in band)})
    known = [
        isinstance(h, list | tuple | np.ndarray) and bool(np.isfinite(np.asarray(h, float)).all()) for h in histograms
    ]
    table = np.full((len(layers), len(levels)), np.nan)
    for i, (histogram, good) in enumerate(zip(histograms, known, strict=True)):
        if good:
            table[i] = quantiles(np.asarray(histogram, float), np.asarray(edges, float), levels)
    x = np.arange(len(layers))
    for (low, high), alpha in zip(BANDS, (0.25, 0.45), strict=True):
        lower, upper = table[:, levels.index(low)], table[:, levels.index(high)]
        axes.fill_between(
            x, lower, upper, color=COLOURS[0], alpha=alpha, linewidth=0, step="mid",
            label=f"{round(100 * (high - low))} % of the values",
        )  # fmt: skip
    axes.plot(x, table[:, levels.index(0.5)], color=COLOURS[1], linewidth=1, drawstyle="steps-mid", label="median")
    foot(axes, x[~np.array(known)], "x", "not finite", "#B00020")
    mark_stages(axes, layers)
