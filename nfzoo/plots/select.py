"""From the rows of a log to the numbers of one picture: layers by steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

# A squared mean that is this much smaller than the mean square is float32's rounding.
ROUNDING = 1e-11


class Quantity(NamedTuple):
    """What one panel shows.

    Attributes:
        title: axis label.
        kind, statistic: of the records, see `nfzoo.spp`.
        place: of the records; None for all of them.
    """

    title: str
    kind: str
    place: str | None
    statistic: str


PANELS: dict[str, Quantity] = {
    "mean": Quantity("average channel\nsquared mean", "activation", "block", "acsm"),
    "variance": Quantity("average channel\nvariance", "activation", "block", "acv"),
    "branch": Quantity("residual branch\nvariance", "activation", "branch", "acv"),
    "gradient": Quantity("gradient at block\noutput, mean square", "gradient", "block", "second_moment"),
    "nonzero": Quantity("share of values\nthat are not zero", "activation", "activation", "nonzero"),
    "dead": Quantity("share of channels\nthat are dead", "activation", "activation", "dead"),
    "kurtosis": Quantity("kurtosis", "activation", "block", "kurtosis"),
    "layer_mean": Quantity("activations,\nACSM", "activation", None, "acsm"),
    "layer_variance": Quantity("activations,\nACV", "activation", None, "acv"),
    "layer_gradient": Quantity("gradients at outputs,\nmean square", "gradient", None, "second_moment"),
    "weight": Quantity("weights,\nmean square", "weight", None, "second_moment"),
    "effective_weight": Quantity("effective weights,\nmean square", "effective_weight", None, "second_moment"),
    "weight_gradient": Quantity("gradients of weights,\nmean square", "weight_gradient", None, "second_moment"),
    "update": Quantity("update over weight,\nnorms", "weight", None, "update_to_weight"),
    "clipped": Quantity("share of units\nthat AGC clips", "weight_gradient", None, "agc_clipped"),
}
_USUAL = ("acsm", "acv", "second_moment", "value")
# Where a network has no such place, what comes nearest: networks of other libraries name no blocks.
_INSTEAD = {"block": ("merge", "activation", "preactivation"), "activation": ("block", "merge")}


@dataclass(frozen=True)
class Grid:
    """One quantity of one log.

    Attributes:
        values: a row per layer in the order of the network, a column per step; NaN where not finite or not measured.
        epochs: step -> epochs done.
        measured: where the log has a record, of the shape of `values`: a NaN there was not finite.
        rounding: values at or below are zero but for rounding, of the shape of `values`.
        first: position of the first layer: 1 for residual branches, which the stem (0) has none of.
    """

    values: pd.DataFrame
    epochs: dict[int, int]
    measured: pd.DataFrame
    rounding: pd.DataFrame
    first: int = 0

    @property
    def layers(self) -> list[str]:
        return list(self.values.index)

    @property
    def steps(self) -> list[int]:
        return list(self.values.columns)

    @property
    def positions(self) -> np.ndarray:
        return np.arange(len(self.values)) + self.first

    @property
    def empty(self) -> bool:
        return self.values.empty

    def at(self, step: int) -> "Grid":
        """This step alone."""
        values, measured, rounding = (table[[step]] for table in (self.values, self.measured, self.rounding))
        return Grid(values, {step: self.epochs[step]}, measured, rounding, self.first)

    def label(self, step: int) -> str:
        """How a legend calls a step."""
        if step == 0:
            return "at initialisation"
        alone = list(self.epochs.values()).count(self.epochs[step]) == 1
        return f"epoch {self.epochs[step]}" if alone else f"step {step}"

    def chosen(self, most: int) -> list[int]:
        """At most `most` steps, evenly over all, the first and the last among them."""
        return [self.steps[i] for i in evenly(len(self.steps), most)]


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of `count` positions, evenly, both ends among them.

    Example:
        >>> evenly(10, 4), evenly(2, 4)
        ([0, 3, 6, 9], [0, 1])
    """
    if most == 1:
        return [count - 1][:count]
    return sorted({round(i) for i in np.linspace(0, count - 1, min(most, count))})


