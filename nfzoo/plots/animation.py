"""Signal propagation as a film: a frame per measured step, the axes fixed over all of them."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from nfzoo.files import atomic
from nfzoo.plots.figures import PROPAGATION, signal_propagation
from nfzoo.plots.select import Quantity, check, select_all
from nfzoo.plots.style import save

ENDINGS = {".gif": "GIF", ".apng": "PNG", ".png": "PNG", ".webp": "WEBP"}


def frames(
    logs: Mapping[str, pd.DataFrame], panels: Sequence[str | Quantity] = PROPAGATION, *,
    theory: Mapping[str, pd.DataFrame] | None = None,
) -> Iterator[Figure]:  # fmt: skip
    """Yield `signal_propagation` at every measured step, the state at initialisation left in view.

    Args:
        logs, panels, theory: see `nfzoo.plots.signal_propagation`.

    Raises:
        ValueError: as it does.

    Example:
        >>> log = pd.DataFrame({"kind": "activation", "place": "block", "layer": "stem_out", "depth": 0,
        ...                     "step": [0, 79], "epoch": [0, 1], "acsm": [0.0, 0.2], "acv": [1.0, 0.8]})
        >>> [figure.get_suptitle() for figure in frames({"SN": log}, ["variance"])]
        ['at initialisation', 'epoch 1']
    """
    logs = check(logs)
    grids = [grid for _, row in select_all(logs, panels) for grid in row.values()]
    steps = sorted({step for grid in grids for step in grid.steps})
    labels = {step: grid.label(step) for grid in grids for step in grid.steps}
    every = signal_propagation(logs, panels, theory=theory, most=len(steps))
    every.draw_without_rendering()
    fixed = [(axes.get_xlim(), axes.get_ylim(), axes.get_yscale()) for axes in every.axes]
    for step in steps:
        # Of a log that was not measured at this very step, what it showed last.
        now = {title: log[log.step.isin({log.step.min(), _last(log, step)})] for title, log in logs.items()}
        figure = signal_propagation(now, panels, theory=theory)
        for axes, (x, y, scale) in zip(figure.axes, fixed, strict=True):
            _fix(axes, x, y, scale)
        figure.suptitle(labels[step], fontsize=10)
        yield figure


def _last(log: pd.DataFrame, step: int) -> int:
    return max((s for s in log.step.unique() if s <= step), default=log.step.min())


def _fix(axes: Axes, x: tuple, y: tuple, scale: str) -> None:
    if axes.axison:
        axes.set_yscale(scale)
        axes.set(xlim=x, ylim=y)


def animate(
    logs: Mapping[str, pd.DataFrame], path: str | pathlib.Path, panels: Sequence[str | Quantity] = PROPAGATION, *,
    theory: Mapping[str, pd.DataFrame] | None = None, seconds: float = 0.6,
) -> list[pathlib.Path]:  # fmt: skip
    """Write `frames` as a film, or as a folder of pictures.

    Args:
        logs, panels, theory: see `nfzoo.plots.signal_propagation`.
        path: a file ending with .gif, .apng, .png or .webp; anything without an ending is a folder for frame-0000.png….
        seconds: that a frame stays.

    Returns:
        The files written.

    Raises:
        ValueError: for another ending.

    Example:
        >>> import tempfile
        >>> log = pd.DataFrame({"kind": "activation", "place": "block", "layer": "stem_out", "depth": 0,
        ...                     "step": [0, 79], "epoch": [0, 1], "acsm": [0.0, 0.2], "acv": [1.0, 0.8]})
        >>> [path] = animate({"SN": log}, pathlib.Path(tempfile.mkdtemp()) / "sn.gif", ["variance"])
        >>> with Image.open(path) as film:
        ...     film.n_frames
        2
    """
    path = pathlib.Path(path)
    if not path.suffix:
        return _folder(frames(logs, panels, theory=theory), path)
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"Expected a folder, or a file ending with {', '.join(ENDINGS)}. Received: {path.name}")
    pictures = [_picture(figure) for figure in frames(logs, panels, theory=theory)]
    with atomic(path) as partial, partial.open("wb") as file:
        pictures[0].save(
            file, ENDINGS[path.suffix.lower()], save_all=True, append_images=pictures[1:],
            duration=round(1000 * seconds), loop=0,
        )  # fmt: skip
    return [path]


def _folder(figures: Iterator[Figure], folder: pathlib.Path) -> list[pathlib.Path]:
    written = [save(figure, folder / f"frame-{i:04d}.png") for i, figure in enumerate(figures)]
    for old in set(folder.glob("frame-*.png")) - set(written):
        old.unlink()
    return written


def _picture(figure: Figure, dpi: int = 110) -> Image.Image:
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
