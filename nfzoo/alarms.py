"""What is wrong with a signal: alarms from a log of signal propagation. pandas only, no Keras.

Explosion, collapse, mean shift and vanishing gradients are judged on the stream: the outputs of blocks and merges where
the log has any, else every layer but the last, which is the classifier. Branches are left out there because Fixup makes
them zero on purpose at initialisation.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

ALARM, WARNING = "alarm", "warning"
STREAM = ("block", "merge")
_MORE_THAN_FIRST = 3
_VALUES = ("second_moment", "acv", "acsm", "mean", "norm")


@dataclass(frozen=True)
class Threshold:
    """When an alarm of one kind is given.

    Attributes:
        severity: "alarm" (training is lost, or as good as) or "warning" (it is hampered).
        bound: what `value` is compared with.
        value: what is compared.
        reason: why this bound.
    """

    severity: str
    bound: float
    value: str
    reason: str


# Measured at initialisation: the variants of ResNet-50 (64 px), EfficientNet-B0 (digits, 32 px) and the test rows.
THRESHOLDS: dict[str, Threshold] = {
    "NaN origin": Threshold(
        ALARM, 0, "number of layers whose values are not finite",
        "no optimizer recovers from a value that is not finite",
    ),
    "explosion": Threshold(
        ALARM, 1e4, "second moment over the least one of an earlier layer, or, outside the range that the "
        "stream had at the start, over the layer's own there",
        "healthy networks stay below 12, and NF-ResNet-600 with alpha 1 below 52 (1 + 50 alpha²); ResNet-50 without "
        "any normalization reaches 3e4",
    ),
    "collapse": Threshold(
        ALARM, 1e-6, "second moment over the largest one of an earlier layer, or, outside the range that the "
        "stream had at the start, over the layer's own there",
        "healthy networks keep 2e-2, and those that see 2x2 maps through 5x5 filters, mostly padding, 5e-5, which they "
        "make good within an epoch; EfficientNet-B0 without normalization keeps 1e-10 and learns nothing",
    ),
    "mean shift": Threshold(
        WARNING, 4.0, "average channel squared mean over average channel variance, where this ratio or the squared "
        f"mean is also {_MORE_THAN_FIRST} times the first layer's",
        "channels carry four times more constant than signal, and blocks have added to it: batch normalization keeps "
        "the ratio below 1, a rectified normal variable has 0.47, unnormalised ReLU networks reach 5 to 8 (NF-ResNet "
        "paper, arXiv 2101.08692, section 3); a stem that ends in max-pooling has 5 of its own",
    ),
    "dead block": Threshold(
        ALARM, 0.0, "variance over the second moment",
        "an output that is zero, or the same for all inputs, passes no signal on; a branch may be so at initialisation "
        "(Fixup, zero gamma), not after training",
    ),
    "vanishing gradients": Threshold(
        ALARM, 1e-8, "second moment of the gradient over the largest one of a later layer",
        "gradients of early layers are 10,000 times smaller than those of late ones; healthy networks keep 3e-2, on "
        "tiny maps 4e-6, and EfficientNet-B0 without normalization 8e-12",
    ),
}  # fmt: skip
# Below this share of the second moment a variance is rounding: float32 keeps 24 bits of a value.
_CONSTANT = 1e-10


@dataclass(frozen=True)
class Alarm:
    """One thing that is wrong.

    Attributes:
        kind: key of `THRESHOLDS`. severity: "alarm" or "warning".
        layer, step, epoch: where it was first seen.
        value, threshold: what was measured there, and the bound.
        sentence: all of it in words.
    """

    kind: str
    severity: str
    layer: str
    step: int
    epoch: int
    value: float
    threshold: float
    sentence: str


def alarms(log: pd.DataFrame) -> list[Alarm]:
    """Judge a log.

    The alarms of a log are also those of any longer one that begins with it: pass all records so far, and what is new
    in the result is news.

    Args:
        log: table of `nfzoo.spp.read`, `nfzoo.spp.snapshot` or `SignalPropagation.table`; statistics that it lacks
            are not judged.

    Returns:
        At most one alarm of each kind, in the order of `THRESHOLDS`: at the first step, and there at the first layer in
        the direction of the signal, where the bound is passed.

    Example:
        >>> rows = [{"kind": "activation", "place": "block", "layer": f"block{i}", "depth": i, "step": 0, "epoch": 0,
        ...          "acsm": 0.0, "acv": 10.0**-i, "second_moment": 10.0**-i} for i in range(8)]
        >>> [alarm] = alarms(pd.DataFrame(rows))
        >>> alarm.kind, alarm.layer
        ('collapse', 'block7')
    """
    if log.empty:
        return []
    log = _complete(log)
    found = (judge(log) for judge, needed in _JUDGES.items() if needed <= set(log.columns))
    return [alarm for alarm in found if alarm]


def _complete(log: pd.DataFrame) -> pd.DataFrame:
    """Fill in the columns that the judges take for granted, sort by time and depth."""
    defaults = {"step": 0, "epoch": 0, "source": "probe", "depth": 0, "place": "layer"}
    log = log.assign(**{name: value for name, value in defaults.items() if name not in log})
    log["source"] = log["source"].fillna("probe")
    log = log.replace([math.inf, -math.inf], math.nan)
    return log.sort_values(["step", "source", "depth"], kind="stable", ignore_index=True)


def stream(log: pd.DataFrame, kind: str = "activation") -> pd.DataFrame:
    """Rows of the signal's main path: blocks and merges, or, without any, all layers but the last.

    Args:
        log: table with kind, place, depth. kind: "activation" or "gradient".

    Example:
        >>> log = pd.DataFrame({"kind": "activation", "place": ["block", "branch", "block"], "depth": [0, 1, 2]})
        >>> stream(log).depth.tolist()
        [0, 2]
    """
    rows = log[log.kind == kind]
    main = rows[rows.place.isin(STREAM)]
    return rows[rows.depth < rows.depth.max()] if main.empty else main


def _first(rows: pd.DataFrame, from_the_end: bool = False) -> tuple[pd.Series, int] | None:
    """The row where the signal meets the trouble first, and how many layers have it at that step."""
    if rows.empty:
        return None
    rows = rows[rows.step == rows.step.min()]
    return rows.sort_values("depth", kind="stable").iloc[-1 if from_the_end else 0], rows.layer.nunique()


def _when(row: pd.Series) -> str:
    return "at initialisation" if row.step == 0 else f"at step {int(row.step)} (epoch {int(row.epoch)})"


def _others(count: int) -> str:
    return "" if count < 2 else f" {count - 1} other layer{' is' if count == 2 else 's are'} beyond it, too."


def _alarm(kind: str, row: pd.Series, value: float, text: str, step: int | None = None) -> Alarm:
    threshold = THRESHOLDS[kind]
    sentence = f"{kind[0].upper()}{kind[1:]}: {text}"
    place = (row.layer, int(row.step if step is None else step), int(row.epoch))
    return Alarm(kind, threshold.severity, *place, float(value), threshold.bound, sentence)


def _change(log: pd.DataFrame, kind: str, extreme: str, beyond: Callable) -> Alarm | None:
    """Explosion or collapse: by depth within a measurement, or of one layer since the start.

    A layer that grows into the range that the stream had at the start recovers, it does not explode.
    """
    bound, rows = THRESHOLDS[kind].bound, stream(log)
    positive = rows.second_moment.where(rows.second_moment > 0)
    measured, layers = [rows.step, rows.source], [rows.layer, rows.source]
    before = positive.groupby(measured).transform(lambda values: getattr(values, extreme)().ffill().shift())
    rows = rows.assign(by_depth=rows.second_moment / before)
    start = positive.groupby(layers).transform("first")
    rows["in_time"] = rows.second_moment / start
    outside = beyond(rows.second_moment, start.groupby(rows.source).transform("max" if bound > 1 else "min"))
    found = _first(rows[beyond(rows.by_depth, bound) | outside & beyond(rows.in_time, bound)])
    if found is None:
        return None
    row, count = found
    deep = beyond(row.by_depth, bound)
    value, against = (row.by_depth, "an earlier layer's") if deep else (row.in_time, "its own at the start")
    text = (
        f"the second moment of {row.layer} is {row.second_moment:.3g} {_when(row)}, {value:.2g} times {against}; the "
        f"alarm is given {'above' if beyond is operator.gt else 'below'} {bound:g} times.{_others(count)}"
    )
    return _alarm(kind, row, value, text)


def _explosion(log: pd.DataFrame) -> Alarm | None:
    return _change(log, "explosion", "cummin", operator.gt)


def _collapse(log: pd.DataFrame) -> Alarm | None:
    return _change(log, "collapse", "cummax", operator.lt)


def _mean_shift(log: pd.DataFrame) -> Alarm | None:
    rows = stream(log)
    rows = rows[rows.acv > _CONSTANT * rows.second_moment]
    rows = rows.assign(ratio=rows.acsm / rows.acv)
    first = rows.groupby(["step", "source"])[["acsm", "ratio"]].transform("first")
    added = (rows[["acsm", "ratio"]] > _MORE_THAN_FIRST * first).any(axis=1)
    bound = THRESHOLDS["mean shift"].bound
    found = _first(rows[(rows.ratio > bound) & added])
    if found is None:
        return None
    row, count = found
    text = (
        f"the channels of {row.layer} have a squared mean of {row.acsm:.3g} beside a variance of {row.acv:.3g} "
        f"{_when(row)}, {row.ratio:.1f} times as much; the warning is given above {bound:g} times.{_others(count)}"
    )
    return _alarm("mean shift", row, row.ratio, text)


def _dead_block(log: pd.DataFrame) -> Alarm | None:
    # A branch that is zero at initialisation is meant to be; one that still is after training is dead.
    branches = log[(log.kind == "activation") & (log.place == "branch") & (log.step > 0)]
    rows = pd.concat([stream(log), branches])
    found = _first(rows[rows.acv <= _CONSTANT * rows.second_moment])
    if found is None:
        return None
    row, count = found
    what = "zero" if row.second_moment == 0 else f"constant (second moment {row.second_moment:.3g}, no variance)"
    text = f"the output of {row.layer} is {what} for all inputs {_when(row)}.{_others(count)}"
    return _alarm("dead block", row, 0.0, text)


def _vanishing_gradients(log: pd.DataFrame) -> Alarm | None:
    rows = stream(log, "gradient").iloc[::-1]
    later = rows.second_moment.groupby([rows.step, rows.source]).transform(lambda values: values.cummax().shift())
    # Where all later gradients are zero too, a classifier that starts at zero stops them; that ends after one step.
    rows = rows.assign(ratio=rows.second_moment / later.where(later > 0))
    bound = THRESHOLDS["vanishing gradients"].bound
    found = _first(rows[rows.ratio < bound], from_the_end=True)
    if found is None:
        return None
    row, count = found
    text = (
        f"going back from the loss, the gradient at {row.layer} has a second moment of {row.second_moment:.3g} "
        f"{_when(row)}, {row.ratio:.2g} times that of a later layer; the alarm is given below {bound:g} times."
    )
    return _alarm("vanishing gradients", row, row.ratio, text + _others(count))


def _nan_origin(log: pd.DataFrame) -> Alarm | None:
    rows = log[log.kind != "parameter"]
    live = rows[rows.first_bad >= 0] if "first_bad" in rows else rows.iloc[:0]
    if not live.empty:
        rows, exact = live.assign(bad_step=live.first_bad), True
    else:
        rows, exact = rows[_bad(rows)].assign(bad_step=lambda r: r.step), False
    if rows.empty:
        return None
    rows = rows[rows.bad_step == rows.bad_step.min()]
    # Activations come before gradients in a step, and these before the weights that they change.
    order = {"activation": 0, "gradient": 1, "weight_gradient": 2}
    first = rows.kind.map(order).fillna(3)
    rows = rows[first == first.min()]
    kind = rows.kind.iloc[0]
    row = rows.sort_values("depth", kind="stable").iloc[-1 if "gradient" in kind else 0]
    kind = kind.replace("weight_gradient", "gradient")
    what = {"activation": "output", "gradient": "gradient"}.get(kind, "weight")
    if exact:
        when = f"at step {int(row.bad_step)}"
    else:
        before = log.step[log.step < row.step]
        when = f"between step {before.max()} and {row.step}" if len(before) else _when(row)
    place = "the last in depth, from where it runs back" if what == "gradient" else "the first in depth"
    text = f"the {what} of {row.layer} is the first value that is not finite, {when} ({place} of {len(rows)})."
    return _alarm("NaN origin", row, len(rows), text, step=row.bad_step)


def _bad(rows: pd.DataFrame) -> pd.Series:
    """Whether a row's values are not finite. A statistic that no row like it has was not asked for."""
    values = [name for name in _VALUES if name in rows]
    bad = pd.Series(False, rows.index)
    for _, group in rows.groupby(["kind", "source"]):
        known = [name for name in values if group[name].notna().any()] or values
        bad[group.index] = group[known].isna().any(axis=1)
    return bad


# What is judged, and the statistics that it takes.
_JUDGES: dict[Callable, set[str]] = {
    _nan_origin: set(),
    _explosion: {"second_moment"},
    _collapse: {"second_moment"},
    _mean_shift: {"acsm", "acv", "second_moment"},
    _dead_block: {"acv", "second_moment"},
    _vanishing_gradients: {"second_moment"},
}
