"""How every figure looks: colours, scales, marks of stages and of what is not finite, one legend, files."""

import math
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nfzoo.files import atomic

# Okabe & Ito's colours, which differ for every kind of colour vision; yellow is too pale for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
SEQUENCE = matplotlib.colormaps["viridis"]
THEORY = {"color": "black", "linestyle": (0, (4, 2)), "linewidth": 1.1, "zorder": 3}
STYLE = {
    "font.size": 8, "axes.titlesize": 9, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "legend.fontsize": 8, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "mathtext.fontset": "dejavusans",
}  # fmt: skip
# Layer names of nfzoo, and of keras.applications' ResNets and EfficientNets.
_STAGE = re.compile(r"(?:^|/)(stage\d+|conv\d+(?=_block)|block\d+(?=[a-z]_))")
NAMED = 32  # as many layers have their names on the axis


def styled(function: Callable) -> Callable:
    """Draw in the style of this package, whatever the user's is."""

    @wraps(function)
    def draw(*args, **kwargs):
        with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
            return function(*args, **kwargs)

    return draw


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches that no window shows."""
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: str | pathlib.Path) -> pathlib.Path:
    """Write a figure, whole or not at all.

    Args:
        figure: of this package, or any of Matplotlib.
        path: its ending says the format, such as png at 150 dots per inch, svg or pdf.

    Raises:
        ValueError: for an ending that Matplotlib does not write; it lists those it does.

    Example:
        >>> import tempfile
        >>> save(new_figure(2, 1), pathlib.Path(tempfile.mkdtemp()) / "empty.svg").name
        'empty.svg'
    """
    with atomic(path) as partial:
        figure.savefig(partial, dpi=150)
    return pathlib.Path(path)


def colour(index: int) -> str:
    """Colour of the model or layer of this number."""
    return COLOURS[index % len(COLOURS)]


def colours(names: Iterable[str]) -> dict[str, Any]:
    """Colour of each: few have one each, many the place that they have in their order."""
    names = list(dict.fromkeys(names))
    few = len(names) <= len(COLOURS)
    return {name: colour(i) if few else in_time(i, len(names)) for i, name in enumerate(names)}


def in_time(index: int, count: int) -> tuple:
    """Colour of the step of this number of so many: dark at initialisation, light at the end."""
    return SEQUENCE(0.88 * index / max(count - 1, 1))


def wide(*values: Iterable, decades: float = 2.0) -> bool:
    """Whether values want a logarithmic axis: none is negative, the positive ones span more than `decades`."""
    every = np.concatenate([np.ravel(np.asarray(part, float)) for part in values]) if values else np.zeros(0)
    every = every[np.isfinite(every)]
    positive = every[every > 0]
    return bool(len(positive) and (every >= 0).all() and np.log10(positive.max() / positive.min()) > decades)


def curve(axes: Axes, x, y, *, logarithmic: bool, measured=True, rounding=0.0, **style) -> None:
    """Draw a line; what is not finite leaves a gap and a cross at the foot, zero on a logarithmic axis a triangle.

    Args:
        measured: whether there is a value at all; where not, there is a gap and no cross.
        rounding: values at or below count as zero.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    y = np.where(np.abs(y) <= rounding, 0.0, y)
    bad = ~np.isfinite(y)
    zero = ~bad & (y <= 0) & logarithmic
    few = len(y) <= 60
    marks = {"marker": "o", "markersize": 2.6 if few else 1.2, "linewidth": 1.2 if few else 0.9}
    axes.plot(x, np.where(bad | zero, np.nan, y), **(marks | style))
    foot(axes, x[bad & measured], "x", "not finite", "#B00020")
    foot(axes, x[zero], "v", "zero", style.get("color", "black"))


def foot(axes: Axes, x: np.ndarray, marker: str, label: str, colour: str) -> None:
    """Mark positions at the foot of the axes, whatever their scale is."""
    if len(x):
        face = "none" if marker == "v" else colour
        axes.plot(
            x, np.full(len(x), 0.025), marker, color=colour, markerfacecolor=face, markersize=4, linestyle="none",
            label=label, transform=axes.get_xaxis_transform(), clip_on=False, zorder=5,
        )  # fmt: skip


