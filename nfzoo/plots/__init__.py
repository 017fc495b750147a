"""Pictures from logs and tables only; no Keras here.

A selection of a log (`select.py`) is drawn on axes (`drawing.py`) in one style (`style.py`); the figures (`figures.py`,
`parameters.py`) compose that, and `FIGURES` names them. `animation.py` films them; `training.py` draws histories,
scans and range tests.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from nfzoo.plots.animation import animate, frames
from nfzoo.plots.drawing import by_depth, heat, over_time
from nfzoo.plots.figures import (
    PAPER,
    POSTER,
    compare,
    epochs,
    heatmap,
    history,
    signal_propagation,
)  # fmt: skip
from nfzoo.plots.parameters import scalars, weights
from nfzoo.plots.select import PANELS, Grid, Quantity, expected, select
from nfzoo.plots.style import save
from nfzoo.plots.training import histories, range_test, scan

__all__ = [
    "FIGURES",
    "PANELS",
    "Grid",
    "Named",
    "Quantity",
    "animate",
    "by_depth",
    "compare",
    "draw",
    "epochs",
    "expected",
    "frames",
    "heat",
    "heatmap",
    "histories",
    "history",
    "over_time",
    "range_test",
    "save",
    "scalars",
    "scan",
    "select",
    "signal_propagation",
    "weights",
]


class Named(NamedTuple):
    """A figure with a name: one line that says what it shows, and the function that draws it from logs."""

    description: str
    function: Callable[..., Figure]


FIGURES: dict[str, Named] = {
    "propagation": Named("depth profiles over epochs, one column per model", signal_propagation),
    "epochs": Named("depth profiles as small multiples, one column per epoch, one line per model", epochs),
    "history": Named("layers over time, one line per layer", history),
    "heatmap": Named("one quantity as a map of layers by epochs", heatmap),
    "models": Named("models against each other: block variance at initialisation and at the end", compare),
    "weights": Named("distribution of every layer's weights (EUNNet, Figure 4)", weights),
    "nonzero": Named(
        "share of activations that are not zero, by layer (EUNNet, Figure 5)", partial(compare, panels=("nonzero",))
    ),
    "variance": Named(
        "variance of block outputs at the end (EUNNet, Figure 7)", partial(compare, panels=("variance",), at=("last",))
    ),
    "scalars": Named("learned scalars by block (EUNNet, Table 7)", scalars),
    "gradients": Named(
        "mean square of the gradient at every layer, over epochs (the poster's Figures 1 and 2)",
        partial(signal_propagation, panels=("layer_gradient",)),
    ),
    "poster": Named(
        "activations, weights and gradients of all layers (the poster's Figures 3 to 5)",
        partial(signal_propagation, panels=POSTER, most=3),
    ),
    "resnetv2": Named(
        "squared mean, variance and branch variance at initialisation (NF-ResNet paper, Figures 1 and 2)",
        partial(compare, panels=PAPER, at=("first",)),
    ),
}


def draw(
    name: str, logs: Mapping[str, pd.DataFrame], *, theory: Mapping[str, pd.DataFrame] | None = None,
    edges: Sequence[float] | None = None, **options: Any,
) -> Figure:  # fmt: skip
    """Draw a figure by its name in `FIGURES`.

    Args:
        name: a key of `FIGURES`.
        logs: title -> table of `nfzoo.spp.read` or `nfzoo.spp.snapshot`.
        theory: title -> table of `nfzoo.theory.profile`; figures to which theory says nothing leave it out.
        edges: of the bins of histograms, `nfzoo.spp.read_meta(run)["edges"]`; only "weights" needs them.
        **options: of the figure's function.

    Raises:
        ValueError: for an unknown name, an empty log, or logs without what the figure shows.

    Example:
        >>> log = pd.DataFrame({"kind": "activation", "place": "block", "layer": ["a", "b"], "depth": [0, 1],
        ...                     "acv": [1.0, 2.0]})
        >>> len(draw("variance", {"net": log}).axes)
        1
    """
    if name not in FIGURES:
        raise ValueError(f"Expected the name of a figure: one of {', '.join(FIGURES)}. Received: {name!r}")
    function = FIGURES[name].function
    known = inspect.signature(function).parameters
    offered = {key: value for key, value in {"theory": theory, "edges": edges}.items() if key in known}
    return function(logs, **offered, **options)