def check(logs: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Check that there are logs with records, and give a table of one measurement a step.

    Raises:
        ValueError: for no log, an empty one, or a table that is none.
    """
    if not logs:
        raise ValueError("Expected at least one log, as {title: table of nfzoo.spp.read}. Received: none")
    for title, log in logs.items():
        missing = {"kind", "layer", "depth"} - set(log.columns)
        if log.empty or missing:
            what = "an empty table" if log.empty else f"a table without {', '.join(sorted(missing))}"
            raise ValueError(
                f"Expected a signal propagation log with records for {title!r}. Received: {what}; "
                "nfzoo.spp.read and nfzoo.spp.snapshot give one"
            )
    return {title: log if "step" in log else log.assign(step=0, epoch=0) for title, log in logs.items()}


def quantity(name: str | Quantity) -> Quantity:
    """Look up a panel by name.

    Raises:
        ValueError: for an unknown name.
    """
    if isinstance(name, Quantity):
        return name
    if name not in PANELS:
        raise ValueError(f"Expected a panel: one of {', '.join(PANELS)}. Received: {name!r}")
    return PANELS[name]


def select(log: pd.DataFrame, what: Quantity) -> Grid:
    """Take one quantity from a log; an empty grid where it was not recorded.

    Of one layer and step, a record of the probe batch is preferred to one accumulated in training (source "live").
    """
    kind = log[log.kind == what.kind]
    rows = kind if what.place is None else kind[kind.place == what.place]
    for place in _INSTEAD.get(what.place or "", ()):
        rows = kind[kind.place == place] if rows.empty else rows
    if rows.empty or what.statistic not in rows or not (seen := _measured(rows, what.statistic)).any():
        return Grid(pd.DataFrame(), {}, pd.DataFrame(), pd.DataFrame())
    live = rows["source"].notna() if "source" in rows else pd.Series(False, rows.index)
    rows = rows.assign(_live=live, _seen=seen).sort_values("_live", kind="stable").drop_duplicates(["layer", "step"])
    layers = rows.sort_values("depth", kind="stable").layer.unique()
    steps = sorted(int(step) for step in rows.step.unique())

    def table(column: pd.Series) -> pd.DataFrame:
        return rows.assign(_=column).pivot(index="layer", columns="step", values="_").reindex(layers)[steps]

    small = ROUNDING * rows["second_moment"] if what.statistic == "acsm" and "second_moment" in rows else 0 * rows.depth
    values = table(rows[what.statistic].astype(float)).replace([np.inf, -np.inf], np.nan)
    epochs = {int(step): int(epoch) for step, epoch in rows.groupby("step").epoch.first().items()}
    first = 1 if what.place == "branch" else 0
    return Grid(values, epochs, table(rows._seen).fillna(False).astype(bool), table(small).fillna(0.0), first)


def _measured(rows: pd.DataFrame, statistic: str) -> pd.Series:
    """Where a NaN was not finite, rather than not asked for: the log says NaN to both.

    It was not finite if other layers have the statistic at this step, or if this record has no number at all.
    """
    values = rows[statistic]
    at_this_step = values.notna().groupby(rows.step).transform("any")
    lost = rows[[c for c in _USUAL if c in rows] or [statistic]].isna().all(axis=1)
    return values.notna() | at_this_step | lost


def expected(theory: pd.DataFrame | None, what: Quantity, layers: Sequence[str]) -> pd.Series:
    """What the theory (`nfzoo.theory.profile`) says of these layers, in their order; layers it is silent on are NaN."""
    if theory is None or what.statistic not in theory:
        return pd.Series(np.nan, index=layers)
    rows = theory[theory.kind == what.kind].drop_duplicates("layer").set_index("layer")
    return rows[what.statistic].reindex(layers)


def select_all(
    logs: Mapping[str, pd.DataFrame], panels: Sequence[str | Quantity]
) -> list[tuple[Quantity, dict[str, Grid]]]:
    """Take quantities from every log.

    Raises:
        ValueError: if no log has any of them; it says what the logs have.
    """
    chosen = [quantity(name) for name in panels]
    found = [(what, {title: select(log, what) for title, log in logs.items()}) for what in chosen]
    if all(grid.empty for _, grids in found for grid in grids.values()):
        wanted = sorted({f"{what.statistic} of kind {what.kind!r}" for what in chosen})
        kinds = sorted({str(kind) for log in logs.values() for kind in log.kind.unique()})
        raise ValueError(
            f"Expected records of {', '.join(wanted)}. Received: logs with the kinds {', '.join(kinds)} only, or "
            "without these statistics; record them with nfzoo.SignalPropagation(what=…, statistics=…, taps=…)"
        )
    return found