def scale(axes: Axes, logarithmic: bool) -> None:
    """Set the scale of the y axis; a linear axis of what is never negative starts at zero."""
    if logarithmic:
        axes.set_yscale("log")
    elif axes.lines and all((np.nan_to_num(line.get_ydata()) >= 0).all() for line in axes.lines):
        # Limits that are set would be those of the whole row, whatever is drawn there later.
        axes.update_datalim([(0, 0)], updatex=False)
        axes.lines[0].sticky_edges.y.append(0)
        axes.autoscale(axis="y")


def stage(layer: str) -> str | None:
    """The stage that a layer's name tells, e.g. "stage2"; None where it tells none."""
    match = _STAGE.search(layer)
    return match.group(1) if match else None


def stage_ends(layers: Sequence[str]) -> list[float]:
    """Positions between two layers of different stages.

    Example:
        >>> stage_ends(["stem_out", "stage1_block1_out", "stage1_block2_out", "stage2_block1_out"])
        [0.5, 2.5]
    """
    stages = [stage(layer) for layer in layers]
    return [i + 0.5 for i, (a, b) in enumerate(zip(stages, stages[1:], strict=False)) if a != b]


def mark_stages(axes: Axes, layers: Sequence[str], first: int = 0, vertical: bool = True, **style) -> None:
    """Draw a line, grey unless told otherwise, where a stage ends."""
    for end in stage_ends(layers):
        draw = axes.axvline if vertical else axes.axhline
        draw(end + first, gid="stage", **({"color": "0.8", "linewidth": 0.7, "zorder": 0} | style))


def short(layer: str) -> str:
    """A layer's name as an axis has room for: "stage2_block3_conv1/kernel" is "s2b3 conv1"."""
    return re.sub(r"^stage(\d+)_block(\d+)_", r"s\1b\2 ", layer.removesuffix("/kernel"))


def titles(layers: Iterable[str]) -> dict[str, str]:
    """Short names for a legend, of blocks where each has one layer.

    Example:
        >>> titles(["stage1_block1_out", "stage1_block2_out"])
        {'stage1_block1_out': 's1b1', 'stage1_block2_out': 's1b2'}
    """
    names = {layer: short(layer) for layer in layers}
    blocks = {layer: re.sub(r"[ _](out|branch)$", "", name) for layer, name in names.items()}
    return blocks if len(set(blocks.values())) == len(blocks) else names


def name_layers(axes: Axes, layers: Sequence[str], first: int = 0, vertical: bool = False) -> None:
    """Label an axis of layers: by name where there is room, else by stage, else by number."""
    axis = axes.yaxis if vertical else axes.xaxis
    spans: dict[str, list[int]] = {}
    for position, layer in enumerate(layers, first):
        spans.setdefault(stage(layer) or "", []).append(position)
    spans.pop("", None)
    if len(layers) <= NAMED:
        axis.set_ticks(range(first, first + len(layers)), [short(layer) for layer in layers])
        if not vertical:
            axes.tick_params(axis="x", labelrotation=90, labelsize=6)
    elif spans:
        narrow = min(map(len, spans.values())) < 0.1 * len(layers)
        labels = [re.sub("stage|block|conv", lambda m: m[0][0], name) if narrow else name for name in spans]
        axis.set_ticks([(span[0] + span[-1]) / 2 for span in spans.values()], labels)
        axes.tick_params(axis="y" if vertical else "x", length=0)
    else:
        axis.set_major_locator(MaxNLocator(integer=True))


def depth_axis(axes: Axes, layers: Sequence[str], first: int = 0) -> None:
    """Label an x axis of layers that are no blocks."""
    name_layers(axes, layers, first)
    axes.set_xlabel("" if len(layers) <= NAMED else "layers in order of depth")


def legend(figure: Figure) -> None:
    """One legend for all axes, below them, in as many columns as have room."""
    entries = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    last = [label for label in ("theory", "zero", "not finite") if label in entries]
    order = [label for label in entries if label not in last] + last
    if order:
        inches = sum(0.55 + 0.065 * len(label) for label in order)
        lines = math.ceil(inches / figure.get_figwidth())
        columns = math.ceil(len(order) / lines)
        figure.legend([entries[label] for label in order], order, loc="outside lower center", ncols=columns)


def nothing(axes: Axes, text: str = "not recorded") -> None:
    """Say in place of a picture that there is none."""
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color="grey")
    axes.set_axis_off()
