"""What is looked for, and how it is said: one generator of findings per check, in the table `CHECKS`."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import keras
import pandas as pd

from nfzoo import agc
from nfzoo.alarms import alarms, stream
from nfzoo.optimizers import clipping_of

PROBE = 128
NORMALIZATIONS = (keras.layers.BatchNormalization,)


@dataclass(frozen=True)
class Finding:
    """One thing that was seen.

    Attributes:
        severity: "alarm" (training is lost, or as good as), "warning" (it is hampered), "note", or "good".
        check: name of the check that found it.
        sentence: what was seen, with its numbers and the bound it was compared with.
        remedy: what to do about it; empty where nothing is to be done.
    """

    severity: str
    check: str
    sentence: str
    remedy: str = ""


@dataclass(frozen=True)
class Case:
    """What the checks see.

    Attributes:
        model: the network, its weights as they were before the steps.
        log: table of signal propagation at every layer, at initialisation and after the steps.
        losses: of every step.
        start, end, inference: loss of the probe batch before the steps and after them, normalized as in training; and
            after them, as in inference.
        batch_size: examples per step.
        classes: of the classifier; None where the loss does not tell.
        probe: examples of the probe batch.
    """

    model: keras.Model
    log: pd.DataFrame
    losses: list[float]
    start: float
    end: float
    inference: float
    batch_size: int
    classes: int | None
    probe: int = PROBE

    def at(self, kind: str, last: bool = False) -> pd.DataFrame:
        """Records of a kind at the first or at the last measurement, in the order of the network."""
        rows = self.log[self.log.step == (self.log.step.max() if last else self.log.step.min())]
        return rows[rows.kind == kind].sort_values("depth", kind="stable")

    def normalizations(self) -> list[keras.Layer]:
        """Layers that normalize by the batch's statistics: frozen ones take their moving averages."""
        layers = self.model._flatten_layers()
        return [layer for layer in layers if isinstance(layer, NORMALIZATIONS) and layer.trainable]


CHECKS: dict[str, Callable[[Case], Iterator[Finding]]] = {}


def check(function: Callable[[Case], Iterator[Finding]]) -> Callable[[Case], Iterator[Finding]]:
    """Register a check: a generator of findings about a case."""
    CHECKS[function.__name__] = function
    return function


REMEDIES = {
    "NaN origin": "Use a smaller learning rate, clip gradients (nfzoo.AGC), look for log(0) and division by zero.",
    "explosion": "Residual sums add up: weigh the branches (an nf_, skipinit_, fixup_ or rescale_ network), normalize, "
    "or use a smaller gain in the initialisation.",
    "collapse": "Use an initialisation that keeps the variance of this activation (He for ReLU, LeCun for SELU), with "
    "the fan-in that a unit really has, or normalize.",
    "mean shift": "Standardize weights (an nf_ network), centre the activation, or normalize.",
    "dead block": "Use a smaller learning rate, or an activation that has a gradient on both sides.",
    "vanishing gradients": "Add residual connections, or an initialisation that keeps the variance.",
}


@check
def alarms_of_the_log(case: Case) -> Iterator[Finding]:
    """The alarms that the callback gives while training."""
    for alarm in alarms(case.log):
        yield Finding(alarm.severity, alarm.kind, alarm.sentence, REMEDIES.get(alarm.kind, ""))


@check
def depth(case: Case) -> Iterator[Finding]:
    """How the signal and the gradient change over the depth of the network, at initialisation."""
    for kind, what in (("activation", "signal"), ("gradient", "gradient")):
        rows = stream(case.at(kind), kind).iloc[:: -1 if kind == "gradient" else 1]  # each in its own direction
        values = rows.second_moment[rows.second_moment > 0]
        if len(values) < 3:
            continue
        first, last, span = values.iloc[0], values.iloc[-1], values.max() / values.min()
        text = f"At initialisation the mean square of the {what} is {first:.2g} at {rows.layer[values.index[0]]} and "
        text += f"{last:.2g} at {rows.layer[values.index[-1]]}, over {len(values)} layers"
        if span < 100:
            yield Finding("good", "depth", f"{text}: level within a factor of {span:.2g}.")
        else:
            per = (last / first) ** (1 / (len(values) - 1))
            yield Finding("note", "depth", f"{text}, a factor of {per:.2g} per layer; it spans a factor of {span:.2g}.")


@check
def initialisation(case: Case) -> Iterator[Finding]:
    """Whether each layer's weights have the variance that keeps the signal's, by the fan-in a unit really has."""
    rows = pd.concat([case.at("effective_weight"), case.at("weight")]).drop_duplicates("layer")
    squares = dict(zip(rows.layer, rows.second_moment, strict=True))
    hidden = bool(case.normalizations())
    comment = " Batch normalization hides it, as long as it is there." if hidden else ""
    severity, thin, odd = "note" if hidden else "warning", {}, {}
    for path, (square, fan_in, channels) in _kernels(case.model, squares).items():
        gain = square * fan_in
        if channels >= 8 and 0.5 <= gain * channels <= 2.5:
            thin[path] = channels
        elif gain and not 0.1 <= gain <= 10:
            odd[path] = gain
    if thin:
        path, channels = next(iter(thin.items()))
        yield Finding(
            severity, "initialisation",
            f"The initialisation of {_some(list(thin))} divides the variance by the number of channels: in a depthwise "
            "layer a unit sees one channel, but these were initialised as if it saw all of them "
            f"({channels} in {path}).{comment}",
            "Take the kernel's height times width as fan-in, as nfzoo's variants do; in Keras: RandomNormal(stddev="
            "sqrt(gain / (height * width))).",
        )  # fmt: skip
    if odd:
        path = min(odd, key=lambda p: -abs(math.log(odd[p])))
        yield Finding(
            severity, "initialisation",
            f"Weights of {_some(list(odd))} do not keep the variance: {path} multiplies it by {odd[path]:.2g} (0.1 to "
            f"10 is let pass; 1 keeps it, 2 makes up for ReLU).{comment}",
            "Initialise with variance 1 / fan-in (LeCun), or 2 / fan-in before ReLU (He).",
        )  # fmt: skip


def _kernels(model: keras.Model, squares: dict[str, float]) -> dict[str, tuple[float, int, int]]:
    """Path -> mean square of the weights, fan-in of a unit, and channels if the layer is depthwise, else 1."""
    owner, found = agc.owners(model), {}
    for variable in model.trainable_variables:
        layer = owner[variable.path]
        axes = agc.fan_in_axes(layer, variable)
        if variable.path in squares and axes and len(variable.shape) >= 2:
            fan_in = math.prod(variable.shape[axis] for axis in axes)
            wide = isinstance(layer, keras.layers.DepthwiseConv1D | keras.layers.DepthwiseConv2D)
            grouped = getattr(layer, "groups", 1)
            channels = variable.shape[-2] if wide else grouped if grouped == variable.shape[-1] else 1
            found[variable.path] = (squares[variable.path], fan_in, channels)
    return found


@check
def dead_units(case: Case) -> Iterator[Finding]:
    """Channels that are zero for every example and pixel."""
    rows = case.at("activation", last=True)
    rows = rows[(rows.place == "activation") & (rows.dead > 0.3)]
    if len(rows):
        worst = rows.loc[rows.dead.idxmax()]
        yield Finding(
            "warning", "dead units",
            f"After the steps {worst.dead:.0%} of the channels of {worst.layer} are zero for all {case.probe} examples "
            f"(30 % is let pass){_more(len(rows))}.",
            "Use a smaller learning rate, or an activation with a gradient on both sides (SELU, GELU, SiLU).",
        )  # fmt: skip


@check
def updates(case: Case) -> Iterator[Finding]:
    """Size of a step: about a thousandth of the weight is usual (Karpathy, CS231n notes, "Ratio of updates")."""
    rows = case.at("weight", last=True)
    if "update_to_weight" not in rows:
        return
    zero = set(case.at("weight").query("second_moment == 0").layer)
    rows = rows[~rows.layer.isin(zero)].dropna(subset="update_to_weight")
    if rows.empty:
        return
    typical, worst = rows.update_to_weight.median(), rows.loc[rows.update_to_weight.idxmax()]
    text = f"The last step changed weights by {typical:.1e} of their norm (median over layers), at most by "
    text += f"{worst.update_to_weight:.1e} ({worst.layer})"
    if worst.update_to_weight > 0.1:
        remedy = "Use a smaller learning rate, or AGC."
        yield Finding("warning", "updates", f"{text}; 1e-3 is usual, 1e-1 a lot.", remedy)
    elif typical < 1e-5:
        yield Finding("warning", "updates", f"{text}; 1e-3 is usual, 1e-5 very little.", "Use a larger learning rate.")
    else:
        yield Finding("good", "updates", f"{text}; 1e-3 is usual.")


@check
def clipping(case: Case) -> Iterator[Finding]:
    """How much AGC clips, where the model has it."""
    rows = case.at("weight_gradient", last=True)
    clip, units = clipping_of(case.model)
    rows = rows[[units.get(path) is not None for path in rows.layer]]
    if not len(rows) or "agc_clipped" not in rows:
        return
    share = rows.agc_clipped.mean()
    text = f"AGC with factor {clip.clip_factor:g} clips {share:.0%} of the units of a layer on average"
    if share > 0.9:
        yield Finding("warning", "clipping", f"{text}: its factor decides the step.", "Use a larger clip factor.")
    else:
        yield Finding("note", "clipping", f"{text}.")


@check
def batch_statistics(case: Case) -> Iterator[Finding]:
    """What batch normalization makes of the batch, and of inference."""
    layers = case.normalizations()
    if not layers:
        text = "No layer normalizes over the batch: examples do not influence each other."
        yield Finding("good", "batch statistics", text)
        return
    sizes = [_pixels(layer) for layer in layers]
    if None in sizes:
        yield Finding("note", "batch statistics", f"{len(layers)} layers normalize over the batch.")
        return
    least = case.batch_size * min(sizes)
    text = f"{len(layers)} layers normalize over the batch; the smallest takes its variance from {least} values, which "
    text += f"makes it {100 * math.sqrt(2 / max(least - 1, 1)):.0f} % uncertain (normal values)"
    if least < 32:
        remedy = "Use larger batches, group normalization (gn_) or a normalizer-free network (nf_, sn_)."
        yield Finding("warning", "batch statistics", f"{text}; fewer than 32 are too few.", remedy)
    else:
        yield Finding("note", "batch statistics", f"{text}.")
    if math.isfinite(case.end) and not case.inference < 1.5 * case.end + 0.1:
        steps, momentum = len(case.losses), max(layer.momentum for layer in layers)
        yield Finding(
            "warning", "moving averages",
            f"The same images have a loss of {case.end:.3g} with the statistics of their batch and of "
            f"{case.inference:.3g} in inference: after {steps} steps the moving averages still hold "
            f"{momentum**steps:.0%} of what they started with (momentum {momentum:g}).",
            "Judge validation figures only after some 5 / (1 - momentum) steps, or use a smaller momentum.",
        )  # fmt: skip


@check
def loss(case: Case) -> Iterator[Finding]:
    """Whether the loss starts where guessing does, and falls."""
    chance = math.log(case.classes) if case.classes and case.classes > 1 else None
    told = f" (guessing: {chance:.3g})" if chance else ""
    bad = [step for step, value in enumerate((*case.losses, case.end), 1) if not math.isfinite(value)]
    if bad:
        yield Finding(
            "alarm",
            "loss",
            f"The loss is not finite from step {min(bad[0], len(case.losses))} on.",
            REMEDIES["NaN origin"],
        )
        return
    if chance and case.start > 1.5 * chance:
        yield Finding(
            "warning", "loss",
            f"The loss of the new network is {case.start:.3g}{told}: the classifier starts with strong opinions.",
            "Initialise the classifier with small weights or zeros.",
        )  # fmt: skip
    text = f"The loss of the probe batch went from {case.start:.3g} to {case.end:.3g} in {len(case.losses)} steps{told}"
    if case.end > 0.995 * case.start:
        yield Finding("warning", "loss", f"{text}: it does not fall.", "Try other learning rates: nfzoo scan.")
    else:
        yield Finding("good", "loss", f"{text}.")


def _pixels(layer: keras.Layer) -> int | None:
    """Positions of a map that a layer takes; None where its graph does not tell."""
    try:
        shape = layer.input.shape[1:-1]
    except (AttributeError, ValueError):  # of a subclassed model
        return None
    return None if None in shape else math.prod(shape)


def _some(paths: list[str]) -> str:
    """A few of many names."""
    shown = ", ".join(paths[:3])
    return shown if len(paths) <= 3 else f"{shown} and {len(paths) - 3} more"


def _more(count: int) -> str:
    return "" if count < 2 else f", and more than that of {count - 1} other layer{'s' if count > 2 else ''}"
